"""The tests of the CUDA kernels can fail: each fault that is seeded into a kernel's source makes them do so.

`make sanitize` runs the same programs over the sources as they are, under the sanitizers.
"""

import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")
FLAGS = shlex.split(
    "-std=c++17 -O1 -w -ffp-contract=off -fno-math-errno -DTRAINOPT_SIMT -DTRAINOPT_PARAMETER_BYTES=4096"
)
FLAGS += [f"-I{ROOT / 'tests' / 'simt'}", f"-I{ROOT / 'tests' / 'cpp' / 'contract'}"]
ROWS, COLUMNS = "cross_entropy_rows.cu", "cross_entropy_columns.cu"
PLAIN = "cross_entropy_plain.h"
KERNELS = (
    *("update.cu", "prepare.cu", "gather.cu", "norm.cu", "pointwise.cu"),
    *("cross_entropy.cu", ROWS, COLUMNS),
)
OTHERS = (
    *("csrc/cpu/engine.cpp", "csrc/cpu/kernels_baseline.cpp"),
    *("csrc/cpu/losses.cpp", "csrc/cpu/loss_kernels_baseline.cpp"),
    *("tests/simt/simt.cpp", "tests/simt/engine_test.cpp", "tests/simt/norm_test.cpp"),
    *("tests/simt/pointwise_test.cpp", "tests/simt/cross_entropy_test.cpp"),
)

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    """Text in a file of csrc/cuda, what it becomes, and what the tests must say."""

    what: str
    file: str
    right: str
    wrong: str
    said: str = "FAILED"


FAULTS = [
    Fault("a missing barrier", "reduce.h", "  __syncthreads();\n", "", "that thread"),
    Fault("half a warp's mask", "reduce.h", "kAllLanes = 0xffffffffu", "kAllLanes = 0xffffu", "its own mask"),
    Fault("unset shared slots", "reduce.h", "threadIdx.x % 32 == 0) of", "threadIdx.x == 0) of", "before it is set"),
    Fault("a norm's tail, one element too long", "norm.cu", "at < chunk.end", "at <= chunk.end"),
    Fault("a step's tail, one element too long", "update.cu", "at < end; at += kThreads", "at <= end; at += kThreads"),
    Fault("a step after an overflow", "update.cu", "*table.header.found_inf != 0) return", "false) return"),
    Fault("scalars of another group", "step_table.h", "row.prepared = set", "row.prepared = 0"),
    Fault("a sum's tail, one element too long", "gather.cu", "(end - at + kSumLanes - 1)", "(end - at + kSumLanes)"),
    Fault("sums in the slots of another", "gather.cu", "    if (s > 0) __syncthreads();", "", "that thread"),
    Fault("sums of another tensor", "gather.cu", "row.place = places[t]", "row.place = 0"),
    Fault("a chunk's sum that is left out", "gather.cu", "c < row.chunks; c +=", "c + 1 < row.chunks; c +="),
    Fault("sums that nothing follows from", "gather.cu", "Rule::finish(scalars, values);", ""),
    Fault("a neighbour's chunk", "table.h", "first_chunk[middle] <= chunk", "first_chunk[middle] < chunk"),
    Fault("a loss's tail, one element too long", "pointwise.cu", "i < item_end", "i <= item_end"),
    Fault("a gradient's tail, one element short", "pointwise.cu", "i < end; i +=", "i + 1 < end; i +="),
    Fault("a factor read past its row", "pointwise.cu", "place + 1 == from.period", "place == from.period"),
    Fault("a sum without its last part", "pointwise.cu", "i < count; i +=", "i + 1 < count; i +="),
    Fault("a part that is not set", "pointwise.cu", "threadIdx.x != 0)", "threadIdx.x + blockIdx.x != 0)"),
    Fault("a mean that is a sum", "pointwise.cu", "0) / pass.divisor", "0)"),
    Fault("a row's missing barrier", ROWS, "    __syncthreads();\n    sums", "    sums", "before it is set"),
    Fault("slots of the row before", ROWS, "(row % 2) * kMostWarps", "(row % 1)", "that thread"),
    Fault("slots of the next set", ROWS, "lane < warps", "lane <= warps", "before it is set"),
    Fault(
        "a row's tail, one class short", PLAIN, "singles(before + classes - end)", "singles(before + classes - end - 1)"
    ),
    Fault("a word of another place", PLAIN, "word = words[first + i * step]", "word = words[first + i]"),
    Fault("a label that is another thread's", PLAIN, "% threads + word % 32", "% threads"),
    Fault("a column's part, one class short", COLUMNS, "? static_cast<int>(classes - at) :", "? 1 :"),
    Fault("a bad target let through", "cross_entropy_row.h", "index >= task.classes", "index > task.classes"),
    Fault("labels that are not counted", "cross_entropy.cu", "threadIdx.x < count", "threadIdx.x + 1 < count"),
    Fault("a row's part that is not set", "cross_entropy_row.h", "threadIdx.x == 0) work", "threadIdx.x == 1) work"),
]

#: The kernels that are compiled anew for a fault in a header.
USERS = {
    "reduce.h": "norm.cu",
    "table.h": "update.cu",
    "step_table.h": "update.cu",
    "cross_entropy_row.h": COLUMNS,
    PLAIN: ROWS,
}
#: The part of the tests that runs a file's kernels.
PARTS = {"update.cu": "steps", "gather.cu": "steps", "norm.cu": "norms", "pointwise.cu": "pointwise"}
PARTS |= {name: "cross-entropy" for name in KERNELS if name.startswith("cross_entropy")}


def compile_object(source: Path, csrc: Path, folder: Path) -> Path:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    made = folder / f"{source.stem}-{source.parent.name}.o"
    subprocess.run([COMPILER, *FLAGS, f"-I{csrc}", *language, "-c", str(source), "-o", str(made)], check=True)
    return made


def run(objects: list[Path], program: Path, *arguments: str) -> subprocess.CompletedProcess:
    subprocess.run([COMPILER, *map(str, objects), "-o", str(program)], check=True)
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("simt")
    sources = [ROOT / "csrc" / "cuda" / name for name in KERNELS] + [ROOT / name for name in OTHERS]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compile_object(source, ROOT / "csrc", folder), sources)
        return {source.name: path for source, path in zip(sources, made, strict=True)}


def test_the_kernels_as_they_are(objects, tmp_path):
    result = run(list(objects.values()), tmp_path / "test")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_seeded_fault_is_caught(fault, objects, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    file = csrc / "cuda" / fault.file
    text = file.read_text()
    assert fault.right in text, f"{fault.file} has changed: seed this fault anew"
    file.write_text(text.replace(fault.right, fault.wrong, 1))
    changed = USERS.get(fault.file, fault.file)
    mine = objects | {changed: compile_object(csrc / "cuda" / changed, csrc, tmp_path)}
    result = run(list(mine.values()), tmp_path / "test", PARTS[changed])
    assert result.returncode != 0 and fault.said in result.stdout, result.stdout
