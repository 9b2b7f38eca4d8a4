"""The random generators a training run draws from: Python's, NumPy's, torch's, and the accelerator's."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def capture(device: torch.device | None = None) -> dict[str, Any]:
    """The state of every generator, as tensors, numbers and tuples. NumPy's only if the program has imported NumPy."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss))
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Sets every generator to a captured state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state and device is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def reseed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators on the CPU."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def preserved(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside leaves no trace outside. With `seed`, it is also the same each time."""
    state = capture(device)
    try:
        if seed is not None:
            reseed(seed)
        yield
    finally:
        restore(state, device)


def derived(seed: int, index: int) -> int:
    """A seed from 0 to 2**63 - 1 for the part `index` of what `seed` governs; unlike those of all other parts."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
