"""Any combination of what surrounds a step, against the same as separate passes in float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import TABLE, outcome, random_values
from test_tail import SeparatePasses

from trainopt._extension import _C

SHAPES = ((), (1,), (7,), (0, 3), (5, 4), (300,))
#: Each alone is judged elsewhere; here they meet. What only a device or torch's path does with them is not asked.
TAIL = {
    "max_grad_norm": st.sampled_from([0.01, 3.0, 1e9]),
    "ema_decay": st.sampled_from([0.0, 0.5, 0.99]),
    "ema_warmup": st.booleans(),
    "zero_grad": st.just("in_step"),
    "skip_nonfinite": st.just(True),
    "noise": st.sampled_from([0.01, 1.0]),
}


@st.composite
def combinations(draw):
    name = draw(st.sampled_from(sorted(TABLE)))
    row = TABLE[name]
    drawn = draw(st.sampled_from([row.usual, row.everything, *row.settings.values(), *row.extras.values()]))
    # A learning rate that is a float32 tensor makes torch, and so the engine, round what follows from it to float32.
    options = {key: value for key, value in drawn.items() if key not in ("foreach", "fused", "noise")}
    options = {key: value for key, value in options.items() if not isinstance(value, torch.Tensor)}
    tail = draw(st.fixed_dictionaries({}, optional=TAIL))
    if "ema_decay" not in tail:
        tail.pop("ema_warmup", None)
    scale = draw(st.sampled_from([None, 0.25, 1024.0]))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    can_overflow = scale is not None or "skip_nonfinite" in tail
    overflows = draw(st.sets(st.integers(0, 3), max_size=2)) if can_overflow else set()
    return row, options, tail, scale, shapes, overflows, draw(st.integers(0, 99))


def gaussian(shape, seed, step, index):
    noise = torch.empty(shape)
    _C.gaussian_(noise, seed, step, index)
    return noise.double()


@settings(max_examples=200, deadline=None)
@given(combinations())
def test_any_combination_is_its_separate_passes(combination):
    row, options, tail, scale, shapes, overflows, seed = combination
    generator = torch.Generator().manual_seed(seed)
    start = [random_values(shape, torch.float64, generator) for shape in shapes]
    params, plain = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizer = row.make(params, **options, **tail, seed=seed)
    separate = {key: value for key, value in tail.items() if key not in ("skip_nonfinite", "noise")}
    judge = SeparatePasses(row.make_formula(plain, **options), plain, **separate)
    if "noise" in tail:
        judge.noise = lambda step: [tail["noise"] * gaussian(p.shape, seed, step, i) for i, p in enumerate(plain)]
    for step in range(4):
        overflow = step in overflows and any(p.numel() for p in params)
        for p, q in zip(params, plain, strict=True):
            gradient = random_values(p.shape, torch.float64, generator)
            if "zero_grad" in tail and p.grad is not None:
                assert not p.grad.any()
            p.grad, q.grad = gradient * (scale or 1.0), gradient
        if overflow:
            next(p for p in params if p.numel()).grad.view(-1)[0] = math.inf
        before = [p.detach().clone() for p in params]
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(overflow))
        optimizer.step()
        assert optimizer.last_step_skipped == overflow
        if overflow:
            assert all(map(torch.equal, before, params))
        else:
            judge.step()
            if "max_grad_norm" in tail:
                torch.testing.assert_close(optimizer.grad_norm, judge.norm, rtol=1e-12, atol=0)
    found, truth = outcome(optimizer, params), outcome(judge, plain)
    for name, tensors in truth.items():
        torch.testing.assert_close(found[name], tensors, rtol=1e-8, atol=1e-10)
