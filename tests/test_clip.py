"""trainopt.clip_grad_norm_ and get_total_norm, judged in float64 and against torch's own behaviour."""

import math
import threading
import warnings

import pytest
import torch
from helpers import attempt, error_of
from judge import bits
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import clip_grad_value_ as torch_clip_value
from torch.nn.utils import clip_grads_with_norm_ as torch_clip_by
from torch.nn.utils import get_total_norm as torch_norm

import trainopt
from trainopt._extension import _C

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = (1.0, 2.0, math.inf)
#: Nothing, a scalar, less than the lanes of a sum, a block of 256 and round it, a chunk of 16,384 and round it.
SHAPES = ((), (0,), (1,), (31,), (33,), (255,), (256,), (257,), (128, 128), (16383,), (16385,), (3, 5, 7, 401))


def make_parameters(shapes=SHAPES, dtype=torch.float32, seed=0, scale=1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)
        params.append(param)
    return params


def copy_of(params):
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for copy, param in zip(copies, params, strict=True):
        copy.grad = None if param.grad is None else param.grad.clone()
    return copies


def gradients(params):
    return [p.grad for p in params if p.grad is not None]


def exact_norm(tensors, order: float) -> float:
    """Of the exact sum, rounded once; the squares of any numbers are held, since the largest is made 1."""
    values = torch.cat([t.detach().double().flatten() for t in tensors]).abs()
    largest = float(values.max())
    if order == math.inf or largest == 0:
        return largest
    if order == 1:
        return math.fsum(values.tolist())
    return math.sqrt(math.fsum(((values / largest) ** 2).tolist())) * largest


def returned(dtype):
    """The dtype of the norm of gradients of this one."""
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_float64_rounded_once(dtype, order, variant):
    tensors = gradients(make_parameters(dtype=dtype, scale=0.1))
    found = trainopt.get_total_norm(tensors, order)
    exact = exact_norm(tensors, order)
    assert found.dtype == returned(dtype) and found.shape == () and not found.requires_grad
    tolerance = 1e-13 if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2 * 1.0001
    assert abs(float(found) - exact) <= tolerance * exact
    # No further from it than torch, which has no largest element of an empty tensor.
    some = [t for t in tensors if t.numel() > 0]
    assert abs(float(found) - exact) <= abs(float(torch_norm(some, order)) - exact) + 1e-13 * exact


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_gradients_are_those_of_float64_rounded_once(dtype, order, variant):
    params = make_parameters(dtype=dtype)
    before = [g.clone().double() for g in gradients(params)]
    exact = exact_norm(before, order)
    found = trainopt.clip_grad_norm_(params, exact / 3, order)
    assert found.dtype == returned(dtype)
    factor = exact / 3 / (exact + 1e-6)
    eps = torch.finfo(dtype).eps
    for old, new in zip(before, gradients(params), strict=True):
        # The factor is rounded to the arithmetic's type before the product is to the gradient's; in float64 the norm
        # has its own roundings besides.
        roundings = 4 * eps if dtype == torch.float64 else eps / 2 + torch.finfo(torch.float32).eps
        bound = roundings * (old * factor).abs()
        if dtype == torch.float16:
            bound += torch.finfo(dtype).smallest_normal * eps
        assert bool(((new.double() - old * factor).abs() <= bound).all())


def test_every_simd_variant_and_number_of_threads_gives_the_same_bits(each_variant):
    shapes, seen = (*SHAPES, (700_001,)), set()
    for _ in each_variant():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16):
                params = make_parameters(shapes, dtype)
                norms = tuple(_C.norm_of(params, order, True)[0] for order in ORDERS)
                trainopt.clip_grad_norm_(params, 1.0)
                seen.add((dtype, norms, *(bits(gradient).numpy().tobytes() for gradient in gradients(params))))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_the_limit_nothing_is_written(dtype):
    params = make_parameters(dtype=dtype)
    before = [g.clone() for g in gradients(params)]
    versions = [g._version for g in gradients(params)]
    norm = trainopt.clip_grad_norm_(params, 1e4)
    assert float(norm) < 1e4
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(params), strict=True))
    assert versions == [g._version for g in gradients(params)]
    trainopt.clip_grad_norm_(params, 1e-3)
    assert all(g._version == v + 1 for g, v in zip(gradients(params), versions, strict=True))


