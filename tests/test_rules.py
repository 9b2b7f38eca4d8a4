"""Each optimizer's arithmetic: every option where it changes the result, in every dtype, against the judge."""

import copy
import functools

import pytest
import torch
from formulas import DECOUPLING, formula_step, options_now, take_undecided
from judge import (
    DTYPES,
    LARGE_SIZES,
    SIZES,
    TABLE,
    assert_no_worse,
    assert_one_rounding,
    assert_same_bits,
    random_problem,
    result_of,
    run,
    undecided_elements,
)
from rows import each_dtype, each_row

STEPS = 9
SETTINGS = [pytest.param(r, o, id=f"{name}-{key}") for name, r in TABLE.items() for key, o in r.settings.items()]
EXTRAS = [pytest.param(r, o, id=f"{name}-{key}") for name, r in TABLE.items() for key, o in r.extras.items()]
each_wide = pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
each_16_bit = pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda d: str(d).removeprefix("torch."))


@functools.cache
def problem(sizes, dtype, steps, seeds):
    """The problems of all seeds in one: more elements to take the mean over. No test writes to them."""
    problems = [random_problem(sizes, dtype, steps, seed) for seed in seeds]
    return [[x for each in problems for x in each[0]], *([g for p in problems for g in p[1][i]] for i in range(steps))]


def depends_on_its_tensor(row, options):
    """Whether an element's step does. Numbers that all elements have in common do not make it so."""
    return (row.has_sums and row.in_common is None) or bool(row.factors) or options.get("cautious", False)


def in_one_piece(row, options, tensors):
    """The tensors as one, where that is the same step: the time of a plain loop is that of its calls."""
    return tensors if depends_on_its_tensor(row, options) else [torch.cat(tensors)]


def judge(row, peer, dtype, options, sizes, steps, seeds):
    apart = problem(sizes, dtype, steps, seeds[:1] if depends_on_its_tensor(row, options) else seeds)
    start, *gradients = (in_one_piece(row, options, tensors) for tensors in apart)
    undecided = undecided_elements(row, start, gradients, dtype, options) if row.takes_signs(options) else None
    ours = result_of(row.make, apart[0], apart[1:], **options)
    for name in ours.keys() & row.numbers if len(start) < len(apart[0]) else ():
        assert len({number.item() for number in ours[name]}) == 1
        ours[name] = ours[name][:1]
    assert_no_worse(
        ours,
        result_of(peer, start, gradients, **options),
        result_of(peer, start, gradients, torch.float64, **options),
        dtype,
        undecided,
        row.roundings,
        row.in_common is not None,
    )


# Of 16 bits each step is judged alone, below, for every option: it is the formula, rounded once.
@each_wide
@pytest.mark.parametrize("row, options", SETTINGS)
def test_no_worse_than_torch(row, options, dtype):
    judge(row, row.make_plain_loop, dtype, options, SIZES, STEPS, seeds=(0, 1))


@each_wide
@pytest.mark.parametrize("row, options", EXTRAS)
def test_no_worse_than_formula(row, options, dtype):
    judge(row, row.make_formula, dtype, options, SIZES[::2], STEPS, seeds=(2, 3))


@each_dtype
@each_row
def test_large(row, dtype):
    torch.set_num_threads(1)  # the loop's many small operations
    judge(row, row.make_plain_loop, dtype, row.settings["all"], LARGE_SIZES, 8, seeds=(4,))


@each_wide
@each_row
def test_many_steps(row, dtype):
    options = row.kept({"lr": 0.01, "weight_decay": 0.1})
    judge(row, row.make_plain_loop, dtype, options, (301,), 200, seeds=(5,))


