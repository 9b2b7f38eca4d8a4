"""Decides whether the CUDA kernels are compiled, and with what, before anything is: for setup.py.

Knows neither torch nor setuptools. What is built does not depend on the machine that builds it, but where
TORCH_CUDA_ARCH_LIST=native asks for the GPUs at hand.

Environment: TRAINOPT_CUDA (0: never; 1: or fail; unset: where there is all that it takes), CUDACXX (nvcc), CUDA_HOME or
CUDA_PATH (where the toolkit is), TORCH_CUDA_ARCH_LIST (what the kernels are compiled for).
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: As the CPU engine's: no contraction to FMA, so that both give the same bits.
FLAGS = ("-std=c++17", "-O3", "-fmad=false")

#: For the host's half of a file, and for what is put into the library.
LIBRARY_FLAGS = ("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off,-Wall")

DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 9.0 10.0 12.0+PTX"

#: What torch's own builds understand in TORCH_CUDA_ARCH_LIST beside numbers.
NAMED_ARCHITECTURES = {
    "Maxwell": "5.0 5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0 6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Blackwell+Tegra": "11.0",
    "Rubin": "10.7+PTX",
}

#: The usual place of a toolkit, and where a distribution's own package puts its headers.
USUAL_TOOLKIT = Path("/usr/local/cuda")
USUAL_HEADERS = Path("/usr/include")
NEEDED_HEADERS = ("cuda_runtime.h", "crt/host_defines.h")


class Missing(Exception):
    """Something that CUDA kernels take is not there: the build goes on without them, unless they were asked for."""


class Refused(Exception):
    """What is there or was asked for cannot be: the build stops."""


@dataclass(frozen=True)
class Toolkit:
    """All that compiles the CUDA kernels."""

    nvcc: Path
    release: tuple[int, int]
    build: str  # nvcc's own name for its build
    includes: tuple[Path, ...]  # CUDA's headers
    architectures: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST
    warning: str  # empty where there is nothing to warn of

    @property
    def version(self) -> str:
        return dotted(self.release)

    def __str__(self) -> str:
        warning = f"\nwarning: {self.warning}" if self.warning else ""
        return f"for {' '.join(self.architectures)}, with nvcc {self.version} ({self.nvcc}){warning}"

    def flags(self, host_compiler: Sequence[str] = ()) -> list[str]:
        """nvcc's flags for every file of csrc/cuda. `host_compiler`: the command in CXX, if it is set."""
        flags = [*FLAGS, *LIBRARY_FLAGS, *architecture_flags(self.architectures)]
        for include in self.includes:
            flags += ["-isystem", str(include)]
        # zstd: every driver for CUDA 13 reads it.
        flags.append("--compress-mode=size" if self.release >= (13, 0) else "-Xfatbin=-compress-all")
        if host_compiler:
            # A launcher such as ccache may stand before the compiler, and flags behind it.
            flags += ["-ccbin", [word for word in host_compiler if not word.startswith("-")][-1]]
        return flags


def choose(
    torch: str,
    cuda: str | None,
    packages: Path,
    environment: Mapping[str, str],
    seen_by_torch: Callable[[], Iterable[str]] = tuple,
) -> Toolkit | str:
    """The toolkit to compile the CUDA kernels with, or why they are not compiled.

    Args:
        torch: the installed torch's version.
        cuda: the CUDA that it was built with, as torch.version.cuda has it; None: without.
        packages: the site-packages that torch lies in.
        seen_by_torch: the compute capabilities of the GPUs that torch finds, asked where nvidia-smi does not tell.

    Raises:
        Refused: TRAINOPT_CUDA is neither 0 nor 1, or is 1 and something is missing; nvcc's major version is not that
            of torch's CUDA; TORCH_CUDA_ARCH_LIST names what is no architecture, or none that this nvcc knows.
    """
    asked = environment.get("TRAINOPT_CUDA", "")
    if asked not in ("", "0", "1"):
        raise Refused(f"TRAINOPT_CUDA={asked} is not known: use 0 or 1")
    if asked == "0":
        return "TRAINOPT_CUDA=0"
    try:
        if cuda is None:
            raise Missing(f"torch {torch} has no CUDA")
        return _toolkit(cuda, packages, environment, seen_by_torch)
    except Missing as missing:
        if asked == "1":
            raise Refused(f"TRAINOPT_CUDA=1 asks for CUDA kernels, and {missing}") from None
        return str(missing)


