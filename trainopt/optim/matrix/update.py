"""Muon's step: momentum, and the orthogonalised update of all matrices of one shape at once."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainopt.optim.distributed import is_dtensor, placed_as, together
from trainopt.optim.matrix.newton_schulz import dtype_for, orthogonalize, takes_gram_form
from trainopt.optim.matrix.options import (
    RATIOS,
    check_matrix,
    check_values,
    dtype_of,
    extra,
    is_muons,
    is_plain,
)

#: Of one stack. Many small matrices go into one product, but a few large ones do not leave a CPU's caches, or fill the
#: memory of another device.
STACK_ELEMENTS = {"cpu": 2**23}
ELSEWHERE = 2**26

BUFFER, SECOND = "momentum_buffer", "second_momentum_buffer"
_TINY = 1e-10  # added to roots and norms that are divided by, as NorMuon's authors have it


@dataclass
class Block:
    """One matrix: a parameter, or the part of one that is orthogonalised by itself."""

    group: Mapping[str, Any]
    param: Tensor  # as its gradient and its buffer a view, of the parameter's own number of dimensions
    grad: Tensor
    buffer: Tensor
    second: Tensor | None  # NorMuon's, a number a row
    dtype: torch.dtype  # that the iteration is made in

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return matrix_shape(self.param)

    @property
    def momentum(self) -> Tensor:
        """What is to be orthogonalised. Without Nesterov's it is the buffer itself, which must not be changed."""
        return self.grad.lerp(self.buffer, self.group["momentum"]) if self.group["nesterov"] else self.buffer


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: a convolution's are its outputs, and all else."""
    return param.shape[0], math.prod(param.shape[1:])


def as_matrix(tensor: Tensor) -> Tensor:
    """A parameter's momentum as a matrix. DTensors do not flatten what is cut unevenly: they are brought together."""
    if tensor.ndim > 2 and is_dtensor(tensor):
        tensor = together(tensor)
    return tensor.reshape(matrix_shape(tensor))


