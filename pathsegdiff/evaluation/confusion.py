"""Pixel metrics, all of them read off one confusion matrix.

The primary numbers are pooled: the matrices of a split's images are added up and the metric is
taken once, so that every pixel weighs the same. Accuracy is then the share of correct pixels
(micro); Dice, IoU and F1 are unweighted means over the classes (macro). Per class, the Dice
coefficient and F1 are the same number, 2 TP / (2 TP + FP + FN).

Shapes: K = classes without don't care, N = images; rows of a matrix are the target, columns the
prediction. ``nan`` stands for "no such number": a class that neither the target nor the
prediction holds has no IoU, and stays out of every mean over classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


def confusion_matrix(target: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of one label map by (target class, predicted class).

    Args:
        target: (H, W) integer labels; a pixel with a label of ``num_classes`` or more (don't care,
            outside, unlabelled) is not counted, whatever was predicted there.
        predicted: (H, W) integer labels, each in [0, num_classes).
        num_classes: K.

    Returns:
        (K, K) int64; element (i, j) counts the pixels of class i that were called j.

    Raises:
        ValueError: If the shapes differ, labels are no integers or negative, or the prediction
            holds a label that is not one of the K classes (don't care is never predicted).
    """
    target, predicted = np.asarray(target), np.asarray(predicted)
    if target.shape != predicted.shape:
        raise ValueError(f"prediction has shape {predicted.shape}, target {target.shape}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    for name, labels in (("target", target), ("prediction", predicted)):
        if labels.dtype != bool and not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"the {name}'s labels must be integers, got {labels.dtype}")
    if not target.size:
        return np.zeros((num_classes, num_classes), np.int64)
    if int(target.min()) < 0:
        raise ValueError(f"the target holds the label {int(target.min())}")
    low, high = int(predicted.min()), int(predicted.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"predicted labels must be in [0, {num_classes - 1}], got {wrong}")
    # One row more collects what does not count; int64 first, since uint8 * K wraps around.
    rows = np.minimum(target.astype(np.int64), num_classes)
    pairs = rows * num_classes + predicted
    counts = np.bincount(pairs.ravel(), minlength=(num_classes + 1) * num_classes)
    return counts.reshape(num_classes + 1, num_classes)[:num_classes].astype(np.int64)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient in float64, ``nan`` where the denominator is 0."""
    numerator = np.asarray(numerator, np.float64)
    denominator = np.asarray(denominator, np.float64)
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def mean_of_defined(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean along an axis without its ``nan``; ``nan`` where nothing else is left."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0.0).sum(axis=axis), defined.sum(axis=axis))


def class_statistics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """IoU, Dice, precision, recall and pixel counts of every class.

    Args:
        confusion: (..., K, K) counts; leading axes are kept.

    Returns:
        Arrays (..., K) in float64: ``iou``, ``dice``, ``precision``, ``recall``, ``pixels`` (of the
        target) and ``predicted_pixels``. Where the class is in neither map, all four are ``nan``;
        precision alone is ``nan`` where the class was never predicted, recall where it never was.
    """
    counts = np.asarray(confusion, np.float64)
    hit = np.diagonal(counts, axis1=-2, axis2=-1)
    target, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    return {
        "iou": divide(hit, target + predicted - hit),
        "dice": divide(2 * hit, target + predicted),
        "precision": divide(hit, predicted),
        "recall": divide(hit, target),
        "pixels": target,
        "predicted_pixels": predicted,
    }


def pooled_statistics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric over all classes that a (pooled) confusion matrix gives.

    Args:
        confusion: (..., K, K) counts; leading axes are kept, so that a whole bootstrap is one call.

    Returns:
        Arrays (...) in float64. The primary ``accuracy`` (micro), ``dice``, ``miou`` and ``f1``
        (macro), then ``balanced_accuracy`` (macro recall), ``macro_precision``, ``micro_dice``
        (equal to the accuracy where every pixel has one label), ``micro_iou``, and
        ``frequency_weighted_iou`` and ``frequency_weighted_dice`` (weights: target pixels).
    """
    per_class = class_statistics(confusion)
    counts = np.asarray(confusion, np.float64)
    hits = np.trace(counts, axis1=-2, axis2=-1)
    total = counts.sum(axis=(-2, -1))
    dice = mean_of_defined(per_class["dice"])

    def frequency_weighted(values: np.ndarray) -> np.ndarray:
        # A class without target pixels has weight 0: its nan must not spoil the sum.
        return divide((np.nan_to_num(values) * per_class["pixels"]).sum(axis=-1), total)

    return {
        "accuracy": divide(hits, total),
        "dice": dice,
        "miou": mean_of_defined(per_class["iou"]),
        "f1": dice.copy(),
        "balanced_accuracy": mean_of_defined(per_class["recall"]),
        "macro_precision": mean_of_defined(per_class["precision"]),
        "micro_dice": divide(2 * hits, 2 * total),
        "micro_iou": divide(hits, 2 * total - hits),
        "frequency_weighted_iou": frequency_weighted(per_class["iou"]),
        "frequency_weighted_dice": frequency_weighted(per_class["dice"]),
    }


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class of a pooled confusion matrix; ``nan`` where a quotient is 0 / 0."""

    iou: float
    dice: float
    precision: float
    recall: float
    pixels: int  # of the target
    predicted_pixels: int


@dataclass(frozen=True, kw_only=True)
class PixelScores:
    """What one (K, K) confusion matrix says; see ``pooled_statistics`` for the definitions."""

    accuracy: float
    dice: float
    miou: float
    f1: float
    variants: Mapping[str, float]
    per_class: tuple[ClassScores, ...]
    absent: tuple[int, ...]  # class ids in neither target nor prediction, left out of the means
    confusion: tuple[tuple[int, ...], ...]

    @property
    def num_classes(self) -> int:
        return len(self.per_class)

    @property
    def pixels(self) -> int:
        """Pixels counted, that is without don't care."""
        return sum(row.pixels for row in self.per_class)

    def to_dict(self) -> dict:
        """The same with JSON types only; a number that does not exist is ``None``."""
        return json_safe(asdict(self))


