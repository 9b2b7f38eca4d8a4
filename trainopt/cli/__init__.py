"""The command `trainopt`, also `python -m trainopt`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from trainopt.cli.refusals import nearest

COMMANDS = ("train", "lr-find", "bench", "info")
USAGE = """\
usage: trainopt [COMMAND]

  train EXPERIMENT    train an experiment: digits, or charlm
  lr-find EXPERIMENT  find a learning rate for it
  bench [NAME]        time optimizer steps and losses against torch
  info                what is installed, what it was built with, which kernels run here; without a command, the same

COMMAND --help lists the options of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is its own, and 2 where there is no such command."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["info"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "info":
        from trainopt.info import main as info

        return info() if not rest else refuse(f"info takes no arguments, and was given {' '.join(rest)}")
    try:
        importlib.import_module("trainopt._extension")
    except ImportError as error:
        print(f"trainopt: error: {error}", file=sys.stderr)
        return 1
    if command in ("train", "lr-find"):
        return experiment(command, rest)
    if command == "bench":
        from trainopt.cli.bench import main as bench

        return bench(rest)
    return refuse(f"there is no command {command!r}; there are {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")


def experiment(command: str, arguments: list[str]) -> int:
    """`train` or `lr-find`, with the name of what to train first."""
    from trainopt.cli.lr_find import main as lr_find
    from trainopt.cli.train import main as train
    from trainopt.experiments import NAMES

    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: trainopt {command} EXPERIMENT [options]\n\nexperiments: {', '.join(NAMES)}; "
            f"'trainopt {command} {NAMES[0]} --help' lists its options"
        )
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in NAMES:
        return refuse(f"{command}: there is no experiment {name!r}; there are {', '.join(NAMES)}{nearest(name, NAMES)}")
    return (train if command == "train" else lr_find)(name, rest)


def refuse(message: str) -> int:
    print(f"trainopt: error: {message} (--help lists the commands)", file=sys.stderr)
    return 2
