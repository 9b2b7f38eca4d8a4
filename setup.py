"""Builds the compiled module trainopt._C from csrc, and trainopt/_build.py, which records what it was built with.

    pip install --no-build-isolation .      into the environment whose torch it is built for
    python setup.py build_ext --inplace     into the source tree; only what has changed is compiled
    python setup.py sanitize                the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer, and
                                            the losses' operators, called with anything, under the first
    python setup.py emulate                 build/emulated/trainopt, with CUDA kernels that run on the CPU: for tests

Environment: CXX (the compiler), MAX_JOBS (compilers at once), TRAINOPT_CUDA (0 or 1) and what else csrc/cuda/toolkit.py
reads, which decides about the CUDA kernels.
"""

import filecmp
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # which pip leaves out
from csrc.cuda import toolkit

OLDEST_TORCH = (2, 11)
CXX20_TORCH = (2, 14)  # the first torch whose headers need C++20

LINUX = sys.platform == "linux"
X86 = platform.machine().lower() in ("x86_64", "amd64")

COMMON_FLAGS = shlex.split("-fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra -Icsrc")

# For every file of csrc/cpu. The arithmetic stays as it is written (no contraction to FMA, no reassociation), so that
# all SIMD variants give the same bits.
KERNEL_FLAGS = [*COMMON_FLAGS, *shlex.split("-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math")]
if X86:
    KERNEL_FLAGS.append("-DTRAINOPT_X86")

# The variants that are compiled for more than the architecture's baseline, and chosen at run time; x86-64 only. A
# file's name ends in its variant.
SIMD_FLAGS = {
    "avx2": shlex.split("-mavx2 -mfma -mf16c"),
    "avx512": shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"),
}

SANITIZER_FLAGS = shlex.split("-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all")
THREAD_SANITIZER_FLAGS = shlex.split("-O1 -g -fno-omit-frame-pointer -fsanitize=thread")

KERNELS = Path("build", "kernels")  # which know no torch: one set of objects for all torches that a tree is built for
SANITIZED = Path("build", "sanitize")

# What sees torch.
BINDINGS = ("csrc/torch", "csrc/python")
# What is instrumented in the module whose losses are called with anything: of csrc/torch/losses all, and these.
FUZZED = {"clip", "layout", "loss_calls", "tensor_list"}
EMULATED = Path("build", "emulated", "trainopt")

# For the CUDA sources as the SIMT machine of the tests runs them.
SIMT_FLAGS = shlex.split("-DTRAINOPT_SIMT -Itests/simt -Wno-unknown-pragmas")


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


