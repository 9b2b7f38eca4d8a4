"""linear_cross_entropy on a device: judged against torch in float64 on the CPU, in chunks, without waiting."""

import itertools

import pytest
import torch
from loss_judge import REDUCTIONS, classes, judge, random, run
from losses import on

from trainopt import functional
from trainopt._extension import _C
from trainopt.losses import reference
from trainopt.losses.options import CrossEntropyOptions

WIDTH, WORDS = 12, 37


def problem(tokens=(9,), words=WORDS, width=WIDTH, kind="classes", ignored=None, seed=0):
    """Hidden states, weight, bias in float64, and a target."""
    hidden, weight = random(*tokens, width, seed=seed), random(words, width, seed=seed + 1)
    bias = random(words, seed=seed + 2)
    if kind == "probabilities":
        return hidden, weight, bias, random(*tokens, words, seed=seed + 3).softmax(-1)
    target = classes(tokens, words, seed)
    if ignored is not None:
        target.view(-1)[::3] = ignored
    return hidden, weight, bias, target


def by_logits(hidden, layer, target, linear_bias=None, weight=None, **options):
    """The same in plain torch, with the logits stored."""
    options.pop("memory_budget", None)
    out_dtype = options.pop("out_dtype", None)
    settings = CrossEntropyOptions(**{"ignore_index": None, **options})
    result = reference.linear_cross_entropy(hidden, layer, target, linear_bias, weight, settings, out_dtype)
    return result[0] if settings.z_loss else result


def compare(device, hidden, layer, bias, target, dtype, **options):
    def order(function):
        if bias is None:
            return lambda h, w, t, **given: function(h, w, t, **given)
        return lambda h, w, b, t, **given: function(h, w, t, linear_bias=b, **given)

    judge(
        order(on(device, functional.linear_cross_entropy)),
        order(by_logits),
        [hidden, layer] if bias is None else [hidden, layer, bias],
        dtype,
        options,
        constants=[target],
        roundings=8.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_grid(device, dtype, reduction):
    for kind, with_bias, weighted, extras in itertools.product(
        ("classes", "probabilities"),
        (False, True),
        (False, True),
        ({}, {"label_smoothing": 0.1}, {"z_loss": 0.01, "softcap": 4.0, "empty": "zero", "temperature": 2.0}),
    ):
        hidden, weight, bias, target = problem(kind=kind, ignored=3)
        compare(
            device,
            hidden,
            weight,
            bias if with_bias else None,
            target,
            dtype,
            reduction=reduction,
            ignore_index=3 if kind == "classes" else None,
            weight=random(WORDS, seed=9).abs() if weighted else None,
            memory_budget=4 * WORDS * 4,
            **extras,
        )


@pytest.mark.parametrize("tokens", [(), (1,), (6,), (0,)], ids=str)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_shapes(device, tokens, kind):
    hidden, weight, bias, target = problem(tokens, kind=kind)
    for reduction, dtype in itertools.product(REDUCTIONS, (torch.float32, torch.bfloat16)):
        compare(device, hidden, weight, bias, target, dtype, reduction=reduction, memory_budget=300)


def test_strides(device):
    hidden, weight, bias, target = problem((20,))
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ):
        compare(device, change(hidden), change(weight), bias, target, torch.float32)
        probabilities = change(random(20, WORDS).softmax(-1))
        compare(device, hidden, weight, bias, probabilities, torch.float32, memory_budget=4 * WORDS * 4)


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
