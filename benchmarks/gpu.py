"""What optimizer steps, losses and clipping cost on a GPU, with trainopt and its peers.

    python -m benchmarks.gpu                              prints tables, and a short one of all last
    python -m benchmarks.gpu --only losses --markdown
    python -m benchmarks.gpu --compiled                   torch.compile's too, which takes minutes for many tensors
    python -m benchmarks.gpu --device simt --quick        on the tests' emulated device: shows that this program runs

Times are the device's own, between CUDA events round a block of calls; beside them stands what a call costs the host.
Every round measures all contenders in random order, and ratios are taken within a round. In the same rounds a plain
copy moves the bytes that the work must move at the least. Leaves bench.jsonl in the folder of results: a line for the
machine, and one for each task as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import trainopt
from benchmarks.gpu_tasks import COMPILED, COPY, KINDS, OURS, Task, tasks
from benchmarks.losses import is_alike
from benchmarks.optimizers import positive
from benchmarks.tables import duration, markdown_table, percent, spread, text_table
from benchmarks.timing import BLOCK_SECONDS, paired_ratio
from trainopt._extension import _C

# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """One task: seconds a call of each contender, round by round, on the device and on the host."""

    kind: str
    title: str
    moved: int
    reference: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes that a call holds above what was held before
    left_out: dict[str, str] = field(default_factory=dict)


class Copy:
    """Reads and writes `traffic` bytes in all: the device's own speed."""

    def __init__(self, traffic: int, device: torch.device) -> None:
        self.source = torch.zeros(max(traffic // 2, 1), dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)


def timed(call: Callable[[], object], calls: int, device: torch.device) -> tuple[float, float]:
    """Seconds a call: on the device, and until the host had handed it over. Without events both are the host's."""
    events = device.type == "cuda"
    torch.get_device_module(device).synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) if events else None for _ in range(2))
    if first is not None:
        first.record()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - start) / calls
    if first is None or last is None:
        return host, host
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls, host


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, block_seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """As benchmarks.timing.interleave, on the device; and the same on the host."""
    calls = {}
    for name, call in contenders.items():
        timed(call, 3, device)
        calls[name] = max(1, round(block_seconds / max(timed(call, 3, device)[0], 1e-7)))
    order, shuffle = list(contenders), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    host: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            contenders[name]()
            on_device, on_host = timed(contenders[name], calls[name], device)
            seconds[name].append(on_device)
            host[name].append(on_host)
    return seconds, host


def measure(
    task: Task, device: torch.device, rounds: int, block_seconds: float = BLOCK_SECONDS, compiled: bool = True
) -> Result:
    """Times all contenders that do the work; those that do not are left out, with the reason.

    Args:
        compiled: also torch.compile's, on CUDA.
    """
    result = Result(task.kind, task.title, task.moved, task.reference)
    module = torch.get_device_module(device)
    truth: list[Tensor] = []
    calls: dict[str, Callable[[], object]] = {}
    for name, prepare in task.contenders.items():
        if name == COMPILED and not (compiled and device.type == "cuda"):
            continue
        if name == COMPILED:
            torch._dynamo.reset()
        try:
            ready = prepare(device)
            ready.call()
            found = ready.outcome()
        except Exception as error:  # a contender that does not work here, for whatever reason, does not end the rest
            result.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        truth = truth or [tensor.clone() for tensor in found]
        if not all(map(is_alike, found, truth)):
            result.left_out[name] = f"its outcome is unlike that of {task.reference}"
            continue
        calls[name] = ready.call
    if task.moved:
        calls[COPY] = Copy(task.moved, device)
    del truth
    result.seconds, result.host = interleave(calls, rounds, device, block_seconds)
    for name, call in calls.items():
        module.synchronize()
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        call()
        module.synchronize()
        result.peaks[name] = max(module.max_memory_allocated() - before, 0)
    return result


# ----------------------------------------------------------------------------------------------------------- reporting


def rows_of(result: Result) -> list[list[str]]:
    """A row a contender: time, ratio, speed, share of the copy's speed, the host's time, memory."""
    reference = result.seconds.get(result.reference)
    copying = result.seconds.get(COPY)
    rows = []
    for name, seconds in result.seconds.items():
        rows.append(
            [
                name,
                duration(median(seconds)),
                spread(paired_ratio(reference, seconds)) if reference and name != COPY else "",
                f"{result.moved / median(seconds) / 1e9:,.0f}" if result.moved else "",
                percent(paired_ratio(copying, seconds).median) if copying else "",
                duration(median(result.host[name])),
                f"{result.peaks[name] / 1e6:,.1f} MB" if name in result.peaks and name != COPY else "",
            ]
        )
    return rows


