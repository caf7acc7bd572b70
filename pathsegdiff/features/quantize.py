"""What is stored of features, beside float16 and float32 as they are (numpy only).

int8: with one scale per channel and sample. A channel's largest value becomes 127, so that the step
is as fine as the channel allows; channels differ by orders of magnitude, samples by less.

float16-5bit: float16 with five of the ten bits of its mantissa, the rest zeros for the compressor.

Rounding is to the nearest, ties to even.
"""

import numpy as np

#: Names the array beside a level that holds its scales.
SCALE_PREFIX = "scale_"
_LARGEST = 127
#: The inverse of a smaller scale is no float32; its channel is taken for zeros.
_SMALLEST = 3e-39
_MANTISSA_BITS, _KEPT_BITS = 10, 5


def array_dtype(stored: str) -> str:
    """numpy's name of what an array holds, for a recipe's dtype."""
    return "float16" if stored == "float16-5bit" else stored


def is_compressed(stored: str) -> bool:
    """Whether features of a recipe's dtype are worth compressing.

    Zstandard takes a tenth off int8, for next to nothing; of float16 it takes 8 %, and reading
    gets several times slower (docs/performance.md).
    """
    return stored in ("int8", "float16-5bit")


def round_mantissa(features: np.ndarray, bits: int = _KEPT_BITS) -> np.ndarray:
    """float16 with the last bits of its mantissa rounded away.

    Args:
        features: Finite floats.
        bits: Of the mantissa that stay, below 10.

    Returns:
        float16 of the same shape; infinite where a value was rounded above 65504.
    """
    drop = _MANTISSA_BITS - bits
    raw = features.astype(np.float16).view(np.uint16).astype(np.uint32)
    raw += (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)
    return (raw >> drop << drop).astype(np.uint16).view(np.float16)


def as_read(features: np.ndarray, stored: str) -> np.ndarray:
    """What a reader of a store would get of features that went into it.

    Args:
        features: (C, M, N) floats of a region.
        stored: The recipe's dtype.
    """
    if stored == "int8":
        return dequantize(*quantize(features))
    if stored == "float16-5bit":
        return round_mantissa(features)
    return features


def quantize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features to int8.

    Args:
        features: (C, M, N) finite floats.

    Returns:
        (C, M, N) int8 in [-127, 127], and (C,) float32 scales: value = int8 * scale. A channel of
        zeros has scale 0.
    """
    values = features.astype(np.float32, copy=False)
    scales = np.abs(values).max(axis=(1, 2), initial=0.0) / np.float32(_LARGEST)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > _SMALLEST)
    steps = np.rint(values * inverse[:, None, None])
    return np.clip(steps, -_LARGEST, _LARGEST).astype(np.int8), scales


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What ``quantize`` was given, up to half a scale.

    Args:
        values: (C, m, n) int8.
        scales: (C,) float32.

    Returns:
        (C, m, n) float32.
    """
    return values * scales[:, None, None]
