"""Training images: random crops of a pool, each a function of (seed, step, index) alone.

Shapes: B = crops of a batch, S = crop_px.
"""

import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from pathsegdiff.data.image import IMAGE_SUFFIXES, image_size, read_image
from pathsegdiff.data.manifest import list_manifests, open_dataset
from pathsegdiff.errors import DataError

logger = logging.getLogger(__name__)

#: Decoded pixels that are kept in memory; beyond that the images used last stay.
_CACHE_BYTES = 6 << 30
#: Crops are taken at the image's scale times a random factor within these.
SCALE_JITTER = (0.85, 1.2)
#: Separates the random draws that share a seed.
_SPLIT_STREAM, _HELD_OUT_STREAM = 11, 12
#: Held out: this share of the groups, but no more images than this many.
_HELD_OUT_SHARE = 0.03
#: Steps below 0 are draws beside the training (statistics); numpy wants no negative seeds.
_FIRST_STEP = 1 << 20
#: A folder with such a file was packed for a journey (travel.py): it says scales and groups.
INDEX_FILE = "index.json"
INDEX_KIND = "pathsegdiff images 1"
_MAX_INDEX_BYTES = 64 << 20
_MASK_SUFFIXES = ("_mask", "_anno", "_tumor", "_label", "_seg")


@dataclass(frozen=True, kw_only=True)
class PoolImage:
    """One image that crops are taken from.

    Attributes:
        path: File.
        scale: Enlarges its pixels to the resolution that the model is meant for.
        group: Patient or case; an image of a folder is a group of its own.
        size: (height, width) of the file.
    """

    path: Path
    scale: float
    group: str
    size: tuple[int, int]

    @property
    def area(self) -> float:
        """Pixels at the model's resolution."""
        return self.size[0] * self.size[1] * self.scale**2


class ImagePool:
    """Images to train on, and a few groups that are held out.

    Args:
        images: All of them.
        seed: Of the choice of what is held out.

    Raises:
        DataError: If there are fewer than two groups.
    """

    def __init__(self, images: Sequence[PoolImage], seed: int = 0) -> None:
        groups = sorted({image.group for image in images})
        if len(groups) < 2:
            raise DataError(
                f"pre-training needs images of two groups at least (one is held out), found "
                f"{len(images)} images of {len(groups)}"
            )
        order = np.random.default_rng((seed, _SPLIT_STREAM)).permutation(len(groups))
        count = max(1, round(_HELD_OUT_SHARE * len(groups)))
        held_out = {groups[number] for number in order[:count]}
        self.train = tuple(image for image in images if image.group not in held_out)
        self.held_out = tuple(image for image in images if image.group in held_out)
        self._seed = seed
        areas = np.array([image.area for image in self.train])
        self._shares = areas / areas.sum()
        self._cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def batch(self, stream: int, step: int, count: int, crop_px: int) -> Tensor:
        """Random training crops.

        Args:
            stream: Tells the trainings apart that share a seed.
            step: Of the training.
            count: B.
            crop_px: S.

        Returns:
            (B, 3, S, S) uint8: random place, scale, mirror and quarter turn.
        """
        rng = np.random.default_rng((self._seed, stream, step + _FIRST_STEP))
        chosen = rng.choice(len(self.train), size=count, p=self._shares)
        return _stack([self._crop(self.train[int(i)], crop_px, rng) for i in chosen])

    def held_out_batch(self, count: int, crop_px: int) -> Tensor:
        """The same ``count`` crops of held-out images each time, (count, 3, S, S) uint8."""
        rng = np.random.default_rng((self._seed, _HELD_OUT_STREAM))
        order = rng.permutation(len(self.held_out))
        chosen = [self.held_out[int(order[i % len(order)])] for i in range(count)]
        return _stack([self._crop(image, crop_px, rng) for image in chosen])

    def _crop(self, image: PoolImage, crop_px: int, rng: np.random.Generator) -> np.ndarray:
        pixels = self._pixels(image.path)
        factor, top, left = rng.uniform(*SCALE_JITTER), *rng.random(2)
        turn, mirror = int(rng.integers(4)), bool(rng.integers(2))
        height, width = pixels.shape[:2]
        # A crop never reaches beyond its image: small ones are enlarged more.
        side = min(crop_px / (image.scale * factor), height, width)
        y, x = top * (height - side), left * (width - side)
        # Cut first: Pillow's own ``box`` would convert the whole image each time.
        y0, x0 = int(y), int(x)
        y1, x1 = min(height, int(np.ceil(y + side))), min(width, int(np.ceil(x + side)))
        window = Image.fromarray(pixels[y0:y1, x0:x1])
        box = (x - x0, y - y0, min(x - x0 + side, x1 - x0), min(y - y0 + side, y1 - y0))
        crop = np.asarray(window.resize((crop_px, crop_px), Image.Resampling.BICUBIC, box=box))
        crop = np.rot90(crop, turn)
        return crop[:, ::-1] if mirror else crop

    def _pixels(self, path: Path) -> np.ndarray:
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        pixels = read_image(path)
        with self._lock:
            if path not in self._cache:
                self._cache[path] = pixels
                self._cached_bytes += pixels.nbytes
            reader = get_worker_info()  # in a process of a loader there are others beside it
            limit = _CACHE_BYTES // (reader.num_workers if reader else 1)
            while self._cached_bytes > limit and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels


