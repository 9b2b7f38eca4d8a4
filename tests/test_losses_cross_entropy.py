"""cross_entropy over the whole grid of its options, dtypes and shapes, on each device, judged against float64."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_judge import (
    DTYPES,
    REDUCTIONS,
    assert_no_worse,
    classes,
    exact_cross_entropy,
    judge,
    large_logits,
    on,
    random,
    run,
)
from torch.nn import functional as F

from trainopt import functional
from trainopt.losses import reference
from trainopt.losses.options import CrossEntropyOptions

CLASSES = 7
SHAPES = {"1-D": (), "2-D": (5,), "3-D": (3, 4), "4-D": (2, 3, 2)}  # of the rows

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "one element on": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every second class": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "reversed dimensions": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
}


def problem(rows, kind="classes", count=CLASSES, ignored=None, seed=0):
    """Float64 logits, and a target of the kind: classes, of which `ignored` stands in some places, or probabilities."""
    shape = (count,) if rows == () else (rows[0], count, *rows[1:])
    logits = random(*shape, seed=seed, scale=3)
    if kind == "probabilities":
        return logits, random(*shape, seed=seed + 1).softmax(0 if rows == () else 1)
    target = classes(rows, count, seed)
    if ignored is not None and target.dim() > 0:
        target.view(-1)[::3] = ignored
    return logits, target


def weight_of(logits, weighted):
    return random(logits.shape[0 if logits.dim() == 1 else 1], seed=5).abs() + 0.1 if weighted else None


def compare(device, logits, target, dtype, weighted=False, ours=functional.cross_entropy, gradient_unit=0.0, **options):
    is_one_class = logits.shape[0 if logits.dim() == 1 else 1] == 1  # 0 is what is left of 1 - 1
    judge(
        on(device, ours),
        F.cross_entropy,
        [logits],
        dtype,
        options,
        constants=[target, weight_of(logits, weighted)],
        # A small loss is what is left of two numbers of the logits' size; the truth in float64 is no nearer than that.
        loss_unit=1.0 if dtype == torch.float64 else 0.0,
        gradient_unit=max(gradient_unit, float(is_one_class)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
def test_the_grid(device, dtype, reduction, rows):
    for kind, ignore_index, weighted, smoothing in itertools.product(
        ("classes", "probabilities"), (-100, 2, 1000), (False, True), (0.0, 0.1, 1.0)
    ):
        if kind == "probabilities" and ignore_index != -100:
            continue  # torch refuses it
        logits, target = problem(rows, kind, ignored=ignore_index)
        compare(
            device,
            logits,
            target,
            dtype,
            weighted,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
        )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(device, layout, kind, dtype):
    logits, target = problem((4, 3, 5), kind, ignored=1)
    logits = layout(logits)
    if kind == "probabilities":
        target = layout(target)
    for reduction in REDUCTIONS:
        compare(device, logits, target, dtype, True, reduction=reduction, label_smoothing=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "count", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 257, 1000, 1025, 4099]
)
def test_numbers_of_classes(device, dtype, count):
    for kind, smoothing in (("classes", 0.0), ("classes", 0.1), ("probabilities", 0.0)):
        logits, target = problem((3,), kind, count=count)
        compare(device, logits, target, dtype, label_smoothing=smoothing)


@pytest.mark.parametrize("count", [1, 2, 3, 15, 17, 64, 127, 129, 257, 1030])
def test_numbers_of_rows(device, count):
    for columns in (3, 10, 40):
        logits, target = problem((count,), "classes", count=columns, ignored=1)
        for reduction in REDUCTIONS:
            compare(device, logits, target, torch.float32, True, reduction=reduction, ignore_index=1)


@pytest.mark.parametrize("count", [50_257, 1_000_000])
def test_vocabularies(device, count):
    logits = random(2, count)
    for target in (classes((2,), count), random(2, count, seed=1).softmax(1)):
        compare(device, logits, target, torch.float32)
        compare(device, logits, target, torch.bfloat16, label_smoothing=0.1)


@pytest.mark.parametrize("variant_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_is_right(variant, variant_dtype):
    for count in (5, 300):
        logits, target = problem((9,), "classes", count=count, ignored=3)
        compare("cpu", logits, target, variant_dtype, True, ignore_index=3, label_smoothing=0.1)


def largest_mass(logits, target, weighted, reduction, label_smoothing, ignore_index):
    """The gradient is A·p - a: it may be small where the masses a are not, which are rounded first."""
    class_dim = 0 if logits.dim() == 1 else 1
    if not target.is_floating_point():
        labels = target[target != ignore_index]
        masses = weight_of(logits, weighted)[labels] if weighted else torch.ones(labels.numel())
        total = masses.sum() if reduction == "mean" else 1
        return (masses.max() / total).item() if labels.numel() else 0.0
    if target.numel() == 0:
        return 0.0
    mass = target * (1 - label_smoothing) + label_smoothing / logits.shape[class_dim]
    if weighted:
        mass = mass.movedim(class_dim, -1) * weight_of(logits, weighted)
    rows = mass.numel() / logits.shape[class_dim]
    return mass.max().item() / (rows if reduction == "mean" else 1)


@given(
    rows=st.lists(st.integers(0, 5), max_size=3),
    count=st.integers(1, 40),
    kind=st.sampled_from(["classes", "probabilities"]),
    reduction=st.sampled_from(REDUCTIONS),
    ignore_index=st.integers(-101, 40),
    smoothing=st.floats(0, 1),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_any_options(device, rows, count, kind, reduction, ignore_index, smoothing, weighted, dtype, seed):
    if kind == "probabilities":
        ignore_index = -100
    logits, target = problem(tuple(rows), kind, count, ignored=ignore_index, seed=seed)
    compare(
        device,
        logits,
        target,
        dtype,
        weighted,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        gradient_unit=largest_mass(logits, target, weighted, reduction, smoothing, ignore_index),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_dtypes_of_classes(device, dtype):
    logits, target = problem((5,), "classes")
    compare(device, logits, target.to(dtype), torch.float32)


# Beyond torch ---------------------------------------------------------------------------------------------------------

EXTRAS = {
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 2.0},
    "both": {"z_loss": 0.1, "softcap": 2.0},
    "zero": {"empty": "zero"},
    "all": {"z_loss": 0.1, "softcap": 2.0, "empty": "zero", "label_smoothing": 0.1},
    "temperature": {"temperature": 0.25},
    "temperature and z_loss": {"temperature": 3.0, "z_loss": 0.1},
    "temperature and softcap": {"temperature": 3.0, "softcap": 2.0},
    "temperature and all": {"temperature": 0.7, "z_loss": 0.1, "softcap": 2.0, "empty": "zero", "label_smoothing": 0.1},
}


def by_formula(logits, target, weight, **options):
    """The same in plain torch."""
    settings = CrossEntropyOptions(**options)
    result = reference.cross_entropy(logits, target, weight, settings)
    return result[0] if settings.z_loss else result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_extras(device, dtype, extras, kind):
    # With both, the cap is cap / T, rounded, and its derivative is taken of the rounded logits; torch keeps the tanh.
    # And CUDA's exp, of which its tanh is made, is a little further off than the CPU's.
    both = {"softcap", "temperature"} <= extras.keys()
    roundings = 8.0 if both else 6.0 if "softcap" in extras and device != "cpu" else 2.0
    shapes = (((), CLASSES), ((6,), CLASSES), ((5,), 40), ((3, 4), CLASSES))
    for (rows, count), reduction, weighted in itertools.product(shapes, REDUCTIONS, (False, True)):
        logits, target = problem(rows, kind, count, ignored=2)
        weight = random(count, seed=5).abs() if weighted else None
        ignore_index = 2 if kind == "classes" else -100
        judge(
            on(device, functional.cross_entropy),
            by_formula,
            [logits],
            dtype,
            {"reduction": reduction, "ignore_index": ignore_index, **extras},
            constants=[target, weight],
            roundings=roundings,
            gradient_unit=0.0 if kind == "classes" else largest_mass(logits, target, weighted, reduction, 0.0, -100),
        )


BY_SOFTCAP = {
    "rows": lambda x, t, **options: functional.cross_entropy(x, t, **options),
    "columns": lambda x, t, **options: functional.cross_entropy(x.t().contiguous().t(), t, **options),
    "a linear layer": lambda x, t, **options: functional.linear_cross_entropy(
        torch.eye(len(x), dtype=x.dtype, device=x.device), x.t(), t, **options
    ),
    "the reference": lambda x, t, **options: by_formula(x, t, None, **options),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("by", "create_graph"),
    [*((by, False) for by in BY_SOFTCAP), ("rows", True)],
    ids=[*BY_SOFTCAP, "differentiable twice"],
)
def test_soft_caps_beyond_all_numbers(device, dtype, by, create_graph):
    """A huge cap caps nothing; a tiny one makes every logit 0, and lets through the gradient of what is 0 already."""

    def gradient(loss, **options):
        x = logits.clone().requires_grad_()
        value = on(device, loss)(x, target, reduction="none", **options)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
        return value.detach(), slope.detach()

    for count in (5, 100, 1500):
        logits, target = random(3, count, scale=3).to(dtype), classes((3,), count)
        logits[:, 2] = 0
        for huge in (1e30, 3e38, 1e39, 1e300, 1.7e308):
            plain = run(lambda x, t=target: F.cross_entropy(x, t, reduction="sum"), [logits.double()])[1]
            loss, slope = gradient(BY_SOFTCAP[by], softcap=huge)
            torch.testing.assert_close(loss, F.cross_entropy(logits.double(), target, reduction="none").to(dtype))
            torch.testing.assert_close(slope, plain.to(dtype))
        flat = torch.zeros_like(logits)
        for tiny in (1e-30, 1e-39, 1e-45, 1e-46, 1e-300, 1e-310, 5e-324):
            loss, slope = gradient(BY_SOFTCAP[by], softcap=tiny)
            torch.testing.assert_close(loss, F.cross_entropy(flat.double(), target, reduction="none").to(dtype))
            (expected,) = run(lambda x, t=target: F.cross_entropy(x, t, reduction="sum"), [flat.double()])[1:]
            torch.testing.assert_close(slope[:, 2], expected[:, 2].to(dtype))
            assert slope[:, [0, 1, 3, 4]].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_soft_cap_keeps_the_digits_of_small_logits(device, dtype):
    """x / cap is subnormal there."""
    logits, cap = random(4, 6) * 1e-4, torch.finfo(dtype).max / 4
    ours, target = on(device, functional.cross_entropy), classes((4,), 6)
    found = run(lambda x: ours(x, target, softcap=cap), [logits.to(dtype)])
    plain = run(lambda x: ours(x, target), [logits.to(dtype)])
    assert all(map(torch.equal, found, plain))


def test_the_formula_is_what_the_page_says():
    logits, target = problem((6,), "classes", ignored=-100)
    capped = 5 * (logits / 5).tanh() / 0.8
    lse = torch.log(capped.exp().sum(1))
    counted = target != -100
    each = (lse - capped.gather(1, target.clamp(min=0)[:, None])[:, 0] + 0.01 * lse**2) * counted
    for reduce, reduction in ((lambda x: x, "none"), (torch.sum, "sum"), (lambda x: x.sum() / counted.sum(), "mean")):
        for function in (functional.cross_entropy, by_formula):
            options = {} if function is functional.cross_entropy else {"weight": None}
            found = function(logits, target, z_loss=0.01, softcap=5.0, temperature=0.8, reduction=reduction, **options)
            torch.testing.assert_close(found, reduce(each))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_z_loss_comes_separately(device, reduction):
    logits, target = problem((6,), "classes", ignored=-100)
    x, ours = logits.clone().requires_grad_(), on(device, functional.cross_entropy)
    loss, z = ours(x, target, z_loss=0.5, return_z_loss=True, reduction=reduction)
    assert not z.requires_grad and z.dtype == loss.dtype and z.shape == loss.shape
    torch.testing.assert_close(loss - z, F.cross_entropy(logits, target, reduction=reduction))
    alone = ours(x, target, z_loss=0.5, reduction=reduction)
    assert torch.equal(alone, loss)
    loss, z = ours(x, target, return_z_loss=True, reduction=reduction)
    assert torch.equal(z, torch.zeros_like(loss)) and not z.requires_grad
    assert torch.equal(loss, ours(x, target, reduction=reduction))


def test_extras_that_are_off_change_nothing(device):
    logits, target = problem((6,), "classes", ignored=-100)
    logits, ours = logits.float(), on(device, functional.cross_entropy)
    off = {"z_loss": 0.0, "softcap": None, "empty": "nan", "inplace_backward": False, "temperature": 1.0}
    plain = run(lambda x: ours(x, target), [logits])
    assert all(map(torch.equal, plain, run(lambda x: ours(x, target, **off), [logits])))
    unempty = run(lambda x: ours(x, target, empty="zero"), [logits])
    assert all(map(torch.equal, plain, unempty))


# Nothing to count -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 3.0}, {"temperature": 2.0}], ids=str
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [(4,), (2, 3), (0,)], ids=str)
def test_all_ignored(device, options, reduction, rows):
    logits, ours = random(rows[0], CLASSES, *rows[1:]).float(), on(device, functional.cross_entropy)
    target = torch.full(rows, -100)
    loss, gradient = run(lambda x: ours(x, target, reduction=reduction, **options), [logits])
    assert torch.equal(gradient, torch.zeros_like(logits))
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert torch.equal(loss, torch.zeros_like(loss))
    zero, gradient = run(lambda x: ours(x, target, reduction=reduction, empty="zero", **options), [logits])
    assert torch.equal(zero, torch.zeros_like(loss)) and torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0), (0, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_empty_batches(device, shape, reduction, kind):
    logits = random(*shape)
    target = logits.clone() if kind == "probabilities" else torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    compare(device, logits, target, torch.float32, reduction=reduction)
    zero = on(device, functional.cross_entropy)(logits, target, reduction=reduction, empty="zero")
    assert torch.equal(zero, torch.zeros_like(zero))


# Extremes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(device, dtype):
    logits = random(6, 9).sign() * 1e4
    compare(device, logits, classes((6,), 9), dtype, reduction="none")
    compare(device, logits, classes((6,), 9), dtype, reduction="mean", label_smoothing=0.1)


BY_LAYOUT = {
    "rows": functional.cross_entropy,
    "columns": lambda x, t, **options: functional.cross_entropy(x.t().contiguous().t(), t, **options),
    "a linear layer": lambda x, t, **options: functional.linear_cross_entropy(
        torch.eye(len(x), dtype=x.dtype, device=x.device), x.t(), t, **options
    ),
}


@pytest.mark.parametrize("by_layout", BY_LAYOUT.values(), ids=BY_LAYOUT)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e17, -1e17])
@pytest.mark.parametrize("count", [5, 100, 1500])
def test_large_logits_lose_no_digits(device, count, size, by_layout):
    """One double of peak + log_sum loses log_sum: the loss of 1,000 ties at 1e17 was 0, and is log(1000)."""
    logits, target = large_logits(count, size), classes((3,), count)
    ours = on(device, by_layout)
    found = run(lambda x: ours(x, target, reduction="sum"), [logits])[1:]
    found = [ours(logits, target, reduction="none"), *found]
    for mine, exact in zip(found, exact_cross_entropy(logits, target), strict=True):
        torch.testing.assert_close(mine, exact, rtol=2e-15, atol=2e-15)
    for dtype in (torch.float32, torch.bfloat16):
        compare(device, logits, target, dtype, reduction="none", ours=lambda x, t, w, **given: by_layout(x, t, **given))


@pytest.mark.parametrize("size", [1e3, 1e6, 1e17])
def test_large_logits_with_other_options(device, size):
    logits = large_logits(40, size)
    for target in (classes((3,), 40), random(3, 40, seed=1).softmax(1)):
        compare(device, logits, target, torch.float64, True, label_smoothing=0.1)


BY_TORCH = {
    "the reference": lambda x, t, **options: by_formula(x, t, None, **options),
    "differentiable twice": lambda x, t, **options: functional.cross_entropy(x, t, **options),
}


@pytest.mark.parametrize("by", [*BY_LAYOUT, *BY_TORCH])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e17])
def test_large_logits_with_z_loss(device, size, by):
    """torch.logsumexp keeps peak and log_sum in one number too."""
    logits, target = large_logits(40, size), classes((3,), 40)
    loss = on(device, partial({**BY_LAYOUT, **BY_TORCH}[by], z_loss=0.1))
    x = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, target, reduction="sum"), x, create_graph=by == "differentiable twice")
    found = [loss(logits, target, reduction="none"), gradient.detach()]
    for mine, exact in zip(found, exact_cross_entropy(logits, target, 0.1), strict=True):
        torch.testing.assert_close(mine, exact, rtol=4e-15, atol=2e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_vocabulary(device, dtype):
    logits = random(6, 40)
    logits[:, 25:] = -torch.inf
    for reduction in REDUCTIONS:
        compare(device, logits, classes((6,), 25), dtype, reduction=reduction)
        compare(device, logits, torch.arange(20, 26), dtype, reduction=reduction)  # one row's own class is masked
        compare(device, logits, classes((6,), 25), dtype, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [3, 40])
def test_values_that_are_no_numbers_stay_in_their_row(device, value, columns):
    logits = random(4, columns)
    logits[1, 2] = value
    for target in (classes((4,), columns), torch.tensor([0, 2, 1, 2])):
        compare(device, logits, target, torch.float32, reduction="none")
    ours = on(device, functional.cross_entropy)
    loss, gradient = run(lambda x: ours(x, torch.tensor([0, 1, 1, 2]), reduction="none"), [logits.float()])
    assert loss[[0, 2, 3]].isfinite().all() and gradient[[0, 2, 3]].isfinite().all()


def test_a_row_that_is_all_minus_infinity(device):
    logits = random(3, 5)
    logits[1] = -torch.inf
    compare(device, logits, classes((3,), 5), torch.float32, reduction="none")


def test_ignored_rows_may_hold_anything(device):
    logits, ours = random(4, 9).float(), on(device, functional.cross_entropy)
    target = torch.tensor([1, -100, 3, -100])
    clean = run(lambda x: ours(x, target), [logits])
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = logits.clone()
        spoilt[1] = value
        loss, gradient = run(lambda x: ours(x, target), [spoilt])
        assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(4, 5), (4, 100), (3, 3000), (4, 100, 3)], ids=str)
def test_the_weight_of_a_class_that_no_row_has_may_be_anything(device, shape, value):
    logits, ours = random(*shape).float(), on(device, functional.cross_entropy)
    target, weight = classes((shape[0], *shape[2:]), 4), torch.linspace(0.5, 2, shape[1])
    clean = run(lambda x: ours(x, target, weight), [logits])
    weight[4] = value
    loss, gradient = run(lambda x: ours(x, target, weight), [logits])
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(4, 5), (4, 100), (3, 3000), (4, 100, 3)], ids=str)
def test_an_upstream_gradient_that_is_not_finite_is_torchs(device, shape, value):
    logits, target = random(*shape), classes((shape[0], *shape[2:]), 4)
    gradients = []
    for function, dtype in ((F.cross_entropy, torch.float64), (on(device, functional.cross_entropy), torch.float32)):
        _, gradient = run(lambda x, f=function: f(x, target) * value, [logits.to(dtype)])
        gradients.append(gradient.double())
    torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_logits_and_gradients(device, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    compare(device, random(4, 9) * tiny / 16, classes((4,), 9), dtype)
    far = torch.zeros(2, 4, dtype=torch.float64)
    far[:, 1] = -95.0 if dtype == torch.float32 else -740.0  # softmax is subnormal there
    compare(device, far, torch.zeros(2, dtype=torch.int64), dtype, reduction="none")


def test_tiny_gradients_are_exact_in_each_element():
    """On the CPU: CUDA's exp is off by a rounding of its argument, which is more the smaller its result is."""
    logits = torch.linspace(-60, 0, 50, dtype=torch.float64).repeat(2, 1)
    target = torch.tensor([49, 0])
    truth = run(lambda x: F.cross_entropy(x, target, reduction="sum"), [logits])[1]
    ours = run(lambda x: functional.cross_entropy(x, target, reduction="sum"), [logits.float()])[1]
    torchs = run(lambda x: F.cross_entropy(x, target, reduction="sum"), [logits.float()])[1]
    for column in range(50):
        assert_no_worse(ours[:, column], torchs[:, column], truth[:, column], f"class {column}", roundings=32)


def test_probabilities_are_not_checked_to_be_a_distribution(device):
    compare(device, random(4, 6), random(4, 6, seed=9), torch.float32)
    compare(device, random(4, 6), torch.zeros(4, 6, dtype=torch.float64), torch.float32, label_smoothing=0.5)


def test_a_loss_that_needs_a_wide_sum(device):
    logits = torch.zeros(200_000, 2)
    target = torch.zeros(200_000, dtype=torch.int64)
    truth = torch.log(torch.tensor(2.0, dtype=torch.float64))
    mean = on(device, functional.cross_entropy)(logits, target)
    assert abs(mean.double() - truth) <= 2**-24
    total = on(device, functional.cross_entropy)(logits, target, reduction="sum")
    assert abs(total.double() / 200_000 - truth) <= 2**-24
