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
    file = tmp_path / "figures.json"
    assert gpu.main(["--device", device, "--quick", "--markdown", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "### cross_entropy, 7 × 5, float32" in output and f"written to {file}" in output
    kinds = {result["kind"] for result in json.loads(file.read_text())["results"]}
    assert kinds == set(gpu.KINDS)
