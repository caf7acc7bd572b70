"""Model bundles: made, checked, read, and what the model then computes."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.diffusion import bundle as bundles
from pathsegdiff.diffusion.bundle import (
    ModelCard,
    init_bundle,
    list_bundles,
    load_bundle,
    models_dir,
    resolve_bundle,
    write_json,
)
from pathsegdiff.diffusion.conditioning import Conditioner
from pathsegdiff.diffusion.presets import PRESETS, build_random
from pathsegdiff.diffusion.pretrain.autoencoder import psnr, reconstruct
from pathsegdiff.diffusion.third_party import UNet2DConditionModel, VQModel
from pathsegdiff.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    return init_bundle("micro", 0, tmp_path_factory.mktemp("bundles") / "micro")


@pytest.fixture(scope="module")
def model(micro):
    return micro.load()


@pytest.fixture
def copy(micro, tmp_path):
    shutil.copytree(micro.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 256, 256, generator=generator)


def _edit(folder, **changes):
    card = json.loads((folder / "model.json").read_text())
    write_json(folder / "model.json", {**card, **changes})


# Making


def test_the_same_seed_gives_the_same_bundle_and_another_seed_another(micro, tmp_path):
    torch.manual_seed(123)  # the caller's random state must not matter
    again = init_bundle("micro", 0, tmp_path / "again")
    other = init_bundle("micro", 1, tmp_path / "other")
    assert again.card.sha256 == micro.card.sha256
    assert other.card.sha256 != micro.card.sha256


def test_making_weights_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_random(PRESETS["micro"], 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_say_so(micro, caplog):
    assert not micro.card.trained
    assert "random weights" in micro.card.title
    with caplog.at_level(logging.WARNING, logger="pathsegdiff"):
        micro.load()
    assert [record.message for record in caplog.records] == [
        "model micro: random weights, its features mean nothing"
    ]


def test_an_existing_folder_is_never_written_over(micro, tmp_path):
    with pytest.raises(BundleError, match="exists already; remove it or choose another --out"):
        init_bundle("micro", 0, micro.path)
    (tmp_path / "empty").mkdir()
    init_bundle("micro", 0, tmp_path / "empty")


def test_a_failure_halfway_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "write_card", fail)
    with pytest.raises(OSError, match="No space left"):
        init_bundle("micro", 0, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ConfigError, match="preset must be one of paper, tiny, micro, got 'huge'"):
        init_bundle("huge", 0, None)


def test_tiny_is_small_and_has_1296_channels(tmp_path):
    bundle = init_bundle("tiny", 0, tmp_path / "tiny")
    assert bundle.card.num_channels == 1296
    assert bundle.card.head_width == 64
    assert [tap.name for tap in bundle.card.taps] == list(ALL_TAPS)
    size = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
    assert size <= 32e6


def test_the_paper_preset_has_the_papers_parameters():
    preset = PRESETS["paper"]
    with torch.device("meta"):
        parts = preset.build()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    # 21,688,704 is HIPT's 21,665,664 with its position table resized for 256 px
    assert count == {
        "encoder": 21_688_704,
        "conditioner": 590_848,
        "autoencoder": 55_322_782,
        "unet": 400_920_579,
    }
    assert preset.head_width == 256
    assert preset.latent_scale == preset.autoencoder["scaling_factor"] == 1.0
    assert preset.schedule.alphas_cumprod()[50].item() == pytest.approx(0.9166874224, rel=1e-9)


def test_diffusers_reads_the_folder(micro, model):
    unet = UNet2DConditionModel.from_pretrained(
        micro.path / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    autoencoder = VQModel.from_pretrained(
        micro.path / "autoencoder", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    for theirs, ours in ((unet, model.unet), (autoencoder, model.autoencoder)):
        expected = ours.state_dict()
        assert theirs.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in theirs.state_dict().items())
    assert autoencoder.config.scaling_factor == micro.card.latent_scale


# Names


def test_a_folder_and_a_name_are_found(micro, monkeypatch, tmp_path):
    monkeypatch.setenv("PSD_MODELS", str(tmp_path))
    assert models_dir() == tmp_path
    shutil.copytree(micro.path, tmp_path / "mine")
    assert resolve_bundle("mine") == tmp_path / "mine"
    assert resolve_bundle(str(micro.path)) == micro.path
    assert list_bundles() == {"tiny": bundles.EMBEDDED / "tiny", "mine": tmp_path / "mine"}


def test_a_folder_called_tiny_does_not_hide_the_embedded_one(micro, monkeypatch, tmp_path):
    monkeypatch.setenv("PSD_MODELS", str(tmp_path))
    shutil.copytree(micro.path, tmp_path / "tiny")
    assert resolve_bundle("tiny") == bundles.EMBEDDED / "tiny"
    assert resolve_bundle(tmp_path / "tiny") == tmp_path / "tiny"


def test_what_is_no_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PSD_MODELS", str(tmp_path / "none"))
    with pytest.raises(BundleError, match=r"no model called 'teeny': there are tiny; or give a"):
        load_bundle("teeny")
    with pytest.raises(BundleError, match=r"is not a model bundle: it has no model\.json"):
        load_bundle(tmp_path)


# Checking


def test_the_card_survives_a_round_trip(micro):
    assert ModelCard.from_dict(micro.card.to_dict(), "x") == micro.card


def test_the_hash_is_of_what_decides_features(micro, copy):
    _edit(copy, name="other", title="Other", licence="MIT", trained=True)
    assert load_bundle(copy).card.sha256 == micro.card.sha256
    card = json.loads((copy / "model.json").read_text())
    _edit(copy, latent={**card["latent"], "scale": 0.5})
    assert load_bundle(copy).card.sha256 != micro.card.sha256


@pytest.mark.parametrize("name", sorted(bundles.WEIGHT_FILES.values()))
def test_an_altered_file_is_named(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} is not the file that model\.json describes"):
        load_bundle(copy)


def test_a_missing_file_is_named(copy):
    (copy / "encoder/model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"encoder/model\.safetensors is missing"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "bundle format 2, this version reads 1; update pathsegdiff"),
        ({"name": 5}, "name must be text, got 5"),
        ({"name": "a\nb"}, "name must be one line"),
        ({"trained": "no"}, "trained must be true or false, got 'no'"),
        ({"patch_px": 512}, "patch_px must be 256, got 512"),
        ({"head_width": True}, "head_width must be a whole number"),
        ({"latent": None}, "latent must be an object"),
        ({"latent": {"kind": "vae"}}, "latent: kind must be one of vq, kl, got 'vae'"),
        ({"schedule": {}}, "schedule: beta_schedule is missing"),
        ({"taps": [3]}, r"taps\[0\]: expected a JSON object, found int"),
        ({"taps": []}, "contradict each other, taps"),
        ({"context_tokens": 1}, "contradict each other, context tokens: 1 and 2"),
        ({"files": {}}, "a bundle has the files"),
        ({"files": {"../../etc/passwd": "0"}}, "a bundle has the files"),
    ],
)
def test_a_card_that_cannot_be_is_one_line(copy, changes, message):
    _edit(copy, **changes)
    with pytest.raises(BundleError, match=message) as error:
        load_bundle(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", '{"a": NaN'])
def test_a_card_that_is_no_json_is_one_line(copy, text):
    (copy / "model.json").write_text(text)
    with pytest.raises(BundleError, match="is not valid JSON"):
        load_bundle(copy)


def _replace(folder, part, change):
    """Change a part's config and put its new hash into the card."""
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    change(config)
    write_json(file, config)
    card = json.loads((folder / "model.json").read_text())
    card["files"][f"{part}/config.json"] = bundles.file_sha256(file)
    write_json(folder / "model.json", card)


