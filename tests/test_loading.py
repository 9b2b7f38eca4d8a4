"""State that is loaded: carefully, as torch loads it, and never shared by accident."""

import copy
import pickle

import pytest
import torch
from helpers import (
    CLASSES,
    NAMES,
    OPTIONS,
    Twins,
    as_loaded,
    assert_same_bits,
    assert_same_outcome,
    error_of,
    skip_without_fused,
    snapshot,
    through_a_file,
)
from short_runs import after, start, steps, twin_of

import trainopt


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", [0, 1], ids=["from ours", "from torch"])
def test_loading_does_not_alias(name, source):
    a, params = after(CLASSES[name][source], start(), range(3), **OPTIONS[name])
    moved = twin_of(params)
    b = CLASSES[name][0](moved, **OPTIONS[name])
    b.load_state_dict(a.state_dict())
    before = snapshot(a)
    steps(b, moved, range(3, 6))
    assert_same_bits(before, snapshot(a))
    b.param_groups[0]["lr"] = 77.0
    assert a.param_groups[0]["lr"] == OPTIONS[name]["lr"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("named", [False, True])
def test_a_state_of_the_wrong_shape_changes_nothing(name, named):
    def make(shapes, lr):
        params = start(shapes=shapes)
        listed = [(f"layer{i}.weight", p) for i, p in enumerate(params)] if named else params
        return CLASSES[name][0](listed, **{**OPTIONS[name], "lr": lr}), params

    other, others = make([(3,), (4, 5)], 0.5)
    steps(other, others, range(2))
    optimizer, params = make([(3,), (5, 4)], 0.125)
    steps(optimizer, params, range(2))
    before, groups, state = snapshot(optimizer), optimizer.param_groups, optimizer.state
    kind, text = error_of(lambda: optimizer.load_state_dict(other.state_dict()))
    first = CLASSES[name][0]._states[0]
    assert kind is ValueError and "(5, 4)" in text and str(tuple(optimizer._shape_of(first, others[1]))) in text
    assert ("layer1.weight" if named else "parameter 1 of group 0") in text
    assert CLASSES[name][0]._states[0] in text
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.param_groups is groups and optimizer.state is state
    steps(optimizer, params, [3])


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_number_of_groups_or_parameters_is_torchs_error_and_changes_nothing(name):
    ours, torchs = CLASSES[name]
    for groups in ([1, 1], [1], [3], [2, 1]):
        params = iter(start(shapes=[(3,)] * 3))
        other = torchs([{"params": [next(params) for _ in range(n)]} for n in groups], **OPTIONS[name])
        mine, theirs = (cls(start(shapes=[(3,)] * 2), **OPTIONS[name]) for cls in (ours, torchs))
        before = snapshot(mine)
        assert error_of(lambda o=mine, s=other: o.load_state_dict(s.state_dict())) == error_of(
            lambda o=theirs, s=other: o.load_state_dict(s.state_dict())
        )
        assert_same_bits(before, snapshot(mine))


def named(optimizer_class, order, options, seed=0):
    """An optimizer over parameters with names, in this order; all names' shapes and starts are fixed."""
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.nn.Parameter(torch.randn(4, 5, dtype=torch.float64, generator=generator)) for n in "abcd"}
    params = {n: made[n] for n in order}
    return optimizer_class(list(params.items()), **options), params


def step_by_name(optimizer, params, seeds):
    for seed in seeds:
        for name, p in params.items():
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed + ord(name)))
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", [0, 1], ids=["from ours", "from torch"])
def test_names_in_another_order_decide(name, source):
    """All shapes are the same: by position the states would go to the wrong parameters without a word."""
    first, params = named(CLASSES[name][source], "abcd", OPTIONS[name])
    step_by_name(first, params, range(0, 300, 100))
    second, others = named(CLASSES[name][0], "dbac", OPTIONS[name])
    with torch.no_grad():
        for n, p in others.items():
            p.copy_(params[n])
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["param_names"] == list("dbac")
    assert all(a is b for a, b in zip(second.param_groups[0]["params"], others.values(), strict=True))
    step_by_name(as_loaded(first), params, range(300, 600, 100))
    step_by_name(second, others, range(300, 600, 100))
    assert_same_outcome((second, [others[n] for n in "abcd"]), (first, [params[n] for n in "abcd"]))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_differ_are_as_in_torch(name):
    """torch goes by position and takes over the loaded names."""
    first, params = named(CLASSES[name][1], "abc", OPTIONS[name])
    step_by_name(first, params, [0])
    for cls in CLASSES[name]:
        second, others = named(cls, "abd", OPTIONS[name])
        second.load_state_dict(first.state_dict())
        assert second.param_groups[0]["param_names"] == list("abc")
        unnamed = cls(list(others.values()), **OPTIONS[name])
        unnamed.load_state_dict(first.state_dict())
        assert unnamed.param_groups[0]["param_names"] == list("abc")


