"""Training of the segmentation head from a feature store (stage 2).

Adam on the weighted cross-entropy; validation on whole regions. Under a constant learning rate the
head that is best there is kept, under one that falls to 0 the last.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathsegdiff.config import content_hash, order_head_inputs
from pathsegdiff.data.labels import LabelScheme
from pathsegdiff.device import autocast, device_name
from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.confusion import confusion_matrix
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.interrupt import Interrupt
from pathsegdiff.provenance import provenance
from pathsegdiff.segmentation.head import FCNHead, FeatureBatch
from pathsegdiff.segmentation.loop import (
    Progress,
    Row,
    TrainingLoop,
    TrainResult,
    finished_before,
    folder_name,
    only_trainer,
    refuse_differences,
    validation_scores,
)
from pathsegdiff.segmentation.losses import (
    class_weights,
    cross_entropy_sums,
    predict_labels,
    weighted_cross_entropy,
)
from pathsegdiff.segmentation.passes import channel_statistics, class_pixel_counts
from pathsegdiff.segmentation.runs import (
    CONFIG_FILE,
    HEAD_FILE,
    RunConfig,
    build_head,
    random_weights_note,
    read_config,
    save_weights,
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
from pathsegdiff.segmentation.splits import Parts, choose_parts, warn_if_partial

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
KEEPS = ("best", "last")
#: With --steps: at most this many validations, and none more often than once per epoch. Where they
#: choose nothing, a few are enough for the curve.
_MAX_VALIDATIONS = {"best": 20, "last": 6}


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
        keep: The head that is "best" on validation, or the "last".
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
    keep: str = "best"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", order_head_inputs(self.taps))
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
            ("--keep", self.keep, KEEPS),
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
        return max(1, min(self.steps, max(epoch, self.steps // _MAX_VALIDATIONS[self.keep])))


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
    schedule: str = "constant",
    keep: str | None = None,
    **others: Any,
) -> TrainSettings:
    """Fill in what a store decides: split, crop, taps and head width.

    Args:
        crop_px: "auto" for whole regions up to 512 px and 384 px crops of larger ones.
        head_width: None for the width that the store's model names.
        keep: None for the last head under a cosine, for the best on validation otherwise: one of
            few images is a noisy judge, and under a cosine the last head is the better one
            (docs/results.md).
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
        schedule=schedule,
        keep=("last" if schedule == "cosine" else "best") if keep is None else keep,
        **others,
    )


def default_run_name(store: FeatureStore, settings: TrainSettings) -> str:
    """Name of a run folder: the store's, and each setting that is not the default."""
    usual = plan_settings(store, schedule=settings.schedule).to_dict()
    chosen = settings.to_dict()
    usual["schedule"] = "constant"
    if chosen["taps"] != usual["taps"]:
        taps = chosen["taps"]
        chosen["taps"] = "-".join(taps) if len(taps) <= 3 else content_hash(taps)[:8]
    return folder_name(Path(store.path).name.removesuffix(".zarr"), chosen, usual)


def parts_of(store: FeatureStore, settings: TrainSettings) -> Parts:
    """What trains, validates and is held out; see ``splits.choose_parts``.

    Raises:
        RunError: If a part would be empty, or a name is unknown.
    """
    return choose_parts(
        store,
        split=settings.split,
        val=settings.val,
        fold=settings.fold,
        seed=settings.seed,
        limit=settings.limit,
    )


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
    parts = parts_of(store, settings)
    with only_trainer(out):
        known = (out / CONFIG_FILE).exists()
        config = _run_config(
            store, settings, parts, device, known=read_config(out) if known else None
        )
        if known:
            refuse_differences(out, read_config(out).differences(config))
            finished = finished_before(out)
            if finished is not None:
                return finished
        else:
            warn_if_partial(parts, store.path, store.samples(), store.registered())
            write_json(out / CONFIG_FILE, config.to_dict())
        training = _Training(store, out, config, settings, parts, device, progress)
        training.resume_or_begin()
        return training.run()


