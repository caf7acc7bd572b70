"""The feature store: what is written is read, and what is damaged is refused."""

import gc
import itertools
import json
import re
import shutil
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from filelock import FileLock
from numcodecs import Zstd
from torch.nn import functional as F

from pathsegdiff.config import ALL_TAPS, Recipe
from pathsegdiff.errors import StoreError
from pathsegdiff.features import writer as writer_module
from pathsegdiff.features.layout import TapSpec, plan_levels
from pathsegdiff.features.seal import sealed, unsealed
from pathsegdiff.features.shards import ShardFormat, read_shard
from pathsegdiff.features.store import FeatureStore, checksum
from pathsegdiff.features.verify import verify_sample, verify_store
from pathsegdiff.features.writer import open_existing, put_metadata_back
from tests import helpers_store
from tests.helpers_hostile import change_json, change_sealed, reseal
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

PAPER_TAPS = tuple(
    TapSpec(name=name, channels=channels, stride=stride)
    for name, channels, stride in zip(
        ALL_TAPS,
        (960, 960, 960, 960, 576, 576, 576, 384, 384, 384, 192, 192, 192),
        (32, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 4),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return build_store(tmp_path_factory.mktemp("store") / "shapes.zarr")


def damaged(tmp_path: Path) -> Path:
    return Path(build_store(tmp_path / "shapes.zarr", train=2, test=1).path)


def test_the_papers_taps_make_four_levels_of_7296_channels():
    levels = plan_levels(PAPER_TAPS, 256, "levels")
    assert [(level.name, level.channels) for level in levels] == [
        ("stride_4", 960),
        ("stride_8", 1344),
        ("stride_16", 2112),
        ("stride_32", 2880),
    ]
    # facts: 6,033,408 values per patch at native size
    assert sum(level.channels * level.cells_per_patch**2 for level in levels) == 6_033_408


def test_a_chunk_never_mixes_two_taps():
    for level in plan_levels(PAPER_TAPS, 256, "levels"):
        channels, _, _ = level.chunk(3, 3, 2)
        assert all(tap.start % channels == 0 for tap in level.taps)


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(5)
    with open_writer(tmp_path / "s.zarr") as writer:
        sample = writer.register(make_samples(1, 0))[0]
        arrays = make_arrays(rng, make_label(rng, GLANDS, 64), GLANDS, TAPS, 32)
        writer.write(sample, arrays)
    store = FeatureStore.open(tmp_path / "s.zarr")
    read = store.samples()[0]
    for name, features in arrays.levels.items():
        np.testing.assert_array_equal(store.read_level(read, name), features.astype(np.float16))
    np.testing.assert_array_equal(store.label(read), arrays.label)
    np.testing.assert_array_equal(store.image(read), arrays.image)
    np.testing.assert_array_equal(store.embedding(read), arrays.embedding)
    np.testing.assert_array_equal(store.instances(read), arrays.instances)


def test_values_that_are_all_zero_are_written_too(tmp_path):
    rng = np.random.default_rng(5)
    with open_writer(tmp_path / "s.zarr") as writer:
        sample = writer.register(make_samples(1, 0))[0]
        arrays = make_arrays(rng, np.zeros((64, 64), np.uint8), GLANDS, TAPS, 32)
        arrays.image[:] = 0
        arrays.levels["stride_8"][:] = 0
        writer.write(sample, arrays)
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert verify_store(store) == []
    read = store.samples()[0]
    assert not store.read_level(read, "stride_8").any()
    assert not store.label(read).any()
    assert not store.instances(read).any()
    (tmp_path / "s.zarr" / "label" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(StoreError, match="label/c/0/0/0 is missing"):
        FeatureStore.open(tmp_path / "s.zarr").label(read)


def test_some_taps_and_some_cells_are_read_alone(store):
    sample = store.samples()[0]
    whole = store.read_level(sample, "stride_4")
    part = store.read_level(
        sample, "stride_4", rows=slice(3, 9), columns=slice(5, 16), taps=["up_08", "up_10"]
    )
    np.testing.assert_array_equal(part, np.concatenate([whole[0:4], whole[6:8]])[:, 3:9, 5:16])


def test_the_dense_map_is_the_papers_computed_the_plain_way(store):
    sample = store.samples()[1]
    maps = {}
    for level in store.levels.values():
        values = torch.from_numpy(store.read_level(sample, level.name).astype(np.float32))
        cells = level.cells_per_patch
        for tap in level.taps:
            stitched = torch.zeros(tap.stop - tap.start, 16, 16)
            for row in range(2):
                for column in range(2):
                    patch = values[
                        tap.start : tap.stop,
                        row * cells : (row + 1) * cells,
                        column * cells : (column + 1) * cells,
                    ]
                    up = F.interpolate(patch[None], size=(8, 8), mode="bilinear")[0]
                    stitched[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = up
            maps[tap.name] = stitched
    expected = torch.cat([maps[tap] for tap in ALL_TAPS]).numpy()
    np.testing.assert_allclose(store.dense(sample), expected, rtol=1e-5, atol=1e-6)


def test_samples_are_listed_by_split_and_only_complete_ones_exist(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "s.zarr") as writer:
        samples = writer.register(make_samples(2, 1))
        writer.write(samples[2], make_arrays(rng, make_label(rng, GLANDS, 64), GLANDS, TAPS, 32))
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert [sample.sample_id for sample in store.samples()] == ["test_0"]
    assert store.samples("train") == ()
    with pytest.raises(StoreError, match="sample train_0 is not complete"):
        store.label(store.registered()[0])


def test_a_second_extraction_appends_and_keeps_what_is_there(tmp_path):
    path = Path(build_store(tmp_path / "s.zarr", train=2, test=0).path)
    before = FeatureStore.open(path)
    features = before.read_level(before.samples()[1], "stride_8")
    with open_writer(path) as writer:
        samples = writer.register(make_samples(2, 3))
    assert [sample.index for sample in samples] == [0, 1, 2, 3, 4]
    after = FeatureStore.open(path)
    assert len(after.samples()) == 2
    np.testing.assert_array_equal(after.read_level(after.samples()[1], "stride_8"), features)


def test_a_sample_that_changed_its_split_is_listed_in_the_new_one(tmp_path):
    path = Path(build_store(tmp_path / "s.zarr", train=2, test=1).path)
    first, second = make_samples(2, 0)
    with open_writer(path) as writer:
        moved = writer.register([first, replace(second, split="test", group="other")])
    assert [sample.index for sample in moved] == [0, 1]
    store = FeatureStore.open(path)
    assert [sample.sample_id for sample in store.samples("test")] == ["train_1", "test_0"]
    assert store.samples("test")[0].group == "other"
    assert store.label(store.samples("test")[0]).shape == (64, 64)


def test_names_and_splits_become_those_of_the_manifest(tmp_path, monkeypatch):
    path = Path(build_store(tmp_path / "s.zarr", train=2, test=1).path)
    before = FeatureStore.open(path)
    card, level = before.card, next(iter(before.levels))
    values = before.read_level(before.samples()[0], level)

    def renamed(**others):
        classes = tuple(
            replace(entry, name=f"{entry.name}_2", colour=(1, 2, number))
            for number, entry in enumerate(card.scheme.classes)
        )
        scheme = replace(card.scheme, classes=classes, objects=classes[1].name)
        return replace(card, scheme=scheme, default_eval="train", title="Other", **others)

    monkeypatch.setattr(helpers_store, "make_card", lambda *_: renamed(typical_source_px=(9, 9)))
    with open_writer(path) as writer:
        assert [sample.index for sample in writer.register(make_samples(3, 1))] == [0, 1, 3, 2]
    after = FeatureStore.open(path)
    assert after.card == renamed()  # sizes stay as they were
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.read_level(after.samples()[0], level), values)
    assert verify_store(after) == []
    content = (path / "zarr.json").read_bytes()
    with open_writer(path):
        assert (path / "zarr.json").read_bytes() == content
    # the second copy has them too
    (path / "zarr.json").unlink()
    put_metadata_back(path)
    assert FeatureStore.open(path).card == renamed()


#: Every field of a recipe with another value than the one it was made with.
OTHER_RECIPES = [
    ("timestep", 100, r"was made with timestep 50, this run asks for 100\. Use --t 50"),
    ("seed", 1, r"seed 0, this run asks for 1\. Use --seed 0"),
    ("conditioning", "none", r"conditioning encoder, this run asks for none\. Use --cond encoder"),
    ("dtype", "float32", r"dtype float16, this run asks for float32\. Use --dtype float16"),
    (
        "precision",
        "bfloat16",
        r"precision float32, this run asks for bfloat16\. Use --precision float32",
    ),
    (
        "model_sha256",
        "c" * 64,
        r"model_sha256 a{12}, this run asks for c{12}\. Use --model with the bundle that it was",
    ),
    (
        "dataset_sha256",
        "c" * 64,
        r"dataset_sha256 b{12}, this run asks for c{12}\. Use the manifest and --mpp that it was",
    ),
    ("taps", ("up_08",), r"taps middle,up_00.*this run asks for up_08\. Use --taps middle,up_00"),
    ("layout", "dense", r"layout levels, this run asks for dense\. Use --layout levels"),
    ("tokens", True, r"tokens False, this run asks for True\. Use --no-tokens"),
]


def test_every_field_of_a_recipe_is_tried():
    assert {field for field, _, _ in OTHER_RECIPES} == {field.name for field in fields(Recipe)}


@pytest.mark.parametrize(("field", "value", "message"), OTHER_RECIPES)
def test_another_recipe_is_refused_by_field_and_value(tmp_path, field, value, message):
    path = damaged(tmp_path)
    before = sorted(path.rglob("*"))
    with pytest.raises(StoreError, match=rf"{message}.*, or another --out\.$"):
        open_writer(path, **{field: value})
    assert sorted(path.rglob("*")) == before


def test_where_several_fields_differ_the_way_out_mends_all_of_them(tmp_path):
    path = damaged(tmp_path)
    message = (
        r"timestep 50, this run asks for 100; seed 0, this run asks for 3\. "
        r"Use --t 50 and --seed 0, or another --out\.$"
    )
    with pytest.raises(StoreError, match=message):
        open_writer(path, timestep=100, seed=3)


def test_a_value_that_float16_cannot_hold_is_refused_and_float32_offered(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "s.zarr") as writer:
        sample = writer.register(make_samples(1, 0))[0]
        arrays = make_arrays(rng, make_label(rng, GLANDS, 64), GLANDS, TAPS, 32)
        arrays.levels["stride_8"][3, 2, 1] = 70000.0
        with pytest.raises(StoreError, match="stride_8 of sample train_0 .* use --dtype float32"):
            writer.write(sample, arrays)
        arrays.levels["stride_8"][3, 2, 1] = np.nan
        with pytest.raises(StoreError, match="the model is broken"):
            writer.write(sample, arrays)
    assert FeatureStore.open(tmp_path / "s.zarr").samples() == ()


def test_features_of_another_shape_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "s.zarr") as writer:
        sample = writer.register(make_samples(1, 0))[0]
        arrays = make_arrays(rng, make_label(rng, GLANDS, 64), GLANDS, TAPS, 32)
        arrays.levels["stride_8"] = arrays.levels["stride_8"][1:]
        with pytest.raises(StoreError, match=r"stride_8 of sample train_0 has shape \(13, 8, 8\)"):
            writer.write(sample, arrays)


def test_a_missing_chunk_is_an_error_and_never_zeros(tmp_path):
    path = damaged(tmp_path)
    (path / "stride_8" / "c" / "1" / "0" / "0" / "0").unlink()
    store = FeatureStore.open(path)
    store.read_level(store.samples()[0], "stride_8")
    with pytest.raises(
        StoreError, match="sample train_1 is damaged, stride_8/c/1/0/0/0 is missing"
    ):
        store.read_level(store.samples()[1], "stride_8")


def test_a_flipped_byte_is_an_error_when_read_and_named_by_verify(tmp_path):
    path = damaged(tmp_path)
    file = path / "stride_4" / "c" / "2" / "0" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    store = FeatureStore.open(path)
    with pytest.raises(StoreError, match="sample test_0 is damaged in stride_4"):
        store.read_level(store.samples()[2], "stride_4")
    findings = verify_store(store)
    assert [(f.sample.sample_id, f.problem) for f in findings] == [
        ("test_0", "stride_4/c/2/0/0/0 has another checksum")
    ]


def test_verify_through_dask_finds_what_a_plain_loop_finds(tmp_path):
    path = Path(build_store(tmp_path / "s.zarr", train=5, test=3).path)
    for index, level in ((0, "stride_4"), (3, "stride_32"), (7, "stride_8")):
        file = path / level / "c" / str(index) / "0" / "0" / "0"
        file.write_bytes(file.read_bytes()[:-1])
    store = FeatureStore.open(path)
    plain = [finding for sample in store.samples() for finding in verify_sample(store, sample)]
    assert verify_store(store) == plain
    assert [finding.sample.index for finding in plain] == [0, 3, 7]


def test_a_truncated_file_is_an_error(tmp_path):
    path = damaged(tmp_path)
    file = path / "label" / "c" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-3])
    store = FeatureStore.open(path)
    with pytest.raises(StoreError, match="sample train_0 is damaged, label/c/0/0/0 has"):
        store.label(store.samples()[0])


