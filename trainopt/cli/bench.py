"""`trainopt bench`: the benchmarks of the source tree."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import trainopt
from trainopt.cli.refusals import Parser, nearest

SOURCES = Path(trainopt.__file__).parents[1]


def benchmarks() -> list[str]:
    """The names of the benchmarks beside the package; none where it was installed from a wheel."""
    files = (SOURCES / "benchmarks").glob("*.py") if (SOURCES / "setup.py").exists() else ()
    return sorted(file.stem for file in files if "\ndef main(" in file.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> int:
    """Runs one of the benchmarks with the rest of the arguments; without a name, lists them."""
    names = benchmarks()
    parser = Parser(prog="trainopt bench", add_help=False)
    if not names:
        parser.error("the benchmarks are in trainopt's source tree, and this trainopt is installed without it")
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: trainopt bench NAME [options]; NAME --help lists its options")
        for name in names:
            print(f"  {name:12}{first_line(name)}")
        return 0
    name, *rest = arguments
    if name not in names:
        parser.error(f"there is no benchmark {name!r}{nearest(name, names)}")
    sys.path.insert(0, str(SOURCES))
    return importlib.import_module(f"benchmarks.{name}").main(rest)


def first_line(name: str) -> str:
    """What a benchmark says it is."""
    text = (SOURCES / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    return text.lstrip('"').split("\n", 1)[0]
