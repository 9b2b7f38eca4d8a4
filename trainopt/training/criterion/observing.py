"""What a loss counts, seen from the operations that it makes.

A loss that is a person's own function or module says nowhere what its mean is over. But it makes that mean somewhere:
by a loss of torch's with a reduction, by `mean`, or by a sum that is divided by a number. So its operations are watched
as they go by, and what is known of a number follows it through those that keep it: scaling, adding, casting.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trainopt.training.criterion.counting import Count, arguments_of, counted, name_of_function, on_host, reduction_of


@dataclass(frozen=True)
class Reduced:
    """What is known of a number that depends on the model's output.

    `count` is None for a sum that has not been divided; `counts` holds those of several means that were added up, where
    they differ.
    """

    count: Count | None = None
    counts: tuple[Count | None, ...] = ()
    labels: dict[str, Any] | None = None  # the arguments of the loss of torch's that made it, where one did

    @property
    def terms(self) -> tuple[Count | None, ...]:
        return self.counts or (self.count,)


SAME = {"neg", "positive", "float", "double", "half", "bfloat16", "to", "type", "type_as", "clone", "contiguous"}
SAME |= {"squeeze", "unsqueeze", "reshape", "view", "view_as", "flatten", "expand", "nan_to_num", "getitem", "where"}
SAME |= {"masked_fill", "requires_grad", "select"}
ADDING = {"add", "sub", "subtract", "radd", "rsub", "iadd", "isub", "stack", "cat", "concat", "concatenate", "hstack"}
SCALING = {"mul", "multiply", "rmul", "imul"}
DIVIDING = {"div", "divide", "true_divide", "truediv", "itruediv", "idiv"}
MEANS, SUMS = {"mean", "nanmean"}, {"sum", "nansum", "dot", "vdot", "inner", "einsum", "tensordot", "matmul"}
#: What they make has a tensor's dtype and device, and depends on nothing in it.
MAKING = {"new_zeros", "new_ones", "new_full", "new_tensor", "zeros_like", "ones_like", "full_like"}
LEAST = {"clamp", "clamp_min", "clip", "maximum", "max"}


class Observer(TorchFunctionMode):
    """While it is entered, torch's functions are watched. `count_of` then says what a number is the mean over.

    Args:
        sources: the tensors on which what a batch gives depends: the model's output, or its parameters.
        samples: in the batch.
    """

    def __init__(self, sources: Iterable[Tensor], samples: int) -> None:
        super().__init__()
        self.samples = samples
        # By id; the reference tells a tensor from a later one in the same place, and keeps none alive.
        self._depending: dict[int, weakref.ref[Tensor]] = {id(source): weakref.ref(source) for source in sources}
        self._independent: dict[int, weakref.ref[Tensor]] = {}
        self._known: dict[int, Reduced] = {}
        self._unclamped: dict[int, tuple[Tensor, Tensor]] = {}  # a count and what it was before it was made at least 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*tensors_among(args), *tensors_among(kwargs.values())]
        before = [self.known(tensor) for tensor in inputs]  # an operation in place has its result among its inputs
        depends = [self.depends(tensor) for tensor in inputs]
        result = function(*args, **kwargs)
        for made in result if isinstance(result, list | tuple) else (result,):
            if not isinstance(made, Tensor):
                continue
            if not any(depends) or name_of(function) in MAKING:
                self._independent[id(made)] = weakref.ref(made)
                self._note_count(function, inputs, made)
                continue
            self._depending[id(made)] = weakref.ref(made)
            known = self._follow(function, args, kwargs, inputs, before, depends, made)
            if known is None:
                self._known.pop(id(made), None)
            else:
                self._known[id(made)] = known
        return result

    def start(self, sources: Iterable[Tensor]) -> None:
        """Takes in more tensors that depend on what a batch gives."""
        self._depending |= {id(source): weakref.ref(source) for source in sources}

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on what the model gave, also by an operation that no one saw."""
        if is_noted(tensor, self._depending):
            return True
        return tensor.grad_fn is not None and not is_noted(tensor, self._independent)

    def known(self, tensor: Tensor) -> Reduced | None:
        """What is known of a number; None for any other tensor."""
        return self._known.get(id(tensor)) if is_noted(tensor, self._depending) else None

    def count_of(self, loss: Tensor) -> Count | None:
        """What a loss is the mean over; None where that is not known."""
        if loss.grad_fn is None and not self.depends(loss) and (loss.requires_grad or float(loss) == 0):
            return 0  # such as torch.zeros((), requires_grad=True), where nothing was there to be counted
        known = self.known(loss)
        count = None if known is None else known.count
        return on_host(count) if isinstance(count, Tensor) else count

    def _note_count(self, function: Any, inputs: list[Tensor], made: Tensor) -> None:
        """Remembers a count that was made at least 1 so that nothing is divided by 0."""
        if made.numel() == 1 and len(inputs) > 0 and name_of(function) in LEAST:
            self._unclamped[id(made)] = (made, inputs[0])

    def _follow(
        self,
        function: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        before: list[Reduced | None],
        depends: list[bool],
        made: Tensor,
    ) -> Reduced | None:
        """What is known of a result."""
        if (loss := name_of_function(function)) is not None:
            arguments = arguments_of(function, args, kwargs)
            if (reduction := reduction_of(arguments)) == "none":
                return None
            return Reduced(None if reduction == "sum" else counted(loss, arguments), labels=arguments)
        name = name_of(function)
        terms = [known for known, is_one in zip(before, depends, strict=True) if is_one]
        first = terms[0]
        if name in MEANS or name in SUMS:
            return self._reduce(name, args, kwargs, inputs, first, made)
        if any(term is None for term in terms):
            return None  # it is part of it, and nothing is known of that
        if name in ADDING:
            return combined([term for term in terms if term is not None])
        if first is None or (len(terms) > 1 and name != "where"):
            return None
        if name in SAME:
            return first
        if name in SCALING:  # by 0: what a person returns where there is nothing to be counted
            return Reduced(0) if any(is_zero(arg) for arg in args) else first
        if name in DIVIDING and depends[0]:
            return self._divide(first, args[1] if len(args) > 1 else kwargs.get("other"), made)
        return None

    def _reduce(
        self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], known: Reduced | None, made: Tensor
    ) -> Reduced | None:
        """Of a mean or a sum."""
        whole = inputs[0]
        if known is not None:  # of means already, such as a list of them that was stacked
            if len(known.counts) == self.samples and name in MEANS:
                return Reduced(self.samples)
            return known if len(inputs) == 1 else None
        if name in SUMS:
            return Reduced() if made.ndim == 0 else None
        dimensions = args[1] if len(args) > 1 else kwargs.get("dim")
        dimensions = dimensions if isinstance(dimensions, list | tuple) else (dimensions,)
        if made.ndim != 0 and not any(each in (0, -whole.ndim) for each in dimensions):
            return None  # a mean for each sample; what is counted is decided by what comes next
        if name == "nanmean":
            return Reduced((~whole.detach().isnan()).sum()) if made.ndim == 0 else None
        return Reduced(whole.numel() // max(made.numel(), 1)) if whole.numel() else Reduced(0)

    def _divide(self, known: Reduced, divisor: Any, made: Tensor) -> Reduced | None:
        """Of a quotient: a sum's divisor is what it is a mean over."""
        if known.counts:  # such as the sum of the samples' losses, divided by their number
            is_mean = isinstance(divisor, int) and divisor == len(known.counts) == self.samples
            return Reduced(self.samples) if is_mean else known
        if known.count is not None:
            return known
        if isinstance(divisor, Tensor):
            if divisor.numel() != 1:
                return None
            _, plain = self._unclamped.get(id(divisor), (None, None))
            divisor = divisor.detach()
            if plain is not None and plain.numel() == 1:
                divisor = torch.where(plain.detach() == 0, 0, divisor)
            return Reduced(divisor)
        if not isinstance(divisor, int | float) or not 0 <= divisor < math.inf:
            return None
        if divisor == 1 and self.samples > 1 and made.item() == 0:  # such as max(mask.sum().item(), 1): nothing counts
            return Reduced(0)
        return Reduced(divisor)


def combined(terms: list[Reduced]) -> Reduced:
    """Of what is added up. Numbers that do not depend on the model have no part in it."""
    counts = tuple(count for term in terms for count in term.terms)
    if all(count is None for count in counts):
        return Reduced()
    if all(is_same(count, counts[0]) for count in counts):
        # Of as many means as there are samples each may be one sample's: their counts are kept apart.
        return replace(terms[0], count=counts[0], counts=counts if len(counts) > 1 else ())
    return Reduced(None, counts)


def is_noted(tensor: Tensor, notes: dict[int, weakref.ref[Tensor]]) -> bool:
    reference = notes.get(id(tensor))
    return reference is not None and reference() is tensor


def is_same(one: Count | None, other: Count | None) -> bool:
    if one is None or other is None:
        return one is other
    return float(one) == float(other)


def is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, without what tells an operator or one in place."""
    return getattr(function, "__name__", "").strip("_")


def tensors_among(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))