def open_pool(sources: Sequence[str], *, data_root: Path | None = None, seed: int = 0) -> ImagePool:
    """Find the training images, and hold some out.

    Args:
        sources: As ``find_images`` has them.
        data_root: Where the images of manifests lie.
        seed: Of the choice of what is held out.

    Raises:
        DataError: If a source is not what it can be, has no image, or there is one group only.
    """
    pool = ImagePool(find_images(sources, data_root=data_root), seed)
    logger.info("%d images to train on, %d held out", len(pool.train), len(pool.held_out))
    return pool


def find_images(sources: Sequence[str], *, data_root: Path | None = None) -> list[PoolImage]:
    """Find the training images, in an order that depends on the sources alone.

    Args:
        sources: Each a manifest (a name, or a file), DIR, or DIR@SCALE. Of a name that a folder
            has as well, the data set is meant, of ./NAME the folder. Of a folder, every image
            in it and below, masks left out; SCALE enlarges its pixels. Of a manifest, the images
            of its training split at the scale of its regions, grouped as it says. Of a folder of
            packed images, those that they were packed from.
        data_root: Where the images of manifests lie.

    Raises:
        DataError: If a source is nothing of these, or has no image.
    """
    images: list[PoolImage] = []
    names = list_manifests()
    for source in sources:
        name, scale = _split_scale(source)
        path = Path(name)
        is_folder = path.is_dir()
        if name in names or (path.suffix == ".toml" and not is_folder):
            if is_folder:
                logger.warning("%s: the data set of that name; the folder is ./%s", name, name)
            images += _of_manifest(name, data_root, scale)
            continue
        if not is_folder:
            raise DataError(
                f"--images {source}: there is no such folder, nor a data set of that name "
                f"({', '.join(names)}); a scale stands behind @, as in DIR@2"
            )
        index = _packed_index(path)
        if index is None:
            images += _of_folder(path, 1.0 if scale is None else scale)
        elif scale is None:
            images += _of_packed(path, index)
        else:
            raise DataError(f"{source}: packed images bring their scales along; give {path} alone")
    return images


def _split_scale(source: str) -> tuple[str, float | None]:
    """What stands before @SCALE, and the scale."""
    name, at, number = source.rpartition("@")
    if not at or Path(source).exists():
        return source, None
    try:
        scale = float(number)
    except ValueError:
        return source, None
    if not 1 / 16 <= scale <= 16:
        raise DataError(f"{source}: a scale is between 1/16 and 16, got {number}")
    return name, scale


def _of_folder(folder: Path, scale: float) -> list[PoolImage]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.stem.endswith(_MASK_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder} has no image ({', '.join(IMAGE_SUFFIXES)}); give another --images"
        )
    return [
        PoolImage(path=file, scale=scale, group=str(file), size=image_size(file)) for file in files
    ]


def _of_manifest(name: str, data_root: Path | None, scale: float | None) -> list[PoolImage]:
    dataset = open_dataset(name, data_root=data_root)
    split = dataset.manifest.default_train
    images = {}
    for sample in dataset.split_samples(split):
        source = sample.source
        size = dataset.source_size(source)
        images[source.source_id] = PoolImage(
            path=dataset.image_path(source),
            scale=dataset.source_scale(source) if scale is None else scale,
            group=f"{dataset.name}/{source.group}",
            size=size,
        )
    if not images:
        raise DataError(f"data set {dataset.name} has no images in its split {split}")
    return list(images.values())


def _packed_index(folder: Path) -> list[Any] | None:
    """The entries of a folder of packed images; None if the folder is not one."""
    file = folder / INDEX_FILE
    try:
        if file.stat().st_size > _MAX_INDEX_BYTES:
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("kind") != INDEX_KIND:
        return None
    entries = values.get("images")
    return entries if isinstance(entries, list) else []


def _of_packed(folder: Path, entries: list[Any]) -> list[PoolImage]:
    images = []
    for number, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        name, scale, group = (values.get(key) for key in ("file", "scale", "group"))
        if (
            not (isinstance(name, str) and name == Path(name).name and name[:1] != ".")
            or not (isinstance(scale, float) and math.isfinite(scale) and scale > 0)
            or not isinstance(group, str)
        ):
            raise DataError(f"{folder / INDEX_FILE}: entry {number} is damaged; unpack it again")
        file = folder / name
        images.append(PoolImage(path=file, scale=scale, group=group, size=image_size(file)))
    if not images:
        raise DataError(f"{folder / INDEX_FILE} names no image; pack them again")
    return images


def _stack(crops: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([crop.transpose(2, 0, 1) for crop in crops]))


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """(B, 3, S, S) uint8 -> float32 in [0, 1] on a device, channels last."""
    moved = images.to(device, non_blocking=True)
    return moved.float().div_(255).contiguous(memory_format=torch.channels_last)
