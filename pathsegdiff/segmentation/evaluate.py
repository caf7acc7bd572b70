"""Evaluation of a trained head on a split of its store: metrics, intervals, overlays, report.

Pixels are scored on the region grid, where the labels of the store are; ``scoring`` says the rest.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathsegdiff.config import TOKENS
from pathsegdiff.device import device_name
from pathsegdiff.errors import RunError
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.provenance import provenance
from pathsegdiff.segmentation.losses import predict_labels
from pathsegdiff.segmentation.runs import (
    CURVES_FILE,
    RESULT_FILE,
    Run,
    check_fits,
    kept_row,
    random_weights_note,
)
from pathsegdiff.segmentation.sampling import RegionReader
from pathsegdiff.segmentation.scoring import (
    REPORT_FILE,
    Evaluation,
    Prediction,
    Progress,
    few_note,
    partial_note,
    score_samples,
    shared_notes,
)
from pathsegdiff.segmentation.train import region_logits

__all__ = ["REPORT_FILE", "Evaluation", "evaluate_run", "evaluated_samples"]


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
    validation: tuple[StoredSample, ...] = ()
    if store.card.scheme.objects is not None:
        validation = _by_id(run, store, run.config.samples["val"])
    trained_on = set(run.config.samples["train"])
    return score_samples(
        _HeadSegmenter(run, store),
        store.card,
        run.path / f"eval-{part}" if out is None else out,
        part=part,
        samples=samples,
        validation=validation,
        training=[sample for sample in store.samples() if sample.sample_id in trained_on],
        subtitle=f"{_inputs(run, store)}, run {run.path.name}",
        notes=[*random_weights_note(store.model), *_part_notes(run, store, part, samples)],
        curves=run.path / CURVES_FILE,
        provenance=_provenance(run, store),
        progress=progress,
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


class _HeadSegmenter:
    """A head that reads a store."""

    def __init__(self, run: Run, store: FeatureStore) -> None:
        self.run, self.store = run, store

    def predictions(self, samples: Sequence[StoredSample]) -> Iterator[Prediction]:
        reader = RegionReader(self.store, self.run.config.levels)
        num_classes = self.run.num_classes
        # In float32 whatever the training computed in: a CPU must reproduce a GPU's metrics.
        logits_of = region_logits(self.run.head, reader, samples, self.run.device)
        for sample, (batch, logits) in zip(samples, logits_of, strict=True):
            assert batch.labels is not None
            yield Prediction(
                sample=sample,
                target=batch.labels[0].numpy(),
                labels=predict_labels(logits, num_classes)[0].cpu().numpy(),
                probabilities=logits[0, :num_classes].softmax(dim=0),
            )

    def image(self, sample: StoredSample) -> np.ndarray:
        return self.store.image(sample)

    def instances(self, sample: StoredSample) -> np.ndarray:
        instances = self.store.instances(sample)
        assert instances is not None
        return instances


def _inputs(run: Run, store: FeatureStore) -> str:
    """What the head reads, for people."""
    name, recipe = store.model["name"], store.recipe
    read = {tap for level in run.config.levels for tap, _ in level.taps}
    if read == {TOKENS}:
        return f"the encoder's tokens of {name} alone"
    null = ", null-conditioned" if recipe.conditioning == "none" else ""
    tokens = ", with the encoder's tokens" if TOKENS in read else ""
    return f"features of {name} at t = {recipe.timestep}{null}{tokens}"


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
        step = kept_row(run.metadata).get("step", 0)
        yield f"the training has not finished: this head is the one kept so far, of step {step:.0f}"
    yield from shared_notes(part, samples, run.config.samples, store.samples())
    yield from partial_note(part, samples, store.registered())
    yield from few_note(samples)


def _provenance(run: Run, store: FeatureStore) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "head": {
            "parameters": sum(p.numel() for p in run.head.parameters()),
            "kept": kept_row(run.metadata),
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
