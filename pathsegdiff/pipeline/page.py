"""A table with its plot and notes: Markdown, CSV, and one page of HTML."""

import csv
import html
import io
import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pathsegdiff.evaluation.intervals import Interval
from pathsegdiff.files import replace_file


@dataclass(frozen=True, kw_only=True)
class Section:
    """A further table on a page.

    Attributes:
        title: Its heading.
        text: What it shows.
        lines: Cells, the header first.
    """

    title: str
    text: str
    lines: Sequence[Sequence[str]]


def write_table(
    out: Path,
    title: str,
    lines: Sequence[Sequence[str]],
    notes: Sequence[str],
    draw: Callable[[Path], object],
    caption: str,
    *,
    reports: Sequence[Path] = (),
    sections: Sequence[Section] = (),
    rows: Sequence[Sequence[object]] | None = None,
    picture: str = "plot.png",
) -> str:
    """Write table.md, table.csv, a picture and report.html into ``out``.

    Args:
        title: Of the table; none in the Markdown where it is "".
        lines: Cells, the header first.
        notes: Below the table, one item each.
        draw: Makes the picture, a PNG.
        caption: What it shows, for those who cannot see it.
        reports: report.html of single runs, RUN/eval-PART/report.html, to be linked.
        sections: Further tables, on the page alone.
        rows: Of the CSV file, where they are others than ``lines``.
        picture: Name of its file.

    Returns:
        The Markdown.
    """
    replace_file(out / picture, draw)
    table = _markdown(lines, notes, title)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines if rows is None else rows)
    image = (out / picture).read_bytes()
    page = _page(title or "Heads compared", lines, notes, image, caption, sections, reports, out)
    for name, content in (
        ("table.md", table),
        ("table.csv", text.getvalue()),
        ("report.html", page),
    ):
        replace_file(out / name, partial(_put, content))
    return table


def number(value: float | None) -> str:
    """A cell; empty for None."""
    return "" if value is None else f"{value:.3f}"


def spread(values: Sequence[float]) -> str:
    """A cell with the lowest and the highest of several values."""
    return f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""


def limits(interval: Interval) -> str:
    """A cell with an interval alone."""
    return f"{interval.low:.3f} to {interval.high:.3f}"


def difference(interval: Interval) -> str:
    """A cell with a difference and its interval."""
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _markdown(lines: Sequence[Sequence[str]], notes: Sequence[str], title: str) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    heading = f"# {title}\n\n" if title else ""
    table = "".join(f"| {' | '.join(line)} |\n" for line in ruled)
    listed = "".join(f"- {note}\n" for note in notes)
    return heading + table + (f"\n{listed}" if listed else "")


def _put(content: str, file: Path) -> None:
    file.write_text(content, encoding="utf-8", newline="")


def _page(
    title: str,
    lines: Sequence[Sequence[str]],
    notes: Sequence[str],
    picture: bytes,
    caption: str,
    sections: Sequence[Section],
    reports: Sequence[Path],
    folder: Path,
) -> str:
    links = "".join(
        f'<li><a href="{html.escape(os.path.relpath(report, folder))}">'
        f"{html.escape(report.parent.parent.name)}, {html.escape(report.parent.name)}</a></li>"
        for report in reports
    )
    further = "".join(
        f"<h2>{html.escape(one.title)}</h2><p>{html.escape(one.text)}</p>{_html_table(one.lines)}"
        for one in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        "</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
        "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.3rem "
        ".5rem;text-align:left}img{max-width:100%}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{_html_table(lines)}"
        f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{b64encode(picture).decode()}"></p>'
        f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>"
        + further
        + (f"<h2>Reports of the runs</h2><ul>{links}</ul>" if links else "")
        + "</body></html>\n"
    )


def _html_table(lines: Sequence[Sequence[str]]) -> str:
    header, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        for tag, line in zip(("th", *["td"] * len(lines)), lines, strict=False)
    )
    rows = "".join(f"<tr>{line}</tr>" for line in body)
    return f"<table><tr>{header}</tr>{rows}</table>"
