"""A table of ours beside the published one: Markdown, CSV, a plot, and a page with all of it."""

import csv
import html
import io
import json
from base64 import b64encode
from functools import partial
from pathlib import Path
from typing import Any

from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.compare import compare, read_scored
from pathsegdiff.files import replace_file
from pathsegdiff.pipeline.tables.make import is_finished
from pathsegdiff.pipeline.tables.plots import PLOTTED, TableRow, draw_few_labels, draw_rows
from pathsegdiff.pipeline.tables.published import COLUMNS, TABLES, TITLES
from pathsegdiff.pipeline.tables.rows import BUDGETS, ROWS, Job, TableSettings
from pathsegdiff.segmentation.splits import source_of_window

FEW_LABELS = "few_labels.png"


def collect(settings: TableSettings) -> list[TableRow]:
    """The published rows in their order, then ours that the paper does not have."""
    known = {row.ours: row for row in TABLES[settings.table].rows if row.ours is not None}
    found = []
    for published in TABLES[settings.table].rows:
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
            runs = tuple(_figures(settings, job) for job in jobs if is_finished(settings, job))
            printed = known.get(name) if limit is None else None
            title = known[name].name if name in known else ROWS[name].title
            found.append(
                TableRow(
                    name=name,
                    title=title,
                    limit=limit,
                    runs=runs,
                    planned=len(jobs),
                    published=printed,
                )
            )
    order = {row.name: number for number, row in enumerate(TABLES[settings.table].rows)}
    return sorted(
        found,
        key=lambda row: len(order) if row.published is None else order[row.published.name],
    )


def write(settings: TableSettings) -> str:
    """Write table.md, table.csv, plot.png and report.html; the Markdown is returned."""
    rows = collect(settings)
    lines = _cells(settings, rows)
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    text = "".join(f"| {' | '.join(line)} |\n" for line in ruled)
    notes = notes_of(settings, rows)
    settings.out.mkdir(parents=True, exist_ok=True)
    whole = text + "\n" + "".join(f"- {note}\n" for note in notes)
    table = io.StringIO()
    csv.writer(table).writerows(lines)
    picture = settings.out / "plot.png"
    replace_file(picture, partial(draw_rows, rows))
    if settings.limits[1:]:
        replace_file(settings.out / FEW_LABELS, partial(draw_few_labels, rows))
    page = _page(settings, lines, notes, picture.read_bytes())
    for name, content in (
        ("table.md", whole),
        ("table.csv", table.getvalue()),
        ("report.html", page),
    ):
        replace_file(settings.out / name, partial(_put, content))
    return whole


def notes_of(settings: TableSettings, rows: list[TableRow]) -> list[str]:
    """What a reader has to know of the table and of its rows."""
    table = TABLES[settings.table]
    budget = BUDGETS[settings.budget]
    notes = [
        f"Ours: model {settings.model}, t = {settings.timestep}; {budget.text}. The paper states "
        "neither batch size, epochs nor augmentation.",
        "Published figures: Danisetty et al. 2025, 'PathSegDiff', "
        f"{table.title.split(':', 1)[0]}; ours are pooled over the scored images, unweighted mean "
        "over classes; the interval is a bootstrap over the images of the first run.",
    ]
    if settings.dataset_name != table.dataset:
        notes.append(
            f"Ours were made on {settings.dataset}, not on {table.dataset}: they do not compare "
            "with the published figures."
        )
    if settings.folds:
        notes.append(
            f"Ours are of the held-out folds {', '.join(map(str, settings.folds))}, the published "
            "ones of the official split."
        )
    incomplete = [row.title for row in rows if len(row.runs) < row.planned]
    if incomplete:
        notes.append(f"Incomplete (runs are missing): {', '.join(incomplete)}.")
    ours = _reference(rows)
    reference = None if ours is None else ours.mean(PLOTTED)
    if reference is not None:
        better = [
            row.title
            for row in rows
            if row.limit is None and (row.mean(PLOTTED) or 0) > reference and row is not ours
        ]
        if better:
            notes.append(f"Better than PathSegDiff here, by mIoU: {', '.join(better)}.")
    notes += [
        f"{row.published.name}: {row.published.note}."
        for row in rows
        if row.published is not None and row.published.note
    ]
    return notes


