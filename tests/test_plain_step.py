"""An optimizer that torch does not have: a rule, a class, and a plain step where other classes have torch's.

The classes here are rules that there are, so that torch's own results are the truth.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch

import trainopt
from trainopt.optim import registry
from trainopt.optim.base import Fused
from trainopt.schedules import linear


class Counting(Fused, rule="adam"):
    """AdamW's rule, which counts steps."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **options):
        decay = {"weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, lr=lr, betas=betas, eps=eps, amsgrad=False, **decay, **options)

    @staticmethod
    def plain_step(param, gradient, state, group):
        (beta1, beta2), step = group["betas"], float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        m, v = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))


class Uncounted(Fused, rule="sgd"):
    """SGD's rule with momentum, which counts no steps."""

    def __init__(self, params, lr=1e-3, momentum=0.9, **options):
        super().__init__(params, lr=lr, momentum=momentum, dampening=0.0, nesterov=False, **options)

    @staticmethod
    def plain_step(param, gradient, state, group):
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        param.sub_(group["lr"] * state["momentum_buffer"])


OWN = {
    "Counting": (Counting, torch.optim.AdamW, {"lr": 0.01}),
    "Uncounted": (Uncounted, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
}
for own_name in OWN:
    del registry.OPTIMIZERS[own_name]  # other tests go over those that users have
each_own = pytest.mark.parametrize("own, stock, options", OWN.values(), ids=OWN)


@pytest.fixture(params=["engine", "plain"])
def path(request, monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", request.param == "plain")
    return request.param


def stepped(cls, options, dtype=torch.float64, steps=3, shape=(5, 3), wrap=torch.nn.Parameter):
    torch.manual_seed(0)
    params = [wrap(torch.randn(shape, dtype=torch.float64).to(dtype)) for _ in range(3)]
    optimizer = cls(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(shape, dtype=torch.float64).to(dtype)
        optimizer.step()
    return optimizer, params


def assert_same(one, other, **tolerance):
    for p, q in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)
        states = [{k: v for k, v in o.state[x].items() if k != "step"} for o, x in ((one[0], p), (other[0], q))]
        torch.testing.assert_close(*states, **tolerance)


@each_own
def test_the_signature_and_the_groups_have_what_torchs_classes_have(own, stock, options):
    shown = inspect.signature(own).parameters
    assert {"maximize", "foreach", "differentiable", "fused", "l1", "noise", "skip_nonfinite"} <= shown.keys()
    assert "options" not in shown and shown["seed"].default == 0
    (group,) = own([torch.nn.Parameter(torch.ones(2))]).param_groups
    assert {"lr", "weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"} <= group.keys()
    assert "l1" not in group


@each_own
@pytest.mark.parametrize("more", [{}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_same_by_the_engine_and_by_the_plain_step(own, stock, options, more, dtype, path):
    found = stepped(own, {**options, **more}, dtype)
    wanted = stepped(stock, {**options, **more, "foreach": False})
    assert {row.path.partition(" ")[0] for row in trainopt.explain(found[0])} == {
        "fused" if path == "engine" else "torch"
    }
    unit = torch.finfo(dtype).eps
    for p, q in zip(found[1], wanted[1], strict=True):
        # Parameters and gradients are rounded to the dtype, the parameter again in each step.
        torch.testing.assert_close(p.double(), q, rtol=8 * unit, atol=8 * unit)


@each_own
@pytest.mark.parametrize("more", [{"l1": 0.3}, {"l1": 0.5, "l1_proximal": True}, {"noise": 0.1}], ids=str)
def test_trainopts_own_options_on_both_paths(own, stock, options, more, monkeypatch):
    fused = stepped(own, {**options, **more})
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    assert_same(stepped(own, {**options, **more}), fused, rtol=1e-6, atol=1e-9)
    with pytest.raises(AssertionError):
        assert_same(stepped(own, options), fused, rtol=1e-6, atol=1e-9)


@each_own
def test_16_bits_are_rounded_once_on_both_paths(own, stock, options, monkeypatch):
    fused = stepped(own, options, torch.bfloat16)
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    plain = stepped(own, options, torch.bfloat16)
    differ = sum(int((p != q).sum()) for p, q in zip(fused[1], plain[1], strict=True))
    assert differ <= 1 and plain[1][0].dtype is torch.bfloat16


@each_own
def test_complex_numbers_are_pairs_of_reals(own, stock, options):
    assert_same(
        stepped(own, options, torch.complex128), stepped(stock, {**options, "foreach": False}, torch.complex128)
    )


@each_own
def test_sparse_gradients_are_refused_before_anything_is_changed(own, stock, options, path):
    optimizer, (p, q, r) = stepped(own, options)
    before = copy.deepcopy([x.detach() for x in (p, q, r)]), copy.deepcopy(list(optimizer.state.values()))
    r.grad = r.grad.to_sparse()
    with pytest.raises(RuntimeError, match=f"{own.__name__} does not support sparse gradients"):
        optimizer.step()
    torch.testing.assert_close(
        before, ([x.detach() for x in (p, q, r)], list(optimizer.state.values())), rtol=0, atol=0
    )


@each_own
def test_a_differentiable_step(own, stock, options):
    slopes = []
    for cls in (own, stock):
        p = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
        moved = p.clone()
        moved.grad = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        cls([moved], **options, differentiable=True).step()
        slopes.append(torch.autograd.grad(moved.sum(), [p, moved.grad], allow_unused=True))
    assert torch.equal(slopes[0][0], slopes[1][0]) and slopes[0][1] is not None


class Subclass(torch.Tensor):
    pass


@each_own
def test_parameters_of_a_subclass_and_states_in_order(own, stock, options):
    wrap = iter([torch.nn.Parameter, lambda t: torch.nn.Parameter(t.as_subclass(Subclass)), torch.nn.Parameter])
    mixed = stepped(own, options, wrap=lambda t: next(wrap)(t))
    assert [row.path.partition(" ")[0] for row in trainopt.explain(mixed[0])] == ["fused", "torch", "fused"]
    assert list(mixed[0].state) == mixed[1]
    for p, q in zip(mixed[1], stepped(own, options)[1], strict=True):
        torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), q.detach())


@each_own
def test_compiled(own, stock, options):
    plain = stepped(own, options)

    def compiled(params, **kwargs):
        optimizer = own(params, **kwargs)
        optimizer.step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
        return optimizer

    assert_same(stepped(compiled, options), plain, rtol=0, atol=0)


@each_own
def test_saved_loaded_copied_and_asked_for(own, stock, options, path):
    optimizer, params = stepped(own, options)
    other, others = stepped(own, options, steps=0)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(other.state[q], optimizer.state[p], rtol=0, atol=0)
    buffer = io.BytesIO()
    pickle.dump(optimizer, buffer)
    buffer.seek(0)
    twins = [optimizer, copy.deepcopy(optimizer), pickle.load(buffer)]
    for twin in twins:
        for p in twin.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        twin.step()
    results = [twin.param_groups[0]["params"] for twin in twins]
    torch.testing.assert_close(*[[p.detach() for p in found] for found in results[:2]], rtol=0, atol=0)
    torch.testing.assert_close(*[[p.detach() for p in found] for found in results[1:]], rtol=0, atol=0)
    made, (p, *_) = stepped(own, options, steps=0)
    made.init_state()
    assert set(made.state[p]) - {"step"} == {name for name in own._states if name in optimizer.state[params[0]]}


@each_own
def test_groups_of_another_librarys_file_are_completed(own, stock, options):
    saved = stepped(own, options)[0].state_dict()
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
        del saved["param_groups"][0][key]
    other, _ = stepped(own, options, steps=0)
    other.load_state_dict(saved)
    other.param_groups[0]["params"][0].grad = torch.ones(5, 3, dtype=torch.float64)
    other.step()
    assert other.param_groups[0]["maximize"] is False


@each_own
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
        ({"l1": -0.5}, ValueError, "Invalid l1 value: -0.5"),
        ({"momentun": 1}, TypeError, "got an unexpected keyword argument 'momentun'"),
    ],
    ids=str,
)
def test_options_are_refused_in_torchs_words(own, stock, options, bad, error, words):
    with pytest.raises(error, match=words):
        own([torch.nn.Parameter(torch.ones(2))], **bad)


