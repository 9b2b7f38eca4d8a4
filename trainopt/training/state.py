"""What a checkpoint of a run holds, and how a run takes it over.

Everything is checked before anything is changed. It is numbers, tensors, strings, dicts and lists alone, for
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainopt.training import gradients, random_state
from trainopt.training.checkpoint import CorruptCheckpoint, plain
from trainopt.training.distributed import like
from trainopt.training.given import is_plain
from trainopt.training.interval import Interval
from trainopt.training.trained import plain_name, plain_state
from trainopt.training.watch import Watch
from trainopt.training.window import Window

if TYPE_CHECKING:
    from trainopt.training.loop import Loop

FORMAT = 2  # 1, without the loss's own state, is read too


@dataclass
class Counters:
    """How far a run is."""

    step: int = 0  # updates made
    epoch: int = 0  # passes over the data completed
    batch: int = 0  # micro-batches drawn in this one
    samples: int = 0
    skipped: int = 0  # updates left out
    skipped_in_a_row: int = 0
    train_loss: float = float("nan")  # mean over the last interval between two Progress events
    validated_step: int = -1
    monitored: float | None = None  # the latest value of `monitor`

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name in vars(self)})


def collect(run: Loop) -> dict[str, Any]:
    """The whole state of a run: at any moment between two micro-batches. Collective: every process must call it."""
    params, pending = gradients.parameters(run.optimizer), run.window
    state = {
        "format": FORMAT,
        **run.trained.state(),
        **{name: None if part is None else part.state_dict() for name, part in run.parts().items()},
        "training_weights": run.modes.weights,
        "given": run.given,
        "data": {**data_of(run), "seed": run.seed, "generators": run.source.state()},
        "window": None if pending is None else pending.state_dict(),
        "gradients": [param.grad for param in params] if pending is not None and pending.done else None,
        "random": run.processes.gather(random_state.capture(run.processes.device)),
    }
    return plain(state)


def restore(run: Loop, state: dict[str, Any], path: Any) -> None:
    """Makes a run what it was. ValueError, with nothing changed, if `check` finds that it is of another run; ValueError
    too where the optimizer, say, cannot take its part over."""
    state = upgraded(state)
    check(run, state, path)
    try:
        take_over(run, state)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be taken over: {type(error).__name__}: {error}; remove it to begin from an older one"
        ) from error


def take_over(run: Loop, state: dict[str, Any]) -> None:
    trained, params = run.trained, gradients.parameters(run.optimizer)
    parts = {"model": state["model"]}
    if holds_state(run):
        parts["criterion"] = state["criterion"]
    trained.load(parts)
    run.optimizer.load_state_dict(spread(state["optimizer"], params))
    for name, part in run.parts().items():
        if name != "optimizer" and part is not None and state[name] is not None:
            part.load_state_dict(state[name])
    run.modes.train(state["training_weights"])
    run.seed = state["data"]["seed"]
    run.source.load(state["data"]["generators"])
    if state["window"] is not None:
        run.window = Window.from_state(state["window"], run.device)
    if state["gradients"] is not None:
        for param, gradient in zip(params, state["gradients"], strict=True):
            param.grad = None if gradient is None else like(gradient.to(param.device), param)
    rank, states = run.processes.rank, state["random"]
    if rank < len(states):
        random_state.restore(states[rank], run.processes.device)
    else:  # there were fewer processes: a stream of its own for each new one
        random_state.reseed(random_state.derived(run.seed, -rank - 1 - run.counters.step))


def spread(state: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
    """An optimizer's state whose tensors in a parameter's shape are spread over the processes as that is."""
    spread_out = {
        index: {
            name: like(value, params[index])
            if isinstance(value, Tensor) and value.shape == params[index].shape and value.ndim
            else value
            for name, value in entries.items()
        }
        if isinstance(entries, dict)
        else entries
        for index, entries in state["state"].items()
    }
    return {**state, "state": spread_out}


def holds_state(run: Loop) -> bool:
    """Whether what the loss owns is state. The buffers of torch's losses, such as class weights, are arguments."""
    criterion = run.trained.criterion
    return criterion.known is None or any(True for _ in criterion.owned.parameters())


def data_of(run: Loop) -> dict[str, Any]:
    """What the position in the data means something for."""
    options = run.options
    return {"batch_size": options.batch_size, "shuffle": options.shuffle, "batches": run.source.length}


# Whose it is ----------------------------------------------------------------------------------------------------------


