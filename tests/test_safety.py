"""Nothing that Python can reach ends the process: other threads, users' objects, and memory that is gone."""

import copy
import threading

import pytest
import torch
from helpers import CLASSES, OPTIONS, Twins, attempt, each_class, skip_unless_taken

import trainopt
from trainopt._extension import _C

# Other threads --------------------------------------------------------------------------------------------------------

#: Many tensors whose counters a step moves, and one that keeps it busy while the interpreter is free.
MANY, LARGE = 3000, 3_000_000


def drop_states(optimizer, params):
    optimizer.state.clear()


def drop_gradients(optimizer, params):
    optimizer.zero_grad()


def drop_parameters(optimizer, params):
    optimizer.param_groups[0]["params"].clear()
    params.clear()
    optimizer.state.clear()


def swap_data(optimizer, params):
    for p in params[:MANY]:
        p.data = torch.zeros_like(p)


def replace_states(optimizer, params):
    for state in list(optimizer.state.values()):
        for key, value in state.items():
            state[key] = torch.zeros_like(value)


MEANWHILE = [drop_states, drop_gradients, drop_parameters, swap_data, replace_states]


def attack(meanwhile, rounds):
    """Steps in one thread and `meanwhile` in another; returns how many strangers' version counters have moved."""
    moved = 0
    for _ in range(rounds):
        params = [torch.nn.Parameter(torch.ones(8)) for _ in range(MANY)] + [torch.nn.Parameter(torch.ones(LARGE))]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = trainopt.AdamW(params)
        optimizer.step()
        for _ in range(2):
            thread = threading.Thread(target=optimizer.step)
            thread.start()
            meanwhile(optimizer, params)
            strangers = [torch.zeros(()) for _ in range(2 * MANY)]
            thread.join()
            moved += sum(t._version != 0 for t in strangers)
    return moved


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda change: change.__name__)
def test_tensors_that_go_during_a_large_step(meanwhile, rounds):
    """Counts the strangers whose version counters a step has moved."""
    torch.set_num_threads(2)
    assert attack(meanwhile, rounds) == 0


def hammer(actions, seconds):
    """Runs all actions again and again, each in a thread; returns what they raised."""
    end, raised = threading.Event(), []

    def work(action):
        while not end.is_set():
            if (error := attempt(action)) is not None:
                raised.append(error)

    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    end.wait(seconds)
    end.set()
    for thread in threads:
        thread.join()
    return raised


@each_class
@pytest.mark.parametrize("seconds", [0.1, pytest.param(10, marks=pytest.mark.slow)])
def test_threads_that_step_and_edit_one_optimizer(name, seconds):
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(50)] + [torch.nn.Parameter(torch.ones(LARGE))]
    # Centered, a gradient that does not change has a variance that rounding makes less than 0.
    options = {key: value for key, value in OPTIONS[name].items() if key != "centered"}
    if CLASSES[name][0]._reads_parameter:  # Adafactor's steps are a share of the parameter, which thousands of them
        options["lr"] = 1e-6  # in one direction make larger than any float: torch's of the same after 2,601
    optimizer = CLASSES[name][0](params, **options)

    def give_gradients():
        for p in params:
            p.grad = torch.ones_like(p)

    def edit():
        group = optimizer.param_groups[0]
        group["params"] = list(reversed(group["params"]))
        group["params"].append(group["params"].pop(0))
        optimizer.param_groups[0] = dict(group)

    raised = hammer([optimizer.step, optimizer.step, give_gradients, optimizer.state.clear, edit], seconds)
    assert not [error for error in raised if error[0] is not KeyError and "should be defined" not in error[1]]
    assert all(p.isfinite().all() for p in params)


# Users' objects -------------------------------------------------------------------------------------------------------


class Impostor:
    """A key with the hash of a string, which edits the optimizer when it is compared with that."""

    def __init__(self, name, edit):
        self.name, self.edit = name, edit

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        self.edit()
        return NotImplemented


class Number:
    """Says what it is worth, and edits the optimizer at that."""

    def __init__(self, value, edit):
        self.value, self.edit = value, edit

    def __float__(self):
        self.edit()
        return self.value

    __index__ = __bool__ = __float__


class EditingList(list):
    edit = staticmethod(lambda: None)

    def __iter__(self):
        self.edit()
        return super().__iter__()


class EditingDict(dict):
    edit = staticmethod(lambda: None)

    def __getitem__(self, key):
        self.edit()
        return super().__getitem__(key)


def upset(optimizer, params):
    """An edit that leaves as little as can be of what the step has already seen; not more than a few times."""
    running, left = False, 5

    def edit():
        nonlocal running, left
        if running or left == 0:
            return
        running, left = True, left - 1
        group = optimizer.param_groups[0]
        dict.update(group, {"lr": 0.0078125, "params": list(params)})
        for p in params:
            p.grad = torch.ones_like(p)
            if state := dict.get(optimizer.state, p):
                dict.__setitem__(optimizer.state, p, {k: copy.copy(v) for k, v in dict.items(state)})
        optimizer.param_groups[:] = [dict(group) if type(group) is dict else group]
        running = False

    return edit


