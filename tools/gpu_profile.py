"""Profiles the kernels behind some tasks of benchmarks.gpu by ncu: memory throughput, registers, occupancy, stalls.

    python -m tools.gpu_profile                            the tasks of TASKS
    python -m tools.gpu_profile "cross_entropy, 8,192"     those whose title contains this
    python -m tools.gpu_profile --contender "torch fused"  another contender of theirs

Clocks are left as they are (`--clock-control none`). Each task is a process of its own, whose second call is profiled.
Leaves profile/TASK.csv, with all that ncu says, and profile.json in the folder of results.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu_tasks import OURS, Task, tasks
from benchmarks.tables import significant, text_table
from tools.jobs import Ended, Job, find_tool, run_all, say

TASKS = (
    "AdamW, GPT-2 124M",
    "AdamW, GPT-2 124M, bfloat16",
    "AdamW, GPT-2 124M, float32, 8-bit states",
    "AdamW, GPT-2 124M, bfloat16, master24, 8-bit states",
    "LAMB, GPT-2 124M",
    "AdamW, 2,000 tensors of 1,024",
    "SGD with momentum 0.9, GPT-2 124M",
    "cross_entropy, 8,192 × 32,000, float32",
    "cross_entropy, 8,192 × 32,000, bfloat16",
    "cross_entropy, 4,096 × 128,256, bfloat16",
    "mse_loss, 67,108,864",
    "binary_cross_entropy_with_logits, 67,108,864",
    "clip_grad_norm_, GPT-2 124M, clips",
)

NANOSECONDS = "gpu__time_duration.sum"
DRAM_SHARE = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
DRAM_SPEED = "dram__bytes.sum.per_second"
REGISTERS = "launch__registers_per_thread"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
METRICS = (NANOSECONDS, DRAM_SHARE, DRAM_SPEED, REGISTERS, OCCUPANCY)

#: The columns of the section WarpStateStats that say what warps wait for, in cycles an issued instruction.
STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio")

PROFILER = ("--clock-control", "none", "--profile-from-start", "off", "--section", "WarpStateStats")
PROFILER += ("--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--print-units", "base")
PROFILER += ("--print-kernel-base", "function", "--force-overwrite")


@dataclass
class Kernel:
    """One launch."""

    task: str
    kernel: str
    grid: str
    microseconds: float
    dram_share: float  # per cent of the peak
    dram_speed: float  # GB/s
    registers: int
    occupancy: float  # per cent of the warps that a multiprocessor holds
    stalls: dict[str, float]  # cycles an issued instruction, the most first


def chosen(wanted: Sequence[str], quick: bool) -> list[Task]:
    """The tasks of these titles, or with these words in their title."""
    every = list(tasks(quick))
    if not wanted:
        return every if quick else [task for task in every if task.title in TASKS]
    return [task for task in every if any(words in task.title for words in wanted)]


def run_profiled(task: Task, contender: str, device: torch.device) -> None:
    """The second call, between the profiler's marks: the first makes what is made once."""
    ready = task.contenders[contender](device)
    ready.call()
    torch.get_device_module(device).synchronize()
    if device.type == "cuda":
        torch.cuda.profiler.start()
    ready.call()
    torch.get_device_module(device).synchronize()
    if device.type == "cuda":
        torch.cuda.profiler.stop()


def job_of(ncu: str, task: Task, contender: str, device: str, quick: bool, results: Path) -> Job:
    """ncu over this program, which runs one task."""
    folder = results / "profile"
    name = re.sub(r"[^a-z0-9.]+", "-", task.title.lower()).strip("-")
    command = [ncu, *PROFILER, "--log-file", str(folder / f"{name}.csv"), sys.executable]
    command += ["-m", "tools.gpu_profile", "--device", device, "--contender", contender, "--run", task.title]
    return Job(task.title, [*command, *(["--quick"] if quick else [])], folder / f"{name}.log", 300)


