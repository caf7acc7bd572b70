"""A table of ours beside the published one: Markdown, CSV, a plot, and a page with all of it."""

import json
import re
import statistics
from collections.abc import Collection
from functools import partial
from typing import Any

from pathsegdiff import __version__
from pathsegdiff.errors import MALFORMED, RunError
from pathsegdiff.evaluation.compare import (
    CLASSES,
    Scored,
    compare,
    join,
    mean_over,
    read_scored,
    sum_runs,
)
from pathsegdiff.evaluation.intervals import GROUPS, IMAGES, bootstrap, pixel_statistics
from pathsegdiff.files import replace_file
from pathsegdiff.pipeline.baselines.pilots import pilot_runs
from pathsegdiff.pipeline.page import difference, limits, number, spread, write_table
from pathsegdiff.pipeline.tables.columns import Columns, columns_of
from pathsegdiff.pipeline.tables.details import sections_of
from pathsegdiff.pipeline.tables.finished import is_finished
from pathsegdiff.pipeline.tables.plots import TableRow, draw_few_labels, draw_rows
from pathsegdiff.pipeline.tables.published import COLUMNS, TABLES
from pathsegdiff.pipeline.tables.records import write_records
from pathsegdiff.pipeline.tables.rows import BUDGETS, ROWS, Job, TableSettings
from pathsegdiff.segmentation.runs import CONFIG_FILE, RESULT_FILE
from pathsegdiff.segmentation.scoring import REPORT_FILE
from pathsegdiff.segmentation.splits import source_of_window

FEW_LABELS = "few_labels.png"
#: As ``psd models pull`` names it.
_PAPERS_MODEL = "ssl-ldm-brca"
#: Of the budget that is called short (docs/reproduction.md).
_SHORT_MINUTES = 15
_SHORT_CORES = 2
_THREADS = re.compile(r", (\d{1,6}) threads\)")
_SEEDS = 3


def collect(settings: TableSettings) -> tuple[Columns, list[TableRow]]:
    """The columns; the published rows in their order, then ours that the paper does not have."""
    table = TABLES[settings.table]
    finished = {
        job: _read_run(settings, job) for job in settings.jobs() if is_finished(settings, job)
    }
    columns = columns_of(
        table,
        same_dataset=settings.dataset_name == table.dataset,
        metrics=list(finished.values()),
    )
    known = {row.ours: row for row in table.rows if row.ours is not None}
    # Single classes of another data set have nothing to stand beside.
    beside = table.rows if columns.fits(table) else ()
    found = []
    for published in beside:
        if published.ours not in settings.rows or None not in settings.limits:
            found.append(
                TableRow(
                    name=published.name,
                    title=published.name,
                    limit=None,
                    runs=(),
                    planned=0,
                    published=published,
                )
            )
    for name in settings.rows:
        for limit in settings.limits:
            jobs = [job for job in settings.jobs() if (job.row, job.limit) == (name, limit)]
            runs = tuple(
                {**finished[job], **columns.figures(finished[job])}
                for job in jobs
                if job in finished
            )
            printed = known.get(name) if limit is None and beside else None
            title = known[name].name if name in known else settings.title_of(name)
            found.append(
                TableRow(
                    name=name,
                    title=title,
                    limit=limit,
                    runs=runs,
                    planned=len(jobs),
                    folds=max(1, len(settings.folds)),
                    published=printed,
                )
            )
    order = {row.name: number for number, row in enumerate(table.rows)}
    return columns, sorted(
        found,
        key=lambda row: len(order) if row.published is None else order[row.published.name],
    )


