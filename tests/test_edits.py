"""What a person changes between two steps, in whatever order, takes effect at the next as with torch.optim.

The same result or the same error, and after an error nothing has changed.
"""

import numpy as np
import pytest
import torch
from edits import (
    CONTAINERS,
    COUNTS,
    EDITS,
    HARMLESS,
    OF_GROUPS,
    SHAPES,
    SHARING,
    SHARING_SHAPES,
    STATE_VALUES,
    defaults_of,
    options_of,
    states_of,
)
from helpers import CLASSES, NAMES, TABLE, Twins, attempt, each_class
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import trainopt

#: Which class it is makes a difference to what is kept from step to step: before the first one, a few are asked.
FEW = ("SGD", "AdamW", "NAdam", "Rprop")
FIRST_AND_LATER = [*((name, 0) for name in FEW), *((name, 2) for name in NAMES)]


def edited(twins, change, warm, after=2, **tolerance):
    """Steps, edits, steps; and goes on where torch goes on."""
    twins.step(warm)
    twins.set_gradients()
    twins.edit(change)
    is_stepped = twins.step_alike(**tolerance)
    for _ in range(after):
        if is_stepped:
            twins.set_gradients()
            is_stepped = twins.step_alike(**tolerance)
    return is_stepped


@each_class
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_takes_effect_at_the_next_step(name, edit):
    edited(Twins(name, SHAPES), EDITS[edit], 3)


def test_an_edit_that_went_unnoticed_would_be_found_out():
    """It changes the outcome of torch's next step for the parameters that were there before."""

    def outcome(edit=None):
        twins = Twins("Adam", SHAPES)
        twins.step(2)
        twins.set_gradients()
        before = twins.torchs.params[:]
        if edit is not None:
            EDITS[edit](*twins.torchs)
        return attempt(twins.torchs.optimizer.step), [p.tolist() for p in before]

    plain = outcome()
    assert {edit for edit in EDITS if outcome(edit) == plain} == HARMLESS


@pytest.mark.parametrize(
    "name, warm, key, value",
    [(name, warm, *row) for name, warm in FIRST_AND_LATER for row in options_of(name)],
    ids=lambda part: part if isinstance(part, str) else repr(part)[:24],
)
def test_a_value_of_an_option(name, warm, key, value):
    twins = Twins(name, foreach=False)
    rough = {"rtol": 1e-6, "atol": 1e-6} if isinstance(value, np.float32) else {}
    change = lambda optimizer, _: optimizer.param_groups[0].update({key: value})  # noqa: E731
    if edited(twins, change, warm, 0 if rough else 2, **rough) and warm and not rough:
        twins.edit(lambda optimizer, _: optimizer.param_groups[0].update(twins.options))
        twins.step(2)


@pytest.mark.parametrize("name, key, what", [(n, *row) for n in NAMES for row in states_of(n)])
def test_a_state_of_any_kind(name, key, what):
    """One that torch refuses is refused in torch's words; where, and after what, is not promised."""
    twins = Twins(name, foreach=False)
    twins.step(2)
    for side in twins.sides:
        state = side.optimizer.state[side.params[1 if key == "variance" else 2]]
        state[key] = (STATE_VALUES | COUNTS)[what](state[key])
    twins.set_gradients()
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours == torchs
    if ours is None:
        twins.compare()


@each_class
def test_a_missing_state_is_torchs_error_and_changes_nothing(name):
    for key in ["step", *CLASSES[name][0]._states]:
        edited(Twins(name, foreach=False), lambda o, params, key=key: o.state[params[2]].pop(key, None), 2)


def test_a_state_of_none_ends_no_iterator():
    """It was a StopIteration, which a map or a generator takes for its own end."""
    twins = Twins("AdamW")
    twins.step()
    twins.ours.optimizer.state[twins.ours.params[2]]["exp_avg"] = None
    assert attempt(lambda: list(map(lambda _: twins.ours.optimizer.step(), range(3))))[0] is AttributeError


