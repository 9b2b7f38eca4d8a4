"""What benchmarks.gpu measures, and who does it: optimizer steps in every form, losses, clipping."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

import trainopt
from benchmarks import loss_cases
from benchmarks.clip import LIBRARIES
from benchmarks.formats import FORMATS, Format
from benchmarks.loss_cases import EAGER, OURS, Case, Step
from benchmarks.optimizers import FIELD, RULES, USUAL, Rule
from benchmarks.tail import DECAY, LIMIT
from benchmarks.workloads import WORKLOADS, Workload

COMPILED = "torch.compile"
COPY = "a copy of the same bytes"
KINDS = ("optimizers", "rules", "formats", "tail", "losses", "clip")


@dataclass(frozen=True)
class Ready:
    """A contender with tensors of its own on the device: what is timed, and what its first call has made."""

    call: Callable[[], object]
    outcome: Callable[[], list[Tensor]]


Prepare = Callable[[torch.device], Ready]


@dataclass(frozen=True)
class Task:
    """Work that contenders do alike.

    Args:
        kind: one of `KINDS`.
        moved: bytes that must be read and written at the least, or 0 where memory is not what the work waits for.
        contenders: by name, what makes one ready on a device; ratios are against the one named `reference`, and all
            must come to its outcome. Where torch has nothing like it, the reference is the copy.
    """

    kind: str
    title: str
    moved: int
    reference: str
    contenders: Mapping[str, Prepare]


# ---------------------------------------------------------------------------------------------------------- optimizers

MANY = Workload("2000x1024", "2,000 tensors of 1,024", ((1024,),) * 2000)
SMALL = Workload("small", "three small tensors", ((5,), (3, 4), ()))


def with_gradients(workload: Workload, device: torch.device) -> list[Parameter]:
    """The same ones for everybody."""
    torch.manual_seed(0)
    parameters = []
    for shape in workload.shapes:
        parameter = Parameter(torch.zeros(shape, dtype=workload.dtype, device=device))
        parameter.grad = torch.randn(shape, device=device).to(workload.dtype)
        parameters.append(parameter)
    return parameters


def stepped(
    workload: Workload, make: Callable[[list[Parameter]], torch.optim.Optimizer], compiled: bool = False
) -> Prepare:
    """A contender that steps through a workload."""

    def ready(device: torch.device) -> Ready:
        parameters = with_gradients(workload, device)
        step = make(parameters).step
        return Ready(torch.compile(step) if compiled else step, lambda: [p.detach() for p in parameters])

    return ready


def optimizer_task(rule: Rule, workload: Workload) -> Task:
    stock, ours = getattr(torch.optim, rule.name), getattr(trainopt, rule.name)
    on_device = {"capturable": True} if rule.name == "AdamW" else {"fused": True}
    makes = {
        "torch fused": partial(stock, fused=True),
        "torch foreach": partial(stock, foreach=True),
        OURS: ours,
        "trainopt, counting on the device": partial(ours, **on_device),
        **apex_optimizers(rule),
    }
    contenders = {name: stepped(workload, partial(make, **rule.settings)) for name, make in makes.items()}
    contenders[COMPILED] = stepped(workload, partial(stock, foreach=True, **rule.settings), compiled=True)
    moved = rule.moved * workload.elements * workload.dtype.itemsize
    return Task("optimizers", f"{rule.title}, {workload.title}", moved, "torch fused", contenders)


def apex_optimizers(rule: Rule) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    try:
        from apex import optimizers
    except ImportError:
        return {}
    if rule.name == "AdamW":
        return {"apex FusedAdam": partial(optimizers.FusedAdam, adam_w_mode=True)}
    return {"apex FusedSGD": optimizers.FusedSGD}


#: The other optimizers: torch's, and some that it does not have.
OTHER_RULES = [
    rule
    for name, rule in RULES.items()
    if name not in USUAL and (name not in FIELD or name in ("lion", "lamb", "lars"))
]


def rule_task(rule: Rule, workload: Workload) -> Task:
    """An optimizer against torch's foreach step, where torch has it, and beside a fused one that may refuse."""
    name, settings = rule.name, rule.settings
    contenders: dict[str, Prepare] = {}
    if stock := getattr(torch.optim, name, None):
        ways = [way for way in ("foreach", "fused") if way in inspect.signature(stock).parameters]
        contenders = {f"torch {way}": stepped(workload, partial(stock, **{way: True}, **settings)) for way in ways}
    reference = next(iter(contenders), COPY)
    contenders[OURS] = stepped(workload, partial(getattr(trainopt, name), **settings))
    moved = rule.moved * workload.elements * workload.dtype.itemsize
    return Task("rules", f"{name}, {workload.title}", moved, reference, contenders)


