"""What came of a sweep: Markdown, CSV, a plot, and a page with all of it."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.compare import TITLES, Scored, compare, join, read_scored, sum_runs
from pathsegdiff.evaluation.intervals import pixel_intervals
from pathsegdiff.pipeline.page import difference, limits, number, spread, write_table
from pathsegdiff.pipeline.sweep import AXES, METRICS, Job, Outcome

TABLE_FILES = ("table.md", "table.csv", "plot.png", "report.html")
_AXIS_TITLES = {
    "t": "diffusion timestep",
    "lr": "learning rate",
    "width": "head width",
    "images": "training images",
}
_NUMBERS = ("t", "lr", "width", "images")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a table says beside the figures of a sweep.

    Attributes:
        title: Of the page; the table alone has none where it is "".
        notes: For its readers.
        reference: (axis, value) of the setting that the others are held against; None for the
            first one.
        published: Figures of ``METRICS`` by the value of the reference's axis; empty where there
            are none.
        same_data: Whether they were published for the data that is scored here.
    """

    title: str = ""
    notes: tuple[str, ...] = ()
    reference: tuple[str, Any] | None = None
    published: Mapping[Any, Mapping[str, float]] = field(default_factory=dict)
    same_data: bool = False


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Runs that differ in fold and seed only.

    Attributes:
        axes: Values of ``AXES``.
        outcomes: Of the runs that were scored.
        planned: How many there should be.
        folds: How many of them have one seed.
    """

    axes: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    planned: int
    folds: int = 1

    def scores(self, metric: str) -> list[float]:
        """One value per run."""
        return [outcome.scores[metric] for outcome in self.outcomes]

    @cached_property
    def by_seed(self) -> dict[int, Scored]:
        """The images of each seed of which every fold is there.

        Empty where only validation was scored, or an older version scored them.
        """
        runs: dict[int, list[Outcome]] = {}
        for one in self.outcomes:
            runs.setdefault(one.job.axes["seed"], []).append(one)
        try:
            return {
                seed: join([read_scored(one.job.out, one.part) for one in of_seed])
                for seed, of_seed in runs.items()
                if len(of_seed) == self.folds
            }
        except RunError:
            return {}

    def scored(self, seeds: Collection[int]) -> Scored:
        """The images of some of ``by_seed``, their pixels counted together."""
        return sum_runs([self.by_seed[seed] for seed in sorted(seeds)])


def write_sweep(
    out: Path, jobs: Sequence[Job], outcomes: Sequence[Outcome], about: About | None = None
) -> str:
    """Write table.csv (one line per run), table.md, plot.png and report.html.

    Returns:
        The Markdown.
    """
    about = about or About()
    rows = table_rows(jobs, outcomes)
    parts = sorted({outcome.part for outcome in outcomes if outcome.part})
    lines = cells(rows, parts, about)
    notes = [*about.notes, *_notes(rows, outcomes, about)]
    reports = sorted(
        report
        for outcome in outcomes
        if (report := outcome.job.out / f"eval-{outcome.part}" / "report.html").exists()
    )
    caption = "mIoU of every setting, lowest to highest run"
    draw = partial(_draw, rows, about)
    return write_table(
        out, about.title, lines, notes, draw, caption, reports=reports, rows=_runs(outcomes)
    )


def table_rows(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> list[TableRow]:
    """One row per setting, in the order of the jobs, of which some may not have been done."""
    found: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        found.setdefault(tuple(job.axes[axis] for axis in AXES), []).append(job)
    by_run = {outcome.job.out: outcome for outcome in outcomes if outcome.scores}
    return [
        TableRow(
            axes=dict(zip(AXES, key, strict=True)),
            outcomes=tuple(by_run[job.out] for job in group if job.out in by_run),
            planned=len(group),
            folds=len(group) // len({job.axes["seed"] for job in group}),
        )
        for key, group in found.items()
    ]


def varied_axes(rows: Sequence[TableRow]) -> list[str]:
    """Axes with more than one value; the taps where there is none."""
    found = [axis for axis in AXES if len({row.axes[axis] for row in rows}) > 1]
    return found or ["taps"]


def cells(rows: Sequence[TableRow], parts: Sequence[str], about: About) -> list[list[str]]:
    """Header and rows: means over folds and seeds, how sure they are, the number of runs.

    Args:
        parts: That were scored.
    """
    axes = varied_axes(rows)
    scored = "validation" if list(parts) == ["validation"] else ", ".join(parts)
    header = list(axes)
    for metric in METRICS:
        where = f" ({scored or 'nothing scored'})" if metric == "miou" else ""
        header.append(f"{TITLES[metric]}{where}")
        header += [f"{TITLES[metric]} published"] if about.published else []
    if about.published and about.same_data:
        header.append("mIoU, ours less published")
    reference = _reference(rows, about)
    compared = _is_compared(rows, about)
    known = any(row.by_seed for row in rows)
    if compared:
        header.append(f"mIoU less that of {_name(reference, axes)} (paired 95 % interval)")
    header.append("mIoU, lowest to highest run")
    if known:
        header.append(f"mIoU, 95 % interval over {drawn(rows)}")
    lines = [[*header, "minutes of training", "runs"]]
    for row in rows:
        printed: Mapping[str, float] = {}
        if about.reference is not None:
            printed = about.published.get(row.axes[about.reference[0]], {})
        line = [_shown(axis, row.axes[axis]) for axis in axes]
        for metric in METRICS:
            line.append(_mean(row.scores(metric)))
            line += [number(printed.get(metric))] if about.published else []
        if about.published and about.same_data:
            line.append(_difference(row.scores("miou"), printed.get("miou")))
        if compared:
            line.append("" if row is reference else _paired(row, reference))
        line.append(spread(row.scores("miou")))
        if known:
            line.append(_between(row))
        seconds = [outcome.seconds for outcome in row.outcomes]
        line.append(f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "")
        runs = len(row.outcomes)
        missing = "" if runs == row.planned else f" of {row.planned}, incomplete"
        lines.append([*line, f"{runs}{missing}"])
    return lines


def drawn(rows: Sequence[TableRow]) -> str:
    """What the bootstrap draws, of the first row that has images."""
    return next(row.scored(row.by_seed).drawn for row in rows if row.by_seed)


def _reference(rows: Sequence[TableRow], about: About) -> TableRow | None:
    if about.reference is None:
        return rows[0] if rows else None
    axis, value = about.reference
    return next((row for row in rows if row.axes[axis] == value), None)


def _is_compared(rows: Sequence[TableRow], about: About) -> bool:
    """Whether there is something to hold against the reference, image by image."""
    reference = _reference(rows, about)
    return len(rows) > 1 and reference is not None and bool(reference.by_seed)


def _name(row: TableRow | None, axes: Sequence[str]) -> str:
    assert row is not None
    return ", ".join(f"{axis} {_shown(axis, row.axes[axis])}" for axis in axes)


def _paired(row: TableRow, reference: TableRow | None) -> str:
    """Of the seeds that both have."""
    assert reference is not None
    common = row.by_seed.keys() & reference.by_seed.keys()
    if not common:
        return "other seeds" if row.by_seed else ""
    try:
        found = compare(row.scored(common), reference.scored(common)).differences["miou"]
    except RunError:
        return "other images"
    return difference(found)


def _between(row: TableRow) -> str:
    if not row.by_seed:
        return ""
    scored = row.scored(row.by_seed)
    return limits(pixel_intervals(scored.confusions, groups=scored.groups)["miou"])


def _notes(rows: Sequence[TableRow], outcomes: Sequence[Outcome], about: About) -> list[str]:
    notes = []
    if any(row.by_seed for row in rows):
        notes.append(
            "Figures are means over the runs of a setting; intervals and paired differences are a "
            f"bootstrap over the {drawn(rows)} of all folds, the pixels of all seeds counted "
            "together (of a difference: of those that both have): of the chance in the seeds, the "
            "lowest and the highest run say more."
        )
    elif any(one.part == "validation" for one in outcomes):
        notes.append(
            "Intervals and paired differences need images that are scored one by one: --fold or "
            "--eval-split."
        )
    if any(row.outcomes and not row.by_seed for row in rows) and any(
        one.part not in ("", "validation") for one in outcomes
    ):
        notes.append(
            "Without interval: no seed has all its folds, or scored by an older version (delete "
            "its eval folder and run this again)."
        )
    if any(row.outcomes for row in rows):
        notes.append(
            "Minutes of training are by the clock, of one head, its mean; heads side by side, and "
            "what else the machine does, make them longer."
        )
    if any(len(row.outcomes) < row.planned for row in rows):
        notes.append("Incomplete: runs are missing; the same command goes on with them.")
    notes += [f"Failed: {one.job.out.name}: {one.error}" for one in outcomes if one.error]
    return notes


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else ""


def _difference(values: Sequence[float], printed: float | None) -> str:
    return "" if printed is None or not values else f"{statistics.fmean(values) - printed:+.3f}"


def _shown(axis: str, value: Any) -> str:
    if value is None:
        return "all" if axis == "images" else ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _runs(outcomes: Sequence[Outcome]) -> list[list[object]]:
    """A line per run."""
    lines: list[list[object]] = [
        [*AXES, "fold", "seed", "part", *METRICS, "kept_step", "seconds", "run", "error"]
    ]
    for outcome in outcomes:
        axes = [outcome.job.axes[axis] for axis in (*AXES, "fold", "seed")]
        scores = [f"{outcome.scores[m]:.6f}" if outcome.scores else "" for m in METRICS]
        lines.append(
            [
                *axes,
                outcome.part,
                *scores,
                outcome.kept_step,
                f"{outcome.seconds:.1f}",
                outcome.job.out.name,
                outcome.error,
            ]
        )
    return lines


def _draw(rows: Sequence[TableRow], about: About, path: Path) -> None:
    """mIoU against the first axis that varies, a line or dots for each value of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis, *others = varied_axes(rows)
    series: dict[str, list[TableRow]] = {}
    for row in rows:
        if row.outcomes:
            label = ", ".join(f"{other} {_shown(other, row.axes[other])}" for other in others)
            series.setdefault(label, []).append(row)
    names = list(dict.fromkeys(_shown(axis, row.axes[axis]) for row in rows))
    figure = Figure(figsize=(max(6.0, 0.62 * len(names) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    numeric = axis in _NUMBERS and all(row.axes[axis] is not None for row in rows)
    for index, (label, group) in enumerate(series.items()):
        if numeric:
            group.sort(key=lambda row: float(row.axes[axis]))
        values = [row.scores("miou") for row in group]
        means = [statistics.fmean(one) for one in values]
        reach = [
            [mean - min(one) for mean, one in zip(means, values, strict=True)],
            [max(one) - mean for mean, one in zip(means, values, strict=True)],
        ]
        if numeric:
            places = [float(row.axes[axis]) for row in group]
            axes.errorbar(places, means, yerr=reach, marker="o", capsize=3, label=label or None)
        else:
            shift = (index - (len(series) - 1) / 2) * 0.6 / len(series)
            places = [names.index(_shown(axis, row.axes[axis])) + shift for row in group]
            axes.errorbar(places, means, yerr=reach, fmt="o", capsize=3, label=label or None)
    if about.published and about.same_data and numeric:
        printed = [(float(value), one["miou"]) for value, one in about.published.items()]
        axes.plot(*zip(*printed, strict=True), "x", color="#D55E00", label="published")
    if numeric and axis == "lr":
        axes.set_xscale("log")
    if not numeric:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set(xlabel=_AXIS_TITLES.get(axis, axis), ylabel="mIoU")
    axes.grid(axis="y", alpha=0.3)
    if any(series) or (about.published and about.same_data and numeric):
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