@pytest.mark.parametrize("name", NAMES)
def test_names_over_two_groups(name):
    def make(order):
        _, params = named(CLASSES[name][0], "abcd", OPTIONS[name])
        groups = [{"params": [(n, params[n]) for n in part], "lr": 0.1 * (i + 1)} for i, part in enumerate(order)]
        return CLASSES[name][0](groups, **OPTIONS[name]), params

    first, params = make(["ab", "cd"])
    step_by_name(first, params, range(0, 300, 100))
    second, others = make(["ba", "dc"])
    with torch.no_grad():
        for n, p in others.items():
            p.copy_(params[n])
    second.load_state_dict(first.state_dict())
    for optimizer, held in ((as_loaded(first), params), (second, others)):
        step_by_name(optimizer, held, range(300, 600, 100))
    assert_same_outcome((second, list(others.values())), (first, list(params.values())))


NEWER_KEYS = {
    "SGD": ["foreach", "fused", "differentiable", "maximize", "nesterov"],
    "Adam": ["foreach", "fused", "differentiable", "maximize", "capturable", "amsgrad", "decoupled_weight_decay"],
    "AdamW": ["foreach", "fused", "differentiable", "maximize", "capturable", "amsgrad", "decoupled_weight_decay"],
    "Adamax": ["foreach", "differentiable", "maximize", "capturable"],
    "RAdam": ["foreach", "differentiable", "maximize", "capturable", "decoupled_weight_decay"],
    "NAdam": ["foreach", "differentiable", "maximize", "capturable", "decoupled_weight_decay"],
    "ASGD": ["foreach", "differentiable", "maximize", "capturable"],
    "RMSprop": ["foreach", "differentiable", "maximize", "capturable"],
    "Adafactor": ["foreach"],
    "Adagrad": ["foreach", "fused", "differentiable", "maximize"],
    "Adadelta": ["foreach", "differentiable", "maximize", "capturable"],
    "Rprop": ["foreach", "differentiable", "maximize", "capturable"],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [float, int, None], ids=["float", "int", "tensor"])
def test_old_state_dicts(name, number):
    twins = Twins(name, **({"amsgrad": False} if "amsgrad" in NEWER_KEYS[name] else {}))
    twins.step(4)
    saved = twins.torchs.optimizer.state_dict()
    for key in NEWER_KEYS[name]:
        for group in saved["param_groups"]:
            del group[key]
    if number is not None:
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = number(state["step"])
    twins.edit(lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(saved)))
    ours, torchs = (side.optimizer.param_groups[0] for side in twins.sides)
    assert {k: ours[k] for k in torchs if k != "params"} == {k: v for k, v in torchs.items() if k != "params"}
    for p, q in zip(twins.ours.params, twins.torchs.params, strict=True):
        for key, value in twins.torchs.optimizer.state[q].items():
            assert twins.ours.optimizer.state[p][key].dtype == value.dtype
    twins.step(4)


def test_a_momentum_buffer_of_none():
    """torch saves momentum_buffer=None for SGD without momentum in some versions, and takes it."""
    twins = Twins("SGD")
    twins.step(2)
    saved = twins.torchs.optimizer.state_dict()
    saved["state"][1] = {"momentum_buffer": None}
    del saved["state"][2]
    twins.edit(lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(saved)))
    twins.step(3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=["default", "fused"])
def test_state_dtypes_at_load_are_torchs(name, saved_dtype, dtype, flags):
    skip_without_fused(name, flags)
    source, _ = after(CLASSES[name][1], start(saved_dtype), range(2), **OPTIONS[name], foreach=False)
    for state in source.state.values():
        if "step" in state:
            state["step"] = state["step"].double()
    loaded = []
    for cls in CLASSES[name]:
        optimizer = cls(start(dtype), **OPTIONS[name], **flags)
        saved = source.state_dict()
        saved["param_groups"] = copy.deepcopy(saved["param_groups"])
        saved["param_groups"][0].update(foreach=None, fused=flags.get("fused"))
        optimizer.load_state_dict(saved)
        loaded.append([optimizer.state[p] for p in optimizer.param_groups[0]["params"]])
    numbers = CLASSES[name][0]._numbers if dtype == torch.bfloat16 else ()  # which would be lost in it
    for mine, theirs in zip(*loaded, strict=True):
        kept = {k: v for k, v in theirs.items() if k not in numbers}
        assert {k: mine[k].dtype for k in kept} == {k: v.dtype for k, v in kept.items()}
        assert all(torch.equal(mine[k], v) for k, v in kept.items()) and list(mine) == list(theirs)
        assert all(mine[k].dtype == torch.float32 and torch.equal(mine[k].bfloat16(), theirs[k]) for k in numbers)


