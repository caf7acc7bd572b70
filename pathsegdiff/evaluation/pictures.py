"""PNG files of pictures and of class ids, whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pathsegdiff.files import replace_file

#: Of zlib: half the time of its default for tissue, and 4 % more bytes.
_LEVEL = 3


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write (rows, columns, 3) uint8 RGB."""
    _save(path, Image.fromarray(picture))


def save_mask(path: Path, label: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> None:
    """Write class ids as an 8-bit palette PNG: the numbers for programs, the colours for people.

    Args:
        path: The file.
        label: (H, W) uint8 ids.
        colours: RGB of each id.
    """
    image = Image.fromarray(label)
    image.putpalette([value for colour in colours for value in colour])
    _save(path, image)


def _save(path: Path, image: Image.Image) -> None:
    replace_file(path, lambda file: image.save(file, format="PNG", compress_level=_LEVEL))
