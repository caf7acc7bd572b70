"""Evaluation of a trained head on a split of its store: metrics, intervals, overlays, report.

Pixels are scored on the region grid, where the labels of the store are. Objects, where the data set
counts them, are scored at the source's own size: class probabilities are resized bilinearly to it,
the largest one decides, and connected components of the object class are the predicted objects.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.confusion import PixelScores, confusion_matrix, image_means, scores
from pathsegdiff.evaluation.intervals import Interval, object_intervals, pixel_intervals
from pathsegdiff.evaluation.objects import (
    ImageObjects,
    SplitObjects,
    choose_min_area,
    image_object_scores,
    object_sums,
    objects_from_mask,
    pool_objects,
)
from pathsegdiff.evaluation.overlays import background_class, panel
from pathsegdiff.evaluation.report import (
    ReportContent,
    image_row,
    metrics_json,
    per_image_csv,
    write_report,
)
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.files import replace_file
from pathsegdiff.provenance import provenance
from pathsegdiff.segmentation.losses import predict_labels
from pathsegdiff.segmentation.runs import (
    CURVES_FILE,
    RESULT_FILE,
    Run,
    check_fits,
    random_weights_note,
)
from pathsegdiff.segmentation.sampling import RegionReader
from pathsegdiff.segmentation.splits import source_ids
from pathsegdiff.segmentation.train import device_name, region_logits

METRICS_FILE = "metrics.json"
PER_IMAGE_FILE = "per_image.csv"
REPORT_FILE = "report.html"
OVERLAYS_FOLDER = "overlays"
#: Without validation images there is nothing to choose the smallest object on: keep every one.
_MIN_AREA_UNCHOSEN = 0
#: Intervals from a handful of images mean little, and a reader must know.
_FEW_IMAGES = 10

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``evaluate_run`` found and where it lies.

    Attributes:
        path: The folder.
        part: Its name: a split, or "foldN".
        samples: How many were scored.
        scores: Pooled pixel metrics.
        intervals: Of them.
        interval_unit: What the bootstrap draws: "images", or "source images" of windows.
        objects: Contest metrics, or None where the data set counts no objects.
        min_area_px: Smallest predicted object that was kept.
        notes: What a reader has to know.
    """

    path: Path
    part: str
    samples: int
    scores: PixelScores
    intervals: dict[str, Interval]
    interval_unit: str
    objects: SplitObjects | None
    min_area_px: int | None
    notes: tuple[str, ...]


