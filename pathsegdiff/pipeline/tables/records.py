"""What a table was computed from, small enough to be published beside it.

``records.tar.gz`` has settings.json and, of every finished run, what it was made with
(config.json), its curve (log.csv), how it ended (result.json), how its rate was chosen
(pilots.json) and its counts of pixels image by image (metrics.json): neither weights nor pixels.
Unpacked into a folder, ``psd reproduce ... --table-only`` makes the same table of it, ``psd
compare`` holds other runs against it, and the command without ``--table-only`` adds what is
missing.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from pathsegdiff.errors import MALFORMED, RunError
from pathsegdiff.files import write_archive
from pathsegdiff.pipeline.baselines.pilots import PILOTS_FILE, pilot_runs
from pathsegdiff.pipeline.tables.finished import SIGNATURE_FILE, is_finished
from pathsegdiff.pipeline.tables.rows import Job, TableSettings
from pathsegdiff.segmentation.runs import CONFIG_FILE, LOG_FILE, RESULT_FILE

RECORDS_FILE = "records.tar.gz"


def write_records(settings: TableSettings) -> Path | None:
    """Write the records of a table's finished runs; the same runs give the same bytes.

    Absolute paths in them (where images, stores and models lay) are cut down to their last name.

    Returns:
        The archive in the table's folder; None where no run is finished: nothing is written.

    Raises:
        RunError: If a file of a run is damaged.
    """
    files = [file for job in settings.jobs() for file in _files(settings, job)]
    if not files:
        return None
    archive = settings.out / RECORDS_FILE
    found = {
        file.relative_to(settings.folder).as_posix(): _content(file)
        for file in sorted([settings.folder / SIGNATURE_FILE, *files])
        if file.is_file()
    }
    write_archive(archive, found)
    return archive


def _files(settings: TableSettings, job: Job) -> list[Path]:
    """Of a finished run and of those that chose its rate; not every run has each of them."""
    if not is_finished(settings, job):
        return []
    run = settings.run(job)
    names = (CONFIG_FILE, LOG_FILE, RESULT_FILE, PILOTS_FILE)
    return [
        settings.metrics(job),
        *(folder / name for folder in (run, *pilot_runs(run)) for name in names),
    ]


def _content(file: Path) -> Path | bytes:
    """A file as it is, or JSON without paths."""
    if file.suffix != ".json":
        return file
    try:
        values = _without_paths(json.loads(file.read_text(encoding="utf-8")))
    except MALFORMED as error:
        raise RunError(
            f"{file} is damaged ({error!s:.300}); delete its folder and make the table again"
        ) from None
    return (json.dumps(values, indent=1) + "\n").encode()


def _without_paths(value: Any) -> Any:
    """A JSON value whose strings name no folder of this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith("psd "):  # a command, as the provenance has it
        try:
            words = shlex.split(value)
        except ValueError:
            words = value.split()
        return shlex.join(map(_last_name, words))
    return _last_name(value)


def _last_name(word: str) -> str:
    """``NAME`` of "/folder/NAME" and of "ENCODER=/folder/NAME"; anything else as it is."""
    if Path(word).is_absolute():
        return Path(word).name
    option, equals, path = word.partition("=")
    return f"{option}{equals}{Path(path).name}" if Path(path).is_absolute() else word
