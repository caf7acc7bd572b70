"""Passes over a whole data set, through dask's threads; results equal those of a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # the manifest module uses map_threads
    from pathsegdiff.data.manifest import Dataset, Sample

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Calls that are made ahead of the one whose result is used.
BLOCK = 128


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(item) for item in items]`` on dask's threads; decoding releases the GIL.

    The first error that a call raises is raised here.
    """
    return list(iterate_threads(function, items))


def iterate_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results of ``map_threads`` one after the other, made a block at a time.

    Whoever merges them as they come needs no more memory for many items than for few.
    """
    import dask

    remaining = iter(items)
    while block := list(islice(remaining, BLOCK)):
        tasks = [dask.delayed(function, pure=False)(item) for item in block]
        yield from dask.compute(*tasks, scheduler="threads")


def class_pixel_counts(dataset: Dataset, split: str | None = None, *, seed: int = 0) -> np.ndarray:
    """Count the pixels of each class over the regions of a data set.

    Args:
        dataset: Its masks are read, its images are not.
        split: Count this split alone.
        seed: Of the crops of training windows, as in ``Dataset.read``.

    Returns:
        (K,) int64; don't-care pixels and those outside the image are in no class.

    Raises:
        DataError: If a mask cannot be read, or holds unknown codes.
    """
    # One task per source, so that the windows of one mask decode it once.
    by_source: dict[str, list[Sample]] = {}
    for sample in dataset.samples:
        if split is None or sample.split == split:
            by_source.setdefault(sample.source.source_id, []).append(sample)

    def count(samples: list[Sample]) -> np.ndarray:
        total = np.zeros(dataset.scheme.num_classes, np.int64)
        for sample in samples:
            label = dataset.read_label(sample, seed=seed)
            total += np.bincount(label.ravel(), minlength=256)[: len(total)]
        return total

    total = np.zeros(dataset.scheme.num_classes, np.int64)
    for counts in iterate_threads(count, by_source.values()):
        total += counts
    return total
