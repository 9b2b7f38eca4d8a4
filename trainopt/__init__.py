"""Drop-in optimizers and losses for PyTorch: one call per step, one pass over memory."""

import sys
from pathlib import Path

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "MSELoss",
    "Schedule",
    "SmoothL1Loss",
    "__version__",
    "clip_grad_norm_",
    "explain",
    "functional",
    "fuse",
    "get_total_norm",
    "nonfinite_report",
    "param_groups",
    "patch",
    "patched",
    "schedules",
]

try:
    from trainopt import functional, schedules
    from trainopt.clip import clip_grad_norm_, get_total_norm
    from trainopt.losses import (
        BCELoss,
        BCEWithLogitsLoss,
        CrossEntropyLoss,
        HuberLoss,
        KLDivLoss,
        L1Loss,
        LinearCrossEntropyLoss,
        LinearCrossEntropyOptions,
        MSELoss,
        SmoothL1Loss,
    )
    from trainopt.optim import SGD, Adam, AdamW, Schedule, fuse, nonfinite_report, param_groups
    from trainopt.patching import patch, patched
    from trainopt.paths import explain
except ImportError:
    # Python imports this package before it runs `python -m trainopt` or `trainopt`, which report this very error.
    if not (sys.argv[:1] == ["-m"] and "trainopt" in sys.orig_argv) and Path(sys.argv[0]).stem != "trainopt":
        raise
