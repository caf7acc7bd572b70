"""Which samples train, validate or are held out; no group is in two of these parts.

The rule sees ids, groups and the seed, never features, so that a head and a network that is trained
on the images themselves get the same parts of one data set.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pathsegdiff.errors import RunError
from pathsegdiff.features.store import DatasetCard, FeatureStore, StoredSample

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The samples of a training.

    Attributes:
        train: Their pixels make the gradient.
        val: Watched through the training; under --keep best they choose the head. May be empty.
        held_out: The test part of a fold; empty without folds.
    """

    train: tuple[StoredSample, ...]
    val: tuple[StoredSample, ...]
    held_out: tuple[StoredSample, ...] = ()

    def to_dict(self) -> dict[str, list[str]]:
        """Sample ids of each part."""
        return {
            "train": [sample.sample_id for sample in self.train],
            "val": [sample.sample_id for sample in self.val],
            "held_out": [sample.sample_id for sample in self.held_out],
        }


def choose_parts(
    store: FeatureStore,
    *,
    split: str | None,
    val: str,
    fold: int | None,
    seed: int,
    limit: int | None = None,
) -> Parts:
    """Divide a store's complete samples; see ``divide``."""
    return divide(
        store.samples(),
        store.card,
        store.path,
        split=split,
        val=val,
        fold=fold,
        seed=seed,
        limit=limit,
    )


def divide(
    samples: Sequence[StoredSample],
    card: DatasetCard,
    place: str,
    *,
    split: str | None,
    val: str,
    fold: int | None,
    seed: int,
    limit: int | None = None,
) -> Parts:
    """Divide samples into parts.

    Args:
        samples: Those that can be read.
        card: Their data set.
        place: Where they are, for messages.
        split: To train on; None for the manifest's training split, or for all splits with a fold.
        val: A fraction of the training groups in [0, 1), or a split.
        fold: Its samples are held out and the others train; by the manifest's fold column.
        seed: Which groups validate, and which images a limit leaves.
        limit: Train on so many images only, or None; the validation part is the same with any.

    Raises:
        RunError: If a part would be empty, or a name is unknown.
    """
    pool = _Pool(tuple(samples), card, place)
    held_out: tuple[StoredSample, ...] = ()
    if fold is None:
        candidates = pool.of_split(split or card.default_train)
    else:
        candidates, held_out = _of_fold(pool, split, fold)
    fraction = parse_fraction(val)
    if fraction is None:
        if fold is not None:
            raise RunError(f"--val {val} cannot go with --fold; give a fraction such as --val 0.2")
        if val == (split or card.default_train):
            raise RunError(f"--val {val} is the split that trains; name another, or a fraction")
        validation = _named_validation(pool, candidates, val)
        return Parts(train=limited(candidates, card, limit, seed), val=validation)
    val_groups = validation_groups([s.group for s in candidates], fraction, seed)
    train = tuple(sample for sample in candidates if sample.group not in val_groups)
    return Parts(
        train=limited(train, card, limit, seed),
        val=tuple(sample for sample in candidates if sample.group in val_groups),
        held_out=held_out,
    )


def warn_if_partial(
    parts: Parts, place: str, known: Sequence[StoredSample], registered: Sequence[StoredSample]
) -> None:
    """Say in the log that a training begins on splits of which not all is extracted.

    Args:
        parts: Of the training.
        place: Where they are, for the message.
        known: The samples that can be read.
        registered: Those that the store is meant to hold.
    """
    splits = {sample.split for part in (parts.train, parts.val, parts.held_out) for sample in part}
    there, planned = (sum(s.split in splits for s in samples) for samples in (known, registered))
    if there < planned:
        _logger.warning(
            "%s: only %d of the %d samples of %s are extracted so far, and the others are neither "
            "trained on nor scored; finish it with `psd extract`",
            place,
            there,
            planned,
            ", ".join(sorted(splits)),
        )


def limited(
    samples: Sequence[StoredSample], card: DatasetCard, limit: int | None, seed: int
) -> tuple[StoredSample, ...]:
    """The samples of the first ``limit`` images in an order by a hash of (seed, image).

    The images of a small limit are among those of a larger one. Of an image that was cut into
    windows all stay.
    """
    images = source_ids(samples, card)
    distinct = sorted(
        set(images), key=lambda name: hashlib.sha256(f"image:{seed}:{name}".encode()).digest()
    )
    if limit is None:
        return tuple(samples)
    if limit > len(distinct):
        _logger.warning(
            "--limit-images %d: the training part has %d images, and all of them train",
            limit,
            len(distinct),
        )
    kept = set(distinct[:limit])
    return tuple(sample for sample, image in zip(samples, images, strict=True) if image in kept)


