# ruff: noqa: E501  (a row of the tables is a line)
"""Small trainings, healthy and ill in known ways: what they are made of, and how one is run.

Each takes about a second at most. `test_training_watch.py` runs them; `python tests/trainings.py 0 1 2` prints the score
of the watch on them with these seeds.
"""

import functools
import inspect
import itertools
import math
import re
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import trainopt
from trainopt import schedules
from trainopt.training import Silent, fit

# Data -----------------------------------------------------------------------------------------------------------------


@functools.cache
def digits():
    """1,797 handwritten digits of 8 x 8 pixels, in a random order, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(0))
    return torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def digits_split(count=1500):
    inputs, target = digits()
    return (inputs[:count], target[:count]), (inputs[1500:], target[1500:])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def blobs(count=1200, features=20, classes=5, spread=1.0, seed=0):
    """Clusters with a normal spread."""
    source = generator(seed)
    target = torch.randint(classes, (count,), generator=source)
    centres = torch.randn(classes, features, generator=source)
    return centres[target] + spread * torch.randn(count, features, generator=source), target


def spirals(count=1200, seed=0):
    """Two arms that only a curved boundary parts."""
    source = generator(seed)
    target = torch.randint(2, (count,), generator=source)
    angle = 3 * math.pi * torch.rand(count, generator=source).sqrt()
    turned = angle + math.pi * target
    points = torch.stack([angle * turned.cos(), angle * turned.sin()], 1) / 4
    return points + 0.05 * torch.randn(count, 2, generator=source), target


def linear(count=1000, features=10, noise=0.1, scale=1.0, offset=0.0, seed=0):
    """Targets of shape (count, 1) that are linear in the inputs, but for noise."""
    source = generator(seed)
    inputs = torch.randn(count, features, generator=source)
    target = inputs @ torch.randn(features, 1, generator=source) / math.sqrt(features)
    return inputs, offset + scale * (target + noise * torch.randn(count, 1, generator=source))


def wave(count=800, seed=0):
    """A sine of one input."""
    inputs = 6 * torch.rand(count, 1, generator=generator(seed)) - 3
    return inputs, torch.sin(2 * inputs)


@functools.cache
def characters(length=24, count=1200):
    """Windows of a source text as codes below 128, and the characters that follow."""
    text = torch.tensor([min(ord(letter), 127) for letter in inspect.getsource(textwrap)])
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator(0))
    windows = text[starts[:, None] + torch.arange(length + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def parity_of_signs(count=1200, length=10, seed=0):
    """Sequences of +1 and -1; the target is the sign of the first."""
    inputs = torch.randint(2, (count, length, 1), generator=generator(seed)).float() * 2 - 1
    return inputs, (inputs[:, 0, 0] > 0).long()


def mislabelled(data, share, classes=10, seed=0):
    """The same with a share of the labels drawn at random."""
    inputs, target = data
    source = generator(seed)
    wrong = torch.rand(len(target), generator=source) < share
    return inputs, torch.where(wrong, torch.randint(classes, target.shape, generator=source), target)


# Models ---------------------------------------------------------------------------------------------------------------


def mlp(*sizes, activation=nn.ReLU, dropout=0.0, norm=False):
    layers = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def cnn(width=8, norm=False):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1),
        *([nn.BatchNorm2d(width)] if norm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        *([nn.BatchNorm2d(2 * width)] if norm else []),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


class CharModel(nn.Module):
    """A transformer of one or two blocks over characters; logits of shape (batch, length, 128)."""

    def __init__(self, width=32, layers=1, length=24):
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)
        self.register_buffer("mask", torch.triu(torch.full((length, length), -math.inf), 1))

    def forward(self, codes):
        x = self.embedding(codes) + self.position
        for block in self.blocks:
            x = block(x, src_mask=self.mask)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self, width=24, kind=nn.GRU, classes=2):
        super().__init__()
        self.cell, self.head = kind(1, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, sequence):
        return self.head(self.cell(sequence)[0][:, -1])


def per_character(logits, target):
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


# A training -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": trainopt.SGD,
    "momentum": functools.partial(trainopt.SGD, momentum=0.9),
    "adam": trainopt.Adam,
    "adamw": trainopt.AdamW,
    "rmsprop": getattr(trainopt, "RMSprop", None) or torch.optim.RMSprop,
}


@dataclass
class Training:
    """What is trained, and what is to be said of it: the name of an expectation in `SAYS`, or None for silence."""

    name: str
    says: str | None
    data: Any  # () -> data, or (data, validation)
    model: Any  # () -> module
    optimizer: str
    lr: float
    loss: Any = field(default_factory=nn.CrossEntropyLoss)
    schedule: Any = None  # a curve of trainopt.schedules
    choices: dict = field(default_factory=dict)
    optimizer_options: dict = field(default_factory=dict)
    before: Any = None  # called with the model and the arguments of fit, before training


class Recorder(Silent):
    def __init__(self):
        self.losses, self.messages, self.validations = [], [], []

    def progress(self, event):
        self.losses.append(event.loss)

    def validated(self, event):
        self.validations.append(event.loss)

    def message(self, event):
        self.messages.append(event)


def run(training, seed=0):
    """What was reported while it ran."""
    torch.manual_seed(seed)
    model = training.model()
    options = {"steps": 400, "batch_size": 32, "seed": seed, **training.choices}
    data = training.data() if callable(training.data) else training.data
    if isinstance(data[0], tuple):
        data, options["validation"] = data
    recorder = Recorder()
    arguments = {"data": data, "loss": training.loss, "report": recorder, **options}
    if training.before is not None:
        training.before(model, arguments)
    optimizer = OPTIMIZERS[training.optimizer](model.parameters(), lr=training.lr, **training.optimizer_options)
    if training.schedule is not None:
        arguments["schedule"] = trainopt.Schedule(optimizer, lr=training.schedule)
    recorder.result = fit(model, optimizer=optimizer, **arguments)
    recorder.model = model
    return recorder


# The tables -----------------------------------------------------------------------------------------------------------

#: What is to be said, as a regular expression.
SAYS = {
    "too high": r"learning rate \S+ seems too high",
    "too low": r"learning rate \S+ (seems|is) too low",
    "dead": r"dead units",
    "softmax": r"output is a softmax already",
    "columns": r"softmax over the batch",
    "sigmoid": r"output is a sigmoid already",
    "relu": r"gone through a ReLU",
    "activation": r"gone through a (sigmoid|tanh)",
    "log-probabilities": r"loss takes log-probabilities",
    "shapes": r"are broadcast against each other",
    "overfitting": r"validation parts from training",
    "flat": r"does not fall",
    "rose": r"rose from",
    "zero": r"every gradient is zero",
    "sorted": r"class alone|shuffle",
}


class Ending(nn.Module):
    """A model with something after its last layer."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model(x))


