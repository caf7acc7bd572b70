"""Write a manifest for a user's own folders of images and masks, guessing what they do not say.

Every guess is a note for the user, and stands in a file that can be edited.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pathsegdiff.data.image import (
    IMAGE_SUFFIXES,
    file_sha256,
    is_jpeg,
    pixel_sha256,
    read_image,
    read_label_image,
    shown,
)
from pathsegdiff.data.labels import POSITIVE, LabelClass, LabelScheme
from pathsegdiff.data.manifest import size_mismatch
from pathsegdiff.data.manifest_file import NAME, NAME_RULE, Manifest, load_manifest
from pathsegdiff.data.passes import map_threads
from pathsegdiff.data.regions import RegionRule, check_mpp
from pathsegdiff.errors import DataError

#: How people name a mask after its image.
_SUFFIXES = ("", "_anno", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "-mask", "-labels")
_MAX_CLASSES = 50
_VOID = 255
_TEST_SHARE = 0.2
#: Told apart with common colour blindness (Okabe and Ito 2008), then lighter and darker ones.
_COLOURS = (
    (0, 158, 115),
    (213, 94, 0),
    (0, 114, 178),
    (240, 228, 66),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (120, 94, 240),
    (0, 90, 50),
    (150, 75, 0),
)
_BACKGROUND = (230, 230, 230)


@dataclass(frozen=True, kw_only=True)
class InitResult:
    """A manifest that was written, and what was guessed for it.

    Attributes:
        class_pixels: Over all masks, in the order of the classes.
        notes: One line each, for the user to confirm.
    """

    manifest: Manifest
    class_pixels: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Row:
    sample_id: str
    image: Path
    mask: Path
    group: str


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What one image and its mask hold.

    Attributes:
        pixels: Raw code -> count.
        single: How many codes above 0 are one connected piece.
        consecutive: Whether the codes above 0 are 1, 2, 3, ...
    """

    size: tuple[int, int]
    image_sha256: str
    mask_sha256: str
    image_file_sha256: str
    pixels: dict[int, int]
    single: int
    consecutive: bool


