"""Make a table: what is missing, the stores, the runs, and what came of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pathsegdiff.data.manifest import dataset_sha256, load_manifest, open_dataset
from pathsegdiff.diffusion.bundle import (
    has_encoder,
    init_bundle,
    load_bundle,
    read_card,
    resolve_bundle,
)
from pathsegdiff.errors import BundleError, DataError, RunError
from pathsegdiff.interrupt import Interrupt, deferred_interrupt
from pathsegdiff.pipeline.baselines.images import Images
from pathsegdiff.pipeline.tables.finished import (
    is_finished,
    known_signature,
    refuse_others,
    write_signature,
)
from pathsegdiff.pipeline.tables.rows import CONTOURS, ROWS, Job, TableSettings, check_rows
from pathsegdiff.segmentation.splits import divide

Log = Callable[[str], None]
_PAPERS_WEIGHTS = (
    "`psd models pull ssl-ldm-brca` gets the paper's weights and makes a bundle of them, then "
    "--model ssl-ldm-brca; `psd models import --help` says how to make one of files at hand; or "
    "--model tiny for the embedded one"
)
#: A command that was told to end has so many seconds for its last checkpoint.
_LAST_WORDS = 120
_LOOK_EVERY = 0.2
#: Of a log, looked at for its last line, of which so much is shown.
_TAIL_BYTES, _SAID = 4096, 300
_BASELINES = "segmentation_models_pytorch"
#: Presets by their channels.
_PRESETS = {1296: "tiny", 7296: "paper"}


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


def missing_things(
    dataset: str,
    data_root: Path | None,
    model: str,
    rows: Sequence[str],
    unconditional: str | None = None,
    encoder_weights: Mapping[str, Path] | None = None,
) -> list[str]:
    """What is not there, each in one line with how to get it; empty where all is."""
    check_rows(rows)
    missing = []
    if unconditional is not None and "null" in rows:
        try:
            load_bundle(unconditional)
        except BundleError as error:
            missing.append(f"--unconditional {unconditional} ({error})")
    if any(_reads_model(name, unconditional) for name in rows):
        try:
            bundle = load_bundle(model)
            blind = [name for name in rows if ROWS[name].store in ("encoder", "timesteps")]
            if blind and not has_encoder(bundle.path):
                missing.append(
                    f"model {model} has no patch encoder, which the rows {', '.join(blind)} need; "
                    "--rows null, or import it with one (psd models import --encoder)"
                )
        except BundleError as error:
            missing.append(f"model {model} ({error}); {_PAPERS_WEIGHTS}")
    try:
        open_dataset(dataset, data_root=data_root)
    except DataError as error:
        missing.append(str(error))
    if any(ROWS[name].store is None for name in rows) and not find_spec(_BASELINES):
        missing.append(f"package {_BASELINES}: pip install 'pathsegdiff[baselines]'")
    for encoder, file in (encoder_weights or {}).items():
        if not file.is_file() and any(ROWS[name].encoder == encoder for name in rows):
            missing.append(f"--encoder-weights {encoder}={file}: there is no such file")
    return missing


def possible_rows(dataset: str, rows: tuple[str, ...], *, usual: bool, log: Log) -> tuple[str, ...]:
    """The rows without the one that learns from objects, where the data set numbers none.

    Args:
        usual: Whether they are the table's own, of which it is left out with a line to ``log``.

    Raises:
        RunError: If it was asked for.
    """
    try:
        manifest = load_manifest(dataset)
    except DataError:
        return rows  # ``missing_things`` says it
    if CONTOURS not in rows or manifest.has_whole_objects:
        return rows
    others = tuple(name for name in rows if name != CONTOURS)
    said = (
        f"the row {CONTOURS} learns the contours of objects, of which data set {manifest.name} "
        "numbers none in whole images"
    )
    if not usual:
        remedy = f"--rows {','.join(others)}" if others else "choose another row"
        raise RunError(f"{said}; {remedy}")
    log(f"left out: {said}")
    return others


def plan_table(
    table: str,
    *,
    dataset: str,
    data_root: Path | None = None,
    eval_split: str | None = None,
    model: str,
    random: Path | None = None,
    unconditional: str | None = None,
    rows: tuple[str, ...],
    any_weights: bool = False,
    **others: Any,
) -> TableSettings:
    """Fill in what data set and model decide: names, splits, the bundle of random weights.

    Args:
        any_weights: As for ``refuse_others``.
        others: Further fields of ``TableSettings``.

    Raises:
        DataError, BundleError, ConfigError: If data set, model or a setting cannot be.
        RunError: If the folder holds a table that was made with other settings.
    """
    manifest = load_manifest(dataset)
    check_rows(rows)
    name = preset = "none"
    sees, digest = True, None
    if any(_reads_model(row, unconditional) for row in rows):
        try:
            folder = resolve_bundle(model)
            card, sees = read_card(folder), has_encoder(folder)
            card.check_timestep(others.get("timestep", TableSettings.timestep))
            name, preset = card.name, _PRESETS.get(card.num_channels, "none")
            digest = card.sha256
        except BundleError:  # a table of finished runs needs no bundle
            known = known_signature(others.get("work") or others["out"])
            if known is None:
                raise
            name = str(known.get("--model"))
    null = null_digest = None
    if unconditional is not None and "null" in rows:
        try:
            other = read_card(resolve_bundle(unconditional))
            null, null_digest = other.name, other.sha256
        except BundleError:
            null = (known_signature(others.get("work") or others["out"]) or {}).get(
                "--unconditional"
            )
            if null is None:
                raise
    random = random or Path("models") / f"{preset}-random"
    settings = TableSettings(
        table=table,
        dataset=dataset,
        dataset_sha256=dataset_sha256(manifest),
        dataset_name=manifest.name,
        data_root=data_root,
        train_split=manifest.default_train,
        eval_split=eval_split or manifest.default_eval,
        model=model,
        model_name=name,
        has_encoder=sees,
        random=random,
        unconditional=unconditional,
        unconditional_name=null,
        model_sha256=digest,
        unconditional_sha256=null_digest,
        random_sha256=_digest_of(random) if "random" in rows else None,
        rows=rows,
        **others,
    )
    refuse_others(settings, any_weights=any_weights)
    return settings


def _digest_of(bundle: Path) -> str | None:
    """Of its weights, as its card says; None where there is none yet."""
    try:
        return read_card(bundle).sha256
    except BundleError:
        return None


def refuse_impossible(
    dataset: str,
    data_root: Path | None,
    *,
    train_split: str,
    eval_split: str | None,
    folds: Sequence[int] = (),
    limits: Sequence[int | None] = (None,),
) -> None:
    """Ask for every part before anything is extracted.

    Args:
        eval_split: Scored where no fold is; None for none.
        limits: Training images.

    Raises:
        DataError: If a split is unknown or its files are not there.
        RunError: If a fold is not there, or a part would be empty.
    """
    scored = [] if folds or eval_split is None else [eval_split]
    splits = tuple(dict.fromkeys((train_split, *scored)))
    opened = open_dataset(dataset, data_root=data_root, splits=splits)
    images = Images(opened, opened.rule.region_px)
    for fold in folds or (None,):
        for limit in limits:
            divide(
                images.samples,
                images.card,
                f"data set {opened.name}",
                split=train_split,
                val="0",
                fold=fold,
                seed=0,
                limit=limit,
            )


def make_runs(settings: TableSettings, *, jobs: int, threads: int | None, log: Log) -> list[str]:
    """Extract, train and score what is not finished; a run that fails does not stop the others.

    Args:
        jobs: Runs at a time.
        threads: Of each; None for torch's own choice.
        log: Called with a line for each command that begins or fails.

    Returns:
        Names of the runs that failed.

    Raises:
        RunError: If a store cannot be filled.
        KeyboardInterrupt: After Ctrl-C, when every run has left a checkpoint.
    """
    logs = settings.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    write_signature(settings)
    todo = [job for job in settings.jobs() if not is_finished(settings, job)]
    running = _Running()
    with deferred_interrupt() as interrupt, ThreadPoolExecutor(jobs) as pool:
        try:
            if todo and settings.stores():
                _wait([pool.submit(_fill_stores, settings, running, logs, log)], interrupt)
            one = partial(_one, settings, running, logs, threads, log)
            _wait([pool.submit(one, job) for job in todo], interrupt)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise
    return [job.name for job in todo if not is_finished(settings, job)]


def _reads_model(row: str, unconditional: str | None) -> bool:
    """Whether a row needs the table's own model."""
    store = ROWS[row].store
    return store is not None and (store != "none" or unconditional is None)


