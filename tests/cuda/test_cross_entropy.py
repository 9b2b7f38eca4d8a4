"""What cross_entropy does on a device alone: nothing waits, forward makes gradients, bad targets are told of late."""

import itertools

import pytest
import torch
from loss_judge import DTYPES, REDUCTIONS, assert_no_worse, on, random, run
from test_losses_cross_entropy import compare, problem
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trainopt import functional
from trainopt._extension import _C


def test_the_operator_takes_it(device):
    logits, target = problem((5,))
    options = (False, 1, -100, 0.0, 0.0, 0.0, False, 1.0)
    assert _C.cross_entropy(logits.to(device), target.to(device), None, *options) is not None
    assert _C.cross_entropy(logits.to(device), target, None, *options) is None  # torch says what is wrong with that


# Without waiting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_waits_for_the_device(device, no_synchronisation, kind, reduction):
    logits, target = (tensor.to(device) for tensor in problem((20, 3), kind, count=40, ignored=-100))
    weight = random(40).abs().to(device)
    upstream = random(20, 3).to(device) if reduction == "none" else torch.ones((), dtype=torch.float64, device=device)
    logits.requires_grad_()
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "empty": "zero"}
    functional.cross_entropy(logits, target, weight, **options)  # makes what lasts
    with no_synchronisation():
        for inplace in (False, True):
            copy = logits * 1
            loss = functional.cross_entropy(copy, target, weight, inplace_backward=inplace, **options)
            torch.autograd.grad(loss, logits, upstream)


