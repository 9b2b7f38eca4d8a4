"""Steps within the backward pass of a run: the bits of ordinary ones, and what cannot be had with them."""

import pytest
import torch
from test_training_loop import Recorder, network, samples
from test_training_tail import OPTIMIZERS, Scaled, train
from torch import nn

import trainopt
from trainopt.training import Silent, fit
from trainopt.training.distributed import Processes


def assert_same(ours, others):
    assert ours[1].keys() == others[1].keys()
    assert all(torch.equal(value, others[1][name]) for name, value in ours[1].items())
    assert ours[0].step == others[0].step
    states, expected = (optimizer.state_dict()["state"] for *_, optimizer in (ours, others))
    assert states.keys() == expected.keys()  # in the order in which backward comes to them
    for index, b in expected.items():
        a = states[index]
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("choices", [{}, {"nonfinite": "ignore"}, {"precision": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_are_those_of_ordinary_steps(name, choices):
    ours, others = (train(*OPTIMIZERS[name], choices, step_in_backward=on) for on in (True, False))
    assert_same(ours, others)


def test_no_gradient_is_left_and_the_optimizer_steps_ordinarily_afterwards():
    model, left = network(), []

    class Looking(Silent):
        def progress(self, event):
            left.append([param.grad for param in model.parameters()])

    optimizer = trainopt.AdamW(model.parameters(), lr=0.01)
    choices = {"batch_size": 7, "log_every": 1, "report": Looking(), "step_in_backward": True}
    fit(model, samples(), nn.CrossEntropyLoss(), optimizer, epochs=1, **choices)
    assert left == [[None] * 4] * 4 and optimizer.completed_steps == 4
    before = model[0].weight.detach().clone()
    model(samples()[0]).sum().backward()
    assert torch.equal(model[0].weight, before) and model[0].weight.grad is not None


def test_with_an_average_a_schedule_and_checkpoints_it_goes_on_to_the_same_bits(tmp_path):
    choices = {"average": 0.9, "step_in_backward": True}
    straight = train(*OPTIMIZERS["adamw"], choices)
    for epochs in (1, 3):
        ours = train(*OPTIMIZERS["adamw"], choices, directory=tmp_path, epochs=epochs)
    assert_same(ours, straight)
    ordinary = train(*OPTIMIZERS["adamw"], {"average": 0.9})
    for name, value in straight[0].average.items():
        assert torch.equal(value, ours[0].average[name])
        torch.testing.assert_close(value, ordinary[0].average[name], rtol=1e-12, atol=0)


def test_a_loss_that_is_not_finite_is_left_out_before_anything_is_stepped():
    """And looked into, for which the micro-batch is computed again, without a step."""
    heard = [Recorder(), Recorder()]
    ours, others = (
        train(*OPTIMIZERS["adamw"], {"step_in_backward": on}, bad=[13, 27], report=report)
        for on, report in zip((True, False), heard, strict=True)
    )
    assert_same(ours, others)
    assert ours[0].step == 18
    texts, expected = ([event.text for event in each.named("Message")] for each in heard)
    assert texts == expected and "the batch's inputs" in texts[0]


def test_what_is_computed_again_steps_nothing():
    """An infinity that is gone when it is looked for: the search goes through a whole backward pass."""

    ours, others = (
        train(*OPTIMIZERS["momentum"], {"step_in_backward": on}, loss=Scaled(infinite_at=3)) for on in (True, False)
    )
    assert_same(ours, others)
    assert ours[0].step == 23


def test_a_loss_that_counts_nothing_steps_nothing():
    """What it counts is known only once it is computed; the decay would move the weights."""

    class Rare(nn.Module):
        def forward(self, output, target):
            losses = nn.functional.cross_entropy(output, target, reduction="none")
            keep = (target == 5 - target) & (target < 0)
            return (losses * keep).sum(), keep.sum()

    class Once(Rare):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, output, target):
            self.calls += 1
            if self.calls % 2:
                return super().forward(output, target)
            return nn.functional.cross_entropy(output, target, reduction="sum"), len(target)

    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    ours, others = (train(trainopt.SGD, settings, {"step_in_backward": on}, loss=Once()) for on in (True, False))
    assert_same(ours, others)
    assert ours[0].step == 12


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (torch.optim.AdamW, TypeError, "torch.optim.adamw.AdamW is not one of trainopt's optimizers"),
        (lambda p: trainopt.AdamW(p, max_grad_norm=1.0), ValueError, "max_grad_norm=1.0: the norm of all gradients"),
        (lambda p: trainopt.AdamW(p, skip_nonfinite=True), ValueError, "skip_nonfinite=True: whether a step is left"),
    ],
)
def test_optimizers_that_cannot_are_refused(make, error, words, tmp_path):
    model = network()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(error, match=words):
        fit(
            model,
            samples(),
            nn.CrossEntropyLoss(),
            make(model.parameters()),
            epochs=1,
            batch_size=7,
            directory=tmp_path / "run",
            step_in_backward=True,
        )
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls, device: cls(0, 2, device)))
    model = network()
    with pytest.raises(ValueError, match="step_in_backward is True, but the gradients are averaged over processes"):
        fit(
            model,
            samples(),
            nn.CrossEntropyLoss(),
            trainopt.AdamW(model.parameters()),
            epochs=1,
            batch_size=4,
            step_in_backward=True,
        )