def format_task(stored: Format, workload: Workload) -> Task:
    """AdamW with parameters and states stored in fewer bytes, against torch's fused step in the parameters' dtype."""
    title, workload = workload.title, replace(workload, dtype=stored.dtype)
    contenders = {
        "torch fused": stepped(workload, partial(torch.optim.AdamW, fused=True)),
        OURS: stepped(workload, partial(trainopt.AdamW, **stored.options)),
    }
    moved = round(stored.bytes_moved * workload.elements)
    return Task("formats", f"AdamW, {title}, {stored.name}", moved, "torch fused", contenders)


def tail_task(workload: Workload) -> Task:
    """Clipping by the global norm, AdamW and a moving average: torch's passes, and one step."""

    def by_torch(device: torch.device) -> Ready:
        parameters = with_gradients(workload, device)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        averages = [parameter.detach().clone() for parameter in parameters]
        average = get_ema_multi_avg_fn(DECAY)

        def tail() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, LIMIT, foreach=True)
            optimizer.step()
            average(averages, parameters, 1)  # type: ignore[arg-type]

        return Ready(tail, lambda: [p.detach() for p in parameters])

    ours = stepped(workload, partial(trainopt.AdamW, max_grad_norm=LIMIT, ema_decay=DECAY))
    # The norm reads the gradient; the step reads five values of an element and writes four.
    moved = (1 + 5 + 4) * workload.elements * workload.dtype.itemsize
    title = f"clip, AdamW and average, {workload.title}"
    return Task("tail", title, moved, "torch's passes", {"torch's passes": by_torch, OURS: ours})


# -------------------------------------------------------------------------------------------------------------- losses


def loss_task(case: Case) -> Task:
    def ready(loss: Callable[..., Tensor], device: torch.device, compiled: bool = False) -> Ready:
        torch.manual_seed(0)
        with device:
            operands = case.make()
        step = Step(torch.compile(loss) if compiled else loss, tuple(map(leaf_of, operands)))
        values: list[Tensor] = []

        def call() -> None:
            values[:] = [step().detach()]

        return Ready(call, lambda: [*values, *(leaf.grad for leaf in step.leaves if leaf.grad is not None)])

    losses = {**case.losses, **peers_losses(case)}
    contenders: dict[str, Prepare] = {n: partial(ready, loss) for n, loss in losses.items()}
    contenders[COMPILED] = partial(ready, case.losses[EAGER], compiled=True)
    return Task("losses", case.title, case.moved_on_gpu or case.moved, EAGER, contenders)


def leaf_of(operand: Tensor) -> Tensor:
    """Operands made by an operation on a random tensor have no .grad."""
    return operand.detach().requires_grad_(operand.requires_grad)


