"""What the CUDA kernels compile to, and what a model makes of it: the tables of docs/cuda.md.

    python -m benchmarks.cuda_kernels              compiles the kernels and prints the tables
    python -m benchmarks.cuda_kernels --write      writes what was found to tests/cuda_machine_code.json, and the tables
                                                   into docs/cuda.md

Needs nvcc (on the PATH or in CUDA_HOME) and nvdisasm (the toolkit's, or Triton's), and no GPU. Nothing here is measured
on one: the times and shares are a model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cuda_compiled import FILES, ROOT, compile_all, compiled, forget_old, nvcc, nvdisasm, version
from benchmarks.formats import SCALES
from benchmarks.machine_code import Code, Moved
from benchmarks.tables import markdown_table, significant

#: What the machine code was found to be, for the tests and the documentation.
FOUND = ROOT / "tests" / "cuda_machine_code.json"
DOCUMENTATION = ROOT / "docs" / "cuda.md"

#: Compute capability: threads and blocks that a multiprocessor holds at most; and the 32-bit registers that each has.
ARCHITECTURES = {75: (1024, 16), 80: (2048, 32), 86: (1536, 16), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24)}
REGISTERS = 65536

#: Memory bandwidth in bytes a second, by the makers' data sheets.
GPUS = {"H100 SXM": 3.35e12, "RTX 4090": 1.008e12}

#: Bytes that an element costs, read and written, and the workload's elements: as many as GPT-2 small has parameters.
ELEMENTS = 124_439_808
TRAFFIC = {
    "AdamW, float32": 28,
    "AdamW with amsgrad, float32": 36,
    "AdamW with an average and stats, float32": 36,
    "AdamW, bfloat16": 14,
    "AdamW, float32 with 8-bit states": 16 + SCALES,
    'AdamW, bfloat16 `"master"`': 18,
    'AdamW, bfloat16 `"master24"` with 8-bit states': 12 + SCALES,
    "AdamW, float32 with bfloat16 gradients": 26,
    "LAMB, float32": 44,
    "SGD, float32": 12,
    "SGD with momentum, float32": 20,
    "SGD with momentum, bfloat16": 10,
    "norm, float32": 4,
    "clip above the limit, float32": 8,
    "mse_loss and its gradient, float32": 20,
    "mse_loss and its gradient, bfloat16": 10,
    "binary_cross_entropy_with_logits with a weight and its gradient, float32": 28,
    "cross_entropy and its gradient, float32": 8,
    "cross_entropy and its gradient, bfloat16": 4,
}


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    registers: int
    stack: int
    spills: int
    threads: int

    def blocks(self, architecture: int) -> int:
        """The blocks that a multiprocessor's registers and threads have room for."""
        most, most_blocks = ARCHITECTURES[architecture]
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(REGISTERS // (per_warp * self.threads // 32), most // self.threads, most_blocks)

    def occupancy(self, architecture: int) -> float:
        """The share of a multiprocessor's threads that run at once."""
        return self.blocks(architecture) * self.threads / ARCHITECTURES[architecture][0]


#: How a type's name is mangled.
TYPES = {"f": "float32", "d": "float64", "BFloat16": "bfloat16", "Float16": "float16"}

#: How tensors are stored that a kernel is not compiled for one type of.
STORAGES = {
    "Mixed": "any types",
    "Strided": "any types, strided",
    "MixedTail": "any types, with a tail",
    "StridedTail": "any types, strided, with a tail",
}


def states_of(mask: int) -> str:
    """A set of a rule's states in words: how many, or which if it is not the first of them."""
    present = [str(state) for state in range(8) if mask >> state & 1]
    if present and int(present[-1]) >= len(present):
        return f"states {' '.join(present)}"
    return {0: "no state", 1: "1 state"}.get(len(present), f"{len(present)} states")


def describe(mangled: str) -> str:
    """A kernel's name and template arguments in words."""
    names = "update|tell|prepare|gather|combine_sums|apply_sums|partial|clip|clamp|finish"
    names += "|add_squares|total_squares|move_averages|finish_rows|take_block"
    names += "|pointwise_(?:forward|backward|finish)|cross_entropy_[a-z_]+"
    found = re.search(rf"\d({names})_kernel(.*)", mangled)
    if found is None:
        raise ValueError(f"{mangled} is no kernel that this knows")
    name, arguments = found[1].replace("_", " "), found[2].partition("EEv")[0] + "E"
    if reduced := re.search(r"^INS_\d+(OwnSums|Agreement)INS_(\w+?)EEE(.*)", arguments):
        name, arguments = name + " agreement" * (reduced[1] == "Agreement"), f"INS_{reduced[2]}E{reduced[3]}"
    parts = [name]
    if way := re.search(r"^INS\w*?_\d(Plain|General)I(.*)", arguments):
        # Repeated types are abbreviated: the second of two 16-bit ones is the first.
        types = re.findall(r"BFloat16|Float16|[fd](?=f|d|N|E)", way[2])
        if way[1] == "General":
            return f"{name}, general, {TYPES[types[0]]}"
        return f"{name}, {TYPES[types[0]]}" + (f" to {TYPES[types[1]]}" if types[1:] and types[1] != types[0] else "")
    if rule := re.search(r"^INS_\d+([A-Z][A-Za-z]+)E([fd])(?:Lh(\d+)E(.*))?", arguments):
        parts.append(rule[1] + (f" with {states_of(int(rule[3]))}" if rule[3] else ""))
        storage = re.search(r"(?:Mixed|Strided)(?:Tail)?|BFloat16|Float16|f", rule[4] or "")
        if storage and storage[0] in TYPES:
            return ", ".join([*parts, TYPES[storage[0]]])
        arithmetic = rule[2]
        if storage:
            parts.append(STORAGES[storage[0]])
    else:
        arithmetic = arguments[1:2] if arguments.startswith("I") else ""
        if storage := re.search(r"^I[fd]N\w*?\d(Mixed|Strided)E", arguments):
            parts.append(STORAGES[storage[1]])
    if arithmetic:
        parts.append(TYPES[arithmetic])
    if "Lb1E" in arguments:
        parts.append("strided")
    return ", ".join(parts)


def goes_by_elements(kernel: str) -> bool:
    """Whether an update loads its tensors one element at a time; of three states in float64 it has no room for more."""
    return "strided" in kernel or bool(re.search(r"with ([34] states|states \d \d \d), any types.* float64", kernel))


def threads_of(kernel: str) -> int:
    """The threads of a kernel's block, by its description; where they differ, so many that any number is like it."""
    if kernel.startswith(("prepare", "apply")):
        return 64
    if kernel in ("combine sums", "tell"):
        return 32
    if "column" in kernel:
        return 128
    if kernel.startswith("cross entropy block, ") and "general" not in kernel:
        return 1024  # of a row of more than 128 KiB
    if kernel == "finish":
        return 1024
    return 512 if any(word in kernel for word in ("finish", "count")) and "rows" not in kernel else 256


# What the compiler reports --------------------------------------------------------------------------------------------


def usages_of(name: str, architecture: int) -> list[Usage]:
    """What each kernel of a file needs, by -Xptxas -v."""
    pattern = (
        r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    usages = []
    for mangled, stack, stores, loads, registers in re.findall(pattern, compiled(name, architecture).report):
        kernel = describe(mangled)
        usages.append(Usage(kernel, int(registers), int(stack), int(stores) + int(loads), threads_of(kernel)))
    return usages


def all_usages(architectures: Sequence[int] = tuple(ARCHITECTURES)) -> dict[int, list[Usage]]:
    """The usages on each architecture."""
    compile_all((name, architecture) for architecture in architectures for name in FILES)
    return {a: [usage for name in FILES for usage in usages_of(name, a)] for a in architectures}


def resource_table(usages: dict[int, list[Usage]]) -> str:
    """Registers of a thread and occupancy, a row for each kernel."""
    rows = []
    for i, first in enumerate(next(iter(usages.values()))):
        row = [first.kernel]
        for architecture, found in usages.items():
            row.append(f"{found[i].registers} ({found[i].occupancy(architecture):.0%})")
        rows.append(row)
    return markdown_table(["kernel", *(f"sm_{a}" for a in usages)], rows)


# The hot loops --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A way round a loop, found by what it moves for so many elements."""

    elements: int
    moved: Moved
    marked: str = ""  # instructions that tell types or norms apart


@dataclass(frozen=True)
class Hot:
    """Where a kernel's time goes: the loops that an element goes through."""

    title: str
    file: str
    kernel: str
    passes: tuple[Pass, ...]
    read: int  # bytes of an element, from memory
    written: int


SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
RULES = {"Adam": (2, 3), "Sgd": (0, 1), "Lion": (1,), "Lamb": (2,), "Lars": (0, 1)}
LOSSES = (
    *("SquaredError", "AbsoluteError", "SmoothAbsoluteError", "Huber"),
    *("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "Divergence", "DivergenceOfLogs"),
)
#: By which a float16 becomes a float32; a bfloat16 does so by shifts.
FROM_FLOAT16 = r"HADD2\.F32"
EXP = r"MUFU\.EX2"


def states_in_words(count: int) -> str:
    return states_of((1 << count) - 1)


def hot_loops() -> Iterator[Hot]:
    """All of them, in the order of the table."""
    for rule, counts in RULES.items():
        for states in counts:
            for dtype, size in SIZES.items():
                kernel = f"update, {rule} with {states_in_words(states)}, {dtype}"
                elements, roles = 2 * 16 // size, 2 + states
                moved = Moved(loaded=32 * roles, stored=32 * (roles - 1))
                yield Hot(kernel, "update", kernel, (Pass(elements, moved),), size * roles, size * (roles - 1))
    for rule in ("Lamb", "Lars"):
        for states in RULES[rule]:
            for dtype, size in SIZES.items():
                kernel = f"gather, {rule} with {states_in_words(states)}, {dtype}"
                roles = 2 + (states if rule == "Lamb" else 0)  # no sum of LARS is of its momentum
                yield Hot(kernel, "gather", kernel, (Pass(8, Moved(loaded=8 * size * roles)),), size * roles, 0)
    for dtype, size in SIZES.items():
        elements = 64 // size
        # The squares' is the norm that has multiplications; a conversion tells the 16-bit types apart.
        yield Hot(
            f"norm, {dtype}", "norm", "partial, float32", (Pass(elements, Moved(64, marked=elements), "FMUL"),), size, 0
        )
        moved = Moved(loaded=64, stored=64, marked=2 * elements)
        yield Hot(f"clip, {dtype}", "norm", "clip, float32", (Pass(elements, moved, "FMUL"),), size, size)
    # Which type is stored is said when the kernel runs; to convert 16 bits costs an instruction more for each number.
    for loss in LOSSES:
        for direction, stores in (("forward", 0), ("backward", 1)):
            kernel = f"pointwise {direction}, {loss}, float32"
            moved = Moved(loaded=128, stored=64 * stores, marked=0)
            yield Hot(kernel, "pointwise", kernel, (Pass(16, moved, FROM_FLOAT16),), 8, 4 * stores)
    for types in ("float32", "bfloat16", "float16", "float32 to bfloat16"):
        first, _, last = types.partition(" to ")
        size, elements = SIZES[first], 64 // SIZES[first]
        stored = elements * SIZES[last or first]
        kernel = f"cross entropy block, {types}"
        written = SIZES[last or first]
        sums = Moved(64, to_shared=64, marked=elements)  # if there is room for the words, which forward alone has not
        again, once = Moved(64, stored, marked=elements), Moved(0, stored, from_shared=64, marked=elements)
        if not last:
            yield Hot(f"{kernel}, forward", "cross_entropy_rows", kernel, (Pass(elements, sums, EXP),), size, 0)
        yield Hot(f"{kernel}, backward", "cross_entropy_rows", kernel, (Pass(elements, again, EXP),), size, written)
        both = (Pass(elements, sums, EXP), Pass(elements, once, EXP))
        yield Hot(f"{kernel}, both at once", "cross_entropy_rows", kernel, both, size, written)


@dataclass(frozen=True)
class Figures:
    """What the machine code of a hot loop is."""

    instructions: float  # of an element
    float32: float  # of these, the kinds that a way has
    special: float
    integer: float
    float64: float
    under_way: int  # bytes that a thread has loaded before it waits for the first
    registers: int
    blocks: int
    threads: int  # of a block


def figures_of(hot: Hot, architecture: int) -> Figures:
    """ValueError if a loop is not what it is said to be."""
    kernels = {
        describe(name): text
        for name, text in compiled(hot.file, architecture).machine_code.items()
        if "_kernel" in name
    }
    usage = next(one for one in usages_of(hot.file, architecture) if one.kernel == hot.kernel)
    total = [0.0] * 5
    for one in hot.passes:
        code = Code(kernels[hot.kernel], one.marked)
        # ptxas may have unrolled a loop once more.
        ways = [(times, way) for times in (1, 2) if (way := code.cheapest(one.moved.times(times)))]
        if not ways:
            raise ValueError(f"sm_{architecture}: no loop of {hot.title!r} moves {one.moved}")
        times, way = min(ways, key=lambda found: found[1].instructions / found[0])
        for i, count in enumerate((way.instructions, way.float32, way.special, way.integer, way.float64)):
            total[i] += count / (one.elements * times)
    costs = [round(value, 2) for value in total]
    return Figures(
        *costs, hot.read * hot.passes[0].elements, usage.registers, usage.blocks(architecture), usage.threads
    )


# The model ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU as its maker's data sheet has it; the clock is the one that its peak of float32 is reckoned with."""

    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float
    float32: int  # additions or multiplications of a multiprocessor and clock
    float64: int


CARDS = {
    "A100 SXM": Card(80, 108, 1.41e9, 2.039e12, 64, 32),
    "H100 SXM": Card(90, 132, 1.98e9, 3.35e12, 128, 64),
    "RTX 5090": Card(120, 170, 2.407e9, 1.792e12, 128, 2),
}
#: Of the data sheet's bandwidth, what a plain copy reaches: an H200's 4.2 of 4.8 TB/s.
COPY = 0.88
#: The clock under load, of the data sheet's.
UNDER_LOAD = 0.88
#: Instructions that a multiprocessor issues in a clock, and of these integer and special ones, times 32 threads.
ISSUED, INTEGERS, SPECIALS = 128, 64, 16
#: Seconds from a load to its words while the memory is busy.
LATENCY = 0.8e-6


def share_of_copy(hot: Hot, figures: Figures, card: Card) -> float:
    """The share of a copy's speed that a model predicts.

    Moving the bytes takes as long as a copy of them, or longer where too few are under way (Little's law). Issuing the
    instructions takes what the busiest kind of unit takes. The two overlap, but not wholly: the square root of the sum
    of their squares.
    """
    copy = card.bandwidth * COPY / card.multiprocessors
    moving = max(
        (hot.read + hot.written) / copy,
        hot.read * LATENCY / (figures.under_way * figures.threads * figures.blocks),
    )
    clocks = max(
        figures.instructions / ISSUED,
        figures.float32 / card.float32,
        figures.integer / INTEGERS,
        figures.special / SPECIALS,
        figures.float64 / card.float64,
    )
    issuing = clocks / (card.clock * UNDER_LOAD)
    return (hot.read + hot.written) / copy / (moving**2 + issuing**2) ** 0.5


# Tables ---------------------------------------------------------------------------------------------------------------


def find_all(hots: Iterable[Hot] = (), architectures: Sequence[int] = ()) -> dict[str, dict[str, Figures]]:
    """The figures of each hot loop on the architecture of each card."""
    hots = list(hots) or list(hot_loops())
    wanted = architectures or [card.architecture for card in CARDS.values()]
    compile_all((name, a) for a in wanted for name in dict.fromkeys(hot.file for hot in hots))
    return {hot.title: {f"sm_{a}": figures_of(hot, a) for a in wanted} for hot in hots}


def load_found() -> tuple[str, dict[str, dict[str, Figures]]]:
    """The compiler's release, and what was found with it."""
    text: dict[str, Any] = json.loads(FOUND.read_text())
    loops = {title: {a: Figures(*row) for a, row in of.items()} for title, of in text["loops"].items()}
    return text["nvcc"], loops


def save_found(found: dict[str, dict[str, Figures]]) -> None:
    fields = ", ".join(Figures.__dataclass_fields__)
    lines = []
    for title, of in found.items():
        rows = ", ".join(f"{json.dumps(a)}: {json.dumps(list(asdict(figures).values()))}" for a, figures in of.items())
        lines.append(f"    {json.dumps(title)}: {{{rows}}}")
    text = f'{{\n  "nvcc": "{version()}",\n  "figures": "{fields}",\n  "loops": {{\n'
    FOUND.write_text(text + ",\n".join(lines) + "\n  }\n}\n")


def machine_code_table(found: dict[str, dict[str, Figures]]) -> str:
    """Instructions an element, bytes under way, registers and blocks of a multiprocessor; and the model's share."""
    rows = []
    for hot in hot_loops():
        row = [hot.title]
        for card in CARDS.values():
            of = found[hot.title][f"sm_{card.architecture}"]
            row.append(f"{of.instructions:.1f}; {of.under_way} B; {of.registers}; {of.blocks} × {of.threads}")
        for card in CARDS.values():
            row.append(f"{share_of_copy(hot, found[hot.title][f'sm_{card.architecture}'], card):.0%}")
        rows.append(row)
    return markdown_table(["loop", *(f"sm_{card.architecture}" for card in CARDS.values()), *CARDS], rows)


def worse(found: Figures, expected: Figures) -> list[str]:
    """What of a loop is worse than it was."""
    said = []
    if found.instructions > expected.instructions * 1.005:
        said.append(f"{found.instructions} instructions an element, {expected.instructions} before")
    if found.under_way < expected.under_way:
        said.append(f"{found.under_way} bytes under way, {expected.under_way} before")
    if found.registers > expected.registers:
        said.append(f"{found.registers} registers, {expected.registers} before")
    if found.blocks * found.threads < expected.blocks * expected.threads:
        said.append(f"{found.blocks} blocks a multiprocessor, {expected.blocks} before")
    return said


def roofline_table() -> str:
    """The time that the memory's bandwidth implies for the bytes that must move."""
    rows = []
    for what, width in TRAFFIC.items():
        times = [f"{significant(width * ELEMENTS / bandwidth * 1e3)} ms" for bandwidth in GPUS.values()]
        rows.append([what, f"{width:.3g}", *times])
    return markdown_table(["kernel", "bytes an element", *(f"{name} (model)" for name in GPUS)], rows)


def replace_table(text: str, table: str) -> str:
    """A Markdown text with this table in place of the one that has its head."""
    first = table.splitlines()[0]
    start = text.index(first)
    end = text.index("\n\n", start) if "\n\n" in text[start:] else len(text.rstrip("\n"))
    return text[:start] + table + text[end:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, or writes them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="write what was found, and the documentation's tables")
    parser.add_argument("--all", action="store_true", help="print registers and occupancy of every kernel as well")
    options = parser.parse_args(arguments)
    if nvcc() is None or nvdisasm() is None:
        sys.exit("there is no nvcc, on the PATH or in CUDA_HOME, or no nvdisasm, on the PATH or in Triton's package")
    forget_old()
    found = find_all()
    tables = [machine_code_table(found), roofline_table()]
    if options.write:
        save_found(found)
        text = DOCUMENTATION.read_text()
        for table in tables:
            text = replace_table(text, table)
        DOCUMENTATION.write_text(text)
        return
    print(f"nvcc {version()}\n")
    if options.all:
        print(resource_table(all_usages()), end="\n\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
