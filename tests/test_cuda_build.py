"""Builds with CUDA kernels and without: what is compiled again, what they say, and what the module holds."""

import shutil
import subprocess
from pathlib import Path

import pytest
from builds import add_compiler, add_torch, bare_packages, calls, copy_of_sources, last_line, needs_source_tree, python

import trainopt
from trainopt import _build, _extension
from trainopt._extension import _C

toolkit = pytest.importorskip("csrc.cuda.toolkit", reason="these tests are not in a source tree")

DEFAULT = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
#: The files of csrc/torch and csrc/python are compiled together, a folder's in one.
UNITS = "build/units/"

needs_cuda_build = pytest.mark.skipif(not _build.CUDA, reason=f"not built with CUDA: {_build.CUDA_REASON}")


# Whole builds, with compilers that compile nothing --------------------------------------------------------------------


class Builder:
    """Builds a copy of the sources with compilers that only say what they were called with."""

    def __init__(self, folder, cuda="13.0", nvcc="13.0"):
        self.folder = folder
        self.sources = copy_of_sources(folder / "source")
        self.packages = bare_packages(folder / "packages")
        add_torch(self.packages, "2.14.1", cuda)
        self.compiler = add_compiler(folder / "host", "g++-99", folder / "log")
        self.nvcc = add_compiler(folder / "toolkit", "nvcc", folder / "log", release=nvcc)

    def build(self, **environment):
        """What it printed, and the calls of its compilers that compile or link."""
        (self.folder / "log").write_text("")
        unset = dict.fromkeys(("CUDACXX", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"), "")
        own = {"CXX": str(self.compiler), "CUDA_HOME": str(self.folder / "toolkit"), "PYTHONPATH": str(self.packages)}
        command = ("-S", "setup.py", "-q", "build_ext", "--inplace")
        self.result = python(*command, cwd=self.sources, **(unset | own | environment))
        said = self.result.stdout + self.result.stderr
        assert "Traceback" not in said, said
        return said, [call for call in calls(self.folder) if " -o build/" in call]


@pytest.fixture
def builder(tmp_path):
    return Builder(tmp_path)


def compiled(made):
    """The files that the compilers were called with."""
    words = {word for call in made for word in call.split()}
    return {word for word in words if word.startswith(("csrc/", UNITS)) and word.endswith((".cpp", ".cu"))}


def included(files):
    """The same with what the units among them include."""
    units = {file for file in files if file.startswith(UNITS)}
    lines = [line for unit in units for line in Path(unit).read_text().splitlines()]
    assert len(lines) == len(set(lines))
    return (files - units) | {line.removeprefix('#include "../../').rstrip('"') for line in lines}


def all_sources(*suffixes):
    return {str(path) for path in Path("csrc").rglob("*") if path.suffix in suffixes}


@needs_source_tree
def test_cuda_is_built_without_being_told(builder, monkeypatch):
    monkeypatch.chdir(builder.sources)
    said, made = builder.build()
    assert builder.result.returncode == 0, said
    assert f"CUDA kernels: for {' '.join(DEFAULT)}, with nvcc 13.0 ({builder.nvcc})" in said and "warning" not in said
    assert included(compiled(made)) == all_sources(".cpp", ".cu")
    for call in made:
        name, words = call.split()[0], call.split()
        assert (name == "nvcc") == any(word.endswith(".cu") for word in words)
        if name == "nvcc":
            assert words.count("-gencode") == len(DEFAULT) and {"-fmad=false", "-O3"} <= set(words)
            assert words[words.index("-ccbin") + 1] == str(builder.compiler)
        assert ("-DTRAINOPT_WITH_CUDA" in words) == any(word.startswith(UNITS) for word in words)
    [link] = [call for call in made if "-shared" in call]
    assert "-lc10_cuda" in link.split() and "cudart" not in link
    for source in compiled(made):
        assert source.rpartition(".")[0].replace("/", "-") + ".o" in link

    built = {}
    exec((builder.sources / "trainopt/_build.py").read_text(), built)
    assert (built["CUDA"], built["CUDA_ARCHITECTURES"], built["CUDA_REASON"]) == ("13.0", " ".join(DEFAULT), "")


@needs_source_tree
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TRAINOPT_CUDA": "0"}, "TRAINOPT_CUDA=0"),
        ({"CUDACXX": "/none/nvcc"}, "CUDACXX=/none/nvcc is no compiler"),
    ],
)
def test_the_cpu_build_goes_on_without(builder, environment, reason):
    said, made = builder.build(**environment)
    assert builder.result.returncode == 0, said
    assert f"CUDA kernels: not built ({reason})\n" in said
    assert "nvcc" not in "".join(calls(builder.folder))
    assert made and "CUDA" not in " ".join(made) and "cuda/" not in " ".join(made) and "c10_cuda" not in " ".join(made)
    built = {}
    exec((builder.sources / "trainopt/_build.py").read_text(), built)
    assert (built["CUDA"], built["CUDA_ARCHITECTURES"], built["CUDA_REASON"]) == (None, "", reason)


