"""How fast a training gets its samples, beside a memory map of the same bytes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pathsegdiff.features.store import FeatureStore
from pathsegdiff.pipeline.bench.measure import Spread, in_turns, ratio
from pathsegdiff.segmentation.head import HeadLevel
from pathsegdiff.segmentation.sampling import CropRequest, RegionReader, head_levels


@dataclass(frozen=True, kw_only=True)
class ReadingSpeed:
    """What ``measure_reading`` found.

    Attributes:
        bytes_per_second: Of whole samples from the store, in a shuffled order, checksums checked.
        memmap_bytes_per_second: Of the same arrays copied out of memory maps.
        of_memmap: The first over the second.
        one_tap_share: Seconds of reading the finest tap alone, over those of all taps.
    """

    bytes_per_second: Spread
    memmap_bytes_per_second: Spread
    of_memmap: Spread
    one_tap_share: float


def measure_reading(store: FeatureStore, folder: Path, runs: int) -> ReadingSpeed:
    """Read every sample of a store, in turns with memory maps; both from the page cache.

    Args:
        folder: For the arrays that are mapped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(store.samples())
    np.random.default_rng(0).shuffle(samples)
    files = []
    for sample in samples:
        for level in store.levels:
            file = folder / f"{sample.index}-{level}.npy"
            np.save(file, store.read_level(sample, level))
            files.append(file)
    levels = head_levels(store)
    everything, finest = RegionReader(store, levels), RegionReader(store, _one_tap(store))

    def read(reader: RegionReader) -> None:
        for sample in samples:
            reader.read([CropRequest(sample=sample)], labels=False)

    def mapped() -> None:
        for file in files:
            np.array(np.load(file, mmap_mode="r"))

    seconds = in_turns(
        {"ours": lambda: read(everything), "memmap": mapped, "one": lambda: read(finest)},
        runs,
        torch.device("cpu"),
    )
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    return ReadingSpeed(
        bytes_per_second=Spread.of([size / value for value in seconds["ours"]]),
        memmap_bytes_per_second=Spread.of([size / value for value in seconds["memmap"]]),
        of_memmap=ratio(seconds["memmap"], seconds["ours"]),
        one_tap_share=Spread.of(seconds["one"]).median / Spread.of(seconds["ours"]).median,
    )


def _one_tap(store: FeatureStore) -> tuple[HeadLevel, ...]:
    return head_levels(store, [store.tap_names[-1]])
