"""The taps of a UNet, and how they are recorded."""

import pytest
import torch

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.diffusion.presets import PRESETS, build_random
from pathsegdiff.diffusion.taps import capture_taps, plan_taps
from pathsegdiff.diffusion.unet import build_unet, unet_config
from pathsegdiff.errors import BundleError

#: facts: channels and stride of the paper's taps, in order
PAPER = [
    (960, 32), (960, 32), (960, 32), (960, 16), (576, 16), (576, 16), (576, 8),
    (384, 8), (384, 8), (384, 4), (192, 4), (192, 4), (192, 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    return build_random(PRESETS["micro"], 0)["unet"].eval().requires_grad_(False)


@pytest.fixture
def inputs(generator):
    return {
        "sample": torch.randn(2, 3, 64, 64, generator=generator),
        "timestep": torch.tensor([50, 50]),
        "encoder_hidden_states": torch.randn(2, 2, 16, generator=generator),
    }


def _hooks(unet) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_the_papers_unet_has_thirteen_taps_and_7296_channels():
    taps = plan_taps(PRESETS["paper"].unet, 4)
    assert tuple(tap.name for tap in taps) == ALL_TAPS
    assert [(tap.channels, tap.stride) for tap in taps] == PAPER
    assert sum(tap.channels for tap in taps) == 7296
    # facts: output blocks 2, 5 and 8 end with the upsampler, the last level does not attend
    paths = {tap.name: tap.module_path for tap in taps}
    assert paths["up_02"] == "up_blocks.0.upsamplers.0"
    assert paths["up_04"] == "up_blocks.1.attentions.1"
    assert paths["up_11"] == "up_blocks.3.resnets.2"


def test_a_model_of_stride_8_has_its_own_strides():
    assert [tap.stride for tap in plan_taps(PRESETS["paper"].unet, 8)] == [
        2 * stride for _, stride in PAPER
    ]


def test_the_papers_unet_has_its_parameters():
    with torch.device("meta"):
        unet = build_unet(PRESETS["paper"].unet)
    assert sum(p.numel() for p in unet.parameters()) == 400_920_579


def test_other_depths_give_a_list_of_their_own():
    config = unet_config(
        latent_channels=3,
        latent_size=64,
        block_out_channels=(32, 64),
        attention=(True, False),
        layers_per_block=1,
        num_heads=1,
        context_dim=8,
    )
    assert [
        (tap.name, tap.module_path, tap.channels, tap.stride) for tap in plan_taps(config, 4)
    ] == [
        ("middle", "mid_block", 64, 8),
        ("up_00", "up_blocks.0.resnets.0", 64, 8),
        ("up_01", "up_blocks.0.upsamplers.0", 64, 4),
        ("up_02", "up_blocks.1.attentions.0", 32, 4),
        ("up_03", "up_blocks.1.attentions.1", 32, 4),
    ]


def test_taps_have_the_size_and_channels_of_the_plan(unet, inputs):
    taps = plan_taps(PRESETS["micro"].unet, 4)
    with capture_taps(unet, [tap.module_path for tap in taps]) as captured:
        unet(**inputs)
    for tap in taps:
        cells = 256 // tap.stride
        assert captured[tap.module_path].shape == (2, tap.channels, cells, cells)


def test_stopping_early_changes_no_number(unet, inputs):
    paths = [tap.module_path for tap in plan_taps(PRESETS["micro"].unet, 4)]
    whole = {}
    handles = [
        unet.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: whole.update(
                {path: output[0] if isinstance(output, tuple) else output}
            )
        )
        for path in paths
    ]
    unet(**inputs)
    for handle in handles:
        handle.remove()
    with capture_taps(unet, paths) as captured:
        unet(**inputs)
    assert all(torch.equal(captured[path], whole[path]) for path in paths)


def test_nothing_after_the_last_tap_is_computed(unet, inputs):
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in unet.named_modules()
        if name in ("mid_block", "up_blocks.0", "conv_norm_out", "conv_out")
    ]
    with capture_taps(unet, ["mid_block"]):
        unet(**inputs)
    assert ran == ["mid_block"]
    ran.clear()
    with capture_taps(unet, ["up_blocks.3.resnets.2", "mid_block"]):
        unet(**inputs)
    for handle in handles:
        handle.remove()
    assert ran == ["mid_block", "up_blocks.0"]


def test_no_hook_is_left_behind(unet, inputs):
    with capture_taps(unet, ["mid_block"]):
        unet(**inputs)
    assert _hooks(unet) == 0
    with pytest.raises(AttributeError), capture_taps(unet, ["mid_block", "no_such_block"]):
        pass
    assert _hooks(unet) == 0
    with pytest.raises(RuntimeError), capture_taps(unet, ["mid_block"]):
        unet(**{**inputs, "encoder_hidden_states": torch.zeros(2, 2, 5)})
    assert _hooks(unet) == 0


def test_another_class_of_unet_is_refused():
    with pytest.raises(BundleError, match="must be a UNet2DConditionModel, got 'Transformer'"):
        build_unet({"_class_name": "Transformer"})
