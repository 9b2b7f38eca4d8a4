"""Loads the compiled module `_C`. Everything else takes it from here: `from trainopt._extension import _C`.

Where it does not fit this environment, importing trainopt fails with one line that says what to run; what the loader
said is the cause of that error, and `python -m trainopt` prints it.
"""

import importlib
import importlib.metadata
import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

PIP = "pip install --no-build-isolation --force-reinstall --no-deps"


def _sources() -> str | None:
    """What to build trainopt from anew, as pip takes it: the tree that it lies in, or what pip installed it from, if
    that is no wheel and is still there. None where nothing is known: it came from a wheel, or was copied."""
    tree = Path(__file__).parents[1]
    if (tree / "setup.py").exists():
        return f"-e {shlex.quote(str(tree))}"
    try:
        distribution = importlib.metadata.distribution("trainopt")
        is_this = Path(str(distribution.locate_file("trainopt"))).resolve() == Path(__file__).parent.resolve()
        origin = json.loads(distribution.read_text("direct_url.json") or "{}") if is_this else {}
        url = str(origin.get("url", ""))
        if "vcs_info" in origin:
            return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}")
        if url.startswith("file:"):
            path = Path(url2pathname(urlsplit(url).path))
            is_there = (path / "setup.py").exists() if "dir_info" in origin else path.exists()
            return shlex.quote(str(path)) if is_there and path.suffix != ".whl" else None
        return shlex.quote(url) if url and not url.endswith(".whl") else None
    except (importlib.metadata.PackageNotFoundError, AttributeError, KeyError, OSError, TypeError, ValueError):
        return None


def _install_command() -> str:
    """What builds trainopt here."""
    return f"{PIP} {_sources() or 'FOLDER'}"


def _remedy(built_for: str | None = None) -> str:
    """What mends it: building it anew, or, where the sources are not known, the torch that it was built for."""
    if _sources() is not None:
        return f"run `{_install_command()}`"
    build = f"`{_install_command()}`, where FOLDER has trainopt's sources"
    if built_for is None:
        return f"run {build}"
    return f"run `pip install torch=={built_for.partition('+')[0]}`, or build trainopt for this torch: {build}"


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _load() -> Any:
    try:
        build = importlib.import_module("trainopt._build")
    except ModuleNotFoundError as error:
        raise ImportError(f"trainopt's compiled module has not been built: {_remedy()}") from error
    if _release(build.TORCH) != _release(torch.__version__):
        raise ImportError(
            f"trainopt was built for torch {build.TORCH}, and this is torch {torch.__version__}: {_remedy(build.TORCH)}"
        )
    try:
        module = importlib.import_module("trainopt._C")
    except ImportError as error:
        if error.name is None:  # it was loaded, and says itself what it cannot work with: TRAINOPT_CPU
            raise
        raise ImportError(
            f"trainopt's compiled module, built for torch {build.TORCH} and Python {build.PYTHON}, does not load here:"
            f" {_remedy()}"
        ) from error
    module.set_install_command(_install_command())
    return module


def why_no_cuda() -> str:
    """Why trainopt has no kernels for CUDA tensors, which take torch's own path then; empty if it has."""
    build = importlib.import_module("trainopt._build")
    return "" if build.CUDA else f"trainopt was built without CUDA kernels: {build.CUDA_REASON}"


_C = _load()
