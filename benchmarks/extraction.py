"""Stage 1 end to end beside its bare forwards, in one process, the same batch and precision.

    python benchmarks/extraction.py [--model tiny] [--samples 12] [--runs 5] [--batch-size 3]

Inside our timer: reading and decoding images and masks, noise, the networks, stitching, casting,
writing the store with checksums and completion marks. Inside the other: encoder, autoencoder
encoder and tapped UNet on patches that are already in memory. The two take turns; the ratio is the
median over the pairs.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pathsegdiff.data.manifest import Dataset, open_dataset
from pathsegdiff.device import autocast, device_name, resolve_device, resolve_precision
from pathsegdiff.diffusion.bundle import Bundle, load_bundle
from pathsegdiff.diffusion.schedule import add_noise
from pathsegdiff.features.extract import extract_dataset
from pathsegdiff.features.stage_one import PreparedRegion, StageOne, View
from pathsegdiff.provenance import versions


def main() -> None:
    """Measure and print; ``--json`` writes the figures too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    bundle = load_bundle(options.model)
    dataset = open_dataset("demo")
    dataset.samples = dataset.samples[: options.samples]
    view = View(timestep=50, conditioning="encoder")
    stage_one = StageOne(
        bundle.load(device=device),
        views=[view],
        taps=[spec.name for spec in bundle.card.taps],
        precision=resolve_precision(options.precision, device),
        device=device,
        batch_size=options.batch_size,
    )
    regions = [
        stage_one.prepare(dataset.read(sample).image, sample.sample_id)
        for sample in dataset.samples
    ]
    patches = sum(len(region.patches) for region in regions)
    end_to_end(dataset, bundle, stage_one, view)  # warm-up
    bare(stage_one, regions, view)
    ours, theirs = [], []
    for _ in range(options.runs):
        theirs.append(bare(stage_one, regions, view))
        ours.append(end_to_end(dataset, bundle, stage_one, view))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    figures = {
        "model": bundle.card.name,
        "device": device_name(device),
        "processor": platform.processor() or platform.machine(),
        "precision": stage_one.precision,
        "batch_size": options.batch_size,
        "patches": patches,
        "runs": options.runs,
        "bare_seconds_per_patch": statistics.median(theirs) / patches,
        "end_to_end_seconds_per_patch": statistics.median(ours) / patches,
        "ratio_to_bare_median": statistics.median(ratios),
        "ratio_to_bare_min_max": [min(ratios), max(ratios)],
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "versions": versions(),
    }
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2))


def end_to_end(dataset: Dataset, bundle: Bundle, stage_one: StageOne, view: View) -> float:
    """Seconds of a whole extraction into an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        extract_dataset(dataset, bundle, stage_one, {view: Path(folder) / "store.zarr"})
        return time.perf_counter() - begin


@torch.inference_mode()
def bare(stage_one: StageOne, regions: list[PreparedRegion], view: View) -> float:
    """Seconds of the networks alone."""
    model, device = stage_one.model, stage_one.device
    batches = [
        (
            region.patches[start : start + stage_one.batch_size].to(device).float() / 255,
            region.noise[start : start + stage_one.batch_size].to(device),
        )
        for region in regions
        for start in range(0, len(region.patches), stage_one.batch_size)
    ]
    begin = time.perf_counter()
    for images, noise in batches:
        with autocast(device, stage_one.precision):
            context = model.context(model.embed(images), len(images))
            latent = model.latent(images).float()
            x_t = add_noise(latent, noise, view.timestep, model.alphas_cumprod)
            model.taps(x_t, view.timestep, context, stage_one.taps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