def test_a_damaged_mark_is_named(tmp_path):
    path = damaged(tmp_path)
    (path / "marks" / "00000000.json").write_text('{"sample_id": "train_0"')
    store = FeatureStore.open(path)
    with pytest.raises(StoreError, match="the completion mark of sample train_0 is damaged"):
        store.image(store.samples()[0])


@pytest.mark.parametrize("name", ["stride_8", "label", "image", "embedding"])
def test_a_mark_that_forgets_an_array_is_named_by_verify(tmp_path, name):
    path = damaged(tmp_path)
    file = path / "marks" / "00000001.json"
    mark = unsealed(file.read_bytes())
    mark["files"] = {key: value for key, value in mark["files"].items() if name not in key}
    file.write_bytes(sealed(mark))
    problems = [finding.problem for finding in verify_store(FeatureStore.open(path))]
    assert problems == [f"the mark does not list {name}"]


def test_a_whole_store_verifies(store):
    assert verify_store(store) == []


def test_a_forgotten_sample_is_no_longer_complete(tmp_path):
    path = damaged(tmp_path)
    writer = open_existing(path)
    writer.forget(writer.store.samples()[0])
    names = [sample.sample_id for sample in FeatureStore.open(path).samples()]
    assert names == ["train_1", "test_0"]


