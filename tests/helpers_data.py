"""Builders of tiny data sets; every pixel is made here."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pathsegdiff.data.image import pixel_sha256
from pathsegdiff.data.manifest import load_manifest

BINARY = {
    "classes": [
        {"name": "background", "colour": [230, 230, 230], "codes": [0]},
        {"name": "gland", "colour": [0, 158, 115], "codes": "positive"},
    ]
}


def stain(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 that looks a little like H&E: objects violet, the rest pink, with noise."""
    colours = np.array([[230, 170, 200], [110, 60, 150]])
    image = colours[(label > 0).astype(int)] + rng.normal(0, 12, (*label.shape, 3))
    return image.clip(0, 255).astype(np.uint8)


def glands(height: int, width: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) uint8: ``count`` ellipses numbered from 1 on background 0, in cells of a grid."""
    label = np.zeros((height, width), np.uint8)
    side = int(np.ceil(np.sqrt(count)))
    rows, cols = np.mgrid[:height, :width]
    for index in range(count):
        row, col = (np.array(divmod(index, side)) + 0.5) * (height / side, width / side)
        down, right = height / side * rng.uniform(0.25, 0.4), width / side * rng.uniform(0.25, 0.4)
        inside = ((rows - row) / down) ** 2 + ((cols - col) / right) ** 2 < 1
        label[inside] = index + 1
    return label


def write_manifest(
    path: Path, rows: Sequence[dict[str, Any]], header: dict[str, Any] | None = None, **more: Any
) -> Path:
    """Write NAME.toml (from JSON-like values) and NAME.csv (columns of the first row)."""
    values = {
        "name": path.stem,
        "title": "made by a test",
        "licence": "CC0",
        "splits": list(dict.fromkeys(row["split"] for row in rows)),
        "region": {"kind": "resize", "region_px": 64, "patch_px": 32},
        "labels": BINARY,
        **(header or {}),
        **more,
    }
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_glas(
    folder: Path,
    *,
    counts: dict[str, int] | None = None,
    size: tuple[int, int] = (52, 77),
    region_px: int = 64,
    patch_px: int = 32,
    suffix: str = ".bmp",
) -> Path:
    """A GlaS-shaped data set with hashes: NAME.bmp and NAME_anno.bmp, one integer per gland.

    Returns:
        Its manifest, ``folder``/glaslike.toml; the files lie in ``folder``/glaslike.
    """
    rng = np.random.default_rng(0)
    root = folder / "glaslike"
    root.mkdir(parents=True)
    rows = []
    for split, count in (counts or {"train": 4, "testA": 2, "testB": 2}).items():
        for index in range(1, count + 1):
            mask = glands(*size, 3 + index % 3, rng)
            image = stain(mask, rng)
            name = f"{split}_{index}"
            Image.fromarray(image).save(root / f"{name}{suffix}", lossless=True)
            Image.fromarray(mask).save(root / f"{name}_anno{suffix}", lossless=True)
            rows.append(
                {
                    "sample_id": name,
                    "image": f"{name}.bmp",
                    "mask": f"{name}_anno.bmp",
                    "split": split,
                    "group": str(index % 3),
                    "patient_fold": index % 2 + 1,
                    "image_sha256": pixel_sha256(image),
                    "mask_sha256": pixel_sha256(mask),
                }
            )
    return write_manifest(
        folder / "glaslike.toml",
        rows,
        root="glaslike",
        mpp=0.62,
        default_eval="testB" if any(row["split"] == "testB" for row in rows) else "train",
        region={"kind": "resize", "region_px": region_px, "patch_px": patch_px},
        labels={**BINARY, "objects": "gland"},
    )


def make_bcss(folder: Path, *, patch_px: int = 32) -> Path:
    """A BCSS-shaped data set: 22 codes, windows, sources at twice the region's resolution.

    In units of a region (three patches): ``wide`` gives 2 x 3 windows, the first of which is
    outside altogether; ``low`` (test) is half a region high; ``square`` (test) gives 2 x 2.

    Returns:
        Its manifest, ``folder``/bcsslike.toml; the files lie in ``folder``/bcsslike.
    """
    rng = np.random.default_rng(1)
    root = folder / "bcsslike"
    region = 3 * patch_px
    window = round(region * 800 / 768)
    rows = []
    for name, split, height, width in (
        ("wide", "train", 1.9, 2.6),
        ("low", "test", 0.5, 1.0),
        ("square", "test", 1.5, 1.5),
    ):
        shape = round(height * region) * 2, round(width * region) * 2
        cells = rng.integers(1, 22, [side // 16 + 1 for side in shape])
        codes = np.kron(cells, np.ones((16, 16), int))[: shape[0], : shape[1]].astype(np.uint8)
        if name == "wide":
            codes[: 2 * window, : 2 * window] = 0
        for sub, pixels in (("rgbs", stain(codes % 2, rng)), ("masks", codes)):
            (root / sub).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / sub / f"{name}_MPP-0.2500.png", compress_level=1)
        rows.append(
            {
                "sample_id": name,
                "image": f"rgbs/{name}_MPP-0.2500.png",
                "mask": f"masks/{name}_MPP-0.2500.png",
                "split": split,
                "group": f"patient {name}",
                "height_px": shape[0],
                "width_px": shape[1],
            }
        )
    return write_manifest(
        folder / "bcsslike.toml",
        rows,
        root="bcsslike",
        mpp=0.25,
        grouped=True,
        labels=load_manifest("bcss").scheme.to_dict(),
        region={
            "kind": "window",
            "region_px": region,
            "patch_px": patch_px,
            "window_px": window,
            "mpp": 0.5,
        },
    )


def make_folders(
    folder: Path, *, count: int = 10, size: tuple[int, int] = (60, 80), suffix: str = ""
) -> tuple[Path, Path]:
    """A user's own images/ and masks/ (codes 0 and 255) of ``count`` patients' images.

    Returns:
        The folder of images and the folder of masks.
    """
    rng = np.random.default_rng(2)
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for index in range(count):
        mask = glands(*size, 2, rng)
        Image.fromarray(stain(mask, rng)).save(images / f"p{index // 2}_{index}.png")
        Image.fromarray((mask > 0).astype(np.uint8) * 255).save(
            masks / f"p{index // 2}_{index}{suffix}.png"
        )
    return images, masks


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{key} = {_toml(entry)}" for key, entry in value.items() if entry is not None]
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