def source_ids(samples: Sequence[StoredSample], card: DatasetCard) -> list[str]:
    """Which image each sample was made from; without windows its own id."""
    ids = [sample.sample_id for sample in samples]
    if card.rule.kind != "window":
        return ids
    return [source_of_window(name) for name in ids]


def source_of_window(sample_id: str) -> str:
    """A window's id is its source's and its place, SOURCE_rROWcCOLUMN."""
    return re.sub(r"_r\d+c\d+$", "", sample_id)


def parse_fraction(val: str) -> float | None:
    """The number in ``--val``, or None where it names a split.

    Raises:
        RunError: If it is a number outside [0, 1).
    """
    try:
        fraction = float(val)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise RunError(f"--val must be a fraction from 0 to below 1, or a split, got {val}")
    return fraction


def validation_groups(groups: Sequence[str], fraction: float, seed: int) -> set[str]:
    """A fraction of the groups, at least one, by a hash of (seed, group).

    A group's place depends on its own name only, so that a sample more or less moves few others.

    Raises:
        RunError: If nothing would be left to train on.
    """
    if fraction == 0:
        return set()
    distinct = sorted(
        set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()
    )
    if len(distinct) < 2:
        raise RunError(
            f"all {len(groups)} training samples belong to one group ({distinct[0]!r}), so none "
            "can be put aside for validation; name a split with --val SPLIT, or use --val 0"
        )
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return set(distinct[:count])


@dataclass(frozen=True)
class _Pool:
    """What is divided, and its name in messages."""

    samples: tuple[StoredSample, ...]
    card: DatasetCard
    place: str

    def of_split(self, split: str) -> tuple[StoredSample, ...]:
        found = tuple(sample for sample in self.samples if sample.split == split)
        if not found:
            raise RunError(
                f"{self.place} has no complete sample of split {split!r}; {self._splits()}"
            )
        return found

    def _splits(self) -> str:
        found = sorted({sample.split for sample in self.samples})
        if not found:
            return "it has no complete sample at all; run `psd extract` again to finish it"
        return f"complete are samples of {', '.join(found)}"


def _of_fold(
    pool: _Pool, split: str | None, fold: int
) -> tuple[tuple[StoredSample, ...], tuple[StoredSample, ...]]:
    samples = pool.samples if split is None else pool.of_split(split)
    columns = sorted({key for sample in samples for key in sample.extra if key.endswith("fold")})
    if len(columns) != 1:
        found = f"it has {', '.join(columns)}" if columns else "it has none"
        raise RunError(
            f"--fold needs one column whose name ends in 'fold' in the manifest of "
            f"{pool.card.name}; {found}"
        )
    column = columns[0]
    values = sorted({sample.extra.get(column, "") for sample in samples} - {""})
    if str(fold) not in values:
        raise RunError(f"--fold {fold}: {pool.place} has the folds {', '.join(values)}")
    in_fold = {sample.sample_id for sample in samples if sample.extra.get(column) == str(fold)}
    held_out = tuple(sample for sample in samples if sample.sample_id in in_fold)
    # A sample without a fold belongs to none, and is not trained on either.
    others = tuple(
        sample for sample in samples if sample.extra.get(column) and sample.sample_id not in in_fold
    )
    if not others:
        raise RunError(f"--fold {fold}: no sample of {pool.place} is left to train on")
    shared = {sample.group for sample in held_out} & {sample.group for sample in others}
    if shared:
        raise RunError(
            f"--fold {fold}: group {min(shared)!r} is in several folds of {pool.card.name}; "
            f"mend the manifest's column {column}"
        )
    return others, held_out


def _named_validation(
    pool: _Pool, train: Sequence[StoredSample], split: str
) -> tuple[StoredSample, ...]:
    samples = pool.of_split(split)
    shared = {sample.group for sample in samples} & {sample.group for sample in train}
    if shared:
        # The official splits of some data sets share patients; the user named this one.
        _logger.warning(
            "validation split %s shares %d groups with the training part (%s, ...)",
            split,
            len(shared),
            min(shared),
        )
    return samples
