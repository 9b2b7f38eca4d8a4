"""The state of a run: what a checkpoint holds, and how a run takes one over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trainopt.optim.average import KEY, averages
from trainopt.optim.convert import convert_state
from trainopt.optim.loading import keeping_types
from trainopt.optim.precision import KEY as MASTER
from trainopt.optim.registry import of_torch
from trainopt.optim.state_dtype import keys_of
from trainopt.optim.states import States
from trainopt.training import gradients, random_state
from trainopt.training.arguments import check_given_twice, differences, given_to
from trainopt.training.average import Modes, WeightAverage
from trainopt.training.checkpoint import plain
from trainopt.training.data import Source
from trainopt.training.distributed import Processes, is_sharded, like
from trainopt.training.evaluation import Best
from trainopt.training.format import FORMAT, upgraded
from trainopt.training.history import Interval
from trainopt.training.options import Options
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained, plain_state
from trainopt.training.watch import Watch
from trainopt.training.window import Window


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


class State:
    """What a run trains and by what, and how far it is: all that a checkpoint holds.

    Args: what a run is made of. Nothing of it is changed before `begin` or `restore`.
    """

    def __init__(
        self,
        options: Options,
        trained: Trained,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        precision: Precision,
        source: Source,
        processes: Processes,
    ) -> None:
        self.options, self.trained, self.optimizer, self.schedule = options, trained, optimizer, schedule
        self.precision, self.source, self.processes = precision, source, processes
        self.is_sharded = is_sharded(trained.model)
        self.given = given_to(options, optimizer, schedule, trained.criterion.core.function)
        self.modes = Modes(optimizer)
        self.average: WeightAverage | None = None
        self.buffers: list[Tensor] = []  # of what is trained

        self.counters = Counters()
        self.interval = Interval()
        stops_early = options.early_stopping is not None
        measures = not self.is_sharded and not options.step_in_backward
        self.watch = Watch(options.log_every, stops_early, measures)
        self.best = Best(options.is_larger_better, keeps_weights=stops_early)
        self.window: Window | None = None  # the update under way
        self.seed = 0 if options.seed is None else options.seed

    def place(self) -> None:
        """Brings what is trained to its device, and makes what is as large as that."""
        self.trained.place()
        self.buffers = list(self.trained.buffers())
        if self.options.state_dtype is not None:
            convert_state(self.optimizer, self.options.state_dtype)
        if self.options.average is not None:
            self.average = WeightAverage(self.trained, self.options.average, self.options.average_warmup)

    def begin(self) -> None:
        """A new run: its seed, and a stream of random numbers for each process."""
        if self.options.seed is None:
            self.seed = self.processes.broadcast(int(torch.randint(2**63 - 1, ())))
        if self.processes.rank > 0:  # a script seeds every process alike, but dropout must differ
            random_state.reseed(random_state.derived(self.seed, -self.processes.rank))
        self.modes.train()

    def put_back_buffers(self, kept: Sequence[Tensor]) -> None:
        """The buffers of what is trained as they were when these copies were made."""
        for buffer, copy in zip(self.buffers, kept, strict=True):
            buffer.copy_(copy)

    @contextmanager
    def weights_to_use(self) -> Iterator[None]:
        """The model holds the weights to be used, the average if there is one, and afterwards those of before."""
        with self.modes.evaluation(), nullcontext() if self.average is None else self.average.applied():
            yield

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, beside what is trained; None for what there is not."""
        return {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.precision.scaler,
            "average": self.average,
            "counters": self.counters,
            "interval": self.interval,
            "watch": self.watch,
            "best": self.best,
        }

    def _data(self) -> dict[str, Any]:
        """What the position in the data means something for."""
        options = self.options
        return {"batch_size": options.batch_size, "shuffle": options.shuffle, "batches": self.source.length}

    # Into a checkpoint ------------------------------------------------------------------------------------------------

    def collect(self) -> dict[str, Any]:
        """All of it, at any moment between two micro-batches. Collective: every process must call it.

        TypeError for what a checkpoint cannot hold.
        """
        params, pending = gradients.parameters(self.optimizer), self.window
        state: dict[str, Any] = {
            "format": FORMAT,
            **self.trained.state(),
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
            "training_weights": self.modes.weights,
            "given": self.given,
            "data": {**self._data(), "seed": self.seed, "generators": self.source.state()},
            "window": None if pending is None else pending.state_dict(),
            "gradients": [param.grad for param in params] if pending is not None and pending.done else None,
            "random": self.processes.gather(random_state.capture(self.processes.device)),
        }
        if self.average is not None and self.average.in_step:
            state["optimizer"] = without_averages(state["optimizer"])
        return plain(state)

    # Out of one -------------------------------------------------------------------------------------------------------

    def restore(self, saved: dict[str, Any], path: Any) -> list[str]:
        """Makes a run what it was; a sentence for each argument that differs from what it was given then.

        ValueError, with nothing changed, where the checkpoint is of another run; ValueError too where the optimizer,
        say, cannot take its part over.
        """
        before, saved = saved.get("given"), upgraded(saved)
        self._check(saved, path)
        try:
            self._take_over(saved)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be taken over: {type(error).__name__}: {error}; remove it to begin from an older one"
            ) from error
        if before is None:  # of an older version
            return []
        then, now = before["options"], self.given["options"]
        if any(then.get(name) != now[name] for name in ("monitor", "maximize")):
            self.best = Best(self.options.is_larger_better, self.best.keeps_weights)
        return list(differences(before, self.given))

    def _check(self, saved: dict[str, Any], path: Any) -> None:
        """ValueError if a checkpoint is not one of this run."""
        if saved["format"] != FORMAT:
            raise ValueError(f"{path} has format {saved['format']!r}; this version reads {FORMAT} and those before")
        check_shapes(saved["model"], plain_state(self.trained.model), f"{path} is of another model: ")
        owned = self.trained.criterion.owned
        if saved["criterion"] is None and any(True for _ in owned.parameters()):
            raise ValueError(f"{path} is of an older version, which did not save the parameters of the loss")
        if saved["criterion"] is not None and self._loss_has_state():
            check_shapes(saved["criterion"], plain_state(owned), f"{path} is of another loss: ")
        there, here = (
            [len(group["params"]) for group in groups]
            for groups in (saved["optimizer"]["param_groups"], self.optimizer.param_groups)
        )
        if there != here:
            raise ValueError(
                f"{path} is of another optimizer: its groups have {there} parameters, here they have {here}"
            )
        for name, value in self._data().items():
            if saved["data"].get(name) != value:
                raise ValueError(
                    f"{path} is of other data: {name} is {saved['data'].get(name)!r} there and {value!r} here, and so "
                    "the position in it means nothing: use another directory"
                )
        if self.options.seed is not None and saved["data"]["seed"] != self.options.seed:
            raise ValueError(f"seed is {self.options.seed}, but {path} is of a run with seed {saved['data']['seed']}")

    def _loss_has_state(self) -> bool:
        """Whether what the loss owns is state. The buffers of torch's losses, such as class weights, are arguments."""
        criterion = self.trained.criterion
        return criterion.known is None or any(True for _ in criterion.owned.parameters())

    def _take_over(self, saved: dict[str, Any]) -> None:
        params = gradients.parameters(self.optimizer)
        state = spread(saved["optimizer"], params)
        if saved.get("given") and saved["given"]["optimizer"]["class"] != type(self.optimizer).__name__:
            state = of_another_class(state, self.optimizer)
        with keeping_types(self.optimizer):
            self.optimizer.load_state_dict(state)
        self.trained.load({name: saved[name] for name in ("model", *["criterion"] * self._loss_has_state())})
        check_given_twice(self.options, self.optimizer)  # the groups' options are the checkpoint's now
        if self.options.state_dtype is not None:
            convert_state(self.optimizer, self.options.state_dtype)
        for name, part in self._parts().items():
            if name != "optimizer" and part is not None and saved[name] is not None:
                part.load_state_dict(saved[name])
        self.modes.train(saved["training_weights"])
        self.seed = saved["data"]["seed"]
        self.source.load(saved["data"]["generators"])
        if saved["window"] is not None:
            self.window = Window.from_state(saved["window"], self.precision.device)
        if saved["gradients"] is not None:
            for param, gradient in zip(params, saved["gradients"], strict=True):
                param.grad = None if gradient is None else like(gradient.to(param.device), param)
        rank, states = self.processes.rank, saved["random"]
        if rank < len(states):
            random_state.restore(states[rank], self.processes.device)
        else:  # there were fewer processes: a stream of its own for each new one
            random_state.reseed(random_state.derived(self.seed, -rank - 1 - self.counters.step))


