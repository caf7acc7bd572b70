"""Both stages on a GPU at several batch sizes, beside what the GPU gives; ends within ten minutes.

    python benchmarks/gpu.py --json gpu.json [--model BUNDLE] [--minutes 9]
    python benchmarks/gpu.py --device cpu --preset micro --batches 2 --samples 2 --region 512

Without a bundle: random weights in the shapes of ``--preset`` (paper), which are as fast as trained
ones. Measured are a large matrix product or convolution and a copy (the ceilings), bare forwards
for each batch size, whole extractions for each (images read, noise, networks, stitching, store with
checksums; the share of the bare forwards is how busy the GPU is kept), and the head's step, plain
and folded.
The file is written after each part, and no part begins that would probably not end in time. An
extraction writes 14 MB of a patch, the plain way beside it 60: where the disk of --scratch is slow
(the file says how fast), a smaller --region, or --scratch /dev/shm, leaves time for all parts.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pathsegdiff.data.manifest import Dataset
from pathsegdiff.device import device_name, resolve_device, resolve_precision
from pathsegdiff.diffusion.bundle import Bundle, init_bundle, load_bundle
from pathsegdiff.errors import ConfigError
from pathsegdiff.features.stage_one import StageOne
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.pipeline.bench import extraction, head
from pathsegdiff.pipeline.bench.measure import (
    Spread,
    compute_rate,
    copy_rate,
    in_turns,
    largest_resident_bytes,
)
from pathsegdiff.pipeline.bench.regions import tiled_dataset
from pathsegdiff.provenance import versions

#: Written to see how fast the disk is.
_DISK_BYTES = 256 << 20


def main() -> None:
    """Measure part by part until all is done or the time is up."""
    options = arguments()
    deadline = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}, "parts": {}}
    longest = 0.0
    with tempfile.TemporaryDirectory(prefix="psd-gpu-", dir=options.scratch) as scratch:
        parts = measurements(options, found, Path(scratch))
        while time.monotonic() + 1.5 * longest < deadline:
            begin = time.monotonic()
            name, measure = next(parts, (None, None))
            if name is None or measure is None:
                found["finished"] = True
                break
            try:
                figures = measure()
            except torch.OutOfMemoryError as error:
                figures = {"failed": f"out of memory: {str(error)[:200]}"}
            longest = max(longest, time.monotonic() - begin)
            found["parts"][name] = figures
            print(f"{name}: {json.dumps(figures)}", flush=True)
            write(options.json, found)
    found["peak_resident_bytes"] = largest_resident_bytes()
    write(options.json, found)
    print("finished" if found.get("finished") else "the time is up")


def arguments() -> argparse.Namespace:
    """Options, with what they default to on the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", help="bundle; random weights without")
    parser.add_argument("--preset", default="paper", help="shapes of the random weights")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--samples", type=int, default=4, help="regions of REGION px")
    parser.add_argument("--region", type=int, default=2048, help="side; batches do not mix regions")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", default="4,16,64", help="patches per forward")
    parser.add_argument("--head-batches", default="1,2", help="regions per training step")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--scratch", type=Path, help="folder for stores")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measurements(
    options: argparse.Namespace, found: dict[str, Any], scratch: Path
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name of each part, and what measures it; the next one may need what it leaves in scratch."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    found |= {"device": device_name(device), "precision": precision, "versions": versions()}
    yield (
        "ceilings",
        lambda: {
            "multiply_adds_per_second": compute_rate(device, precision),
            "copy_bytes_per_second": copy_rate(device),
            "scratch_written_bytes_per_second": disk_rate(scratch),
        },
    )
    if options.model is None:
        bundle = init_bundle(options.preset, seed=0, out=scratch / options.preset)
    else:
        bundle = load_bundle(options.model)
    dataset = tiled_dataset(scratch / "tiles", options.samples, options.region)
    batches = [int(size) for size in options.batches.split(",")]
    stages = {}
    for size in batches:
        if size > (options.region // bundle.card.patch_px) ** 2:
            raise ConfigError(f"a region of {options.region} px has no {size} patches")
        stages[size] = partial(extraction.stage_one_of, bundle, device, precision, size)
        yield f"forwards, batch {size}", partial(measure_forwards, dataset, stages[size], options)
    for size in batches:
        yield (
            f"extraction, batch {size}",
            partial(
                measure_extraction,
                dataset,
                bundle,
                stages[size](),
                scratch,
                options.runs,
                plain=size == batches[0],
            ),
        )
    store = FeatureStore.open(scratch / "store.zarr")
    for size in (int(size) for size in options.head_batches.split(",")):
        yield (
            f"head, batch {size}",
            partial(measure_head, store, scratch / "plain", device, precision, size, options.runs),
        )


def measure_forwards(
    dataset: Dataset, make: Callable[[], StageOne], options: argparse.Namespace
) -> dict[str, Any]:
    """The networks alone, on patches in memory."""
    stage_one = make()
    regions = extraction.prepare_regions(dataset, stage_one)
    patches = sum(len(region.patches) for region in regions)
    bare = partial(extraction.bare_forwards, stage_one, regions)
    seconds = in_turns({"bare": bare}, options.runs, stage_one.device)["bare"]
    per_second = Spread.of([patches / value for value in seconds])
    multiply_adds = extraction.count_multiply_adds(stage_one.model)
    memory = 0
    if stage_one.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(stage_one.device)
    return {
        "patches_per_second": asdict(per_second),
        "multiply_adds_per_second": per_second.median * multiply_adds,
        "device_memory_bytes": memory,
    }


def disk_rate(folder: Path) -> float:
    """Bytes per second of a plain file that is written and reaches the disk."""
    data, file = bytes(_DISK_BYTES), folder / "written"
    begin = time.perf_counter()
    with file.open("wb") as stream:
        stream.write(data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - begin
    file.unlink()
    return _DISK_BYTES / seconds


def measure_extraction(
    dataset: Dataset, bundle: Bundle, stage_one: StageOne, scratch: Path, runs: int, *, plain: bool
) -> dict[str, Any]:
    """One batch size, and at what rate the store is written."""
    speed = extraction.measure_extraction(dataset, bundle, stage_one, scratch, runs, plain=plain)
    size = extraction.measure_bytes(FeatureStore.open(scratch / "store.zarr"), scratch / "plain")
    return {
        **asdict(speed),
        "stored_bytes_per_second": (size.features + size.other) / speed.ours.median,
        "multiply_adds_per_patch": extraction.count_multiply_adds(stage_one.model),
    }


def measure_head(
    store: FeatureStore, plain: Path, device: torch.device, precision: str, size: int, runs: int
) -> dict[str, Any]:
    """The head at one batch size, both ways."""
    speed = head.measure_head(
        store,
        plain,
        device,
        precision=precision,
        batch_size=size,
        width=int(store.model["head_width"]),
        runs=runs,
    )
    return asdict(speed)


def write(file: Path | None, found: dict[str, Any]) -> None:
    """What is known so far."""
    if file is not None:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
