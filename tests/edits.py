"""What becomes of an optimizer between two steps: the tables that `test_edits.py` and `test_recall.py` go over.

An edit is a function of (optimizer, params), made alike to trainopt's optimizer and to torch's, after gradients were
set and before the step; torch's plain loop says what is right. A parameter that it adds goes to the end of `params`.
"""

import collections
import fractions
import types

import numpy as np
import torch
from helpers import CLASSES, OPTIONS

#: The parameters that are edited, all of float64: two of one shape, a square matrix, four dimensions, nothing, one
#: element more than a chunk, and a scalar.
SHAPES = ((9,), (9,), (4, 4), (2, 3, 4, 5), (0, 3), (257,), ())

# Options --------------------------------------------------------------------------------------------------------------


class Half(float):
    """A number of somebody's own."""


#: What an option may be set to: usual values, and such as torch takes in its own way or refuses.
VALUES = {
    "lr": [
        *(0.3, 0.0, 1, np.float64(0.3), torch.tensor(0.25), np.float32(0.25), np.array(0.25), np.int64(1), Half(0.5)),
        *(fractions.Fraction(1, 4), -0.25, float("nan"), 10**400, 0.5 + 0j, [0.5], "fast", None),
    ],
    "weight_decay": [0.5, 0, torch.tensor(0.5).double(), -0.25, "much", None],
    "maximize": [True, "yes", [], None],
    "differentiable": [None],
    "foreach": [None],
    "momentum": [0.25, 0, -0.5, "some", None],
    "dampening": [0.75, None],
    "nesterov": [True, None],
    "betas": [
        *((0.25, 0.625), [0.25, 0.625], (0.0, 0.5), np.array([0.5, 0.75]), (1.0, 0.75), (0.5, 1.0), (1.5, 0.75)),
        *((0.5, 1.5), (-0.5, 0.75), (0.5, -0.75), (), (0.5,), (0.5, 0.75, 0.875), (None, 0.5), (0.5, None)),
        *("ab", 0.5, None),
    ],
    # Far enough below 0 that nothing is divided by almost 0.
    "eps": [0.5, -8.0, "tiny", None],
    "amsgrad": [False, None],
    "decoupled_weight_decay": [True, False, None],
}


def options_of(name):
    """(key, value) of every row that an option of the class has."""
    return [(key, value) for key, values in VALUES.items() if key in defaults_of(name) for value in values]


def defaults_of(name):
    return CLASSES[name][1]([torch.zeros(1)], **OPTIONS[name]).defaults


# Parameters, groups, states and data ----------------------------------------------------------------------------------


def members(optimizer):
    return optimizer.param_groups[0]["params"]


def new_parameter(params, *shape):
    params.append(torch.nn.Parameter(torch.full(shape or (6,), 0.5, dtype=torch.float64)))
    return params[-1]


def replace_one(optimizer, params):
    members(optimizer)[1] = params[1] = torch.nn.Parameter(params[1].detach() + 1)


def split_the_group(optimizer, params):
    group = optimizer.param_groups[0]
    optimizer.param_groups = [{**group, "params": params[3:], "lr": 0.1}, {**group, "params": params[:3], "lr": 0.4}]


def add_a_group(optimizer, params):
    optimizer.add_param_group({"params": [new_parameter(params), new_parameter(params, 3, 2)], "lr": 0.25})


def add_a_group_and_drop_the_first(optimizer, params):
    add_a_group(optimizer, params)
    del optimizer.param_groups[0]


def without_our_options(optimizer, params):
    """As code that builds groups by hand for torch's class."""
    ours = {"l1", "l1_proximal", "noise", "seed", "bias_correction"}
    optimizer.param_groups[0] = {k: v for k, v in optimizer.param_groups[0].items() if k not in ours}


def each_state(change, *where, keys=None):
    """An edit of the states, but for the count, of the parameters at `where`; all if nothing is said."""

    def edit(optimizer, params):
        for p in [params[i] for i in where] or params:
            for key, value in list(optimizer.state[p].items()):
                if key in (keys or [key]) and (keys or key != "step"):
                    optimizer.state[p][key] = change(value)

    return edit


def state_dict_of_one(change):
    """An edit of the dict of one parameter's states."""
    return lambda optimizer, params: optimizer.state.__setitem__(params[2], change(optimizer.state[params[2]]))


def state_in_another_order(optimizer, params):
    """Another dict, another order than the parameters', and in each the other way round."""
    states = type(optimizer.state)(dict)
    for p in reversed(params):
        if p in optimizer.state:
            states[p] = dict(reversed(optimizer.state[p].items()))
    optimizer.state = states


def set_storage(tensor):
    """The same tensor object over other memory."""
    with torch.no_grad():
        return tensor.set_(tensor.detach().clone())


