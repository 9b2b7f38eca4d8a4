"""What every optimizer of trainopt has in common: torch's class, with the step done by the engine.

A class derives from `Fused` and from torch's class of the same name. Construction, param_groups, state, hooks, pickles
and errors are torch's own. The step is one call into the compiled plan, which reads all of that as it stands;
parameters that the engine does not take go through torch's own step (`trainopt.optim.reference`) in the same call.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch.optim import optimizer as torch_optimizer

from trainopt._extension import _C
from trainopt.optim import compiled, reference
from trainopt.optim.nonfinite import NonfiniteReport


class Fused(torch.optim.Optimizer):
    """The mixin that gives torch's optimizer class, next in the order of bases, a fused step.

    A class states `_rule`, the engine's rule; `_states`, the names of the param-shaped states in its state dict; and
    `_counts_steps`, whether every parameter has a "step" in it.
    """

    _rule: ClassVar[str]
    _states: ClassVar[tuple[str, ...]]
    _counts_steps: ClassVar[bool] = True
    #: Options beyond torch's, with their defaults. They live in param_groups like any other.
    EXTRAS: ClassVar[dict[str, Any]] = {"l1": 0.0, "l1_proximal": False, "noise": 0.0, "seed": 0}
    _extras: dict[str, Any]  # the values that the constructor was given
    _plan: Any = None

    _skipped: bool | torch.Tensor = False  # the last step; a tensor on its device until somebody asks
    _steps: int = 0
    _skipped_steps: torch.Tensor | None = None  # of those, on the device
    _compiled_steps: torch.Tensor | None = None  # what a compiled program has counted: a number would be compiled in

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped because GradScaler found a gradient that is not finite (``fused=True``).

        On a CUDA device the step does not wait to know it; to read it here does.
        """
        if self._skipped is not False and self._skipped is not True:
            self._skipped = bool(self._skipped)
        return self._skipped

    @property
    def completed_steps(self) -> int:
        """How many steps this object has completed since it was made; skipped ones are not counted.

        Waits for a CUDA device only where GradScaler has left the steps' fate to it (``fused=True``).
        """
        steps = self._steps
        if self._skipped_steps is not None:
            steps -= int(self._skipped_steps)
        return steps if self._compiled_steps is None else steps + int(self._compiled_steps)

    # Stepping ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What `closure` returned, else None.
        """
        self._opt_called = True
        if torch.compiler.is_compiling():
            return _compiled_step(self, closure)
        if (self._has_hooks() or _C.is_observed()) and type(
            self
        ).step is Fused.step:  # an overriding step has been wrapped by torch already
            return _observed_step(self, closure)
        return self._step(closure)

    def _has_hooks(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    # torch wraps step() in hooks and a profiler range that cost tens of microseconds, heard or not; ours costs that
    # only when somebody listens.
    step.hooked = True  # type: ignore[attr-defined]
    # A scheduler of torch's wraps step() to see whether it was called before the scheduler's own step, and a compiler
    # does not look into the wrapper. Ours tells by itself.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    _opt_called: bool

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan
        if plan is None and not reference.is_forced():
            plan = self._plan = _C.Plan(self._rule)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scale = 1.0
        if found_inf is not None or grad_scale is not None:
            unread = plan is not None and lie_on_device(found_inf, grad_scale)
            if unread and self._step_unread(plan, grad_scale, found_inf):
                return loss
            self._skipped = found_inf is not None and bool(found_inf)
            if self._skipped:
                return loss
            scale = 1.0 if grad_scale is None else float(grad_scale)
        else:
            self._skipped = False
        if plan is None:
            reference.step(self, list(self._enumerate()), None, scale)
            self._steps += 1
            return loss
        unfinished = plan.step(self.param_groups, self.state, scale)
        if unfinished is None or self._finish(plan, unfinished, scale):
            self._steps += 1
        return loss

    def _step_unread(self, plan: Any, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> bool:
        """The step, with GradScaler's scale and flag left on their device; False if the host must read them first."""
        done = plan.step(self.param_groups, self.state, 1.0, (), (), grad_scale, found_inf)
        if isinstance(done, tuple):
            if self._is_dummy_step():
                self.init_state()
                return True
            groups = list(map(self._snapshot, self.param_groups))
            params = list(numbered(groups))
            lacking = [i for i in done[0] if i < len(params) and not self._is_torchs(*params[i][1:])]
            # Should the device skip this step, the next one is the first.
            fresh = [i for i in lacking if self._start_before_first_step(params[i][2], params[i][1])]
            done = plan.step(groups, self.state, 1.0, fresh, (), grad_scale, found_inf)
        if done is not None:
            return False
        self._steps += 1
        self._skipped = found_inf if found_inf is not None else False
        if found_inf is not None:
            skipped = found_inf.ne(0)
            self._skipped_steps = skipped.long() if self._skipped_steps is None else self._skipped_steps.add_(skipped)
        return True

    def _finish(self, plan: Any, unfinished: Any, scale: float) -> bool:
        """A step in which states are still to be made, or that torch has a part in; False if it only makes states.

        It works on the groups as they are at its beginning: what hooks or other threads change meanwhile takes effect
        at the next step.
        """
        if isinstance(unfinished, tuple) and unfinished[0] and self._is_dummy_step():
            self.init_state()
            return False
        groups = list(map(self._snapshot, self.param_groups))
        params = list(numbered(groups))
        started: set[int] = set()
        fresh: set[int] = set()
        torchs: set[int] = set()
        while (unfinished := plan.step(groups, self.state, scale, sorted(fresh), sorted(torchs))) is not None:
            if unfinished is NotImplemented:  # the states' dict answers by code of its own
                reference.step(self, params, None, scale)
                break
            missing, rest, sharing, doubtful = unfinished
            odd = [i for i in missing if i in started or self._is_torchs(*params[i][1:])]
            # torch first: if it refuses anything, nothing has been made or changed for the others.
            reference.rehearse(self, params, [*doubtful, *odd])
            reference.step(self, params, sorted({*rest, *odd} - {*sharing}), scale)
            reference.step(self, params, sharing, scale, plain=True)
            for index in set(missing).difference(odd):
                started.add(index)
                if self._start(params[index][2], params[index][1]):
                    fresh.add(index)
            torchs.update(rest, odd)
        return True

    def _snapshot(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as the plan reads it, whatever containers its user has put it in."""
        copy = {key: group[key] for key in group}
        copy["params"] = list(group["params"])
        for key in compiled.pairs(self._rule):
            if isinstance(copy.get(key), Iterable):
                copy[key] = tuple(copy[key])
        return copy

    def _enumerate(self) -> Iterator[tuple[int, dict[str, Any], torch.Tensor]]:
        """(index over all groups, group, parameter), in order."""
        return numbered(self.param_groups)

    # State ------------------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Makes the state of every parameter that requires a gradient and has none yet, as before its first step.

        For tools that need states to load into, such as distributed checkpoints: no step is counted, and the first
        real step is a first step.
        """
        for _, group, param in self._enumerate():
            if param.requires_grad and not self.state.get(param):
                self._start_before_first_step(param, group)

    def _start_before_first_step(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        """As `_start`, so that the next step is a first one also where it is not this one."""
        return self._start(param, group)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        if lists and lists[-1] == compiled.GATHER:
            return compiled.gather(self, group, *lists[:-1])
        return super()._init_group(group, *lists)  # type: ignore[misc]

    def _states_needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The param-shaped states that a group's options call for."""
        return self._states

    def _is_torchs(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        """Whether a parameter that lacks states has others, which is an error of torch's."""
        state = self.state.get(param, {})
        return bool(state) and any(state.get(name) is None for name in ("step", *self._states_needed(group)))

    def _start(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        """Makes the states that `param` needs for its next step; whether there were none, so that it is the first."""
        state = self.state[param]
        is_first = not state
        with torch.no_grad():
            if is_first:
                state["step"] = new_step_count(param, group)
                for name in self._states_needed(group):
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            reference.widen_count(state, group)
        return is_first

    def _is_dummy_step(self) -> bool:
        """Whether this is a step that only makes states: nothing has a state, no learning rate, no gradient but zeros.

        Checkpoint tools make such a step (torch.distributed.checkpoint). torch counts it, so that the first real step
        comes with the bias correction of the second; here it is not counted.
        """
        return (
            not self.state
            and all(is_zero(group["lr"]) and not group.get("noise") for group in self.param_groups)
            and not any(param.grad is not None and bool(param.grad.any()) for _, _, param in self._enumerate())
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's class of the same name.

        As torch's, and beyond it: the loaded states are copies, so that the optimizer they came from can go on; a state
        whose shape is not its parameter's is a ValueError before anything is changed; where both sides name their
        parameters and the names are the same in another order, names decide; options that torch's class does not know
        keep their present values if the state dict has none.
        """
        adapted: dict[str, Any] = {}

        def adapt(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            adapted.update(self._adapt(given))
            return adapted

        # The last of the pre-hooks: whatever form the state dict came in, it has torch's form by then.
        adapting = self.register_load_state_dict_pre_hook(adapt)
        try:
            super().load_state_dict(state_dict)
        finally:
            adapting.remove()
        self._restore_counts(adapted)

    def _restore_counts(self, saved: dict[str, Any]) -> None:
        """Gives counts that noise has made float64 back what torch has rounded to float32 (fused and capturable)."""
        for saved_group, group in zip(saved["param_groups"], self.param_groups, strict=True):
            if not group.get("noise"):
                continue
            for key, param in zip(saved_group["params"], group["params"], strict=True):
                count = saved["state"][key].get("step") if key in saved["state"] else None
                if isinstance(count, torch.Tensor) and count.dtype is torch.float64:
                    self.state[param]["step"] = count.to(self.state[param]["step"].device, copy=True)

    def _adapt(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved_groups = state_dict["param_groups"]
        adapted = [self._adapt_group(*both) for both in zip(saved_groups, self.param_groups, strict=False)]
        return {**state_dict, "param_groups": [*adapted, *saved_groups[len(adapted) :]]}

    def _adapt_group(self, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        adapted = {**{name: own[name] for name in self.EXTRAS if name in own}, **saved}
        saved_names, names = saved.get("param_names"), own.get("param_names")
        if saved_names and names and saved_names != names and sorted(saved_names) == sorted(names):
            id_of = dict(zip(saved_names, saved["params"], strict=True))
            adapted.update(params=[id_of[name] for name in names], param_names=list(names))
        return adapted

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict ends here too, without "defaults".
        if "defaults" not in state:
            self._check_shapes(state)
            for key, param_state in state["state"].items():
                if isinstance(param_state, dict):
                    state["state"][key] = {name: copy_of(value) for name, value in param_state.items()}
        super().__setstate__(state)
        self._plan = None
        self._complete_groups()

    def _complete_groups(self) -> None:
        """Gives groups that torch made, or an older trainopt, the options that they lack."""
        for group in self.param_groups:
            for name, default in self.EXTRAS.items():
                group.setdefault(name, self.defaults.get(name, default))

    def _check_shapes(self, state: dict[str, Any]) -> None:
        for group_index, group in enumerate(state["param_groups"]):
            for i, param in enumerate(group["params"]):
                param_state = state["state"].get(param, {})
                for name in self._states:
                    value = param_state.get(name)
                    if isinstance(value, torch.Tensor) and value.shape != param.shape:
                        raise ValueError(
                            f"loaded state dict: {name} of {name_of(group, group_index, i)} has shape"
                            f" {tuple(value.shape)}, but the parameter has shape {tuple(param.shape)}"
                        )

    # Options ----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch does; trainopt's own options get their defaults too."""
        self.defaults = {**self.EXTRAS, **self.__dict__.get("_extras", {}), **self.defaults}
        if isinstance(param_group, dict):
            check_extras({**self.defaults, **param_group})
        super().add_param_group(param_group)

    # Diagnosis --------------------------------------------------------------------------------------------------------

    def nonfinite_report(self) -> NonfiniteReport:
        """The parameters with NaN or infinite elements in their gradient, states or value, by name and count.

        Returns a report that prints itself and is empty (false) if all is finite. Reads every tensor once.
        """
        return NonfiniteReport.of(self)

    def _names(self) -> list[str]:
        """A name for every parameter, in order."""
        return [
            name_of(group, group_index, i)
            for group_index, group in enumerate(self.param_groups)
            for i in range(len(group["params"]))
        ]


# What a compiler cannot keep in its graph breaks it, as torch's own step does, and runs as it is.
_uncompiled_step = torch._disable_dynamo(Fused.step)
_observed_step = torch.optim.Optimizer.profile_hook_step(Fused._step)


def _compiled_step(optimizer: Fused, closure: Callable[[], Any] | None) -> Any:
    """The step as the compiler traces it."""
    if (
        closure is not None
        or getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
        or optimizer._has_hooks()
        or optimizer.last_step_skipped  # to be set to False, which a graph cannot do
        or not compiled.step(optimizer)
    ):
        return _uncompiled_step(optimizer, closure)
    return None


_DEVICE_TYPES = frozenset(_C.device_types()) - {"cpu"}


def lie_on_device(*numbers: torch.Tensor | None) -> bool:
    """Whether all of these that there are can be read by kernels where they lie."""
    return all(
        number is None
        or (type(number) is torch.Tensor and number.device.type in _DEVICE_TYPES and number.dtype is torch.float32)
        for number in numbers
    )


def is_zero(lr: float | torch.Tensor) -> bool:
    """Whether a learning rate is known to be 0, without waiting for a device."""
    return not (isinstance(lr, torch.Tensor) and lr.device.type != "cpu") and float(lr) == 0


def check_extras(options: dict[str, Any]) -> None:
    """ValueError for a value of trainopt's own options that makes no sense, in the words of torch's own errors."""
    for name in ("l1", "noise"):
        if not 0.0 <= options[name]:
            raise ValueError(f"Invalid {name} value: {options[name]}")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed value: {seed} (an integer from 0 to 2**64 - 1)")


def numbered(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any], torch.Tensor]]:
    """(index over all groups, group, parameter), in order."""
    return ((i, *both) for i, both in enumerate((group, param) for group in groups for param in group["params"]))


def new_step_count(param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """A step count of 0 where and as torch's optimizers keep it."""
    on_device = group.get("capturable") or group.get("fused")
    dtype = torch_optimizer._get_scalar_dtype(is_fused=group.get("fused"))
    return torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")


def copy_of(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def name_of(group: dict[str, Any], group_index: int, index: int) -> str:
    """How messages call parameter `index` of a group."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"parameter {index} of group {group_index}"