@pytest.mark.parametrize("row, options", SETTINGS)
def test_formula_is_torchs(row, options):
    """The formulas of the judge are torch's loop in float64: what they say of trainopt's own options counts."""
    start, *gradients = (in_one_piece(row, options, x) for x in problem(SIZES, torch.float64, STEPS, (6,)))
    torchs = result_of(row.make_plain_loop, start, gradients, **options)
    formula = result_of(row.make_formula, start, gradients, **options)
    assert torchs.keys() == formula.keys()
    for name in torchs:
        for a, b in zip(torchs[name], formula[name], strict=True):
            # A float32 learning rate is rounded to float32 again in what torch makes of it.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 if "lr" in options else 1e-12)


@pytest.mark.parametrize("row, options", SETTINGS + EXTRAS)
def test_option_changes_something(row, options):
    """Every row of the table is worth its place: without its options the result is another."""
    start, gradients = random_problem((64,), torch.float32, STEPS, 7)
    found = result_of(row.make, start, gradients, **options)["param"][0]
    nothing_but = {name for name in options if name not in row.changes_nothing}
    for name in nothing_but - {"lr"} or nothing_but:
        if name == "l1_proximal":
            continue  # without l1 it says nothing
        without = {key: value for key, value in options.items() if key != name}
        if name == "momentum":
            without.pop("nesterov", None)  # has no sense alone
        if name in DECOUPLING:
            without.pop("cautious_weight_decay", None)  # nor has this
        other = result_of(row.make, start, gradients, **without)["param"][0]
        assert (other - found).abs().max() > 1e-5, f"{name} changes nothing"


@each_row
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("value", [True, False, None])
def test_flags_of_speed_change_nothing(row, flag, value):
    start, gradients = random_problem(SIZES, torch.float32, 3, 8)
    plain = result_of(row.make, start, gradients, **row.everything)
    assert_same_bits(plain, result_of(row.make, start, gradients, **row.everything, **{flag: value}))


@each_16_bit
@pytest.mark.parametrize("row, options", SETTINGS + EXTRAS)
def test_sixteen_bits_are_rounded_once(row, options, dtype):
    """Each step is the formula on what was stored, in at least float32, and one rounding of each result."""
    start, gradients = random_problem((17, 1003), dtype, 8, 9)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = row.make(params, **options)
    for step, now in enumerate(gradients, start=1):
        before = [(p.detach().double(), state_of(optimizer, p, row)) for p in params]
        for p, g in zip(params, now, strict=True):
            p.grad = g
        operands = [(old, g.double(), state) for (old, state), g in zip(before, now, strict=True)]
        with_numbers = options_now(row, operands, options, optimizer)
        optimizer.step()
        for (old, state), p, g in zip(before, params, now, strict=True):
            new = formula_step(row, old, g.double(), state, with_numbers, step)
            # float32 arithmetic comes close to, not upon, the middle between two 16-bit numbers.
            slack = 4e-6 * (old.abs() + new.abs() + 0.1)
            if (undecided := take_undecided(torch.finfo(torch.float32).eps, g)) is not None:
                slack[undecided] = float("inf")
                if options.get("cautious"):  # one more or less counts in what all are divided by
                    slack += 4 * (new - old).abs() * undecided.double().mean()
            assert_one_rounding(p.detach(), new, slack, "param")
            for name, exact in state.items():
                scale = exact.abs() + g.double().abs() + old.abs() + 0.1
                slack = 1e-6 * scale * (scale if "sq" in name else 1)
                assert_one_rounding(optimizer.state[p][name], exact, slack, name)


@each_16_bit
@pytest.mark.parametrize("layout", ["run", "transposed"])
def test_ties_go_to_the_even_neighbour(dtype, layout, variant):
    """p + g with g half a unit in the last place of p, and odd multiples of it."""
    half = torch.finfo(dtype).eps / 2
    p, g = torch.meshgrid(torch.arange(128) * 2 * half + 1, (torch.arange(128) * 2 - 127) * half, indexing="ij")
    p, g = p.to(dtype), g.to(dtype)
    assert torch.equal(p.float() + g.float(), (p.double() + g.double()).float())
    q = p.clone().requires_grad_()
    q.grad = g.t().contiguous().t() if layout == "transposed" else g.contiguous()
    TABLE["SGD"].make([q], lr=1.0, maximize=layout == "transposed").step()
    expected = p.float() + g.float() if layout == "transposed" else p.float() - g.float()
    assert torch.equal(q.detach(), expected.to(dtype))


