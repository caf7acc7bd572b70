"""Bootstrap intervals: against a plain loop and scipy, and by what they must do."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from pathsegdiff.evaluation.confusion import scores
from pathsegdiff.evaluation.intervals import (
    bootstrap,
    object_intervals,
    paired_difference,
    pixel_intervals,
    pixel_statistics,
)
from pathsegdiff.evaluation.objects import image_object_scores, object_sums, pool_objects


def random_confusions(seed, images, num_classes=3):
    rng = np.random.default_rng(seed)
    right = rng.uniform(0.5, 0.95, (images, 1, 1))
    rate = np.where(np.eye(num_classes, dtype=bool), right, (1 - right) / (num_classes - 1))
    return rng.poisson(1000 * rate)


def share_right(sums):
    return {"right": sums[..., 0] / sums[..., 1]}


def test_the_value_is_the_pooled_score_and_lies_inside_its_interval():
    confusions = random_confusions(0, 40)
    pooled = scores(confusions.sum(axis=0))
    found = pixel_intervals(confusions)
    assert found["accuracy"].value == pooled.accuracy
    assert found["miou"].value == pooled.miou
    assert found["f1"] == found["dice"]
    assert found["dice_1"].value == pooled.per_class[1].dice
    assert found["iou_2"].value == pooled.per_class[2].iou
    for interval in found.values():
        assert interval.low < interval.value < interval.high
        assert (interval.level, interval.draws) == (0.95, 2000)


def test_the_interval_agrees_with_a_plain_resampling_loop():
    confusions = random_confusions(1, 25)
    rng = np.random.default_rng(7)
    drawn = [scores(confusions[rng.integers(0, 25, 25)].sum(axis=0)).miou for _ in range(3000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = pixel_intervals(confusions, draws=4000)["miou"]
    tolerance = 0.06 * (high - low)
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)


def test_the_interval_agrees_with_scipy_on_a_mean():
    values = np.random.default_rng(2).exponential(size=60)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=6000, rng=3
    ).confidence_interval
    sums = np.stack([values, np.ones(60)], axis=1)
    ours = bootstrap(sums, share_right, draws=6000)["right"]
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(4)
    hits = 0
    for trial in range(200):
        sums = np.stack([rng.normal(0.7, 0.1, 50), np.ones(50)], axis=1)
        found = bootstrap(sums, share_right, draws=400, seed=trial)["right"]
        hits += found.low <= 0.7 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_seed_decides_the_draws():
    confusions = random_confusions(5, 20)
    assert pixel_intervals(confusions, seed=3) == pixel_intervals(confusions, seed=3)
    first, second = pixel_intervals(confusions, seed=3), pixel_intervals(confusions, seed=4)
    assert first["dice"].low != second["dice"].low


def test_a_higher_level_is_wider():
    confusions = random_confusions(6, 20)
    narrow = pixel_intervals(confusions, level=0.5)["dice"]
    wide = pixel_intervals(confusions, level=0.99)["dice"]
    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_image_or_equal_images_have_no_spread():
    one = random_confusions(7, 1)
    for confusions in (one, np.repeat(one, 9, axis=0)):
        found = pixel_intervals(confusions, draws=50)["miou"]
        assert found.low == pytest.approx(found.value) == pytest.approx(found.high)


def test_drawing_whole_patients_is_wider_when_their_images_resemble_each_other():
    patients = random_confusions(8, 12)
    confusions = np.repeat(patients, 5, axis=0)
    groups = np.repeat([f"p{i}" for i in range(12)], 5).tolist()
    by_image = pixel_intervals(confusions)["dice"]
    by_patient = pixel_intervals(confusions, groups=groups)["dice"]
    assert by_patient.value == pytest.approx(by_image.value)
    assert by_patient.high - by_patient.low > 1.6 * (by_image.high - by_image.low)
    # Five equal images weigh as one: the same as a bootstrap over the patients.
    assert by_patient.low == pytest.approx(pixel_intervals(patients)["dice"].low)


def test_a_class_missing_from_some_draws_uses_the_others_and_one_never_seen_is_nan():
    confusions = np.zeros((6, 3, 3), int)
    confusions[:, 0, 0] = 10
    confusions[0, 1, 1] = confusions[0, 1, 0] = 5  # one image alone holds class 1; none class 2
    found = pixel_intervals(confusions, draws=500)
    assert 250 < found["dice_1"].draws < 450  # 1 - (5/6)^6 = 0.665 of the draws
    assert found["dice_1"].low == pytest.approx(2 / 3)
    assert found["dice_2"].draws == 0 and math.isnan(found["dice_2"].low)
    assert found["dice_2"].to_dict()["value"] is None
    json.dumps(found["dice_2"].to_dict(), allow_nan=False)


def test_paired_difference_is_narrower_than_the_runs_and_antisymmetric():
    hard = random_confusions(9, 30)
    better = hard.copy()
    moved = better[:, 0, 1] // 2
    better[:, 0, 1] -= moved
    better[:, 0, 0] += moved
    found = paired_difference(better, hard, pixel_statistics)["accuracy"]
    alone = pixel_intervals(hard)["accuracy"]
    pooled = [scores(run.sum(axis=0)).accuracy for run in (better, hard)]
    assert found.value == pytest.approx(pooled[0] - pooled[1])
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    back = paired_difference(hard, better, pixel_statistics)["accuracy"]
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_a_run_does_not_differ_from_itself():
    confusions = random_confusions(10, 10)
    for interval in paired_difference(confusions, confusions, pixel_statistics).values():
        assert interval.low == interval.value == interval.high == 0.0


def test_object_intervals_hold_the_pooled_values_even_when_infinite():
    target = np.zeros((12, 12), int)
    target[2:6, 2:6] = 1
    shifted = np.roll(target, 1, axis=1)
    images = [image_object_scores(target, p) for p in (target, shifted, np.zeros_like(target))]
    split = pool_objects(images)
    found = object_intervals(object_sums(images), draws=300)
    assert found["object_f1"].value == split.f1
    assert found["object_dice"].value == split.dice
    assert found["object_hausdorff"].value == found["object_hausdorff"].high == math.inf
    assert found["object_hausdorff"].low <= 1
    assert found["object_hausdorff"].to_dict()["high"] is None
    same = paired_difference(
        object_sums(images),
        object_sums(images),
        lambda sums: {"h": sums[..., 5] + np.where(sums[..., 6] > 0, math.inf, 0)},
        draws=50,
    )
    assert math.isnan(same["h"].value)  # infinity minus infinity


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"draws": 0}, "draws must be at least 1"),
        ({"level": 1.0}, "level must be between 0 and 1"),
        ({"groups": ["a"]}, "1 groups for 4 images"),
    ],
)
def test_arguments_out_of_range_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        pixel_intervals(random_confusions(0, 4), **change)


def test_no_images_or_different_runs_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        pixel_intervals(np.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match="the runs have shapes"):
        paired_difference(np.zeros((2, 2, 2)), np.zeros((3, 2, 2)), pixel_statistics)
