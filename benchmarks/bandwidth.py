"""The machine's own speed at what an optimizer step is made of: reading memory and writing it back."""

from __future__ import annotations

import torch


class ReadModifyWrite:
    """Reads and writes `traffic` bytes in all: `x.add_(1)` on one contiguous float32 tensor of half of those bytes.

    So it works on about as much memory as the step that it is compared with, and stays in the caches when that does.
    """

    label = "x.add_(1), same bytes"

    def __init__(self, traffic: int) -> None:
        self.tensor = torch.ones(max(traffic // 8, 1))

    def __call__(self) -> None:
        self.tensor.add_(1)
