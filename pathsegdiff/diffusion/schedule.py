"""Noise schedule of the latent diffusion model, and the forward process.

Only the closed form q(x_t | x_0) lives here; feature extraction never samples.
Shapes: B = batch, C = latent channels, H, W = latent rows and columns, T = steps of the schedule.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pathsegdiff.errors import ConfigError

#: Names as diffusers uses them. CompVis calls the first "linear" and the second "sqrt_linear".
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
#: Above any scale and any beta of a model; a larger whole number fits no float.
MAX_NUMBER = 1e9


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The betas of a model, as the arguments that make them.

    Attributes:
        beta_schedule: One of ``BETA_SCHEDULES``. "scaled_linear" is linear in sqrt(beta).
        beta_start: First beta; "squaredcos_cap_v2" does not use it.
        beta_end: Last beta; likewise.
        timesteps: T.
    """

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ConfigError(
                f"the noise schedule must be one of {', '.join(BETA_SCHEDULES)}, "
                f"got {self.beta_schedule!r}"
            )
        if not 1 <= self.timesteps <= 100_000:
            raise ConfigError(f"a schedule has 1 to 100000 timesteps, got {self.timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"betas must rise within (0, 1), got {self.beta_start} to {self.beta_end}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def alphas_cumprod(self) -> Tensor:
        """(T,) float64 alpha-bar, the cumulative product of 1 - beta."""
        return torch.cumprod(1 - self.betas(), dim=0)

    def betas(self) -> Tensor:
        """(T,) float64."""
        if self.beta_schedule == "linear":
            return torch.linspace(
                self.beta_start, self.beta_end, self.timesteps, dtype=torch.float64
            )
        if self.beta_schedule == "scaled_linear":
            start, end = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            return torch.linspace(start, end, self.timesteps, dtype=torch.float64) ** 2
        # Nichol & Dhariwal 2021, eq. 17, https://arxiv.org/abs/2102.09672
        steps = torch.arange(self.timesteps + 1, dtype=torch.float64) / self.timesteps
        alpha_bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def check_timestep(timestep: int, timesteps: int, whose: str = " for this model") -> int:
    """Return the timestep if the schedule has it.

    Args:
        timestep: t.
        timesteps: T of the schedule.
        whose: Model in the message.

    Raises:
        ConfigError: If it lies outside [0, timesteps - 1].
    """
    if not 0 <= timestep < timesteps:
        raise ConfigError(f"t must be in [0, {timesteps - 1}]{whose}, got {timestep}")
    return timestep


def add_noise(latent: Tensor, noise: Tensor, timestep: int, alphas_cumprod: Tensor) -> Tensor:
    """Noise a clean latent: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon.

    Ho et al. 2020, eq. 4, https://arxiv.org/abs/2006.11239.

    Args:
        latent: (B, C, H, W) x_0, already multiplied by the autoencoder's scaling factor.
        noise: (B, C, H, W) epsilon ~ N(0, 1), drawn by the caller, who owns the seed.
        timestep: t in [0, T - 1]; 0 is nearly clean.
        alphas_cumprod: (T,) cumulative product of 1 - beta.

    Returns:
        (B, C, H, W) x_t, in the dtype of ``latent``.

    Raises:
        ValueError: If the shapes differ or the timestep lies outside the schedule.
    """
    if latent.shape != noise.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, latent {tuple(latent.shape)}")
    if not 0 <= timestep < len(alphas_cumprod):
        raise ValueError(f"timestep must be in [0, {len(alphas_cumprod) - 1}], got {timestep}")
    # Subtract in float64: in bfloat16, 1 - alpha_bar rounds to 0 at t = 0.
    alpha_bar = alphas_cumprod[timestep].double()
    scale, sigma = alpha_bar.sqrt().to(latent), (1 - alpha_bar).sqrt().to(latent)
    return scale * latent + sigma * noise.to(latent)
