"""Where the first NaN or infinity of an update comes from, and what to try.

The update's micro-batches are gone through once more, on the weights as they are, with every operation looked at
(`origin`). That costs a few updates, and only when one has been lost.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.optim.report import count_nonfinite
from trainopt.training import random_state
from trainopt.training.data import move, tensors_in
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained
from trainopt.training.watch.origin import Backward, Call, Event, Trace, layers_of

SEARCHES = 8  # lost updates that are all looked into; after them only each that doubles their number
LARGE = 1e4  # a weight that has blown up

#: What to try, by the operation; for one whose result and one whose derivative is not finite.
FORWARD = {
    "log": "log needs numbers above 0: clamp(min=eps) them, or work with log_softmax or logsigmoid instead",
    "div": "it divides by 0 or by far too little: add an eps to the denominator",
    "reciprocal": "it divides by 0: add an eps to the denominator",
    "sqrt": "sqrt needs numbers of at least 0: clamp(min=0) them",
    "rsqrt": "rsqrt needs numbers above 0: add an eps inside",
    "exp": "exp overflows above 88 (in float16 above 11): subtract the largest first, or use logsumexp or softplus",
    "pow": "a power of a negative number, a negative power of 0, or an overflow: clamp the base",
    "softmax": "a row of it is masked altogether (all -inf), or overflowed: leave one entry, or mask with -1e4",
    "log_softmax": "a row of it is masked altogether (all -inf), or overflowed",
    "scaled_dot_product_attention": "a row of the mask leaves nothing, or the queries and keys overflowed",
    "linear": "the weights or what is multiplied with them have grown too large",
    "matmul": "what is multiplied has grown too large",
    "convolution": "the weights or what is multiplied with them have grown too large",
    "std": "the standard deviation of a single element: correction=0, or more elements",
    "var": "the variance of a single element: correction=0, or more elements",
    "nll_loss": "the mean over no target: every target of the batch is the one that is ignored",
    "mean": "the mean of nothing: the tensor is empty",
    "acos": "acos is defined in [-1, 1]: clamp",
    "asin": "asin is defined in [-1, 1]: clamp",
}
BACKWARD = {
    "sqrt": "the derivative of sqrt is infinite at 0: add an eps inside, sqrt(x + eps)",
    "norm": "the derivative of a norm is not defined at 0: add an eps, (x.square().sum() + eps).sqrt()",
    "linalg_vector_norm": "the derivative of a norm is not defined at 0: add an eps, (x.square().sum() + eps).sqrt()",
    "pow": "the derivative of a power below 1 is infinite at 0: clamp(min=eps) the base",
    "log": "the derivative of log is infinite at 0: clamp(min=eps) its input",
    "div": "the derivative of a division by 0 is infinite: add an eps to the denominator",
    "std": "the derivative of a standard deviation is not defined where all is equal: (var + eps).sqrt()",
    "acos": "the derivative of acos is infinite at -1 and 1: clamp to a little less",
    "asin": "the derivative of asin is infinite at -1 and 1: clamp to a little less",
    "cdist": "the derivative of a distance is not defined at 0: add an eps",
}
#: Where an infinity of the data may be meant, as a mask.
MASKED = ("softmax", "log_softmax", "scaled_dot_product_attention")
WIDER = "bfloat16 has the range of float32; or scale the inputs, the loss or the weights down"
UNRECOVERABLE = (
    "no update can mend it: go back to a checkpoint or to other first weights, with a lower learning rate or clip"
)
BRANCH = "a branch that torch.where does not take counts too: guard the input of the operation, not its result"


@dataclass(frozen=True)
class Finding:
    """What was not finite first, in a phrase with numbers, and what to try.

    `key` is the same for the same fault in another batch.
    """

    text: str
    key: str
    advice: str = ""
    is_data: bool = False  # whether the data had it already

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


def first_nonfinite(
    micro_batches: Sequence[tuple[Any, float | Tensor]], trained: Trained, precision: Precision
) -> Finding | None:
    """What was not finite first; None if all is finite when computed again. The gradients are cleared.

    Args:
        micro_batches: each with the weight of its mean loss in the update. float16's scale is right for the weighed
            loss, and may overflow for a healthy one that is not.
        trained: the model must not be sharded: a process that stops earlier than the others would leave them waiting
            for it. Its buffers are not restored.
    """
    if (bad := nonfinite_parameter(trained.model)) is not None:
        return bad
    try:
        with random_state.preserved(device=precision.device), uncompiled():
            return _in_all(micro_batches, trained, precision)
    except Exception as error:  # a model that cannot be looked into must not end the training
        text = nonfinite_gradient(trained.model) or "a gradient is not finite"
        text = f"{text}; looking for its origin failed: {type(error).__name__}: {error}"
        return Finding(text, "search failed")
    finally:
        trained.model.zero_grad()


def _in_all(
    micro_batches: Sequence[tuple[Any, float | Tensor]], trained: Trained, precision: Precision
) -> Finding | None:
    trained.model.zero_grad()
    for batch, weight in micro_batches:
        moved = move(batch, precision.device)
        if (found := _in_one(moved, weight, trained, precision)) is not None:
            is_float16 = precision.dtype is torch.float16
            return _apart_from_float16(found, moved, trained, precision) if is_float16 else found
    if (text := nonfinite_gradient(trained.model)) is not None:
        text += ", while those of each micro-batch are finite: their sum overflows"
        return Finding(text, "sum", "a smaller loss, fewer micro-batches, or bfloat16")
    return None


def nonfinite_parameter(module: nn.Module, of: str = "") -> Finding | None:
    """The first parameter that is not finite itself; `of` says whose it is."""
    for name, param in module.named_parameters():
        if (found := described(param)) is not None:
            text = f"parameter '{name}'{of} itself {found}{first_place(param.detach())}"
            return Finding(text, f"parameter {name}{of}", UNRECOVERABLE)
    return None


def nonfinite_gradient(module: nn.Module, of: str = "") -> str | None:
    """A phrase that names the last parameter whose gradient is not finite: the first that backward came to."""
    for name, param in reversed(list(module.named_parameters())):
        if (found := described(param.grad)) is not None:
            return f"the gradient of parameter '{name}'{of} {found}"
    return None


def _in_one(batch: Any, weight: float | Tensor, trained: Trained, precision: Precision) -> Finding | None:
    """The finding in one micro-batch; its gradients are added to those of the ones before."""
    model = trained.model
    inputs, target = trained.split(batch)
    trace = Trace(model)
    for kind, tensors in (
        ("parameter", trained.criterion.owned.named_parameters()),
        ("buffer", trained.criterion.owned.named_buffers()),
    ):
        for name, tensor in tensors:
            trace.know(f"{kind} '{name}' of the loss", tensor)
    for what, tree in (("inputs", inputs), ("target", target)):
        for path, tensor in named_tensors(tree):
            trace.know(f"the batch's {what}{path}", tensor)
    outputs = _Outputs(model)
    with outputs.watched():
        with trace.following(), precision.autocast():
            output = trained.output(model, inputs)
            loss = trained.loss(output, target)
        if (found := described(loss)) is not None:
            origin = trace.origin(loss)
            if origin is None:  # computed by something that cannot be looked into
                text = outputs.first or f"the loss {found}, while the model's output is finite"
                return Finding(text, text.split(" has ")[0])
            return _forward_finding(trace, *origin, loss, outputs)
        if not loss.requires_grad:
            return None
        backward = Backward(loss)
        try:
            precision.scaled(loss * weight).backward()
        finally:
            backward.remove()
    if backward.found is not None:
        return _backward_finding(trace, backward, outputs, model)
    return None


def _forward_finding(trace: Trace, event: Event, maker: Event | None, loss: Tensor, outputs: _Outputs) -> Finding:
    if event.is_outside:
        return _outside_finding(event)
    if maker is not None and maker.is_outside and maker.name.startswith("the batch") and event.name not in MASKED:
        return _outside_finding(maker)
    layer, before, after = trace.place(event.at, 0)
    by = (
        f"`{event.name}`"
        + (f" ({event.line})" if event.line else "")
        + (f" of {event.operands}" if event.operands else "")
    )
    advice = FORWARD.get(event.name, "")
    if event.tensor is not None and event.tensor.dtype == torch.float16 and event.inf and not event.is_written:
        advice = f"float16 ends at 65,504; {WIDER}"
    if layer is None:
        text = f"the loss has {loss_counts(loss)}, while the model's output is finite: {by} made it"
        where = "loss"
    elif layer.is_leaf:
        text = f"the output of {layer.text} has {outputs.counts.get(id(layer.module)) or event.counts}: {by} made it"
        where = layer.text
        if (grown := weights_of(layer.module)) is not None:
            advice = f"{grown}; the learning rate may be too high: try a lower one, or clip"
    else:
        where = between(layer, before, after)
        text = f"{by}, {where}, has {event.counts}"
    if maker is not None:
        line = f" ({maker.line})" if maker.line and maker.line != event.line else ""
        if maker.is_outside:
            text += f", of the infinities of {maker.name}"
        elif maker.is_meant:
            text += f", of the infinities that `{maker.name}`{line} wrote"
        else:
            text += f", and `{maker.name}`{line} then made NaN of the infinity"
    elif event.is_written:
        text += ", with a number of the program that is not finite"
    return Finding(text, f"forward {event.name} {where}", advice)


def _outside_finding(event: Event) -> Finding:
    assert event.tensor is not None
    shape = tuple(event.tensor.shape)
    text = f"{event.name}, a tensor of shape {shape}, has {event.counts}{first_place(event.tensor)}"
    is_data = event.name.startswith("the batch")
    return Finding(text, event.name, "look at the data" if is_data else "", is_data)


def _backward_finding(trace: Trace, backward: Backward, outputs: _Outputs, model: nn.Module) -> Finding:
    event = backward.found
    assert event is not None
    layer, before, after = trace.place(event.at, 1)
    where = "in the loss" if layer is None else f"in {layer.text}" if layer.is_leaf else between(layer, before, after)
    by = f"the derivative of `{event.name}`" + (f" ({event.line})" if event.line else "")
    by += f" at {event.operands}" if event.operands else ""
    made = f"{by}, {where}, made it" + (" of a finite gradient" if event.is_finite_in else "")
    what = outputs.first_gradient or f"a gradient has {event.counts}"
    advice = [BACKWARD[event.name]] if event.name in BACKWARD else []
    if backward.has_where:
        advice.append(BRANCH)
    return Finding(f"{what}: {made}", f"backward {event.name} {where}", "; ".join(advice))


def _apart_from_float16(found: Finding, batch: Any, trained: Trained, precision: Precision) -> Finding:
    """Whether the same computation is finite in float32: then it is an overflow, and no NaN of the model's."""
    trained.model.zero_grad()
    try:
        again = _in_one(batch, 1.0, trained, Precision("float32", precision.device))
    except RuntimeError:  # the model itself converts to float16
        return found
    if again is None:
        text = f"{found.text}; in float32 all is finite: an overflow of float16, which ends at 65,504"
        return Finding(text, found.key, WIDER, found.is_data)
    return Finding(f"{found.text}; in float32 too: no overflow of float16", found.key, found.advice, found.is_data)


