"""Features as int8: what is lost is half a step of the channel, never more."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pathsegdiff.features.quantize import dequantize, quantize, round_mantissa


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
@example(np.array([[[6.9764377e-37]], [[1e-35]], [[4e-37]], [[3e-37]]], np.float32))
def test_no_value_is_off_by_more_than_half_a_step(features):
    values, scales = quantize(features)
    assert values.dtype == np.int8
    assert values.min(initial=0) >= -127
    back = dequantize(values, scales)
    assert back.dtype == np.float32
    steps = np.maximum(scales, 1e-36)[:, None, None].astype(np.float64)
    assert (np.abs(back.astype(np.float64) - features) <= steps * (0.5 + 1e-4)).all()


def test_the_largest_value_of_each_channel_is_kept():
    features = np.array([[[1e-3, -2e-3]], [[500.0, 1.0]], [[0.0, 0.0]]], np.float16)
    values, scales = quantize(features)
    assert values[0].tolist() == [[64, -127]]
    assert values[1].tolist() == [[127, 0]]
    assert scales[2] == 0
    np.testing.assert_allclose(dequantize(values, scales)[1, 0, 0], 500.0, rtol=1e-6)
    assert not dequantize(values, scales)[2].any()


@given(arrays(np.float16, st.integers(1, 20), elements=st.floats(-60000, 60000, width=16)))
def test_a_rounded_mantissa_is_the_nearest_with_five_bits(features):
    rounded = round_mantissa(features)
    assert not (rounded.view(np.uint16) & 0x1F).any()
    # No number with five bits is nearer: neither neighbour is.
    exact, found = features.astype(np.float64), rounded.astype(np.float64)
    for step in (-32, 32):
        neighbour = (rounded.view(np.uint16).astype(np.int32) + step).clip(0, 0xFBE0)
        other = neighbour.astype(np.uint16).view(np.float16).astype(np.float64)
        same_sign = np.signbit(other) == np.signbit(found)
        assert (np.abs(exact - found) <= np.abs(exact - other))[same_sign].all()


def test_ties_go_to_the_even_neighbour():
    values = np.array([1 + 1 / 64, 1 + 3 / 64, 65504.0], np.float16)
    assert round_mantissa(values).tolist() == [1.0, 1 + 2 / 32, np.inf]


def test_normal_features_lose_one_percent():
    features = np.random.default_rng(0).normal(size=(16, 64, 64)).astype(np.float32)
    back = dequantize(*quantize(features))
    error = np.linalg.norm(back - features) / np.linalg.norm(features)
    assert error == pytest.approx(0.01, abs=0.004)
