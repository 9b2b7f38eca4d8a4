"""Compiles and links what has changed since the last build, with as many compilers at once as there are processors.

What torch.utils.cpp_extension has for this cannot stand in for it: `BuildExtension` knows one set of flags for all
files, where each SIMD variant needs its own; takes Python's own compiler flags, which in some distributions name a
processor or link-time optimisation and so change a kernel's bits; compiles everything again where ninja is missing; and
does not compile again when only the compiler has changed.
"""

import filecmp
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NoReturn

LINUX = sys.platform == "linux"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


def jobs_at_once() -> int:
    """Compilers that run at a time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("MAX_JOBS") or str(usable)
    if not asked.isdecimal() or int(asked) == 0:
        fail(f"MAX_JOBS={asked} is no number of compilers")
    return int(asked)


def is_current(product: Path, record: str, inputs: Callable[[], Iterable[Path]]) -> bool:
    """Whether `product` was made by the command in `record`, from inputs that have not changed since."""
    try:
        made = product.stat().st_mtime_ns
        recorded = record_of(product).read_text()
        return recorded == record and all(path.stat().st_mtime_ns <= made for path in inputs())
    except FileNotFoundError:
        return False


def record_of(product: Path) -> Path:
    return product.with_name(product.name + ".command")


class Compiler:
    """Compiles and links what has changed, in `folder`."""

    hurry: ClassVar[list[str]] = []  # arguments that change nothing in what is made
    if_it_fails: ClassVar[str] = ""

    def __init__(self, folder: Path) -> None:
        if sys.platform == "win32":
            fail("trainopt builds on Linux and macOS")
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        commands = [shlex.split(name) for name in names]
        self.command = next((command for command in commands if shutil.which(command[0])), [])
        if not self.command:
            fail(
                f"no C++ compiler found (looked for {', '.join(names)}): install one (Debian, Ubuntu: apt install g++;"
                " Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name it in CXX"
            )
        version = subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=True)
        self.version = version.stdout.splitlines()[0]
        # torch's OpenMP runtime on Linux is GCC's, and code from Clang would bring a second one.
        self.threaded = LINUX and "clang" not in self.version
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def compile(self, flags_of: dict[Path, list[str]]) -> list[Path]:
        """The objects of these sources, in parallel."""
        return compile_all([(self, source, flags) for source, flags in flags_of.items()])

    def compile_one(self, source: Path, flags: list[str]) -> Path:
        stem = self.folder / "-".join(source.with_suffix("").parts)
        product, depfile = Path(f"{stem}.o"), Path(f"{stem}.d")

        def inputs() -> Iterable[Path]:
            _, _, prerequisites = depfile.read_text().replace("\\\n", " ").partition(":")
            return map(Path, prerequisites.split())

        command = [*flags, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(product)]
        self._make(product, command, inputs, f"compiled {source}")
        return product

    def link(self, objects: list[Path], product: Path, flags: list[str]) -> Path:
        command = [*map(str, objects), *flags, "-o", str(product)]
        self._make(product, command, lambda: objects, f"linked {product.name}")
        return product

    def _make(self, product: Path, arguments: list[str], inputs: Callable[[], Iterable[Path]], done: str) -> None:
        command = [*self.command, *arguments]
        record = f"{self.version}\n{shlex.join(command)}\n"
        if is_current(product, record, inputs):
            return
        record_of(product).unlink(missing_ok=True)
        start = time.monotonic()
        command[len(self.command) : len(self.command)] = self.hurry
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            fail(f"the compiler failed{self.if_it_fails}\n{shlex.join(command)}\n{result.stdout}")
        print(f"{result.stdout}{done} in {time.monotonic() - start:.0f} s", flush=True)
        record_of(product).write_text(record)


class CudaCompiler(Compiler):
    """nvcc."""

    if_it_fails = " (TRAINOPT_CUDA=0 builds without CUDA kernels)"

    def __init__(self, folder: Path, cuda, files: int) -> None:
        self.command = [str(cuda.nvcc)]
        self.version = cuda.build
        # The compilers that there is room for, shared out: each file is compiled for several architectures.
        self.hurry = ["--threads", str(max(1, jobs_at_once() // files))]
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)


def compile_all(jobs: Iterable[tuple[Compiler, Path, list[str]]]) -> list[Path]:
    """The objects of these sources with these flags, in parallel."""
    with ThreadPoolExecutor(jobs_at_once()) as pool:
        running = [pool.submit(compiler.compile_one, source, flags) for compiler, source, flags in jobs]
        try:
            return [job.result() for job in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def replace_if_different(target: Path, made: Path) -> None:
    """Never writes into the file in place: a running process may have it mapped."""
    if target.exists() and filecmp.cmp(made, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy(made, fresh)
    os.replace(fresh, target)