@pytest.mark.parametrize("name", [name for name in NAMES if CLASSES[name][0]._numbers])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_not_rounded_to_16_bits(name, dtype):
    """torch casts them to their parameter's dtype where it loads them; what it has saved so goes on in float32."""
    ours, torchs = CLASSES[name]
    first, params = after(ours, start(dtype), range(3), **OPTIONS[name])

    def loaded(cls, saved):
        optimizer = cls(twin_of(params), **OPTIONS[name])
        optimizer.load_state_dict(copy.deepcopy(saved))
        return optimizer

    def numbers_of(optimizer):
        states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        return [state[key] for state in states for key in ours._numbers]

    before, by_torch = numbers_of(first), loaded(torchs, first.state_dict())
    rounded = numbers_of(by_torch)
    assert all(map(torch.equal, before, numbers_of(loaded(ours, first.state_dict()))))
    assert {number.dtype for number in rounded} == {dtype}
    resumed = loaded(ours, by_torch.state_dict())
    assert all(torch.equal(mine, theirs.float()) for mine, theirs in zip(numbers_of(resumed), rounded, strict=True))
    steps(resumed, resumed.param_groups[0]["params"], range(3, 5))
    assert {number.dtype for number in numbers_of(resumed)} == {torch.float32}
    assert all(row.path.startswith("fused") for row in trainopt.explain(resumed))


@pytest.mark.parametrize("name", NAMES)
def test_our_options_keep_their_values_when_torchs_state_is_loaded(name):
    mine = {"l1": 0.25, "l1_proximal": True, "noise": 0.5, "seed": 7}
    if "bias_correction" in CLASSES[name][0].EXTRAS:
        mine["bias_correction"] = False
    twins = Twins(name, extras=mine)
    twins.set_gradients()
    twins.torchs.optimizer.step()
    twins.ours.optimizer.param_groups[0]["noise"] = 0.125  # the present value, not the constructor's
    twins.ours.optimizer.load_state_dict(twins.torchs.optimizer.state_dict())
    group = twins.ours.optimizer.param_groups[0]
    assert {k: group[k] for k in mine} == {**mine, "noise": 0.125}
    assert group["lr"] == OPTIONS[name]["lr"]


@pytest.mark.parametrize("name", NAMES)
def test_our_options_come_from_our_state_dict(name):
    mine = {"l1": 0.25, "l1_proximal": True, "noise": 0.5, "seed": 7}
    source = CLASSES[name][0](start(), **OPTIONS[name], **mine)
    target = CLASSES[name][0](start(), **OPTIONS[name])
    target.load_state_dict(source.state_dict())
    assert {k: target.param_groups[0][k] for k in mine} == mine


@pytest.mark.parametrize("name", NAMES)
def test_torchs_class_loads_ours_with_every_option_set(name):
    extras = {"l1": 0.25, "noise": 0.5, "seed": 7}
    ours, params = after(CLASSES[name][0], start(), range(3), **OPTIONS[name], **extras)
    moved = twin_of(params)
    torchs = CLASSES[name][1](moved, **OPTIONS[name])
    torchs.load_state_dict(through_a_file(ours.state_dict()))
    steps(torchs, moved, range(3))
    back = CLASSES[name][0](moved, **OPTIONS[name])
    back.load_state_dict(torchs.state_dict())  # torch's class carries keys it does not know
    assert {k: back.param_groups[0][k] for k in extras} == extras
    steps(back, moved, range(3))


@pytest.mark.parametrize("name", NAMES)
def test_loading_into_a_stepped_optimizer_takes_effect(name):
    ours, params = after(CLASSES[name][0], start(), range(2), **OPTIONS[name])
    saved, values = copy.deepcopy(ours.state_dict()), twin_of(params)
    steps(ours, params, range(2, 6))
    with torch.no_grad():
        for p, v in zip(params, values, strict=True):
            p.copy_(v)
    ours.load_state_dict(saved)
    again = CLASSES[name][1](values, **OPTIONS[name])
    again.load_state_dict(saved)
    steps(ours, params, range(2, 6))
    steps(again, values, range(2, 6))
    assert_same_outcome((ours, params), (again, values))


