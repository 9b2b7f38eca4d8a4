"""What a person changes between two steps, in whatever order, takes effect at the next as with torch.optim."""

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    NAMES,
    OPTIONS,
    SHAPES,
    Twins,
    assert_same_bits,
    assert_same_outcome,
    attempt,
    each_class,
    error_of,
    snapshot,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import trainopt

# Changes between steps ------------------------------------------------------------------------------------------------


def put(**options):
    def change(optimizer, params):
        optimizer.param_groups[0].update(options)

    return change


COMMON_CHANGES = {
    "lr": put(lr=0.3),
    "lr 0": put(lr=0.0),
    "lr an int": put(lr=1),
    "lr a numpy number": put(lr=np.float64(0.3)),
    "lr a tensor": put(lr=torch.tensor(0.25)),
    "weight_decay": put(weight_decay=0.5),
    "no weight_decay": put(weight_decay=0),
    "maximize": put(maximize=True),
    "several": put(lr=0.3, weight_decay=0.7, maximize=True),
}
CHANGES = {
    "SGD": {
        **COMMON_CHANGES,
        "momentum": put(momentum=0.25),
        "no momentum": put(momentum=0),
        "dampening": put(dampening=0.75),
        "nesterov": put(nesterov=True),
        "weight_decay a tensor": put(weight_decay=torch.tensor(0.5)),
    },
    "Adam": {
        **COMMON_CHANGES,
        "betas": put(betas=(0.25, 0.625)),
        "betas a list": put(betas=[0.25, 0.625]),
        "beta 0": put(betas=(0.0, 0.5)),
        "eps": put(eps=0.5),
        "no amsgrad": put(amsgrad=False),
        "decoupled": put(decoupled_weight_decay=True),
    },
}
CHANGES["AdamW"] = {**CHANGES["Adam"], "coupled": put(decoupled_weight_decay=False)}


@pytest.mark.parametrize("name, change", [(n, c) for n in NAMES for c in CHANGES[n]])
def test_a_changed_option_takes_effect_at_the_next_step(name, change):
    twins = Twins(name)
    twins.step(3)
    twins.edit(CHANGES[name][change])
    twins.step(3)
    twins.edit(put(**twins.options))
    twins.step(2)


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_option_changed_in_place(name, dtype):
    twins = Twins(name, lr=torch.tensor(0.125, dtype=dtype))
    for value in (0.5, 0.25, 0.0, 0.75):
        twins.step(2)
        twins.edit(lambda o, _, value=value: o.param_groups[0]["lr"].fill_(value))
        twins.step()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_changed_in_place(name):
    twins = Twins(name)
    twins.edit(put(betas=[0.75, 0.5]))
    twins.step(2)
    twins.edit(lambda o, _: o.param_groups[0]["betas"].__setitem__(1, 0.875))
    twins.step(2)
    twins.edit(put(betas=(torch.tensor(0.75).double(), torch.tensor(0.5).double())))
    twins.step(2)
    twins.edit(lambda o, _: o.param_groups[0]["betas"][0].fill_(0.25))
    twins.step(2)


@each_class
def test_many_values_of_one_option_one_after_the_other(name):
    """A fresh float often lies where the last one lay: a cache that goes by address alone would take it for that."""
    twins = Twins(name, shapes=((9,),))
    for i in range(200):
        twins.edit(lambda o, _, i=i: o.param_groups[0].__setitem__("lr", 0.001 * (i + 1)))
        twins.step()


@each_class
@pytest.mark.parametrize("extra", ["l1", "noise"])
def test_our_own_options_take_effect_at_the_next_step(name, extra):
    ours = CLASSES[name][0]
    made = []
    for late in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300))
        p.grad = torch.zeros(300)
        optimizer = ours([p], lr=0.0 if extra == "noise" else 0.1, weight_decay=0.0)
        if not late:
            optimizer.param_groups[0][extra] = 0.5
        optimizer.step()
        before = p.detach().clone()
        optimizer.param_groups[0][extra] = 0.5
        optimizer.step()
        assert (p != before).all()
        optimizer.param_groups[0][extra] = 0.0
        held = p.detach().clone()
        if name == "SGD" or extra == "noise":
            optimizer.step()
            assert torch.equal(p, held)
        made.append(optimizer)