def _wait(futures: Sequence[Future[None]], interrupt: Interrupt) -> None:
    """For all of them, or for an interrupt."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_LOOK_EVERY)
        for future in done:
            future.result()
        interrupt.raise_if_requested()


def _fill_stores(settings: TableSettings, running: _Running, logs: Path, log: Log) -> None:
    if "random" in settings.stores():
        _make_random(settings)
    for command in settings.extractions():
        log(_line(command))
        if running.start(command, logs / "extract.txt", None):
            file = logs / "extract.txt"
            raise RunError(
                f"a store is not whole ({_last_line(file)}); see {file}, and run this again"
            )


def _make_random(settings: TableSettings) -> None:
    """The bundle of random weights in the model's shapes, made where it is not there.

    Raises:
        RunError: If there is no preset of these shapes, or the bundle has others.
    """
    taps = read_card(resolve_bundle(settings.model)).taps
    if not settings.random.exists():
        channels = sum(tap.channels for tap in taps)
        if channels not in _PRESETS:
            raise RunError(
                f"there is no preset with the {channels} channels of {settings.model}: leave the "
                "row random out, or make a bundle of its shapes and name it with --random"
            )
        init_bundle(_PRESETS[channels], seed=0, out=settings.random)
    if load_bundle(settings.random).card.taps != taps:
        raise RunError(
            f"--random {settings.random} has not the shapes of {settings.model}; name another"
        )


def _one(
    settings: TableSettings, running: _Running, logs: Path, threads: int | None, log: Log, job: Job
) -> None:
    file = logs / f"{job.name}.txt"
    for command in settings.commands(job):
        if running.stopped:
            return
        log(_line(command))
        if running.start(command, file, threads):
            if not running.stopped:
                log(f"failed: {job.name} ({_last_line(file)}), see {file}")
            return


def _last_line(log: Path) -> str:
    """What a command said at its end, usually its error."""
    lines = []
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:_SAID] if lines else "it said nothing"


def _line(command: list[str]) -> str:
    return f"{time.strftime('%H:%M:%S')} psd {' '.join(command)}"
