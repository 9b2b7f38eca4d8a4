"""Options that a person sets: one table, read from the command line and from a TOML file by the same rules.

An `Option` says once what may stand there; `read` makes the command line from the table and holds the file against it.
A bad option ends the program with status 2 and a sentence that names it and its value.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

Parse = Callable[[str], Any]
TOO_MANY = 2**63
LONG = 60  # characters of a value that are shown

#: What other programs call an option, beside what `trainopt.training.Options` knows.
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "learningrate", "lr_max", "max_lr", "base_lr", "alpha", "eta"), "lr"),
    **dict.fromkeys(("wd", "decay", "l2", "weight_decay_rate"), "weight_decay"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule", "sched"), "schedule"),
    **dict.fromkeys(("warmup_steps", "warmup_updates", "num_warmup_steps", "warm_up"), "warmup"),
    **dict.fromkeys(("min_lr", "lr_min", "min_lr_ratio"), "floor"),
    **dict.fromkeys(("num_threads", "n_threads", "num_workers", "workers", "jobs"), "threads"),
    **dict.fromkeys(("run_name", "experiment_name", "exp_name"), "name"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "log_dir", "run_dir", "directory", "output"), "runs"),
    **dict.fromkeys(("block_size", "seq_len", "sequence_length", "context_length"), "context"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), "width"),
    **dict.fromkeys(("n_layer", "num_layers", "depth"), "layers"),
    **dict.fromkeys(("n_head", "num_heads"), "heads"),
    **dict.fromkeys(("gpu", "accelerator"), "device"),
}


@dataclass(frozen=True)
class Option:
    """One option: `--batch-size N` on the command line, `batch-size = N` in a file.

    Args:
        name: with dashes.
        help: what it is, and its unit.
        default: the value if it is not given.
        parse: the value of a text; ValueError with "… is not …". None for an option that is on or off.
        metavar: what stands for the value in the help.
        shown: the default in words, where the value itself does not say it.
    """

    name: str
    help: str
    default: Any = None
    parse: Parse | None = None
    metavar: str = ""
    shown: str | None = None

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    def help_line(self) -> str:
        shown = self.shown
        if shown is None:
            words = {None: "none", True: "on", False: "off"} if self.parse is None or self.default is None else {}
            shown = words.get(self.default, str(self.default))
        return f"{self.help} (default: {shown})".replace("%", "%%")


# What may stand there -------------------------------------------------------------------------------------------------


def number(kind: type[int] | type[float], low: float, high: float = math.inf, above: bool = False) -> Parse:
    """A parser of finite numbers from low (greater than low, with `above`) to high."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if kind is int and value >= TOO_MANY:  # torch, range and islice count in 64 bits
            raise ValueError(f"{short(text)} is too large: it must be below 2**63")
        if not low <= value <= high or value == math.inf or (above and value == low):
            noun = "a whole number" if kind is int else "a number"
            bound = f"greater than {low:g}" if above else f"of at least {low:g}"
            bounds = bound if high == math.inf else f"from {low:g} to {high:,}"
            raise ValueError(f"{short(text)} is not {noun} {bounds}")
        return value

    return parse


def whole(low: int, high: float = math.inf) -> Parse:
    return number(int, low, high)


def real(low: float, high: float = math.inf, above: bool = False) -> Parse:
    return number(float, low, high, above)


def choice(*names: str) -> Parse:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is not one of {', '.join(names)}{nearest(text, names)}")
        return text

    return parse


def word_or(word: str, parse_other: Parse) -> Parse:
    """That word, or what the other parser takes."""

    def parse(text: str) -> Any:
        if text == word:
            return word
        try:
            return parse_other(text)
        except ValueError as error:
            raise ValueError(f"{error}, nor {word!r}") from None

    return parse


def folder_name(text: str) -> str:
    """A name for one folder."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise ValueError(f"{text!r} is not a plain name for a folder")
    return text


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean …?' if there is something that others call so, or something alike."""
    from trainopt.training import options  # not above: the command must start where trainopt cannot be imported

    name = word.lstrip("-")
    dashes = word[: len(word) - len(name)]
    key = name.replace("-", "_")
    other = OTHER_NAMES.get(key, options.OTHER_NAMES.get(key, "")).replace("_", "-")
    if other and dashes + other in known:
        return f"; did you mean {dashes}{other}?"
    alike = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {alike[0]}?" if alike else ""


def short(text: str) -> str:
    """A value as a message shows it."""
    return repr(text) if len(text) <= LONG else f"{text[:LONG]!r}…"


# Reading them ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a bad option in one sentence, with status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def read(
    arguments: Sequence[str], prog: str, description: str, groups: dict[str, Sequence[Option]]
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
            if option.parse is None:
                action: Any = argparse.BooleanOptionalAction
                section.add_argument(f"--{option.name}", action=action, help=option.help_line())
            else:
                section.add_argument(
                    f"--{option.name}", type=_quoting(option.parse), metavar=option.metavar, help=option.help_line()
                )
    table = {option.name: option for options in groups.values() for option in options}
    given, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        known = [f"--{name}" for name in ("config", *table)]
        parser.error(f"unknown option {argument}{nearest(argument.partition('=')[0], known)}")
    values = {option.key: option.default for option in table.values()}
    if "config" in given:
        values.update(_from_file(Path(given.config), table, parser))
        del given.config
    return SimpleNamespace(**{**values, **vars(given)}), parser


def _quoting(parse: Parse) -> Parse:
    """The same parser, with errors that argparse prints as they are."""

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
    if option.parse is None:
        if not isinstance(value, bool):
            raise ValueError(f"{short(str(value))} is neither true nor false")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{short(str(value).lower())} is not {option.metavar}")
    return option.parse(str(value))
