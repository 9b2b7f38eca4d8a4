"""What torch makes of odd options, states and containers, trainopt makes of them: the same result or the same error."""

import collections
import fractions
import types

import numpy as np
import pytest
import torch
from helpers import CLASSES, NAMES, OPTIONS, Twins, assert_same_bits, attempt, each_class, snapshot

import trainopt

# Options --------------------------------------------------------------------------------------------------------------


def put(**options):
    return lambda optimizer, _: optimizer.param_groups[0].update(options)


class Half(float):
    """A number of somebody's own."""


COMMON = {
    "lr None": put(lr=None),
    "lr a text": put(lr="fast"),
    "lr a list": put(lr=[0.5]),
    "lr complex": put(lr=0.5 + 0j),
    "lr too large an integer": put(lr=10**400),
    "lr a fraction": put(lr=fractions.Fraction(1, 4)),
    "lr a subclass of float": put(lr=Half(0.5)),
    "lr of float32": put(lr=np.float32(0.25)),
    "lr an array": put(lr=np.array(0.25)),
    "lr an integer of numpy's": put(lr=np.int64(1)),
    "lr negative": put(lr=-0.25),
    "lr nan": put(lr=float("nan")),
    "weight_decay None": put(weight_decay=None),
    "weight_decay a text": put(weight_decay="much"),
    "weight_decay negative": put(weight_decay=-0.25),
    "maximize None": put(maximize=None),
    "maximize a text": put(maximize="yes"),
    "maximize an empty list": put(maximize=[]),
    "differentiable None": put(differentiable=None),
    "foreach None": put(foreach=None),
}
ADAM = {
    **COMMON,
    "betas None": put(betas=None),
    "no betas": put(betas=()),
    "one beta": put(betas=(0.5,)),
    "three betas": put(betas=(0.5, 0.75, 0.875)),
    "betas a text": put(betas="ab"),
    "betas a number": put(betas=0.5),
    "betas a generator": lambda optimizer, _: optimizer.param_groups[0].update(betas=(b for b in (0.5, 0.75))),
    "betas an array": put(betas=np.array([0.5, 0.75])),
    "betas None and a number": put(betas=(None, 0.5)),
    "betas a number and None": put(betas=(0.5, None)),
    "beta1 of 1": put(betas=(1.0, 0.75)),
    "beta2 of 1": put(betas=(0.5, 1.0)),
    "beta1 above 1": put(betas=(1.5, 0.75)),
    "beta2 above 1": put(betas=(0.5, 1.5)),
    "beta1 below 0": put(betas=(-0.5, 0.75)),
    "beta2 below 0": put(betas=(0.5, -0.75)),
    "eps None": put(eps=None),
    "eps a text": put(eps="tiny"),
    "eps negative": put(eps=-0.25),
    "amsgrad None": put(amsgrad=None),
    "decoupled_weight_decay None": put(decoupled_weight_decay=None),
}
SGD = {
    **COMMON,
    "momentum None": put(momentum=None),
    "momentum a text": put(momentum="some"),
    "momentum negative": put(momentum=-0.5),
    "dampening None": put(dampening=None),
    "nesterov None": put(nesterov=None),
}
ODD_OPTIONS = {"SGD": SGD, "Adam": ADAM, "AdamW": ADAM}


def compare_outcomes(twins, tolerance=None):
    """One step of both, the same in its result or in its error; an error of ours leaves all as it was."""
    twins.set_gradients()
    before = snapshot(twins.ours.optimizer)
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours == torchs
    if ours is None:
        twins.compare(**(tolerance or {}))
    else:
        assert_same_bits(before, snapshot(twins.ours.optimizer))


@pytest.mark.parametrize("name, odd", [(n, o) for n in NAMES for o in ODD_OPTIONS[n]])
@pytest.mark.parametrize("warm", [0, 2], ids=["at first", "later"])
def test_odd_options(name, odd, warm):
    twins = Twins(name, foreach=False)
    twins.step(warm)
    twins.edit(ODD_OPTIONS[name][odd])
    compare_outcomes(twins, {"rtol": 1e-6, "atol": 1e-6} if "float32" in odd else None)


