import threading
import time

import numpy as np
import pytest
import torch

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.errors import RunError
from pathsegdiff.segmentation.head import FCNHead
from pathsegdiff.segmentation.sampling import (
    CropRequest,
    RegionReader,
    axis_window,
    crop_step,
    epoch_order,
    grid_batch,
    head_levels,
    prefetch,
    steps_per_epoch,
    training_requests,
)
from tests.helpers_store import TAPS, TISSUE, TapSpec, build_store

REGION_PX = 192


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """2 x 2 patches of 96 px: 3 cells of stride 32, so that crops start inside patches."""
    path = tmp_path_factory.mktemp("sampling") / "shapes.zarr"
    return build_store(path, train=5, test=1, region_px=REGION_PX, patch_px=96, dtype="float32")


def dense_crop(store, request, side_px):
    """The plain way: the whole dense map, cropped and mirrored."""
    side, top, left = side_px // 4, request.top_px // 4, request.left_px // 4
    f = store.dense(request.sample)[:, top : top + side, left : left + side]
    label = store.label(request.sample)
    label = label[
        request.top_px : request.top_px + side_px, request.left_px : request.left_px + side_px
    ]
    if request.flip_rows:
        f, label = f[:, ::-1], label[::-1]
    if request.flip_columns:
        f, label = f[:, :, ::-1], label[:, ::-1]
    return torch.from_numpy(f.copy())[None], torch.from_numpy(label.copy())[None]


def relative(first, second):
    return float((first - second).norm() / second.norm())


def make_head(levels):
    torch.manual_seed(0)
    return FCNHead(levels, 2, width=16).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "taps", [None, ("middle", "up_06"), ("up_01", "up_02"), ("up_10",)], ids=str
)
@pytest.mark.parametrize(
    ("top", "left", "side"),
    [(0, 0, 64), (32, 64, 96), (96, 96, 96), (64, 128, 64), (128, 0, 32), (32, 32, 160)],
)
def test_a_crop_gives_what_the_plain_head_gives_on_the_cropped_dense_map(
    store, taps, top, left, side
):
    levels = head_levels(store, taps)
    head = make_head(levels)
    request = CropRequest(sample=store.samples()[1], top_px=top, left_px=left)
    batch = RegionReader(store, levels, side).read([request])
    f, label = dense_crop(store, request, side)
    if taps is not None:
        f = select_taps(store, f, taps)
    assert relative(head(batch), head.forward_dense(f)) < 1e-4
    assert torch.equal(batch.labels, label)


def select_taps(store, f, taps):
    """Channels of some taps of the dense map."""
    channels = {tap.name: tap.stop - tap.start for lv in store.levels.values() for tap in lv.taps}
    parts, start = [], 0
    for tap in ALL_TAPS:
        if tap in taps:
            parts.append(f[:, start : start + channels[tap]])
        start += channels[tap]
    return torch.cat(parts, dim=1)


def test_a_whole_region_gives_what_the_plain_head_gives_on_the_dense_map(store):
    levels = head_levels(store)
    head = make_head(levels)
    samples = store.samples()[:2]
    batch = RegionReader(store, levels).read([CropRequest(sample=sample) for sample in samples])
    f = torch.from_numpy(np.stack([store.dense(sample) for sample in samples]))
    assert relative(head(batch), head.forward_dense(f)) < 1e-4
    assert all(len(weights) == 1 for weights in batch.rows.values())  # shared by the samples


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("side", [96, None])
def test_a_mirrored_crop_is_the_mirrored_dense_map(store, rows, columns, side):
    levels = head_levels(store)
    head = make_head(levels)
    request = CropRequest(
        sample=store.samples()[0],
        top_px=0 if side is None else 32,
        left_px=0 if side is None else 64,
        flip_rows=rows,
        flip_columns=columns,
    )
    batch = RegionReader(store, levels, side).read([request])
    f, label = dense_crop(store, request, side or REGION_PX)
    assert relative(head(batch), head.forward_dense(f)) < 1e-4
    assert torch.equal(batch.labels, label)


