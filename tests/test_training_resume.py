"""A run that is stopped or killed at any moment ends in the same bits as one that is left alone."""

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
from training_runs import assert_same, default_fit, held_out, said

import trainopt
from trainopt.training import Silent, fit
from trainopt.training.checkpoint import Checkpoints

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


#: In the first update, at the end of one, of an epoch and of its checkpoint, and of the run. Of the others the test of
#: every micro step knows too.
USUAL = (1, 3, 7, 8, 12, 21)


@pytest.mark.parametrize(
    "micro_step", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in range(1, 22)]
)
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


# With the defaults ----------------------------------------------------------------------------------------------------


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
    default_fit(directory, 100, model_of=lambda: Dying(call), validation=held_out() if is_validated else None)


@pytest.mark.parametrize("is_validated", [True, False])
def test_a_small_run_that_is_killed_with_the_defaults_has_a_checkpoint(is_validated, tmp_path):
    process = SERVER.Process(target=die, args=(tmp_path, 45, is_validated))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    steps = steps_saved(tmp_path)
    assert steps == [36, 40, 44] if is_validated else steps and steps[-1] <= 44


@pytest.mark.parametrize(
    ("choices", "steps"),
    [
        ({}, [4, 8, 12, 16]),
        ({"validate_every": 3}, [3, 6, 9, 12, 15, 16]),
        ({"checkpoint_every": 5}, [5, 10, 15, 16]),
    ],
    ids=str,
)
def test_by_default_there_is_a_checkpoint_at_every_validation(choices, steps, tmp_path):
    default_fit(tmp_path, validation=held_out(), keep=20, **choices)
    assert steps_saved(tmp_path) == steps


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


#: What the first run was given, what the second, and what is said of it.
DIFFERENT = {
    "longer": ({}, {"epochs": 5}, ["epochs was 4 and is 5: the run now ends there"]),
    "clipped": ({}, {"clip": 1.0}, ["clip was None and is 1.0: the new one holds from here on"]),
    "not accumulated": (
        {"accumulation": 2},
        {"accumulation": 1},
        ["accumulation was 2 and is 1: it holds from the next update on"],
    ),
    "averaged": ({}, {"average": 0.9}, ["average was None and is 0.9: the average begins"]),
    "not averaged": ({"average": 0.9}, {"average": None}, ["average was 0.9 and is None: the average is dropped"]),
    "states in 16 bits": (
        {},
        {"state_dtype": "bfloat16"},
        ["state_dtype was None and is 'bfloat16': the new one holds"],
    ),
    "states as they come": (
        {"state_dtype": "float16"},
        {"state_dtype": None},
        ["state_dtype was 'float16' and is None: the check"],
    ),
    "precision": ({}, {"precision": "bfloat16"}, ["precision was 'float32' and is 'bfloat16': the new one holds"]),
    "two": ({}, {"keep": 7, "log_every": 9}, ["keep was 3 and is 7", "log_every was 50 and is 9"]),
    "learning rate": ({}, {"lr": 0.01}, ["optimizer: lr was 0.1 and is 0.01: the checkpoint's is kept"]),
    "another schedule": (
        {"schedule": cosine(16)},
        {"schedule": cosine(20)},
        ["schedule: T_max was 16 and is 20: the checkpoint's"],
    ),
    "a schedule": ({}, {"schedule": cosine(20)}, ["schedule was none and is CosineAnnealingLR: it begins now"]),
    "no schedule": ({"schedule": cosine(16)}, {"schedule": None}, ["schedule was CosineAnnealingLR and is none"]),
    "nothing": ({}, {}, []),
    "a seed of its own": ({"batch_size": 5}, {"seed": None}, []),
}


@pytest.mark.parametrize(("before", "now", "words"), DIFFERENT.values(), ids=DIFFERENT)
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
    validation = held_out()
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


# What a directory holds, and how a run ends ---------------------------------------------------------------------------


def test_a_directory_holds_the_runs_numbers_and_options(tmp_path):
    import json

    from trainopt.training import Folder, Several
    from trainopt.training.folder import read_metrics

    validation = held_out()
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
    validation = held_out()
    _, result = default_fit(tmp_path, validation=validation, average=0.5)
    model = nn.Linear(3, 4)
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
    loss = nn.functional.cross_entropy(model(validation[0]), validation[1]).item()
    assert loss == pytest.approx(result.best, rel=1e-6)


# Beside the data and the options --------------------------------------------------------------------------------------


def small_fit(directory, stop_at=-1, make=None, dtype=torch.float64, loss=None, is_own=False, seed=0, **choices):
    """A run of a small model to its end, or to a signal in its n-th micro-step; what it saw and what became of it.

    Args:
        is_own: whether the loader draws from a generator of its own.
    """
    torch.manual_seed(seed)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    data = torch.utils.data.TensorDataset(inputs, torch.arange(8) % 3)
    drawn = {"generator": torch.Generator().manual_seed(9 + seed)} if is_own else {}
    model, seen = nn.Linear(3, 3).to(dtype), []
    model.register_forward_pre_hook(lambda _, args: seen.append(round(float(args[0][0, 0]), 3)))
    optimizer = (make or trainopt.SGD)(model.parameters())
    fit(
        model,
        torch.utils.data.DataLoader(data, batch_size=1, shuffle=True, **drawn),
        loss or training_runs.Stopping(nn.CrossEntropyLoss(), stop_at),
        optimizer,
        directory=directory,
        **{"report": Silent(), "epochs": 3, "accumulation": 2, "seed": 3, "checkpoint_every": 3, **choices},
    )
    states = [sorted(state.items()) for state in optimizer.state_dict()["state"].values()]
    return seen, {"weights": list(model.parameters()), "states": states}


