"""torch's own classes and functions: what trainopt derives from, and what does the work that its engine does not take.

People put trainopt where torch's things were (`torch.nn.functional.cross_entropy = trainopt.functional.cross_entropy`,
`trainopt.patch()`). Whoever looks for torch's function there afterwards finds ours, and our fallback would call itself
for ever. So they are bound here, once, when trainopt is imported, and nothing else of trainopt looks them up in torch's
modules. Where another library was there first, and what stands in torch's place is not torch's, a class is found among
its base's subclasses, and a function is made again from the source of its module.

A function is bound as a copy that sees a copy of its module, for torch's functions look one another up when they are
called: clip_grad_norm_ finds _get_total_norm so, and cross_entropy finds itself, to tell a tensor subclass which
function it was.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.utils.clip_grad as clip_grad_module
from torch.nn import functional as functional_module
from torch.nn.modules import loss as loss_module
from torch.optim import adam as adam_module
from torch.optim import adamw as adamw_module
from torch.optim import sgd as sgd_module

#: The losses that trainopt has; linear cross-entropy is younger than the oldest torch.
LOSSES = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "smooth_l1_loss",
)
_CLIPPING = ("_clip_grads_with_norm_", "_get_total_norm", "clip_grad_norm_")


def _own(module: ModuleType, found: Any, name: str) -> FunctionType:
    """torch's function of this name ("Class.method"), without decorators: `found`, unless that is somebody else's."""
    plain = inspect.unwrap(found) if callable(found) else None
    if isinstance(plain, FunctionType) and plain.__code__.co_filename == module.__file__ and plain.__qualname__ == name:
        return plain
    *outer, last = name.split(".")
    body = ast.parse(Path(str(module.__file__)).read_bytes()).body
    for part in outer:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
    definition = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == last)
    definition.decorator_list = []
    namespace = {**vars(module)}
    exec(compile(ast.Module([definition], []), str(module.__file__), "exec"), namespace)
    made = namespace[last]
    assert isinstance(made, FunctionType)
    return made


def _copies(module: ModuleType, names: tuple[str, ...], decorate: Callable[[Any], Any] | None = None) -> Any:
    """The module, with copies of these functions that see one another, whatever is put in their place later."""
    seen = {**vars(module)}
    copies = {}
    for name in names:
        if name not in seen:
            continue
        own = _own(module, seen[name], name)
        copy = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
        copy.__kwdefaults__ = own.__kwdefaults__
        copies[name] = copy if decorate is None else decorate(copy)
        seen[name] = copies[name] if decorate else own  # a tensor subclass is told of the function that it knows
    return SimpleNamespace(**{**seen, **copies})


def _class(module: ModuleType, name: str, root: type) -> Any:
    """torch's class of this name; None if this torch has none."""
    found = vars(module).get(name)
    package = ".".join(module.__name__.split(".")[:2])
    if found is None or (isinstance(found, type) and found.__module__.startswith(package)):
        return found
    own = (c for c in _descendants(root) if c.__name__ == name and c.__module__.startswith(package))
    return next(own, found)


def _descendants(root: type) -> Iterator[type]:
    child: type
    for child in root.__subclasses__():
        yield child
        yield from _descendants(child)


if TYPE_CHECKING:
    from torch.nn import BCELoss as BCELoss
    from torch.nn import BCEWithLogitsLoss as BCEWithLogitsLoss
    from torch.nn import CrossEntropyLoss as CrossEntropyLoss
    from torch.nn import HuberLoss as HuberLoss
    from torch.nn import KLDivLoss as KLDivLoss
    from torch.nn import L1Loss as L1Loss
    from torch.nn import MSELoss as MSELoss
    from torch.nn import SmoothL1Loss as SmoothL1Loss
    from torch.nn import functional as functional
    from torch.optim import SGD, Adam, AdamW
else:
    functional = _copies(functional_module, LOSSES)
    BCELoss = _class(loss_module, "BCELoss", torch.nn.Module)
    BCEWithLogitsLoss = _class(loss_module, "BCEWithLogitsLoss", torch.nn.Module)
    CrossEntropyLoss = _class(loss_module, "CrossEntropyLoss", torch.nn.Module)
    HuberLoss = _class(loss_module, "HuberLoss", torch.nn.Module)
    KLDivLoss = _class(loss_module, "KLDivLoss", torch.nn.Module)
    L1Loss = _class(loss_module, "L1Loss", torch.nn.Module)
    MSELoss = _class(loss_module, "MSELoss", torch.nn.Module)
    SmoothL1Loss = _class(loss_module, "SmoothL1Loss", torch.nn.Module)
    SGD = _class(sgd_module, "SGD", torch.optim.Optimizer)
    Adam = _class(adam_module, "Adam", torch.optim.Optimizer)
    AdamW = _class(adamw_module, "AdamW", torch.optim.Optimizer)

#: None where torch is older than they are.
LinearCrossEntropyLoss: Any = _class(loss_module, "LinearCrossEntropyLoss", torch.nn.Module)
LinearCrossEntropyOptions: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)

#: `clip_grad_norm_`, `_get_total_norm` and `_clip_grads_with_norm_`.
clip: Any = _copies(clip_grad_module, _CLIPPING, torch.no_grad())

#: The bodies of `step`, without the decorators that hook, profile and set the grad mode.
STEPS: dict[type, FunctionType] = {
    SGD: _own(sgd_module, vars(SGD).get("step"), "SGD.step"),
    Adam: _own(adam_module, vars(Adam).get("step"), "Adam.step"),
}
