"""Two evaluations held against each other, as a table with a picture and as one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pathsegdiff.evaluation.compare import TITLES, Comparison, Scored
from pathsegdiff.evaluation.intervals import Interval
from pathsegdiff.pipeline.page import write_table

#: Images named at either end.
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure of both.

    Attributes:
        title: For people.
        first, second: Its values.
        interval: Of the first less the second.
    """

    title: str
    first: float
    second: float
    interval: Interval

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval.low > 0 or self.interval.high < 0


def differences(found: Comparison) -> list[Difference]:
    """Pooled metrics, then the IoU of every class."""
    pooled = [(TITLES[name], found.values[name], one) for name, one in found.differences.items()]
    classes = [
        (f"IoU {name}", found.class_values[name], one) for name, one in found.class_iou.items()
    ]
    return [
        Difference(title=title, first=first, second=second, interval=interval)
        for title, (first, second), interval in [*pooled, *classes]
    ]


def scope(first: Scored) -> str:
    """What was scored, and what the bootstrap draws."""
    return f"{first.part}, {len(first.sample_ids)} images, 95 % intervals over {first.drawn}"


def extremes(found: Comparison) -> list[str]:
    """On how many images the first is better, and where most and least; a line each."""
    ahead = sum(difference > 0 for _, difference in found.images)
    lines = [f"mIoU is higher in the first on {ahead} of {len(found.images)} images"]
    for title, images in (("most", found.images[:_SHOWN]), ("least", found.images[::-1][:_SHOWN])):
        named = ", ".join(f"{sample} {difference:+.3f}" for sample, difference in images)
        lines.append(f"{title}: {named}")
    return lines


def write_comparison(
    out: Path, names: tuple[str, str], scored: Scored, found: Comparison, reports: Sequence[Path]
) -> None:
    """Write table.md, table.csv, plot.png and report.html.

    Args:
        out: Folder to write.
        names: Of the first and the second, for people.
        scored: The first.
        found: The first less the second.
        reports: report.html of the evaluations, to be linked: both show every image.
    """
    rows = differences(found)
    header = ["", *names, "first less second", "95 % interval", "differs"]
    lines = [header] + [
        [
            row.title,
            f"{row.first:.4f}",
            f"{row.second:.4f}",
            f"{row.interval.value:+.4f}",
            f"{row.interval.low:+.4f} to {row.interval.high:+.4f}",
            "yes" if row.differs else "no",
        ]
        for row in rows
    ]
    notes = [
        f"{scope(scored)}; each draw is the same for both, and an interval without 0 is a "
        "difference. It speaks of the images; how much another seed changes, other runs tell.",
        *extremes(found),
    ]
    title = f"{names[0]} less {names[1]}"
    caption = "Every difference with its interval"
    write_table(out, title, lines, notes, partial(_draw, rows), caption, reports=reports)


def _draw(rows: Sequence[Difference], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 0.34 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        reach = [row.interval.value - row.interval.low], [row.interval.high - row.interval.value]
        colour = "#0072B2" if row.differs else "#888888"
        axes.errorbar(row.interval.value, place, xerr=reach, fmt="o", color=colour, capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("first less second (grey: the interval holds 0)")
    FigureCanvasAgg(figure).print_png(str(file))
