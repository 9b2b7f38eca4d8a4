"""Which parameters of a model are Muon's matrices, and which are AdamW's."""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from trainopt.optim.groups import NORM_NAME, NORMS, WEIGHT_LAYERS, _every_parameter, _place_of, spares

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
#: A class of somebody else's that says it is one: TokenEmbedding, LlamaRotaryEmbedding.
EMBEDDING_NAME = re.compile(r"Embed(ding)?s?$")
#: Bare parameters that are added to activations, or looked up: pos_embed, wpe, relative_position_bias_table.
ADDED_NAME = re.compile(r"(^|_)(pos|position|positional|embed|embedding|embeddings|emb|wte|wpe|table)(_|$)")
HEADS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


def muon_groups(
    model: nn.Module,
    *,
    adamw: Sequence[str] = (),
    muon: Sequence[str] = (),
    flatten: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The parameters of a model in groups for `trainopt.Muon`: hidden matrices, and two groups for AdamW.

        optimizer = trainopt.Muon(trainopt.muon_groups(model), lr=0.02, adamw={"lr": 3e-4})
        trainopt.explain(optimizer)                                # shows the split

    AdamW's are embeddings; the output head; what shares a weight with either; norms, biases, tokens, position tables
    and all else that is no matrix. The head is what the model's ``get_output_embeddings()`` returns (Transformers),
    else the last Linear, Bilinear or convolution that is registered, unless that lies within one of a stack of layers,
    as in a model without a head. Every parameter is in exactly one group, tied ones under their first name, and with
    its name. AdamW's second group has a decay of 0 and those that `trainopt.param_groups` spares.

    Args:
        model: any module whose parameters have their shapes.
        adamw: names of further parameters for AdamW: shell patterns, such as "*.router.weight".
        muon: names of parameters for Muon, whatever is said above; they need two dimensions, or more with `flatten`.
        flatten: whether convolutions are Muon's, each as a matrix of its outputs and all else. Else they are AdamW's.
        options: by patterns, options of Muon's groups: ``{"*.attn.qkv.weight": {"split": 3}}`` orthogonalises fused
            queries, keys and values each by itself. What matches is a group of its own.

    Raises:
        ValueError: a pattern that no name matches, or one of `options` that matches no matrix of Muon's; a parameter in
            both lists, or in `muon` and no matrix; a lazy parameter that has no shape yet; a model without parameters.
    """
    options = dict(options or {})
    for argument, patterns in (("adamw", adamw), ("muon", muon)):
        if isinstance(patterns, str):
            raise ValueError(f"muon_groups: {argument} must be a list of patterns, got {patterns!r}")
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in _every_parameter(model):
        if is_lazy(param):
            raise ValueError(f"muon_groups: {name!r} has no shape yet; run the model on a batch first")
        names.setdefault(param, []).append(name)
    if not names:
        raise ValueError(f"muon_groups: model {type(model).__name__} has no parameters")
    for pattern in (*adamw, *muon, *options):
        if not any(fnmatchcase(name, pattern) for all_names in names.values() for name in all_names):
            raise ValueError(f"muon_groups: {pattern!r} matches no parameter of the model")

    outside = set(_not_hidden(model))
    is_spared = spares(model)
    common = {"flatten": True} if flatten else {}
    groups: dict[str | None, dict[str, Any]] = {None: {"params": [], **common}}
    groups |= {pattern: {"params": [], **common, **own} for pattern, own in options.items()}
    decayed: dict[str, Any] = {"params": [], "use_muon": False}
    spared: dict[str, Any] = {"params": [], "use_muon": False, "weight_decay": 0.0}
    for param, own_names in names.items():
        is_wanted, is_refused = (_matches(own_names, patterns) for patterns in (muon, adamw))
        if is_wanted and is_refused:
            raise ValueError(f"muon_groups: {own_names[0]!r} is in both muon and adamw")
        if is_wanted and not _is_matrix(param, flatten):
            raise ValueError(f"muon_groups: {own_names[0]!r} in muon is no matrix, its shape is {tuple(param.shape)}")
        spare = any(is_spared(name, param) for name in own_names)
        is_muons = is_wanted or (_is_matrix(param, flatten) and not spare and not outside & set(own_names))
        if is_muons and not is_refused:
            group = groups[next((pattern for pattern in options if _matches(own_names, [pattern])), None)]
        else:
            group = spared if spare else decayed
        group["params"].append((own_names[0], param))
    for pattern in options:
        if not groups[pattern]["params"]:
            raise ValueError(f"muon_groups: {pattern!r} in options matches no matrix of Muon's")
    return [group for group in (*groups.values(), decayed, spared) if group["params"]]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_matrix(param: nn.Parameter, flatten: bool) -> bool:
    return param.ndim == 2 or (flatten and param.ndim > 2)


def _not_hidden(model: nn.Module) -> Iterator[str]:
    """The names of parameters that are no hidden layer's weights: of embeddings and the head, and what is added."""
    modules = dict(model.named_modules(remove_duplicate=False))
    head = _head_of(model)
    for name, param in _every_parameter(model):
        owner, own_name = _place_of(modules, name)
        is_layer = isinstance(owner, WEIGHT_LAYERS) and not isinstance(owner, EMBEDDINGS)
        is_embedding = isinstance(owner, EMBEDDINGS) or EMBEDDING_NAME.search(type(owner).__name__)
        is_added = ADDED_NAME.search(own_name) or isinstance(owner, NORMS) or NORM_NAME.search(type(owner).__name__)
        if owner is head or is_embedding or (not is_layer and (is_added or param.ndim > 2)):
            yield name


def _head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes the output; None where there is none."""
    said = getattr(model, "get_output_embeddings", None)
    if callable(said) and isinstance(found := said(), nn.Module):
        return found
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, HEADS)]
    if not layers:
        return None
    path, last = layers[-1]
    return None if _lies_in_stack(model, path) else last


def _lies_in_stack(model: nn.Module, path: str) -> bool:
    """Whether a layer lies within a member of a ModuleList, or of a Sequential that has another of the same class."""
    *outer, _ = path.split(".")
    container: nn.Module = model
    for step in outer:
        member = getattr(container, step)
        if isinstance(container, nn.ModuleList):
            return True
        if isinstance(container, nn.Sequential) and sum(type(member) is type(other) for other in container) > 1:
            return True
        container = member
    return False
