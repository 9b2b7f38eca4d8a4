"""The losses of single elements, over their options, dtypes and shapes, judged against float64."""

import inspect
import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_judge import DTYPES, REDUCTIONS, assert_no_worse, judge, on, random, run
from torch.nn import functional as F

from trainopt import functional


def errors(shape, seed=0):
    """An input and a target, equal in some places and far apart in others."""
    input, target = random(*shape, seed=seed, scale=2), random(*shape, seed=seed + 1)
    return input, torch.where(random(*shape, seed=seed + 2) > 1, input, target)


def probabilities(shape, seed=0):
    """None so near to 0 or 1 that rounding makes it that; test_certain_probabilities has those."""
    return random(*shape, seed=seed, scale=3).sigmoid().clamp(0.01, 0.99), random(*shape, seed=seed + 1).sigmoid()


def logits(shape, seed=0):
    return random(*shape, seed=seed, scale=3), random(*shape, seed=seed + 1).sigmoid()


def log_probabilities(shape, seed=0):
    target = random(*shape, seed=seed + 1).sigmoid()
    return random(*shape, seed=seed).sigmoid().log(), torch.where(random(*shape, seed=seed + 2) > 1, 0, target)


def two_log_probabilities(shape, seed=0):
    return tuple(value.clamp(min=0.01).log() for value in probabilities(shape, seed))


#: Function, what makes its operands, its options.
LOSSES = {
    "mse": ("mse_loss", errors, {}),
    "l1": ("l1_loss", errors, {}),
    "smooth_l1": ("smooth_l1_loss", errors, {}),
    "smooth_l1, beta 0.3": ("smooth_l1_loss", errors, {"beta": 0.3}),
    "smooth_l1, beta 0": ("smooth_l1_loss", errors, {"beta": 0.0}),
    "huber": ("huber_loss", errors, {}),
    "huber, delta 0.3": ("huber_loss", errors, {"delta": 0.3}),
    "bce": ("binary_cross_entropy", probabilities, {}),
    "bce with logits": ("binary_cross_entropy_with_logits", logits, {}),
    "kl": ("kl_div", log_probabilities, {}),
    "kl of logs": ("kl_div", two_log_probabilities, {"log_target": True}),
}
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 257, 1023)
LARGE_SIZES = (16_383, 16_384, 16_385, 70_001)

each_loss = pytest.mark.parametrize(("function", "make", "options"), LOSSES.values(), ids=LOSSES)
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
}


def compare(device, function, operands, dtype, constants=(), gradient_unit=0.0, **options):
    def ours(*operands, **given):
        loss = getattr(functional, function)(*operands, **given)
        is_torchs = "weight" in given and not function.startswith("binary")
        if given.get("reduction") != "batchmean":  # which is divided afterwards
            assert ("Pointwise" in loss.grad_fn.name()) is not is_torchs
        return loss

    judge(
        on(device, ours),
        getattr(F, function),
        operands,
        dtype,
        options,
        constants,
        loss_unit=1.0 if function == "kl_div" else 0.0,  # its terms have both signs
        gradient_unit=gradient_unit,
    )


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sizes(device, function, make, options, dtype, reduction):
    for size in SIZES:
        compare(device, function, make((size,)), dtype, reduction=reduction, **options)


@each_loss
def test_large_sizes(device, function, make, options):
    for size, dtype in itertools.product(LARGE_SIZES, (torch.float32, torch.bfloat16)):
        compare(device, function, make((size,)), dtype, **options)


@each_loss
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, ("contiguous", *LAYOUTS))), ids="-".join)
def test_layouts(device, function, make, options, layouts):
    changes = [LAYOUTS.get(layout, lambda x: x) for layout in layouts]
    operands = [change(operand) for change, operand in zip(changes, make((3, 4, 5, 2)), strict=True)]
    for reduction in ("none", "mean"):
        compare(device, function, operands, torch.float32, reduction=reduction, **options)


@each_loss
def test_a_gradient_has_the_strides_of_its_operand(function, make, options):
    operands = [operand.to(memory_format=torch.channels_last) for operand in make((3, 4, 5, 2))]
    for reduction in REDUCTIONS:
        _, *gradients = run(partial(getattr(functional, function), reduction=reduction, **options), operands)
        assert all(gradient.stride() == operands[0].stride() for gradient in gradients)


@each_loss
def test_every_variant_is_right(function, make, options, variant):
    for dtype in (torch.float32, torch.bfloat16):
        compare("cpu", function, make((333,)), dtype, reduction="none", **options)


