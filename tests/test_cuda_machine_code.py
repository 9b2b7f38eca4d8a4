"""The machine code of the CUDA kernels, as the disassembler shows it: what ptxas made of the PTX."""

import re

import pytest

from benchmarks import cuda_kernels

pytestmark = pytest.mark.skipif(
    cuda_kernels.nvcc() is None or cuda_kernels.nvdisasm() is None,
    reason="needs nvcc, and nvdisasm from CUDA's toolkit or from Triton's package",
)


@pytest.mark.parametrize(("name", "architecture"), [("norm", 75), ("norm", 90), ("update", 90)])
def test_wide_accesses_and_no_local_memory(name, architecture):
    found = cuda_kernels.machine_code_of(name, architecture)
    assert len(found) > 8
    for kernel, code in found.items():
        assert not re.search(r"\b(LDL|STL)\b", code), kernel
        if kernel == "finish" or (name == "update" and "strided" in kernel):
            continue
        assert re.search(r"\bLDG\.E[.\w]*\.128\b", code) or "strided" in kernel, kernel
        writes = name == "update" or kernel.startswith(("clip", "clamp"))
        assert bool(re.search(r"\bSTG\.E[.\w]*\.128\b", code)) == writes or "strided" in kernel, kernel