def test_crops_of_several_places_stack_into_one_batch(store):
    levels = head_levels(store)
    head = make_head(levels)
    requests = [
        CropRequest(sample=store.samples()[0], top_px=0, left_px=0),
        CropRequest(sample=store.samples()[1], top_px=32, left_px=96, flip_rows=True),
        CropRequest(sample=store.samples()[2], top_px=96, left_px=64),
    ]
    batch = RegionReader(store, levels, 96).read(requests)
    assert batch.size == 3
    f = torch.cat([dense_crop(store, request, 96)[0] for request in requests])
    assert relative(head(batch), head.forward_dense(f)) < 1e-4


def test_a_store_of_the_dense_map_gives_the_same_logits_as_one_of_levels(tmp_path, store):
    taps = tuple(TapSpec(name=t.name, channels=t.channels, stride=4) for t in TAPS[9:])
    levels_store = build_store(tmp_path / "a.zarr", train=1, test=0, tap_specs=taps)
    dense_store = build_store(tmp_path / "b.zarr", train=1, test=0, tap_specs=taps, layout="dense")
    logits = []
    for one in (levels_store, dense_store):
        levels = head_levels(one)
        batch = RegionReader(one, levels, 32).read(
            [CropRequest(sample=one.samples()[0], top_px=32)]
        )
        logits.append(make_head(levels)(batch))
    assert [level.name for level in head_levels(dense_store)] == ["dense"]
    torch.testing.assert_close(logits[0], logits[1])