@needs_source_tree
@pytest.mark.parametrize(
    ("about", "environment", "told"),
    [
        ({"nvcc": "12.9"}, {}, "the major versions differ"),
        ({"cuda": None}, {"TRAINOPT_CUDA": "1"}, "torch 2.14.1 has no CUDA"),
        ({}, {"TRAINOPT_CUDA": "1", "CUDACXX": "/none/nvcc"}, "CUDACXX=/none/nvcc is no compiler"),
        ({}, {"TRAINOPT_CUDA": "both"}, "use 0 or 1"),
        ({}, {"TORCH_CUDA_ARCH_LIST": "9.0;x"}, "'x' is no architecture"),
        ({}, {"MAX_JOBS": "many"}, "MAX_JOBS=many is no number of compilers"),
        ({}, {"MAX_JOBS": "0"}, "MAX_JOBS=0 is no number of compilers"),
    ],
    ids=str,
)
def test_a_build_that_cannot_be_stops_before_anything_is_compiled(tmp_path, about, environment, told):
    builder = Builder(tmp_path, **about)
    _, made = builder.build(**environment)
    assert builder.result.returncode != 0 and not made
    assert last_line(builder.result.stderr).startswith("error: ") and told in last_line(builder.result.stderr)


@needs_source_tree
def test_another_minor_version_is_warned_of_and_built(tmp_path):
    builder = Builder(tmp_path, nvcc="13.2")
    said, made = builder.build()
    assert builder.result.returncode == 0, said
    assert "\nwarning: nvcc 13.2" in said and "torch's CUDA 13.0" in said and any(".cu" in call for call in made)