@each_class
def test_an_odd_option_of_the_second_group_changes_nothing_in_the_first(name):
    """torch has stepped the first by the time that it comes to the second."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    optimizer = CLASSES[name][0]([{"params": [p]} for p in params], **OPTIONS[name])
    optimizer.step()
    optimizer.param_groups[1]["lr"] = None
    before = snapshot(optimizer)
    assert attempt(optimizer.step)[0] is TypeError
    assert_same_bits(before, snapshot(optimizer))


@each_class
@pytest.mark.parametrize("option", ["l1", "l1_proximal", "noise", "seed", "bias_correction"])
@pytest.mark.parametrize("value", [None, "text", [1.0], 1j], ids=repr)
def test_odd_values_of_our_own_options_are_named(name, option, value):
    twins = Twins(name)
    twins.step()
    if option not in twins.ours.optimizer.param_groups[0]:
        return
    twins.ours.optimizer.param_groups[0][option] = value
    twins.set_gradients()
    before = snapshot(twins.ours.optimizer)
    error = attempt(twins.ours.optimizer.step)
    assert error[0] is TypeError and option in error[1] and type(value).__name__ in error[1]
    assert_same_bits(before, snapshot(twins.ours.optimizer))


# States ---------------------------------------------------------------------------------------------------------------

VALUES = {
    "None": lambda value: None,
    "a number": lambda value: 3.0,
    "a text": lambda value: "three",
    "an array": lambda value: value.numpy(),
    "of another shape": lambda value: value.new_zeros(3, 3, 3),
    "with a gradient": lambda value: value.clone().requires_grad_(),
    "a parameter": lambda value: torch.nn.Parameter(value.clone()),
    "of integers": lambda value: value.long(),
}
COUNTS = {
    **{str(count): lambda value, count=count: torch.full_like(value, count) for count in (-1, -2, -5, -1.5)},
    "2.5": lambda value: torch.full_like(value, 2.5),
    "nan": lambda value: torch.full_like(value, float("nan")),
    "inf": lambda value: torch.full_like(value, float("inf")),
    "of one dimension": lambda value: value.reshape(1),
}
KEYS = {"SGD": ["momentum_buffer"], "Adam": ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]}
ODD_STATES = [(n, k, v) for n in ("SGD", "Adam") for k in KEYS[n] for v in (VALUES | COUNTS if k == "step" else VALUES)]


@pytest.mark.parametrize("name, key, odd", ODD_STATES)
def test_odd_states(name, key, odd):
    twins = Twins(name, foreach=False)
    twins.step(2)

    def change(optimizer, params):
        state = optimizer.state[params[2]]
        state[key] = (VALUES | COUNTS)[odd](state[key])

    twins.edit(change)
    twins.set_gradients()
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours == torchs
    if ours is None:
        twins.compare()


@each_class
def test_a_missing_state_is_torchs_error_and_changes_nothing(name):
    twins = Twins(name, foreach=False)
    twins.step(2)
    for key in KEYS.get(name, KEYS["Adam"]):
        kept = [side.optimizer.state[side.params[2]].pop(key) for side in twins.sides]
        compare_outcomes(twins)
        for side, value in zip(twins.sides, kept, strict=True):
            side.optimizer.state[side.params[2]][key] = value
        if name == "SGD":
            break


def test_a_state_of_none_ends_no_iterator():
    """It was a StopIteration, which a map or a generator takes for its own end."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = trainopt.AdamW([p])
    optimizer.step()
    optimizer.state[p]["exp_avg"] = None
    assert attempt(lambda: list(map(lambda _: optimizer.step(), range(3))))[0] is AttributeError


# Containers -----------------------------------------------------------------------------------------------------------


