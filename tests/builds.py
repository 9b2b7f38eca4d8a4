"""For the tests that build: copies of the sources, and environments that lack something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]

needs_source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these tests are not in a source tree")


def python(*arguments, cwd, **environment):
    command = [sys.executable, *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRAINOPT_", "ATEN_CPU"))}
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def last_line(text):
    return text.strip().splitlines()[-1]


def copy_of_sources(folder):
    """The sources as a clone has them, with nothing built, and a README."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile"):
        shutil.copy2(ROOT / name, folder)
    (folder / "README.md").touch()
    for name in ("csrc", "trainopt", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_build.py", "__pycache__"))
    return folder


def bare_packages(folder):
    """For PYTHONPATH, with `python -S`: setuptools and nothing else."""
    folder.mkdir()
    site_packages = Path(setuptools.__file__).parents[1]
    for part in ("setuptools", "_distutils_hack", f"setuptools-{setuptools.__version__}.dist-info"):
        (folder / part).symlink_to(site_packages / part)
    return folder


def add_metadata_of_torch(packages, version):
    metadata = packages / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def add_torch(packages, version, cuda):
    """A torch that says what a build asks it, and can do nothing."""
    add_metadata_of_torch(packages, version)
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text(
        f"from types import SimpleNamespace\n__version__ = {version!r}\nversion = SimpleNamespace(cuda={cuda!r})\n"
        "def compiled_with_cxx11_abi(): return True\n"
    )


COMPILER = """#!/bin/sh
# Says its version, and makes empty files of the names that it is told.
echo "$(basename $0) $*" >> {log}
case "$1" in
  --version) echo "{name} release {release}, V{release}.1"; echo "Build {name}_{release}"; exit ;;
  --list-gpu-arch) echo {architectures} | tr ' ' '\\n'; exit ;;
  --dryrun) echo '#$ INCLUDES="-I{include}"  ' >&2; exit ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) : > "$2" ;;
    -MF) echo "made :" > "$2" ;;
  esac
  shift
done
echo done >> {log}
"""


def add_compiler(folder, name, log, release="13.0", architectures="75 80 86 87 88 89 90 100 110 103 120 121"):
    """A compiler in folder/bin that compiles nothing, and writes each of its calls into `log`. nvcc has its headers."""
    for header in ("cuda_runtime.h", "crt/host_defines.h") if name == "nvcc" else ():
        (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / header).touch()
    compiler = folder / "bin" / name
    compiler.parent.mkdir(parents=True, exist_ok=True)
    architectures = " ".join(f"compute_{number}" for number in architectures.split())
    compiler.write_text(
        COMPILER.format(log=log, name=name, release=release, architectures=architectures, include=folder / "include")
    )
    compiler.chmod(0o755)
    return compiler


def calls(folder):
    """What the compilers were called with whose log is in this folder."""
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []
