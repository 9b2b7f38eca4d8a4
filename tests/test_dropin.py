"""Drop-in: what a person can do to an optimizer between steps, and around them, does what it does with torch.optim."""

import contextlib
import gc
import inspect
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    SHAPES,
    Twins,
    assert_equal,
    assert_same_bits,
    assert_same_outcome,
    error_of,
    snapshot,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import trainopt

NAMES = list(CLASSES)
each_class = pytest.mark.parametrize("name", NAMES)


# Signature ------------------------------------------------------------------------------------------------------------


def positional(parameters):
    return [k for k, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]


@each_class
def test_the_signature_is_torchs_and_more(name):
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in CLASSES[name])
    assert positional(ours) == positional(theirs)
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default and ours[key].kind == parameter.kind, key
    extras = {k: (p.default, p.kind) for k, p in ours.items() if k not in theirs}
    assert {k: default for k, (default, _) in extras.items()} == {
        **({} if name == "SGD" else {"bias_correction": True}),
        **{"l1": 0.0, "l1_proximal": False, "noise": 0.0, "seed": 0},
    }
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind in extras.values())


@each_class
def test_it_is_an_optimizer_of_torchs_class(name):
    ours, torchs = CLASSES[name]
    optimizer = ours([torch.nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torchs) and isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == torchs.__name__
    text, theirs = repr(optimizer), repr(torchs([torch.nn.Parameter(torch.zeros(2))]))
    assert set(theirs.splitlines()) <= set(text.splitlines()) and "    l1: 0.0" in text
    assert {k: optimizer.defaults[k] for k in torchs([torch.nn.Parameter(torch.zeros(2))]).defaults} == torchs(
        [torch.nn.Parameter(torch.zeros(2))]
    ).defaults


BAD_EXTRAS = [{"l1": -0.1}, {"l1": float("nan")}, {"noise": -1.0}, {"seed": -1}, {"seed": 2**64}, {"seed": 1.5}]


@each_class
@pytest.mark.parametrize("bad", BAD_EXTRAS, ids=str)
def test_senseless_options_are_refused_by_name(name, bad):
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    (key, value), ours = *bad.items(), CLASSES[name][0]
    with pytest.raises(ValueError, match=f"Invalid {key} value: {value}".replace("*", r"\*")):
        ours([p], **bad)
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        ours([{"params": [p], **bad}])
    optimizer = ours([p])
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        optimizer.add_param_group({"params": [q], **bad})
    assert len(optimizer.param_groups) == 1


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


def attempt(action):
    try:
        action()
    except Exception as error:
        return type(error), str(error)
    return None


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


# Gradients ------------------------------------------------------------------------------------------------------------


@each_class
def test_gradients_that_are_missing_at_some_steps(name):
    twins = Twins(name)
    for missing in ({1}, {0, 2}, set(), {0, 1, 2, 3, 4, 5}, {5}, {3, 4}, set(), {2}):
        twins.step(missing=missing)


@each_class
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_first_gradients_at_different_times(name, dampening):
    twins = Twins(name, **({"dampening": dampening} if name == "SGD" else {}))
    for missing in ({0, 1, 2, 3}, {1, 2, 3}, {1, 2}, {1}, set(), set()):
        twins.step(missing=missing)
    if name != "SGD":
        counts = [twins.ours.optimizer.state[p]["step"].item() for p in twins.ours.params]
        assert counts == [5, 2, 3, 4, 6, 6]


@each_class
def test_frozen_and_unfrozen(name):
    twins = Twins(name)
    twins.edit(lambda _, params: [p.requires_grad_(False) for p in params[:3]])
    twins.step(2)
    assert all(p not in twins.ours.optimizer.state for p in twins.ours.params[:3])
    twins.edit(lambda _, params: params[1].requires_grad_(True))
    twins.step(2)
    twins.edit(lambda _, params: [p.requires_grad_(i == 2) for i, p in enumerate(params)])
    twins.step(2)


@each_class
def test_a_frozen_parameter_with_a_gradient_is_stepped_as_torch_does(name):
    twins = Twins(name)
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda _, params: params[2].requires_grad_(False))
        twins.edit(lambda o, _: o.step())
        twins.compare()
        twins.edit(lambda _, params: params[2].requires_grad_(True))


