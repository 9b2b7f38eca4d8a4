"""`python -m trainopt`: what is installed, what it was built with, and which kernels run here."""

import contextlib
import importlib
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import trainopt
from trainopt import switches


def main() -> int:
    """Prints the report; 1 where trainopt cannot be used."""
    build = extension = registry = None
    problem: BaseException | None = None
    with contextlib.suppress(ModuleNotFoundError):
        build = importlib.import_module("trainopt._build")
    try:
        extension = importlib.import_module("trainopt._extension")._C
        registry = importlib.import_module("trainopt.optim.registry")
    except ImportError as error:
        problem = error

    show("trainopt", trainopt.__version__, str(Path(__file__).parent))
    show("Python", platform.python_version(), sys.executable)
    show("torch", torch.__version__, f"trainopt was built for {build.TORCH}" if build else "")
    compiler = re.search(r"(?i)(gcc|clang|msvc)[^\n]*", torch.__config__.show())
    show("compilers", f"torch: {compiler[0] if compiler else 'unknown'}")
    if build:
        show("", f"trainopt: {build.COMPILER}, {build.PLATFORM}, Python {build.PYTHON}")
    if extension:
        show("SIMD", extension.cpu_variant(), reason_for_variant())
        for name, runs in extension.cpu_variants().items():
            show("", name, "this processor runs it" if runs else "this processor cannot run it")
    if build:
        if build.THREADED:
            show("threads", str(torch.get_num_threads()), "torch.get_num_threads()")
        else:
            show("threads", "1", "not built with GCC on Linux")
        if build.CUDA:
            show("CUDA kernels", "built", f"nvcc {build.CUDA}, for {build.CUDA_ARCHITECTURES}")
        else:
            show("CUDA kernels", "not built", build.CUDA_REASON)
    if extension:
        show_gpus(extension)
    reference = os.environ.get("TRAINOPT_REFERENCE")
    show(
        "TRAINOPT_REFERENCE", reference or "not set", "1 sends optimizers, losses and clipping through torch's own path"
    )
    if extension and registry:
        kernels = {"CPU": f"{extension.cpu_variant()} kernel"}
        if "cuda" in extension.device_types():
            kernels["CUDA"] = "CUDA kernel"
        if switches.REFERENCE_FORCED:
            kernels = dict.fromkeys(kernels, "torch's own path")
        used = "; ".join(f"{device}: {kernel}" for device, kernel in kernels.items()) + "; elsewhere: torch's own path"
        more = "trainopt.explain(optimizer) tells more"
        for optimizer in registry.OPTIMIZERS:
            show(optimizer, used, more)
        for optimizer in registry.MATRIX_METHODS:
            show(optimizer, "hidden matrices: torch's products; the rest: as AdamW", more)
        show("losses", used)
        return 0

    print()
    while problem:
        print(f"{type(problem).__name__}: {problem}")
        problem = problem.__cause__
    return 1


def show_gpus(extension: Any) -> None:
    """The GPUs that this torch sees, and whether there are kernels for each."""
    if not torch.cuda.is_available():
        show("GPU", "none", "torch.cuda.is_available() is False")
        return
    for index in range(torch.cuda.device_count()):
        device, name = f"cuda:{index}", torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        remark = ""
        if "cuda" in extension.device_types():
            covered = extension.cuda_covers((major, minor))
            remark = "runs the kernels" if covered else extension.no_kernels_for(name, (major, minor), device)
        show("GPU" if index == 0 else "", f"{device} {name}, compute capability {major}.{minor}", remark)


def reason_for_variant() -> str:
    for variable in ("TRAINOPT_CPU", "ATEN_CPU_CAPABILITY"):
        if value := os.environ.get(variable):
            return f"{variable}={value}"
    return f"as torch's own kernels: {torch.backends.cpu.get_cpu_capability()}"


def show(name: str, fact: str, remark: str = "") -> None:
    print(f"{name:20}{fact}{f' ({remark})' if remark else ''}")