class _Training(TrainingLoop[FeatureBatch]):
    """The training of a head."""

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
        self.store, self.config = store, config
        self.settings, self.parts = settings, parts
        self.interval = settings.validation_interval(len(parts.train))
        self.reader = RegionReader(store, config.levels, settings.crop_px)
        self.whole = RegionReader(store, config.levels)
        self.weights = torch.tensor(config.class_weights, device=device)
        # On the CPU and from a generator of its own: the same start on every device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = build_head(config)
        self.head.to(device)
        super().__init__(
            out,
            self.head,
            adam(self.head, settings.learning_rate),
            device=device,
            precision=settings.precision,
            epoch_steps=steps_per_epoch(len(parts.train), settings.batch_size),
            total_steps=settings.total_steps(len(parts.train)),
            validates=bool(parts.val),
            keeps_best=settings.keep == "best",
            progress=progress,
        )

    def begin(self) -> None:
        """Look at the features first."""
        if self.settings.normalize == "channel":
            _logger.info("channel statistics of %d training samples", len(self.parts.train))
            standardise(self.head, self.store, self.parts.train)

    def read_batch(self, step: int) -> FeatureBatch:
        """The crops of a step."""
        requests = training_requests(
            self.reader,
            self.parts.train,
            step,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            flips=self.settings.augment == "flips",
        )
        return self.reader.read(requests)

    def loss_of(self, batch: FeatureBatch) -> torch.Tensor:
        """The weighted cross-entropy."""
        batch = batch.to(self.device)
        assert batch.labels is not None
        with autocast(self.device, self.settings.precision):
            logits = self.head(batch)
        return weighted_cross_entropy(logits, batch.labels, self.weights)

    def learning_rate(self, step: int) -> float:
        """Constant, or a cosine down to 0."""
        rate = self.settings.learning_rate
        if self.settings.schedule == "constant":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.expected_steps()))

    def validation_is_due(self) -> bool:
        """At regular steps."""
        return self.step % self.interval == 0

    def validate(self, interrupt: Interrupt) -> Row:
        """On whole regions."""
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
        loss = total / weight if weight else math.nan
        return {"val_loss": loss, **validation_scores(confusion)}

    def keep(self, metadata: dict[str, str]) -> None:
        """The head file."""
        save_weights(self.out / HEAD_FILE, self.head, metadata)

    def lower_rate(self) -> str:
        """Another setting first where one is to blame more likely."""
        rate = self.settings.learning_rate
        remedy = f"--lr {rate / 10:g} (it was {rate:g})"
        if self.settings.precision != "float32":
            return f"--precision float32, or {remedy}"
        if self.settings.normalize == "none":
            return f"--normalize channel, or {remedy}"
        return remedy


def adam(head: FCNHead, learning_rate: float) -> torch.optim.Adam:
    """The paper's optimizer; one pass over the weights instead of six."""
    return torch.optim.Adam(head.parameters(), lr=learning_rate, fused=True)


def standardise(head: FCNHead, store: FeatureStore, samples: Sequence[StoredSample]) -> None:
    """Let a head standardise its features by their mean and deviation over some samples."""
    statistics = channel_statistics(store, head.levels, samples)
    head.set_normalization(
        {
            name: (torch.from_numpy(mean), torch.from_numpy(std))
            for name, (mean, std) in statistics.items()
        }
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


def checked_class_weights(
    counts: np.ndarray, scheme: LabelScheme, num_outputs: int, num_samples: int
) -> np.ndarray:
    """``class_weights`` of the training part.

    Args:
        counts: (num_classes,) its pixels of each class.
        scheme: Of the data set, for the message.
        num_outputs: num_classes, or one more where the last output is don't care.
        num_samples: Of the training part.

    Raises:
        RunError: If fewer than two classes have pixels.
    """
    try:
        return class_weights(counts, num_outputs)
    except ValueError:
        present = [name for name, count in zip(scheme.names, counts, strict=False) if count]
        raise RunError(
            f"the {num_samples} training samples hold pixels of "
            f"{' '.join(present) or 'no class'} only; a head needs at least two classes to learn, "
            "check the masks with `psd data check`"
        ) from None


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
    weights = checked_class_weights(counts, scheme, scheme.num_outputs, len(parts.train))
    return replace(
        config,
        class_pixels=tuple(int(count) for count in counts),
        class_weights=tuple(float(weight) for weight in weights),
    )
