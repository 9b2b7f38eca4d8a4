"""What a loss counts: accumulated micro-batches of any shape give the gradient of the one big batch, for any loss."""

import functools

import pytest
import torch
from counted_losses import (
    CE,
    CLASSES,
    CONSTANTS,
    ELEMENTWISE,
    LABELLED,
    OURS,
    Direct,
    Opaque,
    compiled,
    counted,
    network,
    of_scripted,
    scripted,
    traced,
    typed_loss,
)
from test_training_loop import Recorder
from torch import nn
from torch.nn import functional as F
from training_runs import said

import trainopt
from trainopt.training import Silent, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled_batches(empty=True):
    """Micro-batches of different sizes and lengths, of which 0 is padding; in one, 4 rows hold 3 + 1 + 0 + 0 tokens."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows, length in ((4, 5), (3, 6), (2, 5), (5, 3)):
        inputs = torch.randn(rows, length, 5, dtype=torch.float64, generator=generator)
        target = torch.randint(1, CLASSES, (rows, length), generator=generator)
        target[:, -1] = 0
        batches.append((inputs, target))
    few = batches[0][1]
    few.zero_()
    few[0, :3], few[1, 1] = 2, 3
    if empty:
        batches.insert(1, (batches[0][0] + 1, torch.zeros_like(few)))
    return batches


def batches_for(name):
    """For a row of LABELLED; a sample without any token has no mean of its own."""
    batches = labelled_batches(empty="samples" not in name)
    if "samples" in name:
        for _, target in batches:
            target[:, 0] = 1
    return batches


def assert_gradient_of_the_big_batch(batches, loss, reference):
    """One update of SGD over all micro-batches is that of sum / count over all of them."""
    ours, plain = network(), network()
    totals = [reference(plain(inputs), target) for inputs, target in batches]
    count = sum(count for _, count in totals)
    expected = sum(total for total, _ in totals) / count
    expected.backward()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    recorder = Recorder()
    choices = {"epochs": 1, "accumulation": len(batches), "validation": batches, "report": recorder}
    assert fit(ours, batches, loss, optimizer, **choices).step == 1
    for param, other, start in zip(ours.parameters(), plain.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(start - param, other.grad, rtol=1e-9, atol=1e-12)
    return recorder, expected


@pytest.mark.parametrize("name", LABELLED)
def test_the_gradient_is_that_of_the_big_batch(name):
    make, reference = LABELLED[name]
    recorder, expected = assert_gradient_of_the_big_batch(batches_for(name), make(), reference)
    assert not said(recorder, "count")
    shown = recorder.named("Progress")[-1].loss
    assert shown == pytest.approx(expected.item() + CONSTANTS.get(name, 0.0), rel=1e-6)


@pytest.mark.parametrize("name", LABELLED)
def test_the_validation_loss_is_the_mean_over_all_that_is_counted(name):
    make, reference = LABELLED[name]
    batches, model = batches_for(name), network()
    with torch.no_grad():
        totals = [reference(model(inputs), target) for inputs, target in batches]
    expected = float(sum(float(total) for total, _ in totals) / sum(count for _, count in totals))
    recorder, optimizer = Recorder(), torch.optim.SGD(model.parameters(), lr=0.0)
    fit(model, batches[-1:], make(), optimizer, epochs=1, validation=batches, report=recorder)
    assert recorder.named("Validated")[-1].loss == pytest.approx(expected + CONSTANTS.get(name, 0.0), rel=1e-6)


def compiled_in_place(loss):
    loss.compile(backend="eager")
    return loss


WRAPPED = {
    "module": CE(ignore_index=0),
    "module, ours": OURS(ignore_index=0),
    "forward": CE(ignore_index=0).forward,
    "partial": functools.partial(F.cross_entropy, ignore_index=0),
    "partial of a partial, ours": functools.partial(
        functools.partial(trainopt.functional.cross_entropy, ignore_index=0), label_smoothing=0.0
    ),
    "compiled": compiled(CE(ignore_index=0)),
    "compiled in place": compiled_in_place(CE(ignore_index=0)),
    "partial, compiled": compiled(functools.partial(F.cross_entropy, ignore_index=0)),
    "scripted": scripted(CE(ignore_index=0)),
    "traced": traced(CE(ignore_index=0), 2),
    "holder": Direct(CE(ignore_index=0)),
    "holder of ours, compiled": compiled(Direct(OURS(ignore_index=0))),
    "lambda": lambda output, target: CE(ignore_index=0)(output, target),
}


@pytest.mark.parametrize("loss", WRAPPED.values(), ids=WRAPPED)
def test_ignore_index_is_seen_through_whatever_stands_round_the_loss(loss):
    batches = [(inputs.flatten(0, 1), target.flatten()) for inputs, target in labelled_batches()]

    def reference(output, target):
        return F.cross_entropy(output, target, reduction="sum", ignore_index=0), (target != 0).sum()

    recorder, _ = assert_gradient_of_the_big_batch(batches, loss, reference)
    assert not said(recorder, "count")
    assert recorder.named("Validated")[-1].loss == recorder.named("Validated")[-1].loss  # it is no NaN


def test_tokens_that_happen_to_be_as_many_as_rows_are_not_taken_for_rows():
    """Four rows hold 3 + 1 + 0 + 0 tokens: with plain tensors the count was once taken from the shape."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 5, CLASSES, 3, dtype=torch.float64, generator=generator)
    target = torch.full((4, 3), -100)
    target[0], target[1, 1] = 2, 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 1).double()

        def forward(self, inputs):
            return self.linear(inputs.transpose(1, 3)).squeeze(-1).transpose(1, 2)

    ours, plain = Model(), Model()
    F.cross_entropy(plain(inputs), target).backward()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    choices = {"epochs": 1, "batch_size": 1, "accumulation": 4, "shuffle": False, "report": Silent()}
    fit(ours, (inputs, target), CE(), optimizer, **choices)
    torch.testing.assert_close(Model().linear.weight - ours.linear.weight, plain.linear.weight.grad)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_means_over_elements_are_weighed_by_elements(name):
    loss, reference = ELEMENTWISE[name]
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4, 5), (2, 7, 5), (4, 1, 5), (1, 2, 5)]
    batches = [
        (
            torch.randn(shape, dtype=torch.float64, generator=generator),
            torch.randn(*shape[:-1], CLASSES, dtype=torch.float64, generator=generator),
        )
        for shape in shapes
    ]
    recorder, expected = assert_gradient_of_the_big_batch(batches, loss, reference)
    assert not said(recorder, "count")
    assert recorder.named("Progress")[-1].loss == pytest.approx(expected.item(), rel=1e-6)


