"""Bilinear interpolation as matrices (numpy only): both stages must mean the same dense map.

The paper's dense map f upsamples each tap of each patch to the stride-4 grid (equation 4) and then
stitches the patches, so no value crosses a patch border. Along one axis that is a block-diagonal
matrix; a map is upsampled by one such matrix per axis.
"""

import numpy as np


def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights of ``F.interpolate(mode="bilinear", align_corners=False)`` along one axis.

    Returns:
        (size_out, size_in) float32; every row sums to 1.

    Raises:
        ValueError: If a size is below 1.
    """
    if size_in < 1 or size_out < 1:
        raise ValueError(f"sizes must be at least 1, got {size_in} -> {size_out}")
    # Half-pixel centres, clamped at the left edge as PyTorch does.
    centre = np.maximum((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0.0)
    low = np.minimum(centre.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    fraction = centre - low
    matrix = np.zeros((size_out, size_in), np.float64)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1.0 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix.astype(np.float32)


def patchwise_matrix(patches: int, size_in: int, size_out: int) -> np.ndarray:
    """Bilinear weights for ``patches`` patches side by side, none reaching into its neighbour.

    Args:
        patches: Patches along the axis.
        size_in: Cells of one patch at the level's own stride.
        size_out: Cells of one patch on the target grid.

    Returns:
        (patches * size_out, patches * size_in) float32, block-diagonal.
    """
    return np.kron(np.eye(patches, dtype=np.float32), bilinear_matrix(size_in, size_out))
