"""Training of the segmentation head from a feature store (stage 2).

Adam on the weighted cross-entropy; validation on whole regions; the head that is best there is
kept. Everything that a step sees is a function of (seed, step), and the checkpoint holds everything
else, so that a training that was interrupted ends with the weights of one that was not.
"""

import csv
import io
import logging
import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from pathsegdiff.config import content_hash, order_taps
from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.confusion import confusion_matrix, scores
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.files import replace_file
from pathsegdiff.provenance import provenance
from pathsegdiff.segmentation.head import FCNHead, FeatureBatch
from pathsegdiff.segmentation.losses import (
    class_weights,
    cross_entropy_sums,
    predict_labels,
    weighted_cross_entropy,
)
from pathsegdiff.segmentation.passes import channel_statistics, class_pixel_counts
from pathsegdiff.segmentation.runs import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    CURVES_FILE,
    HEAD_FILE,
    LOG_FILE,
    RESULT_FILE,
    RunConfig,
    build_head,
    random_weights_note,
    read_config,
    save_head,
    write_json,
)
from pathsegdiff.segmentation.sampling import (
    CropRequest,
    RegionReader,
    crop_step,
    head_levels,
    prefetch,
    steps_per_epoch,
    training_requests,
)
from pathsegdiff.segmentation.splits import Parts, choose_parts

_logger = logging.getLogger(__name__)

