"""The options of the command line and of files: one table for both, what they take, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch

from trainopt import experiments
from trainopt.cli import lr_find, main, options
from trainopt.cli import train as train_command
from trainopt.cli.settings import read
from trainopt.experiments import digits
from trainopt.training.fields import FLAG, FOLDER_NAME, Option, choice, options_of, real, whole

pytestmark = pytest.mark.usefixtures("own_folder", "one_thread")

EXPERIMENTS = [experiments.load(name) for name in experiments.NAMES]
EVERY_OPTION = {
    option.name: option
    for table in (
        *options.with_defaults(options.of_training(), {}).values(),
        options_of(lr_find.RangeTest),
        *(options_of(module.Options) for module in EXPERIMENTS),
    )
    for option in table
}


def status_of(arguments):
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def refused(arguments, capsys):
    """What a refused command says; nothing may have been written."""
    before = sorted(Path().rglob("*"))
    assert status_of(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sorted(Path().rglob("*")) == before
    [line] = captured.err.splitlines()
    return line


# One table for the command line and the file -------------------------------------------------------------------------


def values_of(arguments, *table):
    return read(arguments, "prog", "", {"all": table})[0]


def an_example(option):
    """A value that is not the default."""
    if option.kind is FLAG:
        return not option.default
    for text in ("full", "0.5", "2", "3", "100", "cosine", "adamw", "float16", "cuda", "stop", "some-name"):
        try:
            value = option.kind.parse(text)
        except ValueError:
            continue
        if value != option.default:
            return value
    raise AssertionError(option)


@pytest.mark.parametrize("option", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_file_and_command_line_agree(option):
    value = an_example(option)
    if option.kind is FLAG:
        arguments = [f"--{option.name}" if value else f"--no-{option.name}"]
    else:
        arguments = [f"--{option.name}={value}"]
    for key in (option.name, option.key):
        Path("options.toml").write_text(f"{key} = {json.dumps(value)}\n")
        by_file = vars(values_of(["--config", "options.toml"], option))
        assert by_file == vars(values_of(arguments, option)) == {option.key: value}
        assert type(by_file[option.key]) is type(value)
    assert vars(values_of([], option)) == {option.key: option.default}


@pytest.mark.parametrize("option", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_every_option_has_a_help_line_with_its_default(option, capsys):
    with pytest.raises(SystemExit) as stop:
        values_of(["--help"], option)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"--{option.name}" in text and option.help in text
    default = option.shown or {None: "none", True: "on", False: "off"}.get(
        option.default if option.kind is FLAG or option.default is None else "", str(option.default)
    )
    assert f"(default: {default})" in text


def test_the_command_line_wins_over_the_file():
    Path("options.toml").write_text("epochs = 3\nsteps = 4\n")
    chosen = values_of(["--config", "options.toml", "--steps", "5"], *options.of_training()["training"])
    assert (chosen.epochs, chosen.steps) == (3, 5)


SAID_WRONG = [
    ("epoch = 3", ["unknown key epoch", "did you mean epochs?"]),
    ("learning_rate = 3", ["unknown key learning_rate", "did you mean lr?"]),
    ("max_grad_norm = 3", ["unknown key max_grad_norm", "did you mean clip?"]),
    (f"epochs = {'9' * 5000}", ["not TOML", "4300 digits"]),
    (f"epochs = 0x{'f' * 5000}", ["epochs", "4300 digits"]),
    (f"epochs = {2**63}", ["epochs", str(2**63), "below 2**63"]),
    (f"lr = {'9' * 400}.0", ["lr", "inf"]),
    ("lr = 1e999", ["lr", "inf"]),
    ("lr = nan", ["lr", "nan"]),
    (f"lr = {'[' * 5000}{']' * 5000}", ["options.toml", "nested too deeply"]),
    (f"lr = {'[' * 150}{']' * 150}", ["lr", "[[["]),
    (f"lr = {'{a = ' * 5000}1{'}' * 5000}", ["options.toml", "nested too deeply"]),
    (f"{'a' * 5000} = 1", ["unknown key aaa", "…"]),
    (f'lr = "{"x" * 5000}"', ["lr", "xxx", "…"]),
    ("lr = 1979-13-45", ["not TOML"]),
    ("lr = 1979-05-27", ["lr", "1979-05-27"]),
    ("lr = -1", ["lr", "'-1'"]),
    ('lr = "fast"', ["lr", "'fast'"]),
    ("lr = true", ["lr", "'true'"]),
    ("lr = [1, 2]", ["lr", "[1, 2]"]),
    ("epochs = 1.5", ["epochs", "'1.5'"]),
    ("plot = 1", ["plot", "1", "neither true nor false"]),
    ('optimizer = "adamx"', ["optimizer", "'adamx'", "did you mean adam"]),
    ("[optimizer]\nlr = 1", ["optimizer"]),
    ("lr = ", ["not TOML"]),
]


@pytest.mark.parametrize("content, words", SAID_WRONG, ids=[content[:30] for content, _ in SAID_WRONG])
def test_what_a_file_says_wrong_is_refused_by_key_and_value(content, words, capsys):
    Path("options.toml").write_text(content)
    said = refused(["train", "digits", "--config", "options.toml"], capsys)
    assert all(word in said for word in ["options.toml", *words]), said


def test_a_file_that_is_not_there(capsys):
    said = refused(["train", "digits", "--config", "none.toml"], capsys)
    assert "--config" in said and "none.toml" in said and "No such file" in said


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (whole(1), {"1": 1, "70000": 70000}, ["0", "-1", "1.5", "x", "", "inf", "nan"]),
        (whole(0, 5), {"0": 0, "5": 5}, ["6", "-1"]),
        (real(0), {"0": 0.0, "1e-3": 1e-3}, ["-0.1", "nan", "inf", "x"]),
        (real(0, above=True), {"1e-9": 1e-9}, ["0", "-1"]),
        (real(0, 1), {"0": 0.0, "1": 1.0}, ["1.01"]),
        (choice("a", "b"), {"a": "a"}, ["c", "A", ""]),
        (whole(1, word="full"), {"full": "full", "3": 3}, ["0", "half"]),
        (FOLDER_NAME, {"a-1": "a-1"}, ["", ".", "..", "a/b", "/a"]),
    ],
)
def test_kinds(kind, good, bad):
    for text, value in good.items():
        assert kind.parse(text) == value and type(kind.parse(text)) is type(value)
    for text in bad:
        with pytest.raises(ValueError) as refusal:
            kind.parse(text)
        assert repr(text) in str(refusal.value)


def test_an_option_that_is_off_says_so():
    assert Option("plot", FLAG, False, "draw").help_line() == "draw (default: off)"
    assert Option("steps", whole(1), 1, "updates").help_line() == "updates (default: 1)"


# Refusals -------------------------------------------------------------------------------------------------------------


REFUSED_OF_TRAIN = [
    (["--lrr=1"], ["--lrr", "did you mean --lr?"]),
    (["--learning-rate", "1"], ["--learning-rate", "did you mean --lr?"]),
    (["--learning_rate=1"], ["--learning_rate=1", "did you mean --lr?"]),
    (["--max-steps=3"], ["--max-steps", "did you mean --steps?"]),
    (["--wd=0.1"], ["--wd", "did you mean --weight-decay?"]),
    (["--gradient-accumulation-steps=2"], ["did you mean --accumulation?"]),
    (["--ema=0.9"], ["did you mean --average?"]),
    ([f"--steps={10**30}"], ["--steps", "below 2**63"]),
    ([f"--accumulation={'9' * 5000}"], ["--accumulation", "…"]),
    (["--epoch", "3"], ["--epoch", "did you mean --epochs?"]),
    (["--optimizer=adabelief"], ["--optimizer", "'adabelief'"]),
    (["--optimizer=adamm"], ["'adamm'", "did you mean adam"]),
    (["--lr=-1"], ["--lr", "-1"]),
    (["--lr=nan"], ["--lr", "nan"]),
    (["--lr=inf"], ["--lr", "inf"]),
    (["--lr=fast"], ["--lr", "fast"]),
    (["--lr"], ["--lr"]),
    (["--epochs=0"], ["--epochs", "0"]),
    (["--epochs=1.5"], ["--epochs", "1.5"]),
    (["--epochs=nine"], ["--epochs", "nine"]),
    (["--epochs=3", "--steps=4"], ["--steps", "4", "--epochs 3"]),
    (["--batch-size=0"], ["--batch-size", "0"]),
    (["--batch-size=4001"], ["--batch-size", "4001", "4,000"]),
    (["--batch-size=half"], ["--batch-size", "half", "full"]),
    (["--accumulation=0"], ["--accumulation", "0"]),
    (["--clip=0"], ["--clip", "0"]),
    (["--average=1.5"], ["--average", "1.5"]),
    (["--average=1"], ["--average", "'1'", "less than 1"]),
    (["--momentum=-0.1"], ["--momentum", "-0.1"]),
    (["--momentum=0.9"], ["--momentum", "0.9", "sgd", "adam"]),
    (["--weight-decay=-1"], ["--weight-decay", "-1"]),
    (["--l1=-1"], ["--l1", "-1"]),
    (["--noise=-1"], ["--noise", "-1"]),
    (["--seed=-1"], ["--seed", "-1"]),
    (["--threads=0"], ["--threads", "0"]),
    (["--schedule=cosin"], ["--schedule", "'cosin'", "did you mean cosine?"]),
    (["--precision=float8"], ["--precision", "float8"]),
    (["--state-dtype=float64"], ["--state-dtype", "'float64'", "'bfloat16'", "'8bit'"]),
    (["--step-in-backward", "--clip=2"], ["--step-in-backward", "--clip 2.0", "when backward has ended"]),
    (["--step-in-backward", "--accumulation=2"], ["--step-in-backward", "--accumulation 2"]),
    (["--step-in-backward", "--precision=float16"], ["--step-in-backward", "--precision float16", "GradScaler"]),
    (["--name=a/b"], ["--name", "a/b"]),
    (["--data=nowhere"], ["--data", "'nowhere'"]),
    (["--compare"], ["--compare", "python -m benchmarks.twin"]),
    (["extra"], ["extra"]),
]


@pytest.mark.parametrize("arguments, words", REFUSED_OF_TRAIN, ids=[" ".join(row[0])[:40] for row in REFUSED_OF_TRAIN])
def test_bad_options_are_refused_before_anything_is_read(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(digits, "embedded_digits", lambda seed: pytest.fail("read"))
    said = refused(["train", "digits", *arguments], capsys)
    assert said.startswith("trainopt train digits: error: ")
    assert all(word in said for word in words), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(capsys):
    assert "'cuda'" in refused(["train", "digits", "--device=cuda"], capsys)


@pytest.mark.parametrize("option, package", train_command.EXTRAS.items())
def test_a_package_that_is_not_there_is_named_before_the_run(option, package, capsys, monkeypatch):
    monkeypatch.setattr(train_command.importlib.util, "find_spec", lambda name: None)
    said = refused(["train", "digits", f"--{option}"], capsys)
    assert f"--{option}" in said and package in said and f"trainopt[{option}]" in said


REFUSED = [
    (["trian", "digits"], ["'trian'", "did you mean train?"]),
    (["train", "digit"], ["'digit'", "did you mean digits?"]),
    (["lr-find", "charml"], ["'charml'", "did you mean charlm?"]),
    (["info", "now"], ["info", "now"]),
    (["bench", "optimizer"], ["'optimizer'", "did you mean optimizers?"]),
    (["lr-find", "digits", "--lowest=1", "--highest=0.1"], ["--lowest", "1", "--highest 0.1"]),
    (["lr-find", "digits", "--plot=nowhere/curve.png"], ["--plot", "nowhere/curve.png"]),
    (["lr-find", "digits", "--updates=1"], ["--updates", "1"]),
    (["lr-find", "digits", "--epochs=1"], ["--epochs"]),
    (["train", "charlm", "--width=33"], ["--width", "33", "--heads 5"]),
]


@pytest.mark.parametrize("arguments, words", REFUSED, ids=[" ".join(row[0])[:40] for row in REFUSED])
def test_other_refusals(arguments, words, capsys):
    said = refused(arguments, capsys)
    assert all(word in said for word in words), said


def test_an_experiment_must_be_named(capsys):
    assert main(["train"]) == 2
    assert "digits, charlm" in capsys.readouterr().out
