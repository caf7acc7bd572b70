"""A baseline from its data set to its report: the parts, the training, the evaluation."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pathsegdiff.data.manifest import Dataset, Region
from pathsegdiff.device import device_name
from pathsegdiff.errors import RunError
from pathsegdiff.features.store import StoredSample
from pathsegdiff.pipeline.baselines.images import Images, Picture
from pathsegdiff.pipeline.baselines.networks import (
    architecture_of,
    build_network,
    network_facts,
    on_device,
)
from pathsegdiff.pipeline.baselines.runs import (
    BaselineConfig,
    BaselineSettings,
    load_baseline,
    read_baseline,
)
from pathsegdiff.pipeline.baselines.scoring import score_baseline
from pathsegdiff.pipeline.baselines.train import BaselineTraining, region_logits
from pathsegdiff.provenance import provenance
from pathsegdiff.segmentation.loop import (
    Progress,
    TrainResult,
    finished_before,
    only_trainer,
    refuse_differences,
)
from pathsegdiff.segmentation.losses import predict_labels
from pathsegdiff.segmentation.runs import CONFIG_FILE, write_json
from pathsegdiff.segmentation.sampling import prefetch
from pathsegdiff.segmentation.scoring import (
    Evaluation,
    Prediction,
)
from pathsegdiff.segmentation.scoring import Progress as ScoringProgress
from pathsegdiff.segmentation.splits import divide
from pathsegdiff.segmentation.train import checked_class_weights

_logger = logging.getLogger(__name__)


class Baseline:
    """A network, a data set and its parts: what is trained and what is scored.

    Raises:
        RunError: If the settings do not fit the data set, or no sample of the evaluated split is
            there.

    Attributes:
        images: The data set.
        parts: As ``psd train-head`` with the same settings has them on a store of it.
        part: Name of what is scored.
        evaluated: The samples of it.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: BaselineSettings,
        *,
        eval_split: str | None = None,
        encoder_weights: Path | None = None,
    ) -> None:
        self.settings, self.encoder_weights = settings, encoder_weights
        self.images = Images(dataset, settings.size_px)
        self.parts = divide(
            self.images.samples,
            self.images.card,
            f"data set {dataset.name}",
            split=settings.split,
            val=settings.val,
            fold=settings.fold,
            seed=settings.seed,
            limit=settings.limit,
        )
        self.part, self.evaluated = self._evaluated(eval_split)
        self.contours = architecture_of(settings.name).decoder == "DCAN"
        if self.contours and not dataset.manifest.has_whole_objects:
            raise RunError(
                f"{settings.name} learns the contours of objects, data set {dataset.name} "
                "numbers none in its masks, or cuts windows; choose another baseline"
            )

    def train(
        self,
        out: Path,
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> TrainResult:
        """Train, or continue the training that ``out`` holds; nothing to do if it is finished.

        Args:
            out: Run folder to make or continue.
            device: Where to compute.
            progress: Called after each step.

        Raises:
            RunError: If the package is missing, ``out`` holds a run with other settings or
                something else, another process trains into it, or the loss is not finite.
            DataError: If an image cannot be read.
            KeyboardInterrupt: After Ctrl-C, with a checkpoint of the last finished step.
        """
        device = torch.device(device)
        settings = self.settings
        num_classes = self.images.card.scheme.num_classes
        network = build_network(
            settings.name, num_classes, seed=settings.seed, encoder_weights=self.encoder_weights
        )
        with only_trainer(out):
            config = self._config(network, device)
            known = (out / CONFIG_FILE).exists()
            if known:
                refuse_differences(out, read_baseline(out).differences(config))
                finished = finished_before(out)
                if finished is not None:
                    return finished
            counts = len(self.parts.train), len(self.parts.val)
            _logger.info("reading %d images to train on, %d to validate on", *counts)
            train = self.images.pictures(self.parts.train, to_train=True, contours=self.contours)
            val = self.images.pictures(self.parts.val, to_train=False)
            config = self._with_weights(config, train)
            if not known:
                write_json(out / CONFIG_FILE, config.to_dict())
            weights = torch.tensor(config.class_weights, device=device)
            training = BaselineTraining(
                out, on_device(network, device), settings, train, val, weights, device, progress
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
        """Score the kept network and write RUN/eval-PART, as ``psd eval`` does.

        Args:
            path: The run.
            device: Where to compute, in float32.
            progress: Called with (done, total, what).

        Raises:
            RunError: If there is no network yet, or it is damaged.
            DataError: If an image cannot be read.
        """
        device = torch.device(device)
        config = read_baseline(path)
        network, metadata = load_baseline(path, config)
        return score_baseline(
            _NetworkSegmenter(on_device(network, device), self.images, device),
            path,
            config,
            metadata,
            card=self.images.card,
            part=self.part,
            evaluated=self.evaluated,
            samples=self.images.samples,
            device=device,
            progress=progress,
        )

    def _evaluated(self, split: str | None) -> tuple[str, tuple[StoredSample, ...]]:
        if split is None and self.parts.held_out:
            return f"fold{self.settings.fold}", self.parts.held_out
        part = split or self.images.card.default_eval
        samples = tuple(sample for sample in self.images.samples if sample.split == part)
        if not samples:
            there = ", ".join(self.images.dataset.splits)
            raise RunError(
                f"data set {self.images.card.name}: no image of split {part!r} is here (there are "
                f"{there}); name one with --eval-split"
            )
        return part, samples

    def _config(self, network: nn.Module, device: torch.device) -> BaselineConfig:
        return BaselineConfig(
            settings=self.settings.to_dict(),
            dataset_sha256=self.images.dataset.sha256,
            dataset=self.images.card.to_dict(),
            network=network_facts(
                self.settings.name,
                network,
                self.encoder_weights,
                self.settings.encoder_weights,
            ),
            class_pixels=(),
            class_weights=(),
            samples=self.parts.to_dict(),
            provenance=provenance(device=device_name(device)),
        )

    def _with_weights(self, config: BaselineConfig, train: Sequence[Picture]) -> BaselineConfig:
        scheme = self.images.card.scheme
        counts = np.sum([picture.class_pixels for picture in train], axis=0)
        weights = checked_class_weights(counts, scheme, scheme.num_classes, len(train))
        return replace(
            config,
            class_pixels=tuple(int(count) for count in counts),
            class_weights=tuple(float(weight) for weight in weights),
        )


class _NetworkSegmenter:
    """A network that reads a data set's images."""

    def __init__(self, network: nn.Module, images: Images, device: torch.device) -> None:
        self.network, self.images, self.device = network, images, device
        self.num_classes = images.card.scheme.num_classes
        self._latest: tuple[str, Region] | None = None

    def predictions(self, samples: Sequence[StoredSample]) -> Iterator[Prediction]:
        jobs = (partial(self._read, sample) for sample in samples)
        with closing(prefetch(jobs)) as regions:
            for sample, (region, image) in zip(samples, regions, strict=True):
                self._latest = sample.sample_id, region
                # In float32 whatever the training computed in, as the head's evaluation.
                outputs = region_logits(self.network, image, len(region.label), self.device)
                logits, edges = outputs[:, : self.num_classes], outputs[0, self.num_classes :]
                yield Prediction(
                    sample=sample,
                    target=region.label,
                    labels=predict_labels(logits, self.num_classes)[0].cpu().numpy(),
                    probabilities=logits[0].softmax(dim=0),
                    contours=edges.softmax(dim=0)[1] if len(edges) else None,
                )

    def image(self, sample: StoredSample) -> np.ndarray:
        return self._region(sample).image

    def instances(self, sample: StoredSample) -> np.ndarray:
        instances = self._region(sample).instances
        assert instances is not None
        return instances

    def _read(self, sample: StoredSample) -> tuple[Region, np.ndarray]:
        region = self.images.region(sample)
        return region, self.images.resized(region.image)

    def _region(self, sample: StoredSample) -> Region:
        assert self._latest is not None and self._latest[0] == sample.sample_id
        return self._latest[1]
