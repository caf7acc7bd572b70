"""The frozen networks of stage 1 behind one interface.

Shapes: B = batch, P = patch_px, D = embedding, L = context tokens, Dc = channels of a token,
C = latent channels, h, w = latent rows and columns, N = patch tokens along one side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathsegdiff.config import order_taps
from pathsegdiff.diffusion.autoencoder import encode
from pathsegdiff.diffusion.conditioning import AnyConditioner
from pathsegdiff.diffusion.encoder import AnyEncoder, NoEncoder
from pathsegdiff.diffusion.schedule import NoiseSchedule, add_noise, check_timestep
from pathsegdiff.diffusion.taps import TapSpec, capture_taps
from pathsegdiff.errors import ConfigError


class DiffusionModel(nn.Module):
    """Encoder, conditioner, autoencoder and UNet; frozen, in eval mode, without gradients.

    The weights may be float32, bfloat16 or float16, and calls may run under autocast: inputs are
    cast where they enter a network.

    Images and latents go in as channels-last. On a CPU that halves the time of the autoencoder and
    saves a tenth of the UNet's, and it is what permuted images were in the authors' code: PyTorch
    sums a channels-last GroupNorm in another order, which over 256 x 256 pixels moves float32
    results by 1e-5, more with fewer threads (``probe`` fixes their number for this reason).

    Attributes:
        patch_px: P, image pixels along one side of a patch.
        latent_shape: (C, h, w).
        tap_specs: Every tap, in tap order.
        embed_dim: D.
        token_grid: N.
        token_channels: Of a patch token; D for a transformer.
        schedule: The noise schedule.
        alphas_cumprod: (T,) float64 on the CPU; T is the number of timesteps.
    """

    def __init__(
        self,
        *,
        encoder: AnyEncoder,
        conditioner: AnyConditioner,
        autoencoder: nn.Module,
        unet: nn.Module,
        tap_specs: tuple[TapSpec, ...],
        schedule: NoiseSchedule,
        latent_scale: float,
        latent_shape: tuple[int, int, int],
        patch_px: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.unet = unet
        self.tap_specs = tap_specs
        self.schedule = schedule
        self.latent_scale = latent_scale
        self.latent_shape = latent_shape
        self.patch_px = patch_px
        self.embed_dim = encoder.config.embed_dim
        self.token_grid = encoder.config.token_grid
        self.token_channels = encoder.config.token_channels
        # An attribute and no buffer: ``model.to(bfloat16)`` must not round it.
        self.alphas_cumprod = schedule.alphas_cumprod()
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.unet.parameters()).dtype

    def check_condition(self, *, encoder: bool) -> None:
        """Raises: ConfigError: If the encoder is asked for and the model has none."""
        if encoder and isinstance(self.encoder, NoEncoder):
            raise ConfigError(
                "this model has no patch encoder: use --cond none, without --tokens, or import it "
                "with one (psd models import --encoder)"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Encoder vectors.

        Args:
            images: (B, 3, P, P) in [0, 1].

        Returns:
            (B, D) float32, raw: the conditioner does the L2 normalisation.
        """
        return self.embed_with_tokens(images)[0]

    def patch_tokens(self, images: Tensor) -> Tensor:
        """The encoder's patch tokens, (B, token_channels, N, N) float32; see ``embed``."""
        return self.embed_with_tokens(images)[1]

    @torch.no_grad()
    def embed_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``embed`` and ``patch_tokens`` from one forward pass of the encoder."""
        self._check_images(images)
        embedding, tokens = self.encoder(images)
        return embedding.float(), tokens.float()

    @torch.no_grad()
    def context(self, embedding: Tensor | None, batch: int) -> Tensor:
        """Context tokens of the UNet.

        Args:
            embedding: (B, D) from ``embed``, or None for the null condition, as the conditioner
                has it.
            batch: B.

        Returns:
            (B, L, Dc) in the dtype of the weights.
        """
        return self.conditioner(embedding, batch)

    @torch.no_grad()
    def latent(self, images: Tensor) -> Tensor:
        """Scaled clean latents x_0.

        Args:
            images: (B, 3, P, P) in [0, 1].

        Returns:
            (B, C, h, w) float32: before quantisation (VQ) or posterior mean (KL).
        """
        self._check_images(images)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        return encode(self.autoencoder, channels_last, self.latent_scale)

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_t from x_0 and epsilon; see ``schedule.add_noise``.

        Raises:
            ConfigError: If the timestep lies outside the schedule.
        """
        self.check_timestep(timestep)
        return add_noise(latent, noise, timestep, self.alphas_cumprod)

    def check_timestep(self, timestep: int) -> int:
        """Return the timestep if the schedule has it.

        Raises:
            ConfigError: If it lies outside [0, T - 1].
        """
        return check_timestep(timestep, len(self.alphas_cumprod))

    @torch.no_grad()
    def taps(
        self, x_t: Tensor, timestep: int, context: Tensor, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Features from one forward pass of the UNet, which stops at the last tap asked for.

        Args:
            x_t: (B, C, h, w) noised latents.
            timestep: t in [0, T - 1].
            context: (B, L, Dc).
            names: Taps.

        Returns:
            Tap -> (B, channels, P / stride, P / stride), in tap order, in the dtype of the
            computation.

        Raises:
            ConfigError: If a name is no tap, or the timestep lies outside the schedule.
        """
        wanted = order_taps(names)
        paths = {spec.name: spec.module_path for spec in self.tap_specs}
        with capture_taps(self.unet, [paths[name] for name in wanted]) as captured:
            self._run_unet(x_t, timestep, context)
        return {name: captured[paths[name]] for name in wanted}

    @torch.no_grad()
    def predict_noise(self, x_t: Tensor, timestep: int, context: Tensor) -> Tensor:
        """The whole UNet: (B, C, h, w) predicted epsilon; arguments as for ``taps``."""
        return self._run_unet(x_t, timestep, context)

    def _run_unet(self, x_t: Tensor, timestep: int, context: Tensor) -> Tensor:
        self.check_timestep(timestep)
        steps = torch.full((len(x_t),), timestep, dtype=torch.long, device=x_t.device)
        return self.unet(
            x_t.to(self.dtype, memory_format=torch.channels_last),
            steps,
            encoder_hidden_states=context.to(self.dtype),
            return_dict=False,
        )[0]

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1:] != (3, self.patch_px, self.patch_px):
            raise ValueError(
                f"images must be (B, 3, {self.patch_px}, {self.patch_px}), "
                f"got {tuple(images.shape)}"
            )