def key_in_the_group(optimizer, params, edit):
    optimizer.param_groups[0] = {Impostor("lr", edit): 1, **optimizer.param_groups[0]}


def key_in_the_state(optimizer, params, edit):
    optimizer.state[params[0]] = {Impostor("step", edit): 1, **optimizer.state[params[0]]}


def key_in_the_states(optimizer, params, edit):
    class Key(Impostor):
        def __hash__(self):
            return hash(params[1])

    optimizer.state[Key("", edit)] = {}
    optimizer.state[params[1]] = optimizer.state.pop(params[1], {})


def parameters_in_a_list_of_ones_own(optimizer, params, edit):
    optimizer.param_groups[0]["params"] = EditingList(params)
    optimizer.param_groups[0]["params"].edit = edit


def group_in_a_dict_of_ones_own(optimizer, params, edit):
    optimizer.param_groups[0] = EditingDict(optimizer.param_groups[0])
    optimizer.param_groups[0].edit = edit


def state_in_a_dict_of_ones_own(optimizer, params, edit):
    optimizer.state[params[0]] = EditingDict(optimizer.state[params[0]])
    optimizer.state[params[0]].edit = edit


def lr_of_ones_own(optimizer, params, edit):
    optimizer.param_groups[0]["lr"] = Number(0.5, edit)


def betas_of_ones_own(optimizer, params, edit):
    key = "betas" if "betas" in optimizer.param_groups[0] else "momentum"
    value = Number(0.5, edit)
    optimizer.param_groups[0][key] = [value, 0.75] if key == "betas" else value


def flag_of_ones_own(optimizer, params, edit):
    optimizer.param_groups[0]["maximize"] = Number(False, edit)


UPSETTING = [
    key_in_the_group,
    key_in_the_state,
    key_in_the_states,
    parameters_in_a_list_of_ones_own,
    group_in_a_dict_of_ones_own,
    state_in_a_dict_of_ones_own,
    lr_of_ones_own,
    betas_of_ones_own,
    flag_of_ones_own,
]


@each_class
@pytest.mark.parametrize("put", UPSETTING, ids=lambda put: put.__name__)
@pytest.mark.parametrize("steps", [0, 2], ids=["at first", "later"])
def test_objects_that_edit_the_optimizer_when_they_are_asked(name, put, steps):
    """Whatever they do, nothing breaks; where torch goes on, so does the step, else it says what torch says."""
    if name == "ASGD" and put is lr_of_ones_own and not steps:
        pytest.skip("torch's makes a tensor of the learning rate, and gets no further once it has edited the optimizer")
    twins = Twins(name)
    twins.step(steps)
    twins.set_gradients()
    twins.edit(lambda optimizer, params: put(optimizer, params, upset(optimizer, params)))
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours == torchs
    twins.edit(lambda optimizer, params: optimizer.param_groups.__setitem__(slice(None), [plain(optimizer, params)]))
    if steps:
        twins.edit(lambda optimizer, params: optimizer.state.clear())
        for p, q in zip(twins.ours.params, twins.torchs.params, strict=True):
            q.data.copy_(p.data)
        twins.step(2)


def plain(optimizer, params):
    group = optimizer.param_groups[0]
    options = {key: value for key, value in dict.items(group) if type(key) is str}
    name = type(optimizer).__name__
    return {**options, **OPTIONS[name], "maximize": False, "params": list(params)}


@each_class
def test_a_step_within_a_step(name):
    """A hook of a gradient, or the closure, steps the optimizer that is being stepped."""
    twins = Twins(name)
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda optimizer, _: optimizer.step(lambda: optimizer.step()))
        twins.compare()
    for side in twins.sides:
        p = side.params[2]
        p.register_post_accumulate_grad_hook(lambda _, side=side: side.optimizer.step())
        side.optimizer.zero_grad()
        (p * p).sum().backward()
    twins.compare()


@each_class
def test_a_hook_that_edits_the_groups(name):
    twins = Twins(name)

    def hook(optimizer, args, kwargs):
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][::-1]
        optimizer.param_groups[0] = dict(optimizer.param_groups[0])

    twins.edit(lambda optimizer, _: optimizer.register_step_pre_hook(hook))
    twins.step(4)


class Slots:
    """As large as a list, so that it can take a list's place in memory."""

    __slots__ = ("a", "b", "c")


def test_another_object_where_the_list_of_parameters_was():
    """An address is no identity: the list of the last step is gone, and something else is there."""
    optimizer = trainopt.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.125)
    group, p = optimizer.param_groups[0], optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones(3)
    for make in (Slots, lambda: [p], lambda: [3], lambda: [None, None]):
        for _ in range(3):
            group["params"] = [p]
            optimizer.step()
        address = id(group["params"])
        spare = [[] for _ in range(200)]  # lists are kept for reuse; their store must be full
        group["params"] = None
        del spare
        others = [make() for _ in range(300)]
        group["params"] = next((other for other in others if id(other) == address), others[0])
        del others
        error = attempt(optimizer.step)
        assert error is None or error[0] in (TypeError, AttributeError)


