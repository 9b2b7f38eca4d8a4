"""Schedules at work: options of an optimizer, set by curves from the number of completed steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.lr_scheduler import LRScheduler

from trainopt.checks import number, whole
from trainopt.optim.base import Fused, copy_of
from trainopt.schedules import constant

Factor = Callable[[int], float]
Group = dict[str, Any]


class Schedule(LRScheduler):
    """Sets options of an optimizer to their base times a factor, a pure function of the number of completed steps.

        schedule = Schedule(optimizer, lr=warmup(100).then(cosine(until=1000)), weight_decay=linear(until=1000))
        ...
        optimizer.step()
        schedule.step()

    A torch.optim.lr_scheduler.LRScheduler, for any torch optimizer. It counts the optimizer's steps itself: `step` may
    be called after each of them, or less often, and a step that was skipped for an overflow does not count. An option
    that is a Tensor is filled in place; it stays the same Tensor, of its dtype, on its device.

    The base of an option is what its group holds when the schedule is made, or the group is added. It stays in the
    group, as "initial_lr", "initial_weight_decay" and so on, and is not taken again where that is there.

    Args:
        override: new bases for a resumed run, by option: one number for all groups, or one for each. They win over
            what is loaded, in whichever order; an option without a curve is held at its new base.
        completed: how many steps are completed already (default 0), for a run that saved no schedule.
        **factors: for each option a curve of `trainopt.schedules`, or any function of the number of completed steps.
            "beta1" and "beta2" are the parts of "betas"; "momentum" is beta1 where a group has no momentum.

    Raises:
        TypeError: no optimizer, or a factor that is no function.
        ValueError: an option that a group does not have or that is no number; an override that is no number, or not one
            for each group. Nothing has been changed then.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        override: Mapping[str, float | Sequence[float]] | None = None,
        completed: int = 0,
        **factors: Factor,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        for option, factor in factors.items():
            if not callable(factor):
                raise TypeError(f"Schedule: {option} must be a curve, such as constant(), got {factor!r}")
        self._override = dict(override or {})
        self._factors: dict[str, Factor] = {**dict.fromkeys(self._override, constant()), **factors}
        self._completed = whole(self, "completed", completed)
        if not self._factors:
            raise ValueError("Schedule: no option is given a curve, as in Schedule(optimizer, lr=cosine(until=1000))")
        for option, bases in self._override.items():
            check_bases(option, bases, len(optimizer.param_groups))
        for group in optimizer.param_groups:
            for option in self._factors:
                read(group, option)

        self._watch = Watch.of(optimizer)
        self._counted = self._watch.completed(optimizer)
        self.optimizer = optimizer
        self._take_bases()
        self._set_bases(self._override)
        super().__init__(optimizer)
        self._watch.schedules.add(self)

    def _initial_step(self) -> None:
        """Called by the constructor of LRScheduler, and by SequentialLR."""
        self._step_count = 1
        self._update_lr(self._completed)

    # Stepping ---------------------------------------------------------------------------------------------------------

    def step(self, epoch: int | None = None) -> None:
        """Sets every option for the next update.

        Args:
            epoch: the number of completed steps, counted by the caller, as in torch's schedulers. Default: the steps
                that the optimizer has completed.
        """
        self._step_count += 1
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + self._pending() if epoch is None else whole(self, "epoch", epoch)
        self._counted = self._watch.completed(self.optimizer)
        self._take_bases()
        self._apply()

    def _pending(self) -> int:
        """The steps completed since the options were last set."""
        return self._watch.completed(self.optimizer) - self._counted

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        for option, factor_of in self._factors.items():
            factor = float(factor_of(self.last_epoch))
            if not math.isfinite(factor):
                raise ValueError(f"Schedule: the factor of {option} after {self.last_epoch} steps is {factor}")
            for group in groups:
                write(group, option, group[base_key(option)] * factor)
        self.base_lrs = [copy_of(group.get("initial_lr", group["lr"])) for group in groups]
        self._last_lr = self.get_lr()

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group, copied if it is a Tensor."""
        return [copy_of(group["lr"]) for group in self.optimizer.param_groups]

    # Bases ------------------------------------------------------------------------------------------------------------

    def _take_bases(self) -> None:
        for group in self.optimizer.param_groups:
            for option in self._factors:
                base = group.get(base_key(option))
                if not isinstance(base, float):
                    group[base_key(option)] = read(group, option) if base is None else float(base)

    def _set_bases(self, bases: Mapping[str, float | Sequence[float]]) -> None:
        for option, given in bases.items():
            for i, group in enumerate(self.optimizer.param_groups):
                if not isinstance(given, Sequence):
                    group[base_key(option)] = float(given)
                elif i < len(given):
                    group[base_key(option)] = float(given[i])

    def _groups_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer, or what `trainopt.fuse` has made of it, has new groups; none is left as it was saved."""
        self.optimizer = optimizer
        self._take_bases()
        self._set_bases(self._override)
        self._apply()

    def _group_added(self) -> None:
        self._take_bases()
        self._apply()

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: "last_epoch", the completed steps, and "bases", by option a list with one for each group."""
        self._take_bases()
        groups = self.optimizer.param_groups
        bases = {option: [group[base_key(option)] for group in groups] for option in self._factors}
        return {"last_epoch": self.last_epoch + self._pending(), "bases": bases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Carries on after the saved number of steps, from the saved bases and with this schedule's own curves.

        The optimizer's state may be loaded before, after, or not at all.

        Raises:
            ValueError: not the state of a `Schedule`, or of another number of groups. Nothing has been changed then.
        """
        if not {"last_epoch", "bases"} <= state_dict.keys():
            raise ValueError(f"Schedule: a state has 'last_epoch' and 'bases', this one has {sorted(state_dict)}")
        completed = whole(self, "last_epoch", state_dict["last_epoch"])
        bases = {option: saved for option, saved in state_dict["bases"].items() if option in self._factors}
        for option, saved in bases.items():
            check_bases(option, saved, len(self.optimizer.param_groups))
        self._set_bases(bases)
        self._set_bases(self._override)
        self._update_lr(completed)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_watch", "_counted")}
        return {**kept, "_pending_steps": self._pending()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pending = state.pop("_pending_steps")
        self.__dict__.update(state)
        self._watch = Watch.of(self.optimizer)
        self._counted = self._watch.completed(self.optimizer) - pending
        self._watch.schedules.add(self)

    def __repr__(self) -> str:
        options = ", ".join(f"{option}={factor!r}" for option, factor in self._factors.items())
        return f"Schedule({options}) after {self.last_epoch} steps"


class Watch:
    """Tells the schedules of one optimizer of its completed steps, and of groups that are added or loaded."""

    @classmethod
    def of(cls, optimizer: Any) -> Watch:
        if "_schedule_watch" not in optimizer.__dict__:
            optimizer._schedule_watch = cls(optimizer)
        return optimizer._schedule_watch

    def __init__(self, optimizer: Any) -> None:
        self.schedules: WeakSet[Schedule] = WeakSet()
        self._steps: int | None = None
        # trainopt's own optimizers count: a hook would cost their step more than the step itself.
        if not isinstance(optimizer, Fused):
            self._steps = 0
            optimizer.register_step_post_hook(self._stepped)
        optimizer.register_load_state_dict_post_hook(self._loaded)
        self.follow(optimizer)

    def follow(self, optimizer: Any) -> None:
        """Hears of the groups that are added to this optimizer from now on."""
        optimizer.add_param_group = partial(self._add_param_group, optimizer)

    def completed(self, optimizer: Any) -> int:
        """The steps that were completed since some moment in the past."""
        return optimizer.completed_steps if self._steps is None else self._steps

    @torch._disable_dynamo
    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # GradScaler sets found_inf for optimizers that look at it themselves (fused=True).
        skipped = getattr(optimizer, "found_inf", None), getattr(optimizer, "last_step_skipped", None)
        if self._steps is not None and not any(flag is not None and bool(flag) for flag in skipped):
            self._steps += 1

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        for schedule in list(self.schedules):
            schedule._groups_loaded(optimizer)

    def _add_param_group(self, optimizer: Any, param_group: Group) -> None:
        type(optimizer).add_param_group(optimizer, param_group)
        for schedule in list(self.schedules):
            schedule._group_added()


# One option of one group ----------------------------------------------------------------------------------------------


def base_key(option: str) -> str:
    return f"initial_{option}"


def place(group: Group, option: str) -> tuple[str, int | None]:
    """The group's key for an option and, if that holds several, the index of the one."""
    if option in group:
        return option, None
    index = {"momentum": 0, "beta1": 0, "beta2": 1}.get(option)
    if index is not None and "betas" in group:
        return "betas", index
    options = ", ".join(name for name in group if name not in ("params", "param_names"))
    raise ValueError(f"Schedule: the optimizer has no option {option!r}; it has {options}")


def read(group: Group, option: str) -> float:
    """The option's value; ValueError if it is no number."""
    key, index = place(group, option)
    value = group[key] if index is None else group[key][index]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise ValueError(f"Schedule: {option} is {value!r}, and only a number can be scheduled")
    return float(value)


def write(group: Group, option: str, value: float) -> None:
    """Sets the option, in place if it is a Tensor."""
    key, index = place(group, option)
    current = group[key] if index is None else group[key][index]
    if isinstance(current, torch.Tensor):
        current.detach().fill_(value)
    elif current != value:
        group[key] = value if index is None else (*group[key][:index], value, *group[key][index + 1 :])


def check_bases(option: str, bases: Any, groups: int) -> None:
    """ValueError unless this is a number, or a list of one for each group."""
    several = isinstance(bases, Sequence) and not isinstance(bases, str)
    for base in bases if several else [bases]:
        number("Schedule", f"the base of {option}", base)
    if several and len(bases) != groups:
        raise ValueError(f"Schedule: {option} has {len(bases)} bases, {bases}, for {groups} parameter groups")
