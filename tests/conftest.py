"""What the tests share: the SIMD variants, and settings of the process that every test leaves as it found them."""

import pytest
import torch

from trainopt._extension import _C

VARIANTS = [name for name, usable in _C.cpu_variants().items() if usable]


@pytest.fixture(autouse=True)
def process_settings():
    """Puts back the number of threads and the SIMD variant."""
    threads, variant = torch.get_num_threads(), _C.cpu_variant()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _C.set_cpu_variant(variant)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Each SIMD variant that the processor can run, set for the test."""
    _C.set_cpu_variant(request.param)
    return request.param


@pytest.fixture
def each_variant():
    """Iterates over the SIMD variants that the processor can run, setting each."""

    def iterate():
        for name in VARIANTS:
            _C.set_cpu_variant(name)
            yield name

    return iterate