@pytest.mark.parametrize("foreach", (None, True, False))
@pytest.mark.parametrize("order", (0.5, 1, 2, 2.0, 3, "inf", math.inf, -math.inf, 0))
def test_it_does_what_torch_does(order, foreach):
    params = make_parameters([shape for shape in SHAPES if shape != (0,)])
    theirs = copy_of(params)
    ours_norm = trainopt.clip_grad_norm_(params, 2, norm_type=order, foreach=foreach)
    torchs_norm = torch_clip(theirs, 2, norm_type=order, foreach=foreach)
    torch.testing.assert_close(ours_norm, torchs_norm)
    for a, b in zip(gradients(params), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        trainopt.get_total_norm(gradients(params), order, foreach=foreach), torch_norm(gradients(theirs), order)
    )


def test_arguments_that_torch_takes():
    params = make_parameters()
    assert torch.equal(trainopt.get_total_norm(params[4].grad), trainopt.get_total_norm([params[4].grad]))
    one = copy_of(params)[4]
    norm = trainopt.clip_grad_norm_(one, 0.5)
    assert torch.equal(norm, torch_norm([params[4].grad])) or norm.isclose(torch_norm([params[4].grad]))
    assert float(trainopt.get_total_norm(one.grad)) == pytest.approx(0.5, abs=1e-5)
    some = copy_of(params)
    for p in some[::2]:
        p.grad = None
    exact = exact_norm(gradients(some), 2.0)
    assert float(trainopt.clip_grad_norm_((p for p in some), 0.25)) == pytest.approx(exact)
    assert exact_norm(gradients(some), 2.0) == pytest.approx(0.25, abs=1e-5)
    assert all(p.grad is None for p in some[::2])


def test_without_gradients_the_norm_is_0():
    params = [torch.nn.Parameter(torch.ones(3))]
    for given in (params, []):
        ours, torchs = trainopt.clip_grad_norm_(given, 1.0), torch_clip(given, 1.0)
        assert torch.equal(ours, torchs) and ours.dtype == torchs.dtype
    assert torch.equal(trainopt.get_total_norm([]), torch_norm([]))
    params[0].grad = torch.zeros(3)
    assert float(trainopt.clip_grad_norm_(params, 0.0)) == 0


def test_empty_tensors_have_a_norm_of_0():
    """Torch raises for the largest element of an empty tensor; a shard of a parameter may well be empty."""
    tensors = [torch.zeros(0), torch.tensor([3.0, -4.0]), torch.zeros(2, 0)]
    for order, norm in ((1.0, 7), (2.0, 5), (math.inf, 4)):
        assert float(trainopt.get_total_norm(tensors, order)) == norm
    assert float(trainopt.get_total_norm(tensors[:1], math.inf)) == 0


