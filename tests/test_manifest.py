"""Manifests, and the data sets that they open."""

import csv
import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathsegdiff.data import manifest as manifest_module
from pathsegdiff.data.check import check_dataset
from pathsegdiff.data.image import file_sha256, pixel_sha256, read_image, read_label_image
from pathsegdiff.data.labels import IGNORE
from pathsegdiff.data.manifest import list_manifests, load_manifest, open_dataset
from pathsegdiff.data.regions import resize_image, resize_label, window_offset
from pathsegdiff.errors import DataError
from tests.helpers_data import make_bcss, make_glas, write_manifest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """No data folder of this machine is seen, and log records reach ``caplog``."""
    monkeypatch.delenv("PSD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("pathsegdiff"), "propagate", True)


@pytest.fixture
def glas(tmp_path) -> Path:
    """Manifest of a GlaS-shaped data set."""
    return make_glas(tmp_path)


@pytest.fixture(scope="module")
def bcss(tmp_path_factory) -> Path:
    """Manifest of a BCSS-shaped data set: regions of 96 px, windows of 100; read only."""
    return make_bcss(tmp_path_factory.mktemp("bcss"))


ROW = {"sample_id": "a", "image": "a.png", "mask": "a_anno.png", "split": "train", "group": "1"}


def manifest_of(tmp_path: Path, *changes: dict[str, str], **more) -> Path:
    """A manifest of rows that differ from ``ROW``."""
    return write_manifest(tmp_path / "m.toml", [{**ROW, **change} for change in changes], **more)


# --- the manifests that come along


def test_the_known_data_sets_are_listed():
    assert list_manifests() == ["bcss", "demo", "ebhi", "ebhi300", "glas"]


@pytest.mark.parametrize(
    ("name", "splits", "classes", "outputs", "default_eval"),
    [
        ("glas", {"train": 85, "testA": 60, "testB": 20}, 2, 2, "testB"),
        ("bcss", {"train": 106, "test": 45}, 5, 6, "test"),
        ("ebhi", {"train": 1679, "test": 130}, 2, 2, "test"),
        ("ebhi300", {"train": 300, "test": 130}, 2, 2, "test"),
        ("demo", {"train": 26, "test": 22}, 2, 2, "test"),
    ],
)
def test_a_known_data_set_has_its_official_parts(name, splits, classes, outputs, default_eval):
    manifest = load_manifest(name)
    counts = [sum(row.split == split for row in manifest.sources) for split in manifest.splits]
    assert dict(zip(manifest.splits, counts, strict=True)) == splits
    assert (manifest.scheme.num_classes, manifest.scheme.num_outputs) == (classes, outputs)
    assert (manifest.default_train, manifest.default_eval) == ("train", default_eval)
    assert manifest.grouped == (name != "glas")
    assert manifest.licence
    assert manifest.where


def test_ebhi300_is_whole_cases_of_ebhi_in_proportion_to_the_diagnoses():
    whole, few = load_manifest("ebhi"), load_manifest("ebhi300")
    assert (few.scheme, few.rule) == (whole.scheme, whole.rule)
    cases = {row.group for row in few.sources if row.split == "train"}
    wanted = [row for row in whole.sources if row.split == "test" or row.group in cases]
    assert list(few.sources) == wanted
    counts = [
        Counter(row.extra["diagnosis"] for row in manifest.sources if row.split == "train")
        for manifest in (whole, few)
    ]
    assert counts[1].keys() == counts[0].keys()
    for diagnosis, count in counts[0].items():
        assert abs(counts[1][diagnosis] - 300 * count / 1679) < 2


def test_ebhi300_is_what_its_script_chooses(tmp_path):
    root = Path(__file__).parents[1]
    script = [sys.executable, root / "benchmarks" / "choose_ebhi300.py"]
    subprocess.run([*script, "--out", tmp_path / "again.csv"], check=True, capture_output=True)
    assert (tmp_path / "again.csv").read_bytes() == (
        root / "data_manifests" / "ebhi300.csv"
    ).read_bytes()


def test_glas_folds_keep_patients_apart_though_its_splits_do_not():
    rows = load_manifest("glas").sources
    folds = {(row.group, row.extra["patient_fold"]) for row in rows}
    assert len(folds) == len({row.group for row in rows})
    assert {fold for _, fold in folds} == {"0", "1", "2", "3"}
    train, test = ({r.group for r in rows if r.split == split} for split in ("train", "testB"))
    assert test <= train


def test_bcss_groups_its_22_codes_as_published():
    scheme = load_manifest("bcss").scheme
    ids = scheme.apply(np.arange(22)[None], "codes")[0].tolist()
    assert ids[0] == scheme.dont_care_id == 5
    assert [ids[code] for code in (1, 19, 20)] == [0, 0, 0]
    assert ids[2] == 1
    assert [ids[code] for code in (3, 10, 11)] == [2, 2, 2]
    assert ids[4] == 3
    assert ids.count(4) == 13


def test_bcss_test_regions_are_those_of_six_institutions():
    rows = load_manifest("bcss").sources
    test = {row.extra["institution"] for row in rows if row.split == "test"}
    assert test == {"OL", "LL", "E2", "EW", "GM", "S3"}
    assert not test & {row.extra["institution"] for row in rows if row.split == "train"}


def test_demo_has_rare_diagnoses_on_the_test_side_only():
    rows = load_manifest("demo").sources
    train, test = (
        {row.extra["diagnosis"] for row in rows if row.split == split}
        for split in ("train", "test")
    )
    assert test - train == {"normal", "serrated_adenoma"}
    assert train <= test


def test_every_embedded_image_is_what_the_manifest_says():
    report = check_dataset("demo")
    assert report.whole
    assert [(split.split, split.good) for split in report.splits] == [("train", 26), ("test", 22)]


def test_the_demo_needs_no_folder_and_teaches_both_classes():
    dataset = open_dataset("demo")
    region = dataset.read(dataset.samples[0])
    assert region.image.shape == (512, 512, 3)
    assert region.source_px == (224, 224)
    assert region.instances is None
    shares = [dataset.read_label(sample).mean() for sample in dataset.split_samples("train")]
    assert min(shares) > 0.3
    assert max(shares) < 0.8
    assert (dataset.root / "ATTRIBUTION.md").is_file()


# --- opening


def test_a_region_is_the_resized_source_and_instances_keep_their_size(glas):
    dataset = open_dataset(glas)
    sample = dataset.samples[0]
    image = read_image(dataset.image_path(sample.source))
    mask = read_label_image(dataset.mask_path(sample.source))
    region = dataset.read(sample)
    assert (region.image == resize_image(image, (64, 64))).all()
    assert (region.label == resize_label((mask > 0).astype(np.uint8), (64, 64))).all()
    assert region.instances is not None
    assert region.instances.dtype == np.int32
    assert (region.instances == mask).all()
    assert region.source_px == (52, 77) == dataset.source_size(sample.source)
    assert (region.image_sha256, region.mask_sha256) == dataset.source_hashes(sample.source)
    assert region.image_sha256 == sample.source.image_sha256


def test_samples_keep_the_order_of_the_manifest_and_know_their_place(glas):
    dataset = open_dataset(glas)
    assert [sample.sample_id for sample in dataset.samples] == [
        *(f"train_{index}" for index in range(1, 5)),
        *("testA_1", "testA_2", "testB_1", "testB_2"),
    ]
    first = dataset.samples[0]
    assert (first.split, first.group, first.window) == ("train", "1", None)
    assert first.source.extra == {"patient_fold": "2"}
    assert [sample.sample_id for sample in dataset.split_samples("testB")] == ["testB_1", "testB_2"]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".BMP"])
