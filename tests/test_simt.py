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
SIMT = ROOT / "tests" / "simt"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")
FLAGS = shlex.split(
    "-std=c++17 -O1 -w -ffp-contract=off -fno-math-errno -DTRAINOPT_SIMT -DTRAINOPT_PARAMETER_BYTES=4096"
)
FLAGS += [f"-I{SIMT}", f"-I{ROOT / 'tests' / 'cpp' / 'contract'}"]
ROWS, COLUMNS = "cross_entropy_rows.cu", "cross_entropy_columns.cu"
PLAIN = "cross_entropy_plain.h"
KERNELS = (
    *("update.cu", "prepare.cu", "gather.cu", "factors.cu", "stats.cu", "norm.cu", "pointwise.cu"),
    *("cross_entropy.cu", ROWS, COLUMNS),
)
OTHERS = (
    *(
        ROOT / "csrc" / "cpu" / f"{name}.cpp"
        for name in ("engine", "factors", "kernels_baseline", "losses", "loss_kernels_baseline")
    ),
    *(SIMT / "simt.cpp", SIMT / "queue.cpp"),
    *sorted(set(SIMT.glob("*_test.cpp")) - {SIMT / "faults_test.cpp"}),  # which is a program of its own
)

#: A line that a fault is seeded into ends with this comment and the fault's name, or follows a line of it.
TAG = "tests break this: "


class Fault(NamedTuple):
    """The name that a line of csrc/cuda carries, text of it, what it becomes, and what the tests must say."""

    name: str
    right: str
    wrong: str
    said: str = "FAILED"

    def seed(self, csrc: Path) -> Path:
        """Writes the fault into a copy of the sources; the file that it is in."""
        (file,) = [path for path in (csrc / "cuda").iterdir() if f"// {TAG}{self.name}\n" in path.read_text()]
        lines = file.read_text().split("\n")
        (at,) = [i for i, line in enumerate(lines) if line.endswith(f"// {TAG}{self.name}")]
        at += lines[at].strip().startswith("//")  # on a line of its own it is said of the next one
        code, comment, tag = lines[at].partition(f"  // {TAG}")
        assert code.count(self.right) == 1, f"{file.name} has changed: say in FAULTS what becomes of {code.strip()!r}"
        assert self.wrong != self.right
        lines[at] = code.replace(self.right, self.wrong) + comment + tag
        file.write_text("\n".join(lines))
        return file


FAULTS = [
    Fault("a missing barrier", "__syncthreads();", "", "that thread"),
    Fault("half a warp's mask", "kAllLanes = 0xffffffffu", "kAllLanes = 0xffffu", "its own mask"),
    Fault("unset shared slots", "threadIdx.x % 32 == 0) of", "threadIdx.x == 0) of", "before it is set"),
    Fault("a norm's tail, one element too long", "at < chunk.end", "at <= chunk.end"),
    Fault("an average of what is not stored", "as_stored(param[i], row.dtype[0])", "param[i]"),
    Fault("an average of one that is not stored", "as_stored(param, row.dtype[0])", "param"),
    Fault("stats of another tensor", "row.stats_place + run.at / kChunk", "run.at / kChunk"),
    Fault("a chunk's stats that are left out", "c < row.chunks; c +=", "c + 1 < row.chunks; c +="),
    Fault("a move that is not stored", "as_stored(after[i], dtype)", "after[i]"),
    Fault("a scale that is a lane's own", "combine_warp(of.largest, ", "(of.largest); combine_warp(of.largest, "),
    Fault("a block's tail, one element too long", "i < count; i += 32", "i <= count; i += 32"),
    Fault("a scale that is written before all have read it", "__syncwarp();", ""),
    Fault("a gradient that is not cleared", "role == 1 && stages.clear_gradient", "false"),
    Fault("a step's tail, one element too long", "at < end; at += kThreads", "at <= end; at += kThreads"),
    Fault("a step after an overflow", "*header.found_inf != 0", "false"),
    Fault("scalars of another group", "row.prepared = set", "row.prepared = 0"),
    Fault("a sum's tail, one element too long", "(end - at + kSumLanes - 1)", "(end - at + kSumLanes)"),
    Fault("sums in the slots of another", "__syncthreads()", "", "that thread"),
    Fault("sums of another tensor", "row.place = places[t]", "row.place = 0"),
    Fault("a chunk's sum that is left out", "c < row.chunks; c +=", "c + 1 < row.chunks; c +="),
    Fault("sums that nothing follows from", "Pass::finish(stages, scalars, values, numbers);", ""),
    Fault("sums of a column that is another piece's", "lane + 32 * k < width", "lane + 32 * k <= width"),
    Fault("the first group of rows alone", "i < count; ++i", "i < 1; ++i"),
    Fault("lanes that are still to be added to", "__syncthreads();", ""),
    Fault("a shard that begins with the first matrix", "first_matrix + matrix", "matrix"),
    Fault("a shard that begins with the first column", "first_column + place", "place"),
    Fault("a matrix with a row too long", "column_ >= shape_.columns", "column_ > shape_.columns"),
    Fault("a stack of one matrix's columns", "of_columns_ += shape_.columns;", ""),
    Fault("a neighbour's chunk", "first_chunk[middle] <= chunk", "first_chunk[middle] < chunk"),
    Fault("a loss's tail, one element too long", "i < item_end", "i <= item_end"),
    Fault("a gradient's tail, one element short", "i < end; i +=", "i + 1 < end; i +="),
    Fault("a factor read past its row", "place + 1 == from.period", "place == from.period"),
    Fault("a sum without its last part", "i < count; i +=", "i + 1 < count; i +="),
    Fault("a part that is not set", "threadIdx.x != 0)", "threadIdx.x + blockIdx.x != 0)"),
    Fault("a mean that is a sum", "0) / pass.divisor", "0)"),
    Fault("a row's missing barrier", "__syncthreads();", "", "before it is set"),
    Fault("slots of the row before", "(row % 2) * kMostWarps", "(row % 1)", "that thread"),
    Fault("slots of the next set", "lane < warps", "lane <= warps", "before it is set"),
    Fault("a row's tail, one class short", "singles(before + classes - end)", "singles(before + classes - end - 1)"),
    Fault("a word of another place", "word = words[first + i * step]", "word = words[first + i]"),
    Fault("a label that is another thread's", "% threads + word % 32", "% threads"),
    Fault("a column's part, one class short", "? static_cast<int>(classes - at) :", "? 1 :"),
    Fault("a bad target let through", "index >= task.classes", "index > task.classes"),
    Fault("labels that are not counted", "threadIdx.x < count", "threadIdx.x + 1 < count"),
    Fault("a row's part that is not set", "threadIdx.x == 0) work", "threadIdx.x == 1) work"),
]