def _toolkit(
    cuda: str, packages: Path, environment: Mapping[str, str], seen_by_torch: Callable[[], Iterable[str]]
) -> Toolkit:
    nvcc, release, build = find_nvcc(cuda, packages, environment)
    wanted = release_of(cuda)
    said = f"nvcc {dotted(release)} ({nvcc})"
    if release[0] != wanted[0]:
        raise Refused(
            f"{said} cannot build for torch's CUDA {cuda}: the major versions differ. Name a CUDA {wanted[0]} toolkit"
            " in CUDA_HOME, or build without CUDA kernels by TRAINOPT_CUDA=0"
        )
    warning = f"{said} is not torch's CUDA {cuda}; the same major version will do" if release != wanted else ""
    known = run(nvcc, "--list-gpu-arch").split()
    wanted_architectures = environment.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted_architectures.strip() == "native":
        wanted_architectures = " ".join(gpus_at_hand(environment) or seen_by_torch())
    architectures = parse_architectures(wanted_architectures, known, said)
    return Toolkit(nvcc, release, build, find_headers(nvcc, packages, release[0]), architectures, warning)


# nvcc -----------------------------------------------------------------------------------------------------------------


def find_nvcc(cuda: str, packages: Path, environment: Mapping[str, str]) -> tuple[Path, tuple[int, int], str]:
    """The nvcc that the environment names; else of those in the usual places the first of the wanted major version."""
    if named := environment.get("CUDACXX"):
        path = shutil.which(named, path=environment.get("PATH"))
        if path is None:
            raise Missing(f"CUDACXX={named} is no compiler")
        return Path(path), *version_of(Path(path))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            path = shutil.which("nvcc", path=f"{home}/bin")
            if path:
                return Path(path), *version_of(Path(path))
    places = [*environment.get("PATH", "").split(":"), f"{USUAL_TOOLKIT}/bin"]
    places += [str(folder / "bin") for folder in toolkit_packages(packages, release_of(cuda)[0])]
    paths = [Path(path) for place in places if place and (path := shutil.which("nvcc", path=place))]
    if not paths:
        raise Missing(
            f"no nvcc was found: looked in CUDACXX, CUDA_HOME, CUDA_PATH, PATH, {USUAL_TOOLKIT}, and for the package"
            f" nvidia-cuda-nvcc in {packages}"
        )
    found = [(path, *version_of(path)) for path in dict.fromkeys(paths)]
    return next((one for one in found if one[1][0] == release_of(cuda)[0]), found[0])


def toolkit_packages(packages: Path, major: int) -> list[Path]:
    """Where the packages of CUDA's compiler and runtime lie in an environment."""
    parts = [f"cu{major}", "cuda_nvcc", "cuda_runtime"]  # the first for CUDA 13 and later, the others for 12
    return [packages / "nvidia" / part for part in parts]


def version_of(nvcc: Path) -> tuple[tuple[int, int], str]:
    """Its release and its build."""
    said = run(nvcc, "--version")
    found = re.search(r"release (\d+\.\d+)", said)
    if not found:
        raise Missing(f"{nvcc} does not say its version")
    return release_of(found[1]), said.strip().splitlines()[-1]


def run(nvcc: Path, *arguments: str) -> str:
    try:
        return subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"{nvcc} does not run: {error}") from None


