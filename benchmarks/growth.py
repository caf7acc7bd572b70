"""Whether a store that grows stays as fast: 100, 1,000 and 10,000 patches side by side.

    python benchmarks/growth.py [--samples 25,250,2500] [--runs 1] [--json FILE]
    python benchmarks/growth.py --preset paper --region 768 --precision bfloat16 --samples 2,20

A small model (preset micro) on regions of four patches, so that what grows with the number of
samples (files, marks, bookkeeping) is a good part of the time. Each step runs in a
process of its own: extraction from an empty store, opening the store and listing its samples,
verifying every byte, one epoch of a head on whole regions. Printed are seconds and bytes per patch,
the largest memory and the open files at the end of each.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pathsegdiff.data.init import init_manifest
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.device import keep_freed_memory
from pathsegdiff.diffusion.bundle import init_bundle, load_bundle
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.features.verify import verify_store
from pathsegdiff.pipeline.bench.extraction import extract_ours, stage_one_of
from pathsegdiff.pipeline.bench.measure import largest_resident_bytes
from pathsegdiff.pipeline.bench.regions import tiled_dataset
from pathsegdiff.segmentation.train import TrainSettings, train_head

BATCH_SIZE, TILES = 4, 12
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the data of one size are, and what is made of them.

    Attributes:
        folder: Holds ``images.toml``; the store and the run are made beside it.
        model: Folder of the bundle.
        precision: Of both stages.
    """

    folder: Path
    model: Path
    precision: str

    @property
    def store(self) -> Path:
        """The features."""
        return self.folder / "store.zarr"

    @property
    def run(self) -> Path:
        """The head's training."""
        return self.folder / "run"


def main() -> None:
    """Measure every size, run by run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="25,250,2500")
    parser.add_argument("--preset", default="micro", help="shapes of the model; random weights")
    parser.add_argument("--region", type=int, default=512, help="side of a region, px")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--runs", type=int, default=1, help="of every size; the fastest counts")
    parser.add_argument("--scratch", type=Path, help="folder for images and stores")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.samples.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="psd-growth-", dir=options.scratch) as scratch:
        folder = Path(scratch)
        init_bundle(options.preset, seed=0, out=folder / "model")
        tiled_dataset(folder / "tiles", TILES, options.region)
        for size in sizes:
            link_images(folder / "tiles" / "data", folder / str(size), size, options.region)
        for run in range(options.runs):
            for size in sizes:
                place = Place(
                    folder=folder / str(size), model=folder / "model", precision=options.precision
                )
                rows.append({"run": run, "samples": size, **measure(place)})
                print(json.dumps(rows[-1]), flush=True)
                if options.json is not None:
                    options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows, sizes, (options.region // 256) ** 2))


def link_images(source: Path, folder: Path, samples: int, region_px: int) -> None:
    """A data set of as many samples, the same few images over and over under other names."""
    data = folder / "data"
    data.mkdir(parents=True)
    for number in range(samples):
        for suffix in ("", "_mask"):
            os.link(
                source / f"t{number % TILES:05d}{suffix}.png", data / f"s{number:06d}{suffix}.png"
            )
    init_manifest(
        data, data, folder / "images.toml", mask_suffix="_mask", kind="resize", region_px=region_px
    )


def measure(place: Place) -> dict[str, Any]:
    """Every step at one size, and the bytes of the store."""
    steps = {"extract": extract, "open": open_store, "verify": verify, "train": train}
    found: dict[str, Any] = {name: in_process(step, place) for name, step in steps.items()}
    files = (file for file in place.store.rglob("*") if file.is_file())
    found["bytes"] = sum(file.stat().st_size for file in files)
    shutil.rmtree(place.store)
    shutil.rmtree(place.run)
    return found


def in_process(step: Callable[[Place], float], place: Place) -> dict[str, float]:
    """Seconds, largest memory and open files of a step in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(watched, step, place).result()


def watched(step: Callable[[Place], float], place: Place) -> dict[str, float]:
    """Call a step and look at this process."""
    keep_freed_memory()
    seconds = step(place)
    handles = Path("/proc/self/fd")
    return {
        "seconds": seconds,
        "peak_bytes": largest_resident_bytes(),
        "open_files": len(list(handles.iterdir())) if handles.exists() else 0,
    }


def extract(place: Place) -> float:
    """Stage 1 from an empty store."""
    dataset = open_dataset(place.folder / "images.toml")
    bundle = load_bundle(place.model)
    stage_one = stage_one_of(bundle, CPU, place.precision, BATCH_SIZE)
    begin = time.perf_counter()
    extract_ours(dataset, bundle, stage_one, place.store)
    return time.perf_counter() - begin


def open_store(place: Place) -> float:
    """Open it and list the complete samples."""
    begin = time.perf_counter()
    FeatureStore.open(place.store).samples()
    return time.perf_counter() - begin


def verify(place: Place) -> float:
    """Every byte against its checksum."""
    store = FeatureStore.open(place.store)
    begin = time.perf_counter()
    findings = verify_store(store)
    assert not findings, findings[:3]
    return time.perf_counter() - begin


def train(place: Place) -> float:
    """One epoch of a head on all samples of the training split."""
    store = FeatureStore.open(place.store)
    trained = [sample for sample in store.samples() if sample.split == "train"]
    settings = TrainSettings(
        split="train",
        val="0",
        epochs=1,
        batch_size=1,
        taps=store.tap_names,
        head_width=int(store.model["head_width"]),
        keep="last",
        precision=place.precision,
    )
    begin = time.perf_counter()
    train_head(store, place.run, settings)
    # As if every sample had been trained on: a fifth is of the split test.
    return (time.perf_counter() - begin) * len(store.samples()) / len(trained)


def table(rows: list[dict[str, Any]], sizes: list[int], patches: int) -> str:
    """Markdown: a line per size, the fastest of its runs."""
    steps = ("extract", "verify", "train")
    header = ["patches", *(f"{step}, ms per patch" for step in steps), "open, ms", "kB per patch"]
    header += [f"{step}, peak MB" for step in steps] + ["open files"]
    lines = [header, ["---"] * len(header)]
    for size in sizes:
        runs = [row for row in rows if row["samples"] == size]
        fastest = {step: min(row[step]["seconds"] for row in runs) for step in (*steps, "open")}
        number = size * patches
        line = [f"{number:,}", *(f"{fastest[step] / number * 1e3:.2f}" for step in steps)]
        line += [f"{fastest['open'] * 1e3:.0f}", f"{runs[0]['bytes'] / number / 1e3:.1f}"]
        line += [f"{max(row[step]['peak_bytes'] for row in runs) / 1e6:.0f}" for step in steps]
        line.append(str(max(row[step]["open_files"] for row in runs for step in steps)))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
