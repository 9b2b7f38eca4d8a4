"""Whether the CUDA kernels are built, with which nvcc and for which GPUs: decided before anything is compiled."""

import pytest
from builds import add_compiler, calls

from trainopt import _build, _extension
from trainopt._extension import _C

toolkit = pytest.importorskip("csrc.cuda.toolkit", reason="these tests are not in a source tree")

DEFAULT = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
NVCC_13_0 = [f"compute_{number}" for number in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)]


# The decision ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without nvcc in any usual place, and the log of those that a test puts somewhere."""
    monkeypatch.setattr(toolkit, "USUAL_TOOLKIT", tmp_path / "usual")
    monkeypatch.setattr(toolkit, "USUAL_HEADERS", tmp_path / "usr-include")
    (tmp_path / "packages").mkdir()
    return tmp_path


def choose(machine, cuda="13.0", **environment):
    return toolkit.choose("2.14.1", cuda, machine / "packages", environment)


def nvcc_in(machine, place, **about):
    return add_compiler(machine / place, "nvcc", machine / "log", **about)


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_0_never_looks_for_nvcc(machine, cuda):
    nvcc = nvcc_in(machine, "toolkit")
    assert choose(machine, cuda, TRAINOPT_CUDA="0", PATH=str(nvcc.parent)) == "TRAINOPT_CUDA=0"
    assert not calls(machine)


def test_torch_without_cuda_never_looks_for_nvcc(machine):
    nvcc = nvcc_in(machine, "toolkit")
    assert choose(machine, None, PATH=str(nvcc.parent)) == "torch 2.14.1 has no CUDA"
    with pytest.raises(toolkit.Refused) as refused:
        choose(machine, None, TRAINOPT_CUDA="1", PATH=str(nvcc.parent))
    assert str(refused.value) == "TRAINOPT_CUDA=1 asks for CUDA kernels, and torch 2.14.1 has no CUDA"
    assert not calls(machine)


@pytest.mark.parametrize("value", ["2", "yes", "on"])
def test_other_values_are_refused(machine, value):
    with pytest.raises(toolkit.Refused, match=f"TRAINOPT_CUDA={value} is not known: use 0 or 1"):
        choose(machine, TRAINOPT_CUDA=value)


def test_no_nvcc_says_where_it_was_looked_for(machine):
    reason = choose(machine, PATH=str(machine))
    for place in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", str(toolkit.USUAL_TOOLKIT), str(machine / "packages")):
        assert place in reason
    assert reason.startswith("no nvcc was found") and "\n" not in reason
    with pytest.raises(toolkit.Refused) as refused:
        choose(machine, PATH=str(machine), TRAINOPT_CUDA="1")
    assert str(refused.value) == f"TRAINOPT_CUDA=1 asks for CUDA kernels, and {reason}"


