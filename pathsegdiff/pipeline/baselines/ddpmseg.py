"""DDPMSeg on cached features: an ensemble of pixel classifiers on several timesteps.

Baranchuk et al. 2022, "Label-efficient semantic segmentation with diffusion models",
https://arxiv.org/abs/2112.03126: decoder blocks at t = 50, 150 and 250, ten perceptrons, a majority
vote. Their blocks 5, 6, 7, 8 and 12 of 18 are those that make maps of strides 8, 4 and 2; here five
taps in a row, of strides 8 and 4 with the paper's autoencoder, 16 and 8 with one of stride 8. The
features are those of the model that was extracted with, parts and metrics those of every row, the
loss that of the heads.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathsegdiff.config import order_taps
from pathsegdiff.device import device_name
from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.confusion import confusion_matrix
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.interrupt import Interrupt
from pathsegdiff.pipeline.baselines.ensemble import PixelEnsemble, PixelInput
from pathsegdiff.pipeline.baselines.pixels import (
    PixelReader,
    draw_pixels,
    pixel_inputs,
    samples_of_all,
)
from pathsegdiff.pipeline.baselines.runs import NETWORK_FILE, BaselineConfig, read_baseline
from pathsegdiff.pipeline.baselines.scoring import score_baseline
from pathsegdiff.provenance import provenance
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
from pathsegdiff.segmentation.losses import weighted_cross_entropy
from pathsegdiff.segmentation.passes import class_pixel_counts
from pathsegdiff.segmentation.runs import (
    CONFIG_FILE,
    load_weights,
    no_weights,
    random_weights_note,
    save_weights,
    write_json,
)
from pathsegdiff.segmentation.sampling import prefetch
from pathsegdiff.segmentation.scoring import Evaluation, Prediction, partial_note
from pathsegdiff.segmentation.scoring import Progress as ScoringProgress
from pathsegdiff.segmentation.splits import divide, warn_if_partial
from pathsegdiff.segmentation.train import KEEPS, checked_class_weights

NAME = "ddpm-seg"
TITLE = "DDPMSeg, ten pixel classifiers on cached features"
#: Of the authors.
TIMESTEPS = (50, 150, 250)
TAPS = ("up_05", "up_06", "up_07", "up_08", "up_09")
MEMBERS = 10
#: Drawn once, of all training images together: 0.3 GB of `tiny`, 1.2 GB of the paper's model.
PIXELS = 100_000
DEFAULT_BATCH_SIZE = 64
DEFAULT_EPOCHS = 4
DEFAULT_LEARNING_RATE = 1e-3
_VALIDATIONS = {"best": 10, "last": 4}
_BATCH_STREAM = 12
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """What decides the weights of an ensemble, beside the samples.

    Attributes:
        features: Fingerprints of the stores, in their order.
        split: Trained on; None with a fold: every split.
        val: A fraction of the training groups, or a split; "0" for no validation.
        fold: Held out, or None.
        limit: Training images that are used, or None for all.
        steps: Of the optimiser; None for four times as many as there are batches of drawn pixels.
        batch_size: Pixels of each member per step.
        learning_rate: Of Adam, constant.
        keep: The weights that are "best" on validation, or the "last".
        seed: Of the initial weights, the pixels, the batches and the parts.
    """

    features: tuple[str, ...]
    split: str | None = None
    val: str = "0.2"
    fold: int | None = None
    limit: int | None = None
    steps: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    learning_rate: float = DEFAULT_LEARNING_RATE
    keep: str = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--steps", self.steps, 1),
            ("--batch-size", self.batch_size, 2),
            ("--limit-images", self.limit, 1),
        ):
            if value is not None and value < least:
                raise RunError(f"{option} must be at least {least}, got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"--lr must be a number above 0, got {self.learning_rate}")
        if self.keep not in KEEPS:
            raise RunError(f"--keep must be one of {', '.join(KEEPS)}, got {self.keep!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": NAME, **asdict(self), "features": list(self.features)}


class DDPMSeg:
    """An ensemble, its stores and its parts: what is trained and what is scored.

    Args:
        stores: Of ``open_stores``: one for each timestep.
        others: Fields of ``EnsembleSettings`` beside the features; None of split means the data
            set's own, unless there is a fold.
        eval_split: Scored; None for the held-out fold, else for what the data set names.

    Raises:
        RunError: If the settings do not fit the stores, or no sample of the evaluated split is
            there.

    Attributes:
        parts: As ``psd train-head`` with the same settings has them on the first store.
        part: Name of what is scored.
        evaluated: The samples of it.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], *, eval_split: str | None = None, **others: Any
    ) -> None:
        self.stores = tuple(stores)
        self.card, self.model = stores[0].card, stores[0].model
        if others.get("split") is None and others.get("fold") is None:
            others["split"] = self.card.default_train
        fingerprints = tuple(store.fingerprint for store in stores)
        self.settings = EnsembleSettings(features=fingerprints, **others)
        self.reader = PixelReader(stores, pixel_inputs(stores, order_taps(TAPS)))
        self.samples = samples_of_all(stores)
        self.parts = divide(
            self.samples,
            self.card,
            stores[0].path,
            split=self.settings.split,
            val=self.settings.val,
            fold=self.settings.fold,
            seed=self.settings.seed,
            limit=self.settings.limit,
        )
        self.part, self.evaluated = self._evaluated(eval_split)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Of the stores."""
        return tuple(store.recipe.timestep for store in self.stores)

    def default_name(self) -> str:
        """Name of a run folder: data set, model, and each setting that is not the usual one."""
        usual = EnsembleSettings(
            features=self.settings.features, split=self.card.default_train
        ).to_dict()
        name = f"{self.card.name}-{self.model['name']}-{NAME}"
        if self.timesteps != TIMESTEPS:
            name += f"-t{'-'.join(map(str, self.timesteps))}"
        return folder_name(name, self.settings.to_dict(), usual)

    def train(
        self,
        out: Path,
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> TrainResult:
        """Train, or continue the training that ``out`` holds; nothing to do if it is finished.

        Raises:
            RunError: If ``out`` holds a run with other settings or something else, another process
                trains into it, or the loss is not finite.
            StoreError: If a sample is damaged.
            KeyboardInterrupt: After Ctrl-C, with a checkpoint of the last finished step.
        """
        device = torch.device(device)
        scheme = self.card.scheme
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            network = PixelEnsemble(self.reader.inputs, scheme.num_classes, MEMBERS)
        with only_trainer(out):
            counts = class_pixel_counts(self.stores[0], self.parts.train)
            weights = checked_class_weights(
                counts, scheme, scheme.num_classes, len(self.parts.train)
            )
            config = self._config(network, counts, weights, device)
            if (out / CONFIG_FILE).exists():
                refuse_differences(out, read_baseline(out).differences(config))
                finished = finished_before(out)
                if finished is not None:
                    return finished
            else:
                first = self.stores[0]
                warn_if_partial(self.parts, first.path, self.samples, first.registered())
                write_json(out / CONFIG_FILE, config.to_dict())
            _logger.info("drawing pixels of %d images", len(self.parts.train))
            pixels, labels = draw_pixels(
                self.reader,
                self.parts.train,
                PIXELS,
                num_classes=scheme.num_classes,
                seed=self.settings.seed,
            )
            network.set_normalization(pixels)
            training = _Training(
                out, network.to(device), self, pixels, labels, weights, device, progress
            )
            training.resume_or_begin()
            return training.run()

    def evaluate(
        self,
        path: Path,
        *,
        device: torch.device | str = "cpu",
        progress: ScoringProgress | None = None,
    ) -> Evaluation:
        """Score the kept ensemble and write RUN/eval-PART, as ``psd eval`` does.

        Raises:
            RunError: If there is none yet, or it is damaged.
            StoreError: If a sample is damaged.
        """
        device = torch.device(device)
        config = read_baseline(path)
        network, metadata = load_ensemble(path, config)
        return score_baseline(
            _EnsembleSegmenter(network.to(device), self.reader),
            path,
            config,
            metadata,
            card=self.card,
            part=self.part,
            evaluated=self.evaluated,
            samples=self.samples,
            device=device,
            notes=(
                *random_weights_note(self.model),
                *partial_note(self.part, self.evaluated, self.stores[0].registered()),
            ),
            sources={
                "features": [
                    {
                        "path": store.path,
                        "fingerprint": store.fingerprint,
                        "recipe": store.recipe.to_dict(),
                        "made": store.provenance,
                    }
                    for store in self.stores
                ],
                "model": self.model,
            },
            progress=progress,
        )

    def _evaluated(self, split: str | None) -> tuple[str, tuple[StoredSample, ...]]:
        if split is None and self.parts.held_out:
            return f"fold{self.settings.fold}", self.parts.held_out
        part = split or self.card.default_eval
        samples = tuple(sample for sample in self.samples if sample.split == part)
        if not samples:
            there = ", ".join(sorted({sample.split for sample in self.samples})) or "none"
            raise RunError(
                f"{self.stores[0].path} has no complete sample of split {part!r} (complete: "
                f"{there}); name one with --eval-split, or extract it with `psd extract`"
            )
        return part, samples

    def _config(
        self, network: PixelEnsemble, counts: np.ndarray, weights: np.ndarray, device: torch.device
    ) -> BaselineConfig:
        return BaselineConfig(
            settings=self.settings.to_dict(),
            dataset_sha256=self.stores[0].recipe.dataset_sha256,
            dataset=self.card.to_dict(),
            network={
                "name": NAME,
                "title": f"{TITLE} of {self.model['name']} at t = "
                f"{', '.join(map(str, self.timesteps))}",
                "model_sha256": self.model["sha256"],
                "timesteps": list(self.timesteps),
                "taps": list(TAPS),
                "members": MEMBERS,
                "channels": self.reader.channels,
                "inputs": [part.to_dict() for part in self.reader.inputs],
                "parameters": sum(p.numel() for p in network.parameters()),
            },
            class_pixels=tuple(int(count) for count in counts),
            class_weights=tuple(float(weight) for weight in weights),
            samples=self.parts.to_dict(),
            provenance=provenance(device=device_name(device)),
            method={
                "optimiser": "Adam, constant learning rate",
                "loss": "class-weighted cross-entropy of single pixels",
                "pixels": PIXELS,
                "members": MEMBERS,
                "normalisation": "each channel standardised by the drawn pixels",
            },
        )


def load_ensemble(path: Path, config: BaselineConfig) -> tuple[PixelEnsemble, dict[str, str]]:
    """The trained ensemble of a run, on the CPU, and the metadata of its file.

    Raises:
        RunError: If there is none yet, the run is of another baseline, or it does not fit.
    """
    if config.settings.get("name") != NAME:
        raise RunError(f"{path} is a run of {config.settings.get('name')}, not of {NAME}")
    file = path / NETWORK_FILE
    if not file.is_file():
        raise no_weights(path, NETWORK_FILE, f"psd baseline {NAME}")
    try:
        inputs = [PixelInput.from_dict(part) for part in config.network["inputs"]]
        members = int(config.network["members"])
        network = PixelEnsemble(inputs, len(config.class_weights), members)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path / CONFIG_FILE} describes no ensemble: {error!r}") from None
    metadata = load_weights(file, network)
    return network.requires_grad_(False).eval(), metadata


class _Training(TrainingLoop[tuple[Tensor, Tensor]]):
    """The training of one ensemble; a batch is (M, B, C) features and (M, B) labels."""

    def __init__(
        self,
        out: Path,
        network: PixelEnsemble,
        made: DDPMSeg,
        pixels: Tensor,
        labels: Tensor,
        weights: np.ndarray,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.made, self.pixels, self.labels = made, pixels, labels
        settings = made.settings
        self.settings = settings
        self.weights = torch.from_numpy(weights).float().to(device)
        epoch_steps = -(-len(pixels) // settings.batch_size)
        super().__init__(
            out,
            network,
            torch.optim.Adam(network.parameters(), lr=settings.learning_rate, fused=True),
            device=device,
            precision="float32",
            epoch_steps=epoch_steps,
            total_steps=settings.steps or DEFAULT_EPOCHS * epoch_steps,
            validates=bool(made.parts.val),
            keeps_best=settings.keep == "best",
            progress=progress,
        )

    def read_batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.settings.seed, _BATCH_STREAM, step))
        chosen = rng.integers(len(self.pixels), size=(MEMBERS, self.settings.batch_size))
        index = torch.from_numpy(chosen)
        return self.pixels[index].float(), self.labels[index]

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of the members' losses, each of its own batch: they train as if alone."""
        pixels, labels = (part.to(self.device) for part in batch)
        logits = self.network(pixels)
        losses = [
            weighted_cross_entropy(one.T[None, :, :, None], label[None, :, None], self.weights)
            for one, label in zip(logits, labels, strict=True)
        ]
        return torch.stack(losses).sum()

    def learning_rate(self, step: int) -> float:
        return self.settings.learning_rate

    def validation_is_due(self) -> bool:
        before = self.rows[-1]["step"] if self.rows else 0
        assert self.total_steps is not None
        return (self.step - before) * _VALIDATIONS[self.settings.keep] >= self.total_steps

    def validate(self, interrupt: Interrupt) -> Row:
        num_classes = len(self.weights)
        confusion = np.zeros((num_classes, num_classes), np.int64)
        assert isinstance(self.network, PixelEnsemble)
        segmenter = _EnsembleSegmenter(self.network, self.made.reader)
        for found in segmenter.predictions(self.made.parts.val):
            interrupt.raise_if_requested()
            confusion += confusion_matrix(found.target, found.labels, num_classes)
        return validation_scores(confusion)

    def keep(self, metadata: dict[str, str]) -> None:
        save_weights(self.out / NETWORK_FILE, self.network, metadata)

    def lower_rate(self) -> str:
        rate = self.settings.learning_rate
        return f"--lr {rate / 10:g} (it was {rate:g})"


class _EnsembleSegmenter:
    """An ensemble that reads stores."""

    def __init__(self, network: PixelEnsemble, reader: PixelReader) -> None:
        self.network, self.reader = network, reader

    def predictions(self, samples: Sequence[StoredSample]) -> Iterator[Prediction]:
        self.network.eval()
        store, device = self.reader.stores[0], self.network.mean.device
        jobs = (partial(self.reader.maps, sample) for sample in samples)
        with closing(prefetch(jobs)) as read:
            for sample, maps in zip(samples, read, strict=True):
                tensors = [torch.from_numpy(one).to(device).float() for one in maps]
                with torch.no_grad():
                    shares = self.network.votes(tensors, store.patch_px, store.patches_per_side)
                yield Prediction(
                    sample=sample,
                    target=self.reader.label(sample),
                    labels=shares.argmax(dim=0).to(torch.uint8).cpu().numpy(),
                    probabilities=shares,
                )

    def image(self, sample: StoredSample) -> np.ndarray:
        return self.reader.stores[0].image(sample)

    def instances(self, sample: StoredSample) -> np.ndarray:
        instances = self.reader.stores[0].instances(sample)
        assert instances is not None
        return instances