@pytest.mark.parametrize("stops", [(8,), (9,), (16, 1), (9, 1, 1), (1, 1, 7, 1)], ids=str)
def test_a_loader_with_a_generator_of_its_own_goes_on_in_its_order(stops, tmp_path):
    """Also from the end of an epoch, and where the run is stopped again before it has drawn anything."""
    expected, end = small_fit(None, is_own=True)
    found = []
    for seed, stop in enumerate((*stops, -1)):
        seen, now = small_fit(tmp_path, stop, is_own=True, seed=seed)
        found += seen
    assert found == expected
    assert_same(end, now)


OF_OTHER_TYPES = {
    "NAdam": (trainopt.NAdam, torch.float64),
    "ASGD": (trainopt.ASGD, torch.float64),
    "NovoGrad": (trainopt.NovoGrad, torch.float64),
    "master": (lambda params: trainopt.AdamWScheduleFree(params, lr=0.03, precision="master"), torch.bfloat16),
    "master24": (lambda params: trainopt.AdamWScheduleFree(params, lr=0.03, precision="master24"), torch.bfloat16),
    "master of float16": (lambda params: trainopt.SGDScheduleFree(params, 0.3, precision="master"), torch.float16),
}


@pytest.mark.parametrize("name", OF_OTHER_TYPES)
@pytest.mark.parametrize("stop", [7, 12, 17])
def test_a_resumed_run_keeps_the_types_of_numbers_and_master_weights(name, stop, tmp_path):
    make, dtype = OF_OTHER_TYPES[name]
    _, end = small_fit(None, make=make, dtype=dtype)
    small_fit(tmp_path, stop, make=make, dtype=dtype)
    _, now = small_fit(tmp_path, make=make, dtype=dtype, seed=1)
    assert_same(end, now)


OTHERS = (
    (trainopt, ("SGD", "Adam", "RMSprop", "Adafactor", "LAMB", "NovoGrad", "Prodigy", "AdamWScheduleFree")),
    (torch.optim, ("SGD", "Adam", "RMSprop", "Adafactor")),
)


@pytest.mark.parametrize(
    "make", [getattr(of, name) for of, names in OTHERS for name in names], ids=lambda c: c.__module__[:8] + c.__name__
)
def test_another_optimizer_goes_on_with_its_own_options(make, tmp_path):
    small_fit(tmp_path, make=trainopt.AdamW, epochs=1, loss=nn.CrossEntropyLoss())
    made, heard = [], Recorder()

    def remembered(params):
        made.append(make(params, lr=0.0123))
        return made[0]

    _, now = small_fit(tmp_path, make=remembered, epochs=2, report=heard, loss=nn.MultiMarginLoss())
    words = " ".join(said(heard))
    assert f"optimizer was AdamW and is {make.__name__}: its options are the new ones" in words
    assert "the loss was CrossEntropyLoss and is MultiMarginLoss: the new one holds from here on" in words
    (group,) = made[0].param_groups
    assert group["lr"] == 0.0123 and set(group) >= set(make([torch.zeros(3)]).param_groups[0])
    fresh = make(params := [nn.Parameter(torch.ones(shape).double()) for shape in ((3, 3), (3,))])
    for p in params:
        p.grad = torch.ones_like(p)
    if hasattr(fresh, "train"):
        fresh.train()
    fresh.step()
    for states, p in zip(now["states"], params, strict=False):  # a plain SGD has none
        shapes = {name: getattr(value, "shape", None) for name, value in states}
        assert shapes == {name: getattr(value, "shape", None) for name, value in fresh.state[p].items()}
    assert all(weight.isfinite().all() for weight in now["weights"])


def test_another_optimizer_takes_states_over_by_the_names_of_parameters(tmp_path):
    def named(cls, names):
        return lambda params: cls([(name, p) for name, p in sorted(zip("ab", params, strict=True), key=names)])

    forwards, backwards = named(trainopt.AdamW, lambda pair: pair[0]), named(trainopt.Adam, lambda pair: -ord(pair[0]))
    _, before = small_fit(tmp_path, make=forwards, epochs=1)
    made = []
    small_fit(tmp_path, make=lambda params: made.append(backwards(params)) or made[0], epochs=1)
    states = made[0].state_dict()["state"]
    assert [dict(before["states"][i])["exp_avg"].shape for i in (0, 1)] == [torch.Size([3, 3]), torch.Size([3])]
    for i in (0, 1):
        torch.testing.assert_close(states[1 - i]["exp_avg"], dict(before["states"][i])["exp_avg"])