def jobs_at_once() -> int:
    """Compilers that run at a time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("MAX_JOBS") or str(usable)
    if not asked.isdecimal() or int(asked) == 0:
        fail(f"MAX_JOBS={asked} is no number of compilers")
    return int(asked)


# torch ----------------------------------------------------------------------------------------------------------------


def release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def installed_torch() -> tuple[int, int] | None:
    """The release of the installed torch, found without importing it."""
    try:
        return release(importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_requirement() -> str:
    """The extension is bound to the C++ ABI of the torch release that it is built with."""
    found = installed_torch()
    if found is None or found < OLDEST_TORCH:
        return "torch>={}.{}".format(*OLDEST_TORCH)
    return "torch=={}.{}.*".format(*found)


def import_torch():
    found = installed_torch()
    if found is None:
        fail(
            "torch is not installed where trainopt is being built: install torch, then run"
            " `pip install --no-build-isolation .`, which builds trainopt for that torch"
        )
    if found < OLDEST_TORCH:
        fail("trainopt needs torch {}.{} or newer, and torch {}.{} is installed".format(*OLDEST_TORCH, *found))
    import torch

    return torch


def binding_flags(torch, threaded: bool) -> list[str]:
    """For csrc/torch and csrc/python, the only files that see torch."""
    torch_include = Path(torch.__path__[0], "include")
    python_include = Path(sysconfig.get_paths()["include"])
    if not Path(python_include, "Python.h").exists():
        fail(f"Python's C headers are missing from {python_include} (Debian, Ubuntu: apt install python3-dev)")
    standard = "c++20" if release(torch.__version__) >= CXX20_TORCH else "c++17"
    flags = [*COMMON_FLAGS, f"-std={standard}", "-O2"]
    for include in (torch_include, torch_include / "torch/csrc/api/include", python_include):
        flags += ["-isystem", str(include)]
    if LINUX:
        flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    if threaded:
        flags.append("-fopenmp")  # for at::parallel_for; not linked, the runtime is the one that torch has loaded
    return flags


def module_flags(torch) -> list[str]:
    """For linking the module."""
    kind = ["-shared"] if LINUX else ["-bundle", "-undefined", "dynamic_lookup"]
    flags = [*kind, f"-L{Path(torch.__path__[0], 'lib')}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    if LINUX:
        flags.append(loaded_cxx_library())
    return flags


def loaded_cxx_library() -> str:
    """The C++ library that torch has loaded, to be linked by its path.

    A compiler that is told to link its own copy (-static-libstdc++), or that was moved away from its shared one, puts a
    second library into the process: then printing a number into an error message crashed.
    """
    loaded = re.search(r"/\S*/libstdc\+\+\.so\.\S+$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return loaded[0] if loaded else "-lstdc++"


# CUDA -----------------------------------------------------------------------------------------------------------------


def choose_cuda(torch) -> tuple[Any, str]:
    """The toolkit for the CUDA kernels; or None, and why they are not built."""

    def seen_by_torch() -> list[str]:
        if not torch.cuda.is_available():
            return []
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ["{}.{}".format(*capability) for capability in sorted(capabilities)]

    packages = Path(torch.__path__[0]).parent
    try:
        chosen = toolkit.choose(torch.__version__, torch.version.cuda, packages, os.environ, seen_by_torch)
    except toolkit.Refused as refused:
        fail(str(refused))
    return (None, chosen) if isinstance(chosen, str) else (chosen, "")


def cuda_binding_flags(cuda, source: Path) -> list[str]:
    """For csrc/torch and csrc/python, beside `binding_flags`."""
    flags = ["-DTRAINOPT_WITH_CUDA"]
    for include in cuda.includes:
        flags += ["-isystem", str(include)]
    if source.stem == "cuda_architectures":  # alone: for another list the others need not be compiled again
        flags.append(f'-DTRAINOPT_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"')
    return flags


# Sources and products -------------------------------------------------------------------------------------------------


def sources(*folders: str) -> list[Path]:
    """The C++ files of these folders that this architecture can compile."""
    found = [source for folder in folders for source in sorted(Path(folder).rglob("*.cpp"))]
    return [source for source in found if X86 or variant_of(source) not in SIMD_FLAGS]


def variant_of(source: Path) -> str:
    return source.stem.rpartition("_")[2]


def build_folder(torch) -> Path:
    return Path("build", f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}")


def kernel_flags(source: Path) -> list[str]:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    return KERNEL_FLAGS + SIMD_FLAGS.get(variant_of(source), []) + language


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


# Commands -------------------------------------------------------------------------------------------------------------


def replace_if_different(target: Path, made: Path) -> None:
    """Never writes into the file in place: a running process may have it mapped."""
    if target.exists() and filecmp.cmp(made, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy(made, fresh)
    os.replace(fresh, target)


def link_package(folder: Path) -> None:
    """Links to all files of the package but its module, which `folder` has its own of."""
    files = {file.name for file in Path("trainopt").iterdir() if not file.match("_C.*")} - {"__pycache__"}
    links = {file.name for file in folder.iterdir() if file.is_symlink()}
    for name in links - files:
        folder.joinpath(name).unlink()
    for name in files - links:
        folder.joinpath(name).symlink_to(os.path.relpath(Path("trainopt", name), folder))


class BuildExtension(build_ext):
    """Builds trainopt._C in build/, where the next build finds what it need not compile again."""

    def run(self) -> None:
        self.torch = import_torch()
        self.cuda, no_cuda = choose_cuda(self.torch)
        folder = build_folder(self.torch)
        self.toolchain = Compiler(folder)
        self.kernels = Compiler(KERNELS)
        print(f"trainopt._C for torch {self.torch.__version__}, with {self.toolchain.version}")
        print(f"CUDA kernels: {self.cuda or f'not built ({no_cuda})'}", flush=True)
        self.threaded = self.toolchain.threaded
        if not self.threaded:
            print("threads: one for a step (build with GCC on Linux for more)")
        super().run()

        build = folder / "_build.py"
        build.write_text(
            '"""What trainopt._C was built with. Written by setup.py."""\n\n'
            f"TORCH = {str(self.torch.__version__)!r}\n"
            f"CXX11_ABI = {self.torch.compiled_with_cxx11_abi()}\n"
            f"PYTHON = {platform.python_version()!r}\n"
            f"COMPILER = {self.toolchain.version!r}\n"
            f"THREADED = {self.threaded}\n"
            f"PLATFORM = {sysconfig.get_platform()!r}\n"
            f"CUDA = {self.cuda.version if self.cuda else None!r}\n"
            f"CUDA_ARCHITECTURES = {' '.join(self.cuda.architectures) if self.cuda else ''!r}\n"
            f"CUDA_REASON = {no_cuda!r}\n"
        )
        replace_if_different(Path("." if self.inplace else self.build_lib, "trainopt", build.name), build)

    def build_extension(self, extension: Extension) -> None:
        start = time.monotonic()
        compiler, link_flags = self.toolchain, module_flags(self.torch)
        jobs: list[tuple[Compiler, Path, list[str]]] = []
        if self.cuda:
            compiler = Compiler(self.toolchain.folder / "cuda")
            files = sorted(Path("csrc", "cuda").glob("*.cu"))
            nvcc = CudaCompiler(compiler.folder, self.cuda, len(files))
            flags = ["-Icsrc", *self.cuda.flags(compiler.command if os.environ.get("CXX") else ())]
            jobs += [(nvcc, file, flags) for file in files]
            # CUDA's own runtime is not linked: it is the one that torch has loaded, and libc10_cuda brings it.
            link_flags.append("-lc10_cuda")
        for source in map(Path, extension.sources):
            if source.parts[1] in ("torch", "python"):
                flags = binding_flags(self.torch, self.threaded)
                jobs.append((compiler, source, flags + (cuda_binding_flags(self.cuda, source) if self.cuda else [])))
            else:
                jobs.append((self.kernels, source, kernel_flags(source)))
        target = Path(self.get_ext_fullpath(extension.name))
        made = compiler.link(compile_all(jobs), compiler.folder / target.name, link_flags)
        print(f"{made.name}: {time.monotonic() - start:.0f} s, {made.stat().st_size / 1e6:.1f} MB", flush=True)
        replace_if_different(target, made)

    def copy_extensions_to_source(self) -> None:
        """For an in-place build."""
        for extension in self.extensions:
            module = self.get_ext_filename(extension.name)
            replace_if_different(Path(module), Path(self.build_lib, module))


class Emulate(Command):
    """A package beside the ordinary one, which is built first: its own module, and links to all else."""

    description = f"build {EMULATED}, with the CUDA engine on the device that the tests emulate"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        ordinary = self.reinitialize_command("build_ext", inplace=True)
        ordinary.ensure_finalized()
        ordinary.run()
        torch = import_torch()
        kernels_of_cpu = Compiler(KERNELS)
        own = Compiler(build_folder(torch) / "emulated")
        device, simt, arena = (Path("tests", "simt", f"{name}.cpp") for name in ("device", "simt", "arena"))
        bindings = [*binding_flags(torch, own.threaded), *SIMT_FLAGS, "-DTRAINOPT_WITH_CUDA"]
        kernels = [*sorted(Path("csrc", "cuda").glob("*.cu")), simt, arena]
        objects = compile_all(
            [
                *((own, source, bindings) for source in [device, *sources(*BINDINGS)]),
                *((own, source, kernel_flags(source) + SIMT_FLAGS) for source in kernels),
                *((kernels_of_cpu, source, kernel_flags(source)) for source in sources("csrc/core", "csrc/cpu")),
            ]
        )
        name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        replace_if_different(EMULATED / name, own.link(objects, own.folder / name, module_flags(torch)))
        link_package(EMULATED)


class Sanitize(Command):
    description = "build the C++ tests with Address-, UndefinedBehavior- and ThreadSanitizer, and run them"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        cpu = sources("csrc/core", "csrc/cpu")
        engine = self.compile("cpu", cpu, [])
        steps = [source for source in cpu if "loss" not in source.stem]
        threads = self.compile("threads", [*steps, Path("tests/cpp/threads_test.cpp")], [], THREAD_SANITIZER_FLAGS)
        faults = self.compile("simt", [Path("tests/simt/faults_test.cpp"), Path("tests/simt/simt.cpp")], SIMT_FLAGS)
        runs: list[list[Path | str]] = [
            [self.link("threads", threads, THREAD_SANITIZER_FLAGS)],
            [self.link("simt", faults)],
            *(
                [self.link(test.stem, engine + self.compile(test.stem, [test], []))]
                for test in sorted(Path("tests", "cpp").glob("*_test.cpp"))
            ),
        ]
        # As for old and for new drivers: the kernels' parameters are larger from CUDA 13 on. That matters only to those
        # that take tables of tensors.
        simt = Path("tests", "simt")
        tables = [
            *(Path("csrc", "cuda", f"{name}.cu") for name in ("gather", "norm", "prepare", "update")),
            simt / "engine_test.cpp",
        ]
        others = [path for path in sorted(Path("csrc", "cuda").glob("*.cu")) if path not in tables]
        others += [simt / f"{name}.cpp" for name in ("cross_entropy_test", "norm_test", "pointwise_test", "simt")]
        common = engine + self.compile("cuda", others, SIMT_FLAGS)
        for size, parts in (
            (4096, ["cross-entropy", "large-rows", "pointwise", "norms", "steps"]),
            (32764, ["norms", "steps"]),
        ):
            own = self.compile(f"cuda-{size}", tables, [*SIMT_FLAGS, f"-DTRAINOPT_PARAMETER_BYTES={size}"])
            program = self.link(f"cuda-{size}", common + own)
            runs += [[program, part] for part in parts]
        run_all(runs)
        self.fuzz(engine)

    def fuzz(self, engine: list[Path]) -> None:
        """Calls the losses with anything, in a module of which they are instrumented.

        Python and torch are not instrumented, so the sanitizer's library has to be loaded before them. With it comes
        the C++ library: the sanitizer looks for __cxa_throw once, when it is loaded, and Python alone has none.
        """
        shared, own = Compiler(build_folder(import_torch())), Compiler(SANITIZED / "module")
        if not own.threaded:
            print("the module is not fuzzed: its sanitizer is GCC's on Linux")
            return
        torch = import_torch()
        flags, instrumented = binding_flags(torch, own.threaded), [*SANITIZER_FLAGS, "-fno-sanitize=undefined"]
        objects = compile_all(
            (own, source, flags + instrumented)
            if source.stem in FUZZED or source.parent.name == "losses"
            else (shared, source, flags)
            for source in sources(*BINDINGS)
        )
        package = SANITIZED / "package" / "trainopt"
        name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        link_flags = [*module_flags(torch), "-fsanitize=address,undefined"]
        replace_if_different(package / name, own.link(engine + objects, own.folder / name, link_flags))
        link_package(package)
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
        # -P: else the package in this directory comes before the instrumented one. --capture=sys: the sanitizer's
        # report is written as the process ends, and would end in pytest's own file.
        tests = "tests/test_losses_fuzz.py"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", tests]
        if subprocess.run(command, env=environment).returncode != 0:
            fail(f"failed: {tests}, with the losses instrumented")

    def compile(
        self, name: str, files: list[Path], flags: list[str], sanitizer: list[str] = SANITIZER_FLAGS
    ) -> list[Path]:
        compiler = Compiler(SANITIZED / name)
        rules = ["-Itests/cpp/contract"]  # has a rule of the tests beside those of csrc/rules
        return compiler.compile({file: rules + kernel_flags(file) + sanitizer + flags for file in files})

    def link(self, name: str, objects: list[Path], sanitizer: list[str] = SANITIZER_FLAGS) -> Path:
        return Compiler(SANITIZED / name).link(objects, SANITIZED / name / "test", [*sanitizer, "-pthread"])


setup(
    license="BSD-3-Clause",
    install_requires=[torch_requirement()],
    ext_modules=[Extension("trainopt._C", [str(path) for path in sources("csrc/core", "csrc/cpu", *BINDINGS)])],
    cmdclass={"build_ext": BuildExtension, "emulate": Emulate, "sanitize": Sanitize},
)
