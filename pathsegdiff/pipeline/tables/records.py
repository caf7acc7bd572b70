"""What a table was computed from, small enough to be published beside it.

``records.tar.gz`` has settings.json and, of every finished run, what it was made with
(config.json), its curve (log.csv), how it ended (result.json) and its counts of pixels image by
image (metrics.json): neither weights nor pixels. Unpacked into a folder, ``psd reproduce ...
--table-only`` makes the same table of it, ``psd compare`` holds other runs against it, and the
command without ``--table-only`` adds what is missing.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from pathsegdiff.diffusion.pretrain.parcel import write_archive
from pathsegdiff.errors import MALFORMED, RunError
from pathsegdiff.pipeline.tables.finished import SIGNATURE_FILE, is_finished
from pathsegdiff.pipeline.tables.rows import TableSettings
from pathsegdiff.segmentation.runs import CONFIG_FILE, LOG_FILE, RESULT_FILE

RECORDS_FILE = "records.tar.gz"


def write_records(settings: TableSettings) -> Path | None:
    """Write the records of a table's finished runs; the same runs give the same bytes.

    Absolute paths in them (where images, stores and models lay) are cut down to their last name.

    Returns:
        The archive in the table's folder; None, and no archive, where no run is finished.

    Raises:
        RunError: If a file of a run is damaged.
    """
    archive = settings.out / RECORDS_FILE
    contents: dict[str, Path | bytes] = {}
    for job in settings.jobs():
        if is_finished(settings, job):
            run = settings.run(job)
            for folder in (run, *sorted(run.parent.glob(f"{run.name}-pilot-*"))):
                for name in (CONFIG_FILE, LOG_FILE, RESULT_FILE):
                    _add(contents, settings.folder, folder / name)
            _add(contents, settings.folder, settings.metrics(job))
    if not contents:
        archive.unlink(missing_ok=True)
        return None
    _add(contents, settings.folder, settings.folder / SIGNATURE_FILE)
    write_archive(archive, dict(sorted(contents.items())))
    return archive


def _add(contents: dict[str, Path | bytes], folder: Path, file: Path) -> None:
    """A file that may not be there: a run of an older version has no curve."""
    if not file.is_file():
        return
    name = file.relative_to(folder).as_posix()
    if file.suffix != ".json":
        contents[name] = file
        return
    try:
        content = _without_paths(json.loads(file.read_text(encoding="utf-8")))
    except MALFORMED as error:
        raise RunError(
            f"{file} is damaged ({error!s:.300}); delete its folder and make the table again"
        ) from None
    contents[name] = (json.dumps(content, indent=1) + "\n").encode()


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
