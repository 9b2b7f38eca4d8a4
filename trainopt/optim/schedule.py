"""Schedules at work: options of an optimizer, set by curves from the number of completed steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.lr_scheduler import LRScheduler

from trainopt.checks import number, whole
from trainopt.optim.loading import copy_of
from trainopt.optim.states import States, asks_for_state
from trainopt.optim.wrappers import unwrapped
from trainopt.schedules import constant

Factor = Callable[[int], float]
Group = dict[str, Any]


class Schedule(LRScheduler):
    """Sets options of an optimizer to their base times a factor, a pure function of the number of completed steps.

        schedule = Schedule(optimizer, lr=warmup(100).then(cosine(until=1000)), weight_decay=linear(until=1000))
        ...
        optimizer.step()
        schedule.step()

    A torch.optim.lr_scheduler.LRScheduler, for any torch optimizer, or a wrapper of one (Accelerate's, Fabric's,
    Lookahead), whose own optimizer it then drives. It counts the optimizer's steps itself: `step` may be called after
    each of them, or less often. A step does not count that was skipped for a gradient that is not finite, or that only
    asks for states to be made, as distributed checkpoints do (`trainopt.optim.states`). An option that is a Tensor is
    filled in place; it stays the same Tensor, of its dtype, on its device.

    The base of an option is what its group holds when the schedule is made, or the group is added. It stays in the
    group, as "initial_lr", "initial_weight_decay" and so on, and is not taken again where that is there. Where a group
    has an "lr_scale", as those of timm and of `param_groups`, its learning rate is multiplied by that too.

    Args:
        override: new bases for a resumed run, by option: one number for all groups, or one for each. They win over
            what is loaded, in whichever order; an option without a curve is held at its new base.
        completed: how many steps are completed already, for a run that saved no schedule. None (default): 0, and a
            warning at the first `step` where the optimizer's states have more behind them, as after a resume that
            restored the optimizer alone. 0 says that the schedule begins anew.
        **factors: for each option a curve of `trainopt.schedules`, or any function of the number of completed steps.
            "beta1" and "beta2" are the parts of "betas"; "momentum" is beta1 where a group has no momentum.

    Raises:
        TypeError: no optimizer, or a factor that is no function.
        ValueError: an option that a group does not have or that is no number; an override that is no number, or not one
            for each group; a factor that is not finite, or that drives a beta out of [0, 1) or another option below 0.
            Nothing has been changed then. `step` raises it too.
    """

    _is_unsure = False  # whether the steps completed before this schedule may be unknown to it

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        override: Mapping[str, float | Sequence[float]] | None = None,
        completed: int | None = None,
        **factors: Factor,
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        for option, factor in factors.items():
            if not callable(factor):
                raise TypeError(f"Schedule: {option} must be a curve, such as constant(), got {factor!r}")
        self._override = dict(override or {})
        self._factors: dict[str, Factor] = {**dict.fromkeys(self._override, constant()), **factors}
        self._completed = 0 if completed is None else whole(self, "completed", completed)
        self._is_unsure = completed is None and not all(type(factor) is constant for factor in self._factors.values())
        if not self._factors:
            raise ValueError("Schedule: no option is given a curve, as in Schedule(optimizer, lr=cosine(until=1000))")
        for option, bases in self._override.items():
            check_bases(option, bases, len(optimizer.param_groups))
        self._beyond_torch = getattr(type(optimizer), "EXTRAS", {})
        self._values_after(self._completed, self._with_bases(optimizer.param_groups, self._override))

        self._counter = StepCounter.of(optimizer)
        self._counted = self._counter.completed(optimizer)
        self.optimizer = optimizer
        self._take_bases(optimizer.param_groups)
        self._set_bases(optimizer.param_groups, self._override)
        super().__init__(optimizer)
        self._counter.schedules.add(self)

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
        if self._is_unsure:
            self._is_unsure = False
            if epoch is None:
                self._warn_if_behind()
        self._step_count += 1
        self._update_lr(epoch)

    @torch._disable_dynamo
    def _warn_if_behind(self) -> None:
        """Not in the constructor: the state of this schedule, or of the optimizer, may be loaded after it."""
        made, counted = steps_of(self.optimizer), self.last_epoch + self._pending()
        if made > counted + 1:  # torch's optimizers count a step that only asks for states
            warnings.warn(
                f"Schedule: the optimizer has made {made} steps and this schedule has counted {counted}, so it begins"
                " anew. In a run that goes on, load the schedule's own state too, or give"
                f" completed={made - self._pending()}; completed=0 says that it is to begin anew",
                stacklevel=3,
            )

    def _update_lr(self, epoch: int | None = None) -> None:
        groups = self.optimizer.param_groups
        self._take_bases(groups)
        completed = self.last_epoch + self._pending() if epoch is None else whole(self, "epoch", epoch)
        values = self._values_after(completed, groups)
        self.last_epoch = completed
        self._counted = self._counter.completed(self.optimizer)
        self._write(values)

    def _pending(self) -> int:
        """The steps completed since the options were last set."""
        return self._counter.completed(self.optimizer) - self._counted

    def _values_after(self, completed: int, groups: Sequence[Group]) -> list[tuple[int, str, float]]:
        """(group, option, value) after so many steps; ValueError for a value that the option cannot have."""
        values = []
        for option, factor_of in self._factors.items():
            try:
                factor = float(factor_of(completed))
            except OverflowError:
                factor = math.inf
            if not math.isfinite(factor):
                raise ValueError(f"Schedule: the factor of {option} after {completed} steps is {factor}")
            for i, group in enumerate(groups):
                value = group[base_key(option)] * factor * (group.get("lr_scale", 1.0) if option == "lr" else 1.0)
                check_value(group, option, value, completed)
                values.append((i, option, value))
        return values

    def _apply(self) -> None:
        self._write(self._values_after(self.last_epoch, self.optimizer.param_groups))

    def _write(self, values: list[tuple[int, str, float]]) -> None:
        groups = self.optimizer.param_groups
        for i, option, value in values:
            write(groups[i], option, value)
        self.base_lrs = [copy_of(group.get("initial_lr", group["lr"])) for group in groups]
        self._last_lr = self.get_lr()

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group, copied if it is a Tensor."""
        return [copy_of(group["lr"]) for group in self.optimizer.param_groups]

    # Bases ------------------------------------------------------------------------------------------------------------

    def _take_bases(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for option in self._factors:
                if option in self._beyond_torch:
                    group.setdefault(option, self._beyond_torch[option])  # it is there only where it is used
                base = group.get(base_key(option))
                if not isinstance(base, float):
                    group[base_key(option)] = read(group, option) if base is None else float(base)

    def _with_bases(self, groups: Sequence[Group], *bases: Mapping[str, float | Sequence[float]]) -> list[Group]:
        """Copies of the groups as they would be with these bases, to see what comes of it."""
        copies = [dict(group) for group in groups]
        self._take_bases(copies)
        for each in bases:
            self._set_bases(copies, each)
        return copies

    def _set_bases(self, groups: Sequence[Group], bases: Mapping[str, float | Sequence[float]]) -> None:
        for option, given in bases.items():
            for i, group in enumerate(groups):
                if not isinstance(given, Sequence):
                    group[base_key(option)] = float(given)
                elif i < len(given):
                    group[base_key(option)] = float(given[i])

    def _groups_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer, or what `trainopt.fuse` has made of it, has new groups; none is left as it was saved."""
        self.optimizer = optimizer
        self._take_bases(optimizer.param_groups)
        self._set_bases(optimizer.param_groups, self._override)
        self._apply()

    def _group_added(self) -> None:
        self._take_bases(self.optimizer.param_groups)
        self._apply()

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: "last_epoch", the completed steps, and "bases", by option a list with one for each group."""
        groups = self.optimizer.param_groups
        self._take_bases(groups)
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
        groups = self.optimizer.param_groups
        self._values_after(completed, self._with_bases(groups, bases, self._override))
        self._set_bases(groups, bases)
        self._set_bases(groups, self._override)
        self._update_lr(completed)
        self._is_unsure = False

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_counter", "_counted")}
        return {**kept, "_pending_steps": self._pending()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pending = state.pop("_pending_steps")
        self.__dict__.update(state)
        self._counter = StepCounter.of(self.optimizer)
        self._counted = self._counter.completed(self.optimizer) - pending
        self._counter.schedules.add(self)

    def __repr__(self) -> str:
        options = ", ".join(f"{option}={factor!r}" for option, factor in self._factors.items())
        return f"Schedule({options}) after {self.last_epoch} steps"


class StepCounter:
    """Tells the schedules of one optimizer of its completed steps, and of groups that are added or loaded."""

    @classmethod
    def of(cls, optimizer: Any) -> StepCounter:
        if "_step_counter" not in optimizer.__dict__:
            optimizer._step_counter = cls(optimizer)
        return optimizer._step_counter

    def __init__(self, optimizer: Any) -> None:
        self.schedules: WeakSet[Schedule] = WeakSet()
        self._steps: int | None = None
        self._asked = False  # by the step that is being made
        # trainopt's own optimizers count: a hook would cost their step more than the step itself.
        if not (isinstance(optimizer, States) and hasattr(optimizer, "_record")):
            self._steps = 0
            if hasattr(optimizer, "_optimizer_step_post_hooks"):
                optimizer.register_step_pre_hook(self._about_to_step)
                optimizer.register_step_post_hook(self._stepped)
            else:
                self._replace(optimizer, "step", self._step)
        if hasattr(optimizer, "_optimizer_load_state_dict_post_hooks"):
            optimizer.register_load_state_dict_post_hook(self._loaded)
        else:
            self._replace(optimizer, "load_state_dict", self._load_state_dict)
        self._replace(optimizer, "add_param_group", self._add_param_group)

    def completed(self, optimizer: Any) -> int:
        """The steps that were completed since some moment in the past."""
        return optimizer.completed_steps if self._steps is None else self._steps

    @torch._disable_dynamo
    def _about_to_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        closures = (*args[1:], *kwargs.values())
        self._asked = all(closure is None for closure in closures) and asks_for_state(optimizer)

    @torch._disable_dynamo
    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # GradScaler sets found_inf for optimizers that look at it themselves (fused=True).
        skipped = getattr(optimizer, "found_inf", None), getattr(optimizer, "last_step_skipped", None)
        is_skipped = any(flag is not None and bool(flag) for flag in skipped)
        if self._steps is not None and not self._asked and not is_skipped:
            self._steps += 1

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        for schedule in list(self.schedules):
            schedule._groups_loaded(optimizer)

    # What has no hooks is replaced: groups that are added, and all of a wrapper that never made itself an Optimizer.

    def _replace(self, optimizer: Any, name: str, method: Callable[..., Any]) -> None:
        replaced = partial(method, optimizer)
        replaced._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's schedulers wrap `step` too
        setattr(optimizer, name, replaced)

    def _add_param_group(self, optimizer: Any, param_group: Group) -> None:
        type(optimizer).add_param_group(optimizer, param_group)
        for schedule in list(self.schedules):
            schedule._group_added()

    def _load_state_dict(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        type(optimizer).load_state_dict(optimizer, *args, **kwargs)
        self._loaded(optimizer)

    def _step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        self._about_to_step(optimizer, (optimizer, *args), kwargs)
        result = type(optimizer).step(optimizer, *args, **kwargs)
        self._stepped(optimizer, args, kwargs)
        return result


# One option of one group ----------------------------------------------------------------------------------------------


def steps_of(optimizer: Any) -> int:
    """The most steps that any parameter has behind it, by the optimizer's states; 0 where these do not count."""
    counts = [state.get("step") for state in getattr(optimizer, "state", {}).values() if isinstance(state, Mapping)]
    numbers = [count for count in counts if isinstance(count, (int, float))]
    tensors = [count for count in counts if type(count) is torch.Tensor and count.numel() == 1]
    if tensors:
        device = tensors[0].device
        numbers.append(float(torch.stack([count.detach().reshape(()).to(device).float() for count in tensors]).max()))
    return int(max(numbers, default=0))


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


NOT_NEGATIVE = frozenset({"lr", "weight_decay", "eps", "momentum", "l1", "noise"})


def check_value(group: Group, option: str, value: float, completed: int) -> None:
    """ValueError for a value that torch's optimizers would refuse: betas outside [0, 1), and negative numbers."""
    key, index = place(group, option)
    current = group[key] if index is None else group[key][index]
    if isinstance(current, torch.Tensor):
        value = float(torch.tensor(value, dtype=current.dtype))  # 0.999999999 is 1 in float32
    allowed = "[0, 1)" if key == "betas" else "[0, inf)"
    if (key == "betas" and not 0 <= value < 1) or (option in NOT_NEGATIVE and value < 0):
        raise ValueError(f"Schedule: {option} after {completed} steps would be {value}, outside {allowed}")


def check_bases(option: str, bases: Any, groups: int) -> None:
    """ValueError unless this is a number, or a list of one for each group."""
    several = isinstance(bases, Sequence) and not isinstance(bases, str)
    for base in bases if several else [bases]:
        number("Schedule", f"the base of {option}", base)
    if several and len(bases) != groups:
        raise ValueError(f"Schedule: {option} has {len(bases)} bases, {bases}, for {groups} parameter groups")
