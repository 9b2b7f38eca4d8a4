"""What nvcc makes of the CUDA kernels: for every architecture, without spills, in few registers, with wide accesses."""

import itertools
import re
import subprocess

import pytest

from benchmarks import cuda_kernels
from benchmarks.cuda_compiled import FLAGS, ROOT, compiled, nvcc
from benchmarks.cuda_kernels import describe, goes_by_elements

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc() is None, reason="nvcc is neither on the PATH nor in CUDA_HOME"),
]

RULES = re.findall(r"\bDO\((\w+)\)", (ROOT / "csrc" / "rules" / "rules.h").read_text())
HEADERS = [(ROOT / "csrc" / "rules" / f"{rule.lower()}.h").read_text() for rule in RULES]
#: The sets of states of each rule that there are kernels of a step for, as its header lists them.
SETS = [re.search(r"kStateSets\[\] = \{(.*)\}", header)[1].split(",") for header in HEADERS]
#: The rules that have averages over rows and columns, which one of their sets of states is: of any types alone.
FACTORED = sum("kFactors" in header for header in HEADERS)
#: Those of the rules that have a reduce phase.
SUMMING = [sets for header, sets in zip(HEADERS, SETS, strict=True) if "kSums[]" in header]
LOSSES = re.findall(r"\bDO\((\w+)\)", (ROOT / "csrc" / "losses" / "pointwise.h").read_text())
TYPES = ("float32", "float64")

#: How many kernels each file has.
COUNTS = {
    # For each set of states: in any types with a tail, strided or not; and in float32 arithmetic likewise without one,
    # and in one of three types.
    "update": sum(map(len, SETS)) * (2 * len(TYPES) + 2 + 3) - FACTORED * 3,
    "prepare": len(RULES) * len(TYPES),
    # Of those that gather sums of their own, in any types, strided or not, and in one of three; and the cautious step's
    # of all, in any types; then what follows from each sum, and one that combines them.
    "gather": sum(map(len, SUMMING)) * (2 * len(TYPES) + 3)
    - FACTORED * 3
    + sum(map(len, SETS)) * 2 * len(TYPES)
    + (len(SUMMING) + len(RULES)) * len(TYPES)
    + 1,
    # The sums, strided or not; the averages, and the division; of shards, the sums' totals, and the numbers of a part.
    "factors": 2 * len(TYPES) + FACTORED * 2 * len(TYPES) + 1 + len(TYPES),
    "stats": 1,
    "norm": 3 * len(TYPES) * 2 + 1,  # partial, clip and clamp, strided or not; finish
    "pointwise": 2 * len(LOSSES) * len(TYPES) + 1,  # forward and backward; finish
    "cross_entropy": len(TYPES) + 2,  # count; finish of the counts and of the losses
    # A warp and a block a row; in general, and for five pairs of logits' and gradients' types.
    "cross_entropy_rows": 2 * (len(TYPES) + 5),
    "cross_entropy_columns": len(TYPES),
}


#: Kernels of which a thread has many elements under way.
HEAVY = ("update", "gather", "add squares", "pointwise", "cross")


def ceiling_of(kernel: str) -> int:
    """Registers of a thread at most: two blocks of 256 threads on a multiprocessor, and one for float64."""
    if is_step_preparation(kernel):
        return 128  # blocks of 64
    if "float64" in kernel:
        # CUDA's own exp and log of float64 take what they can get, and so do the words of many tensors.
        return 255 if kernel.startswith(HEAVY) else 96
    if kernel.startswith("cross entropy block, ") and "general" not in kernel:
        return 64  # 1,024 threads a row
    if re.search(r"(with [34] states|states \d \d \d|Adamax with 2 states), any types, |with a tail", kernel):
        return 255  # which are seldom: one block, where two would spill
    return 128 if kernel.startswith(HEAVY) else 64


def is_step_preparation(kernel: str) -> bool:
    """One thread for a parameter: it indexes the group's options, and is no kernel to be fast."""
    return kernel.startswith(("prepare", "apply sums"))


@pytest.fixture(scope="module")
def usages(request):
    return cuda_kernels.all_usages(request.config.getoption("--architectures"))


def ptx_of(name: str, architecture: int) -> dict[str, str]:
    return {describe(mangled): ptx for mangled, ptx in compiled(name, architecture).ptx.items()}


def test_every_kernel_is_compiled_for_every_architecture(usages, request):
    assert set(usages) == set(request.config.getoption("--architectures"))
    for found in usages.values():
        assert len({usage.kernel for usage in found}) == len(found) == sum(COUNTS.values())
        for direction, loss, arithmetic in itertools.product(("forward", "backward"), LOSSES, TYPES):
            assert any(usage.kernel == f"pointwise {direction}, {loss}, {arithmetic}" for usage in found)


