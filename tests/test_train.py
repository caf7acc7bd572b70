import csv
import io
import json
import os
import signal
import subprocess
import sys
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from pathsegdiff.data import passes as data_passes
from pathsegdiff.data.regions import RegionRule
from pathsegdiff.errors import RunError, StoreError
from pathsegdiff.features.store import FeatureStore, StoredSample
from pathsegdiff.segmentation import passes as segmentation_passes
from pathsegdiff.segmentation.loop import finished_before
from pathsegdiff.segmentation.passes import channel_statistics, class_pixel_counts
from pathsegdiff.segmentation.sampling import head_levels
from pathsegdiff.segmentation.splits import (
    choose_parts,
    limited,
    source_ids,
    validation_groups,
)
from pathsegdiff.segmentation.train import default_run_name, plan_settings, train_head
from tests.helpers_head import same, state, train_small
from tests.helpers_store import (
    GLANDS,
    TAPS,
    TISSUE,
    build_store,
    make_arrays,
    make_label,
    make_samples,
    open_writer,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight training samples in four groups, three test samples in two."""
    return build_store(tmp_path_factory.mktemp("train") / "shapes.zarr", train=8, test=3)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run of four epochs."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_small(store, out, epochs=4, crop_px=32)
    return out


def log_of(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -- passes over the samples --


def test_class_counts_are_those_of_a_plain_loop(tmp_path):
    tissue = build_store(tmp_path / "tissue.zarr", train=5, test=0, scheme=TISSUE)
    expected = np.zeros(3, np.int64)
    for sample in tissue.samples():
        label = tissue.label(sample)
        for class_id in range(3):
            expected[class_id] += int((label == class_id).sum())
    counts = class_pixel_counts(tissue, tissue.samples())
    assert counts.tolist() == expected.tolist()
    assert counts.sum() == 5 * 64 * 56  # a strip of an eighth is don't care


def test_channel_statistics_are_those_of_a_plain_loop(store):
    levels = head_levels(store, ("middle", "up_06", "up_11"))
    samples = store.samples("train")
    statistics = channel_statistics(store, levels, samples)
    for level in levels:
        stack = np.stack(
            [
                store.read_level(sample, level.name, taps=[tap for tap, _ in level.taps])
                for sample in samples
            ]
        ).astype(np.float64)
        mean, std = statistics[level.name]
        np.testing.assert_allclose(mean, stack.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(std, stack.std(axis=(0, 2, 3)), rtol=1e-12)


def test_channel_statistics_keep_no_sample_in_memory_and_are_the_same_in_blocks_of_any_size(
    store, monkeypatch
):
    levels = head_levels(store)
    samples = store.samples("train")
    whole = channel_statistics(store, levels, samples)
    monkeypatch.setattr(data_passes, "BLOCK", 2)
    parts, most = [], 0
    real = segmentation_passes._level_moments

    def watched(*arguments):
        nonlocal most
        found = real(*arguments)
        parts.append(weakref.ref(found[1]))
        most = max(most, sum(part() is not None for part in parts))
        return found

    monkeypatch.setattr(segmentation_passes, "_level_moments", watched)
    blocks = channel_statistics(store, levels, samples)
    assert len(parts) == 8 * len(levels)
    assert most <= 4 * len(levels)  # a block that is used, and the next
    for name, (mean, std) in whole.items():
        assert mean.tobytes() == blocks[name][0].tobytes()
        assert std.tobytes() == blocks[name][1].tobytes()


def test_a_channel_that_never_changes_is_not_blown_up(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "flat.zarr") as writer:
        for sample in writer.register(make_samples(2, 0)):
            label = np.zeros((64, 64), np.uint8)
            label[0, 0] = 1
            arrays = make_arrays(rng, label, GLANDS, TAPS, 32)
            arrays.levels["stride_8"][0] = 3.0
            writer.write(sample, arrays)
    flat = FeatureStore.open(tmp_path / "flat.zarr")
    statistics = channel_statistics(flat, head_levels(flat), flat.samples())
    mean, std = statistics["stride_8"]
    assert (mean[0], std[0]) == (3.0, 1.0)
    assert std[1] == pytest.approx(0.3, abs=0.05)


# -- parts --


def test_a_fifth_of_the_groups_validates_and_no_group_is_in_two_parts(store):
    parts = choose_parts(store, split="train", val="0.25", fold=None, seed=0)
    train, val = {s.group for s in parts.train}, {s.group for s in parts.val}
    assert len(val) == 1
    assert len(train) == 3
    assert not train & val
    assert len(parts.train) + len(parts.val) == 8
    assert parts == choose_parts(store, split="train", val="0.25", fold=None, seed=0)


def test_another_seed_validates_on_other_groups():
    groups = [f"patient-{number}" for number in range(20)]
    chosen = {frozenset(validation_groups(groups, 0.2, seed)) for seed in range(5)}
    assert len(chosen) == 5
    assert all(len(some) == 4 for some in chosen)


def test_one_group_more_moves_few_others():
    groups = [f"patient-{number}" for number in range(40)]
    before = validation_groups(groups, 0.25, 0)
    after = validation_groups([*groups, "patient-new"], 0.25, 0)
    assert len(before ^ after) <= 2


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.01, 1), (0.5, 2), (0.99, 3)])
def test_some_groups_are_left_to_train_on(fraction, expected):
    assert len(validation_groups(["a", "b", "c", "d", "d"], fraction, 0)) == expected


def test_one_group_cannot_be_divided():
    with pytest.raises(RunError, match=r"belong to one group \('a'\).*--val SPLIT, or use --val 0"):
        validation_groups(["a", "a"], 0.2, 0)


def test_a_split_can_validate(store):
    parts = choose_parts(store, split=None, val="test", fold=None, seed=0)
    assert {sample.split for sample in parts.val} == {"test"}
    assert len(parts.train) == 8


def test_a_fold_is_held_out_over_all_splits(store):
    parts = choose_parts(store, split=None, val="0.2", fold=2, seed=0)
    assert {sample.extra["fold"] for sample in parts.held_out} == {"2"}
    assert {sample.extra["fold"] for sample in (*parts.train, *parts.val)} == {"1"}
    assert {sample.split for sample in parts.held_out} == {"train", "test"}
    groups = [{s.group for s in part} for part in (parts.train, parts.val, parts.held_out)]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "testC"},
            r"no complete sample of split 'testC'; complete are samples of test, train",
        ),
        ({"val": "testC"}, r"no complete sample of split 'testC'"),
        ({"val": "1.5"}, r"--val must be a fraction from 0 to below 1, or a split, got 1.5"),
        ({"val": "nan"}, r"--val must be a fraction"),
        ({"val": "train"}, r"--val train is the split that trains"),
        ({"fold": 7}, r"--fold 7: .* has the folds 1, 2"),
        ({"fold": 1, "val": "test"}, r"--val test cannot go with --fold"),
    ],
)
def test_parts_that_cannot_be_are_refused(store, settings, message):
    with pytest.raises(RunError, match=message):
        choose_parts(store, **{"split": None, "val": "0.2", "fold": None, "seed": 0, **settings})


def test_a_limit_takes_the_same_first_images_whatever_the_number(store):
    def divided(limit, seed=0):
        return choose_parts(store, split=None, val="0.25", fold=None, seed=seed, limit=limit)

    def ids(part):
        return {sample.sample_id for sample in part.train}

    everything = divided(None)
    parts = [divided(limit) for limit in range(1, 7)]
    for count, part in enumerate(parts, 1):
        assert len(part.train) == count
        assert part.val == everything.val
        assert ids(part) <= ids(parts[min(count, 5)])
    assert parts[-1] == everything
    assert len({frozenset(ids(divided(2, seed))) for seed in range(8)}) > 2


def test_a_limit_above_what_is_there_takes_all_and_says_so(store, caplog):
    part = choose_parts(store, split=None, val="0.25", fold=None, seed=0, limit=7)
    assert part == choose_parts(store, split=None, val="0.25", fold=None, seed=0)
    assert "--limit-images 7: the training part has 6 images, and all of them" in caplog.text


def test_a_limit_counts_images_not_their_windows(store):
    card = replace(
        store.card, rule=RegionRule(kind="window", region_px=64, patch_px=32, window_px=70)
    )
    windows = [
        StoredSample(
            sample_id=f"{name}_r{row}c0", index=0, split="train", group=name, source_px=(140, 70)
        )
        for name in ("slide_a", "slide_b_r1", "slide_c")
        for row in range(3)
    ]
    kept = limited(windows, card, 2, 0)
    assert len(kept) == 6
    assert len({sample.group for sample in kept}) == 2
    assert source_ids(windows[3:4], card) == ["slide_b_r1"]


# -- settings --


def test_a_store_decides_split_crop_taps_and_width(store, tmp_path):
    settings = plan_settings(store)
    assert settings.split == "train"
    assert settings.head_width == 16  # the model's
    assert settings.crop_px is None  # a region of 64 px is read whole
    assert settings.taps == store.tap_names
    large = build_store(tmp_path / "large.zarr", train=1, test=0, region_px=768, patch_px=256)
    assert plan_settings(large).crop_px == 384
    assert plan_settings(large, crop_px=None).crop_px is None
    assert plan_settings(large, crop_px=768).crop_px is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2, "steps": 3}, "--epochs or --steps, not both"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"limit": 0}, "--limit-images must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "--lr must be a number above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "--lr must be a number above 0, got nan"),
        ({"head_width": 10}, "--head-width must be a multiple of 4, got 10"),
        ({"keep": "first"}, "--keep must be one of best, last, got 'first'"),
        ({"schedule": "step"}, "--schedule must be one of constant, cosine, got 'step'"),
        ({"augment": "rotate"}, "--augment must be one of none, flips, got 'rotate'"),
        ({"normalize": "batch"}, "--normalize must be one of channel, none, got 'batch'"),
        ({"crop_px": 48}, "--crop must be a multiple of 32 px up to the region's 64 px, got 48"),
    ],
)
def test_settings_outside_what_they_can_be_are_refused(store, settings, message):
    with pytest.raises(RunError, match=message):
        plan_settings(store, **settings)


def test_the_default_name_says_what_is_not_the_default(store):
    assert default_run_name(store, plan_settings(store)) == "shapes"
    changed = plan_settings(store, fold=1, learning_rate=3e-4, crop_px=32, taps=("up_05",), seed=7)
    assert default_run_name(store, changed) == "shapes-fold-1-crop-32-lr-0.0003-taps-up_05-seed-7"
    assert default_run_name(store, plan_settings(store, limit=5)) == "shapes-limit-5"
    names = {
        default_run_name(store, plan_settings(store, taps=taps))
        for taps in (store.tap_names[:4], store.tap_names[:5], store.tap_names[1:5])
    }
    assert len(names) == 3


# -- training --


def test_a_head_learns_to_find_discs(store, tmp_path):
    result = train_small(store, tmp_path / "run", epochs=12, val="0.25", learning_rate=2e-2)
    assert result.kept["val_miou"] > 0.8
    rows = log_of(tmp_path / "run")
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])


@pytest.mark.parametrize("dtype", ["int8", "float16-5bit"])
def test_a_head_learns_from_rounded_features_as_well(tmp_path, dtype):
    store = build_store(tmp_path / "s.zarr", train=8, test=2, dtype=dtype)
    result = train_small(store, tmp_path / "run", epochs=12, val="0.25", learning_rate=2e-2)
    assert result.kept["val_miou"] > 0.8


def test_a_run_leaves_its_config_head_log_curves_and_result(store, finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock",
        "config.json",
        "curves.png",
        "head.safetensors",
        "log.csv",
        "result.json",
    ]
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["learning_rate"] == 1e-2
    assert config["features"]["fingerprint"] == store.fingerprint
    assert config["model"]["sha256"] == "a" * 64
    assert len(config["samples"]["train"]) == 6
    assert len(config["samples"]["val"]) == 2
    assert any("random weights" in note for note in config["notes"])
    tensors = state(finished)
    parameters = sum(
        value.numel()
        for name, value in tensors.items()
        if not name.startswith("feature_") and "running" not in name and "tracked" not in name
    )
    assert config["head"]["parameters"] == parameters
    with Image.open(finished / "curves.png") as image:
        assert image.width > 500


def test_the_log_has_one_row_per_epoch(finished):
    rows = log_of(finished)
    assert [(row["step"], row["epoch"]) for row in rows] == [
        ("3", "1"),
        ("6", "2"),
        ("9", "3"),
        ("12", "4"),
    ]
    assert all(float(row["learning_rate"]) == 0.01 for row in rows)
    assert all(0 <= float(row["val_miou"]) <= 1 for row in rows)


def test_the_epoch_that_is_best_on_validation_is_kept(store, tmp_path):
    from safetensors import safe_open

    result = train_small(store, tmp_path / "run", epochs=6, learning_rate=0.1)
    rows = log_of(tmp_path / "run")
    best = max(rows, key=lambda row: float(row["val_miou"]))
    with safe_open(tmp_path / "run" / "head.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == best["step"]
    assert result.kept["step"] == int(best["step"])


def test_the_last_head_is_kept_where_that_is_asked_for(store, tmp_path):
    from safetensors import safe_open

    settings = {"epochs": 4, "learning_rate": 0.1}
    best = train_small(store, tmp_path / "best", keep="best", **settings)
    last = train_small(store, tmp_path / "last", keep="last", **settings)
    assert best.kept["step"] < last.kept["step"] == last.steps
    assert last.kept["val_miou"] < best.kept["val_miou"]
    with safe_open(tmp_path / "last" / "head.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == str(last.steps)
    # The same training: what is kept of it changes no step.
    assert log_of(tmp_path / "last")[-1]["loss"] == log_of(tmp_path / "best")[-1]["loss"]


def test_a_cosine_keeps_the_last_head_unless_it_is_told_otherwise(store):
    assert plan_settings(store).keep == "best"
    assert plan_settings(store, schedule="cosine").keep == "last"
    assert plan_settings(store, schedule="cosine", keep="best").keep == "best"
    assert plan_settings(store, steps=100, schedule="cosine").validation_interval(8) == 16
    named = plan_settings(store, schedule="cosine", keep="best")
    assert default_run_name(store, named) == "shapes-schedule-cosine-keep-best"
    assert default_run_name(store, plan_settings(store, keep="last")) == "shapes-keep-last"


def test_without_validation_the_last_head_is_kept(store, tmp_path):
    result = train_small(store, tmp_path / "run", epochs=2, val="0")
    assert result.kept["step"] == 8
    assert [row["val_miou"] for row in log_of(tmp_path / "run")] == ["", ""]


def test_steps_count_instead_of_epochs(store, tmp_path):
    result = train_small(store, tmp_path / "run", steps=7)
    assert result.steps == 7
    assert [row["step"] for row in log_of(tmp_path / "run")] == ["3", "6", "7"]


def test_many_steps_are_validated_at_most_twenty_times_and_once_more(store):
    assert plan_settings(store, steps=10_000, batch_size=4).validation_interval(8) == 500


def test_the_cosine_schedule_falls_to_zero(store, tmp_path):
    train_small(store, tmp_path / "run", epochs=4, schedule="cosine")
    rates = [float(row["learning_rate"]) for row in log_of(tmp_path / "run")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.01 * 0.5 * (1 + np.cos(np.pi * 11 / 12)))


def test_class_weights_come_from_the_training_part(tmp_path):
    tissue = build_store(tmp_path / "tissue.zarr", train=6, test=0, scheme=TISSUE)
    train_small(tissue, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    train = [s for s in tissue.samples() if s.sample_id in config["samples"]["train"]]
    counts = class_pixel_counts(tissue, train)
    assert config["class_pixels"] == counts.tolist()
    assert config["head"]["num_outputs"] == 4
    assert config["class_weights"][3] == 0
    np.testing.assert_allclose(config["class_weights"][:3], 1 - counts / counts.sum(), rtol=1e-6)


def test_the_features_are_standardised_with_the_training_part(store, finished):
    config = json.loads((finished / "config.json").read_text())
    train = [s for s in store.samples() if s.sample_id in config["samples"]["train"]]
    statistics = channel_statistics(store, head_levels(store), train)
    tensors = state(finished)
    means = [statistics[name][0] for name in ("stride_32", "stride_16", "stride_8", "stride_4")]
    np.testing.assert_allclose(tensors["feature_mean"].numpy(), np.concatenate(means), rtol=1e-6)


def test_normalisation_can_be_left_out(store, tmp_path):
    train_small(store, tmp_path / "run", normalize="none")
    tensors = state(tmp_path / "run")
    assert not tensors["feature_mean"].any()
    assert (tensors["feature_std"] == 1).all()


def test_the_same_seed_gives_the_same_head_and_another_seed_another(store, tmp_path):
    before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_small(store, tmp_path / name, crop_px=32, augment="flips", seed=seed)
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))
    assert not same(state(tmp_path / "a"), state(tmp_path / "c"))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is untouched


def test_bfloat16_trains_as_well(store, tmp_path):
    result = train_small(store, tmp_path / "run", precision="bfloat16")
    assert result.steps == 4
    assert all(value.dtype != torch.bfloat16 for value in state(tmp_path / "run").values())


def test_progress_says_where_the_training_stands(store, tmp_path):
    seen = []
    train_small(store, tmp_path / "run", epochs=2, progress=seen.append)
    assert [(state.step, state.epoch) for state in seen] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]
    assert [state.row is not None for state in seen] == [False, False, True] * 2
    assert seen[-1].seconds_left == 0
    assert all(state.steps_per_second > 0 for state in seen)


# -- interruption --


class InterruptAt:
    """Presses Ctrl-C after a step."""

    def __init__(self, step, press):
        self.step, self.press = step, press

    def __call__(self, progress):
        if progress.step == self.step:
            self.press()


def raise_interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("press", [raise_interrupt, press_ctrl_c])
@pytest.mark.parametrize("step", [3, 7])  # at the end of an epoch, and inside one
def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(
    store, finished, tmp_path, press, step
):
    out = tmp_path / "run"
    settings = {"epochs": 4, "crop_px": 32}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_small(store, out, progress=InterruptAt(step, press), **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (out / "checkpoint.pt").exists()
    assert not (out / "result.json").exists()
    result = train_small(store, out, **settings)
    assert result.steps_done_now == 12 - step
    assert not (out / "checkpoint.pt").exists()
    assert same(state(out), state(finished))

    def numbers(run):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in log_of(run)]

    assert numbers(out) == numbers(finished)


def test_a_finished_run_is_left_alone(store, finished):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    result = train_small(store, finished, epochs=4, crop_px=32)
    assert result.steps_done_now == 0
    assert result.steps == 12
    assert result.kept["val_miou"] == pytest.approx(
        max(float(row["val_miou"]) for row in log_of(finished)), abs=1e-6
    )
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != ".lock"} == {
        name: time for name, time in before.items() if name != ".lock"
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learning_rate": 0.02},
            r"was trained with learning_rate 0.01, this run asks for 0.02; use",
        ),
        ({"epochs": 5}, r"was trained with epochs 4, this run asks for 5"),
        ({"crop_px": None}, r"was trained with crop_px 32, this run asks for none"),
        ({"seed": 3}, r"was trained with seed 0, this run asks for 3"),
        ({"limit": 2}, r"was trained with limit none, this run asks for 2"),
        ({"taps": ("up_05",)}, r"was trained with taps middle,up_00,.*asks for up_05"),
        ({"augment": "flips", "batch_size": 3}, r"augment none, .* flips \(batch_size too\)"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(store, finished, settings, message):
    with pytest.raises(RunError, match=message):
        train_small(store, finished, **{"epochs": 4, "crop_px": 32, **settings})


def test_features_of_another_recipe_in_the_same_folder_are_refused(finished, tmp_path):
    other = build_store(tmp_path / "other.zarr", train=8, test=3, timestep=100)
    with pytest.raises(RunError, match=r"features' timestep 50, this run asks for 100"):
        train_small(other, finished, epochs=4, crop_px=32)


def test_a_store_that_has_grown_is_refused_in_the_same_folder(finished, tmp_path):
    grown = build_store(tmp_path / "grown.zarr", train=10, test=3)
    with pytest.raises(RunError, match=r"train part 6 samples, this run asks for 8 samples"):
        train_small(grown, finished, epochs=4, crop_px=32)


def test_a_folder_of_something_else_is_not_written_to(store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"exists and is no run folder \(notes.txt is in it\)"):
        train_small(store, tmp_path)
    with pytest.raises(RunError, match=r"notes.txt is a file; choose another --out"):
        train_small(store, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_trainings_cannot_write_into_one_run(store, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(RunError, match="another process is training into this run"),
    ):
        train_small(store, tmp_path / "run")


def test_a_damaged_checkpoint_is_named(store, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_small(store, out, progress=InterruptAt(2, raise_interrupt))
    content = (out / "checkpoint.pt").read_bytes()
    packed = io.BytesIO()  # could unpack to any size
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for damaged in (b"", b"junk", content[: len(content) // 2], packed.getvalue()):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(RunError, match=r"checkpoint.pt is damaged .*delete it"):
            train_small(store, out)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"kept": {}, "steps": Infinity, "seconds": 1}',
        '{"kept": {"miou": 1%s}, "steps": 1, "seconds": 1}' % ("0" * 400),
    ],
)
def test_a_result_with_what_cannot_be_is_damage(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(RunError, match=r"result.json is damaged"):
        finished_before(tmp_path)


def test_a_checkpoint_cannot_run_code(store, tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_small(store, out, progress=InterruptAt(2, raise_interrupt))
    (out / "checkpoint.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged"):
        train_small(store, out)
    assert not (tmp_path / "pwned").exists()


# -- what goes wrong --


def test_a_loss_that_is_not_finite_ends_the_training_with_one_line(store, tmp_path):
    with pytest.raises(RunError) as caught:
        train_small(store, tmp_path / "run", epochs=4, learning_rate=1e36, normalize="none")
    message = str(caught.value)
    assert "\n" not in message
    assert "of 12" in message
    assert "--lr 1e+35 (it was 1e+36), and another --out" in message
    assert "--normalize channel" in message


def test_the_checkpoint_before_a_diverging_step_is_kept(store, tmp_path, monkeypatch):
    from pathsegdiff.segmentation import train

    real = train.weighted_cross_entropy
    calls = []

    def diverging(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(train, "weighted_cross_entropy", diverging)
    with pytest.raises(RunError, match=r"loss is nan at step 5 of 12; the checkpoint of step 3"):
        train_small(store, tmp_path / "run", epochs=4)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3


def test_masks_of_one_class_only_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "one.zarr") as writer:
        for sample in writer.register(make_samples(4, 0)):
            label = np.zeros((64, 64), np.uint8)
            label[0] = 255  # unlabelled: counts for no class
            writer.write(sample, make_arrays(rng, label, GLANDS, TAPS, 32))
    one = FeatureStore.open(tmp_path / "one.zarr")
    with pytest.raises(RunError, match=r"hold pixels of background only; .*at least two classes"):
        train_small(one, tmp_path / "run")


def test_a_damaged_sample_ends_the_training_with_its_name(tmp_path):
    damaged = build_store(tmp_path / "damaged.zarr", train=4, test=0)
    sample = damaged.samples()[0]
    chunk = next((tmp_path / "damaged.zarr" / "stride_4" / "c" / str(sample.index)).rglob("0"))
    while chunk.is_dir():
        chunk = chunk / "0"
    chunk.unlink()
    with pytest.raises(StoreError, match=rf"{sample.sample_id} is damaged"):
        train_small(damaged, tmp_path / "run", normalize="none", val="0")


def test_an_unfinished_store_trains_on_what_is_complete_and_says_so(tmp_path, caplog):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "part.zarr") as writer:
        samples = writer.register(make_samples(8, 0))
        for sample in samples[:6]:
            label = make_label(rng, GLANDS, 64)
            writer.write(sample, make_arrays(rng, label, GLANDS, TAPS, 32))
    part = FeatureStore.open(tmp_path / "part.zarr")
    train_small(part, tmp_path / "run", steps=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(config["samples"]["train"]) + len(config["samples"]["val"]) == 6
    said = f"{part.path}: only 6 of the 8 samples of train are extracted so far"
    assert sum(said in message for message in caplog.messages) == 1
    caplog.clear()
    train_small(part, tmp_path / "run", steps=1)  # finished: nothing begins
    assert not caplog.messages


def test_a_finished_store_is_trained_on_without_a_word(store, tmp_path, caplog):
    train_small(store, tmp_path / "run", steps=1)
    assert not [message for message in caplog.messages if "extracted so far" in message]


def test_training_needs_neither_diffusers_nor_timm(store, tmp_path):
    # The packages are made impossible to import, not only watched.
    code = f"""
import sys
from pathlib import Path
for name in ("diffusers", "timm", "transformers", "pathsegdiff.diffusion"):
    sys.modules[name] = None
import cli.train_head, cli.eval
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.segmentation.evaluate import evaluate_run
from pathsegdiff.segmentation.runs import load_run
from pathsegdiff.segmentation.train import plan_settings, train_head
store = FeatureStore.open({store.path!r})
out = Path({str(tmp_path / "run")!r})
train_head(store, out, plan_settings(store, steps=2, head_width=8))
evaluate_run(load_run(out), store)
print((out / "eval-test" / "metrics.json").exists())
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


def test_train_head_takes_a_device_by_name(store, tmp_path):
    settings = plan_settings(store, steps=1, head_width=8)
    assert train_head(store, tmp_path / "run", settings, device="cpu").steps == 1
