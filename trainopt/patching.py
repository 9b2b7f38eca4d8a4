"""trainopt in torch's place, for programs and frameworks that make their optimizer and loss by torch's names."""

import copyreg
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch.nn.utils.clip_grad  # noqa: F401  (the modules below are imported)

from trainopt import clip, losses, originals
from trainopt.losses import functional
from trainopt.optim.fuse import counterparts

_OPTIMIZERS = counterparts()


def _places() -> dict[str, dict[str, Any]]:
    """By torch's modules: the names in them, each with what takes its place."""
    optimizers = {torch_class.__name__: cls for torch_class, cls in _OPTIMIZERS.items()}
    modules = {name: getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")}
    return {
        **{originals.home_of(torch_class): {torch_class.__name__: cls} for torch_class, cls in _OPTIMIZERS.items()},
        "torch.optim": optimizers,
        "torch.nn.functional": {name: getattr(functional, name) for name in functional.__all__},
        # Not in torch.nn.modules.loss, where pickle looks for torch's classes: they call the functions above.
        "torch.nn": modules,
        "torch.nn.modules": modules,
        "torch.nn.utils": {
            "clip_grad_norm_": clip.clip_grad_norm_,
            "clip_grad_value_": clip.clip_grad_value_,
            "clip_grads_with_norm_": clip.clip_grads_with_norm_,
            "get_total_norm": clip.get_total_norm,
        },
        "torch.nn.utils.clip_grad": {
            "clip_grad_norm_": clip.clip_grad_norm_,
            "clip_grad_value_": clip.clip_grad_value_,
            "_clip_grads_with_norm_": clip.clip_grads_with_norm_,
            "_get_total_norm": clip.get_total_norm,
        },
    }


_PLACES = _places()


def _pickled_as(ours: type) -> Callable[[Any], tuple[Any, ...]]:
    """How an optimizer of torch's class is pickled or copied while pickle finds `ours` under the name of its class."""

    return lambda optimizer: (_blank, (ours,), *object.__reduce_ex__(optimizer, 2)[2:])


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


_lock = threading.RLock()
_patches: set["Patch"] = set()  # those that have not been undone
_replaced: list[tuple[ModuleType, str, Any, Any]] = []  # module, name, what stood there, what stands there now


class Patch:
    """That trainopt stands in torch's place, until `undo` is called or the `with` block that it opens is left."""

    def undo(self) -> None:
        """Puts back what stood in torch's namespaces, when no other patch wants it replaced; again: does nothing.

        A name that somebody has given another value meanwhile is left alone.
        """
        with _lock:
            if self not in _patches:
                return
            _patches.discard(self)
            if not _patches:
                while _replaced:
                    module, name, before, ours = _replaced.pop()
                    if vars(module).get(name) is ours:
                        setattr(module, name, before)
                for torch_class in _OPTIMIZERS:
                    copyreg.dispatch_table.pop(torch_class, None)
                _forget_in_compiler()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _forget_in_compiler() -> None:
    """torch.compile keeps a list of torch's functions, by their names, and makes it anew after init_process_group: what
    it has found under those names meanwhile was trainopt's, and torch's own were strangers to it.
    """
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and hasattr(rules, "clear_lru_cache"):
        rules.clear_lru_cache()


def patch() -> Patch:
    """Puts trainopt in torch's place: optimizers, losses and clipping, in torch.optim, torch.nn and their modules.

        patch = trainopt.patch()
        ...                        # torch.optim.AdamW is trainopt.AdamW, torch.nn.functional.cross_entropy is …
        patch.undo()

    Replaced are the optimizers that trainopt has, in torch.optim and the modules that define them; the losses of
    trainopt.functional in torch.nn.functional, and their modules in torch.nn; clipping, in torch.nn.utils and its
    clip_grad. Objects and names that were taken from there before stay what they are: call it before `from torch.optim
    import AdamW` runs. It holds for the process, in all its threads, and not for processes that are started afresh.
    Patches may overlap, in any order and thread: the last one that is undone puts torch's things back.

    Returns:
        The patch: `undo()` ends it, as does leaving `with trainopt.patch():`. Without either it stays.
    """
    made = Patch()
    with _lock:
        if not _patches:
            for place, names in _PLACES.items():
                module = sys.modules[place]
                for name, ours in names.items():
                    if vars(module).get(name, ours) is not ours:
                        _replaced.append((module, name, vars(module)[name], ours))
                        setattr(module, name, ours)
            for torch_class, ours in _OPTIMIZERS.items():
                copyreg.pickle(torch_class, _pickled_as(ours))
        _patches.add(made)
    return made


@contextmanager
def patched() -> Iterator[Patch]:
    """A `with` block, or a decorator, in which trainopt stands in torch's place (see `patch`), whatever it raises."""
    with patch() as made:
        yield made