def write(settings: TableSettings) -> str:
    """Write table.md, table.csv, plot.png, report.html and the records of the runs.

    Returns:
        The Markdown.

    Raises:
        RunError: If a run is damaged.
    """
    columns, rows = collect(settings)
    lines = _cells(settings, columns, rows)
    notes = notes_of(settings, columns, rows)
    title = title_of(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    drawn = columns.plotted, columns.titles[columns.plotted]
    same = settings.dataset_name == TABLES[settings.table].dataset
    if settings.limits[1:]:
        replace_file(settings.out / FEW_LABELS, partial(draw_few_labels, rows, *drawn))
    scored = (settings.metrics(job).with_name(REPORT_FILE) for job in settings.jobs())
    reports = sorted(report for report in scored if report.is_file())
    caption = "Every row, ours and published"
    draw = partial(draw_rows, rows, *drawn, published=same)
    write_records(settings)
    return write_table(
        settings.out,
        title,
        lines,
        notes,
        draw,
        caption,
        reports=reports,
        sections=sections_of(rows),
    )


def title_of(settings: TableSettings) -> str:
    """For people; what is not on the paper's data set or split says so first."""
    table = TABLES[settings.table]
    number = table.title.split(":", 1)[0]
    if settings.dataset_name == table.dataset and settings.folds:
        return f"{number}: held-out folds of {table.dataset}, and the published figures"
    if _is_another_split(settings):
        scored = f"{table.dataset}, scored on {settings.eval_split}, not {table.split}"
        return f"{number}: {scored}, and the published figures"
    if settings.dataset_name == table.dataset:
        return f"{table.title}: ours and the published figures"
    return f"{number} on {settings.dataset_name}, not {table.dataset}: a stand-in"


def notes_of(settings: TableSettings, columns: Columns, rows: list[TableRow]) -> list[str]:
    """What a reader has to know of the table and of its rows."""
    table = TABLES[settings.table]
    budget = BUDGETS[settings.budget]
    notes = [
        f"Ours: {_features(settings)}{budget.text}. The paper "
        "states neither batch size, epochs nor augmentation.",
        *_origin(settings, rows),
        "Published figures: Danisetty et al. 2025, 'PathSegDiff', "
        f"{table.title.split(':', 1)[0]}; ours are pooled over the scored images, unweighted mean "
        f"over classes; intervals are a bootstrap over the {_drawn(settings)}, "
        "the pixels of all seeds counted together: of the chance in the seeds, the lowest and the "
        "highest run say more. Rows without runs are as printed there.",
    ]
    if any(ROWS[name].store is None for name in settings.rows):
        notes.append(
            "The loss is class-weighted cross-entropy; networks on images add soft Dice to it."
        )
    if settings.model_name not in ("none", _PAPERS_MODEL):
        notes.append(
            f"Rows of features read those of {settings.model_name}, not of the paper's model "
            f"({_PAPERS_MODEL}) with HIPT's encoder: they differ from the published by the model "
            "too."
        )
    if settings.dataset_name != table.dataset:
        notes.append(
            f"Ours were made on {settings.dataset_name}, not on {table.dataset}: they do not "
            "compare with the published figures."
        )
    if _is_another_split(settings):
        notes.append(
            f"Ours were scored on {settings.eval_split}, the published ones on {table.split}: they "
            "do not compare."
        )
    if settings.folds:
        notes.append(
            f"Ours are of the held-out folds {', '.join(map(str, settings.folds))}, the published "
            "ones of the official split; figures are the mean over the folds, intervals and paired "
            "differences of all folds' images together."
        )
    devices = sorted({run["device"] for row in rows for run in row.runs})
    if devices:
        notes.append(
            f"Minutes of training are by the clock, of one run, its mean, on "
            f"{' or '.join(devices)}, as many runs side by side as there were jobs; the choice of "
            "a learning rate is in, extraction is not (once for all rows of features)."
        )
    long = [row.title for row in rows if _is_long(row)]
    if long and settings.budget == "short":
        notes.append(
            f"Longer than the {_SHORT_MINUTES} minutes on {_SHORT_CORES} cores that a run should "
            f"take: {', '.join(long)}."
        )
    incomplete = [row.title for row in rows if len(row.runs) < row.planned]
    if incomplete:
        notes.append(f"Incomplete (runs are missing): {', '.join(incomplete)}.")
    ours = _reference(rows)
    if ours is not None:
        better = [
            row.title
            for row in rows
            if row.limit is None
            and row is not ours
            and (means := row.means_beside(ours, columns.plotted)) is not None
            and means[0] > means[1]
        ]
        if better:
            by = columns.titles[columns.plotted]
            notes.append(f"Better than PathSegDiff here, by {by}: {', '.join(better)}.")
    if table.note and columns.fits(table):
        notes.append(f"{table.title.split(':', 1)[0]}: {table.note}.")
    notes += [note for row in rows if (note := _objects_note(row))]
    notes += [
        f"{row.published.name}: {_published_note(settings, row)}."
        for row in rows
        if row.published is not None and row.published.note
    ]
    return notes


def _published_note(settings: TableSettings, row: TableRow) -> str:
    assert row.published is not None
    if row.published.ours == "null" and settings.unconditional is not None:
        return f"the bundle {settings.unconditional_name}, conditioned on nothing"
    return row.published.note


def _reference(rows: list[TableRow]) -> TableRow | None:
    """PathSegDiff's row, trained on all images, that the others are held against."""
    return next((row for row in rows if row.name == "conditioned" and row.limit is None), None)


def _objects_note(row: TableRow) -> str:
    """Ours beside published figures of objects, which the columns of pixels cannot hold."""
    if row.published is None or not row.published.objects:
        return ""
    found = [run["objects"] for run in row.runs if run.get("objects")]
    if not found:
        return ""
    dice, f1 = (statistics.mean(one[name] for one in found) for name in ("dice", "f1"))
    printed = row.published.figures
    return (
        f"{row.title}, by objects: Dice {dice:.3f} (published {printed['dice']:.3f}), F1 {f1:.3f} "
        f"(published {printed['f1']:.3f}); its columns are of pixels."
    )


def _read_run(settings: TableSettings, job: Job) -> dict[str, Any]:
    """The metrics of a finished run, on how many images it was trained, and how long.

    Raises:
        RunError: If one of its files is damaged.
    """
    file, run = settings.metrics(job), settings.run(job)
    try:
        found, config, result = (
            json.loads(part.read_text(encoding="utf-8"))
            for part in (file, run / CONFIG_FILE, run / RESULT_FILE)
        )
        seconds = float(result["seconds"])
        for pilot in pilot_runs(run):
            ended = pilot / RESULT_FILE
            if ended.is_file():  # one that diverged has none
                seconds += float(json.loads(ended.read_text(encoding="utf-8"))["seconds"])
        return {
            **found,
            **_figures(found),
            "training_images": _images(config),
            "model": _model(config),
            "training_minutes": seconds / 60,
            "device": str(result["device"]),
            "path": str(file),
            "seed": job.seed,
            "fold": job.fold,
        }
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{run} is damaged ({reason:.300}); delete it and make the table again"
        ) from None


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the tables show of metrics.json, each of its kind."""

    def as_number(value: Any) -> float | None:
        return None if value is None else float(value)

    objects = metrics.get("objects")
    return {
        **{column: as_number(metrics[column]) for column in COLUMNS},
        "per_class": [
            {"name": str(one["name"]), "iou": as_number(one["iou"]), "pixels": int(one["pixels"])}
            for one in metrics["per_class"]
        ],
        "objects": objects and {name: float(objects[name]) for name in ("dice", "f1")},
    }


def _model(config: dict[str, Any]) -> tuple[str, str] | None:
    """Name and hash of the model whose features a head reads."""
    model = config.get("model")
    if model is None:
        return None
    untrained = "" if model["trained"] else " with random weights"
    return f"{model['name']}{untrained}", str(model["sha256"])


def _images(config: dict[str, Any]) -> int:
    """That a run was trained on; windows of one image count once."""
    samples = config["samples"]["train"]
    if config["dataset"]["rule"]["kind"] != "window":
        return len(samples)
    return len({source_of_window(sample) for sample in samples})


def _cells(settings: TableSettings, columns: Columns, rows: list[TableRow]) -> list[list[str]]:
    few = settings.limits != (None,)
    other = settings.dataset_name != TABLES[settings.table].dataset or _is_another_split(settings)
    plotted = columns.titles[columns.plotted]
    kinds = ("ours", "paper") if columns.fits(TABLES[settings.table]) else ("ours",)
    lines = [
        [
            "row",
            "ours is",
            *(["images"] if few else []),
            *(f"{title} {kind}" for title in columns.titles.values() for kind in kinds),
            *([] if other else [f"{plotted}, ours less paper"]),
            f"{plotted} less PathSegDiff's here (paired 95 % interval"
            + ("; folds pooled)" if settings.folds else ")"),
            f"{plotted}, lowest to highest run",
            f"{plotted}, 95 % interval over {_drawn(settings)}",
            "minutes of training",
            "runs",
        ]
    ]
    ours = _reference(rows)
    for row in rows:
        images = ["" if not row.planned else "all" if row.limit is None else str(row.limit)]
        values: list[str] = []
        for column in columns.titles:
            published = row.published
            theirs = None
            if published is not None and not (published.objects and row.runs):
                theirs = published.figures.get(column)
            values += [number(row.mean(column)), number(theirs)][: len(kinds)]
        lines.append(
            [
                row.title,
                _what(settings, row),
                *(images if few else []),
                *values,
                *([] if other else [_signed(row.difference(columns.plotted))]),
                _less_ours(row, ours, columns),
                *_spread(row, columns),
                _minutes(row),
                _complete(row),
            ]
        )
    return lines


def _is_another_split(settings: TableSettings) -> bool:
    """Whether ours are of the paper's data set, but of another split than the published ones."""
    table = TABLES[settings.table]
    official = settings.dataset_name == table.dataset and not settings.folds
    return official and settings.eval_split != table.split


