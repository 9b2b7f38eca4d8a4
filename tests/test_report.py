"""What a person sees of a run, and what its folder holds."""

import io
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import trainopt
from trainopt.training import Finished, Lines, Message, Options, Progress, Started, Validated, fit
from trainopt.training.folder import CONFIG, METRICS, Folder, plot, read_metrics, write_text
from trainopt.training.report import Several, TensorBoard, Terminal, console, duration


def started(step=0, **changes):
    known = {"model": "Net", "parameters": 7, "optimizer": "SGD", "device": "cpu", "processes": 1, "total_steps": 20}
    resumed = Path("a.pt") if step else None
    return Started(options=Options(epochs=2, seed=3), step=step, resumed_from=resumed, **{**known, **changes})


def progress(step, loss=1.0, **changes):
    known = {"epoch": 0, "lr": 0.1, "grad_norm": 2.0, "samples_per_second": 1e4, "seconds": 1.0, "seconds_left": 90.0}
    return Progress(step=step, total_steps=20, loss=loss, skipped=0, **{**known, **changes})


def validated(step, loss=1.5):
    return Validated(step, 1, loss, {"accuracy": 0.75}, 1.0, True, False, 0.1)


def finished(step, reason="finished"):
    return Finished(step, 2, reason, 0.5, 1.5, 10, 3.0, 100, None)


def message(step, text="the loss does not fall"):
    return Message(step, "warning", "loss", text, {"loss": 1.0})


def trained(report, **options):
    """A real run of 12 updates with 3 validations."""
    torch.manual_seed(0)
    x = torch.randn(24, 3)
    y = x.sum(1, keepdim=True)
    model = torch.nn.Linear(3, 1)
    optimizer = trainopt.SGD(model.parameters(), lr=0.05)
    choices = {"epochs": 3, "batch_size": 6, "log_every": 2, "seed": 0, **options}
    fit(model, (x, y), torch.nn.functional.mse_loss, optimizer, validation=(x, y), report=report, **choices)


# On a terminal, and not on one ----------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_an_interval_and_nothing_else(capsys):
    report = console()
    assert isinstance(report, Lines)
    trained(report)
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\r" not in output
    assert [line.split()[1] for line in output.splitlines() if "samples/s" in line] == ["2", "4", "6", "8", "10", "12"]


@pytest.fixture
def terminal(monkeypatch):
    """A Terminal, and the text that it has drawn into one."""
    rich = pytest.importorskip("rich.console")
    drawn = io.StringIO()
    report = Terminal()
    report.bar.live.console = rich.Console(file=drawn, force_terminal=True, width=150, _environ={"TERM": "xterm"})
    return report, drawn


def test_a_terminal_shows_what_the_run_is_doing(terminal):
    report, drawn = terminal
    report.started(started())
    report.progress(progress(5, loss=0.1234, lr=3e-4, grad_norm=7.5, samples_per_second=12345.6, seconds_left=425))
    shown = drawn.getvalue().splitlines()[-1]
    report.finished(finished(20))
    for part in ("5/20", "loss 0.1234", "lr 0.0003", "|grad| 7.5", "12,346 samples/s", "7:05 left"):
        assert part in shown, shown
    assert "skipped" not in shown


def test_a_terminal_shows_skipped_updates_and_leaves_out_what_is_not_known(terminal):
    report, drawn = terminal
    report.started(started(total_steps=None))
    event = progress(5, grad_norm=None, seconds_left=None)
    report.progress(Progress(**{**vars(event), "skipped": 3, "total_steps": None}))
    shown = drawn.getvalue().splitlines()[-1]
    report.finished(finished(20))
    assert "3 skipped" in shown and "|grad|" not in shown and "left" not in shown


def test_a_bar_starts_where_the_run_does(terminal):
    report, drawn = terminal
    report.started(started(step=12))
    report.finished(finished(20))
    assert "12/20" in drawn.getvalue()


def test_validations_and_messages_are_said_above_the_bar(terminal, capsys):
    report, drawn = terminal
    report.started(started())
    report.validated(validated(5))
    report.message(message(5))
    report.finished(finished(20))
    said = drawn.getvalue() + capsys.readouterr().out
    assert "validation loss 1.5000" in said and "accuracy 0.75" in said and "the loss does not fall" in said


def test_a_terminal_starts_no_thread(terminal):
    import threading

    report, _ = terminal
    before = threading.active_count()
    report.started(started())
    assert threading.active_count() == before
    report.finished(finished(20))


def test_a_run_that_was_refused_still_ends_on_a_terminal(terminal):
    report, _ = terminal
    report.finished(finished(0, "ValueError"))


