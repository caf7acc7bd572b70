"""A grid of heads: stores x taps x learning rates x widths, each over folds and seeds.

Stage 2 only: the stores are there, and every head reads them. A run folder is one of train-head's,
so that a sweep continues where it was, and any of its runs can be looked at by itself. Settings are
meant to be chosen on what a sweep scores by itself, the validation part or held-out folds.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from pathsegdiff.config import parse_head_inputs
from pathsegdiff.device import available_cores, computing_on, keep_freed_memory
from pathsegdiff.errors import MALFORMED, PathSegDiffError, RunError
from pathsegdiff.evaluation.compare import METRICS_FILE
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.interrupt import deferred_interrupt
from pathsegdiff.segmentation.evaluate import evaluate_run, evaluated_samples
from pathsegdiff.segmentation.runs import kept_row, load_run, scored_step
from pathsegdiff.segmentation.splits import parse_fraction
from pathsegdiff.segmentation.train import default_run_name, parts_of, plan_settings, train_head

#: What is scored, as metrics.json and log.csv name it.
METRICS = ("miou", "dice", "accuracy")
#: Axes of a grid in the order of the table's columns; those with one value are left out there.
AXES = ("data", "model", "t", "condition", "dtype", "store", "taps", "lr", "width", "images")
#: Between two looks at whether Ctrl-C was pressed.
_LOOK_SECONDS = 0.5
_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is trained.

    Attributes:
        stores: Feature stores.
        taps: As ``--taps`` reads them, such as "all", "up_05,up_08" or "all,tokens".
        learning_rates: Of Adam.
        widths: Of the head; None for the width that the store's model names.
        limits: Training images; None for all.
        folds: Held out and scored, one after the other; None for the validation part.
        seeds: Of the training.
    """

    stores: Sequence[Path]
    taps: Sequence[str] = ("all",)
    learning_rates: Sequence[float] = (1e-4,)
    widths: Sequence[int | None] = (None,)
    limits: Sequence[int | None] = (None,)
    folds: Sequence[int | None] = (None,)
    seeds: Sequence[int] = (0,)

    def points(self) -> Iterator["Point"]:
        """Every combination; runs of one setting next to each other."""
        for store, taps, rate, width, limit, fold, seed in product(
            self.stores,
            self.taps,
            self.learning_rates,
            self.widths,
            self.limits,
            self.folds,
            self.seeds,
        ):
            yield Point(
                store=str(store),
                taps=taps,
                learning_rate=rate,
                head_width=width,
                limit=limit,
                fold=fold,
                seed=seed,
            )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One head of a grid; the attributes are those of ``Grid``."""

    store: str
    taps: str
    learning_rate: float
    head_width: int | None
    limit: int | None
    fold: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A point with what it needs to be trained anywhere.

    Attributes:
        point: Which.
        out: Its run folder.
        axes: Its values of ``AXES``, and "fold" and "seed".
        settings: Further arguments of ``plan_settings``.
        eval_split: Scored instead of the validation part, or None.
        device: Where to compute.
        threads: Of torch; None for as many as it takes by itself.
    """

    point: Point
    out: Path
    axes: dict[str, Any]
    settings: dict[str, Any]
    eval_split: str | None
    device: str
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: Which.
        part: That was scored: "validation", a fold or a split.
        scores: Of ``METRICS``; empty where it failed.
        kept_step: Step of the head that was kept.
        seconds: Of the training.
        error: Why it failed, or "".
    """

    job: Job
    part: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    kept_step: int = 0
    seconds: float = 0.0
    error: str = ""


def plan_sweep(
    grid: Grid,
    out: Path,
    *,
    eval_split: str | None = None,
    device: str = "cpu",
    threads: int | None = 1,
    **settings: Any,
) -> list[Job]:
    """Open every store and check every point before anything is trained.

    Args:
        grid: What to train.
        out: Folder of the sweep.
        eval_split: A split to score; None for the validation part, or the held-out folds.
        device, threads: Of each training.
        settings: Further arguments of ``plan_settings``, the same for all.

    Raises:
        RunError, StoreError: If a store is missing or incomplete, a setting does not fit one, there
            is nothing to score, or two points would get one run folder.
    """
    if eval_split is not None and any(fold is not None for fold in grid.folds):
        raise RunError("--eval-split cannot go with --fold, of which the held-out part is scored")
    opened = {str(path): FeatureStore.open(path) for path in grid.stores}
    found = {name: _store_axes(store) for name, store in opened.items()}
    # Named where nothing else in the table would tell two stores apart.
    alike = any(list(found.values()).count(own) > 1 for own in found.values())
    facts = {
        name: {**own, "store": Path(name).name if alike else None} for name, own in found.items()
    }
    compared: dict[str, tuple[str, set[str]]] = {}
    jobs: list[Job] = []
    for point in grid.points():
        store = opened[point.store]
        planned = plan_settings(store, **_arguments(point), **settings)
        if not parts_of(store, planned).val and eval_split is None and point.fold is None:
            raise RunError(
                "--val 0 leaves nothing to score; name a fold, or a split with --eval-split"
            )
        named = planned.val if parse_fraction(planned.val) is None else None
        _check_comparable(store, {planned.split, named, eval_split}, compared)
        name = default_run_name(store, planned)
        taken = next((job for job in jobs if job.out.name == name), None)
        if taken is not None:
            raise RunError(
                f"{taken.point.store} and {point.store} would train into one run, {name}; "
                "name each setting once, and stores of different names"
            )
        axes = {
            **facts[point.store],
            "taps": point.taps,
            "lr": point.learning_rate,
            "width": planned.head_width,
            "images": point.limit,
            "fold": point.fold,
            "seed": point.seed,
        }
        jobs.append(
            Job(
                point=point,
                out=out / "runs" / name,
                axes=axes,
                settings=settings,
                eval_split=eval_split,
                device=device,
                threads=threads,
            )
        )
    return jobs


def run_sweep(
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    done: Callable[[int, int, Outcome], None] = lambda count, total, outcome: None,
) -> list[Outcome]:
    """Train and score every job, finished ones being taken as they are.

    A job that fails costs no other. Ctrl-C ends all of them with checkpoints.

    Args:
        jobs: Of ``plan_sweep``.
        processes: That train side by side; 1 trains in this one.
        done: Called with (how many are done, of how many, the latest).

    Returns:
        Outcomes in the order of the jobs.
    """
    if processes > 1:
        return _side_by_side(jobs, processes, done)
    outcomes: list[Outcome] = []
    for job in jobs:
        outcomes.append(run_job(job))
        done(len(outcomes), len(jobs), outcomes[-1])
    return outcomes


def run_job(job: Job) -> Outcome:
    """Train one head and score it; what goes wrong with this one alone is its outcome."""
    try:
        with computing_on(job.threads):
            store = FeatureStore.open(job.point.store)
            settings = plan_settings(store, **_arguments(job.point), **job.settings)
            result = train_head(store, job.out, settings, device=job.device)
            found = {name: float(result.kept.get(f"val_{name}", math.nan)) for name in METRICS}
            part = "validation"
            if job.eval_split is not None or job.point.fold is not None:
                part, found = _evaluated(job, store)
    except (PathSegDiffError, OSError) as error:
        return Outcome(job=job, error=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        return Outcome(job=job, error="out of memory; use fewer --jobs, or a smaller --batch-size")
    return Outcome(
        job=job,
        part=part,
        scores=found,
        kept_step=int(result.kept["step"]),
        seconds=result.seconds,
    )


def _side_by_side(
    jobs: Sequence[Job], processes: int, done: Callable[[int, int, Outcome], None]
) -> list[Outcome]:
    """A process for each job, so many at a time.

    Ctrl-C and SIGTERM reach this process alone; it asks the others to end, which they do at the end
    of a step, with a checkpoint.
    """
    # Spawned: zarr's threads and torch's do not survive a fork.
    context = multiprocessing.get_context("spawn")
    waiting = deque(enumerate(jobs))
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    outcomes: dict[int, Outcome] = {}
    with deferred_interrupt() as interrupt:
        try:
            while waiting or running:
                interrupt.raise_if_requested()
                while waiting and len(running) < processes:
                    index, job = waiting.popleft()
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_run_alone, args=(job, theirs))
                    with _ignored_interrupt():
                        process.start()
                    theirs.close()
                    running[ours] = index, process
                for ready in wait(list(running), timeout=_LOOK_SECONDS):
                    assert isinstance(ready, Connection)
                    index, process = running.pop(ready)
                    outcomes[index] = _received(ready, process, jobs[index])
                    done(len(outcomes), len(jobs), outcomes[index])
        finally:
            for _, process in running.values():
                process.terminate()
            for ours, (_, process) in running.items():
                process.join()
                ours.close()
    return [outcomes[index] for index in range(len(jobs))]


def _run_alone(job: Job, answer: Connection) -> None:
    """What a process of ``_side_by_side`` does."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a Ctrl-C is for the parent
    keep_freed_memory()
    try:
        answer.send(run_job(job))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _received(answer: Connection, process: SpawnProcess, job: Job) -> Outcome:
    try:
        outcome = answer.recv()
        assert isinstance(outcome, Outcome)
    except EOFError:
        process.join()
        outcome = Outcome(
            job=job,
            error=f"its process ended with code {process.exitcode} (-9: out of memory, as a rule; "
            "use fewer --jobs)",
        )
    answer.close()
    process.join()
    return outcome


