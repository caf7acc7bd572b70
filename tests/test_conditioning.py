"""Embeddings to context tokens, and the null condition."""

import torch

from pathsegdiff.diffusion.conditioning import Conditioner


def _conditioner(region: int | None = 6, normalize: bool = True) -> Conditioner:
    torch.manual_seed(0)
    return Conditioner(
        patch_embed_dim=8, region_embed_dim=region, context_dim=4, normalize=normalize
    ).requires_grad_(False)


def test_the_first_token_is_the_layer_of_the_normalised_embedding(generator):
    conditioner = _conditioner()
    embedding = torch.randn(3, 8, generator=generator) * 5
    unit = embedding / embedding.square().sum(1, keepdim=True).sqrt()
    expected = unit @ conditioner.patch_fc.weight.T + conditioner.patch_fc.bias
    torch.testing.assert_close(conditioner(embedding, 3)[:, 0], expected)


def test_the_region_token_is_the_bias_as_there_is_no_region_embedding(generator):
    conditioner = _conditioner()
    context = conditioner(torch.randn(3, 8, generator=generator), 3)
    assert context.shape == (3, 2, 4)
    torch.testing.assert_close(context[:, 1], conditioner.region_fc.bias.expand(3, 4))


def test_the_null_condition_is_zeros_before_the_layers_and_not_zero_tokens():
    conditioner = _conditioner()
    context = conditioner(None, 2)
    torch.testing.assert_close(context[:, 0], conditioner.patch_fc.bias.expand(2, 4))
    torch.testing.assert_close(context[:, 1], conditioner.region_fc.bias.expand(2, 4))
    assert context.abs().min() > 0


def test_without_normalisation_the_length_of_the_embedding_counts(generator):
    embedding = torch.randn(1, 8, generator=generator)
    raw, unit = _conditioner(normalize=False), _conditioner(normalize=True)
    assert not torch.allclose(raw(embedding, 1), raw(2 * embedding, 1))
    torch.testing.assert_close(unit(embedding, 1), unit(2 * embedding, 1))


def test_one_token_without_a_region():
    conditioner = _conditioner(region=None)
    assert conditioner.num_tokens == 1
    assert conditioner(None, 5).shape == (5, 1, 4)


def test_an_embedding_whose_norm_float16_cannot_hold_is_normalised_all_the_same():
    conditioner = _conditioner().half()
    context = conditioner(torch.full((1, 8), 60000.0), 1)
    assert context.dtype == torch.float16
    assert torch.isfinite(context).all()
