"""What the columns of a table are, and how a run's metrics fill them."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pathsegdiff.pipeline.tables.published import COLUMNS, MEAN, PublishedTable

#: Classes of another data set that stand in the table of single classes.
_TOP_CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The figures of a table.

    Attributes:
        titles: By column, for people.
        plotted: The column that is drawn, and that differences are of.
        classes: Our class of each column of single classes; empty for the pooled metrics.
    """

    titles: dict[str, str]
    plotted: str
    classes: dict[str, str]

    def fits(self, table: PublishedTable) -> bool:
        """Whether published figures are of the same columns."""
        return self.classes == table.classes

    def figures(self, metrics: dict[str, Any]) -> dict[str, float | None]:
        """By column, from metrics.json; None of a class that neither is there nor predicted."""
        if not self.classes:
            return {column: metrics[column] for column in self.titles}
        known = {one["name"]: one["iou"] for one in metrics["per_class"]}
        found = {column: known.get(name) for column, name in self.classes.items()}
        values = [value for value in found.values() if value is not None]
        found[MEAN] = statistics.mean(values) if len(values) == len(found) else None
        return found


def columns_of(
    table: PublishedTable, *, same_dataset: bool, metrics: Sequence[dict[str, Any]]
) -> Columns:
    """The columns of a table.

    Args:
        table: The published one.
        same_dataset: Whether ours are of its data set; else the table of single classes has the
            four classes with the most pixels.
        metrics: Of the finished runs.
    """
    if not table.classes:
        return Columns(titles=dict(COLUMNS), plotted="miou", classes={})
    classes = table.classes
    if not same_dataset:
        pixels: Counter[str] = Counter()
        for found in metrics:
            pixels.update({one["name"]: one["pixels"] for one in found["per_class"]})
        classes = {name: name for name, _ in pixels.most_common(_TOP_CLASSES)}
    titles = {column: f"IoU {column}" for column in classes}
    mean = f"mIoU of {len(classes)}" if classes else "mIoU"
    return Columns(titles={**titles, MEAN: mean}, plotted=MEAN, classes=dict(classes))
