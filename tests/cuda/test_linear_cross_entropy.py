"""linear_cross_entropy on a device: judged against torch in float64 on the CPU, in chunks, without waiting."""

import pytest
import torch
from loss_judge import REDUCTIONS, on, random, run
from test_losses_linear import WORDS, by_logits, problem

from trainopt import functional
from trainopt._extension import _C


def test_every_token_ignored(device):
    hidden, weight, bias, target = problem()
    target.fill_(-100)
    for dtype in (torch.float32, torch.bfloat16):
        operands = [tensor.to(dtype) for tensor in (hidden, weight, bias)]
        loss, *found = run(
            lambda h, w, b: on(device, functional.linear_cross_entropy)(h, w, target, linear_bias=b), operands
        )
        assert loss.isnan() and all(gradient.eq(0).all() for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_as_good_in_many_chunks(device, dtype):
    hidden, weight, _, target = problem((512,), 40, 24)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    truth = run(lambda h, w: by_logits(h, w, target), [hidden.double(), weight.double()])[2]
    torchs = (run(lambda h, w: by_logits(h, w, target), [hidden, weight])[2].double() - truth).abs().max()
    slack = 4 * torch.finfo(torch.float32).eps * truth.abs().max()  # sums that are grouped otherwise
    for chunks in (1, 8, 512):
        budget = -(-512 // chunks) * 40 * (2 if dtype == torch.bfloat16 else 4)
        ours = on(device, lambda h, w, t, b=budget: functional.linear_cross_entropy(h, w, t, memory_budget=b))
        found = run(lambda h, w, f=ours: f(h, w, target), [hidden, weight])[2]
        assert (found.double() - truth).abs().max() <= 1.5 * torchs + slack


def test_float16_gradients_keep_the_scale_of_the_loss(device):
    hidden, weight, _, target = problem((300,), 40, 24)
    hidden, weight = (1e-3 * hidden).half(), (1e-3 * weight).half()

    def scaled(function):
        return lambda h, w: 16384 * function(h, w, target).float()

    ours = run(scaled(on(device, functional.linear_cross_entropy)), [hidden, weight])
    truth = run(lambda h, w: 16384 * by_logits(h, w, target), [hidden.double(), weight.double()])
    for found, exact in zip(ours[1:], truth[1:], strict=True):
        assert (found.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_upstream_gradients(device):
    hidden, weight, bias, target = problem((10,))
    weights = random(10, seed=7)
    for scaled in (
        lambda f: lambda h, w, b: 3 * f(h, w, target, linear_bias=b),
        lambda f: lambda h, w, b: (weights * f(h, w, target, linear_bias=b, reduction="none")).sum(),
        lambda f: lambda h, w, b: f(h, w, target, linear_bias=b, reduction="none").sum(),
        lambda f: lambda h, w, b: f(h, w, target, linear_bias=b, reduction="sum").square(),
    ):
        operands = [hidden, weight, bias]
        ours = run(scaled(on(device, functional.linear_cross_entropy)), operands)
        for mine, theirs in zip(ours, run(scaled(by_logits), operands), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(device, dtype, reduction):
    hidden, weight, _, target = (tensor.to(device) for tensor in problem())
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = functional.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    first = [gradient.cpu() for gradient in first]
    for once, again in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(once, again.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_waits_for_the_device(device, no_synchronisation, dtype, reduction):
    hidden, weight, bias, target = (
        tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device) for tensor in problem((20,))
    )
    class_weight = random(WORDS).abs().to(device, dtype)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "memory_budget": 8 * WORDS * 4}
    functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias, weight=class_weight, **options)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    with no_synchronisation():
        loss = functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias, weight=class_weight, **options)
        torch.autograd.grad(loss, (hidden, weight, bias), torch.empty_like(loss))


def test_no_graph_gives_the_same_loss(device):
    hidden, weight, bias, target = (tensor.to(device) for tensor in problem())
    hidden.requires_grad_()
    with torch.no_grad():
        without = functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias)
    assert not without.requires_grad
    assert torch.equal(
        without.cpu(), functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias).detach().cpu()
    )


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, lower):
    hidden, weight, bias, target = (t.float() if t.is_floating_point() else t for t in problem((40,)))

    def ours(h, w, b):
        with torch.autocast(device, dtype=lower):
            return functional.linear_cross_entropy(h, w, target.to(device), linear_bias=b)

    found = run(on(device, ours), [hidden, weight, bias])
    rounded = [hidden.to(lower).double(), weight.to(lower).double(), bias.double()]
    truth = run(lambda h, w, b: by_logits(h, w, target, linear_bias=b), rounded)
    # The products' operands are rounded once; the loss is not.
    for mine, exact, unit in zip(found, truth, (1e-6, *3 * [2 * torch.finfo(lower).eps]), strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - exact).abs().max() <= unit * exact.abs().max()


def test_a_bad_target_is_told_of_with_its_place_among_all(device):
    hidden, weight, _, target = (tensor.to(device) for tensor in problem((20,)))
    target[13], target[16] = WORDS, -5
    weight.requires_grad_()
    loss = functional.linear_cross_entropy(hidden, weight, target, memory_budget=3 * WORDS * 8)
    assert loss.isnan()
    with pytest.raises(IndexError, match=rf"target {WORDS} at position \(13\) is out of range for {WORDS} classes"):
        functional.check_targets()
    each = functional.linear_cross_entropy(hidden, weight, target, reduction="none")
    assert each.detach().cpu().isnan().sum() == 2
    with pytest.raises(IndexError):
        functional.check_targets()


@pytest.mark.skipif("simt" not in _C.device_types(), reason="cuBLAS takes memory of its own")
def test_the_logits_of_all_tokens_never_exist(device):
    hidden, weight, _, target = (tensor.to(device) for tensor in problem((2000,), 500, 4))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    memory = torch.get_device_module(device)
    memory.reset_peak_memory_stats()
    before = memory.max_memory_allocated()
    functional.linear_cross_entropy(hidden, weight, target, memory_budget=100 * 500 * 4).backward()
    assert memory.max_memory_allocated() - before < 2000 * 500 * 4 / 4


def test_compiled(device):
    hidden, weight, bias, target = problem()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(h, w, t, b):
        return functional.linear_cross_entropy(2 * h, w, t, linear_bias=b, label_smoothing=0.1)

    found = run(on(device, lambda h, w, b, t: loss(h, w, t, b)), [hidden, weight, bias, target])
    expected = run(
        lambda h, w, b, t: by_logits(2 * h, w, t, linear_bias=b, label_smoothing=0.1), [hidden, weight, bias, target]
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
