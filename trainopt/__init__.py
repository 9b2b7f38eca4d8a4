"""Drop-in optimizers for PyTorch: one call per step, one pass over memory."""

import sys
from pathlib import Path

__version__ = "0.1.0"
__all__ = ["SGD", "Adam", "AdamW", "Schedule", "__version__", "explain", "fuse", "param_groups", "schedules"]

try:
    from trainopt import schedules
    from trainopt.optim import SGD, Adam, AdamW, Schedule, explain, fuse, param_groups
except ImportError:
    # Python imports this package before it runs `python -m trainopt` or `trainopt`, which report this very error.
    if not (sys.argv[:1] == ["-m"] and "trainopt" in sys.orig_argv) and Path(sys.argv[0]).stem != "trainopt":
        raise
