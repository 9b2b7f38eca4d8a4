"""trainopt.clip_grad_norm_ and get_total_norm, judged in float64 and against torch's own behaviour."""

import math
import threading
import warnings

import pytest
import torch
from clipping import (
    DTYPES,
    EXTREMES,
    ORDERS,
    SHAPES,
    assert_clipped,
    copy_of,
    exact_norm,
    gradients,
    make_extreme,
    make_parameters,
    returned,
)
from helpers import error_of
from judge import bits
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import get_total_norm as torch_norm

import trainopt
from trainopt._extension import _C


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
