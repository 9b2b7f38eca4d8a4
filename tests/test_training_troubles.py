"""The three troubles: what the program says, with what numbers, and that it leaves the run as it should."""

import math
import re

import pytest
import torch
from test_training_loop import Recorder, fitted, network, samples, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainopt
from trainopt.training import Silent, fit, lr_find
from trainopt.training.lr_find import curve_of


def told(recorder, topic):
    return [event for event in recorder.named("Message") if event.topic == topic]


# Something is not finite --------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Sharp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Broken(nn.Module):
    def forward(self, x):
        return Sharp.apply(x)


def layers(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), middle, nn.Linear(7, 3))


@pytest.mark.parametrize(
    ("model", "spoil", "phrase"),
    [
        (
            lambda: layers(nn.Tanh()),
            "inputs",
            r"batch's inputs, a tensor of shape \(7, 5\), has 1 NaN and 0 Inf of 35 elements, first in row 3, column 2",
        ),
        (lambda: layers(Scaled(math.inf)), None, r"the output of layer '2' \(Scaled\) has 0 NaN and 49 Inf of 49"),
        (lambda: layers(Broken()), None, r"the gradient of the output of layer '1' \(BatchNorm1d\) has 49 NaN"),
    ],
)
def test_the_first_offending_tensor_is_named_and_nothing_changes(model, spoil, phrase, tmp_path):
    model = model()
    inputs, target = samples()
    if spoil:
        inputs[3, 2] = math.nan
    optimizer = trainopt.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder = Recorder()
    data = (inputs[:7], target[:7])
    choices = {"shuffle": False, "report": recorder, "schedule": schedule, "directory": tmp_path}
    result = fitted(model, data, optimizer=optimizer, **choices)
    assert result.step == 0 and schedule.last_epoch == 0 and not optimizer.state
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    (message,) = told(recorder, "nonfinite")
    assert re.search(phrase, message.text), message.text
    kept = torch.load(tmp_path / "nonfinite" / "step-000000001.pt", weights_only=True)
    assert torch.equal(kept["micro_batches"][0][1], target[:7]) and kept["what"] in message.text
    assert torch.equal(result.suspects[0][1], target[:7])


def test_training_goes_on_after_a_bad_batch_as_if_it_had_not_been():
    inputs, target = samples()
    bad = inputs.clone()
    bad[9] = math.inf
    model, clean = network(), network()
    batches = list(zip(bad.split(7), target.split(7), strict=True))
    result = fit(model, batches, nn.CrossEntropyLoss(), sgd(model, momentum=0.9), epochs=1, report=Silent())
    rest = [batch for i, batch in enumerate(batches) if i != 1]
    fit(clean, rest, nn.CrossEntropyLoss(), sgd(clean, momentum=0.9), epochs=1, report=Silent())
    assert result.step == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), clean.parameters(), strict=True))


@pytest.mark.parametrize(("choices", "after"), [({"nonfinite_limit": 3}, 3), ({"nonfinite": "stop"}, 1)])
def test_after_so_many_in_a_row_the_run_stops_with_its_last_checkpoint_intact(choices, after, tmp_path):
    inputs, target = samples()
    inputs[14:] = math.nan
    model = network()
    recorder = Recorder()
    usual = {"epochs": 5, "batch_size": 2, "shuffle": False, "checkpoint_every": 2, "directory": tmp_path}
    result = fitted(model, (inputs, target), report=recorder, **usual, **choices)
    assert result.reason == recorder.named("Finished")[0].reason == "nonfinite" and result.step == 7
    assert result.checkpoint.name == "step-000000006.pt"
    messages = told(recorder, "nonfinite")
    assert len(messages) == 2 and f"stopped after {after} in a row" in messages[-1].text  # the same is said once
    assert "step-000000006.pt is intact" in messages[-1].text
    assert torch.load(result.checkpoint, weights_only=True)["counters"]["step"] == 6


