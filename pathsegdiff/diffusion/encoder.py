"""Self-supervised patch encoder: a vision transformer as in HIPT, built with timm.

HIPT (Chen et al. 2022, https://arxiv.org/abs/2206.02647) runs a DINO ViT-S/16 that was trained on
224 px at 256 px, and resizes the position table on the way. timm resizes it a little differently
(0.6 % on random weights), so a bundle holds the table as HIPT would have it, and timm leaves it
alone. UNI (Chen et al. 2024, https://doi.org/10.1038/s41591-024-02857-3) is a ViT-L/16 that sees
its patches at 224 px. Shapes: B = batch, D = embedding, N = patch tokens along one side,
P = patch_px.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.diffusion import imagenet
from pathsegdiff.diffusion.conv_encoder import ConvEncoder, ConvEncoderConfig
from pathsegdiff.diffusion.third_party import VisionTransformer
from pathsegdiff.errors import BundleError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder; the defaults are HIPT's ViT-S/16 (facts: 21,665,664 parameters).

    Attributes:
        architecture: "vit"; ``ConvEncoderConfig`` has the other, "cnn".
        embed_dim: D.
        depth: Transformer blocks.
        num_heads: Attention heads of a block.
        patch_size: Image pixels along one side of a token.
        image_size: Pixels along one side of the image.
        input_size: That it is resized to for the transformer; None for as it is. The tokens are
            resized back, so that a token covers ``patch_size`` pixels of the image.
        mean: Of an RGB channel in [0, 1], subtracted first.
        std: Divided by.
        mlp_ratio: Hidden width of a block's MLP, in D.
        qkv_bias: Whether queries, keys and values have biases.
        layer_scale: Whether the branches of a block have a factor for each channel.
    """

    architecture: str = "vit"
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 16
    image_size: int = 256
    input_size: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: bool = False

    @property
    def input_grid(self) -> int:
        """Patch tokens along one side within the transformer."""
        return (self.input_size or self.image_size) // self.patch_size

    @property
    def token_grid(self) -> int:
        """N: patch tokens along one side."""
        return self.image_size // self.patch_size

    @property
    def token_channels(self) -> int:
        """Channels of a token."""
        return self.embed_dim

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"ViT, {self.depth} blocks, {self.embed_dim} channels"

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "EncoderConfig":
        """Read and check what ``to_dict`` wrote, or what a user wrote by hand.

        Raises:
            BundleError: If a value is unknown or cannot be; ``where`` names the file.
        """
        if not isinstance(values, dict):
            raise BundleError(f"{where}: the encoder's settings must be a JSON object")
        known = list(cls.__dataclass_fields__)
        unknown = [name for name in values if name not in known]
        if unknown:
            raise BundleError(
                f"{where}: the encoder has no setting {unknown[0]!r}; there are {', '.join(known)}"
            )
        if values.get("architecture", "vit") != "vit":
            raise BundleError(
                f"{where}: architecture must be 'vit' or 'cnn', got {values['architecture']!r}"
            )
        for name, largest in _LARGEST.items():
            value = values.get(name, 1)
            if name == "input_size" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= largest:
                raise BundleError(f"{where}: {name} must be 1 to {largest}, got {value!r}")
        for name in ("mean", "std"):
            _check_triple(values.get(name, (0.5, 0.5, 0.5)), name, where)
        ratio = values.get("mlp_ratio", 4.0)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 64:
            raise BundleError(f"{where}: mlp_ratio must be in (0, 64], got {ratio!r}")
        for name in ("qkv_bias", "layer_scale"):
            if not isinstance(values.get(name, True), bool):
                raise BundleError(f"{where}: {name} must be true or false")
        triples = {name: tuple(values[name]) for name in ("mean", "std") if name in values}
        config = cls(**{**values, **triples})
        if config.embed_dim % config.num_heads:
            raise BundleError(
                f"{where}: embed_dim {config.embed_dim} is no multiple of "
                f"num_heads {config.num_heads}"
            )
        for name in ("image_size", "input_size"):
            size = getattr(config, name)
            if size is not None and size % config.patch_size:
                raise BundleError(
                    f"{where}: {name} {size} is no multiple of patch_size {config.patch_size}"
                )
            if size is not None and size > _LARGEST_GRID * config.patch_size:
                raise BundleError(
                    f"{where}: {name} {size} makes more than {_LARGEST_GRID} x {_LARGEST_GRID} "
                    f"patches of {config.patch_size} px"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the newer settings only where they are set: bundles keep their hash."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        return {name: value for name, value in values.items() if value or name not in _NEWER}


#: Settings that earlier bundles do not have.
_NEWER = ("input_size", "layer_scale")


#: Upper bounds that no encoder we know comes near; they keep a hostile file from filling memory.
_LARGEST = {
    "embed_dim": 4096,
    "depth": 128,
    "num_heads": 256,
    "patch_size": 256,
    "image_size": 4096,
    "input_size": 4096,
}


#: Patches along one side: attention is quadratic in their number.
_LARGEST_GRID = 64


def _check_triple(values: Any, name: str, where: str) -> None:
    numbers = (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(v, int | float) and abs(v) < 1e3 for v in values)
    )
    if not numbers or (name == "std" and min(values) <= 0):
        raise BundleError(f"{where}: {name} must be three numbers, got {values!r:.60}")