def test_a_unet_with_other_taps_is_refused(copy):
    _replace(copy, "unet", lambda config: config.update(layers_per_block=1))
    with pytest.raises(BundleError, match="this UNet has 9 taps, only 13 are supported"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"block_out_channels": [10**12]}, "block_out_channels must be up to 8"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block must be 1 to 16"),
        ("unet", {"cross_attention_dim": 17}, "context channels: 16 and 17"),
        ("unet", {"in_channels": 4}, "UNet input channels: 3 and 4"),
        ("autoencoder", {"_class_name": "AutoencoderKL"}, "latent kind: 'vq' and 'kl'"),
        ("encoder", {"embed_dim": 64}, "embedding: 32 and 64"),
        ("conditioner", {"normalize": 1}, "normalize must be true or false"),
    ],
)
def test_parts_that_contradict_each_other_are_one_line(copy, part, change, message):
    _replace(copy, part, lambda config: config.update(change))
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_weights_that_do_not_fit_the_config_are_named(copy):
    _replace(copy, "encoder", lambda config: config.update(depth=2))
    with pytest.raises(BundleError, match=r"12 tensors missing: blocks\.1\.norm1\.weight"):
        load_bundle(copy).load()
    _replace(copy, "encoder", lambda config: config.update(depth=1, mlp_ratio=2.0))
    with pytest.raises(BundleError, match=r"mlp\.fc1\.weight is \(128, 32\) instead of \(64, 32\)"):
        load_bundle(copy).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": {"kind": "vq", "scale": 10**400}}, r"latent: scale must be above 0, got 1000"),
        ({"latent": {"kind": "vq", "scale": float("inf")}}, r"scale must be above 0, got inf"),
        ({"head_width": 10**4000}, "head_width must be 4 to 4096"),
        ({"title": "\x1b[2J"}, "title must be one line of text"),
        ({"licence": "x" * 5000}, "licence must be one line of text"),
    ],
)
def test_a_number_or_a_text_that_cannot_be_is_one_line(copy, changes, message):
    _edit(copy, **changes)
    with pytest.raises(BundleError, match=message) as error:
        load_bundle(copy)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("autoencoder", {"vq_embed_dim": {}}, "vq_embed_dim must be a whole number"),
        ("autoencoder", {"norm_num_groups": 0}, "no such model can be built"),
        ("unet", {"down_block_types": [True] * 4}, "down_block_types must name one block"),
        ("unet", {"transformer_layers_per_block": 10**9}, "must be 1 to 64, got 1000000000"),
        ("unet", {"transformer_layers_per_block": [1, [1], 1e9, 1]}, "must be 1 to 64"),
        ("unet", {"act_fn": ["silu"]}, "no such model can be built"),
    ],
)
def test_settings_that_make_no_network_are_one_line(copy, part, change, message):
    _replace(copy, part, lambda config: config.update(change))
    with pytest.raises(BundleError, match=message) as error:
        _load_one(copy, part)
    assert str(error.value).isprintable()