@pytest.mark.parametrize(
    ("place", "environment"),
    [
        ("a", {"CUDACXX": "a/bin/nvcc"}),
        ("a", {"CUDA_HOME": "a"}),
        ("a", {"CUDA_PATH": "a"}),
        ("a", {"CUDA_HOME": "not-there", "PATH": "a/bin"}),
        ("a", {"PATH": "a/bin"}),
        ("usual", {}),
        ("packages/nvidia/cu13", {}),
        ("packages/nvidia/cuda_nvcc", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", ["", "1"])
def test_nvcc_is_found(machine, place, environment, asked):
    nvcc = nvcc_in(machine, place)
    found = choose(machine, TRAINOPT_CUDA=asked, **{name: str(machine / path) for name, path in environment.items()})
    assert found.nvcc == nvcc and found.version == "13.0" and found.architectures == DEFAULT and not found.warning
    assert found.includes == (machine / place / "include",)


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_what_the_environment_names_comes_first(machine, variable):
    named, other = nvcc_in(machine, "named", release="13.2"), nvcc_in(machine, "other")
    value = str(named) if variable == "CUDACXX" else str(named.parents[1])
    assert choose(machine, PATH=str(other.parent), **{variable: value}).nvcc == named
    named = nvcc_in(machine, "named", release="12.9")  # even where it will not do
    with pytest.raises(toolkit.Refused):
        choose(machine, PATH=str(other.parent), **{variable: value})


def test_of_those_in_the_usual_places_the_first_of_torchs_major_version_is_taken(machine):
    old, new = nvcc_in(machine, "a", release="12.9"), nvcc_in(machine, "b", release="13.1")
    usual = nvcc_in(machine, "usual", release="13.0")
    assert choose(machine, PATH=f"{old.parent}:{new.parent}").nvcc == new
    assert choose(machine, PATH=str(old.parent)).nvcc == usual
    assert choose(machine, "12.6", PATH=f"{new.parent}:{old.parent}").nvcc == old


def test_a_compiler_that_is_named_must_be_there(machine):
    nvcc = nvcc_in(machine, "toolkit")
    assert choose(machine, CUDACXX="/none/nvcc", PATH=str(nvcc.parent)) == "CUDACXX=/none/nvcc is no compiler"


@pytest.mark.parametrize(("release", "cuda"), [("13.2", "13.0"), ("13.0", "13.2"), ("12.9", "12.6")])
def test_another_minor_version_is_warned_of(machine, release, cuda):
    nvcc = nvcc_in(machine, "toolkit", release=release)
    found = choose(machine, cuda, PATH=str(nvcc.parent))
    assert f"nvcc {release} ({nvcc}) is not torch's CUDA {cuda}" in found.warning
    assert f"\nwarning: {found.warning}" in str(found)


@pytest.mark.parametrize(("release", "cuda"), [("12.9", "13.0"), ("13.0", "12.6"), ("14.0", "13.4")])
@pytest.mark.parametrize("asked", ["", "1"])
def test_another_major_version_stops_the_build(machine, release, cuda, asked):
    nvcc = nvcc_in(machine, "toolkit", release=release)
    with pytest.raises(toolkit.Refused) as refused:
        choose(machine, cuda, PATH=str(nvcc.parent), TRAINOPT_CUDA=asked)
    said = str(refused.value)
    assert f"nvcc {release}" in said and f"CUDA {cuda}" in said and "TRAINOPT_CUDA=0" in said and "\n" not in said


def test_an_nvcc_that_does_not_say_its_version(machine):
    nvcc = machine / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert choose(machine, PATH=str(nvcc.parent)) == f"{nvcc} does not say its version"
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    assert choose(machine, PATH=str(nvcc.parent)).startswith(f"{nvcc} does not run")


def test_headers_of_the_environment_stand_in_for_nvccs_own(machine):
    nvcc = nvcc_in(machine, "toolkit")
    header = nvcc.parents[1] / "include" / "cuda_runtime.h"
    header.unlink()
    reason = choose(machine, PATH=str(nvcc.parent))
    assert reason.startswith("CUDA's header cuda_runtime.h is in none of ") and str(header.parent) in reason
    with pytest.raises(toolkit.Refused, match=r"cuda_runtime\.h"):
        choose(machine, PATH=str(nvcc.parent), TRAINOPT_CUDA="1")
    theirs = machine / "packages/nvidia/cu13/include"
    theirs.mkdir(parents=True)
    (theirs / header.name).touch()
    assert choose(machine, PATH=str(nvcc.parent)).includes == (theirs, header.parent)
    # Those in the compilers' own search path are not named to them: that would change the order of the system's.
    usual = toolkit.USUAL_HEADERS
    usual.mkdir()
    (usual / header.name).touch()
    assert choose(machine, PATH=str(nvcc.parent)).includes == (header.parent,)


# Architectures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", DEFAULT),
        ("  ", DEFAULT),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.6 9.0", ("8.6", "9.0")),
        ("9.0;8.0;", ("8.0", "9.0")),
        ("9.0 9.0", ("9.0",)),
        ("9.0 9.0+PTX", ("9.0+PTX",)),
        ("9.0a", ("9.0a",)),
        ("9.0a 9.0 10.0f", ("9.0a", "9.0", "10.0f")),
        ("12.0+PTX", ("12.0+PTX",)),
        ("Hopper", ("9.0+PTX",)),
        ("Ampere", ("8.0", "8.6+PTX")),
        ("Ampere+Tegra;Ada", ("8.7", "8.9+PTX")),
        ("Blackwell", ("10.0", "10.3", "12.0", "12.1+PTX")),
    ],
)
def test_architecture_list(text, wanted):
    assert toolkit.parse_architectures(text, NVCC_13_0, "nvcc 13.0") == wanted


@pytest.mark.parametrize(
    ("text", "known", "wanted"),
    [
        ("", (50, 60, 70, 75, 80, 86, 87, 89, 90), ("7.5", "8.0", "8.6", "9.0+PTX")),  # nvcc 12.6
        ("", (75, 80), ("7.5", "8.0+PTX")),
        ("Blackwell", (90, 100, 120), ("10.0", "12.0+PTX")),  # nvcc 12.8
    ],
)
def test_the_default_and_named_architectures_are_cut_to_what_nvcc_knows(text, known, wanted):
    known = [f"compute_{number}" for number in known] + ["compute_90a"]
    assert toolkit.parse_architectures(text, known, "nvcc") == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8.0;nine", "'nine' is no architecture"),
        ("sm_90", "'sm_90' is no architecture"),
        ("90", "'90' is no architecture"),
        ("8.0,9.0", "'8.0,9.0' is no architecture"),
        ("9.0+ptx", "'9.0+ptx' is no architecture"),
        ("hopper", "'hopper' is no architecture"),
        ("7.0", "nvcc 13.0 cannot compile for 7.0, but for 7.5 8.0 8.6"),
        ("9.0 13.0+PTX", "nvcc 13.0 cannot compile for 13.0+PTX"),
        ("Pascal", "nvcc 13.0 cannot compile for Pascal"),
    ],
)
def test_a_bad_architecture_is_named(text, told):
    with pytest.raises(toolkit.Refused) as refused:
        toolkit.parse_architectures(text, NVCC_13_0, "nvcc 13.0")
    assert str(refused.value).startswith("TORCH_CUDA_ARCH_LIST: ") and told in str(refused.value)


