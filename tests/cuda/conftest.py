"""Tests of what happens on a GPU. They run on CUDA's device where trainopt has been built for CUDA and there is one,
on the emulated device under `make emulated`, and are skipped elsewhere.

The emulated device does each launch at once, on the CPU; the host is killed where it touches the device's memory, and
a test fails if a kernel has done what it must not.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainopt._extension import _C

HERE = Path(__file__).parent
IS_EMULATED = "simt" in _C.device_types()
HAS_GPU = "cuda" in _C.device_types() and torch.cuda.is_available()


def pytest_addoption(parser):
    parser.addoption("--emulated", action="store_true", help="fail unless trainopt is the one on the emulated device")
    parser.addoption("--gpu", action="store_true", help="fail unless there is a GPU that trainopt is built for")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a real GPU")
    if config.getoption("--emulated", default=False) and not IS_EMULATED:
        raise pytest.UsageError(f"trainopt is built for {_C.device_types()}, not for the emulated device")
    if config.getoption("--gpu", default=False) and not HAS_GPU:
        found = "finds a GPU" if torch.cuda.is_available() else "finds no GPU"
        raise pytest.UsageError(f"trainopt is built for {_C.device_types()}, and torch {found}")


def pytest_collection_modifyitems(items):
    for item in items:  # of all tests, when they run together
        if HERE not in item.path.parents:
            continue
        if not (IS_EMULATED or HAS_GPU):
            item.add_marker(pytest.mark.skip(reason="neither a GPU nor `make emulated`"))
        elif IS_EMULATED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU"))


@pytest.fixture
def device() -> str:
    return "simt" if IS_EMULATED else "cuda"


@pytest.fixture
def other_device(device) -> str:
    """A second device of the kind."""
    if torch.get_device_module(device).device_count() < 2:
        pytest.skip("needs two devices")
    return f"{device}:1"


@pytest.fixture(autouse=True)
def no_faults():
    """Fails a test whose kernels race, read what was never set, or leave the memory that they were given."""
    if not IS_EMULATED:
        yield
        return
    _C.simt.take_faults()
    yield
    _C.simt.forbid_synchronisation(False)
    _C.simt.set_capturing(False)
    _C.simt.set_order(ascending=True)
    _C.simt.set_device(0)
    faults = _C.simt.take_faults()
    assert not faults, "\n".join(faults)


@pytest.fixture
def no_synchronisation(device) -> Callable:
    """A context in which waiting for the device raises."""

    @contextlib.contextmanager
    def forbid() -> Iterator[None]:
        if device == "cuda":
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        else:
            _C.simt.forbid_synchronisation(True)
            try:
                yield
            finally:
                _C.simt.forbid_synchronisation(False)

    return forbid


@pytest.fixture
def counted(device):
    """torch's module for the device, where it counts the memory that is asked for: without its cache it does not."""
    if device == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        pytest.skip("torch counts no memory under PYTORCH_NO_CUDA_MEMORY_CACHING")
    return torch.get_device_module(device)


@pytest.fixture
def allocations(counted) -> Callable[[], int]:
    """How many blocks of the device's memory have been asked for since the process began."""
    return lambda: counted.memory_stats()["allocation.all.allocated"]


@pytest.fixture
def allocated(counted) -> Callable[[], int]:
    """How many bytes of the device's memory are in use."""
    return counted.memory_allocated
