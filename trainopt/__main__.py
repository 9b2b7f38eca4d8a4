"""`python -m trainopt`: the same as the command `trainopt`."""

import sys

from trainopt.cli import main

sys.exit(main())
