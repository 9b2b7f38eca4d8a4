"""What the tests share: the SIMD variants, and settings of the process that every test leaves as it found them. And
what they do without: a file that imports an optional package which is not installed is skipped, and says so.
"""

import pytest
import torch

from trainopt._extension import _C

#: Packages of the extras in pyproject.toml. Any other module that is missing is an error.
OPTIONAL = {"expecttest", "hypothesis", "matplotlib", "mlxtend", "numpy", "rich", "tensorboard"}
OPTIONAL |= {"accelerate", "ignite", "lightning", "peft", "timm", "transformers", "trl"}

VARIANTS = [name for name, usable in _C.cpu_variants().items() if usable]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Else one such import, direct or by way of torch.testing._internal, would end the run before the first test."""
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed and report.call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = str(collector.path), None, f"Skipped: the package {error.name} is not installed"
    return report


@pytest.fixture(autouse=True)
def process_settings():
    """Puts back the number of threads and the SIMD variant."""
    threads, variant = torch.get_num_threads(), _C.cpu_variant()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _C.set_cpu_variant(variant)


@pytest.fixture
def one_thread():
    """For what is too small to be divided among several."""
    torch.set_num_threads(1)


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
