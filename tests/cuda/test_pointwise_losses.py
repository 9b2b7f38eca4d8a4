"""The pointwise losses on the device, judged against torch in float64; and element by element against the CPU engine,
whose bits those have that take no exponential and no logarithm."""

import gc
import itertools
import math
import time

import pytest
import torch
from loss_judge import DTYPES, REDUCTIONS, random
from test_losses_pointwise import LAYOUTS, LOSSES
from torch.nn import functional as F

import trainopt
from trainopt import functional

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
]
each_loss = pytest.mark.parametrize(("function", "make", "options"), LOSSES.values(), ids=LOSSES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

#: Round a thread's eight elements, a block's 2,048, and of several blocks.
SIZES = (0, 1, 7, 8, 9, 255, 2047, 2049, 10_000)


def leaves_of(operands, device=None):
    """Copies with gradients and the same strides."""
    copies = [operand.detach().to(device) if device else operand.detach() for operand in operands]
    return [copy.requires_grad_() for copy in copies]


def elements(function, operands, **options):
    """The loss of each element and the gradients for an upstream of many values, brought here."""
    values = getattr(functional, function)(*operands, reduction="none", **options)
    assert "Pointwise" in values.grad_fn.name()
    upstream = random(*values.shape, seed=5).to(values.dtype).to(values.device)
    return [result.detach() for result in (values, *torch.autograd.grad(values, operands, upstream))]


def assert_same_bits(found, expected, exact=True):
    for mine, cpus in zip(found, expected, strict=True):
        assert mine.dtype == cpus.dtype and mine.stride() == cpus.stride()
        if exact:
            torch.testing.assert_close(mine.cpu(), cpus, rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(mine.cpu(), cpus, equal_nan=True)


def is_exact(device, function, dtype):
    """exp and log are the device's own; in float64 the emulated device has the CPU's."""
    if function in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        return True
    return dtype == torch.float64 and device == "simt"


# Numbers --------------------------------------------------------------------------------------------------------------


@each_loss
@each_dtype
def test_every_element_is_as_on_the_cpu(device, function, make, options, dtype):
    for size in SIZES:
        operands = [operand.to(dtype) for operand in make((size,))]
        found = elements(function, leaves_of(operands, device), **options)
        assert_same_bits(found, elements(function, leaves_of(operands), **options), is_exact(device, function, dtype))


@each_loss
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, ("contiguous", *LAYOUTS))), ids="-".join)
def test_layouts(device, function, make, options, layouts):
    made = [operand.float() for operand in make((3, 4, 5, 6))]

    def laid_out(where):
        changes = [LAYOUTS.get(layout, lambda x: x) for layout in layouts]
        leaves = [change(operand.to(where)).detach() for change, operand in zip(changes, made, strict=True)]
        return [leaf.requires_grad_() for leaf in leaves]

    found, expected = (elements(function, laid_out(where), **options) for where in (device, "cpu"))
    assert_same_bits(found, expected, is_exact(device, function, torch.float32))


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("name", ["mse", "smooth_l1", "kl"])
def test_mixed_dtypes(device, dtypes, name):
    function, make, options = LOSSES[name]
    operands = [operand.to(dtype) for operand, dtype in zip(make((2051,)), dtypes, strict=True)]
    found = elements(function, leaves_of(operands, device), **options)
    exact = is_exact(device, function, found[0].dtype)
    assert_same_bits(found, elements(function, leaves_of(operands), **options), exact)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_has_the_same_bits_however_its_tensors_lie(device, reduction):
    input, target = (operand.float().to(device) for operand in LOSSES["bce with logits"][1]((9001,)))
    expected = functional.binary_cross_entropy_with_logits(input, target, reduction=reduction)
    for change in (LAYOUTS["offset"], LAYOUTS["sliced"]):
        found = functional.binary_cross_entropy_with_logits(change(input), change(target), reduction=reduction)
        assert found.item() == expected.item()


def test_what_is_no_probability_has_a_loss_of_nan_and_is_told_of(device, no_synchronisation):
    input = torch.tensor([0.5, -0.1, 0.0, 1.1, 1.0, math.inf, math.nan], device=device)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0], device=device)
    functional.check_targets()
    with no_synchronisation():
        values = functional.binary_cross_entropy(input, target, reduction="none")
    assert values.cpu().isnan().tolist() == [False, True, False, True, False, True, True]
    message = "all elements of input should be between 0 and 1 .found by an earlier binary_cross_entropy on"
    with pytest.raises(RuntimeError, match=message):
        functional.binary_cross_entropy(target, target)
    assert not functional.binary_cross_entropy(target, target).isnan()  # told of once
    assert functional.binary_cross_entropy(input, target).isnan()
    with pytest.raises(RuntimeError, match=message):
        functional.check_targets()
    functional.check_targets()


