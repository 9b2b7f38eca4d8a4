"""The reference training loop: `fit`, and what it is made of."""

from trainopt.training.loop import Result, fit
from trainopt.training.options import Options
from trainopt.training.report import Finished, Lines, Message, Progress, Report, Silent, Started, Validated

__all__ = [
    "Finished",
    "Lines",
    "Message",
    "Options",
    "Progress",
    "Report",
    "Result",
    "Silent",
    "Started",
    "Validated",
    "fit",
]