def _drawn(settings: TableSettings) -> str:
    """What the bootstrap draws: held-out folds speak of new groups."""
    return GROUPS if settings.folds else IMAGES


def _scored(row: TableRow, seeds: Collection[int] | None = None) -> Scored:
    """The images of a row: its folds side by side, its seeds (or some of them) together."""
    files = row.files()
    chosen = [files[seed] for seed in files if seeds is None or seed in seeds]
    if not chosen:
        raise RunError("no seed has all its folds")
    return sum_runs([join([read_scored(path) for path in paths]) for paths in chosen])


def _what(settings: TableSettings, row: TableRow) -> str:
    """Of a row with a published name."""
    if not row.planned or row.title == settings.title_of(row.name):
        return ""
    if row.name == "null" and settings.unconditional is not None:
        return f"the unconditional model {settings.unconditional_name}"
    return settings.title_of(row.name)


def _less_ours(row: TableRow, ours: TableRow | None, columns: Columns) -> str:
    """Of the seeds that both have, image by image."""
    if ours is None or row is ours or row.limit is not None or not row.runs or not ours.runs:
        return ""
    common = row.files().keys() & ours.files().keys()
    if not common:
        return "other seeds" if row.files() and ours.files() else "a fold is missing"
    try:
        classes = tuple(columns.classes.values())
        differences = compare(
            _scored(row, common), _scored(ours, common), classes=classes
        ).differences
        found = differences[CLASSES if classes else columns.plotted]
    except RunError as error:
        return "scored by an older version" if "older version" in str(error) else "other images"
    return difference(found)