def test_a_target_that_is_no_probability_has_a_loss_of_nan_and_is_told_of(device):
    input = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.5, 0.5], device=device)
    target = torch.tensor([1.0, 0.0, 1.0, -0.1, 7.5, math.nan], device=device)
    values = functional.binary_cross_entropy(input, target, reduction="none")
    assert values.cpu().isnan().tolist() == [False, False, False, True, True, True]
    message = "all elements of target should be between 0 and 1 .found by an earlier binary_cross_entropy on"
    with pytest.raises(RuntimeError, match=message):
        functional.check_targets()
    functional.binary_cross_entropy(input + 1, target, torch.zeros(6, device=device)).item()  # waits
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        functional.check_targets()
    functional.check_targets()


@each_loss
def test_more_dimensions_than_the_engine_has(device, function, make, options):
    first, second = (operand.float() for operand in make((2, 1, 3) + (2,) * 6))
    operands = [first.permute(*range(8, -1, -1)), second.permute(*range(0, 9, 2), *range(1, 9, 2))]
    operands[1] = operands[1].reshape(operands[0].shape)
    found, expected = (elements(function, leaves_of(operands, where), **options) for where in (device, "cpu"))
    assert_same_bits(found, expected, is_exact(device, function, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [1e-300, 1e-39, 1e39, 1e300])
def test_betas_and_deltas_that_another_type_does_not_have(device, dtype, number):
    input = torch.tensor([0.0, 1e-20, 1e-3, 2.0, -3.0, 6e4, -1e15], dtype=torch.float64).to(dtype)
    for function, option in (("smooth_l1_loss", "beta"), ("huber_loss", "delta")):
        operands = [input, torch.zeros_like(input)]
        found = elements(function, leaves_of(operands, device), **{option: number})
        assert_same_bits(found, elements(function, leaves_of(operands), **{option: number}))


# Autograd -------------------------------------------------------------------------------------------------------------


@each_loss
def test_whatever_comes_from_above(device, function, make, options):
    operands = [operand.float() for operand in make((3, 700))]
    factors = random(3, 700, seed=6).float()

    def gradients(where, of):
        leaves = leaves_of(operands, where)
        losses = {
            reduction: getattr(functional, function)(*leaves, reduction=reduction, **options)
            for reduction in REDUCTIONS
        }
        return [gradient.cpu() for gradient in torch.autograd.grad(of(losses, factors.to(where)), leaves)]

    for of in (
        lambda losses, w: 3 * losses["mean"],
        lambda losses, w: (w * losses["none"]).sum(),
        lambda losses, w: losses["none"].sum(),
        lambda losses, w: losses["none"].sum(1)[0] + losses["sum"] * 0.5,
        lambda losses, w: losses["none"].mean(0).mul(w[0]).sum(),
        lambda losses, w: losses["sum"].to(torch.float16),
    ):
        for mine, cpus in zip(gradients(device, of), gradients("cpu", of), strict=True):
            torch.testing.assert_close(mine, cpus, rtol=1e-6, atol=1e-6, equal_nan=True)


@each_loss
def test_two_backward_passes_through_one_graph(device, function, make, options):
    leaves = leaves_of([operand.float() for operand in make((2051,))], device)
    loss = getattr(functional, function)(*leaves, **options)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, grad_outputs=torch.full((), 2.0, device=device))
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(two.cpu(), 2 * one.cpu(), equal_nan=True)


