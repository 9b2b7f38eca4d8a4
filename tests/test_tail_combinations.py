"""Any combination of what surrounds a step and of how things are stored, against separate passes in float64.

Each step begins with what the optimizer has stored, decoded. What it stores then is what its format makes of the
passes' result, give or take the rounding errors of the arithmetic before.
"""

import math

import torch
from formulas import SeparatePasses
from helpers import assert_same_bits, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DTYPES, TABLE, assert_one_rounding, random_values, spacing

import trainopt
from trainopt._extension import _C
from trainopt.optim import code8, precision

SHAPES = ((), (1,), (7,), (0, 3), (5, 4), (300,))
#: Enough for 8 bits, and ends within a block.
LARGE = (17, 250)
#: Each alone is judged elsewhere; here they meet. What only a device or torch's path does with them is not asked.
#: These are options of the formula too,
OF_THE_FORMULA = {
    "l1": st.sampled_from([0.0, 0.7]),
    "l1_proximal": st.booleans(),
    "cautious_weight_decay": st.booleans(),  # where decay is decoupled
}
#: these are passes of their own,
TAIL = {
    "max_grad_norm": st.sampled_from([0.01, 3.0, 1e9]),
    "ema_decay": st.sampled_from([0.0, 0.5, 0.99]),
    "ema_warmup": st.booleans(),
    "zero_grad": st.just("in_step"),
    "skip_nonfinite": st.just(True),
    "noise": st.sampled_from([0.01, 1.0]),
}
#: and these say what is stored.
PRECISIONS = st.sampled_from(["native", "master", "master24", "stochastic"])
STATES = st.sampled_from(["8bit", "float32", "bfloat16", "float16"])
#: The tables judge them: Adadelta squares what it has divided, and so what is lost in a difference; of the others a
#: state follows the parameter, or a number all of them.
APART = {"Adadelta"} | {
    name for name, row in TABLE.items() if row.averages or row.settle or row.in_common or row.factors
}


@st.composite
def combinations(draw):
    name, dtype = draw(st.sampled_from(sorted(TABLE.keys() - APART))), draw(st.sampled_from(DTYPES))
    row = TABLE[name]
    drawn = draw(st.sampled_from([row.usual, row.everything, *row.settings.values(), *row.extras.values()]))
    # A learning rate that is a float32 tensor makes torch, and so the engine, round what follows from it to float32.
    options = {key: value for key, value in drawn.items() if key not in ("foreach", "fused", "noise")}
    options = {key: value for key, value in options.items() if not isinstance(value, torch.Tensor)}
    if name == "RMSprop":  # it divides by what may be a difference of near numbers, and sums up what it has divided
        options = {key: value for key, value in options.items() if key not in ("momentum", "centered")}
    options |= draw(st.fixed_dictionaries({}, optional=OF_THE_FORMULA))
    if not {**row.defaults, **options}.get("decoupled_weight_decay", row.decoupled):
        options.pop("cautious_weight_decay", None)
    tail = draw(st.fixed_dictionaries({}, optional=TAIL))
    if "ema_decay" not in tail:
        tail.pop("ema_warmup", None)
    storage = {"precision": draw(PRECISIONS)}
    if dtype == torch.float16 and storage["precision"] == "master24":
        storage["precision"] = "master"
    if dtype != torch.float64:
        by_name = st.dictionaries(st.sampled_from(row.states), STATES, min_size=1)
        storage["state_dtype"] = draw(st.one_of(st.none(), st.just("8bit"), STATES, by_name))
    scale = draw(st.sampled_from([None, 0.25, 1024.0]))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2))
    if "8bit" in str(storage):
        shapes.append(LARGE)
    can_overflow = scale is not None or "skip_nonfinite" in tail
    overflows = draw(st.sets(st.integers(0, 3), max_size=2)) if can_overflow else set()
    octaves = draw(st.sampled_from([0, 8 if dtype == torch.float16 else 16]))
    return name, dtype, options, tail, storage, scale, shapes, overflows, octaves, draw(st.integers(0, 99))


# What is stored -------------------------------------------------------------------------------------------------------


def value_of(param, state):
    value = precision.value_of(param, state) if "master" in state else param.detach()
    return value.to(torch.float64, copy=True)


def decoded(state, name, is_unsigned):
    value = state[name]
    if value.dtype == torch.uint8:
        value = code8.decode(value, state[name + "_scale"], is_unsigned)
    return value.to(torch.float64, copy=True)


def dtype_of(state_dtype, name, param):
    chosen = state_dtype.get(name) if isinstance(state_dtype, dict) else state_dtype
    if chosen == "8bit":
        return torch.uint8 if param.numel() >= 4096 else torch.float32
    return getattr(torch, chosen) if chosen else param.dtype


