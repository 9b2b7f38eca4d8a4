"""Options of Muon's groups that make no sense: when they are made, and when they are set later."""

import pytest
import torch
from helpers import assert_same_bits, snapshot
from test_muon_model import made, train
from torch import nn

import trainopt

pytestmark = pytest.mark.usefixtures("one_thread")

BAD_GROUPS = [
    ({"betas": (0.9, 0.99)}, "'betas' is an option of AdamW"),
    ({"use_muon": False, "momentum": 0.9}, "'momentum' is an option of Muon"),
    ({"use_muon": False, "flatten": True}, "'flatten' is an option of Muon"),
    ({"ns_step": 3}, "has no option 'ns_step'"),
    ({"use_muon": 1}, "use_muon must be True or False"),
    ({"use_muon": False, "lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"use_muon": False, "max_grad_norm": 1.0}, "max_grad_norm=1.0 is about a whole step"),
    ({"use_muon": False, "zero_grad": "in_step"}, "zero_grad='in_step' is about a whole step"),
    ({"use_muon": False, "state_dtype": "int4"}, "state_dtype"),
    ({"ns_steps": 100}, "less than 100"),
    ({"ns_steps": 2.5}, "ns_steps must be a whole number"),
    ({"ns_coefficients": (1.0, 2.0)}, "exactly 3 values"),
    ({"split": 5}, "split=5 does not divide"),
    ({"split": (2, 3)}, r"split=\(2, 3\) does not divide"),
    ({"split": 0}, "Invalid split value: 0"),
    ({"split_dim": 1}, "give that too"),
    ({"split": 2, "split_dim": 2}, "Invalid split_dim value: 2"),
    ({"normuon_beta2": 1.0}, "Invalid normuon_beta2 value: 1.0"),
    ({"normuon_beta2": False}, "Invalid normuon_beta2 value: False"),
    ({"split": True}, "Invalid split value: True"),
    ({"flatten": "no"}, "Invalid flatten value: 'no'"),
]


@pytest.mark.parametrize(("group", "message"), BAD_GROUPS)
def test_an_option_that_makes_no_sense_is_an_error_that_names_it(group, message):
    optimizer = trainopt.Muon([nn.Parameter(torch.zeros(4, 4))])
    defaults = dict(optimizer.defaults)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4))], **group})
    assert len(optimizer.param_groups) == 1 and optimizer.defaults == defaults
    with pytest.raises(TypeError, match="no_such_option"):
        trainopt.Muon([nn.Parameter(torch.zeros(4, 4))], adamw={"no_such_option": 1})


#: What is set in a group of a living Muon: whether it is AdamW's, the option, and what its next step says.
BAD_EDITS = [
    (False, {"momentum": "x"}, TypeError, "momentum must be a number, not a str: 'x'"),
    (False, {"weight_decay": None}, TypeError, "weight_decay must be a number, not a NoneType: None"),
    (False, {"lr": [1.0]}, TypeError, "lr must be a number"),
    (False, {"eps": "small"}, TypeError, "eps must be a number"),
    (False, {"ns_steps": 2.5}, ValueError, "ns_steps must be a whole number"),
    (False, {"ns_coefficients": (1, 2, "3")}, TypeError, "ns_coefficients must be numbers"),
    (False, {"adjust_lr_fn": "mine"}, ValueError, "Adjust learning rate function mine is not supported"),
    (False, {"adjust_lr_fn": ["original"]}, ValueError, "is not supported"),
    (False, {"split": "two"}, ValueError, "Invalid split value: 'two'"),
    (False, {"split": 2, "split_dim": 2}, ValueError, "Invalid split_dim value: 2"),
    (False, {"split": 5}, ValueError, "split=5 does not divide"),
    (False, {"split": 2, "split_dim": True}, ValueError, "Invalid split_dim value: True"),
    (False, {"split": True}, ValueError, "Invalid split value: True"),
    (False, {"flatten": "no"}, ValueError, "Invalid flatten value: 'no'"),
    (False, {"nesterov": "no"}, TypeError, "nesterov must be True or False"),
    (False, {"ns_coefficients": None}, ValueError, "exactly 3 values"),
    (False, {"ns_dtype": []}, ValueError, r"Invalid ns_dtype value: \[\]"),
    (False, {"normuon_beta2": 1.5}, ValueError, "Invalid normuon_beta2 value: 1.5"),
    (False, {"ns_dtype": "float16"}, ValueError, "Invalid ns_dtype value: 'float16'"),
    (False, {"use_muon": 1}, ValueError, "use_muon must be True or False, got 1"),
    (False, {"use_muon": False}, ValueError, "use_muon=False lacks '"),
    (False, {"max_grad_norm": 1.0}, ValueError, "max_grad_norm=1.0 is an option of AdamW"),
    (False, {"state_dtype": "8bit"}, ValueError, "state_dtype='8bit' is an option of AdamW"),
    (False, {"l1": 0.5}, ValueError, "l1=0.5 is an option of AdamW"),
    (True, {"split": 2}, ValueError, "split=2 is an option of Muon"),
    (True, {"max_grad_norm": 1.0}, ValueError, "max_grad_norm=1.0 is about a whole step"),
    (True, {"skip_nonfinite": True}, ValueError, "skip_nonfinite=True is about a whole step"),
    (True, {"differentiable": True}, ValueError, "differentiable=True is about a whole step"),
    (True, {"l1": -1.0}, ValueError, "Invalid l1 value: -1.0"),
    (True, {"state_dtype": "bf16"}, ValueError, "Invalid state_dtype value: 'bf16'"),
]


@pytest.mark.parametrize("steps", [0, 2])
def test_an_option_that_makes_no_sense_is_an_error_when_it_is_set_too(steps):
    """Before anything is changed; and when it is gone, all goes on as if it had not been."""
    (model, optimizer), (other, others) = made(), made()
    expected = train(other, others, 4)
    if steps:
        train(model, optimizer, steps)
    for is_adamws, edit, kind, words in BAD_EDITS:
        for act in (lambda: train(model, optimizer, 1, steps), optimizer.init_state):
            group = optimizer.param_groups[-1 if is_adamws else 0]
            before, held = dict(group), snapshot(optimizer)
            group.update(edit)
            with pytest.raises(kind, match=words):
                act()
            group.clear()
            group.update(before)
            assert_same_bits(held, snapshot(optimizer))
    assert all(map(torch.equal, expected, train(model, optimizer, 4 - steps, steps)))


@pytest.mark.parametrize(
    "change", ["buffer of another dtype", "of another shape", "none", "parameter in float64", "no key"]
)
def test_what_does_not_go_with_a_state_is_an_error_before_anything_changes(change):
    model, optimizer = made()
    train(model, optimizer, 1)
    p = optimizer.param_groups[0]["params"][1]
    state = optimizer.state[p]
    if change == "no key":
        del optimizer.param_groups[0]["nesterov"]
    elif change == "parameter in float64":
        p.data = p.data.double()
        p.grad = p.grad.double()
    else:
        of = {"none": None, "of another shape": torch.zeros(2, 2)}
        state["momentum_buffer"] = of.get(change, state["momentum_buffer"].double())
    before = snapshot(optimizer)
    with pytest.raises((ValueError, KeyError), match="nesterov" if change == "no key" else "momentum_buffer is"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
