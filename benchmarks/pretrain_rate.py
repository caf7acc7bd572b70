"""How fast pre-training is: steps of the diffusion model, launched or recorded, and crops read.

    python benchmarks/pretrain_rate.py --device cuda --json rate.json
    python benchmarks/pretrain_rate.py --device cpu --preset micro --crops 2 --steps 2 --processes 2

On the embedded demo's images, with random weights, which are as fast as trained ones. On a GPU the
kernels of a step are launched one by one (eager) and replayed as recorded (what ``psd pretrain``
does); on a CPU there is nothing to record. Crops of 256 px are read by threads (0) and processes.
Medians over steps, after one that does not count.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pathsegdiff.device import device_name, resolve_device, resolve_precision
from pathsegdiff.diffusion.bundle import part_state
from pathsegdiff.diffusion.presets import build_random
from pathsegdiff.diffusion.pretrain.autoencoder import AutoencoderPart
from pathsegdiff.diffusion.pretrain.images import ImagePool, open_pool
from pathsegdiff.diffusion.pretrain.loop import LoopSettings, Part, TrainingLoop, read_ahead
from pathsegdiff.diffusion.pretrain.plans import Plan, plan_of
from pathsegdiff.diffusion.pretrain.run import FACTS_FILE, WEIGHTS_FILE, Pretraining
from pathsegdiff.pipeline.bench.measure import in_turns
from pathsegdiff.provenance import versions

IMAGES = Path(__file__).parents[1] / "pathsegdiff" / "data" / "demo" / "images"


def main() -> None:
    """Measure, print, and write the figures."""
    options = arguments()
    device = resolve_device(options.device)
    precision = resolve_precision("auto", device)
    plan = plan_of(options.preset).changed(precision=precision)
    pool = open_pool([f"{IMAGES}@2.2", str(IMAGES)])
    found: dict[str, Any] = {
        "device": device_name(device),
        "precision": precision,
        "versions": versions(),
        "milliseconds": {},
        "crops_per_second": {},
    }
    for processes in numbers(options.processes):
        rate = read_rate(pool, plan.ldm, processes)
        found["crops_per_second"][f"{processes} processes" if processes else "threads"] = rate
    with tempfile.TemporaryDirectory() as folder:
        training = untrained(plan, pool, Path(folder), device)
        for count in numbers(options.crops):
            for recorded in (False, True) if device.type == "cuda" else (False,):
                part, _ = training._part("ldm")
                if not recorded:
                    part.record = False  # type: ignore[attr-defined]
                name = f"diffusion model, {count} crops, {'recorded' if recorded else 'eager'}"
                seconds = step_seconds(part, plan.ldm, count, 256, device, options.steps)
                found["milliseconds"][name] = 1000 * seconds
            model = AutoencoderPart(plan.preset.autoencoder, pool, device)
            seconds = step_seconds(model, plan.autoencoder, count, 128, device, options.steps)
            found["milliseconds"][f"autoencoder, {count} crops of 128 px"] = 1000 * seconds
    text = json.dumps(found, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--crops", default="64,128", help="of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", default="0,4,8,12", help="that read; 0 for threads")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Of a list such as 64,128."""
    return [int(part) for part in text.split(",")]


def untrained(plan: Plan, pool: ImagePool, work: Path, device: torch.device) -> Pretraining:
    """A training whose encoder and autoencoder are finished, with random weights."""
    networks = build_random(plan.preset, 0)
    for name in ("encoder", "autoencoder"):
        (work / name).mkdir()
        save_file(part_state(name, networks[name], torch.float32), work / name / WEIGHTS_FILE)
        (work / name / FACTS_FILE).write_text(json.dumps({"latent_scale": 1.0}))
    return Pretraining(plan, pool, work, device)


def step_seconds(
    part: Part, settings: LoopSettings, count: int, crop_px: int, device: torch.device, steps: int
) -> float:
    """Median of whole steps: forward, backward, optimiser and average of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        loop = TrainingLoop(part, replace(settings, steps=10**6), Path(folder), {}, device)
        batch = part.read(0, count, crop_px)
        turns = in_turns({"step": lambda: loop._train_step(batch)}, steps, device)
        return statistics.median(turns["step"])


class Crops:
    """What ``read_ahead`` needs of a part."""

    def __init__(self, pool: ImagePool) -> None:
        self.pool = pool

    def read(self, step: int, count: int, crop_px: int) -> torch.Tensor:
        """(count, 3, crop_px, crop_px) uint8."""
        return self.pool.batch(3, step, count, crop_px)


def read_rate(pool: ImagePool, settings: LoopSettings, processes: int) -> float:
    """Crops of 256 px per second over three seconds."""
    endless = replace(settings, batch_size=128, steps=10**6, crops=((1.0, 256),))
    reader: Any = Crops(pool)
    with read_ahead(reader, endless, 0, processes) as batches:
        next(batches)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 3:
            count += len(next(batches))
        return count / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
