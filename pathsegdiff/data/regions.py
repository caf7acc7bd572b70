"""Resize or window a source image into square regions; cut a region into patches (numpy, Pillow).

A region is what one sample covers: ``region_px`` square, a whole number of patches. The whole
source is resized to it, or a large source is covered by windows, of each of which a crop of
``region_px`` becomes the region. Shapes: H = rows, W = columns, P = patch side.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from pathsegdiff.data.image import MAX_PIXELS, shown
from pathsegdiff.data.labels import LabelScheme
from pathsegdiff.errors import DataError

_MAX_REGION_PX = 8192


@dataclass(frozen=True, kw_only=True)
class RegionRule:
    """How a source image becomes regions.

    Attributes:
        kind: "resize" (the whole image becomes one region) or "window".
        region_px: Side of a region, a multiple of ``patch_px``.
        patch_px: Side of a patch.
        window_px: Side of the windows before cropping, at least ``region_px``; only of "window".
        max_dont_care: A window with a larger share of don't care is left out.
        mpp: Micrometres per pixel of the region, where known; windows are cut from the source
            scaled to it.
    """

    kind: str
    region_px: int
    patch_px: int = 256
    window_px: int | None = None
    max_dont_care: float = 0.9
    mpp: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("resize", "window"):
            raise DataError(f"region: kind must be resize or window, got {shown(self.kind)!r}")
        for name in ("region_px", "patch_px"):
            if not _is_int(getattr(self, name)):
                value = getattr(self, name)
                raise DataError(f"region: {name} must be an integer, got {shown(value)!r}")
        if not 32 <= self.patch_px <= 1024:
            raise DataError(f"region: patch_px must be from 32 to 1024, got {shown(self.patch_px)}")
        if self.region_px % self.patch_px or not 0 < self.region_px <= _MAX_REGION_PX:
            raise DataError(
                f"region: region_px must be a multiple of {self.patch_px}, at most "
                f"{_MAX_REGION_PX}, got {shown(self.region_px)}"
            )
        if self.kind == "resize" and self.window_px is not None:
            raise DataError("region: window_px belongs to kind window, not to resize")
        if self.kind == "window" and not (
            _is_int(self.window_px) and self.region_px <= self.window_px <= 4 * _MAX_REGION_PX  # type: ignore[operator]
        ):
            raise DataError(
                f"region: window_px must be at least region_px ({self.region_px}), "
                f"got {shown(self.window_px)}"
            )
        if not _is_number(self.max_dont_care) or not 0 <= self.max_dont_care <= 1:
            raise DataError(
                f"region: max_dont_care must be from 0 to 1, got {shown(self.max_dont_care)}"
            )
        check_mpp("region: mpp", self.mpp)
        # 1 and 1.0 must give the same hash.
        object.__setattr__(self, "max_dont_care", float(self.max_dont_care))
        object.__setattr__(self, "mpp", None if self.mpp is None else float(self.mpp))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "RegionRule":
        """Read what ``to_dict`` wrote, or the ``[region]`` table of a manifest.

        Raises:
            DataError: If a field is missing, unknown, or has a value it cannot have.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise DataError(f"region must be a table with some of {', '.join(names)}")
        for key in values:
            if key not in names:
                raise DataError(f"region has an unknown {shown(key)!r}; known: {', '.join(names)}")
        for key in ("kind", "region_px"):
            if key not in values:
                raise DataError(f"region lacks {key}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A rectangle of a source image at the rule's mpp; sides below ``window_px`` only where the
    source itself is smaller.

    Attributes:
        row, col: Place in the grid of windows, from 0.
        top, left, height, width: In px of the scaled source.
    """

    row: int
    col: int
    top: int
    left: int
    height: int
    width: int


def check_mpp(name: str, mpp: object) -> None:
    """Refuse a resolution that no microscope has.

    Raises:
        DataError: If it is neither None nor from 0.01 to 100 um/px.
    """
    if mpp is not None and not (_is_number(mpp) and 0.01 <= float(mpp) <= 100):  # type: ignore[arg-type]
        raise DataError(f"{name} must be from 0.01 to 100 um/px, got {shown(mpp)}")


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) after scaling, rounded half up, at least 1.

    Raises:
        DataError: If the result would have more than ``MAX_PIXELS`` pixels.
    """
    scaled = tuple(max(1, math.floor(side * scale + 0.5)) for side in (height, width))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise DataError(
            f"an image of {height} x {width} px would be scaled {scale:.3g} times to "
            f"{scaled[0]} x {scaled[1]} px, more than {MAX_PIXELS:,} pixels; choose a larger mpp"
        )
    return scaled[0], scaled[1]


def plan_windows(height: int, width: int, window_px: int) -> list[Window]:
    """Cover an image with windows, row by row.

    Along each axis n = ceil(length / window_px) windows; what they overlap is spread evenly. The
    first touches the start of the axis and the last its end.

    Args:
        height, width: Of the scaled source, in px.
        window_px: Side of a window; a source shorter than that has one window, as long as itself.
    """
    return [
        Window(
            row=row,
            col=col,
            top=top,
            left=left,
            height=min(window_px, height),
            width=min(window_px, width),
        )
        for row, top in enumerate(_starts(height, window_px))
        for col, left in enumerate(_starts(width, window_px))
    ]


def window_offset(seed: int, sample_id: str, slack_h: int, slack_w: int) -> tuple[int, int]:
    """Where in its window the crop of a training sample starts.

    Keyed by (seed, sample_id) alone: the same whatever the order, worker count or platform.

    Args:
        slack_h, slack_w: Largest row and column that the crop can start at, 0 or more.

    Returns:
        (row, column), each uniform over 0 .. slack.
    """
    digest = hashlib.sha256(f"window offset\0{seed}\0{sample_id}".encode()).digest()
    # 64 bits against at most 2^15 places: the bias of the remainder is below 1e-14.
    row, col = (int.from_bytes(digest[at : at + 8], "big") for at in (0, 8))
    return row % (slack_h + 1), col % (slack_w + 1)


def centre_offset(slack_h: int, slack_w: int) -> tuple[int, int]:
    """Where in its window the crop of a test sample starts: (row, column) of the middle one."""
    return slack_h // 2, slack_w // 2


def dont_care_share(label: np.ndarray, window: Window, scheme: LabelScheme) -> float:
    """Share of a window's pixels, 0 to 1, that no class counts.

    Args:
        label: (H, W) uint8 ids of the whole scaled source.
    """
    part = label[window.top : window.top + window.height, window.left : window.left + window.width]
    return float((part >= scheme.num_classes).mean())


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize bicubically; when shrinking, the kernel widens so that nothing aliases (Pillow).

    Args:
        image: (H, W, 3) uint8.
        size: (height, width) wanted.

    Returns:
        (height, width, 3) uint8; the input itself where the size is the same.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by the nearest pixel centre, so that no new code appears.

    Args:
        label: (H, W) of any integer type.
        size: (height, width) wanted.

    Returns:
        (height, width) of the same type; the input itself where the size is the same.
    """
    if label.shape == tuple(size):
        return label
    # Integers: floor((i + 0.5) * old / new) is then exact where a centre falls on a border.
    rows, cols = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(label.shape, size, strict=True)
    )
    return label[rows[:, None], cols[None, :]]


def pad_region(array: np.ndarray, region_px: int, value: int) -> np.ndarray:
    """Extend an image or label below and to the right to ``region_px`` square.

    Args:
        array: (H, W) or (H, W, 3), at most ``region_px`` high and wide.
        value: Of the new pixels: white (255) for images, the outside id for labels.
    """
    missing = [(0, region_px - side) for side in array.shape[:2]]
    if not any(after for _, after in missing):
        return array
    return np.pad(array, missing + [(0, 0)] * (array.ndim - 2), constant_values=value)


def cut_patches(region: np.ndarray, patch_px: int) -> np.ndarray:
    """Cut a region into patches that do not overlap.

    Args:
        region: (H, W, 3) uint8, both sides multiples of ``patch_px``.

    Returns:
        (rows * cols, P, P, 3) uint8, row by row.

    Raises:
        ValueError: If a side is no multiple of ``patch_px``.
    """
    height, width, channels = region.shape
    if height % patch_px or width % patch_px:
        raise ValueError(f"a region of {height} x {width} px has no whole {patch_px} px patches")
    rows, cols = height // patch_px, width // patch_px
    grid = region.reshape(rows, patch_px, cols, patch_px, channels)
    return grid.swapaxes(1, 2).reshape(rows * cols, patch_px, patch_px, channels)


def _starts(length: int, window_px: int) -> list[int]:
    count = max(1, math.ceil(length / window_px))
    if count == 1:
        return [0]
    # Integers throughout, rounded half up: the same on every platform.
    slack, gaps = length - window_px, count - 1
    return [(2 * index * slack + gaps) // (2 * gaps) for index in range(count)]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # The bounds also keep integers away that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9
