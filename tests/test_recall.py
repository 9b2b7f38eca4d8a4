"""A step that finds everything as the last one left it is compared with it, not walked anew: what it may not overlook.

Every test here steps before it changes something, so that there is a step to compare with.
"""

import edits
import pytest
import torch
from edits import ANYWHERE as EDITS  # noqa: F401  (tests of a device go over them)
from edits import SHAPES
from helpers import CLASSES, OPTIONS, Twins, assert_equal, each_class

#: Enough parameters and elements for several threads to compare: kFewTensors and kGrainElements in csrc.
MANY = 72
LARGE = (100_001,)


@pytest.mark.parametrize("edit", edits.EDITS)
def test_nothing_is_overlooked_by_several_threads(edit):
    """With few parameters, and for every class, `test_edits.py` says so."""
    twins = Twins("Adam", shapes=(*SHAPES, *((2,),) * MANY, LARGE))
    twins.step(2)
    twins.set_gradients()
    twins.edit(edits.EDITS[edit])
    if twins.step_alike():
        twins.step()


@each_class
def test_gradients_that_come_and_go(name):
    twins = Twins(name, shapes=(*((9,),) * (MANY - 1), LARGE))
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


@each_class
def test_version_counters_move_by_one_whoever_shares_them(name):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in (*((9,),) * MANY, LARGE)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
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
