"""Stage 2 beside the plain way: the folded first layer, the whole step, the step with reading."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pathsegdiff.device import autocast
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.pipeline.bench.extraction import plain_file
from pathsegdiff.pipeline.bench.measure import Spread, in_turns, peak_bytes, ratio
from pathsegdiff.pipeline.bench.plain import load_batch
from pathsegdiff.segmentation.head import FCNHead, FeatureBatch
from pathsegdiff.segmentation.losses import weighted_cross_entropy
from pathsegdiff.segmentation.sampling import CropRequest, RegionReader, head_levels, prefetch
from pathsegdiff.segmentation.train import adam, standardise

_LEARNING_RATE = 1e-4
#: Of a run with reading: so many that reading ahead has something to hide behind.
_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class HeadSpeed:
    """What ``measure_head`` found; seconds, and how many times faster ours is.

    Attributes:
        precision, batch_size: Of both.
        width: Of the first layer.
        first_layer: Forward and gradient of the weights.
        step: Forward, loss, backward and Adam, on a batch in memory.
        step_with_reading: Four of them, each batch read from the disk; ours ahead, on a thread.
        input_bytes: Of what the first layer reads, float32: plain, ours.
        output_difference, gradient_difference: Largest ``|a - b| / max|b|`` in float32.
    """

    precision: str
    batch_size: int
    width: int
    first_layer: dict[str, Spread]
    step: dict[str, Spread]
    step_with_reading: dict[str, Spread]
    input_bytes: list[int]
    output_difference: float
    gradient_difference: float


class _Training:
    """A head and what it is trained on, either way."""

    def __init__(
        self,
        store: FeatureStore,
        plain: Path,
        samples: Sequence[StoredSample],
        device: torch.device,
        precision: str,
        width: int,
    ) -> None:
        self.store, self.plain, self.samples = store, plain, list(samples)
        self.device, self.precision = device, precision
        levels = head_levels(store)
        self.reader = RegionReader(store, levels)
        self.num_classes = store.card.scheme.num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = FCNHead(levels, self.num_classes, width).to(device).train()
        standardise(self.head, store, self.samples)
        self.adam = adam(self.head, _LEARNING_RATE)
        self.plain_adam = torch.optim.Adam(self.head.parameters(), lr=_LEARNING_RATE)
        self.weights = torch.ones(self.num_classes, device=device)

    def read_ours(self) -> FeatureBatch:
        """The samples as one batch, from the store."""
        return self.reader.read([CropRequest(sample=sample) for sample in self.samples])

    def read_plain(self) -> Tensor:
        """The samples as one batch, from the array files."""
        return load_batch([plain_file(self.plain, s.sample_id) for s in self.samples])

    def logits(self, batch: FeatureBatch | Tensor) -> Tensor:
        """Forward pass, by the form that the batch is for."""
        with autocast(self.device, self.precision):
            if isinstance(batch, Tensor):
                return self.head.forward_dense(batch.to(self.device))
            return self.head(batch.to(self.device))

    def step(self, batch: FeatureBatch | Tensor, labels: Tensor) -> None:
        """One step of the training."""
        loss = weighted_cross_entropy(self.logits(batch), labels, self.weights)
        optimizer = self.plain_adam if isinstance(batch, Tensor) else self.adam
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def read_and_step_ours(self, labels: Tensor) -> None:
        """Some steps, each batch read from the store while the one before is trained on."""
        with closing(prefetch([self.read_ours] * _STEPS)) as batches:
            for batch in batches:
                self.step(batch, labels)

    def read_and_step_plain(self, labels: Tensor) -> None:
        """As many steps, each batch loaded first."""
        for _ in range(_STEPS):
            self.step(self.read_plain(), labels)

    def first_layer(self, batch: FeatureBatch | Tensor) -> Tensor:
        """The first convolution and the gradient of its weights."""
        self.head.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            if isinstance(batch, Tensor):
                projected = self.head.project(
                    self.head._standardise(batch.to(self.device), slice(None))
                )
            else:
                projected = self.head._project_levels(batch.to(self.device))
        projected.float().square().mean().backward()
        return projected


def measure_head(
    store: FeatureStore,
    plain: Path,
    device: torch.device,
    *,
    precision: str,
    batch_size: int,
    width: int,
    runs: int,
) -> HeadSpeed:
    """Time the head on whole regions, either way, in turns.

    Args:
        store: Complete samples.
        plain: The same samples as array files.
        batch_size: Regions of a step.
        width: Of the first layer.
    """
    training = _Training(store, plain, store.samples()[:batch_size], device, precision, width)
    ours, theirs = training.read_ours(), training.read_plain()
    assert ours.labels is not None
    labels = ours.labels.to(device)
    output, gradient = _differences(training, ours, theirs, labels)

    def both(folded: Callable[[], object], dense: Callable[[], object]) -> dict[str, Spread]:
        seconds = in_turns({"plain": dense, "ours": folded}, runs, device)
        return {
            "plain": Spread.of(seconds["plain"]),
            "ours": Spread.of(seconds["ours"]),
            "ratio": ratio(seconds["plain"], seconds["ours"]),
        }

    return HeadSpeed(
        precision=precision,
        batch_size=batch_size,
        width=width,
        first_layer=both(lambda: training.first_layer(ours), lambda: training.first_layer(theirs)),
        step=both(lambda: training.step(ours, labels), lambda: training.step(theirs, labels)),
        step_with_reading=both(
            lambda: training.read_and_step_ours(labels),
            lambda: training.read_and_step_plain(labels),
        ),
        input_bytes=[
            theirs.numel() * 4,
            sum(values.numel() for values in ours.levels.values()) * 4,
        ],
        output_difference=output,
        gradient_difference=gradient,
    )


def peak_of_step(
    store: str, plain: Path, device: str, precision: str, batch_size: int, width: int, ours: bool
) -> int:
    """Peak memory of two training steps in a process of its own, either way."""
    return peak_bytes(_train_alone, store, str(plain), device, precision, batch_size, width, ours)


def _train_alone(
    store: str, plain: str, device: str, precision: str, batch_size: int, width: int, ours: bool
) -> None:
    opened = FeatureStore.open(store)
    training = _Training(
        opened,
        Path(plain),
        opened.samples()[:batch_size],
        torch.device(device),
        precision,
        width,
    )
    labels = [torch.from_numpy(opened.label(sample).copy()) for sample in training.samples]
    stacked = torch.stack(labels).to(device)
    for _ in range(2):
        training.step(training.read_ours() if ours else training.read_plain(), stacked)


def _differences(
    training: _Training, ours: FeatureBatch, theirs: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Of the logits, and of the gradient of the first layer's weights, in float32.

    The plain batch is made from the store, so that both forms read the same float16 values.
    """
    same = torch.from_numpy(np.stack([training.store.dense(s) for s in training.samples]))
    assert same.shape == theirs.shape
    precision, training.precision = training.precision, "float32"
    found = []
    for batch in (ours, same):
        training.head.zero_grad(set_to_none=True)
        logits = training.logits(batch)
        weighted_cross_entropy(logits, labels, training.weights).backward()
        gradient = training.head.project.weight.grad
        assert gradient is not None
        found.append((logits.detach(), gradient.clone()))
    training.precision = precision
    training.head.zero_grad(set_to_none=True)
    (a, a_gradient), (b, b_gradient) = found
    return _relative(a, b), _relative(a_gradient, b_gradient)


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()
