"""A row of the optimizers' table: what the tests ask of an optimizer, whichever it is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

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
    def factors(self) -> tuple[str, ...]:
        """The states that matrices have in place of others, of a number for each row and each column."""
        return self.ours._factors

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
        own = {name: value for name, value in options.items() if name in self.defaults}
        if "eps" in own and isinstance(self.defaults["eps"], tuple) and not isinstance(own["eps"], tuple):
            own["eps"] = (own["eps"], 0.5)
        return own

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
