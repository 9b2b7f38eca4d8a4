"""Muon in a training run, on the command line, and in the lists of the optimizers."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import trainopt
from trainopt.cli import main, options
from trainopt.experiments import digits
from trainopt.info import main as info
from trainopt.optim import registry
from trainopt.training import Silent, fit
from trainopt.training.fields import options_of

pytestmark = pytest.mark.usefixtures("one_thread", "own_folder")

LR = 0.02


def fitted(*, adamw=None, **choices):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(9, 9), nn.Tanh())), nn.Linear(9, 3)
    ).double()
    optimizer = trainopt.Muon(trainopt.muon_groups(model), LR, adamw=adamw)
    inputs = torch.randn(40, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    choices = {"epochs": 2, "batch_size": 5, "seed": 0, "report": Silent(), **choices}
    result = fit(model, (inputs, torch.arange(40) % 3), nn.CrossEntropyLoss(), optimizer, **choices)
    assert result.step == optimizer.completed_steps == 16
    return model.state_dict(), result.average


def test_a_run_steps_within_backward():
    ours, ordinary = (fitted(average=0.9, step_in_backward=on) for on in (True, False))
    for found, want in zip(ours, ordinary, strict=True):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    clipped = fitted(clip=1e-6)[0]
    assert not torch.allclose(clipped["0.weight"], ordinary[0]["0.weight"], rtol=1e-3)


def test_a_run_says_which_states_can_have_another_dtype():
    with pytest.raises(ValueError, match=r"state_dtype is '8bit', but optimizer is a Muon: .*optimizer\.adamw"):
        fitted(state_dtype="8bit")


OWN = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}
RUNS = {
    "defaults": ("", {}, {}),
    "options": ("--lr=0.01 --weight-decay=0.5 --momentum=0.8", {"lr": 0.01, "weight_decay": 0.5, "momentum": 0.8}, {}),
    "clipped and averaged": ("--clip=0.1 --average=0.5", {}, {"clip": 0.1, "average": 0.5}),
    "within backward": ("--step-in-backward", {}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_command_line_is_the_run_by_hand(name, few_digits, capsys):
    arguments, chosen, choices = RUNS[name]
    settings = {**OWN, **chosen}
    command = ["train", "digits", "--optimizer=muon", "--epochs=1", "--batch-size=10", "--threads=1", "--name=a"]
    assert main([*command, *arguments.split()]) == 0
    assert f"Muon: lr {settings['lr']:g}, " in capsys.readouterr().out
    (path,) = Path("runs/a/checkpoints").iterdir()
    problem = digits.make(SimpleNamespace(data=None, seed=0, batch_size=10))
    first, first_bias, last, last_bias = problem.model.parameters()
    adamw = {"use_muon": False, "lr": settings["lr"]}
    groups = [
        {"params": [first]},
        {"params": [last], "weight_decay": settings["weight_decay"], **adamw},
        {"params": [first_bias, last_bias], "weight_decay": 0.0, **adamw},
    ]
    optimizer = trainopt.Muon(groups, **settings, adjust_lr_fn="match_rms_adamw")
    fit(
        problem.model,
        problem.data,
        problem.loss,
        optimizer,
        epochs=1,
        batch_size=10,
        seed=0,
        report=Silent(),
        **choices,
    )
    saved = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(saved[key], value) for key, value in problem.model.state_dict().items())


REFUSED = [
    (["--l1=0.1"], "--l1: 0.1 is for every --optimizer but muon"),
    (["--noise=0.1"], "--noise: 0.1 is for every --optimizer but muon"),
    (["--state-dtype=8bit"], "--state-dtype: 8bit is for every --optimizer but muon"),
    (["--step-in-backward", "--clip=2"], "--step-in-backward: it does not go with --clip 2.0"),
    (["--optimizer=muom"], "did you mean muon?"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_options_that_do_not_go_with_muon_are_refused(arguments, words, few_digits, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits", "--optimizer=muon", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not list(Path().iterdir())


def test_a_learning_rate_is_found(few_digits, capsys):
    command = ["lr-find", "digits", "--batch-size=10", "--updates=20", "--threads=1", "--optimizer=muon"]
    assert main(command) == 0 and "learning rate " in capsys.readouterr().out


def test_every_list_of_the_optimizers_has_all_of_them(capsys):
    assert registry.every()["Muon"] is trainopt.Muon and "Muon" not in registry.OPTIMIZERS
    info()
    assert registry.every().keys() <= {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    texts = {option.key: option.help for option in options_of(options.Optimizer)}

    def named(text):
        return set(re.findall("[a-z0-9]+", text)) & set(options.OPTIMIZERS)

    assert named(texts["optimizer"]) == set(options.OPTIMIZERS)
    assert named(texts["momentum"]) == set(options.TAKING["momentum"])
    others = {"lr": ("adamwschedulefree", "radamschedulefree"), "weight_decay": options.WEIGHT_DECAYS}
    for key, defaults in (("lr", options.LEARNING_RATES), ("weight_decay", options.WEIGHT_DECAYS)):
        said = dict.fromkeys(others[key], 0.0025 if key == "lr" else 0.0)
        for value, names in re.findall(r"([\d.]+) for ([a-z, ]+)", texts[key].partition("None: ")[2]):
            said |= dict.fromkeys(named(names), float(value))
        assert said == defaults
