"""Pixels of feature stores: the maps that are read, and features at single pixels.

Shapes: N = pixels, C = channels of all maps together, H = W = region_px.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pathsegdiff.errors import RunError
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.pipeline.baselines.ensemble import PixelInput
from pathsegdiff.segmentation.sampling import head_levels

#: Separates the draw of pixels from others of the same seed.
_PIXEL_STREAM = 11
#: Recipe fields in which the stores of one ensemble may differ.
_MAY_DIFFER = ("timestep", "tokens", "taps")


def open_stores(paths: Sequence[str]) -> list[FeatureStore]:
    """Open stores whose maps belong side by side: one data set, model and seed.

    Raises:
        StoreError: If one is no store.
        RunError: If two differ in more than the timestep, or one is given twice.
    """
    stores = [FeatureStore.open(path) for path in paths]
    first = stores[0]
    for number, store in enumerate(stores[1:], start=1):
        odd = [name for name in first.recipe.differences(store.recipe) if name not in _MAY_DIFFER]
        if odd:
            mine, theirs = first.recipe.to_dict()[odd[0]], store.recipe.to_dict()[odd[0]]
            raise RunError(
                f"{store.path} has {odd[0]} {theirs}, {first.path} has {mine}: the stores of an "
                "ensemble differ in the timestep only; extract both with the same options"
            )
        if store.recipe.timestep in {other.recipe.timestep for other in stores[:number]}:
            raise RunError(
                f"{store.path} is a second store of t = {store.recipe.timestep}; give one of each"
            )
    return stores


def samples_of_all(stores: Sequence[FeatureStore]) -> tuple[StoredSample, ...]:
    """The complete samples of the first store.

    Raises:
        RunError: If another lacks one of them.
    """
    samples = stores[0].samples()
    for store in stores[1:]:
        there = {sample.sample_id for sample in store.samples()}
        missing = [sample.sample_id for sample in samples if sample.sample_id not in there]
        if missing:
            raise RunError(
                f"{store.path} lacks {len(missing)} of the samples of {stores[0].path} "
                f"({missing[0]}, ...); finish it with `psd extract`"
            )
    return samples


def pixel_inputs(stores: Sequence[FeatureStore], taps: Sequence[str]) -> list[PixelInput]:
    """The maps of these taps, store by store, finest level first.

    Raises:
        RunError: If a store lacks a tap.
    """
    return [
        PixelInput(
            store=number,
            level=level.name,
            taps=tuple(name for name, _ in level.taps),
            channels=level.channels,
            stride=level.stride,
        )
        for number, store in enumerate(stores)
        for level in head_levels(store, taps)
    ]


class PixelReader:
    """Reads the maps of one sample from several stores.

    Args:
        stores: Of ``open_stores``.
        inputs: Of ``pixel_inputs``.
    """

    def __init__(self, stores: Sequence[FeatureStore], inputs: Sequence[PixelInput]) -> None:
        self.stores, self.inputs = tuple(stores), tuple(inputs)
        # Each store numbers its samples itself.
        self._known = [{sample.sample_id: sample for sample in store.samples()} for store in stores]

    @property
    def channels(self) -> int:
        """C."""
        return sum(part.channels for part in self.inputs)

    def maps(self, sample: StoredSample) -> list[np.ndarray]:
        """(C_i, h, w) of every input, as stored.

        Raises:
            StoreError: If the sample is damaged.
        """
        return [
            self.stores[part.store].read_level(
                self._known[part.store][sample.sample_id], part.level, taps=part.taps
            )
            for part in self.inputs
        ]

    def label(self, sample: StoredSample) -> np.ndarray:
        """(H, W) uint8 class ids."""
        return self.stores[0].label(self._known[0][sample.sample_id])

    def at(self, sample: StoredSample, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Features of some pixels, bilinear within their patch (equation 4 of the paper).

        Args:
            rows, columns: (N,) of pixels.

        Returns:
            (N, C) float16 of stores of float16, else float32.
        """
        half = self.stores[0].recipe.dtype.startswith("float16")
        found = np.empty((len(rows), self.channels), np.float16 if half else np.float32)
        patch_px = self.stores[0].patch_px
        offset = 0
        for part, features in zip(self.inputs, self.maps(sample), strict=True):
            (top, bottom, down), (left, right, across) = (
                bilinear_cells(places, patch_px, part.stride) for places in (rows, columns)
            )
            upper = _between(features[:, top, left], features[:, top, right], across)
            lower = _between(features[:, bottom, left], features[:, bottom, right], across)
            found[:, offset : offset + part.channels] = _between(upper, lower, down).T
            offset += part.channels
        return found


def bilinear_cells(
    places: np.ndarray, patch_px: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which two cells of a level a pixel lies between, and how far, along one axis.

    Args:
        places: (N,) pixels of the region.

    Returns:
        (first cell, second cell, weight of the second), (N,) each; rows of ``patchwise_matrix``.
    """
    patch, inside = np.divmod(places, patch_px)
    cells = patch_px // stride
    centre = np.clip((inside + 0.5) / stride - 0.5, 0, cells - 1)
    first = centre.astype(np.int64)
    second = np.minimum(first + 1, cells - 1)
    begin = patch * cells
    return begin + first, begin + second, (centre - first).astype(np.float32)


def draw_pixels(
    reader: PixelReader,
    samples: Sequence[StoredSample],
    count: int,
    *,
    num_classes: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw labelled pixels, about as many of every sample; what is not counted is left out.

    Args:
        count: N at most, and no more of a sample than it has.
        num_classes: K; labels of K or more are don't care.
        seed: With the sample's id it decides which pixels.
        progress: Called with the samples that were read so far.

    Returns:
        (N, C) features, float16 or float32 as ``PixelReader.at``, and (N,) uint8 labels.
    """
    each = max(1, count // len(samples))
    features, labels = [], []
    for number, sample in enumerate(samples):
        label = reader.label(sample)
        counted = np.flatnonzero(label.ravel() < num_classes)
        key = [seed, _PIXEL_STREAM, *sample.sample_id.encode()]
        rng = np.random.default_rng(key)
        chosen = rng.choice(counted, size=min(each, len(counted)), replace=False)
        rows, columns = np.divmod(np.sort(chosen), label.shape[1])
        features.append(reader.at(sample, rows, columns))
        labels.append(label[rows, columns])
        if progress is not None:
            progress(number + 1)
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(labels))


def _between(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    first = first.astype(np.float32)
    return first + (second.astype(np.float32) - first) * weight
