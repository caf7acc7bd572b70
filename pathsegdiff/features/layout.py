"""Which tap stands where in a store: levels, channels and chunks (standard library only).

A level is one array: all taps of one spatial size, concatenated along channels in tap order and
stitched over the patches of a region.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from pathsegdiff.config import ALL_TAPS, HEAD_INPUTS
from pathsegdiff.errors import StoreError

#: The dense map and the head work on this grid (image pixels per cell).
GRID_STRIDE = 4
#: A chunk that would be smaller than this holds the whole region, a larger one a patch.
_CHUNK_BYTES = 1 << 20
#: Also the name of the array's folder.
_LEVEL_NAME = re.compile(r"stride_[0-9]{1,4}|dense|tokens")
#: Of a level; the paper's model has 7296 in all of them.
_MAX_CHANNELS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TapSpec:
    """One tap of a model: ``channels`` values every ``stride`` pixels of a patch."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class TapSlice:
    """Channels ``[start, stop)`` of a level belong to the tap ``name``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Level:
    """One feature array of a store.

    Attributes:
        name: Of the array, "stride_8".
        stride: Image pixels per cell.
        cells_per_patch: Cells along one side of a patch.
        taps: In tap order, without gaps.
    """

    name: str
    stride: int
    cells_per_patch: int
    taps: tuple[TapSlice, ...]

    @property
    def channels(self) -> int:
        """Of all its taps together."""
        return self.taps[-1].stop

    def chunk(self, rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
        """(channels, cells, cells) of one chunk: a reader can take some taps and some patches.

        Channels: the largest number that divides every tap, so that no chunk mixes two taps.
        """
        channels = gcd(*(tap.stop - tap.start for tap in self.taps))
        height, width = rows * self.cells_per_patch, columns * self.cells_per_patch
        if channels * height * width * itemsize <= _CHUNK_BYTES:
            return channels, height, width
        return channels, self.cells_per_patch, self.cells_per_patch

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "stride": self.stride,
            "cells_per_patch": self.cells_per_patch,
            "taps": [[tap.name, tap.start, tap.stop] for tap in self.taps],
        }

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> "Level":
        """Read what ``to_dict`` wrote.

        Raises:
            StoreError: If the values do not describe a level.
        """
        try:
            taps = tuple(
                TapSlice(name=str(tap), start=int(start), stop=int(stop))
                for tap, start, stop in values["taps"]
            )
            stride, cells = int(values["stride"]), int(values["cells_per_patch"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(
                f"level {name!r:.60} is not described as a level: {error!r:.200}"
            ) from None
        ends = [0, *(tap.stop for tap in taps)]
        gapless = all(tap.start == end < tap.stop for tap, end in zip(taps, ends, strict=False))
        if (
            not _LEVEL_NAME.fullmatch(name)
            or not (taps and gapless and taps[-1].stop <= _MAX_CHANNELS)
            or not all(tap.name in HEAD_INPUTS for tap in taps)
            or not (stride >= 1 and cells >= 1)
        ):
            raise StoreError(f"level {name!r:.60} is not described as a level: {values!r:.200}")
        return cls(name=name, stride=stride, cells_per_patch=cells, taps=taps)


def plan_levels(taps: Sequence[TapSpec], patch_px: int, layout: str) -> tuple[Level, ...]:
    """Group taps into levels, finest first.

    Args:
        taps: Those that are extracted, in any order.
        patch_px: Side of a patch.
        layout: "levels", or "dense" for one array on the stride-4 grid with every tap.
    """
    ordered = sorted(taps, key=lambda tap: ALL_TAPS.index(tap.name))
    if layout == "dense":
        return (_level("dense", GRID_STRIDE, patch_px, ordered),)
    strides = sorted({tap.stride for tap in ordered})
    return tuple(
        _level(f"stride_{stride}", stride, patch_px, [t for t in ordered if t.stride == stride])
        for stride in strides
    )


def _level(name: str, stride: int, patch_px: int, taps: Sequence[TapSpec]) -> Level:
    slices, start = [], 0
    for tap in taps:
        slices.append(TapSlice(name=tap.name, start=start, stop=start + tap.channels))
        start += tap.channels
    return Level(name=name, stride=stride, cells_per_patch=patch_px // stride, taps=tuple(slices))
