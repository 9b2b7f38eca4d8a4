"""param_groups: who gets weight decay, everyone once, by name."""

import math

import pytest
import torch
from torch import nn

import trainopt
from trainopt import param_groups


class Net(nn.Module):
    """A module with a parameter of every kind that the rule tells apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.conv = nn.Conv1d(4, 4, 3)
        self.lstm = nn.LSTM(4, 3)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.norms = nn.ModuleList(
            [
                nn.LayerNorm([3, 4]),
                nn.RMSNorm([3, 4]),
                nn.GroupNorm(2, 4),
                nn.BatchNorm2d(4),
                nn.InstanceNorm1d(4, affine=True),
            ]
        )
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.gain = nn.Parameter(torch.ones(4))
        self.position_bias = nn.Parameter(torch.zeros(5, 5))
        self.biased = nn.Parameter(torch.zeros(5, 5))


def split(groups):
    """(names with decay, names without)"""
    names = {True: set(), False: set()}
    for group in groups:
        names[group["weight_decay"] != 0] |= {name for name, _ in group["params"]}
    return names[True], names[False]


def test_who_gets_weight_decay():
    decayed, undecayed = split(param_groups(Net(), 0.1))
    assert decayed == {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "bilinear.weight",
        "biased",
    }
    assert {"attention.bias_k", "position_bias", "norms.0.weight", "norms.1.weight", "scale", "gain"} <= undecayed


def test_every_parameter_is_there_once_in_the_models_order():
    model = Net()
    groups = param_groups(model, 0.1)
    pairs = [pair for group in groups for pair in group["params"]]
    assert {id(p) for _, p in pairs} == {id(p) for p in model.parameters()}
    assert len(pairs) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert all(named[name] is param for name, param in pairs)
    order = list(named)
    for group in groups:
        places = [order.index(name) for name, _ in group["params"]]
        assert places == sorted(places)


def test_a_tied_parameter_is_spared_under_any_of_its_names():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm([3, 3])})
    model["linear"].weight = model["norm"].weight
    assert split(param_groups(model, 0.1)) == (set(), {"linear.weight", "linear.bias", "norm.bias"})
    assert split(param_groups(Net(), 0.1, no_decay=["head.weight"]))[1] >= {"embed.weight"}


def test_a_module_used_twice_is_counted_once():
    shared = nn.Linear(2, 2)
    groups = param_groups(nn.Sequential(shared, nn.ReLU(), shared), 0.1)
    assert [[name for name, _ in group["params"]] for group in groups] == [["0.weight"], ["0.bias"]]


def test_frozen_parameters_are_there_and_unfreezing_needs_no_new_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimizer = trainopt.AdamW(param_groups(model, 0.1), lr=0.1)
    before = model.weight.clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before) and model.weight not in optimizer.state
    model.weight.requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("make", [trainopt.SGD, trainopt.AdamW, torch.optim.AdamW])
def test_optimizers_take_the_groups_and_their_names(make):
    model = Net()
    optimizer = make(param_groups(model, 0.1), lr=1.0)
    first, second = optimizer.param_groups
    assert first["weight_decay"] == 0.1 and second["weight_decay"] == 0.0
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))


def test_the_decay_acts_on_the_first_group_alone():
    model = nn.Linear(3, 2)
    nn.init.ones_(model.bias)
    weight = model.weight.detach().clone()
    optimizer = trainopt.AdamW(param_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * 0.95)
    assert torch.equal(model.bias, torch.ones(2))


def test_a_group_that_would_be_empty_is_left_out():
    [group] = param_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1
    [group] = param_groups(nn.LayerNorm(2), 0.1)
    assert group["weight_decay"] == 0.0
    trainopt.AdamW(param_groups(nn.LayerNorm(2), 0.1))


def test_patterns_spare_more():
    decayed, undecayed = split(param_groups(Net(), 0.1, no_decay=["lstm.*", "conv.weight"]))
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "conv.weight"} <= undecayed
    assert "bilinear.weight" in decayed


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: param_groups(nn.Linear(2, 2), -0.1), ["weight_decay", "-0.1"]),
        (lambda: param_groups(nn.Linear(2, 2), math.nan), ["weight_decay", "nan"]),
        (lambda: param_groups(nn.Linear(2, 2), "0.1"), ["weight_decay", "'0.1'"]),
        (lambda: param_groups(nn.Linear(2, 2), 0.1, no_decay="bias"), ["no_decay", "'bias'"]),
        (lambda: param_groups(nn.Linear(2, 2), 0.1, no_decay=["bias", "embed*"]), ["no_decay", "'embed*'"]),
        (lambda: param_groups(nn.ReLU(), 0.1), ["ReLU"]),
        (lambda: param_groups(nn.LazyLinear(2), 0.1), ["'weight'"]),
    ],
)
def test_refused_by_name_and_value(make, words):
    with pytest.raises(ValueError) as refusal:
        make()
    assert all(word in str(refusal.value) for word in ["param_groups", *words]), refusal.value
