"""Muon's step: momentum, and the orthogonalised update of all matrices of one shape at once."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainopt.optim.matrix.newton_schulz import dtype_for, orthogonalize
from trainopt.optim.matrix.options import check_iteration, check_matrix, dtype_of, extra, is_muons

#: Of one stack: many small matrices go into one product, and a few large ones do not fill the memory.
STACK_ELEMENTS = 2**24

BUFFER, SECOND = "momentum_buffer", "second_momentum_buffer"
_TINY = 1e-10  # added to roots and norms that are divided by, as NorMuon's authors have it


@dataclass
class Block:
    """One matrix: a parameter, or the part of one that is orthogonalised by itself."""

    group: Mapping[str, Any]
    param: Tensor  # in the parameter's memory and of its own shape
    update: Tensor  # momentum, of the same shape, and of the dtype that the iteration is made in
    second: Tensor | None  # NorMuon's, a number a row

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return matrix_shape(self.param)


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: a convolution's are its outputs, and all else."""
    return param.shape[0], math.prod(param.shape[1:])


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


def gather(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[Tensor]]]:
    """Muon's groups with their parameters that have gradients; raises what torch's step does for those that it
    refuses, before anything is changed."""
    gathered = []
    for group in filter(is_muons, groups):
        check_iteration(group)
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            check_matrix(param, group)
            if param.is_complex():
                raise RuntimeError("Muon does not support complex parameters")
            if param.grad.layout is not torch.strided:  # type: ignore[union-attr]
                raise RuntimeError("Muon does not support sparse gradients")
        gathered.append((group, params))
    return gathered


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
        count = max(1, STACK_ELEMENTS // max(1, math.prod(blocks[0].shape)))
        for start in range(0, len(blocks), count):
            _step_stack(blocks[start : start + count])


def _add_gradients(group: Mapping[str, Any], params: list[Tensor], state: Any) -> None:
    for param in params:
        if BUFFER not in state[param]:
            state[param][BUFFER] = torch.zeros_like(param.grad, memory_format=torch.preserve_format)
        if extra(group, "normuon_beta2") is not None and SECOND not in state[param]:
            dtype = torch.float64 if param.dtype is torch.float64 else torch.float32
            state[param][SECOND] = param.new_zeros(second_shape(param, group), dtype=dtype)
    if params:
        buffers = [state[param][BUFFER] for param in params]
        torch._foreach_lerp_(buffers, [param.grad for param in params], 1 - group["momentum"])


def _blocks(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Iterator[Block]:
    """The matrices of a parameter, each with a momentum of its own memory: the buffer is not to be changed by the
    iteration, whatever its dtype."""
    parts, second = parts_of(param, group), state.get(SECOND)
    grads, buffers = parts_of(param.grad, group), parts_of(state[BUFFER], group)  # type: ignore[arg-type]
    if extra(group, "normuon_beta2") is None or second is None:
        seconds: Any = [None] * len(parts)
    elif extra(group, "split_dim") == 1:
        seconds = second.split(1, 1)
    else:
        seconds = parts_of(second, group)
    dtype = dtype_for(param, dtype_of(extra(group, "ns_dtype")))
    for part, grad, buffer, moments in zip(parts, grads, buffers, seconds, strict=True):
        momentum = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        yield Block(group, part, momentum.to(dtype), moments)


def _key(block: Block) -> Any:
    """What matrices of one stack have in common. Tensors of other classes, such as DTensors, are not stacked."""
    rows, columns = sorted(block.shape)
    alone = None if type(block.update) is Tensor else id(block.param)
    return rows, columns, block.update.dtype, block.update.device, _iteration(block.group), alone


def _iteration(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"]


def _step_stack(blocks: list[Block]) -> None:
    """Orthogonalises the updates of matrices of one shape, or of its transpose, and adds them to their parameters."""
    wide = [_matrix(block.update) for block in blocks]
    wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in wide]
    updates = orthogonalize(torch.stack(wide), *_iteration(blocks[0].group))
    for block, update in zip(blocks, updates.unbind(), strict=True):
        update = update if update.shape == block.shape else update.mT
        if block.second is not None:
            update = normalize_rows(update, block.second, block.group["normuon_beta2"])
        lr = float(block.group["lr"])
        block.param.mul_(1 - lr * block.group["weight_decay"])
        block.param.add_(update.reshape(block.param.shape), alpha=-lr * ratio_of(block))


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(matrix_shape(tensor))


def ratio_of(block: Block) -> float:
    """What ``adjust_lr_fn`` multiplies the learning rate of a matrix by."""
    rows, columns = block.shape
    if block.group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns)) if columns else 1.0


def normalize_rows(update: Tensor, second: Tensor, beta2: float) -> Tensor:
    """NorMuon: each row over the root of the moving average of its mean square, and the whole as long as it was."""
    update = update.to(second.dtype)
    length = torch.linalg.vector_norm(update)
    second.lerp_(update.square().mean(dim=1, keepdim=True), 1 - beta2)
    update = update / (second.sqrt() + _TINY)
    return update * (length / (torch.linalg.vector_norm(update) + _TINY))
