"""What the engine does not take goes through torch's own step in the same call, with torch's results and errors."""

import contextlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import (
    CLASSES,
    NAMES,
    OPTIONS,
    SHAPES,
    TABLE,
    Twins,
    assert_drop_in,
    assert_equal,
    assert_same_bits,
    assert_same_outcome,
    attempt,
    each_class,
    error_of,
    skip_unless_taken,
    snapshot,
    step_randomly,
)
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainopt
from trainopt._extension import _C


def paths(optimizer):
    return ["torch" if row.path == "torch" else "fused" for row in trainopt.explain(optimizer)]


def mixed(name, make, gradient, steps=4, options=None):
    """Steps the parameter that `make` makes among ordinary ones in both classes; returns both (optimizer, params)."""

    def program(cls):
        params = [torch.nn.Parameter(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2)]
        params.insert(1, make())
        optimizer = cls(params, **(options or OPTIONS[name]))
        for step in range(steps):
            for i, p in enumerate(params):
                p.grad = gradient(p, step) if i == 1 else torch.randn_like(p)
            optimizer.step()
        return optimizer, params

    return assert_drop_in(name, program)


def parameter(*shape, dtype=torch.float64):
    return torch.nn.Parameter(torch.randn(shape or (3, 4), dtype=dtype))


# Gradients of other kinds ---------------------------------------------------------------------------------------------


def sparse_gradient(p, step):
    rows = torch.tensor([step % 4, 2])
    return torch.sparse_coo_tensor(
        rows[None], torch.randn(2, p.shape[1], dtype=p.dtype), p.shape, check_invariants=True
    )


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "maximize": True}, {"lr": 0.1, "momentum": 0.9}], ids=str)
def test_sgd_takes_sparse_gradients(options):
    def program(cls):
        params = [parameter(4, 5) for _ in range(3)]
        optimizer = cls(params, **options)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = sparse_gradient(p, step) if i == 1 else torch.randn_like(p)
            optimizer.step()
        return with_dense_momentum(optimizer, params)

    assert_drop_in("SGD", program)


def with_dense_momentum(optimizer, params):
    for state in optimizer.state.values():
        if isinstance(state.get("momentum_buffer"), torch.Tensor):
            state["momentum_buffer"] = state["momentum_buffer"].to_dense()
    return optimizer, params


def test_an_embedding_with_sparse_gradients_trains():
    def program(cls):
        model = torch.nn.Sequential(torch.nn.Embedding(20, 6, sparse=True), torch.nn.Linear(6, 3)).double()
        optimizer = cls(model.parameters(), lr=0.1)
        for i in range(4):
            optimizer.zero_grad()
            model(torch.tensor([i, 3, 7])).square().sum().backward()
            optimizer.step()
        return optimizer, list(model.parameters())

    assert_drop_in("SGD", program)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("warm", [0, 2])
def test_adam_refuses_sparse_gradients_before_anything_changes(name, warm):
    twins = Twins(name, shapes=((4, 5), (4, 5), (3,)))
    twins.step(warm)
    twins.set_gradients()
    twins.edit(lambda _, params: setattr(params[1], "grad", params[1].grad.to_sparse()))
    assert not twins.step_alike() and len(twins.ours.optimizer.state) == (3 if warm else 0)