@pytest.mark.parametrize(
    "name, warm, container", [(n, w, c) for n, w in FIRST_AND_LATER for c in (CONTAINERS if w else OF_GROUPS)]
)
def test_containers_that_torch_accepts(name, container, warm):
    twins = Twins(name, foreach=False)
    twins.edit(lambda optimizer, params: [optimizer.state[p] for p in params] if warm else None)
    edited(twins, CONTAINERS[container], warm)


@each_class
@pytest.mark.parametrize("container", OF_GROUPS)
def test_the_engine_steps_them_all(name, container, monkeypatch):
    """Odd containers are read into plain ones; only states in such are left to torch."""
    twins = Twins(name)
    twins.step()
    twins.edit(CONTAINERS[container])
    twins.set_gradients()
    monkeypatch.setattr("trainopt.optim.torch_path.step_of", None)
    twins.ours.optimizer.step()
    assert len(trainopt.explain(twins.ours.optimizer)) == len(twins.ours.params)


@each_class
def test_generators_are_empty_after_a_step(name):
    if "betas" in defaults_of(name):
        twins = Twins(name, foreach=False)
        edited(twins, lambda optimizer, _: optimizer.param_groups[0].update(betas=(b for b in (0.5, 0.75))), 2)
    twins = Twins(name, foreach=False)
    twins.edit(lambda optimizer, params: optimizer.param_groups[0].update(params=(p for p in params)))
    twins.step(2)


@pytest.mark.parametrize(
    "given",
    [tuple, list, lambda p: dict.fromkeys(p), lambda p: (q for q in p), set],
    ids=["tuple", "list", "dict", "generator", "set"],
)
def test_containers_at_construction(given):
    messages = []
    for cls in CLASSES["AdamW"]:
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        wrapped = attempt(lambda cls=cls, params=params: cls(({"params": given(params)},)))
        messages.append((attempt(lambda cls=cls, params=params: cls(given(params))), wrapped))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name, warm", FIRST_AND_LATER)
@pytest.mark.parametrize("share", SHARING)
def test_shared_memory_is_stepped_in_order(name, share, warm):
    """Torch's plain loop, one parameter after the other, says what is right."""
    if name == "ASGD" and share == "the learning rate lies in a state" and not warm:
        pytest.skip("its first step begins with the learning rate of that step, whatever stands in eta")
    edited(Twins(name, SHARING_SHAPES, foreach=False), SHARING[share], warm)


# Options, one after the other -----------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_option_changed_in_place(name, dtype):
    twins = Twins(name, lr=torch.tensor(0.125, dtype=dtype))
    for value in (0.5, 0.25, 0.0, 0.75):
        twins.step(2)
        twins.edit(lambda o, _, value=value: o.param_groups[0]["lr"].fill_(value))
        twins.step()


#: Values of an option, and changes in place of what it holds, each followed by two steps.
SEQUENCES = {
    "betas": [
        [0.75, 0.5],
        lambda betas: betas.__setitem__(1, 0.875),
        (torch.tensor(0.75).double(), torch.tensor(0.5).double()),
        lambda betas: betas[0].fill_(0.25),
    ],
    "momentum": [0.0, 0.9, 0.0, 0.5],  # SGD alone: torch's RMSprop has no buffer for one that comes later
}


#: NAdam's float32 product is moved in float32 by a number, and in float64 by what torch makes of betas in tensors.
NOT_THESE = {("momentum", "RMSprop"), ("betas", "NAdam")}


@pytest.mark.parametrize(
    "name, key",
    [(n, key) for n in NAMES for key in SEQUENCES if key in defaults_of(n) and (key, n) not in NOT_THESE],
)
def test_an_option_changed_again_and_again(name, key):
    twins = Twins(name, **({"dampening": 0.25, "momentum": 0.0} if name == "SGD" else {}))
    for change in SEQUENCES[key]:
        for side in twins.sides:
            group = side.optimizer.param_groups[0]
            if callable(change):
                change(group[key])
            else:
                group[key] = list(change) if isinstance(change, list) else change
        twins.step(2)