@each_class
def test_tied_parameters(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(11, 6).double(), torch.nn.Linear(6, 11, bias=False).double()
        head.weight = embed.weight
        params = list(torch.nn.ModuleList([embed, head]).parameters())
        optimizer = cls(params, **OPTIONS[name])
        for i in range(4):
            optimizer.zero_grad()
            head(embed(torch.tensor([i, 3, 5]))).exp().sum().backward()
            optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


@each_class
@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_two_parameters_over_the_same_memory(name, dampening):
    """Tied by hand: torch steps one after the other."""
    options = {**OPTIONS[name], **({"dampening": dampening} if name == "SGD" else {})}
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        memory = torch.randn(40, dtype=torch.float64)
        params = [torch.nn.Parameter(memory[:30]), torch.nn.Parameter(memory[10:]), torch.nn.Parameter(memory.clone())]
        optimizer = cls(params, **options)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=p.dtype)
            optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


@each_class
def test_one_gradient_for_two_parameters(name):
    twins = Twins(name, shapes=((5, 7), (5, 7)))
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda _, params: setattr(params[1], "grad", params[0].grad))
        twins.edit(lambda o, _: o.step())
        twins.compare()


@each_class
def test_the_parameter_as_its_own_gradient(name):
    """p.grad = p.data: what is read is what is written."""
    twins = Twins(name, shapes=((300,), (5, 7)))
    for _ in range(3):
        twins.edit(lambda _, params: [setattr(p, "grad", p.detach()) for p in params])
        twins.edit(lambda o, _: o.step())
        twins.compare()


@each_class
def test_a_gradient_that_overlaps_the_parameter(name):
    sides = []
    for cls in CLASSES[name]:
        memory = torch.linspace(-1, 1, 601, dtype=torch.float64)
        params = [torch.nn.Parameter(memory[:600])]
        optimizer = cls(params, **OPTIONS[name])
        params[0].grad = memory[1:]
        optimizer.step()
        params[0].grad = memory[:1].expand(600)
        optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


@each_class
def test_the_same_parameter_twice(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        p, q = (torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([p, q, p], **OPTIONS[name])
        for _ in range(3):
            p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
            optimizer.step()
        sides.append((optimizer, [p, q]))
    assert_same_outcome(*sides)


@each_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(name, set_to_none):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()
        optimizer = cls(model.parameters(), **OPTIONS[name])
        for i in range(9):
            (model(torch.full((4, 5), 0.1 * i, dtype=torch.float64)).square().sum() / 3).backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                assert all((p.grad is None) == set_to_none for p in model.parameters())
        sides.append((optimizer, list(model.parameters())))
    assert_same_outcome(*sides)


@each_class
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_gradients_are_never_written_to(name, flags):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = CLASSES[name][0](params, **OPTIONS[name], **flags, l1=0.1, noise=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]
        before = [(p.grad, p.grad.numpy().tobytes(), p.grad._version) for p in params]
        optimizer.step()
        for p, (gradient, content, version) in zip(params, before, strict=True):
            assert p.grad is gradient and gradient.numpy().tobytes() == content and gradient._version == version


LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "every other": lambda g: torch.stack([g, -g], -1)[..., 0],
    "expanded": lambda g: g[:1].expand_as(g),
    "a scalar expanded": lambda g: g[0, 0].expand_as(g),
    "reversed": lambda g: g.flip(0).contiguous().flip(0),
    "in a larger buffer": lambda g: torch.cat([torch.zeros(1, g.shape[1], dtype=g.dtype), g])[1:],
    "float32": lambda g: g.float(),
    "bfloat16": lambda g: g.bfloat16(),
}


@each_class
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(name, layout):
    """What autograd itself makes, too: a sum's gradient is expanded, a transposed product's transposed."""
    twins = Twins(name, shapes=((33, 20), (3, 300)))
    for _ in range(3):
        twins.set_gradients()

        def lay(_, params):
            for p in params:
                gradient = LAYOUTS[layout](p.grad)
                if gradient.dtype == p.dtype:
                    p.grad = gradient
                else:
                    p.grad = None
                    p.grad_dtype = None
                    p.grad = gradient

        twins.edit(lay)
        if layout in ("float32", "bfloat16") and attempt(twins.torchs.optimizer.step) is not None:
            twins.ours.optimizer.step()  # torch's loop refuses; the engine need not
            return
        if layout not in ("float32", "bfloat16"):
            twins.torchs.optimizer.step()
        twins.ours.optimizer.step()
        twins.compare()


# Names, groups, dtypes, views -----------------------------------------------------------------------------------------


@each_class
def test_named_parameters(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)).double()
        optimizer = cls(model.named_parameters(), **OPTIONS[name])
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        sides.append((optimizer, list(model.parameters())))
    assert sides[0][0].param_groups[0]["param_names"] == sides[1][0].param_groups[0]["param_names"]
    assert_same_outcome(*sides)