def test_another_container_with_the_same_pixels_is_found(tmp_path, suffix):
    dataset = open_dataset(make_glas(tmp_path, suffix=suffix))
    sample = dataset.samples[0]
    assert dataset.image_path(sample.source).name == f"train_1{suffix}"
    assert dataset.read(sample).image_sha256 == sample.source.image_sha256


def test_of_several_containers_the_manifests_own_comes_first_then_a_lossless_one(glas, tmp_path):
    root = tmp_path / "glaslike"
    for name in ("train_1", "train_2"):
        image = Image.open(root / f"{name}.bmp")
        image.save(root / f"{name}.jpg")
        image.save(root / f"{name}.png")
    (root / "train_2.bmp").unlink()
    dataset = open_dataset(glas)
    assert [dataset.image_path(source).name for source in dataset.sources[:2]] == [
        "train_1.bmp",
        "train_2.png",
    ]


def test_the_data_root_is_the_option_then_the_manifests_then_the_variable(
    glas, tmp_path, monkeypatch
):
    root = tmp_path / "glaslike"
    assert open_dataset(glas).root == root
    shutil.copytree(root, tmp_path / "other")
    assert open_dataset(glas, data_root=tmp_path / "other").root == tmp_path / "other"
    lines = glas.read_text().splitlines(keepends=True)
    glas.write_text("".join(line for line in lines if not line.startswith("root")))
    monkeypatch.setenv("PSD_DATA", str(tmp_path))
    assert open_dataset(glas).root == root
    monkeypatch.delenv("PSD_DATA")
    (tmp_path / "data").mkdir()
    root.rename(tmp_path / "data/glaslike")
    assert open_dataset(glas).root == Path("data/glaslike")


