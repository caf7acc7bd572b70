"""Contest metrics: the worked cases, an independent slow implementation, and properties.

tests/glas_metric_cases holds synthetic label maps with the metrics worked out elsewhere; its
expected.json says how and on what they were checked.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, directed_hausdorff

from pathsegdiff.evaluation.objects import (
    MIN_AREA_CANDIDATES,
    choose_objects,
    grow_objects,
    hausdorff_distance,
    image_object_scores,
    match_objects,
    objects_from_mask,
    pool_objects,
)

CASES = Path(__file__).parent / "glas_metric_cases"
EXPECTED = json.loads((CASES / "expected.json").read_text())


def case(name):
    with np.load(CASES / f"{name}.npz") as maps:
        return image_object_scores(maps["gt"], maps["pred"])


def discs(seed, count, shape=(60, 80)):
    """Random ellipses with random labels, later ones on top."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    out = np.zeros(shape, np.int32)
    for label in rng.choice(np.arange(1, 600), count, replace=False):
        row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        high, wide = rng.uniform(3, 14, 2)
        out[((rows - row) / high) ** 2 + ((columns - column) / wide) ** 2 <= 1] = label
    return out


def slow_metrics(target, predicted):
    """The definitions, object by object and pixel by pixel."""

    def one_side(these, others):
        labels = [v for v in np.unique(these) if v]
        total = sum((these == v).sum() for v in labels)
        dice = distance = 0.0
        for v in labels:
            mask = these == v
            under = others[mask]
            under = under[under > 0]
            weight = mask.sum() / total
            if len(under):
                values, counts = np.unique(under, return_counts=True)
                partners = [values[counts.argmax()]]
                other = others == partners[0]
                dice += weight * 2 * (mask & other).sum() / (mask.sum() + other.sum())
            else:
                partners = [u for u in np.unique(others) if u]
            between = []
            for partner in partners:
                pairs = cdist(np.argwhere(mask), np.argwhere(others == partner))
                between.append(max(pairs.min(axis=0).max(), pairs.min(axis=1).max()))
            distance += weight * min(between, default=math.inf)
        return dice, distance

    (d1, h1), (d2, h2) = one_side(target, predicted), one_side(predicted, target)
    return (d1 + d2) / 2, (h1 + h2) / 2


@pytest.mark.parametrize("name", sorted(EXPECTED["cases"]))
def test_worked_cases_of_the_contest_metrics(name):
    expected = EXPECTED["cases"][name]["expected"]
    found = case(name)
    assert (found.tp, found.fp, found.fn) == (expected["tp"], expected["fp"], expected["fn"])
    exactly = {"abs": 1e-9, "rel": 0}
    assert found.f1 == pytest.approx(expected["detection_f1"], **exactly)
    assert found.dice == pytest.approx(expected["object_dice"], **exactly)
    assert found.hausdorff == pytest.approx(float(expected["object_hausdorff"]), **exactly)


def test_there_are_eighteen_worked_cases():
    assert len(EXPECTED["cases"]) == 18


@pytest.mark.parametrize("number", range(len(EXPECTED["pooled"])))
def test_worked_cases_of_whole_splits_pooled_and_as_image_means(number):
    expected = EXPECTED["pooled"][number]
    split = pool_objects([case(name) for name in expected["cases"]])
    assert (split.tp, split.fp, split.fn) == (expected["tp"], expected["fp"], expected["fn"])
    exactly = {"abs": 1e-9, "rel": 0}
    assert split.f1 == pytest.approx(expected["detection_f1_pooled"], **exactly)
    assert split.mean_f1 == pytest.approx(expected["detection_f1_mean_of_images"], **exactly)
    assert split.dice == pytest.approx(expected["object_dice_pooled"], **exactly)
    assert split.mean_dice == pytest.approx(expected["object_dice_mean_of_images"], **exactly)
    assert split.hausdorff == pytest.approx(expected["object_hausdorff_pooled"], **exactly)
    assert split.mean_hausdorff == pytest.approx(
        expected["object_hausdorff_mean_of_images"], **exactly
    )
    assert split.hausdorff_measured == split.hausdorff
    assert split.unmeasured_images == 0