@each_class
def test_parameters_of_several_dtypes_in_one_group(name):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float64, torch.float32]
    options = {} if name == "SGD" else {"eps": 1e-3}
    twins = Twins(name, shapes=((40,),) * 6, **options)
    twins.edit(lambda _, params: [setattr(p, "data", p.data.to(d)) for p, d in zip(params, dtypes, strict=True)])
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda o, _: o.step())
    for p, q, dtype in zip(twins.ours.params, twins.torchs.params, dtypes, strict=True):
        assert p.dtype == dtype
        tolerance = 20 * torch.finfo(dtype).eps
        assert_equal(p, q, rtol=tolerance, atol=tolerance)
        for key, value in twins.torchs.optimizer.state[q].items():
            assert_equal(twins.ours.optimizer.state[p][key], value, key, rtol=tolerance, atol=tolerance)


@each_class
def test_a_view_sees_the_step(name):
    p = torch.nn.Parameter(torch.ones(4, 3))
    view, alias, pointer = p.detach()[1], p.data.numpy(), p.data_ptr()
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    p.grad = torch.ones(4, 3)
    before = view._version
    optimizer.step()
    assert torch.equal(view, p.detach()[1]) and (alias != 1).all() and p.data_ptr() == pointer
    assert view._version > before


@each_class
def test_a_parameter_that_is_a_view_of_a_flat_buffer(name):
    """Neighbours in one buffer are not stepped into."""
    sides = []
    for cls in CLASSES[name]:
        flat = torch.linspace(-1, 1, 100, dtype=torch.float64)
        params = [torch.nn.Parameter(flat[i : i + 7].view(7)) for i in range(1, 90, 10)]
        optimizer = cls(params, **OPTIONS[name])
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        sides.append((optimizer, [*params, torch.nn.Parameter(flat)]))
    assert_same_outcome(*sides)


@each_class
def test_a_hundred_groups(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(17, dtype=torch.float64)) for _ in range(100)]
        optimizer = cls([{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(params)], **OPTIONS[name])
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


# Autograd, memory -----------------------------------------------------------------------------------------------------


@each_class
def test_backward_through_what_was_saved_before_the_step_raises(name):
    for cls in CLASSES[name]:
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = cls([p], **OPTIONS[name])
        loss = (p * p).sum()
        p.grad = torch.ones(5)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_class
def test_version_counters_move(name):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((5,), (3, 4), (300_000,))]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [t for p in params for t in (p, *optimizer.state[p].values())]
    assert len(tensors) == 3 * (2 if name == "SGD" else 5)
    before = [t._version for t in tensors]
    optimizer.step()
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))
    params[0].grad = None
    before = [t._version for t in tensors]
    optimizer.step()
    assert [t._version > v for t, v in zip(tensors, before, strict=True)] == [
        t not in {params[0], *optimizer.state[params[0]].values()} for t in tensors
    ]


def owned(values):
    """A tensor over numpy's memory, and a reference that tells when that memory is let go."""
    array = np.array(values, dtype=np.float32)
    return torch.from_numpy(array), weakref.ref(array)


@each_class
def test_nothing_outlives_what_the_user_drops(name):
    value, value_memory = owned(np.ones(1000))
    gradient, gradient_memory = owned(np.ones(1000))
    p, other = torch.nn.Parameter(value), torch.nn.Parameter(torch.ones(5))
    del value
    optimizer = CLASSES[name][0]([p, other], **OPTIONS[name])
    p.grad, other.grad = gradient, torch.ones(5)
    del gradient
    optimizer.step()
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    state, state_memory = owned(np.ones(1000))
    optimizer.state[p][key] = state
    del state
    for _ in range(2):
        optimizer.step()
    gc.disable()
    try:
        p.grad = None
        assert gradient_memory() is None
        assert state_memory() is not None
        optimizer.state[p][key] = torch.zeros(1000)
        assert state_memory() is None
        watched = weakref.ref(p)
        del optimizer.param_groups[0]["params"][0], optimizer.state[p], p
        assert watched() is None and value_memory() is None
        optimizer.step()
        watched = weakref.ref(optimizer)
        del optimizer
        assert watched() is None
    finally:
        gc.enable()


