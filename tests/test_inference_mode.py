"""Steps and tensors of inference mode: torch's results where it steps, and its errors where it does not."""

import subprocess
import sys

import pytest
import torch
from helpers import CLASSES, OPTIONS, Twins, assert_equal, attempt, each_class


@each_class
def test_steps_inside_inference_mode(name):
    """The states made there are inference tensors, which torch then refuses to step outside."""
    twins = Twins(name)
    for _ in range(2):
        twins.set_gradients()
        with torch.inference_mode():
            twins.edit(lambda o, _: o.step())
        twins.compare()
    twins.set_gradients()
    ours, torchs = (attempt(side.optimizer.step) for side in twins.sides)
    assert ours is None or ours == torchs


@each_class
def test_parameters_made_in_inference_mode(name):
    outcomes = []
    for cls in CLASSES[name]:
        with torch.inference_mode():
            p = torch.ones(5)
        optimizer = cls([p], **OPTIONS[name])
        with torch.inference_mode():
            p.grad = torch.ones(5)
            outcomes.append((attempt(optimizer.step), p.clone()))
        outcomes[-1] += (attempt(optimizer.step),)
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[0][2] in (None, outcomes[1][2])  # outside of it torch refuses to write to them
    with torch.inference_mode():
        assert_equal(outcomes[0][1], outcomes[1][1])


@each_class
@pytest.mark.parametrize("what", ["parameter", "states", "step"])
@pytest.mark.parametrize("warm", [False, True], ids=["at first", "after a step in inference mode"])
def test_inference_tensors_are_written_to_only_in_inference_mode(name, what, warm):
    outcomes = []
    for cls, flags in zip(CLASSES[name], ({}, {"foreach": False}), strict=True):
        p = torch.ones(5, dtype=torch.float64)
        if what == "parameter":
            with torch.inference_mode():
                p = torch.ones(5, dtype=torch.float64)
        optimizer = cls([p], **OPTIONS[name], **flags)
        with torch.inference_mode():
            p.grad = torch.ones(5, dtype=torch.float64)
            if what != "parameter" or warm:
                optimizer.step()
                for key, value in optimizer.state[p].items() if what != "parameter" else ():
                    with torch.inference_mode((key == "step") == (what == "step")):
                        optimizer.state[p][key] = value.clone()
            if warm:
                optimizer.step()
                optimizer.step()
        outcomes.append((attempt(optimizer.step), p.tolist()))
        with torch.inference_mode():
            outcomes[-1] += (attempt(optimizer.step), p.tolist())
    assert outcomes[0][0] == outcomes[1][0]
    if name == "SGD" and what == "step":
        return
    assert outcomes[0][0][0] is RuntimeError and "inference" in outcomes[0][0][1]
    assert outcomes[0][2] is outcomes[1][2] is None


@pytest.mark.slow
def test_imported_in_inference_mode():
    """What an ordinary tensor is must not be learnt from one that is not."""
    program = (
        "import torch\nwith torch.inference_mode(): import trainopt\n"
        "p = torch.nn.Parameter(torch.ones(3)); print(trainopt.explain(trainopt.AdamW([p]))[0].path)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("fused")
