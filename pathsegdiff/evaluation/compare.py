"""Two evaluations on the same images: what differs, and how sure that is.

The intervals are of the difference, both runs with the same draw of images (``paired_difference``):
what makes an image hard for both cancels out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.confusion import class_statistics, pooled_statistics
from pathsegdiff.evaluation.intervals import (
    GROUPS,
    IMAGES,
    Interval,
    Statistics,
    draws_groups,
    paired_difference,
)

METRICS_FILE = "metrics.json"
#: What is compared, as people call it.
TITLES = {"accuracy": "accuracy", "dice": "Dice", "miou": "mIoU", "f1": "F1"}
PRIMARY = tuple(TITLES)
#: The mean IoU of the classes that were asked for.
CLASSES = "classes"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An evaluation as ``psd eval`` and ``psd baseline`` leave it.

    Attributes:
        path: Of the file.
        part: What was scored.
        names: Of the K classes.
        sample_ids: N images.
        units: What a bootstrap draws, one name per image: itself, the source of a window, the
            group of an image of a held-out fold.
        unit: What they are, for people.
        confusions: (N, K, K) counts.
        miou: (N,) of each image; NaN where it has none.
    """

    path: Path
    part: str
    names: tuple[str, ...]
    sample_ids: tuple[str, ...]
    units: tuple[str, ...]
    unit: str
    confusions: np.ndarray
    miou: np.ndarray

    @property
    def groups(self) -> tuple[str, ...] | None:
        """``units`` for a bootstrap; None, for every image by itself, where there is only one."""
        return self.units if len(set(self.units)) > 1 else None

    @property
    def drawn(self) -> str:
        """What such a bootstrap draws, for people."""
        return IMAGES if self.groups is None else self.unit


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first less the second.

    Attributes:
        differences: Of accuracy, Dice, mIoU and F1, pooled.
        class_iou: Of each class.
        values, class_values: (first, second) of each of them.
        images: (sample, difference of its mIoU), the first's best image first.
    """

    differences: dict[str, Interval]
    class_iou: dict[str, Interval]
    values: dict[str, tuple[float, float]]
    class_values: dict[str, tuple[float, float]]
    images: tuple[tuple[str, float], ...]


def read_scored(path: Path, part: str | None = None) -> Scored:
    """Read an evaluation.

    Args:
        path: A run, its eval folder, or the metrics.json in it.
        part: What was scored, where a run has several evaluations.

    Raises:
        RunError: If there is none, there are several, or it is damaged or of an older version.
    """
    file = _file_of(path, part)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        images: list[Mapping[str, Any]] = found["images"]
        if any("confusion" not in image for image in images):
            raise RunError(f"{file} is of an older version; score the run again (`psd eval`)")
        names = tuple(str(name) for name in found["confusion"]["names"])
        confusions = np.array([image["confusion"] for image in images], np.int64)
        if not images or confusions.shape != (len(images), len(names), len(names)):
            raise ValueError(f"confusion matrices of shape {confusions.shape}")
        part = str(found["provenance"]["split"])
        unit = str(found["provenance"].get("interval_unit", IMAGES))
        if draws_groups(part):
            unit = GROUPS
            units = [image.get("group", image["sample_id"]) for image in images]
        else:
            units = [image.get("unit", image["sample_id"]) for image in images]
        return Scored(
            path=file,
            part=part,
            names=names,
            sample_ids=tuple(str(image["sample_id"]) for image in images),
            units=tuple(map(str, units)),
            unit=unit,
            confusions=confusions,
            miou=np.array([image["miou"] for image in images], np.float64),
        )
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{file} is damaged ({reason:.200}); score the run again") from None


def join(scored: Sequence[Scored]) -> Scored:
    """Evaluations of different images, such as those of several folds, as one.

    Args:
        scored: At least one; its path stands for all.

    Raises:
        RunError: If their classes differ, or an image is in two of them.
    """
    first = scored[0]
    for other in scored[1:]:
        if other.names != first.names:
            raise RunError(f"the classes of {first.path} and {other.path} differ")
    sample_ids = tuple(sample for one in scored for sample in one.sample_ids)
    if len(set(sample_ids)) < len(sample_ids):
        raise RunError(f"{first.path} and another evaluation have an image in common")
    return Scored(
        path=first.path,
        part="+".join(one.part for one in scored),
        names=first.names,
        sample_ids=sample_ids,
        units=tuple(unit for one in scored for unit in one.units),
        unit=first.unit,
        confusions=np.concatenate([one.confusions for one in scored]),
        miou=np.concatenate([one.miou for one in scored]),
    )


def sum_runs(scored: Sequence[Scored]) -> Scored:
    """Evaluations of the same images by several runs, such as those of several seeds, as one.

    Counts of an image are summed and its mIoU averaged, so that figures and intervals are those of
    the runs together; how far apart the runs are, they do not say.

    Args:
        scored: At least one; its path and the order of its images stand for all.

    Raises:
        RunError: If images, classes or labels differ.
    """
    first = scored[0]
    confusions, miou = [first.confusions], [first.miou]
    for other in scored[1:]:
        order = _places(first, other)
        confusions.append(other.confusions[order])
        miou.append(other.miou[order])
    return replace(first, confusions=np.sum(confusions, axis=0), miou=np.mean(miou, axis=0))


def mean_over(names: Sequence[str], classes: Sequence[str]) -> Statistics:
    """``CLASSES``: the mean IoU of some classes, from (..., K, K) counts with these names."""
    places = [list(names).index(name) for name in classes]

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {CLASSES: class_statistics(sums)["iou"][..., places].mean(axis=-1)}

    return statistics


def compare(
    first: Scored,
    second: Scored,
    *,
    classes: Sequence[str] = (),
    draws: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Hold two evaluations against each other.

    Args:
        classes: Whose mean IoU is compared as well, as ``CLASSES``; none for not.
        draws, seed: Of the bootstrap.

    Raises:
        RunError: If they are not of the same images and classes.
    """
    order = _places(first, second)
    theirs = second.confusions[order]

    def class_iou(sums: np.ndarray) -> dict[str, np.ndarray]:
        iou = class_statistics(sums)["iou"]
        return {name: iou[..., k] for k, name in enumerate(first.names)}

    def pooled(sums: np.ndarray) -> dict[str, np.ndarray]:
        found = pooled_statistics(sums)
        more = mean_over(first.names, classes)(sums) if classes else {}
        return {**{name: found[name] for name in PRIMARY}, **more}

    def both(statistics: Statistics) -> dict[str, tuple[float, float]]:
        one, other = (statistics(sums.sum(axis=0)) for sums in (first.confusions, theirs))
        return {name: (float(one[name]), float(other[name])) for name in one}

    settings: dict[str, Any] = {"groups": first.groups, "draws": draws, "seed": seed}
    by_image = first.miou - second.miou[order]
    ranked = sorted(
        (pair for pair in zip(first.sample_ids, by_image.tolist(), strict=True)
         if np.isfinite(pair[1])),
        key=lambda pair: -pair[1],
    )  # fmt: skip
    return Comparison(
        differences=paired_difference(first.confusions, theirs, pooled, **settings),
        class_iou=paired_difference(first.confusions, theirs, class_iou, **settings),
        values=both(pooled),
        class_values=both(class_iou),
        images=tuple(ranked),
    )


