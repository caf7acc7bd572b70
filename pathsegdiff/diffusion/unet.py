"""Build the UNet of the latent diffusion model: diffusers' UNet2DConditionModel."""

from typing import Any

from torch import nn

from pathsegdiff.diffusion.third_party import UNet2DConditionModel
from pathsegdiff.errors import BundleError


def build_unet(config: dict[str, Any]) -> nn.Module:
    """Make the UNet that a ``config.json`` of diffusers describes.

    Raises:
        BundleError: If it is another class.
    """
    name = config.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise BundleError(f"the UNet must be a UNet2DConditionModel, got {name!r}")
    return UNet2DConditionModel.from_config(config)


def unet_config(
    *,
    latent_channels: int,
    latent_size: int,
    block_out_channels: tuple[int, ...],
    attention: tuple[bool, ...],
    layers_per_block: int,
    num_heads: int | tuple[int, ...],
    context_dim: int,
    transformer_depth: int = 1,
    norm_num_groups: int = 32,
) -> dict[str, Any]:
    """Settings under which diffusers' UNet computes what CompVis' ``UNetModel`` computes.

    Args:
        latent_channels: In and out.
        latent_size: Latent rows, h.
        block_out_channels: One per level, finest first.
        attention: Whether the blocks of a level attend, one per level.
        layers_per_block: Residual blocks per level going down; one more going up.
        num_heads: Attention heads, one number or one per level.
        context_dim: Channels of a context token.
        transformer_depth: Transformer layers of an attention block.
        norm_num_groups: Groups of every GroupNorm.
    """
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": latent_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": list(block_out_channels),
        "layers_per_block": layers_per_block,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context_dim,
        # diffusers reads this as the NUMBER of heads, whatever its name says (its issue 2011)
        "attention_head_dim": list(num_heads) if isinstance(num_heads, tuple) else num_heads,
        "transformer_layers_per_block": transformer_depth,
        "use_linear_projection": False,
        "norm_num_groups": norm_num_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "center_input_sample": False,
    }