SPARSE_REFUSED = {
    "SGD, decay": ("SGD", {"weight_decay": 0.1}),
    "SGD, decay, cautious": ("SGD", {"weight_decay": 0.1, "cautious": True}),
    "SGD, decay, l1": ("SGD", {"weight_decay": 0.1, "l1": 0.1}),
    "Adam": ("Adam", {}),
    "Adam, states apart": ("Adam", {"state_dtype": "bfloat16"}),
    "Adam, decay, cautious": ("Adam", {"weight_decay": 0.1, "cautious": True}),
    "AdamW, l1": ("AdamW", {"l1": 0.1}),
    "Lion, states apart": ("Lion", {"state_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name, options", SPARSE_REFUSED.values(), ids=SPARSE_REFUSED)
@pytest.mark.parametrize("warm", [0, 1])
@pytest.mark.parametrize("path", ["engine", "torch's path"])
def test_a_sparse_gradient_is_refused_before_another_group_changes(name, options, warm, path, monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path != "engine")
    params = [parameter(4, 5, dtype=torch.float32) for _ in range(3)]
    optimizer = getattr(trainopt, name)([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(warm):
        optimizer.step()
    params[2].grad = params[2].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("name", ["SGD", "Lion", "LAMB", "LARS"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"cautious": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("path", ["engine", "torch's path"])
def test_conjugated_gradients_are_as_others(name, options, path, monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path != "engine")
    results = []
    for is_lazy in (False, True):
        torch.manual_seed(0)
        p = parameter(dtype=torch.complex64)
        optimizer = getattr(trainopt, name)([p], lr=0.1, **options)
        for _ in range(2):
            gradient = torch.randn_like(p.detach()).conj()
            p.grad = gradient if is_lazy else gradient.resolve_conj()
            assert p.grad.is_conj() == is_lazy
            optimizer.step()
        results.append(p.detach())
    assert_equal(*results)
    if name != "SGD" or "cautious" in options:  # torch's own step takes it
        p = torch.nn.Parameter(p.detach().conj())
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="conjugated view"):
            getattr(trainopt, name)([p], **options).step()


class Loud(torch.Tensor):
    """A subclass by __torch_function__, which writes down what is done to it."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


def lazily_negated(p, _):
    """x.imag of a conjugate is a real tensor whose negation is not yet done."""
    return torch.complex(torch.randn_like(p), torch.randn_like(p)).conj().imag


def made_in_inference_mode(p, _):
    with torch.inference_mode():
        return torch.randn(p.shape, dtype=p.dtype)


MANY_DIMENSIONS = (2,) * 12  # in an awkward order, so that none join: more than the engine lays out
AWKWARD = tuple(range(11, -1, -1))

#: A parameter among ordinary ones, its gradients, and who steps it by what explain says.
KINDS = {
    "complex64": (lambda: parameter(dtype=torch.complex64), lambda p, _: torch.randn_like(p), "torch"),
    "complex128": (lambda: parameter(dtype=torch.complex128), lambda p, _: torch.randn_like(p), "torch"),
    "a subclass": (
        lambda: torch.nn.Parameter(parameter().detach().as_subclass(Loud)),
        lambda p, _: torch.randn(p.shape, dtype=p.dtype),
        "torch",
    ),
    "a gradient of a subclass": (parameter, lambda p, _: torch.randn_like(p).as_subclass(Loud), None),
    "a lazily negated gradient": (parameter, lazily_negated, "torch"),
    "a gradient made in inference mode": (parameter, made_in_inference_mode, "fused"),
    "a gradient of many dimensions": (
        lambda: parameter(*MANY_DIMENSIONS),
        lambda p, _: torch.randn(p.shape, dtype=p.dtype).permute(AWKWARD),
        "torch",
    ),
}


@each_class
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"maximize": True}], ids=str)
def test_parameters_and_gradients_of_other_kinds(name, kind, flags):
    skip_unless_taken(name, kind)
    make, gradient, path = KINDS[kind]
    ours, torchs = mixed(name, make, gradient, options={**OPTIONS[name], **flags})
    assert type(ours[1][1]) is type(torchs[1][1])
    assert path is None or paths(ours[0]) == ["fused", path, "fused"]


@each_class
def test_a_lazy_clone_keeps_its_own_values(name):
    """A copy-on-write clone of a parameter, taken before the step, is not stepped."""
    p = torch.nn.Parameter(torch.ones(100))
    kept = torch._lazy_clone(p.detach())
    p.grad = torch._lazy_clone(torch.ones(100))
    source = p.grad
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    optimizer.step()
    assert (kept == 1).all() and (p != 1).all() and (source == 1).all()


@each_class
def test_a_parameter_that_overlaps_itself(name):
    """torch's in-place operations refuse it; so must the step, and not crash."""
    messages = []
    for cls in CLASSES[name]:
        p = torch.nn.Parameter(torch.ones(1, 5).expand(4, 5))
        optimizer = cls([p], **OPTIONS[name])
        p.grad = torch.ones(4, 5)
        messages.append(error_of(optimizer.step))
    assert messages[0][0] is messages[1][0] is RuntimeError and "memory" in messages[0][1]


# Differentiable -------------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("maximize", [False, True])
def test_differentiable_lets_gradients_through_as_torch_does(name, maximize):
    skip_unless_taken(name, "differentiable")
    options = {**OPTIONS[name], "differentiable": True, "maximize": maximize}
    options = {key: value for key, value in options.items() if key not in ("amsgrad", "centered")}
    gradients = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        source = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        gradient = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        p = source.clone()
        p.retain_grad()
        p.grad = gradient
        optimizer = cls([p], **options)
        for key in CLASSES[name][0]._states:
            if not key.startswith("max_"):
                optimizer.state[p][key] = torch.rand(4, 5, dtype=torch.float64)
        optimizer.state[p].update({key: torch.tensor(0.5) for key in CLASSES[name][0]._numbers})
        if name != "SGD":
            optimizer.state[p]["step"] = torch.tensor(3.0)
        optimizer.step()
        p.square().sum().backward()
        gradients.append((source.grad, p.detach(), gradient.grad))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_equal(mine, theirs)
    assert gradients[0][0].abs().sum() > 0


@each_class
def test_gradients_flow_to_a_learning_rate(name):
    skip_unless_taken(name, "differentiable")
    found = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        p = torch.randn(4, 5, dtype=torch.float64, requires_grad=True).clone()
        p.retain_grad()
        optimizer = cls([p], lr=lr, differentiable=True)
        p.grad = torch.ones(4, 5, dtype=torch.float64)
        outcome = attempt(optimizer.step)
        if outcome is None:
            p.square().sum().backward()
        found.append((outcome, lr.grad))
    assert found[0][0] == found[1][0]
    if found[1][1] is not None:
        assert_equal(found[0][1], found[1][1])


# Subclasses, modes, devices -------------------------------------------------------------------------------------------


def in_place(calls):
    return [call for call in calls if call.endswith("_") and not call.endswith("__")]


@each_class
def test_a_subclass_sees_the_operations(name):
    seen = []
    for optimizer, _ in mixed(name, *KINDS["a subclass"][:2], steps=2):
        Loud.calls.clear()
        optimizer.step()
        seen.append(in_place(Loud.calls))
    assert seen[0] == seen[1] and seen[0]


@each_class
def test_a_wrapper_subclass(name):
    """By __torch_dispatch__: two tensors in one, with no memory of its own."""

    def two():
        return TwoTensor(*(torch.randn(3, 4, dtype=torch.float64) for _ in range(2)))

    def program(cls):
        params = [parameter(), torch.nn.Parameter(two()), parameter()]
        optimizer = cls(params, **OPTIONS[name])
        for _ in range(4):
            for i, p in enumerate(params):
                p.grad = two() if i == 1 else torch.randn_like(p)
            optimizer.step()
        if cls is CLASSES[name][0]:
            assert paths(optimizer) == ["fused", "torch", "fused"]
        return optimizer, [params[0], params[1].data.a, params[1].data.b, params[2]]

    assert_drop_in(name, program)


@each_class
def test_a_subclass_as_state(name):
    def program(cls):
        optimizer, params = step_randomly(*made(cls), 2)
        for key, value in optimizer.state[params[0]].items():
            optimizer.state[params[0]][key] = value.as_subclass(Loud)
        step_randomly(optimizer, params, 1)
        optimizer.state.clear()
        return optimizer, params

    def made(cls):
        params = [parameter() for _ in range(3)]
        return cls(params, **OPTIONS[name]), params

    assert_drop_in(name, program)


@each_class
def test_parameters_on_meta(name):
    def run(cls):
        p, q = torch.nn.Parameter(torch.ones(3, device="meta")), torch.nn.Parameter(torch.ones(3))
        optimizer = cls([p, q], **OPTIONS[name])
        for _ in range(3):
            p.grad, q.grad = torch.ones(3, device="meta"), torch.ones(3)
            optimizer.step()
        assert (q != 1).all() and p.is_meta

    ours, torchs = (attempt(lambda cls=cls: run(cls)) for cls in CLASSES[name])
    assert ours == torchs


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@each_class
def test_a_dispatch_mode_sees_the_step(name):
    twins = Twins(name)
    for _ in range(3):
        twins.set_gradients()
        seen = []
        for side in twins.sides:
            with Counting() as mode:
                side.optimizer.step()
            seen.append(sum("_." in call for call in mode.calls))
        assert seen[0] == seen[1] > 5
        twins.compare()
    twins.step(2)


@each_class
def test_fake_tensors(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    if name in ("ASGD", "Adafactor"):
        pytest.skip("torch's asks what its average's weight is, or a norm")
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.randn(3, 4))
        optimizer = CLASSES[name][0]([p], **OPTIONS[name])
        for _ in range(2):
            p.grad = torch.randn(3, 4)
            optimizer.step()
    assert p.shape == (3, 4)


@pytest.fixture(scope="module")
def mesh():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@each_class
@pytest.mark.parametrize("sharded", [True, False])
def test_dtensors(name, sharded, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not TABLE[name].takes_shards:
        pytest.skip(f"torch's {name} refuses shards, and in torch 2.11 replicas too")
    placement = [Shard(0) if sharded else Replicate()]

    def make():
        return torch.nn.Parameter(distribute_tensor(torch.randn(4, 5, dtype=torch.float64), mesh, placement))

    def gradient(p, _):
        return distribute_tensor(torch.randn(4, 5, dtype=torch.float64), mesh, placement)

    # torch's loop itself cannot mix them with ordinary tensors in one call of foreach; its plain loop can.
    ours, torchs = mixed(name, make, gradient, options={**OPTIONS[name], "foreach": False})
    assert paths(ours[0]) == ["fused", "fused", "fused"]
    for key, value in torchs[0].state[torchs[1][1]].items():
        mine = ours[0].state[ours[1][1]][key]
        assert type(mine) is type(value) and getattr(mine, "placements", 0) == getattr(value, "placements", 0)


@each_class
@pytest.mark.parametrize("extras", [{"l1": 0.1}, {"l1": 0.5, "l1_proximal": True}, {"noise": 0.1}], ids=str)
def test_extras_on_dtensors_equal_the_engines(name, extras, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.manual_seed(0)
    value = torch.randn(4, 5)
    plain = torch.nn.Parameter(value.clone())
    distributed = torch.nn.Parameter(distribute_tensor(value.clone(), mesh, [Replicate()]))
    optimizers = [CLASSES[name][0]([p], **OPTIONS[name], **extras) for p in (plain, distributed)]
    for _ in range(3):
        gradient = torch.randn(4, 5)
        plain.grad = gradient.clone()
        distributed.grad = distribute_tensor(gradient, mesh, [Replicate()])
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(distributed.to_local(), plain, rtol=1e-5, atol=1e-6)


# The extras on torch's path -------------------------------------------------------------------------------------------

EXTRAS = {
    "l1": {"l1": 0.05},
    "l1, maximize": {"l1": 0.05, "maximize": True},
    "l1_proximal": {"l1": 0.5, "l1_proximal": True},
    "l1_proximal, maximize": {"l1": 0.5, "l1_proximal": True, "maximize": True},
    "noise": {"noise": 0.25, "seed": 3},
    "noise, large seed": {"noise": 0.25, "seed": 2**64 - 1},
    "all": {"l1": 0.05, "noise": 0.125, "weight_decay": 0.2},
    "plain": {},
}
BIAS = {
    "uncorrected": {"bias_correction": False},
    "uncorrected, all": {"bias_correction": False, "l1": 0.1, "noise": 0.1},
}
HAVE_BIAS = [name for name in NAMES if "bias_correction" in CLASSES[name][0].EXTRAS]
CASES = [(n, e) for n in NAMES for e in ({**EXTRAS, **BIAS} if n in HAVE_BIAS else EXTRAS)]


def stepped(name, options, steps=4, lr=None, missing=()):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES]
    params.append(torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64).t()))
    optimizer = CLASSES[name][0](params, **{**OPTIONS[name], **options})
    for step in range(steps):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, dtype=torch.float64)
            p.grad = None if (step, i) in missing else gradient
            with torch.no_grad():
                p.view(-1)[:1].zero_() if p.is_contiguous() else None  # sign(0)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("name, extra", CASES)
def test_the_reference_path_computes_what_the_engine_does(name, extra, monkeypatch):
    options = TABLE[name].kept({**EXTRAS, **BIAS}[extra])
    missing = {(0, 2), (1, 2), (2, 3)}
    engine = stepped(name, options, missing=missing)
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    reference = stepped(name, options, missing=missing)
    assert set(paths(reference[0])) == {"torch"}
    assert_same_outcome(engine, reference, rtol=1e-6 if "noise" in extra or "all" in extra else 1e-12, atol=1e-9)
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", False)
    assert set(paths(stepped(name, options)[0])) == {"fused"}


@pytest.mark.parametrize("name, extra", CASES)
def test_a_parameter_on_torchs_path_has_the_extras_of_the_engine(name, extra):
    """A subclass among ordinary parameters, against the same as an ordinary one."""
    options = TABLE[name].kept({**EXTRAS, **BIAS}[extra])
    sides = []
    for exotic in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(40, dtype=torch.float64)) for _ in range(3)]
        if exotic:
            params[1] = torch.nn.Parameter(params[1].detach().as_subclass(Loud))
        optimizer = CLASSES[name][0](params, **{**OPTIONS[name], **options})
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(40, dtype=torch.float64)
            optimizer.step()
        sides.append((optimizer, params))
    assert paths(sides[1][0]) == ["fused", "torch", "fused"]
    for (a, p), (b, q) in zip(*([(s[0], p) for p in s[1]] for s in sides), strict=True):
        assert_equal(torch.Tensor(q.detach()), p, rtol=1e-7, atol=1e-9)
        assert set(a.state[p]) == set(b.state[q])


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


# Inference mode -------------------------------------------------------------------------------------------------------


@each_class
def test_steps_inside_inference_mode(name):
    """The states made there are inference tensors, which torch then refuses to step outside."""
    twins = Twins(name)
    for _ in range(2):
        twins.set_gradients()
        with torch.inference_mode():
            twins.edit(lambda o, _: o.step())
        twins.compare()
    twins.set_gradients()
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours is None or ours == torchs


@each_class
def test_parameters_made_in_inference_mode(name):
    outcomes = []
    for cls in CLASSES[name]:
        with torch.inference_mode():
            p = torch.ones(5)
        optimizer = cls([p], **OPTIONS[name])
        with torch.inference_mode():
            p.grad = torch.ones(5)
            outcomes.append((attempt(optimizer.step), p.clone()))
        outcomes[-1] += (attempt(optimizer.step),)
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[0][2] in (None, outcomes[1][2])  # outside of it torch refuses to write to them
    with torch.inference_mode():
        assert_equal(outcomes[0][1], outcomes[1][1])


@each_class
@pytest.mark.parametrize("what", ["parameter", "states", "step"])
@pytest.mark.parametrize("warm", [False, True], ids=["at first", "after a step in inference mode"])
def test_inference_tensors_are_written_to_only_in_inference_mode(name, what, warm):
    outcomes = []
    for cls, flags in zip(CLASSES[name], ({}, {"foreach": False}), strict=True):
        p = torch.ones(5, dtype=torch.float64)
        if what == "parameter":
            with torch.inference_mode():
                p = torch.ones(5, dtype=torch.float64)
        optimizer = cls([p], **OPTIONS[name], **flags)
        with torch.inference_mode():
            p.grad = torch.ones(5, dtype=torch.float64)
            if what != "parameter" or warm:
                optimizer.step()
                for key, value in optimizer.state[p].items() if what != "parameter" else ():
                    with torch.inference_mode((key == "step") == (what == "step")):
                        optimizer.state[p][key] = value.clone()
            if warm:
                optimizer.step()
                optimizer.step()
        outcomes.append((attempt(optimizer.step), p.tolist()))
        with torch.inference_mode():
            outcomes[-1] += (attempt(optimizer.step), p.tolist())
    assert outcomes[0][0] == outcomes[1][0]
    if name == "SGD" and what == "step":
        return
    assert outcomes[0][0][0] is RuntimeError and "inference" in outcomes[0][0][1]
    assert outcomes[0][2] is outcomes[1][2] is None


@pytest.mark.slow
def test_imported_in_inference_mode():
    """What an ordinary tensor is must not be learnt from one that is not."""
    program = (
        "import torch\nwith torch.inference_mode(): import trainopt\n"
        "p = torch.nn.Parameter(torch.ones(3)); print(trainopt.explain(trainopt.AdamW([p]))[0].path)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("fused")


# The order of states --------------------------------------------------------------------------------------------------


def of_other_kind(kind):
    p = torch.nn.Parameter(torch.randn(4, 5, dtype=torch.complex128 if kind == "complex" else torch.float64))
    return torch.nn.Parameter(p.detach().as_subclass(Loud)) if kind == "subclass" else p


@each_class
@pytest.mark.parametrize("kind", ["complex", "subclass"])
@pytest.mark.parametrize("late", [False, True])
def test_states_come_in_the_parameters_order_whoever_makes_them(name, kind, late):
    skip_unless_taken(name, kind)
    orders = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        params = [of_other_kind(kind) if i % 2 else of_other_kind("") for i in range(6)]
        optimizer = cls(params, **OPTIONS[name])
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = None if late and step == 0 and i in (0, 3) else torch.randn(4, 5, dtype=p.dtype)
            optimizer.step()
        orders.append(list(optimizer.state_dict()["state"]))
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(6))
    assert late or orders[0] == list(range(6))


# Groups without trainopt's own options --------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("kind", ["", "complex", "sparse"])
@pytest.mark.parametrize("how", ["appended", "replaced"])
@pytest.mark.parametrize("path", ["engine", "torch's path"])
def test_a_group_of_torchs_own(name, kind, how, path, monkeypatch):
    skip_unless_taken(name, kind)
    if kind == "sparse" and name != "SGD":
        return
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path != "engine")
    options = {"lr": 0.1, "momentum": 0.9} if kind == "sparse" else OPTIONS[name]

    def program(cls):
        params = [of_other_kind(kind) for _ in range(2)]
        optimizer = cls(params[:1], **options)
        theirs = CLASSES[name][1](params[1:] if how == "appended" else params, **options).param_groups[0]
        optimizer.param_groups[:] = [*(optimizer.param_groups if how == "appended" else []), theirs]
        optimizer.init_state() if hasattr(optimizer, "init_state") and kind == "" else None
        for step in range(3):
            for p in params:
                p.grad = sparse_gradient(p, step) if kind == "sparse" else torch.randn_like(p)
            optimizer.step()
        trainopt.explain(optimizer)
        return with_dense_momentum(optimizer, params)

    assert_drop_in(name, program)