class Doubling(dict):
    """Says something else than it holds."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return 2 * value if key == "lr" else value


class Reversed(list):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Quiet(dict):
    """A dict with attributes, as configurations are made of."""

    __getattr__ = dict.get


def each_group(change):
    def edit(optimizer, _):
        optimizer.param_groups[:] = [change(group) for group in optimizer.param_groups]

    return edit


def params_in(container):
    return each_group(lambda group: {**group, "params": container(group["params"])})


CONTAINERS = {
    "a set of parameters": params_in(lambda params: dict.fromkeys(params).keys()),
    "a dict of parameters": params_in(dict.fromkeys),
    "values of a dict": params_in(lambda params: dict(enumerate(params)).values()),
    "a ParameterList": params_in(torch.nn.ParameterList),
    "a deque": params_in(collections.deque),
    "a tuple of parameters": params_in(tuple),
    "a list that goes backwards": params_in(Reversed),
    "a UserList": params_in(collections.UserList),
    "a UserDict as group": each_group(lambda group: collections.UserDict(group)),
    "a mapping proxy as group": each_group(lambda group: types.MappingProxyType(group)),
    "a ChainMap as group": each_group(lambda group: collections.ChainMap({}, group)),
    "an OrderedDict as group": each_group(collections.OrderedDict),
    "a defaultdict as group": each_group(lambda group: collections.defaultdict(lambda: None, group)),
    "a dict that doubles": each_group(Doubling),
    "a dict with attributes": each_group(Quiet),
    "a tuple of groups": lambda optimizer, _: setattr(optimizer, "param_groups", tuple(optimizer.param_groups)),
    "a deque of groups": lambda optimizer, _: setattr(
        optimizer, "param_groups", collections.deque(optimizer.param_groups)
    ),
    "a plain dict of states": lambda optimizer, _: setattr(
        optimizer, "state", {p: optimizer.state[p] for g in optimizer.param_groups for p in g["params"]}
    ),
    "a UserDict of states": lambda optimizer, _: setattr(optimizer, "state", collections.UserDict(optimizer.state)),
    "a UserDict as state": lambda optimizer, params: optimizer.state.__setitem__(
        params[1], collections.UserDict(optimizer.state[params[1]])
    ),
    "betas in a list": lambda optimizer, _: optimizer.param_groups[0].update(
        {"betas": list(optimizer.param_groups[0].get("betas", ()))} if "betas" in optimizer.param_groups[0] else {}
    ),
    "betas in a UserList": lambda optimizer, _: optimizer.param_groups[0].update(
        {"betas": collections.UserList(optimizer.param_groups[0]["betas"])}
        if "betas" in optimizer.param_groups[0]
        else {}
    ),
}


@each_class
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_that_torch_accepts(name, container):
    twins = Twins(name, foreach=False)
    twins.edit(lambda optimizer, params: [optimizer.state[p] for p in params])
    twins.step(2)
    twins.edit(CONTAINERS[container])
    twins.step(3)


@each_class
@pytest.mark.parametrize("container", [c for c in CONTAINERS if "state" not in c])
def test_containers_at_the_first_step(name, container):
    twins = Twins(name, foreach=False)
    twins.edit(CONTAINERS[container])
    twins.step(2)


@each_class
def test_a_generator_of_parameters_is_empty_after_a_step(name):
    twins = Twins(name, foreach=False)
    twins.step(2)
    twins.edit(lambda optimizer, params: optimizer.param_groups[0].update(params=(p for p in params)))
    twins.step(2)


@each_class
@pytest.mark.parametrize("container", [c for c in CONTAINERS if "state" not in c])
def test_the_engine_steps_them_all(name, container, monkeypatch):
    """Odd containers are read into plain ones; only states in such are left to torch."""
    twins = Twins(name)
    twins.step()
    twins.edit(CONTAINERS[container])
    twins.set_gradients()
    monkeypatch.setattr("trainopt.optim.torch_path.step_of", None)
    twins.ours.optimizer.step()


@pytest.mark.parametrize(
    "given",
    [tuple, list, lambda p: dict.fromkeys(p), lambda p: (q for q in p), set],
    ids=["tuple", "list", "dict", "generator", "set"],
)
def test_containers_at_construction(given):
    messages = []
    for cls in CLASSES["AdamW"]:
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        messages.append(attempt(lambda cls=cls, params=params: cls(given(params))))
        messages[-1] = (messages[-1], attempt(lambda cls=cls, params=params: cls(({"params": given(params)},))))
    assert messages[0] == messages[1]


@each_class
def test_explain_of_containers(name):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    optimizer.param_groups = tuple(map(collections.UserDict, optimizer.param_groups))
    assert len(trainopt.explain(optimizer)) == 2


# Inference mode -------------------------------------------------------------------------------------------------------


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
                for key, value in optimizer.state[p].items():
                    if what != "parameter" and (key == "step") != (what == "step"):
                        with torch.inference_mode(False):
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


def test_imported_in_inference_mode():
    """What an ordinary tensor is must not be learnt from one that is not."""
    import subprocess
    import sys

    program = (
        "import torch\nwith torch.inference_mode(): import trainopt\n"
        "p = torch.nn.Parameter(torch.ones(3)); print(trainopt.explain(trainopt.AdamW([p]))[0].path)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("fused")