@each_class
def test_many_values_of_one_option_one_after_the_other(name):
    """A fresh float often lies where the last one lay: a cache that goes by address alone would take it for that."""
    twins = Twins(name, shapes=((9,),))
    for i in range(200):
        twins.edit(lambda o, _, i=i: o.param_groups[0].__setitem__("lr", 0.001 * (i + 1)))
        twins.step()


@each_class
@pytest.mark.parametrize("key", ["lr", "weight_decay", "maximize"])
def test_an_option_that_is_missing_is_torchs_error(name, key):
    if key in defaults_of(name):
        edited(Twins(name), lambda o, _: o.param_groups[0].pop(key), 1)


@pytest.mark.parametrize("name", [n for n in NAMES if "amsgrad" in defaults_of(n)])
def test_amsgrad_switched_on_late_is_torchs_error(name):
    assert not edited(Twins(name, amsgrad=False), lambda o, _: o.param_groups[0].update(amsgrad=True), 2)


@each_class
def test_an_odd_option_of_the_second_group_changes_nothing_in_the_first(name):
    """torch has stepped the first by the time that it comes to the second."""
    twins = Twins(name)
    twins.edit(lambda o, params: o.add_param_group({"params": [torch.nn.Parameter(params[1] + 1)]}))
    twins.edit(lambda o, params: params.append(o.param_groups[1]["params"][0]))
    key = "etas" if "etas" in defaults_of(name) else "lr"  # where a later step reads no learning rate
    assert not edited(twins, lambda o, _: o.param_groups[1].update({key: None}), 1)


@each_class
def test_model_to_another_dtype_in_the_middle(name):
    """torch goes on with states in the old dtype, or refuses; loading the states again, as is usual, casts them."""
    for is_loaded in (False, True):
        twins = Twins(name, shapes=((5, 7), (9,)), dtype=torch.float32)
        twins.step(2)
        twins.edit(lambda o, params: [setattr(p, "data", p.data.double()) for p in params])
        if is_loaded:
            twins.edit(lambda o, _: o.load_state_dict(o.state_dict()))
        twins.set_gradients()
        ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
        assert ours == torchs or (ours is None and not is_loaded)  # torch's loop refuses some mixtures of dtypes
        if torchs is None:
            twins.compare(rtol=1e-5, atol=1e-6)


