"""DDPMSeg: pixels of stores, the ensemble, its training and evaluation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.main import run
from pathsegdiff.errors import RunError
from pathsegdiff.features.store import FeatureStore, mark_key
from pathsegdiff.grid import patchwise_matrix
from pathsegdiff.pipeline.baselines import ddpmseg
from pathsegdiff.pipeline.baselines.ddpmseg import TAPS, DDPMSeg, load_ensemble
from pathsegdiff.pipeline.baselines.ensemble import PixelEnsemble
from pathsegdiff.pipeline.baselines.pixels import (
    PixelReader,
    bilinear_cells,
    draw_pixels,
    open_stores,
    pixel_inputs,
)
from pathsegdiff.pipeline.baselines.runs import read_baseline
from tests.helpers_head import same
from tests.helpers_store import TISSUE, build_store


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Stores of t = 50 and t = 150; other features, the same labels."""
    folder = tmp_path_factory.mktemp("stores")
    for timestep in (50, 150):
        build_store(folder / f"t{timestep}.zarr", train=6, test=3, seed=1, timestep=timestep)
    return [str(folder / "t50.zarr"), str(folder / "t150.zarr")]


@pytest.fixture(scope="module")
def stores(paths):
    return open_stores(paths)


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch):
    monkeypatch.setattr(ddpmseg, "PIXELS", 1200)


def ensemble(stores, seed=0, members=3, num_classes=2):
    """One whose every number matters."""
    network = PixelEnsemble(pixel_inputs(stores, TAPS), num_classes, members)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.2, 1.0, generator=generator)
        for parameter in [*network.weights, *network.biases]:
            parameter.normal_(generator=generator)
    return network.eval()


def small(stores, **settings):
    return DDPMSeg(stores, **{"val": "0.3", "steps": 60, "batch_size": 16, **settings})


