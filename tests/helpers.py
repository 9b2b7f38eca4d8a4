"""What the drop-in tests share: trainopt's optimizer and torch's, put through the same things side by side."""

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from judge import TABLE as TABLE
from judge import bits
from torch.utils._python_dispatch import TorchDispatchMode

import trainopt
from trainopt.optim import registry

#: Every class of torch's that trainopt has too: (trainopt's, torch's), by name.
CLASSES = {stock.__name__: (ours, stock) for stock, ours in registry.of_torch().items()}
NAMES = tuple(CLASSES)

#: Of these, those whose class in torch takes `fused`.
WITH_FUSED = tuple(name for name, (ours, _) in CLASSES.items() if "fused" not in ours.EXTRAS)


def skip_without_fused(name, flags):
    if "fused" in flags and name not in WITH_FUSED:
        pytest.skip(f"torch's {name} has no fused step")


def skip_where_torchs_differ(name, flags):
    """torch's foreach makes ASGD's step size in float32 arithmetic, and its loop in float64."""
    if name == "ASGD" and flags.get("foreach"):
        pytest.skip("torch's foreach and its loop differ")


def skip_unless_taken(name, kind):
    """Where torch's class takes no such parameters, or has no such option."""
    if kind.startswith("complex") and name == "Adafactor":
        pytest.skip("torch's Adafactor refuses complex parameters")
    if kind.startswith("differentiable") and "differentiable" not in TABLE[name].defaults:
        pytest.skip(f"{name} has no option differentiable")


def as_loaded(optimizer):
    """The optimizer, with numbers of the type that torch gives them when it loads them for float64 parameters."""
    if CLASSES[type(optimizer).__name__][0]._numbers:
        optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def skip_without_momentum(name):
    """torch's schedulers that cycle the momentum too refuse an optimizer that has none."""
    if not {"momentum", "betas"} & OPTIONS[name].keys():
        pytest.skip(f"torch's {name} has no momentum to cycle")


each_class = pytest.mark.parametrize("name", NAMES)

#: Options that give every class, torch's or not, all of its states, and that leave nothing at zero.
OPTIONS = {
    "Adafactor": {"lr": 0.02, "beta2_decay": -0.5, "eps": (1e-3, 0.5), "d": 1.1, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    "Adamax": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1},
    "RAdam": {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    "NAdam": {"lr": 0.02, "betas": (0.7, 0.9), "momentum_decay": 0.1, "weight_decay": 0.1},
    "ASGD": {"lr": 0.05, "lambd": 0.1, "t0": 2, "weight_decay": 0.1},
    "NovoGrad": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1},
    "RMSprop": {"lr": 0.02, "alpha": 0.9, "eps": 0.1, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "eps": 1e-3, "weight_decay": 0.1},
    "Adan": {"lr": 0.02, "betas": (0.7, 0.6, 0.9), "weight_decay": 0.1},
    "AdEMAMix": {"lr": 0.02, "betas": (0.7, 0.9, 0.95), "weight_decay": 0.1},
    "Rprop": {"lr": 0.02, "etas": (0.6, 1.3)},
    "LAMB": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1},
    "LARS": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coeff": 0.1},
    "Prodigy": {"lr": 2.0, "d0": 0.01, "d_coef": 10.0, "betas": (0.7, 0.9), "weight_decay": 0.1},
    "Lion": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1},
    "AdamWScheduleFree": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1, "warmup_steps": 2},
    "RAdamScheduleFree": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1, "silent_sgd_phase": False},
    "SGDScheduleFree": {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.1, "warmup_steps": 2},
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.1, "amsgrad": True},
}

#: A scalar, a row shorter than a vector, a matrix, an image kernel, nothing, and one element more than a chunk.
SHAPES = ((), (7,), (33, 20), (2, 3, 4, 5), (0, 3), (257,))


class Side(NamedTuple):
    optimizer: Any
    params: list[torch.nn.Parameter]


class Twins:
    """Trainopt's optimizer and torch's plain loop, over copies of the same parameters.

    Args:
        extras: trainopt's own options, for its side alone.
    """

    def __init__(self, name, shapes=SHAPES, dtype=torch.float64, extras=None, **options):
        self.generator = torch.Generator().manual_seed(0)
        self.options = {**OPTIONS[name], **options}
        start = [self.random(shape, dtype) for shape in shapes]
        ours, torchs = CLASSES[name]
        mine, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
        self.ours = Side(ours(mine, **self.options, **(extras or {})), mine)
        self.torchs = Side(torchs(theirs, **self.options), theirs)
        self.sides = (self.ours, self.torchs)

    def random(self, shape, dtype=torch.float64):
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(dtype)

    def edit(self, change: Callable[[Any, list[torch.nn.Parameter]], Any]) -> None:
        """The same change on both sides."""
        for side in self.sides:
            change(side.optimizer, side.params)

    def set_gradients(self, missing: Iterable[int] = ()) -> None:
        """Fresh random gradients, the same on both sides; None for the parameters of these indices."""
        for i, pair in enumerate(zip(self.ours.params, self.torchs.params, strict=True)):
            gradient = self.random(pair[0].shape)
            for param in pair:
                param.grad = None if i in missing or not param.requires_grad else gradient.to(param.dtype, copy=True)

    def step(self, count: int = 1, missing: Iterable[int] = ()) -> None:
        """Steps both sides with the same new gradients, and compares them after each step."""
        for _ in range(count):
            self.set_gradients(missing)
            self.edit(lambda optimizer, _: optimizer.step())
            self.compare()

    def compare(self, **tolerance) -> None:
        assert_same_outcome(self.ours, self.torchs, **tolerance)

    def step_alike(self, **tolerance) -> bool:
        """Steps both sides with the gradients that there are: the same result, or the same error and nothing changed.

        Returns whether there was a result.
        """
        before = snapshot(self.ours.optimizer)
        ours, torchs = (attempt(side.optimizer.step) for side in self.sides)
        assert ours == torchs
        if ours is None:
            self.compare(**tolerance)
        else:
            assert_same_bits(before, snapshot(self.ours.optimizer))
        return ours is None