def between(layer: Call, before: Call | None, after: Call | None) -> str:
    """Where in a forward an operation stands that belongs to no layer."""
    inside = f"inside the forward of {layer.text}"
    if before is not None and after is not None:
        return f"between {before.text} and {after.text}, {inside}"
    if before is not None:
        return f"after {before.text}, {inside}"
    return f"before {after.text}, {inside}" if after is not None else inside


def weights_of(module: nn.Module) -> str | None:
    """That a layer's weights have blown up, with their size."""
    largest = max((float(param.detach().abs().max()) for param in module.parameters() if param.numel()), default=0.0)
    return f"its weights reach {largest:.2g}" if largest > LARGE else None


class _Outputs:
    """The first output of a layer, and the first gradient of one, that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first = self.first_gradient = ""
        self.counts: dict[int, str] = {}  # of each layer whose output is not finite

    def watched(self) -> ExitStack:
        stack = ExitStack()
        for name, module in layers_of(self.model):
            layer = f"layer '{name}' ({type(module).__name__})" if name else f"the model ({type(module).__name__})"

            def look(module: nn.Module, inputs: Any, output: Any, layer: str = layer) -> None:
                for tensor in tensors_in(output):
                    if (found := described(tensor)) is not None:
                        self.counts.setdefault(id(module), found.removeprefix("has "))
                        self.first = self.first or f"the output of {layer} {found}"
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient, layer=layer: self.look_back(gradient, layer))

            handle = module.register_forward_hook(look)
            stack.callback(handle.remove)
        return stack

    def look_back(self, gradient: Tensor, layer: str) -> None:
        if not self.first_gradient and (found := described(gradient)) is not None:
            self.first_gradient = f"the gradient of the output of {layer} {found}"


class SkippedUpdates:
    """The updates left out so far: each fault is told once, and at the end how often it came."""

    def __init__(self) -> None:
        self.updates = 0
        self.known: dict[str, list[int]] = {}  # by the key of the finding: how often, and first in which update

    def is_searched(self) -> bool:
        """Counts the next update; whether it is to be looked into."""
        self.updates += 1
        return self.updates <= SEARCHES or self.updates & (self.updates - 1) == 0

    def is_new(self, found: Finding | None, update: int) -> bool:
        """Counts a finding, None where it was not looked for; whether it has not been told."""
        if found is None:
            return False
        entry = self.known.setdefault(found.key, [0, update])
        entry[0] += 1
        return entry[0] == 1

    def summary(self) -> str | None:
        """How many updates were left out, where it was more than have been told of."""
        if self.updates <= len(self.known):
            return None
        often = ", ".join(f"{count:,} for the reason given at update {first:,}" for count, first in self.known.values())
        searched = sum(count for count, _ in self.known.values())
        looked_into = "" if searched == self.updates else f" {searched:,} of them were looked into,"
        return f"{self.updates:,} updates were left out as not finite:{looked_into} {often}"

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "known": {key: list(entry) for key, entry in self.known.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.known = {str(key): [int(count), int(first)] for key, (count, first) in state["known"].items()}


def uncompiled() -> Any:
    """What torch.compile has compiled runs as it was written: else it could not be looked into."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def first_place(tensor: Tensor) -> str:
    """Where the first element of a tensor is that is not finite."""
    if not tensor.dim() or tensor.layout != torch.strided:
        return ""
    place = (~tensor.isfinite()).nonzero()[0].tolist()
    if len(place) == 1:
        return f", first in row {place[0]}"
    if len(place) == 2:
        return f", first in row {place[0]}, column {place[1]}"
    return f", first in row {place[0]}, at {place[1:]} of it"


def loss_counts(loss: Tensor) -> str:
    return (described(loss) or "").removeprefix("has ")


def named_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings, lists and tuples with their places, such as ['mask'] or [0]."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_tensors(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from named_tensors(value, f"{path}[{index}]")


def described(tensor: Any) -> str | None:
    """What is not finite in a tensor, with numbers; None if all is."""
    nan, inf, numel = count_nonfinite(tensor)
    return f"has {nan:,} NaN and {inf:,} Inf of {numel:,} elements" if nan or inf else None