def test_an_archive_that_unpacked_into_a_folder_of_its_own_is_found(glas, tmp_path):
    (tmp_path / "unpacked/__MACOSX").mkdir(parents=True)
    (tmp_path / "glaslike").rename(tmp_path / "unpacked/Warwick QU Dataset")
    dataset = open_dataset(glas, data_root=tmp_path / "unpacked")
    assert dataset.root == tmp_path / "unpacked/Warwick QU Dataset"


@pytest.mark.parametrize("name", ["glas", "bcss", "ebhi"])
def test_data_that_is_not_here_says_where_it_looked_and_how_to_get_it(name):
    with pytest.raises(
        DataError, match=rf"{name}: there is no folder data/{name} .*data show {name}`"
    ):
        open_dataset(name)


def test_an_empty_folder_is_not_the_data(tmp_path):
    (tmp_path / "data/glas").mkdir(parents=True)
    with pytest.raises(
        DataError,
        match=r"none of its files is under data/glas \(looked for train_1\.bmp\).*show glas",
    ):
        open_dataset("glas")


def test_a_split_of_which_nothing_is_there_is_left_out_with_a_warning(glas, tmp_path, caplog):
    whole = open_dataset(glas)
    for path in (tmp_path / "glaslike").glob("testA_*"):
        path.unlink()
    dataset = open_dataset(glas)
    assert dataset.splits == ("train", "testB")
    assert "Split testA of glaslike is left out" in caplog.text
    assert dataset.sha256 == whole.sha256  # a store can be continued when testA arrives
    with pytest.raises(
        DataError, match=r"no file of split testA is under .*testA_1\.bmp and 3 more"
    ):
        open_dataset(glas, splits=["testA"])


def test_a_split_that_is_partly_there_lists_what_is_missing(glas, tmp_path):
    for name in ("train_1.bmp", "train_2_anno.bmp"):
        (tmp_path / "glaslike" / name).unlink()
    with pytest.raises(
        DataError,
        match=r"split train: 2 of 8 files are not under .*: train_1\.bmp, train_2_anno\.bmp; see",
    ):
        open_dataset(glas)
    assert open_dataset(glas, splits=["testB"]).splits == ("testB",)


def test_a_long_list_of_missing_files_is_cut(glas, tmp_path):
    for path in list((tmp_path / "glaslike").glob("train_*.bmp"))[:7]:
        path.unlink()
    with pytest.raises(DataError, match=r"7 of 8 files .*, \.\.\.; see") as caught:
        open_dataset(glas)
    assert str(caught.value).count(".bmp") == 5


def test_an_unknown_split_names_the_splits(glas):
    with pytest.raises(DataError, match="has no split 'val'; there are train, testA, testB"):
        open_dataset(glas, splits=["val"])


