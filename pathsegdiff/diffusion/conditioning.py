"""Embedding of a patch -> context tokens of the UNet.

The layers and their key names are those of the authors' conditioners: ``PatchEmbedder`` (one token)
and ``SSLEmbedder`` (two tokens: patch, region). There is no region embedding here, so the second
token is what the authors' code gives without one: the layer applied to zeros, which is its bias.
Shapes: B = batch, D = embedding, L = tokens, Dc = channels of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conditioner(nn.Module):
    """Linear layers from embeddings to context tokens.

    Args:
        patch_embed_dim: D of the patch embedding.
        region_embed_dim: Of the region embedding; None for a model with one token.
        context_dim: Dc.
        normalize: Whether embeddings are scaled to unit L2 norm first.
    """

    def __init__(
        self,
        *,
        patch_embed_dim: int,
        region_embed_dim: int | None,
        context_dim: int,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.patch_fc = nn.Linear(patch_embed_dim, context_dim)
        self.region_fc: nn.Linear | None = None
        if region_embed_dim is not None:
            self.region_fc = nn.Linear(region_embed_dim, context_dim)

    @property
    def num_tokens(self) -> int:
        """L."""
        return 1 if self.region_fc is None else 2

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this module again."""
        return {
            "patch_embed_dim": self.patch_fc.in_features,
            "region_embed_dim": None if self.region_fc is None else self.region_fc.in_features,
            "context_dim": self.patch_fc.out_features,
            "normalize": self.normalize,
        }

    def forward(self, embedding: Tensor | None, batch: int) -> Tensor:
        """Make the context.

        Args:
            embedding: (B, D) raw encoder vectors, or None for the null condition: zeros BEFORE the
                linear layers, as in training, so that their biases remain.
            batch: B; only used for the null condition.

        Returns:
            (B, L, Dc) in the dtype of the layers.
        """
        weight = self.patch_fc.weight
        if embedding is None:
            embedding = weight.new_zeros(batch, self.patch_fc.in_features)
        else:
            if self.normalize:  # in float32: the norm of a float16 vector may overflow
                embedding = F.normalize(embedding.float(), dim=-1)
            embedding = embedding.to(weight.dtype)
        tokens = [self.patch_fc(embedding)]
        if self.region_fc is not None:
            region = weight.new_zeros(len(embedding), self.region_fc.in_features)
            tokens.append(self.region_fc(region))
        return torch.stack(tokens, dim=1)