DEFAULT_EPOCHS = 40
DEFAULT_BATCH_SIZE = 4
#: Whole regions up to here; of larger ones, crops: four of 384 px cost what one 768 px region does,
#: and a batch of four is from four images. Measured on 2 cores, `tiny`: 0.6 s per such step.
LARGEST_WHOLE_REGION_PX = 512
DEFAULT_CROP_PX = 384
SCHEDULES = ("constant", "cosine")
AUGMENTATIONS = ("none", "flips")
NORMALIZATIONS = ("channel", "none")
#: With --steps: at most this many validations, and none more often than once per epoch.
_MAX_VALIDATIONS = 20
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


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What decides the weights of a head, beside the features.

    Attributes:
        split: Trained on; None with a fold: every split.
        val: A fraction of the training groups, or a split; "0" for no validation.
        fold: Held out, or None.
        limit: Training images that are used, or None for all.
        epochs: Passes over the training part; None where ``steps`` is given.
        steps: Of the optimiser, or None.
        batch_size: Crops per step.
        crop_px: Side of a crop, None for whole regions.
        learning_rate: Of Adam.
        schedule: "constant", or "cosine" down to 0.
        taps: Read from the store, in tap order.
        head_width: W.
        augment: "none", or "flips" of the feature maps (not of the images: an approximation).
        normalize: "channel" standardises every feature channel, "none" does not.
        precision: Of the forward and backward pass.
        seed: Of the initial weights, the order, the crops and the validation groups.
    """

    split: str | None
    val: str = "0.2"
    fold: int | None = None
    limit: int | None = None
    epochs: int | None = DEFAULT_EPOCHS
    steps: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    crop_px: int | None = None
    learning_rate: float = 1e-4
    schedule: str = "constant"
    taps: tuple[str, ...]
    head_width: int
    augment: str = "none"
    normalize: str = "channel"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", order_taps(self.taps))
        if (self.epochs is None) == (self.steps is None):
            raise RunError("give --epochs or --steps, not both")
        for option, value in (
            ("--epochs", self.epochs),
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--limit-images", self.limit),
        ):
            if value is not None and value < 1:
                raise RunError(f"{option} must be at least 1, got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"--lr must be a number above 0, got {self.learning_rate}")
        if self.head_width < 4 or self.head_width % 4:
            raise RunError(f"--head-width must be a multiple of 4, got {self.head_width}")
        for option, name, choices in (
            ("--schedule", self.schedule, SCHEDULES),
            ("--augment", self.augment, AUGMENTATIONS),
            ("--normalize", self.normalize, NORMALIZATIONS),
        ):
            if name not in choices:
                raise RunError(f"{option} must be one of {', '.join(choices)}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "taps": list(self.taps)}

    def total_steps(self, num_samples: int) -> int:
        """Of the whole training."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * steps_per_epoch(num_samples, self.batch_size)

    def validation_interval(self, num_samples: int) -> int:
        """Steps between validations: an epoch, or more where many steps were asked for."""
        epoch = steps_per_epoch(num_samples, self.batch_size)
        if self.steps is None:
            return epoch
        return max(1, min(self.steps, max(epoch, self.steps // _MAX_VALIDATIONS)))


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where a training stands, after each step.

    Attributes:
        step: Steps done.
        total_steps: Of the whole training.
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
        best: Row of the log whose head was kept.
        seconds: Of training and validation, over all calls.
    """

    path: Path
    steps: int
    steps_done_now: int
    best: Row
    seconds: float


Progress = Callable[[TrainProgress], None]


def plan_settings(
    store: FeatureStore,
    *,
    crop_px: int | str | None = "auto",
    head_width: int | None = None,
    split: str | None = None,
    fold: int | None = None,
    taps: Sequence[str] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    **others: Any,
) -> TrainSettings:
    """Fill in what a store decides: split, crop, taps and head width.

    Args:
        crop_px: "auto" for whole regions up to 512 px and 384 px crops of larger ones.
        head_width: None for the width that the store's model names.
        others: Further fields of ``TrainSettings``.

    Raises:
        RunError: If a setting is outside what it can be, or does not fit the store.
    """
    levels = head_levels(store, taps)
    if crop_px == "auto":
        crop_px = _default_crop(store.region_px, crop_step(levels))
    assert crop_px is None or isinstance(crop_px, int)
    if crop_px == store.region_px:
        crop_px = None
    RegionReader(store, levels, crop_px)  # refuses a crop that does not fit
    if epochs is None and steps is None:
        epochs = DEFAULT_EPOCHS
    if split is None and fold is None:
        split = store.card.default_train
    return TrainSettings(
        split=split,
        fold=fold,
        crop_px=crop_px,
        taps=tuple(tap for level in levels for tap, _ in level.taps),
        head_width=int(store.model["head_width"]) if head_width is None else head_width,
        epochs=epochs,
        steps=steps,
        **others,
    )


def default_run_name(store: FeatureStore, settings: TrainSettings) -> str:
    """Name of a run folder: the store's, and each setting that is not the default."""
    usual = plan_settings(store).to_dict()
    chosen = settings.to_dict()
    name = Path(store.path).name.removesuffix(".zarr")
    short = {"learning_rate": "lr", "batch_size": "batch", "head_width": "width", "crop_px": "crop"}
    for field_name, value in chosen.items():
        # The split says nothing more with a fold, nor the absence of epochs beside steps.
        if value == usual[field_name] or (value is None and field_name != "crop_px"):
            continue
        if field_name == "taps":
            value = "-".join(value) if len(value) <= 3 else content_hash(value)[:8]
        name += f"-{short.get(field_name, field_name)}-{'none' if value is None else value}"
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def train_head(
    store: FeatureStore,
    out: Path,
    settings: TrainSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TrainResult:
    """Train a head, or continue the training that ``out`` holds; nothing to do if it is finished.

    Args:
        store: Open for reading.
        out: Run folder to make or continue.
        settings: What decides the weights.
        device: Where to compute.
        progress: Called after each step.

    Raises:
        RunError: If the settings do not fit the store, ``out`` holds a run with other settings or
            something else, another process trains into it, or the loss is not finite.
        KeyboardInterrupt: After Ctrl-C, with a checkpoint of the last finished step.
    """
    device = torch.device(device)
    parts = choose_parts(
        store,
        split=settings.split,
        val=settings.val,
        fold=settings.fold,
        seed=settings.seed,
        limit=settings.limit,
    )
    with _only_trainer(out):
        known = (out / CONFIG_FILE).exists()
        config = _run_config(
            store, settings, parts, device, known=read_config(out) if known else None
        )
        if known:
            _refuse_other_settings(out, config)
            if (out / RESULT_FILE).exists():
                return _finished_before(out)
        else:
            write_json(out / CONFIG_FILE, config.to_dict())
        training = _Training(store, out, config, settings, parts, device, progress)
        training.resume_or_begin()
        return training.run()


class _Training:
    """The state of one training, and its loop."""

    def __init__(
        self,
        store: FeatureStore,
        out: Path,
        config: RunConfig,
        settings: TrainSettings,
        parts: Parts,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.store, self.out, self.config = store, out, config
        self.settings, self.parts, self.device = settings, parts, device
        self.progress = progress
        self.total_steps = settings.total_steps(len(parts.train))
        self.interval = settings.validation_interval(len(parts.train))
        self.epoch_steps = steps_per_epoch(len(parts.train), settings.batch_size)
        self.reader = RegionReader(store, config.levels, settings.crop_px)
        self.whole = RegionReader(store, config.levels)
        self.weights = torch.tensor(config.class_weights, device=device)
        # On the CPU and from a generator of its own: the same start on every device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = build_head(config)
        self.head.to(device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.learning_rate)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=settings.precision == "float16" and device.type == "cuda"
        )
        self.step = 0
        self.loss_sum, self.loss_steps = 0.0, 0
        self.rows: list[Row] = []
        self.best: Row | None = None
        self.seconds = 0.0
        self._began, self._steps_before = time.monotonic(), 0
        self._seconds_before = 0.0
        self._last_checkpoint = self._last_curves = self._began

    def resume_or_begin(self) -> None:
        """Continue from the checkpoint where there is one, else look at the features first."""
        file = self.out / CHECKPOINT_FILE
        if file.exists():
            self._load_checkpoint(file)
            _logger.info(
                "%s: continuing after step %d of %d", self.out, self.step, self.total_steps
            )
        elif self.settings.normalize == "channel":
            _logger.info("channel statistics of %d training samples", len(self.parts.train))
            statistics = channel_statistics(self.store, self.config.levels, self.parts.train)
            self.head.set_normalization(
                {
                    name: (torch.from_numpy(mean), torch.from_numpy(std))
                    for name, (mean, std) in statistics.items()
                }
            )
        self._began, self._steps_before = time.monotonic(), self.step
        self._seconds_before = self.seconds
        self._last_checkpoint = self._last_curves = self._began

    def run(self) -> TrainResult:
        """Train to the end."""
        consistent = True
        jobs = (
            partial(self._read_training_batch, step) for step in range(self.step, self.total_steps)
        )
        with _deferred_interrupt() as interrupt, closing(prefetch(jobs)) as batches:
            try:
                self._validate_if_due(interrupt)
                for batch in batches:
                    consistent = False
                    loss = self._train_step(batch)
                    consistent = True
                    row = self._validate_if_due(interrupt)
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

    def _read_training_batch(self, step: int) -> FeatureBatch:
        requests = training_requests(
            self.reader,
            self.parts.train,
            step,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            flips=self.settings.augment == "flips",
        )
        return self.reader.read(requests)

    def _learning_rate(self, step: int) -> float:
        rate = self.settings.learning_rate
        if self.settings.schedule == "constant":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.total_steps))

    def _train_step(self, batch: FeatureBatch) -> float:
        self.head.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        batch = batch.to(self.device)
        assert batch.labels is not None
        with autocast(self.device, self.settings.precision):
            logits = self.head(batch)
        loss = weighted_cross_entropy(logits, batch.labels, self.weights)
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(self._diverged(value))
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
        remedy = (
            f"--lr {self.settings.learning_rate / 10:g} (it was {self.settings.learning_rate:g})"
        )
        if self.settings.precision != "float32":
            remedy = f"--precision float32, or {remedy}"
        elif self.settings.normalize == "none":
            remedy = f"--normalize channel, or {remedy}"
        return (
            f"{self.out}: the loss is {loss} at step {self.step + 1} of {self.total_steps}; "
            f"{kept}; train again with {remedy}, and another --out"
        )

    # -- validation --

    def _validate_if_due(self, interrupt: "_Interrupt") -> Row | None:
        due = self.step > 0 and (self.step % self.interval == 0 or self.step == self.total_steps)
        if not due or (self.rows and self.rows[-1]["step"] == self.step):
            return None
        row: Row = {
            "step": self.step,
            "epoch": self.step / self.epoch_steps,
            "loss": self.loss_sum / max(1, self.loss_steps),
            "learning_rate": self._learning_rate(self.step - 1),
        }
        row.update(self._validate(interrupt))
        self.seconds = self._seconds_before + time.monotonic() - self._began
        row["seconds"] = round(self.seconds, 3)
        self.rows.append(row)
        self.loss_sum, self.loss_steps = 0.0, 0
        if self.best is None or _quality(row) > _quality(self.best) or not self.parts.val:
            self.best = row
            metadata = {key: repr(value) for key, value in row.items()}
            save_head(self.out / HEAD_FILE, self.head, metadata)
        replace_file(self.out / LOG_FILE, lambda file: file.write_text(_csv(self.rows), "utf-8"))
        self._save_checkpoint()
        if time.monotonic() - self._last_curves > _CURVES_SECONDS:
            self._write_curves()
        return row

    def _validate(self, interrupt: "_Interrupt") -> Row:
        if not self.parts.val:
            return {}
        num_classes = self.store.card.scheme.num_classes
        confusion = np.zeros((num_classes, num_classes), np.int64)
        total = weight = 0.0
        for batch, logits in region_logits(
            self.head, self.whole, self.parts.val, self.device, self.settings.precision
        ):
            interrupt.raise_if_requested()
            assert batch.labels is not None
            part, part_weight = cross_entropy_sums(
                logits, batch.labels.to(self.device), self.weights
            )
            total, weight = total + part.item(), weight + part_weight.item()
            predicted = predict_labels(logits, num_classes)[0].cpu().numpy()
            confusion += confusion_matrix(batch.labels[0].numpy(), predicted, num_classes)
        pooled = scores(confusion)
        return {
            "val_loss": total / weight if weight else math.nan,
            "val_miou": pooled.miou,
            "val_dice": pooled.dice,
            "val_accuracy": pooled.accuracy,
        }

    # -- what is left behind --

    def _report(self, loss: float, row: Row | None) -> None:
        if row is not None:
            _logger.debug("%s", row)
        if self.progress is None:
            return
        elapsed = max(1e-9, time.monotonic() - self._began)
        rate = (self.step - self._steps_before) / elapsed
        self.progress(
            TrainProgress(
                step=self.step,
                total_steps=self.total_steps,
                epoch=-(-self.step // self.epoch_steps),
                loss=loss,
                steps_per_second=rate,
                seconds_left=(self.total_steps - self.step) / max(rate, 1e-9),
                row=row,
            )
        )

    def _save_checkpoint(self) -> None:
        self.seconds = self._seconds_before + time.monotonic() - self._began
        state = {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "rows": self.rows,
            "best": self.best,
            "seconds": self.seconds,
        }
        replace_file(self.out / CHECKPOINT_FILE, lambda file: torch.save(state, file))
        self._last_checkpoint = time.monotonic()

    def _load_checkpoint(self, file: Path) -> None:
        try:
            # Only tensors and plain values: a checkpoint from elsewhere cannot run code.
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(file, map_location=self.device, weights_only=True)
            self.head.load_state_dict(state["head"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.loss_sum, self.loss_steps = float(state["loss_sum"]), int(state["loss_steps"])
            self.rows, self.best = list(state["rows"]), state["best"]
        except Exception as error:  # whatever the parsers make of a damaged file
            reason = str(error).split("\n", 1)[0][:200] or type(error).__name__
            raise RunError(
                f"{file} is damaged ({reason}); delete it to begin this run anew"
            ) from None

    def _write_curves(self) -> None:
        if self.rows:
            replace_file(self.out / CURVES_FILE, lambda file: draw_curves(file, self.rows))
        self._last_curves = time.monotonic()

    def _finish(self) -> TrainResult:
        assert self.best is not None
        self._write_curves()
        result = {
            "steps": self.step,
            "best": _json_row(self.best),
            "last": _json_row(self.rows[-1]),
            "seconds": round(self.seconds, 3),
            "device": device_name(self.device),
        }
        write_json(self.out / RESULT_FILE, result)
        (self.out / CHECKPOINT_FILE).unlink(missing_ok=True)
        return TrainResult(
            path=self.out,
            steps=self.step,
            steps_done_now=self.step - self._steps_before,
            best=self.best,
            seconds=self.seconds,
        )


def region_logits(
    head: FCNHead,
    reader: RegionReader,
    samples: Sequence[StoredSample],
    device: torch.device | str,
    precision: str = "float32",
) -> Iterator[tuple[FeatureBatch, torch.Tensor]]:
    """Logits of whole regions, one sample after the other, the next ones being read meanwhile.

    Yields:
        (batch of one sample as it was read, (1, K, H, W) float32 logits on the device).
    """
    device = torch.device(device)
    head.eval()
    jobs = (partial(reader.read, [CropRequest(sample=sample)]) for sample in samples)
    with closing(prefetch(jobs)) as batches:
        for batch in batches:
            # Not around the yield: the caller's code is not ours to switch gradients off for.
            with torch.no_grad(), autocast(device, precision):
                logits = head(batch.to(device))
            yield batch, logits.float()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision, or nothing in float32."""
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def device_name(device: torch.device) -> str:
    """For provenance."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def draw_curves(path: Path, rows: Sequence[Row]) -> None:
    """Loss and validation scores over the steps, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, score_axes = figure.subplots(1, 2)
    for axes, names, title in (
        (loss_axes, (("loss", "training"), ("val_loss", "validation")), "weighted cross-entropy"),
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


def _default_crop(region_px: int, step_px: int) -> int | None:
    if region_px <= LARGEST_WHOLE_REGION_PX:
        return None
    return max(step_px, DEFAULT_CROP_PX // step_px * step_px)


def _run_config(
    store: FeatureStore,
    settings: TrainSettings,
    parts: Parts,
    device: torch.device,
    known: RunConfig | None,
) -> RunConfig:
    """The config of this training; the class counts of ``known`` are not made again."""
    levels = head_levels(store, settings.taps)
    scheme = store.card.scheme
    config = RunConfig(
        settings=settings.to_dict(),
        store_path=str(Path(store.path).resolve()),
        recipe=store.recipe,
        card=store.card,
        model=store.model,
        levels=levels,
        num_outputs=scheme.num_outputs,
        head_width=settings.head_width,
        class_pixels=(),
        class_weights=(),
        samples=parts.to_dict(),
        notes=random_weights_note(store.model),
        provenance=provenance(device=device_name(device), features=store.provenance),
    )
    if known is not None:
        return replace(config, class_pixels=known.class_pixels, class_weights=known.class_weights)
    counts = class_pixel_counts(store, parts.train)
    try:
        weights = class_weights(counts, scheme.num_outputs)
    except ValueError:
        present = [name for name, count in zip(scheme.names, counts, strict=False) if count]
        raise RunError(
            f"the {len(parts.train)} training samples hold pixels of "
            f"{' '.join(present) or 'no class'} only; a head needs at least two classes to learn, "
            "check the masks with `psd data check`"
        ) from None
    return replace(
        config,
        class_pixels=tuple(int(count) for count in counts),
        class_weights=tuple(float(weight) for weight in weights),
    )


def _refuse_other_settings(out: Path, config: RunConfig) -> None:
    differing = read_config(out).differences(config)
    if differing:
        name, theirs, ours = differing[0]
        others = (
            f" ({', '.join(name for name, _, _ in differing[1:])} too)" if differing[1:] else ""
        )
        raise RunError(
            f"{out} was trained with {name} {_short(theirs)}, this run asks for {_short(ours)}"
            f"{others}; use another --out, or the same settings to continue it"
        )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _finished_before(out: Path) -> TrainResult:
    import json

    try:
        result = json.loads((out / RESULT_FILE).read_text(encoding="utf-8"))
        best = {
            key: math.nan if value is None else float(value)
            for key, value in result["best"].items()
        }
        return TrainResult(
            path=out,
            steps=int(result["steps"]),
            steps_done_now=0,
            best=best,
            seconds=float(result["seconds"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{out / RESULT_FILE} is damaged ({error!r}); train again into another --out"
        ) from None


def _quality(row: Row) -> float:
    value = row.get("val_miou", math.nan)
    return -math.inf if math.isnan(value) else value


def _json_row(row: Row) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.8g}" for key, value in row.items()})
    return text.getvalue()


@contextmanager
def _only_trainer(out: Path) -> Iterator[None]:
    """Make the folder and lock it for this process; the system gives it back when that ends."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose another --out")
    if out.is_dir() and not (out / CONFIG_FILE).exists():
        others = [
            path.name for path in out.iterdir() if path.name not in (".lock", f".{CONFIG_FILE}.new")
        ]
        if others:
            raise RunError(
                f"{out} exists and is no run folder ({others[0]} is in it); choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{out}: another process is training into this run; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Interrupt:
    """Whether Ctrl-C was pressed since the training began."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        """The signal handler: remember the first, obey the second."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def raise_if_requested(self) -> None:
        """Stop here, where the state is whole."""
        if self.requested:
            raise KeyboardInterrupt


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupt]:
    """Let Ctrl-C wait for the end of a step: half a step would leave half-updated weights."""
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous or signal.default_int_handler)