def with_bias(model, layer, value, count):
    """The model with the biases of so many units of a layer set, so that a ReLU lets nothing of them through."""
    with torch.no_grad():
        model[layer].bias[:count] = value
    return model


@functools.cache
def trained_state():
    """The weights of a network of digits that is as good as it gets."""
    torch.manual_seed(5)
    model, (inputs, target) = mlp(64, 64, 10), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        rows = torch.randint(1500, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), target[rows]).backward()
        optimizer.step()
    return model.state_dict()


def trained():
    model = mlp(64, 64, 10)
    model.load_state_dict({name: tensor.clone() for name, tensor in trained_state().items()})
    return model


def wide_split():
    """The digits with pixels from 0 to 16, as they come."""
    (inputs, target), (held_inputs, held_target) = digits_split()
    return (16 * inputs, target), (16 * held_inputs, held_target)


def flat_digits():
    return digits_split()[0]


def few(count, data):
    (inputs, target), validation = data
    return (inputs[:count], target[:count]), validation


def imbalanced(count=1200, share=0.05, seed=0):
    inputs = torch.randn(count, 10, generator=generator(seed))
    score = inputs[:, 0] + 0.5 * inputs[:, 1]
    return inputs, (score > score.quantile(1 - share)).long()


def binary(data):
    inputs, target = data
    return inputs, (target % 2).float()[:, None]


def in_order(data):
    inputs, target = data
    order = target.argsort(stable=True)
    return inputs[order], target[order]


def small_digits_net():
    return mlp(64, 64, 10)


squares = nn.MSELoss()
D, M = flat_digits, small_digits_net
cosine = schedules.cosine


def lr_jump(at, factor):
    return schedules.piecewise([at], [1.0, factor])


def table(*rows):
    return [Training(*row[:-1], **row[-1]) if isinstance(row[-1], dict) else Training(*row) for row in rows]


