"""Options that a person sets: fields of dataclasses, read from the command line and from a TOML file by the same rules.

A field says once what may stand there (`trainopt.training.fields`), for Python too. A bad option ends the program with
status 2 and a sentence that names it and its value. No library that makes a command line of a dataclass is used: tyro
reads no files, jsonargparse knows no dashes and no --no-plot, both know no bounds, and neither answers in one sentence.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainopt.cli.refusals import MOVED, Parser, nearest
from trainopt.training.fields import FLAG, LONG, Option, short


def read(
    arguments: Sequence[str], prog: str, description: str, groups: Mapping[str, Sequence[Option]]
) -> tuple[SimpleNamespace, Parser]:
    """The value of every option: from the command line, else from the file of `--config`, else the default.

    Returns the values, by name with underscores, and the parser, whose `error` refuses what only the caller can know.
    """
    parser = Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of options, such as 'batch-size = 32'; the command line wins"
    )
    for title, options in groups.items():
        section = parser.add_argument_group(title)
        for option in options:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if option.kind is not FLAG:
                how = {"type": _quoting(option.kind.parse), "metavar": option.kind.metavar}
            section.add_argument(f"--{option.name}", help=option.help_line().replace("%", "%%"), **how)
    table = {option.name: option for options in groups.values() for option in options}
    given, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        name = argument.partition("=")[0]
        hint = MOVED.get(name) or nearest(name, [f"--{name}" for name in ("config", *table)])
        parser.error(f"unknown option {argument}{hint}")
    values = {option.key: option.default for option in table.values()}
    if "config" in given:
        values.update(_from_file(Path(given.config), table, parser))
        del given.config
    return SimpleNamespace(**{**values, **vars(given)}), parser


def _quoting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same, with errors that argparse prints as they are."""

    def quoting(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return quoting


def _from_file(path: Path, table: dict[str, Option], parser: Parser) -> dict[str, Any]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"argument --config: {str(path)!r} cannot be read: {error.strerror}")
    except RecursionError:
        parser.error(f"argument --config: {str(path)!r} is nested too deeply")
    except ValueError as error:  # also of a number of too many digits, which is none of tomllib's own errors
        parser.error(f"argument --config: {str(path)!r} is not TOML: {error}")
    values = {}
    for key, value in entries.items():
        option = table.get(key.replace("_", "-"))
        if option is None:
            name = key if len(key) <= LONG else f"{key[:LONG]}…"
            parser.error(f"{path}: unknown key {name}{nearest(key.replace('_', '-'), list(table))}")
        try:
            values[option.key] = _value_of(option, value)
        except (ValueError, RecursionError) as error:
            parser.error(f"{path}: {key}: {error}")
    return values


def _value_of(option: Option, value: Any) -> Any:
    if option.kind is FLAG:
        if not isinstance(value, bool):
            raise ValueError(f"{short(str(value))} is neither true nor false")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{short(str(value).lower())} is not {option.kind.wanted(value)}")
    return option.kind.parse(str(value))
