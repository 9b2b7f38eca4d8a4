"""What the environment asks of trainopt as a whole. Read once, when trainopt is imported."""

import os

#: `TRAINOPT_REFERENCE`, unless it is empty or 0: in this process every optimizer, loss and clipping takes torch's own
#: path, for bisecting. To read the environment at each call would take as long as a small loss.
REFERENCE_FORCED = os.environ.get("TRAINOPT_REFERENCE", "0") not in ("", "0")
