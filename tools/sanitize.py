"""Runs the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer.

The losses' operators are called with anything under the first two.

    python -m tools.sanitize
    python -m tools.sanitize threads cpu losses

Environment: TRAINOPT_FUZZ_EXAMPLES (200: how many examples each property is called with).
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from csrc.compiler import Compiler, compile_all, fail, jobs_at_once
from csrc.module import (
    BINDINGS,
    KERNEL_SOURCES,
    KERNELS,
    SIMD_FLAGS,
    binding_flags,
    import_torch,
    kernel_flags,
    module_flags,
    sources,
    units,
    variant_of,
)
from tools.emulate import SIMT_FLAGS, make_package, module_name

#: The engine with several threads; the CPU's engine; the CUDA kernels on the SIMT machine; the module's losses.
PARTS = ("threads", "cpu", "cuda", "losses")

FOLDER = Path("build", "sanitize")
SIMT, CUDA = Path("tests", "simt"), Path("csrc", "cuda")
#: Addresses are checked by calls: in line, the checks alone made the CPU's kernels take three times as long to compile.
CHECKED_BY_CALLS = "--param asan-instrumentation-with-call-threshold=0"
MEMORY = shlex.split(
    f"-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all {CHECKED_BY_CALLS}"
)
#: Those kernels load vectors from any address, and AddressSanitizer sees what `null`, `object-size` and
#: `pointer-overflow` would: with the four, kernels_avx2.cpp compiles in 120 s, and without them in 60 s.
MEMORY_OF_KERNELS = [*MEMORY, "-fno-sanitize=null,object-size,alignment,pointer-overflow"]
THREADS = shlex.split("-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread")

#: The kernels' parameters are larger from CUDA 13 on, which matters only to those that take tables of tensors: their
#: tests run as for old and for new drivers.
PARAMETER_BYTES = (4096, 32764)
WITH_TABLES = ("factors", "gather", "norm", "prepare", "stats", "update")
#: What the program is told to run: of these kernels, and of the others.
WITH_TABLES_RUN, OTHERS_RUN = ["norms", "steps"], ["cross-entropy", "large-rows", "pointwise"]

#: The longest to compile, and to run: these first, or in the end one core waits for them.
FIRST_COMPILED = ("kernels_baseline", "kernels_avx512", "kernels_avx2", "gather", "update", "pointwise")
FIRST_RUN = ("engine_test", "steps")

Job = tuple[Compiler, Path, list[str]]  # compiles a file with these flags


class Program(NamedTuple):
    """What is linked of these objects, and run with each of these arguments, or with none."""

    name: str
    jobs: list[Job]
    parts: Sequence[str] = ()
    sanitizer: Sequence[str] = MEMORY

    def commands(self) -> list[list[Path | str]]:
        objects = compile_all(self.jobs)  # which have been made
        made = Compiler(FOLDER / self.name).link(objects, FOLDER / self.name / "test", [*self.sanitizer, "-pthread"])
        return [[made, part] for part in self.parts] or [[made]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, help="all without any")
    parts = parser.parse_args().parts or PARTS
    engine = jobs_into("cpu", sources(*KERNEL_SOURCES), sanitizer=MEMORY_OF_KERNELS)
    programs = [program_of_threads()] if "threads" in parts else []
    programs += programs_of_cpu(engine) if "cpu" in parts else []
    programs += programs_of_cuda(engine) if "cuda" in parts else []
    module = Compiler(FOLDER / "module")
    bindings = jobs_of_bindings(module) if "losses" in parts else []
    # All at once, and each only once: programs have objects in common.
    jobs = {(job[0].folder, job[1]): job for job in [*bindings, *(job for program in programs for job in program.jobs)]}
    compile_all(sorted(jobs.values(), key=lambda job: rank(job[1].stem, FIRST_COMPILED)))
    commands = [command for program in programs for command in program.commands()]
    run_all(sorted(commands, key=lambda command: min(rank(name, FIRST_RUN) for name in names_in(command))))
    if bindings:
        fuzz(module, compile_all([*(job for job in engine if "loss" in job[1].stem), *bindings]))
    elif "losses" in parts:
        print("the module is not fuzzed: its sanitizer is GCC's on Linux")


def rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def names_in(command: list[Path | str]) -> list[str]:
    """The program's folder, and the part that it runs."""
    return [Path(command[0]).parent.name, *map(str, command[1:])]


def jobs_into(name: str, files: list[Path], flags: Sequence[str] = (), sanitizer: Sequence[str] = MEMORY) -> list[Job]:
    rules = ["-Itests/cpp/contract"]  # has a rule of the tests beside those of csrc/rules
    compiler = Compiler(FOLDER / name)
    return [(compiler, file, [*rules, *kernel_flags(file), *sanitizer, *flags]) for file in files]


