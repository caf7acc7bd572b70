"""Prediction of image files: any size, the training's own features, the right bundle only."""

import numpy as np
import pytest
import torch
from PIL import Image

from cli.main import run as psd
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.data.regions import RegionRule
from pathsegdiff.errors import DataError, RunError
from pathsegdiff.features.extract import extract_dataset
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.pipeline.predict import (
    Predictor,
    pad_to_patches,
    predict_files,
    region_size,
    window_starts,
)
from pathsegdiff.segmentation.evaluate import evaluate_run
from pathsegdiff.segmentation.runs import load_run
from pathsegdiff.segmentation.sampling import CropRequest, RegionReader
from pathsegdiff.segmentation.train import plan_settings, train_head
from tests.helpers_stage_one import T50, make_bundle, make_stage_one, write_dataset
from tests.helpers_store import GLANDS, make_card


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set, a bundle, a store and a briefly trained run."""
    folder = tmp_path_factory.mktemp("predict")
    bundle = make_bundle(folder / "micro")
    dataset = open_dataset(write_dataset(folder / "data"))
    extract_dataset(dataset, bundle, make_stage_one(bundle), {T50: folder / "s.zarr"})
    store = FeatureStore.open(folder / "s.zarr")
    settings = plan_settings(store, steps=3, batch_size=1, val="0.5", learning_rate=1e-3)
    train_head(store, folder / "run", settings)
    return folder, bundle, store, load_run(folder / "run")


def test_an_image_of_the_data_set_is_segmented_as_its_stored_features_are(place):
    folder, bundle, store, run = place
    sample = store.samples("test")[0]
    image = np.array(Image.open(folder / "data" / "images" / "test_0.png"))
    predictor = Predictor(run, bundle)
    found = predictor.probabilities(image, "test_0")
    assert found.shape == (2, 300, 400)
    np.testing.assert_allclose(found.sum(axis=0), 1.0, atol=1e-5)
    batch = RegionReader(store, run.config.levels).read([CropRequest(sample=sample)])
    with torch.inference_mode():
        logits = run.head(batch)[0, :2]
    probabilities = torch.nn.functional.interpolate(
        logits.softmax(0)[None], size=(300, 400), mode="bilinear"
    )[0]
    np.testing.assert_allclose(found, probabilities.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [
        (("tokens",), "float16"),
        (("up_08", "up_11", "tokens"), "float16"),
        (("up_08", "tokens"), "int8"),
        (("up_08", "up_11"), "float16-5bit"),
    ],
)
def test_prediction_reads_what_the_head_learnt_from(tmp_path, inputs, dtype):
    bundle = make_bundle(tmp_path / "micro")
    dataset = open_dataset(write_dataset(tmp_path / "data"))
    stage_one = make_stage_one(bundle, tokens=True, dtype=dtype)
    extract_dataset(dataset, bundle, stage_one, {T50: tmp_path / "s.zarr"})
    store = FeatureStore.open(tmp_path / "s.zarr")
    settings = plan_settings(store, steps=3, batch_size=1, val="0.5", taps=inputs)
    train_head(store, tmp_path / "run", settings)
    run = load_run(tmp_path / "run")
    assert run.config.settings["taps"] == list(inputs)
    assert evaluate_run(run, store).samples == 1
    batch = RegionReader(store, run.config.levels).read(
        [CropRequest(sample=store.samples("test")[0])]
    )
    with torch.inference_mode():
        probabilities = run.head(batch)[0, :2].softmax(0)
    image = np.array(Image.open(tmp_path / "data" / "images" / "test_0.png"))
    found = Predictor(run, bundle).probabilities(image, "test_0")
    stored = torch.nn.functional.interpolate(probabilities[None], (300, 400), mode="bilinear")[0]
    np.testing.assert_allclose(found, stored.numpy(), atol=1e-4)


def test_files_of_any_size_come_back_at_their_own_size(place, tmp_path):
    _, bundle, _, run = place
    rng = np.random.default_rng(0)
    files = []
    for name, size in (
        ("small.png", (40, 30)),
        ("wide.jpg", (300, 1500)),
        ("grey.tif", (200, 256)),
    ):
        shape = size if name.startswith("grey") else (*size, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
        files.append(tmp_path / name)
    found = predict_files(run, bundle, files, tmp_path / "out")
    for prediction, size in zip(found, ((40, 30), (300, 1500), (200, 256)), strict=True):
        mask = Image.open(prediction.mask)
        assert mask.mode == "P"
        assert np.array(mask).shape == size
        assert set(np.unique(np.array(mask))) <= {0, 1}
        assert np.array(Image.open(prediction.overlay)).shape == (*size, 3)
        assert sum(prediction.class_shares.values()) == pytest.approx(1)


def test_a_large_image_is_segmented_the_same_twice_and_without_gaps(place):
    _, bundle, _, run = place
    image = np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    predictor = Predictor(run, bundle)
    windows = []
    first = predictor.probabilities(image, "large", advance=lambda: windows.append(1))
    assert len(windows) == predictor.count_windows((700, 900)) > 1
    np.testing.assert_array_equal(first, predictor.probabilities(image, "large"))
    np.testing.assert_allclose(first.sum(axis=0), 1.0, atol=1e-4)


def test_another_bundle_is_refused(place, tmp_path):
    _, _, _, run = place
    other = make_bundle(tmp_path / "other", seed=5)
    with pytest.raises(RunError, match="was trained with the bundle micro .* give the one"):
        Predictor(run, other)


def test_two_images_of_one_name_are_refused(place, tmp_path):
    _, bundle, _, run = place
    with pytest.raises(DataError, match="two images are called 'a'"):
        predict_files(run, bundle, [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"], tmp_path)


def test_a_missing_image_is_one_line(place, tmp_path, capsys):
    folder = place[0]
    code = psd(
        ["predict", "--run", str(folder / "run"), "--model", str(folder / "micro"), "--out",
         str(tmp_path / "out"), str(tmp_path / "none.png")]
    )  # fmt: skip
    err = capsys.readouterr().err
    assert code == 1
    assert "none.png" in err.strip().splitlines()[-1]


def test_the_command_prints_the_share_of_each_class(place, tmp_path, capsys):
    folder = place[0]
    image = folder / "data" / "images" / "test_0.png"
    code = psd(
        ["predict", "--run", str(folder / "run"), "--model", str(folder / "micro"), "--out",
         str(tmp_path / "out"), str(image)]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "test_0_mask.png: background " in out


@pytest.mark.parametrize(
    ("length", "side", "expected"),
    [
        (512, 768, [0]),
        (768, 768, [0]),
        (1024, 768, [0, 256]),
        (1536, 768, [0, 512, 768]),
        (2048, 768, [0, 512, 768, 1280]),
    ],
)
def test_windows_cover_the_length_with_overlap(length, side, expected):
    starts = window_starts(length, side, 256)
    assert starts == expected
    covered = np.zeros(length, int)
    for start in starts:
        assert start + side <= max(length, side)
        covered[start : start + side] += 1
    assert covered.min() >= 1


def test_padding_goes_to_whole_patches():
    assert pad_to_patches(np.zeros((257, 512, 3), np.uint8), 256).shape == (512, 512, 3)
    assert pad_to_patches(np.zeros((10, 3, 3), np.uint8), 256).shape == (256, 256, 3)


def test_an_image_like_the_training_images_is_one_region_and_a_larger_one_keeps_the_scale():
    card = make_card(GLANDS, 768, 256)  # made from images of 576 x 768
    assert region_size((576, 768), card) == (768, 768)
    assert region_size((500, 700), card) == (768, 768)
    assert region_size((1152, 1536), card) == (1536, 1536)
    assert region_size((1152, 768), card, mpp=0.25) == (768, 384)  # finer than the data's 0.5


def test_a_window_rule_scales_by_mpp():
    from dataclasses import replace

    rule = RegionRule(kind="window", region_px=768, patch_px=256, window_px=800, mpp=0.5)
    card = replace(make_card(GLANDS, 768, 256), rule=rule, source_mpp=0.25)
    assert region_size((2000, 4000), card) == (1000, 2000)
    assert region_size((2000, 4000), card, mpp=1.0) == (4000, 8000)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), 1e9])
def test_a_resolution_that_no_microscope_has_is_refused(mpp):
    with pytest.raises(DataError, match="mpp must be from 0.01 to 100 um/px, got"):
        region_size((576, 768), make_card(GLANDS, 768, 256), mpp=mpp)


def test_an_output_folder_that_is_a_file_is_one_line(place, tmp_path, capsys):
    folder = place[0]
    (tmp_path / "file").write_text("")
    code = psd(
        ["predict", "--run", str(folder / "run"), "--model", str(folder / "micro"), "--out",
         str(tmp_path / "file"), str(folder / "data" / "images" / "test_0.png")]
    )  # fmt: skip
    assert code == 1
    assert "Error: a file stands where a folder" in capsys.readouterr().err.splitlines()[-1]


def test_a_bundle_that_is_not_found_by_name_is_asked_for_by_folder(
    place, tmp_path, monkeypatch, capsys
):
    folder = place[0]
    monkeypatch.chdir(tmp_path)
    code = psd(
        ["predict", "--run", str(folder / "run"), "--out", "out",
         str(folder / "data" / "images" / "test_0.png")]
    )  # fmt: skip
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert f"run {folder / 'run'} was trained with the bundle micro" in err
    assert err.endswith("give its folder as --model")


def test_annotations_beside_the_images_are_not_overwritten_and_predictions_are(place, tmp_path):
    folder, bundle, _, run = place
    image = tmp_path / "a.png"
    image.write_bytes((folder / "data" / "images" / "test_0.png").read_bytes())
    (tmp_path / "a_mask.png").write_bytes(b"annotated by hand")
    with pytest.raises(DataError, match="a_mask.png exists and is no earlier prediction"):
        predict_files(run, bundle, [image], tmp_path)
    assert (tmp_path / "a_mask.png").read_bytes() == b"annotated by hand"
    (tmp_path / "a_mask.png").unlink()
    for _ in range(2):
        assert predict_files(run, bundle, [image], tmp_path)[0].mask == tmp_path / "a_mask.png"