@each_class
def test_an_optimizer_that_is_dropped_frees_everything(name):
    value, memory = owned(np.ones(10))
    p = torch.nn.Parameter(value)
    del value
    optimizer = CLASSES[name][0]([p], **OPTIONS[name], l1=0.1, noise=0.1)
    p.grad = torch.ones(10)
    optimizer.step()
    optimizer.state_dict()
    gc.disable()
    try:
        del optimizer, p
        assert memory() is None
    finally:
        gc.enable()


@each_class
def test_stepping_does_not_pile_up_objects(name):
    twins = Twins(name)
    twins.set_gradients()
    step = twins.ours.optimizer.step
    step()
    step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        step()
    gc.collect()
    assert len(gc.get_objects()) - before < 10


# Hooks, the profiler, closures ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def global_hooks(before, after):
    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one(cls, **options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return cls([p], lr=0.125, **options), p


def overriding(cls):
    class Mine(cls):
        def step(self, closure=None):
            return super().step(closure)

    return Mine


def inheriting(cls):
    class Mine(cls):
        pass

    return Mine


SUBCLASSES = {"itself": lambda cls: cls, "a subclass": inheriting, "a subclass with its own step": overriding}


@each_class
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_hooks_fire_exactly_once(name, kind):
    optimizer, p = one(SUBCLASSES[kind](CLASSES[name][0]))
    events = []
    removable = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: events.append(("pre", o, p[0].item()))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: events.append(("post", o, p[0].item()))),
    ]
    with global_hooks(
        lambda o, args, kwargs: events.append(("all pre", o, p[0].item())),
        lambda o, args, kwargs: events.append(("all post", o, p[0].item())),
    ):
        optimizer.step()
    assert sorted(e[0] for e in events) == ["all post", "all pre", "post", "pre"]
    assert all(e[1] is optimizer for e in events)
    assert all((value == 1) == what.endswith("pre") for what, _, value in events)
    assert [e[0].endswith("pre") for e in events] == [True, True, False, False]
    for handle in removable:
        handle.remove()
    events.clear()
    optimizer.step()
    assert events == []


@each_class
def test_the_order_of_hooks_is_torchs(name):
    orders = []
    for cls in CLASSES[name]:
        events = []
        optimizer, _ = one(cls)
        for i in range(2):
            optimizer.register_step_pre_hook(lambda o, a, k, i=i, e=events: e.append(f"pre {i}"))
            optimizer.register_step_post_hook(lambda o, a, k, i=i, e=events: e.append(f"post {i}"))
        with global_hooks(
            lambda o, a, k, e=events: e.append("all pre"), lambda o, a, k, e=events: e.append("all post")
        ):
            optimizer.step()
        orders.append(events)
    assert orders[0] == orders[1]


@each_class
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_pre_hook_can_change_the_arguments(name, kind):
    optimizer, _ = one(SUBCLASSES[kind](CLASSES[name][0]))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0
    optimizer, _ = one(SUBCLASSES[kind](CLASSES[name][0]))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
    torchs, _ = one(CLASSES[name][1])
    torchs.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
    assert error_of(optimizer.step)[0] is error_of(torchs.step)[0] is RuntimeError


@each_class
def test_a_pre_hook_that_edits_gradients_is_seen(name):
    twins = Twins(name)
    twins.edit(
        lambda o, _: o.register_step_pre_hook(
            lambda o, args, kwargs: [p.grad.mul_(2) for g in o.param_groups for p in g["params"]] and None
        )
    )
    twins.step(3)


@each_class
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_the_profiler_shows_the_step(name, kind):
    cls = SUBCLASSES[kind](CLASSES[name][0])
    optimizer, _ = one(cls)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{cls.__name__}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{cls.__name__}.zero_grad"] == 1
    assert sum(count for key, count in counts.items() if key.startswith("Optimizer.step#")) == 2


@each_class
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back(name, grad_mode):
    optimizer, p = one(CLASSES[name][0])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * 2).sum()
        if grad_mode is not torch.inference_mode:
            loss.backward()
        else:
            p.grad = torch.full((3,), 2.0)
        return loss

    with grad_mode():
        loss = optimizer.step(closure)
        again = optimizer.step(closure=closure)
    assert calls == [True, True] and loss.item() == 6.0 and again.item() < 6.0
    assert (p < 1).all() and optimizer.step() is None