def test_an_unknown_name_names_the_known_ones():
    with pytest.raises(
        DataError, match=r"no data set is called 'gals'; there are bcss, demo, ebhi"
    ):
        open_dataset("gals")
    with pytest.raises(DataError, match=r"nowhere/x\.toml: there is no such manifest"):
        open_dataset("nowhere/x.toml")


# --- reading


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_altered_pixels_are_refused_naming_sample_and_file(glas, tmp_path, kind):
    path = tmp_path / "glaslike" / ("train_1.bmp" if kind == "image" else "train_1_anno.bmp")
    pixels = np.array(Image.open(path))
    pixels[0, 0] = 1 - pixels[0, 0] // 255
    Image.fromarray(pixels).save(path)
    dataset = open_dataset(glas)
    with pytest.raises(
        DataError,
        match=rf"sample train_1: the pixels of {kind} .*{path.name} differ from the manif",
    ):
        dataset.read(dataset.samples[0])


def test_an_unreadable_image_names_the_file(glas, tmp_path):
    (tmp_path / "glaslike/train_2.bmp").write_bytes(b"BM, cut off")
    dataset = open_dataset(glas)
    with pytest.raises(DataError, match=r"train_2\.bmp"):
        dataset.read(dataset.samples[1])


def unhashed(tmp_path: Path, image: np.ndarray, mask: np.ndarray, **more):
    """A data set of one image, without hashes."""
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a_anno.png")
    return open_dataset(manifest_of(tmp_path, {}, **more), data_root=tmp_path)


def test_a_mask_of_another_size_is_refused(tmp_path):
    dataset = unhashed(tmp_path, np.zeros((9, 8, 3), np.uint8), np.zeros((8, 9), np.uint8))
    with pytest.raises(DataError, match=r"a_anno\.png is 8 x 9 px, its image 9 x 8; a mask must"):
        dataset.read(dataset.samples[0])


def test_an_unknown_code_is_refused(tmp_path):
    classes = [
        {"name": name, "colour": [0, 0, 0], "codes": [code]} for code, name in enumerate("ab")
    ]
    dataset = unhashed(
        tmp_path,
        np.zeros((4, 4, 3), np.uint8),
        np.full((4, 4), 9, np.uint8),
        labels={"classes": classes},
    )
    for read in (dataset.read, dataset.read_label):
        with pytest.raises(DataError, match=r"a_anno\.png: code 9 is in no class \(a 0; b 1\)"):
            read(dataset.samples[0])


def jpeg_set(tmp_path: Path, *, with_file_hash: bool) -> Path:
    """A JPEG whose manifest was written by a decoder that gave other pixels."""
    image = np.full((16, 16, 3), 100, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg")
    Image.fromarray(image[..., 0]).save(tmp_path / "a_anno.png")
    hashes = {
        "image": "a.jpg",
        "image_sha256": "0" * 64,
        "mask_sha256": pixel_sha256(image[..., 0]),
    }
    if with_file_hash:
        hashes["image_file_sha256"] = file_sha256(tmp_path / "a.jpg")
    return manifest_of(tmp_path, hashes)


def test_another_jpeg_decoder_is_a_warning_where_the_file_is_the_very_one(tmp_path, caplog):
    dataset = open_dataset(jpeg_set(tmp_path, with_file_hash=True), data_root=tmp_path)
    assert dataset.read(dataset.samples[0]).image.shape == (64, 64, 3)
    assert "JPEG decoder gives other pixels" in caplog.text
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="differ from the manifest"):
        dataset.read(dataset.samples[0])


def test_a_jpeg_without_a_file_hash_must_have_the_pixels(tmp_path):
    dataset = open_dataset(jpeg_set(tmp_path, with_file_hash=False), data_root=tmp_path)
    with pytest.raises(DataError, match="differ from the manifest"):
        dataset.read(dataset.samples[0])


# --- windows


