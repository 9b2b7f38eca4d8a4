"""What an option may be: said once, and held against arguments, the command line and files of options alike."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainopt import checks

TOO_MANY = 2**63  # torch, range and islice count in 64 bits
LONG = 60  # characters of a value that are shown


class Kind:
    """What an option may be. Called with a text it gives the value, or a ValueError with "… is not …"."""

    metavar = "TEXT"  # what stands for the value in a help

    def __call__(self, text: str) -> Any:
        value = self.read(text)
        if not self.accepts(value):
            raise ValueError(f"{short(text)} is not {self.wanted(value)}")
        return value

    def read(self, text: str) -> Any:
        """The value that a text stands for, or the text itself."""
        return text

    def accepts(self, value: Any) -> bool:
        raise NotImplementedError

    def wanted(self, value: Any) -> str:
        """What `value` should have been, in words."""
        raise NotImplementedError

    def check(self, name: str, value: Any) -> None:
        """ValueError that names the option and its value, if it is not of this kind."""
        if self.accepts(value):
            return
        if isinstance(value, int) and value >= TOO_MANY:  # Python itself writes no number of thousands of digits
            shown = f"{value:.3g}" if value < 10**300 else "too large"
        else:
            shown = repr(value)
        raise ValueError(f"{name} is {shown}; it must be {self.wanted(value)}")


class Text(Kind):
    """Any text: a name, or a path."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str | os.PathLike)

    def wanted(self, value: Any) -> str:
        return "a text"


@dataclass(frozen=True)
class Number(Kind):
    """A finite number.

    Args:
        kind: int or float; a float may be given as an int.
        low, high: its bounds; that of a float begins at 0, and an int is below 2**63.
        above: whether it must be greater than low.
        below: whether it must be less than high.
        word: one word that may stand for a number.
    """

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    word: str | None = None

    @property
    def metavar(self) -> str:  # type: ignore[override]
        return ("N" if self.kind is int else "X") + (f"|{self.word}" if self.word else "")

    def read(self, text: str) -> Any:
        try:
            return self.kind(text)
        except ValueError:
            return text

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return value == self.word
        if not isinstance(value, int if self.kind is int else int | float):
            return False
        try:
            if self.kind is int:
                checks.whole("", "", value, int(self.low))
            else:
                checks.number("", "", value, self.low if self.above else None, self.high)
        except (ValueError, OverflowError):
            return False
        if self.kind is int and value >= TOO_MANY:
            return False
        return value < self.high if self.below else value <= self.high

    def wanted(self, value: Any) -> str:
        if self.kind is int and isinstance(value, int) and value >= TOO_MANY:
            return "below 2**63"
        noun = "a whole number" if self.kind is int else "a number"
        bounds = f"greater than {self.low:g}" if self.above else f"of at least {self.low:g}"
        if self.high != math.inf:
            less = f"less than {self.high}" if self.below else f"at most {self.high:,}"
            bounds += f" and {less}"
        return f"{noun} {bounds}" + (f' or "{self.word}"' if self.word else "")


@dataclass(frozen=True)
class Choice(Kind):
    """One of these words."""

    names: tuple[str, ...]
    metavar = "NAME"

    def accepts(self, value: Any) -> bool:
        return value in self.names

    def wanted(self, value: Any) -> str:
        near = difflib.get_close_matches(str(value), self.names, 1, 0.5)
        return f"one of {', '.join(map(repr, self.names))}" + (f"; did you mean {near[0]}?" if near else "")


class Flag(Kind):
    """On or off."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def wanted(self, value: Any) -> str:
        return "True or False"


class FolderName(Kind):
    """A name for one folder."""

    metavar = "NAME"

    def accepts(self, value: Any) -> bool:
        return value not in ("", ".", "..") and Path(value).name == value

    def wanted(self, value: Any) -> str:
        return "a plain name for a folder"


def whole(low: int, high: float = math.inf, word: str | None = None) -> Number:
    return Number(int, low, high, word=word)


def real(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Number:
    return Number(float, low, high, above, below)


def short(text: str) -> str:
    """A value as a message shows it."""
    return repr(text) if len(text) <= LONG else f"{text[:LONG]!r}…"


# Fields of a dataclass ------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """A field of a dataclass of options as a person sets it: `--batch-size N`, or `batch-size = N` in a file."""

    key: str  # the field's name
    kind: Kind
    default: Any
    help: str
    shown: str | None = None  # the default in words, where the value itself does not say it

    @property
    def name(self) -> str:
        return self.key.replace("_", "-")

    def help_line(self) -> str:
        words = {None: "none", True: "on", False: "off"} if self.default is None or isinstance(self.kind, Flag) else {}
        shown = words.get(self.default, str(self.default)) if self.shown is None else self.shown
        return f"{self.help} (default: {shown})"


def option(default: Any, kind: Kind) -> Any:
    """A field of a dataclass of options. Where the default is None, None is always accepted."""
    return dataclasses.field(default=default, metadata={"kind": kind})


def check(options: Any) -> None:
    """ValueError for the first field of a dataclass that is not of its kind."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is not None or field.default is not None:
            field.metadata["kind"].check(field.name, value)


def options_of(cls: type, names: Sequence[str] | None = None) -> tuple[Option, ...]:
    """The fields of a dataclass, or those named, each with what the docstring's "Args:" says of it."""
    texts: dict[str, list[str]] = {}
    for line in (inspect.getdoc(cls) or "").partition("Args:\n")[2].splitlines():
        name, colon, text = line.partition(": ")
        if colon and name.startswith("    ") and name.strip().isidentifier() and name.strip() == name[4:]:
            texts[name.strip()] = [text]
        elif texts:
            texts[list(texts)[-1]].append(line.strip())
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return tuple(
        Option(name, fields[name].metadata["kind"], fields[name].default, " ".join(texts[name]).strip())
        for name in names or fields
    )
