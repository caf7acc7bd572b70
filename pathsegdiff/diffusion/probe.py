"""One patch through stage 1, with every number that comes up on the way.

For comparing with the authors' code, and for finding out where two machines part.
"""

import tokenize  # numpy reads headers with it, and lets its error through
from pathlib import Path

import numpy as np
import torch

from pathsegdiff.config import ALL_TAPS, CONDITIONINGS
from pathsegdiff.data.image import read_image
from pathsegdiff.device import computing_on
from pathsegdiff.diffusion.bundle import Bundle
from pathsegdiff.diffusion.model import DiffusionModel
from pathsegdiff.diffusion.noise import patch_noise
from pathsegdiff.errors import ConfigError, DataError

#: Threads that compute a probe, whatever the machine has. The sum in PyTorch's channels-last
#: GroupNorm depends on their number: for one 256 px patch by 2.6e-5 (one thread against two), which
#: is above the 1e-5 to which a probe is compared. The authors' code was run with two.
_THREADS = 2


def probe_patch(
    bundle: Bundle,
    image: np.ndarray,
    timestep: int,
    *,
    noise: np.ndarray,
    conditioning: str = "encoder",
    full: bool = False,
) -> dict[str, np.ndarray]:
    """Compute everything for one patch in float32 on the CPU.

    Args:
        bundle: The model.
        image: (P, P, 3) uint8 RGB.
        timestep: t in [0, T - 1].
        noise: (1, C, h, w) or (C, h, w) epsilon.
        conditioning: "encoder", or "none" for the null condition.
        full: Also the UNet's prediction, and the context of the other condition.

    Returns:
        Float32 arrays, batch axis first: embedding (raw), context, latent (scaled), noised_latent,
        and the taps at native size; with ``full`` eps_pred and context_null or context_encoder.

    Raises:
        ConfigError: If the timestep lies outside the schedule, or the conditioning is unknown.
        DataError: If image or noise have another shape.
    """
    card = bundle.card
    if conditioning not in CONDITIONINGS:
        raise ConfigError(f"cond must be one of {', '.join(CONDITIONINGS)}, got {conditioning!r}")
    card.check_timestep(timestep)
    if image.shape != (card.patch_px, card.patch_px, 3):
        raise DataError(
            f"a patch has {card.patch_px} x {card.patch_px} pixels, the image "
            f"{image.shape[0]} x {image.shape[1]} (height x width); cut a patch out of it first"
        )
    if noise.shape not in (card.latent_shape, (1, *card.latent_shape)):
        raise DataError(
            f"noise has shape {noise.shape}, this model's latents {(1, *card.latent_shape)}"
        )
    model = bundle.load("cpu", torch.float32)
    model.check_condition(encoder=conditioning == "encoder")
    with computing_on(_THREADS):
        arrays = _forward(
            model,
            torch.from_numpy(np.ascontiguousarray(image)),
            timestep,
            torch.from_numpy(noise.astype(np.float32)).reshape(1, *card.latent_shape),
            conditioning,
            full,
        )
    return {name: value.float().contiguous().numpy() for name, value in arrays.items()}


def _forward(
    model: DiffusionModel,
    image: torch.Tensor,
    timestep: int,
    noise: torch.Tensor,
    conditioning: str,
    full: bool,
) -> dict[str, torch.Tensor]:
    images = image.permute(2, 0, 1)[None].float() / 255
    embedding = model.embed(images)
    contexts = {"encoder": model.context(embedding, 1), "none": model.context(None, 1)}
    context = contexts[conditioning]
    latent = model.latent(images)
    x_t = model.add_noise(latent, noise, timestep)
    arrays = {
        "embedding": embedding,
        "context": context,
        "latent": latent,
        "noised_latent": x_t,
        **model.taps(x_t, timestep, context, ALL_TAPS),
    }
    if full:
        arrays["eps_pred"] = model.predict_noise(x_t, timestep, context)
        other = "context_null" if conditioning == "encoder" else "context_encoder"
        arrays[other] = contexts["none" if conditioning == "encoder" else "encoder"]
    return arrays


def probe_file(
    bundle: Bundle,
    image: Path,
    timestep: int,
    *,
    noise: Path | None = None,
    conditioning: str = "encoder",
    full: bool = False,
) -> dict[str, np.ndarray]:
    """``probe_patch`` of files.

    Args:
        bundle: The model.
        image: Image file of one patch.
        timestep: t in [0, T - 1].
        noise: NPY file; None draws the keyed noise of seed 0, sample (name of the image file
            without its ending), row 0, column 0.
        conditioning: "encoder" or "none".
        full: See ``probe_patch``.

    Raises:
        ConfigError: See ``probe_patch``.
        DataError: If a file cannot be read, or has another shape.
    """
    if noise is None:
        epsilon = patch_noise(0, image.stem, 0, 0, bundle.card.latent_shape)
    else:
        epsilon = read_noise(noise)
    return probe_patch(
        bundle,
        read_image(image),
        timestep,
        noise=epsilon,
        conditioning=conditioning,
        full=full,
    )


def read_noise(path: Path) -> np.ndarray:
    """Read an NPY file of finite numbers; pickled objects in it are refused.

    Raises:
        DataError: If it is something else.
    """
    try:  # mapped, so that a header that claims more than the file holds is found out
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path} is not an NPY file of numbers: {error!s:.120}") from None
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise DataError(f"{path} must hold finite numbers")
    return np.array(array)
