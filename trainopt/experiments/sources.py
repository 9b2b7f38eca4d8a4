"""The Python standard library's own sources as text to learn from: every machine has them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

#: Printable ASCII, tab and newline; every other character is the last one.
VOCABULARY = "\t\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
HELD_OUT_CHARACTERS = 200_000

# No tensor: one that is made at import would be of the device and the mode that are in force there.
_CODES = bytes(VOCABULARY.index(c) if (c := chr(code)) in VOCABULARY else len(VOCABULARY) - 1 for code in range(256))


def encode(text: str) -> Tensor:
    """The characters' places in the vocabulary, uint8."""
    return torch.frombuffer(bytearray(text.encode("latin-1", "replace").translate(_CODES)), dtype=torch.uint8)


def decode(codes: Tensor) -> str:
    """The text of places in the vocabulary."""
    return "".join(VOCABULARY[code] for code in codes.tolist())


def sources(folder: str | Path | None = None) -> list[str]:
    """The modules of the standard library, in the order of their paths, without tests, tables and installed packages.

    Raises:
        FileNotFoundError: there are none: this Python keeps them as bytecode alone, or in an archive.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts[:-1])]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(paths)]
    if sum(map(len, texts)) < 4 * HELD_OUT_CHARACTERS:
        raise FileNotFoundError(f"this Python has no sources of its standard library to learn from in {root}")
    return texts


def windows(context: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(inputs, targets) to train on, and held out: windows of `context` characters and the character after each.

    uint8, of shape (windows, context). Whole modules are held out, drawn by the seed: about 200,000 characters.
    """
    texts = sources()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out: list[str] = []
    while sum(map(len, held_out)) < HELD_OUT_CHARACTERS:
        held_out.append(texts[order.pop()])
    kept = [texts[index] for index in sorted(order)]
    return cut("".join(kept), context), cut("".join(held_out)[:HELD_OUT_CHARACTERS], context)


def cut(text: str, context: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of windows one after another; a rest shorter than a window is left out."""
    codes = encode(text)
    count = (len(codes) - 1) // context
    inputs, targets = codes[: count * context], codes[1 : count * context + 1]
    return inputs.reshape(count, context), targets.reshape(count, context)
