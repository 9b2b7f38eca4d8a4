"""What the losses check of their arguments, beyond what torch checks."""

import math

from torch.nn import _reduction

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def number_of(reduction: str) -> int:
    """torch's number for a reduction; its own error for one that it does not know."""
    number = _REDUCTIONS.get(reduction)
    return _reduction.get_enum(reduction) if number is None else number


def check_extras(z_loss: float, softcap: float | None, empty: str) -> None:
    """ValueError for an option of trainopt's own that is out of its range."""
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, not {z_loss!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None, or finite and greater than 0, not {softcap!r}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', not {empty!r}")
