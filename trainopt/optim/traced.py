"""The step under torch.compile: what the compiler keeps in its graph is one operator for each parameter group.

The compiler runs an optimizer's method of the name `_init_group` as it is while it traces, guards what that reads, and
takes the lists that it fills for inputs of the graph. So `gather` sees real tensors, and decides with them whether the
operator does what the step would do; if not, the step runs uncompiled.
"""

from typing import Any

import torch

from trainopt import switches
from trainopt._extension import _C
from trainopt.optim import stats
from trainopt.optim.average import averages
from trainopt.optim.gradients import clears, clips
from trainopt.optim.options import extra, option_at, places_of
from trainopt.optim.state_dtype import has_codes, uses_codes
from trainopt.optim.states import States

#: The last argument of `_init_group` that asks for `gather`; without it the call is torch's.
GATHER = "trainopt"

# Where each rule's options are in a group; a compiler does not look into what `places_of` asks.
_PLACES = {rule: places_of(rule) for rule in _C.rules()}
# Passed by name: what all rules share. trainopt's own are missing in a group that torch made.
_SHARED_OPTIONS = {"weight_decay": 0.0, "maximize": False, "l1": 0.0, "l1_proximal": False}


def step(optimizer: Any) -> bool:
    """The whole step, traced; False if it must run uncompiled, and then nothing is done."""
    # Of numbers in the state, and of rows and columns, the operator knows none, and with the others the host goes on.
    if optimizer._numbers or optimizer._factors or optimizer._sums_over_all or optimizer._needs_host:
        return False
    batches = []
    for group in optimizer.param_groups:
        # Noise depends on a parameter's index and step; what depends on all gradients, the host must see to before it
        # steps; the operator does not write to them, and knows no tensors of two parts.
        if extra(group, "noise") or extra(group, "skip_nonfinite") or clips(group) or clears(group) or averages(group):
            return False
        if uses_codes(group) or extra(group, "precision") != "native" or stats.wanted(group):
            return False
        if extra(group, "cautious") or extra(group, "cautious_weight_decay"):
            return False
        lists: tuple[list[torch.Tensor], ...] = ([], [], [], [])
        params, gradients, states, steps = lists
        if not optimizer._init_group(group, params, gradients, states, steps, GATHER):
            return False
        batches.append((group, lists))
    with torch.no_grad():
        for group, lists in batches:
            lr = group["lr"]
            # A number that a scheduler changes would be compiled in, time and again. As a factor it becomes an input.
            lr = lr if isinstance(lr, torch.Tensor) else torch.ones((), dtype=torch.float64) * lr
            options = [float(option_at(group, place)) for place in _PLACES[optimizer._rule]]
            shared = {key: type(default)(group.get(key, default)) for key, default in _SHARED_OPTIONS.items()}
            torch.ops.trainopt.optimizer_step_(optimizer._rule, *lists, lr, options, **shared)
        assert optimizer._record.compiled_steps is not None
        optimizer._record.compiled_steps.add_(1)
    return True


@torch._disable_dynamo
def gather(
    optimizer: States,
    group: dict[str, Any],
    params: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: list[torch.Tensor],
    steps: list[torch.Tensor],
) -> bool:
    """Fills the operator's lists with a group's tensors, and makes the states that are missing, as before a first step.

    False if the operator cannot do the group's step as it is, and then no state is made.
    """
    scalars = [option_at(group, place) for place in _PLACES[optimizer._rule]]
    if any(isinstance(value, torch.Tensor) for value in (*scalars, *(group.get(key) for key in _SHARED_OPTIONS))):
        return False
    if switches.REFERENCE_FORCED or optimizer._asks_for_state():
        return False
    chosen = [param for param in group["params"] if param.grad is not None]
    if any(type(param) not in (torch.Tensor, torch.nn.Parameter) for param in chosen):
        return False  # a DTensor is stepped by what is in it, which the operator does not see
    try:  # the uncompiled step raises what is wrong with options, where a caller can see it
        paths = optimizer._new_plan().paths([{**group, "params": chosen}], optimizer.state)
    except (TypeError, ValueError, RuntimeError):
        return False
    if paths is None or any(paths):
        return False
    if any(has_codes(optimizer.state.get(param, {}), optimizer._states) for param in chosen):
        return False
    needed = optimizer._states_needed(group)
    for param in chosen:
        if not optimizer.state.get(param):
            optimizer._start_before_first_step(param, group)
    optimizer._opt_called = True  # what is set in a graph is lost
    optimizer._count_unstarted()
    if optimizer._record.compiled_steps is None:
        optimizer._record.compiled_steps = torch.zeros((), dtype=torch.int64)
    found = [optimizer.state.get(param, {}) for param in chosen]
    counts = [state.get("step") for state in found]
    each = [state.get(name) for name in needed for state in found]
    if optimizer._counts_steps or any(count is not None for count in counts):
        each += counts
    if any(value is None for value in each):
        return False
    params += chosen
    gradients += [param.grad for param in chosen if param.grad is not None]
    states += each[: len(needed) * len(chosen)]
    steps += each[len(needed) * len(chosen) :]
    return True
