"""The latent diffusion model's training, with its features drawn towards an encoder's.

The UNet predicts the noise (Ho et al. 2020; Rombach et al. 2022) under a condition that is dropped
now and then, as zeros before the linear layers. Beside that, a 1 x 1 convolution of some taps has
to give the feature maps that a frozen encoder makes of the clean image. That is representation
alignment (REPA, Yu et al. 2024, https://arxiv.org/abs/2410.06940), here at every scale that the
encoder has, and linear, since the head that will read the taps begins with a linear layer.
Shapes: B = crops, S = crop_px, C, h, w = of the latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathsegdiff.diffusion.autoencoder import encode
from pathsegdiff.diffusion.conditioning import Conditioner
from pathsegdiff.diffusion.conv_encoder import ConvEncoder
from pathsegdiff.diffusion.encoder import AnyEncoder
from pathsegdiff.diffusion.pretrain.images import ImagePool, to_unit
from pathsegdiff.diffusion.pretrain.loop import Figures, Part, StepFigures
from pathsegdiff.diffusion.pretrain.pictures import save_rows
from pathsegdiff.diffusion.pretrain.stain import jitter_stain
from pathsegdiff.diffusion.schedule import NoiseSchedule
from pathsegdiff.diffusion.taps import TapSpec
from pathsegdiff.diffusion.third_party import DDIMScheduler, DDPMScheduler
from pathsegdiff.diffusion.unet import build_unet

STREAM = 3
#: Timesteps at which the held-out loss is measured.
LOOK_AT = (25, 50, 100, 200, 400, 700)
_SAMPLING_STEPS = 25


@dataclass(frozen=True, kw_only=True)
class LdmSettings:
    """Of the diffusion model's training.

    Attributes:
        drop_condition: Share of the crops that are trained without their condition.
        focus_share: Share of the crops whose timestep is drawn from the first ``focus_steps``,
            where features are taken from; the others' from the whole schedule.
        focus_steps: See there.
        align_weight: Of the alignment beside the noise prediction; 0 for none.
        stain_jitter: Largest relative change of a stain's density in the latent; condition and
            encoder maps are those of the image as it is.
    """

    drop_condition: float = 0.1
    focus_share: float = 0.6
    focus_steps: int = 150
    align_weight: float = 1.0
    stain_jitter: float = 0.12

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class LdmPart(Part):
    """Trains UNet and conditioner; encoder and autoencoder are frozen.

    Args:
        unet_config: ``config.json`` of the UNet.
        conditioner: Arguments of ``Conditioner``.
        encoder: Gives the condition, and the maps to align with.
        autoencoder: Gives latents.
        latent_scale: Multiplies them.
        taps: Of the UNet.
        schedule: The noise schedule.
        pool: Images.
        settings: Of this part.
        seed: Of the noise, with the step.
        device: Where to train.
        held_out_crops: That held-out figures are measured on.
    """

    name: ClassVar[str] = "ldm"

    def __init__(
        self,
        *,
        unet_config: dict[str, Any],
        conditioner: dict[str, Any],
        encoder: AnyEncoder,
        autoencoder: nn.Module,
        latent_scale: float,
        taps: Sequence[TapSpec],
        schedule: NoiseSchedule,
        pool: ImagePool,
        settings: LdmSettings,
        seed: int,
        device: torch.device,
        held_out_crops: int = 32,
    ) -> None:
        self.pool, self.device, self.settings, self.seed = pool, device, settings, seed
        self.held_out_crops = held_out_crops
        self.encoder = encoder.to(device).requires_grad_(False).eval()
        self.autoencoder = autoencoder.to(device).requires_grad_(False).eval()
        self.latent_scale = latent_scale
        betas = {
            "num_train_timesteps": schedule.timesteps,
            "beta_schedule": schedule.beta_schedule,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
        }
        self.scheduler: Any = DDPMScheduler(**betas)
        self.sampler: Any = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
        self.patch_px = encoder.config.image_size
        with torch.no_grad():
            first = to_unit(pool.batch(STREAM, -1, 32, self.patch_px), device)
            maps = [features.float() for features in self.encoder.feature_maps(first)]
        pairs = plan_alignment(taps, [features.shape[-1] for features in maps], self.patch_px)
        self.statistics = [
            (features.mean((0, 2, 3)), features.std((0, 2, 3)).clamp_min(1e-4)) for features in maps
        ]
        self.pairs = pairs if settings.align_weight else ()
        projections = {
            pair.tap.name: nn.Conv2d(
                pair.tap.channels, sum(maps[number].shape[1] for number in pair.maps), 1
            )
            for pair in self.pairs
        }
        self.networks = DenoisingLoss(
            build_unet(unet_config),
            Conditioner(**conditioner),
            nn.ModuleDict(projections),
            {pair.tap.name: pair.tap.module_path for pair in self.pairs},
        ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        #: Whether the next step records the kernels, see ``_capture``.
        self.record = device.type == "cuda"

    @property
    def trained(self) -> nn.Module:
        """UNet, conditioner and projections."""
        return self.networks

    def read(self, step: int, count: int, crop_px: int) -> Tensor:
        """(B, 3, S, S) uint8."""
        return self.pool.batch(STREAM, step, count, crop_px)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, StepFigures]:
        """Squared error of the predicted noise, and of the standardised encoder maps."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        images = to_unit(batch, self.device)
        timesteps = self._draw_timesteps(len(images), generator)
        kept = torch.rand(len(images), generator=generator) >= self.settings.drop_condition
        seen = images
        if self.settings.stain_jitter:
            seen = jitter_stain(images, generator, self.settings.stain_jitter)
        with torch.no_grad():  # one pass of the encoder gives the condition and the targets
            maps = self.encoder.feature_maps(images)
            embedding = self._embedding(images, maps)
            latent = encode(self.autoencoder, seen, self.latent_scale)
        noise = self._draw_noise(latent, generator)
        timesteps = timesteps.to(self.device)
        noised = self.scheduler.add_noise(latent, noise, timesteps)
        tensors = (noised, noise, timesteps, embedding, kept.to(self.device), *self._targets(maps))
        if self.record:
            self._capture(tensors)
        noise_loss, *errors = self.networks(*tensors)
        figures = {"noise_loss": noise_loss.detach()}
        loss = noise_loss
        if errors:
            loss = loss + self.settings.align_weight * sum(errors) / len(errors)
            names = [f"align_{pair.tap.name}" for pair in self.pairs]
            figures |= {name: e.detach() for name, e in zip(names, errors, strict=True)}
        return loss, {"loss": loss.detach(), **figures}

    @torch.no_grad()
    def held_out(self) -> Figures:
        """Noise loss by timestep with and without the condition, and the alignment at t = 50.

        The alignment is the share of the variance of the encoder's maps that is not explained.
        """
        images = to_unit(self.pool.held_out_batch(self.held_out_crops, self.patch_px), self.device)
        generator = torch.Generator().manual_seed(self.seed)
        embedding, _ = self.encoder(images)
        targets = self._targets(self.encoder.feature_maps(images))
        latent = encode(self.autoencoder, images, self.latent_scale)
        found: Figures = {}
        sums = {"conditioned": 0.0, "null": 0.0}
        for timestep in LOOK_AT:
            noise = torch.randn(latent.shape, generator=generator).to(self.device)
            steps = torch.full((len(latent),), timestep, device=self.device)
            noised = self.scheduler.add_noise(latent, noise, steps)
            for name, kept in (("conditioned", 1), ("null", 0)):
                mask = torch.full((len(latent),), kept, dtype=torch.bool, device=self.device)
                noise_loss, *errors = self.networks(noised, noise, steps, embedding, mask, *targets)
                error = noise_loss.item()
                sums[name] += error / len(LOOK_AT)
                if name == "conditioned":
                    found[f"held_out_t{timestep}"] = error
                if timestep == 50 and kept:
                    for pair, e in zip(self.pairs, errors, strict=True):
                        found[f"held_out_align_{pair.tap.name}"] = e.item()
        return {f"held_out_{name}": value for name, value in sums.items()} | found

    @torch.no_grad()
    def pictures(self, folder: Path, step: int) -> None:
        """Held-out crops noised at t = 200 and denoised in one step; samples from pure noise."""
        images = to_unit(self.pool.held_out_batch(6, self.patch_px), self.device)
        generator = torch.Generator().manual_seed(self.seed)
        embedding, _ = self.encoder(images)
        everyone = torch.ones(len(images), dtype=torch.bool, device=self.device)
        latent = encode(self.autoencoder, images, self.latent_scale)
        noise = torch.randn(latent.shape, generator=generator).to(self.device)
        steps = torch.full((len(latent),), 200, device=self.device)
        noised = self.scheduler.add_noise(latent, noise, steps)
        predicted = self.networks.predict(noised, steps, embedding, everyone).float()
        alpha_bar = self.scheduler.alphas_cumprod[200].to(self.device)
        clean = (noised - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        rows = [images, self._decode(noised), self._decode(clean), self._decode(latent)]
        save_rows(folder, "denoised", rows)
        sample = torch.randn(latent.shape, generator=generator).to(self.device)
        self.sampler.set_timesteps(_SAMPLING_STEPS)
        for timestep in self.sampler.timesteps:
            steps = torch.full((len(sample),), int(timestep), device=self.device)
            predicted = self.networks.predict(sample, steps, embedding, everyone).float()
            sample = self.sampler.step(predicted, int(timestep), sample).prev_sample
        save_rows(folder, "samples", [images, self._decode(sample)])

    # -- the networks --

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        """Record the networks' kernels once, forward and backward, and replay them in every step.

        On a GPU the thousands of small kernels of a step take less time than to launch them. Only
        the training mode is replayed; each step has the same shapes.
        """
        dtype = torch.get_autocast_dtype("cuda")
        enabled = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            torch.cuda.make_graphed_callables(self.networks, tensors, allow_unused_input=True)
        self.record = False

    def _decode(self, latent: Tensor) -> Tensor:
        decoded = self.autoencoder.decode(latent / self.latent_scale, return_dict=False)[0]  # type: ignore[operator]
        return ((decoded.float() + 1) / 2).clamp(0, 1)

    def _draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        whole = torch.randint(self.scheduler.config.num_train_timesteps, (count,),
                              generator=generator)  # fmt: skip
        focus = torch.randint(self.settings.focus_steps, (count,), generator=generator)
        chosen = torch.rand(count, generator=generator) < self.settings.focus_share
        return torch.where(chosen, focus, whole)

    def _draw_noise(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """In the shape of the latent; on a GPU by its own generator, which takes no time."""
        if latent.device.type == "cpu":
            return torch.randn(latent.shape, generator=generator)
        seed = int(torch.randint(1 << 62, (), generator=generator))
        own = torch.Generator(latent.device).manual_seed(seed)
        return torch.randn(latent.shape, generator=own, device=latent.device)

    def _embedding(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        if isinstance(self.encoder, ConvEncoder):
            return maps[-1].mean(dim=(2, 3))
        return self.encoder(images)[0]

    def _targets(self, maps: list[Tensor]) -> list[Tensor]:
        """Of each pair: the standardised maps, at the size of the tap."""
        standard = [
            (features.float() - mean[:, None, None]) / std[:, None, None]
            for features, (mean, std) in zip(maps, self.statistics, strict=True)
        ]
        targets = []
        for pair in self.pairs:
            side = self.patch_px // pair.tap.stride
            wanted = [_resize(standard[number], (side, side)) for number in pair.maps]
            targets.append(torch.cat(wanted, dim=1))
        return targets


class DenoisingLoss(nn.Module):
    """What is trained, and its losses: UNet, conditioner, and projections of some taps.

    Args:
        unet: Predicts the noise.
        conditioner: Makes its context.
        projections: Tap -> 1 x 1 convolution.
        modules: Tap -> path of its module in the UNet.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditioner: Conditioner,
        projections: nn.ModuleDict,
        modules: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.unet, self.conditioner, self.projections = unet, conditioner, projections
        self._tapped: dict[str, Tensor] = {}
        for name, path in modules.items():
            unet.get_submodule(path).register_forward_hook(self._hook(name))

    def forward(
        self,
        noised: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embedding: Tensor,
        kept: Tensor,
        *targets: Tensor,
    ) -> tuple[Tensor, ...]:
        """Squared errors.

        Args:
            noised: (B, C, h, w) z_t.
            noise: (B, C, h, w) what of it is noise.
            timesteps: (B,) int64.
            embedding: (B, D) of the encoder.
            kept: (B,) bool: whether the condition is given.
            targets: For each projection, in order, the (B, ..., h', w') that it has to give.

        Returns:
            Mean squared errors: of the noise, then of each projection.
        """
        predicted = self.predict(noised, timesteps, embedding, kept)
        losses = [F.mse_loss(predicted.float(), noise)]
        for (name, projection), wanted in zip(self.projections.items(), targets, strict=True):
            losses.append(F.mse_loss(projection(self._tapped[name]).float(), wanted))
        self._tapped.clear()
        return tuple(losses)

    def predict(self, noised: Tensor, timesteps: Tensor, embedding: Tensor, kept: Tensor) -> Tensor:
        """The predicted noise, (B, C, h, w)."""
        with_condition = self.conditioner(embedding, len(noised))
        without = self.conditioner(None, len(noised))
        context = torch.where(kept[:, None, None], with_condition, without)
        return self.unet(
            noised.contiguous(memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=context,
            return_dict=False,
        )[0]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._tapped[name] = output[0] if isinstance(output, tuple) else output

        return hook


@dataclass(frozen=True, kw_only=True)
class AlignedPair:
    """A tap and the encoder maps that it is held against."""

    tap: TapSpec
    maps: tuple[int, ...]


def plan_alignment(
    taps: Sequence[TapSpec], map_sizes: Sequence[int], patch_px: int
) -> tuple[AlignedPair, ...]:
    """Give each encoder map to the last tap but one of the nearest stride that is not finer.

    The last tap but one, since the very last of the UNet must serve the noise prediction.

    Args:
        taps: Of the UNet, in tap order.
        map_sizes: Cells along one side of each map for a whole patch.
        patch_px: Pixels of the patch.
    """
    strides = sorted({tap.stride for tap in taps})
    chosen: dict[str, tuple[TapSpec, list[int]]] = {}
    for number, size in enumerate(map_sizes):
        stride = patch_px // size
        nearest = min(strides, key=lambda s: (s < stride, abs(s - stride)))
        of_stride = [tap for tap in taps if tap.stride == nearest]
        tap = of_stride[-2] if len(of_stride) > 1 else of_stride[-1]
        chosen.setdefault(tap.name, (tap, []))[1].append(number)
    return tuple(AlignedPair(tap=tap, maps=tuple(maps)) for tap, maps in chosen.values())


def _resize(features: Tensor, size: Sequence[int]) -> Tensor:
    if features.shape[-2:] == tuple(size):
        return features
    if features.shape[-2] > size[0]:
        return F.adaptive_avg_pool2d(features, (size[0], size[1]))
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)