# -- pixels --


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_a_pixel_lies_between_the_cells_that_the_matrix_says(stride):
    first, second, weight = bilinear_cells(np.arange(96), 32, stride)
    found = np.zeros((96, 96 // stride), np.float32)
    np.add.at(found, (np.arange(96), first), 1 - weight)
    np.add.at(found, (np.arange(96), second), weight)
    assert np.allclose(found, patchwise_matrix(3, 32 // stride, 32), atol=1e-6)


def dense_pixels(reader, sample):
    """(C, H, W) float32: every map upsampled patch by patch by plain matrices."""
    store, maps = reader.stores[0], []
    for part, features in zip(reader.inputs, reader.maps(sample), strict=True):
        cells = store.patch_px // part.stride
        matrix = patchwise_matrix(store.patches_per_side, cells, store.patch_px)
        maps.append(matrix @ features.astype(np.float32) @ matrix.T)
    return np.concatenate(maps)


def test_features_at_pixels_are_those_of_the_upsampled_maps(stores):
    reader = PixelReader(stores, pixel_inputs(stores, TAPS))
    sample = stores[0].samples()[2]
    rows, columns = np.divmod(np.arange(64 * 64), 64)
    found = reader.at(sample, rows, columns).astype(np.float32)
    expected = dense_pixels(reader, sample).reshape(reader.channels, -1).T
    assert found.shape == (4096, 2 * (6 + 4 + 4 + 4 + 2))
    assert np.abs(found - expected).max() < 2e-3  # float16


def test_features_of_a_float32_store_keep_their_numbers(tmp_path):
    build_store(tmp_path / "a.zarr", train=2, test=1, dtype="float32")
    stores = open_stores([str(tmp_path / "a.zarr")])
    reader = PixelReader(stores, pixel_inputs(stores, TAPS))
    sample = stores[0].samples()[0]
    rows, columns = np.divmod(np.arange(64 * 64), 64)
    found = reader.at(sample, rows, columns)
    expected = dense_pixels(reader, sample).reshape(reader.channels, -1).T
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5


def test_channels_are_store_by_store_and_of_the_taps_alone(stores):
    inputs = pixel_inputs(stores, TAPS)
    assert [(part.store, part.stride, part.taps) for part in inputs] == [
        (0, 4, ("up_08", "up_09")),
        (0, 8, ("up_05", "up_06", "up_07")),
        (1, 4, ("up_08", "up_09")),
        (1, 8, ("up_05", "up_06", "up_07")),
    ]
    assert [part.channels for part in inputs] == [6, 14, 6, 14]


def test_drawn_pixels_are_labelled_and_depend_on_the_seed_alone(tmp_path):
    build_store(tmp_path / "a.zarr", scheme=TISSUE, train=4, test=1)
    stores = open_stores([str(tmp_path / "a.zarr")])
    reader = PixelReader(stores, pixel_inputs(stores, TAPS))
    samples = stores[0].samples("train")

    def draw(seed, count=400, chosen=samples):
        return draw_pixels(reader, chosen, count, num_classes=3, seed=seed)

    features, labels = draw(0)
    assert features.shape == (400, reader.channels) and features.dtype == torch.float16
    assert set(labels.unique().tolist()) <= {0, 1, 2}  # never don't care
    assert torch.equal(draw(0)[0], features) and not torch.equal(draw(1)[0], features)
    # Each sample's pixels are its own, whatever stands beside it.
    assert torch.equal(draw(0, 200, samples[2:])[0], features[200:])
    # Every pixel of the sample is one of the drawn where as many are asked for as there are.
    everything, _ = draw(0, 10**6)
    assert len(everything) == 4 * 64 * 56


# -- the ensemble --


def test_votes_are_those_of_every_pixels_own_features(stores):
    reader = PixelReader(stores, pixel_inputs(stores, TAPS))
    network = ensemble(stores)
    sample = stores[0].samples()[0]
    maps = [torch.from_numpy(one).float() for one in reader.maps(sample)]
    dense = torch.from_numpy(dense_pixels(reader, sample)).flatten(1).T
    with torch.no_grad():
        shares = network.votes(maps, 32, 2)
        logits = network(dense.expand(3, -1, -1))
    winners = logits.argmax(dim=2)
    expected = torch.stack([(winners == k).float().mean(dim=0) for k in range(2)])
    assert shares.shape == (2, 64, 64)
    # A pixel on the fence may fall to either side by rounding.
    close = ((logits[..., 0] - logits[..., 1]).abs() < 1e-3 * logits.abs().amax()).any(dim=0)
    agree = (shares.flatten(1) - expected).abs().amax(dim=0) < 1e-6
    assert (agree | close).all() and agree.float().mean() > 0.99
    assert 0.05 < shares[0].mean() < 0.95


def test_members_are_apart(stores):
    network = ensemble(stores).train()
    pixels = torch.randn(3, 8, network.weights[0].shape[2])
    before = network(pixels)
    changed = pixels.clone()
    changed[1] += torch.randn(8, 1)
    after = network(changed)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


def test_channels_are_standardised_and_constant_ones_are_left(stores):
    network = PixelEnsemble(pixel_inputs(stores, TAPS), 2, 2)
    pixels = torch.randn(5000, len(network.mean)) * 3 + 7
    pixels[:, 4] = 2.5
    network.set_normalization(pixels.half())
    assert torch.allclose(network.mean, pixels.half().float().mean(dim=0), atol=1e-3)
    assert torch.allclose(network.deviation[0], pixels[:, 0].std(), rtol=1e-2)
    assert network.deviation[4] == 1


# -- training and evaluation --


@pytest.fixture(scope="module")
def finished(stores, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ensemble"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpmseg, "PIXELS", 1200)
        made = small(stores, steps=300, learning_rate=1e-2)
        made.train(out)
        return out, made.evaluate(out)


def test_an_ensemble_finds_the_discs(finished):
    out, found = finished
    assert found.scores.miou > 0.75
    metrics = json.loads((out / "eval-test" / "metrics.json").read_text())
    assert metrics["miou"] == pytest.approx(found.scores.miou)
    for name in ("per_image.csv", "report.html", "overlays/test_0.png"):
        assert (out / "eval-test" / name).is_file()
    assert any("random weights" in note for note in metrics["notes"])


def test_the_parts_are_those_of_the_head(stores):
    from pathsegdiff.segmentation.splits import choose_parts

    made = small(stores)
    expected = choose_parts(stores[0], split="train", val="0.3", fold=None, seed=0)
    assert made.parts == expected
    fold = small(stores, fold=1, val="0")
    assert fold.part == "fold1" and fold.evaluated == fold.parts.held_out


@pytest.mark.parametrize("step", [1, 25])
def test_an_interrupted_training_ends_with_the_same_weights(stores, tmp_path, step):
    small(stores).train(tmp_path / "whole")

    def interrupt(state):
        if state.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(stores).train(tmp_path / "broken", progress=interrupt)
    result = small(stores).train(tmp_path / "broken")
    assert result.steps_done_now == 60 - step
    whole, broken = (
        load_ensemble(tmp_path / name, read_baseline(tmp_path / name))[0].state_dict()
        for name in ("whole", "broken")
    )
    assert same(whole, broken)


def test_other_stores_or_settings_in_the_same_folder_are_refused(stores, finished, tmp_path):
    out, _ = finished
    with pytest.raises(RunError, match="was trained with steps 300, this run asks for 60"):
        small(stores, learning_rate=1e-2).train(out)
    with pytest.raises(RunError, match="was trained with features"):
        small(stores[:1], steps=300, learning_rate=1e-2).train(out)


def test_stores_that_do_not_belong_together_are_refused(stores, paths, tmp_path):
    with pytest.raises(RunError, match="second store of t = 50"):
        open_stores([paths[0], paths[0]])
    build_store(tmp_path / "other.zarr", timestep=250, conditioning="none")
    with pytest.raises(RunError, match="has conditioning none, .* has encoder"):
        open_stores([paths[0], str(tmp_path / "other.zarr")])
    build_store(tmp_path / "fewer.zarr", train=5, test=3, timestep=250)
    with pytest.raises(RunError, match=r"lacks 1 of the samples .*\(train_5, \.\.\.\)"):
        small([*stores, FeatureStore.open(tmp_path / "fewer.zarr")])


def test_an_unfinished_store_is_said(paths, tmp_path, caplog):
    parts = []
    for path in paths:
        part = shutil.copytree(path, tmp_path / Path(path).name)
        first = FeatureStore.open(part).samples()[0]
        (part / mark_key(first.index)).unlink()
        parts.append(str(part))
    small(open_stores(parts), steps=1).train(tmp_path / "run")
    said = f"{parts[0]}: only 5 of the 6 samples of train are extracted so far"
    assert sum(said in message for message in caplog.messages) == 1


def test_a_split_without_samples_is_named(stores):
    with pytest.raises(RunError, match="no complete sample of split 'dev'.*test, train"):
        small(stores, eval_split="dev")


# -- the command --


def test_the_command_trains_and_scores(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    features = ["--features", paths[0], "--features", paths[1]]
    assert run(["baseline", "ddpm-seg", *features, "--steps", "20", "--batch-size", "8"]) == 0
    said = capsys.readouterr().out
    name = "runs/shapes-shapes-model-ddpm-seg-t50-150-steps-20-batch-8"
    assert f"{name}: ddpm-seg at t = 50, 150, 40 channels" in said
    assert "20 steps in" in said and f"report: {name}/eval-test/report.html" in said
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert config["network"]["timesteps"] == [50, 150]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ddpm-seg"], "ddpm-seg needs --features"),
        (["ddpm-seg", "--features", "x", "--dataset", "glas"], "ddpm-seg has no --dataset"),
        (["ddpm-seg", "--features", "x", "--minutes", "3"], "ddpm-seg has no --minutes"),
        (["ddpm-seg", "--features", "x", "--precision", "bfloat16"], "ddpm-seg has no --precision"),
        (["res-unet", "--dataset", "glas", "--features", "x"], "res-unet has no --features"),
        (["res-unet"], "Missing option '--dataset'"),
    ],
)
def test_options_of_another_kind_of_baseline_are_refused(options, message, capsys):
    assert run(["baseline", *options]) == 2
    assert message in capsys.readouterr().err
