"""Plain or channels last: the time of a training step of each network, in both layouts.

    python benchmarks/layouts.py [--networks dcan,res-unet] [--steps 3] [--json FILE]

Forward, loss and gradients of random images, both layouts taking turns in one process on one
thread; medians of the process's own CPU time, so that other processes disturb little, and the range
of the ratio. The first turn of each is not counted. `pathsegdiff.device.training_layout` chooses by
what this shows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathsegdiff.device import keep_freed_memory, training_layout
from pathsegdiff.diffusion.presets import PRESETS
from pathsegdiff.pipeline.baselines.networks import ARCHITECTURES, build_network

LAYOUTS = {"plain": torch.contiguous_format, "channels last": torch.channels_last}
BATCH, REGION_PX, PATCH_PX, PATCHES = 4, 512, 256, 8
#: Parts of the embedded model, as they are pre-trained.
PARTS = ("autoencoder", "unet")

Run = Callable[[nn.Module, torch.memory_format], Tensor]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join([*ARCHITECTURES, *PARTS]))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = training_layout(torch.device("cpu"))
    name = next(name for name, layout in LAYOUTS.items() if layout == chosen)
    print(f"{capability}, one thread; the product trains {name} here\n")
    print("| network | plain, s | channels last, s | plain over channels last | from ... to |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    rows = []
    for network in options.networks.split(","):
        rows.append(measure(network, options.steps))
        print(as_line(rows[-1]), flush=True)
    if options.json:
        found = {"capability": capability, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def measure(name: str, steps: int) -> dict[str, Any]:
    """Seconds of each step in each layout."""
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    networks = {layout: build(name).to(memory_format=form) for layout, form in LAYOUTS.items()}  # type: ignore[call-overload]
    for turn in range(steps + 1):
        for layout, network in networks.items():
            begin = time.process_time()
            network.zero_grad()
            outputs(name, network, LAYOUTS[layout]).float().square().mean().backward()
            if turn:
                seconds[layout].append(time.process_time() - begin)
    return {"network": name, **seconds}


def build(name: str) -> nn.Module:
    """A baseline, or a part of the preset tiny."""
    if name in PARTS:
        torch.manual_seed(0)
        return PRESETS["tiny"].build()[name].train()
    return build_network(name, 2, seed=0, pretrained=False).train()


def outputs(name: str, network: nn.Module, layout: torch.memory_format) -> Tensor:
    """What a loss is taken of, from random input in the layout."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).contiguous(memory_format=layout)

    preset = PRESETS["tiny"]
    if name == "autoencoder":
        result: Tensor = network(noise(PATCHES, 3, PATCH_PX, PATCH_PX), return_dict=False)[0]
    elif name == "unet":
        side = preset.unet["sample_size"]
        latent = noise(PATCHES, preset.unet["in_channels"], side, side)
        timesteps = torch.full((PATCHES,), 50)
        context = torch.zeros(PATCHES, 1, preset.unet["cross_attention_dim"])
        result = network(latent, timesteps, encoder_hidden_states=context, return_dict=False)[0]
    else:
        result = network(noise(BATCH, 3, REGION_PX, REGION_PX))
    return result


def as_line(row: dict[str, Any]) -> str:
    """Of the table."""
    plain, last = row["plain"], row["channels last"]
    ratios = [a / b for a, b in zip(plain, last, strict=True)]
    return (
        f"| {row['network']} | {statistics.median(plain):.2f} | {statistics.median(last):.2f} "
        f"| {statistics.median(plain) / statistics.median(last):.2f} "
        f"| {min(ratios):.2f} to {max(ratios):.2f} |"
    )


if __name__ == "__main__":
    main()
