"""Overlays and panels: where colour goes, and where it must not."""

import numpy as np
import pytest

from pathsegdiff.evaluation.overlays import (
    CORRECT,
    ERROR_COLOURS,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    NOT_COUNTED,
    WRONG_CLASS,
    background_class,
    default_colours,
    error_map,
    error_overlay,
    overlay,
    panel,
)

COLOURS = ((225, 227, 230), (0, 180, 135), (240, 228, 66))
NAMES = ("background", "gland", "stroma")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(120, 240, (48, 64, 3)).astype(np.uint8)


@pytest.fixture
def label():
    out = np.zeros((48, 64), np.uint8)
    out[10:30, 10:40] = 1
    return out


def test_background_keeps_its_pixels_and_a_region_moves_towards_its_colour(image, label):
    before = image.copy()
    drawn = overlay(image, label, COLOURS, alpha=0.35, contour_px=2, background=0)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (image == before).all()
    assert (drawn[:9] == image[:9]).all() and (drawn[:, 42:] == image[:, 42:]).all()
    inside = np.s_[14:26, 14:36]
    expected = 0.65 * image[inside].astype(float) + 0.35 * np.array(COLOURS[1])
    assert np.abs(drawn[inside] - expected).max() <= 0.51


def test_the_outline_runs_inside_the_region_in_its_full_colour(image, label):
    drawn = overlay(image, label, COLOURS, contour_px=2, background=0)
    assert (drawn[10:12, 12:38] == COLOURS[1]).all()
    assert (drawn[28:30, 12:38] == COLOURS[1]).all()
    assert not (drawn[12, 14:36] == COLOURS[1]).all()


def test_a_region_cut_off_by_the_image_or_by_dont_care_stays_open_there(image):
    label = np.ones((48, 64), np.uint8)
    label[:, 32:] = 200
    drawn = overlay(image, label, COLOURS, alpha=0.0, background=0)
    assert (drawn[:, :31] == image[:, :31]).all()


def test_no_tint_and_no_outline_is_the_image_itself(image, label):
    assert (overlay(image, label, COLOURS, alpha=0, contour_px=0) == image).all()


def test_what_does_not_count_is_grey_and_hatched(image):
    label = np.zeros((48, 64), np.uint8)
    label[:, 32:] = 255
    drawn = overlay(image, label, COLOURS, background=0).astype(int)
    hidden = drawn[:, 33:]
    assert (drawn[:, :31] == image[:, :31]).all()
    assert (hidden.max(axis=2) - hidden.min(axis=2)).max() < 12  # no hue is left
    lines = hidden[..., 0] < np.median(hidden[..., 0]) - 20
    assert 0.1 < lines.mean() < 0.35


def test_errors_are_told_apart_by_the_background():
    truth = np.array([[0, 0, 1, 1, 1, 2, 255]])
    prediction = np.array([[0, 1, 1, 0, 2, 2, 1]])
    assert error_map(truth, prediction, 3, background=0).tolist() == [
        [CORRECT, FALSE_POSITIVE, CORRECT, FALSE_NEGATIVE, WRONG_CLASS, CORRECT, NOT_COUNTED]
    ]
    without = error_map(truth, prediction, 3)
    assert without.tolist() == [[0, WRONG_CLASS, 0, WRONG_CLASS, WRONG_CLASS, 0, NOT_COUNTED]]
    with pytest.raises(ValueError, match="prediction has shape"):
        error_map(truth, prediction.T, 3)


def test_the_error_overlay_is_grey_where_the_prediction_is_right(image, label):
    prediction = np.roll(label, 8, axis=1)
    drawn = error_overlay(image, label, prediction, 3, background=0).astype(int)
    right = drawn[35:]
    assert (right.max(axis=2) == right.min(axis=2)).all()
    for place, kind in (
        (np.s_[15:25, 13:16], FALSE_NEGATIVE),
        (np.s_[15:25, 43:46], FALSE_POSITIVE),
    ):
        nearest = np.abs(drawn[place] - np.array(ERROR_COLOURS[kind])).max()
        assert nearest < 90


def test_a_panel_has_four_tiles_and_a_fixed_size_whatever_the_image(image, label):
    small = panel(image, label, label, names=NAMES, colours=COLOURS, background=0, tile_px=128)
    large = panel(
        image.repeat(4, 0).repeat(4, 1),
        label.repeat(4, 0).repeat(4, 1),
        label.repeat(4, 0).repeat(4, 1),
        names=NAMES,
        colours=COLOURS,
        background=0,
        tile_px=128,
    )
    assert small.dtype == np.uint8 and small.shape == large.shape
    assert small.shape[1] == 2 * 14 + 4 * 128 + 3 * 10
    assert (small[:3] == 255).all() and (small[-3:] == 255).all()


def test_a_panel_without_truth_has_two_tiles(image, label):
    drawn = panel(image, None, label, names=NAMES, colours=COLOURS, tile_px=128)
    assert drawn.shape[1] == 2 * 14 + 2 * 128 + 10


def test_a_panel_is_taller_with_a_title_and_with_many_classes(image, label):
    plain = panel(image, label, label, names=NAMES, colours=COLOURS, tile_px=128)
    titled = panel(
        image, label, label, names=NAMES, colours=COLOURS, tile_px=128, title="x" * 400, caption="y"
    )
    assert titled.shape[0] > plain.shape[0] and titled.shape[1] == plain.shape[1]
    names = [f"a class with a long name {k}" for k in range(12)]
    many = panel(image, label, label, names=names, colours=default_colours(12), tile_px=128)
    assert many.shape[0] > plain.shape[0] + 100


def test_the_prediction_is_hidden_where_the_truth_says_nothing(image, label):
    truth = label.copy()
    truth[:, 32:] = 255
    options = {"names": NAMES, "colours": COLOURS, "background": 0, "tile_px": 128}
    first = panel(image, truth, label, **options)
    elsewhere = label.copy()
    elsewhere[:, 33:] = 2
    assert (panel(image, truth, elsewhere, **options) == first).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3)])
def test_odd_shapes_are_drawn(shape):
    image, label = np.full((*shape, 3), 200, np.uint8), np.ones(shape, np.uint8)
    assert panel(image, label, label, names=NAMES, colours=COLOURS, tile_px=96).ndim == 3
    assert overlay(image, label, COLOURS).shape == image.shape


def test_shapes_that_do_not_fit_are_refused(image, label):
    with pytest.raises(ValueError, match="labels have shape"):
        overlay(image, label[:-1], COLOURS)
    with pytest.raises(ValueError, match="uint8 image, got float64"):
        overlay(image / 255, label, COLOURS)
    with pytest.raises(ValueError, match="2 names for 3 colours"):
        panel(image, label, label, names=("a", "b"), colours=COLOURS)


def test_default_colours_differ_from_each_other_and_from_eosin():
    colours = default_colours(14, background=0)
    assert len(set(colours)) == 14
    assert colours[0] == (225, 227, 230)
    for red, green, blue in colours[1:9]:
        assert not (red > green + 40 and blue > green + 40)  # pink or purple


def test_only_a_class_that_means_nothing_in_particular_is_background():
    assert background_class(["gland", "Background"]) == 1
    assert background_class(["tumour", "stroma", "other"]) is None
