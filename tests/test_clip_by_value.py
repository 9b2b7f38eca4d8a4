"""Clipping that computes no norm: clip_grad_value_, by value, and clip_grads_with_norm_, by a norm that is known."""

import math

import pytest
import torch
from clipping import DTYPES, copy_of, gradients, make_parameters
from helpers import attempt
from torch.nn.utils import clip_grad_value_ as torch_clip_value
from torch.nn.utils import clip_grads_with_norm_ as torch_clip_by

import trainopt


@pytest.mark.parametrize("foreach", (None, True, False))
@pytest.mark.parametrize("limit", (0, 0.3, 0.25, 1e4, 1e5, 1e300, math.inf, -0.5, math.nan, "x", None))
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_by_value_is_torchs(dtype, limit, foreach, variant):
    params = make_parameters(dtype=dtype)
    params[8].grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    params.append(make_parameters(((64, 300),), dtype)[0])
    params[-1].grad = params[-1].grad.t().contiguous().t()
    theirs, versions = copy_of(params), [g._version for g in gradients(params)]
    ours = attempt(lambda: trainopt.clip_grad_value_(params, limit, foreach))
    assert ours == attempt(lambda: torch_clip_value(theirs, limit, foreach))
    for mine, torchs in zip(gradients(params), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=0, equal_nan=True)
    if ours is None:
        assert all(g._version > version for g, version in zip(gradients(params), versions, strict=True))


@pytest.mark.parametrize("foreach", (None, True, False))
@pytest.mark.parametrize("norm", (8.0, 1.0, 0.0, math.inf, math.nan))
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_by_a_known_norm_is_torchs(dtype, norm, foreach):
    for total in (torch.tensor(norm), torch.tensor(norm).double(), torch.tensor(norm).to(dtype)):
        params = make_parameters(dtype=dtype)
        theirs = copy_of(params)
        assert trainopt.clip_grads_with_norm_(params, 2, total, foreach) is None
        torch_clip_by(theirs, 2, total, foreach)
        for mine, torchs in zip(gradients(params), gradients(theirs), strict=True):
            # torch rounds the factor to the norm's dtype, and to the gradients'.
            torch.testing.assert_close(mine, torchs, rtol=4 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("total", (2.0, "x", None, torch.tensor([8.0]), torch.ones(2), torch.tensor(8)), ids=str)
def test_a_known_norm_that_is_no_number_is_torchs_to_refuse(total):
    params = make_parameters()
    theirs = copy_of(params)
    assert attempt(lambda: trainopt.clip_grads_with_norm_(params, 2, total)) == attempt(
        lambda: torch_clip_by(theirs, 2, total)
    )
    for mine, torchs in zip(gradients(params), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_a_known_norm_is_read_as_it_is():
    """A factor of 1/3 is rounded once, with the product; torch rounds it to bfloat16 before."""
    param = make_parameters(((300,),), torch.bfloat16)[0]
    before = param.grad.double()
    trainopt.clip_grads_with_norm_(param, 1.0, torch.tensor(3.0, dtype=torch.float64, requires_grad=True))
    assert torch.equal(param.grad, (before / (3 + 1e-6)).bfloat16())


@pytest.mark.parametrize("clip", ("clip_grad_value_", "clip_grads_with_norm_"))
@pytest.mark.parametrize("kind", ("sparse", "complex", "shared", "none", "generator"))
def test_other_clipping_of_what_the_module_does_not_take(kind, clip):
    def run(function):
        params = make_parameters(((4, 3), (5,)))
        if kind == "sparse":
            params[0].grad = params[0].grad.to_sparse()
        elif kind == "complex":
            params[0] = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
            params[0].grad = torch.ones(3, dtype=torch.complex64)
        elif kind == "shared":
            params[1].grad = params[0].grad.flatten()[:5]
        elif kind == "none":
            params = [torch.nn.Parameter(torch.ones(3))]
        given = (p for p in params) if kind == "generator" else params
        more = (torch.tensor(4.0),) if clip == "clip_grads_with_norm_" else ()
        error = attempt(lambda: function(given, 0.5, *more))
        return error, [g.to_dense() for g in gradients(params)]

    if kind == "none":
        assert run(getattr(trainopt, clip)) == (None, [])
    (error, mine), (torchs_error, theirs) = run(getattr(trainopt, clip)), run(getattr(torch.nn.utils, clip))
    if kind != "none":  # torch's clip_grad_value_ has an internal error there
        assert error == torchs_error
    torch.testing.assert_close(mine, theirs)
