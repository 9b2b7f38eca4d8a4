"""The emulated device as torch wants it: a module `torch.simt`, as `torch.cuda` is for CUDA."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch

from trainopt._extension import _C


@contextlib.contextmanager
def on_device(device: torch.device | str | int) -> Iterator[None]:
    """As torch.cuda.device."""
    index = device if isinstance(device, int) else torch.device(device).index
    before = _C.simt.current_device()
    _C.simt.set_device(before if index is None else index)
    try:
        yield
    finally:
        _C.simt.set_device(before)


def register() -> None:
    module = ModuleType("torch.simt")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        current_device=_C.simt.current_device,
        set_device=_C.simt.set_device,
        device=on_device,
        _is_in_bad_fork=lambda: False,
        manual_seed=lambda seed: None,  # random numbers come from the CPU's generator
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    torch._register_device_module("simt", module)