def _places(first: Scored, second: Scored) -> list[int]:
    """Where the second has the images of the first.

    Raises:
        RunError: If they are not of the same images, classes and labels.
    """
    if first.names != second.names:
        raise RunError(
            f"the classes differ: {', '.join(first.names)} in {first.path}, "
            f"{', '.join(second.names)} in {second.path}"
        )
    places = {sample: place for place, sample in enumerate(second.sample_ids)}
    odd = sorted(set(first.sample_ids) ^ set(second.sample_ids))
    if odd:
        raise RunError(
            f"{first.path} and {second.path} are not of the same images: {odd[0]} is in one of "
            f"them only ({len(odd)} are)"
        )
    order = [places[sample] for sample in first.sample_ids]
    labels = second.confusions[order].sum(axis=2)
    if not np.array_equal(first.confusions.sum(axis=2), labels):
        raise RunError(f"{first.path} and {second.path} were scored against different labels")
    return order


def _file_of(path: Path, part: str | None) -> Path:
    if path.is_file():
        return path
    if (path / METRICS_FILE).is_file():
        return path / METRICS_FILE
    pattern = f"eval-{part}" if part is not None else "eval-*"
    found = sorted(path.glob(f"{pattern}/{METRICS_FILE}"))
    if not found:
        what = "" if part is None else f" of {part}"
        raise RunError(f"{path} has no evaluation{what}; make one with `psd eval --run {path}`")
    if len(found) > 1:
        parts = ", ".join(file.parent.name.removeprefix("eval-") for file in found)
        raise RunError(f"{path} has several evaluations ({parts}); choose one with --split")
    return found[0]
