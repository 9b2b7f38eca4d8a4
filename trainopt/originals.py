"""torch's own classes and functions: what trainopt derives from, and what does the work that its engine does not take.

People put trainopt where torch's things were (`torch.nn.functional.cross_entropy = trainopt.functional.cross_entropy`,
`trainopt.patch()`). Whoever looks for torch's function there afterwards finds ours, and our fallback would call itself
for ever. So they are bound from here, once, when trainopt is imported, and nothing else of trainopt looks them up in
torch's modules. Where another library was there first, and what stands in torch's place is not torch's, a class is
found among its base's subclasses, and a function is made again from the source of its module.

A function is bound as a copy that sees a copy of its module, for torch's functions look one another up when they are
called: clip_grad_norm_ finds _get_total_norm so, and cross_entropy finds itself, to tell a tensor subclass which
function it was.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.utils.clip_grad as clip_grad_module
from torch.nn import functional as functional_module

# The losses that trainopt has; linear cross-entropy is younger than the oldest torch.
_LOSSES = (
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
_CLIPPING = ("_clip_grads_with_norm_", "_get_total_norm", "clip_grad_norm_", "clip_grad_value_")


def _own(found: Any, module: ModuleType, name: str) -> FunctionType | None:
    """A module's function of this name ("Class.method"), without decorators: `found`, unless it is somebody else's."""
    plain = inspect.unwrap(found) if callable(found) else None
    return plain if _is_defined_in(module, plain, name) else _from_source(module, name)


def _is_defined_in(module: ModuleType, function: Any, name: str) -> TypeGuard[FunctionType]:
    is_function = isinstance(function, FunctionType)
    return is_function and function.__globals__ is vars(module) and function.__qualname__ == name


def _from_source(module: ModuleType, name: str) -> FunctionType | None:
    *outer, last = name.split(".")
    body = ast.parse(Path(str(module.__file__)).read_bytes()).body
    for part in outer:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
    definitions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == last]
    if not definitions:
        return None
    definition = definitions[-1]  # those before it are overloads
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
        own = _own(seen[name], module, name) if name in seen else None
        if own is None:
            continue
        copy = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
        copy.__kwdefaults__ = own.__kwdefaults__
        copies[name] = copy if decorate is None else decorate(copy)
        seen[name] = copies[name] if decorate else own  # a tensor subclass is told of the function that it knows
    return SimpleNamespace(**{**seen, **copies})


#: `clip_grad_norm_`, `clip_grad_value_`, `_get_total_norm` and `_clip_grads_with_norm_`.
clip: Any = _copies(clip_grad_module, _CLIPPING, torch.no_grad())

if TYPE_CHECKING:
    from torch.nn import *  # noqa: F403
    from torch.nn import functional as functional
    from torch.optim import *  # noqa: F403
else:
    functional = _copies(functional_module, _LOSSES)

    def __getattr__(name: str) -> Any:
        """An optimizer's or a loss module's class: `originals.AdamW`. AttributeError if this torch has none such."""
        for package, root in ((torch.optim, torch.optim.Optimizer), (torch.nn, torch.nn.Module)):
            found = vars(package).get(name)
            if found is not None:
                own = (cls for cls in (found, *_descendants(root)) if _is_stock(cls, name, package.__name__))
                found = next(own, found)
                if root is torch.optim.Optimizer:
                    step_of(found)
                return found
        raise AttributeError(f"torch {torch.__version__} has no optimizer and no module {name}")


def _is_stock(found: Any, name: str, package: str) -> bool:
    return isinstance(found, type) and found.__name__ == name and found.__module__.startswith(package)


def _descendants(root: type) -> Iterator[type]:
    child: type
    for child in root.__subclasses__():
        yield child
        yield from _descendants(child)


def step_of(cls: type) -> FunctionType:
    """The body of `step` of the torch optimizer that a class derives from, without torch's decorators."""
    return _step_of(next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim")))


@functools.cache
def _step_of(stock: type) -> FunctionType:
    bases = [base for base in stock.__mro__ if base.__module__.startswith("torch.optim")]
    for i, base in enumerate(bases):
        if "step" not in vars(base):
            continue
        plain = inspect.unwrap(vars(base)["step"])
        # When an optimizer is made, torch puts a wrapped step into its class, an inherited one too: AdamW has Adam's.
        if any(_is_defined_in(sys.modules[home_of(b)], plain, f"{b.__name__}.step") for b in bases[i:]):
            return plain
        made = _from_source(sys.modules[home_of(base)], f"{base.__name__}.step")
        if made is not None:
            return made
    raise AttributeError(f"{stock.__name__} has no step")


def home_of(stock: type) -> str:
    """The module that defines a torch optimizer; those in private modules say that they are torch.optim's own."""
    private = f"{stock.__module__}._{stock.__name__.lower()}"
    return private if private in sys.modules else stock.__module__
