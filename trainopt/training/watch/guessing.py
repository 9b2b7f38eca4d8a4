"""What a model would lose that does not look at its inputs, and mistakes that a batch's output and target show.

From a few batches as they go by: the kind of loss is recognised by its value, for a person's own function, a compiled
one and torch's are the same by value. Nothing of the person's is called, and nothing is read from the device before
`read`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainopt.training.criterion.callables import Core, core_of

LARGEST = 2**22  # elements of an output that are looked at
NUMBERS = 256  # of a target, that its variance is estimated from
LOOKS = 8  # batches that are looked at, at most
ROWS = 8  # fewer rows say too little of the scatter of their losses
LABELS = 2**14  # of a target that are kept to count classes
NEAR = 1e-3  # two values of one loss, computed in different orders
#: Nodes of autograd that keep the values of a tensor.
KEEPING = (
    r"(View|UnsafeView|ReshapeAlias|Alias|Squeeze|Unsqueeze|T|Transpose|Permute|Select|Slice|Clone|ToCopy|Expand)"
    r"Backward"
)
#: What may compute a sigmoid without saying so: a compiled function, 1 / (1 + exp(-x)), a person's own function.
HIDDEN = r"(Compiled\w*|Div|Reciprocal|\w*Function|\w*Sigmoid\w*)Backward"
KINDS = ("squares", "absolute", "binary", "of shares", "huber")  # of losses of numbers

#: In the sentences: what was found, why it is wrong, and what to do.
FAULTS = {
    "softmax": (
        "the model's output is a softmax already (its rows are probabilities), and the loss takes a softmax of it "
        "again: the gradient is a fraction of what it should be, and the loss cannot fall below {floor:.3g}; give the"
        " loss the logits, the output before the softmax"
    ),
    "softmax of columns": (
        "the model's output is a softmax over the batch (its columns sum to 1, not its rows), and the loss takes a "
        "softmax of it again; give the loss the logits, the output before the softmax"
    ),
    "sigmoid": (
        "the model's output is a sigmoid already (it lies in [0, 1]), and the loss takes a sigmoid of it again: it "
        "cannot fall below {floor:.3g} for a target of 1; give the loss the logits, the output before the sigmoid"
    ),
    "relu": (
        "the model's output, which the loss takes for logits, has gone through a ReLU: {zeros:.0%} of it is exactly 0"
        " and none negative; leave out the activation after the last layer"
    ),
    "probabilities": (
        "the loss takes log-probabilities (NLLLoss), and the model's output is probabilities; end the model in "
        "log_softmax, or give the logits to CrossEntropyLoss"
    ),
    "logits": (
        "the loss takes log-probabilities (NLLLoss), and the rows of exp(output) do not sum to 1; end the model in "
        "log_softmax, or give its output to CrossEntropyLoss"
    ),
    "activation": (
        "the model's output, which the loss takes for logits, has gone through {name} and lies in {range}: the loss "
        "cannot fall below {floor:.3g}; leave out the activation after the last layer"
    ),
    "sorted": (
        "one batch holds targets of one class alone, and another batch those of another: the data seems to be sorted "
        "by class, and each part of it undoes what the part before has taught; shuffle it"
    ),
    "shapes": (
        "output {output} and target {target} are broadcast against each other to {broadcast}: every output is "
        "compared with every target of the batch, not with its own; give both the same shape, as by squeeze(1) or "
        "unsqueeze(1)"
    ),
}


class Seen(NamedTuple):
    """What one batch shows: numbers that are still on the device."""

    kind: str  # "classes" or "numbers"
    names: tuple[str, ...]
    values: Tensor  # in the order of `names`
    target: Tensor | None  # labels, or (count, sum, sum of squares, sum of distances from the mean)
    shapes: tuple[Any, ...]
    ending: str = ""  # the operation that made the output, as autograd names it; empty where it does not


class Guessing:
    """The losses of guessing, where the kind of loss is known.

    `uniform` is the loss where all classes (both answers) are equally likely to the model, log C or ln 2. `constant` is
    the loss of the best answer that is the same for all inputs: the entropy of the classes' shares, the variance of a
    target. Both are None as long as they are not known.
    """

    def __init__(self) -> None:
        self.uniform: float | None = None
        self.constant: float | None = None
        self.faults: dict[str, dict[str, Any]] = {}  # by name, with the numbers of the sentence
        self.noise: float | None = None  # standard error of the first batch's mean loss, from the losses of its rows
        self.inside = 0  # looks at which every logit of a binary loss lay in [0, 1]
        self.singles: list[int] = []  # classes of batches that had no other
        self.looks = 0
        self.kind: str | None = None  # the loss that was recognised: "classes", or one of `KINDS`
        self._labels: dict[int, int] = {}
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._pending: list[Seen] = []

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be found out."""
        if self.looks >= LOOKS:
            return True
        if self.kind in ("squares", "absolute") and self._sums[0] < NUMBERS:
            return False
        looks = {"binary": 3, "classes": 2}.get(str(self.kind), 1)
        return self.constant is not None and len(self.singles) != 1 and self.looks >= looks

    @torch.no_grad()
    def see(self, output: Any, target: Any, loss: Tensor, loss_function: Any = None) -> None:
        """Takes in a batch's output, target and loss."""
        output, target = tensor_in(output, "logits"), tensor_in(target, "labels")
        if output is None or target is None or not output.is_floating_point() or not output.numel():
            return
        if not target.numel() or output.device != target.device or type(loss) is not Tensor:
            return
        core = core_of(loss_function)
        settings = {
            name: value
            for name in ("ignore_index", "label_smoothing", "weight")
            if (value := setting_of(core, name)) is not None
        }
        seen = seen_in(output.detach(), target.detach(), loss.detach(), settings)
        if seen is not None:
            self._pending.append(seen._replace(ending=ending_of(output)))

    def read(self) -> None:
        """Works out what has been seen. Waits for the device."""
        for seen in self._pending:
            values = dict(zip(seen.names, seen.values.tolist(), strict=True))
            if math.isfinite(values["loss"]):
                self.looks += 1
                (self._read_classes if seen.kind == "classes" else self._read_numbers)(seen, values)
        self._pending = []

    def _read_classes(self, seen: Seen, values: dict[str, float]) -> None:
        classes, loss = seen.shapes[0], values["loss"]
        is_cross_entropy = near(values["cross entropy"], loss)
        if near(values["likelihood"], loss) and not is_cross_entropy:
            are_shares = values["lowest"] >= 0 and values["rows off"] < 1e-2
            self.faults.setdefault("probabilities" if are_shares else "logits", {})
            return
        is_of_shares = near(values["of probabilities"], loss)
        is_alike = values["cross entropy"] > 0 and 0.8 < loss / values["cross entropy"] < 1.25  # smoothing, …
        if not (is_cross_entropy or is_of_shares or is_alike):
            return
        self.kind, self.uniform = "classes", math.log(classes)
        self._count(seen, classes)
        if not is_cross_entropy or is_of_shares:
            return
        if self.looks == 1 and seen.shapes[1] >= ROWS:
            self.noise = values["noise"]
        if values["lowest"] >= 0 and values["rows off"] < 1e-2:
            self.faults.setdefault("softmax", {"floor": math.log(math.e + classes - 1) - 1})
        elif values["lowest"] >= 0 and values["columns off"] < 1e-2:
            self.faults.setdefault("softmax of columns", {})
        elif (bounded := re.match(r"(Sigmoid|Tanh)Backward", seen.ending)) is not None:
            width = {"Sigmoid": 1, "Tanh": 2}[bounded[1]]
            numbers = {"name": f"a {bounded[1].lower()}", "range": "[0, 1]" if width == 1 else "[-1, 1]"}
            self.faults.setdefault("activation", numbers | {"floor": math.log(1 + (classes - 1) * math.exp(-width))})
        elif values["lowest"] >= 0 and 0.1 < values["zeros"] < 0.95:  # all zeros: a last layer that begins with zeros
            self.faults.setdefault("relu", {"zeros": values["zeros"]})

    def _count(self, seen: Seen, classes: int) -> None:
        """The shares of the classes, and how often a batch has but one."""
        assert seen.target is not None
        labels, counts = seen.target.cpu().unique(return_counts=True)
        found = {k: n for k, n in zip(labels.tolist(), counts.tolist(), strict=True) if 0 <= k < classes}
        for label, count in found.items():
            self._labels[label] = self._labels.get(label, 0) + count
        if len(found) == 1 and sum(found.values()) >= ROWS:
            self.singles = sorted({*self.singles, *found})
            if len(self.singles) > 1:
                self.faults.setdefault("sorted", {})
        total = sum(self._labels.values())
        if total >= 10 * len(self._labels):  # fewer say too little of the shares
            self.constant = sum(-n / total * math.log(n / total) for n in self._labels.values())

    def _read_numbers(self, seen: Seen, values: dict[str, float]) -> None:
        loss = values["loss"]
        own = [kind for kind in KINDS if near(values.get(kind), loss)]
        crossed = [kind for kind in KINDS if near(values.get(f"crossed {kind}"), loss)]
        if crossed and not own:
            self.faults.setdefault("shapes", dict(zip(("output", "target", "broadcast"), seen.shapes, strict=True)))
        if not own and not crossed:
            return
        self.kind = (own or crossed)[0]
        assert seen.target is not None
        self._sums = [a + b for a, b in zip(self._sums, seen.target.tolist(), strict=True)]
        count, total, squares, distances = self._sums
        mean = total / count
        if self.kind == "squares":
            self.constant = max(squares / count - mean * mean, 0.0)
            if self.looks == 1 and seen.shapes[0][:1] >= (ROWS,):
                self.noise = values.get("noise")
        elif self.kind == "absolute":
            self.constant = distances / count
        elif self.kind in ("binary", "of shares"):
            positive = min(max(mean, 1e-6), 1 - 1e-6)  # the fraction of positive answers
            self.uniform = math.log(2)
            self.constant = -positive * math.log(positive) - (1 - positive) * math.log(1 - positive)
            # Logits of a healthy model may lie there too for a while: their values alone are no evidence.
            inside = own == ["binary"] and 0 <= values["lowest"] < values["highest"] <= 1
            self.inside = self.inside + 1 if inside and re.match(HIDDEN, seen.ending) else -100
            if self.inside == 3 or (inside and seen.ending.startswith("SigmoidBackward")):
                self.faults.setdefault("sigmoid", {"floor": math.log1p(math.exp(-1))})

    def state_dict(self) -> dict[str, Any]:
        """All that has been read, as plain numbers, strings and lists."""
        names = ("uniform", "constant", "noise", "inside", "singles", "looks", "kind")
        own = {"labels": dict(self._labels), "sums": list(self._sums)}
        return {**{name: getattr(self, name) for name in names}, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; TypeError or ValueError for what it cannot have given. Faults that were
        found have been said."""
        self.uniform, self.constant, self.noise = (
            None if state[name] is None else float(state[name]) for name in ("uniform", "constant", "noise")
        )
        self.inside, self.looks = int(state["inside"]), int(state["looks"])
        self.singles = [*map(int, state["singles"])]
        self.kind = None if state["kind"] is None else str(state["kind"])
        self._labels = {int(label): int(count) for label, count in state["labels"].items()}
        count, total, squares, distances = map(float, state["sums"])
        self._sums = [count, total, squares, distances]

    @property
    def margin(self) -> float:
        """By what part of it `reference` may be wrong: a variance is estimated from the targets seen."""
        return 0.03 if self.uniform is not None or not self._sums[0] else 0.03 + 3 * math.sqrt(2 / self._sums[0])

    @property
    def reference(self) -> float | None:
        """The largest loss that a model has which knows nothing; None where the kind of loss is not known."""
        known = [value for value in (self.uniform, self.constant) if value is not None]
        return max(known) if known else None


def seen_in(output: Tensor, target: Tensor, loss: Tensor, settings: dict[str, Any]) -> Seen | None:
    """What a batch shows; None where output and target are of no known kind."""
    if not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool:
        rows = rows_of(output, target)
        if rows is not None:
            return classes_in(rows, target.reshape(-1), loss, settings)
    return numbers_in(output, target, loss)


def rows_of(output: Tensor, target: Tensor) -> Tensor | None:
    """An output's rows of logits, one for each label; None if it is none of logits."""
    if target.dim() and output.shape[1:2].numel() > 1 and output.shape[:1] + output.shape[2:] == target.shape:
        return output.movedim(1, -1).reshape(-1, output.shape[1])
    classes = output.shape[-1] if output.dim() > 1 else 0
    return output.reshape(-1, classes) if classes > 1 and output.numel() == classes * target.numel() else None


def classes_in(rows: Tensor, labels: Tensor, loss: Tensor, settings: dict[str, Any]) -> Seen:
    count, classes = rows.shape
    kept = min(count, max(LARGEST // classes, 1))
    rows, some = rows[:kept].float(), labels[:kept].long()
    ignored = settings.get("ignore_index", -100)
    inside = (some >= 0) & (some < classes) & (some != ignored)
    some = torch.where(inside, some, -100)
    weight = settings.get("weight")
    options: dict[str, Any] = {"label_smoothing": settings.get("label_smoothing", 0.0), "ignore_index": -100}
    if isinstance(weight, Tensor) and weight.shape == (classes,):
        options["weight"] = weight.detach().to(rows)
    each = F.cross_entropy(rows, some, reduction="none", ignore_index=-100)
    number = inside.sum()
    mean = each.sum() / number
    spread = (torch.where(inside, each - mean, 0.0).square().sum() / number).sqrt() / number.sqrt()
    chosen = rows.gather(1, some.clamp(min=0)[:, None]).squeeze(1)
    values = {
        "loss": loss,
        "cross entropy": F.cross_entropy(rows, some, **options),
        "likelihood": -torch.where(inside, chosen, 0.0).sum() / number,
        "of probabilities": -torch.where(inside, chosen.clamp(min=1e-30).log(), 0.0).sum() / number,
        "noise": spread,
        "lowest": rows.min(),
        "rows off": (rows.sum(1) - 1).abs().max(),
        "columns off": (rows.sum(0) - 1).abs().max() if kept == count else loss.new_tensor(math.inf),
        "zeros": (rows == 0).float().mean(),
    }
    shown = labels[:LABELS]
    return Seen("classes", tuple(values), stacked(values), torch.where(shown == ignored, -1, shown), (classes, count))


def numbers_in(output: Tensor, target: Tensor, loss: Tensor) -> Seen | None:
    if output.numel() > LARGEST or target.is_complex():
        return None
    output, target = output.float(), target.float()
    values = {"loss": loss, "lowest": output.min(), "highest": output.max()}
    if output.numel() == target.numel():
        flat, aim = output.reshape(len(output) if output.dim() else 1, -1), target.reshape(output.shape)
        values |= compared(output, aim)
        each = (flat - aim.reshape(flat.shape)).square().mean(1)
        values["noise"] = each.std(correction=0) / math.sqrt(len(each))
    broadcast: tuple[int, ...] = ()
    if output.shape != target.shape:
        try:
            broadcast = tuple(torch.broadcast_shapes(output.shape, target.shape))
        except RuntimeError:
            return None
        if max(output.numel(), target.numel()) < math.prod(broadcast) <= LARGEST:
            crossed = compared(*torch.broadcast_tensors(output, target))
            values |= {f"crossed {name}": value for name, value in crossed.items()}
    flat = target.reshape(-1).double() if target.device.type != "mps" else target.reshape(-1)
    count = torch.full((), float(len(flat)), dtype=flat.dtype, device=flat.device)
    sums = torch.stack([count, flat.sum(), flat.square().sum(), (flat - flat.mean()).abs().sum()])
    return Seen("numbers", tuple(values), stacked(values), sums, (tuple(output.shape), tuple(target.shape), broadcast))


def compared(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The usual losses of numbers."""
    distance = output - target
    shares = output.clamp(0, 1)
    of_shares = -(target * shares.log().clamp(min=-100) + (1 - target) * (1 - shares).log().clamp(min=-100)).mean()
    return {
        "squares": distance.square().mean(),
        "absolute": distance.abs().mean(),
        "binary": F.binary_cross_entropy_with_logits(output, target),
        "of shares": torch.where((output == shares).all(), of_shares, math.nan),
        "huber": F.smooth_l1_loss(output, target),
    }


def stacked(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.reshape(()).float() for value in values.values()])


def near(value: float | None, loss: float) -> bool:
    return value is not None and abs(value - loss) <= NEAR * abs(loss) + 1e-6


def ending_of(output: Tensor) -> str:
    """The operation that made an output, as autograd names it; empty for one without a gradient."""
    node = output.grad_fn
    while node is not None and re.match(KEEPING, node.name()) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


def tensor_in(tree: Any, name: str) -> Tensor | None:
    """A tensor: the tree itself, or the one of this name in a mapping or an object (Hugging Face's outputs)."""
    if isinstance(tree, Mapping):
        tree = tree.get(name)
    elif not isinstance(tree, Tensor):
        tree = getattr(tree, name, None)
    return tree if type(tree) is Tensor or isinstance(tree, torch.nn.Parameter) else None


def setting_of(core: Core, name: str) -> Any:
    """An option of a loss, from the module or the functools.partial that it is."""
    return core.keywords.get(name, getattr(core.function, name, None))
