"""Images to latents."""

import pytest
import torch

from pathsegdiff.diffusion.autoencoder import (
    build_autoencoder,
    encode,
    latent_channels,
    latent_stride,
)
from pathsegdiff.diffusion.presets import vq_config
from pathsegdiff.errors import BundleError

VQ = vq_config(channels=(4, 4, 8), layers_per_block=1, codes=4, norm_num_groups=4)
KL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [4, 4, 4, 4],
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 64, 64, generator=generator)


def _build(config):
    torch.manual_seed(0)
    return build_autoencoder(config).eval().requires_grad_(False)


def test_vq_latents_are_taken_before_quantisation(images):
    model = _build(VQ)
    expected = model.quant_conv(model.encoder(images * 2 - 1))
    latent = encode(model, images, 1.0)
    torch.testing.assert_close(latent, expected)
    assert latent.shape == (2, 3, 16, 16)
    codes = model.quantize(latent)[0]
    assert not torch.allclose(latent, codes)


def test_kl_latents_are_the_scaled_posterior_mean_and_never_a_draw(images):
    model = _build(KL)
    mean = model.quant_conv(model.encoder(images * 2 - 1))[:, :2]
    torch.testing.assert_close(encode(model, images, 0.18215), mean * 0.18215)
    assert torch.equal(encode(model, images, 0.18215), encode(model, images, 0.18215))


def test_the_latent_is_float32_whatever_the_model_computes_in(images):
    model = build_autoencoder(VQ).eval().to(torch.bfloat16)
    assert encode(model, images, 1.0).dtype == torch.float32


def test_strides_and_channels_follow_the_config():
    assert (latent_stride(VQ), latent_channels(VQ)) == (4, 3)
    assert (latent_stride(KL), latent_channels(KL)) == (8, 2)
    assert latent_channels({**VQ, "vq_embed_dim": 5}) == 5


def test_another_class_is_refused():
    with pytest.raises(BundleError, match="must be one of VQModel, AutoencoderKL, got 'Flux'"):
        build_autoencoder({"_class_name": "Flux"})


def test_the_papers_vq_f4_has_its_parameters():
    with torch.device("meta"):
        model = build_autoencoder(
            vq_config(channels=(128, 256, 512), layers_per_block=2, codes=8192)
        )
    assert sum(p.numel() for p in model.parameters()) == 55_322_782
    assert sum(p.numel() for p in model.encoder.parameters()) == 22_337_411
