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


def test_workers_draw_again_what_they_drew(tmp_path):
    run(tmp_path / "a", tmp_path / "a.pt", workers=2, epochs=2)
    run(tmp_path / "b", tmp_path / "b.pt", workers=2, epochs=2, stop_at=11)
    run(tmp_path / "b", tmp_path / "b.pt", workers=2, epochs=2, seed=17)
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert_same(first, second)


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


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.messages = []

    def message(self, event):
        self.messages.append(event)


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
    heard = Heard()
    model, result = small_fit(tmp_path / "b", heard)
    assert any(str(newest) in message.text and message.topic == "checkpoint" for message in heard.messages)
    assert not any(str(older) in message.text for message in heard.messages)
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
        heard = Heard()
        model, result = small_fit(tmp_path, heard)
    assert result.step == 10 and result.checkpoint == before.checkpoint
    troubles = [message.text for message in heard.messages if message.topic == "checkpoint"]
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
        heard = Heard()
        _, result = small_fit(tmp_path, heard)
    assert result.step == 10 and result.checkpoint == before.checkpoint
    assert any("Permission denied" in message.text for message in heard.messages)
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