def check(run: Loop, state: dict[str, Any], path: Any) -> None:
    """ValueError if a state, of this format, is not one of this run."""
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']!r}; this version reads {FORMAT} and those before")
    check_shapes(state["model"], plain_state(run.trained.model), f"{path} is of another model: ")
    owned = run.trained.criterion.owned
    if state["criterion"] is None and any(True for _ in owned.parameters()):
        raise ValueError(f"{path} is of an older version, which did not save the parameters of the loss")
    if state["criterion"] is not None and holds_state(run):
        check_shapes(state["criterion"], plain_state(owned), f"{path} is of another loss: ")
    there, here = (
        [len(group["params"]) for group in groups]
        for groups in (state["optimizer"]["param_groups"], run.optimizer.param_groups)
    )
    if there != here:
        raise ValueError(f"{path} is of another optimizer: its groups have {there} parameters, here they have {here}")
    for name, value in data_of(run).items():
        if state["data"].get(name) != value:
            raise ValueError(
                f"{path} is of other data: {name} is {state['data'].get(name)!r} there and {value!r} here, and so the"
                " position in it means nothing: use another directory"
            )
    if run.options.seed is not None and state["data"]["seed"] != run.options.seed:
        raise ValueError(f"seed is {run.options.seed}, but {path} is of a run with seed {state['data']['seed']}")


def check_shapes(state: dict[str, Any], own: dict[str, Any], of_another: str) -> None:
    """ValueError where the tensors of two states are not alike."""
    saved, wanted = shapes_of(state), shapes_of(own)
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            theirs, ours = (shapes.get(name, "missing") for shapes in (saved, wanted))
            raise ValueError(f"{of_another}{name} is {theirs} there and {ours} here")


def shapes_of(state: dict[str, Any]) -> dict[str, str]:
    """The dtype and shape of every tensor of a model's state, by name, as a message shows it."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for name, value in state.items()
    }


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A state of format 1 as one of this format; any other as it is."""
    if state["format"] != 1:
        return state
    model = {plain_name(name): value for name, value in state["model"].items()}
    state = {**state, "format": FORMAT, "model": model, "criterion": None, "training_weights": None, "given": None}
    if (average := state["average"]) is not None:
        weights = {plain_name(name): value for name, value in average["weights"].items()}
        state["average"] = {**average, "weights": weights}
    if (weights := state["best"]["weights"]) is not None:
        best = {plain_name(name): value for name, value in weights.items()}
        state["best"] = {**state["best"], "weights": {"model": best}}
    if (window := state["window"]) is not None:
        window = {name: value for name, value in window.items() if name != "asked_to_stop"}
        state["window"] = {
            **window,
            "planned": window["counts"],
            "counts": window["counts"][: window["done"]],
            "asked": "",
        }
    return state


# Whether it is one ----------------------------------------------------------------------------------------------------

#: The type of each field; a dict stands for one with at least these, None among several for a field that may be None,
#: object for what is its owner's affair.
FIELDS: dict[str, Any] = {
    "format": int,
    "model": {},
    "optimizer": {"state": {}, "param_groups": list},
    "schedule": object,
    "scaler": (dict, None),
    "average": (dict, None),
    "counters": {
        **dict.fromkeys(("step", "epoch", "batch", "samples", "skipped", "skipped_in_a_row", "validated_step"), int),
        "train_loss": float,
    },
    "interval": {"total": float, "counted": (float, int), "samples": int},
    "watch": {},
    "best": {"value": (float, int, None), "step": (int, None), "since": int, "weights": (dict, None)},
    "data": {},
    "window": (dict, None),
    "gradients": (list, None),
    "random": list,
}
DATA = {"seed": int, "generators": list, "batch_size": (int, str, None), "shuffle": bool, "batches": (int, None)}
NEW_FIELDS = {"criterion": {}, "training_weights": (list, None), "given": (dict, None)}  # since format 2


def check_fields(state: dict[str, Any]) -> None:
    """CorruptCheckpoint for what is no state of any run: a field that is missing, or of the wrong type."""
    has_format = isinstance(state.get("format"), int) and not isinstance(state["format"], bool)
    if has_format and state["format"] > FORMAT:
        return  # of a later version; `check` says so
    check_types(state, FIELDS | (NEW_FIELDS if has_format and state["format"] > 1 else {}), "")
    for name, value in state["counters"].items():
        if isinstance(value, int) and value < (-1 if name == "validated_step" else 0):
            raise CorruptCheckpoint(f"its counters.{name} is {value}")
    if state["average"] is not None:
        check_types(state["average"], {"count": int, "log_bias": float, "weights": {}}, "average.")
    check_types(state["data"], DATA, "data.")
    check_optimizer(state)
    if state.get("given") is not None:
        check_given(state["given"])
    for name, part in (("watch", Watch()), ("interval", Interval())):
        check_alike(state[name], part.state_dict(), name)
        with taken_over(name):
            part.load_state_dict(state[name])
    own = random_state.capture()
    for index, generators in enumerate(state["random"]):
        check_types(generators, {"python": tuple, "torch": Tensor}, f"random.{index}.")
        check_alike(generators, own, f"random.{index}")
    if state["window"] is not None:
        with taken_over("window"):
            Window.from_state(upgraded(state)["window"], torch.device("cpu"))