def init_manifest(
    images: Path,
    masks: Path,
    out: Path,
    *,
    mask_suffix: str | None = None,
    kind: str | None = None,
    region_px: int = 768,
    window_px: int | None = None,
    mpp: float | None = None,
    group_regex: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InitResult:
    """Find pairs of images and masks, look into all of them, and write NAME.toml and NAME.csv.

    A fifth of the groups become the split "test", chosen by the hash of their name: the same on
    every machine.

    Args:
        images, masks: Folders, looked through with their sub-folders; they may be the same.
        out: NAME.toml; neither it nor NAME.csv may exist.
        mask_suffix: What follows the image's stem in the mask's. None: the commonest that fits.
        kind: "resize" or "window". None: windows where images are much larger than a region.
        region_px: Side of a region.
        window_px: Side of a window before the crop; only of "window".
        mpp: Micrometres per pixel of the images, where known.
        group_regex: Its first group (or all of it) found in the image's path below ``images`` is
            the group. None: each image stands alone.
        progress: Called with (done, total) images.

    Raises:
        DataError: If nothing pairs, a file cannot be read, masks hold one code only or too many,
            fewer than two groups remain, or ``out`` exists.
    """
    out = out if out.suffix == ".toml" else out.with_name(f"{out.name}.toml")
    table = out.with_suffix(".csv")
    if not NAME.fullmatch(out.stem):
        raise DataError(f"{shown(out)}: the name of a manifest must be {NAME_RULE}")
    for path in (out, table):
        if path.exists():
            raise DataError(f"{shown(path)} exists; delete it, or choose another --out")
    check_mpp("mpp", mpp)
    images, masks = images.resolve(), masks.resolve()
    notes: list[str] = []
    rows = _pairs(images, masks, mask_suffix, _group_pattern(group_regex), notes)
    splits = _split_by_group(rows)
    facts = _look(rows, progress)
    scheme = _guess_scheme(facts, notes)
    rule = _guess_rule([fact.size for fact in facts], kind, region_px, window_px, notes)
    if rule.kind == "window" and scheme.objects is not None:
        scheme = LabelScheme(classes=scheme.classes, dont_care=scheme.dont_care)
        notes.append("objects are not counted, since images are cut into windows")
    class_pixels = _class_pixels(facts, scheme)
    _note_empty_classes(rows, facts, splits, scheme, notes)
    root = Path(os.path.commonpath([images, masks]))
    if group_regex is None:
        notes.append("every image is a group of its own; --group-regex keeps patients together")
    toml = _toml(out, images, root, len(rows), scheme, rule, mpp)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(_csv(rows, facts, splits, root), encoding="utf-8")
    out.write_text(toml, encoding="utf-8")
    try:
        manifest = load_manifest(out)
    except DataError:  # such as a file name that no manifest may hold
        table.unlink()
        out.unlink()
        raise
    return InitResult(manifest=manifest, class_pixels=class_pixels, notes=tuple(notes))


def _pairs(
    images: Path,
    masks: Path,
    suffix: str | None,
    pattern: re.Pattern[str] | None,
    notes: list[str],
) -> list[_Row]:
    image_files, mask_files = (_files_by_stem(folder) for folder in (images, masks))
    same = images == masks
    tried = [suffix] if suffix is not None else [s for s in _SUFFIXES if s or not same]
    if same and suffix == "":
        raise DataError("images and masks lie in one folder, so masks need a --mask-suffix")
    found = {s: [stem for stem in image_files if f"{stem}{s}" in mask_files] for s in tried}
    best = max(tried, key=lambda s: len(found[s]))
    if not found[best]:
        example = next(iter(image_files))
        raise DataError(
            f"no image has a mask: {shown(images)} has {shown(example)}, and {shown(masks)} no "
            f"{shown(PurePosixPath(example).name)}{best or ''}.*; name the ending of masks with "
            "--mask-suffix"
        )
    if suffix is None:
        notes.append(f"masks are named like their image{f' with {best!r} added' if best else ''}")
    paired = set(found[best])
    masks_here = {f"{stem}{best}" for stem in paired} if same else set()
    alone = [stem for stem in image_files if stem not in paired and stem not in masks_here]
    if alone:
        notes.append(f"{len(alone)} images without a mask are left out, such as {shown(alone[0])}")
    rows, seen = [], set()
    for stem in found[best]:
        sample_id = re.sub(r"[^A-Za-z0-9._-]", "-", stem.replace("/", "_")).lstrip("._-")[:120]
        while not sample_id or sample_id.casefold() in seen:
            sample_id += f"{sample_id and '-'}{hashlib.sha256(stem.encode()).hexdigest()[:6]}"
        seen.add(sample_id.casefold())
        image = image_files[stem]
        rows.append(
            _Row(
                sample_id=sample_id,
                image=image,
                mask=mask_files[f"{stem}{best}"],
                group=_group(pattern, image.relative_to(images).as_posix(), sample_id),
            )
        )
    return rows


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Image files below a folder by path without suffix; of several containers a lossless one."""
    if not folder.is_dir():
        raise DataError(f"{shown(folder)}: there is no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix.lower() not in IMAGE_SUFFIXES or any(
            part.startswith(".") for part in relative.parts
        ):
            continue
        if not str(relative).isprintable():
            raise DataError(f"{shown(path)}: the name holds a control character; rename the file")
        stem = relative.with_suffix("").as_posix()
        rank = IMAGE_SUFFIXES.index(path.suffix.lower())
        if stem not in found or rank < IMAGE_SUFFIXES.index(found[stem].suffix.lower()):
            found[stem] = path
    if not found:
        raise DataError(
            f"{shown(folder)} holds no {', '.join(s[1:] for s in IMAGE_SUFFIXES)} files"
        )
    return found


def _group_pattern(group_regex: str | None) -> re.Pattern[str] | None:
    if group_regex is None:
        return None
    try:
        return re.compile(group_regex)
    except (re.error, RecursionError, OverflowError) as error:
        raise DataError(f"--group-regex {shown(group_regex)!r} is no pattern: {error}") from None


def _group(pattern: re.Pattern[str] | None, path: str, sample_id: str) -> str:
    if pattern is None:
        return sample_id
    match = pattern.search(path)
    group = match and (match.group(1) if pattern.groups else match.group(0))
    if not group:
        raise DataError(
            f"--group-regex {pattern.pattern!r} finds no group in {shown(path)}; each image "
            "needs one"
        )
    return group


def _split_by_group(rows: Sequence[_Row]) -> dict[str, str]:
    """Group -> split."""
    groups = sorted(
        {row.group for row in rows}, key=lambda group: hashlib.sha256(group.encode()).hexdigest()
    )
    if len(groups) < 2:
        raise DataError(
            f"all {len(rows)} images are of one group, so none can be held out for testing; "
            "add images of others, or mend --group-regex"
        )
    count = max(1, round(_TEST_SHARE * len(groups)))
    return {group: "test" if index < count else "train" for index, group in enumerate(groups)}


def _look(rows: Sequence[_Row], progress: Callable[[int, int], None] | None) -> list[_Facts]:
    facts: list[_Facts] = []
    for start in range(0, len(rows), 16):
        facts += map_threads(_facts, rows[start : start + 16])
        if progress is not None:
            progress(len(facts), len(rows))
    return facts


def _facts(row: _Row) -> _Facts:
    image, raw = read_image(row.image), read_label_image(row.mask)
    if image.shape[:2] != raw.shape:
        raise size_mismatch(row.mask, raw.shape, image.shape[:2])
    codes, counts = np.unique(raw, return_counts=True)
    above = [int(code) for code in codes if code > 0]
    return _Facts(
        size=raw.shape,
        image_sha256=pixel_sha256(image),
        mask_sha256=pixel_sha256(raw),
        image_file_sha256=file_sha256(row.image) if is_jpeg(row.image) else "",
        pixels={int(code): int(count) for code, count in zip(codes, counts, strict=True)},
        single=_count_single_pieces(raw),
        consecutive=above == list(range(1, len(above) + 1)),
    )


def _count_single_pieces(raw: np.ndarray) -> int:
    from scipy import ndimage

    if raw.max() > 1 << 16:
        return 0
    pieces = 0
    for code, part in enumerate(ndimage.find_objects(raw), start=1):
        if part is not None:
            pieces += ndimage.label(raw[part] == code, np.ones((3, 3)))[1] == 1
    return pieces


def _guess_scheme(facts: Sequence[_Facts], notes: list[str]) -> LabelScheme:
    codes = sorted({code for fact in facts for code in fact.pixels})
    above = [code for code in codes if code > 0]
    background = LabelClass(name="background", colour=_BACKGROUND, codes=(0,))
    foreground = LabelClass(name="foreground", colour=_COLOURS[0], codes=POSITIVE)
    if len(codes) < 2:
        raise DataError(
            f"all masks hold the code {codes[0]} alone; at least two classes are needed"
        )
    if codes[0] == 0 and len(above) == 1:
        notes.append(f"code 0 is background, code {above[0]} foreground")
        return LabelScheme(classes=(background, foreground))
    if _are_objects(facts, above) and codes[0] == 0:
        notes.append(
            f"masks hold one integer per object (up to {above[-1]}): 0 is background, all others "
            "foreground, and objects are counted"
        )
        return LabelScheme(classes=(background, foreground), objects="foreground")
    dont_care = None
    if codes[-1] == _VOID and len(codes) > 2 and codes[-2] < 100:
        notes.append(f"code {_VOID} is taken as don't care")
        dont_care = LabelClass(name="ignore", colour=(0, 0, 0), codes=(_VOID,))
        codes.remove(_VOID)
    if len(codes) > _MAX_CLASSES:
        raise DataError(
            f"masks hold {len(codes)} codes (0 to {codes[-1]}), more than {_MAX_CLASSES} classes, "
            "and they are not one integer per object; save masks with one code per class"
        )
    if codes[-1] >= 1 << 16:
        raise DataError(f"masks hold the code {codes[-1]}; save them with codes below 65536")
    notes.append(f"each code ({', '.join(map(str, codes))}) is a class; edit their names")
    classes = [
        background
        if code == 0
        else LabelClass(name=f"code {code}", colour=_colour(index), codes=(code,))
        for index, code in enumerate(codes, start=-1 if codes[0] == 0 else 0)
    ]
    return LabelScheme(classes=tuple(classes), dont_care=dont_care)


def _are_objects(facts: Sequence[_Facts], above: Sequence[int]) -> bool:
    """Whether codes look like object numbers: 1, 2, 3, ... in each mask, each in one piece."""
    filled = [fact for fact in facts if any(code > 0 for code in fact.pixels)]
    pieces = sum(sum(code > 0 for code in fact.pixels) for fact in filled)
    consecutive = sum(fact.consecutive for fact in filled)
    return (
        len(above) >= 4
        and sum(fact.single for fact in filled) >= 0.9 * pieces
        and consecutive >= 0.8 * len(filled)
    )


def _colour(index: int) -> tuple[int, int, int]:
    red, green, blue = _COLOURS[index % len(_COLOURS)]
    shade = 0.7 ** (index // len(_COLOURS))
    return round(red * shade), round(green * shade), round(blue * shade)


def _guess_rule(
    sizes: Sequence[tuple[int, int]],
    kind: str | None,
    region_px: int,
    window_px: int | None,
    notes: list[str],
) -> RegionRule:
    short = statistics.median(min(size) for size in sizes)
    long = statistics.median(max(size) for size in sizes)
    if kind is None:
        kind = "window" if window_px is not None or short >= 1.5 * region_px else "resize"
        how = "cut into windows" if kind == "window" else f"resized to {region_px} x {region_px} px"
        notes.append(f"images of about {short:.0f} x {long:.0f} px are {how}")
    enough = 256 * math.ceil(short / 256)
    if kind == "resize" and short * 2 < region_px and enough < region_px:
        notes.append(
            f"that enlarges them {region_px / short:.1f} times; --region-px {enough} is faster"
        )
    if kind == "window" and window_px is None:
        window_px = round(region_px * 800 / 768)  # leaves the training crop some play
    return RegionRule(kind=kind, region_px=region_px, window_px=window_px)


def _class_pixels(facts: Sequence[_Facts], scheme: LabelScheme) -> tuple[int, ...]:
    total = np.zeros(256, np.int64)
    for fact in facts:
        codes = np.array([list(fact.pixels)], np.int64)
        np.add.at(total, scheme.apply(codes, "masks")[0], list(fact.pixels.values()))
    return tuple(int(count) for count in total[: scheme.num_classes])


def _note_empty_classes(
    rows: Sequence[_Row],
    facts: Sequence[_Facts],
    splits: dict[str, str],
    scheme: LabelScheme,
    notes: list[str],
) -> None:
    for split in ("train", "test"):
        here = [fact for row, fact in zip(rows, facts, strict=True) if splits[row.group] == split]
        empty = [
            name
            for name, count in zip(scheme.names, _class_pixels(here, scheme), strict=True)
            if count == 0
        ]
        if empty:
            notes.append(f"split {split} has no pixel of {', '.join(empty)}; edit the splits")


def _csv(rows: Sequence[_Row], facts: Sequence[_Facts], splits: dict[str, str], root: Path) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("sample_id", "image", "mask", "split", "group", "height_px", "width_px"),
            *("image_sha256", "mask_sha256", "image_file_sha256"),
        ]
    )
    for row, fact in zip(rows, facts, strict=True):
        paths = [path.relative_to(root).as_posix() for path in (row.image, row.mask)]
        hashes = [fact.image_sha256, fact.mask_sha256, fact.image_file_sha256]
        writer.writerow([row.sample_id, *paths, splits[row.group], row.group, *fact.size, *hashes])
    return text.getvalue()


def _toml(
    out: Path,
    images: Path,
    root: Path,
    count: int,
    scheme: LabelScheme,
    rule: RegionRule,
    mpp: float | None,
) -> str:
    folder = out.parent.resolve()
    # Relative where both lie close together, so that they can be moved together.
    place = Path(os.path.relpath(root, folder)).as_posix()
    if place.startswith("../../.."):
        place = root.as_posix()
    region = {key: value for key, value in rule.to_dict().items() if value is not None}
    if rule.kind == "resize":
        del region["max_dont_care"]
    lines = [
        "# Written by `psd data init`; names, colours, splits and classes are yours to edit.",
        "# A class that is not to be counted goes into [labels] as dont_care = { ... }.",
        f"name = {_value(out.stem)}",
        f"title = {_value(f'{count} images of {images.name}')}",
        'licence = "not stated"',
        f"root = {_value(place)}  # seen from this file",
        *([f"mpp = {float(mpp)!r}"] if mpp is not None else []),
        'splits = ["train", "test"]',
        "grouped = true",
        "",
        "[region]",
        *(f"{key} = {_value(value)}" for key, value in region.items()),
        "",
        "[labels]",
        *([f"objects = {_value(scheme.objects)}"] if scheme.objects is not None else []),
        "classes = [",
        *(f"  {_inline(entry)}," for entry in scheme.classes),
        "]",
        *([f"dont_care = {_inline(scheme.dont_care)}"] if scheme.dont_care is not None else []),
    ]
    return "\n".join(lines) + "\n"


def _inline(entry: LabelClass) -> str:
    pairs = ", ".join(f"{key} = {_value(value)}" for key, value in entry.to_dict().items())
    return f"{{ {pairs} }}"


def _value(value: Any) -> str:
    """A TOML value: its strings, integers, floats and lists are written as JSON's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
