"""The learning rate of a baseline, chosen on the validation part by short trainings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pathsegdiff.data.manifest import Dataset
from pathsegdiff.errors import DivergedError, RunError
from pathsegdiff.pipeline.baselines.baseline import Baseline
from pathsegdiff.pipeline.baselines.runs import BaselineSettings
from pathsegdiff.segmentation.loop import Progress, quality
from pathsegdiff.segmentation.runs import write_json

#: Share of the training that each rate gets.
PILOT_SHARE = 10
#: In the run's folder: validation mIoU of each rate.
PILOTS_FILE = "pilots.json"


def choose_rate(
    dataset: Dataset,
    settings: BaselineSettings,
    rates: Sequence[float],
    out: Path,
    *,
    encoder_weights: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[float, dict[str, float | None]]:
    """Train a tenth of the length with each rate; the best on validation wins, of equals the lower.

    A rate at which the loss diverges is out.

    Each is a run of its own beside ``out`` (OUT-pilot-lrRATE), which is resumed or taken as it is.

    Args:
        settings: Of the whole training; its learning rate is not looked at.
        rates: At least one, above 0.
        out: Run folder of the whole training.
        progress: Called after each step of each.
        log: Called with a line for each.

    Returns:
        The rate, and the validation mIoU of each by its name, None where it diverged.

    Raises:
        RunError: If there is no validation part, a training fails, or all diverge.
    """
    found: dict[float, float] = {}
    for rate in sorted(set(rates)):
        pilot = replace(
            settings,
            learning_rate=rate,
            keep="best",
            steps=None if settings.steps is None else max(1, settings.steps // PILOT_SHARE),
            minutes=None if settings.minutes is None else settings.minutes / PILOT_SHARE,
        )
        made = Baseline(dataset, pilot, encoder_weights=encoder_weights)
        if not made.parts.val:
            raise RunError(
                "--lr with several rates chooses on the validation part, and --val 0 leaves none; "
                "give one rate, or a validation part"
            )
        folder = out.with_name(f"{out.name}-pilot-lr{rate:g}")
        try:
            result = made.train(folder, device=device, progress=progress)
        except DivergedError as error:
            found[rate] = -math.inf
            log(str(error))
            continue
        found[rate] = quality(result.kept)
        log(f"{folder}: {result.steps} steps, validation mIoU {found[rate]:.4f}")
    best = max(found, key=lambda rate: (found[rate], -rate))
    if found[best] == -math.inf:
        raise RunError(f"no rate of {', '.join(map('{:g}'.format, found))} has a validation score")
    return best, {
        f"{rate:g}": miou if math.isfinite(miou) else None for rate, miou in found.items()
    }


def pilot_runs(out: Path) -> list[Path]:
    """Folders of the trainings that chose a run's rate; none where it was given one."""
    return sorted(out.parent.glob(f"{out.name}-pilot-*"))


def write_pilots(out: Path, found: dict[str, float | None]) -> None:
    """Leave the validation mIoU of each rate in the run's folder."""
    write_json(out / PILOTS_FILE, {"validation_miou": found})
