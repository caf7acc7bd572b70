"""The three parts and the bundle: what they learn from, and that it is what stage 1 will see."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.diffusion.presets import PRESETS, vq_config
from pathsegdiff.diffusion.pretrain.autoencoder import (
    AutoencoderPart,
    DecoderPart,
    psnr,
    reconstruct,
)
from pathsegdiff.diffusion.pretrain.images import open_pool
from pathsegdiff.diffusion.pretrain.ldm import LOOK_AT, LdmPart, LdmSettings, plan_alignment
from pathsegdiff.diffusion.pretrain.plans import PARTS, plan_of
from pathsegdiff.diffusion.pretrain.run import LoopOptions, Pretraining
from pathsegdiff.diffusion.pretrain.stain import jitter_stain
from pathsegdiff.diffusion.schedule import NoiseSchedule
from pathsegdiff.diffusion.taps import TapSpec, plan_taps
from pathsegdiff.errors import ConfigError, RunError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool():
    return open_pool(["demo"])


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory):
    """A micro bundle after a few steps of everything, and its working folder."""
    folder = tmp_path_factory.mktemp("pretrained")
    plan = plan_of("micro").changed(steps=4, batch_size=2)
    training = Pretraining(plan, pool, folder / "work", CPU)
    for part in PARTS:
        assert training.train(part, LoopOptions(report_every=2, look_every=4))
    bundle = training.assemble(
        folder / "bundle", name="few-steps", title="A test", licence="none", data="demo"
    )
    return bundle, folder / "work"


def test_the_bundle_is_whole_and_says_what_it_was_trained_with(trained):
    bundle, work = trained
    card = load_bundle(bundle.path).card
    assert card.trained
    assert card.provenance["trained on"] == "demo"
    assert card.provenance["ldm: steps"] == "4"
    assert card.provenance["ldm: hardware"].startswith("cpu")
    assert card.latent_scale == bundle.configs["autoencoder"]["scaling_factor"] != 5.0
    for part, picture in (
        ("autoencoder", "reconstructions"),
        ("encoder", "tokens"),
        ("ldm", "denoised"),
        ("ldm", "samples"),
    ):
        with Image.open(work / part / f"{picture}.png") as drawn:
            assert drawn.size[0] > 6 * 256


def test_scaled_latents_have_a_deviation_of_about_one(trained, pool):
    model = trained[0].load()
    images = pool.batch(1, 77, 16, 256).float() / 255
    assert model.latent(images).std().item() == pytest.approx(1, rel=0.3)


def test_the_log_of_the_diffusion_model_has_the_loss_by_timestep(trained):
    with (trained[1] / "ldm" / "log.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert {f"held_out_t{t}" for t in LOOK_AT} <= set(last)
    by_step = [float(last[f"held_out_t{t}"]) for t in LOOK_AT]
    assert np.mean(by_step) == pytest.approx(float(last["held_out_conditioned"]), rel=1e-4)
    assert float(last["held_out_null"]) > 0


def test_a_part_waits_for_the_ones_before_it(pool, tmp_path):
    training = Pretraining(plan_of("micro"), pool, tmp_path, CPU)
    with pytest.raises(RunError, match="the autoencoder is trained first"):
        training.train("ldm", LoopOptions())
    with pytest.raises(RunError, match="is not finished"):
        training.assemble(tmp_path / "out", name="x", title="x", licence="x", data="x")


def _autoencoder_config(kind):
    if kind == "kl":
        return PRESETS["micro"].autoencoder
    return vq_config(
        channels=(4, 8, 8),
        layers_per_block=1,
        codes=16,
        norm_num_groups=4,
        middle_attention=False,
    )


def test_a_decoder_that_is_trained_on_changes_no_latent(trained, pool, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained[1], work)
    plan = plan_of("micro").changed(steps=4, batch_size=2)
    training = Pretraining(plan, pool, work, CPU)
    assert training.train("decoder", LoopOptions(report_every=2, look_every=4))
    bundle = training.assemble(
        tmp_path / "b", name="b", title="A test", licence="none", data="demo"
    )
    assert bundle.card.provenance["decoder: steps"] == "4"
    images = pool.batch(1, 3, 2, 256).float() / 255
    before, after = trained[0].load(), bundle.load()
    assert torch.equal(before.latent(images), after.latent(images))
    old, new = (reconstruct(model.autoencoder, images) for model in (before, after))
    assert psnr(images, new) != pytest.approx(psnr(images, old), abs=1e-4)
    for name, value in before.unet.state_dict().items():
        assert torch.equal(value, after.unet.state_dict()[name])

    # An autoencoder that was trained anew has another encoder than this decoder was made for.
    weights = load_file(work / "autoencoder" / "weights.safetensors")
    name = next(name for name in weights if name.startswith("encoder."))
    weights[name] = weights[name] + 1
    save_file(weights, work / "autoencoder" / "weights.safetensors")
    with pytest.raises(RunError, match="decoder was trained with another autoencoder"):
        training.assemble(tmp_path / "c", name="c", title="A test", licence="none", data="demo")


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_decoder_learns_to_reconstruct_from_fixed_latents(pool, kind):
    config = _autoencoder_config(kind)
    torch.manual_seed(0)
    state = AutoencoderPart(config, pool, CPU).model.state_dict()
    part = DecoderPart(config, state, pool, CPU, held_out_crops=2)
    trained = [parameter for parameter in part.trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 2e-3)
    before = part.held_out()["held_out_psnr"]
    for step in range(30):
        loss, figures = part.loss(part.read(step, 2, 64), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert figures["psnr"] > 8
    assert part.held_out()["held_out_psnr"] > before + 1
    fixed = part.model.encoder.state_dict()
    assert all(torch.equal(fixed[name], state[f"encoder.{name}"]) for name in fixed)


def test_a_finished_part_is_not_trained_again(trained, pool):
    _, work = trained
    before = (work / "ldm" / "weights.safetensors").stat().st_mtime_ns
    plan = plan_of("micro").changed(steps=4, batch_size=2)
    assert Pretraining(plan, pool, work, CPU).train("ldm", LoopOptions())
    assert (work / "ldm" / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_autoencoder_learns_to_reconstruct(pool, kind):
    config = _autoencoder_config(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = AutoencoderPart(config, pool, CPU)
    images = pool.batch(1, 999, 4, 64).float() / 255
    before = psnr(images, reconstruct(part.model, images))
    optimizer = torch.optim.AdamW(part.model.parameters(), lr=5e-3)
    for step in range(40):
        loss, figures = part.loss(part.read(step, 4, 64), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert figures["psnr"] > 0
    assert psnr(images, reconstruct(part.model, images)) > before + 1


def _ldm(pool, **settings):
    preset = PRESETS["micro"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = preset.build()
        return LdmPart(
            unet_config=preset.unet,
            conditioner=preset.conditioner,
            encoder=parts["encoder"],
            autoencoder=parts["autoencoder"],
            latent_scale=5.0,
            taps=plan_taps(preset.unet, 4),
            schedule=NoiseSchedule(),
            pool=pool,
            settings=LdmSettings(**settings),
            seed=0,
            device=CPU,
        )


def test_the_taps_learn_the_encoders_maps_and_the_noise(pool):
    part = _ldm(pool)
    optimizer = torch.optim.AdamW(part.trained.parameters(), lr=3e-3)
    seen = []
    for _step in range(12):
        loss, figures = part.loss(part.read(0, 2, 256), 0)  # the same crops, noise and timesteps
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(figures)
    aligned = [name for name in seen[0] if name.startswith("align_")]
    assert aligned
    for name in ("noise_loss", *aligned):
        assert seen[-1][name] < seen[0][name]


def test_without_alignment_there_are_no_projections(pool):
    part = _ldm(pool, align_weight=0.0)
    assert not [name for name, _ in part.trained.named_parameters() if "projections" in name]
    assert "align" not in " ".join(part.loss(part.read(0, 2, 256), 0)[1])


def test_a_dropped_condition_is_the_null_condition_of_stage_1(pool):
    part = _ldm(pool, drop_condition=1.0)
    conditioner = part.trained.conditioner
    seen = []
    part.trained.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].detach()),
        with_kwargs=True,
    )
    part.loss(part.read(0, 2, 256), 0)
    torch.testing.assert_close(seen[0], conditioner(None, 2))
    part.settings = replace(part.settings, drop_condition=0.0)
    part.loss(part.read(0, 2, 256), 0)
    assert not torch.allclose(seen[1], conditioner(None, 2))


def test_timesteps_are_drawn_where_features_are_taken_from(pool):
    part = _ldm(pool, focus_share=0.6, focus_steps=150)
    drawn = part._draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0
    assert drawn.max() == 999
    # 0.6 in the focus, and of the others 150 in 1000.
    assert (drawn < 150).float().mean().item() == pytest.approx(0.6 + 0.4 * 0.15, abs=0.02)


def test_maps_are_given_to_the_last_tap_but_one_of_their_stride():
    taps = [
        TapSpec(name=name, module_path=name, channels=8, stride=stride)
        for name, stride in (("middle", 64), ("up_03", 32), ("up_04", 32), ("up_06", 16),
                             ("up_07", 16), ("up_10", 8), ("up_11", 8))
    ]  # fmt: skip
    pairs = {pair.tap.name: pair.maps for pair in plan_alignment(taps, [64, 32, 16, 8], 256)}
    assert pairs == {"up_10": (0, 1), "up_06": (2,), "up_03": (3,)}


def test_stain_jitter_keeps_the_range_and_no_amount_keeps_the_image():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(0.05, 1)
    same = jitter_stain(images, torch.Generator().manual_seed(1), 0.0)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=1e-5)
    changed = jitter_stain(images, torch.Generator().manual_seed(1), 0.2)
    assert (changed - images).abs().max() > 0.01
    assert changed.min() >= 0
    assert changed.max() <= 1
    again = jitter_stain(images, torch.Generator().manual_seed(1), 0.2)
    assert torch.equal(changed, again)


def test_tiny_can_have_a_transformer_and_micro_has_one_already():
    plan = plan_of("tiny").with_dino_encoder()
    assert plan.preset.encoder.architecture == "vit"
    assert plan.preset.conditioner["patch_embed_dim"] == plan.preset.encoder.embed_dim
    with pytest.raises(ConfigError, match="as it is"):
        plan_of("micro").with_dino_encoder()
    with pytest.raises(ConfigError, match="preset must be one of"):
        plan_of("huge")
