"""What follows a backward pass, in the step: clipping by the global norm, the moving average, clearing the gradients.

The truth is the same as separate passes, one after the other, in float64.
"""

import copy
import functools
import io
import math
from unittest import mock

import pytest
import torch
from formulas import SeparatePasses
from helpers import assert_same_bits as assert_same_optimizer
from helpers import snapshot
from judge import DTYPES, TABLE, assert_no_worse, assert_same_bits, outcome, random_problem, undecided_elements

import trainopt
from trainopt import switches
from trainopt._extension import _C

SHAPES = ((), (7,), (0, 3), (33, 20), (257,), (40_000,))
LIMIT, DECAY = 20.0, 0.9
TAIL = {"max_grad_norm": LIMIT, "zero_grad": "in_step", "ema_decay": DECAY}
STEPS = 4


def run(make, start, gradients, dtype=None, device="cpu"):
    """Steps through gradients that are added to what is there, as backward does."""
    params = [torch.nn.Parameter(p.to(device, dtype or p.dtype, copy=True)) for p in start]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make(params)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad.add_(g.to(p))
        optimizer.step()
    return optimizer, params


def problem(dtype, shapes=SHAPES, steps=STEPS):
    """Gradients of which those of every other step are within the limit."""
    start, gradients = random_problem(shapes, dtype, steps)
    return start, [[g / 64 if i % 2 else g for g in now] for i, now in enumerate(gradients)]


def on_cpu(found):
    return {name: [tensor.cpu() for tensor in tensors] for name, tensors in found.items()}


