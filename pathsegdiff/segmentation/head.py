"""The segmentation head: the paper's FCN, in its plain form and folded over the levels of a store.

The plain form reads the dense map f (B, C, M, N) on the stride-4 grid. Its first convolution is
linear and so is bilinear upsampling, so the two can change places: the nine taps of the 3x3 kernel
are one matrix product at each level's own resolution, and what is upsampled and shifted is the
product (W channels instead of C, separable matrices). Both forms have the same parameters, the same
values and the same gradients, up to rounding; the folded one needs several times fewer operations
and never holds f.

Shapes: B = batch, C = feature channels, W = head width, K = outputs; M, N = rows and columns of the
stride-4 grid; h, w = rows and columns of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.config import HEAD_INPUTS
from pathsegdiff.products import times

#: Image pixels per cell of the grid that the head reads; it multiplies by four again.
GRID_STRIDE = 4
#: The paper's width (17,470,150 parameters at 7296 channels and 6 outputs).
PAPER_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class HeadLevel:
    """The taps of one stride that a head reads, concatenated along channels in this order.

    Attributes:
        name: Of the store's array.
        stride: Image pixels per cell.
        taps: (name, channels) of each.
    """

    name: str
    stride: int
    taps: tuple[tuple[str, int], ...]

    @property
    def channels(self) -> int:
        """Of all its taps together."""
        return sum(channels for _, channels in self.taps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        taps = [[name, channels] for name, channels in self.taps]
        return {"name": self.name, "stride": self.stride, "taps": taps}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HeadLevel":
        """Read what ``to_dict`` wrote; KeyError, TypeError or ValueError if it did not."""
        taps = tuple((str(name), int(channels)) for name, channels in values["taps"])
        return cls(name=str(values["name"]), stride=int(values["stride"]), taps=taps)


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """What the folded head reads: windows of the levels, and how each is brought onto the grid.

    Attributes:
        levels: name -> (B, C_level, h, w) features, any floating dtype.
        rows: name -> (1 or B, M, h) bilinear weights; absent for a level on the grid itself.
        columns: name -> (1 or B, N, w), likewise.
        labels: (B, 4 M, 4 N) uint8 class ids, where they are known.
    """

    levels: dict[str, Tensor]
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return len(next(iter(self.levels.values())))

    def to(self, device: torch.device | str) -> "FeatureBatch":
        """The same batch on a device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(
            self,
            levels=moved(self.levels),
            rows=moved(self.rows),
            columns=moved(self.columns),
            labels=labels,
        )


