"""Matrix products on a CPU by whichever of torch's two libraries is the faster.

torch multiplies float32 matrices with MKL and convolves with oneDNN. MKL runs at half speed on
processors that are not Intel's; a matrix product is a convolution of one pixel, so oneDNN can do
it. In bfloat16 both are oneDNN's.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Rows below which it does not pay to bring a weight matrix into oneDNN's order.
_FEWEST_ROWS = 64


@cache
def convolutions_are_faster() -> bool:
    """Whether float32 products should go through convolutions on this processor."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")[:500]
    except OSError:
        described = platform.processor()
    return "GenuineIntel" not in described


def times(matrix: Tensor, values: Tensor) -> Tensor:
    """The matrix product ``matrix @ values``.

    Args:
        matrix: (1 or B, M, K).
        values: (B, G, K, X), contiguous.

    Returns:
        (B, G, M, X).
    """
    if not _convolve(values):
        return torch.matmul(matrix[:, None], values)
    kernels = matrix[:, :, :, None, None]
    if len(kernels) == 1:
        product = F.conv2d(values.flatten(0, 1)[..., None], kernels[0])
        return product.reshape(*values.shape[:2], -1, values.shape[3])
    parts = [F.conv2d(one[..., None], kernel) for one, kernel in zip(values, kernels, strict=True)]
    return torch.stack(parts)[..., 0]


class ConvolvedLinear(nn.Linear):
    """``nn.Linear`` with the same weights and the same result up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        rows = input.numel() // self.in_features
        if rows < _FEWEST_ROWS or not _convolve(input):
            return super().forward(input)
        # Rows as pixels with the channels last: nothing is moved.
        pixels = input.reshape(1, rows, 1, self.in_features).permute(0, 3, 1, 2)
        product = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return product.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def convolve_linears(module: nn.Module) -> None:
    """Let every ``nn.Linear`` in a module compute as a convolution, where that is faster."""
    if convolutions_are_faster():
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = ConvolvedLinear


def restore_linears(module: nn.Module) -> None:
    """Take ``convolve_linears`` back."""
    for part in module.modules():
        if isinstance(part, ConvolvedLinear):
            part.__class__ = nn.Linear  # type: ignore[assignment]


def _convolve(values: Tensor) -> bool:
    return (
        values.device.type == "cpu"
        and values.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and convolutions_are_faster()
    )
