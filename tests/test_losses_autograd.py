"""Differentiating the losses: upstream gradients, twice, again, and forwards."""

import itertools
from functools import partial

import pytest
import torch
from loss_judge import REDUCTIONS, classes, random, run
from torch.nn import functional as F

from trainopt import functional
from trainopt.losses import reference
from trainopt.losses.options import CrossEntropyOptions

TARGET = classes((5,), 4)
PROBABILITIES = random(5, 4, seed=9).softmax(1)
CLASS_WEIGHT = random(4, seed=7).abs() + 0.1

#: Losses of a (5, 4) input, by name, with torch's beside ours.
LOSSES = {
    "cross_entropy": (partial(functional.cross_entropy, target=TARGET), partial(F.cross_entropy, target=TARGET)),
    "cross_entropy, all": (
        partial(functional.cross_entropy, target=TARGET, weight=CLASS_WEIGHT, ignore_index=1, label_smoothing=0.2),
        partial(F.cross_entropy, target=TARGET, weight=CLASS_WEIGHT, ignore_index=1, label_smoothing=0.2),
    ),
    "cross_entropy, probabilities": (
        partial(functional.cross_entropy, target=PROBABILITIES, weight=CLASS_WEIGHT),
        partial(F.cross_entropy, target=PROBABILITIES, weight=CLASS_WEIGHT),
    ),
    "mse": (partial(functional.mse_loss, target=PROBABILITIES), partial(F.mse_loss, target=PROBABILITIES)),
    "l1": (partial(functional.l1_loss, target=PROBABILITIES), partial(F.l1_loss, target=PROBABILITIES)),
    "smooth_l1": (
        partial(functional.smooth_l1_loss, target=PROBABILITIES, beta=0.5),
        partial(F.smooth_l1_loss, target=PROBABILITIES, beta=0.5),
    ),
    "huber": (
        partial(functional.huber_loss, target=PROBABILITIES, delta=0.5),
        partial(F.huber_loss, target=PROBABILITIES, delta=0.5),
    ),
    "bce with logits": (
        partial(functional.binary_cross_entropy_with_logits, target=PROBABILITIES, pos_weight=CLASS_WEIGHT),
        partial(F.binary_cross_entropy_with_logits, target=PROBABILITIES, pos_weight=CLASS_WEIGHT),
    ),
    "bce": (
        lambda x, **options: functional.binary_cross_entropy(x.sigmoid(), PROBABILITIES, CLASS_WEIGHT, **options),
        lambda x, **options: F.binary_cross_entropy(x.sigmoid(), PROBABILITIES, CLASS_WEIGHT, **options),
    ),
    "kl": (partial(functional.kl_div, target=PROBABILITIES), partial(F.kl_div, target=PROBABILITIES)),
    "kl of logs": (
        partial(functional.kl_div, target=PROBABILITIES.log(), log_target=True),
        partial(F.kl_div, target=PROBABILITIES.log(), log_target=True),
    ),
}
each_loss = pytest.mark.parametrize(("ours", "torchs"), LOSSES.values(), ids=LOSSES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


def inputs():
    return random(5, 4, scale=2)


# Upstream gradients ---------------------------------------------------------------------------------------------------


@each_loss
@each_reduction
def test_upstream_gradients(ours, torchs, reduction):
    upstream = random(*torchs(inputs(), reduction=reduction).shape, seed=2)
    noncontiguous = torch.stack([upstream, upstream], -1)[..., 0]
    lazily_negative = torch._neg_view(-upstream)
    no_memory = torch._efficientzerotensor(upstream.shape, dtype=upstream.dtype)
    given_all = (upstream, 3 * torch.ones_like(upstream), torch.zeros_like(upstream), noncontiguous)
    for given in (*given_all, upstream.sum().expand(upstream.shape), lazily_negative, no_memory):
        for mine, theirs in zip(
            run(partial(ours, reduction=reduction), [inputs()], given),
            run(partial(torchs, reduction=reduction), [inputs()], given),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


@each_loss
def test_weights_of_single_losses(ours, torchs):
    def weighted(loss, x):
        each = loss(x, reduction="none")
        return (random(*each.shape, seed=6) * each).sum() * 3

    mine, theirs = (run(partial(weighted, loss), [inputs()]) for loss in (ours, torchs))
    torch.testing.assert_close(mine, theirs)


@each_loss
@each_reduction
def test_backward_twice_through_one_graph(ours, torchs, reduction):
    def gradient(loss):
        x = inputs().requires_grad_()
        value = loss(x, reduction=reduction).sum()
        value.backward(retain_graph=True)
        first = x.grad.clone()
        value.backward()
        torch.testing.assert_close(x.grad, 2 * first)
        return first

    torch.testing.assert_close(gradient(ours), gradient(torchs))


@each_loss
def test_a_second_backward_without_the_graph_is_refused(ours, torchs):
    loss = ours(inputs().requires_grad_())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_two_losses_of_one_set_of_logits():
    def gradient(side):
        x = inputs().requires_grad_()
        loss = side.cross_entropy(x, TARGET) + 0.5 * side.cross_entropy(x, PROBABILITIES)
        loss = loss + side.mse_loss(x.softmax(1), PROBABILITIES) + side.kl_div(x.log_softmax(1), PROBABILITIES)
        loss.backward()
        return x.grad

    torch.testing.assert_close(gradient(functional), gradient(F))


@each_loss
@each_reduction
def test_inputs_are_left_alone(ours, torchs, reduction):
    x = inputs().requires_grad_()
    version = x._version
    ours(x, reduction=reduction).sum().backward()
    assert torch.equal(x.detach(), inputs()) and x._version == version


@pytest.mark.parametrize("ours", [ours for ours, _ in LOSSES.values() if isinstance(ours, partial)])
def test_a_changed_input_is_noticed(ours):
    x = inputs().requires_grad_()
    y = x * 1
    loss = ours(y)
    y.detach().add_(1)  # a view of it: its version counter is the same
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_loss
def test_no_graph_where_none_is_wanted(ours, torchs):
    assert not ours(inputs()).requires_grad
    with torch.no_grad():
        assert not ours(inputs().requires_grad_()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(ours(inputs()), torchs(inputs()))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"])
def test_gradients_of_the_target_alone(name):
    x, t = PROBABILITIES.log(), random(5, 4, seed=1).softmax(1)
    for side in (functional, F):
        target = t.clone().requires_grad_()
        getattr(side, name)(x, target).backward()
        if side is functional:
            mine = target.grad
    torch.testing.assert_close(mine, target.grad)


def test_gradients_of_probabilities_are_torchs():
    def gradients(side):
        return run(lambda x, p: side.cross_entropy(x, p, label_smoothing=0.1), [inputs(), PROBABILITIES])

    torch.testing.assert_close(gradients(functional), gradients(F))


def test_gradients_of_a_class_weight_are_as_in_torch():
    weight = CLASS_WEIGHT.clone().requires_grad_()
    for side in (functional, F):
        loss = side.cross_entropy(inputs().requires_grad_(), PROBABILITIES, weight)
        (gradient,) = torch.autograd.grad(loss, weight)
        if side is functional:
            mine = gradient
    torch.testing.assert_close(mine, gradient)


# Twice ----------------------------------------------------------------------------------------------------------------

EXTRAS = {"z_loss": {"z_loss": 0.3}, "softcap": {"softcap": 3.0}, "both": {"z_loss": 0.3, "softcap": 3.0}}
EXTRAS |= {"temperature": {"temperature": 2.0}, "all": {"z_loss": 0.3, "softcap": 3.0, "temperature": 0.5}}


@each_loss
@each_reduction
def test_numerical_derivatives(ours, torchs, reduction):
    x = inputs().requires_grad_()
    assert torch.autograd.gradcheck(partial(ours, reduction=reduction), [x])
    assert torch.autograd.gradgradcheck(partial(ours, reduction=reduction), [x])


@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div"])
def test_numerical_derivatives_of_input_and_target(name):
    make = torch.Tensor.sigmoid if name == "binary_cross_entropy" else torch.Tensor.clone
    leaves = [make(inputs()).requires_grad_(), PROBABILITIES.clone().requires_grad_()]
    assert torch.autograd.gradcheck(getattr(functional, name), leaves)
    assert torch.autograd.gradgradcheck(getattr(functional, name), leaves)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@each_reduction
@pytest.mark.parametrize("target", [TARGET, PROBABILITIES], ids=["classes", "probabilities"])
def test_numerical_derivatives_of_the_extras(extras, reduction, target):
    ignore_index = 1 if target is TARGET else -100
    for smoothing, empty in ((0.0, "nan"), (0.2, "zero")):
        loss = partial(
            functional.cross_entropy,
            target=target,
            weight=CLASS_WEIGHT,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
            empty=empty,
            **extras,
        )
        x = inputs().requires_grad_()
        assert torch.autograd.gradcheck(loss, [x])
        assert torch.autograd.gradgradcheck(loss, [x])


def test_second_derivatives_of_a_batch_without_classes_to_count():
    def second(side, **options):
        x = inputs().requires_grad_()
        (g,) = torch.autograd.grad(
            side.cross_entropy(x, torch.full((5,), -100), **options), x, create_graph=True, materialize_grads=True
        )
        return g.detach()

    assert torch.equal(second(functional), torch.zeros(5, 4, dtype=torch.float64))
    assert torch.equal(second(functional, empty="zero"), torch.zeros(5, 4, dtype=torch.float64))


@each_loss
def test_a_hessian(ours, torchs):
    mine, theirs = (torch.autograd.functional.hessian(loss, inputs()) for loss in (ours, torchs))
    torch.testing.assert_close(mine, theirs)


# Function transforms --------------------------------------------------------------------------------------------------


@each_loss
def test_function_transforms(ours, torchs):
    x, tangent = inputs(), random(5, 4, seed=3)
    for transform in (
        torch.func.grad,
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda loss: lambda x: torch.func.jvp(loss, (x,), (tangent,)),
        lambda loss: lambda x: torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x])),
    ):
        torch.testing.assert_close(transform(ours)(x), transform(torchs)(x))


