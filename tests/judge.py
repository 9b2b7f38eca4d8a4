"""The judge of the optimizers' numbers, and the table of what it judges.

The truth is the computation in float64: by torch's plain loop (foreach=False, fused=False), never by torch's fused
step, which is wrong on the CPU in known cases; for an optimizer that torch does not have, by the plain step beside its
class; and for what trainopt adds to torch, by the formula (formulas.py). A result is right when its distance to the
truth is no larger than that of the same plain computation in the same dtype: torch's own error, or the formula's.

A new optimizer is a row of `TABLE`; every test that goes over the table then has it.
"""

import copy
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from devices import VARIANTS
from formulas import (
    FormulaOptimizer,
    adadelta,
    adam,
    adamax,
    formula_step,
    lamb,
    lars,
    lion,
    radam,
    rmsprop,
    sgd,
    take_undecided,
)

import trainopt
from trainopt import switches
from trainopt._extension import _C

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Lanes of a vector: 2, 4 and 8 of float64, 4, 8 and 16 of float32. Sizes at and around each, and around a chunk of 256.
WIDTHS = (2, 4, 8, 16)
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 511)
LARGE_SIZES = (65_535, 65_536, 65_537)

Tensors = list[torch.Tensor]
Formula = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any], int], torch.Tensor]


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One optimizer.

    `settings` are options of torch's class, judged against torch's loop (or the plain step); `extras` are trainopt's
    own, judged against the formula. Each computes something else than the defaults do, but for those of
    `changes_nothing`.
    """

    ours: Any
    formula: Formula
    settings: dict[str, dict[str, Any]]
    extras: dict[str, dict[str, Any]]
    usual: dict[str, Any]  # what most users set: torch's own options, which the engine has a shorter way for
    everything: dict[str, Any]  # every stage and state at once
    decoupled: bool = False  # weight decay, of a class without an option for it
    decays_itself: bool = False  # the formula has weight decay in it
    changes_nothing: tuple[str, ...] = field(default=("foreach", "fused"))

    @property
    def states(self) -> tuple[str, ...]:
        return self.ours._states

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        return {**self.ours.EXTRAS, **self.ours([torch.nn.Parameter(torch.ones(1))]).defaults}

    @property
    def has_sums(self) -> bool:
        """Whether an element's step depends on the whole tensor."""
        return bool(_C.rules()[self.ours._rule].sums)

    @property
    def has_torchs_fused(self) -> bool:
        """Whether `fused` is an option of torch's class, or of ours that torch does not have."""
        return "fused" not in self.ours.EXTRAS

    def kept(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of these options that it has."""
        return {name: value for name, value in options.items() if name in self.defaults}

    def takes_signs(self, options: dict[str, Any]) -> bool:
        """Whether the formula calls `sign` with these options."""
        one = torch.ones(1, dtype=torch.float64)
        formula_step(self, one, one, {}, options, 1)
        return take_undecided(0.0, one) is not None

    @functools.cached_property
    def peer(self) -> Any:
        """torch's class; of an optimizer that torch does not have, the class by its plain step."""
        return self.ours._torch_class or by_plain_step(self.ours)

    def make(self, params, **options):
        return self.ours(params, **options)

    def make_plain_loop(self, params, **options):
        flags = {"foreach": False, "fused": False}
        if self.has_torchs_fused:
            return self.peer(params, **{**options, **flags})
        return self.peer(params, **{key: value for key, value in {**options, **flags}.items() if key != "fused"})

    def make_formula(self, params, **options):
        return FormulaOptimizer(self, params, options)


def by_plain_step(cls):
    class Plain(cls):
        def step(self, closure=None):
            with mock.patch.object(switches, "REFERENCE_FORCED", True):
                return super().step(closure)

    return Plain


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


LR32, LR64 = torch.tensor(0.03), float64(0.03)

# Settings and extras that several optimizers share; where one needs another value to show the option, its row says so.

PLAIN = {
    "default": {},
    "lr": {"lr": 0.05},
    "lr float32 tensor": {"lr": LR32},
    "lr float64 tensor": {"lr": LR64},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
DECAY = {
    "weight_decay": {"lr": 0.02, "weight_decay": 0.4},
    "maximize, weight_decay": {"lr": 0.02, "maximize": True, "weight_decay": 0.4},
}
BETAS = {
    "beta1 0": {"lr": 0.02, "betas": (0.0, 0.95)},
    "beta1 0.3": {"lr": 0.02, "betas": (0.3, 0.95)},
    "beta2 0": {"lr": 0.02, "betas": (0.9, 0.0), "eps": 0.1},
}
MOMENTS = {
    **BETAS,
    "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.8), float64(0.9))},
    "eps": {"lr": 0.02, "eps": 0.3},
}
# torch computes the bias correction of a float32 beta in float32: the formula is the better truth.
FLOAT32_BETAS = {"betas float32 tensors": {"lr": 0.02, "betas": (torch.tensor(0.8), torch.tensor(0.9))}}
L1 = {
    "l1": {"lr": 0.02, "l1": 0.7},
    "l1, maximize": {"lr": 0.02, "l1": 0.7, "maximize": True},
    "l1_proximal": {"lr": 0.02, "l1": 2.0, "l1_proximal": True},
}

CAUTIOUS = {
    "cautious": {"lr": 0.02, "cautious": True},
    "cautious, weight_decay, l1": {"lr": 0.02, "cautious": True, "weight_decay": 0.4, "l1": 0.2, "maximize": True},
}
CAUTIOUS_DECAY = {
    "cautious_weight_decay": {"lr": 0.02, "cautious_weight_decay": True, "weight_decay": 0.4},
    "both cautious": {"lr": 0.02, "cautious_weight_decay": True, "cautious": True, "weight_decay": 0.4},
}

BETAS_AND_DECAY = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3}
DECAY_AND_L1 = {"lr": 0.02, "weight_decay": 0.3, "l1": 0.5, "l1_proximal": True}
NESTEROV_AND_L1 = {**DECAY_AND_L1, "momentum": 0.9, "nesterov": True, "maximize": True}

ADAM_SETTINGS = {
    **PLAIN,
    **MOMENTS,
    "beta1 0.5": {"lr": 0.02, "betas": (0.5, 0.95)},
    "beta1 0.7": {"lr": 0.02, "betas": (0.7, 0.95)},
    "beta2 0.2": {"lr": 0.02, "betas": (0.9, 0.2)},
    **DECAY,
    "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
    "weight_decay, lr float64 tensor": {"lr": LR64, "weight_decay": 0.3},
    "amsgrad": {"lr": 0.02, "betas": (0.9, 0.5), "amsgrad": True},
    "maximize": {"lr": 0.02, "maximize": True},
    "all": {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-2, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
}
ADAM_EXTRAS = {
    **FLOAT32_BETAS,
    "bias_correction": {"lr": 0.02, "bias_correction": False},
    "bias_correction, beta1 0": {"lr": 0.02, "betas": (0.0, 0.9), "bias_correction": False},
    "bias_correction, amsgrad": {"lr": 0.02, "betas": (0.7, 0.5), "bias_correction": False, "amsgrad": True},
    **L1,
    **CAUTIOUS,
    "l1, weight_decay": {"lr": 0.02, "l1": 0.7, "weight_decay": 0.5},
    "l1_proximal, maximize": {"lr": 0.02, "l1": 2.0, "l1_proximal": True, "maximize": True},
    "all": {**ADAM_SETTINGS["all"], "bias_correction": False, "l1": 1.5, "l1_proximal": True},
}
ADAM_EVERYTHING = {**DECAY_AND_L1, "amsgrad": True}

TABLE = {
    "SGD": Row(
        ours=trainopt.SGD,
        formula=sgd,
        settings={
            **PLAIN,
            **DECAY,
            "maximize": {"lr": 0.02, "maximize": True},
            "momentum": {"lr": 0.02, "momentum": 0.9},
            "momentum, lr float32 tensor": {"lr": LR32, "momentum": 0.9},
            "momentum 0.4, weight_decay": {"lr": 0.02, "momentum": 0.4, "weight_decay": 0.4},
            "dampening": {"lr": 0.02, "momentum": 0.9, "dampening": 0.3},
            "dampening, weight_decay": {"lr": 0.02, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.4},
            "nesterov": {"lr": 0.02, "momentum": 0.9, "nesterov": True},
            "all": {"lr": 0.02, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.3, "maximize": True},
        },
        extras={
            **L1,
            **{key: {**options, "momentum": 0.9} for key, options in CAUTIOUS.items()},
            "l1, momentum, weight_decay": {"lr": 0.02, "l1": 0.7, "momentum": 0.9, "weight_decay": 0.5},
            "l1_proximal, nesterov": {"lr": 0.02, "l1": 2.0, "l1_proximal": True, "momentum": 0.9, "nesterov": True},
            "l1_proximal, maximize": {"lr": 0.02, "l1": 2.0, "l1_proximal": True, "maximize": True},
        },
        usual={"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "nesterov": True},
        everything=NESTEROV_AND_L1,
    ),
    "Adam": Row(
        ours=trainopt.Adam,
        formula=adam,
        settings={
            **ADAM_SETTINGS,
            "decoupled_weight_decay": {"lr": 0.02, "weight_decay": 0.4, "decoupled_weight_decay": True},
        },
        extras=ADAM_EXTRAS,
        usual=BETAS_AND_DECAY,
        everything=ADAM_EVERYTHING,
    ),
    "AdamW": Row(
        ours=trainopt.AdamW,
        formula=adam,
        settings={**ADAM_SETTINGS, "no weight_decay": {"weight_decay": 0.0}},
        extras={**ADAM_EXTRAS, **CAUTIOUS_DECAY},
        usual=BETAS_AND_DECAY,
        everything=ADAM_EVERYTHING,
    ),
    "Lion": Row(
        ours=trainopt.Lion,
        formula=lion,
        decoupled=True,
        settings={
            **PLAIN,
            "beta1 0": {"lr": 0.02, "betas": (0.0, 0.5)},
            "beta2 0": {"lr": 0.02, "betas": (0.6, 0.0)},
            "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.7), float64(0.8))},
            **DECAY,
            "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
            "all": {"lr": 0.02, "betas": (0.6, 0.7), "weight_decay": 0.3, "maximize": True},
        },
        extras={
            **L1,
            **CAUTIOUS,
            **CAUTIOUS_DECAY,
            "l1_proximal": {"lr": 0.02, "l1": 0.5, "l1_proximal": True},
            "all": {"lr": 0.02, "betas": (0.6, 0.7), "weight_decay": 0.3, "maximize": True, "l1": 0.4},
        },
        usual=BETAS_AND_DECAY,
        everything={**DECAY_AND_L1, "maximize": True},
    ),
    "LAMB": Row(
        ours=trainopt.LAMB,
        formula=lamb,
        decays_itself=True,
        settings={
            **PLAIN,
            **MOMENTS,
            **DECAY,
            "no weight_decay": {"lr": 0.02, "weight_decay": 0.0},
            "always_adapt": {"lr": 0.02, "weight_decay": 0.0, "always_adapt": True},
            "trust_clip": {"lr": 0.02, "trust_clip": True},
            "all": {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-2, "weight_decay": 0.3, "maximize": True},
        },
        extras={
            **FLOAT32_BETAS,
            "bias_correction": {"lr": 0.02, "betas": (0.9, 0.99), "bias_correction": False},
            **L1,
            **CAUTIOUS,
            "all": {"lr": 0.02, "betas": (0.6, 0.7), "weight_decay": 0.3, "l1": 0.4, "bias_correction": False},
        },
        usual=BETAS_AND_DECAY,
        everything={**DECAY_AND_L1, "maximize": True},
    ),
    "LARS": Row(
        ours=trainopt.LARS,
        formula=lars,
        decays_itself=True,
        settings={
            **PLAIN,
            "lr float32 tensor": {"lr": LR32, "weight_decay": 0.1},
            "lr float64 tensor": {"lr": LR64, "weight_decay": 0.1},
            "weight_decay": {"lr": 2.0, "weight_decay": 0.4},
            "always_adapt": {"lr": 2.0, "always_adapt": True},
            "trust_coeff": {"lr": 2.0, "weight_decay": 0.1, "trust_coeff": 0.02},
            "eps": {"lr": 2.0, "weight_decay": 0.1, "eps": 0.5, "trust_coeff": 0.02},
            "trust_clip": {"lr": 0.02, "weight_decay": 0.1, "trust_clip": True, "trust_coeff": 0.01},
            "maximize, weight_decay": {"lr": 2.0, "maximize": True, "weight_decay": 0.4, "trust_coeff": 0.02},
            "momentum": {"lr": 2.0, "momentum": 0.9, "weight_decay": 0.1},
            "dampening": {"lr": 2.0, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
            "nesterov": {"lr": 2.0, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
            "all": dict(lr=0.5, momentum=0.7, dampening=0.2, weight_decay=0.3, trust_coeff=0.1, maximize=True),
        },
        extras={
            **L1,
            "cautious": dict(lr=0.5, momentum=0.9, weight_decay=0.5, trust_coeff=0.1, cautious=True),
            "l1, momentum, weight_decay": dict(lr=0.5, l1=0.7, momentum=0.9, weight_decay=0.5, trust_coeff=0.1),
            "l1_proximal": {"lr": 0.02, "l1": 2.0, "l1_proximal": True, "weight_decay": 0.1},
        },
        usual={"lr": 0.5, "momentum": 0.9, "weight_decay": 0.3, "nesterov": True, "trust_coeff": 0.1},
        everything={**NESTEROV_AND_L1, "trust_coeff": 0.1},
    ),
}

TABLE |= {
    "RMSprop": Row(
        ours=trainopt.RMSprop,
        formula=rmsprop,
        settings={
            **PLAIN,
            **DECAY,
            "alpha": {"lr": 0.02, "alpha": 0.7},
            "alpha 0.3": {"lr": 0.02, "alpha": 0.3},
            "eps": {"lr": 0.02, "eps": 0.3},
            "momentum": {"lr": 0.02, "momentum": 0.9},
            "centered": {"lr": 0.02, "centered": True, "alpha": 0.8},
            "centered, alpha 0.3": {"lr": 0.02, "centered": True, "alpha": 0.3, "eps": 0.1},
            "maximize": {"lr": 0.02, "maximize": True},
            "all": dict(lr=0.02, alpha=0.9, eps=1e-2, momentum=0.7, centered=True, weight_decay=0.3, maximize=True),
        },
        extras={
            **L1,
            **{key: {**options, "momentum": 0.9} for key, options in CAUTIOUS.items()},
            "all": dict(lr=0.02, momentum=0.7, centered=True, weight_decay=0.3, l1=0.4),
        },
        usual={"lr": 0.02, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.3},
        everything={**DECAY_AND_L1, "momentum": 0.9, "centered": True, "eps": 0.1, "maximize": True},
    ),
    "Adadelta": Row(
        ours=trainopt.Adadelta,
        formula=adadelta,
        settings={
            **PLAIN,
            **{key: {**options, "eps": 0.01} for key, options in DECAY.items()},
            "rho": {"lr": 0.5, "rho": 0.6, "eps": 0.01},
            "eps": {"lr": 0.5, "eps": 0.1},
            "maximize": {"lr": 0.5, "maximize": True},
            "all": {"lr": 0.7, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.3, "maximize": True},
        },
        extras={
            **L1,
            "cautious": {"lr": 0.5, "cautious": True},
            "all": {"lr": 0.7, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.3, "l1": 0.4},
        },
        usual={"lr": 0.5, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.3},
        everything={**DECAY_AND_L1, "maximize": True, "eps": 1e-2},
    ),
    "Adamax": Row(
        ours=trainopt.Adamax,
        formula=adamax,
        settings={
            **PLAIN,
            **BETAS,
            **DECAY,
            "eps": {"lr": 0.02, "eps": 0.3},
            "maximize": {"lr": 0.02, "maximize": True},
            "all": {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-2, "weight_decay": 0.3, "maximize": True},
        },
        extras={**L1, **CAUTIOUS, "all": {**BETAS_AND_DECAY, "eps": 1e-2, "l1": 0.4}},
        usual=BETAS_AND_DECAY,
        everything={**DECAY_AND_L1, "maximize": True},
    ),
    "RAdam": Row(
        ours=trainopt.RAdam,
        formula=radam,
        settings={
            **PLAIN,
            **BETAS,
            "beta2 0": {"lr": 0.02, "betas": (0.9, 0.0)},  # the second moment never counts
            **DECAY,
            "eps": {"lr": 0.02, "eps": 0.3, "betas": (0.9, 0.9)},
            "maximize": {"lr": 0.02, "maximize": True},
            "decoupled_weight_decay": {"lr": 0.02, "weight_decay": 0.4, "decoupled_weight_decay": True},
            "decoupled_weight_decay, lr float32 tensor": dict(lr=LR32, weight_decay=0.4, decoupled_weight_decay=True),
            "all": {"lr": 0.02, "betas": (0.6, 0.9), "eps": 1e-2, "weight_decay": 0.3, "maximize": True},
        },
        extras={
            **L1,
            **CAUTIOUS,
            **{key: {**options, "decoupled_weight_decay": True} for key, options in CAUTIOUS_DECAY.items()},
            "all": {**BETAS_AND_DECAY, "eps": 1e-2, "l1": 0.4},
        },
        usual={**BETAS_AND_DECAY, "decoupled_weight_decay": True},
        everything={**DECAY_AND_L1, "maximize": True, "betas": (0.9, 0.9), "decoupled_weight_decay": True},
    ),
}


# Runs -----------------------------------------------------------------------------------------------------------------


def random_values(shape, dtype, generator):
    """Values in [0.1, 4) of either sign, one in eleven a zero: float16 can hold their squares."""
    size = torch.empty(shape, dtype=torch.float64).exponential_(2.0, generator=generator).clamp(max=3.9) + 0.1
    sign = torch.randint(-5, 6, size.shape, generator=generator).sign()
    return (size * sign).to(dtype)


def random_problem(shapes, dtype, steps, seed=0, device="cpu"):
    """Starting values, and gradients for each step."""
    generator = torch.Generator().manual_seed(seed)
    start, *gradients = (
        [random_values(shape, dtype, generator).to(device) for shape in shapes] for _ in range(1 + steps)
    )
    return start, gradients


def run(make: Callable[..., Any], start: Tensors, gradients: Sequence[Tensors], dtype=None, **options):
    """Steps fresh parameters through these gradients; returns the optimizer and the parameters."""
    params = [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in start]
    optimizer = make(params, **options)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer, params


def on_both_paths(row: Row, start: Tensors, gradients: Sequence[Tensors], device: str = "cpu", **options):
    """The optimizer and the parameters of `run` by the engine on a device, and by torch's path on the CPU.

    Gradients stay as they are.
    """
    results = []
    for reference, place in ((False, device), (True, "cpu")):
        with mock.patch.object(switches, "REFERENCE_FORCED", reference):
            now = [[g.to(place, copy=True) for g in of_step] for of_step in gradients]
            results.append(run(row.make, [p.to(place) for p in start], now, **options))
    return results


def outcome(optimizer, params) -> dict[str, Tensors]:
    """The parameters and each of their states but the step count, by name."""
    names = dict.fromkeys(name for p in params for name in optimizer.state.get(p, {}) if name != "step")
    held = {name: [optimizer.state[p][name] for p in params] for name in names}
    return {"param": [p.detach() for p in params], **{n: v for n, v in held.items() if v[0] is not None}}


def result_of(make, start, gradients, dtype=None, **options) -> dict[str, Tensors]:
    return outcome(*run(make, start, gradients, dtype, **options))


def assert_same_bits(one: dict[str, Tensors], other: dict[str, Tensors], any_nan: bool = False) -> None:
    """Equal to the bit; with `any_nan` every NaN equals every other: a GPU's arithmetic makes only one of them."""
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        for i, (a, b) in enumerate(zip(tensors, other[name], strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, (name, i)
            bad = bits(a) != bits(b)
            if any_nan:
                bad &= ~(a.isnan() & b.isnan())
            bad = bad.nonzero()
            assert len(bad) == 0, f"{name}[{i}] of {a.numel()}: {len(bad)} elements differ, first at {bad[0].tolist()}"


def assert_same_bits_everywhere(row: Row, start: Tensors, gradients: Sequence[Tensors], **options) -> None:
    """The outcome has the same bits for any number of threads and every SIMD variant. Gradients stay as they are."""
    results = []
    for variant in VARIANTS:
        for threads in (1, 3):  # three cut every tensor where two and one do not
            _C.set_cpu_variant(variant)
            torch.set_num_threads(threads)
            own = [[g.clone() for g in now] for now in gradients]
            results.append(outcome(*run(row.make, start, own, **options)))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def assert_resumes(row: Row, start: Tensors, gradients: Sequence[Tensors], options: dict[str, Any]) -> Any:
    """A run that is saved after two steps, loaded as weights alone and resumed has the bits of one that went on.

    So has one resumed by an optimizer without the options: the file's own count, as any group's do. Returns the file's
    contents.
    """
    straight = outcome(*run(row.make, start, gradients, **options))
    optimizer, params = run(row.make, start, gradients[:2], **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for given in (options, row.usual):
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = row.make(again, **given)
        resumed.load_state_dict(copy.deepcopy(saved))
        for now in gradients[2:]:
            for p, g in zip(again, now, strict=True):
                p.grad = g.clone()
            resumed.step()
        assert_same_bits(straight, outcome(resumed, again))
    return saved


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers)


# The judgement --------------------------------------------------------------------------------------------------------


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def distances(found: dict[str, Tensors], truth: dict[str, Tensors]) -> Iterator[tuple[str, torch.Tensor, float]]:
    """For each result its elements' distances to the truth, and the truth's root mean square."""
    for name, tensors in truth.items():
        exact = flat(tensors)
        yield name, (flat(found[name]) - exact).abs(), exact.square().mean().sqrt().item()


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def undecided_elements(row, start, gradients, dtype, options) -> torch.Tensor:
    """Elements, of all parameters one after the other, for which a rounding to this dtype may decide a sign."""
    optimizer = row.make_formula([torch.nn.Parameter(p.detach().double()) for p in start], **options)
    optimizer.eps = torch.finfo(dtype).eps
    for now in gradients:
        for p, g in zip(optimizer.params, now, strict=True):
            p.grad = g.double()
        optimizer.step()
    return flat(list(optimizer.undecided.values())) != 0


def assert_no_worse(ours, peers, truth, dtype, undecided=None) -> None:
    """Our distance to the truth is no larger than the peer's, in the mean and at the worst element.

    The slack is for the order of roundings: the engine uses no fused multiply-add, torch does here and there. In units
    of the arithmetic's rounding error it is an eighth in the mean over all elements, and two at the single worst one
    (with storage in 16 bits chance adds a factor there); in float64, where torch's loop is the truth itself, a few.
    Elements that the peer loses altogether (torch's Adam in float16
    turns a gradient of 0 into NaN) need only be finite, as those need which are `undecided`.
    """
    assert undecided is None or undecided.double().mean() < 0.5, "too much is undecided"
    assert ours.keys() == truth.keys() == peers.keys()
    exact_peer = dtype == torch.float64
    luck = 3 if torch.finfo(dtype).bits == 16 else 1.5
    unit = torch.finfo(torch.float64 if exact_peer else torch.float32).eps
    for (name, our, scale), (_, peer, _) in zip(distances(ours, truth), distances(peers, truth), strict=True):
        assert our.isfinite().all(), name
        judged = peer.isfinite() if undecided is None else peer.isfinite() & ~undecided
        our, peer = our[judged], peer[judged]
        mean, peer_mean, worst, peer_worst = root_mean_square(our), root_mean_square(peer), our.max(), peer.max()
        assert mean <= 1.1 * peer_mean + (4 if exact_peer else 1 / 8) * unit * scale, (
            f"{name}: mean {mean}, {peer_mean}"
        )
        assert worst <= luck * peer_worst + (16 if exact_peer else 2) * unit * scale, f"{name}: {worst}, {peer_worst}"


def assert_one_rounding(found: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor, what: str) -> None:
    """`found` is the float64 tensor `exact` rounded once to found's dtype, but for `slack` before the rounding."""
    limit = torch.finfo(found.dtype).max
    exact = exact.double()
    inside = exact.abs() < limit
    error = (found.double() - exact).abs()[inside]
    allowed = (spacing(exact, found.dtype) / 2 + slack)[inside]
    assert (error <= allowed).all(), f"{what}: {(error / allowed).max()} times the error of one rounding"


def spacing(x: torch.Tensor, dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a dtype round x."""
    info = torch.finfo(dtype)
    smallest = torch.frexp(torch.tensor(info.tiny, dtype=torch.float64)).exponent
    exponent = torch.frexp(x.double().abs()).exponent.clamp(min=smallest.item())
    return torch.exp2((exponent - 1).double()) * info.eps