def test_many_samples_are_forgotten_with_one_look_at_the_table(tmp_path, monkeypatch):
    path = damaged(tmp_path)
    writer = open_existing(path)
    looks = []
    real = FeatureStore.reload
    monkeypatch.setattr(FeatureStore, "reload", lambda self: (looks.append(1), real(self)))
    writer.forget(*writer.store.samples())
    assert looks == [1]
    assert writer.store.samples() == FeatureStore.open(path).samples() == ()


_accesses: list[tuple[str, str]] | None = None


def _note_access(event, arguments):
    if _accesses is not None and event in ("open", "os.listdir", "os.scandir"):
        _accesses.append((event, str(arguments[0])))


def accesses(path, work):
    """Every file that is opened and folder that is listed while something is done, by its key."""
    global _accesses
    if not hasattr(sys, "_psd_accesses_noted"):
        sys.addaudithook(_note_access)  # for good: there is no taking it back
        sys._psd_accesses_noted = True
    _accesses = []
    try:
        work()
        return [(event, name[len(str(path)) :]) for event, name in _accesses if str(path) in name]
    finally:
        _accesses = None


def test_what_a_sample_costs_does_not_depend_on_the_number_of_samples(tmp_path):
    """Files opened and folders listed: neither the table nor all marks for each sample."""
    rng = np.random.default_rng(0)
    label = make_label(rng, GLANDS, 64)
    arrays = make_arrays(rng, label, GLANDS, TAPS, 32)
    found = []
    for number in (2, 40):
        path = tmp_path / f"{number}.zarr"
        with open_writer(path) as writer:
            samples = writer.register(make_samples(number, 0))
            writer.write(samples[0], arrays)  # opens the arrays

            def write(writer=writer, sample=samples[-1]):
                claim = writer.claim(sample)
                writer.write(sample, arrays)
                claim.release(finished=True)

            written = accesses(path, write)
        store = FeatureStore.open(path)

        def read(store=store):
            sample = store.samples()[-1]
            for level in store.levels:
                store.read_level(sample, level)
            for part in (store.label, store.image, store.embedding, store.instances):
                part(sample)

        read()  # opens the arrays
        store._checked.clear()
        parts = [written, accesses(path, read)]
        parts.append(accesses(path, lambda s=store: verify_sample(s, s.samples()[-1])))
        # Names without the index, and temporary ones without their random part.
        plain = partial(re.sub, r"\.[0-9a-f]{32}\.|\d+", "N")
        found.append([sorted((event, plain(name)) for event, name in p) for p in parts])
        assert all(part for part in parts)
        for event, name in itertools.chain(*parts):
            assert not name.startswith("/samples.json")
            # A listing of what has an entry for each sample takes longer the more there are.
            many = name in ("", "/marks", "/instances", "/.claims") or name.endswith("/c")
            assert event == "open" or not many
    assert found[0] == found[1]


