"""Finished runs are taken as they are, so they must be of the settings that a table asks for.

``settings.json`` in the table's folder says what its runs have in common, and every run's own
``config.json`` is held against what would be run now: a file can be lost, a model exchanged.
"""

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pathsegdiff.errors import MALFORMED, RunError
from pathsegdiff.pipeline.baselines.ddpmseg import TIMESTEPS
from pathsegdiff.pipeline.baselines.runs import weights_sha256
from pathsegdiff.pipeline.tables.rows import ROWS, Job, TableSettings
from pathsegdiff.segmentation.runs import CONFIG_FILE, RESULT_FILE, scored_step, write_json

#: In the table's folder.
SIGNATURE_FILE = "settings.json"
#: Options of ``train-head`` and ``baseline``, as config.json has them.
_SETTINGS = {
    "--split": "split",
    "--seed": "seed",
    "--fold": "fold",
    "--limit-images": "limit",
    "--val": "val",
    "--keep": "keep",
    "--steps": "steps",
    "--epochs": "epochs",
    "--minutes": "minutes",
    "--batch-size": "batch_size",
    "--size": "size_px",
    "--crop": "crop_px",
    "--lr": "learning_rate",
    "--schedule": "schedule",
    "--augment": "augment",
}


def is_finished(settings: TableSettings, job: Job) -> bool:
    """Whether a run was trained to its end and scored after that.

    Of files that cannot be read as what they should be it says that they are there: whoever reads
    them says what is wrong.
    """
    try:
        result, metrics = (
            json.loads(file.read_text(encoding="utf-8"))
            for file in (settings.run(job) / RESULT_FILE, settings.metrics(job))
        )
        return bool(result["kept"]["step"] == scored_step(metrics))
    except OSError:
        return False
    except MALFORMED:
        return True


def known_signature(out: Path) -> dict[str, Any] | None:
    """What every run in a table's folder has in common; None where there is none yet.

    Raises:
        RunError: If the file that says so is damaged.
    """
    file = out / SIGNATURE_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); choose another --out") from None
    if not isinstance(found, dict) or "--dataset" not in found:
        raise RunError(f"{file} is damaged; choose another --out")
    return found


def write_signature(settings: TableSettings) -> None:
    """Of all rows that the folder has seen: networks on images have no model."""
    known = _signature_of_work(settings.folder) or {}
    found = settings.signature()
    if known and found["--model"] == "none":
        found["--model"] = known["--model"]
    write_json(settings.folder / SIGNATURE_FILE, {**known, **found})


def refuse_others(settings: TableSettings, *, any_weights: bool = False) -> None:
    """Hold what is in a table's folder against what is asked for.

    Args:
        any_weights: Take networks whatever weights they began with.

    Raises:
        RunError: If the folder or a finished run was made with something else.
    """
    _refuse_another_signature(settings)
    digest = cache(weights_sha256)  # a file of half a gigabyte is read once
    precisions: dict[str, Path] = {}
    for job in settings.jobs():
        config = _config_of(settings, job)
        if config is None:
            continue
        try:
            _refuse_other_settings(settings, job, config)
            _refuse_another_dataset(settings, job, config)
            _refuse_another_model(settings, job, config)
            if not any_weights:
                file = settings.weights_of(job.row)
                _refuse_other_weights(settings, job, config, None if file is None else digest(file))
            precision = config["settings"].get("precision")
        except MALFORMED:
            continue  # the table will say that it is damaged
        if precision is not None:
            precisions.setdefault(str(precision), settings.run(job))
    if len(precisions) > 1:
        said = ", ".join(f"{run} in {name}" for name, run in sorted(precisions.items()))
        raise RunError(
            f"runs of one table were trained in different precisions: {said}; choose one with "
            "--precision, and delete the others or take another --out"
        )


def _signature_of_work(folder: Path) -> dict[str, Any] | None:
    """``known_signature`` of a folder that holds a run or a store; None where nothing was made."""
    work = (*folder.glob("runs/*"), *folder.glob("features/*"))
    return known_signature(folder) if work else None


