"""The patch encoder and HIPT's resizing of its position table."""

import math

import numpy as np
import pytest
import torch

from pathsegdiff.diffusion.encoder import EncoderConfig, PatchEncoder, resize_position_table
from pathsegdiff.errors import BundleError


def _parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PatchEncoder(config).parameters())


def test_the_default_is_hipts_vit_small():
    # facts: 21,665,664 with the published 14 x 14 table, 21,688,704 with that for 256 px
    assert _parameters(EncoderConfig(image_size=224)) == 21_665_664
    assert _parameters(EncoderConfig()) == 21_688_704


def _bicubic_weights(size_in: int, size_out: int, factor: float) -> np.ndarray:
    """(size_out, size_in): Keys' kernel with a = -0.75, sampled at (i + 0.5) / factor - 0.5."""
    weights = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) / factor - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - tap)
            if x <= 1:
                value = 1.25 * x**3 - 2.25 * x**2 + 1
            else:
                value = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(tap, 0), size_in - 1)] += value
    return weights


@pytest.mark.parametrize(("side", "grid"), [(14, 16), (7, 16), (20, 16), (16, 32)])
def test_the_position_table_is_resized_by_hipts_factor(side, grid, generator):
    table = torch.randn(1, 1 + side * side, 5, generator=generator)
    resized = resize_position_table(table, grid)
    weights = _bicubic_weights(side, grid, (grid + 0.1) / side)
    patches = table[0, 1:].double().numpy().reshape(side, side, 5)
    expected = np.einsum("ia,jb,abd->ijd", weights, weights, patches)
    np.testing.assert_allclose(resized[0, 1:].numpy().reshape(grid, grid, 5), expected, atol=1e-5)
    assert torch.equal(resized[:, :1], table[:, :1])


def test_timms_own_resize_is_another(generator):
    from timm.layers import resample_abs_pos_embed  # after our own import of timm, which mends it

    table = torch.randn(1, 197, 5, generator=generator)
    theirs = resample_abs_pos_embed(table, [16, 16])
    ours = resize_position_table(table, 16)
    assert (ours - theirs).norm() / ours.norm() > 1e-3


def test_a_table_of_the_right_size_is_left_alone_and_an_odd_one_refused(generator):
    table = torch.randn(1, 257, 5, generator=generator)
    assert torch.equal(resize_position_table(table, 16), table)
    assert resize_position_table(table.half(), 16).dtype == torch.float32
    with pytest.raises(ValueError, match="199 patches is not square"):
        resize_position_table(torch.zeros(1, 200, 5), 16)


def test_images_are_normalised_and_tokens_lie_in_rows(generator):
    config = EncoderConfig(
        embed_dim=16, depth=1, num_heads=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    )
    encoder = PatchEncoder(config).eval().requires_grad_(False)
    images = torch.rand(2, 3, 256, 256, generator=generator)
    embedding, tokens = encoder(images)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    std = torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    sequence = encoder.network.forward_features((images - mean) / std)
    torch.testing.assert_close(embedding, sequence[:, 0])
    assert tokens.shape == (2, 16, 16, 16)
    torch.testing.assert_close(tokens[:, :, 3, 5], sequence[:, 1 + 3 * 16 + 5])


def test_layer_norms_have_hipts_epsilon():
    with torch.device("meta"):
        vit = PatchEncoder(EncoderConfig()).network
    norms = [m for m in vit.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 25
    assert {norm.eps for norm in norms} == {1e-6}


def test_settings_survive_a_round_trip():
    config = EncoderConfig(embed_dim=48, num_heads=3, depth=2)
    assert EncoderConfig.from_dict(config.to_dict(), "x") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must be a JSON object"),
        ({"heads": 3}, "no setting 'heads'; there are architecture, embed_dim"),
        ({"architecture": "resnet"}, "architecture must be 'vit' or 'cnn', got 'resnet'"),
        ({"depth": 0}, "depth must be 1 to 128, got 0"),
        ({"depth": 10**9}, "depth must be 1 to 128"),
        ({"depth": True}, "depth must be 1 to 128"),
        ({"embed_dim": 64, "num_heads": 3}, "64 is no multiple of num_heads 3"),
        ({"image_size": 250}, "image_size 250 is no multiple of patch_size 16"),
        ({"std": [0.5, 0.5]}, "std must be three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "std must be three numbers"),
        ({"mean": "abc"}, "mean must be three numbers"),
        ({"mean": [0.5, 0.5, 10**400]}, "mean must be three numbers"),
        ({"mlp_ratio": -1}, "mlp_ratio must be in"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false"),
    ],
)
def test_impossible_settings_are_one_line(values, message):
    with pytest.raises(BundleError, match=message):
        EncoderConfig.from_dict(values, "encoder.json")
