"""Pictures of segmentations: a tint with a crisp outline over the slide, and what went wrong.

The tint is weak enough that nuclei and stroma stay readable, the outline runs inside the region it
belongs to, so that neighbours keep one line each. Colours are chosen for eyes that confuse red and
green, and against the pinks and purples of H&E.

Shapes: H, W = rows and columns of an image; K = classes without don't care. A label of K or more
means that the pixel does not count (don't care, outside): it is hatched in grey.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Colour = tuple[int, int, int]

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/, without its pinks, which H&E hides; ordered
# so that the first ones stand off best from eosin and haematoxylin, and from each other.
PALETTE: tuple[Colour, ...] = (
    (0, 180, 135),
    (240, 228, 66),
    (0, 90, 181),
    (230, 110, 0),
    (86, 200, 245),
    (25, 25, 25),
    (140, 215, 60),
    (150, 75, 20),
)

CORRECT, FALSE_POSITIVE, FALSE_NEGATIVE, WRONG_CLASS, NOT_COUNTED = 0, 1, 2, 3, 255
ERROR_NAMES: Mapping[int, str] = {
    FALSE_POSITIVE: "false positive",
    FALSE_NEGATIVE: "false negative",
    WRONG_CLASS: "wrong class",
}
ERROR_COLOURS: Mapping[int, Colour] = {
    FALSE_POSITIVE: (213, 80, 0),
    FALSE_NEGATIVE: (0, 100, 190),
    WRONG_CLASS: (110, 20, 90),
}
_HATCH_COLOUR = (120, 124, 130)
_INK, _FAINT_INK, _PAPER = (32, 36, 42), (104, 110, 118), (255, 255, 255)


def default_colours(num_classes: int, background: int | None = None) -> tuple[Colour, ...]:
    """Colours for K classes; the background class, if there is one, is light grey.

    The palette repeats, darkened, after eight classes.
    """
    colours: list[Colour] = []
    used = 0
    for k in range(num_classes):
        if k == background:
            colours.append((225, 227, 230))
            continue
        red, green, blue = PALETTE[used % len(PALETTE)]
        shade = 0.6 ** (used // len(PALETTE))
        colours.append((round(red * shade), round(green * shade), round(blue * shade)))
        used += 1
    return tuple(colours)


def background_class(names: Sequence[str]) -> int | None:
    """The class called background, which gets no tint; "other" tissue is a class like any."""
    lowered = [name.strip().lower() for name in names]
    return lowered.index("background") if "background" in lowered else None


def overlay(
    image: np.ndarray,
    label: np.ndarray,
    colours: Sequence[Colour],
    *,
    alpha: float = 0.35,
    contour_px: float = 2.0,
    background: int | None = None,
) -> np.ndarray:
    """Tint an image by its labels and draw each region's outline.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) integer labels; K or more is hatched.
        colours: RGB of the K classes.
        alpha: Strength of the tint, 0 (outlines only) to 1 (opaque).
        contour_px: Width of the outline, inside its region; 0 leaves it out.
        background: Class without tint and outline.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(image, label)
    shares = _class_shares(label, range(len(colours)), label.shape)
    base = image.astype(np.float32)
    rest = _share(label >= len(colours), label.shape)
    drawn = _tinted(base, shares, dict(enumerate(colours)), alpha, contour_px, {background}, rest)
    return _to_uint8(_hatched(drawn, rest))


def error_map(
    truth: np.ndarray, prediction: np.ndarray, num_classes: int, background: int | None = None
) -> np.ndarray:
    """What is wrong at each pixel.

    Args:
        truth: (H, W) integer labels; ``num_classes`` or more does not count.
        prediction: (H, W) integer labels.
        background: The class that makes a confusion a false positive (background was called
            something) or a false negative (something was called background). Without one, every
            error is a wrong class.

    Returns:
        (H, W) uint8: 0 correct, 1 false positive, 2 false negative, 3 wrong class, 255 not counted.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    errors = np.where(truth == prediction, CORRECT, WRONG_CLASS).astype(np.uint8)
    if background is not None:
        wrong = errors != CORRECT
        errors[wrong & (truth == background)] = FALSE_POSITIVE
        errors[wrong & (prediction == background)] = FALSE_NEGATIVE
    errors[truth >= num_classes] = NOT_COUNTED
    return errors


def error_overlay(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    num_classes: int,
    *,
    background: int | None = None,
) -> np.ndarray:
    """The errors in solid colours on the faded, grey image, with the truth's outline in dark.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth, prediction: (H, W) integer labels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    _check(image, truth)
    errors = error_map(truth, prediction, num_classes, background)
    return _drawn_errors(image, truth, errors, num_classes, background, truth.shape)


