"""Backward passes that write the gradient over the logits' own memory: asked for, or where nobody else reads them."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from loss_judge import random, run
from test_losses_autograd import CLASS_WEIGHT, TARGET, each_reduction, inputs
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainopt import functional

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_reduction
def test_inplace_backward_gives_the_same_gradient(dtype, reduction):
    def gradient(**options):
        x = inputs().to(dtype).requires_grad_()
        logits = x * 1
        loss = functional.cross_entropy(
            logits, TARGET, CLASS_WEIGHT.to(dtype), reduction=reduction, label_smoothing=0.1, **options
        )
        (random(*loss.shape, seed=1).to(dtype) * loss).sum().backward()
        return x.grad, logits

    plain, _ = gradient()
    inplace, logits = gradient(inplace_backward=True)
    assert torch.equal(plain, inplace)
    assert torch.equal(logits.detach(), plain)  # they hold the gradient now


def test_autograd_refuses_logits_that_were_overwritten():
    x = inputs().requires_grad_()
    logits = x * 1
    softmax = logits.exp() * logits  # saves the logits
    functional.cross_entropy(logits, TARGET, inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        softmax.sum().backward()
    y = inputs().requires_grad_()
    loss = functional.cross_entropy(y * 1, TARGET, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_is_right_where_memory_cannot_hold_the_gradient():
    for make in (
        lambda x: x[:1].expand(5, 4),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.t().contiguous().t(),
    ):

        def gradient(loss, make=make):
            x = inputs().requires_grad_()
            loss(make(x), TARGET).backward()
            return x.grad

        mine = gradient(partial(functional.cross_entropy, inplace_backward=True))
        torch.testing.assert_close(mine, gradient(F.cross_entropy))


IN_PLACE = {
    "cross_entropy": lambda x, **options: functional.cross_entropy(x, TARGET, **options, inplace_backward=True),
    "linear_cross_entropy": lambda x, **options: functional.linear_cross_entropy(x, WEIGHT, TARGET, **options),
}
PLAIN = {
    "cross_entropy": lambda x, **options: functional.cross_entropy(x, TARGET, **options),
    "linear_cross_entropy": lambda x, **options: functional.cross_entropy(x @ WEIGHT.t(), TARGET, **options),
}
WEIGHT = random(6, 4, seed=8)
each_in_place = pytest.mark.parametrize("name", IN_PLACE)

UPSTREAM = {
    "lazily negative": lambda shape: torch._neg_view(-random(*shape, seed=2)),
    "half of a conjugate": lambda shape: torch.view_as_complex(random(*shape, 2, seed=2)).conj().imag,
    "zeros without memory": lambda shape: torch._efficientzerotensor(shape, dtype=torch.float64),
    "expanded": lambda shape: torch.tensor(2.0, dtype=torch.float64).expand(shape),
    "strided": lambda shape: torch.stack([random(*shape, seed=2)] * 2, -1)[..., 0],
}


def slope(loss, upstream, watched=lambda: nullcontext(), **options):
    """The gradient of logits that are no leaf, which a backward pass may therefore write over."""
    x = inputs().requires_grad_()
    value = loss(2 * x, **options)
    with watched():
        return torch.autograd.grad(value, x, upstream(value.shape))[0]


@each_in_place
@each_reduction
@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_what_comes_from_above_is_read_as_torch_reads_it(name, reduction, upstream):
    """Written past the dispatcher, the first had the wrong sign, and zeros without memory ended the process."""
    found = slope(IN_PLACE[name], upstream, reduction=reduction)
    torch.testing.assert_close(found, slope(PLAIN[name], upstream, reduction=reduction))


@each_in_place
@each_reduction
def test_in_place_by_rows(name, reduction):
    def jacobian(loss):
        x = inputs().requires_grad_()
        value = loss(2 * x, reduction=reduction)
        rows = random(3, *value.shape, seed=2)
        return torch.autograd.grad(value, x, rows, is_grads_batched=True)[0]

    torch.testing.assert_close(jacobian(IN_PLACE[name]), jacobian(PLAIN[name]))


class Watching(TorchDispatchMode):
    """Sees each operator, and does it."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        seen.append(function)
        return function(*arguments, **(options or {}))


seen: list = []


@each_in_place
def test_a_mode_sees_what_is_done_in_backward(name):
    seen.clear()
    upstream = UPSTREAM["expanded"]
    found = slope(IN_PLACE[name], upstream, Watching)
    torch.testing.assert_close(found, slope(PLAIN[name], upstream))
    operators = {function.name() for function in seen}
    assert operators & {"trainopt::cross_entropy_backward", "aten::mul.Tensor"}


HOOKS = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "nothing": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "numbers": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: (x,), lambda x: x[0]),
}


@each_in_place
@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
def test_saved_tensors_are_not_written_over_where_hooks_keep_them(name, hooks):
    """The next backward pass is given what the hooks have kept, and no version counter tells that it was changed."""
    x = inputs().requires_grad_()
    with hooks():
        loss = IN_PLACE[name](2 * x)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    expected = slope(PLAIN[name], lambda shape: torch.ones(shape, dtype=torch.float64))
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


#: Of six rows: the logits, and the target, the weight and the upstream gradient, of which one is the same memory.
ALIASES = {
    "upstream": lambda rows: (rows[:5], TARGET, None, rows.detach()[:5, 0]),
    "upstream, as one row": lambda rows: (rows[:5], TARGET, None, rows.detach().flatten()[3:8]),
    "target": lambda rows: (rows[:5], rows.detach()[:5], None, None),
    "target, a row before": lambda rows: (rows[1:], rows.detach()[:5], None, None),
    "weight": lambda rows: (rows[:5], TARGET, rows.detach()[0], None),
}


@pytest.mark.parametrize("make", ALIASES.values(), ids=ALIASES)
def test_logits_that_something_else_reads_are_not_written_over(make):
    def gradient(copy, **options):
        x = random(6, 100, scale=2).requires_grad_()
        logits, *others = make(2 * x)
        target, weight, upstream = (value.clone() if copy and value is not None else value for value in others)
        loss = functional.cross_entropy(logits, target, weight, reduction="none", **options)
        return torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream)[0]

    torch.testing.assert_close(gradient(False, inplace_backward=True), gradient(True))


def test_inplace_backward_of_a_leaf():
    x = inputs().requires_grad_()
    expected = run(lambda x: F.cross_entropy(x, TARGET), [inputs()])[1]
    functional.cross_entropy(x, TARGET, inplace_backward=True).backward()
    torch.testing.assert_close(x.grad, expected)


def test_without_inplace_backward_logits_can_be_used_again():
    x = inputs().requires_grad_()
    logits = x * 1
    squared = logits.square().sum()
    functional.cross_entropy(logits, TARGET).backward(retain_graph=True)
    squared.backward()
    expected = run(lambda x: F.cross_entropy(x, TARGET) + x.square().sum(), [inputs()])[1]
    torch.testing.assert_close(x.grad, expected)
