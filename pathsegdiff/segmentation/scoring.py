"""Scores of predictions from any source, and the files that say them.

Pixels are scored on the region grid. Objects, where the data set counts them, are scored at the
source's own size: class probabilities are resized bilinearly to it, the largest one decides, and
connected components of the object class are the predicted objects.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from pathsegdiff.evaluation.compare import METRICS_FILE
from pathsegdiff.evaluation.confusion import PixelScores, confusion_matrix, image_means, scores
from pathsegdiff.evaluation.intervals import (
    GROUPS,
    IMAGES,
    Interval,
    draws_groups,
    object_intervals,
    pixel_intervals,
)
from pathsegdiff.evaluation.objects import (
    ImageObjects,
    SplitObjects,
    choose_objects,
    grow_objects,
    image_object_scores,
    object_sums,
    objects_from_mask,
    pool_objects,
)
from pathsegdiff.evaluation.overlays import background_class, panel
from pathsegdiff.evaluation.pictures import save_mask, save_picture
from pathsegdiff.evaluation.report import (
    ReportContent,
    image_row,
    metrics_json,
    per_image_csv,
    write_report,
)
from pathsegdiff.features.store import DatasetCard, StoredSample
from pathsegdiff.segmentation.splits import source_ids

PER_IMAGE_FILE = "per_image.csv"
REPORT_FILE = "report.html"
OVERLAYS_FOLDER = "overlays"
PREDICTIONS_FOLDER = "predictions"
#: Where there is nothing to choose the smallest object on, every one is kept.
_MIN_AREA_UNCHOSEN = 0
#: Without validation images it is chosen on so many of the training images, evenly spaced.
_TRAINING_LOOKED_AT = 20
#: A pixel of this probability or more is a contour: the first is Chen et al.'s (2016). Their loss
#: does not weigh contours up as ours does (every row's loss is weighted by class), so that a
#: probability of 0.5 comes too easily; which one parts objects best is chosen as the area is.
_CONTOUR_FROM = (0.5, 0.7, 0.8, 0.9)
#: Intervals from a handful of images mean little, and a reader must know.
_FEW_IMAGES = 10

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found and where it lies.

    Attributes:
        path: The folder.
        part: Its name: a split, or "foldN".
        samples, sample_unit: How many were scored, of what: "images" or "windows".
        scores: Pooled pixel metrics.
        intervals: Of them.
        interval_unit: What the bootstrap draws: "images", "source images" of windows, or, of a
            held-out fold, groups.
        objects: Contest metrics, or None where the data set counts no objects.
        min_area_px: Smallest predicted object that was kept.
        notes: What a reader has to know.
    """

    path: Path
    part: str
    samples: int
    sample_unit: str
    scores: PixelScores
    intervals: dict[str, Interval]
    interval_unit: str
    objects: SplitObjects | None
    min_area_px: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One region, segmented.

    Attributes:
        sample: Which one.
        target: (H, W) uint8 class ids; an id of K or more is not counted.
        labels: (H, W) uint8 predicted class ids, never don't care.
        probabilities: (K, H, W) float32.
        contours: (H, W) float32 probability that a pixel is on an object's contour: it parts
            objects that touch. None where the network has none.
    """

    sample: StoredSample
    target: np.ndarray
    labels: np.ndarray
    probabilities: torch.Tensor
    contours: torch.Tensor | None = None


class Segmenter(Protocol):
    """Where predictions come from: a head and its store, or a network and its images."""

    def predictions(self, samples: Sequence[StoredSample]) -> Iterator[Prediction]:
        """Segment regions, in their order."""

    def image(self, sample: StoredSample) -> np.ndarray:
        """(H, W, 3) uint8 RGB region; asked for right after its prediction."""

    def instances(self, sample: StoredSample) -> np.ndarray:
        """(H0, W0) integer objects at the source's own size; asked for as ``image`` is."""