def test_vmap_over_examples():
    x = inputs()
    for side_in, function in (((0, 0), "cross_entropy"), ((0, None), "cross_entropy")):
        target = TARGET if side_in[1] == 0 else torch.tensor(2)
        mine, theirs = (
            torch.func.vmap(getattr(side, function), in_dims=side_in)(x, target) for side in (functional, F)
        )
        torch.testing.assert_close(mine, theirs)
    mine, theirs = (torch.func.vmap(side.mse_loss)(x, PROBABILITIES) for side in (functional, F))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_function_transforms_of_the_extras(extras):
    def loss(x):
        return functional.cross_entropy(x, TARGET, weight=CLASS_WEIGHT, ignore_index=1, **extras)

    x = inputs().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    tangent = random(5, 4, seed=3)
    torch.testing.assert_close(torch.func.jvp(loss, (x.detach(),), (tangent,))[1], (expected * tangent).sum())


def test_function_transforms_of_linear_cross_entropy():
    weight = random(7, 4, seed=2)

    def loss(x):
        return functional.linear_cross_entropy(x, weight, TARGET, z_loss=0.1)

    x = inputs().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    torch.testing.assert_close(torch.func.jacfwd(loss)(x.detach()), expected)


@each_loss
def test_forward_mode(ours, torchs):
    import torch.autograd.forward_ad as forward

    tangent = random(5, 4, seed=3)
    found = []
    for loss in (ours, torchs):
        with forward.dual_level():
            found.append(forward.unpack_dual(loss(forward.make_dual(inputs(), tangent))).tangent)
    torch.testing.assert_close(*found)


def test_the_reference_is_the_operator():
    """reference.py stands in for the operators: with every option, on what both take."""
    for reduction, empty, smoothing in itertools.product(REDUCTIONS, ("nan", "zero"), (0.0, 0.3)):
        mine = run(
            partial(
                functional.cross_entropy,
                target=TARGET,
                weight=CLASS_WEIGHT,
                reduction=reduction,
                label_smoothing=smoothing,
                z_loss=0.2,
                softcap=3.0,
                empty=empty,
                temperature=1.7,
            ),
            [inputs()],
        )
        settings = CrossEntropyOptions(reduction, -100, smoothing, 0.2, 3.0, empty, 1.7)
        theirs = run(
            lambda x, settings=settings: reference.cross_entropy(x, TARGET, CLASS_WEIGHT, settings)[0], [inputs()]
        )
        torch.testing.assert_close(mine, theirs)
