"""Loads the compiled module `_C`. Everything else takes it from here: `from trainopt._extension import _C`.

Where it does not fit this environment, importing trainopt fails with one line that says what to run; what the loader
said is the cause of that error, and `python -m trainopt` prints it.
"""

import importlib
import shlex
from pathlib import Path
from typing import Any

import torch


def _install_command() -> str:
    source_tree = Path(__file__).parents[1]
    if (source_tree / "setup.py").exists():
        what = f"-e {shlex.quote(str(source_tree))}"
    else:
        what = "--no-cache-dir trainopt"  # pip may have kept a wheel that was built for another torch
    return f"pip install --no-build-isolation --force-reinstall --no-deps {what}"


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _load() -> Any:
    try:
        build = importlib.import_module("trainopt._build")
    except ModuleNotFoundError as error:
        raise ImportError(f"trainopt's compiled module has not been built: run `{_install_command()}`") from error
    if _release(build.TORCH) != _release(torch.__version__):
        raise ImportError(
            f"trainopt was built for torch {build.TORCH}, and this is torch {torch.__version__}:"
            f" run `{_install_command()}`"
        )
    try:
        module = importlib.import_module("trainopt._C")
    except ImportError as error:
        if error.name is None:  # it was loaded, and says itself what it cannot work with: TRAINOPT_CPU
            raise
        raise ImportError(
            f"trainopt's compiled module, built for torch {build.TORCH} and Python {build.PYTHON}, does not load here:"
            f" run `{_install_command()}`"
        ) from error
    module.set_install_command(_install_command())
    return module


def why_no_cuda() -> str:
    """Why trainopt has no kernels for CUDA tensors, which take torch's own path then; empty if it has."""
    build = importlib.import_module("trainopt._build")
    return "" if build.CUDA else f"trainopt was built without CUDA kernels: {build.CUDA_REASON}"


_C = _load()
