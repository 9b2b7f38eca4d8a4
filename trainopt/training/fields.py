"""What an option may be: said once, and held against arguments, the command line and files of options alike."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainopt import checks

TOO_MANY = 2**63  # torch, range and islice count in 64 bits
LONG = 60  # characters of a value that are shown


@dataclass(frozen=True)
class Kind:
    """What an option may be.

    Args:
        words: that, as in "a whole number of at least 1".
        accepts: whether a value is that.
        read: the value that a text stands for; ValueError where it stands for none.
        metavar: what stands for the value in a help.
        names: the words that there are, where it is one of them.
    """

    words: str
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any] = str
    metavar: str = "TEXT"
    names: tuple[str, ...] = ()

    def parse(self, text: str) -> Any:
        """The value that a text stands for; ValueError with "… is not …"."""
        try:
            value = self.read(text)
        except ValueError:
            value = text
        if not self.accepts(value):
            raise ValueError(f"{short(text)} is not {self.wanted(value)}")
        return value

    def check(self, name: str, value: Any) -> None:
        """ValueError that names the option and its value, if it is not of this kind."""
        if not self.accepts(value):
            is_large = isinstance(value, int) and value >= TOO_MANY  # Python writes no number of thousands of digits
            shown = repr(value) if not is_large else f"{value:.3g}" if value < 10**300 else "too large"
            raise ValueError(f"{name} is {shown}; it must be {self.wanted(value)}")

    def wanted(self, value: Any) -> str:
        """What a value should have been, in words."""
        if self.read is not float and isinstance(value, int) and value >= TOO_MANY:
            return "below 2**63"
        near = difflib.get_close_matches(str(value), self.names, 1, 0.5) if self.names else ()
        return f"{self.words}; did you mean {near[0]}?" if near else self.words


def whole(low: int, high: float = TOO_MANY - 1, word: str | None = None) -> Kind:
    """A whole number from low to high, or, if there is one, a word."""

    def accepts(value: Any) -> bool:
        if isinstance(value, str):
            return value == word
        return isinstance(value, int) and passes(checks.whole, value, low) and value <= high

    limit = "" if high == TOO_MANY - 1 else f" and at most {high:,}"
    words = f"a whole number of at least {low}{limit}" + (f' or "{word}"' if word else "")
    return Kind(words, accepts, lambda text: text if text == word else int(text), f"N|{word}" if word else "N")


def real(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Kind:
    """A finite number from low, which is 0, to high; with `above` greater than low, with `below` less than high."""

    def accepts(value: Any) -> bool:
        is_inside = isinstance(value, int | float) and passes(checks.number, value, low if above else None, high)
        return is_inside and not (below and value == high)

    limit = "" if high == math.inf else f" and less than {high}" if below else f" and at most {high}"
    return Kind(f"a number {'greater than' if above else 'of at least'} {low:g}{limit}", accepts, float, "X")


def choice(*names: str) -> Kind:
    return Kind(f"one of {', '.join(map(repr, names))}", lambda value: value in names, str, "NAME", names)


def is_folder_name(value: Any) -> bool:
    return value not in ("", ".", "..") and Path(value).name == value


FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str | os.PathLike))
FOLDER_NAME = Kind("a plain name for a folder", is_folder_name, str, "NAME")


def passes(check: Callable[..., Any], value: Any, *bounds: Any) -> bool:
    try:
        check("", "", value, *bounds)
    except (ValueError, OverflowError):
        return False
    return True


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
        words = {None: "none", True: "on", False: "off"} if self.default is None or self.kind is FLAG else {}
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
    fields = {field.name: field for field in dataclasses.fields(cls)}
    texts: dict[str, list[str]] = {}
    for line in (inspect.getdoc(cls) or "").partition("Args:\n")[2].splitlines():
        name, _, text = line.removeprefix("    ").partition(": ")
        if name in fields:
            texts[name] = [text]
        elif texts:
            texts[list(texts)[-1]].append(line.strip())
    return tuple(
        Option(name, fields[name].metadata["kind"], fields[name].default, " ".join(texts[name]).strip())
        for name in names or fields
    )