def _rewrite(folder, part, content: bytes):
    """Put other weights into a bundle, and their hash into its card."""
    file = folder / bundles.WEIGHT_FILES[part]
    file.write_bytes(content)
    card = json.loads((folder / "model.json").read_text())
    card["files"][bundles.WEIGHT_FILES[part]] = bundles.file_sha256(file)
    write_json(folder / "model.json", card)


def _load_one(folder, part):
    """What ``Bundle.load`` does with one of its four parts."""
    return load_bundle(folder)._load_part(part, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("unet", float("nan")),
        ("autoencoder", float("inf")),
        ("encoder", float("-inf")),
        ("conditioner", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_named_before_any_feature_is_made(copy, part, value):
    tensors = load_file(copy / bundles.WEIGHT_FILES[part])
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    _rewrite(copy, part, save(tensors))
    with pytest.raises(BundleError, match=rf"{part}/.*: {name} holds values that are not finite"):
        _load_one(copy, part)


def test_large_weights_are_none_unless_the_dtype_cannot_hold_them(copy):
    tensors = load_file(copy / bundles.WEIGHT_FILES["conditioner"])
    weight = tensors["patch_fc.weight"] = tensors["patch_fc.weight"].float()
    weight[0] = 3e38  # finite, though their sum is not
    _rewrite(copy, "conditioner", save(tensors))
    _load_one(copy, "conditioner")
    message = r"patch_fc\.weight holds values that are not finite in float16.* float32"
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)._load_part("conditioner", torch.device("cpu"), torch.float16)


def _safetensors(header: object, length: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ABSURD = {
    "header of 2**60 bytes": _safetensors({}, 1 << 60),
    "header longer than the file": _safetensors({}, 10_000),
    "no header": _safetensors(b"\xff\xfe"),
    "header nested for ever": _safetensors(b'{"a":' * 50_000),
    "shape": _safetensors(
        {"w": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}, data=bytes(4)
    ),
    "overflowing shape": _safetensors(
        {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, data=bytes(4)
    ),
    "offsets beyond": _safetensors(
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, data=bytes(4)
    ),
    "offsets backwards": _safetensors(
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, data=bytes(4)
    ),
    "one place for two": _safetensors(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
        data=bytes(4),
    ),
    "unknown dtype": _safetensors(
        {"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, data=bytes(8)
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_a_safetensors_header_that_cannot_be_is_one_line(copy, name):
    _rewrite(copy, "conditioner", ABSURD[name])
    with pytest.raises(BundleError, match=r"conditioner/model\.safetensors is not a safe") as error:
        _load_one(copy, "conditioner")
    assert str(error.value).isprintable()


# Computing


def test_the_models_shapes_are_those_of_the_card(model, images):
    assert model.patch_px == 256
    assert model.latent_shape == (3, 64, 64)
    assert model.embed(images).shape == (2, model.embed_dim)
    assert model.patch_tokens(images).shape == (2, model.embed_dim, 16, 16)
    assert model.token_grid == 16
    assert model.latent(images).shape == (2, 3, 64, 64)
    assert len(model.alphas_cumprod) == 1000
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_embedding_and_tokens_come_from_one_pass(model, images):
    embedding, tokens = model.embed_with_tokens(images)
    assert torch.equal(embedding, model.embed(images))
    assert torch.equal(tokens, model.patch_tokens(images))


def test_taps_come_in_tap_order_and_only_those_asked_for(model, images):
    x_t = model.latent(images)
    context = model.context(model.embed(images), 2)
    some = model.taps(x_t, 50, context, ["up_07", "middle"])
    assert list(some) == ["middle", "up_07"]
    every = model.taps(x_t, 50, context, ALL_TAPS)
    assert list(every) == list(ALL_TAPS)
    assert torch.equal(some["up_07"], every["up_07"])
    shapes = {spec.name: (spec.channels, 256 // spec.stride) for spec in model.tap_specs}
    assert {n: (v.shape[1], v.shape[2]) for n, v in every.items()} == shapes


def test_time_and_condition_change_the_features(model, images):
    x_t = model.latent(images)
    contexts = [model.context(model.embed(images), 2), model.context(None, 2)]
    outputs = [model.taps(x_t, t, c, ["up_05"])["up_05"] for t in (0, 999) for c in contexts]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j])


def test_the_output_has_the_latents_shape(model, images):
    noise = model.predict_noise(model.latent(images), 50, model.context(None, 2))
    assert noise.shape == (2, 3, 64, 64)


def test_a_wrong_tap_or_time_is_the_users_error(model):
    x_t, context = torch.zeros(1, 3, 64, 64), model.context(None, 1)
    with pytest.raises(ConfigError, match="no tap is called 'up_12'"):
        model.taps(x_t, 50, context, ["up_12"])
    with pytest.raises(ConfigError, match=r"t must be in \[0, 999\] for this model, got 1000"):
        model.taps(x_t, 1000, context, ["middle"])
    with pytest.raises(ConfigError, match=r"got -1"):
        model.add_noise(x_t, x_t, -1)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 256, 256\)"):
        model.latent(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(micro, model, images, dtype):
    half = micro.load(dtype=dtype)
    assert half.dtype == dtype
    assert half.alphas_cumprod.dtype == torch.float64
    embedding = half.embed(images)
    assert embedding.dtype == half.latent(images).dtype == torch.float32
    torch.testing.assert_close(embedding, model.embed(images), rtol=0.1, atol=0.1)
    x_t, context = model.latent(images), model.context(model.embed(images), 2)
    ours = half.taps(x_t, 50, half.context(embedding, 2), ALL_TAPS)
    for name, expected in model.taps(x_t, 50, context, ALL_TAPS).items():
        assert ours[name].dtype == dtype
        assert (ours[name].float() - expected).norm() / expected.norm() < 0.03


def test_calls_may_run_under_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = model.latent(images)
        taps = model.taps(latent, 50, model.context(model.embed(images), 2), ["up_05"])
    assert latent.dtype == torch.float32
    expected = model.taps(
        model.latent(images), 50, model.context(model.embed(images), 2), ["up_05"]
    )
    assert (taps["up_05"].float() - expected["up_05"]).norm() / expected["up_05"].norm() < 0.06


def test_random_features_fit_float16(model, images):
    taps = model.taps(model.latent(images), 50, model.context(None, 2), ALL_TAPS)
    for value in taps.values():
        assert 0.05 < value.std() < 20
        assert np.isfinite(value.numpy().astype(np.float16)).all()


def test_float32_on_disk_is_kept(tmp_path):
    from safetensors.torch import load_file

    bundle = init_bundle("micro", 0, tmp_path / "full", dtype=torch.float32)
    state = load_file(bundle.path / "conditioner/model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert isinstance(bundle.load().conditioner, Conditioner)


def test_the_embedded_model_is_trained_and_small():
    bundle = load_bundle("tiny")
    assert bundle.card.trained
    assert bundle.path == bundles.EMBEDDED / "tiny"
    files = [path for path in bundle.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000
    notes = bundle.card.provenance
    assert float(notes["ldm: held_out_conditioned"]) < float(notes["ldm: held_out_null"])
    assert "EBHI" in notes["trained on"]
    assert "GlaS" not in json.dumps(notes)


def test_the_embedded_autoencoder_keeps_what_an_image_holds():
    dataset = open_dataset("demo")
    model = load_bundle("tiny").load()
    region = dataset.read(dataset.split_samples("test")[0]).image
    image = torch.from_numpy(region[:256, :256].copy()).permute(2, 0, 1)[None] / 255
    assert psnr(image, reconstruct(model.autoencoder, image)) > 26


def test_the_embedded_unet_predicts_the_noise_of_a_tissue_patch():
    dataset = open_dataset("demo")
    model = load_bundle("tiny").load()
    region = dataset.read(dataset.split_samples("test")[0]).image
    image = torch.from_numpy(region[:256, :256].copy()).permute(2, 0, 1)[None] / 255
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    x_t = model.add_noise(model.latent(image), noise, 400)
    predicted = model.predict_noise(x_t, 400, model.context(model.embed(image), 1))
    # Random weights have an error of 1 and more: noise has a variance of 1.
    assert (predicted - noise).square().mean().item() < 0.4
