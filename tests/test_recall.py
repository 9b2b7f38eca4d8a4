"""A step that finds everything as the last one left it is compared with it, not walked anew: what it may not overlook.

Every test here steps before it changes something, so that there is a step to compare with.
"""

import pytest
import torch
from helpers import CLASSES, OPTIONS, Twins, assert_equal, each_class

MANY = 500  # parameters: enough for several threads to compare them


def edit_state(key, change):
    def edit(optimizer, params):
        state = optimizer.state[params[1]]
        name = key if key in state else "momentum_buffer"
        state[name] = change(state[name])

    return edit


def set_storage(tensor):
    """The same tensor object over other memory."""
    with torch.no_grad():
        tensor.set_(tensor.detach().clone())


def transpose(params):
    params[2].data = params[2].data.t()


EDITS = {
    "a state replaced by a copy": edit_state("exp_avg", torch.clone),
    "a state replaced by another value": edit_state("exp_avg", lambda m: m + 1),
    "a state of the same memory in another tensor": edit_state("exp_avg", lambda m: m.view(m.shape)),
    "a state over other memory": edit_state("exp_avg", lambda m: (set_storage(m), m)[1]),
    "a state under a key that equals the old one": lambda optimizer, params: optimizer.state[params[1]].update(
        {"".join(list(key)): value for key, value in list(optimizer.state[params[1]].items())}
    ),
    "a step count replaced": lambda optimizer, params: optimizer.state[params[1]].update(
        {"step": torch.tensor(40.0)} if "step" in optimizer.state[params[1]] else {}
    ),
    "a step count written to": lambda optimizer, params: [
        state["step"].fill_(9) for state in optimizer.state.values() if "step" in state
    ],
    "a state dict replaced": lambda optimizer, params: optimizer.state.__setitem__(
        params[1], dict(optimizer.state[params[1]])
    ),
    "the order of the states": lambda optimizer, params: optimizer.state.__setitem__(
        params[1], dict(reversed(optimizer.state[params[1]].items()))
    ),
    "the order of the parameters": lambda optimizer, params: optimizer.param_groups[0]["params"].reverse(),
    "a parameter over other memory": lambda optimizer, params: set_storage(params[1]),
    "a parameter's data": lambda optimizer, params: setattr(params[1], "data", params[1].data + 1),
    "two parameters swapped": lambda optimizer, params: torch.utils.swap_tensors(params[0], params[1]),
    "a gradient gone": lambda optimizer, params: setattr(params[1], "grad", None),
    "a gradient in other memory": lambda optimizer, params: setattr(params[1], "grad", params[1].grad.clone()),
    "a gradient with gaps": lambda optimizer, params: setattr(
        params[1], "grad", torch.arange(18, dtype=params[1].dtype)[::2]
    ),
    "a gradient that repeats itself": lambda optimizer, params: setattr(
        params[2], "grad", torch.ones(4, dtype=params[1].dtype).expand(4, 4)
    ),
    "a gradient in the parameter's memory": lambda optimizer, params: setattr(params[1], "grad", params[1].data),
    "a matrix transposed": lambda optimizer, params: transpose(params),
    "no gradient needed any more": lambda optimizer, params: params[1].requires_grad_(False),
}


@each_class
@pytest.mark.parametrize("edit", EDITS)
def test_nothing_is_overlooked(name, edit):
    check_edit(name, edit, 3)


@pytest.mark.parametrize("edit", EDITS)
def test_nothing_is_overlooked_by_several_threads(edit):
    check_edit("Adam", edit, MANY)


def check_edit(name, edit, count):
    twins = Twins(name, shapes=((9,), (9,), (4, 4)) + ((2,),) * (count - 3))
    twins.step(2 if count < MANY else 1)
    twins.set_gradients()
    twins.edit(EDITS[edit])
    twins.edit(lambda optimizer, _: optimizer.step())
    twins.compare()
    twins.step(1)


@each_class
def test_gradients_that_come_and_go(name):
    twins = Twins(name, shapes=((9,),) * MANY)
    for missing in ((), range(0, MANY, 2), range(0, MANY, 2), range(MANY), ()):
        twins.step(1, missing)


@each_class
def test_groups_that_part_and_meet_again(name):
    """Groups of equal options share what is computed for them, until they differ."""
    twins = Twins(name, shapes=((9,),) * 4)
    twins.edit(lambda optimizer, params: optimizer.add_param_group({"params": [torch.nn.Parameter(params[0] + 1)]}))
    for lr in (None, None, 0.5, 0.5, 0.25):
        if lr is not None:
            twins.edit(lambda optimizer, _, lr=lr: optimizer.param_groups[1].update(lr=lr))
        twins.set_gradients()
        for side in twins.sides:
            side.optimizer.param_groups[1]["params"][0].grad = torch.full((9,), 0.5, dtype=torch.float64)
            side.optimizer.step()
        twins.compare()
        assert_equal(*(side.optimizer.param_groups[1]["params"][0] for side in twins.sides))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_step_count_that_two_parameters_share(name):
    twins = Twins(name, shapes=((9,), (9,)))
    twins.step(2)

    def share(optimizer, params):
        optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]

    twins.edit(share)
    twins.step(3)


@each_class
def test_version_counters_move_by_one_whoever_shares_them(name):
    params = [torch.nn.Parameter(torch.ones(9)) for _ in range(MANY)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(9)
        views = [p.detach() for p in params[::2]]  # which share their counters
        before = [p._version for p in params]
        written = [v for state in optimizer.state.values() for v in state.values()]
        states_before = [v._version for v in written]
        optimizer.step()
        assert [p._version for p in params] == [version + 1 for version in before]
        assert [v._version for v in written] == [version + 1 for version in states_before]
        assert [view._version for view in views] == [p._version for p in params[::2]]


@each_class
def test_a_saved_parameter_is_found_stale_after_every_step(name):
    p = torch.nn.Parameter(torch.ones(9))
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    for _ in range(4):
        loss = (p * p).sum()
        p.grad = torch.ones(9)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