def state_of(optimizer, param, row):
    return row.held(optimizer.state.get(param, {}))


# Groups ---------------------------------------------------------------------------------------------------------------


@each_row
def test_groups_have_values_of_their_own(row):
    """Groups of one optimizer step as optimizers of their own do, whatever the neighbour's options are."""
    if row.in_common is not None:
        pytest.skip("its groups have numbers in common: test_prodigy.py")
    choices = [*row.settings.values(), *row.extras.values()]
    choices = [options for options in choices if not options.keys() & {*row.unread_in_groups}]
    sizes = [size for size in (1, 17, 300) for _ in choices]
    start, gradients = random_problem(sizes, torch.float32, 4, 10)
    start[1], start[4] = start[1].double(), start[4].bfloat16()
    params = [torch.nn.Parameter(p.clone()) for p in start]
    members = [params[i :: len(choices)] for i in range(len(choices))]
    together = row.make([{"params": m, **options} for m, options in zip(members, choices, strict=True)])
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.dtype)
        together.step()
    for i, options in enumerate(choices):
        alone, alone_params = run(
            row.make, start[i :: len(choices)], [now[i :: len(choices)] for now in gradients], **options
        )
        for p, q in zip(members[i], alone_params, strict=True):
            assert torch.equal(p, q), options
            for name in row.states:
                if name in alone.state[q]:
                    assert torch.equal(together.state[p][name], alone.state[q][name]), (options, name)


# Extremes -------------------------------------------------------------------------------------------------------------


def pattern(x):
    return torch.where(x.isnan(), 3, torch.where(x.isinf(), x.sign(), 0))


def assert_same_pattern(ours, torchs):
    assert ours.keys() == torchs.keys()
    for name in torchs:
        for a, b in zip(ours[name], torchs[name], strict=True):
            wrong = (pattern(a) != pattern(b)).nonzero()
            assert len(wrong) == 0, f"{name}{wrong[0].tolist()}: {a[tuple(wrong[0])]}, torch's {b[tuple(wrong[0])]}"
            # Only next to the smallest and the largest numbers is what comes of a rounding more than a few bits.
            finite = b.isfinite() & (b.abs() > 1e-30)
            torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-30)


SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-38, 1e-42, 1e-45, 1e15, 5e19, -5e19, 1e30, -1e30, 3e38)
SPECIAL_NONFINITE = (*SPECIAL, float("inf"), -float("inf"), float("nan"))

EXTREMES = {
    "plain": {},
    "lr 1e-20": {"lr": 1e-20},
    "lr 0": {"lr": 0.0},
    "lr 3e30": {"lr": 3e30},
    "eps 0": {"eps": 0.0},
    "eps 0, lr 1e-20": {"eps": 0.0, "lr": 1e-20},
    "eps 1e-45": {"eps": 1e-45},
    "amsgrad": {"amsgrad": True},
    "amsgrad, eps 0": {"amsgrad": True, "eps": 0.0},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 1e-20},
    "betas 0": {"betas": (0.0, 0.0)},
    "betas 0, eps 0": {"betas": (0.0, 0.0), "eps": 0.0},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


def betas_of(row, options):
    """As many as it has; the first of them is not 0 where a parameter is a mean."""
    if "betas" not in options:
        return {}
    first = (0.5,) if row.averages else options["betas"][:1]
    return {"betas": first + options["betas"][:1] * (len(row.defaults["betas"]) - 1)}