@pytest.mark.parametrize("seed", range(6))
def test_object_dice_and_hausdorff_agree_with_the_definitions_taken_literally(seed):
    target, predicted = discs(seed, 7), discs(seed + 100, 5)
    found = image_object_scores(target, predicted)
    dice, hausdorff = slow_metrics(target, predicted)
    assert found.dice == pytest.approx(dice, abs=1e-12)
    assert found.hausdorff == pytest.approx(hausdorff, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_labels_are_only_names_as_long_as_their_order_stays(seed):
    target, predicted = discs(seed, 5, (30, 40)), discs(seed + 1, 5, (30, 40))
    stretched = image_object_scores(target * 7, np.where(predicted > 0, predicted + 70_000, 0))
    plain = image_object_scores(target, predicted)
    assert stretched.sums.tolist() == plain.sums.tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_perfect_prediction_is_perfect_and_mirroring_changes_nothing(seed):
    target, predicted = discs(seed, 5, (30, 40)), discs(seed + 1, 5, (30, 40))
    same = image_object_scores(target, target)
    assert (same.f1, same.dice, same.hausdorff, same.fp, same.fn) == (1.0, 1.0, 0.0, 0, 0)
    plain = image_object_scores(target, predicted)
    mirrored = image_object_scores(target[:, ::-1].T, predicted[:, ::-1].T)
    assert mirrored.sums == pytest.approx(plain.sums)


def test_object_dice_and_hausdorff_are_symmetric_but_detection_is_not():
    target, predicted = np.zeros((10, 20), int), np.zeros((10, 20), int)
    target[2:8, 2:8] = 1
    predicted[2:8, 2:6] = 1  # covers 2/3 of the target
    predicted[0:10, 10:20] = 2
    one, other = image_object_scores(target, predicted), image_object_scores(predicted, target)
    assert one.dice == other.dice and one.hausdorff == other.hausdorff
    assert (one.tp, one.fp, one.fn) == (1, 1, 0)
    assert (other.tp, other.fp, other.fn) == (1, 0, 1)


def test_the_farthest_pixel_may_lie_inside_an_object():
    rows, columns = np.indices((41, 41)) - 20
    radius = np.hypot(rows, columns)
    disc, ring = radius <= 20, (radius <= 20) & (radius > 15)
    # The disc's centre is farther from the ring than any pixel of the outlines is.
    expected = directed_hausdorff(np.argwhere(disc), np.argwhere(ring))[0]
    assert hausdorff_distance(disc, ring) == hausdorff_distance(ring, disc) == expected > 15


def test_hausdorff_of_empty_masks():
    empty, full = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    assert hausdorff_distance(empty, empty) == 0.0
    assert hausdorff_distance(empty, full) == math.inf
    with pytest.raises(ValueError, match="shapes"):
        hausdorff_distance(empty, np.ones((2, 2), bool))


def test_partners_are_the_objects_that_cover_most():
    target = np.array([[5, 5, 5, 9, 0, 0]])
    predicted = np.array([[2, 3, 3, 3, 0, 4]])
    matches = match_objects(target, predicted)
    assert matches.target_partner.tolist() == [1, 1]
    assert matches.predicted_partner.tolist() == [0, 0, -1]
    assert matches.true_positive.tolist() == [False, True, False]
    assert matches.target_dice.tolist() == pytest.approx([4 / 6, 2 / 4])
    assert matches.predicted_dice.tolist() == pytest.approx([2 / 4, 4 / 6, 0])


def test_an_object_that_covers_the_whole_image_needs_no_background():
    full = np.full((4, 5), 3)
    found = image_object_scores(full, full)
    assert (found.tp, found.fp, found.fn, found.dice, found.hausdorff) == (1, 0, 0, 1.0, 0.0)


def test_a_split_says_in_how_many_images_the_distance_is_infinite():
    target = np.zeros((8, 8), int)
    target[2:5, 2:5] = 1
    nothing = np.zeros_like(target)
    images = [
        image_object_scores(target, target),
        image_object_scores(target, nothing),
        image_object_scores(nothing, nothing),
    ]
    split = pool_objects(images)
    assert (split.tp, split.fp, split.fn) == (1, 0, 1)
    assert split.f1 == pytest.approx(2 / 3)
    assert split.mean_f1 == pytest.approx((1 + 0 + 1) / 3)
    assert split.dice == pytest.approx((0.5 + 1) / 2)
    assert split.hausdorff == split.mean_hausdorff == math.inf
    assert (split.hausdorff_measured, split.unmeasured_images, split.images) == (0.0, 1, 3)
    document = split.to_dict()
    assert document["hausdorff_px"] is None and document["hausdorff_measured_px"] == 0.0
    json.dumps(document, allow_nan=False)


def test_a_split_of_empty_images_is_perfect_and_no_image_is_refused():
    nothing = np.zeros((4, 4), int)
    split = pool_objects([image_object_scores(nothing, nothing)] * 2)
    assert (split.f1, split.dice, split.hausdorff) == (1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="at least one image"):
        pool_objects([])


@pytest.mark.parametrize(
    ("target", "predicted", "match"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "prediction has shape"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "target: need an .* integer map, got float64"),
        (np.zeros((2, 2), int), np.full((2, 2), -4), "prediction: object labels must not be neg"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(target, predicted, match):
    with pytest.raises(ValueError, match=match):
        image_object_scores(target, predicted)


def test_objects_are_8_connected_with_holes_filled_and_small_ones_dropped():
    mask = np.array(
        [
            [1, 1, 1, 0, 0, 0, 1],
            [1, 0, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 1],
        ],
        bool,
    )
    every = objects_from_mask(mask)
    assert every.dtype == np.int32
    assert every.tolist() == [
        [1, 1, 1, 0, 0, 0, 2],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 3, 3],
    ]
    large = objects_from_mask(mask, min_area_px=2)
    assert np.unique(large).tolist() == [0, 1, 2]  # numbered without gaps
    assert large[4, 5] == 2 and large[0, 6] == 0
    # The hole counts: the ring has 9 pixels, one more hangs on by its corner.
    assert objects_from_mask(mask, 10).max() == 1
    assert objects_from_mask(mask, 11).max() == 0


def test_objects_grow_by_the_disk_and_share_what_both_could_reach():
    objects = np.zeros((9, 15), np.int32)
    objects[4, 3], objects[4, 8] = 7, 9
    grown = grow_objects(objects)
    rows, columns = np.nonzero(grown == 7)
    assert np.hypot(rows - 4, columns - 3).max() == 3
    assert grown[4].tolist() == [7, 7, 7, 7, 7, 7, 9, 9, 9, 9, 9, 9, 0, 0, 0]
    assert not grow_objects(np.zeros((4, 4), np.int32)).any()


def test_a_bay_that_is_open_through_a_corner_only_is_a_hole():
    # 8-connected objects have 4-connected holes: the background cannot slip through a corner.
    mask = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)
    assert objects_from_mask(mask).tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


def test_objects_from_mask_wants_a_boolean_mask():
    with pytest.raises(ValueError, match="boolean mask, got int64"):
        objects_from_mask(np.zeros((3, 3), np.int64))
    with pytest.raises(ValueError, match="min_area_px"):
        objects_from_mask(np.zeros((3, 3), bool), -1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), area=st.integers(0, 200))