def to_parameter(chosen, param, seed, step, index):
    """What a parameter is rounded by. As all such it never falls."""
    if chosen == "native" or param.dtype not in (torch.bfloat16, torch.float16):
        return to(param.dtype)
    if chosen == "master":
        return to(torch.float32)
    if chosen == "master24":
        return lambda x: (x / spacing(x, param.dtype) * 256).round() / 256 * spacing(x, param.dtype)
    words = torch.empty(param.shape, dtype=torch.int16)
    _C.rounding_bits_(words, seed, step, index)
    bits = 16 if param.dtype == torch.bfloat16 else 13  # that a float32 has more
    random = (words.int() & 0xFFFF).div(2 ** (16 - bits), rounding_mode="floor") / 2**bits
    return lambda x: ((x.abs() / spacing(x, param.dtype) + random).floor() * spacing(x, param.dtype)).copysign(x)


def to(dtype):
    return lambda x: x.to(dtype).double()


def blocks(x):
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)


def to_codes(scale, is_unsigned, rounding):
    """What numbers are rounded by in blocks of these scales: to the number of the code, below 0 for those below 0."""
    top = 255 if is_unsigned else 127
    every_code = torch.arange(256, dtype=torch.uint8).repeat(len(scale))
    numbers = code8.decode(every_code, scale, is_unsigned).view(-1, 256)[:, : top + 1].double()

    def rounded(x):
        rows = blocks(x)
        size = rows.clamp(min=0) if is_unsigned else rows.abs()
        below = (torch.searchsorted(numbers, size) - 1).clamp(0, top - 1)
        low, high = numbers.gather(1, below), numbers.gather(1, below + 1)
        place = below + torch.where(high > low, (size - low) / (high - low), 0.0)
        if is_unsigned:  # what is divided by is never rounded to 0
            place = place.maximum((size > 0).double())
        code = (place.clamp(max=top) + rounding + 0.5).floor() * rows.sign()
        return code.flatten()[: x.numel()].view(x.shape)

    return rounded


def assert_rounded(found, exact, slack, rounded, what):
    """`found` is what `rounded` makes of a number that is no further than `slack` from `exact`."""
    low, high = rounded(exact - slack), rounded(exact + slack)
    wrong = (found < low) | (found > high) | found.isnan()
    assert not wrong.any(), (what, found[wrong][:3], exact[wrong][:3], low[wrong][:3], high[wrong][:3])


# A run ----------------------------------------------------------------------------------------------------------------


def gaussian(shape, seed, step, index):
    noise = torch.empty(shape)
    _C.gaussian_(noise, seed, step, index)
    return noise.double()


