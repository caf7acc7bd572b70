"""Passes over a data set equal plain loops."""

import numpy as np
import pytest

from pathsegdiff.data import passes
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.data.passes import class_pixel_counts, iterate_threads, map_threads
from pathsegdiff.errors import DataError
from tests.helpers_data import make_bcss, make_glas


def plain_counts(dataset, split=None, seed=0):
    """The same count, one region after the other."""
    total = [0] * dataset.scheme.num_classes
    for sample in dataset.samples:
        if split in (None, sample.split):
            label = dataset.read(sample, seed=seed).label
            for class_id in range(len(total)):
                total[class_id] += int((label == class_id).sum())
    return total


@pytest.mark.parametrize("make", [make_glas, make_bcss])
def test_class_counts_equal_a_plain_loop(tmp_path, make):
    dataset = open_dataset(make(tmp_path))
    counts = class_pixel_counts(dataset)
    assert counts.dtype == np.int64
    assert counts.tolist() == plain_counts(dataset)
    assert class_pixel_counts(dataset, "train", seed=3).tolist() == plain_counts(
        dataset, "train", seed=3
    )


def test_pixels_that_are_not_counted_are_in_no_class(tmp_path):
    dataset = open_dataset(make_bcss(tmp_path))
    counts = class_pixel_counts(dataset, "test")
    # Five regions of 96 x 96; half of one lies outside its source.
    assert counts.sum() == 5 * 96 * 96 - 48 * 96


def test_a_pass_keeps_the_order_and_raises_the_error():
    assert map_threads(lambda value: value * value, range(50)) == [i * i for i in range(50)]

    def fail(value):
        if value == 3:
            raise DataError("three")
        return value

    with pytest.raises(DataError, match="three"):
        map_threads(fail, range(5))
    assert map_threads(fail, []) == []


def test_a_pass_is_no_more_than_a_block_ahead_of_who_uses_its_results(monkeypatch):
    monkeypatch.setattr(passes, "BLOCK", 4)
    made = []

    def square(value):
        made.append(value)
        return value * value

    used = 0
    for number, result in enumerate(iterate_threads(square, iter(range(50)))):
        assert result == number * number
        used += 1
        assert len(made) == min(50, 4 * (number // 4 + 1))
    assert used == 50