def evaluate_run(
    run: Run,
    store: FeatureStore,
    *,
    split: str | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a run on a split and write metrics.json, per_image.csv, overlays/ and report.html.

    Args:
        run: Trained head, on its device.
        store: Features of the same recipe as those that it was trained on.
        split: Part of the store; None for the held-out fold of a fold's run, else for the split
            that the manifest names.
        out: Folder to write; None for RUN/eval-SPLIT.
        progress: Called with (done, total, what).

    Raises:
        RunError: If the store does not fit the head, or the split has no complete sample.
        StoreError: If a sample of the store is damaged.
    """
    check_fits(run, store)
    part, samples = evaluated_samples(run, store, split)
    out = run.path / f"eval-{part}" if out is None else out
    scheme = store.card.scheme
    notes = [*random_weights_note(store.model), *_part_notes(run, store, part, samples)]
    min_area = None
    validation: tuple[StoredSample, ...] = ()
    if scheme.objects is not None:
        validation = _by_id(run, store, run.config.samples["val"])
        min_area = _choose_min_area(run, store, validation, len(samples), progress)
        if not validation:
            notes.append("no validation images: every object is kept, however small")

    background = background_class(scheme.names)
    confusions, rows, objects, panels = [], [], [], {}
    for number, (sample, label, labels, probabilities) in enumerate(
        _predictions(run, store, samples)
    ):
        confusion = confusion_matrix(label, labels, scheme.num_classes)
        confusions.append(confusion)
        found = None
        if min_area is not None:
            found = _score_objects(store, sample, probabilities, min_area)
            objects.append(found)
        row = image_row(
            sample.sample_id,
            confusion,
            scheme.names,
            found,
            split=sample.split,
            group=sample.group,
        )
        rows.append(row)
        file = out / OVERLAYS_FOLDER / f"{sample.sample_id}.png"
        picture = panel(
            store.image(sample),
            label,
            labels,
            names=scheme.names,
            colours=scheme.colours,
            background=background,
            title=sample.sample_id,
            caption=_caption(row),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        _save_png(file, picture)
        panels[sample.sample_id] = file
        if progress is not None:
            progress(len(validation) + number + 1, len(validation) + len(samples), part)

    stacked = np.stack(confusions)
    pooled = scores(stacked.sum(axis=0))
    if pooled.absent:
        names = ", ".join(scheme.names[k] for k in pooled.absent)
        notes.append(f"left out of the means, as neither labelled nor predicted: {names}")
    groups, unit = _interval_groups(store, samples)
    intervals = pixel_intervals(stacked, groups=groups)
    split_objects = pool_objects(objects) if objects else None
    limits = object_intervals(object_sums(objects), groups=groups) if objects else {}
    described = _provenance(run, store, part, samples, unit, min_area)
    metrics_json(
        out / METRICS_FILE,
        names=scheme.names,
        confusions=stacked,
        intervals=intervals,
        images=rows,
        objects=split_objects,
        object_intervals=limits,
        notes=notes,
        provenance=described,
    )
    per_image_csv(out / PER_IMAGE_FILE, rows)
    curves = run.path / CURVES_FILE
    write_report(
        out / REPORT_FILE,
        ReportContent(
            title=f"{store.card.title}: {part}",
            subtitle=(
                f"{len(samples)} images, features of {store.model['name']} at "
                f"t = {store.recipe.timestep}, run {run.path.name}"
            ),
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
        scores=pooled,
        intervals=intervals,
        interval_unit=unit,
        objects=split_objects,
        min_area_px=min_area,
        notes=tuple(notes),
    )


def evaluated_samples(
    run: Run, store: FeatureStore, split: str | None
) -> tuple[str, tuple[StoredSample, ...]]:
    """Name of the part and its complete samples.

    Raises:
        RunError: If there are none, or some of a fold's samples are missing.
    """
    held_out = run.config.samples["held_out"]
    if split is None and held_out:
        return f"fold{run.config.settings['fold']}", _by_id(run, store, held_out)
    part = split or store.card.default_eval
    samples = store.samples(part)
    if not samples:
        complete = sorted({sample.split for sample in store.samples()})
        there = ", ".join(complete) if complete else "none"
        raise RunError(
            f"{store.path} has no complete sample of split {part!r} (complete: {there}); "
            "name one with --split, or extract it with `psd extract`"
        )
    return part, samples


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


def _predictions(
    run: Run, store: FeatureStore, samples: Sequence[StoredSample]
) -> Iterator[tuple[StoredSample, np.ndarray, np.ndarray, torch.Tensor]]:
    """(sample, (H, W) target, (H, W) prediction, (K, H, W) probabilities) of each."""
    reader = RegionReader(store, run.config.levels)
    num_classes = run.num_classes
    # In float32 whatever the training computed in: a CPU must reproduce a GPU's metrics.
    logits_of = region_logits(run.head, reader, samples, run.device)
    for sample, (batch, logits) in zip(samples, logits_of, strict=True):
        assert batch.labels is not None
        labels = predict_labels(logits, num_classes)[0].cpu().numpy()
        probabilities = logits[0, :num_classes].softmax(dim=0)
        yield sample, batch.labels[0].numpy(), labels, probabilities


def _object_id(store: FeatureStore) -> int:
    scheme = store.card.scheme
    assert scheme.objects is not None
    return scheme.names.index(scheme.objects)


def _instances(store: FeatureStore, sample: StoredSample) -> np.ndarray:
    instances = store.instances(sample)
    assert instances is not None
    return instances


def _score_objects(
    store: FeatureStore, sample: StoredSample, probabilities: torch.Tensor, min_area: int
) -> ImageObjects:
    target = _instances(store, sample)
    height, width = target.shape
    mask = object_mask(probabilities, (height, width), _object_id(store))
    return image_object_scores(target, objects_from_mask(mask, min_area))


def _choose_min_area(
    run: Run,
    store: FeatureStore,
    samples: Sequence[StoredSample],
    evaluated: int,
    progress: Progress | None,
) -> int:
    """The smallest object to keep, chosen on the run's validation images."""
    if not samples:
        return _MIN_AREA_UNCHOSEN
    masks, targets = [], []
    for number, (sample, _, _, probabilities) in enumerate(_predictions(run, store, samples)):
        target = _instances(store, sample)
        height, width = target.shape
        masks.append(object_mask(probabilities, (height, width), _object_id(store)))
        targets.append(target)
        if progress is not None:
            progress(number + 1, len(samples) + evaluated, "validation: smallest object")
    return choose_min_area(masks, targets)


def _by_id(run: Run, store: FeatureStore, wanted: Sequence[str]) -> tuple[StoredSample, ...]:
    known = {sample.sample_id: sample for sample in store.samples()}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise RunError(
            f"{store.path} lacks {len(missing)} of the samples that {run.path} put aside "
            f"({missing[0]}, ...); finish it with `psd extract`, or name a split with --split"
        )
    return tuple(known[name] for name in wanted)


def _part_notes(
    run: Run, store: FeatureStore, part: str, samples: Sequence[StoredSample]
) -> Iterator[str]:
    """What makes the numbers less than they look."""
    if not (run.path / RESULT_FILE).is_file():
        step = _plain(run.metadata).get("step", 0)
        yield f"the training has not finished: this head is the best so far, of step {step:.0f}"
    for role, verb in (("train", "trained on"), ("val", "chosen on")):
        ids = set(run.config.samples[role])
        shared = sum(sample.sample_id in ids for sample in samples)
        if shared:
            yield f"{shared} of {len(samples)} images of {part} are among those it was {verb}"
    known = {sample.sample_id: sample.group for sample in store.samples()}
    seen = {known[name] for name in run.config.samples["train"] if name in known}
    groups = {sample.group for sample in samples}
    if groups & seen:
        yield (
            f"{len(groups & seen)} of the {len(groups)} groups (patients, cases) of {part} are in "
            "the training part too: a fold by group (--fold) says more about new ones"
        )
    planned = [sample for sample in store.registered() if sample.split == part]
    if len(planned) > len(samples) and not part.startswith("fold"):
        yield f"only {len(samples)} of the {len(planned)} images of {part} are extracted so far"
    if len(samples) < _FEW_IMAGES:
        yield f"{len(samples)} images: the intervals are rough"


def _interval_groups(
    store: FeatureStore, samples: Sequence[StoredSample]
) -> tuple[list[str] | None, str]:
    """What the bootstrap draws: images, or the source images that windows are cut from."""
    if store.card.rule.kind != "window":
        return None, "images"
    sources = source_ids(samples, store.card)
    return (sources, "source images") if len(set(sources)) > 1 else (None, "windows")


def _provenance(
    run: Run,
    store: FeatureStore,
    part: str,
    samples: Sequence[StoredSample],
    unit: str,
    min_area: int | None,
) -> dict[str, Any]:
    return {
        "split": part,
        "images": len(samples),
        "interval_unit": unit,
        "min_area_px": min_area,
        "run": str(run.path),
        "head": {
            "parameters": sum(p.numel() for p in run.head.parameters()),
            "kept": _plain(run.metadata),
        },
        "settings": run.config.settings,
        "features": {
            "path": store.path,
            "fingerprint": store.fingerprint,
            "recipe": store.recipe.to_dict(),
            "made": store.provenance,
        },
        "model": store.model,
        "dataset": {"name": store.card.name, "licence": store.card.licence},
        "trained": run.config.provenance,
        "evaluated": provenance(device=device_name(run.device)),
    }


def _plain(metadata: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            found[name] = json.loads(text)
        except ValueError:  # safetensors' own keys are no numbers
            continue
    return found


def _caption(row: dict[str, object]) -> str:
    parts = [("Dice", row["dice"]), ("mIoU", row["miou"]), ("object F1", row.get("object_f1"))]
    return ", ".join(
        f"{name} {value:.3f}"
        for name, value in parts
        if isinstance(value, float) and not math.isnan(value)
    )


def _save_png(path: Path, picture: np.ndarray) -> None:
    replace_file(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))
