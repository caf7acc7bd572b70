"""Object metrics of the GlaS contest: detection F1, object Dice, object Hausdorff.

Sirinukunwattana et al. 2017, "Gland segmentation in colon histology images: the GlaS challenge
contest", Medical Image Analysis 35, https://doi.org/10.1016/j.media.2016.08.008.

An object is one non-zero value of an integer map, whether its pixels touch or not. Its partner is
the object of the other map that covers most of its pixels (ties: the smallest label), if any does.

- Detection: a predicted object is a true positive if it covers strictly more than half of its
  partner. False negatives are the target's objects minus the true positives.
- Object Dice: the Dice of each object and its partner (0 without one), averaged with the objects'
  areas as weights over each of the two maps, then over the two.
- Object Hausdorff: the same with the symmetric Hausdorff distance over all pixels of the two
  objects, in pixels; an object without a partner takes the nearest object of the other map. Where
  the other map has no object at all the contest's code is undefined, and the distance is infinite.

A split is scored twice: pooled, with all objects of all images together (the contest's numbers),
and as the mean over images. Two empty maps are a perfect image.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

#: Of radius 3: contours are dilated by it, and what lies between them is grown by it
#: (Chen et al. 2016, https://arxiv.org/abs/1604.02677).
DISK_RADIUS_PX = 3
DISK = np.add.outer(*2 * [np.arange(-DISK_RADIUS_PX, DISK_RADIUS_PX + 1) ** 2]) <= DISK_RADIUS_PX**2
MIN_AREA_CANDIDATES = (0, 50, 100, 200, 400, 800, 1600, 3200, 6400)

# Columns of ``object_sums``; what a split's scores are made of, and a sum over images each.
SUM_COLUMNS = (
    "tp",
    "fp",
    "fn",
    "target_area",
    "target_area_dice",
    "target_area_hausdorff",
    "target_area_unmeasured",
    "predicted_area",
    "predicted_area_dice",
    "predicted_area_hausdorff",
    "predicted_area_unmeasured",
)


def objects_from_mask(mask: np.ndarray, min_area_px: int = 0) -> np.ndarray:
    """Number the objects of a boolean mask: holes filled, then 8-connected components.

    Args:
        mask: (H, W) bool, the pixels called gland.
        min_area_px: Components with fewer pixels (holes included) are dropped.

    Returns:
        (H, W) int32, 0 = background, objects 1..n in the order of their first pixel, row by row.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"need an (H, W) boolean mask, got {mask.dtype} of shape {mask.shape}")
    if min_area_px < 0:
        raise ValueError(f"min_area_px must not be negative, got {min_area_px}")
    # The 4-connected background of 8-connected objects: what cannot leave on it is a hole.
    filled = ndimage.binary_fill_holes(mask)
    labels, count = ndimage.label(filled, structure=np.ones((3, 3), bool))
    area = np.bincount(labels.ravel(), minlength=count + 1)
    keep = area >= max(min_area_px, 1)
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]


def grow_objects(objects: np.ndarray) -> np.ndarray:
    """Grow each object by the disk; a pixel within reach of several takes the nearest.

    Args:
        objects: (H, W) int32, 0 = background, such as what lies within predicted contours.

    Returns:
        (H, W) int32.
    """
    if not objects.any():
        return objects
    distances, (rows, columns) = ndimage.distance_transform_edt(objects == 0, return_indices=True)
    return np.where(distances <= DISK_RADIUS_PX, objects[rows, columns], 0).astype(np.int32)


@dataclass(frozen=True)
class _Objects:
    """The objects of one map, numbered 1..n in the order of their labels."""

    index: np.ndarray  # (H, W) intp, 0 = background
    area: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) top, left, bottom, right; the last two exclusive

    @property
    def count(self) -> int:
        return len(self.area)


