"""Steps within the backward pass: a parameter is stepped as soon as its gradient is there, which is then freed."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainopt import switches
from trainopt.optim import stats, torch_path
from trainopt.optim.distributed import is_dtensor
from trainopt.optim.gradients import GradientScaling, norm_of
from trainopt.optim.matrix import update
from trainopt.optim.matrix.muon import Muon, is_muon
from trainopt.optim.matrix.options import check_present, is_muons
from trainopt.optim.options import DEFAULTS
from trainopt.optim.report import Record, names_of
from trainopt.optim.states import States
from trainopt.optim.wrappers import unwrapped

#: Options that depend on all gradients at once, or on the gradients after the step, and why they do not go.
_REFUSED = {
    "max_grad_norm": "the norm of all gradients is known only when backward has ended; clip_by_last_norm=… clips by the"
    " norm of the step before",
    "skip_nonfinite": "whether a step is left out is known only when backward has ended",
    "zero_grad": "gradients are freed, there is nothing to clear",
    "differentiable": "a step cannot be differentiated from within a backward pass",
}


class StepInBackward:
    """What `step_in_backward` returns: `remove` ends it, and so does leaving it as a context."""

    def __init__(self, optimizer: States | Muon, params: set[Tensor], limit: float | None) -> None:
        self._optimizer: Any = optimizer
        self._limit = limit
        self._last_norm: float | Tensor | None = None
        self._squares: float | Tensor = 0.0  # of the gradients' norms in the backward pass under way
        self._pass = -1  # that pass: the steps of the optimizer before it
        names = iter(names_of(optimizer))
        self._hooks = []
        index = 0  # among those that the engine steps
        for group, held in enumerate(optimizer.param_groups):
            has_matrices = is_muon(optimizer) and is_muons(held)
            for place, param in enumerate(held["params"]):
                name = next(names)
                if param in params and param.requires_grad:
                    own = (self, param, (group, place), name)
                    step = _MatrixStep(*own) if has_matrices else _FusedStep(*own, index)
                    self._hooks.append(param.register_post_accumulate_grad_hook(step))
                index += not has_matrices

    @property
    def _fused(self) -> Any:
        """The optimizer of what the engine steps: of a Muon its AdamW, with the groups and states of now."""
        return self._optimizer.adamw if is_muon(self._optimizer) else self._optimizer

    def remove(self) -> None:
        """From now on gradients stay until the optimizer's own step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _note_norm(self, param: Tensor) -> None:
        """Adds a gradient to the norm of this backward pass; the last one's is what this one is clipped by."""
        if self._pass != self._optimizer._record.steps:
            if self._pass >= 0:
                squares = self._squares
                self._last_norm = squares.sqrt() if isinstance(squares, Tensor) else math.sqrt(squares)
            self._squares, self._pass = 0.0, self._optimizer._record.steps
        norm, _ = norm_of([param])
        self._squares = self._squares + norm * norm


class _Step:
    """One parameter's step."""

    def __init__(self, whole: StepInBackward, param: Tensor, place: tuple[int, int], name: str) -> None:
        self.whole, self.place, self.name = whole, place, name
        self.params = [param]
        self.last_pass = -1

    def __call__(self, param: Tensor) -> None:
        record = self.whole._optimizer._record
        if self.last_pass == record.steps:
            raise RuntimeError(
                f"step_in_backward: {self.name} has been stepped since the optimizer's last step(): call"
                " optimizer.step() after each backward pass; gradients cannot be accumulated over several"
            )
        group = self._group(param)
        check_group(group)
        if is_muon(self.whole._optimizer):
            check_present(group)
        group = {**group, "params": self.params}
        norm = None
        if self.whole._limit is not None:
            self.whole._note_norm(param)
            norm = self.whole._last_norm
            group["max_grad_norm"] = None if norm is None else self.whole._limit
        self._make(param, group, GradientScaling(1.0, norm))
        param.grad = None
        self.last_pass = record.steps

    def _make(self, param: Tensor, group: dict[str, Any], scaling: GradientScaling) -> None:
        """Makes the step, by a copy of the parameter's group that has it alone."""
        raise NotImplementedError

    def _group(self, param: Tensor) -> dict[str, Any]:
        """The group that has the parameter: the one that had it, unless groups have been changed."""
        groups, (index, place) = self.whole._optimizer.param_groups, self.place
        if index < len(groups) and place < len(groups[index]["params"]) and groups[index]["params"][place] is param:
            return groups[index]
        return next(group for group in groups if any(p is param for p in group["params"]))


class _MatrixStep(_Step):
    """A matrix of Muon's is orthogonalised by itself."""

    def _make(self, param: Tensor, group: dict[str, Any], scaling: GradientScaling) -> None:
        state = self.whole._optimizer.state
        gathered = update.gather([group], state)
        if (divisor := scaling.divisor(group)) != 1:
            param.grad = param.grad / divisor  # type: ignore[assignment,operator]
        update.step(gathered, state)


