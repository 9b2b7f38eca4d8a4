"""A run that is stopped or killed at any moment ends in the same bits as one that is left alone."""

import errno
import itertools
import multiprocessing
import os
import random
import time

import pytest
import torch
import training_runs
from test_training_loop import Recorder
from torch import nn
from training_runs import assert_same

import trainopt
from trainopt.training import Silent, checkpoint, fit
from trainopt.training.checkpoint import Checkpoints, CorruptCheckpoint, plain, read, write

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training_runs", "torch._dynamo"])  # what the first optimizer imports


def start(*arguments, **choices):
    """The run in a new process."""
    process = SERVER.Process(target=training_runs.train, args=arguments, kwargs=choices)
    process.start()
    return process


def run(*arguments, **choices):
    process = start(*arguments, **choices)
    process.join(120)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run ends in when nothing stops it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder / "run", folder / "final.pt")
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.parametrize("micro_step", range(1, 22))
def test_a_run_stopped_after_any_micro_step_goes_on_to_the_same_bits(micro_step, tmp_path, undisturbed):
    run(tmp_path / "run", tmp_path / "final.pt", stop_at=micro_step)
    assert not (tmp_path / "final.pt").exists() or micro_step == 21
    run(tmp_path / "run", tmp_path / "final.pt", seed=17)  # a seed of its own: all must come from the checkpoint
    assert_same(undisturbed, torch.load(tmp_path / "final.pt", weights_only=True))


def test_a_run_stopped_after_every_micro_step_goes_on_to_the_same_bits(tmp_path, undisturbed):
    for seed in itertools.count():
        run(tmp_path / "run", tmp_path / "final.pt", stop_at=1, seed=seed)
        if (tmp_path / "final.pt").exists():
            break
    assert seed == 21
    assert_same(undisturbed, torch.load(tmp_path / "final.pt", weights_only=True))


@pytest.mark.slow
def test_workers_draw_again_what_they_drew(tmp_path):
    run(tmp_path / "a", tmp_path / "a.pt", workers=2, epochs=2)
    run(tmp_path / "b", tmp_path / "b.pt", workers=2, epochs=2, stop_at=11)
    run(tmp_path / "b", tmp_path / "b.pt", workers=2, epochs=2, seed=17)
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert_same(first, second)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(tmp_path):
    long = {"epochs": 400, "checkpoint_every": 3, "validate_every": 100}
    run(tmp_path / "left alone", tmp_path / "left alone.pt", **long)
    moment = random.Random(0)
    found = set()
    for seed in range(20):
        process = start(tmp_path / "killed", tmp_path / "killed.pt", seed=seed, **long)
        folder = tmp_path / "killed" / "checkpoints"
        before = newest(folder)
        deadline = time.monotonic() + 30
        while newest(folder) == before and time.monotonic() < deadline:  # it has carried on
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -9, "it ended before it was killed: give it more epochs"
        found.add(newest(folder))
        assert 1 <= len([path for path in folder.iterdir() if path.suffix == ".pt"]) <= 4
    assert len(found) == 20
    run(tmp_path / "killed", tmp_path / "killed.pt", seed=99, **long)
    names = ("left alone.pt", "killed.pt")
    assert_same(*(torch.load(tmp_path / name, weights_only=True) for name in names))
    assert not list(folder.glob("*.partial"))


def newest(folder):
    paths = Checkpoints(folder, 3).paths()
    return paths[0].name if paths else None


# One file -----------------------------------------------------------------------------------------------------------


def small_fit(directory, report=None, width=4, **choices):
    torch.manual_seed(0)
    model = nn.Linear(3, width)
    data = (torch.randn(20, 3), torch.randint(0, 4, (20,)))
    optimizer = trainopt.SGD(model.parameters(), lr=0.1, momentum=0.9)
    choices = {"steps": 10, "batch_size": 5, "checkpoint_every": 2, "seed": 3, **choices}
    return model, fit(
        model, data, nn.CrossEntropyLoss(), optimizer, directory=directory, report=report or Silent(), **choices
    )


