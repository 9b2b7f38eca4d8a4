"""Plain and Markdown tables, and how figures are written in them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.timing import Spread


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(len(first)), *others]).rstrip()

    return "\n".join(line(row) for row in (head, *rows))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def duration(seconds: float) -> str:
    """Microseconds below a millisecond, else milliseconds."""
    return f"{significant(seconds * 1e6)} µs" if abs(seconds) < 1e-3 else f"{significant(seconds * 1e3)} ms"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{significant(share * 100)} %"


def spread(value: Spread) -> str:
    """The median and, in brackets, the quartiles."""
    return f"{significant(value.median)} ({significant(value.low)}-{significant(value.high)})"
