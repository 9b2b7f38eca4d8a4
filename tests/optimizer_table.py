"""The table of the optimizers: each one's class, formula and options, in a row.

A new optimizer is a row of `TABLE`; every test that goes over the table then has it. tests/judge.py says when a result
is right.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import formulas
import torch
from formulas import FormulaOptimizer, formula_step, numbers_after, take_undecided

import trainopt
from trainopt import switches
from trainopt._extension import _C
from trainopt.optim.state_dtype import AS_PRECISE

Formula = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any], int], torch.Tensor]


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
    averages: bool = False  # a state is a weight, towards which the parameter goes without a gradient too
    factor: Callable[..., float] | None = None  # what the parameter is multiplied by before the formula
    settle: Callable[..., None] | None = None  # what the states take from the parameter as the formula leaves it
    # States of differences between gradients. Where gradients are rounded to 16 bits after clipping, errors cancel in
    # their sum; a step that clips has not rounded the later one.
    differences: tuple[str, ...] = ()
    roundings: int = 1  # of the parameter and what is made of it, in a step of torch's plain loop
    hides_nan: bool = False  # a NaN in the gradient moves nothing, as in torch's class
    in_common: Any = None  # what the formula has that is not of one parameter: see formulas.numbers_after
    takes_shards: bool = True  # torch's plain loop does, of DTensors
    unread_in_groups: tuple[str, ...] = ()  # options that torch's class reads where it is made, once for all groups
    changes_nothing: tuple[str, ...] = field(default=("foreach", "fused"))

    @property
    def states(self) -> tuple[str, ...]:
        return self.ours._states

    @property
    def numbers(self) -> tuple[str, ...]:
        """Those that are one number for a parameter."""
        return self.ours._numbers

    def held(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A copy of a parameter's states in float64, and of its numbers as they are."""
        numbers = {name: state[name].cpu().clone() for name in self.numbers if name in state}
        return numbers | {
            name: state[name].cpu().double().clone() for name in self.states if torch.is_tensor(state.get(name))
        }

    @property
    def coarse_states(self) -> tuple[str, ...]:
        """Those that may be stored in fewer bits than the parameter."""
        return tuple(name for name in self.states if name not in AS_PRECISE)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        return {**self.ours.EXTRAS, **self.ours([torch.nn.Parameter(torch.ones(1))]).defaults}

    @property
    def has_sums(self) -> bool:
        """Whether an element's step depends on the whole tensor."""
        return bool(_C.rules()[self.ours._rule].sums)

    @property
    def needs_host(self) -> bool:
        """Whether the host knows numbers of its steps, and waits where a device has a part in them."""
        return self.ours._needs_host

    @property
    def has_torchs_fused(self) -> bool:
        """Whether `fused` is an option of torch's class, or of ours that torch does not have."""
        return "fused" not in self.ours.EXTRAS

    @functools.cached_property
    def eager_states(self) -> bool:
        """Whether the constructor of torch's class makes the states."""
        return bool(self.peer([torch.nn.Parameter(torch.ones(1))]).state)

    def kept(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of these options that it has: Rprop has no weight decay."""
        return {name: value for name, value in options.items() if name in self.defaults}

    @property
    def still(self) -> dict[str, Any]:
        """Options with which gradients move nothing."""
        return self.kept({"lr": 0.0, "weight_decay": 0.0, "lambd": 0.0, "step_sizes": (0.0, 0.0)})

    def takes_signs(self, options: dict[str, Any]) -> bool:
        """Whether the formula calls `sign` with these options."""
        one = torch.ones(1, dtype=torch.float64)
        formula_step(self, one, one, {}, {**options, **numbers_after(self, [(one, one, {})], options, {})}, 1)
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


class InTrainMode:
    """In front of an optimizer that has modes: in which it is to be from the beginning."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.train()


class AdamWScheduleFree(InTrainMode, trainopt.AdamWScheduleFree): ...


class RAdamScheduleFree(InTrainMode, trainopt.RAdamScheduleFree): ...


class SGDScheduleFree(InTrainMode, trainopt.SGDScheduleFree): ...


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

AVERAGED = {
    "warmup_steps": {"lr": 0.02, "warmup_steps": 4},
    "r": {"lr": 0.02, "r": 2.0},
    "weight_lr_power": {"lr": 0.02, "warmup_steps": 4, "weight_lr_power": 0.5},
}
ADAM_SCHEDULE_FREE = {
    "beta1 0.3": {"lr": 0.02, "betas": (0.3, 0.95)},
    "beta2 0": {"lr": 0.02, "betas": (0.9, 0.0), "eps": 0.1},
    "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.8), float64(0.9))},
    "eps": {"lr": 0.02, "betas": (0.9, 0.9), "eps": 0.3},
    **DECAY,
    "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
    "maximize": {"lr": 0.02, "maximize": True},
}

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
        formula=formulas.sgd,
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
        formula=formulas.adam,
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
        formula=formulas.adam,
        settings={**ADAM_SETTINGS, "no weight_decay": {"weight_decay": 0.0}},
        extras={**ADAM_EXTRAS, **CAUTIOUS_DECAY},
        usual=BETAS_AND_DECAY,
        everything=ADAM_EVERYTHING,
    ),
    "Lion": Row(
        ours=trainopt.Lion,
        formula=formulas.lion,
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
        formula=formulas.lamb,
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
        formula=formulas.lars,
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

FOUND = {"lr": 2.0, "d0": 0.01, "d_coef": 10.0, "betas": (0.9, 0.9)}  # with which d grows in a few steps
PRODIGY = {"betas": (0.6, 0.8), "beta3": 0.7, "eps": 0.3, "weight_decay": 0.3, "use_bias_correction": True}
TABLE |= {
    "Prodigy": Row(
        ours=trainopt.Prodigy,
        formula=formulas.prodigy,
        in_common=formulas.prodigy_numbers,
        settings={
            **{key: {"d0": 0.5, **options} for key, options in {**PLAIN, **MOMENTS, **DECAY}.items()},
            "d0": FOUND,
            "beta1 0, d0": {**FOUND, "betas": (0.0, 0.95)},
            "beta3": {**FOUND, "beta3": 0.5, "eps": 0.3},
            "eps, d0": {**FOUND, "eps": 0.3},
            "d_coef": {**FOUND, "d_coef": 20.0},
            "growth_rate": {**FOUND, "growth_rate": 1.1},
            "use_bias_correction": {**FOUND, "use_bias_correction": True},
            "safeguard_warmup": {**FOUND, "d_coef": 4.0, "safeguard_warmup": True},
            "decouple": {**FOUND, "d_coef": 4.0, "weight_decay": 0.4, "decouple": False},
            "maximize": {**FOUND, "maximize": True},
            "all": {**FOUND, **PRODIGY, "growth_rate": 1.5, "maximize": True},
            "all, decouple, safeguard_warmup": {**FOUND, **PRODIGY, "safeguard_warmup": True, "decouple": False},
        },
        extras={
            **{key: {"d0": 0.5, **options} for key, options in {**L1, **CAUTIOUS, **CAUTIOUS_DECAY}.items()},
            "all": {**FOUND, **PRODIGY, "l1": 0.4},
            "l1_proximal, d0": {**FOUND, **PRODIGY, "l1": 0.4, "l1_proximal": True},
        },
        usual={**FOUND, "eps": 0.1, "weight_decay": 0.3},  # so much that float16 can hold its squares
        everything={**FOUND, "eps": 0.3, "weight_decay": 0.3, "l1": 0.5, "l1_proximal": True, "maximize": True},
    ),
    "RMSprop": Row(
        ours=trainopt.RMSprop,
        formula=formulas.rmsprop,
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
        formula=formulas.adadelta,
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
        formula=formulas.adamax,
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
        formula=formulas.radam,
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
    "Adan": Row(
        ours=trainopt.Adan,
        formula=formulas.adan,
        decays_itself=True,
        differences=("exp_avg_diff",),
        settings={
            **PLAIN,
            "betas 0": {"lr": 0.02, "betas": (0.0, 0.0, 0.9)},
            "betas": {"lr": 0.02, "betas": (0.4, 0.9, 0.7)},
            "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.8), float64(0.7), float64(0.9))},
            "eps": {"lr": 0.02, "eps": 0.3},
            **DECAY,
            "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
            "no_prox": {"lr": 0.02, "weight_decay": 0.4, "no_prox": True},
            "all": dict(lr=0.02, betas=(0.6, 0.5, 0.7), eps=1e-2, weight_decay=0.3, no_prox=True, maximize=True),
        },
        extras={
            **L1,
            **CAUTIOUS,
            "cautious_weight_decay": {**CAUTIOUS_DECAY["cautious_weight_decay"], "no_prox": True},
            "all": {"lr": 0.02, "betas": (0.6, 0.5, 0.7), "weight_decay": 0.3, "l1": 0.4},
        },
        usual={"lr": 0.02, "betas": (0.8, 0.7, 0.9), "weight_decay": 0.3},
        everything={**DECAY_AND_L1, "maximize": True},
    ),
    "AdEMAMix": Row(
        ours=trainopt.AdEMAMix,
        formula=formulas.ademamix,
        decoupled=True,
        settings={
            **PLAIN,
            "beta1 0": {"lr": 0.02, "betas": (0.0, 0.9, 0.95)},
            "betas": {"lr": 0.02, "betas": (0.7, 0.8, 0.9)},
            "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.8), float64(0.9), float64(0.95))},
            "alpha": {"lr": 0.02, "alpha": 8.0, "betas": (0.9, 0.99, 0.9)},
            "alpha_warmup": {"lr": 0.02, "alpha_warmup": 3, "betas": (0.9, 0.99, 0.9)},
            "beta3_warmup": {"lr": 0.02, "beta3_warmup": 4, "betas": (0.9, 0.99, 0.999)},
            "eps": {"lr": 0.02, "eps": 0.3},
            **DECAY,
            "all": dict(
                lr=0.02, betas=(0.6, 0.7, 0.9), alpha=3.0, alpha_warmup=5, eps=0.1, weight_decay=0.3, maximize=True
            ),
        },
        extras={
            **L1,
            **CAUTIOUS,
            **CAUTIOUS_DECAY,
            "all": dict(lr=0.02, betas=(0.6, 0.7, 0.9), beta3_warmup=3, alpha_warmup=2, weight_decay=0.3, l1=0.4),
        },
        usual={"lr": 0.02, "betas": (0.8, 0.9, 0.95), "weight_decay": 0.3},
        everything={**DECAY_AND_L1, "beta3_warmup": 3, "alpha_warmup": 2, "maximize": True},
    ),
    "NAdam": Row(
        ours=trainopt.NAdam,
        formula=formulas.nadam,
        roundings=4,
        settings={
            **PLAIN,
            **BETAS,
            **DECAY,
            "eps": {"lr": 0.02, "eps": 0.3},
            "momentum_decay": {"lr": 0.02, "momentum_decay": 4.0},
            "maximize": {"lr": 0.02, "maximize": True},
            "decoupled_weight_decay": {"lr": 0.02, "weight_decay": 0.4, "decoupled_weight_decay": True},
            "decoupled_weight_decay, lr float32 tensor": dict(lr=LR32, weight_decay=0.4, decoupled_weight_decay=True),
            "all": dict(lr=0.02, betas=(0.6, 0.9), eps=1e-2, weight_decay=0.3, momentum_decay=0.5, maximize=True),
        },
        extras={
            **L1,
            **CAUTIOUS,
            **{key: {**options, "decoupled_weight_decay": True} for key, options in CAUTIOUS_DECAY.items()},
            "all": {**BETAS_AND_DECAY, "eps": 1e-2, "momentum_decay": 2.0, "l1": 0.4},
        },
        usual={**BETAS_AND_DECAY, "decoupled_weight_decay": True},
        everything={**DECAY_AND_L1, "maximize": True, "momentum_decay": 0.5, "decoupled_weight_decay": True},
    ),
    "ASGD": Row(
        ours=trainopt.ASGD,
        formula=formulas.asgd,
        factor=formulas.asgd_factor,
        settle=formulas.asgd_average,
        changes_nothing=("foreach", "fused", "t0"),  # of the parameter
        settings={
            **PLAIN,
            **DECAY,
            "lambd": {"lr": 0.02, "lambd": 0.3},
            "lambd, lr float32 tensor": {"lr": LR32, "lambd": 0.3},
            "alpha": {"lr": 0.2, "lambd": 0.5, "alpha": 2.0},
            "t0": {"lr": 0.02, "t0": 3},
            "maximize": {"lr": 0.02, "maximize": True},
            "all": dict(lr=0.1, lambd=0.2, alpha=0.9, t0=2, weight_decay=0.3, maximize=True),
        },
        extras={
            **L1,
            "cautious": {"lr": 0.02, "cautious": True, "lambd": 0.5, "t0": 2},
            "all": dict(lr=0.1, lambd=0.2, alpha=0.9, t0=2, weight_decay=0.3, l1=0.4),
        },
        usual={"lr": 0.05, "lambd": 0.1, "t0": 2, "weight_decay": 0.3},
        everything={**DECAY_AND_L1, "maximize": True, "lambd": 0.1, "t0": 2},
    ),
    "NovoGrad": Row(
        ours=trainopt.NovoGrad,
        formula=formulas.novograd,
        decays_itself=True,
        settings={
            **PLAIN,
            **MOMENTS,
            "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.5), float64(0.9))},
            **DECAY,
            "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
            "grad_averaging": {"lr": 0.02, "grad_averaging": True},
            "decoupled_decay": {"lr": 0.02, "weight_decay": 0.4, "decoupled_decay": True},
            "all": dict(lr=0.02, betas=(0.6, 0.7), eps=0.1, weight_decay=0.3, grad_averaging=True, maximize=True),
        },
        extras={
            **L1,
            **CAUTIOUS,
            **{key: {**options, "decoupled_decay": True} for key, options in CAUTIOUS_DECAY.items()},
            "all": {**BETAS_AND_DECAY, "grad_averaging": True, "l1": 0.4},
        },
        usual=BETAS_AND_DECAY,
        everything={**DECAY_AND_L1, "maximize": True, "grad_averaging": True},
    ),
    "Adagrad": Row(
        ours=trainopt.Adagrad,
        formula=formulas.adagrad,
        unread_in_groups=("initial_accumulator_value",),
        settings={
            **PLAIN,
            **DECAY,
            "lr_decay": {"lr": 0.2, "lr_decay": 0.3},
            "lr_decay, lr float32 tensor": {"lr": LR32, "lr_decay": 0.3},
            "initial_accumulator_value": {"lr": 0.2, "initial_accumulator_value": 1.5},
            "eps": {"lr": 0.2, "eps": 0.3},
            "maximize": {"lr": 0.2, "maximize": True},
            "all": dict(lr=0.2, lr_decay=0.1, eps=1e-2, initial_accumulator_value=0.5, weight_decay=0.3, maximize=True),
        },
        extras={
            **L1,
            "cautious": {"lr": 0.2, "cautious": True},
            "all": {"lr": 0.2, "lr_decay": 0.1, "eps": 1e-2, "weight_decay": 0.3, "l1": 0.4},
        },
        usual={"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.3, "eps": 1e-2},
        everything={**DECAY_AND_L1, "maximize": True, "initial_accumulator_value": 0.5},
    ),
    "Rprop": Row(
        ours=trainopt.Rprop,
        formula=formulas.rprop,
        hides_nan=True,
        takes_shards=False,
        settings={
            **PLAIN,
            "etas": {"lr": 0.02, "etas": (0.3, 1.7)},
            "step_sizes": {"lr": 0.02, "step_sizes": (0.015, 0.022)},
            "maximize": {"lr": 0.02, "maximize": True},
            "all": {"lr": 0.02, "etas": (0.6, 1.4), "step_sizes": (1e-3, 0.1), "maximize": True},
        },
        extras={
            **L1,
            "cautious": CAUTIOUS["cautious"],
            "all": {"lr": 0.02, "etas": (0.6, 1.4), "step_sizes": (1e-3, 0.1), "maximize": True, "l1": 0.4},
        },
        usual={"lr": 0.02, "etas": (0.6, 1.3)},
        everything={"lr": 0.02, "l1": 0.5, "l1_proximal": True, "maximize": True},
    ),
    "AdamWScheduleFree": Row(
        ours=AdamWScheduleFree,
        formula=formulas.adamw_schedule_free,
        decays_itself=True,
        averages=True,
        settings={
            **PLAIN,
            **ADAM_SCHEDULE_FREE,
            **AVERAGED,
            "all": {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-2, "weight_decay": 0.3, "warmup_steps": 3, "r": 1.0},
        },
        extras={
            **FLOAT32_BETAS,
            **L1,
            **CAUTIOUS,
            "all": {**BETAS_AND_DECAY, "warmup_steps": 3, "r": 1.0, "maximize": True, "l1": 0.4},
        },
        usual={**BETAS_AND_DECAY, "warmup_steps": 2},
        everything={**DECAY_AND_L1, "maximize": True, "warmup_steps": 4, "r": 0.5},
    ),
    "RAdamScheduleFree": Row(
        ours=RAdamScheduleFree,
        formula=formulas.radam_schedule_free,
        decays_itself=True,
        averages=True,
        settings={
            **{key: {**options, "silent_sgd_phase": False} for key, options in PLAIN.items()},
            **{key: {**options, "silent_sgd_phase": False} for key, options in ADAM_SCHEDULE_FREE.items()},
            "beta2 0": {"lr": 0.02, "betas": (0.9, 0.0), "silent_sgd_phase": False},  # the second moment never counts
            "silent_sgd_phase": {"lr": 0.02, "betas": (0.9, 0.9)},
            "r": {"lr": 0.02, "betas": (0.9, 0.9), "r": 2.0},
            "weight_lr_power": {"lr": 0.02, "betas": (0.9, 0.9), "weight_lr_power": 0.5},
            "all": {"lr": 0.02, "betas": (0.6, 0.9), "eps": 1e-2, "weight_decay": 0.3, "r": 1.0, "maximize": True},
        },
        extras={
            **{
                key: {**options, "silent_sgd_phase": False}
                for key, options in {**FLOAT32_BETAS, **L1, **CAUTIOUS}.items()
            },
            "all": {**BETAS_AND_DECAY, "r": 1.0, "maximize": True, "l1": 0.4},
        },
        usual={**BETAS_AND_DECAY, "silent_sgd_phase": False},
        everything={**DECAY_AND_L1, "maximize": True, "betas": (0.9, 0.9), "silent_sgd_phase": False, "r": 0.5},
    ),
    "SGDScheduleFree": Row(
        ours=SGDScheduleFree,
        formula=formulas.sgd_schedule_free,
        decays_itself=True,
        averages=True,
        settings={
            **PLAIN,
            **DECAY,
            **AVERAGED,
            "momentum": {"lr": 0.02, "momentum": 0.4},
            "maximize": {"lr": 0.02, "maximize": True},
            "all": dict(lr=0.02, momentum=0.7, weight_decay=0.3, warmup_steps=3, r=1.0, maximize=True),
        },
        extras={
            **L1,
            **CAUTIOUS,
            "all": {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.3, "warmup_steps": 3, "l1": 0.4},
        },
        usual={"lr": 0.02, "momentum": 0.8, "weight_decay": 0.3, "warmup_steps": 2},
        everything={**DECAY_AND_L1, "maximize": True, "warmup_steps": 4, "r": 0.5},
    ),
}
