"""Features as int8 with one scale per channel and sample (numpy only).

A channel's largest value becomes 127, so that the step is as fine as the channel allows; channels
differ by orders of magnitude, samples by less. Rounding is to the nearest, ties to even.
"""

import numpy as np

#: Names the array beside a level that holds its scales.
SCALE_PREFIX = "scale_"
_LARGEST = 127


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
    # A largest value below the smallest normal number over 127 would overflow as a divisor.
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 1e-37)
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
