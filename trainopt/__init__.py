"""Drop-in optimizers and losses for PyTorch: one call per step, one pass over memory."""

import sys

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
    "MSELoss",
    "SmoothL1Loss",
    "__version__",
    "explain",
    "functional",
    "fuse",
]

try:
    from trainopt import functional
    from trainopt.losses import (
        BCELoss,
        BCEWithLogitsLoss,
        CrossEntropyLoss,
        HuberLoss,
        KLDivLoss,
        L1Loss,
        LinearCrossEntropyLoss,
        MSELoss,
        SmoothL1Loss,
    )
    from trainopt.optim import SGD, Adam, AdamW, explain, fuse
except ImportError:
    # Python imports this package before it runs `python -m trainopt`, which is there to report this very error.
    if not (sys.argv[:1] == ["-m"] and "trainopt" in sys.orig_argv):
        raise