def assert_same_outcome(ours, torchs, **tolerance) -> None:
    """Equal parameters and states, by name, dtype and value, for any two (optimizer, params)."""
    for i, (p, q) in enumerate(zip(ours[1], torchs[1], strict=True)):
        assert_equal(p, q, f"parameter {i}", **tolerance)
        mine, theirs = (side[0].state.get(param, {}) for side, param in ((ours, p), (torchs, q)))
        assert set(mine) == set(theirs), f"states of parameter {i}: {set(mine)} against {set(theirs)}"
        for key, value in theirs.items():
            assert_equal(mine[key], value, f"{key} of parameter {i}", **tolerance)


def assert_drop_in(name: str, program: Callable[[Any], Any], **tolerance):
    """A program that makes (optimizer, params) of a class ends alike with trainopt's class and with torch's.

    Returns both ends.
    """
    ends = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        ends.append(program(cls))
    assert_same_outcome(*ends, **tolerance)
    return ends


def mixed(name, make, gradient, steps=4, options=None, finish=lambda optimizer, params: (optimizer, params)):
    """Steps the parameter that `make` makes among ordinary ones in both classes; returns both (optimizer, params).

    Args:
        finish: what is compared in the end, where it is not simply (optimizer, params).
    """

    def program(cls):
        params = [torch.nn.Parameter(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2)]
        params.insert(1, make())
        optimizer = cls(params, **(options or OPTIONS[name]))
        for step in range(steps):
            for i, p in enumerate(params):
                p.grad = gradient(p, step) if i == 1 else torch.randn_like(p)
            optimizer.step()
        return finish(optimizer, params)

    return assert_drop_in(name, program)


def model_and(cls, dtype=torch.float64, **options):
    """A small model, the same whenever it is made, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(dtype)
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return model, cls(model.parameters(), **options)


def train(model, optimizer, steps, start=0):
    """Steps number `start`, `start` + 1, ... of one and the same training."""
    dtype = next(model.parameters()).dtype
    for i in range(start, start + steps):
        optimizer.zero_grad()
        model(torch.full((3, 5), 0.3 * (i + 1), dtype=dtype)).square().sum().backward()
        optimizer.step()
    return optimizer, list(model.parameters())


def step_randomly(optimizer, params, steps=3):
    """Steps with new random gradients for these parameters."""
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, params


def assert_equal(ours, torchs, what="", **tolerance) -> None:
    """Equal in type, dtype, shape and, but for the order of roundings, in value."""
    if not isinstance(torchs, torch.Tensor):
        assert type(ours) is type(torchs) and ours == torchs, what
        return
    if not tolerance:
        eps = torch.finfo(torchs.dtype).eps if torchs.dtype.is_floating_point or torchs.dtype.is_complex else 0
        tolerance = {"rtol": 100 * eps, "atol": 100 * eps}
    ours, torchs = ours.detach(), torchs.detach()
    alike = [(type(t), t.dtype, t.shape, t.device, t.layout) for t in (ours, torchs)]
    # The comparison below takes ten times as long to say that all is well as the same one without a message.
    is_plain = alike[0] == alike[1] == (torch.Tensor, torchs.dtype, torchs.shape, torch.device("cpu"), torch.strided)
    if is_plain and torch.allclose(ours, torchs, equal_nan=True, **tolerance):
        return
    torch.testing.assert_close(ours, torchs, equal_nan=True, msg=lambda text: f"{what}: {text}", **tolerance)


def snapshot(optimizer) -> dict[str, Any]:
    """A copy of all that a step could change: values, states and options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": [p.detach().clone() for p in params],
        "states": [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
            for p in params
        ],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "members": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
    }


def assert_same_bits(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots are the same to the bit, NaN included."""
    assert before["groups"] == after["groups"] and before["members"] == after["members"]
    pairs = list(zip(before["params"], after["params"], strict=True))
    for mine, theirs in zip(before["states"], after["states"], strict=True):
        assert list(mine) == list(theirs)
        pairs += [(mine[k], theirs[k]) for k in mine]
    for a, b in pairs:
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        else:
            assert a == b


def through_a_file(state):
    """What torch reads, weights alone, of a file that it wrote."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def error_of(action: Callable[[], Any]) -> tuple[type, str]:
    """Type and text of what an action raises; fails if it does not."""
    try:
        action()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def attempt(action):
    try:
        action()
    except Exception as error:
        return type(error), str(error)
    return None


def paths(optimizer):
    """Who steps each parameter, by what explain says: "fused" or "torch"."""
    return ["torch" if row.path == "torch" else "fused" for row in trainopt.explain(optimizer)]


class Loud(torch.Tensor):
    """A subclass by __torch_function__, which writes down what is done to it."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


class Counting(TorchDispatchMode):
    """Writes down every operator that torch is asked for; a step within it goes by torch's path."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


def one(cls, **options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return cls([p], lr=0.125, **options), p
