"""Tests of what happens on a GPU. They run on CUDA's device where trainopt has been built for CUDA and there is one,
on the emulated device under `make emulated`, and are skipped elsewhere.

The emulated device does its streams' work on the CPU, and late: when somebody waits for it. The host is killed where
it touches the device's memory, and a test fails if a kernel has done what it must not.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from devices import HAS_GPU, IS_EMULATED

from trainopt._extension import _C

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:  # of all tests, when they run together
        if HERE not in item.path.parents:
            continue
        if not (IS_EMULATED or HAS_GPU):
            item.add_marker(pytest.mark.skip(reason="neither a GPU nor `make emulated`"))
        elif IS_EMULATED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """Never the CPU here, where other tests run as well."""
    return "simt" if IS_EMULATED else "cuda"


@pytest.fixture
def other_device(device) -> str:
    """A second device of the kind."""
    if torch.get_device_module(device).device_count() < 2:
        pytest.skip("needs two devices")
    return f"{device}:1"


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