@pytest.mark.parametrize("dtype, warmup", [*((dtype, False) for dtype in DTYPES), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_as_separate_passes(name, dtype, warmup, device):
    row, tail = TABLE[name], {**TAIL, "ema_warmup": warmup}
    start, gradients = problem(dtype)

    def separate(make):
        return lambda params: SeparatePasses(make(params, **row.usual), params, **tail)

    truth = outcome(*run(separate(row.make_formula), start, gradients, torch.float64))
    peer = outcome(*run(separate(row.make_plain_loop), start, gradients))
    optimizer, params = run(lambda params: row.make(params, **row.usual, **tail), start, gradients, device=device)
    found = on_cpu(outcome(optimizer, params))
    undecided = undecided_elements(row, start, gradients, dtype, row.usual) if row.takes_signs(row.usual) else None
    if dtype == torch.float64:
        assert found.keys() == truth.keys()
        torch.testing.assert_close(found, {key: truth[key] for key in found}, rtol=1e-11, atol=1e-13)
    else:
        found, peer, truth = (
            {key: tensors[key] for key in truth if key not in row.differences} for tensors in (found, peer, truth)
        )
        assert_no_worse(found, peer, truth, dtype, undecided, row.in_common is not None)
    assert all(not p.grad.any() for p in params)
    assert {p.path for p in trainopt.explain(optimizer)} <= {f"fused ({device})", f"fused (cpu, {_C.cpu_variant()})"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_each_part_alone_and_none_changes_what_it_should_not(name, dtype, device):
    row = TABLE[name]
    start, gradients = problem(dtype)
    plain, params = run(lambda params: row.make(params, **row.usual), start, gradients[:1], device=device)
    untouched = [p.grad.clone() for p in params]
    for extras in ({"ema_decay": DECAY}, {"zero_grad": "in_step"}, {"max_grad_norm": 1e9}):
        make = functools.partial(row.make, **row.usual, **extras)
        optimizer, others = run(make, start, gradients[:1], device=device)
        found, expected = outcome(optimizer, others), outcome(plain, params)
        averages = found.pop("ema", None)
        assert_same_bits(found, expected)
        if averages is not None:  # after one step it is the parameter
            for average, p in zip(averages, others, strict=True):
                assert torch.equal(average, p.detach().to(average.dtype))
        for p, gradient in zip(others, untouched, strict=True):
            assert torch.equal(p.grad, torch.zeros_like(gradient) if "zero_grad" in extras else gradient)


LAYOUTS = {
    "channels last": lambda: torch.nn.Parameter(torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)),
    "gradient in another order": lambda: torch.nn.Parameter(torch.randn(30, 20)),
    "complex": lambda: torch.nn.Parameter(torch.randn(17, 3, dtype=torch.complex64)),
    "unaligned": lambda: torch.nn.Parameter(torch.randn(1001)[1:]),
    "expanded gradient": lambda: torch.nn.Parameter(torch.randn(6, 5)),
    "sparse gradient": lambda: torch.nn.Parameter(torch.randn(6, 5)),
    "noise": lambda: torch.nn.Parameter(torch.randn(5, 300).t()),
}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_what_torch_has_to_do(layout, scale):
    """The engine, where it takes the parameter, and torch's path with its plain passes are at one."""
    results = []
    noise = {"noise": 0.01} if layout == "noise" else {}
    for reference in (False, True):
        torch.manual_seed(0)
        params = [LAYOUTS[layout](), torch.nn.Parameter(torch.randn(50))]
        momentum = 0.0 if layout == "sparse gradient" else 0.9  # torch's own step of a sparse gradient
        options = {"lr": 0.1, "momentum": momentum, "max_grad_norm": 0.5, "ema_decay": 0.9, **noise}
        clearing = {} if layout == "expanded gradient" else {"zero_grad": "in_step"}
        optimizer = trainopt.SGD(params, **options, **clearing)
        with mock.patch.object(switches, "REFERENCE_FORCED", reference):
            for step in range(3):
                torch.manual_seed(step + 1)
                for p in params:
                    gradient = torch.randn(p.shape, dtype=p.dtype) * scale
                    if layout == "gradient in another order" and p.dim() == 2:
                        gradient = gradient.t().contiguous().t()
                    if layout == "expanded gradient" and p.dim() == 2:
                        gradient = gradient[:1].expand_as(p)
                    if layout == "sparse gradient" and p.dim() == 2:
                        gradient = gradient.to_sparse(1)
                    p.grad = gradient
                optimizer.grad_scale = None if scale == 1 else torch.tensor(scale)
                optimizer.step()
                if clearing:
                    assert all(not p.grad.to_dense().any() for p in params)
        results.append([*params, *(optimizer.state[p]["ema"] for p in params), optimizer.grad_norm])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=3e-6, atol=3e-6)


class Scaler:
    """What GradScaler does for an optimizer that scales itself, on a device that torch has none for."""

    def __init__(self, device, init_scale, growth_interval):
        self.scale_of_loss = torch.tensor(init_scale, device=device)

    def get_scale(self):
        return self.scale_of_loss.item()

    def scale(self, loss):
        return loss * self.scale_of_loss

    def step(self, optimizer):
        assert optimizer._step_supports_amp_scaling
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        found = torch.stack([g.isfinite().all() for g in gradients]).all().logical_not().float()
        optimizer.grad_scale, optimizer.found_inf = self.scale_of_loss, found
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        self.scale_of_loss *= 1 - found / 2

    def update(self):
        pass


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [None, 0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_under_a_grad_scaler(name, dtype, overflow, fused, device):
    """A scale that is a power of two leaves no trace; a step that is skipped does nothing but clear the gradients.

    With fused, on a device, what it does is left to the device.
    """
    row = TABLE[name]
    start, gradients = problem(dtype)
    options = {**row.usual, **TAIL, "fused": fused}
    plain, expected = run(lambda params: row.make(params, **options), start, gradients, device=device)
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    optimizer = row.make(params, **options)
    scaler = (Scaler if device == "simt" else torch.amp.GradScaler)(device, init_scale=4.0, growth_interval=1000)
    for i, now in enumerate(gradients):
        for attempt in ("overflow", "again") if i == overflow else ("again",):
            before = snapshot(optimizer)
            for p, g in zip(params, now, strict=True):
                scaled = g.to(p) * scaler.get_scale()
                p.grad = scaled if p.grad is None else p.grad.add_(scaled)
            if attempt == "overflow":
                params[-1].grad[3] = math.inf
            scaler.scale(torch.ones((), device=device))
            scaler.step(optimizer)
            scaler.update()
            assert all(not p.grad.any() for p in params)
            assert optimizer.last_step_skipped == (attempt == "overflow")
            if attempt == "overflow" and (device == "cpu" or i > 0):  # else it has made the states, for a first step
                assert_same_optimizer(before, snapshot(optimizer))
    assert_same_bits(outcome(optimizer, params), outcome(plain, expected))
    torch.testing.assert_close(optimizer.grad_norm, plain.grad_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", ["engine", "torch's path"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite(path, value, device, monkeypatch):
    monkeypatch.setattr(switches, "REFERENCE_FORCED", path != "engine")
    start, gradients = problem(torch.float32)
    broken = [g.clone() for g in gradients[1]]
    broken[1][2] = value
    for extras in ({"skip_nonfinite": True}, {"error_if_nonfinite": True}, {}):
        make = functools.partial(trainopt.AdamW, lr=0.1, **TAIL, **extras)
        optimizer, params = run(make, start, gradients[:1], device=device)
        before = snapshot(optimizer)
        for p, g in zip(params, broken, strict=True):
            p.grad.add_(g.to(device))
        if "error_if_nonfinite" in extras:
            with pytest.raises(RuntimeError, match="non-finite"):
                optimizer.step()
            assert_same_optimizer(before, snapshot(optimizer))
            continue
        optimizer.step()
        assert not optimizer.grad_norm.isfinite()
        assert all(not p.grad.any() for p in params)
        if extras:
            assert optimizer.last_step_skipped
            assert_same_optimizer(before, snapshot(optimizer))
        else:  # as torch's clip_grad_norm_ leaves it
            assert params[1].isnan()[2] and params[1].isnan().all() == math.isnan(value)


def test_the_norm_is_that_of_all_groups_with_a_limit(device):
    start, gradients = problem(torch.float32)
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g.to(device, copy=True)
    free = torch.nn.Parameter(torch.zeros(5, device=device))
    free.grad = torch.full_like(free, 100.0)
    groups = [
        {"params": params[:3]},
        {"params": params[3:], "max_grad_norm": 2.0},
        {"params": [free], "max_grad_norm": None},
    ]
    optimizer = trainopt.SGD(groups, lr=1.0, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    optimizer.step()
    norm = torch.cat([g.flatten() for g in gradients[0]]).double().norm()
    torch.testing.assert_close(optimizer.grad_norm.cpu(), norm.float())
    assert optimizer.grad_norm.device.type == params[0].device.type and optimizer.grad_norm.dim() == 0
    for i, (p, begun, g) in enumerate(zip(params, start, gradients[0], strict=True)):
        torch.testing.assert_close(p.detach().cpu(), begun - g * ((1.0 if i < 3 else 2.0) / norm).float())
        assert torch.equal(p.grad.cpu(), g)  # neither clipped nor cleared in memory
    assert torch.equal(free.detach().cpu(), torch.full((5,), -100.0))


# The average ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_weights_of_the_average_are_the_recursions(decay, warmup):
    """The engine's by what they make of a parameter that is t in step t; the plain form's by themselves."""
    group = {"ema_decay": decay, "ema_warmup": warmup}
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = trainopt.SGD([p], lr=1.0, **group)
    average, product = 0.0, 1.0
    for t in range(1, 200):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        now = min(decay, t / (9 + t)) if warmup else decay
        product *= now
        weight = (1 - now) / (1 - product)
        average += weight * (t - average)
        assert trainopt.optim.average.weight_at(group, t) == pytest.approx(weight, rel=1e-11)
        assert optimizer.state[p]["ema"].item() == pytest.approx(average, rel=1e-11)


def averaging(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).to(dtype)
    optimizer = trainopt.AdamW(model.named_parameters(), lr=0.1, ema_decay=0.9, **options)
    return model, optimizer


def train(model, optimizer, steps, seed=0):
    for step in range(steps):
        torch.manual_seed(100 * seed + step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_are_put_in_and_taken_out(dtype):
    model, optimizer = averaging(dtype)
    with optimizer.averaged_parameters():
        pass  # there is none yet
    train(model, optimizer, 3)
    trained = copy.deepcopy(model.state_dict())
    averages = optimizer.ema_state_dict()
    assert list(averages) == list(trained) and {a.dtype for a in averages.values()} == {torch.float32}
    assert any(not torch.equal(averages[key].to(dtype), trained[key]) for key in trained)
    with pytest.raises(KeyError), optimizer.averaged_parameters():
        for key, value in model.state_dict().items():
            assert torch.equal(value, averages[key].to(dtype))
        with pytest.raises(RuntimeError, match="averaged_parameters"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="already"), optimizer.averaged_parameters():
            pass
        model.load_state_dict(averages)
        raise KeyError
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    train(model, optimizer, 1)


def test_ema_state_dict_without_names_and_without_averages():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = trainopt.SGD([{"params": params[:2]}, {"params": params[2:], "ema_decay": None}], lr=1, ema_decay=0.5)
    for _ in range(2):
        for p in params[1:]:
            p.grad = torch.ones(3)
        optimizer.step()
    assert {key: value[0].item() for key, value in optimizer.ema_state_dict().items()} == {
        0: 1.0,
        1: pytest.approx(-2 / 3),
        2: -1.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_loaded_and_resumed_bit_for_bit(dtype):
    model, optimizer = averaging(dtype, max_grad_norm=1.0, zero_grad="in_step")
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = averaging(dtype)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["max_grad_norm"] == 1.0 and resumed.param_groups[0]["zero_grad"] == "in_step"
    for one in ((model, optimizer), (other, resumed)):
        train(*one, 2, seed=1)
    assert_same_bits(*(outcome(o, list(m.parameters())) for m, o in ((model, optimizer), (other, resumed))))
    stock = torch.optim.AdamW(other.parameters(), lr=0.1)
    stock.load_state_dict(optimizer.state_dict())
    train(other, stock, 1)


@pytest.mark.parametrize("name", TABLE)
def test_an_average_that_begins_in_the_middle_of_a_run(name):
    row = TABLE[name]
    start, gradients = problem(torch.float64)
    results = []
    for reference in (False, True):
        with mock.patch.object(switches, "REFERENCE_FORCED", reference):
            optimizer, params = run(lambda params: row.make(params, **row.usual), start, gradients)
            optimizer.param_groups[0]["ema_decay"] = 0.5
            before = [p.detach().clone() for p in params]
            for p, g in zip(params, gradients[0], strict=True):
                p.grad = g.clone()
            optimizer.step()
            results.append(outcome(optimizer, params))
    for key, tensors in results[0].items():
        for ours, plain in zip(tensors, results[1][key], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    t = int(optimizer.state[params[0]]["step"])
    weight = 0.5 / (1 - 0.5**t)
    for average, was, p in zip(results[0]["ema"], before, params, strict=True):
        torch.testing.assert_close(average, was + weight * (p.detach() - was), rtol=1e-10, atol=1e-12)


# What does not go -----------------------------------------------------------------------------------------------------

#: What acts without a graph.
ACTING = {"max_grad_norm": 1.0, "zero_grad": "in_step", "ema_decay": 0.5, "state_dtype": "bfloat16"}
ACTING |= {"precision": "master", "cautious": True, "stats": True}


@pytest.mark.parametrize("name", TABLE)
def test_options_that_do_not_go_together(name):
    """Single values that make no sense are in test_options."""
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="either raises or is left out"):
        TABLE[name].ours([p], max_grad_norm=1.0, error_if_nonfinite=True, skip_nonfinite=True)
    if TABLE[name].defaults.get("differentiable") is not None:
        for option, value in ACTING.items():
            with pytest.raises(ValueError, match=f"{option}={value!r} does not go with differentiable=True"):
                TABLE[name].ours([p], **{option: value}, differentiable=True)


def test_explain_says_what_the_step_does_beside_the_update():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).bfloat16())]
    rows = trainopt.explain(
        trainopt.AdamW([{"params": params[:1]}, {"params": params[1:], "max_grad_norm": None}], **TAIL)
    )
    assert "to a norm of 20 over all" in rows[0].note and "in float32" in rows[0].note and "clears" in rows[0].note
    assert "norm" not in rows[1].note and "average is kept, in float32" in rows[1].note


def test_a_compiled_step_runs_uncompiled():
    results = []
    for compiled in (True, False):
        params = [torch.nn.Parameter(torch.full((n,), 2.0)) for n in (3, 5)]
        optimizer = trainopt.AdamW(params, lr=0.1, **{**TAIL, "max_grad_norm": 0.5})
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            for p in params:
                p.grad = torch.arange(float(p.numel()))
            step()
        results.append(outcome(optimizer, params))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_that_are_unscaled_already(name):
    """`scaler.unscale_` before the step, with or without a look at the norm: as without a scaler."""
    row = TABLE[name]
    start, gradients = problem(torch.float32)
    plain, expected = run(lambda params: row.make(params, **row.usual, **TAIL), start, gradients)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = row.make(params, **row.usual, **TAIL)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g * 8.0 if p.grad is None else p.grad.add_(g * 8.0)
        scaler.unscale_(optimizer)
        norm = trainopt.get_total_norm([p.grad for p in params])
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(norm, optimizer.grad_norm)
    assert_same_bits(outcome(optimizer, params), outcome(plain, expected))
