"""Stain jitter: images as another laboratory might have stained and scanned them."""

import torch
from torch import Tensor

#: Optical density of haematoxylin, eosin and the residual (Ruifrok & Johnston 2001, as published
#: with their colour deconvolution): rows are stains, columns red, green and blue.
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def jitter_stain(images: Tensor, generator: torch.Generator, amount: float = 0.12) -> Tensor:
    """Scale and shift each stain's optical density, a little and per image.

    Tellez et al. 2018, https://arxiv.org/abs/1808.05896.

    Args:
        images: (B, 3, S, S) in [0, 1].
        generator: On the CPU.
        amount: Largest relative change; shifts are a tenth of it.

    Returns:
        (B, 3, S, S) in [0, 1], in the memory format of ``images``.
    """
    count = len(images)
    scale = 1 + amount * (2 * torch.rand(count, 3, generator=generator) - 1)
    shift = 0.1 * amount * (2 * torch.rand(count, 3, generator=generator) - 1)
    stains = _STAINS / _STAINS.norm(dim=1, keepdim=True)
    # To stains, scaled, and back again is one 3 x 3 matrix per image.
    matrix = torch.linalg.inv(stains) @ torch.diag_embed(scale) @ stains
    offset = shift @ stains
    density = -torch.log(images.clamp_min(1 / 255))
    changed = torch.einsum("bcd,bchw->bdhw", matrix.to(images), density)
    changed = changed + offset.to(images)[:, :, None, None]
    return torch.exp(-changed).clamp(0, 1)
