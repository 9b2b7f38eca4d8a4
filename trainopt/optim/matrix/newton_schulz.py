"""Orthogonalisation by the Newton-Schulz iteration, for stacks of matrices of one shape.

With the singular value decomposition X = U S V^T of a matrix whose norm is 1, a step of the iteration is

    X <- a X + b (X X^T) X + c (X X^T)^2 X

which leaves U and V alone and takes each singular value s to a s + b s^3 + c s^5. A few steps bring all but the
smallest near 1: the result is near U V^T, the orthogonal matrix nearest to X.

A step costs two products with the whole of X, whose rows may be many times as long as there are of them. In the Gram
form the steps are those of the small square matrix R = X X^T, which determines all of them,

    Z = a I + b R + c R^2        R <- Z R Z        Q <- Z Q        and in the end X <- Q X

so that X is read twice for any number of steps. What rounding makes of the smallest eigenvalues of R, negative ones
among them, grows with every step, so R is computed anew from X before that can be seen: a restart.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

#: After how many steps of the Gram form R is to be computed anew, by the dtype that it is rounded to. With torch's
#: coefficients a step multiplies the error of an eigenvalue near 0 by a**2, about 12.
RESTART_AFTER = {torch.bfloat16: 3, torch.float32: 5, torch.float64: 12}


def orthogonalize(stack: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """The matrices of a stack with their singular values brought near 1, in the stack's dtype.

    Args:
        stack: matrices of one shape, (count, rows, columns). It is overwritten.
        coefficients: a, b and c of a step.
        eps: the least norm that a matrix is divided by; one of zeros stays one.

    Tensors of other classes are taken the plain way: of a DTensor that is the sum of its ranks' parts, the diagonal
    cannot be added to in place.
    """
    a, b, c = map(float, coefficients)
    norms = torch.linalg.vector_norm(stack, dim=-1, keepdim=True, dtype=_wide(stack.dtype))
    norms = torch.linalg.vector_norm(norms, dim=-2, keepdim=True)  # in two goes: one long sum loses digits
    norms = norms.clamp(min=eps).to(stack.dtype)
    is_plain = type(stack) is Tensor
    x = stack.div_(norms) if is_plain else stack / norms  # a DTensor's own placement may be another then
    if is_plain and takes_gram_form(stack.shape[1], stack.shape[2], steps, stack.dtype):
        for length in runs(steps, stack.dtype):
            x = _gram_steps(x, length, a, b, c)
        return x
    for _ in range(steps):
        p = _polynomial(_gram(x), b, c)
        x = torch.baddbmm(x, x, p.mT, beta=a) if _is_tall(x) else torch.baddbmm(x, p, x, beta=a)
    return x


def _gram_steps(x: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    """Steps of the Gram form; p is Z without its a I."""
    r, q = _gram(x), None
    for step in range(steps):
        p = _polynomial(r, b, c)
        if step < steps - 1:
            r = torch.baddbmm(r, p, r, beta=a)
            r = torch.baddbmm(r, r, p, beta=a)
        if q is not None:
            q = torch.baddbmm(q, p, q, beta=a)
        else:
            q = p
            q.diagonal(dim1=-2, dim2=-1).add_(a)
    if q is None:
        return x
    return x @ q.mT if _is_tall(x) else q @ x


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _gram(x: Tensor) -> Tensor:
    """The products of the shorter side's vectors with one another: of a tall matrix's transpose it is X X^T."""
    return x.mT @ x if _is_tall(x) else x @ x.mT


def _polynomial(r: Tensor, b: float, c: float) -> Tensor:
    return torch.baddbmm(r, r, r, beta=b, alpha=c)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def runs(steps: int, dtype: torch.dtype) -> list[int]:
    """How many steps of the Gram form are made between one restart and the next. The longer runs come first: a restart
    mends what the steps before it have done to large singular values, and nothing mends the last."""
    count = -(-steps // RESTART_AFTER[dtype])
    return [(steps + count - 1 - i) // count for i in range(count)]


def takes_gram_form(rows: int, columns: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether the Gram form has fewer multiplications, counted in products of square matrices of
    the shorter side."""
    if 0 in (rows, columns, steps):
        return False
    ratio, count = max(rows, columns) / min(rows, columns), len(runs(steps, dtype))
    return 2 * ratio * count + 4 * steps - 3 * count < steps * (2 * ratio + 1)


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a device has instructions for products of bfloat16; else they cost more than those of float32."""
    if device_type != "cpu":
        return True
    if hasattr(torch.cpu, "get_capabilities"):  # not in the oldest torch
        return any(value is True and name.endswith("bf16") for name, value in torch.cpu.get_capabilities().items())
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def dtype_for(param: Tensor, chosen: torch.dtype | None) -> torch.dtype:
    """What a parameter's update is orthogonalised in: as chosen, else float64 for float64, and bfloat16 for all others
    where that is fast."""
    if chosen is not None:
        return chosen
    if param.dtype is torch.float64:
        return torch.float64
    return torch.bfloat16 if multiplies_bfloat16(param.device.type) else torch.float32
