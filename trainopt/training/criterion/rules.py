"""Rules that say what a loss counts in a target, where it is no loss of torch's and cannot be watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training.criterion.callables import Core, walk
from trainopt.training.criterion.counting import Count, count_in, elements_in, known_loss, reduction_of, samples_in
from trainopt.training.criterion.observing import Reduced

Rule = Callable[[Any], Count]

#: Losses in a TorchScript graph, with the places of their reduction and their ignore_index among the operands.
SCRIPTED = {
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"), (3, 4)),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), (2, None)),
    "binary_cross_entropy": (3, None),
    "binary_cross_entropy_with_logits": (4, None),
}


def scripted_rule(core: Core) -> Rule | None:
    """What a TorchScript function or module counts in its target, if one loss of torch's stands in its graph."""
    if not isinstance(core.function, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return None
    graph: Any = core.function.graph.copy()
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_constant_propagation(graph)  # of the reduction's name
    found = [(node, SCRIPTED[kind]) for kind in SCRIPTED for node in graph.findAllNodes(f"aten::{kind}")]
    if len(found) != 1:
        return None
    node, (reduction, ignored) = found[0]
    operands = list(node.inputs())
    if operands[reduction].toIValue() != 1:
        return None
    if ignored is None:
        return elements_in
    has_weight = operands[2].type().kind() != "NoneType"
    return None if has_weight else of_classes({"ignore_index": operands[ignored].toIValue()})


def learned_rule(known: Reduced | None, target: Any) -> Rule | None:
    """What a loss counts in any target, from what was seen of it with this one; None if that tells nothing."""
    if known is None or known.count is None:
        return None
    rules: list[Rule] = [elements_in, samples_in]
    if known.labels is not None and "ignore_index" in known.labels:
        rule = of_classes({name: value for name, value in known.labels.items() if name not in ("input", "target")})
        inner = known.labels["target"]
        rules = []
        if isinstance(target, Tensor) and isinstance(inner, Tensor):
            if inner.numel() == target.numel():
                rules = [rule]
            elif target.ndim > 1 and inner.numel() == target[..., 1:].numel():  # each token is told from those before
                rules = [lambda target: rule(target[..., 1:])]
    return next((rule for rule in rules if float(rule(target)) == float(known.count)), None)


def guess_of(core: Core) -> tuple[str, Rule]:
    """What a loss may be the mean over, by the one known loss that it reaches, or its `ignore_index`; in words too."""
    if core.function is own_loss:
        return "the labels that are not -100", labels_in
    things = [part for _, thing in walk(core.function) for part in parts_with(thing)]
    inner = [Core(thing, {}, False, True) for thing in things]
    known = [found for each in inner if (found := known_loss(each)) is not None and reduction_of(found[1]) == "mean"]
    rules: list[Rule] = [partial(count_in, found) for found in known]
    if not known:  # the graph of a scripted module is there besides the modules in it
        rules = [rule for each in inner if (rule := scripted_rule(each)) is not None]
    if len(rules) == 1:
        name = f"{known[0][0]} in it" if known else "loss in its graph"
        return f"what the {name} counts in the whole target", rules[0]
    if isinstance(ignored := getattr(core.function, "ignore_index", None), int):
        return f"the targets that are not its ignore_index, {ignored}", of_classes({"ignore_index": ignored})
    return "the samples", samples_in


def own_loss(output: Any, target: Any) -> Any:
    """The loss that a model has computed itself, by Hugging Face's convention."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TypeError(f"loss is None, but the model's output, a {type(output).__name__}, has no loss")
    return loss


def of_classes(options: Mapping[str, Any]) -> Rule:
    """That of cross_entropy with these options."""
    return partial(count_in, ("cross_entropy", options))


def labels_in(target: Any) -> Count:
    """Those that are not -100, by Hugging Face's convention."""
    is_classes = isinstance(target, Tensor) and not target.is_floating_point()
    return of_classes({})(target) if is_classes else samples_in(target)


def parts_with(thing: Any) -> list[Any]:
    """A thing, and its parts if it is a module."""
    return [*thing.modules()] if isinstance(thing, nn.Module) else [thing]
