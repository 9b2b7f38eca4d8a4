"""The loss of a run: what it owns, what it returns, and what it counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import random_state
from trainopt.training.criterion.callables import Core, bare, core_of, reached, rebound
from trainopt.training.criterion.counting import (
    LABELED,
    Count,
    check,
    count_in,
    elements_in,
    known_loss,
    on_host,
    samples_in,
)
from trainopt.training.criterion.observing import Observer
from trainopt.training.criterion.rules import Rule, guess_of, learned_rule, own_loss, scripted_rule
from trainopt.training.data import tensors_in


class Criterion(nn.Module):
    """A loss as a module: `mean, count = criterion(output, target)`.

    A loss that is a module owns what it has registered. One that is a function owns the modules and parameters that it
    reaches (by its closure, say) and that the optimizer trains, and modules that are nothing but buffers.

    What it counts is known before it is called where it is one of torch's or trainopt's losses, whatever stands round
    it (torch.compile, functools.partial, its own `forward`); `is_exact` then. Any other is watched while it is computed
    (`trainopt.training.criterion.observing`), or says it itself by returning (sum, count).

    Args:
        loss: `loss(output, target)`, None where the output has its own as `.loss`.
        count: what it counts in a target, where the person has said it.
        optimized: the optimizer's parameters.
        of_model: modules that belong to the model, and so not to the loss.
    """

    owned: nn.Module
    function: Callable[[Any, Any], Any]
    core: Core
    given: Callable[[Any], Count] | None

    def __init__(
        self,
        loss: Callable[[Any, Any], Any] | None,
        count: Callable[[Any], Count] | None = None,
        optimized: Iterable[Tensor] = (),
        of_model: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        loss = own_loss if loss is None else loss
        core = core_of(loss)
        self.__dict__.update(function=loss, core=core, given=count)  # a module must not be registered twice
        if isinstance(core.function, nn.Module):
            self.owned = bare(core.function)
        else:
            self.owned = owned_by(loss, {id(param) for param in optimized}, {id(module) for module in of_model})
        self.known: tuple[str, dict[str, Any]] | None = known_loss(core) if count is None else None
        self.is_exact = count is not None or self.known is not None
        self.rule: Rule | None = None if self.is_exact else scripted_rule(core)  # for one that cannot be watched
        self.is_unlearned = core.is_compiled and not self.is_exact  # whether one look at what was compiled is due
        self.sees_model: bool | None = False if self.is_exact else None  # None: not known yet
        self.guess: tuple[str, Rule] | None = None
        self.assumed: str | None = None  # what had to be assumed of what it counts; a sentence for the person
        if self.known is not None:
            check(*self.known)

    def planned(self, target: Any) -> Count:
        """What it counts in a target, before it is called; an estimate where that is not known."""
        if self.given is not None:
            return self.given(target)
        if self.known is not None:
            return count_in(self.known, target)
        return max(elements_in(target), 1)

    def counts_by_shape(self, targets: Tensor) -> Callable[[Tensor], int] | None:
        """What it counts in parts of `targets`, from their shape; None where that depends on what is in them."""
        if self.known is None or len(targets) == 0:
            return None
        name, options = self.known
        has_weight = options.get("weight") is not None
        whole = count_in(self.known, targets)
        each = targets.numel() // len(targets)
        if (has_weight and name in LABELED) or isinstance(whole, Tensor):
            return None
        if whole == targets.numel():
            return lambda target: target.size(0) * each
        if whole == len(targets) and name not in LABELED:
            return lambda target: target.size(0)
        return None

    def forward(self, output: Any, target: Any, observer: Observer | None = None) -> tuple[Tensor, Count | None]:
        """The mean loss, a 0-dim tensor, and what it counts; None where that is as planned."""
        if self.is_exact:
            return checked(self.function(output, target)), None
        found: Count | None = None
        if self.core.is_compiled or self.rule is not None:
            value = self.function(output, target)
            if self.is_unlearned and isinstance(value, Tensor):
                self.rule, self.is_unlearned = self._learned(output, target), False
            found = None if self.rule is None else self.rule(target)
        else:
            with observer or Observer(tensors_in(output), samples_in(target)) as observer:
                value = self.function(output, target)
            if self.sees_model is None:  # a model whose output has numbers of its own may have made the loss
                self.sees_model = any(tensor.numel() == 1 for tensor in tensors_in(output))
            found = observer.count_of(value) if isinstance(value, Tensor) else None
        if isinstance(value, tuple | list):
            return self._of_sum(*sum_and_count(value))
        return checked(value), self._assumed(target) if found is None else found

    def _of_sum(self, total: Tensor, count: Count) -> tuple[Tensor, Count]:
        """The mean of a loss that returned (sum, count)."""
        if isinstance(count, Tensor):
            return total / torch.where(count > 0, count, 1), count
        if count != int(count) and self.assumed is None:  # it may have meant something else
            self.assumed = f"the loss returned two numbers, taken for (sum, count), with a count of {count:g}"
        return total / (count or 1), count

    # Where it is not known --------------------------------------------------------------------------------------------

    def _assumed(self, target: Any) -> Count:
        """What it counts if nothing is known but what it looks like; it is said once."""
        if self.guess is None:
            self.guess = guess_of(self.core)
            kind = "loss, which is compiled," if self.core.is_compiled else "loss"
            self.assumed = (
                f"what the {kind} counts cannot be seen, so its means over micro-batches are weighed by "
                f"{self.guess[0]}; if that is not what it is the mean over, let it return (sum, count), or give count="
            )
        return self.guess[1](target)

    def _learned(self, output: Any, target: Any) -> Rule | None:
        """What a compiled loss counts, from one look at the function that was compiled; None if that tells nothing."""
        function = self.core.function.forward if isinstance(self.core.function, nn.Module) else self.core.function
        buffers = [(buffer, buffer.clone()) for buffer in self.owned.buffers()]
        device = next((tensor.device for tensor in tensors_in(output)), None)
        observer = Observer(tensors_in(output), samples_in(target))
        with torch.no_grad(), random_state.preserved(device=device), torch.compiler.set_stance("force_eager"):
            with observer:
                value = function(output, target, **self.core.keywords)
            for buffer, before in buffers:
                buffer.copy_(before)
        return learned_rule(observer.known(value), target) if isinstance(value, Tensor) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Criterion:
        """A loss of copies, also where it is a function: copy.deepcopy alone would leave its closure as it is."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        copied.__dict__.update({name: value for name, value in vars(self).items() if name not in vars(copied)})
        copied.owned = copy.deepcopy(self.owned, memo)
        owned = {id(part) for part in (*self.owned.modules(), *self.owned.parameters())}
        function = rebound(self.function, owned, memo)
        copied.__dict__.update(function=function, core=core_of(function))
        return copied


