"""One training loop for the three parts: resumable, with an average of the weights and a log.

What a step does depends on the settings, the step's number and the state in the checkpoint alone,
so that a training which was interrupted ends, on a CPU, with the weights of one that was not.
Optimiser, schedule, clipping and mixed precision are PyTorch's, the average is diffusers'.
"""

import csv
import io
import json
import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pathsegdiff.device import autocast, available_cores, device_name
from pathsegdiff.diffusion.third_party import EMAModel
from pathsegdiff.errors import RunError
from pathsegdiff.files import replace_file
from pathsegdiff.interrupt import deferred_interrupt
from pathsegdiff.tensors import load_tensors

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.pt"
LOG_FILE = "log.csv"
SETTINGS_FILE = "settings.json"
#: A step whose gradient is not finite is left out; this many in a row are an error.
_MAX_SKIPPED = 20
#: Threads that read crops. More do not help: a part of it holds Python's lock.
_MOST_READERS = 4
#: Processes that read crops for a GPU, whose steps wait for that lock, too.
_MOST_PROCESSES = 12
Figures = dict[str, float]
#: Of one step: tensors without dimensions, left on the device until they are reported.
StepFigures = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What decides the weights, beside the images and the part's own settings.

    Attributes:
        steps: Of the optimiser.
        batch_size: Crops per step at the full crop size; smaller crops come in larger batches.
        crops: (share of the steps, crop_px) in turn; the shares add up to 1.
        learning_rate: Highest, of AdamW; a linear rise, then cosine to a hundredth.
        warmup_steps: Of the rise.
        weight_decay: Of AdamW.
        clip_norm: Largest norm of the gradient.
        ema_decay: Of the average of the weights, which is what is kept.
        precision: Of the forward pass; weights are float32.
        seed: Of initial weights, crops and noise.
    """

    steps: int
    batch_size: int
    crops: tuple[tuple[float, int], ...] = ((1.0, 256),)
    learning_rate: float = 3e-4
    warmup_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise RunError(f"steps and batch size must be at least 1, got {self.steps}, "
                           f"{self.batch_size}")  # fmt: skip
        if not 0 < self.learning_rate < 1:
            raise RunError(f"the learning rate must be in (0, 1), got {self.learning_rate}")

    def crop_px(self, step: int) -> int:
        """Crop size of a step."""
        passed = 0.0
        for share, size in self.crops:
            passed += share
            if step < passed * self.steps - 1e-6:
                return size
        return self.crops[-1][1]

    def batch_at(self, step: int) -> tuple[int, int]:
        """(crops, crop_px) of a step: the same number of pixels throughout."""
        size = self.crop_px(step)
        return max(1, round(self.batch_size * (self.crops[-1][1] / size) ** 2)), size

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "crops": [list(crop) for crop in self.crops]}


@dataclass(frozen=True, kw_only=True)
class PretrainProgress:
    """Where a training stands, after each step.

    Attributes:
        part: "autoencoder", "encoder", "ldm" or "decoder".
        step, total_steps: Done, and of the whole.
        figures: Averages since the last report.
    """

    part: str
    step: int
    total_steps: int
    figures: Figures


Progress = Callable[[PretrainProgress], None]


class Part(ABC):
    """What is trained: its networks, the loss of a step, and how it is looked at.

    Attributes:
        name: Of its folder.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The networks with every trained parameter."""

    @abstractmethod
    def read(self, step: int, count: int, crop_px: int) -> Any:
        """What the step needs from the disk; called ahead, on another thread or process."""

    @abstractmethod
    def loss(self, batch: Any, step: int) -> tuple[Tensor, StepFigures]:
        """The loss of a step and what of it is logged; the forward pass runs under autocast."""

    def after_step(self, step: int, total_steps: int) -> None:  # noqa: B027 (most need nothing)
        """Called after the optimiser."""

    @abstractmethod
    def held_out(self) -> Figures:
        """Figures on held-out images, with the averaged weights in place."""

    @abstractmethod
    def pictures(self, folder: Path, step: int) -> None:
        """Draw what shows how far the training is, with the averaged weights in place."""

    def extra_state(self) -> dict[str, Tensor]:
        """Further tensors that belong into a checkpoint."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take back what ``extra_state`` gave."""


