"""The losses, shapes and dtypes that benchmarks.losses measures, and who computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trainopt import functional

Loss = Callable[..., Tensor]
EAGER, OURS = "torch eager", "trainopt"


@dataclass(frozen=True)
class Case:
    """One loss over tensors of one size.

    Args:
        make: makes the operands; those that are floating and want a gradient say so.
        losses: the contenders' functions of the operands, by name; ratios are against the one named `reference`.
        moved: bytes that forward and backward must read and write, or 0 where memory is not what they wait for.
        moved_on_gpu: the same on a GPU, if it is not as much: where one pass over the logits makes loss and gradient.
        others: contenders that are no losses and just run: what a part of the work costs.
    """

    name: str
    title: str
    make: Callable[[], tuple[Tensor, ...]]
    losses: Mapping[str, Loss]
    moved: int = 0
    moved_on_gpu: int = 0
    others: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    reference: str = EAGER


class Step:
    """Forward and backward of a loss, as a training step calls them: gradients are made anew each time."""

    def __init__(self, loss: Loss, operands: tuple[Tensor, ...]) -> None:
        self.loss = loss
        self.operands = operands
        self.leaves = [operand for operand in operands if operand.requires_grad]

    def __call__(self) -> Tensor:
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.loss(*self.operands)
        loss.backward()
        return loss


def _two(name: str, /, **options: object) -> dict[str, Loss]:
    """torch's function and ours with the same options."""
    return {EAGER: partial(getattr(F, name), **options), OURS: partial(getattr(functional, name), **options)}


def _cross_entropy(rows: int, classes: int, dtype: torch.dtype, note: str = "", **options: object) -> Case:
    def make() -> tuple[Tensor, ...]:
        return torch.randn(rows, classes).to(dtype).requires_grad_(), torch.randint(classes, (rows,))

    kind = str(dtype).removeprefix("torch.")
    title = f"cross_entropy, {rows:,} × {classes:,}, {kind}{note and ', ' + note}"
    losses = _two("cross_entropy", **options)
    if note == "in place":
        losses[OURS] = partial(functional.cross_entropy, inplace_backward=True)
    bytes_of_logits = rows * classes * dtype.itemsize
    on_gpu = 3 if note == "in place" else 2  # backward's gradient is not forward's, then
    return Case("cross-entropy", title, make, losses, 3 * bytes_of_logits, on_gpu * bytes_of_logits)


def _pointwise(name: str, change: Callable[[Tensor], Tensor], size: int = 2**24, **options: object) -> Case:
    def make() -> tuple[Tensor, ...]:
        return change(torch.randn(size)).requires_grad_(), torch.rand(size)

    return Case("pointwise", f"{name}, {size:,}", make, _two(name, **options), moved=5 * 4 * size)


def _stored(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


@torch.no_grad()
def _products(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    logits = hidden @ weight.t()
    torch.mm(logits, weight)
    torch.mm(logits.t(), hidden)


def _in_single(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.linear_cross_entropy(hidden.float(), weight.float(), target)


def _linear(dtype: torch.dtype, tokens: int = 2048, width: int = 768, words: int = 50257) -> Case:
    def make() -> tuple[Tensor, ...]:
        hidden, weight = torch.randn(tokens, width).to(dtype), (torch.randn(words, width) / width**0.5).to(dtype)
        return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(words, (tokens,))

    title = f"linear_cross_entropy, {tokens:,} × {width:,} × {words:,}, {str(dtype).removeprefix('torch.')}"
    if dtype != torch.float32:  # torch's own products in these types may take minutes
        losses = {"trainopt on float32": _in_single, OURS: functional.linear_cross_entropy}
        return Case("linear-low", title, make, losses, reference="trainopt on float32")
    losses = {EAGER: _stored, OURS: functional.linear_cross_entropy}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["torch chunked"] = _torch_chunked
    return Case("linear", title, make, losses, others={"three products alone": _products})


CASES = (
    _cross_entropy(1024, 50257, torch.float32),
    _cross_entropy(1024, 50257, torch.float32, "smoothing 0.1", label_smoothing=0.1),
    _cross_entropy(1024, 50257, torch.float32, "in place"),
    _cross_entropy(1024, 50257, torch.bfloat16),
    _cross_entropy(1024, 50257, torch.bfloat16, "smoothing 0.1", label_smoothing=0.1),
    _cross_entropy(8192, 1000, torch.float32),
    _cross_entropy(8192, 1000, torch.bfloat16),
    _cross_entropy(4096, 10, torch.float32),
    _cross_entropy(64, 10, torch.float32),
    _pointwise("mse_loss", torch.Tensor.clone),
    _pointwise("l1_loss", torch.Tensor.clone),
    _pointwise("smooth_l1_loss", torch.Tensor.clone),
    _pointwise("huber_loss", torch.Tensor.clone),
    _pointwise("binary_cross_entropy_with_logits", torch.Tensor.clone),
    _pointwise("binary_cross_entropy", torch.Tensor.sigmoid),
    _pointwise("kl_div", F.logsigmoid, reduction="sum"),
    _linear(torch.float32),
    _linear(torch.bfloat16),
)
