"""States in 8 bits, and 16-bit parameters of more than 16 bits or rounded at random: a step on the device has the CPU
engine's numbers, as in test_steps.py, whose tests have all other parameters and states."""

import judge
import pytest
import torch
from steps import SHAPES, TABLE, assert_same_bits, counts_on_device, here, outcome_on

import trainopt
from trainopt._extension import _C
from trainopt.optim import code8

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CODES = {"state_dtype": "8bit"}
WAYS = [
    pytest.param(dtype, options, id=f"{str(dtype).removeprefix('torch.')}-{'-'.join(options.values())}")
    for dtype, options in (
        (F32, CODES),
        (BF16, CODES),
        (F16, CODES),
        (BF16, {"precision": "master"}),
        (BF16, {"precision": "master", "state_dtype": "float32"}),
        (BF16, {"precision": "master", **CODES}),
        (BF16, {"precision": "master24", **CODES}),
        (F16, {"precision": "master", **CODES}),
        (BF16, {"precision": "stochastic"}),
        (F16, {"precision": "stochastic", "state_dtype": "float32"}),
        (BF16, {"precision": "stochastic", **CODES}),
    )
]
TAIL = {"noise": 0.1, "seed": 7, "zero_grad": "in_step", "ema_decay": 0.9, "l1": 0.1}

each_row = pytest.mark.parametrize("name", TABLE)
each_way = pytest.mark.parametrize(("dtype", "way"), WAYS)
pytestmark = pytest.mark.usefixtures("any_size")


@pytest.fixture
def any_size(monkeypatch):
    """Small tensors are stored in 8 bits too."""
    monkeypatch.setattr(code8, "LEAST_ELEMENTS", 0)


def problem(dtype, steps=3, shapes=(*SHAPES, (16384 + 300,))):
    return judge.random_problem(shapes, dtype, steps)


def assert_fused(optimizer):
    assert all(row.path.startswith("fused") for row in trainopt.explain(optimizer))


@pytest.mark.parametrize("tail", [{}, TAIL], ids=["plain", "tail"])
@each_way
@each_row
def test_every_combination_has_the_cpus_bits(device, name, dtype, way, tail):
    row, work = TABLE[name], problem(dtype)
    options = {**row.usual, **way, **tail}
    assert_same_bits(outcome_on(device, row.make, work, **options), judge.result_of(row.make, *work, **options))


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_cautious_decay_has_the_cpus_bits(device, name):
    row, work = TABLE[name], problem(BF16)
    options = {"lr": 0.1, "weight_decay": 0.5, "cautious_weight_decay": True}
    options |= {"precision": "master24", **CODES}
    assert_same_bits(outcome_on(device, row.make, work, **options), judge.result_of(row.make, *work, **options))


@each_way
@each_row
def test_where_the_device_knows_alone(device, name, dtype, way):
    """Step counts and the gradients' norm on the device, whose last bits may decide on a code or a rounding."""
    row, work = TABLE[name], problem(dtype)
    options = {**row.usual, **way, "max_grad_norm": 3.0, "ema_decay": 0.9}
    found = outcome_on(device, row.make, work, **options, **counts_on_device(name))
    truth = judge.result_of(row.make, *work, **options)
    assert found.keys() == truth.keys()
    for key, tensors in truth.items():
        for ours, exact in zip(found[key], tensors, strict=True):
            assert ours.dtype == exact.dtype
            rough = 4 * torch.finfo(dtype).eps
            close = torch.isclose(ours.double(), exact.double(), rtol=rough, atol=rough)
            assert close.double().mean() > 0.98 if close.numel() else True, key


