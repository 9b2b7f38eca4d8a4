"""The moving average of the weights, against its formula in Python's own numbers."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import trainopt
from trainopt.training import Silent, fit
from trainopt.training.average import WeightAverage


class Scalar(nn.Module):
    """One weight, and a buffer of each kind."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(5.0, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.tensor(0.0))

    def set(self, value):
        with torch.no_grad():
            self.weight.fill_(value)


def weighted_mean(values, decay, warmup):
    """The definition: the plain recursion from 0, divided by the sum of its weights; exact."""
    total = mass = Fraction(0)
    for t, value in enumerate(values, 1):
        d = min(Fraction(decay), Fraction(t, 9 + t)) if warmup else Fraction(decay)
        total, mass = d * total + (1 - d) * Fraction(value), d * mass + (1 - d)
    return float(total / mass)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.99999])
def test_the_average_is_its_formula(decay, warmup):
    model = Scalar()
    average = WeightAverage(model, decay, warmup)
    values = [math.sin(t) for t in range(1, 11)]
    for t, value in enumerate(values, 1):
        model.set(value)
        average.update()
        if t in (1, 2, 10):
            assert float(average.weights["weight"]) == pytest.approx(
                weighted_mean(values[:t], decay, warmup), rel=1e-10
            )
    assert average.count == 10


@pytest.mark.parametrize(("decay", "warmup"), [(0.99999, False), (0.999, True)])
def test_after_many_updates_it_still_is(decay, warmup):
    """Weights that grow by 1 an update have a mean that is known: the age of the average."""
    model = Scalar()
    average = WeightAverage(model, decay, warmup)
    total = mass = 0.0
    for t in range(1, 20_001):
        with torch.no_grad():
            model.weight.fill_(t)
        average.update()
        d = average.decay_at(t)
        total, mass = d * total + (1 - d) * t, d * mass + (1 - d)
    assert float(average.weights["weight"]) == pytest.approx(total / mass, rel=1e-9)
    assert average.count == 20_000 and average.decay_at(100_000) == decay


def test_warmup_is_the_documented_one():
    average = WeightAverage(Scalar(), 0.9999)
    assert [average.decay_at(t) for t in (1, 10, 100_000)] == [0.1, 10 / 19, 0.9999]


def test_small_steps_of_16_bit_weights_are_not_lost():
    model = Scalar(torch.bfloat16)
    model.set(1.0)
    average = WeightAverage(model, 0.999, warmup=False)
    average.update()
    model.set(2.0)
    for _ in range(10):
        average.update()
    assert average.weights["weight"].dtype == torch.float32
    assert float(average.weights["weight"]) == pytest.approx(weighted_mean([1.0] + [2.0] * 10, 0.999, False), rel=1e-5)


def test_evaluation_on_it_leaves_the_weights_to_the_bit_and_copies_buffers():
    model = Scalar()
    average = WeightAverage(model, 0.5)
    for value in (1.0, 2.0, 1 / 3):
        model.set(value)
        average.update()
    model.count += 7
    model.mean += 0.5
    with average.applied():
        assert model.weight.item() == pytest.approx(weighted_mean([1.0, 2.0, 1 / 3], 0.5, True))
    assert model.weight.item() == 1 / 3
    state = average.model_state()
    assert int(state["count"]) == 7 and state["count"].dtype == torch.int64 and float(state["mean"]) == 0.5
    model.count += 1
    assert int(state["count"]) == 7  # a copy


def test_the_counter_goes_on_after_loading():
    values = [0.3, -1.0, 2.0, 5.0]
    model = Scalar()
    straight, first, second = (WeightAverage(model, 0.9) for _ in range(3))
    for value in values[:2]:
        model.set(value)
        straight.update()
        first.update()
    second.load_state_dict(first.state_dict())
    for value in values[2:]:
        model.set(value)
        straight.update()
        second.update()
    assert second.count == 4 and torch.equal(straight.weights["weight"], second.weights["weight"])


def test_a_skipped_update_is_not_averaged():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs, target = torch.randn(12, 3), torch.randint(0, 2, (12,))
    inputs[5] = math.nan
    optimizer = trainopt.SGD(model.parameters(), lr=0.1)
    choices = {"epochs": 1, "batch_size": 3, "shuffle": False, "average": 0.9, "validate_every": 1}
    seen = []

    class Watching(Silent):
        def validated(self, event):
            seen.append((event.step, event.on_average))

    choices |= {"validation": (inputs[:5], target[:5]), "report": Watching()}
    result = fit(model, (inputs, target), nn.CrossEntropyLoss(), optimizer, **choices)
    assert result.step == 3 and seen == [(1, True), (2, True), (3, True)]
    assert all(tensor.isfinite().all() for tensor in result.average.values())