def _read_objects(instances: np.ndarray, name: str) -> _Objects:
    instances = np.asarray(instances)
    if instances.ndim != 2 or not np.issubdtype(instances.dtype, np.integer):
        raise ValueError(f"{name}: need an (H, W) integer map, got {instances.dtype}")
    if instances.size and int(instances.min()) < 0:
        raise ValueError(f"{name}: object labels must not be negative, got {instances.min()}")
    labels, inverse = np.unique(instances, return_inverse=True)
    index = inverse.reshape(instances.shape)
    if not len(labels) or labels[0] != 0:
        index = index + 1  # no background at all
    area = np.bincount(index.ravel(), minlength=1)[1:]
    boxes = np.array(
        [(r.start, c.start, r.stop, c.stop) for r, c in ndimage.find_objects(index)], np.int64
    ).reshape(-1, 4)
    return _Objects(index, area, boxes)


class _Distances:
    """Hausdorff distances between the objects of two maps, each pair measured at most once."""

    def __init__(self, target: _Objects, predicted: _Objects) -> None:
        self.target, self.predicted = target, predicted
        self.known: dict[tuple[int, int], float] = {}

    def between(self, i: int, j: int) -> float:
        """Symmetric Hausdorff distance of target object ``i`` and predicted object ``j``."""
        if (i, j) not in self.known:
            box_i, box_j = self.target.boxes[i], self.predicted.boxes[j]
            top, left = np.minimum(box_i[:2], box_j[:2])
            bottom, right = np.maximum(box_i[2:], box_j[2:])
            # Both objects lie inside this box, so that distances within it are exact.
            crop = np.s_[top:bottom, left:right]
            self.known[i, j] = hausdorff_distance(
                self.target.index[crop] == i + 1, self.predicted.index[crop] == j + 1
            )
        return self.known[i, j]

    def nearest_to_target(self, i: int) -> float:
        bounds = np.abs(self.predicted.boxes - self.target.boxes[i]).max(axis=1, initial=0)
        return self._nearest(bounds, lambda j: self.between(i, j))

    def nearest_to_predicted(self, j: int) -> float:
        bounds = np.abs(self.target.boxes - self.predicted.boxes[j]).max(axis=1, initial=0)
        return self._nearest(bounds, lambda i: self.between(i, j))

    @staticmethod
    def _nearest(bounds: np.ndarray, distance: Callable[[int], float]) -> float:
        # Two objects whose boxes differ by b on one side are at least b apart: the outermost pixel
        # of one is b rows or columns from all of the other. So most objects need no measuring.
        best = math.inf
        for other in np.argsort(bounds, kind="stable"):
            if bounds[other] >= best:
                break
            best = min(best, distance(int(other)))
        return best


def hausdorff_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Symmetric Hausdorff distance over all pixels of two masks, in pixels; exact.

    Not over the outlines alone: the pixel of one object that is farthest from the other can lie
    inside (a disc in a ring).

    Args:
        first, second: (H, W) bool of one shape.

    Returns:
        0 if both are empty, infinity if one is.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape:
        raise ValueError(f"masks have shapes {first.shape} and {second.shape}")
    if not first.any() or not second.any():
        return math.inf if first.any() or second.any() else 0.0
    return max(_farthest(first, second), _farthest(second, first))


def _farthest(source: np.ndarray, target: np.ndarray) -> float:
    alone = source & ~target
    if not alone.any():
        return 0.0
    return float(ndimage.distance_transform_edt(~target)[alone].max())


