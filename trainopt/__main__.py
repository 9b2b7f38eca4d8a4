"""`python -m trainopt`."""

import sys

from trainopt.info import main

sys.exit(main())
