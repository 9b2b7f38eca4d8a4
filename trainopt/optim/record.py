"""What an optimizer's last step did, and how many steps it has completed."""

import torch


class Record:
    """One object for an optimizer and for every wrapper that copies its `__dict__`, as some frameworks' do.

    Where a device decides whether a step is made, the answer stays there until somebody asks.
    """

    def __init__(self) -> None:
        self.skipped: bool | torch.Tensor = False  # the last step
        self.steps = 0  # completed, and those that a device has skipped
        self.skipped_steps: torch.Tensor | None = None  # of these, on the device
        self.compiled_steps: torch.Tensor | None = None  # of a compiled program, into which a number would be compiled
        self.asked_at: int | None = None  # `steps` when a step last asked for states to be made

    def was_skipped(self) -> bool:
        """Whether the last step was skipped; waits for a device that knows."""
        if not isinstance(self.skipped, bool):
            self.skipped = bool(self.skipped)
        return self.skipped

    def completed(self) -> int:
        """How many steps were completed; waits for a device where steps were left to it."""
        steps = self.steps
        if self.skipped_steps is not None:
            steps -= int(self.skipped_steps)
        return steps if self.compiled_steps is None else steps + int(self.compiled_steps)

    def count_unread(self, found_inf: torch.Tensor | None) -> None:
        """Counts a step that its device makes unless `found_inf` is set there."""
        self.steps += 1
        self.skipped = found_inf if found_inf is not None else False
        if found_inf is not None:
            skipped = found_inf.ne(0)
            self.skipped_steps = skipped.long() if self.skipped_steps is None else self.skipped_steps.add_(skipped)
