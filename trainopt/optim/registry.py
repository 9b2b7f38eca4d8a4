"""Every optimizer of trainopt, each fact of it once.

A class gives the name of its rule, ``class AdamW(Fused, originals.AdamW, rule="adam")``, and is entered here. The
rule's header in C++ says which states and options it has and whether it counts steps; which class of torch's it derives
from, if any, is seen from its bases. Whatever goes over all rules (`trainopt.fuse`, `trainopt.patch`, the tests) goes
over `OPTIMIZERS`; what lists the optimizers for a person (``python -m trainopt``, the command line) over `every`.
"""

import inspect
from typing import Any

import torch

from trainopt._extension import _C
from trainopt.optim.options import DEFAULTS, STOCK_DEFAULTS, Extras, show_options
from trainopt.optim.states import States

#: By the name of the class.
OPTIMIZERS: dict[str, type[States]] = {}
#: Those that are no rules, but products of matrices.
MATRIX_METHODS: dict[str, type[torch.optim.Optimizer]] = {}


def enter(cls: type[States], rule: str) -> None:
    """Enters a class, and gives it what the module says of its rule.

    KeyError if there is no such rule, TypeError if torch has no such optimizer and the class no plain step.
    """
    facts = _C.rules()[rule]
    cls._rule, cls._states, cls._counts_steps = rule, facts.states, facts.counts_steps
    cls._unsigned, cls._numbers, cls._factors = facts.unsigned, facts.numbers, facts.factors
    cls._sums_over_all = facts.sums_over_all
    cls._torch_class = next(filter(is_torch_class, cls.__mro__), None)
    if cls._torch_class is None and not hasattr(cls, "plain_step"):
        raise TypeError(f"{cls.__name__} needs a plain_step: torch has no such optimizer")
    own = {*Extras.__annotations__, *facts.options}
    if cls._torch_class is not None and "fused" not in inspect.signature(cls._torch_class).parameters:
        own.add("fused")
    cls.EXTRAS = {name: default for name, default in DEFAULTS.items() if name in own}
    if "__init__" in vars(cls):
        show_options(cls.__init__, cls.EXTRAS if cls._torch_class else {**STOCK_DEFAULTS, **cls.EXTRAS})
    OPTIMIZERS[cls.__name__] = cls


def every() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer, by the name of its class."""
    return {**OPTIMIZERS, **MATRIX_METHODS}


def of_torch() -> dict[type, type[States]]:
    """By each class of torch's that there is one for, trainopt's."""
    return {cls._torch_class: cls for cls in OPTIMIZERS.values() if cls._torch_class is not None}


def is_torch_class(cls: type[Any]) -> bool:
    return cls.__module__.startswith("torch.optim") and cls is not torch.optim.Optimizer
