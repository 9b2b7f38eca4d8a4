"""The states of an optimizer's parameters: which there are, how they begin, and steps that are made only to have them.

torch.distributed.checkpoint and other tools call `step` before they save or load, so that there are states: with every
learning rate at 0 and gradients of 0. torch makes that step like any other. The first real one then comes with the
bias correction of the second, momenta have been damped, noise has moved the weights, and a schedule is a step ahead.
So a step that only asks for states changes nothing and is not counted. It is one if

- every learning rate is 0 (one that lies on a device other than the CPU is not read, and so is not known to be), and
- there is a gradient with elements, and all gradients are 0 in every element (of DTensors, on every rank), and
- a parameter with a gradient still lacks the state that it needs, or no parameter has a state at all.

A warm-up that begins at a learning rate of 0 comes with gradients that are not 0, and its first step counts.
"""

import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch.optim import optimizer as torch_optimizer

from trainopt._extension import _C
from trainopt.optim import average, precision, state_dtype
from trainopt.optim.distributed import elements, on_any_rank, replica, summed
from trainopt.optim.options import DECIDING, check_extras, extra, option_at, places_of, snapshot
from trainopt.optim.report import Record
from trainopt.optim.stats import ParameterStats, by_name
from trainopt.stand_in import StandIn

Numbered = tuple[int, dict[str, Any], torch.Tensor]  # index over all groups, group, parameter