#: Of the order in which launches run, and of what they are handed: all are caught by the same part of the tests.
ORDER_FAULTS = [
    Fault("a stream mistaken", "stream, work.norm", "nullptr, work.norm"),
    Fault("a table that is gone before its launch runs", "[=]", "[&]", ""),
    Fault(
        "a graph that keeps a host's value",
        "work.groups[count.group];",
        "[](GroupSource now) { now.settings.lr = number_at(now.replaced[0].data, now.replaced[0].is_double != 0);"
        " now.replaced[0].data = nullptr; return now; }(work.groups[count.group]);",
    ),
]
FAULTS += ORDER_FAULTS

#: The kernels that are compiled anew for a fault in a header.
USERS = {
    "reduce.h": "norm.cu",
    "launch.h": "norm.cu",
    "stats.h": "update.cu",
    "blocks.h": "update.cu",
    "two_parts.h": "update.cu",
    "table.h": "update.cu",
    "step_table.h": "update.cu",
    "factored.h": "gather.cu",
    "cross_entropy_row.h": COLUMNS,
    PLAIN: ROWS,
}
#: The part of the tests that runs a file's kernels.
PARTS = {"norm.cu": "norms", "pointwise.cu": "pointwise"}
PARTS |= dict.fromkeys(("update.cu", "gather.cu", "factors.cu", "stats.cu"), "steps")
PARTS |= {name: "cross-entropy" for name in KERNELS if name.startswith("cross_entropy")}


def compile_object(source: Path, csrc: Path, folder: Path, *flags: str) -> Path:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    made = folder / f"{source.stem}-{source.parent.name}.o"
    subprocess.run([COMPILER, *FLAGS, *flags, f"-I{csrc}", *language, "-c", str(source), "-o", str(made)], check=True)
    return made


def run(objects: list[Path], program: Path, *arguments: str) -> subprocess.CompletedProcess:
    subprocess.run([COMPILER, *map(str, objects), "-o", str(program)], check=True)
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("simt")
    sources = [ROOT / "csrc" / "cuda" / name for name in KERNELS] + [*OTHERS]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compile_object(source, ROOT / "csrc", folder), sources)
        return {source.name: path for source, path in zip(sources, made, strict=True)}


@pytest.fixture
def sources(tmp_path) -> Path:
    return Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))


def test_every_fault_has_its_line(sources):
    for fault in FAULTS:
        fault.seed(sources)
    tags = sum(path.read_text().count(TAG) for path in (sources / "cuda").iterdir())
    assert tags == len(FAULTS) == len({fault.name for fault in FAULTS})


@pytest.mark.slow
def test_the_kernels_as_they_are(objects, tmp_path):
    result = run(list(objects.values()), tmp_path / "test")
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_seeded_fault_is_caught(fault, objects, sources, tmp_path):
    file = fault.seed(sources)
    changed = USERS.get(file.name, file.name)
    # Without optimization update.cu compiles in a third of the time, and the tests take no longer.
    mine = objects | {changed: compile_object(sources / "cuda" / changed, sources, tmp_path, "-O0")}
    result = run(list(mine.values()), tmp_path / "test", "streams" if fault in ORDER_FAULTS else PARTS[changed])
    assert result.returncode != 0 and fault.said in result.stdout, result.stdout