@pytest.mark.skipif("simt" not in _C.device_types(), reason="of the emulated device")
def test_the_same_bits_in_any_order(device):
    for count in (7, 40, 1500):
        logits, target = (
            tensor.float() if tensor.is_floating_point() else tensor for tensor in problem((9,), count=count)
        )
        found = []
        for ascending in (True, False):
            _C.simt.set_order(ascending=ascending)
            found.append(run(lambda x, t=target: on(device, functional.cross_entropy)(x, t), [logits]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_tensors_of_a_device_that_is_not_the_current_one(device, other_device):
    logits, target = problem((5,))
    compare(other_device, logits, target, torch.float32)
    assert on(other_device, functional.cross_entropy)(logits, target).device.type == "cpu"


def test_a_graph_is_replayed_with_other_logits(device):
    logits, target = (tensor.to(device) for tensor in problem((64,), count=1500))
    logits.requires_grad_()
    module = torch.get_device_module(device)
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    with module.stream(stream):
        for _ in range(3):
            torch.autograd.grad(functional.cross_entropy(logits, target), logits)
    module.current_stream().wait_stream(stream)
    graph = module.CUDAGraph()
    with module.graph(graph):
        loss = functional.cross_entropy(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits.mul_(0.5)
    graph.replay()
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    target[3] = 5000
    graph.replay()
    module.synchronize()
    with pytest.raises(IndexError, match=r"target 5000 at position \(3\)"):
        functional.check_targets()


# Gradients ------------------------------------------------------------------------------------------------------------


def test_upstream_gradients(device):
    logits, target = problem((6,), count=40)
    weights = random(6, seed=4)
    ours, torchs = on(device, functional.cross_entropy), F.cross_entropy
    for scaled in (
        lambda f, x: 3 * f(x, target),
        lambda f, x: (weights * f(x, target, reduction="none")).sum(),
        lambda f, x: f(x, target, reduction="none").sum(),  # an upstream gradient that is expanded
        lambda f, x: f(x, target, reduction="sum") * f(x, target),
    ):
        for mine, theirs in zip(
            run(lambda x, s=scaled: s(ours, x), [logits]), run(lambda x, s=scaled: s(torchs, x), [logits]), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_and_again(device, reduction):
    logits, target = problem((6,), count=40)
    there = logits.to(device).requires_grad_()
    loss = functional.cross_entropy(there, target.to(device), reduction=reduction).sum()
    first, second = (torch.autograd.grad(loss, there, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first.cpu(), second.cpu())
    (slope,) = torch.autograd.grad(loss, there, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), there)
    here = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(here, target, reduction=reduction).sum(), here, create_graph=True)
    torch.testing.assert_close(slope.cpu(), expected)
    torch.testing.assert_close(curvature.cpu(), torch.autograd.grad(expected.square().sum(), here)[0])


class Watching(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def without_saving():
    """Hooks that change nothing: forward leaves the gradient to backward where somebody packs what it saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_forward_and_backward_make_the_same_gradient(device, dtype, kind, reduction):
    for rows, count, scale in itertools.product(((5,), (3, 4)), (7, 40, 1500), (1.0, 3.0)):
        logits, target = problem(rows, kind, count, ignored=-100)
        there = logits.to(device, dtype).requires_grad_()
        target = target.to(device, dtype) if kind == "probabilities" else target.to(device)

        def loss(there=there, target=target, scale=scale):
            options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
            return scale * functional.cross_entropy(there, target, **options)

        made_early = loss()
        found = [torch.autograd.grad(made_early, there, retain_graph=keep)[0].cpu() for keep in (True, False)]
        with without_saving():
            found.append(torch.autograd.grad(loss(), there)[0].cpu())
        assert all(torch.equal(gradient, found[0]) for gradient in found)


def test_forward_makes_a_gradient_only_where_it_is_wanted(device, allocated):
    logits, target = problem((64,), count=1000)
    logits, target = logits.float().to(device).requires_grad_(), target.to(device)

    def makes_one(loss):
        before = allocated()
        value = loss()
        return allocated() - before >= logits.nbytes, value

    def train(scale):
        (scale * functional.cross_entropy(logits, target)).backward()
        torch.get_device_module(device).synchronize()

    def plain():
        return functional.cross_entropy(logits, target)

    train(1.0)
    assert makes_one(plain)[0]
    with torch.no_grad():
        assert not makes_one(plain)[0]
    assert not makes_one(lambda: functional.cross_entropy(logits.detach(), target))[0]
    assert not makes_one(lambda: functional.cross_entropy(logits, target, reduction="none"))[0]
    copy = logits * 1
    assert not makes_one(lambda: functional.cross_entropy(copy, target, inplace_backward=True))[0]
    with without_saving():
        assert not makes_one(plain)[0]
    with Watching():  # which is to see every operator
        assert not makes_one(plain)[0]
    train(3.0)  # such as by a GradScaler: what forward made was not what backward wanted
    assert not makes_one(plain)[0]
    train(1.0)
    assert makes_one(plain)[0]


def test_a_lazily_negative_gradient_from_above(device):
    logits, target = problem((6,), count=40)
    logits, target = logits.to(device).requires_grad_(), target.to(device)
    for scale in (1.0, 3.0):
        upstream = torch.tensor(-scale, dtype=logits.dtype, device=device)
        found, expected = (
            torch.autograd.grad(functional.cross_entropy(logits, target), logits, above)[0].cpu()
            for above in (torch._neg_view(upstream), -upstream)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_activation_checkpoints(device):
    logits, target = problem((6,), count=40)

    def loss(x):
        return checkpoint(lambda y: functional.cross_entropy(y, target.to(device)), x, use_reentrant=False)

    for mine, theirs in zip(
        run(on(device, loss), [logits]), run(lambda x: F.cross_entropy(x, target), [logits]), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_logits_that_change_before_backward(device):
    logits, target = problem((6,), count=40)
    copy = logits.to(device).requires_grad_() * 1
    loss = functional.cross_entropy(copy, target.to(device))
    copy.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 40), (2, 7, 5)], ids=str)
def test_inplace_backward(device, dtype, shape):
    logits, target = problem((shape[0], *shape[2:]), count=shape[1])
    leaf = logits.to(device, dtype).requires_grad_()
    (expected,) = torch.autograd.grad(functional.cross_entropy(leaf, target.to(device)), leaf)
    copy = leaf * 1
    loss = functional.cross_entropy(copy, target.to(device), inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, copy, retain_graph=True)
    assert gradient.data_ptr() == copy.data_ptr() and torch.equal(gradient.cpu(), expected.cpu())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, copy)
    assert torch.equal(leaf.detach().cpu(), logits.to(dtype))


def test_autocast(device):
    logits, target = problem((6,), count=40)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = functional.cross_entropy(logits.to(device, torch.bfloat16), target.to(device))
    assert loss.dtype == torch.float32
    assert_no_worse(
        loss.cpu(),
        F.cross_entropy(logits.bfloat16().float(), target),
        F.cross_entropy(logits.bfloat16().double(), target),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(device, backend):
    logits, target = problem((6,), count=40)

    @torch.compile(backend=backend, fullgraph=True)
    def slope(x, t):
        return functional.cross_entropy(2 * x, t, label_smoothing=0.1, z_loss=0.1)

    found = run(on(device, slope), [logits, target])
    expected = run(lambda x, t: functional.cross_entropy(2 * x, t, label_smoothing=0.1, z_loss=0.1), [logits, target])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


# Targets out of range -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [7, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_bad_target_is_told_of_at_the_next_call(device, bad, reduction):
    logits, target = (tensor.to(device) for tensor in problem((3, 4)))
    target[1, 2] = bad
    target[2, 0] = 99
    logits.requires_grad_()
    loss = functional.cross_entropy(logits, target, reduction=reduction)
    torch.get_device_module(device).synchronize()
    message = (
        rf"target {bad} at position \(1, 2\) is out of range for 7 classes \(found by an earlier call on {device}:0\)"
    )
    with pytest.raises(IndexError, match=message):
        torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)  # told of once
    is_bad = torch.zeros(3, 4, dtype=torch.bool)
    is_bad[1, 2] = is_bad[2, 0] = True
    assert torch.equal(gradient.cpu().isnan().all(1), is_bad)
    assert torch.equal(gradient.cpu().isnan().any(1), is_bad)
    if reduction == "none":
        assert torch.equal(loss.detach().cpu().isnan(), is_bad)
    else:
        assert loss.isnan()
    functional.cross_entropy(logits, target.clamp(0, 6), reduction=reduction)


def test_bad_targets_can_be_asked_for(device, other_device):
    logits, target = (tensor.to(device) for tensor in problem((5,)))
    functional.check_targets()
    target[3] = 7
    functional.cross_entropy(logits, target)
    on(other_device, functional.cross_entropy)(logits.cpu(), target.cpu().clamp(0, 6))  # no concern of that device
    with pytest.raises(IndexError, match=r"target 7 at position \(3\)"):
        functional.check_targets()
    functional.check_targets()


def test_an_ignored_target_is_not_bad(device):
    logits, target = problem((5,), ignored=-100)
    on(device, functional.cross_entropy)(logits, target)
    on(device, functional.cross_entropy)(logits, target.where(target >= 0, 1000), ignore_index=1000)
    functional.check_targets()


def test_shapes_that_do_not_fit(device):
    logits, target = (tensor.to(device) for tensor in problem((5,)))
    with pytest.raises(ValueError, match="target of classes must have shape"):
        functional.cross_entropy(logits, target[:4])
    with pytest.raises(RuntimeError, match="weight has shape"):
        functional.cross_entropy(logits, target, torch.ones(3, dtype=torch.float64, device=device))
