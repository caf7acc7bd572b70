"""Images and labels for networks that learn from them: read once, resized, augmented.

Everything is a function of (seed, step, index). Shapes: H = W = region_px, S = ``size_px``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathsegdiff.data.manifest import Dataset, Region, Sample
from pathsegdiff.data.passes import map_threads
from pathsegdiff.data.regions import resize_image, resize_label
from pathsegdiff.features.extract import dataset_card, stored_sample
from pathsegdiff.features.store import StoredSample
from pathsegdiff.pipeline.baselines.dcan import contours_of
from pathsegdiff.segmentation.sampling import epoch_order

#: Separates its random draws from those of the order, which share its seed.
_AUGMENT_STREAM = 2
#: What augmentation draws from, each uniformly between the bounds, beside flips and quarter turns.
#: Light: all is H&E of one data set.
AUGMENTATION: dict[str, tuple[float, float]] = {
    "zoom": (0.75, 1.0),  # side of the square that is kept, of every second image
    "stain_scale": (0.9, 1.1),  # of the density of each stain
    "stain_shift": (-0.02, 0.02),  # added to it
    "brightness": (-0.08, 0.08),
    "contrast": (0.85, 1.15),
    "saturation": (0.8, 1.2),
}
#: Optical densities (R, G, B) of haematoxylin, eosin and DAB: Ruifrok and Johnston 2001.
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DARKEST = 1 / 255


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One region in memory.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        label: Class ids, uint8: (S, S) to train on, (H, W) to score.
        class_pixels: (num_classes,) pixels of each class of the region.
        contour: (S, S) uint8, 1 on the contours of objects; None where they are not asked for.
    """

    image: np.ndarray
    label: np.ndarray
    class_pixels: np.ndarray
    contour: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """A batch as a step sees it.

    Attributes:
        images: (B, 3, S, S) float32 in [0, 1].
        labels: (B, S, S) uint8 class ids.
        contours: (B, S, S) uint8, or None.
    """

    images: Tensor
    labels: Tensor
    contours: Tensor | None = None