def _reference(rows: list[TableRow]) -> TableRow | None:
    """PathSegDiff's row, trained on all images, that the others are held against."""
    return next((row for row in rows if row.name == "conditioned" and row.limit is None), None)


def _figures(settings: TableSettings, job: Job) -> dict[str, Any]:
    """The metrics of a finished run, and how many images it was trained on."""
    file = settings.metrics(job)
    found = json.loads(file.read_text(encoding="utf-8"))
    config = json.loads((settings.run(job) / "config.json").read_text(encoding="utf-8"))
    return {**found, "training_images": _images(config), "path": str(file)}


def _images(config: dict[str, Any]) -> int:
    """That a run was trained on; windows of one image count once."""
    samples = config["samples"]["train"]
    if config["dataset"]["rule"]["kind"] != "window":
        return len(samples)
    return len({source_of_window(sample) for sample in samples})


def _cells(settings: TableSettings, rows: list[TableRow]) -> list[list[str]]:
    few = settings.limits != (None,)
    other = settings.dataset_name != TABLES[settings.table].dataset
    lines = [
        [
            "row",
            *(["images"] if few else []),
            *(f"{TITLES[column]} {kind}" for column in COLUMNS for kind in ("ours", "paper")),
            *([] if other else ["mIoU, ours less paper"]),
            "mIoU less PathSegDiff's here (paired 95 % interval)",
            "mIoU, lowest to highest run",
            "mIoU, 95 % interval over images",
            "runs",
        ]
    ]
    ours = _reference(rows)
    for row in rows:
        images = ["" if not row.planned else "all" if row.limit is None else str(row.limit)]
        values: list[str] = []
        for column in COLUMNS:
            theirs = None if row.published is None else row.published.figures.get(column)
            values += [_number(row.mean(column)), _number(theirs)]
        lines.append(
            [
                row.title,
                *(images if few else []),
                *values,
                *([] if other else [_signed(row.difference(PLOTTED))]),
                _less_ours(row, ours),
                *_spread(row),
                _complete(row),
            ]
        )
    return lines


def _less_ours(row: TableRow, ours: TableRow | None) -> str:
    """Of the first runs, image by image."""
    if ours is None or row is ours or row.limit is not None or not row.runs or not ours.runs:
        return ""
    try:
        scored = [read_scored(Path(one.runs[0]["path"])) for one in (row, ours)]
        found = compare(*scored).differences[PLOTTED]
    except RunError as error:
        return "scored by an older version" if "older version" in str(error) else "other images"
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _spread(row: TableRow) -> list[str]:
    if not row.runs:
        return ["", ""]
    values = [run[PLOTTED] for run in row.runs]
    interval = row.runs[0]["intervals"][PLOTTED]
    return [
        f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else "",
        f"{interval['low']:.3f} to {interval['high']:.3f}",
    ]


def _complete(row: TableRow) -> str:
    if not row.planned:
        return "published only"
    incomplete = "" if len(row.runs) == row.planned else ", incomplete"
    return f"{len(row.runs)} of {row.planned}{incomplete}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _page(settings: TableSettings, lines: list[list[str]], notes: list[str], picture: bytes) -> str:
    published = TABLES[settings.table].title
    title = html.escape(f"{published}: ours ({settings.dataset}) and the paper's")
    encoded = b64encode(picture).decode()
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>"
        for line in lines[1:]
    )
    links = "".join(
        f'<li><a href="{html.escape(str(report.relative_to(settings.out)))}">'
        f"{html.escape(report.parent.parent.name)}</a></li>"
        for report in sorted(settings.out.glob("runs/*/eval-*/report.html"))
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
        "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.3rem "
        ".5rem;text-align:left}img{max-width:100%}</style></head>"
        f"<body><h1>{title}</h1><table><tr>{header}</tr>{body}</table>"
        f'<p><img alt="mIoU of every row" src="data:image/png;base64,{encoded}">'
        f"</p><ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>"
        f"<h2>Every run</h2><ul>{links}</ul></body></html>\n"
    )


def _put(content: str, file: Path) -> None:
    file.write_text(content, encoding="utf-8")