def details(result: Result, as_markdown: bool = False) -> str:
    """A table with a row a contender."""
    ratio = f"times as fast as {result.reference}"
    head = ["contender", "a call", ratio, "GB/s", "of copy speed", "on the host", "peak memory above"]
    moved = f", {result.moved / 1e6:,.1f} MB must move" if result.moved else ""
    lines = [
        f"{'### ' if as_markdown else ''}{result.title}{moved}",
        (markdown_table if as_markdown else text_table)(head, rows_of(result)),
        *(f"{name} is left out: {reason}" for name, reason in result.left_out.items()),
    ]
    return ("\n\n" if as_markdown else "\n").join(lines) + "\n"


def summary(results: Sequence[Result], as_markdown: bool = False) -> str:
    """A table with a row a task: its reference and trainopt."""
    rows = []
    for result in results:
        ours = next((row for row in rows_of(result) if row[0] == OURS), None)
        reference = result.seconds.get(result.reference)
        theirs = duration(median(reference)) if reference else "left out"
        rows.append(
            [result.title, result.reference, theirs, *([ours[1], ours[2], ours[4]] if ours else ["left out", "", ""])]
        )
    head = ["task", "reference", "its time", "trainopt", "times as fast", "of copy speed"]
    return (markdown_table if as_markdown else text_table)(head, rows)


# -------------------------------------------------------------------------------------------------------- command line


def obstacle(device: str) -> str:
    """Why nothing can be measured on a device, if so."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU here"
    if device not in _C.device_types():
        return f"trainopt is built for {' and '.join(_C.device_types())}, not for {device}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if trainopt failed somewhere, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=KINDS, default=KINDS, help="what to measure (default: all)")
    add("--rounds", type=positive, default=15, help="rounds; each times every contender once (default: %(default)s)")
    add("--results", type=Path, default=Path("build", "gpu"), metavar="DIR", help="folder (default: build/gpu)")
    add("--minutes", type=float, default=60.0, help="no task is begun after these (default: %(default)s)")
    add("--compiled", action="store_true", help="torch.compile's contenders too")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--device", choices=("cuda", "simt"), default="cuda", help="simt: the tests' emulated device (default: cuda)")
    add("--quick", action="store_true", help="tiny sizes in two rounds: to check this program, not to measure")
    options = parser.parse_args(arguments)
    if reason := obstacle(options.device):
        print(f"nothing is measured: {reason}", file=sys.stderr)
        return 2

    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "emulated"
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    heading = f"{name}, torch {torch.__version__}{cuda}, trainopt {trainopt.__version__}"
    rounds = 2 if options.quick else options.rounds
    what = "Tiny sizes, which measure nothing" if options.quick else f"Medians of {rounds} interleaved rounds"
    print(f"{heading}\n{what}; in brackets the quartiles\n", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "bench.jsonl"
    wanted = [task for task in tasks(options.quick) if task.kind in options.only]
    end = time.monotonic() + 60 * options.minutes
    results: list[Result] = []
    with file.open("w", buffering=1) as lines:
        lines.write(json.dumps({"machine": heading, "rounds": rounds}) + "\n")
        for task in wanted:
            if time.monotonic() > end:
                break
            try:
                block_seconds = 0 if options.quick else BLOCK_SECONDS
                results.append(measure(task, device, rounds, block_seconds, options.compiled))
            except Exception as error:  # out of memory, a fault of the device: what is measured is kept
                reason = {OURS: f"{type(error).__name__}: {error}"}
                results.append(Result(task.kind, task.title, task.moved, task.reference, left_out=reason))
            lines.write(json.dumps(asdict(results[-1])) + "\n")
            gc.collect()  # an optimizer refers to itself: free its states before the next task
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(details(results[-1], options.markdown), flush=True)
    print(summary(results, options.markdown))
    if len(results) < len(wanted):
        print(
            f"stopped after {options.minutes:g} minutes: {len(wanted) - len(results)} of {len(wanted)} tasks are left"
        )
    print(f"written to {file}", flush=True)
    return int(any(OURS in result.left_out for result in results))


if __name__ == "__main__":
    sys.exit(main())
