"""The autoencoder's training: reconstruction, with a weak pull of the latents to a unit normal (KL)
or to their codes (VQ).

Rombach et al. 2022, https://arxiv.org/abs/2112.10752, add a perceptual and an adversarial loss for
crisp samples. Features need neither: what counts is that the latent keeps what the image holds.
Shapes: B = crops, S = crop_px, C, h, w = of the latent.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.device import training_layout
from pathsegdiff.diffusion.autoencoder import build_autoencoder, encode
from pathsegdiff.diffusion.pretrain.images import ImagePool, to_unit
from pathsegdiff.diffusion.pretrain.loop import Figures, Part, StepFigures
from pathsegdiff.diffusion.pretrain.pictures import save_rows

STREAM, _DECODER_STREAM = 1, 4
#: Of the weights that ``DecoderPart`` changes.
DECODER_PREFIXES = ("decoder.", "post_quant_conv.")
#: Weight of the KL term beside the reconstruction, per latent value. Rombach et al.: 1e-6 of sums.
KL_WEIGHT = 1e-4


class AutoencoderPart(Part):
    """Trains a VQModel or an AutoencoderKL.

    Args:
        config: Its ``config.json``.
        pool: Images.
        device: Where to train.
        held_out_crops: That held-out figures are measured on.
    """

    name: ClassVar[str] = "autoencoder"

    def __init__(
        self,
        config: dict[str, Any],
        pool: ImagePool,
        device: torch.device,
        held_out_crops: int = 32,
    ) -> None:
        self.model = cast(Any, build_autoencoder(config).to(device))
        self.layout = training_layout(device)
        self.model.to(memory_format=self.layout)
        self.pool, self.device = pool, device
        self.held_out_crops = held_out_crops
        self.is_vq = config["_class_name"] == "VQModel"
        if not self.is_vq:
            # A standard deviation of 1 drowns the first latents, which are near 0: begin at 0.05.
            with torch.no_grad():
                self.model.quant_conv.bias[config["latent_channels"] :] = -6.0

    @property
    def trained(self) -> nn.Module:
        """The autoencoder."""
        return self.model

    def read(self, step: int, count: int, crop_px: int) -> Tensor:
        """(B, 3, S, S) uint8."""
        return self.pool.batch(STREAM, step, count, crop_px)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, StepFigures]:
        """Absolute and squared error of the reconstruction in [-1, 1], plus the latent's term."""
        images = (to_unit(batch, self.device) * 2 - 1).contiguous(memory_format=self.layout)
        if self.is_vq:
            decoded, commitment = self.model(images, return_dict=False)
            latent_term = commitment.float().mean()
        else:
            posterior = self.model.encode(images).latent_dist
            generator = torch.Generator(self.device).manual_seed(step)
            latent = posterior.sample(generator)
            decoded = self.model.decode(latent).sample
            latent_term = KL_WEIGHT * posterior.kl().mean() / math.prod(latent.shape[1:])
        error, psnr = _reconstruction(decoded, images)
        loss = error + latent_term
        return loss, {
            "loss": loss.detach(),
            "psnr": psnr,
            "latent_term": latent_term.detach(),
        }

    @torch.no_grad()
    def held_out(self) -> Figures:
        """PSNR in dB over held-out crops, decoded from what stage 1 would see."""
        images = to_unit(self.pool.held_out_batch(self.held_out_crops, 256), self.device)
        return {"held_out_psnr": psnr(images, reconstruct(self.model, images))}

    @torch.no_grad()
    def pictures(self, folder: Path, step: int) -> None:
        """Held-out crops above their reconstructions."""
        images = to_unit(self.pool.held_out_batch(6, 256), self.device)
        save_rows(folder, "reconstructions", [images, reconstruct(self.model, images)])


class DecoderPart(AutoencoderPart):
    """Trains the decoder of an autoencoder on, its encoder as it is.

    Latents and features stay what they are, so this may come last and on other images: sharper
    ones, or of another laboratory.

    Args:
        config: ``config.json`` of the autoencoder.
        state: Its trained weights.
        pool: Images.
        device: Where to train.
        held_out_crops: That held-out figures are measured on.
    """

    name: ClassVar[str] = "decoder"

    def __init__(
        self,
        config: dict[str, Any],
        state: Mapping[str, Tensor],
        pool: ImagePool,
        device: torch.device,
        held_out_crops: int = 32,
    ) -> None:
        super().__init__(config, pool, device, held_out_crops)
        self.model.load_state_dict(state)
        self.model.requires_grad_(False)
        for trained in (self.model.decoder, self.model.post_quant_conv):
            trained.requires_grad_(True)

    def read(self, step: int, count: int, crop_px: int) -> Tensor:
        """(B, 3, S, S) uint8."""
        return self.pool.batch(_DECODER_STREAM, step, count, crop_px)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, StepFigures]:
        """Absolute and squared error in [-1, 1], decoded from what stage 1 sees."""
        images = to_unit(batch, self.device)
        with torch.no_grad():
            latent = encode(self.model, images, 1.0)
        decoded = self.model.decode(latent, return_dict=False)[0]
        loss, psnr = _reconstruction(decoded, images * 2 - 1)
        return loss, {"loss": loss.detach(), "psnr": psnr}


def _reconstruction(decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute plus twice the squared error in [-1, 1], and the PSNR in dB."""
    error = decoded.float() - images
    squared = error.square().mean()
    return error.abs().mean() + 2 * squared, 10 * (4 / squared.detach().clamp_min(1e-12)).log10()


@torch.no_grad()
def reconstruct(model: Any, images: Tensor) -> Tensor:
    """Encode and decode.

    Args:
        images: (B, 3, S, S) in [0, 1].

    Returns:
        (B, 3, S, S) float32 in [0, 1]: through the codes (VQ), or from the posterior mean (KL).
    """
    decoded = model.decode(encode(model, images, 1.0), return_dict=False)[0]
    return ((decoded.float() + 1) / 2).clamp(0, 1)


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all of them together."""
    return 10 * math.log10(1 / max(F.mse_loss(others, images).item(), 1e-12))


@torch.no_grad()
def latent_std(model: nn.Module, pool: ImagePool, device: torch.device, crops: int = 64) -> float:
    """Standard deviation of unscaled latents over training crops; its inverse is the scale.

    One number for all channels, as in Rombach et al. 2022 (appendix G).
    """
    latents = [
        encode(model, to_unit(pool.batch(STREAM, -1 - start, 8, 256), device), 1.0).cpu()
        for start in range(crops // 8)
    ]
    return torch.cat(latents).std().item()
