"""Tests of trainopt inside the frameworks that people train with: each runs the same small program twice, with torch's
optimizers, losses and clipping, and with trainopt's, and compares what became of the models.

    make clients

Models are made from configurations and data from random numbers: nothing is downloaded. A file whose framework is not
installed (the extra `clients` has them all) is skipped.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}


def pytest_collection_modifyitems(items):
    for item in items:  # of all tests, when they run together
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


def names_for_torchvision() -> torch.library.Library | None:
    """For timm, which imports torchvision. The one on PyPI has its operators in a library for CUDA, which does not load
    beside torch's build for CPUs, and then it fails over their names. With the names it imports; timm needs no more.
    """
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


TORCHVISION = names_for_torchvision()  # for as long as the process
