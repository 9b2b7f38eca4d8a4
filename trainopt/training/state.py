"""What a checkpoint of a run holds, and how a run takes it over.

Everything is checked before anything is changed. It is numbers, tensors, strings, dicts and lists alone, for
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainopt.training import gradients, random_state
from trainopt.training.checkpoint import plain
from trainopt.training.window import Window

if TYPE_CHECKING:
    from trainopt.training.run import Run

FORMAT = 1
COUNTERS = ("step", "epoch", "batch", "samples", "skipped", "skipped_in_a_row", "train_loss", "validated_step")


def collect(run: Run) -> dict[str, Any]:
    """The whole state of a run: at any moment between two micro-batches. Collective: every process must call it."""
    params = gradients.parameters(run.optimizer)
    pending = run.window
    state = {
        "format": FORMAT,
        "model": run.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "scaler": None if run.precision.scaler is None else run.precision.scaler.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "counters": {name: getattr(run, name) for name in COUNTERS},
        "interval": run.interval.state_dict(),
        "watch": run.watch.state_dict(),
        "best": run.best.state_dict(),
        "data": {**data_of(run), "seed": run.seed, "generators": run.source.state()},
        "window": None if pending is None else pending.state_dict(),
        "gradients": [param.grad for param in params] if pending is not None and pending.done else None,
        "random": run.processes.gather(random_state.capture(run.processes.device)),
    }
    return plain(state)


def restore(run: Run, state: dict[str, Any], path: Any) -> None:
    """Makes a run what it was. ValueError, with nothing changed, if `check` finds that it is of another run."""
    check(run, state, path)
    run.module.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.schedule is not None and state["schedule"] is not None:
        run.schedule.load_state_dict(state["schedule"])
    if run.precision.scaler is not None and state["scaler"] is not None:
        run.precision.scaler.load_state_dict(state["scaler"])
    if run.average is not None and state["average"] is not None:
        run.average.load_state_dict(state["average"])
    for name in COUNTERS:
        setattr(run, name, state["counters"][name])
    run.interval.load_state_dict(state["interval"])
    run.watch.load_state_dict(state["watch"])
    run.best.load_state_dict(state["best"])
    run.seed = state["data"]["seed"]
    run.source.load(state["data"]["generators"])
    if state["window"] is not None:
        run.window = Window.from_state(state["window"], run.device)
    if state["gradients"] is not None:
        for param, gradient in zip(gradients.parameters(run.optimizer), state["gradients"], strict=True):
            param.grad = None if gradient is None else gradient.to(param.device)
    rank, states = run.processes.rank, state["random"]
    if rank < len(states):
        random_state.restore(states[rank], run.processes.device)
    else:  # there were fewer processes: a stream of its own for each new one
        random_state.reseed(random_state.derived(run.seed, -rank - 1 - run.step))


def data_of(run: Run) -> dict[str, Any]:
    """What the position in the data means something for."""
    options = run.options
    return {"batch_size": options.batch_size, "shuffle": options.shuffle, "batches": run.source.length}


def check(run: Run, state: dict[str, Any], path: Any) -> None:
    """ValueError if a state is not one of this run."""
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')!r}; this version reads {FORMAT}")
    saved, own = shapes_of(state["model"]), shapes_of(run.module.state_dict())
    for name in [*own, *saved]:
        if saved.get(name) != own.get(name):
            theirs, ours = (shapes.get(name, "missing") for shapes in (saved, own))
            raise ValueError(f"{path} is of another model: {name} is {theirs} there and {ours} here")
    there, here = (
        [len(group["params"]) for group in groups]
        for groups in (state["optimizer"]["param_groups"], run.optimizer.param_groups)
    )
    if there != here:
        raise ValueError(f"{path} is of another optimizer: its groups have {there} parameters, here they have {here}")
    for name, value in data_of(run).items():
        if state["data"][name] != value:
            raise ValueError(f"{path} is of other data: {name} is {state['data'][name]!r} there and {value!r} here")
    if run.options.seed is not None and state["data"]["seed"] != run.options.seed:
        raise ValueError(f"seed is {run.options.seed}, but {path} is of a run with seed {state['data']['seed']}")


def shapes_of(state: dict[str, Any]) -> dict[str, str]:
    """The dtype and shape of every tensor of a model's state, by name, as a message shows it."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for name, value in state.items()
    }