def panel(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    *,
    names: Sequence[str],
    colours: Sequence[Colour],
    background: int | None = None,
    title: str = "",
    caption: str = "",
    tile_px: int = 448,
    alpha: float = 0.25,
) -> np.ndarray:
    """One row of tiles with captions and a legend: image, truth, prediction, errors.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) integer labels; ``None`` where it is unknown: image and prediction only.
        prediction: (H, W) integer labels, K or more where nothing was predicted.
        names, colours: Of the K classes.
        background: Class without tint, see ``background_class``.
        title: Above the tiles at the left, such as the sample's id.
        caption: Above the tiles at the right, such as its scores.
        tile_px: Longest side of one tile.
        alpha: Strength of the tint.

    Returns:
        (rows, columns, 3) uint8 RGB on white.

    Raises:
        ValueError: If the shapes do not fit each other, or names and colours differ in number.
    """
    if len(names) != len(colours):
        raise ValueError(f"{len(names)} names for {len(colours)} colours")
    _check(image, prediction)
    size = _fit(prediction.shape, tile_px)
    small = _resized(image, size)
    labelled = partial(
        _labelled, small, size=size, colours=colours, background=background, alpha=alpha
    )

    tiles = [("Image", _to_uint8(small))]
    legend = [(name, colours[k], k == background) for k, name in enumerate(names)]
    hatched = bool((prediction >= len(names)).any())
    if truth is None:
        tiles.append(("Prediction", labelled(prediction)))
    else:
        _check(image, truth)
        errors = error_map(truth, prediction, len(names), background)
        hatched = bool((truth >= len(names)).any())
        # Where the truth says nothing, the prediction is not judged: hide it as well.
        judged = np.where(truth >= len(names), len(names), prediction)
        tiles += [
            ("Ground truth", labelled(truth)),
            ("Prediction", labelled(judged)),
            ("Errors", _drawn_errors(image, truth, errors, len(names), background, size)),
        ]
    present = [row for row in legend if not row[2]]
    marks: list[tuple[str, Colour, str]] = [(name, colour, "tint") for name, colour, _ in present]
    if hatched:
        marks.append(("not counted", _HATCH_COLOUR, "hatch"))
    error_marks: list[tuple[str, Colour, str]] = []
    if truth is not None:
        counted = max(int((errors != NOT_COUNTED).sum()), 1)
        for code, name in ERROR_NAMES.items():
            share = int((errors == code).sum()) / counted
            if share or (code != WRONG_CLASS and background is not None):
                error_marks.append((f"{name} {100 * share:.1f} %", ERROR_COLOURS[code], "solid"))
        if not error_marks:
            error_marks.append(("no errors", (200, 204, 208), "solid"))
    return _page(tiles, marks, error_marks, title, caption, alpha)


def comparison(
    image: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    *,
    names: Sequence[str],
    colours: Sequence[Colour],
    background: int | None = None,
    title: str = "",
    tile_px: int = 320,
    alpha: float = 0.25,
) -> np.ndarray:
    """One row of tiles: image, truth, and what several models predict.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) integer labels; where it is K or more, nothing is shown of the predictions.
        predictions: (H, W) integer labels by the words above their tile.
        names, colours: Of the K classes.
        background: Class without tint.
        title: Above the tiles.
        tile_px: Longest side of one tile.
        alpha: Strength of the tint.

    Returns:
        (rows, columns, 3) uint8 RGB on white.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    for label in (truth, *predictions.values()):
        _check(image, label)
    size = _fit(truth.shape, tile_px)
    small = _resized(image, size)
    labelled = partial(
        _labelled, small, size=size, colours=colours, background=background, alpha=alpha
    )
    outside = truth >= len(names)
    tiles = [("Image", _to_uint8(small)), ("Ground truth", labelled(truth))]
    for name, label in predictions.items():
        tiles.append((name, labelled(np.where(outside, len(names), label))))
    marks = [(name, colours[k], "tint") for k, name in enumerate(names) if k != background]
    if outside.any():
        marks.append(("not counted", _HATCH_COLOUR, "hatch"))
    return _page(tiles, marks, [], title, "", alpha)


# --- drawing -------------------------------------------------------------------------------------


def _labelled(
    small: np.ndarray,
    label: np.ndarray,
    *,
    size: tuple[int, int],
    colours: Sequence[Colour],
    background: int | None,
    alpha: float,
) -> np.ndarray:
    """A tile: (h, w, 3) float32 pixels with the labels' tint; (h, w, 3) uint8."""
    shares = _class_shares(label, range(len(colours)), size)
    rest = _share(label >= len(colours), size)
    drawn = _tinted(small, shares, dict(enumerate(colours)), alpha, 2.0, {background}, rest)
    return _to_uint8(_hatched(drawn, rest))


