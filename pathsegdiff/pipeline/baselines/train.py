"""The training of a baseline on images in memory.

AdamW with a short warm-up and a cosine, over a number of steps or a time; class-weighted
cross-entropy plus soft Dice. The weights that are best on validation are kept, or the last.
Shapes: S = ``size_px``, H = W = region_px, K = classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.device import autocast
from pathsegdiff.evaluation.confusion import confusion_matrix
from pathsegdiff.interrupt import Interrupt
from pathsegdiff.pipeline.baselines.dcan import DCAN
from pathsegdiff.pipeline.baselines.images import ImageBatch, Picture, to_tensor, training_batch
from pathsegdiff.pipeline.baselines.networks import normalise
from pathsegdiff.pipeline.baselines.runs import (
    NETWORK_FILE,
    PATIENCE,
    VALIDATIONS,
    WARM_UP_STEPS,
    WEIGHT_DECAY,
    BaselineSettings,
)
from pathsegdiff.segmentation.loop import Progress, Row, TrainingLoop, validation_scores
from pathsegdiff.segmentation.losses import (
    cross_entropy_sums,
    predict_labels,
    soft_dice_loss,
    soft_dice_sums,
    weighted_cross_entropy,
)
from pathsegdiff.segmentation.runs import save_weights
from pathsegdiff.segmentation.sampling import steps_per_epoch


class BaselineTraining(TrainingLoop[ImageBatch]):
    """The training of one network.

    Args:
        out: Folder of the run.
        network: On ``device``.
        settings: What decides the weights.
        train: Its labels are (S, S).
        val: Its labels are (H, W).
        weights: (K,) of the classes.
        device: Where to compute.
        progress: Called after each step.
    """

    loss_title = "weighted cross-entropy + soft Dice"

    def __init__(
        self,
        out: Path,
        network: nn.Module,
        settings: BaselineSettings,
        train: Sequence[Picture],
        val: Sequence[Picture],
        weights: Tensor,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.settings, self.train, self.val, self.weights = settings, train, val, weights
        self.contour_weights = _contour_weights(train, device)
        super().__init__(
            out,
            network,
            torch.optim.AdamW(
                network.parameters(),
                lr=settings.learning_rate,
                weight_decay=WEIGHT_DECAY,
                fused=True,  # of FCN-8s' 134 million parameters in a seventh of the time, on a CPU
            ),
            device=device,
            precision=settings.precision,
            epoch_steps=steps_per_epoch(len(train), settings.batch_size),
            total_steps=settings.steps,
            validates=bool(val),
            keeps_best=settings.keep == "best",
            progress=progress,
        )

    def read_batch(self, step: int) -> ImageBatch:
        """The images of a step."""
        return training_batch(
            self.train, step, batch_size=self.settings.batch_size, seed=self.settings.seed
        )

    def loss_of(self, batch: ImageBatch) -> Tensor:
        """Cross-entropy plus soft Dice."""
        labels = batch.labels.to(self.device)
        images = normalise(batch.images.to(self.device), self.network)
        if isinstance(self.network, DCAN):
            assert batch.contours is not None
            return self._loss_with_contours(images, labels, batch.contours.to(self.device))
        with autocast(self.device, self.precision):
            logits = self.network(images)
        dice = soft_dice_loss(soft_dice_sums(logits, labels, len(self.weights)))
        return weighted_cross_entropy(logits, labels, self.weights) + dice

    def _loss_with_contours(self, images: Tensor, labels: Tensor, contours: Tensor) -> Tensor:
        """That of the sum of DCAN's levels, and of each level by itself, which fades.

        Chen et al. lower the weight of the levels tenfold in steps; here it falls linearly to 0.
        """
        edge_weights = self.contour_weights
        assert isinstance(self.network, DCAN) and edge_weights is not None
        num_classes = len(self.weights)
        with autocast(self.device, self.precision):
            levels = self.network.levels(images)

        def entropies(logits: Tensor) -> Tensor:
            objects, edges = logits[:, :num_classes], logits[:, num_classes:]
            of_classes = weighted_cross_entropy(objects, labels, self.weights)
            return of_classes + weighted_cross_entropy(edges, contours, edge_weights)

        whole = torch.stack([level.float() for level in levels]).sum(dim=0)
        loss = entropies(whole)
        loss = loss + soft_dice_loss(soft_dice_sums(whole[:, :num_classes], labels, num_classes))
        fading = 1 - min(1.0, self._share(self.step))
        for level in levels:
            loss = loss + fading * entropies(level)
        return loss

    def learning_rate(self, step: int) -> float:
        """Up within the first steps, then a cosine over steps or time down to 0."""
        warm_up = WARM_UP_STEPS
        if self.total_steps is not None:
            warm_up = max(1, min(warm_up, self.total_steps // 10))
        share = min(1.0, self._share(step))
        rising = min(1.0, (step + 1) / warm_up)
        return self.settings.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * share))

    def validation_is_due(self) -> bool:
        """After each twentieth of the training, in which earlier validations do not count."""
        if self.total_steps is None:
            before = self.rows[-1]["seconds"] if self.rows else 0.0
            assert self.settings.minutes is not None
            return (self.elapsed() - before) * VALIDATIONS >= self.settings.minutes * 60
        before = self.rows[-1]["step"] if self.rows else 0
        return (self.step - before) * VALIDATIONS >= self.total_steps

    def is_finished(self) -> bool:
        """At the end of the steps or the time, or where validation no longer improves."""
        return self._share(self.step) >= 1 or self._patience_is_over()

    def expected_steps(self) -> int:
        """As given, or at the rate so far."""
        if self.total_steps is not None:
            return self.total_steps
        share = self._share(self.step)
        return self.step if share >= 1 else max(self.step + 1, round(self.step / max(share, 1e-6)))

    def outcome(self) -> dict[str, Any]:
        """Why the training ended."""
        if self._share(self.step) >= 1:
            return {"ended": f"after {self.settings.length()}"}
        return {"ended": f"no improvement in {PATIENCE} validations"}

    def validate(self, interrupt: Interrupt) -> Row:
        """On whole regions, at their own size."""
        num_classes = len(self.weights)
        confusion = np.zeros((num_classes, num_classes), np.int64)
        total = weight = 0.0
        dice = torch.zeros(3, num_classes, dtype=torch.float64)
        for picture in self.val:
            interrupt.raise_if_requested()
            side = len(picture.label)
            logits = region_logits(self.network, picture.image, side, self.device, self.precision)
            logits = logits[:, :num_classes]
            labels = torch.from_numpy(picture.label)[None].to(self.device)
            part, part_weight = cross_entropy_sums(logits, labels, self.weights)
            total, weight = total + part.item(), weight + part_weight.item()
            dice += soft_dice_sums(logits, labels, num_classes).cpu()
            predicted = predict_labels(logits, num_classes)[0].cpu().numpy()
            confusion += confusion_matrix(picture.label, predicted, num_classes)
        loss = total / weight + soft_dice_loss(dice).item() if weight else math.nan
        return {"val_loss": loss, **validation_scores(confusion)}

    def keep(self, metadata: dict[str, str]) -> None:
        """The network's file."""
        save_weights(self.out / NETWORK_FILE, self.network, metadata)

    def lower_rate(self) -> str:
        """Float32 first where it is not."""
        rate = self.settings.learning_rate
        remedy = f"--lr {rate / 10:g} (it was {rate:g})"
        return remedy if self.precision == "float32" else f"--precision float32, or {remedy}"

    def _share(self, step: int) -> float:
        """Of the training that is done."""
        if self.total_steps is not None:
            return step / self.total_steps
        assert self.settings.minutes is not None
        return self.elapsed() / (60 * self.settings.minutes)

    def _patience_is_over(self) -> bool:
        if not self.keeps_best or self.kept is None:
            return False
        return sum(row["step"] > self.kept["step"] for row in self.rows) >= PATIENCE


def region_logits(
    network: nn.Module,
    image: np.ndarray,
    region_px: int,
    device: torch.device,
    precision: str = "float32",
) -> Tensor:
    """Logits of a region from its image at the network's size.

    Args:
        network: On ``device``; put into evaluation mode.
        image: (S, S, 3) uint8 RGB.
        region_px: H.

    Returns:
        (1, K, H, W) float32 on the device, (1, K + 2, H, W) of DCAN; bilinear where S is not H.
    """
    network.eval()
    with torch.no_grad(), autocast(device, precision):
        logits = network(normalise(to_tensor(image)[None].to(device), network))
    if logits.shape[-1] == region_px:
        return logits.float()
    return F.interpolate(logits.float(), size=region_px, mode="bilinear", align_corners=False)


def _contour_weights(train: Sequence[Picture], device: torch.device) -> Tensor | None:
    """(2,) of no contour and contour, by the rule of the classes; None without contours."""
    shares = [picture.contour.mean() for picture in train if picture.contour is not None]
    if not shares:
        return None
    share = float(np.mean(shares))
    # A training part without a single edge: both alike, so that the loss stays finite.
    weights = [share, 1 - share] if 0 < share < 1 else [0.5, 0.5]
    return torch.tensor(weights, device=device)