def owned_by(function: Any, optimized: set[int], known: set[int]) -> nn.Module:
    """A module of what a function reaches and the optimizer trains, under the names that it has there."""
    owner = nn.Module()
    for name, part in reached(function):
        key = name.replace(".", "_")
        if isinstance(part, nn.Parameter):
            if id(part) in optimized:
                owner._parameters[key] = part
        elif id(bare(part)) not in known:
            params = list(part.parameters())
            if any(id(param) in optimized for param in params) or (not params and any(True for _ in part.buffers())):
                owner._modules[key] = bare(part)
    return owner


def sum_and_count(value: Any) -> tuple[Tensor, Count]:
    """What a loss returned instead of its mean; a sentence for what is no such pair."""
    total, count = value if len(value) == 2 else (None, None)
    is_number = isinstance(count, int | float) and not isinstance(count, bool)
    is_tensor = isinstance(count, Tensor) and count.numel() == 1 and not count.requires_grad
    if not isinstance(total, Tensor) or total.numel() != 1 or not (is_number or is_tensor):
        kinds = ", ".join(map(shown, value))
        raise TypeError(f"the loss returned ({kinds}); it must return one number, its mean, or (sum, count)")
    number: Any = on_host(count.detach().reshape(())) if isinstance(count, Tensor) else count
    if not isinstance(number, Tensor) and not 0 <= number < math.inf:
        raise ValueError(f"the loss returned (sum, count) with a count of {number}")
    return checked(total), number


def checked(value: Any) -> Tensor:
    """A loss as a 0-dim tensor; a sentence for what is none."""
    if isinstance(value, Tensor) and value.numel() == 1:
        if not value.requires_grad and torch.is_grad_enabled():
            raise ValueError("the loss does not depend on any parameter: was the output or the loss detached?")
        return value if value.ndim == 0 else value.reshape(())
    if isinstance(value, Tensor):
        raise ValueError(
            f"the loss returned a tensor of shape {tuple(value.shape)}; it must return one number, its mean"
        )
    hint = ": a plain number has no gradient" if isinstance(value, int | float) else ""
    raise TypeError(f"the loss returned {shown(value)}; it must return a tensor of one number, its mean{hint}")


def shown(value: Any) -> str:
    """A value's kind, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + (" with a gradient" if value.requires_grad else "")
    return f"a {type(value).__name__}"
