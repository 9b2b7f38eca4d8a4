"""States in 8 bits: codes in a uint8 tensor of the parameter's shape, and a float32 scale for each block of 256.

Blocks are runs of elements in memory, in the order in which the tensor's own strides have them. csrc/core/code8.h says
which numbers the codes stand for, and is what the engine does; this is the same in plain torch, bit for bit.

Where a tensor's rows, along its first dimension, are whole blocks, the scales have a row for each of them: so they can
be spread over processes as a parameter's rows are (DTensors), and spread anew. A DTensor is worked on rank by rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainopt.optim.distributed import elements, is_cut, is_dtensor, spread_like

#: Elements that share a scale.
BLOCK = 256
#: What is put behind a state's name for the key of its scales.
SUFFIX = "_scale"
#: Elements below which a state is stored in float32: there is little to save.
LEAST_ELEMENTS = 4096


def blocks_of(numel: int) -> int:
    """How many scales a state of so many elements has."""
    return -(-numel // BLOCK)


def shape_of_scales(shape: torch.Size) -> torch.Size:
    """The shape of the scales of a state of this shape."""
    row = shape[1:].numel()
    has_rows = len(shape) > 1 and row > 0 and row % BLOCK == 0
    return torch.Size((shape[0], row // BLOCK) if has_rows else (blocks_of(shape.numel()),))


def can_be_shared(param: Tensor) -> bool:
    """Whether the processes that share a DTensor have whole blocks each; True for an ordinary tensor."""
    cuts = {placement.dim for placement in getattr(param, "placements", ()) if is_cut(placement)}
    return not cuts or (cuts == {0} and len(shape_of_scales(param.shape)) > 1 and elements(param).is_contiguous())


def scale_of(state: Mapping[str, Any], name: str) -> Tensor:
    """The scales of a state in codes; ValueError if they are not there, or are those of another number of elements."""
    scale, blocks = state.get(name + SUFFIX), blocks_of(state[name].numel())
    fits = isinstance(scale, Tensor) and scale.numel() == blocks and scale.dtype is torch.float32
    if not fits or not isinstance(scale, Tensor) or state[name].dtype is not torch.uint8:
        found = f"{scale.dtype} of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(
            f"{name} is {state[name].dtype} and {name + SUFFIX} {found}: a state in 8 bits is of torch.uint8, and this"
            f" one has {blocks} scales of torch.float32"
        )
    wanted = shape_of_scales(state[name].shape)
    return scale.detach() if is_dtensor(scale) or scale.shape == wanted else scale.detach().reshape(wanted)


def zeros_like(param: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and the scales of a state of zeros."""
    codes = torch.zeros_like(param, dtype=torch.uint8, memory_format=torch.preserve_format)
    scale = torch.zeros(shape_of_scales(elements(param).shape), device=param.device)
    return codes, spread_like(scale, param, shape_of_scales(param.shape))


def decode(codes: Tensor, scale: Tensor, is_unsigned: bool) -> Tensor:
    """The float32 numbers that codes and scales stand for, in a tensor like the codes."""
    return spread_like(_decode(elements(codes), elements(scale), is_unsigned), codes, codes.shape)


