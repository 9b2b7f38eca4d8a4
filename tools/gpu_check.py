"""All that there is to run on a GPU: the tests, those that are slow, the benchmark, the sanitizer and the profile.

    python -m tools.gpu_check                    one after the other; each also runs alone: see gpu_test and the others
    python -m tools.gpu_check --parts test bench

A part that fails does not end the others; one whose tool is not there is left out. Leaves PART.txt, what each has
printed, in the folder of results beside what the parts leave there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import text_table
from tools.jobs import say

#: The module of each part, and its arguments beside the device and the folder of results.
PARTS = {
    "test": ["tools.gpu_test"],
    "slow": ["tools.gpu_test", "--name", "slow", "tests/cuda", "--", "-m", "slow"],
    "bench": ["benchmarks.gpu"],
    "sanitize": ["tools.gpu_sanitize"],
    "profile": ["tools.gpu_profile"],
}
OUTCOMES = {0: "ok", 2: "left out"}


def run_part(command: Sequence[str], copy: Path) -> int:
    """Runs a part, and copies what it prints into a file too."""
    with copy.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
            file.write(line)
            file.flush()
        return process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="default: all")
    add("--device", choices=("cuda", "simt"), default="cuda", help="simt: the emulated device (default: cuda)")
    add("--results", type=Path, default=Path("build", "gpu"), metavar="DIR", help="default: build/gpu")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in options.parts:
        say(f"\n--- {part} ---")
        module, *more = PARTS[part]
        command = [sys.executable, "-u", "-m", module, "--device", options.device, "--results", str(options.results)]
        command += more
        start = time.monotonic()
        code = run_part(command, options.results / f"{part}.txt")
        outcome = OUTCOMES.get(code, "FAILED")
        rows.append([part, f"{time.monotonic() - start:.0f}", outcome])
    say("\n" + text_table(["part", "seconds", "outcome"], rows))
    return int(any(row[2] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
