"""Keyed noise: one draw per patch, the same whatever the batch, device, worker count or order."""

import hashlib
import json

import numpy as np

#: Enters every key; a change here changes every feature that was ever extracted.
_PURPOSE = "pathsegdiff.noise.1"


def patch_noise(
    seed: int, sample_id: str, row: int, column: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Standard normal noise for one patch.

    The raw 64-bit words come from Philox, a counter-based generator (Salmon et al. 2011), keyed by
    SHA-256 of the arguments. They become normal by Box-Muller here and not by NumPy's
    ``standard_normal``, whose algorithm NumPy may change between releases (NEP 19); the words of a
    bit generator are promised to stay.

    Args:
        seed: Of the run.
        sample_id: Name of the region.
        row: Patch row in the region.
        column: Patch column in the region.
        shape: Of the latent, (C, h, w).

    Returns:
        ``shape`` float32.
    """
    name = json.dumps([_PURPOSE, int(seed), sample_id, int(row), int(column)])
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    count = int(np.prod(shape, dtype=np.int64))
    words = np.random.Philox(key=key).random_raw(2 * ((count + 1) // 2))
    # 53 bits each; the half keeps the first above 0, where the logarithm ends
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    first, second = uniform.reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normal[:count].astype(np.float32).reshape(shape)
