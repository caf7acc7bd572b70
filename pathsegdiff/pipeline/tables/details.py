"""What stands below a table on its page: single classes, the worst and best images, each run."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.compare import read_scored
from pathsegdiff.pipeline.page import Section, number
from pathsegdiff.pipeline.tables.plots import TableRow

#: Images that are named at each end.
_ENDS = 3


def sections_of(rows: Sequence[TableRow]) -> list[Section]:
    """Of the rows that have a run."""
    ours = [row for row in rows if row.runs]
    if not ours:
        return []
    return [
        Section(title="IoU of each class", text="Means over the runs.", lines=_classes(ours)),
        Section(
            title="Worst and best images",
            text="By the mIoU of each image, its mean over the runs that scored it. Every run's "
            "report shows its own, with truth, prediction and errors.",
            lines=_images(ours),
        ),
        Section(
            title="Figures of every run",
            text="As its metrics.json has them; beside it report.html, per_image.csv, overlays and "
            "predictions, and in the run's folder the settings (config.json) and the curve "
            "(log.csv).",
            lines=_runs(ours),
        ),
    ]


def _called(row: TableRow) -> str:
    return row.title if row.limit is None else f"{row.title}, {row.limit} images"


def _classes(rows: Sequence[TableRow]) -> list[list[str]]:
    names = list(dict.fromkeys(one["name"] for row in rows for one in row.runs[0]["per_class"]))
    lines = [["row", *names]]
    for row in rows:
        cells = []
        for name in names:
            found = [
                one["iou"] for run in row.runs for one in run["per_class"] if one["name"] == name
            ]
            values = [value for value in found if value is not None]
            cells.append(number(statistics.mean(values) if values else None))
        lines.append([_called(row), *cells])
    return lines


def _images(rows: Sequence[TableRow]) -> list[list[str]]:
    lines = [["row", "worst", "best"]]
    for row in rows:
        scores: dict[str, list[float]] = {}
        try:
            for run in row.runs:
                scored = read_scored(Path(run["path"]))
                for sample, miou in zip(scored.sample_ids, scored.miou, strict=True):
                    if not np.isnan(miou):
                        scores.setdefault(sample, []).append(float(miou))
        except RunError as error:  # scored by an older version
            lines.append([_called(row), str(error), ""])
            continue
        ranked = sorted((statistics.mean(values), sample) for sample, values in scores.items())
        ends = min(_ENDS, len(ranked) // 2)
        worst, best = ranked[:ends], ranked[len(ranked) - ends :][::-1]
        lines.append(
            [
                _called(row),
                *(
                    ", ".join(f"{sample} {miou:.3f}" for miou, sample in end)
                    for end in (worst, best)
                ),
            ]
        )
    return lines


def _runs(rows: Sequence[TableRow]) -> list[list[str]]:
    lines = [["run", "accuracy", "Dice", "mIoU", "F1", "training images", "minutes", "device"]]
    for row in rows:
        for run in row.runs:
            file = Path(run["path"])
            lines.append(
                [
                    f"{file.parent.parent.name}/{file.parent.name}",
                    *(number(run[name]) for name in ("accuracy", "dice", "miou", "f1")),
                    str(run["training_images"]),
                    f"{run['training_minutes']:.1f}",
                    run["device"],
                ]
            )
    return lines