#: Where infinities of both signs meet, or not, by the order of operations: torch adds NAdam's two quotients by a root
#: of 0, and multiplies and adds at once what overflows in ASGD.
BY_ORDER = {("NAdam", "eps 0"), ("ASGD", "lr 3e30")}
EXTREME_CASES = [
    pytest.param(row, {**options, **betas_of(row, options)}, id=f"{name}-{key}")
    for name, row in TABLE.items()
    for key, options in EXTREMES.items()
    if options.keys() <= row.defaults.keys() and (name, key) not in BY_ORDER
    if not ("eps" in options and isinstance(row.defaults["eps"], tuple))
]


@each_wide
@pytest.mark.parametrize("row, extreme", EXTREME_CASES)
def test_extremes_give_torchs_pattern(row, extreme, dtype):
    if row.factors and dtype == torch.float32:
        pytest.skip("torch's norm of a parameter overflows in float32")
    value = torch.tensor(SPECIAL_NONFINITE, dtype=dtype)
    start = [torch.tensor(SPECIAL, dtype=dtype).repeat_interleave(len(value))]
    gradients = [[g.repeat(len(SPECIAL))] for g in (value, value.flip(0), torch.ones_like(value))]
    assert_same_pattern(
        result_of(row.make, start, gradients, **extreme),
        result_of(row.make_plain_loop, start, gradients, **extreme),
    )


@each_dtype
@pytest.mark.parametrize("late", [1e7, 2.0**24, 1e12])
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.ours._counts_steps])
def test_late_steps(name, late, dtype):
    """A step count in the millions, and one that float32 can no longer count on."""
    row = TABLE[name]
    start, gradients = random_problem((1000,), dtype, 3, 11)
    early, params = run(row.make, start, gradients)
    saved = early.state_dict()
    saved["state"][0]["step"].fill_(late)
    found = {}
    for kind, make in {"ours": row.make, "torchs": row.make_plain_loop, "truth": row.make_plain_loop}.items():
        q = params[0].detach().clone().to(torch.float64 if kind == "truth" else dtype).requires_grad_()
        optimizer = make([q])
        optimizer.load_state_dict(copy.deepcopy(saved))  # torch's would share the tensors
        for g in gradients:
            q.grad = g[0].to(q.dtype)
            optimizer.step()
        assert optimizer.state[q]["step"].isfinite()
        states = [name for name in row.states[:2] if name in saved["state"][0]]
        found[kind] = {"param": [q.detach()], **{name: [optimizer.state[q][name]] for name in states}}
    in_common = row.in_common is not None
    assert_no_worse(found["ours"], found["torchs"], found["truth"], dtype, None, row.roundings, in_common)


@each_row
def test_all_gradients_zero(row):
    start, gradients = random_problem((33,), torch.float32, 3, 12)
    zeros = [[torch.zeros_like(g) for g in now] for now in gradients]
    found = result_of(row.make, start, zeros, **row.kept({"weight_decay": 0.0, "lambd": 0.0}))
    assert torch.equal(found["param"][0], start[0])


@each_dtype
@pytest.mark.parametrize("plain", [False, True], ids=["engine", "plain step"])
def test_the_sign_of_a_zero_is_zero_and_of_a_nan_a_nan(plain, dtype, variant):
    """Lion moves by lr for the smallest gradient, by nothing for either zero, and hides no NaN."""
    tiny, inf, nan = torch.finfo(dtype).tiny, float("inf"), float("nan")
    gradient = torch.tensor([nan, 0.0, -0.0, inf, -inf, 8 * tiny, -8 * tiny, 3.0] * 9, dtype=dtype)
    moved = torch.tensor([nan, 0.0, 0.0, 0.5, -0.5, 0.5, -0.5, 0.5] * 9, dtype=dtype)
    row = TABLE["Lion"]
    for value in (1.0, 0.0, -0.0):
        start = torch.full_like(gradient, value)
        _, (p,) = run(row.make_plain_loop if plain else row.make, [start], [[gradient]], lr=0.5, betas=(0.5, 0.5))
        expected = torch.where(moved == 0, start, start - moved)
        assert_same_bits({"param": [p.detach()]}, {"param": [expected]}, any_nan=True)
