"""Which operation made the first NaN or infinity of a computation, and where in the model it stands.

Forward: every operation below autograd is looked at (`TorchDispatchMode`), also those inside functions, custom
autograd.Functions and scripted modules. What is not finite is followed back from the loss to an operation whose inputs
were finite, so that an infinity that is meant, such as that of an attention mask, is not blamed where it was absorbed.
Backward: every node of the graph is looked at, in the order in which they run.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainopt.optim.report import count_nonfinite

#: Operations whose results are uninitialised memory.
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")
#: Operations that put a number of the program into a tensor: an infinity in it is meant.
WRITING = (
    "full",
    "full_like",
    "new_full",
    "fill",
    "masked_fill",
    "where",
    "index_put",
    "copy",
    "scalar_tensor",
    "lift_fresh_copy",
)
#: As a person knows them.
NAMES = {
    "addmm": "linear",
    "mm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "convolution": "convolution",
    "nll_loss_forward": "nll_loss",
    "nll_loss2d_forward": "nll_loss",
    "linalg_vector_norm": "norm",
    "_to_copy": "conversion",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
}
LINE = 60  # characters of a source line that are shown
FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
PACKAGE = os.path.dirname(os.path.dirname(FOLDER))
#: Files whose frames stand between a person's line and the operation, because they look at operations as they go by.
LOOKING = (os.path.abspath(__file__), os.path.join(FOLDER, "criterion", "observing.py"))
#: Whose lines are not the person's: trainopt's, torch's, and the standard library's that both go through.
LIBRARIES = (
    PACKAGE,
    os.path.dirname(os.path.abspath(torch.__file__)),
    contextlib.__file__,
    functools.__file__,
)


@dataclass
class Event:
    """A tensor that is not finite, and what it came from."""

    name: str  # of the operation; for a tensor from outside what it is
    nan: int
    inf: int
    numel: int
    is_outside: bool = False  # a parameter, buffer, input or constant
    is_meant: bool = False  # an infinity that the program wrote down, or that came with a buffer, as in a mask
    is_constant: bool = False  # a number of the program
    is_written: bool = False  # made with such a number
    at: tuple[int, int] = (0, 0)  # the moment
    line: str = ""  # of the person's source
    operands: str = ""  # what the finite inputs hold
    tensor: Tensor | None = None
    parents: list[Event] = field(default_factory=list)

    @property
    def counts(self) -> str:
        return f"{self.nan:,} NaN and {self.inf:,} Inf of {self.numel:,} elements"


@dataclass
class Call:
    """A call of a layer: its name and the moments between which it ran."""

    name: str
    module: nn.Module
    begin: tuple[int, int]
    end: tuple[int, int] = (sys.maxsize, sys.maxsize)

    @property
    def text(self) -> str:
        kind = type(self.module).__name__
        return f"layer '{self.name}' ({kind})" if self.name else f"the model ({kind})"

    @property
    def is_leaf(self) -> bool:
        return next(self.module.children(), None) is None


class Trace(TorchDispatchMode):
    """Follows one forward pass. A moment is (number of the operation, autograd's sequence number)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.made: dict[int, Event] = {}  # by storage; the events hold the tensors, so that none is used again
        self.outside: dict[int, tuple[str, Tensor, bool]] = {}  # with whether it was finite at first
        self.calls: list[Call] = []
        self.operations = 0
        for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in tensors:
                self.know(f"{kind} '{name}'", tensor)

    def know(self, name: str, tensor: Tensor) -> None:
        """A tensor from outside, by its name."""
        if (key := storage_of(tensor)) is not None:
            self.outside.setdefault(key, (name, tensor, not any(counted(tensor)[:2])))

    @property
    def now(self) -> tuple[int, int]:
        return self.operations, torch.autograd._get_sequence_nr()

    @contextmanager
    def following(self) -> Iterator[None]:
        """With this mode on, the calls of layers noted, and the source lines of backward nodes kept by autograd."""
        handles = []
        for name, module in layers_of(self.model):

            def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
                self.calls.append(Call(name, module, self.now))

            def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                for call in reversed(self.calls):
                    if call.module is module and call.end[0] == sys.maxsize:
                        call.end = self.now
                        break

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        try:
            with torch.autograd.set_detect_anomaly(True, check_nan=False), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        name = function._schema.name.split("::")[-1]
        if function.is_view or name in EMPTY or not all(issubclass(kind, (Tensor, nn.Parameter)) for kind in types):
            return result
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                nan, inf, numel = counted(tensor)
                if nan or inf:
                    self.note(name, tensor, (nan, inf, numel), args, kwargs or {})
                elif (key := storage_of(tensor)) in self.made:
                    del self.made[key]  # overwritten in place
        return result

    def note(self, name: str, tensor: Tensor, counts: tuple[int, int, int], args: Any, kwargs: Any) -> None:
        own = storage_of(tensor)
        event = Event(NAMES.get(name, name.strip("_")), *counts, at=self.now, line=line_of_stack(), tensor=tensor)
        operands = []
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                key = storage_of(value)
                if key == own:
                    event.parents += [self.made[key]] if key in self.made else []
                    continue
                nan, inf, numel = counted(value)
                if not nan and not inf:
                    operands.append(range_of(value))
                elif key in self.made:
                    event.parents.append(self.made[key])
                else:
                    known, _, was_finite = self.outside.get(key or 0, ("a tensor made before", value, False))
                    if was_finite:  # a layer's running mean, say, into which this very operation wrote
                        continue
                    is_number = not value.dim() and key not in self.outside
                    event.parents.append(
                        Event(
                            known,
                            nan,
                            inf,
                            numel,
                            tensor=value,
                            is_outside=True,
                            is_meant=not nan,
                            is_constant=is_number,
                        )
                    )
                    event.is_written = event.is_written or is_number
            elif isinstance(value, float) and not math.isfinite(value):
                event.is_written = True
        event.operands = " and ".join([text for text in operands if text][:2])
        event.is_meant = event.is_written and not event.nan and name.strip("_") in WRITING
        if own is not None:
            self.made[own] = event

    def origin(self, tensor: Tensor) -> tuple[Event, Event | None] | None:
        """The event that a tensor's NaN or infinity goes back to, and the operation that made NaN of its infinity, if
        that was another one."""
        event = self.made.get(storage_of(tensor) or 0)
        if event is None:
            return None
        seen: set[int] = set()
        while id(event) not in seen:
            seen.add(id(event))
            parents = [parent for parent in event.parents if not parent.is_constant]
            candidates = [parent for parent in parents if bool(parent.nan) >= bool(event.nan)]
            if candidates:
                event = candidates[0]
            elif parents:  # NaN out of infinities
                maker = event
                event = parents[0]
                while event.parents and id(event) not in seen and not event.is_meant:
                    seen.add(id(event))
                    event = event.parents[0]
                return (maker, event) if event.is_meant else (event, maker)
            else:
                break
        return event, None

    def place(self, at: tuple[int, int], which: int) -> tuple[Call | None, Call | None, Call | None]:
        """The innermost layer that a moment lies in, and the layers of it that were called before and after it.

        Args:
            which: 0 compares the numbers of operations, 1 autograd's sequence numbers.
        """
        # An operation is numbered after it has run, a node gets the number that is next.
        inside = [
            call
            for call in self.calls
            if (
                call.begin[which] < at[which] <= call.end[which]
                if which == 0
                else call.begin[which] <= at[which] < call.end[which]
            )
        ]
        inner = max(inside, key=lambda call: self.calls.index(call), default=None)
        prefix = "" if inner is None or not inner.name else inner.name + "."
        children = [
            call
            for call in self.calls
            if inner is not None
            and call is not inner
            and call.name.startswith(prefix)
            and call.name != inner.name
            and inner.begin[0] <= call.begin[0]
            and call.end[0] <= inner.end[0]
            and "." not in call.name[len(prefix) :]
        ]
        before = [
            call for call in children if (call.end[which] < at[which] if which == 0 else call.end[which] <= at[which])
        ]
        after = [
            call
            for call in children
            if (call.begin[which] >= at[which] if which == 0 else call.begin[which] > at[which])
        ]
        return inner, before[-1] if before else None, after[0] if after else None


@dataclass
class BackwardEvent:
    """A node of the graph whose gradient going out is not finite."""

    name: str  # of the operation
    counts: str
    at: tuple[int, int]
    line: str
    operands: str
    is_finite_in: bool  # whether the gradient that came in was finite


class Backward:
    """Looks at every node of a graph as it runs; `found` is the first that gives what is not finite."""

    def __init__(self, loss: Tensor) -> None:
        self.found: BackwardEvent | None = None
        self.has_where = False  # whether a choice by torch.where is in the graph
        self.handles: list[Any] = []
        todo, seen = [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self.has_where = self.has_where or node.name() == "WhereBackward0"
            todo += [following for following, _ in node.next_functions]
            self.handles.append(node.register_hook(self.look_at(node)))

    def look_at(self, node: Any) -> Any:
        def look(outgoing: Any, incoming: Any) -> None:
            if self.found is not None:
                return
            for gradient in outgoing if isinstance(outgoing, tuple) else (outgoing,):
                if gradient is not None and any(counts := counted(gradient)[:2]):
                    finite = not any(any(counted(g)[:2]) for g in incoming if g is not None)
                    name = re.sub(r"Backward\d*$", "", node.name().split("::")[-1])
                    text = f"{counts[0]:,} NaN and {counts[1]:,} Inf of {gradient.numel():,} elements"
                    line = line_of_lines(node.metadata.get("traceback_", ()))
                    self.found = BackwardEvent(
                        snake(name), text, (0, node._sequence_nr()), line, saved_in(node), finite
                    )
                    return

        return look

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that take hooks, by the names that a person knows them by: without those that torch.compile adds."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name.replace("_orig_mod.", "").removesuffix("_orig_mod"), module


def counted(tensor: Tensor) -> tuple[int, int, int]:
    try:
        return count_nonfinite(tensor)
    except (RuntimeError, NotImplementedError):  # a layout or type that cannot be looked at
        return 0, 0, 0


def storage_of(tensor: Tensor) -> int | None:
    """What a tensor shares with its views."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def range_of(tensor: Tensor) -> str:
    """The values of a finite tensor, in words."""
    tensor = tensor.detach()
    if not tensor.numel() or tensor.is_complex():
        return ""
    if tensor.numel() == 1:
        return f"{float(tensor):.3g}"
    zeros = int((tensor == 0).sum())
    zero = f" with {zeros:,} zeros" if zeros > 1 else " with a zero" if zeros else ""
    return f"[{float(tensor.min()):.3g}, {float(tensor.max()):.3g}]{zero}"


def saved_in(node: Any) -> str:
    """The values that a node kept for its gradient."""
    for name in ("_saved_self", "_saved_result", "_saved_other"):
        try:
            value = getattr(node, name)
        except (AttributeError, RuntimeError):
            continue
        if isinstance(value, Tensor) and value.is_floating_point() and not any(counted(value)[:2]):
            return range_of(value.detach())
    return ""


def line_of_stack() -> str:
    """The person's innermost line on the stack, inside the computation that is followed."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_loops(file):
            break
        if is_persons(file):
            return shown(file, frame.f_lineno, linecache.getline(file, frame.f_lineno).strip())
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of_lines(lines: Any) -> str:
    """The same of a formatted stack, as autograd keeps it."""
    for text in reversed(list(lines)):
        found = re.match(r'\s*File "(.*)", line (\d+).*?\n\s*(.*)', text)
        if found and is_loops(found[1]):
            break
        if found and is_persons(found[1]):
            return shown(found[1], int(found[2]), found[3].strip())
    return ""


def is_loops(file: str) -> bool:
    """Whether a file is of the training loop, which calls the person's code."""
    file = os.path.abspath(file)
    return file.startswith(FOLDER) and file not in LOOKING


def is_persons(file: str) -> bool:
    return not file.startswith("<frozen") and not os.path.abspath(file).startswith(LIBRARIES)


def shown(file: str, number: int, line: str) -> str:
    line = line if len(line) <= LINE else line[: LINE - 3] + "..."
    return f"{os.path.basename(file)}:{number}" + (f": {line}" if line else "")


def snake(name: str) -> str:
    """AddmmBackward's Addmm as addmm."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return NAMES.get(words, words)