def damage_end(data):
    return data[:-7]


def damage_half(data):
    return data[: len(data) // 2]


def damage_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def damage_all(data):
    return b""


@pytest.mark.parametrize("damage", [damage_end, damage_half, damage_bit, damage_all])
def test_a_damaged_checkpoint_is_named_and_skipped(damage, tmp_path):
    expected, _ = small_fit(tmp_path / "a")
    small_fit(tmp_path / "b", steps=7)
    newest, older = Checkpoints(tmp_path / "b" / "checkpoints", 3).paths()[:2]
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(CorruptCheckpoint):
        read(newest)
    heard = Recorder()
    model, result = small_fit(tmp_path / "b", heard)
    assert any(str(newest) in message.text and message.topic == "checkpoint" for message in heard.named("Message"))
    assert not any(str(older) in message.text for message in heard.named("Message"))
    assert result.step == 10 and torch.equal(model.weight, expected.weight)


def test_every_damaged_byte_is_noticed(tmp_path):
    write({"x": torch.arange(5)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for i in range(0, len(whole), 13):
        (tmp_path / "x.pt").write_bytes(whole[:i] + bytes([whole[i] ^ 0x80]) + whole[i + 1 :])
        with pytest.raises(CorruptCheckpoint):
            read(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(whole)
    assert torch.equal(read(tmp_path / "x.pt")["x"], torch.arange(5))


def test_a_checkpoint_is_an_ordinary_file_of_torch(tmp_path):
    model, result = small_fit(tmp_path, average=0.9)
    state = torch.load(result.checkpoint, weights_only=True)
    assert torch.equal(state["model"]["weight"], model.weight)
    assert state["counters"]["step"] == 10 and state["average"]["count"] == 10


def test_the_last_n_are_kept(tmp_path):
    small_fit(tmp_path, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000008.pt", "step-000000010.pt"]


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("room", [0, 100, 2000, 4000])
def test_a_full_disk_loses_nothing_that_is_saved(room, tmp_path, monkeypatch):
    _, before = small_fit(tmp_path, steps=4)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert len(saved) == 2 and all(len(data) > 4000 for data in saved.values())
    with monkeypatch.context() as patch:
        opened = open
        patch.setattr(
            checkpoint,
            "open",
            lambda path, mode: FullDisk(opened(path, mode), room) if "w" in mode else opened(path, mode),
            raising=False,
        )
        heard = Recorder()
        model, result = small_fit(tmp_path, heard)
    assert result.step == 10 and result.checkpoint == before.checkpoint
    troubles = [message.text for message in heard.named("Message") if message.topic == "checkpoint"]
    assert troubles and all("No space left" in text and str(before.checkpoint) in text for text in troubles)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == saved
    again, result = small_fit(tmp_path)  # there is room again
    assert torch.equal(again.weight, model.weight) and result.checkpoint.name == "step-000000010.pt"


def test_a_directory_that_cannot_be_written_is_refused_before_anything(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"directory: .*file' is not a directory"):
        small_fit(tmp_path / "file" / "run")

    def refuse(**where):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"directory: cannot write in .*Permission denied"):
        small_fit(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_becomes_unwritable_loses_nothing(tmp_path, monkeypatch):
    _, before = small_fit(tmp_path, steps=4)

    def refuse(partial, path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", refuse)
        heard = Recorder()
        _, result = small_fit(tmp_path, heard)
    assert result.step == 10 and result.checkpoint == before.checkpoint
    assert any("Permission denied" in message.text for message in heard.named("Message"))
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert small_fit(tmp_path, steps=4)[1].step == 4


def test_a_checkpoint_of_something_else_is_refused_with_nothing_changed(tmp_path):
    _, result = small_fit(tmp_path, steps=4)
    files = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(
        ValueError, match=r"another model: weight is float32 \(4, 3\) there and float32 \(5, 3\) here"
    ) as e:
        small_fit(tmp_path, width=5)
    assert str(result.checkpoint) in str(e.value)
    with pytest.raises(ValueError, match="batch_size is 5 there and 10 here"):
        small_fit(tmp_path, batch_size=10)
    with pytest.raises(ValueError, match=r"seed is 4, but .* with seed 3"):
        small_fit(tmp_path, seed=4)
    with pytest.raises(ValueError, match=r"resume is False, but .* has checkpoints"):
        small_fit(tmp_path, resume=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == files


def test_a_finished_run_is_not_trained_again(tmp_path):
    model, first = small_fit(tmp_path)
    again, second = small_fit(tmp_path)
    assert second.step == first.step == 10 and torch.equal(model.weight, again.weight)
    longer, third = small_fit(tmp_path, steps=12)
    straight, _ = small_fit(tmp_path / "other", steps=12)
    assert third.step == 12 and torch.equal(longer.weight, straight.weight)


def test_plain_takes_what_a_state_can_hold_and_names_what_it_cannot():
    import numpy as np

    state = plain({"a": np.float64(0.5), "b": [np.int64(2), (None, True)], "c": torch.arange(100)[3:5]})
    assert type(state["a"]) is float and type(state["b"][0]) is int and state["b"][1] == (None, True)
    assert state["c"].untyped_storage().nbytes() == 16
    with pytest.raises(TypeError, match=r"the state\['a'\]\[1\] is a function"):
        plain({"a": [1, lambda: 0]})


# With the defaults ----------------------------------------------------------------------------------------------------


def default_fit(directory, epochs=4, heard=None, model_of=lambda: nn.Linear(3, 4), **choices):
    """A run of 4 updates an epoch that says nothing of checkpoints."""
    torch.manual_seed(0)
    model = model_of()
    data = (torch.randn(20, 3), torch.randint(0, 4, (20,)))
    optimizer = choices.pop("optimizer", None) or trainopt.SGD(model.parameters(), lr=choices.pop("lr", 0.1))
    make = choices.pop("schedule", None)
    choices = {"epochs": epochs, "batch_size": 5, "seed": 3, "directory": directory, **choices}
    choices["report"] = heard or Silent()
    schedule = None if make is None else make(optimizer)
    return model, fit(model, data, nn.CrossEntropyLoss(), optimizer, schedule=schedule, **choices)


def steps_saved(directory):
    return [int(path.stem.removeprefix("step-")) for path in Checkpoints(directory / "checkpoints", 9).paths()][::-1]


class Dying(nn.Module):
    """A model that ends its process, without a word, in the n-th forward pass in training."""

    def __init__(self, call):
        super().__init__()
        self.layer, self.call, self.calls = nn.Linear(3, 4), call, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == self.call:
            os._exit(9)
        return self.layer(x)


def die(directory, call, is_validated):
    validation = (torch.randn(6, 3), torch.randint(0, 4, (6,))) if is_validated else None
    default_fit(directory, 100, model_of=lambda: Dying(call), validation=validation)


@pytest.mark.parametrize("is_validated", [True, False])
def test_a_small_run_that_is_killed_with_the_defaults_has_a_checkpoint(is_validated, tmp_path):
    process = SERVER.Process(target=die, args=(tmp_path, 45, is_validated))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    steps = steps_saved(tmp_path)
    assert steps == [36, 40, 44] if is_validated else steps and steps[-1] <= 44


def test_by_default_there_is_a_checkpoint_at_every_validation(tmp_path):
    validation = (torch.randn(6, 3), torch.randint(0, 4, (6,)))
    default_fit(tmp_path / "epochs", validation=validation, keep=20)
    assert steps_saved(tmp_path / "epochs") == [4, 8, 12, 16]
    default_fit(tmp_path / "updates", validation=validation, validate_every=3, keep=20)
    assert steps_saved(tmp_path / "updates") == [3, 6, 9, 12, 15, 16]
    default_fit(tmp_path / "every", validation=validation, checkpoint_every=5, keep=20)
    assert steps_saved(tmp_path / "every") == [5, 10, 15, 16]


def test_after_so_many_minutes_there_is_a_checkpoint(tmp_path, monkeypatch):
    """Each look at the clock takes a second here, so that there is one about every ten updates."""
    from trainopt.training import saving

    clock = itertools.count()
    monkeypatch.setattr(saving, "perf_counter", lambda: float(next(clock)))
    default_fit(tmp_path, 10, checkpoint_every=1000, checkpoint_minutes=1 / 6, keep=20)
    steps = steps_saved(tmp_path)
    assert 2 < len(steps) < 10 and steps[-1] == 40
    with pytest.raises(ValueError, match=r"checkpoint_minutes is 0; it must be a number greater than 0"):
        default_fit(tmp_path, checkpoint_minutes=0)


def test_a_run_of_many_short_epochs_does_not_spend_its_time_on_checkpoints(tmp_path, monkeypatch):
    written = []

    def slowly(self, state, step):
        time.sleep(0.05)
        written.append(step)
        return self.directory / f"step-{step:09}.pt"

    monkeypatch.setattr(Checkpoints, "save", slowly)
    default_fit(tmp_path, 30)
    assert written[0] == 4 and written[-1] == 120 and len(written) < 15


# Started again with something else ------------------------------------------------------------------------------------


def said(heard, topic="resume"):
    return [message.text for message in heard.named("Message") if message.topic == topic]


def test_a_finished_run_says_so(tmp_path):
    default_fit(tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    heard = Recorder()
    _, result = default_fit(tmp_path, heard=heard)
    (text,) = said(heard)
    assert "already finished, after step 16" in text and "use another directory or resume=False" in text
    assert result.reason == "finished" and result.is_complete
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    heard = Recorder()
    default_fit(tmp_path, 5, heard=heard)
    assert [text for text in said(heard) if "already finished" in text] == []


def cosine(updates):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {"epochs": 5}, ["epochs was 4 and is 5: the run now ends there"]),
        ({}, {"clip": 1.0}, ["clip was None and is 1.0: the new one holds from here on"]),
        ({"accumulation": 2}, {"accumulation": 1}, ["accumulation was 2 and is 1: it holds from the next update on"]),
        ({}, {"average": 0.9}, ["average was None and is 0.9: the average begins"]),
        ({"average": 0.9}, {"average": None}, ["average was 0.9 and is None: the average is dropped"]),
        ({}, {"state_dtype": "bfloat16"}, ["state_dtype was None and is 'bfloat16': the new one holds"]),
        ({"state_dtype": "float16"}, {"state_dtype": None}, ["state_dtype was 'float16' and is None: the check"]),
        ({}, {"precision": "bfloat16"}, ["precision was 'float32' and is 'bfloat16': the new one holds"]),
        ({}, {"keep": 7, "log_every": 9}, ["keep was 3 and is 7", "log_every was 50 and is 9"]),
        ({}, {"lr": 0.01}, ["optimizer: lr was 0.1 and is 0.01: the checkpoint's is kept"]),
        ({"schedule": cosine(16)}, {"schedule": cosine(20)}, ["schedule: T_max was 16 and is 20: the checkpoint's"]),
        ({}, {"schedule": cosine(20)}, ["schedule was none and is CosineAnnealingLR: it begins now"]),
        ({"schedule": cosine(16)}, {"schedule": None}, ["schedule was CosineAnnealingLR and is none"]),
        ({}, {}, []),
        ({"batch_size": 5}, {"seed": None}, []),
    ],
)
def test_what_differs_is_said_and_what_is_done_about_it(before, now, words, tmp_path):
    default_fit(tmp_path, **before)
    heard = Recorder()
    default_fit(tmp_path, **{"epochs": 5, **before, **now, "heard": heard})
    texts = said(heard)
    if "epochs" not in now:
        assert any("epochs was 4 and is 5" in text for text in texts)
        texts = [text for text in texts if "epochs" not in text]
    assert len(texts) == len(words) and all(word in text for word, text in zip(words, texts, strict=True))


def test_the_learning_rate_of_the_checkpoint_is_kept_as_is_said(tmp_path):
    default_fit(tmp_path)
    model = nn.Linear(3, 4)
    optimizer = trainopt.SGD(model.parameters(), lr=0.01)
    default_fit(tmp_path, 5, model_of=lambda: model, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_best_that_cannot_be_compared_or_brought_back_begins_anew(tmp_path):
    validation = (torch.randn(6, 3), torch.randint(0, 4, (6,)))
    metrics = {"accuracy": lambda output, target: (output.argmax(1) == target).double().mean()}
    choices = {"validation": validation, "metrics": metrics}
    _, first = default_fit(tmp_path / "a", 4, **choices)
    heard = Recorder()
    _, second = default_fit(tmp_path / "a", 5, heard=heard, monitor="accuracy", **choices)
    assert first.best > 1 > second.best and second.best_step == 20
    assert any("monitor was 'loss' and is 'accuracy': the best begins anew" in text for text in said(heard))
    _, first = default_fit(tmp_path / "b", 4, **choices)
    _, second = default_fit(tmp_path / "b", 5, early_stopping=9, **choices)
    assert second.best_step == 20
    default_fit(tmp_path / "c", 4, early_stopping=9, **choices)
    _, third = default_fit(tmp_path / "c", 4, **choices)
    assert third.best == pytest.approx(first.best)


# Files that are no checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("stray", ["stray", "truncated", "altered", "pipe", "folder"])
def test_what_was_just_written_is_never_deleted(stray, keep, tmp_path):
    expected, _ = small_fit(tmp_path / "straight")
    _, result = small_fit(tmp_path, steps=4, keep=keep)
    folder = tmp_path / "checkpoints"
    path = folder / "step-000000999.pt"
    if stray == "pipe":
        os.mkfifo(path)
    elif stray == "folder":
        path.mkdir()
    else:
        damage = {"stray": lambda data: b"what is this?", "truncated": damage_half, "altered": damage_bit}[stray]
        path.write_bytes(damage(result.checkpoint.read_bytes()))
    heard = Recorder()
    model, result = small_fit(tmp_path, heard, keep=keep)
    assert str(path) in said(heard, "checkpoint")[0] and path.exists()
    assert result.checkpoint.exists() and read(result.checkpoint)["counters"]["step"] == 10
    assert torch.equal(model.weight, expected.weight)
    whole = sorted(file.name for file in folder.iterdir() if file != path)
    assert whole == ["step-000000008.pt", "step-000000010.pt"][-keep:]


def test_files_that_are_not_whole_do_not_count_among_those_kept(tmp_path):
    small_fit(tmp_path, steps=6, keep=3)
    folder = tmp_path / "checkpoints"
    for step in (2, 6):
        path = folder / f"step-{step:09}.pt"
        path.write_bytes(damage_end(path.read_bytes()))
    small_fit(tmp_path, keep=3, checkpoint_every=100)  # from step 4
    assert {path.name for path in folder.iterdir() if path.stat().st_size} >= {"step-000000004.pt", "step-000000010.pt"}


def set_field(*path, value=None):
    def spoil(state):
        tree = state
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value
        return state

    return spoil


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: [1, 2], "holds a list, not a dict"),
        (lambda state: torch.ones(3), "holds a Tensor, not a dict"),
        (lambda state: {}, "has no format"),
        (set_field("format", value="2"), "its format is '2'"),
        (set_field("model", value=3), "its model is a int"),
        (set_field("counters", "step", value=float("nan")), "its counters.step is nan"),
        (set_field("counters", "step", value=-4), "its counters.step is -4"),
        (set_field("counters", "epoch", value=None), "its counters.epoch is a NoneType"),
        (set_field("counters", "batch", value=True), "its counters.batch is True"),
        (set_field("optimizer", value=[]), "its optimizer is a list"),
        (set_field("optimizer", "param_groups", value=[3]), "optimizer.param_groups.0 is a int"),
        (set_field("data", "seed", value="x"), "its data.seed is 'x'"),
        (set_field("interval", "total", value="x"), "its interval.total is 'x'"),
        (set_field("best", "since", value=0.5), "its best.since is 0.5"),
        (set_field("window", value={"batches": []}), "its window cannot be taken over"),
        (set_field("gradients", value=[]), "its gradients are not those of 2 parameters"),
        (set_field("optimizer", "param_groups", value=[{"params": [0, None], "lr": 0.1}]), "whose states there are"),
        (set_field("optimizer", "param_groups", value=[{"params": [0, 0], "lr": 0.1}]), "whose states there are"),
        (set_field("optimizer", "param_groups", value=[{"params": [0, 7], "lr": 0.1}]), "whose states there are"),
        (set_field("optimizer", "param_groups", 0, "lr", value=float("nan")), "optimizer.param_groups.0.lr is nan"),
        (set_field("optimizer", "state", 0, value=3), "optimizer.state.0 is a int"),
        (set_field("data", "shuffle", value=3), "its data.shuffle is 3"),
        (set_field("given", "optimizer", value=[]), "its given.optimizer is a list"),
        (set_field("given", "options", "keep", value=torch.ones(2)), "its given has something that is no plain value"),
        (set_field("random", 0, value="x"), "its random.0 is a str"),
        (set_field("random", 0, "torch", value=torch.ones(3)), "its random.0.torch is of another shape or dtype"),
        (set_field("random", 0, "python", value=(3, None)), "its random.0.python has 2 entries, not 3"),
        (set_field("watch", "told", value=3), "its watch.told is 3"),
        (set_field("watch", "losses", "marks", value=[3]), "its watch cannot be taken over"),
        (set_field("watch", "losses", "peak", value="x"), "its watch.losses.peak is 'x'"),
        (set_field("watch", "guessing", "uniform", value=[]), "its watch cannot be taken over"),
        (set_field("watch", "guessing", "sums", value=[1.0]), "its watch cannot be taken over"),
        (set_field("watch", "validation", "above", value=["x"]), "its watch cannot be taken over"),
        (set_field("watch", "lost", "known", value={"a fault": 3}), "its watch cannot be taken over"),
        (set_field("watch", "next", value=[1.0]), "its watch cannot be taken over"),
        (set_field("watch", "dead", value=["layer"]), "its watch cannot be taken over"),
        (set_field("interval", "history", value=3), "its interval.history is 3"),
        (set_field("interval", "history", "fine", value=[[1.0]]), "its interval cannot be taken over"),
        (set_field("interval", "history", "size", value=float("nan")), "its interval cannot be taken over"),
        (set_field("random", value={}), "its random is a dict"),
        (without("random"), "it has no random"),
        (without("criterion"), "it has no criterion"),
        (set_field("average", value={"count": 1}), "it has no average.log_bias"),
    ],
)
def test_a_whole_file_that_is_no_state_of_a_run_is_skipped_with_a_word(spoil, words, tmp_path):
    expected, _ = small_fit(tmp_path / "straight")
    _, result = small_fit(tmp_path, steps=4)
    path = result.checkpoint.with_name("step-000000005.pt")
    write(spoil(torch.load(result.checkpoint, weights_only=True)), path)
    heard = Recorder()
    model, result = small_fit(tmp_path, heard)
    (text,) = said(heard, "checkpoint")
    assert str(path) in text and words in text
    assert result.step == 10 and torch.equal(model.weight, expected.weight)


def test_what_an_optimizer_cannot_take_over_is_told_in_a_sentence(tmp_path):
    _, result = small_fit(tmp_path, steps=4)
    state = torch.load(result.checkpoint, weights_only=True)
    state["optimizer"]["state"]["name"] = 3  # of nobody, as some optimizers have it
    write(state, result.checkpoint)
    assert small_fit(tmp_path)[1].step == 10

    class Refusing(torch.optim.SGD):
        def load_state_dict(self, state):
            raise KeyError("exp_avg")

    model = nn.Linear(3, 4)
    optimizer = Refusing(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"step-000000010.pt cannot be taken over: KeyError: 'exp_avg'"):
        default_fit(tmp_path, model_of=lambda: model, optimizer=optimizer, batch_size=5)


@pytest.mark.parametrize("state", [[1, 2], 3, (4,), "five"])
def test_a_schedules_state_may_be_anything(state, tmp_path):
    class Odd:
        def __init__(self):
            self.state = None

        def step(self):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    made = []

    def make(optimizer):
        made.append(Odd())
        return made[-1]

    default_fit(tmp_path, schedule=make)
    heard = Recorder()
    default_fit(tmp_path, 5, heard=heard, schedule=make)
    assert not said(heard, "checkpoint") and made[1].state == state


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    _, result = small_fit(tmp_path, steps=4)
    write({**torch.load(result.checkpoint, weights_only=True), "format": 3}, result.checkpoint)
    with pytest.raises(ValueError, match="has format 3; this version reads 2 and those before"):
        small_fit(tmp_path)


# What a directory holds, and how a run ends ---------------------------------------------------------------------------


def test_a_directory_holds_the_runs_numbers_and_options(tmp_path):
    import json

    from trainopt.training import Folder, Several
    from trainopt.training.folder import read_metrics

    validation = (torch.randn(6, 3), torch.randint(0, 4, (6,)))
    default_fit(tmp_path / "a", validation=validation, log_every=4)
    events = [entry["event"] for entry in read_metrics(tmp_path / "a")]
    assert events == ["progress", "validated"] * 4 + ["finished"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["options"]["epochs"] == 4
    for report in (Folder(tmp_path / "b", {"mine": 1}), Several(Silent(), Folder(tmp_path / "c" / ".." / "c"))):
        folder = report if isinstance(report, Folder) else report.reports[1]
        default_fit(folder.path, heard=report)
        assert len([e for e in read_metrics(folder.path) if e["event"] == "finished"]) == 1  # not told twice
    default_fit(tmp_path / "d", heard=Folder(tmp_path / "elsewhere"))
    assert read_metrics(tmp_path / "d")[-1]["event"] == "finished" == read_metrics(tmp_path / "elsewhere")[-1]["event"]


@pytest.mark.parametrize(("reason", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signals_way_out_can_be_told_from_success(reason, status, tmp_path):
    import signal

    outcome = training_runs.train(tmp_path / "a", stop_at=3, number=getattr(signal, reason))
    assert (outcome.reason, outcome.is_complete, outcome.exit_status) == (reason, False, status)
    outcome = training_runs.train(tmp_path / "a")
    assert (outcome.reason, outcome.is_complete, outcome.exit_status) == ("finished", True, 0)


def test_the_best_weights_are_loaded_in_one_line(tmp_path):
    validation = (torch.randn(6, 3), torch.randint(0, 4, (6,)))
    _, result = default_fit(tmp_path, validation=validation, average=0.5)
    model = nn.Linear(3, 4)
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
    loss = nn.functional.cross_entropy(model(validation[0]), validation[1]).item()
    assert loss == pytest.approx(result.best, rel=1e-6)
