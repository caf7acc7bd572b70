"""Batches for the head, read from a feature store: whole regions, or random crops of feature maps.

A crop is a square of the region. Of each level it needs the cells that cover it and, where its
border does not fall on a patch border, one more cell that the bilinear weights of its outermost
rows reach. Which crop a step sees depends on (seed, step, index) alone, so a resumed run continues
with the crops that it would have seen.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from pathsegdiff.config import HEAD_INPUTS, TOKENS
from pathsegdiff.errors import RunError
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.grid import patchwise_matrix
from pathsegdiff.segmentation.head import GRID_STRIDE, FeatureBatch, HeadLevel

Batch = TypeVar("Batch")
#: Crops start and end on multiples of this, or of the coarsest stride where that is larger.
CROP_STEP_PX = 32
#: Batches that are read ahead of the one that is used.
PREFETCH = 2
#: Separates the random draws that share a seed and a step.
_ORDER_STREAM, _CROP_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class CropRequest:
    """One crop of one sample.

    Attributes:
        sample: Of the store.
        top_px: First row, in region pixels.
        left_px: First column.
        flip_rows: Mirror it top to bottom after reading.
        flip_columns: Mirror it left to right after reading.
    """

    sample: StoredSample
    top_px: int = 0
    left_px: int = 0
    flip_rows: bool = False
    flip_columns: bool = False


@dataclass(frozen=True)
class AxisWindow:
    """What a crop needs of one level along one axis.

    Attributes:
        start: First cell to read.
        stop: One past the last cell to read.
        offset: Position of cell ``start`` in the window; the other positions are filled with zeros
            and have weight zero, so that every crop of a size has windows of one size.
        weights: (crop cells on the grid, window cells) float32 bilinear weights.
    """

    start: int
    stop: int
    offset: int
    weights: np.ndarray


def head_levels(store: FeatureStore, taps: Sequence[str] | None = None) -> tuple[HeadLevel, ...]:
    """What a head reads of a store, finest level first.

    Args:
        store: Open for reading.
        taps: Those to read, "tokens" among them or alone; None for all taps that the store has.

    Raises:
        RunError: If the store lacks a tap, or the tokens.
    """
    if taps is None:
        taps = [tap.name for level in store.levels.values() for tap in level.taps]
    stored = {tap.name for level in store.head_levels for tap in level.taps}
    wanted = [name for name in HEAD_INPUTS if name in taps]
    missing = [name for name in wanted if name not in stored]
    if missing:
        if missing[0] == TOKENS:
            raise RunError(
                f"{store.path} holds no tokens of the encoder; extract with `psd extract --tokens` "
                "into another --out"
            )
        kept = ", ".join(name for name in HEAD_INPUTS if name in stored)
        raise RunError(f"{store.path} has no tap {missing[0]}; choose --taps among {kept}")
    found = []
    for level in sorted(store.head_levels, key=lambda level: level.stride):
        channels = tuple(
            (tap.name, tap.stop - tap.start) for tap in level.taps if tap.name in wanted
        )
        if channels:
            found.append(HeadLevel(name=level.name, stride=level.stride, taps=channels))
    return tuple(found)


def crop_step(levels: Sequence[HeadLevel]) -> int:
    """Pixels between the places where a crop can start: whole cells of every level."""
    return max(CROP_STEP_PX, *(level.stride for level in levels))


@lru_cache(maxsize=512)
def axis_window(
    stride: int, patch_px: int, patches: int, start_px: int, size_px: int
) -> AxisWindow:
    """Cells and weights that turn a level into ``size_px`` pixels of the grid, along one axis.

    Args:
        stride: Of the level.
        patch_px: Side of a patch; nothing is interpolated across its border.
        patches: Patches of the region along the axis.
        start_px: First pixel of the crop, a multiple of the stride.
        size_px: Pixels of the crop, a multiple of the stride.
    """
    cells = patches * patch_px // stride
    matrix = patchwise_matrix(patches, patch_px // stride, patch_px // GRID_STRIDE)
    rows = matrix[start_px // GRID_STRIDE : (start_px + size_px) // GRID_STRIDE]
    if size_px == patches * patch_px:
        return AxisWindow(0, cells, 0, rows)
    # One halo cell on either side; which of the two carry weight depends on the patch borders.
    halo = 0 if stride == GRID_STRIDE else 1
    first = start_px // stride - halo
    used = np.flatnonzero(rows.any(axis=0))
    start, stop = int(used[0]), int(used[-1]) + 1
    offset = start - first
    weights = np.zeros((len(rows), size_px // stride + 2 * halo), np.float32)
    weights[:, offset : offset + stop - start] = rows[:, start:stop]
    return AxisWindow(start, stop, offset, weights)


class RegionReader:
    """Reads crops, or whole regions, of a store as batches.

    Args:
        store: Open for reading.
        levels: What the head reads of it.
        crop_px: Side of the crops; None for whole regions.

    Raises:
        RunError: If the crop does not fit the regions or its side is no multiple of the step.
    """

    def __init__(
        self, store: FeatureStore, levels: Sequence[HeadLevel], crop_px: int | None = None
    ) -> None:
        self.store = store
        self.levels = tuple(levels)
        self.step_px = crop_step(levels)
        if crop_px is not None and (
            crop_px % self.step_px or not self.step_px <= crop_px <= store.region_px
        ):
            raise RunError(
                f"--crop must be a multiple of {self.step_px} px up to the region's "
                f"{store.region_px} px, got {crop_px}; use --crop none for whole regions"
            )
        self.crop_px = crop_px
        self.side_px = store.region_px if crop_px is None else crop_px

    def request(
        self, sample: StoredSample, rng: np.random.Generator, *, flips: bool
    ) -> CropRequest:
        """A random crop of a sample (the whole region where no crop size is set)."""
        places = (self.store.region_px - self.side_px) // self.step_px + 1
        top, left = rng.integers(places, size=2)
        # Drawn in any case, so that crops are the same with and without flips.
        flip_rows, flip_columns = rng.integers(2, size=2)
        return CropRequest(
            sample=sample,
            top_px=self.step_px * int(top),
            left_px=self.step_px * int(left),
            flip_rows=flips and bool(flip_rows),
            flip_columns=flips and bool(flip_columns),
        )

    def read(self, requests: Sequence[CropRequest], *, labels: bool = True) -> FeatureBatch:
        """Read crops into one batch (in the store's dtype, on the CPU)."""
        levels, rows, columns = {}, {}, {}
        for level in self.levels:
            parts = [self._read_level(level, request) for request in requests]
            levels[level.name] = torch.from_numpy(_stack([features for features, _, _ in parts]))
            if level.stride != GRID_STRIDE:
                rows[level.name] = _stack_weights([weights for _, weights, _ in parts])
                columns[level.name] = _stack_weights([weights for _, _, weights in parts])
        found = torch.from_numpy(np.stack([self._label(r) for r in requests])) if labels else None
        return FeatureBatch(levels=levels, rows=rows, columns=columns, labels=found)

    def _read_level(
        self, level: HeadLevel, request: CropRequest
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        patch_px, patches = self.store.patch_px, self.store.patches_per_side
        row = axis_window(level.stride, patch_px, patches, request.top_px, self.side_px)
        column = axis_window(level.stride, patch_px, patches, request.left_px, self.side_px)
        read = self.store.read_level(
            request.sample,
            level.name,
            rows=slice(row.start, row.stop),
            columns=slice(column.start, column.stop),
            taps=[tap for tap, _ in level.taps],
        )
        shape = (level.channels, row.weights.shape[1], column.weights.shape[1])
        features = read
        if read.shape != shape:
            features = np.zeros(shape, read.dtype)
            features[
                :,
                row.offset : row.offset + row.stop - row.start,
                column.offset : column.offset + column.stop - column.start,
            ] = read
        row_weights, column_weights = row.weights, column.weights
        # A mirrored map has mirrored weights: both the cells and the grid run backwards.
        if request.flip_rows:
            features, row_weights = features[:, ::-1], row_weights[::-1, ::-1]
        if request.flip_columns:
            features, column_weights = features[:, :, ::-1], column_weights[::-1, ::-1]
        return features, row_weights, column_weights

    def _label(self, request: CropRequest) -> np.ndarray:
        rows = slice(request.top_px, request.top_px + self.side_px)
        columns = slice(request.left_px, request.left_px + self.side_px)
        label = self.store.label(request.sample)[rows, columns]
        if request.flip_rows:
            label = label[::-1]
        return label[:, ::-1] if request.flip_columns else label


def grid_batch(
    levels: Sequence[HeadLevel],
    arrays: dict[str, torch.Tensor],
    *,
    patch_px: int,
    rows: int,
    columns: int,
) -> FeatureBatch:
    """A batch of whole grids of patches that come from no store (prediction on new images).

    Args:
        levels: What the head reads.
        arrays: level name -> (B, C_level, rows * cells, columns * cells) stitched features.
        patch_px: Side of a patch.
        rows: Patches of the grid, downwards.
        columns: Patches of the grid, across.
    """
    coarse = [level for level in levels if level.stride != GRID_STRIDE]

    def weights(patches: int) -> dict[str, torch.Tensor]:
        found = {}
        for level in coarse:
            window = axis_window(level.stride, patch_px, patches, 0, patches * patch_px)
            found[level.name] = _stack_weights([window.weights])
        return found

    wanted = {level.name: arrays[level.name] for level in levels}
    return FeatureBatch(levels=wanted, rows=weights(rows), columns=weights(columns))


def training_requests(
    reader: RegionReader,
    samples: Sequence[StoredSample],
    step: int,
    *,
    batch_size: int,
    seed: int,
    flips: bool = False,
) -> list[CropRequest]:
    """The crops of one training step: every sample once per epoch, in an order keyed by the epoch.

    Args:
        reader: Knows the crop size.
        samples: Of the training part.
        step: From 0 through the whole training.
        batch_size: Samples of a step; the last step of an epoch has what remains.
        seed: Of the run.
        flips: Mirror at random.
    """
    epoch, position = divmod(step, steps_per_epoch(len(samples), batch_size))
    order = epoch_order(seed, epoch, len(samples))
    chosen = order[position * batch_size : (position + 1) * batch_size]
    return [
        reader.request(
            samples[int(number)],
            np.random.default_rng((seed, _CROP_STREAM, step, index)),
            flips=flips,
        )
        for index, number in enumerate(chosen)
    ]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, number: int) -> np.ndarray:
    """The order in which an epoch goes over so many samples; drawn once, not in each step."""
    order = np.random.default_rng((seed, _ORDER_STREAM, epoch)).permutation(number)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Steps in which every sample is seen once."""
    return -(-num_samples // batch_size)


def prefetch(
    jobs: Iterable[Callable[[], Batch]], ahead: int = PREFETCH
) -> Generator[Batch, None, None]:
    """Run jobs in order on a thread of their own, up to ``ahead`` of the one that is used.

    An error of a job is raised where its batch would have been.
    """
    remaining = iter(jobs)
    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="psd-loader")
    try:
        for job in remaining:
            waiting.append(pool.submit(job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(B, ...) of B arrays; a single one is not copied, unless it runs backwards."""
    if len(arrays) == 1 and arrays[0].flags.c_contiguous:
        return arrays[0][None]
    return np.stack(arrays)


def _stack_weights(weights: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, M, h), or (1, M, h) where all are the same array."""
    if all(matrix is weights[0] for matrix in weights):
        weights = weights[:1]
    return torch.from_numpy(np.stack(weights))
