"""Builds build/emulated/trainopt: a package beside the ordinary one, with the CUDA kernels run on the CPU, for tests.

Its module has the CUDA engine on the device that tests/simt emulates; all else in it are links to the ordinary package,
which must have been built.

    python -m tools.emulate
"""

import os
import shlex
import sysconfig
from pathlib import Path

from csrc.compiler import Compiler, compile_all, replace_if_different
from csrc.module import (
    BINDINGS,
    KERNEL_SOURCES,
    KERNELS,
    binding_flags,
    build_folder,
    import_torch,
    kernel_flags,
    module_flags,
    sources,
    units,
)

PACKAGE = Path("build", "emulated", "trainopt")

#: The SIMT machine that runs kernels on the CPU, and, in its folder "device", the torch device that has them run there.
SIMT = Path("tests", "simt")

#: For that device, which does little itself: most of what is compiled there is torch's headers, and without these flags
#: the compiler takes a quarter longer.
DEVICE_FLAGS = shlex.split("-O1 -DAT_PER_OPERATOR_HEADERS")

#: For the CUDA sources as the SIMT machine of the tests runs them.
SIMT_FLAGS = shlex.split("-DTRAINOPT_SIMT -Itests/simt -Wno-unknown-pragmas")

#: For these sources here: update.cu compiles in half the time, and most of the tests' time is the machine's.
KERNELS_OF_TESTS = ["-O1"]


def main() -> None:
    torch = import_torch()
    kernels_of_cpu = Compiler(KERNELS)
    own = Compiler(build_folder(torch) / "emulated")
    bindings = [*binding_flags(torch, own.threaded), *SIMT_FLAGS, "-DTRAINOPT_WITH_CUDA"]
    machine = [file for file in sorted(SIMT.glob("*.cpp")) if not file.match("*_test.cpp")]
    kernels = [*sorted(Path("csrc", "cuda").glob("*.cu")), *machine]
    objects = compile_all(
        [
            *((own, source, bindings + DEVICE_FLAGS) for source in units(str(SIMT / "device"))),
            *((own, unit, bindings) for unit in units(*BINDINGS)),
            *((own, source, kernel_flags(source) + SIMT_FLAGS + KERNELS_OF_TESTS) for source in kernels),
            *((kernels_of_cpu, source, kernel_flags(source)) for source in sources(*KERNEL_SOURCES)),
        ]
    )
    make_package(PACKAGE, own.link(objects, own.folder / module_name(), module_flags(torch)))


def module_name() -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def make_package(folder: Path, module: Path) -> None:
    """A package with this module, and links to all other files of trainopt."""
    replace_if_different(folder / module.name, module)
    files = {file.name for file in Path("trainopt").iterdir() if not file.match("_C.*")} - {"__pycache__"}
    links = {file.name for file in folder.iterdir() if file.is_symlink()}
    for name in links - files:
        folder.joinpath(name).unlink()
    for name in files - links:
        folder.joinpath(name).symlink_to(os.path.relpath(Path("trainopt", name), folder))


if __name__ == "__main__":
    main()
