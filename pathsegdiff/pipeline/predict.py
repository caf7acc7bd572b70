"""Segment image files of any size with a trained head and the bundle that it was trained with.

An image is brought to the scale of the training regions as the region rule did it, padded to whole
patches, cut into overlapping windows where it exceeds a region, and brought back to its own size.
Shapes: H0, W0 = the image's own size, H, W = at the regions' scale, K = classes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pathsegdiff.config import ALL_TAPS, TOKENS
from pathsegdiff.data.image import image_size, read_image, shown
from pathsegdiff.data.regions import check_mpp, resize_image
from pathsegdiff.diffusion.bundle import Bundle, load_bundle
from pathsegdiff.errors import BundleError, DataError, RunError
from pathsegdiff.evaluation.overlays import background_class, overlay
from pathsegdiff.evaluation.pictures import save_mask, save_picture
from pathsegdiff.features.quantize import as_read
from pathsegdiff.features.stage_one import StageOne, View
from pathsegdiff.features.store import DatasetCard
from pathsegdiff.segmentation.runs import Run
from pathsegdiff.segmentation.sampling import grid_batch

logger = logging.getLogger(__name__)

#: Windows share this part of their side with their neighbour, so that no border is seen.
_OVERLAP = 0.25
#: An image up to this factor larger than the largest of the data set is one region, as in training.
_ONE_REGION = 1.25
#: Scaled images above this many pixels are refused rather than left to run out of memory.
_MAX_PIXELS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Files that were written for one image."""

    image: Path
    mask: Path
    overlay: Path
    class_shares: dict[str, float]


def bundle_of_run(run: Run, model: str | None = None) -> Bundle:
    """The bundle that a run was trained with.

    Args:
        model: Its name or folder; None for the name that the run records.

    Raises:
        RunError: If the recorded name leads to no bundle here.
        BundleError: If ``model`` does not.
    """
    if model is not None:
        return load_bundle(model)
    name = str(run.config.model["name"])
    try:
        return load_bundle(name)
    except BundleError as error:
        raise RunError(
            f"run {run.path} was trained with the bundle {name} "
            f"({str(run.config.model['sha256'])[:12]}), which is not found under that name "
            f"({error}); give its folder as --model"
        ) from None