def test_a_terminal_without_rich_gets_lines(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert isinstance(console(), Lines)


def test_a_terminal_with_rich_gets_the_bar(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(console(), Terminal)


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (0.2, "1 s"), (59, "59 s"), (59.5, "1:00"), (425, "7:05"), (7625, "2:07:05")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_several_reporters_hear_the_same_in_order():
    heard = []

    class Ear:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, event):
            return lambda value: heard.append((self.name, event, value))

    report = Several(Ear("a"), Ear("b"))
    events = {"started": 1, "progress": 2, "validated": 3, "message": 4, "finished": 5}
    for name, value in events.items():
        getattr(report, name)(value)
    assert heard == [(ear, name, value) for name, value in events.items() for ear in "ab"]


def test_nothing_is_read_from_the_device_between_two_intervals():
    """`.item()` and its kin are called for what is shown, not for every update or micro-batch."""

    def reads(log_every):
        counted = 0

        class Counting(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
                nonlocal counted
                counted += function is torch.ops.aten._local_scalar_dense.default
                return function(*arguments, **(keywords or {}))

        with Counting():
            trained(Lines(io.StringIO()), log_every=log_every, nonfinite="ignore", accumulation=2)
        return counted

    once, six = reads(6), reads(1)
    assert once < six
    assert (six - once) % 5 == 0  # the same few for each of the five events more


# The folder -----------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run(tmp_path):
    trained(Several(Folder(tmp_path / "runs" / "a", {"name": "a"})), average=0.9)
    config = json.loads((tmp_path / "runs" / "a" / CONFIG).read_text())
    assert config["settings"] == {"name": "a"}
    assert config["options"]["epochs"] == 3 and config["options"]["average"] == 0.9
    assert config["model"] == "Linear" and config["optimizer"] == "SGD" and config["parameters"] == 4
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["trainopt"] == trainopt.__version__
    entries = read_metrics(tmp_path / "runs" / "a")
    kinds = [entry["event"] for entry in entries]
    assert kinds.count("progress") == 6 and kinds.count("validated") == 3 and kinds[-1] == "finished"
    assert [entry["step"] for entry in entries] == sorted(entry["step"] for entry in entries)
    for entry in entries:
        if entry["event"] == "progress":
            assert entry["loss"] > 0 and entry["lr"] == 0.05 and entry["grad_norm"] > 0
            assert entry["samples_per_second"] > 0


def test_numbers_that_are_not_finite_are_null(tmp_path):
    folder = Folder(tmp_path, {"data": Path("x")})
    folder.started(started())
    folder.progress(progress(2, loss=math.nan, grad_norm=math.inf))
    [line] = (tmp_path / METRICS).read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert entry["loss"] is None and entry["grad_norm"] is None and entry["step"] == 2
    assert json.loads((tmp_path / CONFIG).read_text())["settings"] == {"data": "x"}


def test_a_run_that_carries_on_makes_later_lines_anew(tmp_path):
    first = Folder(tmp_path)
    first.started(started())
    for step in (2, 4, 6):
        first.progress(progress(step))
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"event": "progress", "st')  # killed while it wrote
    second = Folder(tmp_path)
    second.started(started(step=4))
    second.progress(progress(6, loss=9.0))
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [(2, 1.0), (4, 1.0), (6, 9.0)]


def test_a_run_that_begins_anew_keeps_no_lines(tmp_path):
    for _ in range(2):
        folder = Folder(tmp_path)
        folder.started(started())
        folder.progress(progress(2))
    assert len(read_metrics(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, METRICS]


def test_a_run_that_was_refused_leaves_nothing_behind(tmp_path):
    Folder(tmp_path / "a").finished(finished(0, "ValueError"))
    assert not (tmp_path / "a").exists()


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_text(tmp_path / CONFIG, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / CONFIG, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(CONFIG, "old")]


def test_lines_that_cannot_be_written_are_missed_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    folder = Folder(tmp_path)
    folder.started(started())
    folder.progress(progress(2))
    before = (tmp_path / METRICS).read_text()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    folder.progress(progress(4))
    folder.progress(progress(6))
    monkeypatch.undo()
    folder.progress(progress(8))
    assert (tmp_path / METRICS).read_text().startswith(before)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [2, 8]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_folder_without_numbers_is_read_as_empty(tmp_path):
    assert read_metrics(tmp_path) == []


# The picture ----------------------------------------------------------------------------------------------------------


def test_a_picture_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    trained(Folder(tmp_path))
    target = plot(tmp_path)
    assert target == tmp_path / "metrics.png"
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000


def test_what_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    folder = Folder(tmp_path)
    folder.started(started())
    for step, loss in ((2, 3.0), (4, math.nan), (6, 1.0)):
        folder.progress(progress(step, loss=loss, lr=step / 10, grad_norm=None if step == 2 else step))
    folder.validated(validated(5, loss=2.0))
    plot(tmp_path)
    lines = {line.get_label(): line for axes in drawn[0].axes for line in axes.get_lines()}

    def points(label):
        return [(x, None if math.isnan(y) else y) for x, y in zip(*lines[label].get_data(), strict=True)]

    assert points("training") == [(2, 3.0), (4, None), (6, 1.0)]
    assert points("validation") == [(5, 2.0)]
    assert points("learning rate") == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert points("gradient norm") == [(2, None), (4, 4), (6, 6)]


def test_without_numbers_there_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="no numbers to draw"):
        plot(tmp_path)


# TensorBoard ----------------------------------------------------------------------------------------------------------


def test_what_tensorboard_is_given(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, path, purge_step):
            calls.append(("open", path, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def add_text(self, name, text, step):
            calls.append((name, text, step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    report = TensorBoard(tmp_path)
    report.started(started(step=4))
    report.progress(progress(6, grad_norm=None, update_ratio=2e-3))
    report.validated(validated(6))
    report.message(message(6))
    report.finished(finished(6))
    assert calls == [
        ("open", str(tmp_path), 5),
        ("loss/training", 1.0, 6),
        ("learning rate", 0.1, 6),
        ("update to weights", 2e-3, 6),
        ("samples per second", 1e4, 6),
        ("loss/validation", 1.5, 6),
        ("accuracy", 0.75, 6),
        ("loss", "the loss does not fall", 6),
        "close",
    ]
    TensorBoard(tmp_path).finished(finished(0, "ValueError"))  # a run that was refused


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss/training")] == [2, 4, 6, 8, 10, 12]
    assert [scalar.step for scalar in events.Scalars("loss/validation")] == [4, 8, 12]
