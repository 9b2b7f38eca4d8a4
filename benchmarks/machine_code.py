"""Loops in a GPU's machine code, as nvdisasm prints it: what a way through a loop loads, stores and costs.

A loop has many ways through it: ones that end a tensor, ones for another type, a slow one for what overflows. Which of
them is the one that the time goes into is said by what it moves: so for each number of bytes that a way can load and
store, the one of fewest instructions is what counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
LABEL = re.compile(r"^\s*(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    conditional: bool
    target: str  # of a branch


class Way(NamedTuple):
    """A way through a loop. Ordered by what it costs."""

    instructions: int = 0
    float32: int = 0  # of these, additions, multiplications and the like of float32
    special: int = 0  # exponentials, reciprocals and the like; conversions from and to 16 bits on some GPUs
    integer: int = 0  # integers, logic, comparisons, selections
    float64: int = 0  # and conversions to it

    def after(self, other: Way) -> Way:
        return Way(*map(add, self, other))


class Moved(NamedTuple):
    """What a way through a loop moves, in bytes of a thread; and how many instructions of a wanted kind it has."""

    loaded: int = 0
    stored: int = 0  # by words, or halves of them
    from_shared: int = 0
    to_shared: int = 0
    marked: int = 0
    singles: int = 0  # elements stored one by one, whatever a condition says

    def after(self, other: Moved) -> Moved:
        return Moved(*map(add, self, other))

    def times(self, count: int) -> Moved:
        return Moved(*(value * count for value in self))

    def is_within(self, most: Moved) -> bool:
        return (
            self.loaded <= most.loaded
            and self.stored <= most.stored
            and self.from_shared <= most.from_shared
            and self.to_shared <= most.to_shared
            and self.marked <= most.marked
            and self.singles <= most.singles
        )


FLOAT32 = re.compile(r"F(ADD|MUL|FMA)\b|F(ADD|MUL|FMA)32I|FSWZADD")
SPECIAL = re.compile(r"MUFU")
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.F64")
INTEGER = re.compile(
    r"U?(IADD|ISETP|LOP|SHF|LEA|PRMT|SEL|IMNMX|VIADD|VIMNMX|POPC|FLO|SHL|SHR|PLOP|I2F|F2F)|F(SETP|SEL|MNMX)|F2FP|VHMNMX"
)


def width_of(opcode: str) -> int:
    """Bytes that a load or a store moves."""
    found = re.search(r"\.(U8|S8|U16|S16|64|128)\b", opcode)
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[found[1]] if found else 4


class Code:
    """A kernel's instructions in blocks that have one entry and one end, in the order of the code."""

    def __init__(self, text: str, marked: str) -> None:
        self.marked = re.compile(marked) if marked else None
        labels: dict[str, int] = {}
        found: list[Instruction] = []
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(found)
            elif match := LINE.search(line):
                target = TARGET.search(match[4])
                is_branch = match[3].startswith("BRA")
                found.append(
                    Instruction(
                        match[3],
                        # A uniform branch has its condition among the operands.
                        match[2] is not None or (is_branch and match[4].lstrip()[:1] != "`"),
                        target[1] if is_branch and target else "",
                    )
                )
        starts = {0, *labels.values()}
        starts |= {i + 1 for i, one in enumerate(found) if one.target or one.opcode in ("EXIT", "RET", "BRX")}
        ordered = sorted(start for start in starts if start < len(found))
        self.blocks = [found[i:j] for i, j in zip(ordered, [*ordered[1:], len(found)], strict=True)]
        place = {start: i for i, start in enumerate(ordered)}
        self.after: list[list[int]] = []
        for i, block in enumerate(self.blocks):
            last = block[-1]
            ends = last.opcode.startswith(("EXIT", "RET", "BRX")) or bool(last.target)
            following = [i + 1] if (not ends or last.conditional) and i + 1 < len(self.blocks) else []
            if last.target and labels.get(last.target) in place:
                following.append(place[labels[last.target]])
            self.after.append(following)

    @cached_property
    def dominators(self) -> list[int]:
        """Of each block, those that every way to it goes through, as bits."""
        every = (1 << len(self.blocks)) - 1
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, following in enumerate(self.after):
            for j in following:
                before[j].append(i)
        found = [1] + [every] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for i in range(1, len(self.blocks)):
                common = every
                for j in before[i]:
                    common &= found[j]
                now = common | 1 << i
                if now != found[i]:
                    found[i], changed = now, True
        return found

    def loops(self) -> Iterator[tuple[int, set[int], set[int]]]:
        """Each loop's first block, its last ones, and all of them."""
        before: list[list[int]] = [[] for _ in self.blocks]
        tails: dict[int, set[int]] = {}
        for i, following in enumerate(self.after):
            for j in following:
                before[j].append(i)
                if self.dominators[i] >> j & 1:
                    tails.setdefault(j, set()).add(i)
        for head, last in tails.items():
            inside, left = {head}, list(last)
            while left:
                block = left.pop()
                if block not in inside:
                    inside.add(block)
                    left += before[block]
            yield head, last, inside

    def cost(self, block: list[Instruction]) -> tuple[Moved, Way]:
        loaded = stored = from_shared = to_shared = marked = singles = float32 = special = integer = float64 = 0
        for one in block:
            name = one.opcode
            if name.startswith("LDG"):
                loaded += width_of(name)
            elif name.startswith("STG"):
                width = width_of(name)
                stored += width if width >= 8 else 0
                singles += width < 8 and not one.conditional
            elif name.startswith("LDS"):
                from_shared += width_of(name)
            elif name.startswith("STS"):
                to_shared += width_of(name)
            marked += self.marked is not None and self.marked.fullmatch(name) is not None
            float32 += FLOAT32.match(name) is not None
            special += SPECIAL.match(name) is not None
            integer += INTEGER.match(name) is not None
            float64 += FLOAT64.match(name) is not None
        moved = Moved(loaded, stored, from_shared, to_shared, marked, singles)
        return moved, Way(len(block), float32, special, integer, float64)

    def cheapest(self, wanted: Moved) -> Way | None:
        """Of all ways round a loop that move just this: the one of fewest instructions; None if there is none."""
        costs = [self.cost(block) for block in self.blocks]
        found: list[Way] = []
        for head, tails, inside in self.loops():
            reached: dict[int, dict[Moved, Way]] = {head: {Moved(): Way()}}
            for block in self.in_order(head, inside):
                moved, way = costs[block]
                here = {m.after(moved): w.after(way) for m, w in reached.pop(block, {}).items()}
                here = {m: w for m, w in here.items() if m.is_within(wanted)}
                if block in tails and wanted in here:
                    found.append(here[wanted])
                for following in self.after[block]:
                    if following not in inside or self.dominators[block] >> following & 1:
                        continue
                    there = reached.setdefault(following, {})
                    for m, w in here.items():
                        if m not in there or w < there[m]:
                            there[m] = w
        return min(found, default=None)

    def in_order(self, head: int, inside: set[int]) -> list[int]:
        """A loop's blocks, each after all that lead to it but by going round a loop."""
        done: list[int] = []
        seen: set[int] = set()
        stack = [(head, iter(self.after[head]))]
        seen.add(head)
        while stack:
            block, following = stack[-1]
            for j in following:
                if j in inside and j not in seen and not self.dominators[block] >> j & 1:
                    seen.add(j)
                    stack.append((j, iter(self.after[j])))
                    break
            else:
                done.append(block)
                stack.pop()
        return done[::-1]
