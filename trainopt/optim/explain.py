"""Which path each parameter takes through a step, and why."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainopt import switches
from trainopt._extension import _C, why_no_cuda
from trainopt.optim import average, precision, stats
from trainopt.optim.gradients import clears, clips
from trainopt.optim.matrix.muon import Muon, is_muon
from trainopt.optim.matrix.options import is_muons
from trainopt.optim.matrix.update import note_of
from trainopt.optim.options import extra
from trainopt.optim.report import names_of
from trainopt.optim.state_dtype import dtype_of
from trainopt.optim.states import States
from trainopt.optim.wrappers import unwrapped

_STORED = {
    "master": "with what it lacks of a float32",
    "master24": "with 8 bits more",
    "stochastic": "rounded at random",
}
_STATES = {torch.uint8: "8 bits"}


@dataclass(frozen=True)
class ParameterPath:
    """One parameter's way through a step."""

    name: str
    path: str  # "fused (cpu, avx2)", "fused (cuda)", "torch", or "muon" for its matrices
    reason: str  # why torch; empty for the fused path
    parameter: str  # dtype, shape and device
    note: str = ""  # what else there is to know of its step

    def __str__(self) -> str:
        return "; ".join(filter(None, [f"{self.name}: {self.path}", self.parameter, self.reason, self.note]))


class Explanation(tuple[ParameterPath, ...]):
    """A `ParameterPath` for each parameter, in order. Prints itself, alike parameters in one line."""

    __slots__ = ()

    def __str__(self) -> str:
        lines: dict[tuple[str, str, str], list[ParameterPath]] = {}
        for row in self:
            lines.setdefault((row.path, row.reason, row.note), []).append(row)
        return "\n".join(
            f"{path}: {len(rows)} parameter{'s' * (len(rows) > 1)}"
            + (f" ({reason})" if reason else "")
            + (f"; {note}" if note else "")
            + "".join(f"\n    {row.name}: {row.parameter}" for row in rows)
            for (path, reason, note), rows in lines.items()
        )

    __repr__ = __str__


def explain(optimizer: Any) -> Explanation:
    """Tells which path each parameter of an optimizer takes in `step`: the fused engine, or torch's own code, and why.

    Looks at the parameters, options, states and gradients as they are now; where there is no gradient yet, an ordinary
    one is assumed. Also notes where moments are float16, in which small ones underflow, and what the step does beside
    the update: that it clips, averages or clears, or is left out for gradients that are not finite. Of `trainopt.Muon`
    it tells which parameters are its matrices, and which AdamW's. Changes nothing.

    TypeError or ValueError for options of a group that the next step refuses.

    Args:
        optimizer: any torch optimizer, or a wrapper of one (Accelerate's, Fabric's, Lookahead).
    """
    optimizer = unwrapped(optimizer)
    if is_muon(optimizer):
        return _explain_muon(optimizer)
    if not isinstance(optimizer, States):
        rows = [p for group in optimizer.param_groups for p in group["params"]]
        why = f"{type(optimizer).__module__}.{type(optimizer).__qualname__} is not one of trainopt's"
        return Explanation(ParameterPath(f"parameter {i}", "torch", why, outline(p)) for i, p in enumerate(rows))
    groups = optimizer._snapshot()
    params = [param for group in groups for param in group["params"]]
    if switches.REFERENCE_FORCED:
        reasons = ["TRAINOPT_REFERENCE is set"] * len(params)
    else:
        paths = optimizer._new_plan().paths(groups, optimizer.state)
        if paths is None:
            paths = ["states in a container that is no plain dict"] * len(params)
        reasons = [_reason(said, param.device) for said, param in zip(paths, params, strict=True)]
    return Explanation(
        ParameterPath(name, "torch" if reason else kernel(param.device.type), reason, outline(param), note)
        for name, reason, param, note in zip(names_of(optimizer), reasons, params, _notes(optimizer), strict=True)
    )


def _explain_muon(optimizer: Muon) -> Explanation:
    """Which parameters are matrices of Muon's, and which way AdamW's go."""
    adamw = optimizer.adamw
    others = iter(() if adamw is None else explain(adamw))
    names, rows = iter(names_of(optimizer)), []
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = next(names)
            if is_muons(group):
                rows.append(ParameterPath(name, "muon", "", outline(param), note_of(group, param)))
            else:
                row = next(others)
                rows.append(replace(row, name=name, note="; ".join(filter(None, ["AdamW", row.note]))))
    return Explanation(rows)


def _notes(optimizer: States) -> Iterator[str]:
    for _, group, param in optimizer._enumerate():
        notes = []
        if extra(group, "skip_nonfinite"):
            notes.append("a step whose gradients are not all finite is left out (skip_nonfinite)")
        if clips(group):
            limit = extra(group, "max_grad_norm")
            notes.append(f"gradients are clipped in the step, to a norm of {limit:g} over all (max_grad_norm)")
        if average.averages(group):
            notes.append(f"a moving average is kept, in {_name_of(average.dtype_of(param))} (ema_decay)")
        if clears(group):
            notes.append("the step clears its gradient (zero_grad)")
        if stats.wanted(group):
            notes.append("norms of gradient, parameter and update are taken (stats)")
        if "train_mode" in group:
            notes.append(f"the parameter is {'y, as in training' if group['train_mode'] else 'x, the average'}")
        state = optimizer.state.get(param, {})
        if (chosen := precision.of(group, param)) != "native":
            notes.append(f"the parameter is stored {_STORED[chosen]} (precision={chosen!r})")
        if extra(group, "cautious"):
            notes.append("what disagrees with the gradient in sign is left out of the update (cautious)")
        if extra(group, "cautious_weight_decay"):
            notes.append("weight decay acts only where it agrees with the update (cautious_weight_decay)")
        if extra(group, "state_dtype") is not None:
            dtypes = {name: dtype_of(group, name, param) for name in optimizer._states_needed(group, param)}
            said = ", ".join(f"{name} in {_STATES.get(dtype) or _name_of(dtype)}" for name, dtype in dtypes.items())
            notes.append(f"states are stored with {said} (state_dtype)" if said else "there are no states")
        if state and (extra(group, "state_dtype") is not None or chosen != "native"):
            notes.append(_bytes_of(state, param))
        squares = [name for name in optimizer._states_needed(group) if name.endswith("_sq")]
        stored = [getattr(state.get(name), "dtype", dtype_of(group, name, param)) for name in squares]
        if torch.float16 in stored:
            beta2 = float(group["betas"][1])
            if beta2 < 1:
                least = math.sqrt(2**-25 / (1 - beta2))
                notes.append(
                    f"its second moment is float16, in which gradients below {least:.1e} leave nothing: their step is"
                    " lr * m / eps (see docs/optimizers.md)"
                )
        yield "; ".join(notes)


def _bytes_of(state: dict[str, Any], param: torch.Tensor) -> str:
    """How many bytes of state there are for an element, the count of steps apart."""
    tensors = [value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"]
    held = sum(value.nbytes for value in tensors if value.layout is torch.strided)
    return f"{held / max(param.numel(), 1):.3g} bytes of state an element"


def _reason(said: str, device: torch.device) -> str:
    """Why torch, in the plan's words; a CUDA tensor's first reason is a build without kernels for it."""
    return (said and device.type == "cuda" and why_no_cuda()) or said


def kernel(device: str) -> str:
    """How the fused path is called on a type of device."""
    return f"fused (cpu, {_C.cpu_variant()})" if device == "cpu" else f"fused ({device})"


def outline(tensor: torch.Tensor) -> str:
    return f"{_name_of(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