@each_class
def test_an_option_that_is_missing_is_torchs_error(name):
    for key in ("lr", "weight_decay", "maximize"):
        twins = Twins(name)
        twins.step()
        twins.edit(lambda o, _, key=key: o.param_groups[0].pop(key))
        twins.set_gradients()
        ours, torchs = (error_of(side.optimizer.step) for side in twins.sides)
        assert ours == torchs


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_switched_on_late_is_torchs_error(name):
    twins = Twins(name, amsgrad=False)
    twins.step(2)
    twins.edit(put(amsgrad=True))
    twins.set_gradients()
    before = snapshot(twins.ours.optimizer)
    ours, torchs = (error_of(side.optimizer.step) for side in twins.sides)
    assert ours == torchs
    assert_same_bits(before, snapshot(twins.ours.optimizer))


def test_momentum_switched_on_late():
    twins = Twins("SGD", momentum=0.0, dampening=0.25)
    twins.step(2)
    twins.edit(put(momentum=0.9))
    twins.step(2)
    twins.edit(put(momentum=0.0))
    twins.step(2)
    twins.edit(put(momentum=0.5))
    twins.step(2)


def append(optimizer, params):
    params.append(torch.nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64)))
    optimizer.param_groups[0]["params"].append(params[-1])


def insert(optimizer, params):
    params.append(torch.nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64)))
    optimizer.param_groups[0]["params"].insert(0, params[-1])


def remove(optimizer, params):
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not params[2]]


def remove_in_place(optimizer, params):
    del optimizer.param_groups[0]["params"][2]


def empty(optimizer, params):
    optimizer.param_groups[0]["params"].clear()


def reverse(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def replace_list(optimizer, params):
    optimizer.param_groups[0]["params"] = list(params)


def replace_tuple(optimizer, params):
    optimizer.param_groups[0]["params"] = tuple(params)


def replace_one(optimizer, params):
    params[1] = torch.nn.Parameter(params[1].detach() + 1)
    optimizer.param_groups[0]["params"][1] = params[1]


def replace_group(optimizer, params):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.2}


def replace_groups(optimizer, params):
    group = optimizer.param_groups[0]
    optimizer.param_groups = [{**group, "params": params[3:], "lr": 0.1}, {**group, "params": params[:3], "lr": 0.4}]


def new_group(optimizer, params):
    params.append(torch.nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64)))
    params.append(torch.nn.Parameter(torch.full((3, 2), 0.5, dtype=torch.float64)))
    optimizer.add_param_group({"params": params[-2:], "lr": 0.25})


def group_without_ours(optimizer, params):
    """As code that builds groups by hand for torch's class."""
    optimizer.param_groups[0] = {
        k: v
        for k, v in optimizer.param_groups[0].items()
        if k not in {"l1", "l1_proximal", "noise", "seed", "bias_correction"}
    }


def drop_group(optimizer, params):
    new_group(optimizer, params)
    del optimizer.param_groups[0]


def replace_state(optimizer, params):
    for key, value in optimizer.state[params[2]].items():
        optimizer.state[params[2]][key] = value.clone() * 2


def replace_state_strided(optimizer, params):
    for key, value in optimizer.state[params[2]].items():
        if value.dim() == 2:
            optimizer.state[params[2]][key] = value.t().contiguous().t()


def replace_state_dict_of_one(optimizer, params):
    optimizer.state[params[2]] = {k: v.clone() for k, v in optimizer.state[params[2]].items()}


def state_of_another_dtype(optimizer, params):
    key = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
    state = optimizer.state[params[2]]
    state[key] = state[key].float().double()


def forget_one(optimizer, params):
    del optimizer.state[params[2]]


def empty_one(optimizer, params):
    optimizer.state[params[2]] = {}


def forget_all(optimizer, params):
    optimizer.state.clear()


def replace_all_state(optimizer, params):
    fresh = type(optimizer.state)(dict)
    for p in reversed(params):  # another order than the parameters'
        if p in optimizer.state:
            fresh[p] = dict(reversed(optimizer.state[p].items()))
    optimizer.state = fresh


def swap_data(optimizer, params):
    for p in params:
        p.data = p.data.clone() + 0.5


def swap_data_strided(optimizer, params):
    params[2].data = params[2].data.t().contiguous().t()
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)


