"""A step captured in a CUDA graph and replayed is the step itself."""

import judge
import pytest
import torch
from devices import IS_EMULATED
from steps import TABLE, UNREAD, assert_same_bits, counts_on_device, here

from trainopt.optim import code8

each_row = pytest.mark.parametrize("name", UNREAD)
SHAPES = ((5,), (0, 3), (300,), (33, 20)) + ((40,),) * 600
RATES = [0.05 / (step + 1) for step in range(4 if IS_EMULATED else 10)]


#: How tensors are stored.
WAYS = {
    "float32": (torch.float32, {}),
    "float32, 8 bits": (torch.float32, {"state_dtype": "8bit"}),
    "master24, 8 bits": (torch.bfloat16, {"precision": "master24", "state_dtype": "8bit"}),
    "stochastic": (torch.bfloat16, {"precision": "stochastic"}),
}


def prepared(name, device, dtype=torch.float32, **options):
    """An optimizer whose states are made, gradients that stay where they are, and the values that they will take."""
    row = TABLE[name]
    start, gradients = judge.random_problem(SHAPES, dtype, 1 + len(RATES))
    params = [torch.nn.Parameter(t.to(device)) for t in start]
    lr = torch.tensor(0.1, device=device)
    optimizer = row.make(params, **{**row.everything, "lr": lr, **counts_on_device(name), **options})
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g.to(device)
    optimizer.step()  # on the current stream: makes the states
    return optimizer, params, lr, [[g.to(device) for g in now] for now in gradients[1:]]


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad.copy_(g)


def captured(step, device):
    module = torch.get_device_module(device)
    side = module.Stream()
    side.wait_stream(module.current_stream())
    graph = module.CUDAGraph()
    with module.stream(side), module.graph(graph, stream=side):
        step()
    module.current_stream().wait_stream(side)
    return graph


@pytest.mark.parametrize("way", WAYS)
@each_row
def test_replays_with_a_changing_learning_rate(device, name, way, monkeypatch):
    monkeypatch.setattr(code8, "LEAST_ELEMENTS", 0)
    outcomes = []
    dtype, options = WAYS[way]
    for replays in (False, True):
        optimizer, params, lr, gradients = prepared(name, device, dtype, **options)
        step = captured(optimizer.step, device).replay if replays else optimizer.step
        for rate, now in zip(RATES, gradients, strict=True):
            lr.fill_(rate)
            set_gradients(params, now)
            step()
        outcomes.append(here(judge.outcome(optimizer, params)))
        if TABLE[name].ours._counts_steps:
            assert {int(optimizer.state[p]["step"]) for p in params} == {1 + len(RATES)}
    assert_same_bits(*outcomes)


def test_a_replay_tells_what_it_has_seen(device):
    optimizer, params, _, gradients = prepared("AdamW", device, stats=True)
    graph = captured(optimizer.step, device)
    for now in gradients:
        before = [p.detach().cpu().double() for p in params]
        set_gradients(params, now)
        graph.replay()
        for told, p, old, g in zip(optimizer.stats().values(), params, before, now, strict=True):
            norms = [x.cpu().double().norm().item() for x in (g, old, p.detach().cpu().double() - old)]
            assert [told.gradient_norm, told.parameter_norm, told.update_norm] == pytest.approx(norms)


@each_row
def test_a_scaled_step_skips_in_the_graph(device, name):
    optimizer, params, _, gradients = prepared(name, device, fused=True)
    optimizer.grad_scale = torch.tensor(64.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    graph = captured(optimizer.step, device)
    set_gradients(params, gradients[0])
    before = [p.detach().clone() for p in params]
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert all(torch.equal(p.detach(), was) for p, was in zip(params, before, strict=True))
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert not torch.equal(params[2].detach(), before[2])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_count_on_the_host_cannot_be_captured(device, name):
    row = TABLE[name]
    param = torch.nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones(3, device=device)
    optimizer = row.make([param])
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"):
        captured(optimizer.step, device)
    torch.get_device_module(device).synchronize()


@each_row
def test_a_parameter_without_a_gradient_cannot_be_captured(device, name):
    optimizer, params, _, _ = prepared(name, device)
    params[2].grad = None
    with pytest.raises(RuntimeError, match="parameter 2 has no gradient"):
        captured(optimizer.step, device)
    torch.get_device_module(device).synchronize()