NVIDIA_SMI = """#!/bin/sh
test "$*" = "--query-gpu=compute_cap --format=csv,noheader" || exit 1
{answer}
"""


def add_nvidia_smi(folder, answer):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvidia-smi").write_text(NVIDIA_SMI.format(answer=answer))
    (folder / "nvidia-smi").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("answer", "torchs", "asked", "wanted"),
    [
        ("echo 9.0", ["8.0"], "native", ("9.0",)),
        ("echo 9.0; echo 8.0; echo 9.0", [], "native", ("8.0", "9.0")),
        ("echo 9.0", [], "8.6+PTX", ("8.6+PTX",)),  # what is named wins
        ("echo 9.0", [], "", DEFAULT),
        ("echo No devices were found; exit 6", ["8.9"], "native", ("8.9",)),
        ("echo '[N/A]'", ["8.9"], "native", ("8.9",)),
        (None, ["8.0", "9.0"], "native", ("8.0", "9.0")),
        (None, [], "native", DEFAULT),  # built where there is no GPU
    ],
)
def test_native_is_the_gpus_at_hand(machine, answer, torchs, asked, wanted):
    path = str(nvcc_in(machine, "toolkit").parent)
    if answer is not None:
        path += f":{add_nvidia_smi(machine / 'driver', answer)}:/usr/bin:/bin"  # a driver's own would lie there
    environment = {"PATH": path, "TORCH_CUDA_ARCH_LIST": asked}
    chosen = toolkit.choose("2.14.1", "13.0", machine / "packages", environment, lambda: torchs)
    assert chosen.architectures == wanted


def test_a_gpu_at_hand_that_nvcc_does_not_know_stops_the_build(machine):
    path = f"{nvcc_in(machine, 'toolkit').parent}:{add_nvidia_smi(machine / 'driver', 'echo 15.0')}"
    with pytest.raises(toolkit.Refused, match=r"cannot compile for 15\.0"):
        choose(machine, PATH=path, TORCH_CUDA_ARCH_LIST="native")


def test_architecture_flags():
    assert toolkit.architecture_flags(("7.5", "9.0a", "12.0+PTX")) == [
        *("-gencode", "arch=compute_75,code=sm_75"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_120,code=[sm_120,compute_120]"),
    ]


@pytest.mark.parametrize(
    ("architectures", "capability", "wanted"),
    [
        ("", (9, 0), False),
        ("7.5", (7, 0), False),
        ("7.5", (7, 5), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0 8.6", (8, 0), True),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.6+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("12.0+PTX", (12, 1), True),
        ("12.0+PTX", (11, 0), False),
        ("12.0+PTX", (13, 0), True),
        *((" ".join(DEFAULT), device, True) for device in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0)]),
        (" ".join(DEFAULT), (6, 1), False),
    ],
)
def test_which_gpus_are_covered(architectures, capability, wanted):
    assert _C.cuda_covers(capability, architectures) is wanted
    for major in range(15):  # what is listed first or last makes no difference
        entries = [f"{major}.9", *architectures.split(), f"{major}.9"]
        if (major, 9) > capability or major != capability[0]:
            assert _C.cuda_covers(capability, " ".join(entries)) is wanted


def test_a_gpu_without_kernels_is_told_what_to_run():
    said = _C.no_kernels_for("NVIDIA GeForce GTX 1080", (6, 1), "cuda:1")
    assert "no CUDA kernels for NVIDIA GeForce GTX 1080 (compute capability 6.1, device cuda:1)" in said
    assert f"built for {_build.CUDA_ARCHITECTURES}" in said
    assert f"TORCH_CUDA_ARCH_LIST=6.1 {_extension._install_command()}" in said