@each_loss
def test_a_gradient_can_be_differentiated_again(device, function, make, options):
    def second(function, where, dtype):
        leaves = leaves_of([operand.to(dtype) for operand in make((40,))], where)
        first = torch.autograd.grad(function(*leaves, **options), leaves, create_graph=True)
        total = sum((gradient * gradient).sum() for gradient in first)
        found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None, None)
        return [None if gradient is None else gradient.cpu().double() for gradient in (*first, *found)]

    found = second(getattr(functional, function), device, torch.float64)
    for mine, true in zip(found, second(getattr(F, function), None, torch.float64), strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            torch.testing.assert_close(mine.detach(), true.detach(), equal_nan=True)


def test_only_the_gradients_that_are_wanted(device):
    input, target = (operand.float().to(device) for operand in LOSSES["mse"][1]((100,)))
    for wanted in ((True, False), (False, True)):
        leaves = [operand.clone().requires_grad_(w) for operand, w in zip((input, target), wanted, strict=True)]
        functional.mse_loss(*leaves).backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    with torch.no_grad():
        assert not functional.mse_loss(*leaves).requires_grad


def test_autocast_computes_in_float32(device):
    input, target = (operand.bfloat16().to(device) for operand in LOSSES["mse"][1]((100,)))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = functional.mse_loss(input.requires_grad_(), target)
    assert found.dtype == torch.float32 and "Pointwise" not in F.mse_loss(input, target).grad_fn.name()
    torch.testing.assert_close(found.cpu(), F.mse_loss(input.cpu().float(), target.cpu().float()))
    assert torch.autograd.grad(found, input)[0].dtype == torch.bfloat16


@pytest.mark.gpu
def test_autocast_refuses_what_torchs_refuses():
    input, target = (operand.float().cuda() for operand in LOSSES["bce"][1]((100,)))
    with torch.autocast("cuda"), pytest.raises(RuntimeError, match="unsafe to autocast"):
        functional.binary_cross_entropy(input, target)


# The device -----------------------------------------------------------------------------------------------------------


def step(function, leaves, reduction, options):
    values = getattr(functional, function)(*leaves, reduction=reduction, **options)
    return torch.autograd.grad(values, leaves, torch.ones_like(values))


@each_loss
def test_nothing_waits_for_the_device(device, function, make, options, no_synchronisation):
    for size, reduction in itertools.product((5, 5000), REDUCTIONS):
        leaves = leaves_of([operand.float() for operand in make((size,))], device)
        with no_synchronisation():
            step(function, leaves, reduction, options)


def test_memory_is_for_the_results_alone(device, allocations):
    input, target = (operand.float().to(device) for operand in LOSSES["mse"][1]((5000,)))
    upstream, leaf = torch.ones((), device=device), input.clone().requires_grad_()
    for _ in range(3):
        before = allocations()
        loss = functional.mse_loss(leaf, target)
        forward = allocations() - before
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        assert (forward, allocations() - before) == (2, 3)  # the loss and its partial sums; the gradient
        del loss, gradient


@each_loss
def test_memory_is_flat(device, function, make, options, allocated):
    leaves = leaves_of([operand.float() for operand in make((5000,))], device)
    gc.collect()
    before = allocated()
    for _ in range(20):
        step(function, leaves, "mean", options)
        for _ in range(1000):  # autograd's own thread lets go of a gradient a moment after the step
            if allocated() == before:
                break
            time.sleep(1e-3)
        assert allocated() == before


def test_a_small_sum_is_one_launch_and_a_large_one_two(device):
    if device != "simt":
        pytest.skip("counts the emulated device's launches")
    simt = trainopt._extension._C.simt
    for size, blocks in ((2048, [1]), (2049, [2, 1]), (10_000, [5, 1])):
        input, target = torch.ones(size, device=device), torch.zeros(size, device=device)
        simt.take_launches()
        functional.mse_loss(input, target)
        assert simt.take_launches() == blocks
        functional.mse_loss(input, target, reduction="none")
        assert simt.take_launches() == blocks[:1]


def test_on_a_device_that_is_not_the_current_one(other_device):
    input, target = (operand.float().to(other_device) for operand in LOSSES["mse"][1]((5000,)))
    (gradient,) = step("mse_loss", [input.requires_grad_()], "mean", {"target": target})
    assert gradient.device == torch.device(other_device)
    torch.testing.assert_close(gradient.cpu(), 2 * (input - target).detach().cpu() / 5000)


def test_tensors_of_two_devices_go_to_torch(device):
    input, target = (operand.float() for operand in LOSSES["mse"][1]((10,)))
    with pytest.raises(RuntimeError):
        F.mse_loss(input.to(device), target)
    with pytest.raises(RuntimeError):
        functional.mse_loss(input.to(device), target)
    with pytest.raises(RuntimeError, match="target is on cpu and input on"):
        torch.ops.trainopt.pointwise_loss("mse_loss", input.to(device), target, None, None, 1, 0.0)


def test_a_graph_can_capture_it(device):
    leaves = leaves_of([operand.float() for operand in LOSSES["bce with logits"][1]((5000,))], device)
    arguments = ("binary_cross_entropy_with_logits", leaves, "mean", {})
    expected = [gradient.cpu() for gradient in step(*arguments)]
    if device == "simt":
        trainopt._extension._C.simt.set_capturing(True)
        found = step(*arguments)
        trainopt._extension._C.simt.set_capturing(False)
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(*arguments)
        graph.replay()
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), true)
