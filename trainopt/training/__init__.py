"""The reference training loop: `fit`, and what it is made of."""

from trainopt.training.folder import Folder
from trainopt.training.loop import fit
from trainopt.training.lr_find import LrCurve, lr_find
from trainopt.training.options import Options
from trainopt.training.report import (
    Finished,
    Lines,
    Message,
    Progress,
    Report,
    Several,
    Silent,
    Started,
    TensorBoard,
    Terminal,
    Validated,
)
from trainopt.training.result import Result

__all__ = [
    "Finished",
    "Folder",
    "Lines",
    "LrCurve",
    "Message",
    "Options",
    "Progress",
    "Report",
    "Result",
    "Several",
    "Silent",
    "Started",
    "TensorBoard",
    "Terminal",
    "Validated",
    "fit",
    "lr_find",
]
