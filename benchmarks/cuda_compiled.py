"""The CUDA kernels compiled one file and one architecture at a time, for what the compiler and the code say of them.

One run of nvcc makes the report (-Xptxas -v), the PTX and the machine code of a file for an architecture. All three are
kept in build/cuda_kernels, by a hash of the sources, the flags and the compiler: tests, tables and a second run of
either read what the first has made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

from csrc.compiler import jobs_at_once
from csrc.cuda import toolkit

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "cuda_kernels"
FILES = (
    *("update", "prepare", "gather", "factors", "stats", "norm", "pointwise"),
    *("cross_entropy", "cross_entropy_rows", "cross_entropy_columns"),
)
#: Those of the build.
FLAGS = (*toolkit.FLAGS, f"-I{ROOT / 'csrc'}")


def nvcc() -> str | None:
    """The compiler's path, if there is one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


@cache
def said_version() -> str:
    return subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def version() -> str:
    """The compiler's release, as 13.0."""
    found = re.search(r"release (\S+),", said_version())
    return found[1] if found else "unknown"


def nvdisasm() -> str | None:
    """The disassembler's path, if there is one: the toolkit's, or the one in Triton's package."""
    triton = importlib.util.find_spec("triton")
    places = [] if triton is None or triton.origin is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
    return shutil.which("nvdisasm") or next(filter(None, (shutil.which("nvdisasm", path=str(p)) for p in places)), None)


@cache
def included_by(path: Path) -> frozenset[Path]:
    """The house's own files that a source includes, itself among them."""
    found = {path}
    for name in re.findall(r'^#include "(\S+)"', path.read_text(), flags=re.MULTILINE):
        header = ROOT / "csrc" / name
        if header.exists():  # the SIMT machine's is for the tests
            found |= included_by(header)
    return frozenset(found)


@cache
def sources_hash(name: str) -> str:
    """Of all that a file is made of, and of what compiles it."""
    found = hashlib.sha256(repr((toolkit.FLAGS, said_version())).encode())
    for path in sorted(included_by(ROOT / "csrc" / "cuda" / f"{name}.cu")):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def folder_of(name: str, architecture: int) -> Path:
    return KEPT / f"{name}-sm_{architecture}-{sources_hash(name)}"


@dataclass(frozen=True)
class Compiled:
    """A file's kernels for one architecture."""

    folder: Path  # report, ptx, cubin

    @cached_property
    def report(self) -> str:
        """What ptxas -v says."""
        return (self.folder / "report").read_text()

    @cached_property
    def ptx(self) -> dict[str, str]:
        """The PTX of each kernel, by its mangled name."""
        entries = re.split(r"\.visible \.entry |\.entry ", (self.folder / "ptx").read_text())[1:]
        return {entry.partition("(")[0]: entry for entry in entries}

    @cached_property
    def machine_code(self) -> dict[str, str]:
        """The machine code of each kernel, disassembled, by its mangled name."""
        kept = self.folder / "machine_code"
        if not kept.exists():
            command = [nvdisasm() or "nvdisasm", "-c", str(self.folder / "cubin")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            with NamedTemporaryFile("w", dir=self.folder, delete=False) as made:
                made.write(re.sub(r"[ \t]+", " ", said))  # it comes in columns, of 300 characters
            Path(made.name).rename(kept)
        sections = re.split(r"^ ?\.section \.text\.", kept.read_text(), flags=re.MULTILINE)[1:]
        return {section.partition(",")[0]: section for section in sections}


@cache
def compiled(name: str, architecture: int) -> Compiled:
    """Compiles csrc/cuda/NAME.cu for one architecture, if need be; CalledProcessError if it does not compile."""
    folder = folder_of(name, architecture)
    if folder.exists():
        return Compiled(folder)
    KEPT.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=KEPT) as made:
        command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        command += ["-keep", "-keep-dir", made, "-o", f"{made}/cubin", str(ROOT / "csrc" / "cuda" / f"{name}.cu")]
        report = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
        whole = Path(made, "whole")
        whole.mkdir()
        (whole / "report").write_text(report)
        Path(made, "cubin").rename(whole / "cubin")
        Path(made, f"{name}.ptx").rename(whole / "ptx")
        try:
            whole.rename(folder)  # whoever else is compiling it has the same
        except OSError:
            if not folder.exists():
                raise
    return Compiled(folder)


def compile_all(wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Compiled]:
    """Several of them, with as many compilers at once as the build has."""
    wanted = list(wanted)
    with ThreadPoolExecutor(jobs_at_once()) as pool:
        return dict(zip(wanted, pool.map(lambda one: compiled(*one), wanted), strict=True))


def forget_old() -> None:
    """Removes what other sources were compiled to."""
    hashes = {sources_hash(name) for name in FILES}
    for folder in KEPT.glob("*-sm_*"):
        if folder.name.rpartition("-")[2] not in hashes:
            shutil.rmtree(folder, ignore_errors=True)
