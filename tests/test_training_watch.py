"""What is said of some eighty small trainings, healthy and ill in known ways, and of histories of losses."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
import trainings
from torch import nn
from trainings import HEALTHY, ILL, blobs, cnn, digits_split, linear, mlp, outcome, run

from trainopt.training.history import KEPT, PIECE, History
from trainopt.training.watch.guessing import Guessing
from trainopt.training.watch.suspicion import Losses
from trainopt.training.watch.watch import Validation, scatter_of

pytest.importorskip("sklearn")  # has the digits
pytestmark = pytest.mark.usefixtures("one_thread")  # more would only wait for each other

#: Those of the sorts that users meet most; the others are marked slow.
USUAL = r"digits, (AdamW|SGD|momentum|batch norm|convolutions(, AdamW 0.3)?$|a high|a slow|one at|long|restarts|dropout"
USUAL += r"|40 %|early|good weights$|sigmoid|a rate|60 of|all units|softmax|ReLU|tanh|linear|Adam 1|six|sorted|wrong)"
USUAL += r"|^(binary|characters$|large|linear data|wave)"


def rows(table):
    fast = [training for training in table if re.search(USUAL, training.name)]
    slow = [training for training in table if training not in fast]
    return [
        *(pytest.param(training, id=training.name) for training in fast),
        *(pytest.param(training, id=training.name, marks=pytest.mark.slow) for training in slow),
    ]


@pytest.mark.parametrize("training", rows(HEALTHY))
def test_nothing_is_said_of_a_healthy_training(training):
    found, said = outcome(training, run(training))
    assert found == "right", said


@pytest.mark.parametrize("training", rows(ILL))
def test_the_right_word_is_said_of_an_ill_training_and_no_other(training):
    recorder = run(training)
    found, said = outcome(training, recorder)
    assert found == "right", said
    assert len(set(said)) == len(said), "what is said is said once"


def test_the_score_in_the_docs_is_of_these_trainings():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    healthy, ill = (
        re.search(rf"\| {kind} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text) for kind in ("healthy", "ill")
    )
    assert int(healthy[1]) == len(HEALTHY) and int(ill[1]) == len(ILL)
    for row in (healthy, ill):
        assert int(row[2]) + int(row[3]) + int(row[4]) == 3 * int(row[1])  # with three seeds


# The parts ------------------------------------------------------------------------------------------------------------


def test_a_history_keeps_the_whole_run_in_little_room():
    losses = [random.Random(0).gauss(5 - i / 2000, 1.0) for i in range(9_876)]
    history = History()
    at = 0
    for size in [1, 7, 300, 10, 2_000] * 100:  # however many come at a time
        history.extend(losses[at : at + size])
        at += size
    assert history.length == len(losses) and len(history.coarse) <= KEPT and len(history.fine) == KEPT
    for first, last in ((0, 3_000), (5_000, 8_000), (len(losses) - 300, len(losses))):
        stretch = history.stretch(first, last)
        true = torch.tensor(losses[first:last], dtype=torch.float64)
        assert stretch.number == pytest.approx(len(true), abs=2 * history.size)
        assert stretch.mean == pytest.approx(float(true.mean()), abs=0.1)
        assert stretch.error == pytest.approx(2 * float(true.std()) / math.sqrt(len(true)), rel=0.3)
    again = History()
    again.load_state_dict(history.state_dict())
    assert vars(again) == vars(history)


def test_a_history_leaves_out_what_is_not_finite():
    history = History()
    history.extend([math.nan, 1.0, math.inf, 3.0] * PIECE)
    assert history.stretch(0).mean == 2.0 and history.length == 4 * PIECE
    assert math.isfinite(history.peak())


@pytest.mark.parametrize(("count", "cause"), [(1000, "flat"), (100, None)])
def test_losses_whose_beginning_is_not_known_are_not_judged(count, cause):
    """A checkpoint of an older version holds none."""
    history = History()
    history.extend([2.0] * count)
    found = Losses().judge(1000, 2000, 0.1, history, 2.0, None)
    assert (found and found.cause) == cause


def guessed(output, target, loss):
    guessing = Guessing()
    guessing.see(output, target, loss(output, target), loss)
    guessing.read()
    return guessing


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (nn.CrossEntropyLoss(), math.log(7)),
        (torch.compiler.disable(nn.functional.cross_entropy), math.log(7)),
        (lambda output, target: -output.log_softmax(1)[range(64), target].mean(), math.log(7)),
        (nn.CrossEntropyLoss(label_smoothing=0.2), math.log(7)),
        (nn.CrossEntropyLoss(label_smoothing=0.9).forward, math.log(7)),
        (nn.CrossEntropyLoss(weight=torch.arange(1.0, 8.0)), math.log(7)),
    ],
)
def test_the_loss_of_guessing_classes(loss, value):
    output, target = torch.randn(64, 7, generator=trainings.generator(0)), torch.arange(64) % 7
    guessing = guessed(output, target, loss)
    assert guessing.uniform == pytest.approx(value) and guessing.reference >= value - 1e-9
    assert not guessing.faults and guessing.noise is not None


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (nn.MSELoss(), lambda target: target.var(correction=0)),
        (lambda output, target: (output - target).pow(2).mean(), lambda target: target.var(correction=0)),
        (nn.L1Loss(), lambda target: (target - target.mean()).abs().mean()),
    ],
)
def test_the_loss_of_guessing_numbers(loss, value):
    target = 3 + 2 * torch.randn(256, 2, generator=trainings.generator(0))
    guessing = guessed(torch.randn(256, 2), target, loss)
    assert guessing.reference == pytest.approx(float(value(target)), rel=1e-5)


def test_nothing_is_taken_for_known_that_is_not():
    output, target = torch.randn(64, 7), torch.arange(64) % 7
    assert guessed(output, target, lambda output, target: output.square().mean() + 40).reference is None
    assert guessed(output, target, nn.MultiMarginLoss()).reference is None
    assert guessed({"scores": output}, target, lambda output, target: output["scores"].mean()).reference is None


@pytest.mark.parametrize(
    ("ending", "fault"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x.softmax(0), "softmax of columns"),
        (torch.relu, "relu"),
        (torch.tanh, "activation"),
        (lambda x: x.sigmoid().reshape(64, 7), "activation"),
        (lambda x: x, None),
        (lambda x: x * 0, None),
        (lambda x: x.log_softmax(1), None),
        (lambda x: 20 * torch.tanh(x / 20), None),
        (nn.functional.softplus, None),
    ],
)
def test_what_stands_between_the_model_and_cross_entropy(ending, fault):
    output = ending(torch.randn(64, 7, generator=trainings.generator(0), requires_grad=True))
    assert list(guessed(output, torch.arange(64) % 7, nn.CrossEntropyLoss()).faults) == ([fault] if fault else [])


def test_logits_between_0_and_1_are_no_sigmoid():
    guessing, loss = Guessing(), nn.BCEWithLogitsLoss()
    weight = torch.full((3, 1), 0.1, requires_grad=True)
    for _ in range(8):
        inputs, target = torch.rand(32, 3), torch.randint(2, (32, 1)).float()
        guessing.see(inputs @ weight, target, loss(inputs @ weight, target), loss)
    guessing.read()
    assert not guessing.faults and guessing.uniform == pytest.approx(math.log(2))
    output = (inputs @ weight).sigmoid()
    assert list(guessed(output, target, loss).faults) == ["sigmoid"]


@pytest.mark.parametrize(("output", "target"), [((8, 1), (8,)), ((8,), (8, 1)), ((3, 3, 1), (3, 3))])
@pytest.mark.parametrize("power", [1, 2])
def test_shapes_that_are_broadcast_are_told_apart_from_those_that_are_meant(output, target, power):
    def loss(output, target):
        return (output - target).abs().pow(power).mean()

    one, other = torch.randn(output), torch.randn(target)
    assert list(guessed(one, other, loss).faults) == ["shapes"]
    assert not guessed(one, other.reshape(output), loss).faults
    assert not guessed(one, other, lambda output, target: loss(output, target.reshape(output.shape))).faults


@pytest.mark.parametrize(
    ("validations", "parts"),
    [
        ([1.0, 0.8, 0.9, 1.0, 1.1], True),
        ([1.0, 0.8, 0.9, 1.4, 0.9, 1.5, 0.95], False),  # it scatters
        ([1.0, 0.8, 0.81, 0.82, 0.83], False),  # a trifle
        ([0.08, 0.04, 0.06, 0.06, 0.06], False),  # of a loss that has nearly gone
        ([1.0, 1.3, 1.3, 0.8, 1.0, 1.0, 1.0], False),  # it has come back from further
    ],
)
def test_validation_parts_from_training_when_it_rises_by_more_than_it_scatters(validations, parts):
    validation = Validation()
    training = [1.0 / (i + 1) for i in range(len(validations))]
    found = [validation.parts(i, loss, training[i], trifle=0.07) for i, loss in enumerate(validations)]
    assert any(found) == parts


def test_a_straight_course_does_not_scatter():
    assert scatter_of([1.0, 2.0, 3.0, 4.0]) == scatter_of([1.0, 2.0]) == 0.0
    noise = torch.randn(4000, generator=trainings.generator(0), dtype=torch.float64)
    assert scatter_of((noise * 3 + torch.arange(4000) / 10).tolist()) == pytest.approx(3, rel=0.1)


# What is measured leaves no trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["too low", "dead"])
def test_a_run_that_is_measured_makes_the_updates_that_it_would_make(kind, monkeypatch):
    """With dropout, batch norm's buffers and a shuffle, whose random numbers must be the same."""

    def model():
        network = mlp(20, 32, 5, dropout=0.3, norm=True)
        if kind == "dead":
            with torch.no_grad():
                network[1].bias[:30] = -100.0
        return network

    training = trainings.Training("", None, blobs, model, "sgd", 1e-7 if kind == "too low" else 0.01)
    watched = run(training)
    assert watched.messages
    monkeypatch.setattr("trainopt.training.watch.Watch.progressed", lambda *_, **__: [])
    unwatched = run(training)
    assert not unwatched.messages and watched.losses == unwatched.losses
    for one, other in zip(watched.model.state_dict().values(), unwatched.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rate", "word"), [(20.0, "too high"), (1e-6, None)])
def test_where_the_weights_are_spread_over_processes_nothing_is_measured(rate, word, monkeypatch):
    """A process that measured alone would wait for the others; what the losses alone show is said all the same."""
    monkeypatch.setattr("trainopt.training.state.is_sharded", lambda model: True)
    monkeypatch.setattr("trainopt.training.watch.evidence.Measurement.before_step", None)  # not to be called
    training = trainings.Training("", word, digits_split, lambda: mlp(64, 32, 10), "sgd", rate)
    assert [word in event.text for event in run(training).messages] == ([True] if word else [])


def test_what_was_said_is_not_said_again_after_a_checkpoint(tmp_path):
    choices = {"directory": tmp_path, "checkpoint_every": 50, "keep": 9, "steps": 150}
    training = trainings.Training("", "too low", digits_split, lambda: mlp(64, 32, 10), "sgd", 1e-6, choices=choices)
    assert len(run(training).messages) == 1
    training.choices = {**choices, "steps": 400}
    again = run(training)
    assert again.result.step == 400 and not [event for event in again.messages if event.topic == "loss"]


def test_advice_of_a_rate_that_is_too_low_or_too_high_is_a_rate_that_trains():
    for data, model, optimizer, rate, loss in (
        (digits_split, lambda: mlp(64, 64, 10), "sgd", 1e-5, nn.CrossEntropyLoss()),
        (digits_split, lambda: cnn(8), "adamw", 1.0, nn.CrossEntropyLoss()),
        (linear, lambda: mlp(10, 32, 1), "adamw", 1e-6, nn.MSELoss()),
    ):
        training = trainings.Training("", None, data, model, optimizer, rate, loss, choices={"steps": 200})
        ill = run(training)
        (text,) = [event.text for event in ill.messages if event.topic == "loss"]
        training.lr = float(re.search(r"; try (\d+e[-+]\d+)", text)[1])
        assert run(training).losses[-1] < 0.5 * ill.losses[-1]
