"""Which operation, layer or datum is blamed for a NaN, how often it is said, and what is advised."""

import math
import re

import pytest
import torch
from test_training_loop import Recorder
from torch import nn

import trainopt
from trainopt.training import fit


class Model(nn.Module):
    """Two layers with a norm between, and something done to the output of the first."""

    def __init__(self, function):
        super().__init__()
        self.first, self.norm, self.last, self.function = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.last(self.norm(self.function(self.first(x), x)))


class DividesByZero(nn.Module):
    def forward(self, x):
        return x / (x.sum(1, keepdim=True) * 0)


class Doubled(nn.Module):
    """A container whose parts are healthy."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def through_where(h, x):
    return torch.where(h > 0, h.abs().sqrt(), (h * 0).sqrt())


def told(model, inputs=None, target=None, loss=None, lr=0.01, **choices):
    torch.manual_seed(0)
    inputs = torch.randn(64, 5) if inputs is None else inputs
    target = torch.arange(len(inputs)) % 3 if target is None else target
    recorder = Recorder()
    choices = {"epochs": 2, "batch_size": 16, "shuffle": False, "nonfinite_limit": 100, "seed": 0, **choices}
    optimizer = trainopt.SGD(model.parameters(), lr=lr)
    fit(model, (inputs, target), loss or nn.CrossEntropyLoss(), optimizer, report=recorder, **choices)
    return [event.text for event in recorder.named("Message")]


def model(function):
    torch.manual_seed(0)
    return Model(function)


@pytest.mark.parametrize(
    ("function", "phrases"),
    [
        (lambda h, x: h.log(), ["`log`", "layer 'first' (Linear) and layer 'norm' (LayerNorm)", "clamp(min=eps)"]),
        (lambda h, x: (-h.abs()).sqrt(), ["`sqrt`", "of [-", "and layer 'norm'"]),
        (lambda h, x: h / (x[:, :1] * 0), ["`div`", "16 zeros", "`layer_norm`", "made NaN of the infinity", "an eps"]),
        (lambda h, x: (1000 + 100 * h).exp(), ["`exp`", "logsumexp"]),
        (
            lambda h, x: h.masked_fill(x[:, :1] > 0, -math.inf).softmax(1),
            ["`softmax`", "infinities that `masked_fill`", "masked altogether"],
        ),
        (lambda h, x: h - h[:, :1].std(1, keepdim=True), ["`std`", "a single element"]),
        (through_where, ["derivative of `sqrt`", "a branch that torch.where does not take"]),
        (lambda h, x: (h * 0).pow(0.5), ["derivative of `pow`", "infinite at 0"]),
        (lambda h, x: (2 + h.square()).acos(), ["`acos`", "[-1, 1]"]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:std")
def test_the_operation_that_made_it_is_blamed_and_no_layer_it_passed_through(function, phrases):
    (text, count) = told(model(function))
    assert all(phrase in text for phrase in phrases), text
    assert "output of layer 'norm'" not in text and "output of layer 'last'" not in text
    assert "test_training_origin.py:" in text  # the line
    assert count == "8 updates were left out as not finite: 8 for the reason given at update 1"


def test_a_layer_without_parameters_is_blamed_and_not_the_batch_norm_that_it_spoils():
    torch.manual_seed(0)
    spoilt = nn.Sequential(nn.Linear(5, 8), DividesByZero(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    text = told(spoilt)[0]
    assert "the output of layer '1' (DividesByZero)" in text and "`div`" in text and "running_mean" not in text
    assert spoilt[2].running_mean.isfinite().all()


def test_inside_a_container_the_innermost_layer_is_blamed():
    inner = Doubled(nn.Linear(5, 8), Doubled(nn.ReLU(), DividesByZero()), nn.LayerNorm(8), nn.Linear(8, 3))
    assert "the output of layer 'parts.1.parts.1' (DividesByZero)" in told(inner)[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_the_batch_brings_is_told_with_row_and_column_and_once(bad):
    torch.manual_seed(0)
    inputs = torch.randn(64, 5)
    inputs[19, 3] = inputs[20, 1] = bad
    text, count = told(model(lambda h, x: h.relu()), inputs, epochs=3)
    assert re.search(
        r"the batch's inputs, a tensor of shape \(16, 5\).*first in row 3, column 3; look at the data", text
    )
    assert count == "3 updates were left out as not finite: 3 for the reason given at update 2"


def test_a_target_is_told_too():
    target = torch.randn(64, 1)
    target[5] = math.nan
    text = told(nn.Linear(5, 1), target=target, loss=nn.MSELoss(), epochs=1)[0]
    assert "the batch's target" in text and "first in row 5, column 0" in text


def test_a_parameter_is_told_with_what_to_do():
    network = nn.Linear(5, 3)
    with torch.no_grad():
        network.weight[1, 2] = math.nan
    text = told(network, epochs=1)[0]
    assert "parameter 'weight' itself has 1 NaN and 0 Inf of 15 elements, first in row 1, column 2" in text
    assert "checkpoint" in text


def test_weights_that_blew_up_are_laid_to_the_learning_rate():
    network = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))
    texts = told(network, target=3 * torch.randn(64, 1), loss=nn.MSELoss(), lr=5.0, epochs=30)
    assert re.search(
        r"the loss had grown from .* the learning rate 5 seems too high; try 5e-01, a warm-up, or clip", texts[0]
    )


def test_an_overflow_of_float16_is_told_from_a_nan_of_the_model():
    inputs = torch.randn(64, 5)
    choices = {"precision": "float16", "epochs": 30, "nonfinite_limit": 3}
    overflows = told(model(lambda h, x: h * 1e6), inputs, **choices)
    assert any("float16" in text and "bfloat16" in text for text in overflows)
    nan = told(model(lambda h, x: h.log()), inputs, **choices)
    assert "`log`" in nan[0] and "in float32 too" in nan[0]


def test_a_loss_that_is_not_finite_while_its_gradients_are_is_looked_into():
    def loss(output, target):
        return (output.softmax(1) - 2).log().mean()  # NaN; the derivative of log is finite there

    texts = told(nn.Linear(5, 3), loss=loss, epochs=20, log_every=10)
    assert texts[0].startswith("the mean loss since the last report is nan")
    assert "update 11" in texts[1] and "`log`" in texts[1] and len(texts) == 2


def test_a_loss_of_the_persons_own_is_blamed_while_the_output_is_finite():
    def loss(output, target):
        return (output * 0 / (output.detach() * 0)).mean()

    line = r"\(test_training_origin\.py:\d+: return .*\)"
    assert re.search(
        f"while the model's output is finite: `div` {line} .* made it", told(nn.Linear(5, 3), loss=loss)[0]
    )


def test_what_the_loss_owns_is_told_as_its_own():
    weight = torch.tensor([1.0, math.nan, 1.0])
    text = told(nn.Linear(5, 3), loss=nn.CrossEntropyLoss(weight=weight), epochs=1)[0]
    assert "buffer 'weight' of the loss, a tensor of shape (3,), has 1 NaN" in text and "first in row 1" in text


def test_two_faults_are_two_sentences():
    torch.manual_seed(0)
    inputs = torch.randn(64, 5)
    inputs[20] = math.nan
    inputs[40, 0] = 100.0
    texts = told(model(lambda h, x: torch.where(x[:, :1] > 50, h - 1e9, h + 1e3).log()), inputs, epochs=3)
    assert "the batch's inputs" in texts[0] and "`log`" in texts[1]
    assert texts[2].startswith("6 updates were left out as not finite: 3 for the reason given at update 2, 3 for")
    assert len(texts) == 3
