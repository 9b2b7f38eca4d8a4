"""What the compiled module consists of: its sources, their flags, and the torch that it is built for.

Nothing here imports torch before `import_torch`, so that metadata can be made where there is none.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import sysconfig
from pathlib import Path

from csrc.compiler import LINUX, fail

OLDEST_TORCH = (2, 11)
CXX20_TORCH = (2, 14)  # the first torch whose headers need C++20

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

KERNELS = Path("build", "kernels")  # which know no torch: one set of objects for all torches that a tree is built for
KERNEL_SOURCES = ("csrc/core", "csrc/cpu")
BINDINGS = ("csrc/torch", "csrc/python")  # what sees torch
UNITS = Path("build", "units")
ALONE = ("cuda_architectures",)  # has a flag of its own, for which the others need not be compiled again


# Sources --------------------------------------------------------------------------------------------------------------


def sources(*folders: str) -> list[Path]:
    """The C++ files of these folders that this architecture can compile."""
    found = [source for folder in folders for source in sorted(Path(folder).rglob("*.cpp"))]
    return [source for source in found if X86 or variant_of(source) not in SIMD_FLAGS]


def units(*folders: str) -> list[Path]:
    """What is compiled of sources that see torch: a file for each folder, which includes all the files in it.

    torch's headers take a compiler ten seconds and more, and what a file of ours has beside them takes one.
    """
    included: dict[Path, list[Path]] = {}
    for source in sources(*folders):
        included.setdefault(source if source.stem in ALONE else source.parent, []).append(source)
    made = []
    for place, files in included.items():
        unit = UNITS / f"{'-'.join(place.with_suffix('').parts)}.cpp"
        text = "".join(f'#include "{os.path.relpath(file, UNITS)}"\n' for file in files)
        if not unit.exists() or unit.read_text() != text:
            unit.parent.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
        made.append(unit)
    return made


def variant_of(source: Path) -> str:
    return source.stem.rpartition("_")[2]


def build_folder(torch) -> Path:
    return Path("build", f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}")


def kernel_flags(source: Path) -> list[str]:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    return KERNEL_FLAGS + SIMD_FLAGS.get(variant_of(source), []) + language


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
