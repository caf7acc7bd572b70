"""The rows of a table as pictures: each beside the published one, and over the training images."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathsegdiff.pipeline.tables.published import PublishedRow


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line, of ours, of the paper's, or both.

    Attributes:
        name: Of ours in ``ROWS``, or the published one.
        title: For people.
        limit: Training images; None for all.
        runs: Of the finished runs: figures by column, and what ``psd eval`` wrote.
        planned: Runs.
        folds: How many of them have one seed.
        published: The paper's line, or None.
    """

    name: str
    title: str
    limit: int | None
    runs: tuple[dict[str, Any], ...]
    planned: int
    folds: int = 1
    published: PublishedRow | None

    def mean(self, column: str) -> float | None:
        """Over the runs; None where there are none, or one has no such figure."""
        values = self.values(column)
        return statistics.mean(values) if values else None

    def values(self, column: str) -> list[float]:
        """Of every run; none of them where one has no such figure."""
        found = [run[column] for run in self.runs]
        return [] if None in found else found

    @property
    def images(self) -> int:
        """That the first run was trained on."""
        return int(self.runs[0]["training_images"])

    def files(self) -> dict[int, list[Path]]:
        """Seed -> metrics.json of its runs, one for each fold; seeds of which all are there."""
        found: dict[int, list[Path]] = {}
        for run in self.runs:
            found.setdefault(run["seed"], []).append(Path(run["path"]))
        return {seed: files for seed, files in found.items() if len(files) == self.folds}

    def means_beside(self, other: "TableRow", column: str) -> tuple[float, float] | None:
        """Our mean and the other's, over the seeds and folds that both have; None without one."""
        ours, theirs = (
            {(run["seed"], run["fold"]): run[column] for run in row.runs} for row in (self, other)
        )
        pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
        if not pairs or any(None in pair for pair in pairs):
            return None
        first, second = (statistics.mean(values) for values in zip(*pairs, strict=True))
        return first, second

    def difference(self, column: str) -> float | None:
        """Ours less the published one."""
        ours = self.mean(column)
        theirs = None if self.published is None else self.published.figures.get(column)
        return None if ours is None or theirs is None else ours - theirs


def draw_rows(
    rows: list[TableRow], column: str, title: str, file: Path, *, published: bool
) -> None:
    """A figure of every row of ours, lowest to highest run, and the published one beside it.

    Args:
        published: Whether the published figures are of the same data; else they are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not published:
        rows = [row for row in rows if row.values(column)]
    figure = Figure(figsize=(7.5, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = row.values(column)
        if values:
            mean = statistics.mean(values)
            axes.errorbar(
                mean,
                place,
                xerr=[[mean - min(values)], [max(values) - mean]],
                fmt="o",
                color="#0072B2",
                capsize=4,
            )
        if published and row.published is not None and column in row.published.figures:
            axes.plot(row.published.figures[column], place, "x", color="#D55E00")
    few = any(row.limit is not None for row in rows)
    axes.set_yticks(
        range(len(rows)),
        [
            f"{row.title}, {row.limit or 'all'} images" if few and row.planned else row.title
            for row in rows
        ],
    )
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    crosses = "; crosses: published" if published else ""
    axes.set_xlabel(f"{title} (dots: ours, lowest to highest run{crosses})")
    FigureCanvasAgg(figure).print_png(str(file))


def draw_few_labels(rows: list[TableRow], column: str, title: str, file: Path) -> None:
    """A figure over the number of training images that there really were, lowest to highest run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in rows:
        values = row.values(column)
        if values:
            mean = statistics.mean(values)
            point = row.images, mean, mean - min(values), max(values) - mean
            lines.setdefault(row.name, []).append(point)
    for name, points in lines.items():
        x, means, low, high = (list(part) for part in zip(*sorted(points), strict=True))
        label = next(row.title for row in rows if row.name == name)
        axes.errorbar(x, means, yerr=[low, high], marker="o", capsize=3, label=label)
    counts = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="training images", ylabel=title)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(file))
