"""What the tests of the optimizers on a device share: the same steps there and on the CPU."""

from typing import Any

import judge
import torch

Outcome = dict[str, judge.Tensors]

TABLE = judge.TABLE
#: The rows of which the host reads nothing in a step: no number that parameters have in common.
UNREAD = [name for name, row in TABLE.items() if row.in_common is None and not row.needs_host]

# Nothing, less than a thread's eight, around a warp's 256 and a block's 2,048; a scalar and a matrix.
SHAPES = ((5,), (0, 3), (), (257,), (33, 20), (2049,), (8,))


def moved(tensors: judge.Tensors, device: str) -> judge.Tensors:
    return [t.to(device) for t in tensors]


def here(outcome: Outcome) -> Outcome:
    return {name: [t.cpu() for t in tensors] for name, tensors in outcome.items()}


def outcome_on(device: str, make: Any, problem: tuple, **options: Any) -> Outcome:
    """A run of `judge.run` with everything on the device, brought here."""
    start, gradients = problem
    return here(judge.result_of(make, moved(start, device), [moved(g, device) for g in gradients], **options))


def counts_on_device(name: str) -> dict[str, Any]:
    """Options with which an optimizer counts its steps on the device, if it counts them."""
    return {"capturable": True} if "capturable" in TABLE[name].defaults else {"fused": True}


def on_device(value: Any, device: str) -> Any:
    """Options with their tensors on the device."""
    if isinstance(value, dict):
        return {name: on_device(v, device) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(on_device(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def assert_same_bits(found: Outcome, truth: Outcome) -> None:
    """But for which NaN a NaN is, where a real GPU has computed it."""
    judge.assert_same_bits(found, truth, any_nan=torch.cuda.is_available())


def assert_near(found: Outcome, truth: Outcome) -> None:
    """Within two steps between neighbouring numbers, of each result's dtype."""
    assert found.keys() == truth.keys()
    for name, tensors in truth.items():
        for i, (a, b) in enumerate(zip(found[name], tensors, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, (name, i)
            off = (a.double() - b.double()).abs() > 2 * judge.spacing(b, b.dtype)
            assert not off.any(), f"{name}[{i}]: {a[off][:3]} in place of {b[off][:3]}"