def score_samples(
    segmenter: Segmenter,
    card: DatasetCard,
    out: Path,
    *,
    part: str,
    samples: Sequence[StoredSample],
    validation: Sequence[StoredSample],
    training: Sequence[StoredSample],
    subtitle: str,
    notes: Sequence[str],
    curves: Path,
    provenance: Mapping[str, Any],
    progress: Progress | None = None,
) -> Evaluation:
    """Score a part; write metrics.json, per_image.csv, predictions/, overlays/ and report.html.

    Args:
        segmenter: Predicts.
        card: The data set.
        out: Folder to write.
        part: Name of what is scored.
        samples: Of it, at least one.
        validation: The smallest predicted object that is kept is chosen on these, and from which
            probability a contour is one; only where the data set counts objects.
        training: Where there are none: on some of these, which the head has seen. May be empty.
        subtitle: Of the report, behind the number of images.
        notes: What a reader has to know; what is found here is added.
        curves: PNG of the training curves, if it is there.
        provenance: Further entries of metrics.json's.
        progress: Called with (done, total, what).
    """
    scheme = card.scheme
    notes = list(notes)
    rule: _ObjectRule | None = None
    chosen_on: Sequence[StoredSample] = ()
    if scheme.objects is not None:
        chosen_on = validation or _spread(training, _TRAINING_LOOKED_AT)
        where = "validation" if validation else "training"
        rule = _choose_objects(segmenter, card, chosen_on, where, len(samples), progress)
        if not chosen_on:
            notes.append("no validation images: every object is kept, however small")
        elif not validation:
            notes.append(
                "no validation images: the smallest object that is kept was chosen on "
                f"{len(chosen_on)} training images"
            )

    background = background_class(scheme.names)
    predictions = out / PREDICTIONS_FOLDER
    predictions.mkdir(parents=True, exist_ok=True)
    confusions, rows, objects, panels = [], [], [], {}
    has_contours = False
    for number, found in enumerate(segmenter.predictions(samples)):
        sample = found.sample
        confusion = confusion_matrix(found.target, found.labels, scheme.num_classes)
        confusions.append(confusion)
        scored = None
        if rule is not None:
            has_contours = found.contours is not None
            scored = _score_objects(segmenter, card, found, rule)
            objects.append(scored)
        row = image_row(
            sample.sample_id,
            confusion,
            scheme.names,
            scored,
            split=sample.split,
            group=sample.group,
        )
        rows.append(row)
        file = out / OVERLAYS_FOLDER / f"{sample.sample_id}.png"
        picture = panel(
            segmenter.image(sample),
            found.target,
            found.labels,
            names=scheme.names,
            colours=scheme.colours,
            background=background,
            title=sample.sample_id,
            caption=_caption(row),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        save_picture(file, picture)
        save_mask(predictions / file.name, found.labels, scheme.colours)
        panels[sample.sample_id] = file
        if progress is not None:
            progress(len(chosen_on) + number + 1, len(chosen_on) + len(samples), part)

    stacked = np.stack(confusions)
    pooled = scores(stacked.sum(axis=0))
    if pooled.absent:
        names = ", ".join(scheme.names[k] for k in pooled.absent)
        notes.append(f"left out of the means, as neither labelled nor predicted: {names}")
    groups, unit = _interval_groups(card, samples, part)
    intervals = pixel_intervals(stacked, groups=groups)
    split_objects = pool_objects(objects) if objects else None
    limits = object_intervals(object_sums(objects), groups=groups) if objects else {}
    described = {
        "split": part,
        "images": len(samples),
        "interval_unit": unit,
        "min_area_px": None if rule is None else rule.min_area_px,
        **({"contour_from": rule.contour_from} if rule is not None and has_contours else {}),
        **provenance,
    }
    metrics_json(
        out / METRICS_FILE,
        names=scheme.names,
        confusions=stacked,
        intervals=intervals,
        images=rows,
        units=groups,
        objects=split_objects,
        object_intervals=limits,
        notes=notes,
        provenance=described,
    )
    per_image_csv(out / PER_IMAGE_FILE, rows)
    write_report(
        out / REPORT_FILE,
        ReportContent(
            title=f"{card.title}: {part}",
            subtitle=f"{len(samples)} {_sample_unit(card)}, {subtitle}",
            names=scheme.names,
            colours=scheme.colours,
            scores=pooled,
            notes=notes,
            intervals=intervals,
            interval_unit=unit,
            objects=split_objects,
            object_intervals=limits,
            image_means=image_means(stacked),
            images=rows,
            panels=panels,
            curves=curves if curves.is_file() else None,
            provenance=described,
        ),
    )
    return Evaluation(
        path=out,
        part=part,
        samples=len(samples),
        sample_unit=_sample_unit(card),
        scores=pooled,
        intervals=intervals,
        interval_unit=unit,
        objects=split_objects,
        min_area_px=None if rule is None else rule.min_area_px,
        notes=tuple(notes),
    )


def object_mask(probabilities: torch.Tensor, size: tuple[int, int], object_id: int) -> np.ndarray:
    """Where the object class has the largest probability at the source's own size.

    Args:
        probabilities: (K, H, W) of the region.
        size: (H0, W0) of the source.
        object_id: Class of the objects.

    Returns:
        (H0, W0) bool.
    """
    resized = F.interpolate(probabilities[None], size=size, mode="bilinear", align_corners=False)
    return (resized[0].argmax(dim=0) == object_id).cpu().numpy()


def shared_notes(
    part: str,
    samples: Sequence[StoredSample],
    roles: Mapping[str, Sequence[str]],
    known: Sequence[StoredSample],
) -> Iterator[str]:
    """What scored samples have to do with the training, where it makes numbers look better.

    Args:
        part: Name of what is scored.
        samples: Of it.
        roles: Sample ids of "train" and "val".
        known: Samples whose groups are known, those of the training among them.
    """
    for role, verb in (("train", "trained on"), ("val", "chosen on")):
        ids = set(roles[role])
        shared = sum(sample.sample_id in ids for sample in samples)
        if shared:
            yield f"{shared} of {len(samples)} images of {part} are among those it was {verb}"
    group_of = {sample.sample_id: sample.group for sample in known}
    seen = {group_of[name] for name in roles["train"] if name in group_of}
    groups = {sample.group for sample in samples}
    if groups & seen:
        yield (
            f"{len(groups & seen)} of the {len(groups)} groups (patients, cases) of {part} are in "
            "the training part too: a fold by group (--fold) says more about new ones"
        )


def partial_note(
    part: str, samples: Sequence[StoredSample], registered: Sequence[StoredSample]
) -> Iterator[str]:
    """A note where a split is scored of which not all is extracted.

    Args:
        part, samples: What is scored; a fold is of what there was when it was put aside.
        registered: The samples that the store is meant to hold.
    """
    planned = sum(sample.split == part for sample in registered)
    if planned > len(samples) and not draws_groups(part):
        yield f"only {len(samples)} of the {planned} images of {part} are extracted so far"


def few_note(samples: Sequence[StoredSample]) -> Iterator[str]:
    """A note where intervals mean little."""
    if len(samples) < _FEW_IMAGES:
        yield f"{len(samples)} images: the intervals are rough"


def _object_id(card: DatasetCard) -> int:
    assert card.scheme.objects is not None
    return card.scheme.names.index(card.scheme.objects)


@dataclass(frozen=True, kw_only=True)
class _ObjectRule:
    """What turns a prediction into objects.

    Attributes:
        min_area_px: Of the smallest that is kept.
        contour_from: Probability of a contour's pixels; None where none are predicted.
    """

    min_area_px: int
    contour_from: float | None = None


def _object_masks(
    card: DatasetCard, found: Prediction, size: tuple[int, int], contours_from: Sequence[float]
) -> list[np.ndarray]:
    """Where objects are, less their contours from each probability; one mask without contours."""
    mask = object_mask(found.probabilities, size, _object_id(card))
    if found.contours is None:
        return [mask]
    edges = F.interpolate(
        found.contours[None, None], size=size, mode="bilinear", align_corners=False
    )
    return [mask & (edges[0, 0] < least).cpu().numpy() for least in contours_from]


def _score_objects(
    segmenter: Segmenter, card: DatasetCard, found: Prediction, rule: _ObjectRule
) -> ImageObjects:
    target = segmenter.instances(found.sample)
    height, width = target.shape
    contours_from = () if rule.contour_from is None else (rule.contour_from,)
    (mask,) = _object_masks(card, found, (height, width), contours_from)
    objects = objects_from_mask(mask, rule.min_area_px)
    return image_object_scores(target, objects if found.contours is None else grow_objects(objects))


def _spread(samples: Sequence[StoredSample], count: int) -> list[StoredSample]:
    """At most ``count`` of the samples, evenly spaced."""
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _choose_objects(
    segmenter: Segmenter,
    card: DatasetCard,
    samples: Sequence[StoredSample],
    part: str,
    evaluated: int,
    progress: Progress | None,
) -> _ObjectRule:
    """The smallest object to keep and the contour, chosen on a part that is not scored."""
    if not samples:
        return _ObjectRule(min_area_px=_MIN_AREA_UNCHOSEN, contour_from=_CONTOUR_FROM[0])
    predictions = iter(segmenter.predictions(samples))
    first = next(predictions)

    def images() -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        for number, found in enumerate(chain([first], predictions)):
            target = segmenter.instances(found.sample)
            height, width = target.shape
            yield _object_masks(card, found, (height, width), _CONTOUR_FROM), target
            if progress is not None:
                progress(number + 1, len(samples) + evaluated, f"{part}: smallest object")

    has_contours = first.contours is not None
    way, area = choose_objects(images(), grown=has_contours)
    return _ObjectRule(min_area_px=area, contour_from=_CONTOUR_FROM[way] if has_contours else None)


def _interval_groups(
    card: DatasetCard, samples: Sequence[StoredSample], part: str
) -> tuple[list[str] | None, str]:
    """What the bootstrap draws: images, the source images of windows, a held-out fold's groups."""
    held_out = [sample.group for sample in samples] if draws_groups(part) else []
    if len(set(held_out)) > 1:
        return held_out, GROUPS
    if card.rule.kind != "window":
        return None, IMAGES
    sources = source_ids(samples, card)
    return (sources, "source images") if len(set(sources)) > 1 else (None, _sample_unit(card))


def _sample_unit(card: DatasetCard) -> str:
    """What one sample is."""
    return "windows" if card.rule.kind == "window" else IMAGES


def _caption(row: dict[str, object]) -> str:
    parts = [("Dice", row["dice"]), ("mIoU", row["miou"]), ("object F1", row.get("object_f1"))]
    return ", ".join(
        f"{name} {value:.3f}"
        for name, value in parts
        if isinstance(value, float) and not math.isnan(value)
    )
