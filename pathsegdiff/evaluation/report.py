"""What an evaluation leaves: metrics.json, per_image.csv and one self-contained report.html.

The report needs nothing but a browser: styles are inline, pictures are embedded, nothing is
fetched and no script runs, so that it can be mailed, archived and printed. Files appear whole or
not at all.
"""

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from pathsegdiff.evaluation.confusion import (
    PixelScores,
    class_image_means,
    image_means,
    json_safe,
    scores,
)
from pathsegdiff.evaluation.intervals import Interval
from pathsegdiff.evaluation.objects import ImageObjects, SplitObjects
from pathsegdiff.evaluation.overlays import Colour
from pathsegdiff.files import replace_file

# All embedded panels together; a mail server takes 20 MB, and base64 adds a third.
PANEL_BUDGET_BYTES = 9_000_000
MAX_PANELS = 400
_PANEL_WIDTHS_PX = (1640, 1280, 1024, 832, 640, 480, 320)
_JPEG_QUALITY = 84
_NOTHING = "n/a"

HEADLINE = (
    ("accuracy", "Accuracy", "share of correct pixels"),
    ("dice", "Dice", "mean over classes"),
    ("miou", "mIoU", "mean over classes"),
    ("f1", "F1", "mean over classes; equals Dice"),
)
OBJECT_HEADLINE = (
    ("object_f1", "Detection F1", "objects found, pooled over images"),
    ("object_dice", "Object Dice", "weighted by area"),
    ("object_hausdorff", "Object Hausdorff", "weighted by area, in pixels"),
)


# --- files ---------------------------------------------------------------------------------------


def image_row(
    sample_id: str,
    confusion: np.ndarray,
    names: Sequence[str],
    objects: ImageObjects | None = None,
    **extra: object,
) -> dict[str, object]:
    """One image's scores as a flat row for ``per_image_csv``, ``metrics_json`` and the report.

    Args:
        sample_id: The image.
        confusion: (K, K) counts of this image.
        names: Of the K classes.
        objects: Its objects, where the data set counts them.
        extra: Further columns, such as ``group``; they stand right behind the id.

    Returns:
        ``sample_id``, the extra columns, ``pixels``, ``accuracy``, ``dice``, ``miou``, ``f1``,
        ``dice_NAME`` and ``iou_NAME`` of each class, and with objects ``tp``, ``fp``, ``fn``,
        ``object_f1``, ``object_dice``, ``object_hausdorff``. Scores may be ``nan`` or infinite.
    """
    image = scores(confusion)
    row: dict[str, object] = {"sample_id": sample_id, **extra, "pixels": image.pixels}
    row |= {key: getattr(image, key) for key, _, _ in HEADLINE}
    for name, one in zip(names, image.per_class, strict=True):
        row[f"dice_{name}"] = one.dice
        row[f"iou_{name}"] = one.iou
    if objects is not None:
        row |= {"tp": objects.tp, "fp": objects.fp, "fn": objects.fn}
        row |= {"object_f1": objects.f1, "object_dice": objects.dice}
        row["object_hausdorff"] = objects.hausdorff
    return row


def per_image_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one line per image; a score that does not exist is an empty cell.

    Columns are those of all rows, in the order in which they first appear.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    _write(path, stream.getvalue())


def _cell(value: object) -> object:
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{float(value):.6g}"
    return "" if value is None else value


