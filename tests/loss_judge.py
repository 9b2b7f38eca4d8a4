"""The judge of the losses' numbers: value and gradients against torch's own function in float64.

A result is right when its distance to the truth is no larger than that of torch's function in the same dtype, but for a
few roundings. NaN and infinities must stand where torch has them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")

#: A loss as a function of nothing but the tensors that have gradients.
Loss = Callable[..., Tensor]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers; which ones, shape and seed decide."""
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def classes(shape: Sequence[int], count: int, seed: int = 0) -> Tensor:
    """Random class indices below `count`."""
    return torch.randint(0, count, tuple(shape), generator=torch.Generator().manual_seed(seed))


def large_logits(count: int, size: float) -> Tensor:
    """Three rows of float64 logits near `size`: from 1e17 on, where float64 has steps of 16, they are mostly ties."""
    return size + random(3, count)


def exact_cross_entropy(logits: Tensor, target: Tensor, z_loss: float = 0.0) -> list[Tensor]:
    """The losses of rows of float64 logits and the gradient of their sum, from 50 digits."""
    losses, gradients = [], []
    with mpmath.workdps(50):
        for row, label in zip(logits.tolist(), target.tolist(), strict=True):
            exponentials = [mpmath.exp(mpmath.mpf(x) - mpmath.mpf(max(row))) for x in row]
            total = mpmath.fsum(exponentials)
            lse = mpmath.mpf(max(row)) + mpmath.log(total)
            losses.append(float(lse - mpmath.mpf(row[label]) + z_loss * lse**2))
            slope = (1 + 2 * z_loss * lse) / total
            gradients.append([float(e * slope - (c == label)) for c, e in enumerate(exponentials)])
    return [torch.tensor(losses, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)]


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in another dtype with its strides, or anything else as it is; first rounded, if it must be."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype, copy=True)
    return value


def run(loss: Loss, operands: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """The loss of the operands, and the gradients of those that are floating, for a given upstream gradient."""
    leaves = [operand.detach().requires_grad_(operand.is_floating_point()) for operand in operands]
    value = loss(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if upstream is not None:
        upstream = upstream.to(value.dtype)
    elif value.dim() > 0:
        upstream = random(*value.shape, seed=3).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, wanted, upstream, allow_unused=True)]


def on(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on tensors that are moved to the device, its results brought back; gradients find their way."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def there(*arguments: Any, **options: Any) -> Any:
        result = function(*map(moved, arguments), **{name: moved(value) for name, value in options.items()})
        return tuple(value.cpu() for value in result) if isinstance(result, tuple) else result.cpu()

    return there


def judge(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    operands: Sequence[Tensor],
    dtype: torch.dtype,
    arguments: dict[str, Any] | None = None,
    constants: Sequence[Tensor] = (),
    roundings: float = 2.0,
    loss_unit: float = 0.0,
    gradient_unit: float = 0.0,
) -> None:
    """Compares ours(*operands, *constants, **arguments) with torch's: values, gradients, dtypes, shapes.

    Args:
        operands: float64 tensors whose gradients are compared too.
        constants: tensors that follow them and have no gradient. All are rounded to dtype before anyone sees them.
        roundings: how many are forgiven, of the largest element of a result, or of loss_unit or gradient_unit where the
            result is what is left of a difference of larger things.
    """
    arguments = arguments or {}
    rounded = [as_dtype(operand, dtype) for operand in operands]
    fixed = [as_dtype(constant, dtype) for constant in constants]
    settings = {key: as_dtype(value, dtype) for key, value in arguments.items()}

    def of(function: Callable[..., Tensor], widen: bool) -> list[Tensor]:
        def up(value: Any) -> Any:
            return as_dtype(value, torch.float64) if widen else value

        others, options = [up(value) for value in fixed], {key: up(value) for key, value in settings.items()}
        return run(lambda *leaves: function(*leaves, *others, **options), [up(operand) for operand in rounded])

    found, expected, truth = of(ours, False), of(torchs, False), of(torchs, True)
    names = ["loss", *(f"gradient {i}" for i in range(len(found) - 1))]
    for name, mine, theirs, true in zip(names, found, expected, truth, strict=True):
        assert_no_worse(mine, theirs, true, name, roundings, loss_unit if name == "loss" else gradient_unit)


def assert_no_worse(
    ours: Tensor, torchs: Tensor, truth: Tensor, what: str = "result", roundings: float = 2.0, unit: float = 0.0
) -> None:
    """ours is as near to the truth as torchs is, but for some roundings of the largest element, or of `unit`."""
    assert ours.dtype == torchs.dtype, f"{what}: {ours.dtype} against {torchs.dtype}"
    assert ours.shape == torchs.shape, f"{what}: {tuple(ours.shape)} against {tuple(torchs.shape)}"
    rounded = truth.to(ours.dtype)
    finite = rounded.isfinite()
    if not finite.all():
        odd = ~finite
        torch.testing.assert_close(ours[odd], rounded[odd], equal_nan=True, msg=lambda text: f"{what}: {text}")
    if not finite.any():
        return
    info = torch.finfo(ours.dtype)
    mine, theirs = ((tensor[finite].double() - truth[finite]).abs() for tensor in (ours, torchs))
    error, peer = mine.max().item(), theirs.nan_to_num(0, 0).max().item()
    # The truth is itself computed in float64: what is judged in float64 may be off by as much as it is.
    allowed = roundings * (32 if ours.dtype == torch.float64 else 1)
    slack = allowed * max(info.eps * max(truth[finite].abs().max().item(), unit), info.smallest_normal * info.eps)
    assert error <= peer + slack, f"{what}: error {error:.3e}, torch's {peer:.3e}, slack {slack:.3e}"