def test_windows_are_planned_on_the_scaled_source_and_empty_ones_left_out(bcss):
    dataset = open_dataset(bcss)
    # wide is 182 x 250 px at 0.5 um/px: 2 x 3 windows of 100, the first of them outside the region.
    assert [sample.sample_id for sample in dataset.samples] == [
        *("wide_r0c1", "wide_r0c2", "wide_r1c0", "wide_r1c1", "wide_r1c2"),
        "low_r0c0",
        *("square_r0c0", "square_r0c1", "square_r1c0", "square_r1c1"),
    ]
    window = dataset.samples[1].window
    assert window is not None
    assert (window.top, window.left, window.height, window.width) == (0, 150, 100, 100)


def test_another_resolution_gives_other_windows_and_another_hash(bcss):
    half, full = open_dataset(bcss), open_dataset(bcss, mpp=0.25)
    assert full.rule.mpp == 0.25
    assert len(full.samples) > len(half.samples)
    assert full.sha256 != half.sha256
    assert open_dataset(bcss, mpp=0.5).sha256 == half.sha256


def test_a_resized_data_set_takes_no_resolution(glas):
    with pytest.raises(DataError, match=r"is resized to 64 px; a resolution \(--mpp\) applies"):
        open_dataset(glas, mpp=0.5)


def test_a_training_window_is_cropped_where_the_key_says(bcss):
    dataset = open_dataset(bcss)
    sample = dataset.split_samples("train")[3]
    image = read_image(dataset.image_path(sample.source))
    mask = read_label_image(dataset.mask_path(sample.source))
    scaled = resize_image(image, (182, 250))
    label = resize_label(dataset.scheme.apply(mask, "mask"), (182, 250))
    for seed in (0, 5):
        down, right = window_offset(seed, sample.sample_id, 4, 4)
        top, left = sample.window.top + down, sample.window.left + right
        region = dataset.read(sample, seed=seed)
        assert (region.image == scaled[top : top + 96, left : left + 96]).all()
        assert (region.label == label[top : top + 96, left : left + 96]).all()
        assert (region.label == dataset.read_label(sample, seed=seed)).all()
    assert region.source_px == (364, 500)


def test_a_test_window_is_cropped_in_its_middle_whatever_the_seed(bcss):
    dataset = open_dataset(bcss)
    sample = dataset.split_samples("test")[1]
    assert sample.sample_id == "square_r0c0"
    scaled = resize_image(read_image(dataset.image_path(sample.source)), (144, 144))
    for seed in (0, 1):
        assert (dataset.read(sample, seed=seed).image == scaled[2:98, 2:98]).all()


def test_what_lies_outside_a_low_source_is_dont_care_under_white(bcss):
    dataset = open_dataset(bcss)
    region = dataset.read(dataset.split_samples("test")[0])
    assert region.image.shape == (96, 96, 3)
    assert (region.label[48:] == dataset.scheme.dont_care_id).all()
    assert (region.label[:48] < dataset.scheme.num_classes).all()
    assert (region.image[48:] == 255).all()
    assert region.image[:48].mean() < 230


def test_outside_is_ignored_where_there_is_no_dont_care(tmp_path):
    dataset = unhashed(
        tmp_path,
        np.zeros((40, 64, 3), np.uint8),
        np.zeros((40, 64), np.uint8),
        region={"kind": "window", "region_px": 64, "patch_px": 32, "window_px": 64},
    )
    label = dataset.read(dataset.samples[0]).label
    assert (label[:40] == 0).all()
    assert (label[40:] == IGNORE).all()


def test_all_windows_of_a_source_decode_it_once_even_from_threads(bcss, monkeypatch):
    dataset = open_dataset(bcss)
    decoded = []

    def counting(path):
        decoded.append(path.name)
        return read_image(path)

    monkeypatch.setattr(manifest_module, "read_image", counting)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(dataset.read, dataset.samples))
    assert sorted(decoded) == [f"{name}_MPP-0.2500.png" for name in ("low", "square", "wide")]
    alone = [open_dataset(bcss).read(sample) for sample in dataset.samples]
    for one, other in zip(together, alone, strict=True):
        assert (one.image == other.image).all()
        assert (one.label == other.label).all()


