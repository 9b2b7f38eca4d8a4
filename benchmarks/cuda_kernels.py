"""What the CUDA kernels compile to: registers, spills and occupancy on every architecture, and a roofline model.

    python -m benchmarks.cuda_kernels          the tables of docs/cuda.md

Needs nvcc (on the PATH or in CUDA_HOME), and no GPU. Nothing here is measured on one: the times are what a GPU's
memory bandwidth implies for the bytes that a kernel moves.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.tables import markdown_table, significant
from csrc.cuda import toolkit

ROOT = Path(__file__).parents[1]
FILES = (
    *("update", "prepare", "gather", "norm", "pointwise"),
    *("cross_entropy", "cross_entropy_rows", "cross_entropy_columns"),
)
#: Those of the build.
FLAGS = (*toolkit.FLAGS, f"-I{ROOT / 'csrc'}")

#: Compute capability: threads and blocks that a multiprocessor holds at most; and the 32-bit registers that each has.
ARCHITECTURES = {75: (1024, 16), 80: (2048, 32), 86: (1536, 16), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24)}
REGISTERS = 65536

#: The one of an H100 and an H200, whose tables docs/cuda.md has.
DOCUMENTED = 90

#: Memory bandwidth in bytes a second, by the makers' data sheets.
GPUS = {"H100 SXM": 3.35e12, "RTX 4090": 1.008e12}

#: Bytes that an element costs, read and written, and the workload's elements: as many as GPT-2 small has parameters.
ELEMENTS = 124_439_808
TRAFFIC = {
    "AdamW, float32": 28,
    "AdamW with amsgrad, float32": 36,
    "AdamW, bfloat16": 14,
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

    def occupancy(self, architecture: int) -> float:
        """The share of a multiprocessor's threads that the registers leave room for."""
        most, most_blocks = ARCHITECTURES[architecture]
        per_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(REGISTERS // (per_warp * self.threads // 32), most_blocks)
        return min(blocks * self.threads, most) / most


def nvcc() -> str | None:
    """The compiler's path, if there is one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def version() -> str:
    """The compiler's release, as 13.0."""
    text = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", text)
    return found[1] if found else "unknown"


#: How a type's name is mangled.
TYPES = {"f": "float32", "d": "float64", "BFloat16": "bfloat16", "Float16": "float16"}


def states_of(mask: int) -> str:
    """A set of a rule's states in words: how many, or which if it is not the first of them."""
    present = [str(state) for state in range(8) if mask >> state & 1]
    if present and int(present[-1]) >= len(present):
        return f"states {' '.join(present)}"
    return {0: "no state", 1: "1 state"}.get(len(present), f"{len(present)} states")


def describe(mangled: str) -> str:
    """A kernel's name and template arguments in words."""
    names = "update|prepare|gather|combine_sums|apply_sums|partial|clip|clamp|finish"
    names += "|pointwise_(?:forward|backward|finish)|cross_entropy_[a-z_]+"
    found = re.search(rf"\d({names})_kernel(.*)", mangled)
    if found is None:
        raise ValueError(f"{mangled} is no kernel that this knows")
    name, arguments = found[1].replace("_", " "), found[2].partition("EEv")[0] + "E"
    parts = [name]
    if way := re.search(r"^INS\w*?_\d(Plain|General)I(.*)", arguments):
        # Repeated types are abbreviated: the second of two 16-bit ones is the first.
        types = re.findall(r"BFloat16|Float16|[fd](?=f|d|N|E)", way[2])
        if way[1] == "General":
            return f"{name}, general, {TYPES[types[0]]}"
        return f"{name}, {TYPES[types[0]]}" + (f" to {TYPES[types[1]]}" if types[1:] and types[1] != types[0] else "")
    if rule := re.search(r"^INS_\d+([A-Z][A-Za-z]+)E([fd])(?:Lh(\d+)E(.*))?", arguments):
        parts.append(rule[1] + (f" with {states_of(int(rule[3]))}" if rule[3] else ""))
        storage = re.search(r"Mixed|Strided|BFloat16|Float16|f", rule[4] or "")
        if storage and storage[0] in TYPES:
            return ", ".join([*parts, TYPES[storage[0]]])
        arithmetic = rule[2]
        if storage:
            parts.append({"Mixed": "any types", "Strided": "any types, strided"}[storage[0]])
    else:
        arithmetic = arguments[1:2] if arguments.startswith("I") else ""
    if arithmetic:
        parts.append(TYPES[arithmetic])
    if "Lb1E" in arguments:
        parts.append("strided")
    return ", ".join(parts)


def threads_of(kernel: str) -> int:
    """The threads of a kernel's block, by its description; where they differ, so many that any number is like it."""
    if kernel.startswith(("prepare", "apply")):
        return 64
    if kernel == "combine sums":
        return 32
    if "column" in kernel:
        return 128
    if kernel == "finish":
        return 1024
    return 512 if any(word in kernel for word in ("finish", "count")) else 256


def compile_for(architecture: int) -> list[Usage]:
    """What each kernel needs, by -Xptxas -v; raises CalledProcessError if it does not compile."""
    usages = []
    with TemporaryDirectory() as folder:
        for name in FILES:
            command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
            command += [str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", f"{folder}/{name}.cubin"]
            said = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
            pattern = (
                r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores,"
                r" (\d+) bytes spill loads\n.*?Used (\d+) registers"
            )
            for mangled, stack, stores, loads, registers in re.findall(pattern, said):
                kernel = describe(mangled)
                usages.append(Usage(kernel, int(registers), int(stack), int(stores) + int(loads), threads_of(kernel)))
    return usages


def ptx_of(name: str, architecture: int) -> dict[str, str]:
    """The PTX of each kernel of a file."""
    command = [nvcc() or "nvcc", *FLAGS, f"-arch=compute_{architecture}", "-ptx", "-o", "-"]
    source = str(ROOT / "csrc" / "cuda" / f"{name}.cu")
    with TemporaryDirectory() as folder:
        command[-1] = f"{folder}/{name}.ptx"
        subprocess.run([*command, source], check=True, capture_output=True)
        text = Path(command[-1]).read_text()
    entries = re.split(r"\.visible \.entry |\.entry ", text)[1:]
    return {describe(entry.partition("(")[0]): entry for entry in entries}


def nvdisasm() -> str | None:
    """The disassembler's path, if there is one: the toolkit's, or the one in Triton's package."""
    triton = importlib.util.find_spec("triton")
    places = [] if triton is None or triton.origin is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
    return shutil.which("nvdisasm") or next(filter(None, (shutil.which("nvdisasm", path=str(p)) for p in places)), None)


def machine_code_of(name: str, architecture: int) -> dict[str, str]:
    """The machine code of each kernel of a file, disassembled."""
    with TemporaryDirectory() as folder:
        cubin = f"{folder}/{name}.cubin"
        command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-o", cubin]
        subprocess.run([*command, str(ROOT / "csrc" / "cuda" / f"{name}.cu")], check=True, capture_output=True)
        said = subprocess.run([nvdisasm() or "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True)
    sections = re.split(r"^\s*\.section\s+\.text\.", said.stdout, flags=re.MULTILINE)[1:]
    return {describe(section.partition(",")[0]): section for section in sections}


@dataclass(frozen=True)
class Loop:
    """A loop over 16-byte words in a kernel's machine code, in the order of the code."""

    instructions: int  # branches that are rarely taken count too
    loads: int  # of 16 bytes, under way at one time


def loops_in(code: str) -> list[Loop]:
    """The innermost loops that load words. A second way to load the same ones, at the end of a row, counts for none."""
    lines = [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/|^\s*\.L_\w+:", line)]
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if ".L_" in line and "/*" not in line}
    found = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA\S*\s+(?:U?P\d, )?`\((\.L_\w+)\)", line)
        if target and labels.get(target[1], end) < end:
            found.append((labels[target[1]], end))
    innermost = [(i, j) for i, j in found if not any((i, j) != (k, m) and i <= k and m <= j for k, m in found)]
    loops = []
    for i, j in innermost:
        body = [line for line in lines[i:j] if "/*" in line]
        loads = len(set(re.findall(r"LDG\.E\S*\.128\S*\s+R\d+,\s+(\S.*?)\s*;", "\n".join(body))))
        if loads:
            loops.append(Loop(len(body), loads))
    return loops


#: Kernels whose hot loops have one type, and how many elements of it a word has. What counts of an update is the loop
#: with most words under way; of a row, the loops of its two passes.
HOT = {
    "update": {
        "update, Adam with 2 states, float32": 4,
        "update, Adam with 2 states, bfloat16": 8,
        "update, Sgd with 1 state, float32": 4,
        "update, Sgd with 1 state, bfloat16": 8,
    },
    "cross_entropy_rows": {
        "cross entropy block, float32": 4,
        "cross entropy block, bfloat16": 8,
        "cross entropy block, float32 to bfloat16": 4,
    },
}


def compile_all(architectures: Sequence[int] = tuple(ARCHITECTURES)) -> dict[int, list[Usage]]:
    """The usages on each architecture."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(architectures, pool.map(compile_for, architectures), strict=True))


def resource_table(usages: dict[int, list[Usage]]) -> str:
    """Registers of a thread and occupancy, a row for each kernel."""
    rows = []
    for i, first in enumerate(next(iter(usages.values()))):
        row = [first.kernel]
        for architecture, found in usages.items():
            row.append(f"{found[i].registers} ({found[i].occupancy(architecture):.0%})")
        rows.append(row)
    return markdown_table(["kernel", *(f"sm_{a}" for a in usages)], rows)


def machine_code_table(architectures: Sequence[int] = (80, 90, 120)) -> str:
    """Bytes that a thread has under way in a hot loop, of all tensors together, and instructions an element."""
    rows: dict[str, list[str]] = {}
    for architecture in architectures:
        for name, kernels in HOT.items():
            codes = machine_code_of(name, architecture)
            for kernel, elements in kernels.items():
                loops = loops_in(codes[kernel])
                if name == "update":
                    passes = {"": min(loops, key=lambda loop: (-loop.loads, loop.instructions))}
                    roles = 4 if "Adam" in kernel else 3
                else:
                    passes = {", sums": loops[0], ", gradient": loops[-1]}
                    roles = 1
                for which, loop in passes.items():
                    row = rows.setdefault(kernel + which, [str(16 * loop.loads)])
                    row.append(f"{loop.instructions / (elements * loop.loads / roles):.1f}")
    head = ["loop", "bytes under way", *(f"sm_{architecture}" for architecture in architectures)]
    return markdown_table(head, [[name, *row] for name, row in rows.items()])


def roofline_table() -> str:
    """The time that the memory's bandwidth implies for the bytes that must move."""
    rows = []
    for what, width in TRAFFIC.items():
        times = [f"{significant(width * ELEMENTS / bandwidth * 1e3)} ms" for bandwidth in GPUS.values()]
        rows.append([what, str(width), *times])
    return markdown_table(["kernel", "bytes an element", *(f"{name} (model)" for name in GPUS)], rows)


def main() -> None:
    """Prints the tables."""
    if nvcc() is None:
        sys.exit("there is no nvcc, on the PATH or in CUDA_HOME")
    print(f"nvcc {version()}\n")
    print(resource_table(compile_all()))
    print()
    if nvdisasm() is not None:
        print(machine_code_table())
        print()
    print(roofline_table())


if __name__ == "__main__":
    main()
