"""The optimizers of other packages that follow the same rules as trainopt's, and the settings by which they do.

Settings are added to those of the rule in benchmarks/optimizers.py; pytorch-optimizer takes and ignores options that it
does not have. Decay, on which the packages differ most, is 0 but for LAMB and LARS, which are nothing without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

Compile = Callable[[Any], Callable[[], object]]  # makes an optimizer's step a compiled one


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package, as module.Class."""

    title: str
    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    writes_gradient: bool = False  # and so needs gradients of its own
    differs: str = ""  # why it is not compared with the others
    compile: Compile | None = None

    @property
    def package(self) -> str:
        """The name that it is imported by."""
        return self.path.partition(".")[0]

    def load(self) -> Any:
        """The class, or None where it cannot be imported."""
        module, _, name = self.path.rpartition(".")
        found = imported(module)
        return None if isinstance(found, Exception) else getattr(found, name)


def by_torch(optimizer: Any) -> Callable[[], object]:
    """All of it."""
    step: Callable[[], object] = torch.compile(optimizer.step)
    return step


def by_itself(optimizer: Any) -> Callable[[], object]:
    """What pytorch-optimizer's create_optimizer(compile=True) does: all but what changes from step to step."""
    optimizer._compile_foreach()
    step: Callable[[], object] = optimizer.step
    return step


def both_ways(title: str, path: str, differs: str = "", writes_gradient: bool = False, **settings: Any) -> list[Peer]:
    """Its loop over tensors, and its step by torch's operators for lists."""
    return [
        Peer(title + name, path, {**settings, "foreach": foreach}, writes_gradient, differs)
        for name, foreach in (("", False), (" foreach", True))
    ]


def timm(name: str, differs: str = "", **settings: Any) -> list[Peer]:
    """Both of timm's."""
    return both_ways("timm", f"timm.optim.{name}", differs, **settings)


def timm_compiled(name: str, **settings: Any) -> list[Peer]:
    """And a third, of those that are not compiled anew in each step for the count of steps."""
    path = f"timm.optim.{name}"
    return [*timm(name, **settings), Peer("timm compiled", path, {**settings, "foreach": True}, compile=by_torch)]


def kozistr(name: str, differs: str = "", **settings: Any) -> list[Peer]:
    """All three of pytorch-optimizer's, which works in the gradient's memory."""
    title, path = "pytorch-optimizer", f"pytorch_optimizer.{name}"
    compiled = Peer(f"{title} compiled", path, {**settings, "foreach": True}, True, differs, by_itself)
    return [*both_ways(title, path, differs, writes_gradient=True, **settings), compiled]


def authors(name: str) -> list[Peer]:
    """Both of schedulefree's, which too works in the gradient's memory."""
    return both_ways("schedulefree", f"schedulefree.{name}", writes_gradient=True)


#: By the class of trainopt whose rule they follow. Where torch has none, the first is the judge of the others.
PEERS: dict[str, list[Peer]] = {
    "AdamW": [
        Peer("DeepSpeedCPUAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": True}),
        *timm("adamw.AdamWLegacy"),
    ],
    "SGD": timm("sgdw.SGDW"),
    "NAdam": timm("nadamw.NAdamW", "its momentum follows no schedule", weight_decay=0.0),
    "Lion": [
        Peer("lion-pytorch", "lion_pytorch.Lion", {"use_triton": False}),
        Peer("lion-pytorch foreach", "lion_pytorch.foreach.Lion"),
        Peer("lion-pytorch compiled", "lion_pytorch.foreach.Lion", compile=by_torch),
        *timm_compiled("Lion"),
        *kozistr("Lion"),
    ],
    # timm clips by default. pytorch-optimizer corrects the first bias alone, or with `adam_debias` none, so that
    # the rule corrects none either; it decays as the others if told not to decouple; and it bounds the parameter's norm
    # by 10, which 64M of 0.001 keep.
    "LAMB": [
        *timm_compiled("Lamb", max_grad_norm=None),
        *kozistr("Lamb", weight_decouple=False, adam_debias=True),
    ],
    "LARS": [
        *timm_compiled("Lars"),
        *kozistr("LARS", "it steps tensors of one dimension as SGD does, without norms and decay"),
    ],
    "NovoGrad": [Peer("timm", "timm.optim.NvNovoGrad"), *kozistr("NovoGrad")],
    "Adan": [*timm("Adan"), *kozistr("Adan")],
    "AdEMAMix": kozistr("AdEMAMix"),
    "Prodigy": [Peer("prodigyopt", "prodigyopt.Prodigy"), *kozistr("Prodigy")],
    "AdamWScheduleFree": [*authors("AdamWScheduleFree"), *kozistr("ScheduleFreeAdamW")],
    "RAdamScheduleFree": [*authors("RAdamScheduleFree"), *kozistr("ScheduleFreeRAdam")],
    "SGDScheduleFree": [*authors("SGDScheduleFree"), *kozistr("ScheduleFreeSGD")],
}


@cache
def imported(module: str) -> ModuleType | Exception:
    """The module, or why there is none: packages that are there may fail too, over others that they need."""
    if module.startswith("timm"):
        names_for_torchvision()
    try:
        return importlib.import_module(module)
    except Exception as error:
        return error


@cache
def names_for_torchvision() -> torch.library.Library | None:
    """For timm, which imports torchvision. The one on PyPI has its operators in a library for CUDA, which does not load
    beside torch's build for CPUs, and then it fails over their names. With the names it imports; timm needs no more.
    They last as long as what is returned.
    """
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def missing(rules: Iterable[str]) -> dict[str, str]:
    """The packages without which peers of these rules are missing, and why they cannot be imported."""
    reasons = {}
    for peer in (peer for rule in rules for peer in PEERS.get(rule, [])):
        found = imported(peer.path.rpartition(".")[0])
        if isinstance(found, Exception):
            reasons[peer.package] = f"{type(found).__name__}: {found}".split("\n")[0]
    return reasons
