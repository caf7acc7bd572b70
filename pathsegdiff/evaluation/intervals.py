"""Bootstrap intervals over images, for any metric that is pooled from per-image sums.

Images are drawn with replacement, their counts added up, the metric taken: one draw. The interval
is the percentile interval of many draws (Efron and Tibshirani 1993, chapter 13). It speaks of the
images, not of the training: another seed of the head is another matter. Where several images come
from one patient, name the groups: whole groups are drawn then, and the interval is honestly wider.

Shapes: N = images, D = draws; S = whatever is summed per image, (K, K) for confusion matrices.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pathsegdiff.evaluation.confusion import class_statistics, json_safe, pooled_statistics
from pathsegdiff.evaluation.objects import object_statistics

#: What is drawn, as people call it.
IMAGES, GROUPS = "images", "groups (patients, cases)"
_FOLD = re.compile(r"fold\d+")

Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]

# Draws whose sums are held at once: 256 x 36 counts are small, 20,000 x 484 would not be.
_DRAWS_AT_ONCE = 256


def draws_groups(part: str) -> bool:
    """Whether whole groups are drawn of a part: of a held-out fold, which speaks of new groups."""
    return _FOLD.fullmatch(part) is not None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and its percentile interval; ``nan`` where it does not exist."""

    value: float
    low: float
    high: float
    level: float
    draws: int  # those in which the number exists, of all that were made

    def to_dict(self) -> dict:
        """JSON types; what is not finite is ``None``."""
        return json_safe(asdict(self))


def bootstrap(
    sums: np.ndarray,
    statistics: Statistics,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of pooled metrics, all from the same draws.

    Args:
        sums: (N, S...) per-image counts.
        statistics: Maps (..., S...) summed counts to named arrays (...), such as
            ``pooled_statistics``.
        groups: One group per image, drawn as a whole; ``None``: every image for itself.
        draws: D.
        level: Share of the draws inside the interval.
        seed: Seed of the draws; the same seed gives the same interval.

    Raises:
        ValueError: If there is no image, or an argument is out of its range.
    """
    units = _units(sums, groups)
    value = statistics(units.sum(axis=0))
    drawn = _resampled([units], [statistics], draws, seed, level)[0]
    return {name: _interval(float(value[name]), drawn[name], level) for name in value}


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    statistics: Statistics,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of ``first - second`` for two runs on the same images.

    Both runs get the same draw of images: what makes an image hard for both cancels out, so that
    the interval is narrower than two separate ones suggest. An interval without 0 is a difference
    at that level.

    Args:
        first, second: (N, S...) per-image counts, image by image in the same order.
        statistics, groups, draws, level, seed: As in ``bootstrap``.

    Raises:
        ValueError: If the shapes differ, or as ``bootstrap``.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(f"the runs have shapes {np.shape(first)} and {np.shape(second)}")
    units = [_units(first, groups), _units(second, groups)]
    values = [statistics(sums.sum(axis=0)) for sums in units]
    drawn = _resampled(units, [statistics, statistics], draws, seed, level)
    out = {}
    for name in values[0]:
        with np.errstate(invalid="ignore"):  # infinity minus infinity: no such number
            value = float(np.subtract(values[0][name], values[1][name]))
            differences = drawn[0][name] - drawn[1][name]
        out[name] = _interval(value, differences, level)
    return out


def _units(sums: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """(U, S...) float64: what is drawn, images or the sums of groups. Counts stay exact."""
    sums = np.asarray(sums, np.float64)
    if sums.ndim < 2 or not len(sums):
        raise ValueError(f"need (N, ...) sums of at least one image, got shape {sums.shape}")
    if groups is None:
        return sums
    if len(groups) != len(sums):
        raise ValueError(f"{len(groups)} groups for {len(sums)} images")
    order = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    units = np.zeros((len(order), *sums.shape[1:]))
    np.add.at(units, [order[group] for group in groups], sums)
    return units


def _resampled(
    runs: Sequence[np.ndarray],
    statistics: Sequence[Statistics],
    draws: int,
    seed: int,
    level: float,
) -> list[dict[str, np.ndarray]]:
    """Per run, name -> (D,) values; every run sees the same draws."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    number = len(runs[0])
    parts: list[list[Mapping[str, np.ndarray]]] = [[] for _ in runs]
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        # How often each unit is drawn says all that a sum needs to know.
        times = rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64)
        for part, units, statistic in zip(parts, runs, statistics, strict=True):
            part.append(statistic(np.tensordot(times, units, axes=1)))
    return [{name: np.concatenate([p[name] for p in part]) for name in part[0]} for part in parts]


def _interval(value: float, drawn: np.ndarray, level: float) -> Interval:
    # A rare class can be missing from a draw: its number does not exist there.
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return Interval(value=value, low=np.nan, high=np.nan, level=level, draws=0)
    # Between a finite draw and an infinite one there is nothing to interpolate.
    ends = [(1 - level) / 2, (1 + level) / 2]
    if np.isfinite(defined).all():
        low, high = np.quantile(defined, ends)
    else:
        low, high = np.quantile(defined, ends, method="inverted_cdf")
    return Interval(value=value, low=float(low), high=float(high), level=level, draws=len(defined))


def pixel_statistics(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """``pooled_statistics``, and the IoU and Dice of class k as ``iou_k`` and ``dice_k``.

    Args:
        confusions: (..., K, K) counts.
    """
    per_class = class_statistics(confusions)
    named = {
        f"{name}_{k}": per_class[name][..., k]
        for name in ("iou", "dice")
        for k in range(np.shape(confusions)[-1])
    }
    return pooled_statistics(confusions) | named


def pixel_intervals(
    confusions: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of every pooled pixel metric, from (N, K, K) per-image confusion matrices.

    Keys: ``accuracy``, ``dice``, ``miou``, ``f1``, the variants, and ``iou_k``, ``dice_k`` of
    each class k.
    """
    return bootstrap(
        confusions, pixel_statistics, groups=groups, draws=draws, level=level, seed=seed
    )


def object_intervals(
    sums: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of the pooled contest metrics, from ``objects.object_sums``.

    Keys: ``object_f1``, ``object_dice``, ``object_hausdorff``.
    """
    return bootstrap(sums, object_statistics, groups=groups, draws=draws, level=level, seed=seed)
