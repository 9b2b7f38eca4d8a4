"""torch.nn.functional's losses, fused: `trainopt.functional.cross_entropy` where it was `F.cross_entropy`."""

from trainopt.losses.functional import *  # noqa: F403
from trainopt.losses.functional import __all__  # noqa: F401