@each_way
@each_row
def test_a_scaled_step_is_made_or_skipped_on_the_device(device, name, dtype, way):
    start, gradients = problem(dtype, 2)
    params = [torch.nn.Parameter(p.to(device)) for p in start]
    optimizer = TABLE[name].make(params, **TABLE[name].usual, **way, **counts_on_device(name))
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    for found_inf in (0.0, 1.0):
        optimizer.found_inf.fill_(found_inf)
        for p, g in zip(params, gradients[0], strict=True):
            p.grad = (2 * g).to(device)
        before = {key: [t.clone() for t in tensors] for key, tensors in judge.outcome(optimizer, params).items()}
        optimizer.step()
        after = judge.outcome(optimizer, params)
        if found_inf:
            assert_same_bits(here(before), here(after))
        else:
            assert not torch.equal(before["param"][3], after["param"][3])
        scale = 1 if found_inf == 0 else 2
        assert all(torch.equal(p.grad.cpu(), scale * g) for p, g in zip(params, gradients[0], strict=True))
    assert_fused(optimizer)


# Random numbers and rows follow the indices, codes and masters the memory: where these differ the step is torch's, as
# on the CPU.
@pytest.mark.parametrize(("dtype", "way"), [p for p in WAYS if p.values[1] != {"precision": "stochastic", **CODES}])
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.factors])
def test_layouts(device, name, dtype, way):
    """And gradients of another order than their parameters', whose blocks follow the memory all the same."""
    row = TABLE[name]
    start, gradients = problem(dtype, shapes=((4, 6, 5, 3), (30, 17), (4, 6, 5, 3)))

    def laid_out(where):
        params = [torch.nn.Parameter(t.to(where, copy=True)) for t in start]
        params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        params[1].data = params[1].data.t().contiguous().t()
        optimizer = row.make(params, **row.usual, **way)
        for now in gradients:
            params[0].grad = now[0].to(where)
            params[1].grad = now[1].to(where)
            params[2].grad = now[2].to(where).contiguous(memory_format=torch.channels_last)
            optimizer.step()
        assert_fused(optimizer)
        return here(judge.outcome(optimizer, params))

    assert_same_bits(laid_out(device), laid_out("cpu"))


@pytest.mark.parametrize("role", ["param", "grad", "state", "beside"])
@each_way
def test_unaligned_tensors(device, dtype, way, role):
    row = TABLE["AdamW"]
    start, gradients = problem(dtype, shapes=((600,), (300,)))

    def shifted(t):
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return room[1:].copy_(t.reshape(-1)).view(t.shape)

    def run(where):
        params = [torch.nn.Parameter(t.to(where)) for t in start]
        if role == "param":
            params = [torch.nn.Parameter(shifted(p.data)) for p in params]
        optimizer = row.make(params, **row.usual, **way)
        for now in gradients:
            for p, g in zip(params, now, strict=True):
                p.grad = shifted(g.to(where)) if role == "grad" else g.to(where)
            optimizer.step()
            for state in (optimizer.state[p] for p in params):
                for key in [key for key in state if key != "step"]:
                    if role == ("beside" if key == "master" or key.endswith("_scale") else "state"):
                        state[key] = shifted(state[key])
        assert_fused(optimizer)
        return here(judge.outcome(optimizer, params))

    assert_same_bits(run(device), run("cpu"))


@each_way
def test_few_tensors_take_one_launch(device, dtype, way):
    if device != "simt":
        pytest.skip("the emulated device counts launches")
    start, gradients = problem(dtype, 2, ((3,), (20000,), (17,)))
    params = [torch.nn.Parameter(t.to(device)) for t in start]
    optimizer = trainopt.AdamW(params, **way)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(device)
        _C.simt.take_launches()
        optimizer.step()
        assert _C.simt.take_launches() == [4]  # chunks of 16,384 elements


def test_a_precision_that_changes_midway(device):
    """Rounding at random is for other kernels: those of the last step are not taken again."""
    start, gradients = problem(BF16, 4)
    results = []
    for where in ("cpu", device):
        params = [torch.nn.Parameter(p.to(where, copy=True)) for p in start]
        optimizer = trainopt.AdamW(params, lr=1e-2, seed=3)
        for precision, now in zip(("native", "stochastic", "stochastic", "native"), gradients, strict=True):
            optimizer.param_groups[0]["precision"] = precision
            for p, g in zip(params, now, strict=True):
                p.grad = g.to(where)
            optimizer.step()
        results.append(here(judge.outcome(optimizer, params)))
    assert_same_bits(*results)