@each_loss
@pytest.mark.parametrize("dims", [8, 9, 12])
def test_more_dimensions_than_the_engine_has(device, function, make, options, dims):
    """In as many orders in memory as there are operands, so that no two dimensions join."""
    shape = (2, 1, 3) + (2,) * (dims - 3)
    backwards, odd_last = [*range(dims)][::-1], [*range(0, dims, 2), *range(1, dims, 2)]
    operands = [
        operand.permute(*order).contiguous().permute(*(order.index(d) for d in range(dims)))
        for operand, order in zip(make(shape), (backwards, odd_last), strict=True)
    ]
    for reduction in REDUCTIONS:
        compare(device, function, operands, torch.float32, reduction=reduction, **options)
        ours = partial(getattr(functional, function), reduction=reduction, **options)
        _, *gradients = run(ours, operands)
        assert [gradient.stride() for gradient in gradients] == [operand.stride() for operand in operands]
    if "weight" in inspect.signature(getattr(F, function)).parameters and function.startswith("binary"):
        compare(device, function, operands, torch.float32, weight=random(2, 1, 2).abs(), **options)
    if not function.startswith("binary"):
        compare(device, function, [operands[0], operands[1][:1]], torch.float32, gradient_unit=4.0, **options)


@each_loss
def test_scalars(device, function, make, options):
    for reduction in REDUCTIONS:
        compare(device, function, make(()), torch.float32, reduction=reduction, **options)


@pytest.mark.parametrize(
    "shapes", [((4, 1), (4,)), ((3, 40), (40,)), ((4,), (3, 4)), ((2, 1, 3), (1, 4, 1)), ((), (3,))]
)
@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "huber", "kl", "kl of logs"])
def test_broadcasting(device, shapes, name):
    function, make, options = LOSSES[name]
    operands = [make(shapes[0])[0], make(shapes[1])[1]]
    for reduction in REDUCTIONS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            judge_all = [torch.float32, torch.bfloat16]
            for dtype in judge_all:
                compare(device, function, operands, dtype, gradient_unit=4.0, reduction=reduction, **options)
        if function != "kl_div":
            ours = [w for w in caught if "target size" in str(w.message)]
            assert len(ours) == 3 * len(judge_all)  # ours, torch's, and torch's in float64
            assert len({str(w.message) for w in ours}) == 1


def test_torchs_warning_names_the_callers_line():
    with pytest.warns(UserWarning, match="different to the input size") as caught:
        functional.mse_loss(torch.ones(3, 1), torch.ones(3))
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match="batchmean") as caught:
        functional.kl_div(torch.ones(3), torch.ones(3))
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "kl"])
def test_two_dtypes_are_promoted(name, dtypes):
    function, make, options = LOSSES[name]
    for first, second in (dtypes, dtypes[::-1]):
        a, b = make((50,))
        for reduction in REDUCTIONS:
            ours = partial(getattr(functional, function), reduction=reduction, **options)
            torchs = partial(getattr(F, function), reduction=reduction, **options)
            rounded = [a.to(first), b.to(second)]
            try:
                expected = run(torchs, rounded)
            except RuntimeError as error:  # torch 2.11's mse_loss, going backward
                pytest.skip(f"torch {torch.__version__} does not promote here: {error}")
            found = run(ours, rounded)
            truth = run(torchs, [operand.double() for operand in rounded])
            for mine, theirs, true in zip(found, expected, truth, strict=True):
                assert_no_worse(mine, theirs, true)


# Weights --------------------------------------------------------------------------------------------------------------

WEIGHTED = {
    "bce": ("binary_cross_entropy", probabilities, ("weight",)),
    "bce with logits": ("binary_cross_entropy_with_logits", logits, ("weight",)),
    "bce with logits, pos_weight": ("binary_cross_entropy_with_logits", logits, ("pos_weight",)),
    "bce with logits, both": ("binary_cross_entropy_with_logits", logits, ("weight", "pos_weight")),
    "mse": ("mse_loss", errors, ("weight",)),
    "l1": ("l1_loss", errors, ("weight",)),
    "huber": ("huber_loss", errors, ("weight",)),
}