class Judge(SeparatePasses):
    """Separate passes that begin each step with what an optimizer holds, and look at what it has made of it."""

    def __init__(self, row, dtype, options, tail, storage, optimizer, params, seed):
        passes = {key: value for key, value in tail.items() if key not in ("skip_nonfinite", "noise")}
        plain = [torch.nn.Parameter(p.detach().double()) for p in params]
        super().__init__(row.make_formula(plain, **options), plain, **passes)
        self.row, self.of_noise, self.storage, self.seed = row, tail.get("noise", 0.0), storage, seed
        self.optimizer, self.judged = optimizer, list(params)
        of_all = {**row.defaults, **options}
        is_decoupled = of_all.get("decoupled_weight_decay", row.decoupled)
        self.lr, self.is_cautious = of_all["lr"], of_all["cautious"]
        # What of a parameter goes into the gradient.
        decay = 0 if is_decoupled else of_all.get("weight_decay", 0)
        self.pull = (0 if of_all["l1_proximal"] else of_all["l1"]) + decay
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        self.plain.eps, self.unit = eps, max(8 * eps, 1e-12)  # 1 - beta^t loses a few digits of a float64

    def take(self):
        """Begins where the optimizer is."""
        for i, (p, q) in enumerate(zip(self.judged, self.params, strict=True)):
            state = self.optimizer.state.get(p, {})
            q.data = value_of(p, state)
            names = [name for name in self.row.states if state.get(name) is not None]
            self.plain.state[q] = {name: decoded(state, name, self.is_unsigned(name)) for name in names}
            self.plain.state[q] |= {name: state[name].clone() for name in self.row.numbers if name in state}
            if "ema" in state:
                self.averages[i] = state["ema"].to(torch.float64, copy=True)
            self.plain.undecided[q] = torch.zeros_like(q, dtype=torch.bool)
        self.before = [
            {"param": q.detach().clone(), "ema": average.clone(), **self.plain.state[q]}
            for q, average in zip(self.params, self.averages, strict=True)
        ]

    def is_unsigned(self, name):
        return name in self.row.ours._unsigned

    def noise(self, step):
        return [self.of_noise * gaussian(p.shape, self.seed, step, i) for i, p in enumerate(self.params)]

    def store(self):
        """Looks at parameters and states; what follows is of the parameters as they are stored."""
        noises = self.noise(self.steps)
        for i, (p, q, noise, before) in enumerate(zip(self.judged, self.params, noises, self.before, strict=True)):
            if not p.numel():
                continue
            state = self.optimizer.state.get(p, {})
            # Of the gradient, with what is added to it and may cancel it; of nothing, nothing.
            off = self.unit * (q.grad.abs() + self.pull * (1 + before["param"].abs()))
            off[(q.grad == 0) & (before["param"] == 0)] = 0.0
            for name, exact in self.plain.state[q].items():
                slack = self.slack_of(exact, before.get(name, torch.zeros(())), off, self.is_unsigned(name))
                self.compare_state(p, state, name, exact, slack)
            found = value_of(p, state)
            assert_one_rounding(p, found, torch.zeros(()), "param beside what completes it")
            rounded = to_parameter(self.storage["precision"], p, self.seed, self.steps, i)
            undecided = self.plain.undecided[q]
            assert undecided.double().mean() < 0.1 or p.numel() < 100
            change = (q - noise - before["param"]).abs()  # which noise may cancel in the sum
            slack = self.unit * (before["param"].abs() + q.abs() + change.amax())
            if self.is_cautious:  # one more or less counts in what all updates are divided by
                slack += change * undecided.sum() * max(4 / p.numel(), p.numel() < 100)
            for name, root in (("exp_avg_sq", True), ("square_avg", True), ("sum", True), ("exp_inf", False)):
                if name in state:  # which the update is divided by, or its root
                    divisor = self.plain.state[q][name]
                    slack += self.lr * torch.where(off > 0, off / (divisor.sqrt() if root else divisor), 0.0)
            assert_rounded(torch.where(undecided, rounded(q), found), q, slack, rounded, "param")
            q.copy_(found)

    def slack_of(self, exact, before, off, is_square):
        """How far arithmetic may be off in a state where the gradient is as far off as this."""
        if is_square:
            return self.unit * exact + (2 * exact.sqrt() + off) * off
        return self.unit * (before.abs() + exact.abs() + (exact - before).abs()) + off

    def compare_state(self, p, state, name, exact, slack):
        stored = state[name]
        if name in self.row.numbers:
            return torch.testing.assert_close(stored.double(), exact.double(), rtol=self.unit, atol=0)
        assert stored.dtype == dtype_of(self.storage.get("state_dtype"), name, p)
        if stored.dtype != torch.uint8:
            assert_rounded(stored.double(), exact, slack, to(stored.dtype), name)
            return
        scale, is_unsigned = state[name + "_scale"], self.is_unsigned(name)
        code = stored.int() if is_unsigned else (stored.int() & 127) * (1 - 2 * (stored.int() >> 7))
        rounded = to_codes(scale, is_unsigned, code8.rounding_at(self.steps) if is_unsigned else 0.0)
        assert_rounded(code.double(), exact, slack + 2e-6 * exact.abs(), rounded, name)
        largest, truth, slack = (blocks(x).abs().amax(1) for x in (decoded(state, name, is_unsigned), exact, slack))
        assert ((largest - truth).abs() <= slack + 1e-6 * truth).all(), (name, largest, truth)

    def look_at_average(self):
        for p, average, before in zip(self.judged, self.averages, self.before, strict=True):
            stored = self.optimizer.state.get(p, {}).get("ema")
            assert (stored is None) == (self.decay is None)
            if stored is not None and p.numel():
                assert stored.dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
                slack = self.unit * (average.abs() + (average - before["ema"]).abs())
                assert_rounded(stored.double(), average, slack, to(stored.dtype), "ema")


@settings(max_examples=200, deadline=None)
@given(combinations())
def test_any_combination_is_its_separate_passes(combination):
    name, dtype, options, tail, storage, scale, shapes, overflows, octaves, seed = combination
    row = TABLE[name]
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(random_values(shape, dtype, generator)) for shape in shapes]
    optimizer = row.make(params, **options, **tail, **storage, seed=seed)
    judge = Judge(row, dtype, options, tail, storage, optimizer, params, seed)
    for step in range(4):
        overflow = step in overflows and any(p.numel() for p in params)
        for p, q in zip(params, judge.params, strict=True):
            if "zero_grad" in tail and p.grad is not None:
                assert not p.grad.any()
            spread = torch.randint(-octaves, 1, p.shape, generator=generator)
            gradient = random_values(p.shape, dtype, generator) * torch.exp2(spread.to(dtype))
            p.grad, q.grad = gradient * (scale or 1.0), gradient.double()
        if overflow:
            next(p for p in params if p.numel()).grad.view(-1)[0] = math.inf
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(overflow))
        before = snapshot(optimizer)
        judge.take()
        optimizer.step()
        assert optimizer.last_step_skipped == overflow
        if overflow:
            assert_same_bits(before, snapshot(optimizer))
            continue
        judge.step()
        judge.look_at_average()
        if "max_grad_norm" in tail:
            torch.testing.assert_close(optimizer.grad_norm.double(), judge.norm, rtol=judge.unit, atol=0)
    assert {each.path.split(" ")[0] for each in trainopt.explain(optimizer)} == {"fused"}