class _FusedStep(_Step):
    """A step of the engine's: the optimizer with this parameter alone, which has a plan and no hooks of its own."""

    def __init__(self, whole: StepInBackward, param: Tensor, place: tuple[int, int], name: str, index: int) -> None:
        super().__init__(whole, param, place, name)
        optimizer = whole._fused
        self.view: Any = object.__new__(type(optimizer))
        self.view.__dict__.update(
            optimizer.__dict__, _plan=None, _record=Record(), _first_index=index, state=defaultdict(dict)
        )

    def __call__(self, param: Tensor) -> None:
        self.whole._fused._check_can_step()
        super().__call__(param)

    def _make(self, param: Tensor, group: dict[str, Any], scaling: GradientScaling) -> None:
        optimizer, view = self.whole._fused, self.view
        states = optimizer.state.get(param)
        view.param_groups, view._unstarted = [{**group, **optimizer._advanced(group)}], optimizer._unstarted
        view.state.clear()
        if states is not None:
            view.state[param] = states
        self._step(scaling)
        if stats.wanted(group):
            self._note_stats(optimizer._record)
        if states is None and view.state.get(param):
            optimizer.state[param] = view.state[param]
        optimizer._unstarted.discard(param)

    def _step(self, scaling: GradientScaling) -> None:
        view = self.view
        if switches.REFERENCE_FORCED:
            view._check_groups()
            torch_path.step(view, list(view._enumerate()), None, scaling)
            return
        if view._plan is None:
            view._plan = view._new_plan(view._first_index)
        answer = scaling.step(view._plan, view.param_groups, view.state, view._indices_unstarted())
        if answer.status != "done":
            view._step_with_torch(view._plan, scaling)

    def _note_stats(self, record: Record) -> None:
        if record.pass_stats_of != record.steps:
            record.pass_stats, record.pass_stats_of = {}, record.steps
        own = self.view._record
        for found in (stats.of_plan(self.view._plan) | own.stats).values():
            record.pass_stats[id(self.params[0])] = found
        own.stats.clear()


def step_in_backward(model: nn.Module, optimizer: Any, *, clip_by_last_norm: float | None = None) -> StepInBackward:
    """Has each parameter stepped within the backward pass, as soon as its gradient is there, which is then freed.

        handle = trainopt.step_in_backward(model, optimizer)
        ...
        loss.backward()          # steps the model's parameters
        optimizer.step()         # steps what is not the model's, and counts the step: for schedules and hooks
        schedule.step()

    The training loop stays as it is. Of all gradients only those that backward is working on are in memory, and each is
    read while it is in the caches. The results are those of ordinary steps, bit for bit; but those of `trainopt.Muon`
    only to rounding where ordinary steps orthogonalise several matrices of one shape as a stack, for products of stacks
    may round otherwise.

    Args:
        model: whose parameters are stepped so, as far as they are the optimizer's.
        optimizer: one of trainopt's, or a wrapper that holds one in ``.optimizer``.
        clip_by_last_norm: clips the gradients to this norm by that of the pass before, which is known in time (default
            None: they are not clipped): a gradient is multiplied by ``min(1, limit / (last norm + 1e-6))``. The first
            pass is not clipped. Reads each gradient once more.

    Returns:
        A handle; its `remove()`, or leaving it as a context, makes steps ordinary ones again.

    Raises:
        TypeError: the optimizer is none of trainopt's.
        ValueError: the model is under DistributedDataParallel, which averages gradients after they are there, or has
            DTensors, whose gradients are reduced after that; a group has an option that needs all gradients at once
            (`max_grad_norm`, `skip_nonfinite`) or gradients after the step (`zero_grad`, `differentiable`).
        RuntimeError: in backward, for a second pass before `optimizer.step()`: gradients are not accumulated.

    A GradScaler cannot be used: its scale would be in the gradients.
    """
    inner = unwrapped(optimizer)
    if not (isinstance(inner, States) or is_muon(inner)):
        raise TypeError(
            f"step_in_backward: {type(inner).__module__}.{type(inner).__qualname__} is not one of trainopt's"
            " optimizers; trainopt.fuse makes one of torch's such a one"
        )
    if isinstance(inner, States) and inner._sums_over_all:
        raise ValueError(
            f"step_in_backward: the step of {type(inner).__name__} depends on all gradients at once, which are there"
            " only when backward has ended: make ordinary steps"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "step_in_backward: the model is under DistributedDataParallel, which averages gradients over the processes"
            " after they are there: make ordinary steps"
        )
    params: set[Tensor] = set(model.parameters())
    if any(is_dtensor(param) for param in params):
        raise ValueError(
            "step_in_backward: the model has DTensors, whose gradients are reduced over the processes after they are"
            " there: make ordinary steps"
        )
    for group in inner.param_groups:
        check_group(group)
    if clip_by_last_norm is not None and not clip_by_last_norm > 0:
        raise ValueError(f"step_in_backward: clip_by_last_norm must be a number above 0, got {clip_by_last_norm!r}")
    return StepInBackward(inner, params, clip_by_last_norm)


def check_group(group: dict[str, Any]) -> None:
    """ValueError for an option that needs what a step within backward does not have."""
    for name, why in _REFUSED.items():
        value = group.get(name, DEFAULTS.get(name))  # Adafactor's and Muon's groups have not all
        if value:
            raise ValueError(f"step_in_backward: a group has {name}={value!r}: {why}")
