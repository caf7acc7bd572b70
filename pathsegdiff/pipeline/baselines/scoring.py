"""Score a trained baseline, whatever it reads: the report and its provenance."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pathsegdiff.device import device_name
from pathsegdiff.features.store import DatasetCard, StoredSample
from pathsegdiff.pipeline.baselines.runs import BaselineConfig
from pathsegdiff.provenance import provenance
from pathsegdiff.segmentation.runs import CURVES_FILE, kept_row
from pathsegdiff.segmentation.scoring import (
    Evaluation,
    Progress,
    Segmenter,
    few_note,
    score_samples,
    shared_notes,
)


def score_baseline(
    segmenter: Segmenter,
    path: Path,
    config: BaselineConfig,
    metadata: Mapping[str, str],
    *,
    card: DatasetCard,
    part: str,
    evaluated: Sequence[StoredSample],
    samples: Sequence[StoredSample],
    device: torch.device,
    notes: Iterable[str] = (),
    sources: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Write RUN/eval-PART of a baseline, as ``psd eval`` does of a head.

    Args:
        path: Of the run.
        metadata: Of its kept weights.
        part, evaluated: What is scored.
        samples: All that the data set has.
        notes: For readers, before the usual ones.
        sources: What it reads beside the data set, for the provenance.
    """
    known = {sample.sample_id: sample for sample in samples}
    return score_samples(
        segmenter,
        card,
        path / f"eval-{part}",
        part=part,
        samples=evaluated,
        validation=[known[name] for name in config.samples["val"]],
        training=[known[name] for name in config.samples["train"] if name in known],
        subtitle=f"{config.network['title']}, run {path.name}",
        notes=[
            *notes,
            *shared_notes(part, evaluated, config.samples, samples),
            *few_note(evaluated),
        ],
        curves=path / CURVES_FILE,
        provenance={
            "run": str(path),
            "network": {**config.network, "kept": kept_row(metadata)},
            "settings": config.settings,
            "method": config.method,
            **(sources or {}),
            "dataset": {
                "name": card.name,
                "licence": card.licence,
                "sha256": config.dataset_sha256,
                "images": {role: len(ids) for role, ids in config.samples.items()},
            },
            "trained": config.provenance,
            "evaluated": provenance(device=device_name(device)),
        },
        progress=progress,
    )
