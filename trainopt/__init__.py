"""Drop-in optimizers and losses for PyTorch: one call per step, one pass over memory."""

import sys
from pathlib import Path

from trainopt._version import __version__

__all__ = [
    "__version__",
    "adaptive_clip_grad_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "explain",
    "functional",
    "get_total_norm",
    "patch",
    "patched",
    "schedules",
]

try:
    from trainopt import functional, losses, optim, schedules
    from trainopt.adaptive_clip import adaptive_clip_grad_
    from trainopt.clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
    from trainopt.losses import *  # noqa: F403
    from trainopt.optim import *  # noqa: F403
    from trainopt.patching import patch, patched
    from trainopt.paths import explain

    __all__ += losses.__all__
    __all__ += optim.__all__
except ImportError:
    # Python imports this package before it runs the command `trainopt`, or `python -m trainopt`, which begins with this
    # very import and reports what is wrong and what mends it. For any other program the error is raised here.
    if not (sys.argv[:1] == ["-m"] and "trainopt" in sys.orig_argv) and Path(sys.argv[0]).stem != "trainopt":
        raise