def scores(confusion: np.ndarray) -> PixelScores:
    """All pixel metrics of one confusion matrix.

    Args:
        confusion: (K, K) int64 from ``confusion_matrix``, or the sum of several: pooled.

    Raises:
        ValueError: If it is not a square matrix of counts.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or not confusion.size:
        raise ValueError(f"a confusion matrix is square, got shape {confusion.shape}")
    if (confusion < 0).any():
        raise ValueError("a confusion matrix holds counts, and one of these is negative")
    per_class = class_statistics(confusion)
    pooled = {name: float(value) for name, value in pooled_statistics(confusion).items()}
    rows = tuple(
        ClassScores(
            iou=float(per_class["iou"][k]),
            dice=float(per_class["dice"][k]),
            precision=float(per_class["precision"][k]),
            recall=float(per_class["recall"][k]),
            pixels=int(per_class["pixels"][k]),
            predicted_pixels=int(per_class["predicted_pixels"][k]),
        )
        for k in range(len(confusion))
    )
    return PixelScores(
        accuracy=pooled.pop("accuracy"),
        dice=pooled.pop("dice"),
        miou=pooled.pop("miou"),
        f1=pooled.pop("f1"),
        variants=pooled,
        per_class=rows,
        absent=tuple(k for k, row in enumerate(rows) if not row.pixels + row.predicted_pixels),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def image_means(confusions: np.ndarray) -> dict[str, float]:
    """Means over images of each image's own scores: every image weighs the same.

    An image without a counted pixel has no score and is left out. These are the secondary
    numbers: a class that one image holds in ten pixels decides that image's macro Dice.

    Args:
        confusions: (N, K, K) counts, one matrix per image.

    Returns:
        ``accuracy``, ``dice``, ``miou``, ``f1`` and the variants of ``pooled_statistics``.
    """
    confusions = np.asarray(confusions)
    if confusions.ndim != 3:
        raise ValueError(f"need (N, K, K) matrices, got shape {confusions.shape}")
    pooled = pooled_statistics(confusions)
    return {name: float(mean_of_defined(values)) for name, values in pooled.items()}


def class_image_means(confusions: np.ndarray) -> list[dict[str, float]]:
    """Per class, the mean IoU and Dice over the images that hold the class in either map.

    Args:
        confusions: (N, K, K) counts, one matrix per image.

    Returns:
        K dicts with ``iou``, ``dice`` and ``images`` (how many went into the mean).
    """
    per_class = class_statistics(np.asarray(confusions))
    iou = mean_of_defined(per_class["iou"], axis=0)
    dice = mean_of_defined(per_class["dice"], axis=0)
    images = (~np.isnan(per_class["dice"])).sum(axis=0)
    return [
        {"iou": float(iou[k]), "dice": float(dice[k]), "images": int(images[k])}
        for k in range(len(iou))
    ]


def json_safe(value: object) -> Any:
    """Turn numpy scalars and arrays, tuples, and nan or infinity (-> ``None``) into JSON types."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return json_safe(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [json_safe(entry) for entry in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str) else str(value)