def test_betas_are_refused_in_torchs_words():
    with pytest.raises(ValueError, match="Invalid beta parameter at index 1"):
        Counting([torch.nn.Parameter(torch.ones(2))], betas=(0.9, 1.0))


@each_own
def test_torch_has_no_class_to_turn_it_from_and_no_place_for_it(own, stock, options, monkeypatch):
    monkeypatch.setitem(registry.OPTIMIZERS, own.__name__, own)
    assert own not in registry.of_torch().values() and own._torch_class is None
    optimizer, _ = stepped(own, options)
    assert trainopt.fuse(optimizer) is optimizer and type(optimizer) is own
    with trainopt.patched():
        assert not hasattr(torch.optim, own.__name__)
        stepped(own, options)


@each_own
def test_schedules_and_scaled_gradients(own, stock, options, path):
    optimizer, params = stepped(own, {**options, "fused": True}, torch.float32)
    schedule = trainopt.Schedule(optimizer, lr=linear(until=10), completed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad()
    scaler.scale(sum((p * float("inf")).sum() for p in params)).backward()
    scaler.step(optimizer)
    schedule.step()
    assert optimizer.last_step_skipped and schedule.last_epoch == 0
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


# The registry ---------------------------------------------------------------------------------------------------------


def test_every_optimizer_is_exported_and_says_what_its_rule_says():
    assert registry.OPTIMIZERS.keys() >= {"SGD", "Adam", "AdamW"}
    for name, cls in registry.OPTIMIZERS.items():
        assert getattr(trainopt, name) is cls and name in trainopt.__all__ and cls.__name__ == name
        assert cls._states and set(cls.EXTRAS) >= {"l1", "l1_proximal", "noise", "seed", "skip_nonfinite"}
    adam = registry.OPTIMIZERS["Adam"]
    assert adam._states == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") and adam._counts_steps
    assert "bias_correction" in adam.EXTRAS and "bias_correction" not in registry.OPTIMIZERS["SGD"].EXTRAS
    assert registry.of_torch()[torch.optim.AdamW] is trainopt.AdamW


def test_a_subclass_of_a_users_is_not_entered():
    class Mine(trainopt.AdamW):
        def __init__(self, params, **options):
            super().__init__(params, **options)

    assert Mine not in registry.OPTIMIZERS.values() and list(inspect.signature(Mine).parameters) == [
        "params",
        "options",
    ]


def test_a_class_without_a_rule_or_a_step_is_an_error_at_once():
    with pytest.raises(KeyError, match="unknown"):
        type("Unknown", (Fused,), {}, rule="unknown")
    with pytest.raises(TypeError, match="Stepless needs a plain_step"):
        type("Stepless", (Fused,), {}, rule="sgd")
    assert "Stepless" not in registry.OPTIMIZERS