def strided(matrix):
    return matrix.t().contiguous().t() if matrix.dim() == 2 else matrix


def each_data(change, *where):
    def edit(optimizer, params):
        for p in [params[i] for i in where] or params:
            p.data = change(p.data)

    return edit


def resize_in_place(optimizer, params):
    """The elements move to other memory; shape and values are as they were."""
    p = params[5]
    values = p.detach().clone()
    p.data.resize_(100_000)
    p.data.resize_(257)
    p.data.copy_(values)


def zero_what_the_data_was(optimizer, params):
    with torch.no_grad():
        params[2].data, other = strided(params[2].data.clone()), params[2].data
        other.zero_()


def grad(change, *where):
    """An edit of gradients, by what becomes of one; all if nothing is said."""

    def edit(optimizer, params):
        for p in [params[i] for i in where] or params:
            p.grad = change(p.grad)

    return edit


def lazily_negated(gradient):
    """x.imag of a conjugate is a real tensor whose negation is not yet done."""
    return torch.complex(torch.zeros_like(gradient), -gradient).conj().imag


def in_inference_mode(gradient):
    with torch.inference_mode():
        return gradient.clone()


def put_nonfinite(value):
    return lambda optimizer, params: params[2].grad[1].fill_(value)


EDITS = {
    "a parameter appended": lambda o, params: members(o).append(new_parameter(params)),
    "a parameter inserted": lambda o, params: members(o).insert(0, new_parameter(params)),
    "a parameter removed": lambda o, _: members(o).pop(2),
    "a parameter replaced": replace_one,
    "two parameters swapped": lambda _, params: torch.utils.swap_tensors(params[0], params[1]),
    "no parameters": lambda o, _: members(o).clear(),
    "parameters reversed": lambda o, _: members(o).reverse(),
    "another list without one": lambda o, params: o.param_groups[0].update(params=params[:2] + params[3:]),
    "another list of parameters": lambda o, params: o.param_groups[0].update(params=list(params)),
    "a tuple of parameters": lambda o, params: o.param_groups[0].update(params=tuple(params)),
    "a group added": add_a_group,
    "a group added, the first dropped": add_a_group_and_drop_the_first,
    "the group replaced": lambda o, _: o.param_groups.__setitem__(0, {**o.param_groups[0], "lr": 0.2}),
    "the group split": split_the_group,
    "a group without our options": without_our_options,
    "states doubled": each_state(lambda value: value * 2, 2),
    "states written to": each_state(lambda value: value.mul_(0.5)),
    "states cloned": each_state(torch.clone, 1),
    "states in other tensors of the same memory": each_state(lambda value: value.view(value.shape), 1),
    "states over other memory": each_state(set_storage, 1),
    "states strided": each_state(strided, 2),
    "states of another dtype for a while": each_state(lambda value: value.float().double(), 2),
    "a count replaced": each_state(lambda value: torch.tensor(40.0), 1, keys=["step"]),
    "counts written to": each_state(lambda value: value.fill_(9), keys=["step"]),
    "a state dict replaced": state_dict_of_one(dict),
    "a state dict the other way round": state_dict_of_one(lambda state: dict(reversed(state.items()))),
    "a state dict of equal keys": state_dict_of_one(lambda state: {"".join(list(k)): v for k, v in state.items()}),
    "a state dict emptied": state_dict_of_one(lambda state: {}),
    "a state gone": lambda o, params: o.state.pop(params[2]),
    "all states gone": lambda o, _: o.state.clear(),
    "all states in another order": state_in_another_order,
    "data replaced": each_data(lambda data: data + 0.5),
    "data replaced, of one": each_data(lambda data: data + 1, 1),
    "data written to": lambda _, params: [p.data.mul_(0.5) for p in params],
    "data over other memory": lambda _, params: set_storage(params[1]),
    "data strided": each_data(strided, 2),
    "data transposed": each_data(torch.t, 2),
    "data channels last": each_data(lambda data: data.contiguous(memory_format=torch.channels_last), 3),
    "data with an offset": each_data(lambda data: torch.cat([data.new_zeros(1), data])[1:], 5),
    "data resized in place": resize_in_place,
    "data replaced, the old zeroed": zero_what_the_data_was,
    "frozen": lambda _, params: [params[i].requires_grad_(False) for i in (1, 2)],
    "a gradient gone": grad(lambda g: None, 1),
    "a gradient in other memory": grad(torch.clone, 1),
    "a gradient with gaps": grad(lambda g: torch.stack([g, -g], -1)[..., 0], 1),
    "a gradient that repeats itself": grad(lambda g: g[:1].expand(4, 4), 2),
    "a gradient transposed": grad(strided, 2),
    "a lazily negated gradient": grad(lazily_negated),
    "gradients made in inference mode": grad(in_inference_mode),
    "a sparse gradient": grad(torch.Tensor.to_sparse, 2),
    "one gradient for two": lambda _, params: setattr(params[1], "grad", params[0].grad),
    "parameters as their own gradients": lambda _, params: [setattr(p, "grad", p.detach()) for p in params],
    "a gradient of NaN": put_nonfinite(float("nan")),
    "a gradient of infinity": put_nonfinite(float("inf")),
    "a gradient of minus infinity": put_nonfinite(-float("inf")),
}

