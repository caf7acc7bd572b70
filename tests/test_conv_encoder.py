"""Convolutional encoders: stages, tokens, settings from outside."""

import pytest
import torch

from pathsegdiff.diffusion.conv_encoder import ConvEncoder, ConvEncoderConfig
from pathsegdiff.diffusion.encoder import read_encoder_config
from pathsegdiff.errors import BundleError


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvEncoder(ConvEncoderConfig()).eval().requires_grad_(False)


def test_the_embedding_is_the_mean_of_the_last_stage(encoder):
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    embedding, tokens = encoder(images)
    maps = encoder.feature_maps(images)
    assert [tuple(features.shape[1:]) for features in maps] == [
        (24, 64, 64),
        (40, 32, 32),
        (112, 16, 16),
        (320, 8, 8),
    ]
    torch.testing.assert_close(embedding, maps[-1].mean((2, 3)))
    assert tokens.shape == (2, 432, 16, 16)
    torch.testing.assert_close(tokens[:, :112], maps[2])


def test_images_are_standardised_with_the_mean_and_deviation_of_the_settings(encoder):
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    direct = encoder.network((images - 0.5) / 0.5)
    torch.testing.assert_close(encoder.feature_maps(images)[1], direct[1])


def test_settings_survive_json():
    config = ConvEncoderConfig()
    assert read_encoder_config(config.to_dict(), "x") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "hf-hub:somebody/net"}, "no model called"),
        ({"model": "os"}, "no model called"),
        ({"stages": [1, 2, 3, 10**9]}, "stages must be"),
        ({"stage_channels": [24, 40, 112, 10**9]}, "stage_channels must be"),
        ({"stage_channels": [24, 40, 112]}, "one per stage"),
        ({"stage_strides": [4, 8, 15, 32]}, "hold 16"),
        ({"image_size": 10**9}, "image_size must be"),
        ({"std": [0, 1, 1]}, "std must be"),
        ({"surplus": 1}, "differing: surplus"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(changes, message):
    values = {**ConvEncoderConfig().to_dict(), **changes}
    with pytest.raises(BundleError, match=message) as error:
        read_encoder_config(values, "encoder/config.json")
    assert "\n" not in str(error.value)


def test_a_network_with_other_stages_than_the_settings_say_is_refused():
    config = ConvEncoderConfig(stage_channels=(24, 40, 112, 321))
    with pytest.raises(BundleError, match="its settings say"):
        ConvEncoder(config)
