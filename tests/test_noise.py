"""Keyed noise."""

import numpy as np
import pytest
from scipy import stats

from pathsegdiff.diffusion.noise import patch_noise


def test_the_same_key_gives_the_same_bits_and_no_global_state_matters():
    first = patch_noise(0, "train_1", 2, 1, (3, 8, 8))
    np.random.seed(5)
    np.testing.assert_array_equal(first, patch_noise(0, "train_1", 2, 1, (3, 8, 8)))
    assert first.dtype == np.float32


EXPECTED = [1.28286624, -0.351179987, -1.83662927, -0.0405726843, 2.4375422, -0.54926163]


def test_these_numbers_stay_for_ever():
    # made by this function when it was written (numpy 2.4); stores are tied to them
    noise = patch_noise(7, "sample", 1, 2, (1, 2, 3))
    np.testing.assert_allclose(noise.ravel(), EXPECTED, rtol=1e-6)


@pytest.mark.parametrize(
    "other", [(1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a,0", 0, 0)]
)
def test_every_part_of_the_key_counts(other):
    shape = (3, 16, 16)
    assert not np.allclose(patch_noise(0, "a", 0, 0, shape), patch_noise(*other, shape))


def test_rows_and_columns_do_not_run_together():
    assert not np.allclose(patch_noise(0, "a", 1, 11, (4,)), patch_noise(0, "a", 11, 1, (4,)))


def test_it_is_standard_normal():
    values = patch_noise(0, "a", 0, 0, (4, 128, 128)).ravel()
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_an_odd_count_is_filled():
    assert np.isfinite(patch_noise(0, "a", 0, 0, (3, 5, 7))).all()
