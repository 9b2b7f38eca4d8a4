"""Clipping on the device: the norm against float64, what becomes of the gradients, and that nothing waits."""

import math

import pytest
import torch
from clipping import (
    DTYPES,
    EXTREMES,
    ORDERS,
    SHAPES,
    assert_clipped,
    copy_of,
    exact_norm,
    gradients,
    make_extreme,
    make_parameters,
    returned,
)
from helpers import error_of
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import clip_grad_value_ as torch_clip_value
from torch.nn.utils import clip_grads_with_norm_ as torch_clip_by
from torch.nn.utils import get_total_norm as torch_norm

import trainopt
from trainopt._extension import _C
from trainopt.training import gradients as training

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_order = pytest.mark.parametrize("order", ORDERS)


def moved(params, device):
    """The same parameters and gradients there."""
    there = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]
    for copy, param in zip(there, params, strict=True):
        copy.grad = None if param.grad is None else param.grad.to(device, copy=True)
    return there


def here(params):
    return [g.cpu() for g in gradients(params)]


def tolerance(dtype):
    """Of a norm: rounded once, and below float64 eight elements at a time are summed in float32."""
    return 1e-13 if dtype == torch.float64 else 2e-7


@each_order
@each_dtype
def test_the_norm_is_that_of_float64(device, dtype, order):
    params = moved(make_parameters(dtype=dtype, scale=0.1), device)
    found = trainopt.get_total_norm(gradients(params), order)
    exact = exact_norm(here(params), order)
    assert found.dtype == returned(dtype) and found.shape == () and found.device == params[0].device
    assert float(found) == pytest.approx(exact, rel=tolerance(dtype))
    assert torch.equal(trainopt.get_total_norm(gradients(params), order), found)


@each_order
@each_dtype
def test_clipped_gradients_are_those_of_float64(device, dtype, order):
    params = moved(make_parameters(dtype=dtype), device)
    before = [g.double() for g in here(params)]
    exact = exact_norm(before, order)
    trainopt.clip_grad_norm_(params, exact / 3, order)
    eps = torch.finfo(dtype).eps
    for old, new in zip(before, here(params), strict=True):
        wanted = old * (exact / 3 / (exact + 1e-6))
        roundings = 4 * eps if dtype == torch.float64 else eps / 2 + 4e-7
        bound = roundings * wanted.abs() + (torch.finfo(dtype).smallest_normal * eps if dtype == torch.float16 else 0)
        assert bool(((new.double() - wanted).abs() <= bound).all())


@each_order
@pytest.mark.parametrize("kind", EXTREMES)
def test_gradients_at_the_ends_of_their_dtype(device, kind, order):
    dtype, scales, limit = EXTREMES[kind]
    params = moved(make_extreme(dtype, scales), device)
    before = here(params)
    exact = exact_norm(before, order)
    found = trainopt.clip_grad_norm_(params, limit, order)
    wanted = float(torch.tensor(exact, dtype=found.dtype))
    assert float(found) == pytest.approx(wanted, rel=1e-12 if dtype == torch.float64 else 3e-7, abs=5e-324)
    for old, new in zip(before, here(params), strict=True):
        assert_clipped(old, new, exact, limit)


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("scale", (1e200, 1e-200))
def test_what_is_not_finite_reaches_the_norm_of_scaled_squares(device, scale, bad):
    for place in (0, 7, 299, 16_384):
        gradient = torch.full((16_400,), scale, dtype=torch.float64)
        gradient[place] = bad
        found = float(trainopt.get_total_norm([gradient.to(device), torch.zeros(5, device=device)]))
        assert found == math.inf if math.isinf(bad) else math.isnan(found)


@each_dtype
def test_below_the_limit_nothing_changes(device, dtype):
    params = moved(make_parameters(dtype=dtype), device)
    before = here(params)
    assert float(trainopt.clip_grad_norm_(params, 1e4)) < 1e4
    assert all(torch.equal(a, b) for a, b in zip(before, here(params), strict=True))


