"""Pixel metrics: counted by hand, against scikit-learn, and by their properties."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathsegdiff.evaluation.confusion import (
    class_image_means,
    confusion_matrix,
    image_means,
    json_safe,
    pooled_statistics,
    scores,
)


def label_maps(seed, num_classes, shape=(40, 50)):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, num_classes, shape)
    predicted = np.where(rng.random(shape) < 0.6, target, rng.integers(0, num_classes, shape))
    return target.astype(np.uint8), predicted.astype(np.uint8)


def test_predicting_where_the_label_is_ignored_costs_nothing_and_hiding_does():
    target, predicted = np.array([[0, 0, 1, 2]]), np.array([[0, 1, 1, 1]])
    confusion = confusion_matrix(target, predicted, num_classes=2)
    assert confusion.tolist() == [[1, 1], [0, 1]]  # counted by hand
    assert confusion.dtype == np.int64


def test_every_label_from_k_on_is_left_out():
    target = np.array([[0, 1, 2, 255]], np.uint8)
    predicted = np.zeros((1, 4), np.uint8)
    assert confusion_matrix(target, predicted, 2).tolist() == [[1, 0], [1, 0]]


def test_predicting_dont_care_is_refused():
    with pytest.raises(ValueError, match=r"predicted labels must be in \[0, 1\], got 2"):
        confusion_matrix(np.array([[0, 2]]), np.array([[0, 2]]), 2)
    with pytest.raises(ValueError, match="got -1"):
        confusion_matrix(np.array([[0]]), np.array([[-1]]), 2)


@pytest.mark.parametrize(
    ("target", "predicted", "match"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "prediction has shape"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "target's labels must be integers, got float64"),
        (np.full((1, 1), -1), np.zeros((1, 1), int), "target holds the label -1"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(target, predicted, match):
    with pytest.raises(ValueError, match=match):
        confusion_matrix(target, predicted, 2)


def test_many_classes_do_not_wrap_around_in_8_bits():
    target = np.arange(200, dtype=np.uint8).reshape(10, 20)
    assert confusion_matrix(target, target, 200).tolist() == np.eye(200, dtype=int).tolist()


def test_a_map_without_a_counted_pixel_counts_nothing_and_scores_nothing():
    confusion = confusion_matrix(np.full((3, 3), 255), np.zeros((3, 3), int), 2)
    assert confusion.sum() == 0
    assert confusion_matrix(np.zeros((0, 4), int), np.zeros((0, 4), int), 2).sum() == 0
    empty = scores(confusion)
    assert empty.absent == (0, 1)
    assert math.isnan(empty.accuracy) and math.isnan(empty.dice) and math.isnan(empty.miou)


def test_scores_of_a_matrix_counted_by_hand():
    #          predicted 0  1
    result = scores(np.array([[6, 2], [1, 1]]))
    assert result.accuracy == pytest.approx(7 / 10)
    assert [row.iou for row in result.per_class] == pytest.approx([6 / 9, 1 / 4])
    assert [row.dice for row in result.per_class] == pytest.approx([12 / 15, 2 / 5])
    assert [row.precision for row in result.per_class] == pytest.approx([6 / 7, 1 / 3])
    assert [row.recall for row in result.per_class] == pytest.approx([6 / 8, 1 / 2])
    assert [row.pixels for row in result.per_class] == [8, 2]
    assert [row.predicted_pixels for row in result.per_class] == [7, 3]
    assert result.dice == result.f1 == pytest.approx((0.8 + 0.4) / 2)
    assert result.miou == pytest.approx((6 / 9 + 1 / 4) / 2)
    assert result.variants["frequency_weighted_iou"] == pytest.approx(0.8 * 6 / 9 + 0.2 / 4)
    assert result.variants["frequency_weighted_dice"] == pytest.approx(0.8 * 0.8 + 0.2 * 0.4)
    assert result.variants["micro_iou"] == pytest.approx(7 / 13)
    assert result.variants["micro_dice"] == pytest.approx(0.7)
    assert result.variants["balanced_accuracy"] == pytest.approx((0.75 + 0.5) / 2)
    assert result.pixels == 10


def test_a_class_in_neither_map_is_named_and_does_not_lower_the_mean():
    with_absent = scores(np.array([[6, 0, 2], [0, 0, 0], [1, 0, 1]]))
    without = scores(np.array([[6, 2], [1, 1]]))
    assert with_absent.absent == (1,)
    assert math.isnan(with_absent.per_class[1].dice)
    assert (with_absent.dice, with_absent.miou) == (without.dice, without.miou)
    assert with_absent.variants == pytest.approx(without.variants)


def test_a_class_that_is_only_predicted_counts_as_zero():
    result = scores(np.array([[6, 2], [0, 0]]))
    assert result.absent == ()
    assert result.per_class[1].dice == 0.0
    assert math.isnan(result.per_class[1].recall)
    assert result.dice == pytest.approx(12 / 14 / 2)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_scores_agree_with_scikit_learn(num_classes):
    from sklearn import metrics as sklearn

    target, predicted = label_maps(num_classes, num_classes)
    y, p = target.ravel(), predicted.ravel()
    confusion = confusion_matrix(target, predicted, num_classes)
    assert confusion.tolist() == sklearn.confusion_matrix(y, p).tolist()
    result = scores(confusion)
    assert result.accuracy == pytest.approx(sklearn.accuracy_score(y, p))
    assert result.dice == pytest.approx(sklearn.f1_score(y, p, average="macro"))
    assert result.miou == pytest.approx(sklearn.jaccard_score(y, p, average="macro"))
    variants = {
        "micro_iou": sklearn.jaccard_score(y, p, average="micro"),
        "micro_dice": sklearn.f1_score(y, p, average="micro"),
        "frequency_weighted_iou": sklearn.jaccard_score(y, p, average="weighted"),
        "frequency_weighted_dice": sklearn.f1_score(y, p, average="weighted"),
        "balanced_accuracy": sklearn.balanced_accuracy_score(y, p),
        "macro_precision": sklearn.precision_score(y, p, average="macro"),
    }
    assert result.variants == pytest.approx(variants)
    per_class = sklearn.precision_recall_fscore_support(y, p)
    assert [row.precision for row in result.per_class] == pytest.approx(per_class[0])
    assert [row.recall for row in result.per_class] == pytest.approx(per_class[1])
    assert [row.dice for row in result.per_class] == pytest.approx(per_class[2])
    assert [row.pixels for row in result.per_class] == per_class[3].tolist()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(2, 6))
def test_renaming_the_classes_changes_no_mean(seed, num_classes):
    target, predicted = label_maps(seed, num_classes, (8, 9))
    new_name = np.random.default_rng(seed).permutation(num_classes)
    before = confusion_matrix(target, predicted, num_classes)
    after = confusion_matrix(new_name[target], new_name[predicted], num_classes)
    assert (after[np.ix_(new_name, new_name)] == before).all()
    first, second = pooled_statistics(before), pooled_statistics(after)
    for name, value in first.items():
        assert float(second[name]) == pytest.approx(float(value), nan_ok=True), name


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_swapping_truth_and_prediction_keeps_dice_and_iou(seed):
    target, predicted = label_maps(seed, 3, (6, 7))
    one = scores(confusion_matrix(target, predicted, 3))
    other = scores(confusion_matrix(predicted, target, 3))
    assert (one.accuracy, one.dice, one.miou) == pytest.approx(
        (other.accuracy, other.dice, other.miou)
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_dice_is_two_iou_over_one_plus_iou(seed):
    target, predicted = label_maps(seed, 4, (6, 7))
    for row in scores(confusion_matrix(target, predicted, 4)).per_class:
        if not math.isnan(row.iou):
            assert row.dice == pytest.approx(2 * row.iou / (1 + row.iou))


def test_matrices_add_up_over_the_parts_of_an_image():
    target, predicted = label_maps(1, 4)
    whole = confusion_matrix(target, predicted, 4)
    parts = [confusion_matrix(target[:, s], predicted[:, s], 4) for s in (np.s_[:13], np.s_[13:])]
    assert (sum(parts) == whole).all()


def test_image_means_weigh_every_image_the_same_and_skip_those_without_pixels():
    confusions = np.array([[[1, 0], [0, 0]], [[50, 50], [0, 0]], [[0, 0], [0, 0]]])
    means = image_means(confusions)
    assert means["accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert means["dice"] == pytest.approx((1 + (2 / 3) / 2) / 2)
    by_class = class_image_means(confusions)
    assert by_class[0] == {
        "iou": pytest.approx(0.75),
        "dice": pytest.approx((1 + 2 / 3) / 2),
        "images": 2,
    }
    assert by_class[1] == {"iou": 0.0, "dice": 0.0, "images": 1}


def test_the_dict_form_is_strict_json():
    document = scores(np.array([[3, 0], [0, 0]])).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["per_class"][1]["dice"] is None
    assert document["absent"] == [1]
    odd = {"a": np.float32("inf"), 2: (np.int64(1), np.bool_(True)), "c": np.arange(2)}
    assert json_safe(odd) == {"a": None, "2": [1, True], "c": [0, 1]}


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros(4), np.array([[1, -1], [0, 0]])])
def test_what_is_no_confusion_matrix_is_refused(wrong):
    with pytest.raises(ValueError, match="confusion matrix"):
        scores(wrong)