def metrics_json(
    path: Path,
    *,
    names: Sequence[str],
    confusions: np.ndarray,
    intervals: Mapping[str, Interval],
    images: Sequence[Mapping[str, object]],
    units: Sequence[str] | None = None,
    objects: SplitObjects | None = None,
    object_intervals: Mapping[str, Interval] | None = None,
    notes: Sequence[str] = (),
    provenance: Mapping[str, object] | None = None,
) -> dict:
    """Write metrics.json and return what it holds.

    Args:
        path: The file.
        names: Of the K classes.
        confusions: (N, K, K) counts, one matrix per image.
        intervals: From ``intervals.pixel_intervals``.
        images: Rows of ``image_row``.
        units: What the intervals draw, one name per image; None where it is the images.
        objects, object_intervals: Where the data set counts objects.
        notes: What a reader must know before the numbers, such as random weights.
        provenance: Settings, fingerprints, versions; anything JSON can hold.

    Returns:
        Top level: ``accuracy``, ``dice``, ``miou``, ``f1`` (pooled; see ``confusion.py``),
        ``intervals``, ``per_class``, ``absent``, ``confusion``, ``variants``, ``objects``,
        ``images``, ``notes``, ``provenance``. Numbers that do not exist are null.
    """
    confusions = np.asarray(confusions)
    pooled = scores(confusions.sum(axis=0))
    by_class = zip(names, pooled.per_class, class_image_means(confusions), strict=True)
    document = {
        **{key: getattr(pooled, key) for key, _, _ in HEADLINE},
        "intervals": {name: one.to_dict() for name, one in intervals.items()},
        "per_class": [
            {"name": name, **vars(one), "image_mean": mean} for name, one, mean in by_class
        ],
        "absent": [names[k] for k in pooled.absent],
        "confusion": {"names": list(names), "rows": "target", "counts": pooled.confusion},
        "variants": {**pooled.variants, "image_mean": image_means(confusions)},
        "objects": None,
        "images": [
            {**image, "confusion": counts, **({} if units is None else {"unit": units[number]})}
            for number, (image, counts) in enumerate(zip(images, confusions.tolist(), strict=True))
        ],
        "notes": list(notes),
        "provenance": dict(provenance or {}),
    }
    if objects is not None:
        limits = {name: one.to_dict() for name, one in (object_intervals or {}).items()}
        document["objects"] = {**objects.to_dict(), "intervals": limits}
    safe = json_safe(document)
    _write(path, json.dumps(safe, indent=1, allow_nan=False) + "\n")
    return safe


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that report.html shows.

    Panels are (rows, columns, 3) uint8 arrays (``overlays.panel``) or image files. Every string is
    plain text: the report escapes it.
    """

    title: str
    names: Sequence[str]
    colours: Sequence[Colour]
    scores: PixelScores
    subtitle: str = ""
    notes: Sequence[str] = ()  # in the banner at the top: random weights, left-out classes, ...
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    interval_unit: str = "images"  # what the bootstrap draws: "images", "patients"
    objects: SplitObjects | None = None
    object_intervals: Mapping[str, Interval] = field(default_factory=dict)
    image_means: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[Mapping[str, object]] = ()  # rows of ``image_row``
    panels: Mapping[str, np.ndarray | Path] = field(default_factory=dict)  # by sample_id
    rank_by: str = "dice"  # the column that says which image is worst
    curves: Path | None = None  # PNG of the training curves
    provenance: Mapping[str, object] = field(default_factory=dict)


def write_report(path: Path, content: ReportContent) -> None:
    """Write report.html.

    Raises:
        ValueError: If names, colours and scores differ in their number of classes.
    """
    if not len(content.names) == len(content.colours) == content.scores.num_classes:
        raise ValueError(
            f"{len(content.names)} names and {len(content.colours)} colours "
            f"for {content.scores.num_classes} classes"
        )
    _write(path, render_report(content))


def _write(path: Path, text: str) -> None:
    content = text.encode()  # the line ends of a CSV as they are
    replace_file(path, lambda file: file.write_bytes(content))


def render_report(content: ReportContent) -> str:
    """The report as HTML5 text; see ``write_report``."""
    sections = [
        _header(content),
        _headline(content),
        _objects(content),
        _per_class(content),
        _confusion(content.scores, content.names),
        _distribution(content),
        _panels(content),
        _curves(content),
        _provenance(content.provenance),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(content.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(content: ReportContent) -> str:
    banner = "".join(f"<p>{escape(note)}</p>" for note in content.notes)
    return (
        f"<header><h1>{escape(content.title)}</h1>"
        + (f'<p class="subtitle">{escape(content.subtitle)}</p>' if content.subtitle else "")
        + "</header>"
        + (f'\n<aside class="banner" role="note">{banner}</aside>' if banner else "")
    )


def _number(value: object, digits: int = 3) -> str:
    if value is None or not isinstance(value, int | float | np.integer | np.floating):
        return _NOTHING if value is None else escape(str(value))
    if math.isnan(value):
        return _NOTHING
    if math.isinf(value):
        return "∞"
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{value:.{digits}f}"


def _range(interval: Interval | None, digits: int = 3) -> str:
    if interval is None or math.isnan(interval.low):
        return ""
    return f"{_number(interval.low, digits)} to {_number(interval.high, digits)}"


def _card(name: str, value: float, interval: Interval | None, what: str, digits: int = 3) -> str:
    limits = _range(interval, digits)
    level = f"{100 * interval.level:.0f} % " if interval is not None and limits else ""
    return (
        f'<div class="card"><h3>{escape(name)}</h3>'
        f'<p class="value">{_number(value, digits)}</p>'
        + (f'<p class="limits"><span>{level}</span>{limits}</p>' if limits else "")
        + f'<p class="what">{escape(what)}</p></div>'
    )


def _headline(content: ReportContent) -> str:
    cards = "".join(
        _card(name, getattr(content.scores, key), content.intervals.get(key), what)
        for key, name, what in HEADLINE
    )
    said = [
        f"Pooled over {_number(content.scores.pixels)} pixels"
        + (f" of {len(content.images)} images" if content.images else "")
        + "; pixels that do not count are left out."
    ]
    if content.intervals:
        draws = max(interval.draws for interval in content.intervals.values())
        unit = escape(content.interval_unit)
        said.append(f"Intervals: percentile bootstrap over {unit}, {draws:,} draws.")
    if content.scores.absent:
        missing = ", ".join(escape(content.names[k]) for k in content.scores.absent)
        said.append(
            f"In neither the truth nor the prediction, so left out of the means: {missing}."
        )
    return (
        f'<section><h2>Result</h2><div class="cards">{cards}</div>'
        f'<p class="fine">{" ".join(said)}</p>{_variants(content)}</section>'
    )


def _variants(content: ReportContent) -> str:
    rows = [(name.replace("_", " "), value) for name, value in content.scores.variants.items()]
    rows += [
        (f"mean over images: {name}", content.image_means[name])
        for name, _, _ in HEADLINE
        if name in content.image_means
    ]
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_number(value)}</td></tr>'
        for name, value in rows
    )
    return (
        f"<details><summary>Other ways to average</summary><table>{cells}</table></details>"
        if cells
        else ""
    )


def _objects(content: ReportContent) -> str:
    found = content.objects
    if found is None:
        return ""
    values = {
        "object_f1": found.f1,
        "object_dice": found.dice,
        "object_hausdorff": found.hausdorff,
    }
    cards = "".join(
        _card(
            name,
            values[key],
            content.object_intervals.get(key),
            what,
            1 if key == "object_hausdorff" else 3,
        )
        for key, name, what in OBJECT_HEADLINE
    )
    said = (
        f"GlaS contest metrics at the images' original size: {found.tp:,} objects found, "
        f"{found.fp:,} false, {found.fn:,} missed, in {found.images:,} images. Means over images: "
        f"F1 {_number(found.mean_f1)}, Dice {_number(found.mean_dice)}, "
        f"Hausdorff {_number(found.mean_hausdorff, 1)}."
    )
    if found.unmeasured_images:
        said += (
            f" In {found.unmeasured_images:,} images one of truth and prediction has no object, "
            "which makes the Hausdorff distance infinite; without them it is "
            f"{_number(found.hausdorff_measured, 1)}."
        )
    return (
        f'<section><h2>Objects</h2><div class="cards">{cards}</div>'
        f'<p class="fine">{said}</p></section>'
    )


def _swatch(colour: Colour) -> str:
    return f'<i class="swatch" style="background:rgb({colour[0]},{colour[1]},{colour[2]})"></i>'


def _per_class(content: ReportContent) -> str:
    total = max(content.scores.pixels, 1)
    rows = []
    for k, (name, one) in enumerate(zip(content.names, content.scores.per_class, strict=True)):
        rows.append(
            f'<tr><th scope="row">{_swatch(content.colours[k])}{escape(name)}</th>'
            f"<td>{_number(one.dice)}<small>{_range(content.intervals.get(f'dice_{k}'))}</small></td>"
            f"<td>{_number(one.iou)}<small>{_range(content.intervals.get(f'iou_{k}'))}</small></td>"
            f"<td>{_number(one.precision)}</td><td>{_number(one.recall)}</td>"
            f"<td>{100 * one.pixels / total:.1f} %</td>"
            f"<td>{100 * one.predicted_pixels / total:.1f} %</td></tr>"
        )
    heads = ("Dice", "IoU", "Precision", "Recall", "Share of truth", "Share of prediction")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<section><h2>Classes</h2><div class="wide"><table class="grid"><thead><tr>'
        f'<th scope="col">Class</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></section>"
    )


def _confusion(pooled: PixelScores, names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for k, counts in enumerate(pooled.confusion):
        total = sum(counts)
        cells = []
        for count in counts:
            share = count / total if total else 0.0
            # From white to dark blue; the ink turns white where the blue gets dark.
            colour = [round(255 + (end - 255) * share) for end in (12, 74, 130)]
            ink = "#fff" if share > 0.5 else "#20242a"
            shown = f"{100 * share:.1f} %" if total else _NOTHING
            cells.append(
                f'<td style="background:rgb({colour[0]},{colour[1]},{colour[2]});color:{ink}">'
                f"{shown}<small>{count:,}</small></td>"
            )
        rows.append(f'<tr><th scope="row">{escape(names[k])}</th>{"".join(cells)}</tr>')
    return (
        "<section><h2>Confusion</h2>"
        '<p class="fine">Rows: truth, columns: prediction. Shares of the row, with pixels.</p>'
        '<div class="wide"><table class="grid heat"><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _rank(row: Mapping[str, object], column: str) -> float:
    value = row.get(column)
    return float(value) if isinstance(value, int | float | np.floating) else math.nan


def _label(column: str) -> str:
    known = {key: name for key, name, _ in (*HEADLINE, *OBJECT_HEADLINE)}
    return known.get(column, column.replace("_", " "))


def _distribution(content: ReportContent) -> str:
    """A dot per image, stacked where scores are close; the sample's id shows under the pointer."""
    ranked = [(_rank(row, content.rank_by), str(row["sample_id"])) for row in content.images]
    values = sorted((value, name) for value, name in ranked if 0 <= value <= 1)
    if len(values) < 2:
        return ""
    numbers = [value for value, _ in values]
    # The axis: whole tenths around the scores, at least three of them.
    first = min(math.floor(numbers[0] * 10), 7)
    last = max(math.ceil(numbers[-1] * 10), first + 3)
    width, left, right = 1000, 20, 20
    bins = 50
    stacks: dict[int, list[tuple[float, str]]] = {}
    for value, name in values:
        index = int((value * 10 - first) / (last - first) * bins)
        stacks.setdefault(min(index, bins - 1), []).append((value, name))
    tallest = max(len(stack) for stack in stacks.values())
    step = min(14.0, 220 / tallest)
    height = round(tallest * step + 58)
    floor = height - 34
    span = width - left - right

    def place(value: float) -> float:
        return left + span * (value * 10 - first) / (last - first)

    dots = []
    for index, stack in sorted(stacks.items()):
        x = left + span * (index + 0.5) / bins
        for level, (value, name) in enumerate(stack):
            y = floor - step * (level + 0.5) - 1
            dots.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{step * 0.42:.1f}">'
                f"<title>{escape(name)}: {value:.3f}</title></circle>"
            )
    ticks = "".join(
        f'<line x1="{place(t / 10):.1f}" y1="{floor}" x2="{place(t / 10):.1f}" y2="{floor + 5}"/>'
        f'<text x="{place(t / 10):.1f}" y="{floor + 21}">{t / 10:.1f}</text>'
        for t in range(first, last + 1)
    )
    median = float(np.median(numbers))
    marker = (
        f'<line class="median" x1="{place(median):.1f}" y1="8" x2="{place(median):.1f}" '
        f'y2="{floor}"/>'
    )
    low, high = np.quantile(numbers, [0.25, 0.75])
    return (
        f'<section><h2>Images</h2><p class="fine">{escape(_label(content.rank_by))} of each image: '
        f"median {median:.3f} (dashed), quartiles {low:.3f} and {high:.3f}, "
        f"lowest {numbers[0]:.3f}, highest {numbers[-1]:.3f}.</p>"
        f'<svg class="dots" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Distribution of {escape(_label(content.rank_by))} over the images">'
        f'<line x1="{left}" y1="{floor}" x2="{width - right}" y2="{floor}"/>{ticks}{marker}'
        f"{''.join(dots)}</svg></section>"
    )


