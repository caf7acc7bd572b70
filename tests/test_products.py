"""Products as convolutions: the same numbers and gradients, only where they are faster."""

import pytest
import torch
from torch import nn

from pathsegdiff import products
from pathsegdiff.products import ConvolvedLinear, convolve_linears, restore_linears, times


@pytest.fixture(params=[True, False], ids=["convolved", "multiplied"])
def convolved(request, monkeypatch):
    monkeypatch.setattr(products, "convolutions_are_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("batch", "matrices", "groups"), [(1, 1, 1), (3, 1, 2), (3, 3, 1)])
def test_times_is_the_matrix_product_with_its_gradients(
    convolved, batch, matrices, groups, generator
):
    matrix = torch.randn(matrices, 5, 7, generator=generator).requires_grad_()
    values = torch.randn(batch, groups, 7, 11, generator=generator).requires_grad_()
    expected = torch.einsum("bmk,bgkx->bgmx", matrix.expand(batch, 5, 7), values)
    found = times(matrix, values)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((found * weights).sum(), (matrix, values))
    wanted = torch.autograd.grad((expected * weights).sum(), (matrix, values))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 70, 6), (1, 1, 6), (100, 6), (2, 3, 50, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolved_linear_gives_what_the_linear_gives(convolved, shape, bias, generator):
    module = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.ReLU())
    x = torch.randn(shape, generator=generator)
    expected = module(x)
    convolve_linears(module)
    assert isinstance(module[0], ConvolvedLinear) == convolved
    torch.testing.assert_close(module(x), expected)
    assert set(module.state_dict()) == ({"0.weight", "0.bias"} if bias else {"0.weight"})
    restore_linears(module)
    assert type(module[0]) is nn.Linear


def test_other_linears_and_other_precisions_are_left_alone(monkeypatch, generator):
    class Own(nn.Linear):
        pass

    monkeypatch.setattr(products, "convolutions_are_faster", lambda: True)
    module = nn.ModuleList([Own(6, 4), nn.Linear(6, 4)])
    convolve_linears(module)
    assert [type(part) for part in module] == [Own, ConvolvedLinear]
    x = torch.randn(80, 6, generator=generator)
    called = []
    monkeypatch.setattr(products.F, "conv2d", lambda *a: called.append(a) or torch.zeros(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module[1](x).shape == (80, 4)
    module.double()
    assert module[1](x.double()).shape == (80, 4)
    assert not called


def test_only_processors_that_are_not_intels_convolve(monkeypatch):
    for vendor, expected in (("GenuineIntel", False), ("AuthenticAMD", True)):
        products.convolutions_are_faster.cache_clear()
        monkeypatch.setattr(products.Path, "read_text", lambda *a, v=vendor, **k: f"vendor_id: {v}")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert products.convolutions_are_faster() is expected
    monkeypatch.undo()
    products.convolutions_are_faster.cache_clear()