@pytest.mark.parametrize("name", NAMES)
def test_two_optimizers_of_one_class_share_nothing(name):
    """Alternating steps of two optimizers are those of each alone."""
    pairs = [Twins(name), Twins(name, shapes=((5, 5),), lr=0.5)]
    for _ in range(3):
        for twins in pairs:
            twins.step()


@pytest.mark.parametrize("name", NAMES)
def test_states_that_belong_to_no_parameter_are_kept(name):
    """torch copies state entries that it cannot assign; tools keep their own notes there."""
    twins = Twins(name)
    twins.step(2)
    twins.edit(lambda o, _: o.state.__setitem__("note", {"epoch": 3}))
    twins.edit(lambda o, _: o.load_state_dict(o.state_dict()))
    twins.step(2)
    assert twins.ours.optimizer.state["note"] == {"epoch": 3}


@pytest.mark.parametrize("name", NAMES)
def test_foreign_keys_in_a_parameters_state_are_kept(name):
    twins = Twins(name)
    twins.step(2)

    def annotate(optimizer, params):
        optimizer.state[params[0]]["tag"] = torch.ones(3, dtype=torch.float64)
        optimizer.state[params[1]]["tags"] = [torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]

    twins.edit(annotate)
    twins.edit(lambda o, _: o.step())
    twins.ours.optimizer.load_state_dict(twins.ours.optimizer.state_dict())
    state = [twins.ours.optimizer.state[p] for p in twins.ours.params]
    assert torch.equal(state[0]["tag"], torch.ones(3, dtype=torch.float64)) and len(state[1]["tags"]) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", [0, 1], ids=["from ours", "from torch"])
def test_loading_leaves_the_given_dict_as_it_was(name, source):
    """Also what belongs to no parameter, which torch keeps as it is given; and by the steps after it."""
    twins = Twins(name)
    twins.step(2)
    given = twins.sides[source].optimizer.state_dict()
    given["state"]["elsewhere"] = {"note": torch.ones(3)}
    held, kept = {key: dict(state) for key, state in given["state"].items()}, copy.deepcopy(given)
    fresh = Twins(name)
    fresh.ours.optimizer.load_state_dict(given)
    fresh.set_gradients()
    fresh.ours.optimizer.step()
    assert given["param_groups"] == kept["param_groups"] and list(given["state"]) == list(kept["state"])
    for key, values in held.items():
        assert list(given["state"][key]) == list(values)
        assert all(given["state"][key][k] is v and torch.equal(v, kept["state"][key][k]) for k, v in values.items())
    assert fresh.ours.optimizer.state["elsewhere"]["note"] is not given["state"]["elsewhere"]["note"]


# 16-bit counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["state dict", "pickle", "fuse"])
def test_counts_of_16_bits_are_widened(name, dtype, how):
    """256 + 1 is 256 in bfloat16: bias corrections and noise would stand still."""
    cls = CLASSES[name][how == "fuse"]
    optimizer, params = after(cls, start(), range(2), **OPTIONS[name], **({} if how == "fuse" else {"noise": 1e-300}))
    for state in optimizer.state.values():
        state["step"] = torch.tensor(256.0, dtype=dtype)
    if how == "state dict":
        moved = twin_of(params)
        other = cls(moved, **OPTIONS[name], noise=1e-300)
        other.load_state_dict(optimizer.state_dict())
    elif how == "pickle":
        other, moved = pickle.loads(pickle.dumps((optimizer, params)))
    else:
        other, moved = trainopt.fuse(optimizer), params
    steps(other, moved, range(2))
    for p in moved:
        wide = torch.float32 if how == "fuse" else torch.float64  # with noise
        assert other.state[p]["step"].dtype is wide and other.state[p]["step"] == 258


def test_an_option_that_is_not_there_keeps_its_value_and_in_an_old_pickle_has_the_default():
    """Of classes that torch does not have; torch's have torch's error."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = trainopt.LAMB([{"params": [params[0]], "decoupled_decay": True}, {"params": [params[1]]}])
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["decoupled_decay"]
    optimizer.load_state_dict(saved)
    assert [group["decoupled_decay"] for group in optimizer.param_groups] == [True, False]
    optimizer.step()
    for group in (*optimizer.param_groups, optimizer.defaults):
        del group["decoupled_decay"]
    copy = pickle.loads(pickle.dumps(optimizer))
    assert [group["decoupled_decay"] for group in copy.param_groups] == [False, False]
    for group in copy.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(3)
    copy.step()
    assert copy.state[copy.param_groups[0]["params"][0]]["step"] == 3
