"""State: exchanged with torch.optim both ways, saved and copied."""

import copy
import io
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
    skip_where_torchs_differ,
    skip_without_fused,
    snapshot,
    through_a_file,
)
from short_runs import after, start, steps, twin_of

# torch's implementations whose states may come along. Its fused step is right for contiguous tensors without surprises.
IMPLEMENTATIONS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}


# Interchange with torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("to_ours", [True, False], ids=["from torch", "to torch"])
def test_mid_run_interchange(name, flags, to_ours):
    ours, torchs = CLASSES[name]
    skip_without_fused(name, flags)
    skip_where_torchs_differ(name, flags)
    source, target = (torchs, ours) if to_ours else (ours, torchs)
    options = OPTIONS[name]
    first, params = after(source, start(), range(10), **options, **flags)
    moved = twin_of(params)
    second = target(moved, **options, **({} if to_ours else flags))
    second.load_state_dict(first.state_dict())
    steps(second, moved, range(10, 20))

    straight = start()
    truth = torchs(straight, **options, foreach=False)
    steps(truth, straight, range(10))
    steps(as_loaded(truth), straight, range(10, 20))
    assert_same_outcome((second, moved), (truth, straight))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_state_of_a_capturable_optimizer(name):
    """torch steps those on accelerators only; the state dict is the same but for the flag."""
    twins = Twins(name)
    twins.step(5)
    saved = twins.torchs.optimizer.state_dict()
    saved["param_groups"][0]["capturable"] = True
    twins.ours.optimizer.load_state_dict(saved)
    assert twins.ours.optimizer.param_groups[0]["capturable"]
    twins.torchs.optimizer.param_groups[0]["capturable"] = False
    twins.step(5)
    fresh = CLASSES[name][0](twin_of(twins.ours.params), **OPTIONS[name], capturable=True)
    assert fresh.defaults["capturable"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=["default", "fused"])
def test_keys_shapes_and_dtypes_are_torchs(name, dtype, flags):
    skip_without_fused(name, flags)
    dicts = []
    for cls in CLASSES[name]:
        optimizer, _ = after(cls, start(dtype), range(2), **OPTIONS[name], **flags)
        dicts.append(optimizer.state_dict())
    ours, theirs = dicts
    assert list(ours) == list(theirs)
    assert list(ours["state"]) == list(theirs["state"])
    for index, state in theirs["state"].items():
        mine = ours["state"][index]
        assert list(mine) == list(state)
        for key, value in state.items():
            assert mine[key].dtype == value.dtype and mine[key].shape == value.shape, key
            assert mine[key].device == value.device and mine[key].stride() == value.stride(), key
            assert not mine[key].requires_grad
    assert ours["param_groups"] == theirs["param_groups"]
    assert [list(group) for group in ours["param_groups"]] == [list(group) for group in theirs["param_groups"]]


@pytest.mark.parametrize("name", NAMES)
def test_step_counts_follow_the_default_dtype_as_torchs(name):
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins(name, extras={"noise": 1e-300})
        twins.set_gradients()
        twins.edit(lambda o, _: o.step())
        for p, q in zip(twins.ours.params, twins.torchs.params, strict=True):
            theirs = twins.torchs.optimizer.state[q].get("step")
            if theirs is not None:
                assert twins.ours.optimizer.state[p]["step"].dtype == theirs.dtype
    finally:
        torch.set_default_dtype(torch.float32)


# Files and copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extras", [{}, {"l1": 0.01, "noise": 0.1, "seed": 2**64 - 1}], ids=["torch's", "with extras"])
def test_saved_and_loaded_the_run_goes_on_bit_for_bit(name, extras):
    optimizer, params = after(CLASSES[name][0], start(torch.float32), range(4), **OPTIONS[name], **extras)
    saved = through_a_file({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    moved = twin_of(saved["params"])
    resumed = CLASSES[name][0](moved)
    resumed.load_state_dict(saved["optimizer"])
    steps(optimizer, params, range(4, 8))
    steps(resumed, moved, range(4, 8))
    one, other = snapshot(optimizer), snapshot(resumed)
    assert_same_bits({**one, "members": []}, {**other, "members": []})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stepped", [0, 3])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_of_the_whole_optimizer_go_on_alike(name, stepped, how):
    optimizer, params = after(
        CLASSES[name][0], start(torch.float32), range(stepped), **OPTIONS[name], l1=0.01, noise=0.1
    )
    if how == "pickle":
        other, copied = pickle.loads(pickle.dumps((optimizer, params)))
    elif how == "deepcopy":
        other, copied = copy.deepcopy((optimizer, params))
    else:
        file = io.BytesIO()
        torch.save((optimizer, params), file)
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    assert type(other) is type(optimizer) and repr(other) == repr(optimizer)
    assert all(a is b for a, b in zip(other.param_groups[0]["params"], copied, strict=True))
    before = snapshot(optimizer)
    steps(other, copied, range(5, 8))
    assert_same_bits(before, snapshot(optimizer))  # the copy's steps leave the first alone
    steps(optimizer, params, range(5, 8))
    one, two = snapshot(optimizer), snapshot(other)
    assert_same_bits({**one, "members": []}, {**two, "members": []})


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_of_torchs_optimizer_state_goes_into_ours(name):
    """__setstate__ with what torch's own instance pickles: made by hand, as tools that convert checkpoints do."""
    torchs, params = after(CLASSES[name][1], start(), range(3), **OPTIONS[name])
    state = copy.deepcopy(torchs.__getstate__())
    ours = CLASSES[name][0].__new__(CLASSES[name][0])
    ours.__setstate__(state)
    moved = ours.param_groups[0]["params"]
    steps(ours, moved, range(3, 6))
    steps(torchs, params, range(3, 6))
    assert_same_outcome((ours, moved), (torchs, params))