@each_dtype
@pytest.mark.parametrize("limit", (0, 0.3, 1e4))
def test_clipping_by_value(device, dtype, limit, no_synchronisation):
    params = make_parameters(dtype=dtype)
    params[8].grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    params[9].grad = params[9].grad.repeat(2)[::2]
    mine = moved(params, device)
    with no_synchronisation():
        trainopt.clip_grad_value_(mine, limit)
    torch_clip_value(params, limit)
    for found, exact in zip(here(mine), gradients(params), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("norm", (8.0, 1.0, math.nan))
def test_clipping_by_a_known_norm(device, dtype, norm):
    params = make_parameters(dtype=dtype)
    for total in (torch.tensor(norm), torch.tensor(norm, device=device), torch.tensor(norm, device=device).double()):
        mine, theirs = moved(params, device), copy_of(params)
        trainopt.clip_grads_with_norm_(mine, 2, total)
        torch_clip_by(theirs, 2, total.cpu().double())
        for found, exact in zip(here(mine), gradients(theirs), strict=True):
            torch.testing.assert_close(found, exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("order", (0.5, 1, 2, 3, "inf", math.inf, -math.inf, 0))
def test_it_does_what_torch_does(device, order):
    params = make_parameters([shape for shape in SHAPES if shape != (0,)])
    mine, theirs = moved(params, device), copy_of(params)
    # torch's own norm of order 1/2 differs by 2e-6 between a GPU and the CPU.
    torch.testing.assert_close(
        trainopt.clip_grad_norm_(mine, 2, norm_type=order).cpu(),
        torch_clip(theirs, 2, norm_type=order),
        rtol=1e-5,
        atol=0,
    )
    for a, b in zip(here(mine), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_many_small_gradients(device):
    params = make_parameters([(i % 13,) for i in range(1500)])
    mine = moved(params, device)
    exact = exact_norm(gradients(params), 2.0)
    assert float(trainopt.clip_grad_norm_(mine, exact / 2)) == pytest.approx(exact, rel=1e-6)
    assert exact_norm(here(mine), 2.0) == pytest.approx(exact / 2, rel=1e-6)


def test_mixed_dtypes_and_missing_gradients(device):
    params = [p for dtype in DTYPES for p in make_parameters(((7,), (300,)), dtype)]
    params[3].grad = None
    mine, theirs = moved(params, device), copy_of(params)
    ours, torchs = trainopt.clip_grad_norm_(mine, 3.0), torch_clip(theirs, 3.0)
    assert ours.dtype == torchs.dtype == torch.float64
    assert float(ours) == pytest.approx(exact_norm(gradients(params), 2.0), rel=1e-6)
    assert exact_norm(here(mine), 2.0) == pytest.approx(3.0, rel=1e-3)
    assert mine[3].grad is None


def test_strided_gradients(device):
    values = torch.randn(6, 8, 10, 4)
    for view_of in (
        lambda v: v.permute(3, 1, 0, 2),
        lambda v: v[:, ::2],
        lambda v: v[1:, :, 3],
        lambda v: v.contiguous(memory_format=torch.channels_last),
    ):
        there = values.to(device)
        view = view_of(there)
        param = torch.nn.Parameter(torch.zeros(view.shape, device=device))
        param.grad = view
        before = view.cpu().double()
        exact = exact_norm([before], 2.0)
        assert float(trainopt.clip_grad_norm_([param], exact / 2)) == pytest.approx(exact, rel=1e-6)
        torch.testing.assert_close(param.grad.cpu().double(), before * (exact / 2 / (exact + 1e-6)), rtol=1e-6, atol=0)
        if view._base is not None:
            assert int((there.cpu() != values).sum()) == view.numel()


@each_order
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_reaches_norm_and_gradients(device, bad, order):
    for place in (0, 17, 16384, 20000):
        params = make_parameters(((20001,), (5,)))
        params[0].grad[place] = bad
        mine = moved(params, device)
        ours, torchs = trainopt.clip_grad_norm_(mine, 1.0, order), torch_clip(params, 1.0, order)
        torch.testing.assert_close(ours.cpu(), torchs, equal_nan=True)
        for a, b in zip(here(mine), gradients(params), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_error_if_nonfinite_is_torchs_and_changes_nothing(device):
    params = make_parameters()
    params[5].grad[3] = math.inf
    mine = moved(params, device)
    before = here(mine)
    ours = error_of(lambda: trainopt.clip_grad_norm_(mine, 1.0, error_if_nonfinite=True))
    assert ours == error_of(lambda: torch_clip(params, 1.0, error_if_nonfinite=True))
    for a, b in zip(here(mine), before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


# What torch takes care of ---------------------------------------------------------------------------------------------


def test_gradients_of_several_devices(device, other_device):
    params = make_parameters(((7,), (300,), (40, 5)))
    for where in ((device, "cpu", device), ("cpu", device, other_device), (other_device, device, device)):
        mine = [moved([p], there)[0] for p, there in zip(params, where, strict=True)]
        norm = trainopt.clip_grad_norm_(mine, 2.0)
        assert norm.device == mine[0].grad.device
        assert float(norm) == pytest.approx(exact_norm(gradients(params), 2.0), rel=1e-6)
        assert exact_norm(here(mine), 2.0) == pytest.approx(2.0, rel=1e-5)
        assert float(trainopt.get_total_norm(gradients(mine))) == pytest.approx(2.0, rel=1e-5)


def test_gradients_that_share_memory_are_scaled_one_after_the_other(device):
    gradient = torch.randn(1000, device=device)
    params = [torch.nn.Parameter(torch.zeros(1000, device=device)) for _ in range(2)]
    for p in params:
        p.grad = gradient
    before = gradient.cpu().double()
    exact = exact_norm([before, before], 2.0)
    trainopt.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(gradient.cpu().double(), before * (1 / (exact + 1e-6)) ** 2, rtol=1e-5, atol=0)


def test_an_expanded_gradient_is_torchs_error(device):
    param = torch.nn.Parameter(torch.zeros(4, 5, device=device))
    param.grad = torch.ones(5, device=device).expand(4, 5)
    assert float(trainopt.get_total_norm([param.grad])) == pytest.approx(math.sqrt(20))
    with pytest.raises(RuntimeError, match="single memory location"):
        trainopt.clip_grad_norm_([param], 1.0)


# The device -----------------------------------------------------------------------------------------------------------


@each_order
def test_nothing_waits_for_the_device(device, order, no_synchronisation):
    params = moved(make_parameters(), device)
    versions = [g._version for g in gradients(params)]
    with no_synchronisation():
        norm = trainopt.clip_grad_norm_(params, 1.0, order)
        trainopt.get_total_norm(gradients(params), order)
    assert norm.device == params[0].device
    # The host does not know whether they were written to.
    assert all(g._version > v for g, v in zip(gradients(params), versions, strict=True))


def test_launches_and_memory(device, allocations):
    params = moved(make_parameters(((5000,), (40_000,), (3,))), device)
    before = allocations()
    trainopt.clip_grad_norm_(params, 1.0)
    once = allocations() - before
    assert once == 3  # the norm, exact and rounded, and its sums
    if device == "simt":
        _C.simt.take_launches()
        trainopt.clip_grad_norm_(params, 1.0)
        assert _C.simt.take_launches() == [5, 1, 5]  # one launch each, for chunks of 64 KB: sums, norm, clip


def test_a_graph_can_capture_it(device):
    params = make_parameters(((5000,), (40,)))
    mine, exact = moved(params, device), exact_norm(gradients(params), 2.0)
    if device == "simt":
        _C.simt.set_capturing(True)
        norm = trainopt.clip_grad_norm_(mine, 1.0)
        _C.simt.set_capturing(False)
    else:
        kept = [g.clone() for g in gradients(mine)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            trainopt.clip_grad_norm_(mine, 1e9)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm = trainopt.clip_grad_norm_(mine, 1.0)
        for _ in range(2):
            for g, value in zip(gradients(mine), kept, strict=True):
                g.copy_(value)
            graph.replay()
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    assert exact_norm(here(mine), 2.0) == pytest.approx(1.0, rel=1e-5)


def test_on_a_device_that_is_not_the_current_one(other_device):
    params = moved(make_parameters(), other_device)
    exact = exact_norm(here(params), 2.0)
    norm = trainopt.clip_grad_norm_(params, 1.0)
    assert norm.device == torch.device(other_device) and float(norm) == pytest.approx(exact, rel=1e-6)
    assert exact_norm(here(params), 2.0) == pytest.approx(1.0, rel=1e-5)


# The training loop's gradients ----------------------------------------------------------------------------------------


def test_the_training_loop_measures_and_clips_without_waiting(device, no_synchronisation):
    params = moved(make_parameters(), device)
    exact = exact_norm(here(params), 2.0)
    with no_synchronisation():
        norm = training.global_norm(params)
        training.clip(params, 1.0, norm)
    assert norm.dtype == torch.float64 and norm.device == params[0].device
    assert float(norm) == pytest.approx(exact, rel=1e-7)
    assert exact_norm(here(params), 2.0) == pytest.approx(1.0, rel=1e-5)


def test_the_training_loop_finds_what_is_not_finite(device):
    params = moved(make_parameters(), device)
    assert training.are_finite(params, None) and training.are_finite(params, training.global_norm(params))
    params[5].grad[2] = math.nan
    assert not training.are_finite(params, None) and not training.are_finite(params, training.global_norm(params))


def test_the_training_loop_takes_gradients_of_several_devices(device):
    params = make_parameters(((7,), (300,)))
    mine = moved(params[:1], device) + copy_of(params[1:])
    norm = training.global_norm(mine)
    assert float(norm) == pytest.approx(exact_norm(gradients(params), 2.0), rel=1e-6)
    training.clip(mine, 1.0, norm)
    assert exact_norm(here(mine), 2.0) == pytest.approx(1.0, rel=1e-5)
    assert float(torch_norm(gradients(mine))) == pytest.approx(1.0, rel=1e-5)
