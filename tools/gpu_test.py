"""Runs the test suite with a process for each file, so that a fault in one does not end the others.

    python -m tools.gpu_test                               all files; those of tests/cuda must find a GPU
    python -m tools.gpu_test tests/cuda -- -k clip -x      what stands behind "--" is pytest's
    python -m tools.gpu_test --device simt tests/cuda      on the tests' emulated device

Leaves test/FILE.log for each file and test.json in the folder of results, or so under another --name. Slow tests are
left out: `-- -m slow` has these alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.tables import text_table
from tools.jobs import Ended, Job, cores, run_all, say, split_arguments

ROOT = Path(__file__).parents[1]
CUDA_TESTS = Path("tests", "cuda")
KINDS = ("passed", "failed", "error", "skipped")
#: What comes first on a GPU: whatever the rest stands on. Beginnings of names in tests/cuda.
FIRST = (
    *("test_steps", "test_recalled", "test_unread", "test_device", "test_graphs"),
    *("test_clipping", "test_pointwise", "test_cross_entropy", "test_linear"),
)


@dataclass
class Report:
    """What became of one file."""

    file: str
    outcome: str  # "ok", or what is wrong
    seconds: float
    passed: int = 0
    failed: int = 0
    error: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)  # how many for each reason


def test_files(wanted: Sequence[str]) -> list[Path]:
    """The test files of some files and folders, those of a GPU first, from the root of the sources."""
    places = [Path(place) for place in wanted] or [CUDA_TESTS, Path("tests")]
    found = []
    for place in places:
        found += sorted((ROOT / place).rglob("test_*.py"), key=rank) if (ROOT / place).is_dir() else [ROOT / place]
    return [file.relative_to(ROOT) for file in dict.fromkeys(found)]


def rank(file: Path) -> tuple[int, Path]:
    """Its place among the files of a folder."""
    own = (i for i, start in enumerate(FIRST) if file.parent.name == CUDA_TESTS.name and file.name.startswith(start))
    return next(own, len(FIRST)), file


def job_of(file: Path, device: str, logs: Path, seconds: float, threads: int, arguments: Sequence[str]) -> Job:
    """pytest for one file."""
    command = [sys.executable, *(["-P"] if device == "simt" else []), "-m", "pytest", str(file), "-v", "-rfEs"]
    command += ["-m", "not slow", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={seconds * 0.9:.0f}"]
    if CUDA_TESTS in file.parents:
        command.append("--gpu" if device == "cuda" else "--emulated")
    log = logs / f"{'-'.join(file.with_suffix('').parts[1:])}.log"
    return Job(str(file), [*command, *arguments], log, seconds, {"OMP_NUM_THREADS": str(threads)})


def report_of(ended: Ended) -> Report:
    """What pytest's own words, or their lack, say of a file."""
    text = ended.text
    report = Report(ended.job.name, "ok", round(ended.seconds, 1))
    summary = re.findall(r"^=+ (?:.*, )?(?:\d+ \w+|no tests ran).* in [\d.]+s.*=+$", text, re.MULTILINE)
    if summary:
        for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", summary[-1]):
            setattr(report, kind, int(count))
    else:  # it did not come to its end
        status = Counter(re.findall(r"^tests/\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE))
        for kind in KINDS:
            setattr(report, kind, status[kind.upper()])
    report.failures = [line[:300] for line in re.findall(r"^(?:FAILED|ERROR) (tests/.*)", text, re.MULTILINE)]
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)", text, re.MULTILINE):
        report.skips[reason] = report.skips.get(reason, 0) + int(count)
    if ended.fault or not summary:
        last = re.findall(r"^(tests/\S+::.*?)(?: (?:PASSED|FAILED|ERROR|SKIPPED)\b.*)?$", text, re.MULTILINE)
        running = f" in {last[-1].partition('Fatal Python')[0].strip()}" if last else ""
        report.outcome = f"{ended.fault or 'it ended early'}{running}"
    elif report.failed or report.error:
        report.outcome = "FAILED"
    elif ended.code not in (0, 5):  # 5: no test was chosen
        report.outcome = f"pytest ended with {ended.code}"
    return report


def table(reports: Sequence[Report]) -> str:
    """A row a file, and one of all."""
    rows = [
        [r.file, str(r.passed), str(r.failed + r.error), str(r.skipped), f"{r.seconds:.1f}", r.outcome] for r in reports
    ]
    total = [sum(getattr(r, kind) for r in reports) for kind in KINDS]
    bad = sum(r.outcome != "ok" for r in reports)
    whole = ["all", str(total[0]), str(total[1] + total[2]), str(total[3]), f"{sum(r.seconds for r in reports):.1f}"]
    return text_table(
        ["file", "passed", "failed", "skipped", "seconds", "outcome"],
        [*rows, [*whole, f"{bad} with faults" if bad else "ok"]],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and reports; 1 if anything failed."""
    own, handed_on = split_arguments(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", help="test files and folders (default: all)")
    add("--device", choices=("cuda", "simt"), default="cuda", help="simt: the emulated device (default: cuda)")
    add("--results", type=Path, default=Path("build", "gpu"), metavar="DIR", help="default: build/gpu")
    add("--name", default="test", help="of what it leaves there (default: %(default)s)")
    add("--jobs", type=int, default=max(1, min(6, cores() // 2)), help="files at once (default here: %(default)s)")
    add("--minutes", type=float, default=60.0, help="what has not ended then is ended (default: %(default)s)")
    add("--file-seconds", type=float, default=600.0, help="the longest that a file may take (default: %(default)s)")
    options = parser.parse_args(own)

    threads = max(1, cores() // options.jobs)
    files = test_files(options.files)
    logs, summary = options.results / options.name, options.results / f"{options.name}.json"
    jobs = [job_of(f, options.device, logs, options.file_seconds, threads, handed_on) for f in files]
    say(f"{len(files)} test files, {options.jobs} at once, logs in {logs}")
    by_file = {}
    for ended in run_all(jobs, options.jobs, options.minutes):
        report = by_file[ended.job.name] = report_of(ended)
        say(f"{report.file}: {report.outcome}, {report.seconds:.1f} s")
    reports = [by_file[job.name] for job in jobs]
    summary.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")

    failures = [failure for report in reports for failure in report.failures]
    skips: Counter[str] = Counter()
    for report in reports:
        skips.update(report.skips)
    say("\n" + "\n".join(f"FAILED {failure[:200]}" for failure in failures[:40]))
    if len(failures) > 40:
        say(f"... and {len(failures) - 40} more: see {summary}")
    say("\n".join(f"skipped {count}: {reason[:120]}" for reason, count in skips.most_common(12)))
    say("\n" + table(reports))
    return int(any(report.outcome != "ok" for report in reports))


if __name__ == "__main__":
    sys.exit(main())