#: Those after which torch's next step gives the parameters that were there the same values as without the edit.
HARMLESS = {
    *("a parameter appended", "a parameter inserted", "parameters reversed", "another list of parameters"),
    *("a tuple of parameters", "a group added", "a group without our options", "states cloned"),
    *("states in other tensors of the same memory", "states over other memory", "states strided"),
    *("a state dict replaced", "a state dict the other way round", "a state dict of equal keys"),
    *("all states in another order", "data over other memory", "data strided", "data channels last"),
    *("data with an offset", "data resized in place", "data replaced, the old zeroed", "frozen"),
    *("a gradient in other memory", "a gradient with gaps", "a gradient transposed", "a lazily negated gradient"),
    "gradients made in inference mode",
}

#: Those that need the first three parameters alone, and no more than the operators of an emulated device.
ANYWHERE = {
    what: EDITS[what]
    for what in (
        *("two parameters swapped", "parameters reversed", "states doubled", "states cloned"),
        *("states in other tensors of the same memory", "states over other memory", "a count replaced"),
        *("counts written to", "a state dict replaced", "a state dict the other way round"),
        *("a state dict of equal keys", "data over other memory", "data replaced, of one", "data transposed", "frozen"),
        *("a gradient gone", "a gradient in other memory", "a gradient with gaps", "a gradient that repeats itself"),
        "parameters as their own gradients",
    )
}

# States of any kind ---------------------------------------------------------------------------------------------------

STATE_VALUES = {
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
    **{str(n): lambda value, n=n: torch.full_like(value, n) for n in (-1, -2, -5, -1.5, 2.5, torch.nan, torch.inf)},
    "of one dimension": lambda value: value.reshape(1),
}


def states_of(name):
    """(key, what) of every row for a state of the class."""
    cls = CLASSES[name][0]
    counts = [("step", what) for what in STATE_VALUES | COUNTS] if cls._counts_steps else []
    return [*counts, *((key, what) for key in (*cls._numbers, *cls._states) for what in STATE_VALUES)]


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


def betas_in(container):
    return each_group(lambda group: {**group, "betas": container(group["betas"])} if "betas" in group else group)


def a_user_dict_as_state(optimizer, params):
    optimizer.state[params[1]] = collections.UserDict(optimizer.state[params[1]])


def a_plain_dict_of_states(optimizer, params):
    optimizer.state = {p: optimizer.state[p] for p in params}


CONTAINERS = {
    "a view of a dict's keys": params_in(lambda params: dict.fromkeys(params).keys()),
    "a dict of parameters": params_in(dict.fromkeys),
    "values of a dict": params_in(lambda params: dict(enumerate(params)).values()),
    "a ParameterList": params_in(torch.nn.ParameterList),
    "a deque": params_in(collections.deque),
    "a tuple of parameters": params_in(tuple),
    "a list that goes backwards": params_in(Reversed),
    "a UserList": params_in(collections.UserList),
    "a UserDict as group": each_group(collections.UserDict),
    "a mapping proxy as group": each_group(types.MappingProxyType),
    "a ChainMap as group": each_group(lambda group: collections.ChainMap({}, group)),
    "an OrderedDict as group": each_group(collections.OrderedDict),
    "a defaultdict as group": each_group(lambda group: collections.defaultdict(lambda: None, group)),
    "a dict that doubles": each_group(Doubling),
    "a dict with attributes": each_group(Quiet),
    "a tuple of groups": lambda o, _: setattr(o, "param_groups", tuple(o.param_groups)),
    "a deque of groups": lambda o, _: setattr(o, "param_groups", collections.deque(o.param_groups)),
    "betas in a list": betas_in(list),
    "betas in a UserList": betas_in(collections.UserList),
    "a plain dict of states": a_plain_dict_of_states,
    "a UserDict of states": lambda o, _: setattr(o, "state", collections.UserDict(o.state)),
    "a UserDict as state": a_user_dict_as_state,
}
#: Containers that can be told from the first step on; what holds states comes with the second.
OF_GROUPS = [name for name in CONTAINERS if "state" not in name]

# Memory that a step both reads and writes -----------------------------------------------------------------------------

#: Three parameters of one size share it.
SIZE = 40
SHARING_SHAPES = ((SIZE,),) * 3


