"""`python -m trainopt`: what is installed, what it was built with, and which kernels run here."""

import contextlib
import importlib
import os
import platform
import re
import sys
from pathlib import Path

import torch

import trainopt


def main() -> int:
    """Prints the report; 1 where trainopt cannot be used."""
    build = extension = optim = None
    problem: BaseException | None = None
    with contextlib.suppress(ModuleNotFoundError):
        build = importlib.import_module("trainopt._build")
    try:
        extension = importlib.import_module("trainopt._extension")._C
        optim = importlib.import_module("trainopt.optim.base")
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
        show("CUDA kernels", "built" if build.CUDA else "not built", build.CUDA or build.CUDA_REASON)
    reference = os.environ.get("TRAINOPT_REFERENCE")
    show("TRAINOPT_REFERENCE", reference or "not set", "1 sends every parameter through torch's own path")
    if extension and optim:
        on_cpu = "torch's own path" if optim.reference.is_forced() else f"{extension.cpu_variant()} kernel"
        for optimizer in ("SGD", "Adam", "AdamW"):
            show(optimizer, f"CPU: {on_cpu}; elsewhere: torch's own path", "trainopt.explain(optimizer) tells more")
        show("losses", f"CPU: {on_cpu}; elsewhere: torch's own path")
        return 0

    print()
    while problem:
        print(f"{type(problem).__name__}: {problem}")
        problem = problem.__cause__
    return 1


def reason_for_variant() -> str:
    for variable in ("TRAINOPT_CPU", "ATEN_CPU_CAPABILITY"):
        if value := os.environ.get(variable):
            return f"{variable}={value}"
    return f"as torch's own kernels: {torch.backends.cpu.get_cpu_capability()}"


def show(name: str, fact: str, remark: str = "") -> None:
    print(f"{name:20}{fact}{f' ({remark})' if remark else ''}")
