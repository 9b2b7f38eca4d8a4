"""What the engine does not take goes through torch's own step in the same call, with torch's results and errors."""

import pytest
import torch
from edits import in_inference_mode, lazily_negated
from helpers import (
    CLASSES,
    OPTIONS,
    Counting,
    Loud,
    Twins,
    assert_drop_in,
    assert_equal,
    assert_same_bits,
    attempt,
    each_class,
    error_of,
    mixed,
    paths,
    skip_unless_taken,
    snapshot,
    step_randomly,
)
from torch.testing._internal.two_tensor import TwoTensor

import trainopt
from trainopt._extension import _C


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
    mixed("SGD", lambda: parameter(4, 5), sparse_gradient, options=options, finish=with_dense_momentum)


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


def two(p=None, _=None):
    """A wrapper by __torch_dispatch__: two tensors in one, with no memory of its own."""
    return TwoTensor(*(torch.randn(4, 5, dtype=torch.float64) for _ in range(2)))


def torn_apart(optimizer, params):
    return optimizer, [part for p in params for part in ([p.data.a, p.data.b] if type(p.data) is TwoTensor else [p])]


MANY_DIMENSIONS = (2,) * 12  # in an awkward order, so that none join: more than the engine lays out
AWKWARD = tuple(range(11, -1, -1))


def ordinary(p, _):
    return torch.randn(p.shape, dtype=p.dtype)


def changed(change):
    """A gradient of which something was made that the engine does not take, or has to look at."""
    return lambda p, step: change(ordinary(p, step))


#: A parameter among ordinary ones, its gradients, and who steps it by what explain says.
KINDS = {
    "complex64": (lambda: parameter(dtype=torch.complex64), ordinary, "torch"),
    "complex128": (lambda: parameter(dtype=torch.complex128), ordinary, "torch"),
    "a subclass": (lambda: torch.nn.Parameter(parameter().detach().as_subclass(Loud)), ordinary, "torch"),
    "a wrapper subclass": (lambda: torch.nn.Parameter(two()), two, "torch"),
    "a gradient of a subclass": (parameter, changed(lambda g: g.as_subclass(Loud)), None),
    "a lazily negated gradient": (parameter, changed(lazily_negated), "torch"),
    "a gradient made in inference mode": (parameter, changed(in_inference_mode), "fused"),
    "a gradient of many dimensions": (
        lambda: parameter(*MANY_DIMENSIONS),
        changed(lambda g: g.permute(AWKWARD)),
        "torch",
    ),
}


@each_class
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"maximize": True}], ids=str)
def test_parameters_and_gradients_of_other_kinds(name, kind, flags):
    skip_unless_taken(name, kind)
    make, gradient, path = KINDS[kind]
    ours, torchs = mixed(name, make, gradient, options={**OPTIONS[name], **flags}, finish=torn_apart)
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
def test_a_subclass_as_state(name):
    def program(cls):
        params = [parameter() for _ in range(3)]
        optimizer, _ = step_randomly(cls(params, **OPTIONS[name]), params, 2)
        state = optimizer.state[params[0]]
        state.update({key: value.as_subclass(Loud) for key, value in state.items()})
        step_randomly(optimizer, params, 1)
        optimizer.state.clear()
        return optimizer, params

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
