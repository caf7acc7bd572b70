"""Resizing, windows, crops and patches."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pathsegdiff.data.labels import LabelClass, LabelScheme
from pathsegdiff.data.manifest import load_manifest
from pathsegdiff.data.regions import (
    RegionRule,
    centre_offset,
    cut_patches,
    dont_care_share,
    pad_region,
    plan_windows,
    resize_image,
    resize_label,
    scaled_size,
    window_offset,
)
from pathsegdiff.errors import DataError


def starts(length: int, window_px: int) -> list[int]:
    """Of the windows along one axis."""
    return [window.left for window in plan_windows(1, length, window_px)]


def test_windows_by_hand():
    assert starts(800, 800) == [0]
    assert starts(801, 800) == [0, 1]
    assert starts(1600, 800) == [0, 800]
    assert starts(2000, 800) == [0, 600, 1200]
    assert starts(2001, 800) == [0, 601, 1201]  # 600.5 is rounded up
    assert starts(500, 800) == [0]


def test_windows_go_row_by_row_and_know_their_place():
    windows = plan_windows(900, 1600, 800)
    assert [(w.row, w.col, w.top, w.left) for w in windows] == [
        (0, 0, 0, 0),
        (0, 1, 0, 800),
        (1, 0, 100, 0),
        (1, 1, 100, 800),
    ]


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000), window_px=st.integers(32, 900))
def test_windows_cover_everything_and_stay_inside(height, width, window_px):
    windows = plan_windows(height, width, window_px)
    count = -(-height // window_px) * -(-width // window_px)
    assert len(windows) == count
    for begin, size, length in (("top", "height", height), ("left", "width", width)):
        spans = sorted({(getattr(w, begin), getattr(w, size)) for w in windows})
        assert spans[0][0] == 0
        assert sum(spans[-1]) == length
        gaps = [after[0] - before[0] for before, after in pairwise(spans)]
        assert all(gap <= window_px for gap in gaps)
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert {side for _, side in spans} == {min(window_px, length)}


@pytest.mark.parametrize(
    ("mpp", "expected"),
    [(0.5, {"train": 1332, "test": 596}), (0.25, {"train": 4612, "test": 2079})],
)
def test_bcss_has_the_published_number_of_windows(mpp, expected):
    # Counted independently from the regions' bounds: ceil(L / 800) per axis.
    manifest = load_manifest("bcss")
    counts = dict.fromkeys(manifest.splits, 0)
    for source in manifest.sources:
        size = scaled_size(*source.size_px, manifest.mpp / mpp)
        counts[source.split] += len(plan_windows(*size, manifest.rule.window_px))
    assert counts == expected


def test_an_offset_depends_on_seed_and_sample_alone():
    assert window_offset(0, "a_r0c0", 32, 32) == window_offset(0, "a_r0c0", 32, 32)
    assert window_offset(0, "a_r0c0", 32, 32) == (30, 28)  # sha256 is the same everywhere
    assert window_offset(0, "a", 0, 0) == (0, 0)
    several = {window_offset(seed, name, 32, 32) for seed in (0, 1) for name in "abcdefgh"}
    assert len(several) > 12


def test_offsets_reach_the_whole_slack_evenly():
    offsets = np.array([window_offset(0, f"s{index}", 3, 7) for index in range(4000)])
    rows, cols = np.bincount(offsets[:, 0]), np.bincount(offsets[:, 1])
    assert len(rows) == 4
    assert len(cols) == 8
    assert abs(rows / 1000 - 1).max() < 0.12
    assert abs(cols / 500 - 1).max() < 0.2
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.05


def test_the_centre_is_the_centre():
    assert centre_offset(32, 31) == (16, 15)


def test_dont_care_share_counts_pixels_of_the_window_alone():
    scheme = LabelScheme(
        classes=tuple(
            LabelClass(name=name, colour=(0, 0, 0), codes=(code,)) for code, name in enumerate("ab")
        ),
        dont_care=LabelClass(name="outside", colour=(0, 0, 0), codes=(9,)),
    )
    label = np.full((4, 8), 2, np.uint8)
    label[:2, 4:6] = 1
    first, second = plan_windows(4, 8, 4)
    assert dont_care_share(label, first, scheme) == 1.0
    assert dont_care_share(label, second, scheme) == 0.75


def test_resizing_labels_equals_pillows_nearest():
    label = np.random.default_rng(0).integers(0, 250, (52, 77), dtype=np.uint8)
    # Sizes where no centre falls on a border: there Pillow's sums of floats decide.
    for size in ((64, 64), (24, 24), (104, 154), (52, 77), (768, 768)):
        expected = Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST)
        assert (resize_label(label, size) == np.asarray(expected)).all()


def test_a_centre_on_a_border_takes_the_later_pixel():
    assert resize_label(np.array([[1, 2]]), (1, 1)).tolist() == [[2]]
    label = np.arange(52)[:, None]
    assert resize_label(label, (17, 1))[8, 0] == 26  # 8.5 * 52 / 17


def test_resizing_keeps_the_integer_type_of_labels():
    codes = np.array([[0, 70_000]], np.int32)
    assert resize_label(codes, (2, 4)).tolist() == [[0, 0, 70_000, 70_000]] * 2
    assert resize_label(codes, (2, 4)).dtype == np.int32


def test_resizing_an_image_keeps_a_constant_and_does_not_alias():
    flat = np.full((20, 30, 3), (250, 3, 128), np.uint8)
    assert (resize_image(flat, (64, 64)) == (250, 3, 128)).all()
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = resize_image(stripes, (16, 16))[4:-4, 4:-4]
    assert abs(shrunk.astype(int) - 127).max() <= 4  # nearest would give 0 or 255


def test_resizing_to_the_same_size_copies_nothing():
    image, label = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    assert resize_image(image, (8, 8)) is image
    assert resize_label(label, (8, 8)) is label


def test_image_and_label_stay_aligned_when_resized():
    label = np.zeros((60, 40), np.uint8)
    label[20:50, 10:35] = 1
    image = np.repeat(label[..., None] * 255, 3, axis=2)
    resized = resize_image(image, (128, 128))[..., 0] > 127
    assert (resized != resize_label(label, (128, 128))).mean() < 0.02


def test_padding_goes_below_and_to_the_right():
    padded = pad_region(np.ones((1, 2), np.uint8), 3, 9)
    assert padded.tolist() == [[1, 1, 9], [9, 9, 9], [9, 9, 9]]
    image = pad_region(np.zeros((1, 2, 3), np.uint8), 2, 255)
    assert image.shape == (2, 2, 3)
    assert image[1].min() == 255


def test_patches_are_cut_row_by_row():
    region = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = cut_patches(region, 2)
    assert patches.shape == (6, 2, 2, 3)
    for index, (row, col) in enumerate((r, c) for r in (0, 2) for c in (0, 2, 4)):
        assert (patches[index] == region[row : row + 2, col : col + 2]).all()
    with pytest.raises(ValueError, match="no whole 4 px patches"):
        cut_patches(region, 4)


def test_scaling_rounds_half_up_and_refuses_the_absurd():
    assert scaled_size(2961, 4074, 0.5) == (1481, 2037)
    assert scaled_size(1, 1, 0.01) == (1, 1)
    with pytest.raises(DataError, match="scaled 25 times to .*choose a larger mpp"):
        scaled_size(4000, 4000, 25)


@pytest.mark.parametrize(
    "rule",
    [
        RegionRule(kind="resize", region_px=512),
        RegionRule(kind="window", region_px=768, window_px=800, mpp=0.5),
    ],
)
def test_a_rule_survives_json(rule):
    assert RegionRule.from_dict(rule.to_dict()) == rule


def test_one_and_one_point_zero_are_the_same_rule():
    values = {"kind": "window", "region_px": 256, "window_px": 256}
    one, same = (RegionRule.from_dict({**values, "mpp": mpp}) for mpp in (1, 1.0))
    assert repr(one.to_dict()) == repr(same.to_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "tile"}, "kind must be resize or window, got 'tile'"),
        ({"region_px": 700}, "multiple of 256, at most 8192, got 700"),
        ({"region_px": 0}, "multiple of 256"),
        ({"region_px": 256_000_000}, "at most 8192"),
        ({"region_px": 512.0}, "region_px must be an integer"),
        ({"patch_px": 8}, "patch_px must be from 32 to 1024, got 8"),
        ({"window_px": 800}, "window_px belongs to kind window"),
        ({"kind": "window"}, r"window_px must be at least region_px \(768\), got None"),
        ({"kind": "window", "window_px": 700}, "at least region_px"),
        ({"max_dont_care": 1.5}, "max_dont_care must be from 0 to 1"),
        ({"max_dont_care": float("nan")}, "max_dont_care must be from 0 to 1"),
        ({"mpp": 0}, "mpp must be from 0.01 to 100 um/px, got 0"),
        ({"mpp": 10**400}, "mpp must be from 0.01 to 100"),
        ({"mpp": "half"}, "mpp must be from 0.01 to 100"),
        ({"colour": 1}, "unknown 'colour'"),
    ],
)
def test_a_rule_outside_its_bounds_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        RegionRule.from_dict({"kind": "resize", "region_px": 768, **values})