# Anything in any order ------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Random edits to a torch optimizer and trainopt's, compared after each step."""

    @initialize(name=st.sampled_from(NAMES), count=st.integers(1, 4), fused=st.sampled_from([None, True]))
    def begin(self, name, count, fused):
        self.name = name
        shapes = [(5,), (4, 6), (2, 3, 2, 2), (300,)]
        self.twins = Twins(name, shapes=shapes[:count])
        self.twins.ours.optimizer.param_groups[0]["fused"] = fused
        self.missing = set()

    def edit(self, change):
        self.twins.edit(change)

    @rule(times=st.integers(1, 3))
    def step(self, times):
        self.twins.step(times, self.missing)

    @rule(index=st.integers(0, 6))
    def lose_or_find_a_gradient(self, index):
        self.missing ^= {index}

    @rule(
        key=st.sampled_from(["lr", "weight_decay"]),
        value=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
        group=st.integers(0, 3),
    )
    def set_option(self, key, value, group):
        self.edit(lambda o, _: o.param_groups[group % len(o.param_groups)].update({key: value}))

    @rule(value=st.booleans(), group=st.integers(0, 3))
    def set_maximize(self, value, group):
        self.edit(lambda o, _: o.param_groups[group % len(o.param_groups)].update(maximize=value))

    @rule(a=st.sampled_from([0.0, 0.3, 0.9]), b=st.sampled_from([0.0, 0.5]), group=st.integers(0, 3))
    def set_averages(self, a, b, group):
        options = {"momentum": a, "dampening": b} if self.name == "SGD" else {"betas": (a, b)}
        self.edit(lambda o, _: o.param_groups[group % len(o.param_groups)].update(options))

    @rule(rows=st.integers(0, 3), lr=st.sampled_from([0.01, 0.2]))
    def add_group(self, rows, lr):
        def change(optimizer, params):
            if len(params) < 8:
                params.append(torch.nn.Parameter(torch.full((rows, 3), 0.5, dtype=torch.float64)))
                optimizer.add_param_group({"params": [params[-1]], "lr": lr})

        self.edit(change)

    @rule()
    def merge_groups(self):
        def change(optimizer, params):
            group = optimizer.param_groups[0]
            optimizer.param_groups = [{**group, "params": [p for g in optimizer.param_groups for p in g["params"]]}]

        self.edit(change)

    @rule()
    def swap_groups(self):
        self.edit(lambda o, _: o.param_groups.reverse())

    @rule()
    def rotate_parameters(self):
        self.edit(lambda o, _: [g["params"].insert(0, g["params"].pop()) for g in o.param_groups if g["params"]])

    @rule(index=st.integers(0, 7), how=st.sampled_from(["clone", "transpose", "offset", "scale"]))
    def new_data(self, index, how):
        def change(_, params):
            p = params[index % len(params)]
            if how == "transpose":
                p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1)
            elif how == "offset":
                p.data = torch.cat([torch.zeros(1, dtype=p.dtype), p.data.reshape(-1)])[1:].view(p.shape)
            elif how == "scale":
                p.data.mul_(0.5)
            else:
                p.data = p.data.clone()

        self.edit(change)

    @rule(index=st.integers(0, 7), how=st.sampled_from(["delete", "empty", "clone", "scale", "reorder"]))
    def new_state(self, index, how):
        def change(optimizer, params):
            p = params[index % len(params)]
            if not optimizer.state.get(p):
                return
            if how == "delete" or (how == "empty" and TABLE[self.name].eager_states):  # which torch cannot load
                del optimizer.state[p]
            elif how == "empty":
                optimizer.state[p].clear()
            elif how == "scale":
                for key, value in optimizer.state[p].items():
                    if isinstance(value, torch.Tensor) and key != "step":
                        value.mul_(0.5)
            elif how == "clone":
                optimizer.state[p] = {
                    k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()
                }
            else:
                optimizer.state[p] = optimizer.state.pop(p)

        self.edit(change)

    @rule(index=st.integers(0, 7), wanted=st.booleans())
    def freeze_or_not(self, index, wanted):
        self.edit(lambda _, params: params[index % len(params)].requires_grad_(wanted))

    @rule(exchange=st.booleans())
    def save_and_load(self, exchange):
        ours, torchs = (side.optimizer for side in self.twins.sides)
        mine, theirs = ours.state_dict(), torchs.state_dict()
        if exchange:
            mine, theirs = theirs, mine
        mine, theirs = (
            {"state": {k: dict(v) for k, v in s["state"].items()}, "param_groups": s["param_groups"]}
            for s in (mine, theirs)
        )
        theirs["state"] = {
            k: {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in s.items()}
            for k, s in theirs["state"].items()
        }
        ours.load_state_dict(mine)
        for group in theirs["param_groups"]:
            group["fused"] = None
        torchs.load_state_dict(theirs)

    @precondition(lambda self: len(self.twins.ours.params) > 1)
    @rule()
    def drop_the_first(self):
        def change(optimizer, params):
            p = params.pop(0)
            for group in optimizer.param_groups:
                group["params"] = [q for q in group["params"] if q is not p]
            optimizer.state.pop(p, None)

        self.edit(change)

    def teardown(self):
        if hasattr(self, "twins"):
            self.twins.step(2)


AnyOrder.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestAnyOrder = AnyOrder.TestCase