def predict_files(
    run: Run,
    bundle: Bundle,
    images: Sequence[Path],
    out: Path,
    *,
    mpp: float | None = None,
    batch_size: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Segment images; write ``STEM_mask.png`` (class ids, a palette) and ``STEM_overlay.png``.

    Args:
        run: Trained head; its device is used.
        bundle: The one that its features came from.
        mpp: Micrometres per pixel of these images; None: as the data set's own images.
        progress: Called with (windows done, windows of all images).

    Raises:
        RunError: If the bundle is another one.
        DataError: If an image cannot be read, two have the same stem, or a mask that is no
            prediction would be overwritten.
    """
    predictor = Predictor(run, bundle, batch_size=batch_size)
    stems = [path.stem for path in images]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise DataError(f"two images are called {twice!r}; predict them into different folders")
    for stem in stems:
        # Beside images, STEM_mask.png is what people call their own annotations; ours are pairs.
        mask = out / f"{stem}_mask.png"
        if mask.exists() and not (out / f"{stem}_overlay.png").exists():
            raise DataError(
                f"{shown(mask)} exists and is no earlier prediction (there is no "
                f"{shown(stem)}_overlay.png beside it); choose another --out"
            )
    total = sum(predictor.count_windows(image_size(path), mpp=mpp) for path in images)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    out.mkdir(parents=True, exist_ok=True)
    scheme = run.config.card.scheme
    background = background_class(scheme.names)
    written = []
    for path in images:
        image = read_image(path)
        label = predictor.labels(image, path.stem, mpp=mpp, advance=advance)
        mask, drawn = out / f"{path.stem}_mask.png", out / f"{path.stem}_overlay.png"
        save_mask(mask, label, scheme.colours)
        picture = overlay(image, label, scheme.colours[: scheme.num_classes], background=background)
        save_picture(drawn, picture)
        counts = np.bincount(label.ravel(), minlength=scheme.num_classes)
        shares = {n: float(c / label.size) for n, c in zip(scheme.names, counts, strict=False)}
        written.append(Prediction(image=path, mask=mask, overlay=drawn, class_shares=shares))
    return written


class Predictor:
    """Both stages for images that are in no store."""

    def __init__(self, run: Run, bundle: Bundle, *, batch_size: int = 3) -> None:
        """Load the bundle beside the head.

        Raises:
            RunError: If the head was trained on the features of another bundle.
        """
        recipe = run.config.recipe
        if bundle.card.sha256 != recipe.model_sha256:
            raise RunError(
                f"run {run.path} was trained with the bundle {run.config.model['name']} "
                f"({recipe.model_sha256[:12]}), this one is {bundle.card.name} "
                f"({bundle.card.sha256[:12]}); give the one it was trained with as --model"
            )
        self.run = run
        self.card = run.config.card
        self.view = View(timestep=recipe.timestep, conditioning=recipe.conditioning)
        # Only the taps that this head reads, whatever its store had besides.
        inputs = [name for level in run.config.levels for name, _ in level.taps]
        taps = [name for name in inputs if name != TOKENS]
        self.stage_one = StageOne(
            bundle.load(device=run.device),
            views=[self.view],
            taps=taps or ALL_TAPS[:1],
            tokens=TOKENS in inputs,
            dtype=recipe.dtype,
            precision=recipe.precision,
            layout=recipe.layout,
            seed=recipe.seed,
            device=run.device,
            batch_size=batch_size,
        )

    def count_windows(self, size: tuple[int, int], *, mpp: float | None = None) -> int:
        """Windows that an image of (height, width) is cut into."""
        rule = self.card.rule
        counts = [
            len(window_starts(length + -length % rule.patch_px, rule.region_px, rule.patch_px))
            for length in region_size(size, self.card, mpp)
        ]
        return counts[0] * counts[1]

    def labels(
        self,
        image: np.ndarray,
        name: str,
        *,
        mpp: float | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """(H0, W0) uint8 class ids of an RGB image (H0, W0, 3)."""
        found = self.probabilities(image, name, mpp=mpp, advance=advance)
        return found.argmax(axis=0).astype(np.uint8)

    def probabilities(
        self,
        image: np.ndarray,
        name: str,
        *,
        mpp: float | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """(K, H0, W0) float32 class probabilities; don't care is never among them.

        Args:
            image: (H0, W0, 3) uint8 RGB.
            name: Keys the noise, as a sample's id does: an image of the data set under its own id
                gets the features that its store holds.
            mpp: Micrometres per pixel of the image; None: as the data set's own images.
            advance: Called after each window.
        """
        height, width = image.shape[:2]
        size = region_size((height, width), self.card, mpp)
        if size[0] * size[1] > _MAX_PIXELS:
            raise DataError(
                f"{name} would have {size[0]} x {size[1]} pixels at the scale of the training "
                "regions; cut it into smaller images"
            )
        scaled = image if size == (height, width) else resize_image(image, size)
        patch = self.card.rule.patch_px
        padded = pad_to_patches(scaled, patch)
        side = self.card.rule.region_px
        total: np.ndarray | None = None
        weights = np.zeros(padded.shape[:2], np.float32)
        windows = [
            (top, left)
            for top in window_starts(padded.shape[0], side, patch)
            for left in window_starts(padded.shape[1], side, patch)
        ]
        for top, left in windows:
            window = padded[top : top + side, left : left + side]
            key = name if len(windows) == 1 else f"{name}_y{top}_x{left}"
            found = self._window(window, key)
            if total is None:
                total = np.zeros((len(found), *padded.shape[:2]), np.float32)
            weight = _tent(*window.shape[:2])
            rows, columns = slice(top, top + len(window)), slice(left, left + window.shape[1])
            total[:, rows, columns] += found * weight
            weights[rows, columns] += weight
            advance()
        assert total is not None
        total /= weights
        total = total[:, : size[0], : size[1]]
        return resize_probabilities(total, (height, width))

    @torch.inference_mode()
    def _window(self, image: np.ndarray, key: str) -> np.ndarray:
        prepared = self.stage_one.prepare(image, key)
        features = self.stage_one.run(prepared)
        arrays = dict(features.levels[self.view])
        if features.tokens is not None:
            arrays[TOKENS] = features.tokens
        rows, columns = prepared.grid
        batch = grid_batch(
            self.run.config.levels,
            {
                name: torch.from_numpy(as_read(values, self.run.config.recipe.dtype))[None]
                for name, values in arrays.items()
            },
            patch_px=self.card.rule.patch_px,
            rows=rows,
            columns=columns,
        ).to(self.run.device)
        logits = self.run.head(batch)[0, : self.run.num_classes].float()
        return logits.softmax(dim=0).cpu().numpy()


def region_size(
    size: tuple[int, int], card: DatasetCard, mpp: float | None = None
) -> tuple[int, int]:
    """Size at which an image is segmented: the scale at which the training regions were made.

    A "resize" rule stretched every training image onto one region, so an image about as large as
    these becomes one region too; a larger one is scaled as the commonest training image was. A
    "window" rule cut regions at its own mpp.

    Args:
        size: (height, width) of the image.
        card: Of the data set that the head was trained on.
        mpp: Micrometres per pixel of the image; None: as the data set's own images.

    Returns:
        (height, width), each at least 1.

    Raises:
        DataError: If ``mpp`` is no resolution, or the data set states none to compare it with.
    """
    rule = card.rule
    zoom = 1.0
    check_mpp("mpp", mpp)
    if mpp is not None:
        if card.source_mpp is None:
            raise DataError(f"data set {card.name} states no mpp, so --mpp {mpp} means nothing")
        zoom = mpp / card.source_mpp
    height, width = size[0] * zoom, size[1] * zoom
    if rule.kind == "resize":
        largest = card.largest_source_px
        if height <= _ONE_REGION * largest[0] and width <= _ONE_REGION * largest[1] and mpp is None:
            return rule.region_px, rule.region_px
        typical = card.typical_source_px
        scale = rule.region_px / typical[0], rule.region_px / typical[1]
    else:
        ratio = 1.0 if rule.mpp is None or card.source_mpp is None else card.source_mpp / rule.mpp
        scale = ratio, ratio
    return max(1, round(height * scale[0])), max(1, round(width * scale[1]))


def pad_to_patches(image: np.ndarray, patch_px: int) -> np.ndarray:
    """Mirror an image at its lower and right border up to whole patches."""
    height, width = image.shape[:2]
    missing = (-height % patch_px, -width % patch_px)
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")


def window_starts(length: int, side: int, step: int) -> list[int]:
    """First pixels of windows of ``side`` that cover ``length`` with overlap, spread evenly.

    Args:
        length: A multiple of ``step``.
        side: A multiple of ``step``; one window is enough where the length is not larger.
        step: Windows start on its multiples.
    """
    if length <= side:
        return [0]
    stride = max(step, int(side * (1 - _OVERLAP)) // step * step)
    count = -(-(length - side) // stride) + 1
    return [round(index * (length - side) / (count - 1) / step) * step for index in range(count)]


def resize_probabilities(probabilities: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(K, H, W) -> (K, *size), bilinear with half-pixel centres."""
    if probabilities.shape[1:] == size:
        return probabilities
    tensor = torch.from_numpy(np.ascontiguousarray(probabilities))[None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0].numpy()


def _tent(height: int, width: int) -> np.ndarray:
    """(height, width) float32 weights that fall towards the borders, never to zero."""

    def axis(length: int) -> np.ndarray:
        distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
        return (distance / distance.max()).astype(np.float32)

    return axis(height)[:, None] * axis(width)[None, :]