def state_of(optimizer, param):
    """The states of a parameter, made if there are none yet, and the name of the first that has its shape."""
    state = optimizer.state[param]
    cls = CLASSES[type(optimizer).__name__][0]
    if not state:
        state.update({"step": torch.zeros(())} if cls._counts_steps else {})
        lr = float(optimizer.param_groups[0]["lr"])
        state.update({key: torch.tensor(lr if key == "eta" else 1.0) for key in cls._numbers})  # as they begin
        names = cls._states_needed(optimizer.param_groups[0], param) if cls._factors else cls._states
        state.update({key: torch.full_like(param, 0.25 if key in cls._unsigned else 0.0) for key in names})
    return state, next(key for key in cls._states if key in state)


def is_anothers_state(optimizer, params):
    state, key = state_of(optimizer, params[2])
    params[0].grad = state[key]


def is_an_own_state(optimizer, params):
    state, key = state_of(optimizer, params[1])
    params[1].grad = state[key]


def share_a_state(optimizer, params):
    (state, key), (other, _) = state_of(optimizer, params[0]), state_of(optimizer, params[2])
    state[key] = other[key]


def state_is_a_parameter(optimizer, params):
    state, key = state_of(optimizer, params[0])
    state[key] = params[1].detach()


def each_others_parameters(optimizer, params):
    params[0].grad, params[1].grad = params[1].detach(), params[0].detach()


def overlaps_a_parameter(optimizer, params):
    memory = torch.linspace(-1, 1, SIZE + 5, dtype=params[0].dtype)
    params[1].data, params[2].grad = memory[5:], memory[:-5]


def overlaps_its_parameter(optimizer, params):
    memory = torch.linspace(-1, 1, SIZE + 1, dtype=params[0].dtype)
    params[1].data, params[1].grad = memory[:-1], memory[1:]


def numpys_view_of_a_parameter(optimizer, params):
    """Two storages over one memory."""
    params[0].grad = torch.from_numpy(params[2].detach().numpy())


def numpys_view_of_a_gradient(optimizer, params):
    params[2].data = torch.from_numpy(params[0].grad.numpy())


def two_are_a_parameter(optimizer, params):
    params[0].grad = params[1].grad = params[2].detach()


def repeats_an_element(optimizer, params):
    params[0].grad = params[2].detach()[7:8].expand(SIZE)


def lazy_negation_of_a_parameter(optimizer, params):
    """torch steps the parameter whose gradient it is, and the engine would step the other."""
    memory = torch.linspace(-1, 1, 2 * SIZE, dtype=params[0].dtype)
    params[0].data, params[2].grad = memory[:SIZE], torch.view_as_complex(memory.view(SIZE, 2)).conj().imag
    assert params[2].grad.is_neg()


def count_in_a_parameter(optimizer, params):
    if "betas" in optimizer.param_groups[0]:
        state_of(optimizer, params[0])[0]["step"] = params[2].detach().fill_(3)[4]


def shared_count(optimizer, params):
    if "betas" in optimizer.param_groups[0]:
        state_of(optimizer, params[1])[0]["step"] = state_of(optimizer, params[0])[0]["step"]


def lr_in_a_parameter(optimizer, params):
    optimizer.param_groups[0]["lr"] = params[1].detach().fill_(0.25)[3]


def lr_in_a_state(optimizer, params):
    state, key = state_of(optimizer, params[1])
    optimizer.param_groups[0]["lr"] = state[key].fill_(0.125)[3]


def betas_in_a_parameter(optimizer, params):
    if "betas" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["betas"] = tuple(params[0].detach().fill_(0.5)[3:5])


SHARING = {
    "a gradient is a later parameter": lambda _, params: setattr(params[0], "grad", params[2].detach()),
    "a gradient is an earlier parameter": lambda _, params: setattr(params[2], "grad", params[0].detach()),
    "gradients are each other's parameters": each_others_parameters,
    "a gradient overlaps another parameter": overlaps_a_parameter,
    "a gradient overlaps its parameter": overlaps_its_parameter,
    "one gradient of two is a parameter": two_are_a_parameter,
    "a gradient repeats an element of a parameter": repeats_an_element,
    "a gradient is another's state": is_anothers_state,
    "a gradient is an own state": is_an_own_state,
    "two share a state": share_a_state,
    "a state is a parameter": state_is_a_parameter,
    "a gradient is numpy's view of a parameter": numpys_view_of_a_parameter,
    "a parameter is numpy's view of a gradient": numpys_view_of_a_gradient,
    "a gradient is a parameter, lazily negated": lazy_negation_of_a_parameter,
    "two share a count": shared_count,
    "a count lies in a parameter": count_in_a_parameter,
    "the learning rate lies in a parameter": lr_in_a_parameter,
    "the learning rate lies in a state": lr_in_a_state,
    "betas lie in a parameter": betas_in_a_parameter,
}