def _panels(content: ReportContent) -> str:
    rows = [row for row in content.images if row["sample_id"] in content.panels]
    if not rows:
        return ""
    # Worst first, equals in their order; an image without a score is neither best nor worst.
    unscored = [row for row in rows if math.isnan(_rank(row, content.rank_by))]
    scored = [row for row in rows if not math.isnan(_rank(row, content.rank_by))]
    scored.sort(key=lambda row: _rank(row, content.rank_by))
    ends = min(3, len(scored) // 3)
    worst, best = scored[:ends], scored[len(scored) - ends :][::-1]
    others = scored[ends : len(scored) - ends] + unscored
    room = MAX_PANELS - 2 * ends
    if len(others) > room:
        others = [others[i] for i in np.linspace(0, len(others) - 1, room).astype(int)]
    shown = [*worst, *best, *others]
    pictures = _encoded([content.panels[str(row["sample_id"])] for row in shown])
    figures = [_figure(row, picture) for row, picture in zip(shown, pictures, strict=True)]
    left_out = (
        f'<p class="fine">{len(shown):,} of {len(rows):,} images are shown.</p>'
        if len(shown) < len(rows)
        else ""
    )
    named = escape(_label(content.rank_by))
    if not ends:
        return (
            f'<section><h2>Segmentations</h2><p class="fine">By {named}, lowest first.</p>'
            f'{left_out}<div class="large">{"".join(figures)}</div></section>'
        )
    return (
        f'<section><h2>Worst images</h2><p class="fine">By {named}, lowest first.</p>'
        f'<div class="large">{"".join(figures[:ends])}</div></section>\n'
        f'<section><h2>Best images</h2><p class="fine">By {named}, highest first.</p>'
        f'<div class="large">{"".join(figures[ends : 2 * ends])}</div></section>\n'
        f'<section><h2>The others</h2><p class="fine">By {named}, lowest first.</p>{left_out}'
        f'<div class="tiles">{"".join(figures[2 * ends :])}</div></section>'
    )


def _figure(row: Mapping[str, object], picture: str) -> str:
    shown = [*(key for key, _, _ in HEADLINE if key != "f1"), *(k for k, _, _ in OBJECT_HEADLINE)]
    values = " ".join(
        f"<span>{escape(_label(key))} <b>{_number(row[key], 1 if 'hausdorff' in key else 3)}</b>"
        "</span>"
        for key in shown
        if key in row
    )
    name = escape(str(row["sample_id"]))
    return (
        f'<figure><img src="{picture}" alt="{name}: image, truth, prediction and errors">'
        f"<figcaption><strong>{name}</strong> {values}</figcaption></figure>"
    )


def _open(panel: np.ndarray | Path) -> Image.Image:
    if isinstance(panel, np.ndarray):
        return Image.fromarray(panel)
    with Image.open(panel) as picture:
        return picture.convert("RGB")


def _jpeg(picture: Image.Image, width: int) -> bytes:
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # 4:4:4, since the outlines are thin and coloured. Not optimize=True: Pillow's buffer for it is
    # too small for noisy pictures ("encoder error -2").
    picture.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _encoded(panels: Sequence[np.ndarray | Path]) -> list[str]:
    """Data URLs of all panels, at the largest width that keeps them within the budget."""
    few = [panels[i] for i in np.unique(np.linspace(0, len(panels) - 1, 8).astype(int))]
    width = _PANEL_WIDTHS_PX[-1]
    for candidate in _PANEL_WIDTHS_PX:
        mean = sum(len(_jpeg(_open(panel), candidate)) for panel in few) / len(few)
        if mean * len(panels) <= PANEL_BUDGET_BYTES:
            width = candidate
            break
    return [
        "data:image/jpeg;base64," + base64.b64encode(_jpeg(_open(panel), width)).decode()
        for panel in panels
    ]


def _curves(content: ReportContent) -> str:
    if content.curves is None or not content.curves.is_file():
        return ""
    picture = base64.b64encode(content.curves.read_bytes()).decode()
    return (
        '<section><h2>Training</h2><figure class="curves">'
        f'<img src="data:image/png;base64,{picture}" alt="Training curves"></figure></section>'
    )


def _flattened(value: object, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            pair
            for key, entry in value.items()
            for pair in _flattened(entry, f"{name} / {key}" if name else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(str(entry) for entry in value))]
    return [(name, _NOTHING if value is None else str(value))]


def _provenance(provenance: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in _flattened(provenance)
    )
    if not rows:
        return ""
    return f'<section><h2>Provenance</h2><table class="facts">{rows}</table></section>'


_STYLE = """
:root { color-scheme: light; --ink: #20242a; --faint: #646b75; --line: #dfe2e6; --blue: #0c4a82; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f8; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 0 0 12px; }
.subtitle { color: var(--faint); margin: 0; }
.banner { margin: 20px 0 0; padding: 10px 16px; border-left: 5px solid #d55000;
  background: #fff1e6; border-radius: 0 6px 6px 0; font-weight: 600; }
.banner p { margin: 2px 0; }
section { margin-top: 24px; padding: 20px 22px; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; }
.card { padding: 12px 16px; border: 1px solid var(--line); border-radius: 8px; }
.card h3 { margin: 0; font-size: 14px; font-weight: 600; color: var(--faint); }
.card p { margin: 0; }
.value { font-size: 34px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums;
  color: var(--blue); }
.limits { font-variant-numeric: tabular-nums; }
.limits span, .what, .fine { color: var(--faint); font-size: 13px; }
.fine { margin: 10px 0; }
h2 + .fine { margin-top: -8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.grid { width: 100%; }
.grid th, .grid td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: right; }
.grid thead th { color: var(--faint); font-size: 13px; font-weight: 600; }
.grid tbody th, .grid thead th:first-child { text-align: left; font-weight: 600; }
.heat { width: auto; }
.heat td { min-width: 96px; border: 2px solid #fff; }
small { display: block; font-size: 12px; opacity: .75; }
.swatch { display: inline-block; width: 13px; height: 13px; margin-right: 9px; border-radius: 3px;
  border: 1px solid rgba(0, 0, 0, .25); vertical-align: -1px; }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--blue); font-size: 14px; }
details th { text-align: left; font-weight: 400; padding: 2px 24px 2px 0; }
details td { text-align: right; }
.dots { display: block; width: 100%; height: auto; }
.dots line { stroke: #8b929b; stroke-width: 1; }
.dots .median { stroke: #d55000; stroke-width: 2; stroke-dasharray: 6 4; }
.dots text { font-size: 13px; text-anchor: middle; fill: var(--faint); }
.dots circle { fill: var(--blue); fill-opacity: .75; }
figure { margin: 0 0 18px; }
figure img { display: block; width: 100%; height: auto; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { margin-top: 4px; font-size: 13px; overflow-wrap: anywhere; }
figcaption span { color: var(--faint); margin-right: 10px; white-space: nowrap; }
figcaption strong { margin-right: 10px; }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(540px, 1fr));
  gap: 6px 18px; }
.curves img { max-width: 900px; border: 0; }
.facts th { text-align: left; vertical-align: top; font-weight: 400; color: var(--faint);
  padding: 3px 28px 3px 0; white-space: nowrap; }
.facts td { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
@media (max-width: 620px) { .tiles { grid-template-columns: 1fr; } }
@media print {
  @page { margin: 14mm; }
  body { background: #fff; font-size: 11px; }
  main { max-width: none; padding: 0; }
  section { border: 0; padding: 0; }
  .card, figure, tr, .dots, .banner { break-inside: avoid; }
  h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