def swap_data_offset(optimizer, params):
    buffer = torch.zeros(1 + params[5].numel(), dtype=torch.float64)
    buffer[1:] = params[5].data
    params[5].data = buffer[1:]


def write_data(optimizer, params):
    for p in params:
        p.data.mul_(0.5)


def freeze(optimizer, params):
    params[2].requires_grad_(False)
    params[4].requires_grad_(False)


def resize_in_place(optimizer, params):
    """The elements move to other memory; shape and values are as they were."""
    p = params[5]
    values = p.detach().clone()
    p.data.resize_(100_000)
    p.data.resize_(257)
    p.data.copy_(values)


def exchange(optimizer, params):
    with torch.no_grad():
        params[2].data, other = params[2].data.clone().t().contiguous().t(), params[2].data
        other.zero_()


EDITS = [
    append,
    insert,
    remove,
    remove_in_place,
    empty,
    reverse,
    replace_list,
    replace_tuple,
    replace_one,
    replace_group,
    replace_groups,
    new_group,
    group_without_ours,
    drop_group,
    replace_state,
    replace_state_strided,
    replace_state_dict_of_one,
    state_of_another_dtype,
    forget_one,
    empty_one,
    forget_all,
    replace_all_state,
    swap_data,
    swap_data_strided,
    swap_data_offset,
    write_data,
    freeze,
    resize_in_place,
    exchange,
]


@each_class
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_takes_effect_at_the_next_step(name, edit):
    twins = Twins(name)
    twins.step(3)
    twins.edit(edit)
    twins.step(3)


HARMLESS = {
    append,
    exchange,
    group_without_ours,
    insert,
    new_group,
    replace_list,
    replace_state_dict_of_one,
    replace_state_strided,
    replace_tuple,
    resize_in_place,
    reverse,
    state_of_another_dtype,
    swap_data_offset,
    swap_data_strided,
    replace_all_state,
}


@pytest.mark.parametrize("edit", [e for e in EDITS if e not in HARMLESS], ids=lambda edit: edit.__name__)
def test_an_edit_that_went_unnoticed_would_be_found_out(edit):
    """It changes the outcome of torch's next step for the parameters that were there before."""
    outcomes = []
    for edited in (False, True):
        twins = Twins("Adam")
        twins.step(2)
        if edited:
            twins.edit(edit)
        twins.set_gradients()
        twins.torchs.optimizer.step()
        outcomes.append([p.detach() for p in twins.torchs.params[: len(SHAPES)]])
    assert not all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@each_class
def test_extended_and_replaced_state_of_a_model_in_another_dtype(name):
    """model.to(dtype) in the middle of a run: torch goes on with states in the old dtype."""
    twins = Twins(name, shapes=((5, 7), (9,)), dtype=torch.float32)
    twins.step(2)
    twins.edit(lambda o, params: [setattr(p, "data", p.data.double()) for p in params])
    twins.set_gradients()
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours == torchs or ours is None  # torch's loop refuses some mixtures of dtypes
    if torchs is None:
        twins.compare(rtol=1e-5, atol=1e-6)


@each_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_model_to_another_dtype_before_the_first_step(name, dtype):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
        optimizer = cls(model.parameters(), **OPTIONS[name])
        model.to(dtype)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 5, dtype=dtype)).square().sum().backward()
            optimizer.step()
        sides.append((optimizer, list(model.parameters())))
    assert sides[0][0].state[sides[0][1][0]][("momentum_buffer" if name == "SGD" else "exp_avg")].dtype == dtype
    assert_same_outcome(*sides)


@each_class
def test_model_to_another_dtype_and_states_loaded_again(name):
    """The usual way round: the state dict casts the states at load."""
    twins = Twins(name, dtype=torch.float32)
    twins.step(2)
    twins.edit(lambda o, params: [setattr(p, "data", p.data.double()) for p in params])
    twins.edit(lambda o, _: o.load_state_dict(o.state_dict()))
    twins.set_gradients()
    twins.edit(lambda o, _: o.step())
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
            if how == "delete":
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


def test_every_class_is_exported():
    assert {trainopt.SGD, trainopt.Adam, trainopt.AdamW} == {ours for ours, _ in CLASSES.values()}