def kernels_of(task: str, text: str) -> list[Kernel]:
    """The launches in ncu's table, without the lines of messages before it and the units below its head."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels = []
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if not row.get("ID"):
            continue

        def number(column: str, row: dict[str, str] = row) -> float:
            try:
                return float(row.get(column, "").replace(",", ""))
            except ValueError:  # not measured: n/a
                return float("nan")

        stalls = {found[1]: number(column) for column in row if (found := STALL.fullmatch(column or ""))}
        stalls = {
            n: cycles for n, cycles in stalls.items() if n != "selected" and not n.endswith("not_issued") and cycles > 0
        }
        kernels.append(
            Kernel(
                task,
                row["Kernel Name"],
                row.get("Grid Size", ""),
                number(NANOSECONDS) / 1e3,
                number(DRAM_SHARE),
                number(DRAM_SPEED) / 1e9,
                int(number(REGISTERS)) if number(REGISTERS) > 0 else 0,
                number(OCCUPANCY),
                dict(sorted(stalls.items(), key=lambda item: -item[1])),
            )
        )
    return kernels


def read(ended: Ended) -> tuple[list[Kernel], str]:
    """The kernels of a task, and what is wrong if there are none."""
    file = ended.job.log.with_suffix(".csv")
    said = file.read_text(errors="replace") if file.exists() else ""
    kernels = kernels_of(ended.job.name, said)
    if kernels and not ended.fault:
        return kernels, ""
    told = re.findall(r"^==(?:ERROR|WARNING)== *(.*)", said + ended.text, re.MULTILINE)
    return kernels, ended.fault or (told[0] if told else f"no kernel was profiled: see {ended.job.log}")


def table(kernels: Sequence[Kernel]) -> str:
    """A row a kernel, with the three things that its warps wait for most."""
    rows = []
    for k in kernels:
        stalls = ", ".join(f"{name} {significant(cycles)}" for name, cycles in list(k.stalls.items())[:3])
        figures = [f"{k.microseconds:.1f}", f"{k.dram_share:.1f}", f"{k.dram_speed:.0f}", str(k.registers)]
        rows.append([k.task, k.kernel, *figures, f"{k.occupancy:.0f}", stalls])
    return text_table(["task", "kernel", "µs", "DRAM %", "GB/s", "registers", "occupancy %", "stalls"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profiles and reports; 1 if a task could not be profiled, 2 where there is no ncu."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tasks", nargs="*", help="words in their titles")
    add("--contender", default=OURS, help="who does the work (default: %(default)s)")
    add("--device", choices=("cuda", "simt"), default="cuda", help="simt: the emulated device (default: cuda)")
    add("--quick", action="store_true", help="tiny sizes: to check this program")
    add("--results", type=Path, default=Path("build", "gpu"), metavar="DIR", help="default: build/gpu")
    add("--minutes", type=float, default=9.0, help="what has not ended then is ended (default: %(default)s)")
    add("--run", metavar="TASK", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        (task,) = (task for task in tasks(options.quick) if task.title == options.run)
        run_profiled(task, options.contender, torch.device(options.device))
        return 0
    ncu = find_tool("ncu")
    if ncu is None:
        print("nothing is profiled: there is no ncu, which is Nsight Compute's", file=sys.stderr)
        return 2

    found = [task for task in chosen(options.tasks, options.quick) if options.contender in task.contenders]
    device, quick, results = options.device, options.quick, options.results
    jobs = [job_of(ncu, task, options.contender, device, quick, results) for task in found]
    say(f"{len(jobs)} tasks, logs in {results / 'profile'}")
    kernels: list[Kernel] = []
    faults = {}
    for ended in run_all(jobs, 1, options.minutes):
        launched, fault = read(ended)
        kernels += launched
        if fault:
            faults[ended.job.name] = fault
        say(f"{ended.job.name}: {fault or f'{len(launched)} kernels'}, {ended.seconds:.0f} s")
    (results / "profile.json").write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    say("\n" + table(kernels))
    return int(bool(faults) or not kernels)


if __name__ == "__main__":
    sys.exit(main())
