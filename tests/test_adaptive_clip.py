"""trainopt.adaptive_clip_grad_, judged by the formula, unit by unit in float64."""

import math

import pytest
import torch

import trainopt

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
SHAPES = [(), (1,), (7,), (4, 5), (1, 1), (6, 3, 2, 2), (0, 3), (3, 0)]


def made(shape, dtype, seed):
    value = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=seed)
    return value.to(dtype)


def clipped(weight, gradient, factor, eps):
    """The formula, for one unit."""
    most, norm = factor * max(weight.norm().item(), eps), gradient.norm().item()
    return gradient * (most / max(norm, 1e-6)) if norm > most else gradient


def expected(weight, gradient, factor, eps):
    kind = torch.complex128 if weight.is_complex() else torch.float64
    weight, gradient = weight.to(kind), gradient.to(kind)
    if weight.dim() < 2:
        return clipped(weight, gradient, factor, eps)
    units = [clipped(w, g, factor, eps) for w, g in zip(weight, gradient, strict=True)]
    return torch.stack(units) if units else gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("factor", "eps"), [(0.01, 1e-3), (1.0, 0.0), (0.7, 2.0)])
def test_the_formula(dtype, factor, eps):
    seed = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(made(shape, dtype, seed)) for shape in SHAPES]
    params.append(torch.nn.Parameter(made((6, 4), dtype, seed).t()))  # strided
    params.append(torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype)))  # weights of 0
    gradients = [made(p.shape, dtype, seed) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
    without = torch.nn.Parameter(torch.ones(2))
    assert trainopt.adaptive_clip_grad_([*params, without], factor, eps) is None
    tolerance = 4 * torch.finfo(dtype).eps
    for p, gradient in zip(params, gradients, strict=True):
        truth = expected(p.detach(), gradient, factor, eps)
        torch.testing.assert_close(p.grad.to(truth.dtype), truth, rtol=tolerance, atol=1e-7 if eps else 1e-12)
    assert without.grad is None


def test_what_is_within_its_limit_keeps_its_bits_and_nan_stays():
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.tensor([[1e-3] * 4, [math.nan, 1, 1, 1], [5.0] * 4])
    before = p.grad.clone()
    trainopt.adaptive_clip_grad_(p, 0.01)
    assert torch.equal(p.grad[0], before[0])
    assert p.grad[1].isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(p.grad[2].norm(), torch.tensor(0.02))


@pytest.mark.parametrize(("factor", "eps"), [(0, 1e-3), (-1, 1e-3), (math.nan, 1e-3), (0.1, -1e-3)])
def test_bad_numbers(factor, eps):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"adaptive_clip_grad_: (clip_factor|eps) must be a finite number"):
        trainopt.adaptive_clip_grad_([p], factor, eps)


def test_a_sparse_gradient_is_refused_before_anything_changes():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2))
    first.grad, second.grad = torch.full((2,), 9.0), torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match=r"gradient of parameter 1 is torch\.sparse_coo"):
        trainopt.adaptive_clip_grad_([first, second])
    assert first.grad.tolist() == [9.0, 9.0]
