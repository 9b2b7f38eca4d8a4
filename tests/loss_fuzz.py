"""Calls of the loss operators with whatever their schemas let through.

A call begins as one that is right. Then some of its arguments are replaced by hostile ones: tensors of another shape,
type, device or order in memory, with lazy bits, with less storage than they need, with none at all; numbers that mean
nothing. An operator may answer with an error or with a result, and with nothing else.
"""

import contextlib
import os
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

OPS = torch.ops.trainopt
#: Calls of each operator in one run of the suite.
EXAMPLES = int(os.environ.get("TRAINOPT_FUZZ_EXAMPLES", "40"))
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)  # NotImplementedError is a RuntimeError

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
LOSSES = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "kl_div_log_target"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)


def loss_operators() -> list[str]:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("trainopt::")}
    return sorted(name for name in names if "optimizer" not in name)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(0.1, 0.9, max(count, 1))[:count].reshape(shape).to(dtype).to(device)


@st.composite
def _right(draw: Any, name: str, device: str) -> dict[str, Any]:
    """Arguments of an operator that are right, by their names."""
    dtype = draw(st.sampled_from(FLOATING))
    rows, classes = tuple(draw(st.lists(st.integers(0, 3), min_size=0, max_size=3))), draw(st.integers(1, 70))
    reduction, with_gradients = draw(st.integers(0, 2)), draw(st.booleans())

    def numbers(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return _numbers(shape, of, device)

    arguments: dict[str, Any] = {"reduction": reduction, "parameter": 0.5}
    arguments |= {
        "ignore_index": draw(st.sampled_from((-100, 1))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
    }
    arguments |= {"z_loss": draw(st.sampled_from((0.0, 0.1))), "softcap": draw(st.sampled_from((0.0, 3.0)))}
    arguments["temperature"] = draw(st.sampled_from((1.0, 2.0)))
    arguments |= {"inplace_backward": draw(st.booleans()), "empty_is_zero": draw(st.booleans())}
    arguments["chunk"] = draw(st.sampled_from((1, 3, 10_000)))
    arguments |= {"loss": draw(st.sampled_from(LOSSES))}
    if "entropy" in name:
        logits = (classes,) if rows == () else (rows[0], classes, *rows[1:])
        if "linear" in name:
            logits = (*rows, classes)
            arguments |= {"input": numbers(*rows, 3), "weight": numbers(classes, 3), "bias": numbers(classes)}
            arguments["class_weight"] = numbers(classes)
            if with_gradients and reduction == 0 and name == "linear_cross_entropy_forward":
                with_gradients = False
            arguments["wanted"] = [with_gradients] * 3
        else:
            arguments |= {"input": numbers(*logits), "weight": numbers(classes)}
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        arguments["target"] = draw(st.sampled_from((labels, numbers(*logits))))
        arguments["lse"] = numbers(2, torch.Size(rows).numel(), of=torch.float64)
        arguments["upstream"] = numbers(*(rows if reduction == 0 else ()))
    else:
        shape = (*rows, classes)
        arguments |= {"input": numbers(*shape), "target": numbers(*shape), "weight": numbers(classes)}
        arguments |= {"pos_weight": numbers(classes), "wanted": [True, draw(st.booleans())]}
        arguments["upstream"] = numbers(*(shape if reduction == 0 else ()))
    for optional in ("weight", "pos_weight", "bias", "class_weight"):
        if optional in arguments and optional in _optional(name) and draw(st.booleans()):
            arguments[optional] = None
    return {argument.name: arguments[argument.name] for argument in _schema(name).arguments}


def _schema(name: str) -> Any:
    return getattr(OPS, name).default._schema


def _optional(name: str) -> set[str]:
    return {argument.name for argument in _schema(name).arguments if "Optional" in str(argument.type)}


def _without_storage(tensor: Tensor, bytes_left: int) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(min(bytes_left, tensor.untyped_storage().nbytes()))
    return tensor


CHANGES: dict[str, Any] = {
    "another type": lambda x, draw: x.to(draw(st.sampled_from(FLOATING + OTHERS))),
    "a dimension more": lambda x, draw: x.unsqueeze(draw(st.integers(0, x.dim()))),
    "a dimension less": lambda x, draw: x.sum(draw(st.integers(0, x.dim() - 1))) if x.dim() else x,
    "one element more": lambda x, draw: torch.cat([x, x[:1]]) if x.dim() and x.shape[0] else x.new_zeros(3),
    "nothing": lambda x, draw: x.new_empty(0),
    "very many dimensions": lambda x, draw: x.reshape((1,) * 10 + tuple(x.shape)),
    "transposed": lambda x, draw: x.transpose(0, -1) if x.dim() > 1 else x,
    "strided": lambda x, draw: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x, draw: x.flatten()[:1].sum().expand(x.shape),
    "lazily negative": lambda x, draw: torch._neg_view(x),
    "zeros without memory": lambda x, draw: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
    "meta": lambda x, draw: x.to("meta"),
    "on the CPU": lambda x, draw: x.to("cpu"),
    "sparse": lambda x, draw: x.to_sparse(),
    "without storage": lambda x, draw: _without_storage(x, 0),
    "with too little storage": lambda x, draw: _without_storage(x, draw(st.integers(1, 16))),
    "other numbers": lambda x, draw: x.clone().fill_(draw(st.sampled_from((9, 200, -1, 1e30)))),
    "no numbers": lambda x, draw: x.clone().fill_(draw(st.sampled_from((torch.nan, torch.inf)))),
    "with a gradient": lambda x, draw: x.detach().requires_grad_(),
}
INTEGERS = (-1, 0, 1, 2, 3, 2**62, -(2**63))
FLOATS = (0.0, -1.0, 2.0, 1e300, 1e-300, torch.nan, torch.inf)


@st.composite
def calls(draw: Any, name: str, device: str = "cpu") -> dict[str, Any]:
    """Arguments by their names, of which up to three are hostile."""
    arguments = draw(_right(name, device))
    # Once each: torch itself may not survive what is done with a tensor whose storage has been taken away.
    for key in draw(st.lists(st.sampled_from(list(arguments)), max_size=3, unique=True)):
        value = arguments[key]
        if isinstance(value, Tensor):
            others = [other for other in arguments.values() if isinstance(other, Tensor)]
            change = draw(st.sampled_from((*CHANGES, "one of the others")))
            if change == "one of the others":
                arguments[key] = draw(st.sampled_from(others))
            else:
                with contextlib.suppress(*REFUSALS):  # torch does not make every such tensor
                    arguments[key] = CHANGES[change](value, draw)
        elif isinstance(value, bool):
            arguments[key] = not value
        elif isinstance(value, int):
            arguments[key] = draw(st.sampled_from(INTEGERS))
        elif isinstance(value, float):
            arguments[key] = draw(st.sampled_from(FLOATS))
        elif isinstance(value, str):
            arguments[key] = draw(st.sampled_from((*LOSSES, "", "nothing")))
        elif isinstance(value, list):
            arguments[key] = draw(st.lists(st.booleans(), max_size=4))
    return arguments


def attempt(action: Any) -> Any:
    """What it returns; or None where it refuses, in words for the caller and not about itself."""
    try:
        return action()
    except REFUSALS as error:
        assert "INTERNAL ASSERT" not in str(error), str(error)
        assert str(error)
        return None


def run(name: str, arguments: dict[str, Any], take_away: str | None = None) -> None:
    """Calls an operator, and goes back through what it returns, after a storage has been taken away."""
    results = attempt(lambda: getattr(OPS, name)(*arguments.values()))
    if results is None:
        return
    results = [results] if isinstance(results, Tensor) else list(results)
    if take_away is not None and isinstance(arguments.get(take_away), Tensor):
        attempt(lambda: arguments[take_away].untyped_storage().resize_(0))
    for result in results:
        if result.requires_grad:
            leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
            for upstream in (torch.ones_like(result), torch._neg_view(torch.ones_like(result))):
                back = partial(torch.autograd.grad, result, leaves, upstream, retain_graph=True, allow_unused=True)
                attempt(back)
