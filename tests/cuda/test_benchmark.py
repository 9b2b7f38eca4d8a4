"""The GPU benchmark runs, at sizes at which it measures nothing."""

import json

import torch

from benchmarks import gpu, gpu_tasks


def test_every_contender_does_the_work(device):
    for task in gpu_tasks.tasks(quick=True):
        result = gpu.measure(task, torch.device(device), rounds=2, block_seconds=0)
        assert not result.left_out, task.title
        assert {task.reference, gpu_tasks.OURS} <= result.seconds.keys()
        assert all(len(seconds) == 2 for seconds in (*result.seconds.values(), *result.host.values()))
        assert (gpu.COPY in result.seconds) == bool(task.moved)


def test_one_that_does_something_else_is_left_out(device):
    task = next(gpu_tasks.tasks(quick=True))
    idle = task.contenders["torch fused"](torch.device(device))
    others = {**task.contenders, "idle": lambda _: gpu_tasks.Ready(lambda: None, idle.outcome)}
    result = gpu.measure(gpu_tasks.replace(task, contenders=others), torch.device(device), 1, 0)
    assert result.left_out == {"idle": "its outcome is unlike that of torch fused"}


def test_the_command_line(device, capsys, tmp_path):
    assert gpu.main(["--device", device, "--quick", "--markdown", "--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "### cross_entropy, 7 × 5, float32" in output and f"written to {tmp_path / 'bench.jsonl'}" in output
    machine, *results = map(json.loads, (tmp_path / "bench.jsonl").read_text().splitlines())
    assert machine["rounds"] == 2 and {result["kind"] for result in results} == set(gpu.KINDS)
    # The last table has a row for each task, and every task was measured.
    table = output[output.index("| task |") :]
    assert all(f"| {result['title']} |" in table and gpu.OURS in result["seconds"] for result in results)


def test_what_is_measured_when_the_time_is_up_is_kept(device, capsys, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 40))  # forty seconds a look
    monkeypatch.setattr(gpu, "measure", lambda task, *_: gpu.Result(task.kind, task.title, 0, task.reference))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    gpu.main(["--device", device, "--quick", "--minutes", "2", "--results", str(tmp_path)])
    count = len(list(gpu_tasks.tasks(quick=True)))
    assert f"stopped after 2 minutes: {count - 3} of {count} tasks are left" in capsys.readouterr().out
    assert len((tmp_path / "bench.jsonl").read_text().splitlines()) == 4
