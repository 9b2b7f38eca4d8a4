"""Prodigy on a device, whose d the host reads in each step, and which has the parameters of a step go one way."""

import judge
import pytest
import torch
from steps import SHAPES, TABLE, here, moved

import trainopt

ROW = TABLE["Prodigy"]
OPTIONS = ROW.usual
START, GRADIENTS = judge.random_problem(SHAPES, torch.float32, 4)


def numbers_of(optimizer):
    return {name: optimizer.param_groups[0][name] for name in ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")}


def test_the_numbers_are_the_cpus(device):
    steady = GRADIENTS[:1] * 4  # so that d grows
    optimizer, _ = judge.run(ROW.make, moved(START, device), [moved(now, device) for now in steady], **OPTIONS)
    truth, _ = judge.run(ROW.make, START, steady, **OPTIONS)
    assert numbers_of(optimizer) == numbers_of(truth) and numbers_of(truth)["k"] == 4
    assert numbers_of(truth)["d"] > optimizer.param_groups[0]["d0"]


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_under_a_gradscaler(device, found):
    """The host reads whether it is made."""
    optimizer, params = judge.run(
        ROW.make, moved(START, device), [moved(now, device) for now in GRADIENTS[:3]], **OPTIONS, fused=True
    )
    truth, others = judge.run(ROW.make, START, GRADIENTS[:3] if found else GRADIENTS, **OPTIONS)
    optimizer.grad_scale = torch.tensor(64.0, device=device)
    optimizer.found_inf = torch.tensor(found, device=device)
    for p, g in zip(params, GRADIENTS[3], strict=True):
        p.grad = (64 * g).to(device)
    optimizer.step()
    assert optimizer.last_step_skipped == bool(found)
    assert numbers_of(optimizer) == numbers_of(truth)
    judge.assert_same_bits(here(judge.outcome(optimizer, params)), judge.outcome(truth, others))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_parameters_in_two_places(device, dtypes):
    """On the CPU and on the device, or in two arithmetics there: all by the plain step."""
    places = ("cpu" if dtypes[0] is dtypes[1] else device, device)
    start = [torch.ones(300, dtype=dtype) for dtype in dtypes]
    params = [torch.nn.Parameter(p.to(place, copy=True)) for p, place in zip(start, places, strict=True)]
    optimizer = ROW.make(params, **OPTIONS)
    assert all(row.path == "torch" and "several devices" in row.reason for row in trainopt.explain(optimizer))
    gradients = [[torch.full_like(p, value) for p in start] for value in (1.0, 0.5, -0.25)]
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.device)
        optimizer.step()
    truth, others = judge.run(ROW.make, start, gradients, **OPTIONS)
    assert numbers_of(optimizer)["d"] == pytest.approx(numbers_of(truth)["d"], rel=1e-5)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


def test_a_step_cannot_be_captured(device):
    module = torch.get_device_module(device)
    optimizer, _ = judge.run(
        ROW.make, moved(START, device), [moved(now, device) for now in GRADIENTS], **OPTIONS, capturable=True
    )
    before = numbers_of(optimizer)
    side, graph = module.Stream(), module.CUDAGraph()
    side.wait_stream(module.current_stream())
    refused = pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph: the host reads")
    with module.stream(side), module.graph(graph, stream=side), refused:
        optimizer.step()
    assert numbers_of(optimizer) == before