def test_an_overflow_of_float16_is_no_trouble_while_the_scale_is_found():
    model = network()
    recorder = Recorder()
    loss = lambda output, target: nn.functional.cross_entropy(output * 30, target) * 50  # noqa: E731
    arguments = {"epochs": 10, "batch_size": 7, "precision": "float16", "nonfinite": "stop", "report": recorder}
    result = fit(model, samples(), loss, sgd(model, lr=1e-4), count=len, **arguments)
    assert result.reason == "finished" and not told(recorder, "nonfinite")
    assert recorder.named("Progress")[-1].skipped > 0


def test_without_the_check_nothing_is_left_out():
    inputs, target = samples()
    inputs[3] = math.nan
    model = network()
    result = fitted(model, (inputs, target), nonfinite="ignore")
    assert result.step == 4 and model[0].weight.isnan().any()


# The loss does not fall ---------------------------------------------------------------------------------------------


def watched(model, lr, steps=80, data=None, **choices):
    recorder = Recorder()
    choices = {"steps": steps, "batch_size": 7, "log_every": 5, "seed": 0, **choices}
    fit(model, data or samples(), nn.CrossEntropyLoss(), sgd(model, lr=lr), report=recorder, **choices)
    return told(recorder, "loss")


def test_a_learning_rate_that_is_too_low_is_said_with_numbers():
    (message,) = watched(network(), 1e-7)
    assert "does not fall" in message.text and "1e-07 seems too low" in message.text
    assert message.numbers["update_to_weights"] < 1e-5 and "; try " in message.text


def test_a_learning_rate_that_is_too_high_is_said_with_numbers():
    messages = watched(network(), 30.0)
    assert any("30 seems too high" in message.text for message in messages)
    assert messages[0].numbers["update_to_weights"] > 3e-2


def test_dead_units_are_named():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    (message,) = watched(model, 0.1)
    assert "every gradient is zero" in message.text
    model = nn.Sequential(nn.Linear(5, 70), nn.ReLU(), nn.Linear(70, 3))
    with torch.no_grad():
        model[0].bias[:65].fill_(-100)
        model[2].weight.zero_()
    (message,) = watched(model, 1e-4)
    assert "65 of 70 units of layer '0' get no gradient" in message.text


def test_a_loss_that_falls_is_left_alone():
    inputs = samples()[0]
    assert watched(network(), 0.3, data=(inputs, (inputs[:, 0] > 0).long())) == []


def test_validation_that_parts_from_training_is_said_once_with_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3))
    recorder = Recorder()
    optimizer = trainopt.AdamW(model.parameters(), lr=0.02)
    data, unlike = samples(20), (torch.randn(50, 5), torch.randint(0, 3, (50,)))
    choices = {"epochs": 30, "batch_size": 5, "log_every": 2, "validation": unlike, "report": recorder}
    fitted(model, data, optimizer=optimizer, **choices)
    (message,) = told(recorder, "overfitting")
    assert message.numbers["validation"] > 1.01 * message.numbers["best_validation"]
    assert "weight decay" in message.text and f"{message.numbers['training']:.4g}" in message.text


# The range test -----------------------------------------------------------------------------------------------------


def test_the_range_test_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = trainopt.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    inputs, target = samples()
    nn.functional.cross_entropy(model(inputs), target).backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(inputs, target), batch_size=7, shuffle=True, generator=generator)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [param.grad.clone() for param in model.parameters()]
    states = [{key: value.clone() for key, value in optimizer.state[param].items()} for param in model.parameters()]
    lr, random, order = optimizer.param_groups[0]["lr"], torch.get_rng_state(), generator.get_state()
    curve = lr_find(model, loader, nn.CrossEntropyLoss(), optimizer, steps=40)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(param.grad, old) for param, old in zip(model.parameters(), gradients, strict=True))
    for param, state in zip(model.parameters(), states, strict=True):
        assert all(torch.equal(optimizer.state[param][key], value) for key, value in state.items())
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == pytest.approx(1e-3)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(generator.get_state(), order)
    assert curve.rates[0] == pytest.approx(1e-7) and len(curve.rates) == len(curve.losses) == len(curve.smoothed)
    again = lr_find(model, loader, nn.CrossEntropyLoss(), optimizer, steps=40)
    assert again == curve