def _spread(row: TableRow, columns: Columns) -> list[str]:
    values = row.values(columns.plotted)
    if not values:
        return ["", ""]
    runs = spread(values)
    try:
        joined = _scored(row)
    except RunError:  # scored by an older version, or no seed is whole
        return [runs, ""]
    classes = tuple(columns.classes.values())
    wanted = mean_over(joined.names, classes) if classes else pixel_statistics
    found = bootstrap(joined.confusions, wanted, groups=joined.groups)
    return [runs, limits(found[CLASSES if classes else columns.plotted])]


def _mean_minutes(row: TableRow) -> float:
    """Of training, of one run on average; 0 where there is none."""
    found = [run["training_minutes"] for run in row.runs]
    return statistics.mean(found) if found else 0.0


def _is_long(row: TableRow) -> bool:
    """Whether a run takes more than the short budget: by the cores that it had."""
    threads = [_THREADS.search(run["device"]) for run in row.runs]
    used = [_SHORT_CORES if found is None else int(found[1]) for found in threads]
    minutes = [run["training_minutes"] * count for run, count in zip(row.runs, used, strict=True)]
    return bool(minutes) and statistics.mean(minutes) > _SHORT_MINUTES * _SHORT_CORES


def _minutes(row: TableRow) -> str:
    return f"{_mean_minutes(row):.1f}" if row.runs else ""


def _features(settings: TableSettings) -> str:
    if settings.model_name == "none":
        return ""
    return f"model {settings.model_name}, t = {settings.timestep}; "


def _origin(settings: TableSettings, rows: list[TableRow]) -> list[str]:
    few = "" if len(settings.seeds) >= _SEEDS else f"; fewer than {_SEEDS} say little of their part"
    said = [f"Seeds: {', '.join(map(str, settings.seeds))}{few}."]
    made = [f"pathsegdiff {__version__}"]
    models = {run["model"] for row in rows for run in row.runs} - {None}
    made += [f"model {name}, sha256 {digest[:12]}" for name, digest in sorted(models)]
    return [*said, f"Written by {'; '.join(made)}; every run's config.json has its own."]


def _complete(row: TableRow) -> str:
    if not row.planned:
        computable = row.published is not None and row.published.ours is not None
        return "not run" if computable else "published only"
    incomplete = "" if len(row.runs) == row.planned else ", incomplete"
    return f"{len(row.runs)} of {row.planned}{incomplete}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
