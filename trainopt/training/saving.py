"""When a run writes its checkpoints and its best weights, and what it does when it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from trainopt.training.checkpoint import Checkpoints, plain, write
from trainopt.training.format import check_fields
from trainopt.training.state import State

COSTLY = 20  # an epoch without validation ends in a checkpoint if it took this many times as long as writing one


class Saving:
    """Writes a run's state into its directory, or nothing where it has none. Building it writes nothing.

    Args:
        state: of the run.
        say: takes (kind, topic, text) of a sentence for the person.

    Raises:
        ValueError: the directory cannot be written in, or has checkpoints that are not to be resumed from.
    """

    def __init__(self, state: State, say: Callable[[str, str, str], None]) -> None:
        self.state, self.say = state, say
        self.checkpoints: Checkpoints | None = None
        self.newest: Path | None = None
        self.is_current = False  # whether the newest holds all that there is
        self.saved_at, self.took = perf_counter(), 0.0
        options = state.options
        if options.directory is None:
            return
        self.checkpoints = Checkpoints(Path(options.directory) / "checkpoints", options.keep)
        if state.processes.is_first:
            self.checkpoints.check_writable()
            if not options.resume and self.checkpoints.paths():
                raise ValueError(f"resume is False, but {self.checkpoints.directory} has checkpoints")

    def find(self) -> tuple[dict[str, Any] | None, list[tuple[Path, str]]]:
        """The content of the newest whole checkpoint, if there is one, the same in all processes; and in the first
        one those newer ones that are not whole, with what is wrong with them. Collective."""
        corrupt: list[tuple[Path, str]] = []
        found = None
        if self.checkpoints is not None and self.state.processes.is_first:
            found = self.checkpoints.newest(lambda path, why: corrupt.append((path, why)), check_fields)
        found = self.state.processes.broadcast(found)
        if found is None:
            return None, corrupt
        self.newest, saved = found
        self.is_current = True
        return saved, corrupt

    def check(self) -> None:
        """TypeError for a run that a checkpoint cannot hold: now, and not after an hour. Collective."""
        if self.checkpoints is not None:
            self.state.collect()
        self.saved_at = perf_counter()

    def is_late(self) -> bool:
        """Whether so many minutes have passed since the last checkpoint; said by the first process."""
        if self.checkpoints is None or not self.state.processes.is_first:
            return False
        return perf_counter() - self.saved_at >= 60 * self.state.options.checkpoint_minutes

    def is_cheap(self) -> bool:
        """Whether a checkpoint takes little against the time since the last one. Collective."""
        is_cheap = perf_counter() - self.saved_at >= COSTLY * self.took
        return self.state.processes.sum([float(is_cheap and self.state.processes.is_first)])[0] > 0

    def save(self) -> float:
        """A checkpoint of everything, unless the newest one holds it; the seconds that it took. Collective."""
        if self.checkpoints is None or self.is_current:
            return 0.0
        begun, checkpoints, state = perf_counter(), self.checkpoints, self.state
        with state.modes.evaluation():  # until it is written: what is collected is no copy
            everything = state.collect()
            if state.processes.is_first:
                written = self._try(lambda: checkpoints.save(everything, state.counters.step))
                self.newest = written or self.newest
        self.is_current, self.saved_at = True, perf_counter()
        self.took = self.saved_at - begun
        return self.took

    def save_best(self) -> None:
        """The weights that the model holds, as best.pt. Collective."""
        if self.checkpoints is None:
            return
        state, path = self.state, Path(str(self.state.options.directory)) / "best.pt"
        weights = plain({**state.trained.state(), "step": state.counters.step})
        weights.setdefault(state.options.monitor, state.best.value)
        if state.processes.is_first:
            self._try(lambda: write(weights, path))

    def _try(self, writing: Callable[[], Any]) -> Any:
        """What `writing` returns, or None where it fails: training goes on, and the person is told."""
        try:
            return writing()
        except OSError as error:
            last = f"the newest checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"
            self.say("trouble", "checkpoint", f"could not save: {error.strerror or error}; training goes on, {last}")
            return None
