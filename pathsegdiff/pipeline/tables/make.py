"""Make a table: what is missing, the stores, the runs, and what came of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from pathsegdiff.data.manifest import Dataset, open_dataset
from pathsegdiff.diffusion.bundle import init_bundle, load_bundle
from pathsegdiff.errors import BundleError, DataError, RunError
from pathsegdiff.interrupt import Interrupt, deferred_interrupt
from pathsegdiff.pipeline.tables.rows import Job, TableSettings

Log = Callable[[str], None]
_PAPERS_WEIGHTS = (
    "the paper's: get configs/*-project.yaml and checkpoints/last.ckpt of the SSL-guided LDM "
    "(BRCA, 20x) from Google Drive folder 1kZ69wVEHV3k3Zr1hgS3kftz9cfNb9BxA, and HIPT's "
    "vit256_small_dino.pth from github.com/mahmoodlab/HIPT (git LFS), then: psd models import "
    "--ldm last.ckpt --config project.yaml --encoder vit256_small_dino.pth "
    "--out models/ssl-ldm-brca; or --model tiny for the embedded one"
)
#: A command that was told to end has so many seconds for its last checkpoint.
_LAST_WORDS = 120
_LOOK_EVERY = 0.2


@dataclass(kw_only=True)
class _Running:
    """The commands at work, so that an interrupt reaches all of them."""

    commands: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def start(self, command: list[str], log: Path, threads: int | None) -> int:
        """Run a command to its end, unless all were stopped; its exit code."""
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") as file:
            with self.lock:
                if self.stopped:
                    return 1
                process = subprocess.Popen(
                    [sys.executable, "-m", "cli", *command],
                    stdout=file,
                    stderr=file,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    # Ctrl-C at a terminal would reach it beside our SIGTERM: two are one too many.
                    start_new_session=True,
                )
                self.commands.add(process)
            try:
                return process.wait()
            finally:
                with self.lock:
                    self.commands.discard(process)

    def stop(self) -> None:
        """Let each end with a checkpoint (SIGTERM does), and start no other."""
        with self.lock:
            self.stopped = True
            for process in self.commands:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _LAST_WORDS
        while time.monotonic() < deadline:
            with self.lock:
                if not self.commands:
                    return
            time.sleep(0.05)


def missing_things(settings: TableSettings) -> list[str]:
    """What is not there, each in one line with how to get it; empty where all is."""
    missing = []
    if settings.stores():
        try:
            load_bundle(settings.model)
        except BundleError as error:
            missing.append(f"model {settings.model} ({error}); {_PAPERS_WEIGHTS}")
    try:
        _dataset(settings.dataset, settings.data_root)
    except DataError as error:
        missing.append(str(error))
    return missing


def make_runs(settings: TableSettings, *, jobs: int, log: Log) -> None:
    """Extract, train and score what is not finished; a run that fails does not stop the others.

    Args:
        jobs: Runs at a time; one thread each where there are several.
        log: Called with a line for each command that begins or fails.

    Raises:
        RunError: If a store cannot be filled.
        KeyboardInterrupt: After Ctrl-C, when every run has left a checkpoint.
    """
    dataset = _dataset(settings.dataset, settings.data_root)
    eval_split = evaluated(settings)
    logs = settings.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    todo = [job for job in settings.jobs() if not is_finished(settings, job, eval_split)]
    running = _Running()
    with deferred_interrupt() as interrupt, ThreadPoolExecutor(jobs) as pool:
        try:
            if todo and settings.stores():
                filling = partial(_fill_stores, settings, dataset, eval_split, running, logs, log)
                _wait([pool.submit(filling)], interrupt)
            one = partial(_one, settings, running, logs, 1 if jobs > 1 else None, log)
            _wait([pool.submit(one, job) for job in todo], interrupt)
        except BaseException:
            running.stop()
            raise


def evaluated(settings: TableSettings) -> str:
    """The split that the table scores."""
    if settings.eval_split is not None:
        return settings.eval_split
    return _dataset(settings.dataset, settings.data_root).manifest.default_eval


def is_finished(settings: TableSettings, job: Job, eval_split: str) -> bool:
    """Whether a run was trained to its end and scored."""
    result = settings.run(job) / "result.json"
    return result.exists() and settings.metrics(job, eval_split).exists()


def _wait(futures: Sequence[Future[None]], interrupt: Interrupt) -> None:
    """For all of them, or for an interrupt."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_LOOK_EVERY)
        for future in done:
            future.result()
        interrupt.raise_if_requested()


@cache  # what it warns of is said once
def _dataset(name: str, root: Path | None) -> Dataset:
    return open_dataset(name, data_root=root)


def _fill_stores(
    settings: TableSettings,
    dataset: Dataset,
    eval_split: str,
    running: _Running,
    logs: Path,
    log: Log,
) -> None:
    if "random" in settings.stores() and not settings.random.exists():
        init_bundle(_preset_of(settings), seed=0, out=settings.random)
    splits = [dataset.manifest.default_train]
    if not settings.folds:
        splits.append(eval_split)
    for command in settings.extractions(list(dict.fromkeys(splits))):
        log(_line(command))
        if running.start(command, logs / "extract.txt", None):
            raise RunError(f"a store is not whole, see {logs / 'extract.txt'}; run this again")


def _preset_of(settings: TableSettings) -> str:
    """The preset with the model's shapes."""
    channels = load_bundle(settings.model).card.num_channels
    presets = {1296: "tiny", 7296: "paper"}
    if channels not in presets:
        raise RunError(
            f"there is no preset with the {channels} channels of {settings.model}: leave the row "
            "random out, or make a bundle of its shapes and name it with --random"
        )
    return presets[channels]


def _one(
    settings: TableSettings, running: _Running, logs: Path, threads: int | None, log: Log, job: Job
) -> None:
    file = logs / f"{job.name}.txt"
    for command in settings.commands(job):
        log(_line(command))
        if running.start(command, file, threads):
            if not running.stopped:
                log(f"failed: {job.name}, see {file}")
            return


def _line(command: list[str]) -> str:
    return f"{time.strftime('%H:%M:%S')} psd {' '.join(command)}"