def test_the_objects_of_a_sample_that_was_read_are_not_kept(tmp_path, monkeypatch):
    store = build_store(tmp_path / "s.zarr", train=4, test=0)
    opened = []
    real = FeatureStore._array

    def watched(self, name):
        array = real(self, name)
        opened.append(weakref.ref(array))
        return array

    monkeypatch.setattr(FeatureStore, "_array", watched)
    for sample in store.samples():
        store.instances(sample)
    gc.collect()
    assert [array() for array in opened] == [None] * 4


def test_a_sample_is_written_by_the_one_who_has_its_claim(tmp_path):
    path = damaged(tmp_path)
    first, second = open_existing(path), open_existing(path)
    sample = first.store.samples()[0]
    assert first.claim(sample) is None  # it is complete
    first.forget(sample)
    claim = first.claim(sample)
    assert claim is not None and second.claim(sample) is None
    claim.release(finished=False)
    again = second.claim(sample)
    assert again is not None and first.claim(sample) is None
    again.release(finished=True)


def test_a_store_that_another_process_keeps_locked_is_said(tmp_path, monkeypatch):
    path = damaged(tmp_path)
    monkeypatch.setattr(writer_module, "_LOCK_SECONDS", 0)
    with FileLock(path / ".lock"), pytest.raises(StoreError, match="has kept this store locked"):
        open_writer(path)
    open_writer(path)


