"""The machine code of the CUDA kernels, as the disassembler shows it: what ptxas made of the PTX."""

import dataclasses
import re

import pytest

from benchmarks import cuda_kernels
from benchmarks.cuda_compiled import compiled, nvcc, nvdisasm, version
from benchmarks.machine_code import Code, Moved, Way

needs_a_compiler = pytest.mark.skipif(
    nvcc() is None or nvdisasm() is None,
    reason="needs nvcc, and nvdisasm from CUDA's toolkit or from Triton's package",
)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), [("norm", 75), ("norm", 90), ("update", 90)])
def test_wide_accesses_and_no_local_memory(name, architecture):
    found = {
        cuda_kernels.describe(k): v for k, v in compiled(name, architecture).machine_code.items() if "_kernel" in k
    }
    assert len(found) > 8
    for kernel, code in found.items():
        assert not re.search(r"\b(LDL|STL)\b", code), kernel
        if kernel == "finish" or (name == "update" and cuda_kernels.goes_by_elements(kernel)):
            continue
        assert re.search(r"\bLDG\.E[.\w]*\.128\b", code) or "strided" in kernel, kernel
        writes = name == "update" or kernel.startswith(("clip", "clamp"))
        assert bool(re.search(r"\bSTG\.E[.\w]*\.128\b", code)) == writes or "strided" in kernel, kernel


@needs_a_compiler
@pytest.mark.slow
def test_no_hot_loop_is_worse_than_it_was(request):
    """Where one is better: python -m benchmarks.cuda_kernels --write."""
    wanted = request.config.getoption("--architectures")
    release, expected = cuda_kernels.load_found()
    if release != version():
        pytest.skip(f"the loops are known as nvcc {release} makes them, and this is {version()}")
    cards = [card.architecture for card in cuda_kernels.CARDS.values()]
    found = cuda_kernels.find_all(architectures=[architecture for architecture in cards if architecture in wanted])
    assert found.keys() == expected.keys()
    said = [
        f"{title}, {architecture}: {words}"
        for title, of in found.items()
        for architecture, figures in of.items()
        for words in cuda_kernels.worse(figures, expected[title][architecture])
    ]
    assert not said, "\n".join(said)


def test_the_documentation_has_these_tables():
    text = (cuda_kernels.DOCUMENTATION).read_text()
    release, found = cuda_kernels.load_found()
    assert f"nvcc {release}" in text
    assert cuda_kernels.machine_code_table(found) in text
    assert cuda_kernels.roofline_table() in text


@pytest.mark.parametrize(
    "change",
    [{"instructions": 10.2}, {"under_way": 64}, {"registers": 81}, {"blocks": 2}, {"blocks": 5, "threads": 128}],
    ids=str,
)
def test_what_is_worse_is_said(change):
    before = cuda_kernels.Figures(10.0, 4.0, 1.0, 3.0, 0.0, 128, 80, 3, 256)
    assert cuda_kernels.worse(before, before) == []
    assert len(cuda_kernels.worse(dataclasses.replace(before, **change), before)) == 1
    better = dataclasses.replace(before, instructions=9.0, under_way=256, registers=64, blocks=4)
    assert cuda_kernels.worse(better, before) == []


#: Of a loop: its head loads a word, if P0 a slow way comes back to the fast one, and the end stores a half.
LOOP = """
 /*0000*/ MOV R1, c[0x0][0x28] ;
.L_x_1:
 /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
 /*0020*/ @P0 BRA `(.L_x_3) ;
 /*0030*/ FMUL R4, R4, R5 ;
.L_x_2:
 /*0040*/ MUFU.EX2 R4, R4 ;
 /*0050*/ @P2 STG.E desc[UR4][R2.64], R4 ;
 /*0060*/ STG.E.64 desc[UR4][R2.64], R4 ;
 /*0070*/ @P1 BRA `(.L_x_1) ;
 /*0080*/ EXIT ;
.L_x_3:
 /*0090*/ FADD R4, R4, R5 ;
 /*00a0*/ FADD R4, R4, R5 ;
 /*00b0*/ FADD R4, R4, R5 ;
 /*00c0*/ BRA `(.L_x_2) ;
"""


def test_a_loop_is_gone_round_in_the_cheapest_way():
    fast = Way(instructions=7, float32=1, special=1)
    assert Code(LOOP, "").cheapest(Moved(loaded=16, stored=8)) == fast
    assert Code(LOOP, r"FMUL").cheapest(Moved(loaded=16, stored=8, marked=1)) == fast
    slow = Code(LOOP, r"FMUL").cheapest(Moved(loaded=16, stored=8, marked=0))
    assert slow == Way(instructions=10, float32=3, special=1)
    assert Code(LOOP, "").cheapest(Moved(loaded=32, stored=8)) is None


def test_the_model_knows_too_few_bytes_and_too_many_instructions():
    hot = next(cuda_kernels.hot_loops())
    card = cuda_kernels.CARDS["H100 SXM"]
    good = cuda_kernels.Figures(10.0, 4.0, 0.5, 3.0, 0.0, 128, 64, 4, 256)
    share = cuda_kernels.share_of_copy(hot, good, card)
    assert 0.95 < share <= 1
    assert cuda_kernels.share_of_copy(hot, dataclasses.replace(good, under_way=2), card) < 0.5
    assert cuda_kernels.share_of_copy(hot, dataclasses.replace(good, instructions=800.0), card) < 0.5
    assert cuda_kernels.share_of_copy(hot, dataclasses.replace(good, special=120.0), card) < 0.5
    doubles = dataclasses.replace(good, float64=40.0)
    assert cuda_kernels.share_of_copy(hot, doubles, cuda_kernels.CARDS["RTX 5090"]) < 0.8 * share
