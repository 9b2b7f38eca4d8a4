"""Builds the compiled module trainopt._C from csrc, and trainopt/_build.py, which records what it was built with.

    pip install --no-build-isolation .      into the environment whose torch it is built for
    python setup.py build_ext --inplace     into the source tree; only what has changed is compiled
    python setup.py sanitize                the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
    python setup.py emulate                 build/emulated/trainopt, with CUDA kernels that run on the CPU: for tests

Environment: CXX (the compiler), MAX_JOBS (compilers at once), TRAINOPT_CUDA (0 or 1).
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
from typing import ClassVar, NoReturn

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

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

SANITIZED = Path("build", "sanitize")
EMULATED = Path("build", "emulated", "trainopt")

# For the CUDA sources as the SIMT machine of the tests runs them.
SIMT_FLAGS = shlex.split("-DTRAINOPT_SIMT -Itests/simt -Wno-unknown-pragmas")


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


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
    """csrc/python, the only files that see torch, pybind11 and Python."""
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
    return [*kind, f"-L{Path(torch.__path__[0], 'lib')}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]


def reason_for_no_cuda() -> str:
    """Decides about the CUDA kernels; nvcc is never looked for unless they are asked for."""
    asked = os.environ.get("TRAINOPT_CUDA") or "0"
    if asked == "1":
        fail("TRAINOPT_CUDA=1 asks for CUDA kernels, which are not part of this version")
    if asked != "0":
        fail(f"TRAINOPT_CUDA={asked} is not known: use 0 or 1")
    return "not part of this version"


# Sources and products -------------------------------------------------------------------------------------------------


def sources(*folders: str) -> list[Path]:
    """The C++ files of these folders that this architecture can compile."""
    found = [source for folder in folders for source in sorted(Path(folder).glob("*.cpp"))]
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
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(self._compile, source, flags) for source, flags in flags_of.items()]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _compile(self, source: Path, flags: list[str]) -> Path:
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
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            fail(f"the compiler failed\n{shlex.join(command)}\n{result.stdout}")
        print(f"{result.stdout}{done} in {time.monotonic() - start:.0f} s", flush=True)
        record_of(product).write_text(record)


# Commands -------------------------------------------------------------------------------------------------------------


def replace_if_different(target: Path, made: Path) -> None:
    """Never writes into the file in place: a running process may have it mapped."""
    if target.exists() and filecmp.cmp(made, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy(made, fresh)
    os.replace(fresh, target)


class BuildExtension(build_ext):
    """Builds trainopt._C in build/, where the next build finds what it need not compile again."""

    def run(self) -> None:
        self.torch = import_torch()
        no_cuda = reason_for_no_cuda()
        folder = build_folder(self.torch)
        self.toolchain = Compiler(folder)
        print(f"trainopt._C for torch {self.torch.__version__}, with {self.toolchain.version}")
        print(f"CUDA kernels: not built ({no_cuda})", flush=True)
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
            "CUDA = None\n"
            f"CUDA_REASON = {no_cuda!r}\n"
        )
        replace_if_different(Path("." if self.inplace else self.build_lib, "trainopt", build.name), build)

    def build_extension(self, extension: Extension) -> None:
        bindings = binding_flags(self.torch, self.threaded)
        objects = self.toolchain.compile(
            {
                source: bindings if source.parent.name == "python" else kernel_flags(source)
                for source in map(Path, extension.sources)
            }
        )
        target = Path(self.get_ext_fullpath(extension.name))
        made = self.toolchain.link(objects, self.toolchain.folder / target.name, module_flags(self.torch))
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
        shared = Compiler(build_folder(torch))
        own = Compiler(shared.folder / "emulated")
        bindings = [*binding_flags(torch, own.threaded), *SIMT_FLAGS, "-DTRAINOPT_WITH_CUDA"]
        device = Path("tests", "simt", "device.cpp")
        objects = shared.compile({source: kernel_flags(source) for source in sources("csrc/core", "csrc/cpu")})
        objects += own.compile({source: bindings for source in [*sources("csrc/python"), device]})
        kernels = [*sorted(Path("csrc", "cuda").glob("*.cu")), *map(device.with_name, ("simt.cpp", "arena.cpp"))]
        objects += own.compile({source: kernel_flags(source) + SIMT_FLAGS for source in kernels})
        name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        replace_if_different(EMULATED / name, own.link(objects, own.folder / name, module_flags(torch)))
        for file in Path("trainopt").iterdir():
            link = EMULATED / file.name
            if not file.match("_C.*") and file.name != "__pycache__" and not link.is_symlink():
                link.symlink_to(os.path.relpath(file, EMULATED))


class Sanitize(Command):
    description = "build the C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer, and run them"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        engine = self.compile("cpu", sources("csrc/core", "csrc/cpu"), [])
        programs = [
            *(
                self.link(test.stem, engine + self.compile(test.stem, [test], []))
                for test in sorted(Path("tests", "cpp").glob("*_test.cpp"))
            ),
            self.link(
                "simt",
                self.compile("simt", [Path("tests/simt/faults_test.cpp"), Path("tests/simt/simt.cpp")], SIMT_FLAGS),
            ),
        ]
        # As for old and for new drivers: the kernels' parameters are larger from CUDA 13 on.
        for size in (4096, 32764):
            flags = [*SIMT_FLAGS, f"-DTRAINOPT_PARAMETER_BYTES={size}"]
            tested = [
                *sorted(Path("csrc", "cuda").glob("*.cu")),
                Path("tests/simt/engine_test.cpp"),
                Path("tests/simt/norm_test.cpp"),
                Path("tests/simt/pointwise_test.cpp"),
                Path("tests/simt/simt.cpp"),
            ]
            programs.append(self.link(f"cuda-{size}", engine + self.compile(f"cuda-{size}", tested, flags)))
        failed = [program.parent.name for program in programs if subprocess.run([program]).returncode != 0]
        if failed:
            fail(f"failed: {', '.join(failed)}")

    def compile(self, name: str, files: list[Path], flags: list[str]) -> list[Path]:
        compiler = Compiler(SANITIZED / name)
        return compiler.compile({file: kernel_flags(file) + SANITIZER_FLAGS + flags for file in files})

    def link(self, name: str, objects: list[Path]) -> Path:
        return Compiler(SANITIZED / name).link(objects, SANITIZED / name / "test", [*SANITIZER_FLAGS, "-pthread"])


setup(
    license="BSD-3-Clause",
    install_requires=[torch_requirement()],
    ext_modules=[Extension("trainopt._C", [str(path) for path in sources("csrc/core", "csrc/cpu", "csrc/python")])],
    cmdclass={"build_ext": BuildExtension, "emulate": Emulate, "sanitize": Sanitize},
)