def test_an_image_at_another_resolution_is_noticed(tmp_path):
    path = make_bcss(tmp_path)
    image = tmp_path / "bcsslike/rgbs/low_MPP-0.2500.png"
    Image.open(image).reduce(2).save(image)
    with pytest.raises(
        DataError, match=r"low_.* is 48 x 96 px, the manifest says 96 x 192; get it"
    ):
        open_dataset(path)


def test_a_split_whose_every_window_is_empty_is_refused(tmp_path):
    path = make_bcss(tmp_path)
    for mask in (tmp_path / "bcsslike/masks").glob("wide*"):
        Image.fromarray(np.zeros((364, 500), np.uint8)).save(mask)
    with pytest.raises(DataError, match="every window of split train is more than 90% don't care"):
        open_dataset(path)


def test_objects_are_not_counted_in_windows(tmp_path):
    path = make_glas(tmp_path)
    text = path.read_text().replace('"resize"', '"window"').replace('"patch_px"', "patch_px")
    text = text.replace("region_px = 64,", "region_px = 64, window_px = 64,")
    path.write_text(text)
    with pytest.raises(DataError, match="objects are counted only where whole images are resized"):
        load_manifest(path)


# --- the hash


def test_the_hash_ignores_place_container_and_title(glas, tmp_path):
    here = open_dataset(glas)
    (tmp_path / "elsewhere").mkdir()
    there = make_glas(tmp_path / "elsewhere", suffix=".png")
    there.write_text(there.read_text().replace("made by a test", "another title"))
    csv_path = there.with_suffix(".csv")
    csv_path.write_text(csv_path.read_text().replace(".bmp", ".png"))
    assert open_dataset(there).sha256 == here.sha256
    assert open_dataset(glas, splits=["testB"]).sha256 == here.sha256


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("toml", "region_px = 64", "region_px = 128", True),
        ("toml", '"positive"', "[1, 2, 3, 4, 5, 6, 7, 8, 9]", True),
        ("toml", '"gland"', '"Gland"', False),
        ("csv", "train_1,", "train_01,", False),
        ("csv", ",train,", ",testB,", False),
    ],
)
def test_the_hash_changes_with_what_decides_labels_and_regions_and_not_with_rows(
    glas, file, old, new, changes
):
    before = open_dataset(glas).sha256
    path = glas.with_suffix(f".{file}")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1 if file == "csv" else -1))
    assert (open_dataset(glas).sha256 != before) is changes


# --- bad manifests


def test_duplicate_ids_and_images_are_refused_even_if_only_case_differs(tmp_path):
    with pytest.raises(DataError, match=r"m\.csv, line 3: sample_id 'A' stands twice"):
        load_manifest(manifest_of(tmp_path, {}, {"sample_id": "A", "image": "b.png"}))
    with pytest.raises(DataError, match=r"line 3: image 'a\.png' stands twice"):
        load_manifest(manifest_of(tmp_path, {}, {"sample_id": "b"}))


def test_a_group_in_two_parts_is_refused_where_the_split_claims_to_be_grouped(tmp_path):
    rows = {}, {"sample_id": "b", "image": "b.png", "split": "test"}
    with pytest.raises(DataError, match="group '1' stands in train and in test; move it whole"):
        load_manifest(manifest_of(tmp_path, *rows, grouped=True))
    assert not load_manifest(manifest_of(tmp_path, *rows)).grouped


