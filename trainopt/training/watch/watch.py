"""Three troubles of training, said with numbers: the loss does not fall, it rises, or validation parts from it.

The watch reads only what has been brought from the device to be shown, and a few batches as they go by. Where the
losses give cause for suspicion (`suspicion`), a few updates are measured (`evidence`), and what that shows decides what
is said and whether anything is. Each thing is said once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainopt.training.history import History
from trainopt.training.precision import Precision
from trainopt.training.report import Message
from trainopt.training.trained import Trained
from trainopt.training.watch.evidence import Evidence, Measurement, Units
from trainopt.training.watch.first_nonfinite import Finding, SkippedUpdates
from trainopt.training.watch.guessing import FAULTS, Guessing
from trainopt.training.watch.suspicion import Losses, Suspicion
from trainopt.training.window import Window

TOO_SHORT, TOO_FAR = 100, 0.5  # times an update that would still help; of the loss, by which one update changes it
APART = 25  # updates between two looks at the units
HELP = 1e-4, 3e-2  # of the loss, by which longer updates must lower it, where they are small and where of usual size
CRAWL, UNKNOWN = 0.02, 100_000  # of the weights' size, in all updates, or in so many where their number is not known
USUAL, TOO_LARGE, ENORMOUS = 1e-3, 1e-2, 0.1  # the size of an update against the weights'
BELATED, LATEST = 0.6, 2000  # of the run, and updates, before which a loss may still begin to fall
WILD = ("worse", "spiked", "rising")  # what only too high a learning rate does
DEADLY = {"dead", "too high", "zero"}  # what has been said when dead units have been told of
DEAD_SHARE, NEARLY_ALL, DEAD_UNITS = 0.75, 0.85, 4  # of a layer's units, and at least so many, without a gradient
NOTABLE = 0.03  # of the loss of guessing: less is a trifle to a loss that has nearly gone
SCATTER = 1.5  # times the scatter of the validations, by which the least of these must lie above the best
PARTING, GAIN, PATIENCE = 0.1, 0.03, 3  # validation above its best by this share, this many times in a row


class Watch:
    """Follows a run and says what is wrong with it.

    Args:
        log_every: updates between two calls of `progressed`.
        stops_early: whether the run ends by itself where validation parts from training.
        measures: whether updates may be measured. Not where the weights are spread over processes, each of which may
            suspect something else and would wait for the others; then only what the losses alone show is said.
    """

    def __init__(self, log_every: int = 50, stops_early: bool = False, measures: bool = True) -> None:
        self.log_every, self.stops_early, self.measures = log_every, stops_early, measures
        self.told: list[str] = []  # what has been said
        self.guessing, self.losses, self.validation = Guessing(), Losses(), Validation()
        self.lost = SkippedUpdates()  # updates
        self.suspicion: Suspicion | None = None  # that updates are measured for
        self.next_look = self.next_units = self.next_measured = 0.0  # steps
        self.living: dict[str, int] = {}  # of each layer, the units that had a gradient in the first update
        self.dead: tuple[str, int, int] | None = None  # a layer, its units without a gradient, and all of them

        self.seeks_origin = False  # of a loss that is not finite while its gradients are
        self.is_looking = False  # at the batch of this update
        self.measurement: Measurement | None = None
        self._counts_units = False  # in this update
        self._units: Units | None = None
        self._first_units: Units | None = None

    # What an update calls -----------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Before update number `step`, from 1: decides whether it is looked at."""
        is_shown = step == 1 or step % self.log_every == 0
        self.is_looking = is_shown and step >= self.next_look
        self._counts_units = is_shown and step >= self.next_units if self._units is None else not self._units.are_enough

    @property
    def is_watching(self) -> bool:
        """Whether `before_step` looks at the gradients of this update, or at its weights."""
        return self._counts_units or self.measurement is not None

    def see(self, output: Any, target: Any, loss: Tensor, function: Any) -> None:
        """The first micro-batch of an update that is looked at."""
        self.is_looking = False
        self.next_look = math.inf if self.guessing.is_settled else max(APART, 2 * self.next_look)
        self.guessing.see(output, target, loss, function)

    def before_step(self, module: nn.Module, params: Sequence[Tensor], step: int, samples: int) -> None:
        """With the gradients of update number `step` at hand."""
        if self._counts_units:
            if step == 1:
                self._first_units = Units()
                self._first_units.see(module, samples)
            else:
                self._units = self._units or Units()
                self._units.see(module, samples)
        if self.measurement is not None:
            self.measurement.before_step(params)

    def after_step(
        self, params: Sequence[Tensor], window: Window, norm: Tensor | None, trained: Trained, precision: Precision
    ) -> Evidence | None:
        """After an update, where updates are measured: the evidence for `measured`, once it is complete."""
        measurement = self.measurement
        if measurement is None:
            return None
        gradient = math.nan if norm is None else float(norm)
        measurement.after_step(params, window.batches[-1], window.losses[-1], gradient, trained, precision)
        return measurement.evidence if measurement.is_done else None

    # What the losses show -----------------------------------------------------------------------------------------

    def progressed(
        self, step: int, total: int | None, lr: float, loss: float, history: History, is_alone: bool
    ) -> list[Message]:
        """Takes in the losses up to update `step`; what can be said at once. Afterwards updates may be measured.

        Args:
            total: updates of the whole run, where that is known.
            loss: mean since the last call.
            history: of all processes.
            is_alone: whether there is no other process, so that the model may be called here alone.
        """
        self.guessing.read()
        self.look_at_units(step)
        messages = [self.say(step, name, FAULTS[name].format(**numbers), {}) for name, numbers in self.new_faults()]
        if not math.isfinite(loss):
            self.seeks_origin = is_alone and "nonfinite" not in self.told
            return messages + self.tell_nonfinite(step, lr, loss, history)
        if self.measurement is None:
            found = self.losses.judge(step, total, lr, history, self.guessing.reference, self.guessing.noise)
            tells_dead = self.dead is not None and not self.losses.is_low and not DEADLY & set(self.told)
            if tells_dead and (found is None or found.cause in ("flat", "stalled")):
                found = self.losses.as_it_is(history, step)
            self.suspicion = found
            if found is not None and (found.cause == "dead" or self.is_worth_measuring(found, step)):
                self.measurement = Measurement(is_alone and self.dead is None and found.cause in ("flat", "stalled"))
                self.next_measured = belated(total) if step < belated(total) < 2 * step else 2 * step
        if not self.measures and (message := self.ended(step, total, lr)) is not None:
            messages.append(message)
        return messages

    def is_worth_measuring(self, found: Suspicion, step: int) -> bool:
        if found.cause in WILD:
            return "too high" not in self.told
        if FAULTS.keys() & set(self.told):  # the loss is as it is because of that
            return False
        if self._units is not None:  # it is not certain yet whether units are dead
            return False
        return step >= self.next_measured and not {"too high", "too low", "flat", "dead", "zero"} & set(self.told)

    def ended(self, step: int, total: int | None, lr: float) -> Message | None:
        """After the last update: what can be said of a suspicion for which nothing can be measured any more."""
        if self.measurement is None:
            return None
        return self.measured(step, total, Evidence(), lr)

    def measured(self, step: int, total: int | None, evidence: Evidence, lr: float) -> Message | None:
        """What the measured updates say about the suspicion; None if they give no reason to say anything."""
        found, self.measurement = self.suspicion, None
        assert found is not None
        said = self.verdict(found, step, total, evidence, lr)
        if said is None or said[0] in self.told:
            return None
        numbers = {
            "loss": found.now,
            "lr": lr,
            "gradient": evidence.gradient,
            "update_to_weights": evidence.ratio,
            "dead_units": float(self.dead[1]) if self.dead else 0.0,
        }
        return self.say(step, said[0], f"{self.fact(found)}; {said[1]}", numbers)

    def verdict(
        self, found: Suspicion, step: int, total: int | None, evidence: Evidence, lr: float
    ) -> tuple[str, str] | None:
        """What is wrong, in a word and in a sentence."""
        moves = f"an update changes the weights by {evidence.ratio:.2g} of their size"
        losses, best = evidence.losses, evidence.best
        if math.isnan(evidence.ratio):  # the run has ended before
            return self.too_high(lr, "") if found.cause in WILD else None
        if found.cause in WILD:
            return self.too_high(lr, moves)
        if evidence.level < found.now - 0.2 * abs(found.now):  # it has begun to fall while it was measured
            return None
        if evidence.gradient == 0:
            why = "does the loss depend on the model's output, and are its units all off?"
            return "zero", f"every gradient is zero: {why}"
        if self.losses.has_spiked or (self.have_died and (evidence.ratio > TOO_LARGE or self.dead_share > NEARLY_ALL)):
            return self.too_high(lr, moves)
        if self.dead is not None:
            advice = "try a lower learning rate from the start, another initialisation, or a leaky activation"
            return "dead", f"{self.about_dead}; {advice}"
        if evidence.update == 0:
            too_low = "too low", f"the learning rate {lr:.3g} is too low: the updates change no weight"
            return None if found.has_moved and lr else too_low  # None: it is where no gradient is left
        help_wanted = HELP[evidence.ratio > USUAL] * abs(losses.get(0, 0.0))
        # As many updates as are still to come are made anyway, and what one of usual size does ten of them do.
        enough = min(max(TOO_SHORT, (total or UNKNOWN) - step), 10 * TOO_SHORT)
        is_small = evidence.ratio < 2 * USUAL
        helps = is_small and best >= enough and losses[0] - losses[best] > help_wanted
        if not helps and found.cause == "flat" and not found.has_moved and evidence.ratio * (total or UNKNOWN) < CRAWL:
            all_in_all = f"all {total:,} updates" if total else "100,000 updates"
            text = f"the learning rate {lr:.3g} seems too low: {moves}, and {all_in_all} by less than {CRAWL:.0%}"
            return "too low", f"{text}; try {lr * USUAL / evidence.ratio:.0e}"
        if helps and (found.projected < 0.25 or best >= 10 * TOO_SHORT):
            would = f"{best:,.0f} such updates at once would lower the loss of other batches"
            would += f" from {losses[0]:.4g} to {losses[best]:.4g}"
            return (
                "too low",
                f"the learning rate {lr:.3g} seems too low: {moves}, and {would}; try {lr * best / 10:.0e}",
            )
        reference, margin = self.guessing.reference, self.guessing.margin
        is_high = reference is None or found.now > 0.9 * reference
        is_above = reference is not None and found.now > (1 + margin) * reference and evidence.ratio > USUAL
        is_above = is_above and not best >= 10  # more such updates would help
        if is_above or (is_high and evidence.ratio > ENORMOUS) or evidence.jump > TOO_FAR * abs(found.now):
            return self.too_high(lr, f"{moves}, and the loss of other batches by {evidence.jump:.2g}")
        guess = self.guessing.constant
        if (
            found.cause == "flat"
            and found.is_certain
            and step >= belated(total)
            and (guess is None or found.now > 0.95 * guess)
        ):
            text = f"{moves}, the gradient's norm is {evidence.gradient:.2g}: nothing is wrong with their size"
            return "flat", f"{text}; look at the inputs' scale and the labels, and try lr-find"
        return None

    def fact(self, found: Suspicion) -> str:
        """What the losses do."""
        guess = self.guessing.reference
        guessing = "" if guess is None else f", where guessing gives {guess:.4g}"
        if found.cause == "worse":
            return f"the loss is {found.now:.4g}{guessing}, and was {found.before:.4g} at first"
        if found.cause == "spiked":
            return f"the loss rose from {found.before:.4g} at first to {found.now:.4g}{guessing}"
        if found.cause == "rising":
            return f"the loss rose from {found.before:.4g} at step {found.before_step:,} to {found.now:.4g}"
        if found.cause == "dead":
            return f"the loss falls: {found.before:.4g} at first, {found.now:.4g} now, but not with all of the model"
        if found.cause == "stalled":
            before = f"{found.before:.4g} at step {found.before_step:,}"
            return f"the loss does not fall any more: {before}, {found.now:.4g} now"
        falls = "falls slowly" if found.now < 0.99 * found.before else "does not fall"
        return f"the loss {falls}: {found.before:.4g} at first, {found.now:.4g} now{guessing}"

    def too_high(self, lr: float, moves: str) -> tuple[str, str]:
        died = f"; {self.about_dead}" if self.dead is not None else ""
        lower = lr / (100 if self.losses.peak > 5 * abs(self.losses.bound) else 10)
        why = f": {moves}" if moves else ""
        return "too high", f"the learning rate {lr:.3g} seems too high{why}{died}; try {lower:.0e}, a warm-up, or clip"

    def tell_nonfinite(self, step: int, lr: float, loss: float, history: History) -> list[Message]:
        if "nonfinite" in self.told:
            return []
        growth = self.growth(lr, history)
        self.told.append("nonfinite")
        text = f"the mean loss since the last report is {loss}{growth and '; '}{growth}"
        return [Message(step, "trouble", "nonfinite", text, {"lr": lr})]

    def lost_update(self, found: Finding | None, update: int, lr: float, history: History) -> str | None:
        """What is to be said of an update left out, of which this was found; None if that has been said."""
        growth = self.growth(lr, history)
        if growth and found is not None and not found.is_data:  # where it shows first is chance
            found = Finding(found.text, "growth", growth)
        if not self.lost.is_new(found, update):
            return None
        return str(found)

    def growth(self, lr: float, history: History) -> str:
        """How the loss had grown before something was not finite, and what to try; empty where it had not."""
        first, largest = history.first, history.latest_peak()
        reference = self.guessing.reference
        if not largest > max(2 * abs(first), first, -math.inf if reference is None else 2 * reference):
            return ""
        if "too high" not in self.told:
            self.told.append("too high")
        return (
            f"the loss had grown from {first:.3g} to {largest:.3g} before: the learning rate {lr:.3g} seems too high; "
            f"try {lr / 10:.0e}, a warm-up, or clip"
        )

    def new_faults(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, numbers) for name, numbers in self.guessing.faults.items() if name not in self.told]

    def say(self, step: int, verdict: str, text: str, numbers: dict[str, float]) -> Message:
        self.told.append(verdict)
        return Message(step, "trouble", "loss", text, numbers)

    # The units ----------------------------------------------------------------------------------------------------

    def look_at_units(self, step: int) -> None:
        """Reads what has been seen of the units; those that seem dead are looked at in every update until that is
        certain."""
        if self._first_units is not None:
            self.living = {name: units - dead for name, (dead, units) in self._first_units.counts().items()}
            self._first_units = None
        if self._units is None:
            return
        name, (dead, units) = max(
            self._units.counts().items(), key=lambda item: item[1][0] / item[1][1], default=("", (0, 1))
        )
        seems = dead >= max(DEAD_SHARE * units, DEAD_UNITS)
        if not seems or self._units.are_enough:
            self.dead, self._units = (name, dead, units) if seems else None, None
            self.next_units = math.inf if DEADLY & set(self.told) else step + max(APART, step // 2)

    @property
    def have_died(self) -> bool:
        """Whether most of the dead units lived in the first update."""
        if self.dead is None:
            return False
        name, dead, units = self.dead
        return self.living.get(name, 0) - (units - dead) >= dead / 2

    @property
    def dead_share(self) -> float:
        return self.dead[1] / self.dead[2] if self.dead is not None else 0.0

    @property
    def about_dead(self) -> str:
        assert self.dead is not None
        name, dead, units = self.dead
        text = f"{dead:,} of {units:,} units of layer '{name}' get no gradient: dead units"
        return f"{text}, of which {min(self.living[name], dead):,} had one at first" if self.have_died else text

    # Validation ---------------------------------------------------------------------------------------------------

    def validated(self, step: int, loss: float, train_loss: float) -> Message | None:
        """Takes in a validation; a message when it has parted from the training loss.

        Never while training itself is in trouble, nor where the run ends by itself and takes the best weights.
        """
        reference = self.guessing.reference
        parted = self.validation.parts(step, loss, train_loss, NOTABLE * (reference or 0.0))
        is_well = self.suspicion is None and not self.told and not self.losses.has_spiked
        is_well = is_well and (reference is None or train_loss < 0.9 * reference)
        if not parted or not is_well or self.stops_early:
            return None
        self.told.append("overfitting")
        best = self.validation
        text = (
            f"validation parts from training: since step {best.step:,} its loss rose from {best.loss:.4g} to "
            f"{loss:.4g}, while the training loss fell from {best.train_loss:.4g} to {train_loss:.4g}; try more data "
            "or augmentation, weight decay, dropout, a smaller model, early_stopping"
        )
        numbers = {"validation": loss, "best_validation": best.loss, "training": train_loss}
        return Message(step, "trouble", "overfitting", text, numbers)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain numbers, strings and lists; a measurement is begun anew."""
        return {
            "told": list(self.told),
            "guessing": self.guessing.state_dict(),
            "losses": self.losses.state_dict(),
            "validation": self.validation.state_dict(),
            "lost": self.lost.state_dict(),
            "next": [self.next_look, self.next_measured, self.next_units],
            "living": dict(self.living),
            "dead": None if self.dead is None else list(self.dead),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; TypeError or ValueError for what it cannot have given. A watch of an older
        version has nothing to say to this one."""
        if "losses" not in state:
            return
        self.told = [*map(str, state["told"])]
        self.guessing.load_state_dict(state["guessing"])
        self.losses.load_state_dict(state["losses"])
        self.validation.load_state_dict(state["validation"])
        self.lost.load_state_dict(state["lost"])
        self.next_look, self.next_measured, self.next_units = map(float, state["next"])
        self.living = {str(name): int(units) for name, units in state["living"].items()}
        self.dead = None
        if state["dead"] is not None:
            name, dead, units = state["dead"]
            self.dead = str(name), int(dead), int(units)


class Validation:
    """The validation losses against the best of them."""

    def __init__(self) -> None:
        self.loss, self.step, self.train_loss = math.inf, 0, math.nan  # the best one
        self.lowest_train = math.inf
        self.rebound = 0.0  # the furthest that validation was above its best before a new best came
        self.above: list[float] = []  # how far each validation since has been above this best

    def parts(self, step: int, loss: float, train_loss: float, trifle: float) -> bool:
        """Whether validation is above its best for good while training gets better.

        For good: a few times in a row by more than a trifle, by more than it has ever come back from, and by more than
        it scatters from one validation to the next, which is what too high a learning rate makes it do.
        """
        if math.isfinite(train_loss):
            self.lowest_train = min(self.lowest_train, train_loss)
        if loss < self.loss:
            self.rebound = max(self.rebound, *self.above, 0.0)
            self.loss, self.step, self.train_loss, self.above = loss, step, train_loss, []
            return False
        if math.isnan(self.train_loss):
            self.train_loss = train_loss  # validation comes more often than the training loss is shown
        self.above = [*self.above[-63:], loss - self.loss]
        least = max(PARTING * abs(self.loss), trifle, self.rebound, SCATTER * scatter_of([0.0, *self.above]))
        is_above = min(self.above[-PATIENCE:]) > least
        gains = train_loss < self.train_loss - GAIN * abs(self.train_loss)
        is_steady = train_loss <= self.lowest_train + 0.1 * abs(self.lowest_train)
        return len(self.above) >= PATIENCE and is_above and gains and is_steady

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "above": list(self.above)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.step, self.train_loss = float(state["loss"]), int(state["step"]), float(state["train_loss"])
        self.lowest_train, self.rebound = float(state["lowest_train"]), float(state["rebound"])
        self.above = [*map(float, state["above"])]


def belated(total: int | None) -> float:
    """The update after which a loss that has not fallen will not, whatever the learning rate is."""
    return LATEST if total is None else min(BELATED * total, LATEST)


def scatter_of(values: Sequence[float]) -> float:
    """The standard deviation of each value from a smooth course: from the second differences, which that leaves out."""
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return math.sqrt(sum(bend * bend for bend in bends) / 6 / len(bends)) if bends else 0.0
