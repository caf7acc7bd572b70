"""ZoomLDM's conditioner, UNI's shape, and models without an encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from cli.main import run
from pathsegdiff.config import ALL_TAPS
from pathsegdiff.diffusion.bundle import has_encoder, load_bundle
from pathsegdiff.diffusion.checkpoints import import_bundle
from pathsegdiff.diffusion.compvis import LdmGridConditioner, grid_conditioner_shapes
from pathsegdiff.diffusion.conditioning import GridConditioner
from pathsegdiff.diffusion.encoder import NAMED_ENCODERS, EncoderConfig, PatchEncoder
from pathsegdiff.diffusion.project import read_project
from pathsegdiff.diffusion.third_party import create_model
from pathsegdiff.errors import BundleError, ConfigError
from pathsegdiff.files import file_sha256
from tests.helpers_compvis import (
    grid_context,
    random_state,
    unet_forward,
    write_files,
    zoom_project,
    zoom_state,
)
from tests.helpers_stage_one import write_dataset


def write_zoom(folder, project):
    """Settings, tensors and files of a small ZoomLDM with random weights."""
    folder.mkdir(parents=True)
    (folder / "probe.yaml").write_text(yaml.safe_dump(project))
    settings = read_project(folder / "probe.yaml")
    state = zoom_state(settings)
    return settings, state, write_files(folder, project, state)


@pytest.fixture(scope="module")
def zoom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoom")
    settings, state, files = write_zoom(folder / "files", zoom_project())
    import_bundle(**files, out=folder / "bundle")
    import_bundle(**{**files, "encoder": None, "encoder_config": None}, out=folder / "null")
    return folder, settings, state, files


def test_the_expected_tensors_are_those_of_torchvisions_transformer():
    from torchvision.models.vision_transformer import Encoder

    with torch.device("meta"):
        transformer = Encoder(65, 12, 8, 512, 2048, 0.0, 0.0)
    theirs = {
        f"cond_stage_model.encoder.{name}": tuple(value.shape)
        for name, value in transformer.state_dict().items()
    }
    ours = grid_conditioner_shapes(LdmGridConditioner())
    assert {name: ours[name] for name in ours if ".encoder." in name} == theirs
    assert ours.keys() - theirs.keys() == {
        f"cond_stage_model.{name}"
        for name in (
            "mag_embedding.weight",
            "pad_token",
            *(
                f"{layer}.{part}"
                for layer in ("dim_reduce", "final_proj", "layer_norm")
                for part in ("weight", "bias")
            ),
        )
    }


def test_the_transformer_computes_what_torchvisions_does(generator):
    from torchvision.models.vision_transformer import Encoder

    transformer = Encoder(65, 2, 4, 16, 40, 0.0, 0.0).eval().requires_grad_(False)
    state = random_state({k: tuple(v.shape) for k, v in transformer.state_dict().items()})
    transformer.load_state_dict(state)
    rest = grid_conditioner_shapes(
        LdmGridConditioner(
            input_channels=6, channels=16, num_layers=2, num_heads=4, mlp_dim=40, cells=64,
            magnifications=3,
        )
    )  # fmt: skip
    rest = {name: shape for name, shape in rest.items() if ".encoder." not in name}
    state = {f"cond_stage_model.encoder.{k}": v for k, v in state.items()} | random_state(rest)
    # what goes into the transformer, and what is made of its result, with everything else undone
    embedding = torch.randn(6, generator=generator)
    vector = (embedding - embedding.mean()) / (embedding.std() + 1e-8)
    plain = {k.removeprefix("cond_stage_model."): v for k, v in state.items()}
    tokens = plain["pad_token"].repeat(1, 65, 1)
    tokens[0, 0] = plain["mag_embedding.weight"][0]
    tokens[0, 33] = F.linear(vector, plain["dim_reduce.weight"], plain["dim_reduce.bias"])
    out = F.linear(transformer(tokens), plain["final_proj.weight"], plain["final_proj.bias"])
    expected = F.layer_norm(out, (16,), plain["layer_norm.weight"], plain["layer_norm.bias"])
    torch.testing.assert_close(grid_context(state, 4, 2, embedding, 64), expected[0])


def test_an_imported_model_computes_what_the_authors_formulas_say(zoom, generator):
    folder, settings, state, _ = zoom
    bundle = load_bundle(folder / "bundle")
    assert bundle.card.context_tokens == 65 and has_encoder(bundle.path)
    model = bundle.load()
    images = torch.rand(2, 3, 256, 256, generator=generator)
    embedding = model.embed(images)
    context = model.context(embedding, 2)
    expected = torch.stack([grid_context(state, 4, 2, one, 64) for one in embedding])
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(context[0], context[1])
    null = model.context(None, 2)
    assert null.shape == (2, 65, 16) and not null.any()
    x_t = torch.randn(2, 3, 64, 64, generator=generator)
    for one in (context, null):
        taps, noise = unet_forward(state, settings.unet, x_t, 50, one)
        ours = model.taps(x_t, 50, one, ALL_TAPS)
        for tap in ALL_TAPS:
            error = (ours[tap] - taps[tap]).norm() / taps[tap].norm()
            assert error < 2e-5, f"{tap}: {error}"
        torch.testing.assert_close(model.predict_noise(x_t, 50, one), noise, rtol=1e-3, atol=1e-4)


def test_the_context_is_the_same_in_lower_precision_but_for_rounding(zoom, generator):
    model = load_bundle(zoom[0] / "bundle").load()
    embedding = torch.randn(3, 24, generator=generator) * 40
    exact = model.context(embedding, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.context(embedding, 3)
    assert (rounded.float() - exact).abs().max() < 0.1
    half = load_bundle(zoom[0] / "bundle").load(dtype=torch.bfloat16).context(embedding, 3)
    assert half.dtype == torch.bfloat16 and (half.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("hidden_channels", 32, "hidden_channels must be 16, got 32"),
        ("hidden_channels", None, "hidden_channels is missing"),
        ("output_channels", 512, "output_channels must be 16, got 512"),
        ("seq_length", 16, "seq_length must be 64, got 16"),
        ("num_heads", 3, "num_heads must be a divisor of 16 channels, got 3"),
        ("num_layers", 10**9, "num_layers must be a whole number from 1 to 64"),
        ("input_channels", 1024, "takes vectors of 1024, the encoder gives 24; .* or uni"),
    ],
)
def test_what_the_yaml_may_not_say(tmp_path, zoom, setting, value, message):
    project = zoom_project()
    project["model"]["params"]["cond_stage_config"]["params"][setting] = value
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(project))
    with pytest.raises(BundleError, match=message):
        import_bundle(**{**zoom[3], "project": file}, out=tmp_path / "b")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("kind", "ring", "kind must be one of grid"),
        ("num_heads", 3, "num_heads must be a divisor of the 16 channels, got 3"),
        ("depth", 10**6, "depth must be 1 to 64"),
        ("cells", 10**9, "cells must be 1 to 2047"),
        ("cells", 16, "context tokens: 65 and 17"),
        ("magnification", 8, "magnification must be 0 to 7, got 8"),
        ("colour", 1, "no such model can be built"),
    ],
)
def test_a_conditioner_that_cannot_be_is_one_line(tmp_path, zoom, setting, value, message):
    folder = tmp_path / "b"
    shutil.copytree(zoom[0] / "bundle", folder)
    config = folder / "conditioner/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), setting: value}))
    card = json.loads((folder / "model.json").read_text())
    card["files"]["conditioner/config.json"] = file_sha256(config)
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(BundleError, match=message):
        load_bundle(folder).load()


def test_a_model_without_an_encoder_knows_the_null_condition_only(
    zoom, generator, tmp_path, monkeypatch, capsys
):
    folder = zoom[0]
    bundle = load_bundle(folder / "null")
    assert not has_encoder(bundle.path)
    x_t = torch.randn(1, 3, 64, 64, generator=generator)
    model, other = bundle.load(), load_bundle(folder / "bundle").load()
    taps = [one.taps(x_t, 50, one.context(None, 1), ["up_05"])["up_05"] for one in (model, other)]
    assert torch.equal(*taps)
    with pytest.raises(ConfigError, match="has no patch encoder: use --cond none"):
        model.check_condition(encoder=True)

    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data"), train=1, test=1)
    extract = ["-q", "extract", "--dataset", "data/discs.toml", "--model", str(folder / "null")]
    extract += ["--out", "s.zarr"]
    for options in ([], ["--cond", "none", "--tokens"], ["--cond", "both"]):
        assert run([*extract, *options]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("Error: this model has no patch encoder: use --cond none")
        assert not Path("s.zarr").exists()
    assert run([*extract, "--cond", "none"]) == 0
    assert run(["models", "show", str(folder / "null")]) == 0
    shown = capsys.readouterr().out
    assert "none: --cond none is all that the model can do" in shown and "65 tokens" in shown


def test_a_folder_called_as_an_encoder_is_not_taken_for_its_description(
    zoom, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("uni").mkdir()
    files = {**zoom[3], "encoder_config": Path("uni")}
    with pytest.raises(BundleError, match="takes vectors of 24, the encoder gives 1024"):
        import_bundle(**files, out=Path("b"))
    with pytest.raises(BundleError, match="--encoder-config uni describes no encoder: none is"):
        import_bundle(**{**files, "encoder": None}, out=Path("b"))


def test_uni_has_the_shape_that_timm_gives_it():
    with torch.device("meta"):
        ours = PatchEncoder(NAMED_ENCODERS["uni"]).network
        theirs = create_model(
            "vit_large_patch16_224",
            pretrained=False,
            img_size=224,
            init_values=1e-5,
            num_classes=0,
            dynamic_img_size=True,
        )
    shapes = [{k: tuple(v.shape) for k, v in one.state_dict().items()} for one in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(value.numel() for value in ours.parameters()) == 303_350_784


def test_an_encoder_that_sees_a_smaller_image_gives_tokens_of_the_patch(generator):
    config = EncoderConfig(
        embed_dim=16, depth=1, num_heads=2, input_size=224, layer_scale=True, mean=(0.4, 0.5, 0.6)
    )
    assert EncoderConfig.from_dict(config.to_dict(), "x") == config
    encoder = PatchEncoder(config).eval().requires_grad_(False)
    images = torch.rand(2, 3, 256, 256, generator=generator)
    embedding, tokens = encoder(images)
    small = F.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
    mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    sequence = encoder.network.forward_features((small - mean) / 0.5)
    torch.testing.assert_close(embedding, sequence[:, 0])
    assert tokens.shape == (2, 16, 16, 16)
    grid = sequence[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(tokens.mean((2, 3)), grid.mean((2, 3)), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(encoder(images)[1]).all()


def test_settings_that_earlier_bundles_lack_are_not_written_where_they_are_not_set():
    written = EncoderConfig().to_dict()
    assert "input_size" not in written and "layer_scale" not in written
    assert written["qkv_bias"] is True
    with pytest.raises(BundleError, match="input_size 200 is no multiple of patch_size 16"):
        EncoderConfig.from_dict({"input_size": 200}, "x")
    with pytest.raises(BundleError, match="input_size 272 makes more than 64 x 64 patches of 2 px"):
        EncoderConfig.from_dict({"patch_size": 2, "image_size": 128, "input_size": 272}, "x")
    with pytest.raises(BundleError, match="input_size must be 1 to 4096"):
        EncoderConfig.from_dict({"input_size": 10**9}, "x")


def test_an_encoder_with_layer_scales_is_imported_as_timm_writes_it(tmp_path, zoom):
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 2, "input_size": 224, "layer_scale": True}
    vit = PatchEncoder(EncoderConfig.from_dict(shape, "x")).network
    state = random_state({k: tuple(v.shape) for k, v in vit.state_dict().items()}, seed=3)
    torch.save(state, tmp_path / "pytorch_model.bin")
    # what the file shows need not be said
    (tmp_path / "e.json").write_text(
        json.dumps({name: shape[name] for name in shape if name != "layer_scale"})
    )
    files = {**zoom[3], "encoder": tmp_path / "pytorch_model.bin"}
    bundle = import_bundle(
        **{**files, "encoder_config": tmp_path / "e.json"}, out=tmp_path / "b"
    ).bundle
    model = bundle.load()
    assert model.encoder.config.layer_scale
    assert torch.equal(model.encoder.network.blocks[0].ls1.gamma, state["blocks.0.ls1.gamma"])
    assert torch.equal(model.encoder.network.pos_embed, state["pos_embed"])


def test_the_grid_is_at_20x_and_the_embedding_in_its_middle(generator):
    conditioner = GridConditioner(
        patch_embed_dim=6, context_dim=8, depth=0, num_heads=2, mlp_dim=8, cells=4
    ).requires_grad_(False)
    for name, value in conditioner.named_parameters():
        if not name.startswith(("norm", "layer_norm")):
            value.copy_(torch.randn(value.shape, generator=generator))
    two = conditioner(torch.randn(2, 6, generator=generator), 2)
    differs = (two[0] - two[1]).abs().amax(1) > 1e-6
    assert differs.tolist() == [False, False, False, True, False]