@contextmanager
def _ignored_interrupt() -> Iterator[None]:
    """A process that is started inside inherits that SIGINT is ignored, until it trains."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _evaluated(job: Job, store: FeatureStore) -> tuple[str, dict[str, float]]:
    """Part and scores; a split is looked at once per run."""
    run = load_run(job.out, torch.device(job.device))
    part, samples = evaluated_samples(run, store, job.eval_split)
    try:
        text = (job.out / f"eval-{part}" / METRICS_FILE).read_text(encoding="utf-8")
        values = json.loads(text)
        kept = kept_row(run.metadata)["step"]
        if len(values["images"]) == len(samples) and scored_step(values) == kept:
            return part, {name: float(values[name]) for name in METRICS}
    except (OSError, *MALFORMED):
        pass  # not there, or not whole: it is made now
    pooled = evaluate_run(run, store, split=job.eval_split).scores
    return part, {name: float(getattr(pooled, name)) for name in METRICS}


def default_processes(device: torch.device) -> int:
    """One per core on a CPU, where a small head gains little from a second thread; else one."""
    return available_cores() if device.type == "cpu" else 1


def _check_comparable(
    store: FeatureStore, splits: set[str | None], compared: dict[str, tuple[str, set[str]]]
) -> None:
    """Refuse a store with samples that are missing, or others than the stores before it have.

    Args:
        splits: That are used; None where all are.
        compared: Data set -> a store of it and its samples; filled here.
    """
    used = splits - {None}
    wanted = [sample for sample in store.registered() if not used or sample.split in used]
    for split in used:
        if not any(sample.split == split for sample in wanted):
            raise RunError(f"{store.path} has no sample of split {split!r}")
    missing = [sample.sample_id for sample in wanted if not store.is_complete(sample)]
    if missing:
        raise RunError(
            f"{store.path} lacks {len(missing)} of {len(wanted)} samples ({missing[0]}, ...); "
            "finish it with `psd extract`"
        )
    ids = {sample.sample_id for sample in wanted}
    other, theirs = compared.setdefault(store.card.name, (store.path, ids))
    if ids != theirs:
        odd = min(ids ^ theirs)
        raise RunError(
            f"{store.path} and {other} do not hold the same samples ({odd} is in one of them); "
            "extract the same splits into both"
        )


def _store_axes(store: FeatureStore) -> dict[str, Any]:
    return {
        "data": store.card.name,
        "model": store.model["name"],
        "t": store.recipe.timestep,
        "condition": store.recipe.conditioning,
        "dtype": store.recipe.dtype,
    }


def _arguments(point: Point) -> dict[str, Any]:
    arguments = asdict(point)
    del arguments["store"]
    arguments["taps"] = None if point.taps == "all" else parse_head_inputs(point.taps)
    return arguments