# What cannot be known -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: Opaque.apply(F.mse_loss(output, target, reduction="none")),
        lambda output, target: F.mse_loss(output, target).sqrt(),
        lambda output, target: F.mse_loss(output, target, reduction="sum"),
        lambda output, target: 1 - (output * target).sum() / (output.square().sum() + target.square().sum()),
    ],
    ids=["opaque", "root", "sum", "dice"],
)
def test_what_cannot_be_known_is_said_once(loss):
    batches = [(torch.randn(rows, 5).double(), torch.randn(rows, CLASSES).double()) for rows in (3, 2, 4)]
    recorder = Recorder()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fit(model, batches, loss, optimizer, epochs=3, accumulation=2, validation=batches, report=recorder)
    (text,) = said(recorder, "count")
    assert "weighed by the samples" in text and "(sum, count)" in text
    alone = Recorder()
    fit(model, batches, loss, optimizer, epochs=1, report=alone)  # nothing depends on it
    assert not said(alone, "count")


class Duck(nn.Module):
    """A loss of some other library, with the arguments that everybody has, computed where no one looks."""

    def __init__(self, ignore_index):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, "mean"

    def forward(self, output, target):
        losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
        return Opaque.apply(losses[target.flatten() != self.ignore_index])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (of_scripted(scripted(typed_loss)), "what the loss in its graph counts"),
        (of_scripted(scripted(CE(ignore_index=0))), "what the cross_entropy in it counts"),
        (of_scripted(scripted(Direct(CE(ignore_index=0)))), "what the cross_entropy in it counts"),
        (Duck(0), "not its ignore_index, 0"),
    ],
    ids=["closure of a function", "closure of a module", "closure of a holder", "module"],
)
def test_what_is_guessed_well_is_right_and_said(loss, words):
    batches = labelled_batches(empty=False)
    if "cross_entropy" in words:
        batches = [(inputs.flatten(0, 1), target.flatten()) for inputs, target in batches]
        recorder, _ = assert_gradient_of_the_big_batch(batches, loss, lambda o, t: counted(o[None], t[None]))
    else:
        recorder, _ = assert_gradient_of_the_big_batch(batches, loss, counted)
    (text,) = said(recorder, "count")
    assert words in text


def with_mse(*more):
    return lambda o, t: (F.mse_loss(o, t), *more)


#: What a loss returns, and what is said of it.
SOMETHING_ELSE = {
    "a number": (lambda o, t: 0.5, TypeError, "returned a float; .* a plain number has no gradient"),
    "an item": (lambda o, t: F.mse_loss(o, t).item(), TypeError, "returned a float"),
    "nothing": (lambda o, t: None, TypeError, "returned a NoneType"),
    "its output": (lambda o, t: (F.mse_loss(o, t), o), TypeError, r"returned \(.* with a gradient\); .*\(sum, count\)"),
    "its parts": (with_mse({"parts": 1}), TypeError, "a dict"),
    "two losses": (lambda o, t: (F.mse_loss(o, t), F.mse_loss(o, t)), TypeError, "with a gradient"),
    "three": (with_mse(1, 2), TypeError, "an? int"),
    "a bool": (with_mse(True), TypeError, "a bool"),
    "a negative count": (with_mse(-1), ValueError, "a count of -1"),
    "a dict": (lambda o, t: {"loss": F.mse_loss(o, t)}, TypeError, "returned a dict"),
    "elements": (
        lambda o, t: F.mse_loss(o, t, reduction="none"),
        ValueError,
        r"shape \(3, 4\); it must return one number",
    ),
    "no gradient": (lambda o, t: F.mse_loss(o.detach(), t), ValueError, "does not depend on any parameter"),
    "a module's sum": (nn.KLDivLoss(reduction="sum"), ValueError, "reduction 'sum'"),
    "a function's elements": (functools.partial(F.mse_loss, reduction="none"), ValueError, "reduction 'none'"),
    "a forward's sum": (nn.CrossEntropyLoss(reduction="sum").forward, ValueError, "reduction 'sum'"),
    "a z-loss": (trainopt.CrossEntropyLoss(z_loss=0.1, return_z_loss=True), ValueError, "return_z_loss"),
}


@pytest.mark.parametrize(("loss", "kind", "text"), SOMETHING_ELSE.values(), ids=SOMETHING_ELSE)
def test_a_loss_that_returns_something_else_is_refused_in_a_sentence(loss, kind, text):
    batches = [(torch.randn(3, 5).double(), torch.randn(3, CLASSES).double())] * 2
    model = network()
    with pytest.raises(kind, match=text):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, batches, loss, optimizer, epochs=1, accumulation=2, report=Silent())
    for param, start in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(param, start)
