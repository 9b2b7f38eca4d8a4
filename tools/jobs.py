"""Commands run side by side, each in a process group of its own, with a log and a limit of time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

#: Where CUDA's tools lie beside the PATH.
USUAL_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute/*")


@dataclass(frozen=True)
class Job:
    """A command, and the file that all it prints goes to."""

    name: str
    command: Sequence[str]
    log: Path
    seconds: float = 600.0  # it is ended after these
    environment: dict[str, str] = field(default_factory=dict)  # beside what there is


@dataclass(frozen=True)
class Ended:
    """A job that ran, or that its time did not suffice for."""

    job: Job
    code: int | None  # as of subprocess: negative for a signal; None: ended by the limit, or never started
    seconds: float

    @property
    def text(self) -> str:
        """All that it printed."""
        return self.job.log.read_text(errors="replace") if self.job.log.exists() else ""

    @property
    def fault(self) -> str:
        """How it ended, if not by itself."""
        if self.code is None:
            return "out of time" if self.seconds else "not started: out of time"
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else ""


def run_all(jobs: Sequence[Job], at_once: int, minutes: float) -> Iterator[Ended]:
    """Runs the jobs, the first ones first, and yields each as it ends; whatever runs after `minutes` is ended."""
    deadline = time.monotonic() + 60 * minutes
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(_run, job, deadline, running) for job in jobs]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:  # an interrupt too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                _end(process)
            raise


def _run(job: Job, deadline: float, running: set[subprocess.Popen[bytes]]) -> Ended:
    start = time.monotonic()
    if start >= deadline:
        return Ended(job, None, 0.0)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )
        running.add(process)
        try:
            code: int | None = process.wait(min(job.seconds, deadline - start))
        except subprocess.TimeoutExpired:
            _end(process)
            code = None
        running.discard(process)
    return Ended(job, code, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_tool(name: str) -> str | None:
    """The path of one of CUDA's tools, in the PATH, in CUDA_HOME or where it usually lies."""
    home = os.environ.get("CUDA_HOME", "")
    places = [*([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), *USUAL_PLACES]
    folders = [folder for place in places for folder in sorted(Path("/").glob(place.lstrip("/")), reverse=True)]
    return shutil.which(name) or next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


def split_arguments(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A program's own arguments, and those behind "--", which it hands on."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]