def test_what_is_no_store_is_said_so(tmp_path):
    with pytest.raises(StoreError, match="there is no feature store; make one with `psd extract`"):
        FeatureStore.open(tmp_path / "nothing.zarr")
    zarr.create_group(str(tmp_path / "plain.zarr"))
    with pytest.raises(StoreError, match="a Zarr group but no feature store"):
        FeatureStore.open(tmp_path / "plain.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists and is no feature store"):
        open_writer(tmp_path / "folder")
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"


def test_altered_attributes_are_noticed(tmp_path):
    path = damaged(tmp_path)
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["pathsegdiff"]["recipe"]["timestep"] = 60
    altered = json.dumps(metadata).encode()
    (path / "zarr.json").write_bytes(altered)
    with pytest.raises(StoreError, match="the store itself is missing or damaged"):
        FeatureStore.open(path)
    table = unsealed((path / "samples.json").read_bytes())
    table["files"]["zarr.json"] = [checksum(altered)]
    (path / "samples.json").write_bytes(sealed(table))
    with pytest.raises(StoreError, match="does not match its fingerprint"):
        FeatureStore.open(path)


def test_a_data_set_without_objects_has_no_instances(tmp_path):
    store = build_store(tmp_path / "s.zarr", train=1, test=0, scheme=TISSUE)
    assert store.instances(store.samples()[0]) is None


def test_int8_keeps_a_scale_per_channel_and_less_than_half_the_bytes(tmp_path):
    plain = build_store(tmp_path / "f.zarr", train=2, test=0, region_px=256, patch_px=128)
    small = build_store(
        tmp_path / "i.zarr", train=2, test=0, region_px=256, patch_px=128, dtype="int8"
    )
    for sample, other in zip(plain.samples(), small.samples(), strict=True):
        sizes = plain.bytes_of(sample), small.bytes_of(other)
        for level in plain.levels:
            values, rounded = plain.read_level(sample, level), small.read_level(other, level)
            assert rounded.dtype == np.float32
            steps = np.abs(values).max(axis=(1, 2), keepdims=True).astype(np.float32) / 127
            assert (np.abs(rounded - values) <= 0.51 * steps + 1e-3 * np.abs(values)).all()
            taps = [tap.name for tap in plain.levels[level].taps][-1:]
            some = small.read_level(other, level, taps=taps, rows=slice(1, 3))
            start = plain.levels[level].taps[-1].start
            np.testing.assert_array_equal(some, rounded[start:, 1:3])
        features = [
            sum(size for name, size in found.items() if "stride" in name) for found in sizes
        ]
        assert features[1] < 0.5 * features[0]
    assert verify_store(small) == []
    # Through zarr, as a reader elsewhere would do it.
    group = zarr.open_group(tmp_path / "i.zarr", mode="r")
    raw, scale = group["stride_8"][1], group["scale_stride_8"][1]
    np.testing.assert_allclose(
        raw * scale[:, None, None], small.read_level(small.samples()[1], "stride_8"), rtol=1e-6
    )


def test_a_rounded_mantissa_is_stored_compressed(tmp_path):
    plain = build_store(tmp_path / "f.zarr", train=1, test=0, region_px=256, patch_px=128)
    small = build_store(
        tmp_path / "r.zarr", train=1, test=0, region_px=256, patch_px=128, dtype="float16-5bit"
    )
    (sample,), (other,) = plain.samples(), small.samples()
    for level in plain.levels:
        rounded = small.read_level(other, level)
        assert rounded.dtype == np.float16
        np.testing.assert_allclose(rounded, plain.read_level(sample, level), rtol=1 / 60, atol=1e-5)
    assert small.bytes_of(other)["stride_4"] < 0.75 * plain.bytes_of(sample)["stride_4"]
    assert verify_store(small) == []