def _check(image: np.ndarray, label: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"need an (H, W, 3) uint8 image, got {image.dtype} of {image.shape}")
    if label.shape != image.shape[:2]:
        raise ValueError(f"labels have shape {label.shape}, the image {image.shape[:2]}")


def _fit(shape: tuple[int, ...], longest: int) -> tuple[int, int]:
    scale = longest / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) float32, antialiased."""
    if image.shape[:2] == size:
        return image.astype(np.float32)
    picture = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32)


def _share(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(h, w) float32 in [0, 1]: how much of each output pixel the mask covers."""
    if mask.shape == tuple(size):
        return mask.astype(np.float32)
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    # BILINEAR is PIL's area-weighted (antialiased) filter when shrinking; no overshoot.
    resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32) / 255


def _class_shares(
    label: np.ndarray, ids: Collection[int], size: tuple[int, ...]
) -> dict[int, np.ndarray]:
    present = set(np.unique(label).tolist())
    return {k: _share(label == k, size) for k in ids if k in present}


def _disc(radius: float) -> np.ndarray:
    reach = int(np.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return rows**2 + columns**2 <= radius**2 + 1e-9


def _outline(share: np.ndarray, width: float, rest: np.ndarray | float = 0.0) -> np.ndarray:
    """(h, w) share of each pixel that the line inside a region's edge covers.

    Neither the image's own border nor that of the part that does not count (``rest``) is an edge:
    a region that is cut off there stays open.
    """
    if width <= 0:
        return np.zeros_like(share)
    region = np.minimum(share + rest, 1)
    eroded = ndimage.minimum_filter(region, footprint=_disc(width), mode="nearest")
    return (region - eroded) * (share > 0)


def _halo(share: np.ndarray) -> np.ndarray:
    """(h, w) share of each pixel that a thin line just outside a region's edge covers."""
    return ndimage.maximum_filter(share, footprint=_disc(1), mode="nearest") - share


def _blend(base: np.ndarray, colour: Colour, weight: np.ndarray) -> np.ndarray:
    return base + (np.array(colour, np.float32) - base) * weight[..., None]


def _tinted(
    base: np.ndarray,
    shares: Mapping[int, np.ndarray],
    colours: Mapping[int, Colour],
    alpha: float,
    contour_px: float,
    skip: Collection[int | None] = (),
    rest: np.ndarray | float = 0.0,
) -> np.ndarray:
    shares = {k: share for k, share in shares.items() if k not in skip}
    drawn = base
    for k, share in shares.items():
        drawn = _blend(drawn, colours[k], share * alpha)
    if contour_px > 0:
        # A light line outside the coloured one keeps it visible on dark nuclei; all lines above
        # all tints, and the coloured ones last.
        for share in shares.values():
            drawn = _blend(drawn, _PAPER, _halo(share) * 0.6)
        for k, share in shares.items():
            drawn = _blend(drawn, colours[k], _outline(share, contour_px, rest))
    return drawn


def _hatched(base: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Fade the part that does not count and draw thin diagonal lines over it."""
    if not share.any():
        return base
    grey = base.mean(axis=2, keepdims=True)
    drawn = base + (0.35 * grey + 0.65 * 245 - base) * share[..., None]
    rows, columns = np.indices(share.shape)
    lines = ((rows + columns) % 10 < 2).astype(np.float32)
    return _blend(drawn, _HATCH_COLOUR, share * lines * 0.55)


def _drawn_errors(
    image: np.ndarray,
    truth: np.ndarray,
    errors: np.ndarray,
    num_classes: int,
    background: int | None,
    size: tuple[int, ...],
) -> np.ndarray:
    small = _resized(image, (size[0], size[1]))
    grey = small.mean(axis=2, keepdims=True)
    faded = np.broadcast_to(255 - (255 - grey) * 0.55, small.shape)
    drawn = _tinted(faded, _class_shares(errors, ERROR_NAMES, size), ERROR_COLOURS, 0.72, 1.0)
    for k, share in _class_shares(truth, range(num_classes), size).items():
        if k != background:
            drawn = _blend(drawn, _INK, _outline(share, 1.0) * 0.8)
    return _to_uint8(_hatched(drawn, _share(errors == NOT_COUNTED, size)))


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# --- the page ------------------------------------------------------------------------------------

_MARGIN, _GAP = 14, 10


def _font(size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except ImportError:  # a Pillow without FreeType has one small bitmap font
        return ImageFont.load_default()


def _page(
    tiles: Sequence[tuple[str, np.ndarray]],
    marks: Sequence[tuple[str, Colour, str]],
    error_marks: Sequence[tuple[str, Colour, str]],
    title: str,
    caption: str,
    alpha: float,
) -> np.ndarray:
    height, width = tiles[0][1].shape[:2]
    text_px = int(np.clip(round(max(height, width) / 28), 11, 22))
    text, heading = _font(text_px), _font(round(text_px * 1.2))
    head = round(text_px * 2.1) if title or caption else 0
    page_width = 2 * _MARGIN + len(tiles) * width + (len(tiles) - 1) * _GAP
    line = round(text_px * 1.75)
    # The classes stand under the tiles that show them, the errors under theirs.
    first = _MARGIN + (width + _GAP if len(tiles) == 4 else 0)
    last = _MARGIN + (len(tiles) - 1) * (width + _GAP)
    stop = last - _GAP if error_marks else page_width - _MARGIN
    class_lines = _wrapped(marks, text, text_px, stop - first)
    error_lines = _wrapped(error_marks, text, text_px, width)
    legend = max(len(class_lines), len(error_lines))
    top = _MARGIN + head + line
    page = Image.new(
        "RGB", (page_width, top + height + (round(text_px * 0.6) + legend * line) + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(page)
    if head:
        right = draw.textlength(caption, font=text)
        room = page_width - 2 * _MARGIN - right - (2 * text_px if caption else 0)
        draw.text((_MARGIN, _MARGIN), _shortened(draw, title, heading, room), _INK, font=heading)
        place = (page_width - _MARGIN - right, _MARGIN + round(text_px * 0.15))
        draw.text(place, caption, _FAINT_INK, font=text)
    for column, (name, tile) in enumerate(tiles):
        left = _MARGIN + column * (width + _GAP)
        draw.text((left, top - line + round(text_px * 0.15)), name, _FAINT_INK, font=text)
        page.paste(Image.fromarray(tile), (left, top))
        frame = (left - 1, top - 1, left + width, top + height)
        draw.rectangle(frame, outline=(205, 208, 212))
    below = top + height + round(text_px * 0.6)
    for lines, left in ((class_lines, first), (error_lines, last)):
        for row, entries in enumerate(lines):
            x = left
            for name, colour, kind in entries:
                _draw_mark(draw, (x, below + row * line), text_px, colour, kind, alpha)
                draw.text((x + round(text_px * 1.5), below + row * line), name, _INK, font=text)
                x += _mark_width(draw, name, text, text_px)
    return np.asarray(page)


def _mark_width(draw: ImageDraw.ImageDraw, name: str, font: object, text_px: int) -> int:
    return round(text_px * 2.9 + draw.textlength(name, font=font))  # type: ignore[arg-type]


def _wrapped(
    marks: Sequence[tuple[str, Colour, str]], font: object, text_px: int, width: int
) -> list[list[tuple[str, Colour, str]]]:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[list[tuple[str, Colour, str]]] = []
    used = width + 1
    for mark in marks:
        wide = _mark_width(draw, mark[0], font, text_px)
        # The space behind the last entry of a line may stick out.
        if used + wide - text_px > width:
            lines.append([])
            used = 0
        lines[-1].append(mark)
        used += wide
    return lines


def _shortened(draw: ImageDraw.ImageDraw, text: str, font: object, room: float) -> str:
    if draw.textlength(text, font=font) <= room:  # type: ignore[arg-type]
        return text
    while text and draw.textlength(text + "...", font=font) > room:  # type: ignore[arg-type]
        text = text[:-1]
    return text + "..."


def _draw_mark(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text_px: int,
    colour: Colour,
    kind: str,
    alpha: float,
) -> None:
    left, top = place
    side = round(text_px * 1.05)
    box = (left, top + 1, left + side, top + 1 + side)
    if kind == "solid":
        draw.rectangle(box, fill=colour)
    elif kind == "hatch":
        draw.rectangle(box, fill=(240, 241, 243), outline=colour)
        for start in range(0, side, 4):
            draw.line((left, top + 1 + start, left + start, top + 1), fill=colour)
            draw.line((left + start, top + 1 + side, left + side, top + 1 + start), fill=colour)
    else:
        # As it looks on the slide: a tinted pink with an outline.
        tint = _to_uint8(_blend(np.array([[[232, 200, 218]]], np.float32), colour, np.array(alpha)))
        red, green, blue = tint[0, 0].tolist()
        draw.rectangle(box, fill=(red, green, blue), outline=colour, width=2)