def release_of(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def dotted(release: tuple[int, int]) -> str:
    return "{}.{}".format(*release)


# Headers --------------------------------------------------------------------------------------------------------------


def find_headers(nvcc: Path, packages: Path, major: int) -> tuple[Path, ...]:
    """The folders that hold CUDA's headers: nvcc's own, else the environment's."""
    folders = [*own_headers(nvcc), USUAL_HEADERS, *(part / "include" for part in toolkit_packages(packages, major))]
    chosen = []
    for header in NEEDED_HEADERS:
        holder = next((folder for folder in folders if (folder / header).exists()), None)
        if holder is None:
            raise Missing(f"CUDA's header {header} is in none of {', '.join(map(str, folders))}")
        if holder not in chosen and holder != USUAL_HEADERS:  # which compilers search of themselves
            chosen.append(holder)
    return tuple(chosen)


def own_headers(nvcc: Path) -> Iterator[Path]:
    """The folders that nvcc itself gives its host compiler, which says more than its path: that may be a script's."""
    try:
        command = [str(nvcc), "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
        said = subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr
    except OSError:
        return
    for line in re.findall(r"^#\$ INCLUDES=(.*)", said, re.MULTILINE):
        for word in shlex.split(line):
            yield Path(word.removeprefix("-I")).resolve()


# Architectures --------------------------------------------------------------------------------------------------------


def gpus_at_hand(environment: Mapping[str, str]) -> list[str]:
    """The compute capabilities of this machine's GPUs, by nvidia-smi; none where that has no answer."""
    path = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if path is None:
        return []
    try:
        command = [path, "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", said, re.MULTILINE)))


def parse_architectures(text: str, known: Iterable[str], nvcc: str) -> tuple[str, ...]:
    """The architectures of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX", "8.6 9.0a" or "Hopper", in ascending order.

    Empty stands for the default list. That and the named ones are cut to what the compiler knows; the last
    that is left has the PTX then.

    Args:
        known: what `nvcc --list-gpu-arch` says.
        nvcc: the compiler's name for an error.

    Raises:
        Refused: an entry is no architecture, or the compiler does not know it.
    """
    numbers = sorted({int(digits) for name in known if (digits := name.removeprefix("compute_")).isdigit()})
    if not text.strip():
        text = DEFAULT_ARCHITECTURES
        chosen = _known_of(text.split(), numbers)
    else:
        chosen = []
        for entry in re.split(r"[;\s]+", text.strip(" ;\t\n")):
            named = NAMED_ARCHITECTURES.get(entry)
            if named is None and not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
                raise Refused(f"TORCH_CUDA_ARCH_LIST: '{entry}' is no architecture such as 9.0, 9.0+PTX or Hopper")
            found = _known_of(named.split() if named else [entry], numbers)
            if not found:
                able = " ".join(f"{n // 10}.{n % 10}" for n in numbers)
                raise Refused(f"TORCH_CUDA_ARCH_LIST: {nvcc} cannot compile for {entry}, but for {able}")
            chosen += found
    if not chosen:
        raise Refused(f"{nvcc} can compile for none of {text}: name architectures in TORCH_CUDA_ARCH_LIST")
    # One with PTX stands for the same without.
    chosen = [entry for entry in dict.fromkeys(chosen) if f"{entry}+PTX" not in chosen]
    return tuple(sorted(chosen, key=_number_of))


def _known_of(entries: Sequence[str], numbers: Sequence[int]) -> list[str]:
    known = [entry for entry in entries if _number_of(entry) in numbers]
    if known and entries[-1].endswith("+PTX") and not known[-1].endswith("+PTX"):
        known[-1] += "+PTX"
    return known


def _number_of(entry: str) -> int:
    major, minor = re.findall(r"\d+", entry)
    return int(major) * 10 + int(minor)


def architecture_flags(architectures: Iterable[str]) -> list[str]:
    """Machine code for each, and PTX, which later GPUs compile for themselves, for those with +PTX."""
    flags = []
    for entry in architectures:
        name = entry.removesuffix("+PTX").replace(".", "")
        kinds = f"[sm_{name},compute_{name}]" if entry.endswith("+PTX") else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code={kinds}"]
    return flags