def test_damaged_scales_are_noticed(tmp_path):
    store = build_store(tmp_path / "i.zarr", train=2, test=0, dtype="int8")
    file = tmp_path / "i.zarr" / "scale_stride_8" / "c" / "1" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert any("scale_stride_8" in finding.problem for finding in verify_store(store))
    with pytest.raises(StoreError, match="damaged in scale_stride_8"):
        FeatureStore.open(tmp_path / "i.zarr").read_level(store.samples()[1], "stride_8")


def test_the_dense_layout_reads_as_the_levels_do(tmp_path):
    store = build_store(tmp_path / "s.zarr", train=1, test=0, layout="dense")
    assert list(store.levels) == ["dense"]
    sample = store.samples()[0]
    assert store.dense(sample).shape == (sum(tap.channels for tap in TAPS), 16, 16)


def test_the_fingerprint_changes_with_every_field():
    base = Recipe(model_sha256="a", dataset_sha256="b")
    changed = [
        {"model_sha256": "x"},
        {"dataset_sha256": "x"},
        {"timestep": 51},
        {"conditioning": "none"},
        {"taps": ("up_03",)},
        {"dtype": "float32"},
        {"dtype": "int8"},
        {"dtype": "float16-5bit"},
        {"precision": "bfloat16"},
        {"seed": 1},
        {"layout": "dense"},
        {"tokens": True},
    ]
    assert {field for change in changed for field in change} == set(base.to_dict())
    prints = {Recipe(**{**base.to_dict(), **change}).fingerprint() for change in changed}
    assert len(prints | {base.fingerprint()}) == len(changed) + 1


@pytest.mark.parametrize("gone", ["stride_4/zarr.json", "label/zarr.json", "stride_8"])
def test_an_array_that_is_gone_is_said_with_the_way_out_and_never_passes_as_whole(tmp_path, gone):
    path = damaged(tmp_path)
    if (path / gone).is_dir():
        shutil.rmtree(path / gone)
    else:
        (path / gone).unlink()
    message = rf"array {gone.split('/')[0]} is missing or damaged .*psd cache repair"
    with pytest.raises(StoreError, match=message):
        verify_store(FeatureStore.open(path))
    with pytest.raises(StoreError, match=message), open_writer(path):
        pass


def test_marks_without_the_table_of_samples_are_damage_and_not_an_empty_store(tmp_path):
    path = damaged(tmp_path)
    (path / "samples.json").unlink()
    with pytest.raises(
        StoreError, match="lists 0 samples, but number 2 is marked .*psd cache repair"
    ):
        FeatureStore.open(path)


@pytest.mark.parametrize("name", ["samples.json", "zarr.json"])
def test_a_store_that_is_damaged_itself_says_how_to_mend_it(tmp_path, name):
    path = damaged(tmp_path)
    (path / name).write_text('{"cut')
    with pytest.raises(StoreError, match="run `psd cache repair"):
        FeatureStore.open(path)


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("dataset_sha256", r"Use the manifest and --mpp that it was made with, or another --out"),
        ("model_sha256", "Use --model with the bundle that it was made with, or another --out"),
    ],
)
def test_no_hash_is_offered_as_an_option(tmp_path, field, remedy):
    path = damaged(tmp_path)
    with (
        pytest.raises(StoreError, match=remedy),
        open_writer(path, **{field: "c" * 64}),
    ):
        pass


# Made to deceive: every checksum fits


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    return Path(build_store(tmp_path_factory.mktemp("h") / "s.zarr", train=1, test=0).path)


@pytest.fixture
def hostile(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "hostile.zarr"))


