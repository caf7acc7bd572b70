"""A micro bundle and stage 1 settings for tests."""

from pathlib import Path

import numpy as np
import torch

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.diffusion.bundle import Bundle, init_bundle, load_bundle
from pathsegdiff.features.stage_one import StageOne, View

T50 = View(timestep=50, conditioning="encoder")
#: Of a level's largest value: what another batch size or number of threads may change in float32.
#: Convolutions and matrix products of another shape are cut into other blocks, whose sums are
#: rounded in another order. The largest that was seen is 1.1e-5 (micro bundle, batches of 1, 3
#: and 8, 1 and 2 threads, x86-64). Noise is bitwise equal, and all is with the same batch, threads
#: and device.
TOLERANCE = 5e-5


def make_bundle(folder: Path, seed: int = 0) -> Bundle:
    """A micro bundle of random weights."""
    init_bundle("micro", seed=seed, out=folder)
    return load_bundle(folder)


def make_stage_one(bundle: Bundle, **settings: object) -> StageOne:
    """Stage 1 at t = 50 with every tap, unless told otherwise."""
    chosen: dict[str, object] = {"views": [T50], "taps": ALL_TAPS, "batch_size": 3}
    settings = {**chosen, **settings}
    model = bundle.load(device=settings.get("device", "cpu"))  # type: ignore[arg-type]
    return StageOne(model, **settings)  # type: ignore[arg-type]


def plain_dense(bundle: Bundle, image: np.ndarray, sample_id: str, seed: int = 0) -> np.ndarray:
    """The paper's f as a researcher would write it: hooks, F.interpolate, cat, stitch.

    Knows nothing of levels, batches or the extraction loop.
    """
    from torch.nn import functional as F

    from pathsegdiff.diffusion.noise import patch_noise

    model = bundle.load(device="cpu")
    rows, columns = image.shape[0] // 256, image.shape[1] // 256
    channels = sum(spec.channels for spec in model.tap_specs)
    out = torch.zeros(channels, rows * 64, columns * 64)
    for row in range(rows):
        for column in range(columns):
            patch = image[row * 256 : (row + 1) * 256, column * 256 : (column + 1) * 256]
            pixels = torch.from_numpy(patch.copy()).permute(2, 0, 1)[None].float() / 255
            recorded: dict[str, torch.Tensor] = {}

            def hook(name, recorded=recorded):
                def record(module, args, output):
                    recorded[name] = output[0] if isinstance(output, tuple) else output

                return record

            handles = [
                model.unet.get_submodule(spec.module_path).register_forward_hook(hook(spec.name))
                for spec in model.tap_specs
            ]
            with torch.no_grad():
                noise = torch.from_numpy(
                    patch_noise(seed, sample_id, row, column, model.latent_shape)
                )[None]
                alpha_bar = model.alphas_cumprod[50].double()
                z_t = (
                    alpha_bar.sqrt().float() * model.latent(pixels)
                    + (1 - alpha_bar).sqrt().float() * noise
                )
                context = model.context(model.embed(pixels), 1)
                model.unet(z_t, 50, encoder_hidden_states=context)
            for handle in handles:
                handle.remove()
            maps = [
                F.interpolate(recorded[name], size=(64, 64), mode="bilinear") for name in ALL_TAPS
            ]
            out[:, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64] = torch.cat(maps, 1)[0]
    return out.numpy()


def write_dataset(
    folder: Path, *, train: int = 2, test: int = 1, size: tuple[int, int] = (300, 400)
) -> Path:
    """Images and masks of coloured discs with their manifest; regions of 2 x 2 patches.

    Returns:
        The manifest's path.
    """
    from PIL import Image

    rng = np.random.default_rng(3)
    (folder / "images").mkdir(parents=True)
    rows = ["sample_id,image,mask,split,group"]
    names = [f"train_{i}" for i in range(train)] + [f"test_{i}" for i in range(test)]
    for name in names:
        image, mask = draw_discs(rng, size)
        Image.fromarray(image).save(folder / f"images/{name}.png")
        Image.fromarray(mask).save(folder / f"images/{name}_anno.png")
        split = name.split("_")[0]
        rows.append(f"{name},images/{name}.png,images/{name}_anno.png,{split},{name}")
    (folder / "discs.csv").write_text("\n".join(rows) + "\n")
    (folder / "discs.toml").write_text(discs_manifest("discs", region_px=512))
    return folder / "discs.toml"


def draw_discs(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 image and (H, W) uint8 mask of two dark discs on a bright ground."""
    y, x = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, np.uint8)
    for number in (1, 2):
        row, column = rng.uniform(0.2, 0.8, 2) * size
        mask[(y - row) ** 2 + (x - column) ** 2 < (min(size) / 6) ** 2] = number
    image = rng.normal(200, 10, (*size, 3)) - 80 * (mask > 0)[..., None]
    return image.clip(0, 255).astype(np.uint8), mask


def discs_manifest(name: str, *, region_px: int) -> str:
    """TOML of a data set of discs with the table NAME.csv beside it."""
    return f"""
name = "{name}"
title = "Discs"
licence = "CC0"
root = "."
splits = ["train", "test"]
grouped = true

[region]
kind = "resize"
region_px = {region_px}

[labels]
objects = "disc"
classes = [
  {{ name = "background", colour = [230, 230, 230], codes = [0] }},
  {{ name = "disc", colour = [0, 158, 115], codes = "positive" }},
]
"""
