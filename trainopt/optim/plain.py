"""What the plain steps of several optimizers share."""

import math


def bias_correction(beta: float, step: float) -> float:
    """1 - beta**step, what an average that began at 0 has to be divided by, without cancellation in the first steps."""
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0
