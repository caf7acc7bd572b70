"""Pictures of a training: rows of images, side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pathsegdiff.files import replace_file

_GAP = 4


def save_rows(folder: Path, name: str, rows: Sequence[Tensor]) -> None:
    """Draw rows of images into ``folder/NAME.png``, whole or not at all.

    Args:
        rows: Each (B, 3, S, S) in [0, 1]; all of one shape.
    """
    drawn = [_row(row) for row in rows]
    gap = np.full((_GAP, drawn[0].shape[1], 3), 255, np.uint8)
    parts = [part for row in drawn for part in (row, gap)][:-1]
    image = Image.fromarray(np.concatenate(parts))
    replace_file(folder / f"{name}.png", lambda file: image.save(file, format="PNG"))


def _row(images: Tensor) -> np.ndarray:
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    gap = np.full((arrays.shape[1], _GAP, 3), 255, np.uint8)
    parts = [part for image in arrays for part in (image, gap)][:-1]
    return np.concatenate(parts, axis=1)