@pytest.mark.parametrize(
    "path",
    [
        *("../a.png", "x/../../a.png", "/etc/a.png", "C:/a.png", "..\\a.png", "\\\\host\\a.png"),
        *("./a.png", "x//a.png", "", "a.png/"),
    ],
)
@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_path_that_leaves_the_data_root_is_refused(tmp_path, column, path):
    with pytest.raises(DataError, match=rf"line 2: {column} must be a path below the data root"):
        load_manifest(manifest_of(tmp_path, {column: path}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "a.svs"}, r"image must end in one of \.png"),
        ({"image": "a\x00.png"}, "image holds a control character"),
        ({"group": "\x1b[2Jx"}, r"group holds a control character .*x1b"),
        ({"group": "x" * 2000}, "more than 1000 characters"),
        ({"group": " "}, "group is empty"),
        ({"sample_id": "../a"}, r"sample_id must be letters, digits, dots, .*got '\.\./a'"),
        ({"sample_id": ".hidden"}, "sample_id must be letters"),
        ({"sample_id": "a b"}, "sample_id must be letters"),
        ({"sample_id": "a" * 129}, "sample_id must be letters"),
        ({"image_sha256": "xyz"}, "image_sha256 must be 64 hex digits, got 'xyz'"),
        ({"height_px": "9e9", "width_px": "1"}, "height_px and width_px must be integers"),
        ({"height_px": "999999", "width_px": "999999"}, "of at most 536,870,912 pixels"),
        ({"height_px": "", "width_px": "5"}, "height_px and width_px must be integers"),
    ],
)
def test_a_hostile_row_is_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=f"line 2.*{message}") as caught:
        load_manifest(manifest_of(tmp_path, change))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_an_unknown_split_in_a_row_is_refused(tmp_path):
    with pytest.raises(DataError, match="line 2: split must be one of test, got 'train'"):
        load_manifest(manifest_of(tmp_path, {}, splits=["test"]))
    with pytest.raises(DataError, match="no row is of split 'test'"):
        load_manifest(manifest_of(tmp_path, {}, splits=["train", "test"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"lacks the column sample_id; needed are sample_id, image, mask, split, group"),
        ("sample_id,image,mask,split\n", "lacks the column group"),
        ("sample_id;image;mask;split;group\na;b;c;d;e\n", "has ';' between its columns; save"),
        ("sample_id,image,mask,split,group\n", "lists no images"),
        ("sample_id,image,mask,split,group,group\n", "a column stands twice"),
        ("sample_id,image,mask,split,group\na,b.png\n", "line 2: 2 fields, the header has 5"),
        ('sample_id,image,mask,split,group\na,"b', "line 2"),
        ("sample_id,image,mask,split,group\n" + "a" * 200_000, "line 2: field larger than"),
    ],
)
def test_a_table_that_is_no_table_is_one_line(tmp_path, text, message):
    path = manifest_of(tmp_path, {})
    path.with_suffix(".csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_manifest(path)


def test_text_that_is_not_utf8_is_one_line(tmp_path):
    path = manifest_of(tmp_path, {})
    path.with_suffix(".csv").write_bytes(b"sample_id,\xff\xfe")
    with pytest.raises(DataError, match=r"m\.csv is not UTF-8 text; save it as UTF-8"):
        load_manifest(path)


def test_a_byte_order_mark_and_bare_cr_line_ends_are_read(tmp_path):
    path = manifest_of(tmp_path, {}, {"sample_id": "b", "image": "b.png"})
    table = path.with_suffix(".csv")
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r"))
    assert [source.source_id for source in load_manifest(path).sources] == ["a", "b"]


def test_a_missing_table_is_one_line(tmp_path):
    path = manifest_of(tmp_path, {})
    path.with_suffix(".csv").unlink()
    with pytest.raises(DataError, match=r"m\.csv: there is no such file; a manifest is NAME\.toml"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, r"name must be letters, digits"),
        ({"name": 3}, r"name must be letters, digits"),
        ({"title": "x\x1b[2J"}, "title holds a control character"),
        ({"citation": "x\u202ey"}, "citation holds a control character"),
        ({"licence": 3}, "licence must be a text"),
        ({"splits": []}, "splits must be a list of different names"),
        ({"splits": ["train", "train"]}, "splits must be a list of different names"),
        ({"splits": ["../train"]}, "splits must be a list of different names"),
        ({"default_eval": "test"}, "default_eval must be one of train, got 'test'"),
        ({"grouped": "yes"}, "grouped must be true or false"),
        ({"mpp": -1}, "mpp must be from 0.01 to 100 um/px"),
        ({"colour": 1}, "unknown key 'colour'; known: name, title"),
        ({"embedded": "../../x"}, "embedded must be letters"),
        ({"root": ""}, "root must be the path of a folder"),
        ({"region": 3}, "region must be a table"),
        ({"region": {"kind": "resize"}}, "region lacks region_px"),
        ({"labels": []}, "labels must be a table with classes"),
        (
            {"region": {"kind": "window", "region_px": 256, "window_px": 256, "mpp": 0.5}},
            "region has an mpp, so the manifest needs one too",
        ),
    ],
)
def test_a_hostile_manifest_is_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(manifest_of(tmp_path, {}, **change))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML"),
        ("x = " + "[" * 50_000, "is not valid TOML"),
        ("x = " + "9" * 5000, "is not valid TOML"),
        ('title = "x"', "lacks name; needed are name, title, licence, labels, region, splits"),
        ("# " + "x" * (1 << 20), "is larger than 1 MiB"),
    ],
)
def test_what_is_no_toml_is_one_line(tmp_path, text, message):
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(tmp_path / "m.toml")
    assert str(caught.value).isprintable()


