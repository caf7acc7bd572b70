"""What every training has in common: the loop, its checkpoint, its log, Ctrl-C and the lock.

A training is a subclass of ``TrainingLoop``. Everything that a step sees must be a function of
(seed, step); the checkpoint holds everything else, so that a training that was interrupted ends
with the weights of one that was not.
"""

import csv
import io
import itertools
import json
import logging
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pathsegdiff.device import device_name
from pathsegdiff.errors import DivergedError, RunError
from pathsegdiff.evaluation.confusion import scores
from pathsegdiff.files import as_file_name, replace_file
from pathsegdiff.interrupt import Interrupt, deferred_interrupt
from pathsegdiff.locks import alone_in
from pathsegdiff.segmentation.runs import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    CURVES_FILE,
    LOG_FILE,
    RESULT_FILE,
    damage_in_one_line,
    write_json,
)
from pathsegdiff.segmentation.sampling import prefetch
from pathsegdiff.tensors import load_tensors

_logger = logging.getLogger(__name__)

#: A checkpoint is written at each validation, and after this long without one.
_CHECKPOINT_SECONDS = 300.0
_CURVES_SECONDS = 20.0
LOG_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "val_loss",
    "val_miou",
    "val_dice",
    "val_accuracy",
    "seconds",
)
Row = dict[str, float]
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where a training stands, after each step.

    Attributes:
        step: Steps done.
        total_steps: Of the whole training; expected where its time is given.
        epoch: Epochs begun.
        loss: Of this step.
        steps_per_second: Since this process began, validation included.
        seconds_left: At that rate.
        row: The log's row where the step was validated, else None.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    steps_per_second: float
    seconds_left: float
    row: Row | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training ended with.

    Attributes:
        path: The run.
        steps: Done in all.
        steps_done_now: Done by this call; 0 where the run had finished before.
        kept: Row of the log whose weights were kept.
        seconds: Of training and validation, over all calls.
    """

    path: Path
    steps: int
    steps_done_now: int
    kept: Row
    seconds: float


Progress = Callable[[TrainProgress], None]


class TrainingLoop(ABC, Generic[Batch]):
    """The state of one training, and its loop.

    A subclass says what a batch, the loss, the learning rate and a validation are, and what is
    written of the row that is kept.

    Args:
        out: Folder of the run.
        network: On ``device``.
        optimizer: Of the network.
        device: Where to compute.
        precision: Of the forward and backward pass.
        epoch_steps: Steps in which every sample is seen once.
        total_steps: None where something else than their number ends the training.
        validates: Whether there is a validation part.
        keeps_best: Whether the weights of the best validation are kept, or those of the last row,
            as without a validation part.
        progress: Called after each step.
    """

    #: Of the curves' left half.
    loss_title = "weighted cross-entropy"

    def __init__(
        self,
        out: Path,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: str,
        epoch_steps: int,
        total_steps: int | None,
        validates: bool,
        keeps_best: bool,
        progress: Progress | None,
    ) -> None:
        self.out, self.network, self.optimizer = out, network, optimizer
        self.device, self.precision = device, precision
        self.epoch_steps, self.total_steps = epoch_steps, total_steps
        self.validates, self.keeps_best = validates, keeps_best and validates
        self.progress = progress
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=precision == "float16" and device.type == "cuda"
        )
        self.step = 0
        self.loss_sum, self.loss_steps = 0.0, 0
        self.rows: list[Row] = []
        self.kept: Row | None = None
        self.seconds = 0.0
        self._start_clock()

    # -- what a subclass says --

    @abstractmethod
    def read_batch(self, step: int) -> Batch:
        """The batch of a step; called ahead of it, on a thread of its own."""

    @abstractmethod
    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of a batch, with its gradient; the network is in training mode."""

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""

    @abstractmethod
    def validation_is_due(self) -> bool:
        """Whether the step that was just done is validated."""

    @abstractmethod
    def validate(self, interrupt: Interrupt) -> Row:
        """Scores of the network as it is: val_loss, val_miou, val_dice, val_accuracy."""

    @abstractmethod
    def keep(self, metadata: dict[str, str]) -> None:
        """Write the network as it is, the best one so far or the latest."""

    @abstractmethod
    def lower_rate(self) -> str:
        """What to try where the loss is not finite: "--lr 1e-05 (it was 0.0001)"."""

    def begin(self) -> None:
        """Called where there is no checkpoint to continue from."""

    def is_finished(self) -> bool:
        """Whether no step is left to do."""
        return self.total_steps is not None and self.step >= self.total_steps

    def expected_steps(self) -> int:
        """Of the whole training."""
        assert self.total_steps is not None
        return self.total_steps

    def outcome(self) -> dict[str, Any]:
        """More of what result.json says."""
        return {}

    # -- the loop --

    def resume_or_begin(self) -> None:
        """Continue from the checkpoint where there is one."""
        file = self.out / CHECKPOINT_FILE
        if file.exists():
            self._load_checkpoint(file)
            of = "" if self.total_steps is None else f" of {self.total_steps}"
            _logger.info("%s: continuing after step %d%s", self.out, self.step, of)
        else:
            self.begin()
        self._start_clock()

    def run(self) -> TrainResult:
        """Train to the end."""
        consistent = True
        steps: Iterable[int] = itertools.count(self.step)
        if self.total_steps is not None:
            steps = range(self.step, self.total_steps)
        jobs = (partial(self.read_batch, step) for step in steps)
        with deferred_interrupt() as interrupt, closing(prefetch(jobs)) as batches:
            try:
                done, _ = self._validate_if_due(interrupt)
                while not done:
                    batch = next(batches)
                    consistent = False
                    loss = self._train_step(batch)
                    consistent = True
                    done, row = self._validate_if_due(interrupt)
                    self._report(loss, row)
                    interrupt.raise_if_requested()
                    if time.monotonic() - self._last_checkpoint > _CHECKPOINT_SECONDS:
                        self._save_checkpoint()
            except KeyboardInterrupt:
                # A second Ctrl-C can fall into a step; then the last checkpoint holds.
                if consistent:
                    self._save_checkpoint()
                    self._write_curves()
                raise
        return self._finish()

    def elapsed(self) -> float:
        """Seconds of training and validation so far, over all calls."""
        return self._seconds_before + time.monotonic() - self._began

    def _start_clock(self) -> None:
        self._began, self._steps_before = time.monotonic(), self.step
        self._seconds_before = self.seconds
        self._last_checkpoint = self._last_curves = self._began

    def _train_step(self, batch: Batch) -> float:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss = self.loss_of(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(self._diverged(value))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.loss_sum += value
        self.loss_steps += 1
        return value

    def _diverged(self, loss: float) -> str:
        kept = (
            f"the checkpoint of step {self.rows[-1]['step']:.0f} is kept"
            if (self.out / CHECKPOINT_FILE).exists() and self.rows
            else "no checkpoint had been written yet"
        )
        of = "" if self.total_steps is None else f" of {self.total_steps}"
        return (
            f"{self.out}: the loss is {loss} at step {self.step + 1}{of}; "
            f"{kept}; train again with {self.lower_rate()}, and another --out"
        )

    def _validate_if_due(self, interrupt: Interrupt) -> tuple[bool, Row | None]:
        """Whether the training is over, which is said right after a validation only, and its row.

        Asked once before the validation: a clock that runs out later must not take the last row.
        """
        if self.step == 0:
            return False, None
        done = self.is_finished()
        if self.rows and self.rows[-1]["step"] == self.step:
            return done, None
        if not (done or self.validation_is_due()):
            return False, None
        row: Row = {
            "step": self.step,
            "epoch": self.step / self.epoch_steps,
            "loss": self.loss_sum / max(1, self.loss_steps),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if self.validates:
            row.update(self.validate(interrupt))
        self.seconds = self.elapsed()
        row["seconds"] = round(self.seconds, 3)
        self.rows.append(row)
        self.loss_sum, self.loss_steps = 0.0, 0
        if self.kept is None or not self.keeps_best or quality(row) > quality(self.kept):
            self.kept = row
            self.keep({key: repr(value) for key, value in row.items()})
        replace_file(self.out / LOG_FILE, lambda file: file.write_text(_csv(self.rows), "utf-8"))
        self._save_checkpoint()
        if time.monotonic() - self._last_curves > _CURVES_SECONDS:
            self._write_curves()
        return done or self.is_finished(), row

    # -- what is left behind --

    def _report(self, loss: float, row: Row | None) -> None:
        if row is not None:
            _logger.debug("%s", row)
        if self.progress is None:
            return
        elapsed = max(1e-9, time.monotonic() - self._began)
        rate = (self.step - self._steps_before) / elapsed
        total = self.expected_steps()
        self.progress(
            TrainProgress(
                step=self.step,
                total_steps=total,
                epoch=-(-self.step // self.epoch_steps),
                loss=loss,
                steps_per_second=rate,
                seconds_left=(total - self.step) / max(rate, 1e-9),
                row=row,
            )
        )

    def _save_checkpoint(self) -> None:
        self.seconds = self.elapsed()
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "rows": self.rows,
            "kept": self.kept,
            "seconds": self.seconds,
        }
        replace_file(self.out / CHECKPOINT_FILE, lambda file: torch.save(state, file))
        self._last_checkpoint = time.monotonic()

    def _load_checkpoint(self, file: Path) -> None:
        try:
            state = load_tensors(file, self.device)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.loss_sum, self.loss_steps = float(state["loss_sum"]), int(state["loss_steps"])
            self.rows, self.kept = list(state["rows"]), state.get("kept", state.get("best"))
        except Exception as error:  # whatever the parsers make of a damaged file
            reason = str(error).split("\n", 1)[0][:200] or type(error).__name__
            raise RunError(
                f"{file} is damaged ({reason}); delete it to begin this run anew"
            ) from None

    def _write_curves(self) -> None:
        if self.rows:
            replace_file(
                self.out / CURVES_FILE, lambda file: draw_curves(file, self.rows, self.loss_title)
            )
        self._last_curves = time.monotonic()

    def _finish(self) -> TrainResult:
        assert self.kept is not None
        self._write_curves()
        result = {
            "steps": self.step,
            "kept": _json_row(self.kept),
            "last": _json_row(self.rows[-1]),
            "seconds": round(self.seconds, 3),
            "device": device_name(self.device),
            **self.outcome(),
        }
        write_json(self.out / RESULT_FILE, result)
        (self.out / CHECKPOINT_FILE).unlink(missing_ok=True)
        return TrainResult(
            path=self.out,
            steps=self.step,
            steps_done_now=self.step - self._steps_before,
            kept=self.kept,
            seconds=self.seconds,
        )


def finished_before(out: Path) -> TrainResult | None:
    """The result of a training that has finished, or None.

    Raises:
        RunError: If the file that says so is damaged.
    """
    file = out / RESULT_FILE
    if not file.exists():
        return None
    with damage_in_one_line(file):
        result = json.loads(file.read_text(encoding="utf-8"))
        kept = {
            key: math.nan if value is None else float(value)
            for key, value in result.get("kept", result.get("best")).items()
        }
        return TrainResult(
            path=out,
            steps=int(result["steps"]),
            steps_done_now=0,
            kept=kept,
            seconds=float(result["seconds"]),
        )


def refuse_differences(out: Path, differing: Sequence[tuple[str, Any, Any]]) -> None:
    """Refuse to continue a run with other settings.

    Args:
        differing: (field, that of the run, that of this call) of what differs.

    Raises:
        RunError: If anything does, naming the first.
    """
    if differing:
        name, theirs, ours = differing[0]
        others = (
            f" ({', '.join(name for name, _, _ in differing[1:])} too)" if differing[1:] else ""
        )
        raise RunError(
            f"{out} was trained with {name} {_short(theirs)}, this run asks for {_short(ours)}"
            f"{others}; use another --out, or the same settings to continue it"
        )


def folder_name(name: str, settings: dict[str, Any], usual: dict[str, Any]) -> str:
    """Name of a run folder: what is trained, and each setting that is not the usual one."""
    for field_name, value in settings.items():
        # The split says nothing more with a fold, nor the absence of epochs beside steps.
        if value == usual[field_name] or (value is None and field_name != "crop_px"):
            continue
        name += f"-{_SHORT_NAMES.get(field_name, field_name)}-{'none' if value is None else value}"
    return as_file_name(name)


def validation_scores(confusion: np.ndarray) -> Row:
    """What a validation says of pooled (K, K) counts."""
    pooled = scores(confusion)
    return {
        "val_miou": pooled.miou,
        "val_dice": pooled.dice,
        "val_accuracy": pooled.accuracy,
    }


def quality(row: Row) -> float:
    """What the best row has most of."""
    value = row.get("val_miou", math.nan)
    return -math.inf if math.isnan(value) else value


def draw_curves(path: Path, rows: Sequence[Row], loss_title: str) -> None:
    """Loss and validation scores over the steps, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, score_axes = figure.subplots(1, 2)
    for axes, names, title in (
        (loss_axes, (("loss", "training"), ("val_loss", "validation")), loss_title),
        (
            score_axes,
            (("val_miou", "mIoU"), ("val_dice", "Dice"), ("val_accuracy", "accuracy")),
            "validation",
        ),
    ):
        for name, label in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                # A curve of one row would be invisible without its marker.
                axes.plot(*zip(*points, strict=True), label=label, marker=".", markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


@contextmanager
def only_trainer(out: Path) -> Iterator[None]:
    """Make the folder and lock it for this process; the system gives it back when that ends.

    Raises:
        RunError: If it is a file, holds something else than a run, or another process has it.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose another --out")
    if out.is_dir() and not (out / CONFIG_FILE).exists():
        # A kill while the first file was written leaves its beginning.
        begun = re.compile(rf"\.{re.escape(CONFIG_FILE)}\.\d+\.new")
        others = [
            path.name
            for path in out.iterdir()
            if path.name != ".lock" and not begun.fullmatch(path.name)
        ]
        if others:
            raise RunError(
                f"{out} exists and is no run folder ({others[0]} is in it); choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    busy = RunError(f"{out}: another process is training into this run; wait for it, or stop it")
    with alone_in(out, busy):
        yield


_SHORT_NAMES = {
    "learning_rate": "lr",
    "batch_size": "batch",
    "head_width": "width",
    "crop_px": "crop",
    "size_px": "size",
}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _json_row(row: Row) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.8g}" for key, value in row.items()})
    return text.getvalue()