class TrainingLoop:
    """Trains one part in a folder of its own.

    Args:
        part: What is trained; on ``device``.
        settings: Of the loop.
        folder: Made where it is not there; continued where it holds the same training.
        identity: Further settings that a continued training must share.
        device: Of the networks.

    Raises:
        RunError: If the folder holds a training with other settings.
    """

    def __init__(
        self,
        part: Part,
        settings: LoopSettings,
        folder: Path,
        identity: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.part, self.settings, self.folder, self.device = part, settings, folder, device
        self.parameters = [p for p in part.trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )
        self.ema = EMAModel(
            self.parameters,
            decay=settings.ema_decay,
            use_ema_warmup=True,
            power=0.75,
            foreach=device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=settings.precision == "float16" and device.type == "cuda"
        )
        self.step = 0
        self.seconds = 0.0
        self.hardware: list[str] = []
        self.rows: list[Figures] = []
        self._skipped = 0
        self._sums: StepFigures = {}
        self._counts: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._check_identity({**settings.to_dict(), **identity})
        if (folder / CHECKPOINT_FILE).exists():
            self._load(folder / CHECKPOINT_FILE)

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.step >= self.settings.steps

    def run(
        self,
        *,
        progress: Progress | None = None,
        report_every: int = 50,
        look_every: int = 1000,
        checkpoint_seconds: float = 300.0,
        stop_at: float | None = None,
    ) -> bool:
        """Train to the end, or until it is time to stop.

        Args:
            report_every: Steps between rows of the log.
            look_every: Steps between held-out figures and pictures; those of the end come always.
            checkpoint_seconds: Between checkpoints.
            stop_at: ``time.monotonic()`` after which no further step begins.

        Returns:
            Whether the training is finished.

        Raises:
            RunError: If the loss stays without a finite value.
            KeyboardInterrupt: After Ctrl-C or SIGTERM, with a checkpoint of the last whole step.
        """
        if self.finished:
            return True
        began, before = time.monotonic(), self.seconds
        saved = began
        torch.manual_seed(self.settings.seed)
        if (name := device_name(self.device)) not in self.hardware:
            self.hardware.append(name)
        processes = 0
        if self.device.type == "cuda":
            processes = min(_MOST_PROCESSES, available_cores() - 1)
        with (
            deferred_interrupt() as interrupt,
            read_ahead(self.part, self.settings, self.step, processes) as batches,
        ):
            while not self.finished:
                self._train_step(next(batches))
                self.seconds = before + time.monotonic() - began
                last = self.finished
                if self.step % report_every == 0 or last:
                    self._report(look=self.step % look_every == 0 or last)
                if progress is not None:
                    progress(self._state())
                now = time.monotonic()
                out_of_time = stop_at is not None and now >= stop_at
                if last or interrupt.requested or out_of_time or now - saved > checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
                interrupt.raise_if_requested()
                if out_of_time:
                    break
        return self.finished

    def end(self) -> None:
        """Be content with the steps that are done: look at them once more, and train no further.

        Raises:
            RunError: If no step is done.
        """
        if self.step == 0:
            raise RunError(f"{self.folder}: no step is done that the training could end with")
        if not self.finished:
            self._report(look=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place inside the block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        training = self.part.trained.training
        self.part.trained.eval()
        try:
            yield
        finally:
            self.ema.restore(self.parameters)
            self.part.trained.train(training)

    # -- one step --

    def _train_step(self, batch: Any) -> None:
        self.part.trained.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        with autocast(self.device, self.settings.precision):
            loss, figures = self.part.loss(batch, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        if torch.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self._skipped = 0
        else:
            self._skipped += 1
            if self._skipped >= _MAX_SKIPPED:
                raise RunError(
                    f"{self.folder}: the loss has had no finite value for {_MAX_SKIPPED} steps "
                    f"(step {self.step + 1}); go on from the last checkpoint with a lower "
                    "learning rate, or --precision float32"
                )
        self.scaler.update()
        self.ema.step(self.parameters)
        self.part.after_step(self.step, self.settings.steps)
        self.step += 1
        for name, value in figures.items():
            so_far = self._sums.get(name)
            self._sums[name] = value.double() if so_far is None else so_far + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _state(self) -> PretrainProgress:
        latest = self.rows[-1] if self.rows else {}
        return PretrainProgress(
            part=self.part.name,
            step=self.step,
            total_steps=self.settings.steps,
            figures={name: value for name, value in latest.items() if name not in _PLAIN},
        )

    # -- log, checkpoint --

    def _report(self, *, look: bool) -> None:
        row: Figures = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "learning_rate": self.settings.rate(self.step - 1),
        }
        row.update({name: total.item() / self._counts[name] for name, total in self._sums.items()})
        self._sums, self._counts = {}, {}
        if look:
            with self.averaged(), torch.no_grad(), autocast(self.device, self.settings.precision):
                row.update(self.part.held_out())
                self.part.pictures(self.folder, self.step)
        self.rows.append(row)
        replace_file(self.folder / LOG_FILE, lambda file: file.write_text(_csv(self.rows), "utf-8"))

    def save(self) -> None:
        """Write a checkpoint from which the training continues."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "weights": self.part.trained.state_dict(),
            "extra": self.part.extra_state(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rows": self.rows,
            "hardware": self.hardware,
        }
        replace_file(self.folder / CHECKPOINT_FILE, lambda file: torch.save(state, file))

    def _load(self, file: Path) -> None:
        try:
            state = load_tensors(file)
            self.part.trained.load_state_dict(state["weights"])
            self.part.load_extra_state(state["extra"])
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = self.device.type == "cuda"  # it may come from another device
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
            if state["scaler"]:  # empty where there was none
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.rows = list(state["rows"])
            self.hardware = [str(name) for name in state.get("hardware", [])]
        except Exception as error:  # torch names a broken file in a dozen ways
            raise RunError(
                f"{file} is not a checkpoint of this training ({error!s:.100}); remove "
                f"{self.folder} to begin again"
            ) from None
        logger.info("%s: continuing after step %d", self.folder, self.step)

    def _check_identity(self, wanted: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(wanted))
        file = self.folder / SETTINGS_FILE
        if not file.exists():
            replace_file(file, lambda f: f.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8"))
            return
        try:
            known = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise RunError(f"{file} is damaged; remove {self.folder} to begin again") from None
        for name in sorted({*known, *wanted}):
            if known.get(name) != wanted.get(name):
                raise RunError(
                    f"{self.folder} was trained with {name} {known.get(name)!r:.60}, this run asks "
                    f"for {wanted.get(name)!r:.60}; use the same settings, or another --out"
                )


#: Columns of the log that say nothing of the quality.
_PLAIN = ("step", "seconds", "learning_rate")


def _csv(rows: list[Figures]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.7g}" for name, value in row.items()})
    return text.getvalue()


@contextmanager
def read_ahead(
    part: Part, settings: LoopSettings, first: int, processes: int = 0
) -> Iterator[Iterator[Any]]:
    """What the steps from ``first`` on need from the disk, read some steps ahead.

    What a step reads depends on its number alone, not on who reads it.

    Args:
        part: Whose ``read`` is called.
        settings: Of its loop.
        first: Step to begin with.
        processes: That read; 0 or 1 for threads.
    """
    if processes > 1:
        loader = DataLoader(
            _Steps(part, settings),
            batch_size=None,
            sampler=range(first, settings.steps),
            num_workers=processes,
            multiprocessing_context="fork",  # the images are not copied
            worker_init_fn=_leave_interrupts_to_the_parent,
            pin_memory=torch.cuda.is_available(),
        )
        yield iter(loader)
        return
    threads = min(_MOST_READERS, available_cores())
    pool = ThreadPoolExecutor(threads, "psd-crops")

    def read(step: int) -> Any:
        return part.read(step, *settings.batch_at(step))

    def batches() -> Iterator[Any]:
        steps = iter(range(first, settings.steps))
        waiting = deque(pool.submit(read, step) for step in islice(steps, threads + 2))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(read, step) for step in islice(steps, 1))
            yield batch

    try:
        yield batches()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Steps(Dataset[Any]):
    """Step -> what it reads, for the loader's processes."""

    def __init__(self, part: Part, settings: LoopSettings) -> None:
        self.part, self.settings = part, settings

    def __getitem__(self, step: int) -> Any:
        return self.part.read(step, *self.settings.batch_at(step))


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the parent ends the readers when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