@dataclass(frozen=True, kw_only=True)
class ImageObjects:
    """The objects of one image, each with its area, its Dice and its Hausdorff distance.

    n = objects of the target, m = objects of the prediction, both in the order of their labels.
    """

    tp: int
    target_area: np.ndarray  # (n,) int64, in pixels
    target_dice: np.ndarray  # (n,) float64
    target_hausdorff: np.ndarray  # (n,) float64, in pixels; infinite if nothing was predicted
    predicted_area: np.ndarray  # (m,)
    predicted_dice: np.ndarray
    predicted_hausdorff: np.ndarray

    @property
    def fp(self) -> int:
        return len(self.predicted_area) - self.tp

    @property
    def fn(self) -> int:
        return len(self.target_area) - self.tp

    @cached_property
    def sums(self) -> np.ndarray:
        """(11,) float64, in the order of ``SUM_COLUMNS``."""
        columns = [self.tp, self.fp, self.fn]
        for area, dice, hausdorff in (
            (self.target_area, self.target_dice, self.target_hausdorff),
            (self.predicted_area, self.predicted_dice, self.predicted_hausdorff),
        ):
            measured = np.isfinite(hausdorff)
            columns += [
                area.sum(),
                (area * dice).sum(),
                (area[measured] * hausdorff[measured]).sum(),
                area[~measured].sum(),
            ]
        return np.array(columns, np.float64)

    @property
    def f1(self) -> float:
        return float(object_statistics(self.sums)["object_f1"])

    @property
    def dice(self) -> float:
        return float(object_statistics(self.sums)["object_dice"])

    @property
    def hausdorff(self) -> float:
        """In pixels; infinite if exactly one of the maps is empty."""
        return float(object_statistics(self.sums)["object_hausdorff"])


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Which object of the other map each object goes with, by the contest's rule."""

    target_area: np.ndarray  # (n,) int64, in pixels
    predicted_area: np.ndarray  # (m,)
    target_partner: np.ndarray  # (n,) index into the predicted objects, -1 = none
    predicted_partner: np.ndarray  # (m,) index into the target's objects, -1 = none
    target_dice: np.ndarray  # (n,) float64, of the object and its partner; 0 without one
    predicted_dice: np.ndarray  # (m,)
    true_positive: np.ndarray  # (m,) bool: covers strictly more than half of its partner


def match_objects(target: np.ndarray, predicted: np.ndarray) -> Matches:
    """Give every object its partner: the object of the other map that covers most of its pixels.

    Args:
        target: (H, W) integer map, 0 = background.
        predicted: (H, W) integer map of the same shape.

    Raises:
        ValueError: If the shapes differ, or a map does not hold non-negative integers.
    """
    return _match(*_read_both(target, predicted))


def _read_both(target: np.ndarray, predicted: np.ndarray) -> tuple[_Objects, _Objects]:
    if np.shape(target) != np.shape(predicted):
        raise ValueError(f"prediction has shape {np.shape(predicted)}, target {np.shape(target)}")
    return _read_objects(target, "target"), _read_objects(predicted, "prediction")


def _match(truth: _Objects, guess: _Objects) -> Matches:
    overlap = np.bincount(
        (truth.index * (guess.count + 1) + guess.index).ravel(),
        minlength=(truth.count + 1) * (guess.count + 1),
    ).reshape(truth.count + 1, guess.count + 1)[1:, 1:]
    target_partner, target_shared = _largest(overlap)
    predicted_partner, predicted_shared = _largest(overlap.T)
    # -1 reads the 0 that is put behind the areas; the shared pixels are 0 there anyway.
    partner_area = np.append(truth.area, 0)[predicted_partner]
    return Matches(
        target_area=truth.area,
        predicted_area=guess.area,
        target_partner=target_partner,
        predicted_partner=predicted_partner,
        target_dice=2 * target_shared / (truth.area + np.append(guess.area, 0)[target_partner]),
        predicted_dice=2 * predicted_shared / (guess.area + partner_area),
        true_positive=2 * predicted_shared > partner_area,
    )