@contextmanager
def taken_over(name: str) -> Iterator[None]:
    """CorruptCheckpoint where a part's own loading fails."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"its {name} cannot be taken over: {type(error).__name__}: {error}") from error


def check_optimizer(state: dict[str, Any]) -> None:
    """Whose state each entry is, and as many gradients as parameters."""
    owners: list[Any] = []
    for index, group in enumerate(state["optimizer"]["param_groups"]):
        check_types(group, {"params": list}, f"optimizer.param_groups.{index}.")
        rate = group.get("lr", 0.0)
        rate = rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate
        if type(rate) not in (int, float) or rate != rate:
            raise CorruptCheckpoint(f"its optimizer.param_groups.{index}.lr is {shown(rate)}")
        owners += group["params"]
    numbers = {owner for owner in owners if type(owner) is int}
    entries = {key: value for key, value in state["optimizer"]["state"].items() if type(key) is int}
    if len(numbers) < len(owners) or not numbers.issuperset(entries):  # keys that are no numbers are nobody's
        raise CorruptCheckpoint("its optimizer.param_groups do not say whose states there are")
    for index, values in entries.items():
        check_types(values, {}, f"optimizer.state.{index}.")
    found = state["gradients"]
    if found is not None and (len(found) != len(owners) or any(type(each) not in (Tensor, NoneType) for each in found)):
        raise CorruptCheckpoint(f"its gradients are not those of {len(owners)} parameters")


def check_given(given: dict[str, Any]) -> None:
    """What `trainopt.training.given` compares: plain values by name."""
    check_types(given, {"options": {}, "optimizer": {"class": str, "groups": list}, "schedule": (dict, None)}, "given.")
    parts = [given["options"], *given["optimizer"]["groups"]]
    if given["schedule"] is not None:
        check_types(given["schedule"], {"class": str}, "given.schedule.")
        parts.append(given["schedule"])
    if not all(isinstance(part, dict) and all(map(is_plain, part.values())) for part in parts):
        raise CorruptCheckpoint("its given has something that is no plain value")


def check_alike(value: Any, own: Any, where: str) -> None:
    """CorruptCheckpoint where something is of another type than in a state that this program would write itself.

    A number may stand for a number, and anything for None. Of a dict the common keys are looked at, for another version
    may have others.
    """
    numbers = (int, float)
    if type(value) is not type(own) and own is not None and not (type(value) in numbers and type(own) in numbers):
        raise CorruptCheckpoint(f"its {where} is {shown(value)}")
    if isinstance(own, dict):
        for name in own.keys() & value.keys():
            check_alike(value[name], own[name], f"{where}.{name}")
    elif isinstance(own, tuple):
        if len(value) != len(own):
            raise CorruptCheckpoint(f"its {where} has {len(value)} entries, not {len(own)}")
        for index, (each, other) in enumerate(zip(value, own, strict=True)):
            check_alike(each, other, f"{where}.{index}")
    elif isinstance(own, Tensor) and (value.dtype, value.shape) != (own.dtype, own.shape):
        raise CorruptCheckpoint(f"its {where} is of another shape or dtype")


def check_types(state: Any, fields: dict[str, Any], where: str) -> None:
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"its {where.rstrip('.') or 'content'} is a {type(state).__name__}, not a dict")
    for name, types in fields.items():
        if name not in state:
            raise CorruptCheckpoint(f"it has no {where}{name}")
        value = state[name]
        if isinstance(types, dict):
            check_types(value, types, f"{where}{name}.")
            continue
        allowed = types if isinstance(types, tuple) else (types,)
        if object not in allowed and type(value) not in allowed and not (value is None and None in allowed):
            raise CorruptCheckpoint(f"its {where}{name} is {shown(value)}")


def shown(value: Any) -> str:
    is_short = isinstance(value, int | float | str) and len(str(value)) < 40
    return f"{value!r}" if is_short else f"a {type(value).__name__}"
