"""Rules whose step depends on the whole tensor, LAMB and LARS: their sums, on every path, and ratios of 1."""

import copy

import judge
import pytest
import torch
from helpers import skip_unless_taken
from judge import DTYPES, TABLE, assert_no_worse, assert_same_bits, outcome, random_problem, result_of, run

import trainopt
from trainopt._extension import _C

SUMMING = {name: row for name, row in TABLE.items() if row.has_sums}
each_row = pytest.mark.parametrize("row", SUMMING.values(), ids=SUMMING.keys())
each_path = pytest.mark.parametrize("make", ["make", "make_plain_loop"], ids=["engine", "plain step"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

#: Around a segment of 2,048 elements and a chunk of 16,384, and more than one thread's worth of them.
SIZES = (1, 2047, 2049, 16_383, 16_384, 16_385, 200_003)


def test_the_module_names_the_sums():
    sums = {name: facts.sums for name, facts in _C.rules().items()}
    assert sums["lamb"] == ("squares of the parameter", "squares of the update") and len(sums["lars"]) == 2
    assert sums["adam"] == sums["sgd"] == sums["lion"] == ()


@each_dtype
@each_row
def test_the_same_bits_for_any_threads_and_any_variant(row, dtype):
    judge.assert_same_bits_everywhere(row, *random_problem(SIZES, dtype, 2, 1), **row.usual)


@each_row
def test_the_same_bits_wherever_elements_lie(row):
    """Of a transposed or a sliced tensor, or one with gradients that are, the elements are summed in another order."""
    start, gradients = random_problem(((300, 70), (129, 257)), torch.float64, 3, 2)
    plain = result_of(row.make, start, gradients, **row.usual)

    def turned(x):
        return x.t().contiguous().t()

    for move_param, move_gradient in ((turned, turned), (torch.clone, turned), (turned, torch.clone)):
        moved = [[move_gradient(g) for g in now] for now in gradients]
        params = [torch.nn.Parameter(move_param(p)) for p in start]
        optimizer = row.make(params, **row.usual)
        for now in moved:
            for p, g in zip(params, now, strict=True):
                p.grad = g
            optimizer.step()
        found = {name: [t.contiguous() for t in tensors] for name, tensors in outcome(optimizer, params).items()}
        assert_same_bits({name: [t.contiguous() for t in tensors] for name, tensors in plain.items()}, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_row
def test_a_step_that_repeats_the_last_one(row, dtype):
    """The second step is recalled and not walked; each is that of an optimizer which has made none before."""
    start, gradients = random_problem((700, 9), dtype, 4, 3)
    optimizer, params = run(row.make, start, gradients[:2], **row.usual)
    other = row.make([torch.nn.Parameter(p.detach().clone()) for p in params], **row.usual)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for now in gradients[2:]:
        for opt in (optimizer, other):
            for p, g in zip(opt.param_groups[0]["params"], now, strict=True):
                p.grad = g
            opt.step()
        other._plan = None
        assert_same_bits(outcome(optimizer, params), outcome(other, other.param_groups[0]["params"]))


# A trust ratio of 1 ---------------------------------------------------------------------------------------------------


@each_path
@each_dtype
def test_a_parameter_of_zero_norm_moves_by_the_learning_rate(dtype, make):
    gradient = torch.tensor([1.0, -2.0, 4.0, 0.0], dtype=dtype)
    lamb = getattr(TABLE["LAMB"], make)
    _, (p,) = run(
        lamb, [torch.zeros(4, dtype=dtype)], [[gradient]], lr=0.5, eps=0.0, betas=(0.5, 0.5), weight_decay=0.1
    )
    assert p.isnan().tolist() == [False, False, False, True]  # 0 / 0 without an epsilon, as Adam
    torch.testing.assert_close(p[:3].detach(), torch.tensor([-0.5, 0.5, -0.5], dtype=dtype))
    lars = getattr(TABLE["LARS"], make)
    _, (p,) = run(lars, [torch.zeros(4, dtype=dtype)], [[gradient]], lr=0.5, weight_decay=0.1)
    assert p.tolist() == [-0.5, 1.0, -2.0, 0.0]


@each_path
@each_dtype
def test_an_update_of_zero_norm_changes_nothing_but_by_decay(dtype, make):
    start, zeros = torch.tensor([1.0, -2.0, 4.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    lamb = getattr(TABLE["LAMB"], make)
    _, (p,) = run(lamb, [start], [[zeros]] * 2, lr=0.5, weight_decay=0.0, always_adapt=True)
    assert torch.equal(p.detach(), start)
    lars = getattr(TABLE["LARS"], make)
    _, (p,) = run(lars, [start], [[zeros]], lr=0.5, weight_decay=0.5)
    assert torch.equal(p.detach(), start * 0.75)  # by a ratio of 1, as timm


@each_path
@each_row
def test_empty_tensors_and_tensors_without_a_gradient(row, make):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((0, 3), (5,), (4,), ())]
    optimizer = getattr(row, make)(params, **row.usual)
    for i in (0, 1, 3):
        params[i].grad = torch.full_like(params[i], 0.5)
    for _ in range(3):
        optimizer.step()
    assert (params[2] == 1).all() and (params[1] != 1).all() and params[3] != 1


@each_path
@each_row
def test_a_nan_is_not_hidden(row, make):
    start, gradients = torch.ones(1000), torch.ones(1000)
    gradients[7] = float("nan")
    _, (p,) = run(getattr(row, make), [start], [[gradients]], **row.usual)
    # Of a number in common that of the steps before is kept, and Adafactor's clipping, as torch's, passes over a NaN.
    assert (p[7] if row.in_common is not None or row.factors else p).isnan().all()


def test_norms_of_numbers_whose_squares_a_float_does_not_hold():
    """Sums are in double: their squares overflow or vanish in float32."""
    for size in (1e30, 1e-30):
        start, gradient = torch.full((100,), size), torch.full((100,), size)
        _, (p,) = run(TABLE["LARS"].make, [start], [[gradient]], lr=1.0, trust_coeff=0.5, always_adapt=True, eps=0.0)
        torch.testing.assert_close(p.detach() / size, torch.full((100,), 0.5))


# Every path -----------------------------------------------------------------------------------------------------------


@each_dtype
@each_row
def test_the_plain_step_and_the_engine_agree(row, dtype):
    """But for single roundings: both sum in double."""
    start, gradients = random_problem((1000, 33), dtype, 5, 4)
    ours = [] if row.ours._torch_class else [row.everything]
    for options in (row.usual, row.settings["all"], *ours):
        found = result_of(row.make, start, gradients, **options)
        plain = result_of(row.make_plain_loop, start, gradients, **options)
        truth = result_of(row.make_plain_loop, start, gradients, torch.float64, **options)
        assert_no_worse(found, plain, truth, dtype, in_common=row.in_common is not None)


@each_path
@each_row
def test_caution_looks_at_updates_and_not_at_what_a_parameter_shows_of_them(row, make):
    """Of an update below half a unit of a float32 parameter nothing is left in it."""
    if "cautious" in row.changes_nothing:
        pytest.skip("every update has its gradient's sign")
    start, gradients = random_problem((1000,), torch.float32, 1, 6)
    for lr in (1e-7, 1e-8):
        options = {**row.usual, "lr": lr, "cautious": True}
        (found,) = result_of(getattr(row, make), start, gradients, **options)["param"]
        (truth,) = result_of(row.make_formula, start, gradients, torch.float64, **options)["param"]
        slack = torch.finfo(torch.float32).eps * truth.abs() + 1e-5 * (truth - start[0]).abs()
        assert ((found - truth).abs() <= slack).all()


@each_row
def test_compiled(row):
    start, gradients = random_problem((300, 7), torch.float32, 3, 5)
    plain = result_of(row.make, start, gradients, **row.usual)
    torch._dynamo.reset()  # what other tests have compiled counts towards its limit
    fullgraph = row.in_common is None and not row.numbers and not row.factors  # which run uncompiled

    def compiled(params, **options):
        optimizer = row.make(params, **options)
        optimizer.step = torch.compile(optimizer.step, backend="eager", fullgraph=fullgraph)
        return optimizer

    assert_same_bits(plain, result_of(compiled, start, gradients, **row.usual))


@each_row
def test_a_gradient_scale_and_a_skipped_step(row):
    """Norms are those of the gradients after GradScaler's scale."""
    start, gradients = random_problem((300, 7), torch.float32, 2, 6)
    plain = result_of(row.make, start, gradients, **row.usual)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = row.make(params, **row.usual, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step, now in enumerate(gradients):
        if step == 1:
            optimizer.found_inf.fill_(1)
            for p in params:
                p.grad = torch.full_like(p, float("inf"))
            optimizer.step()
            assert optimizer.last_step_skipped
            optimizer.found_inf.fill_(0)
        for p, g in zip(params, now, strict=True):
            p.grad = 8 * g
        optimizer.step()
    assert_same_bits(plain, outcome(optimizer, params))


@each_row
def test_steps_that_are_not_finite_are_left_out(row):
    start, gradients = random_problem((300, 7), torch.float32, 2, 7)
    plain = result_of(row.make, start, gradients, **row.usual)
    bad = [torch.full_like(g, float("inf")) for g in gradients[0]]
    found = result_of(row.make, start, [gradients[0], bad, gradients[1]], **row.usual, skip_nonfinite=True)
    assert_same_bits(plain, found)


@pytest.mark.parametrize(
    "row",
    [row for row in SUMMING.values() if row.in_common is None and "differentiable" in row.defaults],
    ids=lambda row: row.ours.__name__,
)
def test_a_differentiable_step(row):
    def step(p, g):
        moved = p.clone()
        moved.grad = g.clone()
        row.ours([moved], **row.usual, differentiable=True).step()
        return moved

    start, ((gradient,),) = random_problem((5,), torch.float64, 1, 8)
    (p, g) = (x.abs().add(0.1).requires_grad_() for x in (start[0], gradient))
    assert torch.autograd.gradcheck(step, (p, g))


@each_row
def test_complex_numbers_are_pairs_of_reals(row):
    skip_unless_taken(row.ours.__name__, "complex")
    start, gradients = random_problem(((50, 2),), torch.float64, 3, 9)
    real = result_of(row.make, start, gradients, **row.usual)
    pairs = [[torch.view_as_complex(g) for g in now] for now in gradients]
    found = result_of(row.make, [torch.view_as_complex(p) for p in start], pairs, **row.usual)
    for name, (tensor,) in found.items():
        torch.testing.assert_close(torch.view_as_real(tensor) if tensor.is_complex() else tensor, real[name][0])


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "bad", "words"),
    [
        (trainopt.LAMB, {"lr": -1.0}, "Invalid learning rate: -1.0"),
        (trainopt.LAMB, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
        (trainopt.LAMB, {"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        (trainopt.LAMB, {"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
        (trainopt.LARS, {"momentum": -0.5}, "Invalid momentum value: -0.5"),
        (trainopt.LARS, {"trust_coeff": -0.5}, "Invalid trust_coeff value: -0.5"),
        (trainopt.LARS, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ],
    ids=str,
)
def test_options_are_refused_in_torchs_words(cls, bad, words):
    with pytest.raises(ValueError, match=words):
        cls([torch.nn.Parameter(torch.ones(2))], **bad)


def test_the_first_momentum_step_takes_the_gradient_whole():
    _, (p,) = run(TABLE["LARS"].make, [torch.ones(3)], [[torch.ones(3)]], lr=0.5, momentum=0.9, dampening=0.5)
    assert (p == 0.5).all()
