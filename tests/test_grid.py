"""The interpolation matrices mean what PyTorch's bilinear interpolation means."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pathsegdiff.grid import bilinear_matrix, patchwise_matrix


@pytest.mark.parametrize(("size_in", "size_out"), [(1, 8), (8, 64), (16, 64), (3, 7), (64, 64)])
def test_two_matrices_interpolate_as_pytorch_does(size_in, size_out):
    values = torch.randn(2, 3, size_in, size_in, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(
        values, size=(size_out, size_out), mode="bilinear", align_corners=False
    )
    matrix = bilinear_matrix(size_in, size_out)
    np.testing.assert_allclose(
        matrix @ values.numpy() @ matrix.T, expected.numpy(), rtol=1e-5, atol=1e-6
    )


def test_every_row_of_weights_sums_to_one():
    np.testing.assert_allclose(bilinear_matrix(5, 17).sum(axis=1), 1.0, rtol=1e-6)


def test_no_value_crosses_a_patch_border():
    matrix = patchwise_matrix(3, 2, 8)
    assert matrix.shape == (24, 6)
    assert not matrix[:8, 2:].any()
    assert not matrix[8:16, :2].any()
    assert not matrix[8:16, 4:].any()


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0 -> 4"):
        bilinear_matrix(0, 4)
