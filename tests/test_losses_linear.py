"""linear_cross_entropy: the judge, the number of chunks, and the work that is not done."""

import itertools
from functools import partial

import pytest
import torch
from loss_judge import REDUCTIONS, assert_no_worse, classes, judge, on, random, run
from torch.nn import functional as F

from trainopt import functional
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


def compare(device, hidden, layer, bias, target, dtype, roundings=8.0, **options):
    def order(function):
        if bias is None:
            return lambda h, w, t, **given: function(h, w, t, **given)
        return lambda h, w, b, t, **given: function(h, w, t, linear_bias=b, **given)

    operands = [hidden, layer] if bias is None else [hidden, layer, bias]
    judge(
        order(on(device, functional.linear_cross_entropy)),
        order(by_logits),
        operands,
        dtype,
        options,
        constants=[target],
        roundings=roundings,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_grid(device, dtype, reduction):
    for kind, with_bias, weighted, smoothing, extras in itertools.product(
        ("classes", "probabilities"),
        (False, True),
        (False, True),
        (0.0, 0.1),
        (
            {},
            {"z_loss": 0.01, "softcap": 4.0, "empty": "zero"},
            {"temperature": 0.5},
            {"temperature": 3.0, "softcap": 4.0},
        ),
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
            label_smoothing=smoothing,
            weight=random(WORDS, seed=9).abs() if weighted else None,
            memory_budget=4 * WORDS * 4,
            **extras,
        )


@pytest.mark.parametrize("tokens", [(), (1,), (5,), (0,)], ids=str)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_shapes(device, tokens, kind):
    hidden, weight, bias, target = problem(tokens, kind=kind)
    for reduction, dtype in itertools.product(REDUCTIONS, (torch.float32, torch.bfloat16)):
        compare(device, hidden, weight, bias, target, dtype, reduction=reduction, memory_budget=300)


def test_strides(device):
    hidden, weight, bias, target = problem((20,))
    layouts = (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.repeat_interleave(2, -1)[..., ::2])
    for change in layouts:
        compare(device, change(hidden), change(weight), bias, target, torch.float32)
    compare(device, hidden, weight, bias[:1].expand(WORDS), target.repeat_interleave(2)[::2], torch.float32)
    probabilities = random(20, 2 * WORDS).softmax(-1)[..., ::2]
    compare(device, hidden, weight, bias, probabilities, torch.float32, memory_budget=4 * WORDS * 4)


def gradient_error(chunks, dtype, tokens=1024, words=40, width=24):
    """The error of the weight's gradient, relative to its largest element, and torch's without chunks."""
    hidden, weight, _, target = problem((tokens,), words, width)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    budget = -(-tokens // chunks) * words * 4

    def gradient(function, *operands, **options):
        return run(lambda h, w: function(h, w, target, **options), operands)[2].double()

    truth = gradient(by_logits, hidden.double(), weight.double())
    ours = gradient(functional.linear_cross_entropy, hidden, weight, memory_budget=budget)
    torchs = gradient(by_logits, hidden, weight)
    scale = truth.abs().max()
    return ((ours - truth).abs().max() / scale).item(), ((torchs - truth).abs().max() / scale).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_as_good_from_1_to_1024_chunks(dtype):
    found = [gradient_error(chunks, dtype) for chunks in (1, 2, 16, 128, 1024)]
    one, torchs = found[0]
    assert one <= 1.5 * torchs
    # float32 sums of 1024 terms round a little differently in each grouping; bfloat16's own rounding hides that.
    for error, _ in found:
        assert error <= max(1.5 * torchs, one + 4 * torch.finfo(torch.float32).eps)


def test_accumulation_in_bfloat16_would_be_found():
    """The check above can fail: a sum over chunks that is rounded to bfloat16 each time is far off."""
    hidden, weight, _, target = problem((1024,), 40, 24)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    truth = run(lambda h, w: by_logits(h, w, target), [hidden.double(), weight.double()])[2]
    sum_ = torch.zeros_like(weight)
    for h, t in zip(hidden.split(4), target.split(4), strict=True):
        sum_ += run(lambda h, w, t=t: by_logits(h, w, t, reduction="sum"), [h, weight])[2]
    error = (sum_.double() / 1024 - truth).abs().max() / truth.abs().max()
    assert error > 1.5 * gradient_error(1, torch.bfloat16)[1]


# Work that nobody needs -----------------------------------------------------------------------------------------------


def products(of_input, of_weight, reduction, with_graph=True, backward=True):
    """Matrix products of forward and backward, in units of the logits' one."""
    hidden, weight, _, target = problem((8,), 16, 4)
    hidden.requires_grad_(of_input)
    weight.requires_grad_(of_weight)
    with torch.profiler.profile(record_shapes=True) as profiler:
        with torch.set_grad_enabled(with_graph):
            loss = functional.linear_cross_entropy(
                hidden, weight, target, reduction=reduction, memory_budget=2 * 16 * 8
            )
        if backward:
            loss.sum().backward()
    work = 0
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm"):
            a, b = event.input_shapes[-5:-3] if event.name == "aten::addmm" else event.input_shapes[:2]
            work += a[0] * a[1] * b[1]
    return work / (8 * 16 * 4)


@pytest.mark.parametrize(
    ("of_input", "of_weight", "reduced", "each"),
    [(True, True, 3, 4), (True, False, 2, 3), (False, True, 2, 3)],
)
def test_a_frozen_operand_costs_no_product(of_input, of_weight, reduced, each):
    assert products(of_input, of_weight, "mean") == reduced
    assert products(of_input, of_weight, "none") == each


def test_without_a_graph_there_is_one_product():
    for reduction in REDUCTIONS:
        assert products(True, True, reduction, with_graph=False, backward=False) == 1
        assert products(False, False, reduction, backward=False) == 1


def test_no_grad_gives_the_same_loss():
    hidden, weight, bias, target = problem()
    for reduction in REDUCTIONS:
        loss = functional.linear_cross_entropy(
            hidden.requires_grad_(), weight, target, linear_bias=bias, reduction=reduction
        )
        with torch.no_grad():
            free = functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction)
        with torch.inference_mode():
            inferred = functional.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction)
        assert not free.requires_grad and torch.equal(loss, free) and torch.equal(loss, inferred)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradients(reduction):
    operands = problem()[:3]
    target = problem()[3]
    factors = random(9, seed=4) if reduction == "none" else torch.tensor(3.0, dtype=torch.float64)

    def gradients(function):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction)
        (factors * loss).sum().backward(retain_graph=True)
        (2 * loss).sum().backward()  # computed again, and added
        return [leaf.grad for leaf in leaves]

    for mine, theirs in zip(gradients(functional.linear_cross_entropy), gradients(by_logits), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck():
    hidden, weight, bias, target = problem((4,), 6, 3)
    leaves = [operand.requires_grad_() for operand in (hidden, weight, bias)]
    for reduction, extras in itertools.product(
        REDUCTIONS, ({}, {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.2, "temperature": 2.0})
    ):
        loss = partial(functional.linear_cross_entropy, reduction=reduction, memory_budget=100, **extras)
        assert torch.autograd.gradcheck(lambda h, w, b, loss=loss: loss(h, w, target, linear_bias=b), leaves)


def test_second_derivatives():
    """torch's function has them, by the logits."""
    hidden, weight, bias, target = problem((4,), 6, 3)
    leaves = [operand.requires_grad_() for operand in (hidden, weight, bias)]
    for reduction, extras in itertools.product(
        REDUCTIONS, ({}, {"z_loss": 0.1, "softcap": 3.0, "temperature": 2.0, "weight": random(6).abs()})
    ):
        loss = partial(functional.linear_cross_entropy, reduction=reduction, memory_budget=100, **extras)
        assert torch.autograd.gradgradcheck(lambda h, w, b, loss=loss: loss(h, w, target, linear_bias=b), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_of_a_tied_weight(dtype):
    """The hidden states depend on the weight that they are multiplied by."""

    def second(loss, dtype):
        weight = problem()[1].to(dtype).requires_grad_()
        hidden = F.embedding(torch.arange(9), weight).sin()
        (first,) = torch.autograd.grad(loss(hidden, weight, problem()[3]), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    truth = second(by_logits, torch.float64)
    ours, torchs = second(functional.linear_cross_entropy, dtype), second(by_logits, dtype)
    assert_no_worse(ours, torchs, truth, roundings=4)


def test_tied_weights_get_both_gradients():
    def gradient(of):
        weight = problem()[1].requires_grad_()
        tokens = torch.arange(9)
        of(F.embedding(tokens, weight), weight, problem()[3]).backward()
        return weight.grad

    torch.testing.assert_close(gradient(functional.linear_cross_entropy), gradient(by_logits))


def test_operands_are_left_alone():
    hidden, weight, bias, target = (t.clone() for t in problem())
    run(lambda h, w, b: functional.linear_cross_entropy(h, w, target, linear_bias=b), [hidden, weight, bias])
    assert all(map(torch.equal, (hidden, weight, bias, target), problem()))


def test_z_loss_comes_separately():
    hidden, weight, _, target = problem()
    loss, z = functional.linear_cross_entropy(hidden.requires_grad_(), weight, target, z_loss=0.1, return_z_loss=True)
    assert not z.requires_grad
    torch.testing.assert_close(loss - z, functional.linear_cross_entropy(hidden, weight, target))
    _, z = functional.linear_cross_entropy(hidden, weight, target, return_z_loss=True)
    assert z == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_chunks_do_not_show(threads):
    """Other chunks may round sums differently, but never the loss of a token."""
    torch.set_num_threads(threads)
    hidden, weight, _, target = problem((64,))
    losses = [
        functional.linear_cross_entropy(hidden, weight, target, reduction="none", memory_budget=budget)
        for budget in (1, 1000, 10**9)
    ]
    for loss in losses:
        torch.testing.assert_close(loss, losses[0])
