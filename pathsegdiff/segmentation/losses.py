"""The training losses: cross-entropy weighted against the frequency of the classes, soft Dice.

W_c = 1 - N_c / N, where N_c counts the training pixels of class c and N those of all classes. The
don't-care class counts neither in N nor in the loss: its weight is 0, and it is never predicted.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_IGNORED = -100


def class_weights(pixel_counts: np.ndarray, num_outputs: int) -> np.ndarray:
    """W_c = 1 - N_c / N of the classes, 0 for a don't-care output.

    Args:
        pixel_counts: (num_classes,) training pixels of each class, without don't care.
        num_outputs: num_classes, or one more where the last output is don't care.

    Returns:
        (num_outputs,) float32.

    Raises:
        ValueError: If fewer than two classes have pixels, so that nothing can be learnt.
    """
    if np.count_nonzero(pixel_counts) < 2:
        raise ValueError(f"fewer than two classes have pixels: {pixel_counts.tolist()}")
    counts = pixel_counts.astype(np.float64)
    weights = np.zeros(num_outputs, np.float32)
    weights[: len(counts)] = 1.0 - counts / counts.sum()
    return weights


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over the pixels of W_label * -log softmax(logits)[label], divided by the sum of W_label.

    That is PyTorch's mean reduction with class weights.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) integer class ids; pixels whose class has weight 0 (don't care), or no
            output at all, are left out.
        weights: (K,) of the outputs.

    Returns:
        () float32; exactly 0 (with a gradient of 0) where no pixel counts.
    """
    total, weight = cross_entropy_sums(logits, labels, weights)
    # A crop that holds nothing but don't care would be 0 / 0.
    return total / weight.clamp_min(torch.finfo(torch.float32).tiny)


def cross_entropy_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of ``weighted_cross_entropy``, to pool it over batches."""
    target = labels.long()
    outputs = target.clamp_max(len(weights) - 1)
    # Gathered once: what a pixel weighs, 0 where it has no output or its class does not count.
    pixel_weights = torch.where(target < len(weights), weights[outputs], 0.0)
    target = torch.where(pixel_weights > 0, target, _IGNORED)
    total = F.cross_entropy(
        logits.float(), target, weight=weights, ignore_index=_IGNORED, reduction="sum"
    )
    return total, pixel_weights.sum()


def soft_dice_sums(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sums of the soft Dice of each class, to pool it over batches.

    Args:
        logits: (B, K, H, W), K = num_classes.
        labels: (B, H, W) integer class ids; num_classes or more is left out.
        num_classes: Without don't care.

    Returns:
        (3, num_classes) float32: of p * g, of p and of g, with g = 1 where the label is the class
        and p = softmax(logits).
    """
    probabilities = logits.float().softmax(dim=1)
    target = labels.long()
    counted = (target < num_classes).unsqueeze(1)
    truth = F.one_hot(target.clamp_max(num_classes - 1), num_classes).movedim(-1, 1) * counted
    probabilities = probabilities * counted
    pixels = (0, 2, 3)
    return torch.stack(
        [
            (probabilities * truth).sum(pixels),
            probabilities.sum(pixels),
            truth.sum(pixels).to(probabilities.dtype),
        ]
    )


def soft_dice_loss(sums: Tensor) -> Tensor:
    """1 - 2 sum(p g) / (sum p + sum g), the mean over the classes that occur in the labels.

    Milletari et al. 2016 (https://arxiv.org/abs/1606.04797), without their squares.

    Args:
        sums: (3, K) of ``soft_dice_sums``.

    Returns:
        () in [0, 1]; exactly 0 (with a gradient of 0) where no pixel counts.
    """
    both, predicted, true = sums
    occurs = true > 0
    loss = (1 - 2 * both / (predicted + true).clamp_min(torch.finfo(sums.dtype).tiny)) * occurs
    return loss.sum() / occurs.sum().clamp_min(1)


def predict_labels(logits: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) uint8 class ids: the largest logit among the classes, don't care left out.

    Args:
        logits: (B, K, H, W), K = num_classes or one more.
        num_classes: Without don't care.
    """
    return logits[:, :num_classes].argmax(dim=1).to(torch.uint8)
