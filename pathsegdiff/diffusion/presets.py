"""Shapes of the models that ``psd models init`` makes, and their random weights.

``paper`` is the model of the paper as its parameter counts give it away (400,920,579 UNet,
55,322,782 VQ-f4, 21,665,664 encoder, 590,848 conditioner); ``tiny`` has the same structure at a
size that a laptop runs; ``micro`` is for tests.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pathsegdiff.diffusion.autoencoder import build_autoencoder, latent_channels, latent_stride
from pathsegdiff.diffusion.conditioning import build_conditioner
from pathsegdiff.diffusion.conv_encoder import ConvEncoderConfig
from pathsegdiff.diffusion.encoder import AnyEncoderConfig, EncoderConfig, build_encoder
from pathsegdiff.diffusion.schedule import NoiseSchedule
from pathsegdiff.diffusion.unet import build_unet, unet_config


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything but the weights of a model.

    Attributes:
        name: Of the preset.
        title: One line for people.
        head_width: Channels of the segmentation head's first layer that suit the model.
        encoder: Of the patch encoder.
        conditioner: ``config.json`` of the conditioner.
        autoencoder: ``config.json`` of the autoencoder.
        unet: ``config.json`` of the UNet.
        schedule: The noise schedule.
        latent_scale: Multiplies the latent.
    """

    name: str
    title: str
    head_width: int
    encoder: AnyEncoderConfig
    conditioner: dict[str, Any]
    autoencoder: dict[str, Any]
    unet: dict[str, Any]
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    latent_scale: float = 1.0

    def build(self) -> dict[str, nn.Module]:
        """The four networks with whatever weights the current random state gives."""
        return {
            "encoder": build_encoder(self.encoder),
            "conditioner": build_conditioner(self.conditioner),
            "autoencoder": build_autoencoder(self.autoencoder),
            "unet": build_unet(self.unet),
        }


def build_random(preset: Preset, seed: int) -> dict[str, nn.Module]:
    """The four networks with weights that depend on the seed alone.

    The caller's random state is neither read nor changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return preset.build()


def vq_config(
    *,
    channels: tuple[int, ...],
    layers_per_block: int,
    codes: int,
    norm_num_groups: int = 32,
    middle_attention: bool = True,
    scale: float = 1.0,
) -> dict[str, Any]:
    """``config.json`` of a VQModel with 3 latent channels for 256 px patches."""
    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": list(channels),
        "layers_per_block": layers_per_block,
        "act_fn": "silu",
        "latent_channels": 3,
        "sample_size": 256,
        "num_vq_embeddings": codes,
        "norm_num_groups": norm_num_groups,
        "vq_embed_dim": 3,
        "scaling_factor": scale,  # diffusers' default is that of Stable Diffusion's KL-f8
        "norm_type": "group",
        "mid_block_add_attention": middle_attention,
    }


def kl_config(
    *,
    channels: tuple[int, ...],
    layers_per_block: int,
    latents: int,
    norm_num_groups: int = 32,
    middle_attention: bool = True,
    scale: float = 0.18215,
) -> dict[str, Any]:
    """``config.json`` of an AutoencoderKL for 256 px patches."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": list(channels),
        "layers_per_block": layers_per_block,
        "act_fn": "silu",
        "latent_channels": latents,
        "sample_size": 256,
        "norm_num_groups": norm_num_groups,
        "scaling_factor": scale,
        "mid_block_add_attention": middle_attention,
    }


def _preset(
    name: str,
    title: str,
    *,
    head_width: int,
    encoder: AnyEncoderConfig,
    region_embed_dim: int,
    context_dim: int,
    autoencoder: dict[str, Any],
    unet_channels: tuple[int, ...],
    unet_groups: int = 32,
) -> Preset:
    return Preset(
        name=name,
        title=title,
        head_width=head_width,
        encoder=encoder,
        conditioner={
            "patch_embed_dim": encoder.embed_dim,
            "region_embed_dim": region_embed_dim,
            "context_dim": context_dim,
            "normalize": True,
        },
        autoencoder=autoencoder,
        latent_scale=float(autoencoder["scaling_factor"]),
        unet=unet_config(
            latent_channels=latent_channels(autoencoder),
            latent_size=256 // latent_stride(autoencoder),
            block_out_channels=unet_channels,
            attention=(False, True, True, True),
            layers_per_block=2,
            num_heads=1,
            context_dim=context_dim,
            norm_num_groups=unet_groups,
        ),
    )


#: An untrained small autoencoder's latents have a standard deviation of 0.2 on H&E. Left so, the
#: noise at t = 50 (0.29) drowns them; LDM scales its latents to 1 (Rombach et al. 2022, app. G).
#: Pre-training measures the scale of the autoencoder that it trained.
_UNTRAINED_SCALE = 5.0

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset(
            "paper",
            "The paper's shapes: UNet 192 x [1, 2, 3, 5], VQ-f4, ViT-S/16",
            head_width=256,
            encoder=EncoderConfig(),
            region_embed_dim=768,
            context_dim=512,
            autoencoder=vq_config(channels=(128, 256, 512), layers_per_block=2, codes=8192),
            unet_channels=(192, 384, 576, 960),
        ),
        _preset(
            "tiny",
            "The paper's structure, small: UNet [64, 112, 128, 96], KL-f8, EfficientNet-Lite0",
            head_width=64,
            encoder=ConvEncoderConfig(),
            region_embed_dim=320,
            context_dim=64,
            autoencoder=kl_config(
                channels=(16, 32, 64, 64),
                layers_per_block=1,
                latents=16,
                norm_num_groups=8,
                middle_attention=False,
                scale=_UNTRAINED_SCALE,
            ),
            unet_channels=(64, 112, 128, 96),
            unet_groups=16,
        ),
        _preset(
            "micro",
            "For tests: thirteen taps in milliseconds",
            head_width=16,
            encoder=EncoderConfig(embed_dim=32, depth=1, num_heads=2),
            region_embed_dim=16,
            context_dim=16,
            autoencoder=vq_config(
                channels=(4, 4, 8),
                layers_per_block=1,
                codes=16,
                norm_num_groups=4,
                middle_attention=False,
                scale=_UNTRAINED_SCALE,
            ),
            unet_channels=(16, 16, 16, 32),
            unet_groups=8,
        ),
    )
}