def of_another_class(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this optimizer takes over of one of another class: of each parameter all that a step of its own needs, or
    nothing; and none of its options, which may mean something else there."""
    cls: type[States] | None = type(optimizer) if isinstance(optimizer, States) else of_torch().get(type(optimizer))
    groups, entries = [], {}
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        of_saved = {name: saved[name] for name in ("params", "param_names") if name in saved}
        groups.append({**{name: value for name, value in own.items() if name != "param_names"}, **of_saved})
        by_name = dict(zip(own.get("param_names", ()), own["params"], strict=False))
        names = saved.get("param_names") or [None] * len(own["params"])
        for index, name, param in zip(saved["params"], names, own["params"], strict=True):
            found = state["state"].get(index, {})
            if cls is not None and (kept := fitting(found, cls, own, by_name.get(name, param))):
                entries[index] = kept
    return {**state, "state": entries, "param_groups": groups}


def fitting(found: dict[str, Any], cls: type[States], group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Of a parameter's states those that a class has, if there are all that it needs, in their shapes; else none."""
    shapes = {name: cls._shape_of(name, param) for name in cls._states_needed(group, param)}
    shapes |= dict.fromkeys((*cls._numbers_needed(group), *["step"] * cls._counts_steps), torch.Size())
    fits = all(isinstance(found.get(name), Tensor) and found[name].shape == shape for name, shape in shapes.items())
    also = (KEY, MASTER, *keys_of(shapes))
    return {name: value for name, value in found.items() if name in also} if fits and shapes else {}


def without_averages(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the averages that it keeps for a run, which has a place of its own for them."""
    lent = {index for group in state["param_groups"] if not averages(group) for index in group["params"]}
    entries = {
        index: {name: value for name, value in values.items() if name != KEY} if index in lent else values
        for index, values in state["state"].items()
    }
    return {**state, "state": entries}


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