@needs_source_tree
def test_only_what_has_changed_is_compiled(builder):
    said, first = builder.build()
    assert builder.result.returncode == 0, said
    assert not builder.build()[1]
    assert not builder.build(MAX_JOBS="64")[1]  # with other --threads

    _, made = builder.build(TORCH_CUDA_ARCH_LIST="9.0+PTX")
    cuda = {source for source in compiled(first) if source.endswith(".cu")}
    assert compiled(made) == cuda | {f"{UNITS}csrc-torch-cuda_architectures.cpp"}
    assert all("arch=compute_90,code=[sm_90,compute_90]" in call for call in made if ".cu " in call)

    _, made = builder.build(TRAINOPT_CUDA="0")  # shares with the other what neither compiles in a way of its own
    assert compiled(made) == {source for source in compiled(first) if source.startswith(UNITS)}
    assert not builder.build(TRAINOPT_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")[1]


@needs_source_tree
def test_a_file_that_nvcc_does_not_compile_is_told_with_the_way_round(builder):
    builder.nvcc.write_text(builder.nvcc.read_text().replace("while ", "exit 1; while "))
    said, _ = builder.build()
    assert builder.result.returncode != 0
    assert "error: the compiler failed (TRAINOPT_CUDA=0 builds without CUDA kernels)" in said


@needs_source_tree
@pytest.mark.parametrize(
    ("jobs", "threads"), [("1", 1), ("2", 1), ("64", 64 // len(list(Path(toolkit.__file__).parent.glob("*.cu"))))]
)
def test_max_jobs(builder, jobs, threads):
    _, made = builder.build(MAX_JOBS=jobs)
    assert all(f"--threads {threads} " in call for call in made if call.startswith("nvcc"))
    running = most = 0
    for call in calls(builder.folder):
        running += (" -o build/" in call) - (call == "done")
        most = max(most, running)
    assert 1 <= most <= int(jobs) and running == 0


@needs_source_tree
@pytest.mark.parametrize("command", ["{}", "ccache {}", "{} -pipe"])
def test_the_compiler_in_cxx_is_nvccs_too(command):
    found = toolkit.Toolkit(Path("nvcc"), (13, 0), "build", (), ("9.0",), "")
    flags = found.flags(command.format("/opt/g++-12").split())
    assert flags[-2:] == ["-ccbin", "/opt/g++-12"]
    assert "-ccbin" not in found.flags()


# A build with CUDA, on a machine with or without a GPU ----------------------------------------------------------------


def test_a_build_without_cuda_says_why():
    if _build.CUDA:
        assert _extension.why_no_cuda() == ""
    else:
        assert _extension.why_no_cuda() == f"trainopt was built without CUDA kernels: {_build.CUDA_REASON}"
        assert _build.CUDA_REASON
    assert _C.cuda_architectures() == _build.CUDA_ARCHITECTURES
    assert ("cuda" in _C.device_types()) == bool(_build.CUDA)


def tool(name):
    """One of CUDA's tools, which Triton's package has too."""
    found = shutil.which(name)
    try:
        import triton
    except ImportError:
        triton = None
    if not found and triton:
        found = shutil.which(name, path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    return found or pytest.skip(f"there is no {name}")


@needs_cuda_build
def test_the_module_holds_what_its_list_says():
    def listed(option, pattern):
        said = subprocess.run([tool("cuobjdump"), option, _C.__file__], capture_output=True, text=True, check=True)
        return {line.split(".")[-2] for line in said.stdout.splitlines() if pattern in line}

    architectures = _C.cuda_architectures().split()
    names = {entry.removesuffix("+PTX").replace(".", ""): entry.endswith("+PTX") for entry in architectures}
    assert listed("--list-elf", ".cubin") == {f"sm_{name}" for name in names}
    assert listed("--list-ptx", ".ptx") == {f"sm_{name}" for name, ptx in names.items() if ptx}


@needs_cuda_build
def test_the_module_brings_no_cuda_of_its_own():
    said = subprocess.run([tool("readelf"), "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = {line.partition("[")[2].rstrip("]") for line in said.splitlines() if "NEEDED" in line}
    assert "libc10_cuda.so" in needed
    assert not [name for name in needed if name.startswith(("libcudart", "libcuda.", "libtorch_cuda"))]
    assert "RPATH" not in said and "RUNPATH" not in said


@needs_cuda_build
def test_it_works_on_a_machine_without_a_gpu():
    step = (
        "import torch, trainopt; p = torch.ones(9, requires_grad=True); o = trainopt.AdamW([p], lr=0.5);"
        "p.sum().backward(); o.step(); print(p.max().item(), trainopt.explain(o)[0].path)"
    )
    result = python("-c", step, cwd=Path(trainopt.__file__).parents[1], CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    value, path = result.stdout.split(maxsplit=1)
    assert float(value) < 0.6 and path.startswith("fused (cpu")
    report = python("-m", "trainopt", cwd=Path(trainopt.__file__).parents[1], CUDA_VISIBLE_DEVICES="")
    assert report.returncode == 0, report.stderr
    assert f"CUDA kernels        built (nvcc {_build.CUDA}, for {_build.CUDA_ARCHITECTURES})" in report.stdout
    assert "GPU                 none" in report.stdout
    assert "CUDA: CUDA kernel; elsewhere: torch's own path" in report.stdout