def test_an_empty_generator_is_warned_of():
    with pytest.warns(UserWarning, match="empty generator"):
        assert float(trainopt.clip_grad_norm_((p for p in ()), 1.0)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainopt.clip_grad_norm_([], 1.0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_reaches_the_norm(bad, order):
    for place in (0, 17, 300, 16384, 20000):
        params = make_parameters(((20001,), (5,)))
        params[0].grad[place] = bad
        theirs = copy_of(params)
        ours, torchs = (f(p, 1.0, order) for f, p in ((trainopt.clip_grad_norm_, params), (torch_clip, theirs)))
        torch.testing.assert_close(ours, torchs, equal_nan=True)
        for a, b in zip(gradients(params), gradients(theirs), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_error_if_nonfinite_is_torchs_and_changes_nothing(bad):
    params = make_parameters()
    params[5].grad[3] = bad
    before = [g.clone() for g in gradients(params)]
    ours = error_of(lambda: trainopt.clip_grad_norm_(params, 1.0, error_if_nonfinite=True))
    assert ours == error_of(lambda: torch_clip(params, 1.0, error_if_nonfinite=True))
    assert error_of(lambda: trainopt.get_total_norm(before, error_if_nonfinite=True)) == ours
    for a, b in zip(gradients(params), before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    trainopt.clip_grad_norm_(make_parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("arguments", (("x",), (1.0, "x"), (None,)))
def test_bad_arguments_raise_torchs_errors(arguments):
    ours = error_of(lambda: trainopt.clip_grad_norm_(make_parameters(), *arguments))
    assert ours == error_of(lambda: torch_clip(make_parameters(), *arguments))


#: Gradients at the ends of their dtypes, and what they are clipped to: sums or squares that the dtype or float64 cannot
#: hold, subnormal numbers, and coefficients that float32 or float64 would hold with few digits.
EXTREMES = {
    "float32, 1e25": (torch.float32, (1e25,), 1.0),
    "float32, 1e-25": (torch.float32, (1e-25,), 1e-30),
    "float32, 1e38": (torch.float32, (1e38,), 1.0),
    "float32, 1e38 and 1e-38": (torch.float32, (1e38, 1e-38), 1e-3),
    "float32, subnormal": (torch.float32, (1e-40,), 1e-30),
    "float64, 1e200": (torch.float64, (1e200,), 1.0),
    "float64, 1e-200": (torch.float64, (1e-200,), 1.0),
    "float64, 1e160 and 1": (torch.float64, (1e160, 1.0), 1e150),
    "float64, 1 and 1e-160": (torch.float64, (1.0, 1e-160), 1e-3),
    "float64, 1e-120, 1e-135, 1e-140 and 1e-165": (torch.float64, (1e-120, 1e-135, 1e-140, 1e-165), 1.0),
    "float64, 1e-135 alone": (torch.float64, (1e-135,), 1e-140),
    "float64, 1e150": (torch.float64, (1e150,), 1.0),
    "float64, 1e303": (torch.float64, (1e303,), 1e-8),
    "float64, subnormal": (torch.float64, (1e-315,), 1.0),
    "float16, 1,000": (torch.float16, (1000.0,), 1.0),
    "float16, 60,000": (torch.float16, (20000.0,), 100.0),
    "float16, subnormal": (torch.float16, (1e-6,), 1e-7),
    "bfloat16, 1e38": (torch.bfloat16, (1e38,), 1.0),
    "bfloat16, 1e-38": (torch.bfloat16, (1e-38,), 1.0),
}


def make_extreme(dtype, scales):
    """A scalar, nothing, less than a block and more than a chunk, for each scale; the first one with zeros in it."""
    params = [p for i, s in enumerate(scales) for p in make_parameters(((300,), (0,), (), (16_500,)), dtype, i, s)]
    for p in params:
        p.grad.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    params[0].grad[::3] = 0
    return params


def assert_clipped(before, after, exact, limit):
    """After clipping, gradients are those before times min(1, limit / (norm + 1e-6)), in float64."""
    info = torch.finfo(after.dtype)
    whole, small = limit / (exact + 1e-6), 1.0
    if abs(whole) < 1e-200:  # itself subnormal: in two steps
        small, whole = 1e-200, limit / ((exact + 1e-6) * 1e-200)
    wanted = before.double() * small * min(whole, 1.0)
    bound = 4 * info.eps * wanted.abs() + 2 * info.smallest_normal * info.eps
    assert bool(((after.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", EXTREMES)
def test_gradients_at_the_ends_of_their_dtype(kind, order, variant):
    dtype, scales, limit = EXTREMES[kind]
    params = make_extreme(dtype, scales)
    before = [g.clone() for g in gradients(params)]
    exact = exact_norm(before, order)
    assert 0 < exact < math.inf
    for of_one in before:  # each alone: the scales meet only in the list
        found, alone = trainopt.get_total_norm([of_one], order), exact_norm([of_one], order) if of_one.numel() else 0
        assert float(found) == pytest.approx(float(torch.tensor(alone, dtype=found.dtype)), rel=1e-6, abs=0)
    found = trainopt.clip_grad_norm_(params, limit, order)
    rel = 1e-12 if dtype == torch.float64 else 1e-7
    assert found.dtype == returned(dtype)
    assert float(found) == pytest.approx(float(torch.tensor(exact, dtype=found.dtype)), rel=rel, abs=5e-324)
    for old, new in zip(before, gradients(params), strict=True):
        assert_clipped(old, new, exact, limit)
    if math.isfinite(float(found)):
        trainopt.get_total_norm(before, order, error_if_nonfinite=True)


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("scale", (1e200, 1e-200))
def test_what_is_not_finite_reaches_the_norm_of_scaled_squares(scale, bad):
    for place in (0, 1, 299, 16_384):
        gradient = torch.full((16_400,), scale, dtype=torch.float64)
        gradient[place] = bad
        found = trainopt.get_total_norm([gradient, torch.full((5,), scale, dtype=torch.float64)])
        assert float(found) == math.inf if math.isinf(bad) else math.isnan(float(found))
        with pytest.raises(RuntimeError, match="non-finite"):
            trainopt.get_total_norm([gradient], error_if_nonfinite=True)


def test_the_norm_of_a_float64_list_that_holds_nothing_but_zeros_is_0():
    tensors = [torch.zeros(20_000, dtype=torch.float64), -torch.zeros(3, dtype=torch.float64)]
    for order in ORDERS:
        found = trainopt.get_total_norm(tensors, order)
        assert float(found) == 0 and not torch.signbit(found)


@pytest.mark.parametrize("order", (3.0, 0.5))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_other_orders_of_16_bit_gradients_are_float32_too(dtype, order):
    params = make_parameters(((300,), (7, 50)), dtype, scale=3000.0)
    before = [g.double() for g in gradients(params)]
    exact = float(torch_norm(before, order))
    limit = exact / 100
    found = trainopt.clip_grad_norm_(params, limit, order, error_if_nonfinite=True)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(exact, rel=1e-5)
    for old, new in zip(before, gradients(params), strict=True):
        torch.testing.assert_close(new.double(), old * 0.01, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert trainopt.get_total_norm(gradients(params), order).dtype == torch.float32


def test_a_float16_norm_beyond_float16_is_no_error():
    """The norm is 84,853: torch has infinity, zeros and an error."""
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    param.grad = torch.full((2,), 60_000.0, dtype=torch.float16)
    norm = trainopt.clip_grad_norm_([param], 100.0, error_if_nonfinite=True)
    assert norm.dtype == torch.float32 and float(norm) == pytest.approx(60_000 * math.sqrt(2))
    torch.testing.assert_close(param.grad.double(), torch.full((2,), 100 / math.sqrt(2)).double(), rtol=1e-3, atol=0)


# By value, and by a norm that is known already ------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", (None, True, False))
@pytest.mark.parametrize("limit", (0, 0.3, 0.25, 1e4, 1e5, 1e300, math.inf, -0.5, math.nan, "x", None))
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_by_value_is_torchs(dtype, limit, foreach, variant):
    params = make_parameters(dtype=dtype)
    params[8].grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    params.append(make_parameters(((64, 300),), dtype)[0])
    params[-1].grad = params[-1].grad.t().contiguous().t()
    theirs, versions = copy_of(params), [g._version for g in gradients(params)]
    ours = attempt(lambda: trainopt.clip_grad_value_(params, limit, foreach))
    assert ours == attempt(lambda: torch_clip_value(theirs, limit, foreach))
    for mine, torchs in zip(gradients(params), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=0, equal_nan=True)
    if ours is None:
        assert all(g._version > version for g, version in zip(gradients(params), versions, strict=True))


@pytest.mark.parametrize("foreach", (None, True, False))
@pytest.mark.parametrize("norm", (8.0, 1.0, 0.0, math.inf, math.nan))
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_by_a_known_norm_is_torchs(dtype, norm, foreach):
    for total in (torch.tensor(norm), torch.tensor(norm).double(), torch.tensor(norm).to(dtype)):
        params = make_parameters(dtype=dtype)
        theirs = copy_of(params)
        assert trainopt.clip_grads_with_norm_(params, 2, total, foreach) is None
        torch_clip_by(theirs, 2, total, foreach)
        for mine, torchs in zip(gradients(params), gradients(theirs), strict=True):
            # torch rounds the factor to the norm's dtype, and to the gradients'.
            torch.testing.assert_close(mine, torchs, rtol=4 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("total", (2.0, "x", None, torch.tensor([8.0]), torch.ones(2), torch.tensor(8)), ids=str)
def test_a_known_norm_that_is_no_number_is_torchs_to_refuse(total):
    params = make_parameters()
    theirs = copy_of(params)
    assert attempt(lambda: trainopt.clip_grads_with_norm_(params, 2, total)) == attempt(
        lambda: torch_clip_by(theirs, 2, total)
    )
    for mine, torchs in zip(gradients(params), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_a_known_norm_is_read_as_it_is():
    """A factor of 1/3 is rounded once, with the product; torch rounds it to bfloat16 before."""
    param = make_parameters(((300,),), torch.bfloat16)[0]
    before = param.grad.double()
    trainopt.clip_grads_with_norm_(param, 1.0, torch.tensor(3.0, dtype=torch.float64, requires_grad=True))
    assert torch.equal(param.grad, (before / (3 + 1e-6)).bfloat16())


@pytest.mark.parametrize("clip", ("clip_grad_value_", "clip_grads_with_norm_"))
@pytest.mark.parametrize("kind", ("sparse", "complex", "shared", "none", "generator"))
def test_other_clipping_of_what_the_module_does_not_take(kind, clip):
    def run(function):
        params = make_parameters(((4, 3), (5,)))
        if kind == "sparse":
            params[0].grad = params[0].grad.to_sparse()
        elif kind == "complex":
            params[0] = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
            params[0].grad = torch.ones(3, dtype=torch.complex64)
        elif kind == "shared":
            params[1].grad = params[0].grad.flatten()[:5]
        elif kind == "none":
            params = [torch.nn.Parameter(torch.ones(3))]
        given = (p for p in params) if kind == "generator" else params
        more = (torch.tensor(4.0),) if clip == "clip_grads_with_norm_" else ()
        error = attempt(lambda: function(given, 0.5, *more))
        return error, [g.to_dense() for g in gradients(params)]

    if kind == "none":
        assert run(getattr(trainopt, clip)) == (None, [])
    (error, mine), (torchs_error, theirs) = run(getattr(trainopt, clip)), run(getattr(torch.nn.utils, clip))
    if kind != "none":  # torch's clip_grad_value_ has an internal error there
        assert error == torchs_error
    torch.testing.assert_close(mine, theirs)


def test_mixed_dtypes():
    params = [p for dtype in DTYPES for p in make_parameters(((7,), (300,)), dtype)]
    for chosen in (params, params[:2] + params[4:6], params[4:]):
        mine, theirs = copy_of(chosen), copy_of(chosen)
        ours, torchs = trainopt.clip_grad_norm_(mine, 3.0), torch_clip(theirs, 3.0)
        assert ours.dtype == returned(torchs.dtype)
        assert float(ours) == pytest.approx(exact_norm(gradients(chosen), 2.0), rel=torch.finfo(ours.dtype).eps)
        assert exact_norm(gradients(mine), 2.0) == pytest.approx(3.0, rel=1e-3)


def test_strided_gradients():
    values = torch.randn(6, 8, 10, 4)
    views = (
        values.permute(3, 1, 0, 2),
        values[:, ::2],
        values[1:, :, 3],
        values.contiguous(memory_format=torch.channels_last),
    )
    for view in views:
        param = torch.nn.Parameter(torch.zeros(view.shape))
        param.grad = view
        before = view.double().clone()
        untouched = values.clone()
        exact = exact_norm([before], 2.0)
        assert float(trainopt.clip_grad_norm_([param], exact / 2)) == pytest.approx(exact, rel=1e-6)
        torch.testing.assert_close(param.grad.double(), before * (exact / 2 / (exact + 1e-6)), rtol=1e-6, atol=0)
        if view.data_ptr() in range(values.data_ptr(), values.data_ptr() + 4 * values.numel()):
            assert int((values != untouched).sum()) == view.numel()


def test_gradients_that_share_memory_are_scaled_one_after_the_other():
    gradient = torch.randn(100_000)
    params = [torch.nn.Parameter(torch.zeros(100_000)) for _ in range(2)]
    for p in params:
        p.grad = gradient
    exact = exact_norm([gradient, gradient], 2.0)
    expected = gradient.double() * (1 / (exact + 1e-6)) ** 2
    trainopt.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=0)


def test_an_expanded_gradient_is_torchs_error():
    param = torch.nn.Parameter(torch.zeros(4, 5))
    param.grad = torch.ones(5).expand(4, 5)
    assert float(trainopt.clip_grad_norm_([param], 100.0)) == pytest.approx(math.sqrt(20))
    ours = error_of(lambda: trainopt.clip_grad_norm_([param], 1.0))
    assert ours[0] is RuntimeError and "single memory location" in ours[1]


def test_sparse_complex_and_meta_gradients_go_through_torch():
    dense = torch.nn.Parameter(torch.zeros(3))
    dense.grad = torch.ones(3)
    number = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    number.grad = torch.tensor([3 + 4j, 0])
    assert float(trainopt.clip_grad_norm_([number], 1.0)) == pytest.approx(5)
    assert abs(number.grad[0]) == pytest.approx(1)

    def clipped_by(clip):
        sparse = torch.nn.Parameter(torch.zeros(3))
        sparse.grad = torch.sparse_coo_tensor([[1]], [2.0], (3,), check_invariants=True)
        return float(clip([sparse], 1.0)), sparse.grad.to_dense().tolist()

    try:
        wanted = clipped_by(torch_clip)  # from torch 2.14 on
    except RuntimeError:
        assert error_of(lambda: clipped_by(trainopt.clip_grad_norm_)) == error_of(lambda: clipped_by(torch_clip))
    else:
        assert clipped_by(trainopt.clip_grad_norm_) == wanted
    absent = torch.nn.Parameter(torch.zeros(3, device="meta"))
    absent.grad = torch.zeros(3, device="meta")
    assert trainopt.get_total_norm([absent.grad]).device.type == "meta"


def test_subclasses_and_modes_are_torchs():
    class Loud(torch.Tensor):
        pass

    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3).as_subclass(Loud)
    assert float(trainopt.clip_grad_norm_([param], 1.0)) == pytest.approx(math.sqrt(3))
    assert exact_norm([param.grad.as_subclass(torch.Tensor)], 2.0) == pytest.approx(1, abs=1e-5)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.zeros(3))
        fake.grad = torch.zeros(3)
        assert trainopt.clip_grad_norm_([fake], 1.0).shape == ()


def test_the_benchmark_measures_both_cases(capsys):
    from benchmarks import clip

    clip.main(["--workload", "mlp", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "mlp, clips" in printed and "mlp, below the limit" in printed


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("left", [0, 35])
def test_a_gradient_whose_memory_is_gone_is_named(norm_type, left):
    """torch's own kernels end the process there."""
    params = [torch.nn.Parameter(torch.ones(9)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(9)
    params[1].grad.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 1 needs 36 bytes of memory, and its storage has"):
        trainopt.clip_grad_norm_(params, 1.0, norm_type)
    assert (params[0].grad == 1).all()


def test_gradients_that_go_while_a_large_norm_is_taken():
    """The norm's dtype was read from the tensors after the interpreter was let go."""
    for _ in range(3):
        params = [torch.nn.Parameter(torch.ones(8)) for _ in range(500)] + [torch.nn.Parameter(torch.ones(3_000_000))]
        for p in params:
            p.grad = torch.ones_like(p)
        thread = threading.Thread(target=trainopt.clip_grad_norm_, args=(params, 1e9))
        thread.start()
        for p in params:
            p.grad = None
        strangers = [torch.zeros(()) for _ in range(1000)]
        thread.join()
        assert not any(t._version for t in strangers)