class States(torch.optim.Optimizer, metaclass=StandIn):
    """What an optimizer knows of its states. The class attributes come from `trainopt.optim.registry`."""

    _rule: ClassVar[str]  # the engine's rule
    _states: ClassVar[tuple[str, ...]]  # the names of the param-shaped states in the state dict
    _unsigned: ClassVar[tuple[str, ...]]  # those of them that are never below 0
    _numbers: ClassVar[tuple[str, ...]]  # the names of those that are one number for a parameter
    _factors: ClassVar[tuple[str, ...]]  # averages over rows and over columns, which matrices have in place of others
    _reads_parameter: ClassVar[bool] = False  # whether the update depends on the parameter, weight decay aside
    _begin_as_parameter: ClassVar[tuple[str, ...]] = ()  # those that begin as a copy of it
    #: Whether a step depends on sums over all parameters, to which ``plain_sums(param, gradient, state, group)`` says
    #: what one adds; the plain step finds them in its group.
    _sums_over_all: ClassVar[bool]
    plain_sums: ClassVar[Any]
    _counts_steps: ClassVar[bool]  # whether every parameter has a "step" in it
    #: Of the numbers and "step", those that lie beside their parameter whatever its options. Else a device has the
    #: count where it is to know it, and the numbers are where the count is.
    _beside: ClassVar[tuple[str, ...]] = ()
    _torch_class: ClassVar[type | None] = None  # whose step it makes, if torch has one
    _torch_takes_shards: ClassVar[bool] = True  # else its `plain_step` is made in place of torch's, of DTensors
    _needs_host: ClassVar[bool] = False  # whether a step begins with numbers that the host moves on: see `_advanced`
    _may_be_none: ClassVar[frozenset[str]] = frozenset()  # options of the rule that need not be numbers
    _deciding: ClassVar[tuple[str, ...]] = ()  # those whose change is checked, beside trainopt's own
    _host_options: ClassVar[frozenset[str]] = frozenset()  # of groups, which the class reads and the rule does not
    #: Options beyond torch's, with their defaults. They are in param_groups where they are not at these.
    EXTRAS: ClassVar[dict[str, Any]]

    _first_index: ClassVar[int] = 0  # of the parameters, for the noise: other than 0 where there is one of several
    _opt_called: bool  # read by torch's schedulers
    _record: Record
    _uncast: list[tuple[torch.Tensor, str, torch.Tensor]]  # while a state dict is loaded: see `loading.adapted`
    _unstarted: set[torch.Tensor]  # with states of zeros that only a real step makes a first one

    def _start_recording(self) -> None:
        self._record = Record()
        self._unstarted = set()

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped for a gradient that is not finite.

        That GradScaler has found (``fused=True``), or the optimizer itself (``skip_nonfinite=True``). On a CUDA device
        the step does not wait to know it; to read it here does.
        """
        return self._record.was_skipped()

    @property
    def completed_steps(self) -> int:
        """How many steps this object has completed since it was made.

        Not counted are skipped steps, and those that only ask for states to be made (`init_state`). Waits for a CUDA
        device only where a step's fate was left to it (`last_step_skipped`).
        """
        return self._record.completed()

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of the gradients in the last step that clipped them (``max_grad_norm``), before it did.

        Over all groups with a limit, without GradScaler's scale: a 0-dimensional tensor on the gradients' device,
        float64 for float64 gradients and float32 for others. None before the first such step.
        """
        return self._record.grad_norm

    def stats(self) -> dict[str | int, ParameterStats]:
        """What the last call of `step` has found out about the parameters of groups with ``stats=True``.

        By the name, or the number, that parameters had in that step; those that had no gradient are not there. A step
        that was left out has its gradients, and updates of 0. Empty where that call has made no step: it raised an
        error, or only made states; and where it had no group with ``stats=True``, as a compiled step has none. A
        GradScaler that leaves out a step by not calling `step` leaves what the call before has told. For a DTensor the
        numbers are of the whole, and are brought together in the step; on a CUDA device nothing waits for them before
        this call. RuntimeError where no group has ``stats=True`` now.
        """
        return by_name(self)

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """A context in which the parameters are their moving averages (``ema_decay``), as for an evaluation.

        Afterwards they have the bits that they had before, however it is left. Those without an average, which have
        made no step yet or whose group has no ``ema_decay``, stay as they are. RuntimeError for `step` in it.
        """
        return average.applied(self)

    def ema_state_dict(self) -> dict[str | int, torch.Tensor]:
        """A copy of the moving average of every parameter, by its name, or by its number where it has none.

        Of float32 for a 16-bit parameter, else of the parameter's dtype. A parameter without an average is there as it
        is, so that ``model.load_state_dict(optimizer.ema_state_dict(), strict=False)`` has all of them where the
        optimizer was given ``model.named_parameters()``.
        """
        return average.averages_by_name(self)

    def init_state(self) -> None:
        """Makes the state of every parameter that requires a gradient and has none yet, as before its first step.

        For tools that need states to load into, such as distributed checkpoints: no step is counted, and the first
        real step is a first step.
        """
        self._check_groups()
        for _, group, param in self._enumerate():
            if param.requires_grad and not self._has_partial_state(param, group):
                self._start_before_first_step(param, group)

    def _enumerate(self) -> Iterator[Numbered]:
        """(index over all groups, group, parameter), in order."""
        return numbered(self.param_groups)

    def _snapshot(self) -> list[dict[str, Any]]:
        """The groups as they are now: what hooks or other threads change meanwhile takes effect at the next step."""
        return [snapshot(group, self._rule) for group in self.param_groups]

    @classmethod
    def _states_needed(cls, group: dict[str, Any], param: torch.Tensor | None = None) -> tuple[str, ...]:
        """The states that a group's options call for, numbers aside; of one of a vector's without a parameter."""
        return tuple(_C.states_needed(cls._rule, _named(group), 1 if param is None else param.dim()))

    @classmethod
    def _numbers_needed(cls, group: dict[str, Any]) -> tuple[str, ...]:
        """Likewise the numbers."""
        return tuple(_C.numbers_needed(cls._rule, _named(group))) if cls._numbers else ()

    @classmethod
    def _shape_of(cls, name: str, param: torch.Tensor) -> torch.Size:
        """The shape of a parameter's state."""
        shape = list(param.shape)
        if name in cls._factors and len(shape) > 1:
            shape[-1 if name == cls._factors[0] else -2] = 1
        return torch.Size(shape)

    @classmethod
    def _new_plan(cls, first_index: int = 0) -> Any:
        """A plan, which checks options that are new in a group, as the constructor does."""
        return _C.Plan(cls._rule, first_index, [*cls.EXTRAS, *DECIDING, *cls._deciding], cls._check_group)

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        """ValueError or TypeError for options that make no sense; of torch's own it is torch that says so."""
        options = {**cls.EXTRAS, **group}
        check_extras(options)
        state_dtype.check(options["state_dtype"], cls._states)
        if cls._torch_class is None:
            cls._check_numbers(group)
        cls._check_options(options)

    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> None:
        """ValueError for options that do not go together: cautious weight decay where the decay is in the gradient."""
        if options["cautious_weight_decay"] and cls._decay_of(options) != "parameter":
            raise ValueError(
                f"cautious_weight_decay=True is for weight decay that is decoupled from the gradient, as AdamW's and"
                f" Lion's, and that of {cls.__name__} is not"
            )

    @classmethod
    def _check_numbers(cls, group: Mapping[str, Any]) -> None:
        """TypeError for an option of the rule that is no number, or none where it may be None."""
        for key, element in (("lr", -1), ("weight_decay", -1), *places_of(cls._rule)):
            if key not in group:
                continue
            try:
                value = option_at(group, (key, element))
            except (TypeError, IndexError) as error:
                raise TypeError(f"{cls.__name__}: {key} must be numbers in a tuple, not {group[key]!r}") from error
            is_real = isinstance(value, (numbers.Real, torch.Tensor)) or _C.is_number(value)
            if not is_real and not (value is None and key in cls._may_be_none):
                place = f"{key}[{element}]" if element >= 0 else key
                raise TypeError(f"{cls.__name__}: {place} must be a number, not a {type(value).__name__}: {value!r}")

    @staticmethod
    def _check_storage(group: Mapping[str, Any]) -> None:
        """ValueError for a parameter that cannot be stored, or have its states stored, as its group says."""
        state_dtype.check_params(group)
        precision.check_params(group)

    def _check_groups(self) -> None:
        """`_check_group` and `_check_storage` of all: before states are made, and before a step without a plan."""
        for group in self.param_groups:
            self._check_group(group)
            self._check_storage(group)

    @classmethod
    def _decay_of(cls, group: dict[str, Any]) -> str:
        """Where a group's weight decay goes: into the "gradient", the "update", onto the "parameter", or "none"."""
        return _C.decay_of(cls._rule, _named(group))

    def _lr_of(self, group: dict[str, Any]) -> float:
        """A group's learning rate, times the rule's rate if it has one."""
        return float(group["lr"])

    def _agree(self) -> None:
        """Before a step that depends on sums over all parameters: brings what groups share in line."""

    def _options_for(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        """What the dtype of one parameter makes of its group's options."""
        return {}

    def _take_sums(self, sums: Sequence[float]) -> None:
        """After such a step: puts into the groups what follows from the sums that it went by."""

    def _begin_at(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the states begin at, in every element, that do not begin at 0; and the numbers."""
        return {}

    def _decay_share(self, state: dict[str, Any], group: dict[str, Any]) -> float:
        """How much of a parameter is taken away before its update."""
        return self._lr_of(group) * float(group["weight_decay"]) if self._decay_of(group) == "parameter" else 0.0

    def _settle(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """What the states take from a parameter, as reals, where a part of its `plain_step` has left it."""

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        """Whether a first step does something else with states of zeros than a later one, by no count in the state."""
        return False

    def _begin_first_step(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Puts into states of zeros what torch puts there where its first step makes them."""

    def _check_can_step(self) -> None:
        """RuntimeError where the parameters are not what a step steps."""
        self._record.check_parameters()

    def _advanced(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the next step begins with, of what a group remembers of its steps. Changes nothing."""
        return {}

    def _has_partial_state(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter that lacks states has others, which is an error of torch's where a class counts steps."""
        state = self.state.get(param)
        if not state or not self._counts_steps or self._torch_class is None:
            return False
        needed = ("step", *self._numbers_needed(group), *self._states_needed(group, param))
        return any(state.get(name) is None for name in needed)

    def _start(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        """Makes what `param` lacks of states for its next step; whether it had none, so that it is the first."""
        state = self.state.get(param, {})
        missing = [name for name in self._states_needed(group, param) if state.get(name) is None]
        is_first = not state if self._counts_steps else bool(missing)
        with torch.no_grad():
            if self._counts_steps or precision.is_random(group, param) or average.averages(group):
                self._start_count(param, group)
            begin = self._begin_at(group) if missing or self._numbers else {}
            for name in self._numbers_needed(group):
                if self.state[param].get(name) is None:
                    self.state[param][name] = self._new_number(name, begin.get(name, 0.0), param)
            for name in missing:
                if name in self._begin_as_parameter:
                    state_dtype.start_as_copy(self.state[param], group, param, name)
                    continue
                like = replica(param, self._shape_of(name, param)) if name in self._factors else param
                state_dtype.start(self.state[param], group, like, name, begin.get(name, 0.0), name in self._unsigned)
            if precision.lacks_master(group, param, self.state.get(param, {})):
                self.state[param][precision.KEY] = precision.new_master(group, param)
            if average.averages(group) and self.state[param].get(average.KEY) is None:
                self.state[param][average.KEY] = average.new_average(param)
        return is_first

    def _start_before_first_step(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        """As `_start`, so that the next step is a first one also where it is not this one.

        Where only the state can tell, a count of 0 says that states of zeros are those of no step yet.
        """
        if not self.state.get(param) and self._first_step_differs(group):
            self._start_count(param, group)
        return self._start(param, group)

    def _start_count(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Counts this parameter's steps from now on; one that has states has made one. Where torch's class does not
        count, the noise still depends on the count."""
        state = self.state[param]
        if state.get("step") is None:
            made = any(state.get(name) is not None for name in self._states)
            state["step"] = self._new_count(param, group) + float(made)
        widen_count(state, group, param)

    def _new_count(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return new_step_count(param, group, "step" in self._beside)

    def _new_number(self, name: str, value: float | torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        """One of a parameter's numbers, in the type and where its class keeps it."""
        dtype = torch_optimizer._get_scalar_dtype()
        if self._torch_class is None:
            dtype = torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32
        device = self._device_of_number(name, param, self.state[param])
        if isinstance(value, torch.Tensor) and value.device == device:
            return value.detach().reshape(()).to(dtype, copy=True)
        return torch.full((), float(value), dtype=dtype, device=device)  # without a copy, which would wait

    def _device_of_number(self, name: str, param: torch.Tensor, state: dict[str, Any]) -> torch.device:
        count = state.get("step")
        return count.device if isinstance(count, torch.Tensor) and name not in self._beside else param.device

    def _count_unstarted(self) -> None:
        """Tells by a count of 0 which states are those of no step yet, where only the state can tell."""
        for _, group, param in self._enumerate() if self._unstarted else ():
            if param in self._unstarted and self.state.get(param):
                self.state[param].setdefault("step", self._new_count(param, group))
        self._unstarted.clear()

    def _indices_unstarted(self) -> list[int]:
        if not self._unstarted:
            return []
        return [index for index, _, p in self._enumerate() if p in self._unstarted and p.grad is not None]

    # Steps that only ask for states -----------------------------------------------------------------------------------

    def _only_makes_states(self) -> bool:
        """Whether this step is made only to have states; then they are made.

        As by `init_state`, and with no other key in the state than torch would leave: checkpoints are read by keys.
        """
        if not self._asks_for_state():
            return False
        self._check_groups()
        for _, group, param in self._enumerate():
            if param.requires_grad and not self.state.get(param):
                self._start(param, group)
                if self._first_step_differs(group):
                    self._unstarted.add(param)
        self._record.skipped = False
        self._record.asked_at = self._record.steps
        return True

    def _asks_for_state(self) -> bool:
        """Whether this step is made only to have states."""
        if not asks_for_state(self, lambda group: self._counts_steps or bool(self._states_needed(group))):
            return False
        # Noise that was switched on since is a reason to make a step after one that only asked.
        is_noisy = any(extra(group, "noise") != 0 for group in self.param_groups)
        return bool(self.state) or not is_noisy or self._record.asked_at != self._record.steps

    @contextmanager
    def _states_in_order(self, params: Sequence[Numbered], indices: Iterable[int]) -> Iterator[None]:
        """New states of these parameters come in order, as torch's do, whether torch makes them or the engine."""
        new = [param for index in sorted({*indices}) if (param := params[index][2]) not in self.state]
        for param in new:
            self.state[param] = {}
        try:
            yield
        finally:
            for param in new:
                if not self.state[param]:
                    del self.state[param]


def _named(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group whose names are plain strings, which are all that the module reads."""
    return {key: group[key] for key in group if type(key) is str}


def asks_for_state(optimizer: Any, needs_state: Callable[[dict[str, Any]], bool] = lambda group: True) -> bool:
    """Whether the step that is about to be made is a request for states.

    Args:
        needs_state: whether the parameters of a group have states, by its options. By default every one may.
    """
    if not all(is_zero(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    state = optimizer.state
    gradients = []
    lacks = not state
    for group in optimizer.param_groups:
        needs = needs_state(group)
        for param in group["params"]:
            if param.grad is not None:
                gradients.append(param.grad)
                lacks = lacks or (needs and not state.get(param))
    if not lacks or not any(gradient.numel() for gradient in gradients):  # of a DTensor, that of the whole
        return False
    params = [param for group in optimizer.param_groups for param in group["params"]]
    gradients = list(map(summed, gradients))  # all of them, for every rank has its part in each sum
    return not bool(on_any_rank(not all(map(is_all_zero, gradients)), params))


def is_zero(lr: float | torch.Tensor) -> bool:
    """Whether a learning rate is known to be 0, without waiting for a device."""
    if isinstance(lr, torch.Tensor):
        return lr.device.type == "cpu" and lr.numel() == 1 and float(lr.detach()) == 0
    return lr == 0


def is_all_zero(gradient: torch.Tensor) -> bool:
    """Whether every element that this rank has is 0."""
    return not gradient.is_meta and not bool(elements(gradient).any())


def numbered(groups: Iterable[dict[str, Any]]) -> Iterator[Numbered]:
    """(index over all groups, group, parameter), in order."""
    return ((i, *both) for i, both in enumerate((group, param) for group in groups for param in group["params"]))


# Counts of steps ------------------------------------------------------------------------------------------------------


def new_step_count(param: torch.Tensor, group: dict[str, Any], beside: bool = False) -> torch.Tensor:
    """A step count of 0 where and as torch's optimizers keep it; where a device decides on steps, it counts them."""
    on_device = beside or group.get("capturable") or group.get("fused") or extra(group, "skip_nonfinite")
    dtype = torch_optimizer._get_scalar_dtype(is_fused=group.get("fused"))
    return torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")


def widen_count(state: dict[str, Any], group: dict[str, Any], param: torch.Tensor) -> None:
    """Makes the count of steps a float64 where random numbers depend on it: a float32 stops at 2**24, and they too."""
    if precision.is_random(group, param) and isinstance(state.get("step"), torch.Tensor):
        state["step"] = state["step"].double()


def widen_counts(states: Any, names: Iterable[str]) -> None:
    """Gives 16-bit counts of steps, of a state that somebody cast as a whole, the type in which they go on counting:
    in bfloat16, 256 + 1 is 256. Likewise numbers of these names, which torch casts when it loads them."""
    for state in states.values():
        for name in ("step", *names) if isinstance(state, dict) else ():
            number = state.get(name)
            if isinstance(number, torch.Tensor) and number.is_floating_point() and number.element_size() < 4:
                state[name] = number.to(torch_optimizer._get_scalar_dtype())
