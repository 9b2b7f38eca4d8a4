"""What an optimizer does with gradients beside stepping by them: their global norm, to clip by, and clearing them.

Both are options of every optimizer, ``max_grad_norm`` and ``zero_grad="in_step"``. The engine divides and clears each
gradient where it reads it, so that clipping costs one pass that reads, and clearing none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainopt import switches
from trainopt._extension import _C
from trainopt.clip import check_finite
from trainopt.optim.distributed import elements, reals_of
from trainopt.optim.options import extra
from trainopt.optim.states import States
from trainopt.originals import clip as stock

DEVICE_TYPES = frozenset(_C.device_types()) - {"cpu"}


@dataclass
class GradientScaling:
    """What the gradients of a step are divided by."""

    scale: float = 1.0  # GradScaler's
    #: Of the gradients with their scale, for groups that clip; a float64 tensor where it lies on a device.
    norm: float | Tensor | None = None

    def step(self, plan: Any, groups: Any, state: Any, new_states: Any, stepped: Any = ()) -> Any:
        """The plan's answer. What lies on a device is read only where the plan cannot do without."""
        answer = plan.step(groups, state, self.scale, new_states, stepped, None, None, self.norm, True)
        if answer.status == "ask the host" and isinstance(self.norm, Tensor):
            self.norm = float(self.norm)
            answer = plan.step(groups, state, self.scale, new_states, stepped, None, None, self.norm, True)
        return answer

    def is_written_back(self, group: dict[str, Any]) -> bool:
        """Whether this group's gradients are left without their scale. Those that are clipped stay as they are."""
        return self.scale != 1 and not clips(group)

    def divisor(self, group: dict[str, Any]) -> float:
        """What this group's gradients are divided by. Waits for a device where the norm lies there."""
        if not clips(group) or self.norm is None:
            return self.scale
        excess = (float(self.norm) / self.scale + 1e-6) / extra(group, "max_grad_norm")
        return self.scale if excess <= 1 else self.scale * excess


def clips(group: dict[str, Any]) -> bool:
    """Whether a group's gradients are clipped in the step."""
    return extra(group, "max_grad_norm") is not None


def clears(group: dict[str, Any]) -> bool:
    """Whether a group's gradients are cleared in the step."""
    return extra(group, "zero_grad") is not None


def norm_of(params: list[Tensor]) -> tuple[float | Tensor, Tensor]:
    """The norm over the gradients of parameters: in float64, a number or a tensor on a device that kernels run on; and
    as the tensor that is shown."""
    found = None if switches.REFERENCE_FORCED else _C.norm_of(params, 2.0, True)
    return _norm_by_torch([param.grad for param in params if param.grad is not None]) if found is None else found


def find_norm(optimizer: States, scale: float | Tensor = 1.0, may_raise: bool = True) -> float | Tensor:
    """The norm over the gradients of all groups that clip, with the scale that they carry.

    Without it, it is the optimizer's ``grad_norm`` from now on. On a device nothing waits for it, but where a group has
    ``error_if_nonfinite``.

    Args:
        may_raise: whether a norm that is not finite is an error then; with a GradScaler it is none.

    Returns:
        The norm in float64, as `norm_of` gives it.
    """
    groups = [group for group in optimizer.param_groups if clips(group)]
    norm, total = norm_of([param for group in groups for param in group["params"]])
    if may_raise and any(extra(group, "error_if_nonfinite") for group in groups):
        check_finite(total, 2.0)
    is_scaled = isinstance(scale, Tensor) or scale != 1
    optimizer._record.grad_norm = total / scale if is_scaled else total
    return norm


@torch.no_grad()
def _norm_by_torch(gradients: list[Tensor]) -> tuple[float | Tensor, Tensor]:
    """Likewise, of gradients of any kind, each rank's part of a DTensor included."""
    shared = [gradient for gradient in gradients if hasattr(gradient, "full_tensor")]
    norms = [
        torch.linalg.vector_norm(reals_of(own), dtype=torch.float64)
        for own in (elements(gradient) for gradient in gradients if not hasattr(gradient, "full_tensor"))
    ]
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in shared:
        wide = torch.complex128 if gradient.is_complex() else torch.float64  # 16 bits would not hold many a norm
        norm = torch.linalg.vector_norm(gradient, dtype=wide)
        by_mesh.setdefault(gradient.device_mesh, []).append(norm)  # type: ignore[attr-defined]
    norms += [stock._get_total_norm(of_mesh).full_tensor() for of_mesh in by_mesh.values()]  # type: ignore[attr-defined]
    device = gradients[0].device if gradients else torch.device("cpu")
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms])) if norms else torch.zeros(())
    is_double = any(gradient.dtype in (torch.float64, torch.complex128) for gradient in gradients)
    norm = total.double() if device.type in DEVICE_TYPES else float(total)
    return norm, total.to(torch.float64 if is_double else torch.float32)


@torch.no_grad()
def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Clears what a step would have cleared that is left out: what is not finite would stay in the gradients else."""
    for group in optimizer.param_groups:
        if not clears(group):
            continue
        gradients = [param.grad for param in group["params"] if param.grad is not None]
        plain = [g for g in gradients if type(g) is Tensor and g.layout is torch.strided]
        if plain:
            torch._foreach_zero_(plain)
        for gradient in gradients:
            if type(gradient) is not Tensor or gradient.layout is not torch.strided:
                gradient.zero_()
