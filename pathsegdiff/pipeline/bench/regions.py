"""Regions of any size to measure on: the embedded images side by side."""

from pathlib import Path

import numpy as np
from PIL import Image

from pathsegdiff.data.init import init_manifest
from pathsegdiff.data.manifest import Dataset, open_dataset
from pathsegdiff.errors import ConfigError

SOURCE = "demo"
#: Regions are a multiple of a patch's usual side.
STEP_PX = 256


def check_region_px(region_px: int) -> None:
    """Raise ConfigError unless regions of that side can be made."""
    if region_px < STEP_PX or region_px % STEP_PX:
        raise ConfigError(f"--region must be a multiple of {STEP_PX} px, got {region_px}")


def tiled_dataset(folder: Path, samples: int, region_px: int) -> Dataset:
    """A data set of square regions, each of other images (as long as there are any).

    Args:
        folder: Made here; images, masks and ``tiles.toml`` are written into it.
        samples: Regions.
        region_px: Their side, a multiple of 256.

    Raises:
        ConfigError: If the side is none.
    """
    check_region_px(region_px)
    data = folder / "data"
    data.mkdir(parents=True)
    source = open_dataset(SOURCE)
    regions = [source.read(sample) for sample in source.samples]
    side = -(-region_px // source.rule.region_px)
    for number in range(max(samples, 2)):  # a manifest has two parts
        chosen = [regions[(number * side * side + k) % len(regions)] for k in range(side * side)]
        for suffix, parts in (
            ("", [region.image for region in chosen]),
            ("_mask", [region.label for region in chosen]),
        ):
            rows = [np.concatenate(parts[i * side : (i + 1) * side], axis=1) for i in range(side)]
            tile = np.concatenate(rows)[:region_px, :region_px]
            Image.fromarray(tile).save(data / f"t{number:05d}{suffix}.png", compress_level=1)
    manifest = folder / "tiles.toml"
    init_manifest(data, data, manifest, mask_suffix="_mask", kind="resize", region_px=region_px)
    dataset = open_dataset(str(manifest))
    dataset.samples = dataset.samples[:samples]
    return dataset