@each_class
def test_an_error_in_the_closure_leaves_everything(name):
    optimizer, _ = one(CLASSES[name][0])
    optimizer.step()
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError, match="no loss today"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_same_bits(before, snapshot(optimizer))


# Schedulers, averaging ------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=20),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.5, step_size_up=3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        ],
        milestones=[4],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@each_class
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_schedulers(name, kind, tensor):
    """OneCycleLR and CyclicLR cycle the momentum, or beta1, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins = Twins(name, lr=torch.tensor(0.25, dtype=torch.float64) if tensor else 0.25)
        schedulers = [SCHEDULERS[kind](side.optimizer) for side in twins.sides]
        for epoch in range(8):
            twins.step()
            for scheduler in schedulers:
                scheduler.step(*([1.0 + epoch] if kind == "ReduceLROnPlateau" else []))
            ours, torchs = (side.optimizer.param_groups[0] for side in twins.sides)
            assert float(ours["lr"]) == float(torchs["lr"])
    assert isinstance(ours["lr"], torch.Tensor) == isinstance(torchs["lr"], torch.Tensor) == tensor


@each_class
def test_the_warning_of_a_scheduler_that_goes_first_is_kept(name):
    for cls in CLASSES[name]:
        optimizer, _ = one(cls)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()


@each_class
def test_a_scheduler_made_after_some_steps(name):
    twins = Twins(name)
    twins.step(2)
    schedulers = [torch.optim.lr_scheduler.StepLR(side.optimizer, 1, gamma=0.5) for side in twins.sides]
    for _ in range(3):
        twins.step()
        for scheduler in schedulers:
            scheduler.step()


@each_class
def test_stochastic_weight_averaging(name):
    outcomes = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)).double()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        optimizer = cls(model.parameters(), **OPTIONS[name])
        scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
            scheduler.step()
        outcomes.append(list(averaged.parameters()))
    for p, q in zip(*outcomes, strict=True):
        assert_equal(p, q)


# Mixed precision ------------------------------------------------------------------------------------------------------

RECIPES = ["plain", "unscale_", "unscale_ and clip", "accumulate"]


def scaled_run(cls, recipe, options, overflow_at=(), steps=5, seen=None):
    """A run under GradScaler on the CPU; returns the optimizer, the parameters and the scaler."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    optimizer = cls(model.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for i in range(steps):
        for _ in range(2 if recipe == "accumulate" else 1):
            loss = model(torch.linspace(-1, 1, 36).view(4, 9) * (i + 1)).square().mean()
            scaler.scale(loss).backward()
        if i in overflow_at:
            model[0].weight.grad[3, 4] = float("inf")
        if "unscale_" in recipe:
            scaler.unscale_(optimizer)
        if "clip" in recipe:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if seen is not None:
            seen(optimizer, i, lambda: scaler.step(optimizer))
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return optimizer, list(model.parameters()), scaler


@each_class
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("overflow_at", [(), (0,), (2,), (0, 1, 3)])
def test_gradscaler(name, recipe, fused, overflow_at):
    ours, torchs = CLASSES[name]
    options = {**OPTIONS[name], **({"dampening": 0.25} if name == "SGD" else {"eps": 1e-3})}
    mine = scaled_run(ours, recipe, {**options, "fused": fused}, overflow_at)
    theirs = scaled_run(torchs, recipe, options, overflow_at)
    assert mine[2].get_scale() == theirs[2].get_scale()
    assert_same_outcome(mine[:2], theirs[:2], rtol=2e-5, atol=2e-6)


@each_class
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("overflow_at", [0, 3])
@pytest.mark.parametrize("extras", [{}, {"noise": 0.1, "l1": 0.1}], ids=["", "extras"])
def test_an_overflow_leaves_everything_as_it_was(name, fused, recipe, overflow_at, extras):
    skipped = []

    def seen(optimizer, i, step):
        before, keys = snapshot(optimizer), [list(optimizer.state[p]) for p in optimizer.state]
        version = optimizer.param_groups[0]["params"][0]._version
        step()
        if i == overflow_at:
            assert_same_bits(before, snapshot(optimizer))
            assert [list(optimizer.state[p]) for p in optimizer.state] == keys
            assert optimizer.param_groups[0]["params"][0]._version == version
            assert overflow_at > 0 or len(optimizer.state) == 0
        skipped.append(optimizer.last_step_skipped)

    options = {**OPTIONS[name], "fused": fused, **extras}
    optimizer, _, _ = scaled_run(CLASSES[name][0], recipe, options, (overflow_at,), seen=seen)
    if fused:
        assert skipped == [i == overflow_at for i in range(5)]
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@each_class
def test_the_scaler_keys_on_fused_alone(name):
    p = [torch.nn.Parameter(torch.zeros(2))]
    assert not getattr(CLASSES[name][0](p), "_step_supports_amp_scaling", False)
    assert CLASSES[name][0](p, fused=True)._step_supports_amp_scaling
    assert CLASSES[name][0](p).last_step_skipped is False


