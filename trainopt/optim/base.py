"""What every optimizer of trainopt has in common: torch's class, with the step done by the engine.

A class derives from `Fused` and from torch's class of the same name. Construction, param_groups, state, hooks, pickles
and errors are torch's own. The step is one call into the compiled plan, which reads all of that as it stands;
parameters that the engine does not take go through torch's own step (`trainopt.optim.reference`) in the same call.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.optim import optimizer as torch_optimizer

from trainopt._extension import _C
from trainopt.optim import compiled, reference
from trainopt.optim.asking import asks_for_state
from trainopt.optim.depth import apply_depth
from trainopt.optim.extras import SHARED, check_extras, extra, not_default
from trainopt.optim.finite import found_nonfinite
from trainopt.optim.names import name_of
from trainopt.optim.nonfinite import NonfiniteReport
from trainopt.optim.record import Record
from trainopt.stand_in import StandIn


class Fused(torch.optim.Optimizer, metaclass=StandIn):
    """The mixin that gives torch's optimizer class, next in the order of bases, a fused step.

    A class states `_rule`, the engine's rule; `_states`, the names of the param-shaped states in its state dict; and
    `_counts_steps`, whether every parameter has a "step" in it.
    """

    _rule: ClassVar[str]
    _states: ClassVar[tuple[str, ...]]
    _counts_steps: ClassVar[bool] = True
    #: Options beyond torch's, with their defaults. They are in param_groups where they are not at these.
    EXTRAS: ClassVar[dict[str, Any]] = SHARED
    _plan: Any = None
    _record: Record

    def __init__(self, params: Any, *, extras: dict[str, Any], **options: Any) -> None:
        self._extras = not_default(extras)
        self._start_recording()
        super().__init__(params, **options)

    def _start_recording(self) -> None:
        self._record = Record()
        self._unstarted: set[torch.Tensor] = set()  # with states of zeros that only a real step makes a first one

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

    # Stepping ---------------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What `closure` returned, else None.
        """
        # Hooks are given the arguments as they came: ``step()``, ``step(None)`` and ``step(closure=None)`` differ.
        if torch.compiler.is_compiling():
            return _compiled_step(self, *args, **kwargs)
        self._opt_called = True  # while tracing, torch 2.11 lets nobody set what is an optimizer's: see `gather`
        if (self._has_hooks() or _C.is_observed()) and type(
            self
        ).step is Fused.step:  # an overriding step has been wrapped by torch already
            return _observed_step(self, *args, **kwargs)
        return self._step(*args, **kwargs)

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
        record, plan = self._record, self._plan
        if plan is None and not reference.is_forced():
            plan = self._plan = _C.Plan(self._rule)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scale = 1.0
        if found_inf is not None or grad_scale is not None:
            unread = plan is not None and lie_on_device(found_inf, grad_scale)
            if unread and self._step_unread(plan, grad_scale, found_inf):
                return loss
            record.skipped = found_inf is not None and bool(found_inf)
            if record.skipped:
                return loss
            scale = 1.0 if grad_scale is None else float(grad_scale)
        else:
            record.skipped = False
        if plan is None:
            unfinished = True
        elif self._unstarted:
            unfinished = plan.step(self.param_groups, self.state, scale, self._indices_unstarted())
        else:
            unfinished = plan.step(self.param_groups, self.state, scale)
        if unfinished is True or unfinished is NotImplemented:
            unfinished = self._look_and_step(plan, scale)
        if unfinished is None or (unfinished is not False and self._finish(plan, scale)):
            record.steps += 1
            if self._unstarted:
                self._unstarted = {param for param in self._unstarted if param.grad is None}
        return loss

    def _look_and_step(self, plan: Any, scale: float) -> Any:
        """The step, where it depends on the gradients' elements what it is: as `Plan.step` says how far it came.

        False if it was not to be made, or if the device that decides on it has made it.
        """
        if self._only_makes_states():
            return False
        if self._skips_nonfinite():
            found_inf = self._found_nonfinite(None)
            can_stay = plan is not None and scale == 1 and lie_on_device(found_inf)
            if can_stay and self._step_unread(plan, None, found_inf, were_seen=True):
                return False
            self._record.skipped = bool(found_inf)
            if self._record.skipped:
                return False
        if plan is None:
            reference.step(self, list(self._enumerate()), None, scale)
            return None
        fresh = self._indices_unstarted()
        return plan.step(self.param_groups, self.state, scale, fresh, (), None, None, True)

    def _step_unread(
        self, plan: Any, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None, were_seen: bool = False
    ) -> bool:
        """The step, with its gradients' scale and its fate left on their device; False if the host must know first."""

        def step(groups: Any = self.param_groups, fresh: Sequence[int] = ()) -> Any:
            return plan.step(groups, self.state, 1.0, fresh, (), grad_scale, found_inf, were_seen)

        self._count_unstarted()
        done = step()
        if done is True:
            if self._only_makes_states():
                return True
            if self._skips_nonfinite():
                found_inf = self._found_nonfinite(found_inf)
                if not lie_on_device(found_inf):
                    return False
            were_seen = True
            done = step()
        if done is False and self._move_counts():
            done = step()
        if isinstance(done, tuple):
            if self._only_makes_states():
                return True
            groups = list(map(self._snapshot, self.param_groups))
            params = list(numbered(groups))
            lacking = [i for i in done[0] if i < len(params) and not self._is_torchs(*params[i][1:])]
            # Should the device skip this step, the next one is the first.
            fresh = [i for i in lacking if self._start_before_first_step(params[i][2], params[i][1])]
            done = step(groups, fresh)
        if done is not None:
            return False
        self._record.count_unread(found_inf)
        return True

    def _finish(self, plan: Any, scale: float) -> bool:
        """A step in which states are still to be made, or that torch has a part in; False if it only makes states.

        It works on the groups as they are at its beginning: what hooks or other threads change meanwhile takes effect
        at the next step.
        """
        if self._only_makes_states():
            return False
        groups = list(map(self._snapshot, self.param_groups))
        params = list(numbered(groups))
        started: set[int] = set()
        fresh: set[int] = set(self._indices_unstarted())
        torchs: set[int] = set()

        def step() -> Any:
            return plan.step(groups, self.state, scale, sorted(fresh), sorted(torchs), None, None, True)

        unfinished = step()
        if unfinished is NotImplemented:  # the states' dict answers by code of its own
            reference.step(self, params, None, scale)
            return True
        with self._states_in_order(params, unfinished):
            while unfinished is not None:
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
                unfinished = step()
        return True

    @contextmanager
    def _states_in_order(self, params: Sequence[reference.Numbered], unfinished: Any) -> Iterator[None]:
        """New states come in the parameters' order, as torch's do, whether torch makes them or the engine."""
        missing, rest = unfinished[:2] if unfinished is not None else ((), ())
        new = [param for index in sorted({*missing, *rest}) if (param := params[index][2]) not in self.state]
        for param in new:
            self.state[param] = {}
        try:
            yield
        finally:
            for param in new:
                if not self.state[param]:
                    del self.state[param]

    def _snapshot(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as the plan reads it, whatever containers its user has put it in."""
        copy = {key: group[key] for key in group}
        copy["params"] = list(group["params"])
        for key in compiled.pairs(self._rule):
            if isinstance(copy.get(key), Iterable):
                copy[key] = tuple(copy[key])
        return copy

    def _skips_nonfinite(self) -> bool:
        return any(extra(group, "skip_nonfinite") for group in self.param_groups)

    def _found_nonfinite(self, found_inf: torch.Tensor | None) -> Any:
        """Whether this step is to be skipped; a tensor on the gradients' device where the kernels can read it."""
        params = [param for group in self.param_groups if extra(group, "skip_nonfinite") for param in group["params"]]
        return found_nonfinite(params, found_inf)

    def _move_counts(self) -> bool:
        """Moves counts of steps to the devices that decide on them (`skip_nonfinite`); whether there were any.

        Counts loaded from torch's class lie on the host, which would have to wait at every step.
        """
        moved = False
        for _, group, param in self._enumerate():
            count = self.state.get(param, {}).get("step") if extra(group, "skip_nonfinite") else None
            if isinstance(count, torch.Tensor) and count.is_cpu and param.device.type in _DEVICE_TYPES:
                self.state[param]["step"] = count.to(param.device, torch.float32, non_blocking=True)
                moved = True
        return moved

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

    def _asks_for_state(self) -> bool:
        """Whether this step is made only to have states (`trainopt.optim.asking`)."""
        if not asks_for_state(self, self._needs_state):
            return False
        # Noise that was switched on since is a reason to make a step after one that only asked.
        is_noisy = any(extra(group, "noise") != 0 for group in self.param_groups)
        return bool(self.state) or not is_noisy or self._record.asked_at != self._record.steps

    def _needs_state(self, group: dict[str, Any]) -> bool:
        return self._counts_steps or bool(self._states_needed(group))

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        """Whether a first step does something else with states of zeros than a later one, by no count in the state."""
        return False

    def _only_makes_states(self) -> bool:
        """Whether this step is made only to have states; then they are made.

        As by `init_state`, and with no other key in the state than torch would leave: checkpoints are read by keys.
        """
        if not self._asks_for_state():
            return False
        for _, group, param in self._enumerate():
            if param.requires_grad and not self.state.get(param):
                self._start(param, group)
                if self._first_step_differs(group):
                    self._unstarted.add(param)
        self._record.skipped = False
        self._record.asked_at = self._record.steps
        return True

    def _indices_unstarted(self) -> list[int]:
        if not self._unstarted:
            return []
        return [index for index, _, p in self._enumerate() if p in self._unstarted and p.grad is not None]

    def _count_unstarted(self) -> None:
        """Tells by a count of 0 which states are those of no step yet, where only the state can tell."""
        for _, group, param in self._enumerate() if self._unstarted else ():
            if param in self._unstarted and self.state.get(param):
                self.state[param].setdefault("step", new_step_count(param, group))
        self._unstarted.clear()

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
            if not extra(group, "noise"):
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
        for name in self.EXTRAS.keys() & saved.keys() - own.keys():
            if not not_default({name: saved[name]}):  # from a file of the days when every group had every option
                del adapted[name]
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
            state = {**state, "param_groups": self._take_groups(state["param_groups"])}
        super().__setstate__(state)
        widen_counts(self.state)
        self._plan = None
        if "_record" in self.__dict__:
            self._unstarted.clear()
        else:
            self._start_recording()

    def _take_groups(self, loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Loads the groups into those that are there: a wrapper or a scheduler may hold them."""
        own = self.param_groups
        if not isinstance(own, list) or len(own) != len(loaded):
            return loaded
        for group, values in zip(own, loaded, strict=True):
            if group is not values:
                group.clear()
                group.update(values)
        return own

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
        """Adds a group of parameters, as torch does."""
        self.defaults = {**self.defaults, **self.__dict__.get("_extras", {})}
        if isinstance(param_group, dict):
            check_extras({**self.EXTRAS, **self.defaults, **param_group})
            apply_depth(param_group, self.defaults)
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        """As torch's, with trainopt's own options even where they are at their defaults."""
        shown = object.__new__(type(self))
        shown.__dict__.update(self.__dict__, param_groups=[{**self.EXTRAS, **group} for group in self.param_groups])
        return super(Fused, shown).__repr__()

    # Diagnosis --------------------------------------------------------------------------------------------------------

    def nonfinite_report(self) -> NonfiniteReport:
        """The parameters with NaN or infinite elements in their gradient, states or value, by name and count.

        Returns a report that prints itself and is empty (false) if all is finite. Reads every tensor once.
        """
        return NonfiniteReport.of(self)

    step.__signature__ = inspect.signature(_step)  # type: ignore[attr-defined]


# What a compiler cannot keep in its graph breaks it, as torch's own step does, and runs as it is.
_uncompiled_step = torch._disable_dynamo(Fused.step)
_observed_step = torch.optim.Optimizer.profile_hook_step(Fused._step)


def _compiled_step(optimizer: Fused, *args: Any, **kwargs: Any) -> Any:
    """The step as the compiler traces it."""
    if (
        any(argument is not None for argument in (*args, *kwargs.values()))
        or getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
        or optimizer._has_hooks()
        or optimizer.last_step_skipped  # to be set to False, which a graph cannot do
        or not compiled.step(optimizer)
    ):
        return _uncompiled_step(optimizer, *args, **kwargs)
    return None


_DEVICE_TYPES = frozenset(_C.device_types()) - {"cpu"}


def lie_on_device(*numbers: torch.Tensor | None) -> bool:
    """Whether all of these that there are can be read by kernels where they lie."""
    return all(
        number is None
        or (type(number) is torch.Tensor and number.device.type in _DEVICE_TYPES and number.dtype is torch.float32)
        for number in numbers
    )


def numbered(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any], torch.Tensor]]:
    """(index over all groups, group, parameter), in order."""
    return ((i, *both) for i, both in enumerate((group, param) for group in groups for param in group["params"]))


def new_step_count(param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """A step count of 0 where and as torch's optimizers keep it; where a device decides on steps, it counts them."""
    on_device = group.get("capturable") or group.get("fused") or extra(group, "skip_nonfinite")
    dtype = torch_optimizer._get_scalar_dtype(is_fused=group.get("fused"))
    return torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")


def widen_counts(states: Any) -> None:
    """Gives 16-bit counts of steps, of a state that somebody cast as a whole, the type in which they go on counting:
    in bfloat16, 256 + 1 is 256."""
    for state in states.values():
        count = state.get("step") if isinstance(state, dict) else None
        if isinstance(count, torch.Tensor) and count.is_floating_point() and count.element_size() < 4:
            state["step"] = count.to(torch_optimizer._get_scalar_dtype())


def copy_of(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