def encode(values: Tensor, is_unsigned: bool, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
    """The codes and scales that are nearest to float32 numbers, or nearly: see `rounding_at`."""
    codes, scale = _encode(elements(values), is_unsigned, rounding)
    return spread_like(codes, values, values.shape), spread_like(scale, values, shape_of_scales(values.shape))


def _decode(codes: Tensor, scale: Tensor, is_unsigned: bool) -> Tensor:
    out = torch.empty_like(codes, dtype=torch.float32)
    code = _in_memory(codes).int()
    bits = scale.reshape(-1).view(torch.int32)
    places = _Places(bits & 3, is_unsigned)
    shift, unit = (_of_each(of_block, code.numel()) for of_block in (places.shift, places.unit))
    magnitude = code if is_unsigned else code & 0x7F
    place = (magnitude + (1 << shift)).float() * unit
    multiple = torch.where(magnitude != 0, (place.view(torch.int32) << shift).view(torch.float32), 0.0)
    value = multiple * _of_each((bits & ~3).view(torch.float32), code.numel())
    _in_memory(out).copy_(value if is_unsigned else torch.where(code >= 0x80, -value, value))
    return out


def rounding_at(step: int) -> float:
    """How far second moments are moved towards the next code before the nearest is taken, in a step t = 1, 2, …."""
    if step % 2**32 == 0:
        return 0.0
    part = (step * 0x9E3779B9 % 2**32 >> 8) * 2.0**-24
    return min(max(part, 1 / 64), 63 / 64) - 0.5


def _encode(values: Tensor, is_unsigned: bool, rounding: float) -> tuple[Tensor, Tensor]:
    if not values.is_contiguous():  # what is not dense becomes so
        values = torch.empty_like(values).copy_(values)
    out = torch.empty_like(values, dtype=torch.uint8)
    flat = _in_memory(values)
    magnitude = flat.abs()
    largest = _blocks(magnitude, 0.0).amax(1) if flat.numel() else magnitude
    is_zero = largest < 2.0**-124
    shift = torch.where(is_zero, 0, _shifts(magnitude, largest, is_unsigned))
    places = _Places(shift, is_unsigned)
    last = (1 << shift).float() + places.top
    multiple = ((last * places.unit).view(torch.int32) << shift).view(torch.float32)
    scale = ((largest / multiple).view(torch.int32) & ~3).view(torch.float32)
    stored = (scale.view(torch.int32) | shift).view(torch.float32)
    stored = torch.where(is_zero, 0.0, torch.where(largest.isfinite(), stored, torch.nan))
    inverse = torch.where(is_zero | ~largest.isfinite(), 0.0, 1 / scale)

    shift, unit, inverse, last = (_of_each(each, flat.numel()) for each in (shift, places.unit, inverse, last))
    place = ((magnitude * inverse).view(torch.int32) >> shift).view(torch.float32).double() / unit.double()
    offset = (1 << shift).double()
    within = torch.where(place < last, place, last.double()).maximum(offset + 1).float()
    code = (within + rounding if is_unsigned else within).round().int() - offset.int()
    if is_unsigned:
        code = torch.where(magnitude != 0, code, 0)
    else:
        code = torch.where(place > offset, code, 0) | (flat.view(torch.int32) < 0).int() << 7
    _in_memory(out).copy_(code)
    return out, stored.view(shape_of_scales(values.shape))


class _Places:
    """Where the codes of blocks with these shifts lie: each at a whole number of units."""

    def __init__(self, shift: Tensor, is_unsigned: bool) -> None:
        self.shift, self.top = shift, 255 if is_unsigned else 127
        self.unit = ((128 >> shift) - (8 if is_unsigned else 7) << 23).int().view(torch.float32)


def _shifts(magnitude: Tensor, largest: Tensor, is_unsigned: bool) -> Tensor:
    """The shift that suits each block."""
    bits, top = magnitude.view(torch.int32).long(), largest.view(torch.int32).long()
    if is_unsigned:
        least = _blocks(torch.where(bits > 0, bits, 2**31), 2**31).amin(1) if len(top) else top
        span = torch.where(least <= top, top - least, 0)
        return ((span > 4 << 23).int() + (span > 13 << 22).int() + (span > 10 << 23).int()).int()
    count = _blocks(torch.ones_like(bits), 0).sum(1) if len(top) else top
    logarithms = _blocks(bits >> 15, 0).sum(1) if len(top) else top
    near = (top >> 15) - (3 << 8)
    return torch.where((near > 0) & (logarithms >= count * near), 1, 2).int()


def _blocks(values: Tensor, filling: float) -> Tensor:
    """A row for each block, the last one filled up."""
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK), value=filling).view(-1, BLOCK)


def _of_each(of_block: Tensor, numel: int) -> Tensor:
    """What each of so many elements has of its block."""
    return of_block.repeat_interleave(BLOCK)[:numel]


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