def test_nothing_is_spilled_or_kept_in_local_memory(usages):
    for architecture, found in usages.items():
        for usage in found:
            # The row of float64 with every option has all the registers that there are, and a little more.
            has_all = usage.registers == 255 and "float64" in usage.kernel
            assert usage.spills <= (64 if has_all else 0) or is_step_preparation(usage.kernel), (architecture, usage)
            assert usage.stack <= (16 if has_all else 0) or is_step_preparation(usage.kernel), (architecture, usage)


def test_registers_are_within_their_ceilings(usages):
    for architecture, found in usages.items():
        for usage in found:
            assert usage.registers <= ceiling_of(usage.kernel), (architecture, usage)
            assert usage.occupancy(architecture) >= 0.125


def test_occupancy_is_what_the_registers_leave_room_for():
    usage = cuda_kernels.Usage("update", registers=120, stack=0, spills=0, threads=256)
    # 120 registers of 32 threads are 3,840, so 65,536 hold 17 warps: two blocks of 8.
    assert usage.occupancy(80) == 512 / 2048 and usage.occupancy(86) == 512 / 1536
    small = cuda_kernels.Usage("prepare", registers=32, stack=0, spills=0, threads=64)
    assert small.occupancy(86) == 16 * 64 / 1536 and small.occupancy(80) == 1


@pytest.mark.parametrize("architecture", (80, 90, 120))
def test_aligned_tensors_are_loaded_and_stored_16_bytes_at_a_time(architecture, request):
    if architecture not in request.config.getoption("--architectures"):
        pytest.skip("not among --architectures")

    def words(ptx: str) -> tuple[int, int]:
        loads, stores = (len(re.findall(rf"\b{what}\.global(\.cs)?\.v4\.\w32\b", ptx)) for what in ("ld", "st"))
        return loads, stores

    for kernel, ptx in ptx_of("update", architecture).items():
        if goes_by_elements(kernel):
            continue
        roles = 2 + int((re.search(r"with (\d) state", kernel) or ["", "0"])[1])
        roles -= kernel.startswith("update, Prodigy")  # p0, which its sums alone are of
        loads, stores = words(ptx)
        # Two words of each tensor under way; in any types a tensor as float32 and in 16 bits.
        assert loads >= 2 * roles and stores >= 2 * (roles - 1), (kernel, loads, stores)
        assert not re.search(r"\.local\b", ptx), kernel
    for kernel, ptx in ptx_of("norm", architecture).items():
        if "strided" in kernel or kernel == "finish":
            continue
        assert re.search(r"\bld\.global\.(v4\.\w32|v2\.\w64)\b", ptx), kernel
        assert kernel.startswith(("clip", "clamp")) == bool(re.search(r"\bst\.global\.v4\.\w32\b", ptx)), kernel
    for kernel, ptx in ptx_of("pointwise", architecture).items():
        loads, stores = words(ptx)
        # Two items of input and target under way, then one with a weight; a result in each of the types.
        assert "finish" in kernel or (loads >= 12 and stores >= 4 * (1 + ("backward" in kernel))), (
            kernel,
            loads,
            stores,
        )
        assert not re.search(r"\.local\b", ptx), kernel
    for kernel, ptx in ptx_of("cross_entropy_rows", architecture).items():
        loads, stores = words(ptx)
        # Four words of the logits, in each of two passes.
        assert loads >= 8 and (stores >= 4 or " to " in kernel), (kernel, loads, stores)
        assert not re.search(r"\.local\b", ptx), kernel


def test_contraction_is_off_so_that_the_steps_bits_are_the_cpus():
    assert "-fmad=false" in FLAGS
    for name in ("update", "gather", "norm"):
        for kernel, ptx in ptx_of(name, 90).items():
            assert not re.search(r"\bfma\.rn\.f(32|64)\b", ptx), kernel


def test_parameters_of_4_kb_compile_too():
    """One file with tables of tensors: the emulated device has such parameters in all kernels of all rules."""
    command = [nvcc(), *FLAGS, "-DTRAINOPT_PARAMETER_BYTES=4096", "-arch=sm_75", "-ptx", "-o", "/dev/null"]
    subprocess.run([*command, str(ROOT / "csrc" / "cuda" / "factors.cu")], check=True)


def test_a_name_that_is_no_kernel_is_refused():
    with pytest.raises(ValueError, match="no kernel"):
        describe("_Z3foov")