class FCNHead(nn.Module):
    """Conv 3x3, two transposed convolutions that double, conv 3x3: features to K logits per pixel.

    The input channels of the first convolution are in the order of the dense map (``HEAD_INPUTS``:
    coarse to fine), whichever form is called. Features are standardised per channel first, with
    buffers that are no parameters; as made, they change nothing.

    Args:
        levels: What the folded form reads.
        num_outputs: K, the don't-care output included where the data set has one.
        width: W; the layers have W, W / 2 and W / 4 channels.

    Raises:
        ValueError: If a tap is unknown or appears twice, or the width is no multiple of 4.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, levels: Sequence[HeadLevel], num_outputs: int, width: int = PAPER_WIDTH
    ) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"the head's width must be a multiple of 4, got {width}")
        self.levels = tuple(levels)
        self.num_outputs = num_outputs
        self.width = width
        channels = sum(level.channels for level in self.levels)
        self._columns = _dense_columns(self.levels)
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_std", torch.ones(channels))
        self.project = nn.Conv2d(channels, width, 3, padding=1)
        self.project_norm = nn.BatchNorm2d(width)
        self.up_1 = nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1)
        self.up_1_norm = nn.BatchNorm2d(width // 2)
        self.up_2 = nn.ConvTranspose2d(width // 2, width // 4, 4, stride=2, padding=1)
        self.up_2_norm = nn.BatchNorm2d(width // 4)
        self.classify = nn.Conv2d(width // 4, num_outputs, 3, padding=1)

    @property
    def channels(self) -> int:
        """C, of the dense map."""
        return self.project.in_channels

    def set_normalization(self, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Standardise the features with these from now on.

        Args:
            statistics: level name -> (mean, standard deviation), each (C_level,), in the level's
                own channel order.
        """
        for level, columns in zip(self.levels, self._columns, strict=True):
            mean, std = statistics[level.name]
            self.feature_mean[columns] = mean.to(self.feature_mean)
            self.feature_std[columns] = std.to(self.feature_std)

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Logits from the levels (the folded form).

        Returns:
            (B, K, 4 M, 4 N) logits.
        """
        return self._decode(self._project_levels(batch))

    def forward_dense(self, features: Tensor) -> Tensor:
        """Logits from the dense map, the plain way: the reference for ``forward``.

        Args:
            features: (B, C, M, N), channels in the order of ``HEAD_INPUTS``.

        Returns:
            (B, K, 4 M, 4 N) logits.
        """
        return self._decode(self.project(self._standardise(features, slice(None))))

    def _decode(self, projected: Tensor) -> Tensor:
        hidden = F.relu(self.project_norm(projected), inplace=True)
        hidden = F.relu(self.up_1_norm(self.up_1(hidden)), inplace=True)
        hidden = F.relu(self.up_2_norm(self.up_2(hidden)), inplace=True)
        return self.classify(hidden)

    def _standardise(self, features: Tensor, columns: slice | Tensor) -> Tensor:
        # On the features, not in the weights: the convolution pads with zeros after this.
        inverse = 1.0 / self.feature_std[columns]
        offset = -self.feature_mean[columns] * inverse
        values = features.to(inverse.dtype)
        return torch.addcmul(offset[:, None, None], values, inverse[:, None, None])

    def _project_levels(self, batch: FeatureBatch) -> Tensor:
        """The first convolution of the dense map, from the levels: (B, W, M, N)."""
        assert self.project.bias is not None
        total = self.project.bias[:, None, None]
        folded, rows = [], []
        weights = self._level_weights()
        for level, columns, weight in zip(self.levels, self._columns, weights, strict=True):
            features = self._standardise(batch.levels[level.name], columns)
            if level.stride == GRID_STRIDE:
                total = F.conv2d(features, weight, padding=1) + total
            else:
                folded.append(_fold_columns(features, weight, batch.columns[level.name]))
                rows.append(_shifts(batch.rows[level.name]))
        if folded:
            total = total + _unfold_rows(torch.cat(folded, dim=1), torch.cat(rows, dim=2))
        # What follows is faster with channels last, but torch sums a batch's statistics less
        # exactly so.
        return total.contiguous(
            memory_format=torch.contiguous_format if self.training else torch.channels_last
        )

    def _level_weights(self) -> list[Tensor]:
        """Of the first convolution, (W, C_level, 3, 3) for each level."""
        runs = [columns for columns in self._columns if isinstance(columns, slice)]
        if len(runs) < len(self._columns):
            return [self.project.weight[:, columns] for columns in self._columns]
        # One split has one gradient; slices would each make one of the whole weight's size.
        runs.sort(key=lambda run: run.start)
        parts = self.project.weight.split([run.stop - run.start for run in runs], dim=1)
        found = dict(zip((run.start for run in runs), parts, strict=True))
        return [found[columns.start] for columns in self._columns if isinstance(columns, slice)]


def _fold_columns(features: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Convolve the upsampled map without upsampling it first, but for the rows.

    With A_r (M, h) and A_c (N, w) the bilinear matrices and S_k the shift by one cell that pads
    with zeros, the 3x3 convolution of ``A_r x A_c^T`` with the kernel ``w[k, l]`` is
    ``sum_k S_k A_r (sum_l (w[k, l] x) (S_l A_c)^T)``: nine products with x at the level's own
    resolution, then one matrix along the columns (here) and one along the rows, which all levels
    share (``_unfold_rows``).

    Args:
        features: (B, C, h, w).
        weight: (W, C, 3, 3).
        columns: (1 or B, N, w) A_c.

    Returns:
        (B, 3 h, N, W).
    """
    batch, channels, height, width = features.shape
    outputs = weight.shape[0]
    kernel = weight.permute(2, 3, 0, 1).reshape(1, 9 * outputs, channels)
    products = times(kernel, features.view(batch, 1, channels, height * width))
    products = products.view(batch, 3, 3, outputs, height, width)
    products = products.permute(0, 1, 4, 2, 5, 3)
    return times(_shifts(columns), products.reshape(batch, 3 * height, 3 * width, outputs))


def _unfold_rows(folded: Tensor, rows: Tensor) -> Tensor:
    """The other half: (B, H, N, W) and (1 or B, M, H) to (B, W, M, N), channels last."""
    batch, height, size_n, outputs = folded.shape
    total = times(rows, folded.view(batch, 1, height, size_n * outputs))
    return total.view(batch, -1, size_n, outputs).permute(0, 3, 1, 2)


def _shifts(matrix: Tensor) -> Tensor:
    """(B, M, h) -> (B, M, 3 h): what kernel position 0, 1 and 2 reads, zeros outside the map."""
    before = F.pad(matrix[:, :-1], (0, 0, 1, 0))
    after = F.pad(matrix[:, 1:], (0, 0, 0, 1))
    return torch.cat([before, matrix, after], dim=2)


def _dense_columns(levels: Sequence[HeadLevel]) -> tuple[slice | Tensor, ...]:
    """Where each level's channels stand in the dense map."""
    channels: dict[str, int] = {}
    for level in levels:
        for tap, count in level.taps:
            if tap not in HEAD_INPUTS or tap in channels:
                raise ValueError(f"tap {tap!r} is unknown, or stands in two levels")
            channels[tap] = count
    starts, start = {}, 0
    for tap in sorted(channels, key=HEAD_INPUTS.index):
        starts[tap] = start
        start += channels[tap]
    found: list[slice | Tensor] = []
    for level in levels:
        index = [starts[tap] + number for tap, count in level.taps for number in range(count)]
        # As a rule coarse taps come first, so that a level is one run of channels.
        if index == list(range(index[0], index[0] + len(index))):
            found.append(slice(index[0], index[0] + len(index)))
        else:
            found.append(torch.tensor(index, device="cpu"))
    return tuple(found)
