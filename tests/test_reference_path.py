"""torch's path has what the engine adds to torch's optimizers, and a run may go from one to the other at any step."""

import contextlib

import pytest
import torch
from helpers import (
    CLASSES,
    NAMES,
    OPTIONS,
    SHAPES,
    TABLE,
    Counting,
    Loud,
    Twins,
    assert_equal,
    assert_same_outcome,
    each_class,
    paths,
    skip_unless_taken,
)

EXTRAS = {
    "l1": {"l1": 0.05},
    "l1, maximize": {"l1": 0.05, "maximize": True},
    "l1_proximal": {"l1": 0.5, "l1_proximal": True},
    "l1_proximal, maximize": {"l1": 0.5, "l1_proximal": True, "maximize": True},
    "noise": {"noise": 0.25, "seed": 3},
    "noise, large seed": {"noise": 0.25, "seed": 2**64 - 1},
    "all": {"l1": 0.05, "noise": 0.125, "weight_decay": 0.2},
    "plain": {},
    "uncorrected": {"bias_correction": False},
    "uncorrected, all": {"bias_correction": False, "l1": 0.1, "noise": 0.1},
}
each_case = pytest.mark.parametrize(
    "name, extra",
    [(n, e) for n in NAMES for e in EXTRAS if "uncorrected" not in e or "bias_correction" in CLASSES[n][0].EXTRAS],
)


def stepped(name, options, missing=()):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES]
    params.append(torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64).t()))
    optimizer = CLASSES[name][0](params, **{**OPTIONS[name], **options})
    for step in range(4):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, dtype=torch.float64)
            p.grad = None if (step, i) in missing else gradient
            with torch.no_grad():
                p.view(-1)[:1].zero_() if p.is_contiguous() else None  # sign(0)
        optimizer.step()
    return optimizer, params


@each_case
def test_the_reference_path_computes_what_the_engine_does(name, extra, monkeypatch):
    options = TABLE[name].kept(EXTRAS[extra])
    missing = {(0, 2), (1, 2), (2, 3)}
    engine = stepped(name, options, missing=missing)
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    reference = stepped(name, options, missing=missing)
    assert set(paths(reference[0])) == {"torch"}
    assert_same_outcome(engine, reference, rtol=1e-6 if "noise" in extra or "all" in extra else 1e-12, atol=1e-9)
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", False)
    assert set(paths(stepped(name, options)[0])) == {"fused"}


@each_case
def test_a_parameter_on_torchs_path_has_the_extras_of_the_engine(name, extra):
    """A subclass among ordinary parameters, against the same as an ordinary one."""
    options = TABLE[name].kept(EXTRAS[extra])
    sides = []
    for is_exotic in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(40, dtype=torch.float64)) for _ in range(3)]
        if is_exotic:
            params[1] = torch.nn.Parameter(params[1].detach().as_subclass(Loud))
        optimizer = CLASSES[name][0](params, **{**OPTIONS[name], **options})
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(40, dtype=torch.float64)
            optimizer.step()
        sides.append((optimizer, params))
    (plain, params), (exotic, others) = sides
    assert paths(exotic) == ["fused", "torch", "fused"]
    for p, q in zip(params, others, strict=True):
        assert_equal(torch.Tensor(q.detach()), p, rtol=1e-7, atol=1e-9)
        assert set(plain.state[p]) == set(exotic.state[q])


@each_class
def test_a_run_that_moves_between_the_paths(name, monkeypatch):
    """Half of the steps by the engine, half by torch: one run, noise included."""
    straight = Twins(name, extras={"l1": 0.01, "noise": 0.25})
    mixed = Twins(name, extras={"l1": 0.01, "noise": 0.25})
    for step in range(6):
        for twins in (straight, mixed):
            twins.set_gradients()
        straight.ours.optimizer.step()
        with Counting() if step % 2 else contextlib.nullcontext():
            mixed.ours.optimizer.step()
    assert_same_outcome(straight.ours, mixed.ours, rtol=1e-7, atol=1e-9)


@each_class
@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_first_steps_on_torchs_path(name, dampening):
    """States made for one path and used on the other: a first step is a first step."""
    options = {"dampening": dampening} if name == "SGD" else {}
    for exotic in ([True, False, False], [False, True, False], [True, True, False]):
        twins = Twins(name, **options)
        for flag in exotic:
            twins.set_gradients()
            with Counting() if flag else contextlib.nullcontext():
                twins.ours.optimizer.step()
            twins.torchs.optimizer.step()
            twins.compare()


@each_class
def test_complex_parameters_with_extras(name):
    skip_unless_taken(name, "complex")
    p = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    optimizer = CLASSES[name][0]([p], **OPTIONS[name], l1=0.1, noise=0.1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert torch.view_as_real(p.detach()).isfinite().all()


@each_class
@pytest.mark.parametrize("fused", [None, True])
def test_a_gradient_scale_on_torchs_path(name, fused, monkeypatch):
    results = []
    for forced in (False, True):
        monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", forced)
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 7).double()
        optimizer = CLASSES[name][0](model.parameters(), **OPTIONS[name], fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 5, dtype=torch.float64)).square().sum()).backward()
            if i == 1:
                model.bias.grad[0] = float("nan")
            scaler.step(optimizer)
            if fused:
                assert optimizer.last_step_skipped == (i == 1)
            scaler.update()
        results.append((optimizer, list(model.parameters())))
    assert_same_outcome(*results)