def peers_losses(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Those of the packages that are installed; one that does not know the case's options is left out when it runs."""
    found: dict[str, Callable[..., Tensor]] = {}
    options = getattr(case.losses[EAGER], "keywords", {})
    with suppress(ImportError):
        from liger_kernel.transformers import functional as liger

        if case.name == "cross-entropy":
            found["Liger, in place"] = partial(liger.liger_cross_entropy, **options)
        if case.name == "linear":
            found["Liger"] = liger.liger_fused_linear_cross_entropy
    with suppress(ImportError):
        from quack.cross_entropy import cross_entropy as quack

        if case.name == "cross-entropy":
            found["quack"] = partial(quack, **options)
    return found


def linear(dtype: torch.dtype, tokens: int, width: int, words: int) -> Case:
    """On a GPU torch's own products are fast in every dtype."""
    case = loss_cases._linear(dtype, tokens, width, words)
    losses = {EAGER: loss_cases._stored, OURS: trainopt.functional.linear_cross_entropy}
    return replace(case, name="linear", losses=losses, others={}, reference=EAGER)


# ---------------------------------------------------------------------------------------------------------------- clip


def clip_task(workload: Workload, clips: bool) -> Task:
    def ready(clip: Callable[..., object], device: torch.device) -> Ready:
        parameters = with_gradients(workload, device)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        # A negative limit keeps the norm while it changes every sign: every call writes, and no gradient fades away.
        limit = -norm if clips else 2 * norm
        return Ready(partial(clip, parameters, limit), lambda: [p.grad for p in parameters if p.grad is not None])

    passes = 3 if clips else 1  # the norm reads; clipping reads again and writes
    moved = passes * workload.elements * workload.dtype.itemsize
    title = f"clip_grad_norm_, {workload.title}, {'clips' if clips else 'below the limit'}"
    contenders = {name: partial(ready, library.clip_grad_norm_) for name, library in LIBRARIES.items()}
    return Task("clip", title, moved, "torch", contenders)


# ----------------------------------------------------------------------------------------------------------------- all


def tasks(quick: bool) -> Iterator[Task]:
    """All of them, or tiny ones of each kind."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    names = ("1000x64", "300x4096", "resnet50", "gpt2", "gpt2-bf16", "64m")
    workloads = [SMALL] if quick else [*(WORKLOADS[name] for name in names), MANY]
    for rule in (RULES[name] for name in USUAL):
        for workload in workloads:
            yield optimizer_task(rule, workload)
    models = [SMALL] if quick else [WORKLOADS["gpt2"], WORKLOADS["gpt2-bf16"]]
    yield from (rule_task(rule, workload) for rule in OTHER_RULES for workload in models)
    yield from (format_task(stored, models[0]) for stored in FORMATS if stored.cls is trainopt.AdamW and stored.options)
    yield from map(tail_task, [SMALL] if quick else [*models, WORKLOADS["1000x64"]])
    cross_entropy, pointwise = loss_cases._cross_entropy, loss_cases._pointwise
    if quick:
        cases = [cross_entropy(7, 5, float32), pointwise("mse_loss", Tensor.clone, 100), linear(float32, 6, 3, 5)]
    else:
        cases = [
            cross_entropy(8192, 32000, float32),
            cross_entropy(8192, 32000, bfloat16),
            cross_entropy(8192, 32000, bfloat16, "smoothing 0.1", label_smoothing=0.1),
            cross_entropy(8192, 32000, bfloat16, "in place"),
            cross_entropy(4096, 128256, bfloat16),
            cross_entropy(65536, 1000, float32),
            cross_entropy(4096, 10, float32),
            *(pointwise(name, Tensor.clone, 2**26) for name in ("mse_loss", "l1_loss", "huber_loss")),
            pointwise("binary_cross_entropy_with_logits", Tensor.clone, 2**26),
            pointwise("binary_cross_entropy", Tensor.sigmoid, 2**26),
            pointwise("kl_div", torch.nn.functional.logsigmoid, 2**26, reduction="sum"),
            linear(bfloat16, 8192, 4096, 32000),
            linear(bfloat16, 4096, 4096, 128256),
        ]
    yield from map(loss_task, cases)
    for workload in [SMALL] if quick else [WORKLOADS["1000x64"], WORKLOADS["gpt2"], WORKLOADS["64m"]]:
        for clips in (True, False):
            yield clip_task(workload, clips)
