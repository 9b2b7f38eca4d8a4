"""What every optimizer of trainopt has in common: its construction, and the step, which the engine makes.

A class derives from `Fused` and from torch's class of the same name, if torch has one. Construction, param_groups,
state, hooks, pickles and errors are torch's own. The step is one call into the compiled plan, which reads all of that
as it stands; parameters that the engine does not take go through torch's own step (`trainopt.optim.torch_path`) in the
same call.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim import optimizer as torch_optimizer

from trainopt import switches
from trainopt._extension import _C
from trainopt.optim import loading, registry, stats, torch_path, traced
from trainopt.optim.depth import apply_depth
from trainopt.optim.gradients import GradientScaling, clear_gradients, clears, clips, find_norm
from trainopt.optim.options import defaults_of, not_default
from trainopt.optim.report import NonfiniteReport, Record
from trainopt.optim.skipping import found_nonfinite, lie_on_device, skips_nonfinite, step_on_device
from trainopt.optim.states import States, numbered


class Fused(States):
    """The mixin that gives an optimizer class, torch's or one that torch does not have, a fused step.

    A class names the engine's rule that it is the front of: ``class AdamW(Fused, originals.AdamW, rule="adam")``. What
    there is to know of a rule, its header says; `trainopt.optim.registry` has it from there.
    """

    #: Of an optimizer that torch does not have: ``plain_step(param, gradient, state, group)``, one parameter's step in
    #: plain torch, in place. It is what torch's own step is to the other classes; one whose states take in what is made
    #: of the parameter has one as well, of its update alone, for cautious groups.
    plain_step: ClassVar[Any]
    _plan: Any = None

    def __init_subclass__(cls, rule: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if rule is not None:
            registry.enter(cls, rule)

    def __init__(self, params: Any, **options: Any) -> None:
        self._extras = not_default({name: options.pop(name) for name in self.EXTRAS if name in options})
        self._start_recording()
        if self._torch_class is not None:
            super().__init__(params, **options)
            return
        super().__init__(params, defaults_of(type(self).__name__, self._rule, options, self._host_options))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch does."""
        self.defaults = {**self.defaults, **self.__dict__.get("_extras", {})}
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
            apply_depth(param_group, self.defaults)
        super().add_param_group(param_group)
        try:  # of the parameters, whatever form they came in, torch has made a list
            self._check_storage(self.param_groups[-1])
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    # The step ---------------------------------------------------------------------------------------------------------

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
        self._opt_called = True  # while tracing, torch 2.11 lets nobody set what is an optimizer's: see `traced.gather`
        if (self._has_hooks() or _C.is_observed()) and type(
            self
        ).step is Fused.step:  # an overriding step has been wrapped by torch already
            return _observed_step(self, *args, **kwargs)
        return self._step(*args, **kwargs)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler is to leave its scale and what it has found to the step, as torch's fused optimizers set.

        A step that clears gradients has to be called where one is to be left out, too: else infinities would stay in
        them. One that clips them needs no pass of GradScaler's to take the scale out of them. Not all of
        torch's classes set it: some have no `fused`, and in torch 2.11 Adagrad has it and does not.
        """
        acts = any(clips(group) or clears(group) for group in self.param_groups)
        return acts or self.__dict__.get("_step_supports_amp_scaling", bool(self.defaults.get("fused")))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

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

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss, record = None, self._record
        record.names = None  # what the step before has told is not told of this one, should it raise an error
        if record.stats:
            record.stats = {}
        self._check_can_step()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_step(record)
        for group in self.param_groups:
            if "stats" in group:
                stats.end_step(self)
                break
        return loss

    def _make_step(self, record: Record) -> None:
        plan = self._plan
        if plan is None and not switches.REFERENCE_FORCED:
            plan = self._plan = self._new_plan(self._first_index)
        if plan is None:
            self._check_groups()
        if self._sums_over_all:
            self._agree()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scale = 1.0
        if found_inf is not None or grad_scale is not None:
            can_stay = plan is not None and not self._needs_host and lie_on_device(found_inf, grad_scale)
            if can_stay and step_on_device(self, plan, grad_scale, found_inf):
                return
            record.skipped = found_inf is not None and bool(found_inf)
            if record.skipped:
                stats.note_left_out(self, self._enumerate(), 1.0 if grad_scale is None else float(grad_scale))
                clear_gradients(self)
                return
            scale = 1.0 if grad_scale is None else float(grad_scale)
        else:
            record.skipped = False
        answer = None
        if plan is not None and self._unstarted:
            answer = plan.step(self.param_groups, self.state, scale, self._indices_unstarted())
        elif plan is not None:
            answer = plan.step(self.param_groups, self.state, scale)
        if (answer is not None and answer.status == "done") or self._complete_step(
            plan, answer, GradientScaling(scale), found_inf is None
        ):
            if self._sums_over_all and plan is not None and (sums := plan.sums_over_all()) is not None:
                self._take_sums(sums)
            record.steps += 1
            if self._unstarted:
                self._unstarted = {param for param in self._unstarted if param.grad is None}

    def _complete_step(self, plan: Any, answer: Any, scaling: GradientScaling, may_raise: bool) -> bool:
        """Makes a step that the plan has not made, as its answer says, or that is made without one.

        False if the step is not to be counted: it is left out, only makes states, or the device that decides on it has
        made and counted it.
        """
        if self._only_makes_states():
            return False
        if answer is None or answer.status != "unfinished":
            if any(map(clips, self.param_groups)):
                scaling.norm = find_norm(self, scaling.scale, may_raise)
            if skips_nonfinite(self):
                found_inf = found_nonfinite(self, norm=scaling.norm)
                can_stay = plan is not None and not self._needs_host and scaling.scale == 1 and lie_on_device(found_inf)
                if can_stay and step_on_device(self, plan, None, found_inf, scaling.norm, gradients_seen=True):
                    return False
                self._record.skipped = bool(found_inf)
                if self._record.skipped:
                    stats.note_left_out(self, self._enumerate(), scaling.scale)
                    clear_gradients(self)
                    return False
            if plan is None:
                torch_path.step(self, list(self._enumerate()), None, scaling)
                return True
            answer = scaling.step(plan, self.param_groups, self.state, self._indices_unstarted())
        if answer.status != "done":
            self._step_with_torch(plan, scaling)
        return True

    def _step_with_torch(self, plan: Any, scaling: GradientScaling) -> None:
        """Makes a step in which states are still to be made, or that torch has a part in."""
        groups = self._snapshot()
        params = list(numbered(groups))
        started: set[int] = set()
        new_states: set[int] = set(self._indices_unstarted())
        stepped: set[int] = set()  # by torch

        def step() -> Any:
            return scaling.step(plan, groups, self.state, sorted(new_states), sorted(stepped))

        answer = step()
        if answer.status == "foreign containers" or answer.missing or answer.doubtful:
            self._check_groups()
        if answer.status == "foreign containers":  # the state dict's own
            torch_path.step(self, params, None, scaling)
            return
        with self._states_in_order(params, (*answer.missing, *answer.rest)):
            while answer.status == "unfinished":
                missing = {i for i in answer.missing if i not in started}
                missing = {i for i in missing if not self._has_partial_state(params[i][2], params[i][1])}
                odd = sorted({*answer.missing} - missing)
                # torch first: if it refuses anything, nothing has been made or changed for the others.
                torch_path.rehearse(self, params, [*answer.doubtful, *odd, *answer.sharing])
                torch_path.step(self, params, sorted({*answer.rest, *odd} - {*answer.sharing}), scaling)
                torch_path.step(self, params, answer.sharing, scaling, plain=True)
                new_states.update(i for i in sorted(missing) if self._start(params[i][2], params[i][1]))
                started |= missing
                stepped.update(answer.rest, odd)
                answer = step()

    def nonfinite_report(self) -> NonfiniteReport:
        """The parameters with NaN or infinite elements in their gradient, states or value, by name and count.

        Returns a report that prints itself and is empty (false) if all is finite. Reads every tensor once; of a DTensor
        the part of this rank, which it counts by itself.
        """
        return NonfiniteReport.of(self)

    # What torch calls -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's class of the same name.

        As torch's, and beyond it: the loaded states are copies, so that the optimizer they came from can go on; a state
        whose shape is not its parameter's is a ValueError before anything is changed; where both sides name their
        parameters and the names are the same in another order, names decide; options that torch's class does not know
        keep their present values if the state dict has none.
        """
        with loading.adapted(self):
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict ends here too, without "defaults".
        super().__setstate__(state if "defaults" in state else loading.prepare(self, state))
        loading.complete(self)
        self._plan = None
        if "_record" in self.__dict__:
            self._unstarted.clear()
            self._record.forget_stats()
        else:
            self._start_recording()

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        if lists and lists[-1] == traced.GATHER:
            return traced.gather(self, group, *lists[:-1])
        return super()._init_group(group, *lists)  # type: ignore[misc]

    def __repr__(self) -> str:
        """As torch's, with trainopt's own options even where they are at their defaults."""
        shown = object.__new__(type(self))
        shown.__dict__.update(self.__dict__, param_groups=[{**self.EXTRAS, **group} for group in self.param_groups])
        return super(Fused, shown).__repr__()

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
        or not traced.step(optimizer)
    ):
        return _uncompiled_step(optimizer, *args, **kwargs)
    return None