def test_the_suggestion_is_a_rate_that_trains():
    inputs, _ = samples(200)
    data = (inputs, (inputs[:, 0] > 0).long())
    model = network()
    curve = lr_find(model, data, nn.CrossEntropyLoss(), sgd(model), batch_size=20, lowest=1e-5, highest=1000.0)
    assert curve.suggestion is not None and 1e-3 < curve.suggestion < 1000
    assert "falls fastest" in str(curve)
    before = nn.functional.cross_entropy(model(inputs), data[1]).item()
    fit(model, data, nn.CrossEntropyLoss(), sgd(model, lr=curve.suggestion), epochs=5, batch_size=20, report=Silent())
    assert nn.functional.cross_entropy(model(inputs), data[1]).item() < 0.7 * before


def test_groups_keep_their_proportions_and_a_curve_without_a_fall_suggests_nothing():
    assert curve_of([0.1, 0.2, 0.4], [1.0, 2.0, 3.0]).suggestion is None
    assert "did not fall" in str(curve_of([0.1, 0.2, 0.4], [1.0, 2.0, 3.0]))
    model = network()
    with pytest.raises(ValueError, match=r"lowest is 1.0 and highest 0.1"):
        lr_find(model, samples(), nn.CrossEntropyLoss(), sgd(model), lowest=1.0, highest=0.1, batch_size=7)
    with pytest.raises(ValueError, match="steps is 1"):
        lr_find(model, samples(), nn.CrossEntropyLoss(), sgd(model), steps=1, batch_size=7)


@pytest.mark.parametrize("optimizer", [trainopt.AdamW, trainopt.SGD])
def test_the_suggestion_does_not_move_with_the_number_of_steps(optimizer):
    inputs, _ = samples(200)
    data, model = (inputs, (inputs[:, 0] > 0).long()), network()
    loader = DataLoader(TensorDataset(*data), 20, shuffle=True, generator=torch.Generator().manual_seed(1))
    curves = [
        lr_find(model, loader, nn.CrossEntropyLoss(), optimizer(model.parameters(), lr=1.0), steps=steps)
        for steps in (20, 50, 200)
    ]
    assert len({curve.suggestion for curve in curves}) == 1 and curves[0].falls == curves[1].falls == curves[2].falls
    rates = sorted(curves[0].falls)
    best = max(curves[0].falls.values())
    assert curves[0].suggestion == min(rate for rate in rates if curves[0].falls[rate] >= 0.8 * best)


def test_rates_that_blow_up_do_not_hide_one_far_below_that_trains():
    inputs, _ = samples(200)
    data, model = (100 * inputs, 100 * inputs[:, :1]), nn.Linear(5, 1)
    curve = lr_find(model, data, nn.MSELoss(), sgd(model), batch_size=20)
    assert curve.suggestion is not None and 1e-6 < curve.suggestion < 1e-3


def test_copies_of_a_compiled_model_are_not_compiled():
    compiled = []
    model = torch.compile(network(), backend=lambda graph, inputs: compiled.append(graph) or graph)
    curve = lr_find(model, samples(), nn.CrossEntropyLoss(), sgd(model), steps=5, batch_size=7)
    assert len(curve.rates) > 2 and not compiled


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curve = curve_of([0.1, 0.2, 0.4], [3.0, 1.0, 2.0], {0.1: 1.0, 0.3: 1.9})
    (axes,) = curve.plot(tmp_path / "curve.png").axes
    assert axes.get_xscale() == "log" and len(axes.lines) == 3 and curve.suggestion == 0.3
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_loss_that_is_not_finite_at_first_is_refused():
    model = network()
    with pytest.raises(ValueError, match="not finite before the first update"):
        lr_find(model, samples(), lambda output, target: output.sum() * math.nan, sgd(model), batch_size=7)
