"""Passes over the samples of a store: class counts and channel statistics.

Each is a row of independent jobs, one per sample, which dask's threads run; the parts are merged
in the order of the samples, as they come, so that the result is that of a plain loop, to the last
bit, and no more than a block of parts is in memory.
"""

from collections.abc import Sequence

import numpy as np

from pathsegdiff.data.passes import iterate_threads
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.segmentation.head import HeadLevel

#: (values, mean, sum of squared deviations) of each channel.
Moments = tuple[int, np.ndarray, np.ndarray]


def class_pixel_counts(store: FeatureStore, samples: Sequence[StoredSample]) -> np.ndarray:
    """(num_classes,) int64 pixels of each class, without don't care and unlabelled ones."""
    num_classes = store.card.scheme.num_classes

    def count(sample: StoredSample) -> np.ndarray:
        return np.bincount(store.label(sample).ravel(), minlength=256)[:num_classes]

    total = np.zeros(num_classes, np.int64)
    for part in iterate_threads(count, samples):
        total += part
    return total


def channel_statistics(
    store: FeatureStore, levels: Sequence[HeadLevel], samples: Sequence[StoredSample]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of every channel at its level's own resolution, in float64.

    Returns:
        level name -> (mean, standard deviation), each (C_level,) float64. A channel that never
        changes gets the standard deviation 1.
    """

    def moments(sample: StoredSample) -> list[Moments]:
        return [_level_moments(store, level, sample) for level in levels]

    merged: list[Moments] | None = None
    for part in iterate_threads(moments, samples):
        merged = part if merged is None else list(map(_merge, merged, part))
    if merged is None:
        raise ValueError("statistics need at least one sample")
    found = {}
    for level, (count, mean, squares) in zip(levels, merged, strict=True):
        std = np.sqrt(squares / count)
        # Below this the spread is the rounding of the stored numbers, and would be blown up to 1.
        constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
        found[level.name] = (mean, np.where(constant, 1.0, std))
    return found


def _level_moments(store: FeatureStore, level: HeadLevel, sample: StoredSample) -> Moments:
    means, squares, count = [], [], 0
    # One tap at a time: a level of the paper's model is 54 MB in float16 and 216 MB in float64.
    for tap, _ in level.taps:
        values = store.read_level(sample, level.name, taps=[tap]).astype(np.float64)
        values = values.reshape(len(values), -1)
        mean = values.mean(axis=1)
        values -= mean[:, None]
        count = values.shape[1]
        means.append(mean)
        squares.append(np.einsum("cn,cn->c", values, values))
    return count, np.concatenate(means), np.concatenate(squares)


def _merge(first: Moments, second: Moments) -> Moments:
    """Chan, Golub and LeVeque 1983: exact where naive sums of squares cancel."""
    count_a, mean_a, squares_a = first
    count_b, mean_b, squares_b = second
    count = count_a + count_b
    delta = mean_b - mean_a
    mean = mean_a + delta * (count_b / count)
    return count, mean, squares_a + squares_b + delta**2 * (count_a * count_b / count)
