"""Builds the compiled module trainopt._C from csrc, and trainopt/_build.py, which records what it was built with.

    pip install --no-build-isolation .      into the environment whose torch it is built for
    python setup.py build_ext --inplace     into the source tree; only what has changed is compiled

Environment: CXX (the compiler), MAX_JOBS (compilers at once), TRAINOPT_CUDA (0 or 1) and what else csrc/cuda/toolkit.py
reads, which decides about the CUDA kernels.
"""

import os
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # which pip leaves out
from csrc.compiler import Compiler, CudaCompiler, compile_all, fail, replace_if_different
from csrc.cuda import toolkit
from csrc.module import (
    ALONE,
    BINDINGS,
    KERNEL_SOURCES,
    KERNELS,
    binding_flags,
    build_folder,
    import_torch,
    kernel_flags,
    module_flags,
    sources,
    torch_requirement,
    units,
)


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
    if source.stem.endswith(ALONE):
        flags.append(f'-DTRAINOPT_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"')
    return flags


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
        flags = binding_flags(self.torch, self.threaded)
        for unit in units(*BINDINGS):
            jobs.append((compiler, unit, flags + (cuda_binding_flags(self.cuda, unit) if self.cuda else [])))
        jobs += [(self.kernels, source, kernel_flags(source)) for source in sources(*KERNEL_SOURCES)]
        target = Path(self.get_ext_fullpath(extension.name))
        made = compiler.link(compile_all(jobs), compiler.folder / target.name, link_flags)
        print(f"{made.name}: {time.monotonic() - start:.0f} s, {made.stat().st_size / 1e6:.1f} MB", flush=True)
        replace_if_different(target, made)

    def copy_extensions_to_source(self) -> None:
        """For an in-place build."""
        for extension in self.extensions:
            module = self.get_ext_filename(extension.name)
            replace_if_different(Path(module), Path(self.build_lib, module))


setup(
    license="BSD-3-Clause",
    install_requires=[torch_requirement()],
    ext_modules=[Extension("trainopt._C", [str(path) for path in sources(*KERNEL_SOURCES, *BINDINGS)])],
    cmdclass={"build_ext": BuildExtension},
)