def program_of_threads() -> Program:
    """With the kernels of one SIMD variant: which it is makes no difference to what several threads do."""
    steps = [source for source in sources(*KERNEL_SOURCES) if "loss" not in source.stem]
    steps = [source for source in steps if variant_of(source) not in SIMD_FLAGS]
    jobs = jobs_into("threads", [*steps, Path("tests/cpp/threads_test.cpp")], ["-UTRAINOPT_X86"], THREADS)
    return Program("threads", jobs, sanitizer=THREADS)


def programs_of_cpu(engine: list[Job]) -> list[Program]:
    tests = sorted(Path("tests", "cpp").glob("*_test.cpp"))
    count = jobs_at_once()
    shares = {"engine_test": [f"{share}/{count}" for share in range(1, count + 1)]}  # the longest
    return [Program(test.stem, [*engine, *jobs_into(test.stem, [test])], shares.get(test.stem, ())) for test in tests]


def programs_of_cuda(engine: list[Job]) -> list[Program]:
    machine = jobs_into("simt", [SIMT / "simt.cpp", SIMT / "queue.cpp"], SIMT_FLAGS)
    programs = [Program("simt", [*jobs_into("simt", [SIMT / "faults_test.cpp"], SIMT_FLAGS), *machine])]
    tables = [*(CUDA / f"{name}.cu" for name in WITH_TABLES), SIMT / "engine_test.cpp"]
    others = {*CUDA.glob("*.cu"), *SIMT.glob("*_test.cpp")} - {SIMT / "faults_test.cpp", *tables}
    common = [*engine, *machine, *jobs_into("cuda", sorted(others), SIMT_FLAGS)]
    for size in PARAMETER_BYTES:
        jobs = jobs_into(f"cuda-{size}", tables, [*SIMT_FLAGS, f"-DTRAINOPT_PARAMETER_BYTES={size}"])
        parts = [*WITH_TABLES_RUN, *(OTHERS_RUN if size == PARAMETER_BYTES[0] else ())]
        programs.append(Program(f"cuda-{size}", common + jobs, parts))
    return programs


def jobs_of_bindings(module: Compiler) -> list[Job]:
    """What sees torch; nothing where the compiler is not the one that can share a process with it."""
    if not module.threaded:
        return []
    flags = [*binding_flags(import_torch(), module.threaded), *MEMORY, "-fno-sanitize=undefined"]
    return [(module, unit, flags) for unit in units(*BINDINGS)]


def run_all(commands: list[list[Path | str]]) -> None:
    """Runs programs side by side, and ends with those that failed, if any did."""

    def run(command: list[Path | str]) -> bool:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{command[0]} {' '.join(map(str, command[1:]))}\n{done.stdout}", end="", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs_at_once()) as pool:
        passed = pool.map(run, commands)
    failed = [" ".join(map(str, command)) for command, good in zip(commands, passed, strict=True) if not good]
    if failed:
        fail(f"failed: {', '.join(failed)}")


def fuzz(module: Compiler, instrumented: list[Path]) -> None:
    """Calls the losses with anything, in a module where they and all that sees torch are instrumented.

    The optimizers' kernels are those of the build: here Python asks for every rule.

    Python and torch are not instrumented, so the sanitizer's library has to be loaded before them. With it comes the
    C++ library: the sanitizer looks for __cxa_throw once, when it is loaded, and Python alone has none.
    """
    others = {source: kernel_flags(source) for source in sources(*KERNEL_SOURCES) if "loss" not in source.stem}
    objects = instrumented + Compiler(KERNELS).compile(others)
    package = FOLDER / "package" / "trainopt"
    link_flags = [*module_flags(import_torch()), "-fsanitize=address,undefined"]
    make_package(package, module.link(objects, module.folder / module_name(), link_flags))
    libraries = (
        subprocess.check_output([*module.command, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONPATH": f"{package.parent}:.",
        "TRAINOPT_FUZZ_EXAMPLES": os.environ.get("TRAINOPT_FUZZ_EXAMPLES", "200"),
    }
    # -P: else the package in this directory comes before the instrumented one. --capture=sys: the sanitizer's report is
    # written as the process ends, and would end in pytest's own file.
    tests = "tests/test_losses_fuzz.py"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", tests]
    if subprocess.run(command, env=environment).returncode != 0:
        fail(f"failed: {tests}, with the losses instrumented")


if __name__ == "__main__":
    main()
