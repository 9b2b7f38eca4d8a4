"""The same bits for any number of threads, any run and any SIMD variant."""

from functools import partial

import pytest
import torch
from judge import everywhere
from loss_judge import REDUCTIONS, classes, random, run

from trainopt import functional


def cross_entropy(count, rows, kind="classes", layout=lambda x: x, weighted=True, **options):
    def make(dtype):
        if kind == "classes":
            target = classes((rows,), count)
            target[::5] = -100
        else:
            target = random(rows, count, seed=1).softmax(1).to(dtype)
        given = {"weight": random(count, seed=2).abs().to(dtype)} if weighted else {}
        return partial(functional.cross_entropy, target=target, **given, **options), [
            layout(random(rows, count, scale=3)).to(dtype)
        ]

    return make


def pointwise(name, size, weighted=False, **options):
    def make(dtype):
        given = {"weight": random(size, seed=2).abs().to(dtype)} if weighted else {}
        operands = [random(size, seed=seed).sigmoid().to(dtype) for seed in (0, 1)]
        return partial(getattr(functional, name), **options, **given), operands

    return make


def linear():
    hidden, weight, bias = random(130, 24), random(301, 24, seed=1), random(301, seed=2)
    target = classes((130,), 301)

    def make(dtype):
        def loss(h, w, b, **given):
            return functional.linear_cross_entropy(h, w, target, linear_bias=b, memory_budget=40 * 301 * 4, **given)

        return loss, [hidden.to(dtype), weight.to(dtype), bias.to(dtype)]

    return make


SIZE = 5 * 16_384 + 77  # several chunks, and no whole number of vectors
CASES = {
    "cross_entropy of many rows": cross_entropy(10, 9001),
    "cross_entropy of long rows": cross_entropy(5003, 37, label_smoothing=0.1),
    "cross_entropy of long rows without weights": cross_entropy(5003, 37, weighted=False),
    "cross_entropy of smoothed rows without weights": cross_entropy(5003, 37, weighted=False, label_smoothing=0.1),
    "cross_entropy of few very long rows": cross_entropy(100_003, 2),
    "cross_entropy of probabilities": cross_entropy(1001, 99, kind="probabilities"),
    "cross_entropy with extras": cross_entropy(333, 300, z_loss=0.1, softcap=5.0),
    "cross_entropy with a temperature": cross_entropy(333, 300, temperature=0.6, z_loss=0.1),
    "cross_entropy with all extras": cross_entropy(333, 300, temperature=2.0, z_loss=0.1, softcap=5.0),
    "cross_entropy class by class": cross_entropy(40, 3001, layout=lambda x: x.t().contiguous().t()),
    "mse": pointwise("mse_loss", SIZE),
    "l1": pointwise("l1_loss", SIZE),
    "smooth_l1": pointwise("smooth_l1_loss", SIZE, beta=0.3),
    "huber": pointwise("huber_loss", SIZE, delta=0.3),
    "bce": pointwise("binary_cross_entropy", SIZE, weighted=True),
    "bce with logits": pointwise("binary_cross_entropy_with_logits", SIZE, weighted=True),
    "kl": pointwise("kl_div", SIZE),
}
each_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


def bits(loss, operands, reduction):
    return [result.reshape(-1).view(torch.uint8) for result in run(partial(loss, reduction=reduction), operands)]


def assert_same_bits_everywhere(made, reductions=REDUCTIONS):
    for reduction in reductions:
        first, *others = (bits(*made, reduction) for _ in everywhere())
        for other in others:
            assert all(map(torch.equal, other, first))


@each_case
@each_dtype
def test_threads_and_variants(make, dtype):
    assert_same_bits_everywhere(make(dtype))


@each_dtype
@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_what_is_written_past_the_caches(name, dtype):
    """From kStreamFrom of csrc/cpu/losses.h on."""
    rows = (16 << 20) // (120_011 * dtype.itemsize) + 1
    make = pointwise(name, rows * 120_011) if name == "mse_loss" else cross_entropy(120_011, rows, weighted=False)
    assert_same_bits_everywhere(make(dtype), ("none" if name == "mse_loss" else "mean",))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_from_run_to_run(reduction):
    """The matrix products are torch's; what it promises for its number of threads, it promises here."""
    first, second = (bits(*linear()(torch.float32), reduction) for _ in range(2))
    assert all(map(torch.equal, first, second))


@each_dtype
@pytest.mark.parametrize("by_class", [False, True], ids=["row by row", "class by class"])
def test_a_rows_result_does_not_depend_on_where_it_lies(dtype, by_class):
    """Parts of a batch, and other offsets, give every row the very bits of the whole batch."""

    def lay(x):
        return x.t().contiguous().t() if by_class else x

    for count in (10, 37, 1001):
        x, target = lay(random(23, count, scale=3).to(dtype)), classes((23,), count)
        loss, gradient = run(partial(functional.cross_entropy, target=target, reduction="sum"), [x])
        each, _ = run(partial(functional.cross_entropy, target=target, reduction="none"), [x])
        for first in (0, 1, 6):
            part = slice(first, first + 17)
            part_loss = partial(functional.cross_entropy, target=target[part])
            assert torch.equal(part_loss(x[part], reduction="none"), each[part])
            assert torch.equal(run(partial(part_loss, reduction="sum"), [x[part]])[1], gradient[part])
        shifted = torch.cat([x.new_zeros(1), x.t().reshape(-1) if by_class else x.reshape(-1)])[1:]
        shifted = shifted.view(count, 23).t() if by_class else shifted.view(23, count)
        again = run(partial(functional.cross_entropy, target=target, reduction="sum"), [shifted])
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)


@each_dtype
def test_an_elements_result_does_not_depend_on_where_it_lies(dtype):
    x, t = random(301).sigmoid().to(dtype), random(301, seed=1).sigmoid().to(dtype)
    names = ("mse_loss", "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div")
    for name in names:
        loss = partial(getattr(functional, name), reduction="none")
        ones = torch.ones(301)
        whole = run(loss, [x, t], ones)
        for i in (0, 7, 255, 300):
            piece = run(loss, [x[i : i + 1], t[i : i + 1]], ones[:1])
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(piece, whole, strict=True)), name