HEALTHY = table(
    ("digits, AdamW", None, digits_split, M, "adamw", 1e-3, {"choices": {"validate_every": 50}}),
    ("digits, SGD", None, D, M, "sgd", 0.1),
    ("digits, momentum", None, D, M, "momentum", 0.05),
    ("digits, a high rate that is fine", None, D, M, "adamw", 0.02),
    ("digits, a slow beginning", None, D, lambda: mlp(64, 128, 64, 10), "sgd", 0.03),
    ("digits, SGD at a high rate that is fine", None, D, M, "sgd", 0.7),
    ("digits, batch norm, SGD 1", None, D, lambda: mlp(64, 64, 64, 10, norm=True), "sgd", 1.0),
    ("digits, convolutions", None, D, cnn, "adamw", 2e-3, {"choices": {"steps": 250}}),
    ("digits, convolutions, SGD", None, D, cnn, "sgd", 0.3, {"choices": {"steps": 250}}),
    ("digits, convolutions, momentum, a trifle of overfitting", None, digits_split, lambda: cnn(16), "momentum", 0.1,
     {"choices": {"steps": 300, "validate_every": 30}}),
    ("digits, one at a time", None, D, M, "sgd", 0.01, {"choices": {"batch_size": 1, "steps": 1000}}),
    ("digits, four at a time", None, D, M, "adamw", 1e-3, {"choices": {"batch_size": 4, "steps": 800}}),
    ("digits, long warm-up", None, D, M, "adamw", 3e-3, {"schedule": schedules.warmup(200).then(cosine(400))}),
    ("digits, cosine", None, D, M, "momentum", 0.1, {"schedule": cosine(400)}),
    ("digits, restarts", None, D, M, "sgd", 0.7, {"schedule": schedules.cosine_restarts(100), "choices": {"steps": 500}}),
    ("digits, dropout", None, D, lambda: mlp(64, 128, 128, 10, dropout=0.5), "adamw", 2e-3),
    ("digits, accumulation", None, D, M, "adamw", 2e-3, {"choices": {"accumulation": 4, "batch_size": 8, "steps": 300}}),
    ("digits, clipped", None, D, M, "sgd", 0.3, {"choices": {"clip": 0.5}}),
    ("digits, bfloat16", None, D, M, "adamw", 2e-3, {"choices": {"precision": "bfloat16"}}),
    ("digits, 40 % wrong labels", None, lambda: mislabelled(D(), 0.4), M, "adamw", 2e-3),
    ("digits, good weights", None, digits_split, trained, "adamw", 1e-4, {"choices": {"validate_every": 100}}),
    ("digits, good weights, SGD", None, D, trained, "sgd", 0.05),
    ("digits, 30 of them", None, lambda: few(30, digits_split())[0], M, "adamw", 1e-2, {"choices": {"batch_size": "full"}}),
    ("digits, early stopping", None, lambda: few(300, digits_split()), M, "adamw", 1e-2,
     {"choices": {"early_stopping": 3, "validate_every": 20}}),
    ("digits, smoothed labels", None, D, M, "adamw", 2e-3, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
    ("digits, hinge loss", None, D, M, "adamw", 3e-3, {"loss": nn.MultiMarginLoss()}),
    ("digits, autoencoder", None, lambda: (D()[0], D()[0]), lambda: mlp(64, 16, 64), "adamw", 3e-3, {"loss": squares}),
    ("few of one class", None, imbalanced, lambda: mlp(10, 32, 2), "adamw", 3e-3),
    ("binary", None, lambda: binary(D()), lambda: mlp(64, 64, 1), "adamw", 2e-3, {"loss": nn.BCEWithLogitsLoss()}),
    ("clusters that overlap, linear, long past its best", None, lambda: blobs(spread=3.0), lambda: nn.Linear(20, 5),
     "adamw", 1e-2, {"choices": {"steps": 800}}),
    ("linear data", None, linear, lambda: mlp(10, 32, 1), "sgd", 0.05, {"loss": squares}),
    ("linear data, mostly noise", None, lambda: linear(noise=1.5), lambda: nn.Linear(10, 1), "sgd", 0.02, {"loss": squares}),
    ("linear data, gradient descent past its end", None, lambda: linear(noise=1.0), lambda: nn.Linear(10, 1), "sgd", 0.1,
     {"loss": squares, "choices": {"batch_size": "full", "steps": 600}}),
    ("large targets", None, lambda: linear(scale=30, offset=100), lambda: mlp(10, 32, 1), "adam", 0.3, {"loss": squares}),
    ("wave", None, wave, lambda: mlp(1, 32, 32, 1, activation=nn.Tanh), "adamw", 1e-2, {"loss": squares}),
    ("wave, absolute", None, wave, lambda: mlp(1, 64, 64, 1), "adamw", 3e-3, {"loss": nn.L1Loss()}),
    ("characters", None, characters, CharModel, "adamw", 3e-3, {"loss": per_character, "choices": {"steps": 150}}),
    ("first of a sequence", None, parity_of_signs, Recurrent, "adamw", 1e-2, {"choices": {"steps": 200}}),
)  # fmt: skip

ILL = table(
    ("digits, AdamW 1", "too high", digits_split, M, "adamw", 1.0, {"choices": {"validate_every": 50}}),
    ("digits, SGD 5", "too high", digits_split, M, "sgd", 5.0, {"choices": {"validate_every": 50}}),
    ("digits, convolutions, AdamW 0.1", "too high", D, cnn, "adamw", 0.1, {"choices": {"steps": 250}}),
    ("digits, convolutions, AdamW 0.3", "too high", digits_split, cnn, "adamw", 0.3, {"choices": {"steps": 250, "validate_every": 30}}),
    ("digits, convolutions, AdamW 1", "too high", D, cnn, "adamw", 1.0, {"choices": {"steps": 250}}),
    ("digits, convolutions of wide inputs, SGD 0.5", "too high", wide_split, lambda: cnn(16), "sgd", 0.5, {"choices": {"steps": 250, "validate_every": 30}}),
    ("digits, linear, SGD 100", "too high", digits_split, lambda: nn.Linear(64, 10), "sgd", 100.0, {"choices": {"steps": 300, "validate_every": 30}}),
    ("digits, Adam 1", "too high", digits_split, lambda: mlp(64, 128, 10), "adam", 1.0, {"choices": {"steps": 200, "validate_every": 60}}),
    ("large targets, SGD 0.1", "too high", lambda: linear(scale=30, offset=10), lambda: mlp(10, 64, 1), "sgd", 0.1, {"loss": squares}),
    ("digits, convolutions, SGD 2", "too high", D, cnn, "sgd", 2.0, {"choices": {"steps": 250}}),
    ("digits, convolutions, SGD 10", "too high", D, cnn, "sgd", 10.0, {"choices": {"steps": 250}}),
    ("digits, sigmoid, AdamW 0.3", "too high", D, lambda: mlp(64, 32, 32, 10, activation=nn.Sigmoid), "adamw", 0.3),
    ("digits, warm-up to too high a rate", "too high", D, M, "sgd", 20.0, {"schedule": schedules.warmup(250), "choices": {"steps": 500}}),
    ("digits, a rate that jumps", "too high", D, M, "adamw", 2e-3, {"schedule": lr_jump(200, 500.0), "choices": {"steps": 500}}),
    ("digits, good weights destroyed", "too high", digits_split, trained, "adamw", 0.3, {"choices": {"validate_every": 50}}),
    ("clusters, linear, momentum 0.5", "too high", lambda: blobs(spread=3.0), lambda: nn.Linear(20, 5), "momentum", 0.5),
    ("large targets, SGD 0.2", "too high", lambda: linear(scale=5, offset=3), lambda: mlp(10, 32, 1), "sgd", 0.2, {"loss": squares}),
    ("wave, SGD 0.5", "too high", wave, lambda: mlp(1, 32, 32, 1, activation=nn.Tanh), "sgd", 0.5, {"loss": squares}),
    ("characters, AdamW 1", "too high", characters, CharModel, "adamw", 1.0, {"loss": per_character, "choices": {"steps": 150}}),
    ("digits, SGD 1e-5", "too low", D, M, "sgd", 1e-5),
    ("digits, AdamW 1e-6", "too low", digits_split, M, "adamw", 1e-6, {"choices": {"validate_every": 50}}),
    ("digits, a rate that is gone too early", "too low", D, M, "sgd", 0.1, {"schedule": schedules.exponential(0.9), "choices": {"steps": 600}}),
    ("binary, SGD 1e-4", "too low", lambda: binary(D()), lambda: mlp(64, 40, 1), "sgd", 1e-4, {"loss": nn.BCEWithLogitsLoss()}),
    ("linear data, SGD 1e-6", "too low", linear, lambda: mlp(10, 32, 1), "sgd", 1e-6, {"loss": squares}),
    ("characters, AdamW 1e-6", "too low", characters, CharModel, "adamw", 1e-6, {"loss": per_character, "choices": {"steps": 150}}),
    ("digits, 60 of 64 units dead", "dead", D, lambda: with_bias(M(), 0, -100.0, 60), "adamw", 3e-3),
    ("digits, all units dead", "zero|dead", D, lambda: with_bias(mlp(64, 64, 10), 0, -100.0, 64), "adamw", 3e-3),
    ("digits, channels dead", "dead", D, lambda: with_bias(cnn(), 1, -100.0, 7), "adamw", 2e-3, {"choices": {"steps": 250}}),
    ("digits, softmax before cross-entropy", "softmax", D, lambda: Ending(M(), nn.Softmax(1)), "adamw", 3e-3),
    ("digits, softmax over the batch", "columns", D, lambda: Ending(M(), nn.Softmax(0)), "adamw", 3e-3),
    ("digits, ReLU before cross-entropy", "relu", D, lambda: Ending(M(), nn.ReLU()), "adamw", 3e-3),
    ("digits, tanh before cross-entropy", "activation", D, lambda: Ending(M(), nn.Tanh()), "adamw", 3e-3),
    ("digits, NLLLoss of a softmax", "log-probabilities", D, lambda: Ending(M(), nn.Softmax(1)), "adamw", 3e-3, {"loss": nn.NLLLoss()}),
    ("binary, sigmoid twice", "sigmoid", lambda: binary(D()), lambda: Ending(mlp(64, 64, 1), nn.Sigmoid()), "adamw", 2e-3, {"loss": nn.BCEWithLogitsLoss()}),
    ("linear data, (N, 1) against (N,)", "shapes", lambda: (linear()[0], linear()[1][:, 0]), lambda: mlp(10, 32, 1), "adamw", 3e-3,
     {"loss": lambda output, target: ((output - target) ** 2).mean()}),
    ("20 digits against many", "overfitting", lambda: few(20, mislabelled_split(0.3)), M, "adamw", 1e-2,
     {"choices": {"validate_every": 10, "batch_size": 10, "steps": 300, "log_every": 10}}),
    ("digits, wrong labels learned by heart", "overfitting", lambda: few(400, mislabelled_split(0.5)), lambda: mlp(64, 256, 10), "adamw", 5e-3,
     {"choices": {"validate_every": 25, "steps": 500}}),
    ("labels of nothing", "flat", lambda: mislabelled(D(), 1.0), lambda: mlp(64, 8, 10), "sgd", 0.02),
    ("digits, six layers of sigmoid", "flat", D, lambda: mlp(64, 32, 32, 32, 32, 32, 10, activation=nn.Sigmoid), "sgd", 0.1),
    ("digits, sorted by class", "sorted", lambda: in_order(D()), M, "sgd", 0.3, {"choices": {"shuffle": False}}),
    ("wave, exploding, not looked at", "too high", wave, lambda: mlp(1, 32, 32, 1), "sgd", 1.0, {"loss": squares, "choices": {"nonfinite": "ignore"}}),
)  # fmt: skip


def mislabelled_split(share):
    training, validation = digits_split()
    return mislabelled(training, share), validation


def outcome(training, recorder):
    """right, wrong or silent; and what was said. A right word beside a wrong one is wrong."""
    said = [event for event in recorder.messages if event.kind == "trouble"]
    texts = [event.text for event in said]
    if training.says is None:
        return ("wrong" if said else "right"), texts
    wanted = "|".join(SAYS[word] for word in training.says.split("|"))
    fits = [re.search(wanted, event.text) is not None for event in said if event.topic != "nonfinite"]
    if fits and all(fits):
        return "right", texts
    is_told = any(re.search(wanted, text) for text in texts)  # with a NaN
    return ("wrong" if fits and not all(fits) else "right" if is_told else "silent"), texts


def main(seeds):
    """Prints the score: of each seed how many were right, wrong and silent, and which."""
    torch.set_num_threads(1)
    for seed in seeds:
        scores = {kind: dict.fromkeys(("right", "wrong", "silent"), 0) for kind in ("healthy", "ill")}
        for kind, trainings in (("healthy", HEALTHY), ("ill", ILL)):
            for training in trainings:
                found, said = outcome(training, run(training, seed))
                scores[kind][found] += 1
                if found != "right":
                    print(f"  {found}: {training.name} (to be said: {training.says})", *said, sep="\n    ")
        print(f"seed {seed}:", *(f"{kind} {score}" for kind, score in scores.items()))


if __name__ == "__main__":
    main(map(int, sys.argv[1:] or ["0"]))
