"""Checkpoints: files that are damaged, full disks, what was written for another run, and whatever else lies there."""

import errno
import os

import numpy as np
import pytest
import torch
from test_training_loop import Recorder
from torch import nn
from training_runs import default_fit, said

from trainopt.training import checkpoint
from trainopt.training.checkpoint import Checkpoints, CorruptCheckpoint, plain, read, write

# One file -----------------------------------------------------------------------------------------------------------


def small_fit(directory, heard=None, width=4, **choices):
    """A run of 10 updates that writes at every second, and keeps a state for each parameter."""
    choices = {"steps": 10, "checkpoint_every": 2, "momentum": 0.9, **choices}
    return default_fit(directory, None, heard, lambda: nn.Linear(3, width), **choices)


def files_in(directory):
    return {path.name: path.read_bytes() for path in (directory / "checkpoints").iterdir()}


def change_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {
    "end": lambda data: data[:-7],
    "half": lambda data: data[: len(data) // 2],
    "bit": change_a_bit,
    "all": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(damage, tmp_path):
    expected, _ = small_fit(tmp_path / "a")
    small_fit(tmp_path / "b", steps=7)
    newest, older = Checkpoints(tmp_path / "b" / "checkpoints", 3).paths()[:2]
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(CorruptCheckpoint):
        read(newest)
    heard = Recorder()
    model, result = small_fit(tmp_path / "b", heard)
    assert any(str(newest) in text for text in said(heard, "checkpoint"))
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
    saved = files_in(tmp_path)
    assert len(saved) == 2 and all(len(data) > 4000 for data in saved.values())
    with monkeypatch.context() as patch:
        opened = open
        full = lambda path, mode: FullDisk(opened(path, mode), room) if "w" in mode else opened(path, mode)  # noqa: E731
        patch.setattr(checkpoint, "open", full, raising=False)
        heard = Recorder()
        model, result = small_fit(tmp_path, heard)
    assert result.step == 10 and result.checkpoint == before.checkpoint
    troubles = said(heard, "checkpoint")
    assert troubles and all("No space left" in text and str(before.checkpoint) in text for text in troubles)
    assert files_in(tmp_path) == saved
    again, result = small_fit(tmp_path)  # there is room again
    assert torch.equal(again.weight, model.weight) and result.checkpoint.name == "step-000000010.pt"


def refuse(*_, **where):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_directory_that_cannot_be_written_is_refused_before_anything(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"directory: .*file' is not a directory"):
        small_fit(tmp_path / "file" / "run")
    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"directory: cannot write in .*Permission denied"):
        small_fit(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_becomes_unwritable_loses_nothing(tmp_path, monkeypatch):
    _, before = small_fit(tmp_path, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", refuse)
        heard = Recorder()
        _, result = small_fit(tmp_path, heard)
    assert result.step == 10 and result.checkpoint == before.checkpoint
    assert any("Permission denied" in message.text for message in heard.named("Message"))
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert small_fit(tmp_path, steps=4)[1].step == 4


OF_SOMETHING_ELSE = {
    "width": (5, r"another model: weight is float32 \(4, 3\) there and float32 \(5, 3\) here"),
    "batch_size": (10, "batch_size is 5 there and 10 here"),
    "seed": (4, "seed is 4, but .* with seed 3"),
    "resume": (False, "resume is False, but .* has checkpoints"),
}


@pytest.mark.parametrize("choice", OF_SOMETHING_ELSE)
def test_a_checkpoint_of_something_else_is_refused_with_nothing_changed(choice, tmp_path):
    _, result = small_fit(tmp_path, steps=4)
    files = files_in(tmp_path)
    value, words = OF_SOMETHING_ELSE[choice]
    with pytest.raises(ValueError, match=words) as refusal:
        small_fit(tmp_path, **{choice: value})
    assert str(result.checkpoint) in str(refusal.value) or choice != "width"
    assert files_in(tmp_path) == files


def test_a_finished_run_is_not_trained_again(tmp_path):
    model, first = small_fit(tmp_path)
    again, second = small_fit(tmp_path)
    assert second.step == first.step == 10 and torch.equal(model.weight, again.weight)
    longer, third = small_fit(tmp_path, steps=12)
    straight, _ = small_fit(tmp_path / "other", steps=12)
    assert third.step == 12 and torch.equal(longer.weight, straight.weight)


def test_plain_takes_what_a_state_can_hold_and_names_what_it_cannot():
    state = plain({"a": np.float64(0.5), "b": [np.int64(2), (None, True)], "c": torch.arange(100)[3:5]})
    assert type(state["a"]) is float and type(state["b"][0]) is int and state["b"][1] == (None, True)
    assert state["c"].untyped_storage().nbytes() == 16
    with pytest.raises(TypeError, match=r"the state\['a'\]\[1\] is a function"):
        plain({"a": [1, lambda: 0]})


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
        damage = {"stray": lambda data: b"what is this?", "truncated": DAMAGE["half"], "altered": change_a_bit}[stray]
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
        path.write_bytes(DAMAGE["end"](path.read_bytes()))
    small_fit(tmp_path, keep=3, checkpoint_every=100)  # from step 4
    assert {path.name for path in folder.iterdir() if path.stat().st_size} >= {"step-000000004.pt", "step-000000010.pt"}


def with_field(path, value):
    """A state in which another value stands at a path as messages write it."""

    def spoil(state):
        tree, keys = state, [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value
        return state

    return spoil


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


NO_STATES = {
    "a list": (lambda state: [1, 2], "holds a list, not a dict"),
    "a tensor": (lambda state: torch.ones(3), "holds a Tensor, not a dict"),
    "an empty dict": (lambda state: {}, "has no format"),
    "no random": (without("random"), "it has no random"),
    "no criterion": (without("criterion"), "it has no criterion"),
}
FIELDS = [
    ("format", "2", "its format is '2'"),
    ("model", 3, "its model is a int"),
    ("counters.step", float("nan"), "its counters.step is nan"),
    ("counters.step", -4, "its counters.step is -4"),
    ("counters.epoch", None, "its counters.epoch is a NoneType"),
    ("counters.batch", True, "its counters.batch is True"),
    ("optimizer", [], "its optimizer is a list"),
    ("optimizer.param_groups", [3], "optimizer.param_groups.0 is a int"),
    ("data.seed", "x", "its data.seed is 'x'"),
    ("interval.total", "x", "its interval.total is 'x'"),
    ("best.since", 0.5, "its best.since is 0.5"),
    ("window", {"batches": []}, "its window cannot be taken over"),
    ("gradients", [], "its gradients are not those of 2 parameters"),
    ("optimizer.param_groups", [{"params": [0, None], "lr": 0.1}], "whose states there are"),
    ("optimizer.param_groups", [{"params": [0, 0], "lr": 0.1}], "whose states there are"),
    ("optimizer.param_groups", [{"params": [0, 7], "lr": 0.1}], "whose states there are"),
    ("optimizer.param_groups.0.lr", float("nan"), "optimizer.param_groups.0.lr is nan"),
    ("optimizer.state.0", 3, "optimizer.state.0 is a int"),
    ("data.shuffle", 3, "its data.shuffle is 3"),
    ("given.optimizer", [], "its given.optimizer is a list"),
    ("given.options.keep", torch.ones(2), "its given has something that is no plain value"),
    ("random.0", "x", "its random.0 is a str"),
    ("random.0.torch", torch.ones(3), "its random.0.torch is of another shape or dtype"),
    ("random.0.python", (3, None), "its random.0.python has 2 entries, not 3"),
    ("watch.told", 3, "its watch.told is 3"),
    ("watch.losses.marks", [3], "its watch cannot be taken over"),
    ("watch.losses.peak", "x", "its watch.losses.peak is 'x'"),
    ("watch.guessing.uniform", [], "its watch cannot be taken over"),
    ("watch.guessing.sums", [1.0], "its watch cannot be taken over"),
    ("watch.validation.above", ["x"], "its watch cannot be taken over"),
    ("watch.lost.known", {"a fault": 3}, "its watch cannot be taken over"),
    ("watch.next", [1.0], "its watch cannot be taken over"),
    ("watch.dead", ["layer"], "its watch cannot be taken over"),
    ("interval.history", 3, "its interval.history is 3"),
    ("interval.history.fine", [[1.0]], "its interval cannot be taken over"),
    ("interval.history.size", float("nan"), "its interval cannot be taken over"),
    ("random", {}, "its random is a dict"),
    ("average", {"count": 1}, "it has no average.log_bias"),
]
NO_STATES |= {f"{path} is {value}": (with_field(path, value), words) for path, value, words in FIELDS}


@pytest.mark.parametrize(("spoil", "words"), NO_STATES.values(), ids=NO_STATES)
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
