"""Embedding of a patch -> context tokens of the UNet.

``Conditioner``: the layers and their key names are those of the SSL-guided LDM, ``PatchEmbedder``
(one token) and ``SSLEmbedder`` (two tokens: patch, region). There is no region embedding here, so
the second token is what the authors' code gives without one: the layer applied to zeros, which is
its bias. ``GridConditioner``: ZoomLDM's.
Shapes: B = batch, D = embedding, L = tokens, Dc = channels of a token.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.diffusion.third_party import Block

#: Entry of a config that tells the two apart; that of ``Conditioner`` has none.
KIND = "kind"
GRID = "grid"


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


class GridConditioner(nn.Module):
    """A transformer over a grid of embeddings and the magnification: ZoomLDM's conditioner.

    ZoomLDM (Yellapragada et al. 2025, https://arxiv.org/abs/2411.16969; ``EmbeddingViT2_5`` of its
    code) describes an image by the embeddings of its 20x patches, up to 8 x 8 of them. A patch at
    20x is a single one: it takes the middle of the grid, and a learnt token every other cell.

    Args:
        patch_embed_dim: D.
        context_dim: Dc, also the transformer's width.
        depth: Transformer blocks.
        num_heads: Attention heads of a block.
        mlp_dim: Hidden width of a block's MLP.
        cells: Of the grid; L is one more, the magnification's.
        magnifications: How many there are.
        magnification: The one of the patches: 0 is 20x (0.5 um/px), 1 is 10x, and so on.
    """

    def __init__(
        self,
        *,
        patch_embed_dim: int,
        context_dim: int,
        depth: int = 12,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        cells: int = 64,
        magnifications: int = 8,
        magnification: int = 0,
    ) -> None:
        super().__init__()
        self.magnification = magnification
        # torchvision's, whose encoder the authors use
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.mag_embedding = nn.Embedding(magnifications, context_dim)
        self.dim_reduce = nn.Linear(patch_embed_dim, context_dim)
        self.pad_token = nn.Parameter(torch.zeros(1, 1, context_dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, cells + 1, context_dim))
        self.blocks = nn.ModuleList(
            Block(
                context_dim,
                num_heads,
                mlp_ratio=mlp_dim / context_dim,
                qkv_bias=True,
                norm_layer=norm,
            )
            for _ in range(depth)
        )
        self.norm = norm(context_dim)
        self.final_proj = nn.Linear(context_dim, context_dim)
        self.layer_norm = nn.LayerNorm(context_dim)

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.pos_embedding.shape[1]

    def forward(self, embedding: Tensor | None, batch: int) -> Tensor:
        """Make the context.

        Args:
            embedding: (B, D) raw encoder vectors, standardised here over their channels; or None
                for the null condition: zero tokens, which training puts in the place of the result.
            batch: B; only used for the null condition.

        Returns:
            (B, L, Dc) in the dtype of the layers.
        """
        weight = self.dim_reduce.weight
        if embedding is None:
            return weight.new_zeros(batch, self.num_tokens, weight.shape[0])
        embedding = embedding.float()
        spread, mean = torch.std_mean(embedding, dim=1, keepdim=True)
        standardised = (embedding - mean) / (spread + 1e-8)
        cells = self.pad_token.repeat(len(embedding), self.num_tokens - 1, 1)
        middle = (self.num_tokens - 1) // 2
        cells[:, middle] = self.dim_reduce(standardised.to(weight.dtype)).to(cells.dtype)
        first = self.mag_embedding.weight[self.magnification].expand(len(cells), 1, -1)
        tokens = torch.cat([first, cells], dim=1) + self.pos_embedding
        for block in self.blocks:
            tokens = block(tokens)
        return self.layer_norm(self.final_proj(self.norm(tokens)))


AnyConditioner = Conditioner | GridConditioner


def build_conditioner(config: dict[str, Any]) -> AnyConditioner:
    """The conditioner that a bundle's ``config.json`` describes."""
    if config.get(KIND) == GRID:
        return GridConditioner(**{name: value for name, value in config.items() if name != KIND})
    return Conditioner(**config)


def context_tokens(config: dict[str, Any]) -> int:
    """L, from the config alone."""
    if config.get(KIND) == GRID:
        return int(config["cells"]) + 1
    return 1 if config.get("region_embed_dim") is None else 2
