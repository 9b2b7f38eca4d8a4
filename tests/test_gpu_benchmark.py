"""The GPU benchmark's tables, on made-up figures, and what it says where there is no GPU. tests/cuda runs it."""

import pytest
import torch

from benchmarks import gpu, gpu_tasks

MADE_UP = gpu.Result(
    "optimizers",
    "AdamW, a model",
    moved=28_000_000,
    reference="torch fused",
    seconds={"torch fused": [2e-4, 4e-4, 2e-4], "trainopt": [1e-4, 2e-4, 1e-4], gpu.COPY: [5e-5, 1e-4, 5e-5]},
    host={"torch fused": [3e-5] * 3, "trainopt": [1e-5] * 3, gpu.COPY: [5e-6] * 3},
    peaks={"torch fused": 0, "trainopt": 2_500_000, gpu.COPY: 0},
    left_out={"apex FusedAdam": "RuntimeError: no kernel image"},
)


@pytest.mark.parametrize("as_markdown", [False, True])
def test_a_table_of_made_up_figures(as_markdown):
    table = gpu.details(MADE_UP, as_markdown)
    lines = [line for line in table.splitlines() if line]
    assert lines[0].endswith("AdamW, a model, 28.0 MB must move")
    (ours,) = (line for line in lines if "trainopt" in line)
    cells = [cell.strip() for cell in (ours.strip("|").split("|") if as_markdown else ours.split("  ")) if cell.strip()]
    # 28 MB in 100 µs are 280 GB/s; the copy took half the time.
    assert cells == ["trainopt", "100 µs", "2.00 (2.00-2.00)", "280", "50.0 %", "10.0 µs", "2.5 MB"]
    assert "apex FusedAdam is left out: RuntimeError: no kernel image" in table


def test_a_contender_without_its_reference_has_no_ratio():
    result = gpu.Result("losses", "a loss", 0, "torch eager", {"trainopt": [1e-3]}, {"trainopt": [1e-3]})
    assert gpu.rows_of(result) == [["trainopt", "1.00 ms", "", "", "", "1.00 ms", ""]]


def test_tasks_move_the_bytes_that_they_must():
    moved = {task.title: task.moved for task in gpu_tasks.tasks(quick=False)}
    assert len(moved) == len(list(gpu_tasks.tasks(quick=False)))  # no two are called the same
    assert moved["AdamW, GPT-2 124M"] == 7 * 4 * 124_439_808
    assert moved["SGD with momentum 0.9, 2,000 tensors of 1,024"] == 5 * 4 * 2_048_000
    assert moved["cross_entropy, 8,192 × 32,000, bfloat16"] == 2 * 2 * 8192 * 32000
    assert moved["clip_grad_norm_, one tensor of 64M, clips"] == 3 * 4 * 2**26
    assert moved["clip_grad_norm_, one tensor of 64M, below the limit"] == 4 * 2**26


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == "nothing is measured: torch finds no GPU here\n"
