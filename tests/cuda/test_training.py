"""A run on a device: its optimizer clips, leaves out and averages in its step there, and the device counts steps."""

import math

import pytest
import torch
from torch import nn

import trainopt
from trainopt.training import Silent, fit

CASES = {
    "clipped": {"clip": 0.1, "average": 0.9},
    "watched": {"clip": 0.1, "average": 0.9, "log_every": 3},  # the loop looks at the gradients of some updates
    "unread": {"clip": 0.1, "average": 0.9, "nonfinite": "ignore"},
    "within backward": {"step_in_backward": True},
    "states in 16 bits": {"clip": 0.1, "average": 0.9, "state_dtype": "bfloat16"},
}
OPTIMIZERS = {
    "adamw": (trainopt.AdamW, {"lr": 0.01}),
    "capturable": (trainopt.AdamW, {"lr": 0.01, "capturable": True}),
    "momentum": (trainopt.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
}


def train(device, name, bad=None, **choices):
    """A run, and an ordinary step after it; the averages and the weights."""
    kind, settings = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    inputs, target = torch.randn(40, 6), torch.arange(40) % 3
    if bad is not None:
        inputs[bad] = math.nan
    if device == "cpu":
        settings = {key: value for key, value in settings.items() if key != "capturable"}
    optimizer = kind(model.parameters(), **settings)
    choices = {"epochs": 2, "batch_size": 5, "shuffle": False, "seed": 0, "report": Silent(), **choices}
    result = fit(model, (inputs, target), nn.CrossEntropyLoss(), optimizer, **choices)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    weights = [param.detach().cpu().clone() for param in model.parameters()]
    return result.step, [value.cpu() for value in (result.average or {}).values()], weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_is_that_of_the_cpu(name, case, device, tmp_path):
    bad = None if case == "unread" else 13
    expected = train("cpu", name, bad, **CASES[case])
    train(device, name, bad, directory=tmp_path, **{**CASES[case], "epochs": 1})
    resumed = train(device, name, bad, directory=tmp_path, **CASES[case])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if case != "states in 16 bits" else {"rtol": 0.02, "atol": 1e-3}
    for found in (train(device, name, bad, **CASES[case]), resumed):
        assert found[0] == expected[0] == (16 if bad is None else 14)
        torch.testing.assert_close(found[1:], expected[1:], **tolerance)