def parts_of(tensor: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The parts of a tensor of a parameter's shape that are orthogonalised by themselves, as views."""
    split, dim = extra(group, "split"), extra(group, "split_dim")
    if split == 1:
        return (tensor,)
    if isinstance(split, int):
        return tensor.tensor_split(split, dim)
    return tensor.split(list(split), dim)


def second_shape(param: Tensor, group: Mapping[str, Any]) -> tuple[int, int]:
    """The shape of NorMuon's state: a number for each row of each matrix that a parameter is."""
    return param.shape[0], len(parts_of(param, group)) if extra(group, "split_dim") == 1 else 1


def gather(groups: Iterable[Mapping[str, Any]], state: Any) -> list[tuple[Mapping[str, Any], list[Tensor]]]:
    """Muon's groups as they are now, with their parameters that have gradients.

    Raises what torch's step does for those that it refuses, before anything is changed. A learning rate that is a
    tensor on a device is waited for here, once.
    """
    gathered: list[tuple[Mapping[str, Any], list[Tensor]]] = []
    for group in filter(is_muons, groups):
        check_values(group)
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            check_matrix(param, group)
            if param.is_complex():
                raise RuntimeError("Muon does not support complex parameters")
            if param.grad.layout is not torch.strided:  # type: ignore[union-attr]
                raise RuntimeError("Muon does not support sparse gradients")
            _check_states(param, group, state.get(param, {}))
        numbers = {name: float(group[name]) for name in ("lr", "weight_decay", "momentum")}
        gathered.append(({**group, **numbers}, params))
    return gathered


def _check_states(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """ValueError for states that do not go with the parameter as it is now."""
    gradient, buffer = param.grad, state.get(BUFFER)
    assert gradient is not None
    if BUFFER in state and (
        not isinstance(buffer, Tensor) or buffer.shape != gradient.shape or buffer.dtype is not gradient.dtype
    ):
        found = f"{buffer.dtype} {tuple(buffer.shape)}" if isinstance(buffer, Tensor) else repr(buffer)
        raise ValueError(f"Muon: {BUFFER} is {found}, and the gradient {gradient.dtype} {tuple(gradient.shape)}")
    second = state.get(SECOND)
    if second is not None and tuple(second.shape) != second_shape(param, group):
        raise ValueError(f"Muon: {SECOND} is not of the present split={extra(group, 'split')!r}")


@torch.no_grad()
def step(gathered: list[tuple[Mapping[str, Any], list[Tensor]]], state: Any) -> None:
    """Makes Muon's step of what `gather` has found."""
    stacks: dict[Any, list[Block]] = defaultdict(list)
    for group, params in gathered:
        _add_gradients(group, params, state)
        for param in params:
            for block in _blocks(group, param, state[param]):
                stacks[_key(block)].append(block)
    for blocks in stacks.values():
        most = STACK_ELEMENTS.get(blocks[0].param.device.type, ELSEWHERE)
        count = max(1, most // max(1, math.prod(blocks[0].shape)))
        for start in range(0, len(blocks), count):
            _step_stack(blocks[start : start + count])


def _add_gradients(group: Mapping[str, Any], params: list[Any], state: Any) -> None:
    for param in params:
        start(group, param, state[param])
    # torch's operators on lists take ordinary tensors or DTensors, and not both.
    for part in ([param for param in params if is_plain(param) is plain] for plain in (True, False)):
        if part:
            buffers = [state[param][BUFFER] for param in part]
            torch._foreach_lerp_(buffers, [param.grad for param in part], 1 - group["momentum"])


def start(group: Mapping[str, Any], param: Any, state: dict[str, Any]) -> None:
    """Makes what a parameter lacks of states for its next step."""
    if BUFFER not in state:
        like = param.detach() if param.grad is None else param.grad
        state[BUFFER] = torch.zeros_like(like, memory_format=torch.preserve_format)
    if extra(group, "normuon_beta2") is not None and SECOND not in state:
        dtype = torch.float64 if param.dtype is torch.float64 else torch.float32
        state[SECOND] = param.new_zeros(second_shape(param, group), dtype=dtype)


def _blocks(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Iterator[Block]:
    """The matrices of a parameter."""
    parts = [parts_of(tensor, group) for tensor in (param, param.grad, state[BUFFER])]  # type: ignore[arg-type]
    of_rows: Any = [None] * len(parts[0])
    if extra(group, "normuon_beta2") is not None:
        is_by_columns = extra(group, "split_dim") == 1
        of_rows = state[SECOND].split(1, 1) if is_by_columns else parts_of(state[SECOND], group)
    dtype = dtype_for(param, dtype_of(extra(group, "ns_dtype")))
    for part, grad, buffer, second in zip(*parts, of_rows, strict=True):
        yield Block(group, part, grad, buffer, second, dtype)


def _key(block: Block) -> Any:
    """What matrices of one stack have in common. Tensors of other classes, such as DTensors, are not stacked."""
    alone = None if type(block.buffer) is Tensor else id(block.param)
    return block.shape, block.dtype, block.buffer.device, _iteration(block.group), alone


def _iteration(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"]


def _step_stack(blocks: list[Block]) -> None:
    """Orthogonalises the updates of matrices of one shape and adds them to their parameters."""
    first = blocks[0]
    if type(first.buffer) is Tensor:
        stack = torch.empty(len(blocks), *first.shape, dtype=first.dtype, device=first.buffer.device)
        for block, place in zip(blocks, stack.unbind(), strict=True):
            place.view(block.param.shape).copy_(block.momentum)
    else:
        stack = as_matrix(first.momentum).to(first.dtype, copy=True).unsqueeze(0)
    updates = orthogonalize(stack, *_iteration(first.group))
    for block, update in zip(blocks, updates.unbind(), strict=True):
        if block.second is not None:
            update = normalize_rows(update, block.second, block.group["normuon_beta2"])
        lr = block.group["lr"]
        block.param.mul_(1 - lr * block.group["weight_decay"])
        update = placed_as(block.param, update.reshape(block.param.shape))
        block.param.add_(update, alpha=-lr * ratio_of(block))


def ratio_of(block: Block) -> float:
    """What the learning rate of a matrix is multiplied by; of an empty one it does not matter."""
    rows, columns = block.shape
    return RATIOS[block.group["adjust_lr_fn"]](rows, columns) if columns else 1.0


def normalize_rows(update: Tensor, second: Tensor, beta2: float) -> Tensor:
    """NorMuon: each row over the root of the moving average of its mean square, and the whole as long as it was."""
    update = update.to(second.dtype)
    length = torch.linalg.vector_norm(update)
    second.lerp_(placed_as(second, update.square().mean(dim=1, keepdim=True)), 1 - beta2)
    update = update / (second.sqrt() + _TINY)
    return update * (length / (torch.linalg.vector_norm(update) + _TINY))


def note_of(group: Mapping[str, Any], param: Tensor) -> str:
    """How a parameter of Muon's is orthogonalised, in words."""
    dtype = dtype_for(param, dtype_of(extra(group, "ns_dtype")))
    shapes = [matrix_shape(part) for part in parts_of(param, group)]
    form = "Gram form" if is_plain(param) and takes_gram_form(*shapes[0], group["ns_steps"], dtype) else "plain form"
    pieces = "" if len(shapes) == 1 else f", as {len(shapes)} matrices"
    normed = "" if extra(group, "normuon_beta2") is None else ", rows normalised (normuon_beta2)"
    return f"orthogonalised in {str(dtype).removeprefix('torch.')}, {form}{pieces}{normed}"
