"""Two real processes train as one does: the same weights, the same numbers shown, one of them writing."""

import os
import subprocess
import sys

import pytest
import torch
from test_training_loop import Recorder
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from training_runs import Stopping

import trainopt
from trainopt.training import fit
from trainopt.training.distributed import Processes, whole

SAMPLES, TAIL = 29, 5  # the last batch of an epoch has one sample: too few for two


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 5, dtype=torch.float64, generator=generator)
    target = torch.randint(0, 3, (SAMPLES,), generator=generator)
    target[::4] = -100
    target[8:14] = -100
    return inputs, target


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class Scaled(nn.Module):
    """A loss with a parameter and a buffer; it says itself what it counts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, output, target):
        if self.training:
            self.calls += 1
        keep = target != -100
        losses = nn.functional.cross_entropy(output * self.scale, target, reduction="none")
        return losses.sum(), keep.sum()


#: Runs that the person has given a loss with parameters, or a model in a wrapper.
OWNED = ("owned loss", "own wrapper", "sharded", "sharded bad batch", "sharded bad batch, clipped")
SEVERAL = {"epochs": 2, "batch_size": 4, "accumulation": 3, "clip": 0.5, "average": 0.9}
CASES = {
    "owned loss": SEVERAL,
    "own wrapper": SEVERAL,
    "sharded": {**SEVERAL, "early_stopping": 100},
    "sharded bad batch": {"epochs": 1, "batch_size": 4, "shuffle": False},
    "sharded bad batch, clipped": {"epochs": 1, "batch_size": 4, "shuffle": False, "clip": 0.5, "average": 0.9},
    "tensors": SEVERAL,
    "loader": {"epochs": 2, "accumulation": 2},
    "workers": {"epochs": 1},
    "bad batch": {"epochs": 1, "batch_size": 4, "shuffle": False},
}


def train(case, directory, **choices):
    """One case, in each process; returns the model and what was said."""
    torch.set_num_threads(1)
    model, loss = network(), Scaled() if case in OWNED else nn.CrossEntropyLoss()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and case in OWNED[1:]:
        Processes.join(torch.device("cpu"))
        if "sharded" in case:
            for layer in (model[0], model[2], model):
                fully_shard(layer)
        else:
            model = nn.parallel.DistributedDataParallel(model)
    optimizer = trainopt.AdamW([*model.parameters(), *loss.parameters()], lr=0.02)
    inputs, target = data()
    if "bad batch" in case:
        inputs[5] = float("nan")
    source = (inputs, target)
    if case in ("loader", "workers"):
        workers = 2 if case == "workers" else 0
        source = DataLoader(TensorDataset(inputs, target), batch_size=4, shuffle=True, num_workers=workers)
    recorder = Recorder()
    metrics = {"accuracy": lambda output, target: (output.argmax(1) == target).double().mean()}
    choices = {
        "seed": 3,
        "log_every": 2,
        "checkpoint_every": 3,
        "directory": directory,
        **CASES.get(case, CASES["tensors"]),
        **choices,
    }
    result = fit(
        model,
        source,
        Stopping(loss, 4) if case == "stopped" and os.environ["RANK"] == "1" else loss,
        optimizer,
        validation=data(),
        metrics=metrics,
        count=None if case in OWNED else lambda target: int((target != -100).sum()),
        schedule=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        report=recorder,
        **choices,
    )
    return model, loss, recorder, result


def main(*runs):
    """What each process of torchrun runs: cases, one after the other, each with a folder of its own."""
    for case, folder in (run.split("=", 1) for run in runs):
        model, loss, recorder, result = train(case, os.path.join(folder, "run"))
        shown = [(event.step, event.loss) for event in recorder.named("Progress") + recorder.named("Validated")]
        texts = [event.text for event in recorder.named("Message")]
        accuracy = [event.metrics["accuracy"] for event in recorder.named("Validated")]
        weights = {name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()}
        found = {"model": weights, "owned": dict(loss.state_dict()), "average": result.average}
        found.update(shown=shown, texts=texts, accuracy=accuracy, step=result.step, reason=result.reason)
        torch.save(found, os.path.join(folder, f"{os.environ['RANK']}.pt"))
    # torch's FSDP2 over gloo leaves a thread that now and then, one process in fifty, aborts at exit.
    torch.distributed.barrier()
    os._exit(0)


def run_under_torchrun(folders):
    """Cases under torchrun, on this machine's loopback, each with its folder; what went wrong, if anything did."""
    # Where trainopt is not installed it is found by this path.
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += [f"{case}={folder}" for case, folder in folders.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    return done.stderr[-5000:] if done.returncode else ""


def found_in(folder):
    """What each process found, by rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def torchrun(case, folder):
    assert not (error := run_under_torchrun({case: folder})), error
    return found_in(folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folders of all cases, and what went wrong: two processes run them all, for each start takes seconds."""
    folders = {case: tmp_path_factory.mktemp(case.replace(" ", "-").replace(",", "")) for case in CASES}
    return folders, run_under_torchrun(folders)


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one(case, two_processes):
    folder, error = two_processes[0][case], two_processes[1]
    assert (folder / "1.pt").exists(), error
    model, loss, recorder, result = train(case, folder / "alone")
    first, second = found_in(folder)
    assert first["step"] == second["step"] == result.step > 0
    assert_close(first["model"], model.state_dict())
    assert_close(first["owned"], loss.state_dict())
    assert_close(first["average"] or {}, result.average or {})
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    assert all(torch.equal(first["owned"][name], second["owned"][name]) for name, _ in loss.named_parameters())
    shown = [(event.step, event.loss) for event in recorder.named("Progress") + recorder.named("Validated")]
    assert [step for step, _ in first["shown"]] == [step for step, _ in shown]
    assert [loss for _, loss in first["shown"]] == pytest.approx([loss for _, loss in shown], rel=1e-10)
    accuracy = [event.metrics["accuracy"] for event in recorder.named("Validated")]
    assert first["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert second["shown"] == [] and second["texts"] == []  # the first alone speaks
    files = [sorted(path.name for path in (folder / run / "checkpoints").iterdir()) for run in ("alone", "run")]
    assert files[0] == files[1]
    if "bad batch" in case:
        assert result.step == 5
        (text,) = first["texts"]
        where = "the gradient of parameter" if "sharded" in case else "the batch's inputs"
        assert where in text and ("in process 1" in text or "sharded" in case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tensors", "owned loss", "sharded"])
def test_a_run_of_one_process_goes_on_in_two_and_back(case, tmp_path):
    """The position in the data is that of all processes together, and the file is the same for sharded models."""
    straight, loss, _, _ = train(case, tmp_path / "straight", epochs=3)
    train(case, tmp_path / "run", epochs=1)
    first, second = torchrun(case, tmp_path)
    assert first["step"] == second["step"] == 6
    saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    for name, tensor in saved.items():
        assert type(tensor) is torch.Tensor and tensor.shape == first["model"][name].shape
    again, other, _, result = train(case, tmp_path / "run", epochs=3)
    assert result.step == 9
    assert_close(again.state_dict(), straight.state_dict())
    assert_close(other.state_dict(), loss.state_dict())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_update(tmp_path):
    straight, _, _, _ = train("tensors", tmp_path / "straight")
    first, second = torchrun("stopped", tmp_path)
    assert first["reason"] == second["reason"] == "SIGTERM" and first["step"] == second["step"] < 6
    assert "start the same run again" in first["texts"][-1]
    first, _ = torchrun("tensors", tmp_path)
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(first["model"][name], tensor, rtol=1e-11, atol=1e-13)


def test_data_that_cannot_be_divided_is_refused(monkeypatch):
    from trainopt.training.data import source_of
    from trainopt.training.distributed import Processes

    processes = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="sharded is False, but data, a list, cannot be divided among 2 processes"):
        source_of([data()], None, True, processes)
    assert source_of([data()], None, True, processes, sharded=True).length == 1


if __name__ == "__main__":
    main(*sys.argv[1:])