def _largest(overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row, the column of the largest overlap (-1 if there is none) and that overlap."""
    rows, columns = overlap.shape
    if not rows or not columns:
        return np.full(rows, -1), np.zeros(rows, np.int64)
    partner = overlap.argmax(axis=1)  # the first of equals: the smallest label
    shared = overlap[np.arange(rows), partner]
    return np.where(shared > 0, partner, -1), shared


def image_object_scores(target: np.ndarray, predicted: np.ndarray) -> ImageObjects:
    """Measure the objects of one image against each other.

    Args:
        target: (H, W) integer map at the image's original size, 0 = background.
        predicted: (H, W) integer map of the same shape, see ``objects_from_mask``.

    Raises:
        ValueError: If the shapes differ, or a map does not hold non-negative integers.
    """
    truth, guess = _read_both(target, predicted)
    matches = _match(truth, guess)
    distances = _Distances(truth, guess)
    return ImageObjects(
        tp=int(matches.true_positive.sum()),
        target_area=matches.target_area,
        target_dice=matches.target_dice,
        target_hausdorff=np.array(
            [
                distances.between(i, j) if j >= 0 else distances.nearest_to_target(i)
                for i, j in enumerate(matches.target_partner.tolist())
            ],
            np.float64,
        ),
        predicted_area=matches.predicted_area,
        predicted_dice=matches.predicted_dice,
        predicted_hausdorff=np.array(
            [
                distances.between(i, j) if i >= 0 else distances.nearest_to_predicted(j)
                for j, i in enumerate(matches.predicted_partner.tolist())
            ],
            np.float64,
        ),
    )


def object_sums(images: Sequence[ImageObjects]) -> np.ndarray:
    """(N, 11) float64: per image what adds up to a split's scores; see ``SUM_COLUMNS``."""
    return np.array([image.sums for image in images]).reshape(len(images), len(SUM_COLUMNS))


def object_statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The contest's metrics from (summed) columns of ``object_sums``.

    Args:
        sums: (..., 11); leading axes are kept, so that a whole bootstrap is one call.

    Returns:
        Arrays (...) in float64: ``object_f1``, ``object_dice``, ``object_hausdorff`` (in pixels,
        infinite as soon as one object has nothing to be measured against).
    """
    column = dict(zip(SUM_COLUMNS, np.moveaxis(np.asarray(sums, np.float64), -1, 0), strict=True))
    tp, wrong = column["tp"], column["fp"] + column["fn"]
    empty = (column["target_area"] == 0) & (column["predicted_area"] == 0)

    def mean(side: str, what: str) -> np.ndarray:
        area = column[f"{side}_area"]
        return np.divide(
            column[f"{side}_area_{what}"], area, out=np.zeros_like(area), where=area > 0
        )

    unmeasured = column["target_area_unmeasured"] + column["predicted_area_unmeasured"] > 0
    dice = (mean("target", "dice") + mean("predicted", "dice")) / 2
    hausdorff = (mean("target", "hausdorff") + mean("predicted", "hausdorff")) / 2
    # F1 = 2 TP / (2 TP + FP + FN); with no true positive 0, as the worked cases have it.
    f1 = np.divide(2 * tp, 2 * tp + wrong, out=np.zeros_like(tp), where=tp > 0)
    return {
        "object_f1": np.where(empty, 1.0, f1),
        "object_dice": np.where(empty, 1.0, dice),
        "object_hausdorff": np.where(unmeasured, math.inf, hausdorff),
    }


@dataclass(frozen=True, kw_only=True)
class SplitObjects:
    """The contest's metrics of a split: pooled over all objects, and as means over images."""

    f1: float
    dice: float
    hausdorff: float  # in pixels; infinite if one image has objects in one map only
    mean_f1: float
    mean_dice: float
    mean_hausdorff: float
    hausdorff_measured: float  # pooled without the images that have objects in one map only
    unmeasured_images: int  # how many images those are
    images: int
    tp: int
    fp: int
    fn: int

    def to_dict(self) -> dict:
        """JSON types; an infinite distance is ``None`` (``unmeasured_images`` says why)."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "f1": self.f1,
            "dice": self.dice,
            "hausdorff_px": number(self.hausdorff),
            "hausdorff_measured_px": number(self.hausdorff_measured),
            "image_mean": {
                "f1": self.mean_f1,
                "dice": self.mean_dice,
                "hausdorff_px": number(self.mean_hausdorff),
            },
            "tp": self.tp,
            "fp": self.fp,
            "fn": self.fn,
            "images": self.images,
            "unmeasured_images": self.unmeasured_images,
        }


def pool_objects(images: Sequence[ImageObjects]) -> SplitObjects:
    """The metrics of a split from those of its images.

    Raises:
        ValueError: If there is no image.
    """
    if not images:
        raise ValueError("need at least one image")
    sums = object_sums(images)
    pooled = object_statistics(sums.sum(axis=0))
    each = object_statistics(sums)
    measured = np.isfinite(each["object_hausdorff"])
    return SplitObjects(
        f1=float(pooled["object_f1"]),
        dice=float(pooled["object_dice"]),
        hausdorff=float(pooled["object_hausdorff"]),
        mean_f1=float(each["object_f1"].mean()),
        mean_dice=float(each["object_dice"].mean()),
        mean_hausdorff=float(each["object_hausdorff"].mean()),
        hausdorff_measured=(
            float(object_statistics(sums[measured].sum(axis=0))["object_hausdorff"])
            if measured.any()
            else math.inf
        ),
        unmeasured_images=int((~measured).sum()),
        images=len(images),
        tp=int(sums[:, 0].sum()),
        fp=int(sums[:, 1].sum()),
        fn=int(sums[:, 2].sum()),
    )


def choose_objects(
    images: Iterable[tuple[Sequence[np.ndarray], np.ndarray]],
    candidates: Sequence[int] = MIN_AREA_CANDIDATES,
    *,
    grown: bool = False,
) -> tuple[int, int]:
    """Of several ways to a mask and of minimum areas, the pair that scores best.

    Best is the largest sum of pooled detection F1 and pooled object Dice; of equals, the first way,
    then the smallest area. The Hausdorff distance takes no part: it is infinite once an image loses
    all its objects.

    Args:
        images: (masks, target) of each, at its original size, one at a time: one (H, W) bool mask
            for each way, as many for every image, and the (H, W) integer target map.
        candidates: Areas in pixels.
        grown: Whether what is kept is grown before it is scored (``grow_objects``).

    Returns:
        (number of the way, area); the first way where there is no image.

    Raises:
        ValueError: If there is nothing to choose from.
    """
    if not candidates:
        raise ValueError("need at least one candidate area")
    areas = sorted(set(candidates))
    sums = np.zeros((1, len(areas), len(SUM_COLUMNS)))
    for masks, target in images:
        scored = np.stack([_sums_by_area(mask, target, areas, grown) for mask in masks])
        sums = sums + scored
    pooled = object_statistics(sums)
    # Rounded, so that equals are equal whatever the order of the additions.
    quality = np.round(pooled["object_f1"] + pooled["object_dice"], 12)
    way, row = np.unravel_index(int(quality.argmax()), quality.shape)
    return int(way), areas[int(row)]


def _sums_by_area(
    mask: np.ndarray, target: np.ndarray, areas: Sequence[int], grown: bool
) -> np.ndarray:
    """(areas, columns) of one image."""
    everything = objects_from_mask(mask)
    size = np.bincount(everything.ravel())
    scored: dict[bytes, np.ndarray] = {}  # most candidates drop the same objects
    rows = []
    for area in areas:
        keep = size >= area
        keep[0] = False
        if keep.tobytes() not in scored:
            kept = np.where(keep[everything], everything, 0)
            kept = grow_objects(kept) if grown else kept
            scored[keep.tobytes()] = _sums_without_distances(match_objects(target, kept))
        rows.append(scored[keep.tobytes()])
    return np.stack(rows)


def _sums_without_distances(matches: Matches) -> np.ndarray:
    tp = int(matches.true_positive.sum())
    sums = dict.fromkeys(SUM_COLUMNS, 0.0)
    sums["tp"] = tp
    sums["fp"] = len(matches.predicted_area) - tp
    sums["fn"] = len(matches.target_area) - tp
    sums["target_area"] = matches.target_area.sum()
    sums["target_area_dice"] = (matches.target_area * matches.target_dice).sum()
    sums["predicted_area"] = matches.predicted_area.sum()
    sums["predicted_area_dice"] = (matches.predicted_area * matches.predicted_dice).sum()
    return np.array(list(sums.values()), np.float64)