class Images:
    """A data set as the rules of stage 2 see it: the same samples as in a store of it.

    Attributes:
        dataset: Open.
        card: As a store has it.
        samples: As a store lists them, in the manifest's order.
        size_px: S.
    """

    def __init__(self, dataset: Dataset, size_px: int) -> None:
        self.dataset = dataset
        self.card = dataset_card(dataset)
        self.samples = tuple(stored_sample(dataset, sample) for sample in dataset.samples)
        self.size_px = size_px
        self._by_id: dict[str, Sample] = {sample.sample_id: sample for sample in dataset.samples}

    def region(self, sample: StoredSample) -> Region:
        """Read a region; windows are cropped as ``psd extract`` crops them with its usual seed.

        Raises:
            DataError: As ``Dataset.read``.
        """
        return self.dataset.read(self._by_id[sample.sample_id])

    def resized(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) to (S, S, 3) uint8."""
        return resize_image(image, (self.size_px, self.size_px))

    def pictures(
        self, samples: Sequence[StoredSample], *, to_train: bool, contours: bool = False
    ) -> list[Picture]:
        """Read regions into memory, in their order; about S * S * 4 bytes each.

        Args:
            to_train: Whether the labels are resized to S as well.
            contours: Whether those of the objects are wanted; only to train.

        Raises:
            DataError: As ``Dataset.read``.
        """
        num_classes = self.card.scheme.num_classes

        def read(sample: StoredSample) -> Picture:
            region = self.region(sample)
            label = region.label
            counts = np.bincount(label.ravel(), minlength=256)[:num_classes]
            contour = None
            if to_train:
                size = self.size_px, self.size_px
                label = resize_label(label, size)
                if contours:
                    assert region.instances is not None
                    contour = resize_label(contours_of(region.instances).astype(np.uint8), size)
            image = self.resized(region.image)
            return Picture(image=image, label=label, class_pixels=counts, contour=contour)

        return map_threads(read, samples)


def training_batch(
    pictures: Sequence[Picture], step: int, *, batch_size: int, seed: int
) -> ImageBatch:
    """The pictures of one step, augmented: every one once per epoch, every batch full.

    Args:
        pictures: Of the training part.
        step: From 0 through the whole training.
        batch_size: B.
        seed: Of the run.
    """
    images, targets = [], []
    for index in range(batch_size):
        epoch, position = divmod(step * batch_size + index, len(pictures))
        order = epoch_order(seed, epoch, len(pictures))
        picture = pictures[int(order[position])]
        rng = np.random.default_rng((seed, _AUGMENT_STREAM, step, index))
        target = [picture.label] if picture.contour is None else [picture.label, picture.contour]
        image, turned = augment(to_tensor(picture.image), torch.from_numpy(np.stack(target)), rng)
        images.append(image)
        targets.append(turned)
    labels, *contours = torch.stack(targets, dim=1)
    return ImageBatch(
        images=torch.stack(images), labels=labels, contours=contours[0] if contours else None
    )


def to_tensor(image: np.ndarray) -> Tensor:
    """(S, S, 3) uint8 to (3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def augment(image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Turn, mirror, zoom in and change the colours of one picture (``AUGMENTATION``).

    Args:
        image: (3, S, S) in [0, 1].
        label: (..., S, S) uint8; follows the image, by the nearest pixel.

    Returns:
        Image and label of the same shapes.
    """
    turns, mirror, zoomed = rng.integers(4), rng.integers(2), rng.integers(2)
    image, label = (torch.rot90(t, int(turns), (-2, -1)) for t in (image, label))
    if mirror:
        image, label = image.flip(-1), label.flip(-1)
    size = image.shape[-1]
    side = round(size * rng.uniform(*AUGMENTATION["zoom"]))
    top, left = (int(v) for v in rng.integers(size - side + 1, size=2))
    if zoomed and side < size:
        image, label = _zoom(image, label, top, left, side)
    return change_colours(image, rng), label.contiguous()


def change_colours(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change stains, brightness, contrast and saturation of (3, S, S) in [0, 1]."""
    scale = rng.uniform(*AUGMENTATION["stain_scale"], size=3)
    shift = rng.uniform(*AUGMENTATION["stain_shift"], size=3)
    image = jitter_stains(image, torch.from_numpy(scale).float(), torch.from_numpy(shift).float())
    contrast = rng.uniform(*AUGMENTATION["contrast"])
    brightness = rng.uniform(*AUGMENTATION["brightness"])
    saturation = rng.uniform(*AUGMENTATION["saturation"])
    mean = image.mean()
    image = (image - mean) * contrast + mean + brightness
    grey = image.mean(dim=0, keepdim=True)
    return (grey + (image - grey) * saturation).clamp(0, 1)


def jitter_stains(image: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift the densities of the stains: Tellez et al. 2018, HED colour augmentation.

    Beer-Lambert: -log(rgb) = densities @ stains (https://arxiv.org/abs/1808.05896, section III-C).

    Args:
        image: (3, S, S) in [0, 1].
        scale: (3,) of haematoxylin, eosin and the rest.
        shift: (3,) added after.

    Returns:
        (3, S, S) in [0, 1].
    """
    stains = _STAINS / _STAINS.norm(dim=1, keepdim=True)
    density = -image.clamp_min(_DARKEST).log().flatten(1)
    amounts = torch.linalg.inv(stains).T @ density
    amounts = amounts * scale[:, None] + shift[:, None]
    return torch.exp(-(stains.T @ amounts)).clamp(0, 1).view_as(image)


def _zoom(image: Tensor, label: Tensor, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
    """Enlarge the square of ``side`` pixels to the whole picture."""
    size = image.shape[-1]
    image = image[:, top : top + side, left : left + side]
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    # Integers: the nearest pixel centre, as ``resize_label`` does.
    places = (2 * torch.arange(size) + 1) * side // (2 * size)
    return image, label[..., top + places, :][..., left + places]
