"""Runs the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer.

The losses' operators are called with anything under the first two.

    python -m tools.sanitize
    python -m tools.sanitize --parameter-bytes 32764

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
WITH_TABLES = ("gather", "norm", "prepare", "stats", "update")
#: What the program is told to run: of these kernels, and of the others.
PARTS_WITH_TABLES, OTHER_PARTS = ["norms", "steps"], ["cross-entropy", "large-rows", "pointwise"]

Job = tuple[Compiler, Path, list[str]]  # compiles a file with these flags


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__.partition("\n")[0])
    said = "of the kernels' parameters, to test with these alone"
    parser.add_argument("--parameter-bytes", type=int, choices=PARAMETER_BYTES, help=said)
    given = parser.parse_args().parameter_bytes
    sizes = PARAMETER_BYTES if given is None else (given,)
    cpu = sources(*KERNEL_SOURCES)
    engine_jobs = jobs_into("cpu", cpu, sanitizer=MEMORY_OF_KERNELS)
    # What takes minutes, all at once: else a core waits for each program's last file.
    tables = [job for size in sizes for job in jobs_of_tables(size)]
    compile_all([*engine_jobs, *tables, *jobs_of_threads()])
    engine = compile_all(engine_jobs)
    run_all([*programs_of_threads(), *programs_of_cpu(engine), *programs_of_cuda(engine, sizes)])
    fuzz([made for source, made in zip(cpu, engine, strict=True) if "loss" in source.stem])


def jobs_into(name: str, files: list[Path], flags: Sequence[str] = (), sanitizer: Sequence[str] = MEMORY) -> list[Job]:
    rules = ["-Itests/cpp/contract"]  # has a rule of the tests beside those of csrc/rules
    compiler = Compiler(FOLDER / name)
    return [(compiler, file, [*rules, *kernel_flags(file), *sanitizer, *flags]) for file in files]


def jobs_of_threads() -> list[Job]:
    """With the kernels of one SIMD variant: which it is makes no difference to what several threads do."""
    steps = [source for source in sources(*KERNEL_SOURCES) if "loss" not in source.stem]
    steps = [source for source in steps if variant_of(source) not in SIMD_FLAGS]
    return jobs_into("threads", [*steps, Path("tests/cpp/threads_test.cpp")], ["-UTRAINOPT_X86"], THREADS)


def jobs_of_tables(size: int) -> list[Job]:
    """What depends on the bytes of a kernel's parameters."""
    tables = [*(CUDA / f"{name}.cu" for name in WITH_TABLES), SIMT / "engine_test.cpp"]
    return jobs_into(f"cuda-{size}", tables, [*SIMT_FLAGS, f"-DTRAINOPT_PARAMETER_BYTES={size}"])


def link(name: str, objects: list[Path], sanitizer: Sequence[str] = MEMORY) -> Path:
    return Compiler(FOLDER / name).link(objects, FOLDER / name / "test", [*sanitizer, "-pthread"])


def programs_of_threads() -> list[list[Path | str]]:
    return [[link("threads", compile_all(jobs_of_threads()), THREADS)]]


def programs_of_cpu(engine: list[Path]) -> list[list[Path | str]]:
    tests = sorted(Path("tests", "cpp").glob("*_test.cpp"))
    return [[link(test.stem, engine + compile_all(jobs_into(test.stem, [test])))] for test in tests]


def programs_of_cuda(engine: list[Path], sizes: Sequence[int]) -> list[list[Path | str]]:
    machine = [SIMT / "simt.cpp", SIMT / "queue.cpp"]
    faults = compile_all(jobs_into("simt", [SIMT / "faults_test.cpp", *machine], SIMT_FLAGS))
    runs: list[list[Path | str]] = [[link("simt", faults)]]
    apart = {SIMT / "faults_test.cpp", SIMT / "engine_test.cpp", *(CUDA / f"{name}.cu" for name in WITH_TABLES)}
    others = [*sorted({*CUDA.glob("*.cu"), *SIMT.glob("*_test.cpp")} - apart), *machine]
    common = engine + compile_all(jobs_into("cuda", others, SIMT_FLAGS))
    for size in sizes:
        program = link(f"cuda-{size}", common + compile_all(jobs_of_tables(size)))
        runs += [[program, part] for part in (*(OTHER_PARTS if size == sizes[0] else ()), *PARTS_WITH_TABLES)]
    return runs


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


def fuzz(losses: list[Path]) -> None:
    """Calls the losses with anything, in a module where they and all that sees torch are instrumented.

    The optimizers' kernels are those of the build: here Python asks for every rule.

    Python and torch are not instrumented, so the sanitizer's library has to be loaded before them. With it comes the
    C++ library: the sanitizer looks for __cxa_throw once, when it is loaded, and Python alone has none.
    """
    torch = import_torch()
    own = Compiler(FOLDER / "module")
    if not own.threaded:
        print("the module is not fuzzed: its sanitizer is GCC's on Linux")
        return
    flags, instrumented = binding_flags(torch, own.threaded), [*MEMORY, "-fno-sanitize=undefined"]
    others = {source: kernel_flags(source) for source in sources(*KERNEL_SOURCES) if "loss" not in source.stem}
    objects = losses + Compiler(KERNELS).compile(others)
    objects += own.compile({unit: flags + instrumented for unit in units(*BINDINGS)})
    package = FOLDER / "package" / "trainopt"
    link_flags = [*module_flags(torch), "-fsanitize=address,undefined"]
    make_package(package, own.link(objects, own.folder / module_name(), link_flags))
    libraries = (
        subprocess.check_output([*own.command, f"-print-file-name={name}"], text=True).strip()
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