@contextmanager
def _little_memory(limit: int = 20 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def _configuration(metadata, codec: int = 0) -> dict[str, Any]:
    return metadata["codecs"][codec]["configuration"]


HUGE = 1 << 60
SHARDED = {
    "rows": (lambda m: m["shape"].__setitem__(0, HUGE), "it has 1152921504606846976 rows"),
    "channels": (lambda m: m["shape"].__setitem__(1, HUGE), "it has rows of shape"),
    "no shape": (lambda m: m.update(shape=[]), "is missing or damaged"),
    "fractions": (lambda m: m["shape"].__setitem__(0, 1.5), "not a whole number: 1.5"),
    "shard": (
        lambda m: m["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, HUGE),
        "a sample of it is not one file",
    ),
    "chunk": (lambda m: _configuration(m)["chunk_shape"].__setitem__(1, HUGE), "do not tile"),
    "no chunk": (lambda m: _configuration(m)["chunk_shape"].__setitem__(1, 0), "do not tile"),
    "objects": (lambda m: m.update(data_type="string"), "and dtype 'string'"),
    "bytes": (lambda m: m.update(data_type="r8000000000"), "and dtype 'r8000000000'"),
    "named dtype": (
        lambda m: m.update(data_type={"name": "variable_length_bytes"}),
        "and dtype {'name': 'variable_length_bytes'}",
    ),
    "codec": (lambda m: m.update(codecs=[{"name": "numcodecs.pickle"}]), "'numcodecs.pickle'"),
    "unpacker": (
        lambda m: _configuration(m)["codecs"].insert(1, {"name": "gzip"}),
        "it has the codec 'gzip'",
    ),
    "shards in shards": (
        lambda m: _configuration(m)["codecs"].insert(0, {"name": "sharding_indexed"}),
        "it has the codec 'sharding_indexed'",
    ),
    "group": (lambda m: m.update(node_type="group"), "not one file"),
    "transformer": (lambda m: m.update(storage_transformers=[{"name": "x"}]), "not one file"),
}


@pytest.mark.parametrize("name", SHARDED)
def test_metadata_that_no_writer_makes_is_refused_before_memory_is_taken(hostile, name):
    change, message = SHARDED[name]
    change_json(hostile / "stride_4" / "zarr.json", change)
    reseal(hostile)
    with _little_memory():
        store = FeatureStore.open(hostile)
        with pytest.raises(StoreError, match="array stride_4 is missing or damaged") as error:
            store.read_level(store.samples()[0], "stride_4")
        with pytest.raises(StoreError, match="array stride_4 is missing or damaged"):
            store.check_arrays()
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_what_the_group_repeats_of_its_arrays_counts_for_nothing(hostile):
    metadata = json.loads((hostile / "label" / "zarr.json").read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [HUGE] * 3
    inline = {"kind": "inline", "must_understand": False, "metadata": {"label": metadata}}
    change_json(hostile / "zarr.json", lambda group: group.update(consolidated_metadata=inline))
    reseal(hostile)
    store = FeatureStore.open(hostile)
    assert store.label(store.samples()[0]).shape == (64, 64)
    assert store._array("label").chunks == (1, 64, 64)


def test_metadata_nested_for_ever_is_one_line(hostile):
    (hostile / "label" / "zarr.json").write_text('{"shape": ' + "[" * 100_000)
    reseal(hostile)
    store = FeatureStore.open(hostile)
    with pytest.raises(StoreError, match="array label is missing or damaged"):
        store.label(store.samples()[0])
    (hostile / "zarr.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match="cannot be read as a feature store"):
        FeatureStore.open(hostile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["model"].update(embed_dim=HUGE), "embed_dim 1152921504606846976"),
        (lambda own: own["model"].update(head_width=HUGE), "head_width 1152921504606846976"),
        (lambda own: own["model"].update(trained="yes"), "neither trained nor not"),
        (lambda own: own["recipe"].update(model_sha256=3), "model_sha256 must be text, got 3"),
        (lambda own: own["recipe"].update(timestep=50.5), "t must be a whole number, got 50.5"),
        (lambda own: own["model"].pop("embed_dim"), "KeyError"),
        (lambda own: own["model"].update(name="a\x1b[2J"), "not a line of text"),
        (lambda own: own["dataset"].update(title="two\nlines"), "not a line of text"),
        (lambda own: own["dataset"].update(largest_source_px=[HUGE, 1]), "not a size"),
        (lambda own: own["dataset"].update(source_mpp=10**400), "OverflowError"),
        (lambda own: own["levels"]["stride_4"].update(cells_per_patch=HUGE), "stride_4 has"),
        (lambda own: own["levels"]["stride_4"].update(stride=float("inf")), "OverflowError"),
        (
            lambda own: own["levels"]["stride_4"]["taps"][-1].__setitem__(2, HUGE),
            "is not described as a level",
        ),
        (
            lambda own: own["levels"].update({"../../x": own["levels"]["stride_4"]}),
            "'../../x' is not described as a level",
        ),
    ],
)
def test_attributes_that_cannot_be_are_one_line(hostile, change, message):
    change_json(hostile / "zarr.json", lambda group: change(group["attributes"]["pathsegdiff"]))
    reseal(hostile)
    with pytest.raises(StoreError) as error, _little_memory():
        FeatureStore.open(hostile)
    assert message in str(error.value)
    assert str(error.value).isprintable()


def _bomb(size: int) -> bytes:
    """A chunk that unpacks to so many zeros: a Zstandard frame and its CRC-32C."""
    frame = Zstd(level=1).encode(bytes(size))
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


@pytest.mark.parametrize("name", ["label/c/0/0/0", "embedding/c/0/0/0", "instances/0/c/0/0"])
def test_a_chunk_that_unpacks_to_more_than_a_sample_has_is_not_unpacked(hostile, name):
    (hostile / name).write_bytes(_bomb(64 << 20))
    reseal(hostile)
    array = name.split("/")[0]
    with _little_memory():
        store = FeatureStore.open(hostile)
        read = getattr(store, array)
        with pytest.raises(StoreError, match=rf"damaged in {array}.*does not unpack to \d+ bytes"):
            read(store.samples()[0])


def test_a_shard_that_is_shorter_than_its_row_is_refused_before_memory_is_taken(tmp_path):
    # A whole index, and all of its 16,384 chunks of 64 kB the same one.
    index = np.tile(np.array([0, 65540], "<u8"), 16384).tobytes()
    file = tmp_path / "shard"
    file.write_bytes(bytes(65540) + index + google_crc32c.value(index).to_bytes(4, "little"))
    shape, dtype = (16384, 128, 256), np.dtype("float16")
    with _little_memory(), pytest.raises(ValueError, match="too short for its chunks"):
        where = [slice(None)] * 3
        read_shard(file, shape, ShardFormat(chunk=(1, 128, 256)), dtype, where)


@pytest.mark.parametrize("shape", [[HUGE, HUGE], [-4, -4], [1 << 29, 2], [8], [8, 8, 8], [0, 8]])
def test_objects_of_an_absurd_size_are_refused_though_their_mark_fits(hostile, shape):
    def change(metadata):
        metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape

    change_json(hostile / "instances" / "0" / "zarr.json", change)
    reseal(hostile)
    store = FeatureStore.open(hostile)
    with _little_memory(), pytest.raises(StoreError, match="objects of shape"):
        store.instances(store.samples()[0])


@pytest.mark.parametrize("key", ["samples.json", "marks/00000000.json", "zarr.json"])
def test_a_file_that_is_too_large_is_not_read(hostile, key):
    with (hostile / key).open("r+b") as file:
        file.truncate(1 << 30)
    with _little_memory(), pytest.raises(StoreError, match="1073741824 bytes"):
        store = FeatureStore.open(hostile)
        store.label(store.samples()[0])


@pytest.mark.parametrize("key", ["../../../etc/passwd", "/dev/zero", "label/../../x", "marks/x"])
def test_a_mark_that_lists_what_is_no_file_of_the_store_is_damaged(hostile, key):
    change_sealed(hostile / "marks/00000000.json", lambda mark: mark["files"].update({key: [0, 0]}))
    store = FeatureStore.open(hostile)
    (finding,) = verify_store(store)
    assert "completion mark of sample train_0 is damaged (it lists" in finding.problem


def test_numbers_in_marks_and_tables_that_are_none_are_damage(hostile):
    mark, table = hostile / "marks/00000000.json", hostile / "samples.json"
    change_sealed(mark, lambda mark: mark["files"].update({"label/c/0/0/0": [float("inf"), 0]}))
    store = FeatureStore.open(hostile)
    with pytest.raises(StoreError, match="completion mark of sample train_0 is damaged"):
        store.label(store.samples()[0])
    (hostile / "marks" / "\u00b2.json").write_text("{}")  # a digit, and no number
    FeatureStore.open(hostile)
    change_sealed(table, lambda t: t["samples"][0].update(source_px=[float("inf"), 1]))
    with pytest.raises(StoreError, match=r"samples\.json is damaged"):
        FeatureStore.open(hostile)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", ".x", "a\nb", "", "x" * 500, 3])
def test_a_sample_whose_name_leads_elsewhere_is_refused(hostile, name):
    change_sealed(hostile / "samples.json", lambda t: t["samples"][0].update(sample_id=name))
    with pytest.raises(StoreError, match=r"samples\.json is damaged") as error:
        FeatureStore.open(hostile)
    assert str(error.value).isprintable()