def _refuse_another_signature(settings: TableSettings) -> None:
    known = _signature_of_work(settings.folder)
    if known is None:
        return
    for option, ours in settings.signature().items():
        theirs = known.get(option)
        unknown = option == "--model" and "none" in (ours, theirs)
        if option == "--unconditional" and option not in known:
            unknown = not any((settings.folder / "runs").glob("null-*"))
        if ours != theirs and not unknown:
            raise RunError(
                f"{settings.folder} was made with {option} {theirs}, this asks for {ours}; give "
                "the same, or choose another folder (--out, or --runs where there is such an "
                "option)"
            )


def _config_of(settings: TableSettings, job: Job) -> dict[str, Any] | None:
    """Of a finished run; None where it cannot be read: the table will say that it is damaged."""
    if not is_finished(settings, job):
        return None
    try:
        found = json.loads((settings.run(job) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, *MALFORMED):
        return None
    return found if isinstance(found, dict) else None


def _refuse_other_settings(settings: TableSettings, job: Job, config: dict[str, Any]) -> None:
    """A run must have what its own command would give it now."""
    asked = _options(settings.commands(job)[0])
    found = config["settings"]
    for option, name in _SETTINGS.items():
        if option not in asked and option not in ("--fold", "--limit-images"):
            continue
        ours, theirs = asked.get(option), found.get(name)
        if not _is_same(ours, theirs):
            raise RunError(
                f"{settings.run(job)} was made with {option} {theirs}, this asks for {ours}; "
                "delete it, or choose another --out"
            )
    if settings.precision != "auto" and found.get("precision", settings.precision) != (
        settings.precision
    ):
        raise RunError(
            f"{settings.run(job)} was trained in {found['precision']}, this asks for --precision "
            f"{settings.precision}; give the same, or choose another --out"
        )


def _options(command: Sequence[str]) -> dict[str, str]:
    """Option -> its value."""
    return {option: value for option, value in pairwise(command) if option.startswith("--")}


def _is_same(asked: str | None, found: Any) -> bool:
    """Whether a setting is one of those that an option names ("1e-3,1e-4"; "none")."""
    if asked is None or asked == "none":
        return found is None
    if isinstance(found, int | float):
        return any(float(part) == found for part in asked.split(","))
    return found == asked


def _refuse_another_dataset(settings: TableSettings, job: Job, config: dict[str, Any]) -> None:
    """Regions and labels of another manifest of this name."""
    ours = settings.dataset_sha256
    recipe = config["features"]["recipe"] if "features" in config else config
    theirs = recipe["dataset_sha256"]
    if ours is not None and theirs != ours:
        raise RunError(
            f"{settings.run(job)} was made from other regions or classes of "
            f"{settings.dataset_name} (sha256 {theirs!s:.12}, now {ours:.12}): its manifest was "
            "changed; choose another --out"
        )


def _refuse_other_weights(
    settings: TableSettings, job: Job, config: dict[str, Any], ours: str | None
) -> None:
    """A network that began with other weights is another row."""
    if ROWS[job.row].encoder is None:
        return
    theirs = config["settings"].get("encoder_weights")
    if theirs != ours:
        began, asked = (f"sha256 {x:.12}" if x else "none" for x in (theirs, ours))
        raise RunError(
            f"{settings.run(job)} began with other encoder weights ({began}) than this asks for "
            f"({asked}); choose another --out, or give the same --encoder-weights"
        )


def _refuse_another_model(settings: TableSettings, job: Job, config: dict[str, Any]) -> None:
    """A name is not enough: another model may bear it. Nor may features be of another time."""
    kind = ROWS[job.row].store
    if kind is None:
        return
    run = settings.run(job)
    if kind == "timesteps":
        theirs, times = config["network"].get("model_sha256"), config["network"]["timesteps"]
        wanted = list(TIMESTEPS)
    else:
        theirs, times = config["model"]["sha256"], [config["features"]["recipe"]["timestep"]]
        wanted = [settings.timestep]
    if times != wanted:
        raise RunError(
            f"{run} was made with features of t = {', '.join(map(str, times))}, this asks for "
            f"{', '.join(map(str, wanted))}; choose another --out"
        )
    ours = settings.model_sha256
    if kind == "none" and settings.unconditional is not None:
        ours = settings.unconditional_sha256
    if kind == "random":
        ours = settings.random_sha256
    if None not in (ours, theirs) and theirs != ours:
        raise RunError(
            f"{run} was made with another model of this name: sha256 {theirs!s:.12}, this asks "
            f"for {ours!s:.12}; choose another --out"
        )
