"""The qualitative figure: what the rows of a table predict on the same images, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathsegdiff.data.image import read_label_image
from pathsegdiff.data.manifest import Dataset
from pathsegdiff.errors import MALFORMED, RunError
from pathsegdiff.evaluation.compare import METRICS_FILE
from pathsegdiff.evaluation.overlays import background_class, comparison
from pathsegdiff.evaluation.pictures import save_picture
from pathsegdiff.pipeline.page import number, write_table
from pathsegdiff.pipeline.tables.finished import known_signature
from pathsegdiff.pipeline.tables.rows import ROWS, Job
from pathsegdiff.segmentation.scoring import PREDICTIONS_FOLDER

PICTURE_FILE = "qualitative.png"


def table_of(dataset: str, folder: Path) -> tuple[str, Path]:
    """The table that shows a data set, and the folder of its runs.

    Args:
        dataset: Its name.
        folder: Of all tables.

    Returns:
        "table2" or "table4": the first that was made for this data set; that of the paper's data
        where none was, Table 4 for other data.
    """
    for table in ("table4", "table2"):
        try:
            known = known_signature(folder / table)
        except RunError:
            continue  # another command will say that it is damaged
        if known is not None and known.get("--dataset") == dataset:
            return table, folder / table
    table = "table2" if dataset == "bcss" else "table4"
    return table, folder / table


def scored_rows(runs: Path, *, split: str, seed: int) -> list[str]:
    """Names of the ``ROWS`` that have a scored run, in their order."""
    return [name for name in ROWS if (_scored(runs, name, split, seed) / METRICS_FILE).is_file()]


def draw_qualitative(
    dataset: Dataset,
    runs: Path,
    out: Path,
    *,
    rows: Sequence[str] = (),
    split: str,
    seed: int = 0,
    images: Sequence[str] = (),
    count: int = 4,
    made_with: str,
) -> tuple[Path, list[str]]:
    """Draw a line of tiles for each image: image, truth, and the prediction of every row.

    Beside qualitative.png: table.md and table.csv with each image's Dice, and report.html.

    Args:
        dataset: Open; the images and their truth are read from it.
        runs: Folder of a table: ``runs/ROW-seedN/eval-SPLIT``.
        out: Folder of the picture.
        rows: Names of ``ROWS``; empty for those that have a scored run, in their order.
        split: That was scored.
        seed: Of the runs.
        images: Sample ids; empty for ``count`` from the worst to the best of the first row.
        count: Images, from 1.
        made_with: What the runs have in common, for readers.

    Returns:
        The picture, and the sample ids in it.

    Raises:
        RunError: If a row or an image has no prediction.
        DataError: If an image cannot be read.
    """
    there = scored_rows(runs, split=split, seed=seed)
    scored = {name: _scored(runs, name, split, seed) for name in ROWS}
    rows = list(rows) or there
    missing = [name for name in rows if name not in there]
    if missing or not rows:
        raise RunError(
            f"{runs} has no scored run of {missing[0] if missing else 'any row'} with seed {seed} "
            f"on {split}; make it with `psd reproduce` (--runs names another folder)"
        )
    dice = {name: _dice(scored[name] / METRICS_FILE) for name in rows}
    chosen = list(images) or _spread(dice[rows[0]], count)
    known = {sample.sample_id: sample for sample in dataset.samples}
    scheme = dataset.scheme
    lines = []
    for sample_id in chosen:
        if sample_id not in known or any(sample_id not in found for found in dice.values()):
            raise RunError(f"image {sample_id!r} is not among those of {split} that were scored")
        region = dataset.read(known[sample_id])
        predictions = {}
        for name in rows:
            file = scored[name] / PREDICTIONS_FOLDER / f"{sample_id}.png"
            if not file.is_file():
                raise RunError(f"{file} is missing: score the run again, with `psd eval`")
            title = f"{_title(name)} ({dice[name][sample_id]:.2f})"
            predictions[title] = read_label_image(file)
        lines.append(
            comparison(
                region.image,
                region.label,
                predictions,
                names=scheme.names,
                colours=scheme.colours,
                background=background_class(scheme.names),
                title=f"{sample_id} (in brackets: Dice)",
            )
        )
    width = max(line.shape[1] for line in lines)
    padded = [
        np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255)
        for line in lines
    ]
    out.mkdir(parents=True, exist_ok=True)
    table = [
        ["image", *(f"Dice, {_title(name)}" for name in rows)],
        *([sample_id, *(number(dice[name][sample_id]) for name in rows)] for sample_id in chosen),
    ]
    ranked = "the worst" if len(chosen) == 1 else "from the worst to the best"
    chosen_how = "as asked for" if images else f"{ranked} of {_title(rows[0])}"
    notes = [
        f"Images of {split} of {dataset.name}, {chosen_how}; runs with seed {seed}, of {runs}: "
        f"{made_with}.",
        f"The picture holds pixels of {dataset.name}: its licence is theirs "
        f"({dataset.manifest.licence}).",
    ]
    write_table(
        out,
        f"What the rows predict on {dataset.name}",
        table,
        notes,
        lambda file: save_picture(file, np.concatenate(padded)),
        "Each line an image: image, truth, and the prediction of every row",
        reports=[scored[name] / "report.html" for name in rows],
        picture=PICTURE_FILE,
    )
    return out / PICTURE_FILE, chosen


def _scored(runs: Path, name: str, split: str, seed: int) -> Path:
    """Folder of a row's evaluation."""
    return runs / "runs" / Job(row=name, seed=seed).name / f"eval-{split}"


def _title(name: str) -> str:
    """Short enough for a tile."""
    return "PathSegDiff" if name == "conditioned" else name


def _dice(file: Path) -> dict[str, float]:
    """By sample id; images without one (no pixel counts) are left out."""
    try:
        metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(image["sample_id"]): float(image["dice"])
            for image in metrics["images"]
            if image["dice"] is not None
        }
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{file} is damaged ({reason:.200}); score the run again") from None


def _spread(dice: dict[str, float], count: int) -> list[str]:
    """Sample ids from the worst to the best, evenly in between."""
    ordered = sorted(dice, key=lambda name: (dice[name], name))
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]