# What the plan says of a step -----------------------------------------------------------------------------------------


class Foreign(dict):
    def __getitem__(self, key):
        return super().__getitem__(key)


ANSWERS = {
    "states are missing": (lambda group, state: state.clear(), "unfinished", {"missing": [0, 1]}),
    "a part of torch's": (lambda group, state: group.update(differentiable=True), "unfinished", {"rest": [0, 1]}),
    "an odd option": (lambda group, state: group.update(eps=None), "unfinished", {"rest": [0, 1], "doubtful": [0]}),
    "steps may be skipped": (lambda group, state: group.update(skip_nonfinite=True), "look at gradients", {}),
    "gradients are clipped": (lambda group, state: group.update(max_grad_norm=1.0), "look at gradients", {}),
    "nothing to say": (lambda group, state: None, "done", {}),
}


@pytest.mark.parametrize("edit, status, indices", ANSWERS.values(), ids=ANSWERS)
def test_the_plan_says_what_became_of_a_step(edit, status, indices):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    optimizer = trainopt.AdamW(params)
    optimizer.init_state()
    (group,) = optimizer.param_groups
    edit(group, optimizer.state)
    before = snapshot(optimizer)
    answer = _C.Plan("adam").step([group], optimizer.state, 1.0)
    assert answer.status == status
    lists = {name: getattr(answer, name) for name in ("missing", "rest", "sharing", "doubtful")}
    assert {name: found for name, found in lists.items() if found} == indices
    if status != "done":
        assert_same_bits(before, snapshot(optimizer))
        assert _C.Plan("adam").step([Foreign(group)], optimizer.state, 1.0).status == "foreign containers"
