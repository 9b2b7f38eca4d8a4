"""Runs a choice of the GPU tests under compute-sanitizer's memcheck, racecheck and synccheck.

    python -m tools.gpu_sanitize
    python -m tools.gpu_sanitize --tools racecheck tests/cuda/test_steps.py -- -k strided

The choice covers every kernel in every layout and ends within ten minutes on an H100; what has not ended by then is
reported as such. Leaves sanitize/TOOL-FILE.log for each run and sanitize.json in the folder of results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.tables import text_table
from tools.gpu_test import test_files
from tools.jobs import Ended, Job, find_tool, run_all, say, split_arguments

TOOLS = ("memcheck", "racecheck", "synccheck")
FILES = ("cuda/test_steps", "cuda/test_cross_entropy", "test_losses_cross_entropy", "cuda/test_pointwise_losses")
FILES += ("cuda/test_clipping",)
CHOICE = "(layouts or unaligned or sum or clip or label) and not cpu"

#: What the tools report of, in our kernels alone: torch's and CUDA's own are not to be judged here, nor calls of CUDA's
#: interface that fail as they are meant to.
CHECKED = ("--kernel-name", "kernel_substring=trainopt", "--report-api-errors", "no")

#: Without torch's cache each tensor is an allocation of its own, whose bounds are watched.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

ERROR_CODE = 86  # none of pytest's own


@dataclass
class Report:
    """One tool over one file of tests."""

    tool: str
    file: str
    errors: int  # hazards too
    passed: int
    failed: int
    seconds: float
    outcome: str  # "ok", or what is wrong


def jobs_of(
    sanitizer: str, device: str, files: Sequence[Path], tools: Sequence[str], results: Path, handed_on: Sequence[str]
) -> list[Job]:
    """A job for each file and tool."""
    chosen = handed_on or ["-k", CHOICE]
    jobs = []
    for file in files:
        for tool in tools:
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_CODE), *CHECKED]
            command += ["--port", str(49152 + 64 * len(jobs))]  # several at once
            command += [sys.executable, *(["-P"] if device == "simt" else []), "-m", "pytest", str(file)]
            command += ["--gpu" if device == "cuda" else "--emulated", "-m", "not slow", "-q", "-rfE", *chosen]
            log = results / "sanitize" / f"{tool}-{file.stem.removeprefix('test_')}.log"
            jobs.append(Job(f"{tool} {file}", [*command, "-p", "no:cacheprovider"], log, 3600, NO_CACHE))
    return jobs


def report_of(ended: Ended) -> Report:
    """What the tool's summary and pytest's say."""
    tool, _, file = ended.job.name.partition(" ")
    text = ended.text
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    count = {kind: int(number) for number, kind in re.findall(r"\b(\d+) (passed|failed|error)s? ?[,i]", text)}
    report = Report(
        tool,
        file,
        int(found[-1]) if found else 0,
        count.get("passed", 0),
        count.get("failed", 0) + count.get("error", 0),
        round(ended.seconds, 1),
        "ok",
    )
    if ended.fault:
        report.outcome = ended.fault
    elif not found:
        report.outcome = f"{tool} has come to no result: see {ended.job.log}"
    elif report.errors:
        report.outcome = f"ERRORS: see {ended.job.log}"
    elif report.failed:
        report.outcome = f"FAILED: see {ended.job.log}"
    elif not report.passed:
        report.outcome = "no test has run"
    elif ended.code:
        report.outcome = f"ended with {ended.code}"
    return report


def table(reports: Sequence[Report]) -> str:
    """A row for each tool and file."""
    rows = [
        [r.tool, Path(r.file).stem, str(r.errors), str(r.passed), str(r.failed), f"{r.seconds:.0f}", r.outcome]
        for r in reports
    ]
    return text_table(["tool", "tests", "errors", "passed", "failed", "seconds", "outcome"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and reports; 1 if anything was found, 2 where there is no compute-sanitizer."""
    own, handed_on = split_arguments(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_sanitize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", help=f"test files (default: those of {', '.join(FILES)})")
    add("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    add("--device", choices=("cuda", "simt"), default="cuda", help="simt: the emulated device (default: cuda)")
    add("--results", type=Path, default=Path("build", "gpu"), metavar="DIR", help="default: build/gpu")
    add("--jobs", type=int, default=4, help="runs at once (default: %(default)s)")
    add("--minutes", type=float, default=9.0, help="what has not ended then is ended (default: %(default)s)")
    options = parser.parse_args(own)
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        print("nothing is checked: there is no compute-sanitizer, which is a part of the CUDA toolkit", file=sys.stderr)
        return 2

    files = test_files(options.files or [f"tests/{name}.py" for name in FILES])
    jobs = jobs_of(sanitizer, options.device, files, options.tools, options.results, handed_on)
    say(f"{len(jobs)} runs, {options.jobs} at once, logs in {options.results / 'sanitize'}")
    by_name = {}
    for ended in run_all(jobs, options.jobs, options.minutes):
        report = by_name[ended.job.name] = report_of(ended)
        say(f"{ended.job.name}: {report.outcome}, {report.seconds:.0f} s")
    reports = sorted(by_name.values(), key=lambda r: (TOOLS.index(r.tool), r.file))
    (options.results / "sanitize.json").write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    say("\n" + table(reports))
    return int(any(report.outcome != "ok" for report in reports))


if __name__ == "__main__":
    sys.exit(main())
