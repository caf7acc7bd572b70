"""Table 1: the parameters of the paper's networks, counted in the networks themselves."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from pathsegdiff.diffusion.presets import PRESETS
from pathsegdiff.diffusion.taps import plan_taps
from pathsegdiff.features.layout import TapSpec, plan_levels
from pathsegdiff.pipeline.page import write_table
from pathsegdiff.pipeline.tables.published import PARAMETERS
from pathsegdiff.segmentation.head import PAPER_WIDTH, FCNHead, HeadLevel

#: Pixels per latent step of VQ-f4.
_LATENT_STRIDE = 4
#: Five classes of BCSS and don't care.
_OUTPUTS = 6
#: An Inception network, which the training code of the LDM builds to compute FIDs; it stands in the
#: published sum, but no feature comes from it.
INCEPTION = 21_785_568


_TITLE = "Table 1: parameters, counted and published"


def write_parameters(out: Path) -> str:
    """Write table.md, table.csv, plot.png and report.html; the Markdown is returned."""
    lines, notes, counted = count_parameters()
    caption = "Parameters of every network, counted and published"
    return write_table(out, _TITLE, lines, notes, partial(_draw, counted), caption)


def count_parameters() -> tuple[list[list[str]], list[str], dict[str, int]]:
    """Header and rows, notes, and the count of each network of the paper."""
    preset = PRESETS["paper"]
    with torch.device("meta"):
        parts = preset.build()
        taps = [
            TapSpec(name=tap.name, channels=tap.channels, stride=tap.stride)
            for tap in plan_taps(preset.unet, _LATENT_STRIDE)
        ]
        levels = [
            HeadLevel(
                name=level.name,
                stride=level.stride,
                taps=tuple((tap.name, tap.stop - tap.start) for tap in level.taps),
            )
            for level in plan_levels(taps, 256, "levels")
        ]
        head = FCNHead(levels, _OUTPUTS, PAPER_WIDTH)
    diffusion = {name: _count(parts[name]) for name in ("unet", "autoencoder", "conditioner")}
    counted = {
        "HIPT": _count(parts["encoder"]),
        "SSL-guided LDM": sum(diffusion.values()) + INCEPTION,
        "FCN": _count(head),
    }
    lines = [["network", "counted", "published", "counted less published"]]
    lines += [
        [name, f"{counted[name]:,}", f"{published:,}", f"{counted[name] - published:+,}"]
        for name, published in PARAMETERS.items()
    ]
    sizes = ", ".join(f"{name} {count:,}" for name, count in diffusion.items())
    notes = [
        f"SSL-guided LDM: {sizes}, and {INCEPTION:,} of an Inception network that its training "
        "code builds for FIDs; extraction does not use it and it is not counted here, but added.",
        "HIPT: its position table is resized from 14 x 14 to 16 x 16 for patches of 256 px: "
        "60 more of 384 numbers.",
        f"FCN: {head.channels} input channels, {_OUTPUTS} outputs (five classes and don't care).",
        "Published: Danisetty et al. 2025, 'PathSegDiff', Table 1.",
    ]
    return lines, notes, counted


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _draw(counted: dict[str, int], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for shift, label, values in ((-0.2, "counted", counted), (0.2, "published", PARAMETERS)):
        places = [place + shift for place in range(len(PARAMETERS))]
        axes.barh(places, [values[name] / 1e6 for name in PARAMETERS], 0.38, label=label)
    axes.set_yticks(range(len(PARAMETERS)), list(PARAMETERS))
    axes.invert_yaxis()
    axes.set_xlabel("million parameters")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(file))
