"""An ensemble of perceptrons that classify pixels by their features.

DDPMSeg's: Baranchuk et al. 2022, https://arxiv.org/abs/2112.03126, appendix A.

Shapes: M = members, B = pixels of a batch, C = channels of a pixel, K = classes, P = side of a
patch, n = patches along a side of a region, c = cells of a patch along a side at a map's stride.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Hidden layers of each member where K is below 30, as in every data set here.
_FIRST, _SECOND = 128, 32
#: Weights begin normal with this deviation.
_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class PixelInput:
    """One feature map that the members read, in the order of their channels.

    Attributes:
        store: Which of the stores it is in.
        level: Its name there.
        taps: Of the level, in the store's order.
        channels: Of these.
        stride: Of the level, pixels.
    """

    store: int
    level: str
    taps: tuple[str, ...]
    channels: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "taps": list(self.taps)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PixelInput":
        """Read what ``to_dict`` wrote."""
        return cls(**{**values, "taps": tuple(values["taps"])})


class PixelEnsemble(nn.Module):
    """M perceptrons of three layers, side by side.

    Each is Linear, ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear. The channels are standardised
    first, by buffers that are set from the training pixels (the authors take them as they are).

    Args:
        inputs: Where the C channels come from.
        num_classes: K.
        members: M.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: Sequence[PixelInput], num_classes: int, members: int) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.members, self.num_classes = members, num_classes
        channels = sum(part.channels for part in inputs)
        sizes = (channels, _FIRST, _SECOND, num_classes)
        self.weights = nn.ParameterList(
            _SPREAD * torch.randn(members, after, before)
            for before, after in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(members, size) for size in sizes[1:])
        self.norms = nn.ModuleList(nn.BatchNorm1d(members * size) for size in sizes[1:-1])
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def set_normalization(self, pixels: Tensor) -> None:
        """Standardise by the mean and deviation of (N, C) pixels; constant channels by 1."""
        mean, square = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
        for part in pixels.split(4096):
            mean += part.double().sum(dim=0)
        mean /= len(pixels)
        for part in pixels.split(4096):
            square += (part.double() - mean).square().sum(dim=0)
        deviation = (square / len(pixels)).sqrt()
        constant = deviation <= 1e-6 * mean.abs().clamp_min(1e-6)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(constant, 1.0, deviation))

    def forward(self, pixels: Tensor) -> Tensor:
        """(M, B, C) features, other pixels for each member, to (M, B, K) logits."""
        x = (pixels - self.mean) / self.deviation
        last = len(self.weights) - 1
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias[:, None], x, weight.mT)
            if number < last:
                members, batch, width = x.shape
                flat = F.relu(x).transpose(0, 1).reshape(batch, members * width)
                x = self.norms[number](flat).view(batch, members, width).transpose(0, 1)
        return x

    def votes(self, maps: Sequence[Tensor], patch_px: int, patches: int) -> Tensor:
        """Shares of the members that vote for each class, at every pixel of a region.

        The same as ``forward`` of every pixel's features, upsampled bilinearly patch by patch. The
        first layer is linear, so it is applied at each map's own resolution and upsampled after.

        Args:
            maps: Of ``inputs``, (C_i, n * c, n * c) each, float32 on the network's device.
            patch_px: P.
            patches: n.

        Returns:
            (K, n * P, n * P) float32 on the network's device.
        """
        first = self.weights[0] / self.deviation
        bias = self.biases[0] - (first @ self.mean)
        projected: dict[int, Tensor] = {}
        offset = 0
        for part, features in zip(self.inputs, maps, strict=True):
            weight = first[:, :, offset : offset + part.channels].flatten(0, 1)
            offset += part.channels
            found = (weight @ features.flatten(1)).unflatten(1, features.shape[1:])
            known = projected.get(part.stride)
            projected[part.stride] = found if known is None else known + found
        shares = torch.zeros(
            self.num_classes, patches * patch_px, patches * patch_px, device=self.mean.device
        )
        for row in range(patches):
            for column in range(patches):
                place = _square(row, column, patch_px)
                for member in range(self.members):
                    channels = slice(member * _FIRST, (member + 1) * _FIRST)
                    hidden = bias[member].view(1, -1, 1, 1)
                    for stride, found in projected.items():
                        cells = found[channels][_square(row, column, patch_px // stride)]
                        hidden = hidden + F.interpolate(
                            cells[None], size=patch_px, mode="bilinear", align_corners=False
                        )
                    winner = self._rest(hidden[0].flatten(1), member).argmax(dim=0)
                    vote = F.one_hot(winner, self.num_classes).T.view(-1, patch_px, patch_px)
                    shares[place] += vote
        return shares / self.members

    def _rest(self, x: Tensor, member: int) -> Tensor:
        """(128, pixels) of the first layer to (K, pixels) logits of a member, in evaluation."""
        for number, norm in enumerate(self.norms):
            width = len(x)
            channels = slice(member * width, (member + 1) * width)
            assert isinstance(norm, nn.BatchNorm1d)
            assert norm.running_var is not None and norm.running_mean is not None
            scale = norm.weight[channels] / (norm.running_var[channels] + norm.eps).sqrt()
            shift = norm.bias[channels] - norm.running_mean[channels] * scale
            x = F.relu(x) * scale[:, None] + shift[:, None]
            x = self.weights[number + 1][member] @ x + self.biases[number + 1][member][:, None]
        return x


def _square(row: int, column: int, side: int) -> tuple[slice, slice, slice]:
    """Index of a patch in (channels, rows, columns)."""
    rows = slice(row * side, (row + 1) * side)
    return slice(None), rows, slice(column * side, (column + 1) * side)
