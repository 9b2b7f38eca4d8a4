"""The gradients of an update: their norm against float64, and whether every one of them is looked at."""

import math

import pytest
import torch

import trainopt
from trainopt.training import gradients

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parameters(dtype=torch.float32, shapes=((7,), (100, 70), (3, 2), (5000,), ())):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def norm_in_float64(params):
    return math.sqrt(sum(float(param.grad.double().square().sum()) for param in params if param.grad is not None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_float64(dtype):
    params = parameters(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert gradients.global_norm(params).item() == pytest.approx(norm_in_float64(params), rel=tolerance)


def test_mixed_dtypes_missing_and_no_gradients():
    params = [param for dtype in DTYPES for param in parameters(dtype)]
    params[3].grad = None
    assert gradients.global_norm(params).item() == pytest.approx(norm_in_float64(params), rel=1e-6)
    assert gradients.are_finite(params, None)
    assert gradients.global_norm([torch.nn.Parameter(torch.ones(2))]).item() == 0
    assert gradients.are_finite([torch.nn.Parameter(torch.ones(2))], None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_anywhere_is_found(dtype, bad):
    for index in range(5):
        params = parameters(dtype)
        for place in (0, params[index].numel() // 2, params[index].numel() - 1):
            params[index].grad.view(-1)[place] = bad
            assert not gradients.are_finite(params, None)
            assert not gradients.are_finite(params, gradients.global_norm(params))
            params[index].grad.view(-1)[place] = 0
        assert gradients.are_finite(params, None)


def test_a_norm_that_overflows_is_no_bad_element():
    params = parameters(torch.float64)
    for param in params:
        param.grad.fill_(1e308)
    before = [param.grad.clone() for param in params]
    assert not math.isfinite(gradients.global_norm(params).item())
    assert gradients.are_finite(params, gradients.global_norm(params)) and gradients.are_finite(params, None)
    assert all(torch.equal(param.grad, old) for param, old in zip(params, before, strict=True))


def test_strided_and_sparse_gradients():
    param, table = torch.nn.Parameter(torch.zeros(90, 80)), torch.nn.Embedding(10, 3, sparse=True)
    param.grad = torch.randn(80, 90).t()
    table(torch.tensor([1, 1, 4])).sum().backward()
    params = [param, table.weight]
    dense = math.sqrt(float(param.grad.double().square().sum()) + 3 * 2**2 + 3)
    assert gradients.global_norm(params).item() == pytest.approx(dense, rel=1e-6) and gradients.are_finite(params, None)
    param.grad[79, 3] = math.nan
    assert not gradients.are_finite(params, None)


def test_clearing_is_zero_grad():
    params = parameters()
    optimizer = trainopt.SGD(params[:3], lr=0.1)
    gradients.clear(optimizer)
    assert [param.grad is None for param in params] == [True] * 3 + [False] * 2

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            self.called = True

    own = Own(params, lr=0.1)
    gradients.clear(own)
    assert own.called
