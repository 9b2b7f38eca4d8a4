"""What becomes of an update whose gradient is not finite: it is left out, looked into, and told of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainopt.functional import check_targets
from trainopt.training.checkpoint import plain, write
from trainopt.training.criterion.counting import is_counted
from trainopt.training.state import State
from trainopt.training.watch.first_nonfinite import Finding, first_nonfinite, nonfinite_gradient, nonfinite_parameter
from trainopt.training.window import Window


class Skipping:
    """Leaves out the updates of a run that are not finite, and says where the first NaN or infinity came from.

    Args:
        state: of the run.
        say: takes (kind, topic, text) of a sentence for the person.
    """

    def __init__(self, state: State, say: Callable[[str, str, str], None]) -> None:
        self.state, self.say = state, say
        self.suspects: list[Any] | None = None  # the micro-batches of the last update that was not finite

    def skip(self, window: Window, lr: float, checkpoint: Path | None) -> str | None:
        """Leaves out an update; nothing has changed then but the scale of float16. "nonfinite" where the run must end.

        Args:
            lr: that the last update used.
            checkpoint: the newest.
        """
        check_targets()  # a class out of range, which no later update can be right about
        state = self.state
        options, at, processes, precision = state.options, state.counters, state.processes, state.precision
        state.put_back_buffers(window.buffers or ())
        at.skipped += 1
        is_loss_finite = all(math.isfinite(float(loss)) for loss in window.losses)
        is_scale = precision.is_searching() and not processes.sum([float(not is_loss_finite)])[0]
        if is_scale or options.nonfinite == "ignore":
            precision.adapt()
            return None
        at.skipped_in_a_row += 1
        found = otherwise = None
        if state.watch.lost.is_searched():
            otherwise = self._blamed_gradient()
            if not state.is_sharded:  # whose forward pass needs all processes, while one may have found something
                otherwise = Finding(f"{otherwise.text}, and is finite when computed again", "finite again")
                found = self._search(window)
        state.put_back_buffers(window.buffers or ())
        precision.adapt()
        everywhere = processes.gather(found)
        rank = next((rank for rank, finding in enumerate(everywhere) if finding is not None), 0)
        found = everywhere[rank] or otherwise
        self.suspects = window.batches
        what = found.text if found is not None else "not looked into"
        kept_in = processes.gather(self._keep(what) if processes.rank == rank else None)[rank]
        state.interval.fold()
        told = state.watch.lost_update(found, at.step + 1, lr, state.interval.history)
        if told is not None:
            where = f" in process {rank}" if processes.world > 1 else ""
            text = f"update {at.step + 1:,} left out ({at.skipped_in_a_row} in a row){where}: {told}"
            self.say("trouble", "nonfinite", text + (f"; its batch is in {kept_in}" if kept_in else ""))
        limit = 1 if options.nonfinite == "stop" else options.nonfinite_limit
        if at.skipped_in_a_row < limit:
            return None
        intact = f"{checkpoint} is intact" if checkpoint else "there is no checkpoint"
        text = f"stopped after {limit} in a row; the weights are those of step {at.step:,}, and {intact}"
        self.say("trouble", "nonfinite", text)
        return "nonfinite"

    def explain_loss(self, window: Window) -> None:
        """Names, once, what makes a loss that is not finite, though its gradients are and the update was made."""
        losses = [float(loss) for loss, count in zip(window.losses, window.counts, strict=True) if is_counted(count)]
        if all(map(math.isfinite, losses)):
            return
        self.state.watch.seeks_origin = False
        buffers = [buffer.clone() for buffer in self.state.buffers]
        found = self._search(window)
        self.state.put_back_buffers(buffers)
        if found is not None:
            step = self.state.counters.step
            text = f"the loss of update {step:,} is not finite, though its gradients are: {found}"
            self.say("trouble", "nonfinite", text)

    def _search(self, window: Window) -> Finding | None:
        """What is not finite first when the micro-batches are computed again, each with the weight that it had."""
        trained, precision = self.state.trained, self.state.precision
        if (found := nonfinite_parameter(trained.criterion.owned, " of the loss")) is not None:
            return found
        weights = map(window.weight_of, range(len(window.batches)))
        parts = zip(window.batches, weights, window.counts, strict=True)
        computed = [(batch, weight) for batch, weight, count in parts if is_counted(count)]
        return first_nonfinite(computed, trained, precision)

    def _blamed_gradient(self) -> Finding:
        """The gradient that is not finite and that backward came to first: the loss's own before the model's."""
        trained = self.state.trained
        text = nonfinite_gradient(trained.criterion.owned, " of the loss") or nonfinite_gradient(trained.model)
        text = text or "a gradient is not finite"
        return Finding(text, text.split(" has ")[0])

    def _keep(self, what: str) -> Path | None:
        """Writes the micro-batches that were not finite to the run's directory; None where that cannot be done."""
        if self.state.options.directory is None:
            return None
        path = Path(self.state.options.directory) / "nonfinite" / f"step-{self.state.counters.step + 1:09}.pt"
        try:
            write(plain({"micro_batches": self.suspects, "what": what}), path)
        except (OSError, TypeError):
            return None
        return path