@each_class
def test_a_gradient_scale_is_divided_out_and_written_back(name):
    """As torch's fused step does; a user's own scale, as for clipping, goes the same way."""
    twins = Twins(name, shapes=((33, 20), (5,)), fused=True)
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda o, params: [p.grad.mul_(8) for p in params])
        for side in twins.sides:
            side.optimizer.grad_scale = torch.tensor(4.0)
            side.optimizer.found_inf = torch.tensor(0.0)
        twins.edit(lambda o, _: o.step())
        twins.compare()
        for p, q in zip(twins.ours.params, twins.torchs.params, strict=True):
            assert_equal(p.grad, q.grad)
    twins.set_gradients()
    before = snapshot(twins.ours.optimizer)
    twins.ours.optimizer.found_inf = torch.tensor(1.0)
    gradients = [p.grad.clone() for p in twins.ours.params]
    twins.ours.optimizer.step()
    assert twins.ours.optimizer.last_step_skipped
    assert_same_bits(before, snapshot(twins.ours.optimizer))
    assert all(torch.equal(p.grad, g) for p, g in zip(twins.ours.params, gradients, strict=True))


@each_class
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_do_what_torch_does(name, value):
    twins = Twins(name)
    twins.step(2)
    twins.set_gradients()
    twins.edit(lambda _, params: params[2].grad[1].fill_(value))
    twins.edit(lambda o, _: o.step())
    twins.compare()
    twins.step(2)


# Threads --------------------------------------------------------------------------------------------------------------


@each_class
def test_a_step_in_another_thread(name):
    twins = Twins(name, shapes=((1000, 700), (50,)))
    for _ in range(3):
        twins.set_gradients()
        thread = threading.Thread(target=twins.ours.optimizer.step)
        thread.start()
        busy = [i for _ in range(20) for i in range(1000)]
        twins.torchs.optimizer.step()
        thread.join()
        assert len(busy) == 20_000
        twins.compare()


@each_class
def test_two_optimizers_in_two_threads(name):
    pairs = [Twins(name, shapes=((300, 700), (50,))) for _ in range(2)]
    for twins in pairs:
        twins.set_gradients()
        for _ in range(5):
            twins.torchs.optimizer.step()
    threads = [threading.Thread(target=lambda t=t: [t.ours.optimizer.step() for _ in range(5)]) for t in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for twins in pairs:
        twins.compare()


@each_class
def test_the_interpreter_is_free_during_a_large_step(name):
    """Another Python thread gets on while the engine is at work, and only then: Python itself would not switch."""
    p = torch.nn.Parameter(torch.zeros(3_000_000))
    p.grad = torch.ones_like(p)
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    optimizer.step()
    go, done, ran = threading.Semaphore(0), False, []

    def work():
        while True:
            go.acquire()
            ran.append(True)
            if done:
                return

    interval = sys.getswitchinterval()
    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.05)
    sys.setswitchinterval(1000)
    try:
        for _ in range(30):
            go.release()
            optimizer.step()
            if ran:
                break
        found = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        done = True
        go.release()
        worker.join()
    assert found


@each_class
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(name, threads):
    def outcome(count):
        torch.set_num_threads(count)
        twins = Twins(name, shapes=((1000, 300), (50,), (3, 70_001)), dtype=torch.float32, extras={"noise": 0.1})
        for _ in range(2):
            twins.set_gradients()
            twins.ours.optimizer.step()
        return {**snapshot(twins.ours.optimizer), "members": []}

    assert_same_bits(outcome(1), outcome(threads))


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.full((4,), float(i)) @ torch.ones(4, 4)


@each_class
def test_forked_workers_after_a_step_do_not_hang(name):
    model = torch.nn.Linear(4, 100_000)
    optimizer = CLASSES[name][0](model.parameters(), lr=1e-6)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
        for batch in loader:
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


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
