"""The stage 1 loop: stores that are the paper's features, resume, and refuse a mixture."""

import errno

import numpy as np
import pytest
from PIL import Image

from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.errors import DataError, StoreError
from pathsegdiff.features.extract import WRITERS, extract_dataset, plan_extraction
from pathsegdiff.features.stage_one import StageOne, View, iterate_views
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.features.verify import verify_store
from tests.helpers_stage_one import T50, make_bundle, make_stage_one, plain_dense, write_dataset


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "micro")


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "data")


def extract(manifest, bundle, path, **settings):
    splits = settings.pop("splits", ())
    dataset = open_dataset(manifest, splits=splits)
    stage_one = make_stage_one(bundle, **settings)
    stores = {stage_one.views[0]: path}
    return extract_dataset(dataset, bundle, stage_one, stores)[0]


def files_of(path):
    """Every file of the store that holds values, with its bytes."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and "/c/" in str(file)
    }


def test_the_dense_map_of_a_real_image_is_the_papers(bundle, tmp_path):
    dataset = open_dataset("demo", splits=["test"])
    dataset.samples = dataset.samples[:1]
    stage_one = make_stage_one(bundle, dtype="float32")
    extract_dataset(dataset, bundle, stage_one, {T50: tmp_path / "s.zarr"})
    store = FeatureStore.open(tmp_path / "s.zarr")
    sample = store.samples()[0]
    expected = plain_dense(bundle, store.image(sample), sample.sample_id)
    found = store.dense(sample)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    for start in range(0, len(expected), 16):  # and no group of channels hides behind a larger one
        part, right = found[start : start + 16], expected[start : start + 16]
        assert np.linalg.norm(part - right) / np.linalg.norm(right) < 1e-5


def test_the_dense_layout_holds_the_same_map(bundle, manifest, tmp_path):
    extract(manifest, bundle, tmp_path / "l.zarr", dtype="float32", splits=["test"])
    extract(manifest, bundle, tmp_path / "d.zarr", dtype="float32", splits=["test"], layout="dense")
    levels, dense = (FeatureStore.open(tmp_path / name) for name in ("l.zarr", "d.zarr"))
    np.testing.assert_allclose(
        dense.dense(dense.samples()[0]), levels.dense(levels.samples()[0]), rtol=1e-4, atol=1e-5
    )


def test_the_store_holds_what_stage_two_needs(bundle, manifest, tmp_path):
    result = extract(manifest, bundle, tmp_path / "s.zarr")
    assert (result.written, result.skipped) == (3, 0)
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert verify_store(store) == []
    assert store.card.name == "discs"
    assert store.card.typical_source_px == (300, 400)
    sample = store.samples("test")[0]
    assert sample.source_px == (300, 400)
    assert store.image(sample).shape == (512, 512, 3)
    assert set(np.unique(store.label(sample))) == {0, 1}
    assert set(np.unique(store.instances(sample))) == {0, 1, 2}
    assert store.embedding(sample).shape[0] == 4
    assert store.model["trained"] is False


def test_running_again_does_nothing_and_a_forgotten_sample_is_made_bitwise_equal(
    bundle, manifest, tmp_path
):
    path = tmp_path / "s.zarr"
    extract(manifest, bundle, path)
    before = files_of(path)
    assert extract(manifest, bundle, path).written == 0
    (path / "marks" / "00000001.json").unlink()
    (path / "stride_8" / "c" / "1" / "0" / "0" / "0").unlink()
    result = extract(manifest, bundle, path)
    assert (result.written, result.skipped) == (1, 2)
    assert files_of(path) == before


def test_several_writers_leave_the_same_store(bundle, tmp_path, monkeypatch):
    manifest = write_dataset(tmp_path / "data", train=6)
    extract(manifest, bundle, tmp_path / "one.zarr")
    monkeypatch.setitem(WRITERS, "cpu", 4)
    extract(manifest, bundle, tmp_path / "four.zarr")
    store = FeatureStore.open(tmp_path / "four.zarr")
    assert len(store.samples()) == 7
    assert not verify_store(store)
    assert files_of(tmp_path / "four.zarr") == files_of(tmp_path / "one.zarr")


def test_splits_extracted_one_after_the_other_give_the_same_samples(bundle, manifest, tmp_path):
    extract(manifest, bundle, tmp_path / "a.zarr")
    extract(manifest, bundle, tmp_path / "b.zarr", splits=["test"])
    extract(manifest, bundle, tmp_path / "b.zarr", splits=["train"])
    a, b = FeatureStore.open(tmp_path / "a.zarr"), FeatureStore.open(tmp_path / "b.zarr")
    for sample in a.samples():
        same = next(s for s in b.samples() if s.sample_id == sample.sample_id)
        for level in a.levels:
            first, second = a.read_level(sample, level), b.read_level(same, level)
            assert first.tobytes() == second.tobytes()


def everything(store, sample):
    """All that a store holds of a sample, byte by byte."""
    found = {name: store.read_level(sample, name).tobytes() for name in store.levels}
    for name in ("label", "image", "embedding", "instances"):
        found[name] = getattr(store, name)(sample).tobytes()
    return found


def test_the_order_of_the_samples_changes_no_bit_of_any(bundle, manifest, tmp_path, monkeypatch):
    noise = {}
    real = StageOne.prepare

    def prepare(self, image, sample_id):
        region = real(self, image, sample_id)
        noise.setdefault(sample_id, []).append(region.noise.numpy().tobytes())
        return region

    monkeypatch.setattr(StageOne, "prepare", prepare)
    extract(manifest, bundle, tmp_path / "a.zarr")
    rows = manifest.with_suffix(".csv").read_text().splitlines()
    manifest.with_suffix(".csv").write_text("\n".join([rows[0], *rows[:0:-1]]) + "\n")
    extract(manifest, bundle, tmp_path / "b.zarr")
    a, b = FeatureStore.open(tmp_path / "a.zarr"), FeatureStore.open(tmp_path / "b.zarr")
    names = [sample.sample_id for sample in a.samples()]
    assert names == [sample.sample_id for sample in b.samples()][::-1] == list(noise)
    for first, second in zip(a.samples(), b.samples()[::-1], strict=True):
        assert everything(a, first) == everything(b, second)
    for drawn in noise.values():
        assert len(drawn) == 2
        assert drawn[0] == drawn[1]
    assert len(set(map(tuple, noise.values()))) == 3  # and no two samples share theirs


def test_a_store_grows_with_its_data_set_and_a_renamed_class_changes_nothing(
    bundle, manifest, tmp_path
):
    rows = manifest.with_suffix(".csv").read_text()
    manifest.with_suffix(".csv").write_text(
        "\n".join(rows.splitlines()[:2] + rows.splitlines()[3:])
    )
    assert extract(manifest, bundle, tmp_path / "s.zarr").written == 2
    manifest.with_suffix(".csv").write_text(rows)
    manifest.write_text(manifest.read_text().replace('"disc"', '"gland"'))
    result = extract(manifest, bundle, tmp_path / "s.zarr")
    assert (result.written, result.skipped) == (1, 2)
    assert FeatureStore.open(tmp_path / "s.zarr").card.scheme.names[1] == "gland"
    manifest.write_text(manifest.read_text().replace("codes = [0]", "codes = [0, 7]"))
    with pytest.raises(StoreError, match="made with dataset_sha256"):
        extract(manifest, bundle, tmp_path / "s.zarr")


def test_several_timesteps_and_conditions_get_a_store_each(bundle, manifest, tmp_path):
    views = list(iterate_views([50, 100], ["encoder", "none"]))
    dataset = open_dataset(manifest, splits=["test"])
    stage_one = make_stage_one(bundle, views=views)
    stores = {view: tmp_path / f"{view.timestep}-{view.conditioning}.zarr" for view in views}
    results = extract_dataset(dataset, bundle, stage_one, stores)
    assert [result.written for result in results] == [1, 1, 1, 1]
    maps = set()
    for view, path in stores.items():
        store = FeatureStore.open(path)
        assert store.recipe.timestep == view.timestep
        assert store.recipe.conditioning == view.conditioning
        maps.add(store.read_level(store.samples()[0], "stride_32").tobytes())
    assert len(maps) == 4


def test_an_interrupted_extraction_keeps_what_is_finished(bundle, manifest, tmp_path):
    dataset = open_dataset(manifest)
    stage_one = make_stage_one(bundle)

    def interrupt(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_dataset(dataset, bundle, stage_one, {T50: tmp_path / "s.zarr"}, progress=interrupt)
    assert len(FeatureStore.open(tmp_path / "s.zarr").samples()) == 2
    assert extract(manifest, bundle, tmp_path / "s.zarr").written == 1


def test_an_unreadable_image_is_named_and_the_finished_samples_are_kept(bundle, manifest, tmp_path):
    image = manifest.parent / "images" / "test_0.png"
    image.write_bytes(image.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"test_0\.png"):
        extract(manifest, bundle, tmp_path / "s.zarr")
    assert len(FeatureStore.open(tmp_path / "s.zarr").samples()) == 2


def test_a_changed_image_or_mask_of_a_finished_sample_is_noticed(bundle, manifest, tmp_path):
    extract(manifest, bundle, tmp_path / "s.zarr")
    for name, kind in (("train_1.png", "image"), ("train_1_anno.png", "mask")):
        file = manifest.parent / "images" / name
        before = file.read_bytes()
        pixels = np.array(Image.open(file))
        pixels[0, 0] = 1
        Image.fromarray(pixels).save(file)
        with pytest.raises(StoreError, match=f"the {kind} of sample train_1 has changed"):
            extract(manifest, bundle, tmp_path / "s.zarr")
        file.write_bytes(before)
    assert extract(manifest, bundle, tmp_path / "s.zarr").written == 0


def test_another_timestep_into_the_same_store_is_refused(bundle, manifest, tmp_path):
    extract(manifest, bundle, tmp_path / "s.zarr", splits=["test"])
    views = [View(timestep=100, conditioning="encoder")]
    with pytest.raises(StoreError, match=r"made with timestep 50, this run asks for 100\. Use --t"):
        extract(manifest, bundle, tmp_path / "s.zarr", splits=["test"], views=views)


def test_another_model_into_the_same_store_is_refused(bundle, manifest, tmp_path):
    extract(manifest, bundle, tmp_path / "s.zarr", splits=["test"])
    other = make_bundle(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"model_sha256 .* Use --model"):
        extract(manifest, other, tmp_path / "s.zarr", splits=["test"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_is_missing_and_keeps_the_finished_samples(
    bundle, manifest, tmp_path, monkeypatch, number
):

    from pathsegdiff.features.writer import StoreWriter

    write = StoreWriter.write

    def full(self, sample, arrays):
        if sample.sample_id == "train_1":
            raise OSError(number, "No space left on device")
        write(self, sample, arrays)

    monkeypatch.setattr(StoreWriter, "write", full)
    with pytest.raises(StoreError, match=r"samples are not written yet and need about .* MB"):
        extract(manifest, bundle, tmp_path / "s.zarr")
    monkeypatch.undo()
    kept = [s.sample_id for s in FeatureStore.open(tmp_path / "s.zarr").samples()]
    assert "train_0" in kept
    assert "train_1" not in kept
    extract(manifest, bundle, tmp_path / "s.zarr")
    assert len(FeatureStore.open(tmp_path / "s.zarr").samples()) == 3


def test_a_dry_run_counts_patches_and_bytes(bundle, manifest, tmp_path):
    dataset = open_dataset(manifest)
    stage_one = make_stage_one(bundle)
    plan = plan_extraction(dataset, bundle, stage_one)
    assert (plan.samples, plan.patches) == (3, 12)
    extract(manifest, bundle, tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr")
    sizes = store.bytes_of(store.samples()[0])
    written = sum(size for name, size in sizes.items() if name.startswith("stride_"))
    assert plan.feature_bytes / 3 <= written <= plan.feature_bytes / 3 * 1.02  # index, checksums
    assert plan.seconds > 0
