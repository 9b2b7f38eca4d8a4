"""Drop-in optimizers for PyTorch: one call per step, one pass over memory."""

import sys

__version__ = "0.1.0"
__all__ = ["SGD", "Adam", "AdamW", "__version__", "clip_grad_norm_", "explain", "fuse", "get_total_norm"]

try:
    from trainopt.clip import clip_grad_norm_, get_total_norm
    from trainopt.optim import SGD, Adam, AdamW, explain, fuse
except ImportError:
    # Python imports this package before it runs `python -m trainopt`, which is there to report this very error.
    if not (sys.argv[:1] == ["-m"] and "trainopt" in sys.orig_argv):
        raise
