"""Tests of trainopt inside the frameworks that people train with: each runs the same small program twice, with torch's
optimizers, losses and clipping, and with trainopt's, and compares what became of the models.

    make clients

Models are made from configurations and data from random numbers: nothing is downloaded. A file whose framework is not
installed (the extra `clients` has them all) is skipped.
"""

import os
from pathlib import Path

import pytest

from benchmarks.peers import names_for_torchvision

HERE = Path(__file__).parent

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}


def pytest_collection_modifyitems(items):
    for item in items:  # of all tests, when they run together
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


names_for_torchvision()  # before timm is imported