def test_patches_that_come_from_no_store_are_read_as_a_grid(store):
    levels = head_levels(store)
    head = make_head(levels)
    sample = store.samples()[0]
    arrays = {
        level.name: torch.from_numpy(store.read_level(sample, level.name))[None] for level in levels
    }
    whole = RegionReader(store, levels).read([CropRequest(sample=sample)])
    batch = grid_batch(levels, arrays, patch_px=96, rows=2, columns=2)
    torch.testing.assert_close(head(batch), head(whole))
    upper = {name: x[:, :, : x.shape[2] // 2] for name, x in arrays.items()}
    batch = grid_batch(levels, upper, patch_px=96, rows=1, columns=2)
    f = torch.from_numpy(store.dense(sample))[None, :, :24]
    assert relative(head(batch), head.forward_dense(f)) < 1e-4


def test_a_window_reads_no_cell_that_has_no_weight():
    # A crop that starts on a patch border needs nothing of the patch before it.
    window = axis_window(8, 64, 3, 64, 64)
    assert (window.start, window.stop) == (8, 16)
    assert window.weights.shape == (16, 10)
    inside = axis_window(8, 64, 3, 32, 64)
    assert (inside.start, inside.stop) == (3, 13)
    assert inside.weights.shape == (16, 10)
    np.testing.assert_allclose(inside.weights.sum(axis=1), 1)


def test_every_crop_of_a_size_has_windows_of_one_size(store):
    levels = head_levels(store)
    reader = RegionReader(store, levels, 64)
    shapes = set()
    for top in range(0, REGION_PX - 64 + 1, 32):
        batch = reader.read([CropRequest(sample=store.samples()[0], top_px=top)], labels=False)
        assert batch.labels is None
        shapes.add(tuple(tuple(x.shape) for x in batch.levels.values()))
    assert len(shapes) == 1


@pytest.mark.parametrize("crop", [0, -32, 40, 224])
def test_a_crop_that_does_not_fit_is_refused(store, crop):
    with pytest.raises(RunError, match=rf"multiple of 32 px up to the region's 192 px, got {crop}"):
        RegionReader(store, head_levels(store), crop)


def test_crops_of_a_model_with_stride_64_start_on_its_cells(tmp_path):
    taps = tuple(
        TapSpec(name=name, channels=2, stride=stride)
        for name, stride in zip(
            ALL_TAPS, (64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8, 8), strict=True
        )
    )
    store = build_store(
        tmp_path / "kl.zarr", train=1, test=0, tap_specs=taps, region_px=256, patch_px=128
    )
    levels = head_levels(store)
    assert crop_step(levels) == 64
    request = CropRequest(sample=store.samples()[0], top_px=64, left_px=128)
    head = make_head(levels)
    f, _ = dense_crop(store, request, 128)
    assert (
        relative(head(RegionReader(store, levels, 128).read([request])), head.forward_dense(f))
        < 1e-4
    )


def test_levels_hold_the_asked_taps_finest_first(store):
    levels = head_levels(store, ("up_11", "middle", "up_01"))
    assert [(level.name, level.taps) for level in levels] == [
        ("stride_4", (("up_11", 2),)),
        ("stride_32", (("middle", 8), ("up_01", 8))),
    ]


def test_a_tap_that_the_store_lacks_is_named(tmp_path):
    store = build_store(tmp_path / "few.zarr", train=1, test=0, tap_specs=TAPS[:4])
    with pytest.raises(RunError, match=r"has no tap up_11; choose --taps among middle, up_00"):
        head_levels(store, ("middle", "up_11"))
    with pytest.raises(RunError, match=r"holds no tokens .* extract with `psd extract --tokens`"):
        head_levels(store, ("middle", "tokens"))


def test_every_sample_is_seen_once_per_epoch(store):
    reader = RegionReader(store, head_levels(store), 64)
    samples = store.samples("train")
    for epoch in range(3):
        steps = range(epoch * 3, epoch * 3 + 3)
        requests = [
            training_requests(reader, samples, step, batch_size=2, seed=0) for step in steps
        ]
        assert [len(batch) for batch in requests] == [2, 2, 1]
        seen = sorted(request.sample.index for batch in requests for request in batch)
        assert seen == [0, 1, 2, 3, 4]


def test_the_order_of_an_epoch_is_drawn_once_and_not_in_each_of_its_steps(store):
    reader = RegionReader(store, head_levels(store), 64)
    epoch_order.cache_clear()
    for step in range(15):
        training_requests(reader, store.samples("train"), step, batch_size=1, seed=12)
    assert epoch_order.cache_info().misses == 3


def test_what_a_step_sees_depends_on_seed_and_step_alone(store):
    reader = RegionReader(store, head_levels(store), 64)
    samples = store.samples("train")

    def plan(seed, flips=False):
        return [
            training_requests(reader, samples, step, batch_size=2, seed=seed, flips=flips)
            for step in range(30)
        ]

    assert plan(0) == plan(0)
    assert plan(0) != plan(1)
    places = {(request.top_px, request.left_px) for batch in plan(0) for request in batch}
    assert len(places) > 15
    assert {top for top, _ in places} == {0, 32, 64, 96, 128}
    flipped = plan(0, flips=True)
    assert {(r.flip_rows, r.flip_columns) for batch in flipped for r in batch} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }
    # Flips change nothing else.
    assert [[(r.sample, r.top_px, r.left_px) for r in b] for b in flipped] == [
        [(r.sample, r.top_px, r.left_px) for r in b] for b in plan(0)
    ]


@pytest.mark.parametrize(("samples", "batch", "steps"), [(5, 2, 3), (4, 2, 2), (1, 4, 1)])
def test_an_epoch_has_as_many_steps_as_see_every_sample(samples, batch, steps):
    assert steps_per_epoch(samples, batch) == steps


def test_dont_care_labels_are_kept_for_the_loss_to_drop(tmp_path):
    store = build_store(tmp_path / "tissue.zarr", train=1, test=0, scheme=TISSUE)
    batch = RegionReader(store, head_levels(store)).read([CropRequest(sample=store.samples()[0])])
    assert (batch.labels == 3).any()
    assert batch.labels.dtype == torch.uint8


def test_batches_come_in_order_and_ahead_of_their_use():
    begun = []

    def job(number):
        begun.append(number)
        return number

    batches = prefetch([lambda n=n: job(n) for n in range(6)], ahead=2)
    assert next(batches) == 0
    deadline = time.monotonic() + 5
    while len(begun) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert begun == [0, 1, 2]
    assert list(batches) == [1, 2, 3, 4, 5]


def test_an_error_of_a_job_is_raised_where_its_batch_would_have_been():
    def fail():
        raise RunError("broken chunk")

    batches = prefetch([lambda: 0, fail, lambda: 2])
    assert next(batches) == 0
    with pytest.raises(RunError, match="broken chunk"):
        next(batches)


def test_closing_the_loader_ends_its_thread():
    batches = prefetch([lambda n=n: n for n in range(100)])
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("psd-loader")]
