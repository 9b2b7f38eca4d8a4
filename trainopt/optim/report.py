"""What an optimizer tells of itself: what its last step did, how its parameters are called, what is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainopt.optim.distributed import elements
from trainopt.optim.wrappers import unwrapped

if TYPE_CHECKING:
    from trainopt.optim.stats import Numbers


class Record:
    """One object for an optimizer and for every wrapper that copies its `__dict__`, as some frameworks' do.

    Where a device decides whether a step is made, the answer stays there until somebody asks.
    """

    def __init__(self) -> None:
        self.skipped: bool | torch.Tensor = False  # the last step
        self.steps = 0  # completed, and those that a device has skipped
        self.skipped_steps: torch.Tensor | None = None  # of these, on the device
        self.compiled_steps: torch.Tensor | None = None  # of a compiled program, into which a number would be compiled
        self.grad_norm: torch.Tensor | None = None  # before clipping, in the last step that had a limit
        #: What has been measured in the last step beside the plan, by the parameter's index: `trainopt.optim.stats`.
        self.stats: dict[int, Numbers] = {}
        self.names: list[str | int] | None = None  # of the parameters in that step; None if it has nothing to tell
        self.plan: Any = None  # that it was made by
        self.compiled_before = 0  # compiled steps before it
        self.pass_stats: dict[int, Numbers] = {}  # by the parameter's id, within the backward pass before a step
        self.pass_stats_of = -1  # `steps` then
        self.holds_averages = False  # whether the parameters are their moving averages now
        self.asked_at: int | None = None  # `steps` when a step last asked for states to be made

    def forget_stats(self) -> None:
        """What the steps before have told is not that of the states that have been loaded."""
        self.names, self.stats, self.plan = None, {}, None
        self.pass_stats, self.pass_stats_of = {}, -1

    def check_parameters(self) -> None:
        """RuntimeError for a step of what is put back afterwards."""
        if self.holds_averages:
            raise RuntimeError("step: the parameters are their moving averages, inside averaged_parameters()")

    def was_skipped(self) -> bool:
        """Whether the last step was skipped; waits for a device that knows."""
        if not isinstance(self.skipped, bool):
            self.skipped = bool(self.skipped)
        return self.skipped

    def completed(self) -> int:
        """How many steps were completed; waits for a device where steps were left to it."""
        steps = self.steps + self.compiled()
        return steps if self.skipped_steps is None else steps - int(self.skipped_steps)

    def compiled(self) -> int:
        """How many steps a compiled program has made."""
        return 0 if self.compiled_steps is None else int(self.compiled_steps)

    def count_unread(self, found_inf: torch.Tensor | None) -> None:
        """Counts a step that its device makes unless `found_inf` is set there."""
        self.steps += 1
        self.skipped = found_inf if found_inf is not None else False
        if found_inf is not None:
            skipped = found_inf.ne(0).reshape(())  # GradScaler's has a dimension, the optimizer's own has none
            self.skipped_steps = skipped.long() if self.skipped_steps is None else self.skipped_steps.add_(skipped)


def name_of(group: dict[str, Any], group_index: int, index: int) -> str:
    """How messages call parameter `index` of a group."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"parameter {index} of group {group_index}"


def names_of(optimizer: Any) -> list[str]:
    """A name for every parameter of an optimizer, in order."""
    return [
        name_of(group, group_index, i)
        for group_index, group in enumerate(optimizer.param_groups)
        for i in range(len(group["params"]))
    ]


@dataclass(frozen=True)
class Nonfinite:
    """One tensor of a parameter that holds NaN or infinite elements."""

    parameter: str  # its name, or its place in the groups
    group: int  # the index of its group
    tensor: str  # "gradient", "value", or the name of a state
    nan: int  # how many elements are NaN
    inf: int  # how many are infinite
    numel: int  # of how many
    step: int | None  # the steps that this parameter has made; None where they are not counted

    def __str__(self) -> str:
        after = "" if self.step is None else f", after {self.step} steps"
        return f"{self.parameter}: {self.tensor} has {self.nan} NaN and {self.inf} Inf of {self.numel} elements{after}"


class NonfiniteReport(tuple[Nonfinite, ...]):
    """What is not finite, in the order of the parameters. Empty, and so false, if everything is finite."""

    __slots__ = ()

    @classmethod
    def of(cls, optimizer: Any) -> NonfiniteReport:
        """Reads every gradient, state and value of an optimizer once."""
        found = []
        names = iter(names_of(optimizer))
        for group_index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                name, state = next(names), optimizer.state.get(param, {})
                steps = state.get("step")
                tensors = {"gradient": param.grad, "value": param, **{k: v for k, v in state.items() if k != "step"}}
                for what, tensor in tensors.items():
                    nan, inf, numel = count_nonfinite(tensor)
                    if nan or inf:
                        step = None if steps is None else int(steps)
                        found.append(Nonfinite(name, group_index, what, nan, inf, numel, step))
        return cls(found)

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "all gradients, states and values are finite"

    __repr__ = __str__


def nonfinite_report(optimizer: Any) -> NonfiniteReport:
    """The parameters with NaN or infinite elements in their gradient, states or value, by name and count.

    Args:
        optimizer: any torch optimizer, or a wrapper of one (Accelerate's, Fabric's, Lookahead).

    Returns:
        A report that prints itself, and is empty (false) if all is finite. Reads every tensor once.
    """
    return NonfiniteReport.of(unwrapped(optimizer))


def count_nonfinite(tensor: Any) -> tuple[int, int, int]:
    """(NaN, infinite, all) elements of a tensor; of the stored ones if it is sparse, and of those of this rank if it is
    a DTensor. Zeros for anything else."""
    if not isinstance(tensor, torch.Tensor):
        return 0, 0, 0
    values = elements(tensor)
    if values.isfinite().all():
        return 0, 0, values.numel()
    nan, inf = values.isnan(), values.isinf()
    return int(nan.sum()), int((inf & ~nan).sum()), values.numel()
