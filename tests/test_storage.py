"""Whatever way parameters and states are stored in: the same bits everywhere, after a resume, and by either path."""

import pytest
import torch
from judge import TABLE, assert_resumes, assert_same_bits_everywhere, on_both_paths, outcome, random_problem

import trainopt
from trainopt.optim import code8, precision

SHAPES = ((), (7,), (0, 3), (33, 20), (256,), (257,), (1030,))
TAIL = {"max_grad_norm": 3.0, "zero_grad": "in_step", "ema_decay": 0.9}
STATES = ("float32", "bfloat16", "float16", "8bit")
PRECISIONS = {
    torch.float32: ("native",),
    torch.bfloat16: ("native", "master", "master24", "stochastic"),
    torch.float16: ("native", "master", "stochastic"),
}
WAYS = [
    (dtype, {"precision": stored, "state_dtype": states})
    for dtype, precisions in PRECISIONS.items()
    for stored in precisions
    for states in (STATES if stored == "native" else (None, "float32", "8bit"))
]

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, (way[0], *way[1].values()))))
each_optimizer = pytest.mark.parametrize("name", TABLE)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Small tensors are stored in 8 bits too."""
    monkeypatch.setattr(code8, "LEAST_ELEMENTS", 0)


@pytest.mark.parametrize("way", [*WAYS, (torch.float64, {})], ids=str)
@each_optimizer
def test_the_same_bits_for_any_number_of_threads_and_every_variant(name, way):
    row, (dtype, storage) = TABLE[name], way
    start, gradients = random_problem((*SHAPES, (40_001,)), dtype, 2)
    for tail in ({}, TAIL):
        assert_same_bits_everywhere(row, start, gradients, **row.usual, **storage, **tail, seed=5)


@each_way
@each_optimizer
def test_saved_loaded_and_resumed_bit_for_bit(name, way):
    row, (dtype, storage) = TABLE[name], way
    start, gradients = random_problem(SHAPES, dtype, 4)
    saved = assert_resumes(row, start, gradients, {**row.usual, **storage, "seed": 3})
    if row.ours._torch_class is not None and storage["precision"] == "native" and storage["state_dtype"] != "8bit":
        stock = row.ours._torch_class([torch.nn.Parameter(p.clone()) for p in start])  # and the way back
        stock.load_state_dict(saved)
        for p in stock.param_groups[0]["params"]:
            assert {v.dtype for key, v in stock.state[p].items() if key != "step"} == {dtype}


@each_way
@each_optimizer
def test_the_engine_and_torchs_path_are_at_one(name, way):
    row, (dtype, storage) = TABLE[name], way
    start, gradients = random_problem(SHAPES, dtype, 3)
    results = []
    for optimizer, params in on_both_paths(row, start, gradients, **row.usual, **storage, **TAIL):
        assert all(not p.grad.any() for p in params)
        assert {each.path.split(" ")[0] for each in trainopt.explain(optimizer)} == {"fused"}
        kept = [{key: (t.dtype, t.shape) for key, t in optimizer.state[p].items()} for p in params]
        values = [precision.value_of(p, optimizer.state[p]) for p in params]
        trainopt.convert_state(optimizer, "float32", precision="native")
        results.append((kept, {**outcome(optimizer, params), "param": values}))
    (kept, ours), (expected, plain) = results
    assert kept == expected and ours.keys() == plain.keys()
    for key, tensors in ours.items():
        for found, truth in zip(tensors, plain[key], strict=True):
            off = (found - truth).abs() > 1e-6 + 1e-5 * truth.abs()
            assert off.float().mean() < 0.02 if off.numel() else True, key  # a rounding may fall either way