def test_other_strings_where_the_keys_were():
    optimizer = trainopt.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.125)
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones(3)
    for _ in range(20):
        rest = {k: v for k, v in optimizer.param_groups[0].items() if k != "eps"}
        optimizer.param_groups[0] = {**rest, "".join(["e", "ps"]): 1e-8}
        optimizer.step()
        del optimizer.param_groups[0]["eps"]
        for key in ["".join(["e", "pt"]) for _ in range(50)]:
            optimizer.param_groups[0][key] = 1e-8
            assert attempt(optimizer.step) == (KeyError, "'eps'")
            del optimizer.param_groups[0][key]


# The plan itself ------------------------------------------------------------------------------------------------------


def test_a_plan_without_init():
    plan = _C.Plan.__new__(_C.Plan)
    for call in (lambda: plan.paths([], {}), lambda: plan.step([], {}, 1.0)):
        assert attempt(call)[0] is TypeError


ODD = [None, 3, "text", b"bytes", [], {}, (), [None], [3], ["text"], [{}], object(), torch.ones(2), {3: 4}, [[1]], -1]


def test_a_plan_takes_any_arguments():
    """An error or an answer, for whatever is given in the place of each argument."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = trainopt.AdamW([p])
    good = [optimizer.param_groups, optimizer.state, 1.0, [], [], None, None]
    for place in range(len(good)):
        for odd in ODD:
            given = [*good[:place], odd, *good[place + 1 :]]
            attempt(lambda given=given: _C.Plan("adam").step(*given))
            attempt(lambda given=given: _C.Plan("adam").paths(*given[:2]))
    for odd in ODD:
        for group in ({**optimizer.param_groups[0], "params": odd}, odd):
            attempt(lambda group=group: _C.Plan("adam").step([group], optimizer.state, 1.0))
            attempt(lambda group=group: _C.Plan("adam").paths([group], optimizer.state))
        for state in ({p: odd}, {p: {"step": odd}}, {p: {"step": torch.ones(()), "exp_avg": odd}}):
            attempt(lambda state=state: _C.Plan("adam").step(optimizer.param_groups, state, 1.0))
            attempt(lambda state=state: _C.Plan("adam").paths(optimizer.param_groups, state))
    assert attempt(lambda: _C.Plan("lbfgs"))[0] is ValueError
    assert attempt(lambda: _C.Plan(None))[0] is TypeError
    assert torch.equal(p, torch.ones(3))


# Memory that is gone --------------------------------------------------------------------------------------------------


def empty(tensor):
    tensor.untyped_storage().resize_(0)


def shorten(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)


def tensors_of(optimizer, p):
    names = {"parameter": p, "gradient": p.grad, "learning rate": optimizer.param_groups[0]["lr"]}
    return {**names, **optimizer.state[p]}


@each_class
@pytest.mark.parametrize("lose", [empty, shorten])
@pytest.mark.parametrize("warm", [1, 3], ids=["walked", "compared"])
@pytest.mark.parametrize("what", ["parameter", "gradient", "learning rate", "states", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_storage_that_was_made_smaller(name, lose, warm, what, dtype):
    """torch's own kernels end the process there."""
    skip_unless_taken(name, str(dtype).removeprefix("torch."))
    params = [torch.nn.Parameter(torch.ones(1000, dtype=dtype)) for _ in range(2)]
    optimizer = CLASSES[name][0](params, **{**OPTIONS[name], "lr": torch.tensor(0.125)})
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(warm):
        optimizer.step()
    state_names = [key for key in optimizer.state[params[1]] if key != "step"]
    for key in state_names if what == "states" else [what]:
        tensor = tensors_of(optimizer, params[1]).get(key)
        if tensor is None:  # SGD counts no steps
            continue
        kept = tensor.untyped_storage().clone()
        before = [p.detach().clone() for p in params[:1]]
        lose(tensor)
        error = attempt(optimizer.step)
        assert error is not None and error[0] is RuntimeError
        assert "storage" in error[1] and ("parameter 1" in error[1] or what == "learning rate")
        assert torch.equal(params[0], before[0])
        tensor.untyped_storage().resize_(kept.nbytes())
        tensor.untyped_storage().copy_(kept)
        optimizer.step()


@each_class
def test_an_idle_parameter_may_have_no_memory(name):
    """As FSDP leaves them."""
    p, q = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    empty(p)
    q.grad = torch.ones(9)
    optimizer = CLASSES[name][0]([p, q], **OPTIONS[name])
    optimizer.step()
    optimizer.step()
    assert (q != 1).all()
