"""The authors' files become a bundle, or one line says why not."""

import copy
import gzip
import json
import re
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.diffusion.checkpoints import import_bundle
from pathsegdiff.diffusion.compvis import (
    LdmFirstStage,
    conditioner_shapes,
    first_stage_shapes,
    unet_shapes,
)
from pathsegdiff.diffusion.encoder import resize_position_table
from pathsegdiff.diffusion.project import read_project
from pathsegdiff.diffusion.schedule import NoiseSchedule
from pathsegdiff.errors import BundleError
from tests.helpers_compvis import (
    ENCODER,
    encoder_state,
    first_stage_moments,
    ldm_state,
    random_state,
    small_project,
    unet_forward,
    write_files,
)

GOLDEN = Path(__file__).parent / "golden"


def _params(project):
    return project["model"]["params"]


def _write(folder, project, **changes):
    """The files of a project with random weights; ``changes`` go into the state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe.yaml").write_text(yaml.safe_dump(project))
    settings = read_project(folder / "probe.yaml")
    dims = settings.patch_embed_dim, settings.region_embed_dim
    state = ldm_state(settings.unet, settings.first_stage, dims)
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return settings, state, write_files(folder, project, state)


@pytest.fixture
def project():
    return small_project()


# The real key list


@pytest.mark.parametrize(("name", "count"), [("unet", 688), ("vqf4", None)], ids=["UNet", "VQ-f4"])
def test_the_expected_tensors_are_those_of_the_published_model(name, count):
    text = gzip.decompress((GOLDEN / f"compvis_{name}_keys_shapes.txt.gz").read_bytes()).decode()
    lines = [line.partition(" ") for line in text.splitlines()]
    published = {key: literal_eval(shape) for key, _, shape in lines}
    # the shapes of benchmarks/fake_checkpoint.py, which cannot be imported from here
    source = (Path(__file__).parents[1] / "benchmarks/fake_checkpoint.py").read_text()
    namespace: dict = {}
    exec(source.partition("PROJECT = ")[0], namespace)
    if name == "unet":
        ours = unet_shapes(namespace["UNET"])
    else:
        ours = first_stage_shapes(namespace["FIRST_STAGE"])
    assert ours == published
    assert count is None or len(published) == count


def test_the_conditioner_of_the_paper_has_its_parameters():
    shapes = conditioner_shapes(384, 768, 512)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 590_848


# Other shapes against a second implementation


def _case(**changes):
    project = small_project()
    params = _params(project)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = params
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return project


UNET = "unet_config__params__"
STAGE = "first_stage_config__params__"
CASES = {
    "as it is": {},
    "channels per head": {f"{UNET}num_heads": None, f"{UNET}num_head_channels": 16},
    "both, channels win": {f"{UNET}num_heads": 8, f"{UNET}num_head_channels": 32},
    "widths": {f"{UNET}channel_mult": [1, 2, 2, 3], f"{UNET}num_heads": 4},
    "attention at other levels": {f"{UNET}attention_resolutions": [4, 1]},
    "no attention but the middle": {f"{UNET}attention_resolutions": []},
    "deep transformers": {f"{UNET}transformer_depth": 2, f"{UNET}context_dim": [16]},
    "vq with attention": {
        f"{STAGE}ddconfig__attn_resolutions": [64],
        f"{STAGE}ddconfig__ch_mult": [1, 1, 2],
    },
    "vq with two blocks": {f"{STAGE}ddconfig__num_res_blocks": 2, f"{STAGE}n_embed": 5},
    "vq of another width": {
        f"{STAGE}embed_dim": 4,
        f"{STAGE}ddconfig__z_channels": 6,
        f"{UNET}in_channels": 4,
        f"{UNET}out_channels": 4,
    },
    "kl-f8 with attention": {
        "first_stage_config__target": "ldm.models.autoencoder.AutoencoderKL",
        f"{STAGE}embed_dim": 4,
        f"{STAGE}ddconfig__double_z": True,
        f"{STAGE}ddconfig__z_channels": 4,
        f"{STAGE}ddconfig__ch_mult": [1, 1, 2, 2],
        f"{STAGE}ddconfig__attn_resolutions": [32, 64],
        f"{UNET}in_channels": 4,
        f"{UNET}out_channels": 4,
    },
    "one token, normalised": {
        "cond_stage_config__target": "ldm.modules.encoders.modules.PatchEmbedder",
        "cond_stage_config__params": {
            "patch_embed_dim": 24,
            "target_dim": 16,
            "normalize_ssl": True,
        },
    },
    "another schedule": {"beta_schedule": "sqrt_linear", "timesteps": 200},
}


def _close(ours, theirs, where):
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert ours.shape == theirs.shape, where
    assert error < 2e-5, f"{where}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_an_imported_model_computes_what_the_authors_formulas_say(name, tmp_path, generator):
    settings, state, files = _write(tmp_path / "files", _case(**CASES[name]))
    model = import_bundle(**files, out=tmp_path / "bundle").bundle.load()
    images = torch.rand(1, 3, 256, 256, generator=generator)
    moments = first_stage_moments(state, settings.first_stage, images * 2 - 1)
    expected = moments[:, : settings.first_stage.embed_dim] * settings.scale_factor
    _close(model.latent(images), expected, "latent")
    x_t = torch.randn(expected.shape, generator=generator)
    for embedding in (model.embed(images), None):
        context = model.context(embedding, 1)
        tokens = []
        for layer, dim in (("patch_fc", 24), ("region_fc", settings.region_embed_dim)):
            if dim is None:
                continue
            vector = torch.zeros(1, dim)
            if layer == "patch_fc" and embedding is not None:
                vector = embedding / embedding.norm() if settings.normalize else embedding
            weight = state[f"cond_stage_model.{layer}.weight"]
            tokens.append(vector @ weight.T + state[f"cond_stage_model.{layer}.bias"])
        _close(context, torch.stack(tokens, 1), "context")
        taps, noise = unet_forward(state, settings.unet, x_t, 50, context)
        ours = model.taps(x_t, 50, context, ALL_TAPS)
        assert list(taps) == list(ALL_TAPS)
        for tap in ALL_TAPS:
            _close(ours[tap], taps[tap], tap)
        _close(model.predict_noise(x_t, 50, context), noise, "predicted noise")


def test_the_codebook_comes_along_and_the_decoder_too(tmp_path, project):
    _, state, files = _write(tmp_path / "files", project)
    model = import_bundle(**files, out=tmp_path / "bundle").bundle.load()
    codebook = model.autoencoder.quantize.embedding.weight
    assert torch.equal(codebook, state["first_stage_model.quantize.embedding.weight"])
    expected = state["first_stage_model.decoder.conv_out.weight"]
    assert torch.equal(model.autoencoder.decoder.conv_out.weight, expected)


def test_the_position_table_is_resized_once_and_for_all(tmp_path, project):
    _, _, files = _write(tmp_path / "files", project)
    bundle = import_bundle(**files, out=tmp_path / "bundle").bundle
    stored = load_file(bundle.path / "encoder/model.safetensors")
    table = encoder_state()["pos_embed"]
    assert table.shape == (1, 197, 24)
    assert torch.equal(stored["pos_embed"], resize_position_table(table, 16))


# What is read from where


def test_the_bundle_says_what_the_files_say(tmp_path, project):
    _params(project)["cond_stage_config"]["params"]["normalize_ssl"] = True
    _, _, files = _write(tmp_path / "files", project)
    report = import_bundle(**files, out=tmp_path / "brca", head_width=32, licence="MIT")
    card = report.bundle.card
    assert (card.name, card.licence, card.head_width) == ("brca", "MIT", 32)
    assert card.trained
    assert (card.latent_kind, card.latent_scale, card.latent_shape) == ("vq", 0.7, (3, 64, 64))
    assert card.context_tokens == 2
    assert report.bundle.configs["conditioner"]["normalize"] is True
    assert report.bundle.configs["autoencoder"]["scaling_factor"] == 0.7
    assert "last.ckpt, sha256" in card.provenance["ldm"]
    assert report.parameters["encoder"] == sum(v.numel() for v in encoder_state().values())
    random = import_bundle(**files, out=tmp_path / "random", trained=False)
    assert not random.bundle.card.trained


def test_normalisation_is_off_where_the_yaml_is_silent_as_in_the_authors_code(tmp_path, project):
    settings, _, _ = _write(tmp_path, project)
    assert settings.normalize is False


def test_float16_stays_float16_on_disk_and_is_computed_in_float32(tmp_path, project):
    _, state, _ = _write(tmp_path / "full", project)
    files = write_files(tmp_path / "half", project, {k: v.half() for k, v in state.items()})
    bundle = import_bundle(**files, out=tmp_path / "bundle").bundle
    stored = load_file(bundle.path / "unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert bundle.load().dtype == torch.float32


def test_averaged_weights_are_taken_on_request(tmp_path, project):
    settings, state, _ = _write(tmp_path / "plain", project)
    averaged = random_state(unet_shapes(settings.unet), seed=9)
    flat = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value
        for name, value in averaged.items()
    }
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    files = write_files(tmp_path / "files", project, {**state, **flat, **counters})
    name = "model.diffusion_model.out.2.weight"
    plain = import_bundle(**files, out=tmp_path / "a").bundle.load()
    report = import_bundle(**files, out=tmp_path / "b", ema=True)
    assert report.ignored == {"model.diffusion_model.": len(averaged), "model_ema.": 2}
    ema = report.bundle.load()
    assert torch.equal(plain.unet.conv_out.weight, state[name])
    assert torch.equal(ema.unet.conv_out.weight, averaged[name])
    more = {"model_ema.diffusion_modelextraweight": torch.zeros(2)}
    files = write_files(tmp_path / "files", project, {**state, **flat, **more})
    with pytest.raises(BundleError, match=r"1 tensor surplus: model_ema\.diffusion_modelextra"):
        import_bundle(**files, out=tmp_path / "c", ema=True)
    del flat["model_ema.diffusion_modelout2weight"]
    files = write_files(tmp_path / "files", project, {**state, **flat})
    with pytest.raises(
        BundleError, match=r"1 tensor missing: model_ema\.diffusion_modelout2weight"
    ):
        import_bundle(**files, out=tmp_path / "c", ema=True)
    files = write_files(tmp_path / "files", project, state)
    with pytest.raises(BundleError, match=r"has no averaged weights .* leave --ema out"):
        import_bundle(**files, out=tmp_path / "c", ema=True)


def test_a_measured_latent_scale_wins_over_the_yaml_only_when_the_yaml_says_so(tmp_path, project):
    scale = {"scale_factor": torch.tensor(0.25)}
    _, _, files = _write(tmp_path / "attribute", project, **scale)
    bundle = import_bundle(**files, out=tmp_path / "a").bundle
    assert bundle.card.latent_scale == 0.7
    _params(project)["scale_by_std"] = True
    _, _, files = _write(tmp_path / "buffer", project, **scale)
    bundle = import_bundle(**files, out=tmp_path / "b").bundle
    assert bundle.card.latent_scale == 0.25
    _, _, files = _write(tmp_path / "none", project)
    with pytest.raises(BundleError, match="says scale_by_std, but the checkpoint has no scale_fac"):
        import_bundle(**files, out=tmp_path / "c")


def test_leftovers_of_training_are_counted_and_left_aside(tmp_path, project):
    schedule = NoiseSchedule()
    leftovers = {
        "betas": schedule.betas().float(),
        "alphas_cumprod": schedule.alphas_cumprod().half(),
        "logvar": torch.zeros(1000),
        "inception.fc.weight": torch.zeros(2),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.decay": torch.tensor(0.9),
    }
    _, _, files = _write(tmp_path / "files", project, **leftovers)
    report = import_bundle(**files, out=tmp_path / "bundle")
    assert report.ignored == {
        "buffers": 3,
        "inception.": 1,
        "first_stage_model.loss.": 2,
        "model_ema.": 1,
    }


# One line for everything else

OUT = "model.diffusion_model.out.2.weight"
CONV = "first_stage_model.encoder.conv_in.bias"
PATCH = "cond_stage_model.patch_fc.weight"
BAD_STATES = [
    ({OUT: None}, rf"1 tensor missing: {OUT}"),
    ({CONV: None}, rf"1 tensor missing: {CONV}"),
    ({PATCH: None}, rf"1 tensor missing: {PATCH}"),
    (
        {
            f"model.diffusion_model.time_embed.{i}.{part}": None
            for i in (0, 2)
            for part in ("weight", "bias")
        },
        r"4 tensors missing: model\.diffusion_model\.time_embed\.0\.weight, .* and 1 more",
    ),
    ({OUT: torch.zeros(3, 32, 1, 1)}, rf"{OUT} is \(3, 32, 1, 1\) instead of \(3, 32, 3, 3\)"),
    ({PATCH: torch.zeros(16, 25)}, r"patch_fc\.weight is \(16, 25\) instead of \(16, 24\)"),
    (
        {"model.diffusion_model.label_emb.weight": torch.zeros(1)},
        r"1 tensor surplus: model\.diffusion_model\.label_emb\.weight",
    ),
    ({"first_stage_model.extra": torch.zeros(1)}, r"1 tensor surplus: first_stage_model\.extra"),
    (
        {f"control.{i}": torch.zeros(1) for i in range(5)},
        r"5 surplus tensors .*: control\.0, control\.1, control\.2 and 2 more; --ignore PREFIX",
    ),
    ({OUT: torch.full((3, 32, 3, 3), float("nan"))}, rf"{OUT} holds values that are not finite"),
    ({OUT: torch.full((3, 32, 3, 3), -float("inf"))}, rf"{OUT} holds values that are not finite"),
    (
        {PATCH: torch.full((16, 24), 1e300, dtype=torch.float64)},
        rf"{PATCH} holds values that are not finite",  # in float32
    ),
    ({OUT: torch.zeros(3, 32, 3, 3, dtype=torch.int32)}, rf"{OUT} holds torch\.int32, not weights"),
    (
        {"alphas_cumprod": NoiseSchedule(beta_end=0.012).alphas_cumprod()},
        r"its noise schedule is not the YAML's: alphas_cumprod\[\d+\] is .* another run's YAML",
    ),
    ({"alphas_cumprod": torch.ones(10)}, r"its noise schedule has \(10,\) steps, the YAML's 1000"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_STATES)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_nothing(
    tmp_path, project, changes, message
):
    _, _, files = _write(tmp_path / "files", project, **changes)
    with pytest.raises(BundleError, match=message) as error:
        import_bundle(**files, out=tmp_path / "out" / "bundle")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_unknown_tensors_can_be_left_aside_by_prefix(tmp_path, project):
    _, _, files = _write(tmp_path / "files", project, **{"control.x": torch.zeros(1)})
    report = import_bundle(**files, out=tmp_path / "bundle", ignore=["control."])
    assert report.ignored == {"control.": 1}


def test_swapped_files_are_noticed(tmp_path, project):
    _, _, files = _write(tmp_path / "files", project)
    with pytest.raises(
        BundleError, match=r"no checkpoint of a latent .* 'teacher'.* is it the enc"
    ):
        import_bundle(**{**files, "ldm": files["encoder"]}, out=tmp_path / "bundle")
    with pytest.raises(
        BundleError, match=r"no DINO or timm checkpoint .* is it the diffusion model's"
    ):
        import_bundle(**{**files, "encoder": files["ldm"]}, out=tmp_path / "bundle")
    with pytest.raises(BundleError, match="is not a text file|not valid YAML|too large"):
        import_bundle(**{**files, "project": files["ldm"]}, out=tmp_path / "bundle")
    with pytest.raises(BundleError, match="is not a PyTorch checkpoint"):
        import_bundle(**{**files, "ldm": files["project"]}, out=tmp_path / "bundle")


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, project):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "file").touch()
    none = tmp_path / "none"
    with pytest.raises(BundleError, match="exists already"):
        import_bundle(ldm=none, project=none, encoder=none, out=tmp_path / "bundle")


# The encoder


def _encoder(files, change):
    saved = torch.load(files["encoder"], weights_only=True)
    torch.save(change(saved), files["encoder"])


def _edited(saved, name, value):
    teacher = saved["teacher"]
    if value is None:
        del teacher[f"module.backbone.{name}"]
    else:
        teacher[f"module.backbone.{name}"] = value
    return saved


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.weight", None, r"1 tensor missing: norm\.weight"),
        ("extra", torch.zeros(1), r"1 tensor surplus: extra"),
        ("cls_token", torch.zeros(1, 1, 8), r"cls_token is \(1, 1, 8\) instead of \(1, 1, 24\)"),
        ("pos_embed", torch.zeros(1, 200, 24), r"pos_embed is \(1, 200, 24\) instead of \(1, 257"),
        ("pos_embed", torch.zeros(1, 197, 8), r"pos_embed is \(1, 257, 8\) instead|197, 8"),
        ("norm.bias", torch.full((24,), float("inf")), r"norm\.bias holds values that are not fin"),
    ],
)
def test_an_encoder_that_does_not_fit_is_one_line(tmp_path, project, name, value, message):
    _, _, files = _write(tmp_path / "files", project)
    _encoder(files, lambda saved: _edited(saved, name, value))
    with pytest.raises(BundleError, match=message):
        import_bundle(**files, out=tmp_path / "bundle")


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["teacher"],
        lambda saved: {"state_dict": saved["teacher"]},
        lambda saved: {
            "teacher": {k.removeprefix("module.backbone."): v for k, v in saved["teacher"].items()}
        },
    ],
    ids=["flat", "state_dict", "no prefixes"],
)
def test_other_wrappings_of_the_encoder_are_read(tmp_path, project, change):
    _, _, files = _write(tmp_path / "files", project)
    _encoder(files, change)
    import_bundle(**files, out=tmp_path / "bundle")


def test_what_the_encoders_tensors_say_need_not_be_said_again(tmp_path, project):
    _, _, files = _write(tmp_path / "files", project)

    def narrow(saved):
        teacher = saved["teacher"]
        teacher["module.backbone.blocks.0.mlp.fc1.weight"] = torch.zeros(36, 24)
        teacher["module.backbone.blocks.0.mlp.fc1.bias"] = torch.zeros(36)
        teacher["module.backbone.blocks.0.mlp.fc2.weight"] = torch.zeros(24, 36)
        del teacher["module.backbone.blocks.0.attn.qkv.bias"]
        return saved

    _encoder(files, narrow)
    bundle = import_bundle(**files, out=tmp_path / "bundle").bundle
    assert bundle.configs["encoder"]["mlp_ratio"] == 1.5
    assert bundle.configs["encoder"]["qkv_bias"] is False
    bundle.load()


def test_an_encoder_of_another_shape_than_hipts_must_be_described(tmp_path, project):
    _, _, files = _write(tmp_path / "files", project)
    with pytest.raises(
        BundleError, match="vectors of 24, the encoder gives 384; .*--encoder-config"
    ):
        import_bundle(**{**files, "encoder_config": None}, out=tmp_path / "bundle")
    files["encoder_config"].write_text(json.dumps({**ENCODER, "image_size": 224}))
    with pytest.raises(BundleError, match="image_size is 224, it must be 256"):
        import_bundle(**files, out=tmp_path / "bundle")
    files["encoder_config"].write_text(json.dumps({**ENCODER, "depth": 2}))
    with pytest.raises(BundleError, match=r"12 tensors missing: blocks\.1\.norm1\.weight"):
        import_bundle(**files, out=tmp_path / "bundle")


# The project YAML


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{UNET}num_res_blocks", 1, "this UNet has 9 taps, only 13 are supported"),
        (f"{UNET}channel_mult", [1, 1, 1], "this UNet has 10 taps, only 13 are supported"),
        (f"{UNET}num_res_blocks", [2, 2, 2, 1], "num_res_blocks must be the same for every level"),
        (
            f"{UNET}num_res_blocks",
            "${x}",
            r"num_res_blocks must be a whole number .* got .*\$\{x\}",
        ),
        (f"{UNET}channel_mult", [2, 1, 1, 1], "channel_mult must be a list that starts with 1"),
        (f"{UNET}model_channels", 48, "model_channels must be a multiple of 32"),
        (f"{UNET}model_channels", 10**12, "model_channels must be a whole number from 1 to 4096"),
        (f"{UNET}num_heads", -1, "num_heads or num_head_channels must be above 0"),
        (f"{UNET}num_head_channels", 24, "must be a divisor of 32 channels, got 24"),
        (
            f"{UNET}use_spatial_transformer",
            False,
            "use_spatial_transformer must be True, got False",
        ),
        (f"{UNET}use_spatial_transformer", None, "use_spatial_transformer must be True, got False"),
        (f"{UNET}resblock_updown", True, "resblock_updown must be False, got True"),
        (f"{UNET}num_classes", 10, "num_classes must be None, got 10"),
        (f"{UNET}context_dim", None, "context_dim is missing"),
        (f"{UNET}in_channels", 4, "the UNet takes 4 and gives 3 channels, the first stage makes 3"),
        ("conditioning_key", "concat", "conditioning_key must be 'crossattn', got 'concat'"),
        ("parameterization", "x0", "parameterization must be 'eps', got 'x0'"),
        ("beta_schedule", "sigmoid", "beta_schedule must be one of linear, sqrt_linear, cosine"),
        ("linear_start", "much", "linear_start must be a number, got 'much'"),
        ("linear_start", 0.5, "betas must rise"),
        ("scale_factor", 0, "scale_factor must be a number above 0"),
        ("scale_factor", 10**400, "scale_factor must be a number above 0"),
        ("scale_factor", float("inf"), "scale_factor must be a number above 0, got inf"),
        ("linear_start", float("nan"), "linear_start must be a number above 0, got nan"),
        ("scale_by_std", "yes please", "scale_by_std must be true or false"),
        (
            "first_stage_config__target",
            "ldm.IdentityFirstStage",
            "must be VQModelInterface or Auto",
        ),
        (f"{STAGE}ddconfig__double_z", True, "double_z must be False for a VQModelInterface"),
        (f"{STAGE}ddconfig__attn_type", "linear", "attn_type must be 'vanilla', got 'linear'"),
        (f"{STAGE}ddconfig__ch_mult", 3, "ch_mult must be a list of up to 16 whole numbers"),
        (f"{STAGE}ddconfig__in_channels", 1, "in_channels and out_ch must be 3"),
        (f"{STAGE}embed_dim", None, "embed_dim is missing"),
        ("cond_stage_config__target", "ldm.BERTEmbedder", "must be PatchEmbedder or SSLEmbedder"),
        ("cond_stage_config__params__target_dim", 8, r"must be the UNet's context_dim \(16\)"),
        ("unet_config", None, "unet_config is missing"),
        ("unet_config", 3, "unet_config is no mapping"),
    ],
)
def test_a_yaml_that_cannot_be_honoured_is_one_line(tmp_path, path, value, message):
    _, _, files = _write(tmp_path / "files", small_project())
    files["project"].write_text(yaml.safe_dump(_case(**{path: value})))
    with pytest.raises(BundleError, match=message) as error:
        import_bundle(**files, out=tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert str(files["project"]) in str(error.value)


def test_an_exponent_without_a_point_is_a_number(tmp_path):
    text = yaml.safe_dump(_case(linear_start=1.5)).replace(
        "linear_start: 1.5", "linear_start: 15e-4"
    )
    (tmp_path / "project.yaml").write_text(text)
    assert isinstance(_params(yaml.safe_load(text))["linear_start"], str)
    assert read_project(tmp_path / "project.yaml").schedule.beta_start == 0.0015


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("[1, 2]", "is not the project YAML of a latent diffusion model: its top is no mapping"),
        ("", "its top is no mapping"),
        ("a: !!python/object/apply:os.system ['ls']", "is not valid YAML"),
        ("[" * 50_000, "is not valid YAML for a project: nested too deeply"),
        ("a: &a [x]\n" + "".join(f"b{i}: *a\n" for i in range(20)), "more than 16 YAML aliases"),
        ("x" * (2 << 20), "too large to be a project YAML"),
        ("a: 0x" + "f" * 5000, "is no project YAML: a value has 5002 letters"),
        ("a: " + "\x1b", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_project_is_one_line(tmp_path, text, message):
    (tmp_path / "project.yaml").write_text(text)
    with pytest.raises(BundleError, match=message) as error:
        read_project(tmp_path / "project.yaml")
    assert "\n" not in str(error.value)


def test_a_yaml_that_multiplies_itself_takes_no_time(tmp_path):
    # each level merges the one before nine times: 9**9 keys without a limit on aliases
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10)]
    (tmp_path / "project.yaml").write_text("\n".join(lines))
    with pytest.raises(BundleError, match="more than 16 YAML aliases"):
        read_project(tmp_path / "project.yaml")


def test_a_bundle_says_what_it_is_after_a_copy(tmp_path, project):
    _, _, files = _write(tmp_path / "files", copy.deepcopy(project))
    first = import_bundle(**files, out=tmp_path / "one").bundle
    second = import_bundle(**files, out=tmp_path / "two").bundle
    assert first.card.sha256 == second.card.sha256
    assert re.fullmatch("[0-9a-f]{64}", first.card.sha256)
    assert load_bundle(tmp_path / "one").card == first.card
    assert isinstance(read_project(files["project"]).first_stage, LdmFirstStage)