@pytest.mark.parametrize(("function", "make", "names"), WEIGHTED.values(), ids=WEIGHTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(device, function, make, names, dtype):
    shapes = ((4, 33, 16), (16,), (33, 1), (1,), (), (4, 1, 1), (33, 16))
    for shape, reduction in itertools.product(shapes if function.startswith("binary") else shapes[:1], REDUCTIONS):
        weights = {name: random(*shape, seed=8 + i).abs() for i, name in enumerate(names)}
        compare(device, function, make((4, 33, 16)), dtype, reduction=reduction, **weights)


@pytest.mark.parametrize("function", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_a_weight_that_wants_a_gradient_is_refused_as_in_torch(function):
    input, target = probabilities((4, 3))
    weight = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    messages = []
    for side in (functional, F):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'") as caught:
            getattr(side, function)(input.requires_grad_(), target, weight)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_batchmean(device):
    for shape in ((6, 4), (6,), ()):
        for options in ({}, {"log_target": True}):
            make = two_log_probabilities if options else log_probabilities
            compare(device, "kl_div", make(shape), torch.float32, reduction="batchmean", **options)


# Extremes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_extremes(device, dtype, reduction):
    large = torch.finfo(torch.float16).max / 4
    values = torch.tensor([0.0, -0.0, 1.0, 1e-4, -large, large, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    for name in ("mse", "l1", "smooth_l1", "huber"):
        function, _, options = LOSSES[name]
        grid = torch.cartesian_prod(values, values)
        if reduction == "none":
            compare(device, function, [grid[:, 0], grid[:, 1]], dtype, reduction=reduction, **options)
        else:
            for a, b in grid:
                compare(device, function, [a.expand(3), b.expand(3)], dtype, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [1e-323, 1e-300, 1e-46, 1e-39, 1e-30, 1e30, 3e38, 1e39, 1e300, math.inf])
def test_betas_and_deltas_that_another_type_does_not_have(dtype, number):
    """In float32 1e39 is infinite and 1e-46 is 0; torch in float64 is the judge, for each element."""
    input = torch.tensor([0.0, 1e-30, 1e-20, 1e-3, 2.0, -3.0, 6e4, -1e15, 1e25], dtype=torch.float64).to(dtype)
    for function, option in (("smooth_l1_loss", "beta"), ("huber_loss", "delta")):
        for reduction in ("none", "sum"):
            ours, torchs = (
                partial(getattr(side, function), reduction=reduction, **{option: number}) for side in (functional, F)
            )
            zeros = torch.zeros_like(input)
            found = run(ours, [input, zeros], torch.ones_like(input) if reduction == "none" else None)
            wide = [input.double(), zeros.double()]
            truth = run(torchs, wide, torch.ones_like(wide[0]) if reduction == "none" else None)
            for mine, true in zip(found, truth, strict=True):
                torch.testing.assert_close(
                    mine, true.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_certain_probabilities(device, dtype):
    input = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1e-7, 1 - 1e-3], dtype=torch.float64)
    target = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0], dtype=torch.float64)
    compare(device, "binary_cross_entropy", [input], dtype, constants=[target], reduction="none")
    compare(device, "binary_cross_entropy", [input], dtype, constants=[target], reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_target_beside_a_certain_probability_is_infinite(dtype):
    input, target = torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([0.5, 0.5], dtype=dtype)
    gradient = run(lambda x, t: functional.binary_cross_entropy(x, t, reduction="sum"), [input, target])[2]
    assert gradient.tolist() == [torch.inf, -torch.inf]
    assert torch.equal(gradient, run(lambda x, t: F.binary_cross_entropy(x, t, reduction="sum"), [input, target])[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(device, dtype):
    input = torch.tensor([1e4, -1e4, 1e4, -1e4, 100.0, -100.0, 20.0, -20.0, torch.inf, -torch.inf], dtype=torch.float64)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    function = "binary_cross_entropy_with_logits"
    compare(device, function, [input[:-2], target[:-2]], dtype, reduction="none")
    compare(device, function, [input, target], dtype, reduction="none")
    compare(device, function, [input[:-2], target[:-2]], dtype, reduction="none", pos_weight=torch.tensor(3.0).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impossible_events_add_nothing_to_kl(device, dtype):
    input = torch.tensor([0.0, -torch.inf, -1.0, -torch.inf, -50.0], dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    compare(device, "kl_div", [input, target], dtype, reduction="none")
    compare(device, "kl_div", [input[:3], target.log()[:3]], dtype, reduction="none", log_target=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_numbers(device, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 8
    for name in ("l1", "smooth_l1", "huber"):
        compare(device, LOSSES[name][0], [random(40) * tiny, random(40, seed=4) * tiny], dtype, reduction="none")
    compare(device, "mse_loss", [random(40) * tiny**0.5, torch.zeros(40, dtype=torch.float64)], dtype, reduction="none")


def test_small_probabilities_are_exact_in_each_element():
    input = torch.logspace(-30, -1, 60, dtype=torch.float64)
    target = torch.zeros(60, dtype=torch.float64)
    for x, function in ((input, "binary_cross_entropy"), (input.logit(), "binary_cross_entropy_with_logits")):
        sides = [
            run(lambda x, t, side=side, function=function: getattr(side, function)(x, t, reduction="sum"), [x_, t_])
            for side, x_, t_ in (
                (functional, x.float(), target.float()),
                (F, x.float(), target.float()),
                (F, x.float().double(), target),
            )
        ]
        for i in range(60):
            mine, theirs, true = (side[1][i : i + 1] for side in sides)
            assert_no_worse(mine, theirs, true, f"{function} {x[i]}", roundings=4)


@each_loss
def test_a_mean_needs_a_wide_sum(function, make, options):
    first, second = (operand[:1].expand(300_000).float() for operand in make((8,)))
    truth = getattr(F, function)(first[:1].double(), second[:1].double(), reduction="sum", **options)
    for reduction, scale in (("mean", 1), ("sum", 300_000)):
        loss = getattr(functional, function)(first, second, reduction=reduction, **options).double() / scale
        assert abs(loss - truth) <= 2**-22 * abs(truth)  # an element's own error, and no more


@given(
    name=st.sampled_from(list(LOSSES)),
    shape=st.lists(st.integers(0, 6), max_size=4),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(device, name, shape, seed, dtype, reduction):
    function, make, options = LOSSES[name]
    operands = make(tuple(shape), seed)
    # The gradient of a target of binary cross-entropy is a difference of logarithms, which are 0.7 where that is 0.
    unit = 1.0 / (max(1, operands[0].numel()) if reduction == "mean" else 1) if name == "bce" else 0.0
    compare(device, function, operands, dtype, gradient_unit=unit, reduction=reduction, **options)