def test_objects_from_mask_is_idempotent(seed, area):
    once = objects_from_mask(discs(seed, 6, (30, 40)) > 0, area)
    assert (objects_from_mask(once > 0, area) == once).all()


def choose_min_area(pairs, *candidates, **settings):
    """``choose_objects`` with one way to a mask."""
    way, area = choose_objects(
        (((mask,), target) for mask, target in pairs), *candidates, **settings
    )
    assert way == 0
    return area


def test_the_minimum_area_drops_specks_and_keeps_glands():
    target = np.zeros((60, 60), np.int32)
    target[5:25, 5:25], target[32:56, 32:56] = 1, 2
    mask = target > 0
    mask[2:4, 50:58] = mask[50:57, 5:15] = True  # 16 and 70 pixels of nothing
    assert choose_min_area([(mask, target)]) == 100
    # Every area from 71 to 400 drops the same: the smallest wins, in whatever order they come.
    assert choose_min_area([(mask, target)], candidates=(400, 200, 75, 71, 0)) == 71


def test_the_minimum_area_is_zero_where_nothing_is_gained_or_known():
    target = np.zeros((20, 20), np.int32)
    target[5:15, 5:15] = 1
    assert choose_min_area([(target > 0, target)]) == 0
    assert choose_min_area([]) == min(MIN_AREA_CANDIDATES) == 0
    with pytest.raises(ValueError, match="candidate"):
        choose_min_area([(target > 0, target)], candidates=())


def test_of_several_ways_to_a_mask_the_best_is_chosen_with_its_area():
    target = np.zeros((60, 60), np.int32)
    target[5:25, 5:25], target[5:25, 26:46] = 1, 2
    parted = target > 0
    touching = parted.copy()
    touching[5:25, 25] = True  # one object of two
    specks = parted.copy()
    specks[50:57, 5:15] = True  # as good, once 70 pixels are dropped
    images = [((touching, specks, parted), target)]
    assert choose_objects(images) == (1, 100)
    assert choose_objects(images, candidates=(0,)) == (2, 0)
    assert choose_objects([((parted, parted), target)]) == (0, 0)
    assert choose_objects([]) == (0, 0)


@pytest.mark.parametrize("grown", [False, True])
def test_the_chosen_minimum_area_is_the_best_of_all_scored_one_by_one(grown):
    targets = [discs(seed, 6) for seed in range(3)]
    masks = [(discs(seed + 50, 5) > 0) | (target > 0) for seed, target in enumerate(targets)]
    candidates = (0, 20, 60, 150, 300, 500)
    quality = []
    for area in candidates:
        objects = [objects_from_mask(mask, area) for mask in masks]
        objects = [grow_objects(map_) for map_ in objects] if grown else objects
        split = pool_objects(list(map(image_object_scores, targets, objects)))
        quality.append(round(split.f1 + split.dice, 12))
    expected = candidates[int(np.argmax(quality))]
    pairs = zip(masks, targets, strict=True)
    assert choose_min_area(pairs, candidates, grown=grown) == expected
