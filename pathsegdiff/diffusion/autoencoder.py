"""First stage: image <-> latent, through diffusers' VQModel or AutoencoderKL.

The latent diffusion model was trained on scaled latents BEFORE quantisation (VQ), or on draws from
the posterior, for which we take the mean (KL): features must not depend on a second draw.
Shapes: B = batch, P = patch_px, C = latent channels, h, w = latent rows and columns.
"""

from typing import Any

from torch import Tensor, nn

from pathsegdiff.diffusion.third_party import AutoencoderKL, VQModel
from pathsegdiff.errors import BundleError

#: What diffusers writes as ``_class_name`` -> our word for it.
KINDS = {"VQModel": "vq", "AutoencoderKL": "kl"}


def build_autoencoder(config: dict[str, Any]) -> nn.Module:
    """Make the diffusers model that a ``config.json`` describes.

    Raises:
        BundleError: If it is another class, or diffusers refuses the settings.
    """
    name = config.get("_class_name")
    classes = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
    if name not in classes:
        raise BundleError(f"the autoencoder must be one of {', '.join(classes)}, got {name!r}")
    return classes[name].from_config(config)


def latent_stride(config: dict[str, Any]) -> int:
    """Image pixels per latent step: 4 for three levels (f4), 8 for four (f8)."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def latent_channels(config: dict[str, Any]) -> int:
    """C: channels after ``quant_conv``."""
    embed = config.get("vq_embed_dim") if config.get("_class_name") == "VQModel" else None
    return int(config["latent_channels"] if embed is None else embed)


def encode(model: nn.Module, images: Tensor, scale: float) -> Tensor:
    """Images to scaled latents.

    Args:
        model: A VQModel or an AutoencoderKL.
        images: (B, 3, P, P) in [0, 1].
        scale: Multiplies the latent; 1.0 for VQ-f4, 0.18215 for KL-f8.

    Returns:
        (B, C, h, w) float32: pre-quantisation (VQ) or posterior mean (KL).
    """
    pixels = (images * 2 - 1).to(next(model.parameters()).dtype)  # trained on [-1, 1]
    encoded = model.encode(pixels)  # type: ignore[operator]  # a method, nn.Module hides it
    latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latent.float() * scale
