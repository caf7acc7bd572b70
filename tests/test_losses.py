import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pathsegdiff.segmentation.losses import (
    class_weights,
    cross_entropy_sums,
    predict_labels,
    soft_dice_loss,
    soft_dice_sums,
    weighted_cross_entropy,
)


def test_weights_are_one_minus_the_share_of_the_class():
    weights = class_weights(np.array([75, 20, 5]), num_outputs=3)
    np.testing.assert_allclose(weights, [0.25, 0.8, 0.95], rtol=1e-6)
    assert weights.dtype == np.float32


def test_dont_care_has_weight_0_and_does_not_enter_the_shares():
    weights = class_weights(np.array([60, 40]), num_outputs=3)
    np.testing.assert_allclose(weights, [0.4, 0.6, 0.0], rtol=1e-6)


@pytest.mark.parametrize("counts", [[0, 0], [10, 0], [0, 10, 0]])
def test_weights_of_fewer_than_two_classes_are_refused(counts):
    with pytest.raises(ValueError, match="fewer than two classes"):
        class_weights(np.array(counts), num_outputs=len(counts))


def test_the_loss_divides_by_the_sum_of_the_weights():
    # One pixel of each class, both with p = 1/2: log 2 whatever the weights.
    logits = torch.zeros(1, 2, 1, 2)
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    loss = weighted_cross_entropy(logits, labels, torch.tensor([0.1, 0.9]))
    assert loss.item() == pytest.approx(math.log(2))


def test_the_loss_is_pytorchs_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, generator=generator)
    labels = torch.randint(0, 3, (2, 5, 4), generator=generator)
    weights = torch.tensor([0.2, 0.7, 1.1])
    expected = F.cross_entropy(logits, labels, weight=weights)
    torch.testing.assert_close(weighted_cross_entropy(logits, labels.byte(), weights), expected)


def test_dont_care_and_unlabelled_pixels_cost_nothing_and_get_no_gradient():
    logits = torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    labels = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    weights = torch.tensor([0.3, 0.7, 0.0])
    loss = weighted_cross_entropy(logits, labels, weights)
    loss.backward()
    expected = weighted_cross_entropy(logits[..., :2], labels[..., :2], weights)
    assert loss.item() == pytest.approx(expected.item())
    assert (logits.grad[..., 2:] == 0).all()
    assert (logits.grad[..., :2] != 0).all()


def test_a_label_without_an_output_is_left_out_where_there_is_no_dont_care():
    logits = torch.zeros(1, 2, 1, 2)
    labels = torch.tensor([[[1, 255]]], dtype=torch.uint8)
    total, weight = cross_entropy_sums(logits, labels, torch.tensor([0.5, 0.25]))
    assert total.item() == pytest.approx(0.25 * math.log(2))
    assert weight.item() == 0.25


def test_a_crop_that_holds_only_dont_care_costs_exactly_nothing():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.full((1, 2, 2), 2, dtype=torch.uint8)
    loss = weighted_cross_entropy(logits, labels, torch.tensor([0.5, 0.5, 0.0]))
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()


def test_dont_care_is_never_predicted():
    logits = torch.tensor([1.0, 2.0, 9.0]).view(1, 3, 1, 1)
    labels = predict_labels(logits, num_classes=2)
    assert labels.tolist() == [[[1]]]
    assert labels.dtype == torch.uint8


def test_soft_dice_is_one_minus_twice_the_overlap_over_both_sums():
    # Two pixels of class 0 and one of class 1, all with p = 1/2; class 2 does not occur.
    logits = torch.tensor([0.0, 0.0, -1e9]).view(1, 3, 1, 1).expand(1, 3, 1, 3)
    labels = torch.tensor([[[0, 0, 1]]], dtype=torch.uint8)
    sums = soft_dice_sums(logits, labels, 3)
    assert sums.tolist() == [[1.0, 0.5, 0.0], [1.5, 1.5, 0.0], [2.0, 1.0, 0.0]]
    expected = ((1 - 2 * 1.0 / 3.5) + (1 - 2 * 0.5 / 2.5)) / 2
    assert soft_dice_loss(sums).item() == pytest.approx(expected)


def test_soft_dice_sums_pool_over_batches_and_leave_dont_care_out(generator):
    logits = torch.randn(4, 2, 5, 6, generator=generator)
    labels = torch.randint(0, 3, (4, 5, 6), generator=generator)  # 2: don't care
    whole = soft_dice_sums(logits, labels, 2)
    parts = soft_dice_sums(logits[:1], labels[:1], 2) + soft_dice_sums(logits[1:], labels[1:], 2)
    torch.testing.assert_close(whole, parts)
    assert whole[2].tolist() == [int((labels == 0).sum()), int((labels == 1).sum())]
    moved = torch.where((labels == 2)[:, None], -logits, logits)
    torch.testing.assert_close(soft_dice_sums(moved, labels, 2), whole)


def test_a_right_prediction_has_no_soft_dice_loss_and_nothing_counted_costs_nothing():
    logits = torch.tensor([[30.0, -30.0], [-30.0, 30.0]]).view(1, 2, 1, 2).requires_grad_()
    labels = torch.tensor([[[0, 1]]])
    assert soft_dice_loss(soft_dice_sums(logits, labels, 2)).item() == pytest.approx(0, abs=1e-6)
    loss = soft_dice_loss(soft_dice_sums(logits, torch.full((1, 1, 2), 255), 2))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