#: Python reads it, and refuses to write it out.
_LONG = "0x" + "f" * 5000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patch_px = 32", f"patch_px = {_LONG}", "patch_px must be from 32 to 1024, got a number"),
        ("region_px = 64", f"region_px = {_LONG}", "region_px must be a multiple of 32.* a number"),
        ("codes = [0]", f"codes = [{_LONG}]", "codes must be one or more integers .* a number of"),
        ("[230, 230, 230]", f"[0, 0, {_LONG}]", "colour must be three integers .* a number of"),
        ("title =", f"mpp = {_LONG}\ntitle =", "mpp must be from 0.01 to 100 um/px, got a number"),
        ("title =", "fetch = { kind = [1] }\ntitle =", "fetch must be a table whose kind is one"),
        (
            "title =",
            f'fetch = {{ kind = "archive", url = {_LONG} }}\ntitle =',
            "url must be an https:// address .*a value of type int that cannot",
        ),
    ],
)
def test_a_value_that_cannot_be_written_out_is_one_line(tmp_path, old, new, message):
    path = manifest_of(tmp_path, {})
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(path)
    assert str(caught.value).isprintable()


def test_rows_of_the_known_manifests_have_the_documented_columns():
    folder = load_manifest("glas").path.parent
    with (folder / "glas.csv").open() as file:
        header = next(csv.reader(file))
    assert header[:6] == ["sample_id", "image", "mask", "split", "group", "patient_fold"]
    assert json.dumps(load_manifest("glas").scheme.to_dict())


# --- checking


def test_a_check_finds_each_kind_of_fault(glas, tmp_path):
    root = tmp_path / "glaslike"
    (root / "train_1.bmp").unlink()
    (root / "train_2.bmp").write_bytes(b"BM")
    Image.new("RGB", (77, 52)).save(root / "train_3.bmp")
    Image.new("L", (10, 10)).save(root / "testB_1_anno.bmp")
    for path in root.glob("testA_*"):
        path.unlink()
    report = check_dataset(glas)
    found = {split.split: [finding.kind for finding in split.findings] for split in report.splits}
    assert found == {
        "train": ["missing", "unreadable", "altered"],
        "testA": [],
        "testB": ["altered", "contradicting"],
    }
    assert [(split.good, split.absent) for split in report.splits] == [
        (1, False),
        (2, True),
        (1, False),
    ]
    assert not report.whole
    assert check_dataset(glas, splits=["testB"]).whole is False


def test_a_check_of_a_whole_data_set_is_whole_and_counts_its_progress(glas, bcss):
    seen = []
    report = check_dataset(glas, progress=lambda done, total: seen.append((done, total)))
    assert report.whole
    assert report.hashed
    assert seen == [(done, 8) for done in range(1, 9)]
    assert not check_dataset(bcss).hashed
    assert check_dataset(bcss).whole


def test_an_absent_split_is_no_fault_unless_it_is_asked_for(glas, tmp_path):
    for path in (tmp_path / "glaslike").glob("testA_*"):
        path.unlink()
    assert check_dataset(glas).whole
    assert not check_dataset(glas, splits=["testA"]).whole
