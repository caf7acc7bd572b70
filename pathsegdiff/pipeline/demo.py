"""The whole pipeline on the embedded images: extract, train, evaluate, report."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.device import resolve_device, resolve_precision
from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.evaluation.intervals import Interval
from pathsegdiff.features.extract import ProgressCallback, extract_dataset, store_name
from pathsegdiff.features.stage_one import StageOne, View
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.files import replace_file
from pathsegdiff.segmentation.evaluate import REPORT_FILE, evaluate_run
from pathsegdiff.segmentation.runs import load_run
from pathsegdiff.segmentation.train import Progress, plan_settings, train_head

HEADLINES = ("accuracy", "dice", "miou", "f1")
#: A preset that ends within two minutes on 2 cores; the paper's own settings are train-head's.
PRESET: dict[str, Any] = {
    "steps": 200,
    "batch_size": 4,
    "crop_px": 256,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "augment": "flips",
}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where things are, and how it went.

    Attributes:
        intervals: accuracy, dice, miou and f1 of the test images with their intervals.
        seconds: Of each step.
    """

    store: Path
    run: Path
    report: Path
    trained: bool
    intervals: dict[str, Interval]
    seconds: dict[str, float]


def run_demo(
    out: Path,
    *,
    model: str = "tiny",
    device: str = "auto",
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    extract_progress: ProgressCallback | None = None,
    train_progress: Progress | None = None,
) -> DemoResult:
    """Run the demo into ``out``; finished parts of an earlier demo there are reused.

    Args:
        out: Folder for the store, the run and ``report.html``.
        log: Called with a line before each step.
    """
    place = resolve_device(device)
    dataset = open_dataset("demo")
    bundle = load_bundle(model)
    view = View(timestep=50, conditioning="encoder")
    store_path = out / "features" / store_name(dataset.name, bundle.card.name, view)
    seconds = {}

    log(f"1/3 extract: {len(dataset.samples)} images through {bundle.card.name}")
    begin = time.perf_counter()
    stage_one = StageOne(
        bundle.load(device=place),
        views=[view],
        taps=[spec.name for spec in bundle.card.taps],
        precision=resolve_precision("auto", place),
        seed=seed,
        device=place,
        batch_size=4,
    )
    extract_dataset(dataset, bundle, stage_one, {view: store_path}, progress=extract_progress)
    seconds["extract"] = time.perf_counter() - begin

    store = FeatureStore.open(store_path)
    settings = plan_settings(store, seed=seed, **PRESET)
    shown = ", ".join(f"{name} {value}" for name, value in PRESET.items())
    log(f"2/3 train: {len(store.samples(store.card.default_train))} images, {shown}")
    begin = time.perf_counter()
    run_path = out / "run"
    train_head(store, run_path, settings, device=place, progress=train_progress)
    seconds["train"] = time.perf_counter() - begin

    log(f"3/3 evaluate: {len(store.samples(store.card.default_eval))} images of other cases")
    begin = time.perf_counter()
    evaluation = evaluate_run(load_run(run_path, place), store)
    seconds["evaluate"] = time.perf_counter() - begin
    report = out / "report.html"
    replace_file(report, lambda file: shutil.copyfile(evaluation.path / REPORT_FILE, file))
    return DemoResult(
        store=store_path,
        run=run_path,
        report=report,
        trained=bundle.card.trained,
        intervals={name: evaluation.intervals[name] for name in HEADLINES},
        seconds=seconds,
    )