class PatchEncoder(nn.Module):
    """Images -> class token (the embedding) and patch tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network = VisionTransformer(
            img_size=config.input_size or config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            init_values=1.0 if config.layer_scale else None,  # the weights come from a file
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # HIPT; timm's own default differs
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the transformer once.

        Args:
            images: (B, 3, P, P) in [0, 1].

        Returns:
            (B, D) class token after the last LayerNorm, not L2-normalised, and
            (B, D, N, N) patch tokens; both in the dtype of the computation.
        """
        # new_tensor and not a buffer: these are settings, and no entry of a state dict
        mean = images.new_tensor(self.config.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.config.std).view(1, 3, 1, 1)
        if self.config.input_size is not None:  # in [0, 1], as images of 8 bits are
            images = _resize(images, self.config.input_size)
        normalized = ((images - mean) / std).to(next(self.network.parameters()).dtype)
        tokens = self.network.forward_features(normalized)
        grid = self.config.input_grid
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
        if grid != self.config.token_grid:
            patches = _resize(patches.float(), self.config.token_grid)
        return tokens[:, 0], patches

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The patch tokens as the one feature map: [(B, D, N, N)]."""
        return [self(images)[1]]


def _resize(maps: Tensor, side: int) -> Tensor:
    """(B, C, side, side): bilinear with antialias, as PIL and torchvision resize images."""
    return F.interpolate(maps, size=(side, side), mode="bilinear", antialias=True)


@dataclass(frozen=True, kw_only=True)
class NoEncoderConfig:
    """A model without a patch encoder, which knows the null condition only.

    Attributes:
        architecture: "none".
        embed_dim: D that its conditioner would take.
        image_size: P.
    """

    architecture: str = "none"
    embed_dim: int
    image_size: int = 256
    token_grid = 1
    token_channels = 1
    summary = "none: --cond none is all that the model can do"

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "NoEncoderConfig":
        """Read and check what ``to_dict`` wrote.

        Raises:
            BundleError: If a value is unknown or cannot be; ``where`` names the file.
        """
        sizes = [values.get(name) for name in ("embed_dim", "image_size")]
        if len(values) != 3 or not all(type(size) is int and 0 < size <= 4096 for size in sizes):
            raise BundleError(f"{where}: of no encoder, embed_dim and image_size must be 1 to 4096")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class NoEncoder(nn.Module):
    """In the place of an encoder: vectors of zeros."""

    def __init__(self, config: NoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network = nn.Module()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, P, P) to (B, D) and (B, 1, 1, 1) zeros."""
        count = len(images)
        return images.new_zeros(count, self.config.embed_dim), images.new_zeros(count, 1, 1, 1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """None."""
        return []


#: Shapes of published encoders; what they see is what their publishers show them.
NAMED_ENCODERS = {
    "hipt": EncoderConfig(),
    "uni": EncoderConfig(
        embed_dim=1024,
        depth=24,
        num_heads=16,
        input_size=224,
        mean=imagenet.USUAL_MEAN,
        std=imagenet.USUAL_STD,
        layer_scale=True,
    ),
}
AnyEncoderConfig = EncoderConfig | ConvEncoderConfig | NoEncoderConfig
AnyEncoder = PatchEncoder | ConvEncoder | NoEncoder


def read_encoder_config(values: Any, where: str) -> AnyEncoderConfig:
    """Read and check an encoder's ``config.json``, whichever architecture it names.

    Raises:
        BundleError: If a value is unknown or cannot be; ``where`` names the file.
    """
    if isinstance(values, dict) and values.get("architecture") == "cnn":
        return ConvEncoderConfig.from_dict(values, where)
    if isinstance(values, dict) and values.get("architecture") == "none":
        return NoEncoderConfig.from_dict(values, where)
    return EncoderConfig.from_dict(values, where)


def build_encoder(config: AnyEncoderConfig) -> AnyEncoder:
    """Make the network that a config describes."""
    if isinstance(config, NoEncoderConfig):
        return NoEncoder(config)
    return ConvEncoder(config) if isinstance(config, ConvEncoderConfig) else PatchEncoder(config)


def resize_position_table(table: Tensor, token_grid: int) -> Tensor:
    """Resize a position table as HIPT's ``interpolate_pos_encoding`` does.

    Bicubic by the scale factor (N + 0.1) / M, without antialias. The factor, not the size, decides
    where the samples fall, so that asking for the size N gives other numbers.

    Args:
        table: (1, 1 + M * M, D) class token first.
        token_grid: N, tokens wanted along one side.

    Returns:
        (1, 1 + N * N, D) float32; unchanged values where M = N.

    Raises:
        ValueError: If the table is not square.
    """
    table = table.float()
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise ValueError(f"a position table of {table.shape[1] - 1} patches is not square")
    if side == token_grid:
        return table
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (token_grid + 0.1) / side
    resized = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    rows = resized.permute(0, 2, 3, 1).reshape(1, token_grid * token_grid, -1)
    return torch.cat([table[:, :1], rows], dim=1)
