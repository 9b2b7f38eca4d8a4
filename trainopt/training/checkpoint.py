"""Checkpoints that are whole or not there.

A file is written under another name, flushed to the disk, and renamed: a process that is killed at any moment leaves
the files that were there before. Its last 40 bytes are a mark and the SHA-256 of all before; `torch.load(path,
weights_only=True)` reads it as any other.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from trainopt.training.distributed import is_dtensor, whole

MARK = b"trainopt"
TRAILER = len(MARK) + hashlib.sha256().digest_size
NAME = re.compile(r"step-(\d+)\.pt")


class CorruptCheckpoint(Exception):
    """A file that is not as it was written; the message says in what way."""


class Checkpoints:
    """The checkpoints of one run: `step-000001000.pt` and so on, in one directory.

    Args:
        directory: is made with the first file.
        keep: how many are kept, the newest ones.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self.corrupt: set[Path] = set()  # those that are known to be

    def check_writable(self) -> None:
        """ValueError, with nothing written, if files cannot be made there."""
        existing = self.directory
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise ValueError(f"directory: {str(existing)!r} is not a directory")
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise ValueError(f"directory: cannot write in {str(existing)!r}: {error.strerror}") from error

    def paths(self) -> list[Path]:
        """The checkpoints, whole or not, the newest first."""
        found = [path for path in self._files() if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (number_of(path), path), reverse=True)

    def save(self, state: Mapping[str, Any], step: int) -> Path:
        """Writes a checkpoint and, once it is whole, removes the oldest whole ones beyond `keep`. OSError if it cannot
        be written; what was there before is then still there.

        Of a higher number than the one just written are only files that the run could not begin from: neither they nor
        others that are not whole count, and they are left alone.
        """
        for left_over in self.directory.glob("*.partial"):  # by a run that was killed
            left_over.unlink(missing_ok=True)
        path = self.directory / f"step-{step:09}.pt"
        write(state, path)
        self.corrupt.discard(path)
        older = [old for old in self.paths() if number_of(old) < step and old not in self.corrupt and seems_whole(old)]
        for old in older[self.keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def newest(
        self, on_corrupt: Callable[[Path, str], None], check: Callable[[Any], None] = lambda state: None
    ) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint; each newer one that is not goes to `on_corrupt`, with what is wrong with it.

        Args:
            check: CorruptCheckpoint for a file that is as it was written, but is no checkpoint of a run.
        """
        for path in self.paths():
            try:
                state = read(path)
                check(state)
                return path, state
            except CorruptCheckpoint as error:
                self.corrupt.add(path)
                on_corrupt(path, str(error))
        return None

    def _files(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []


def number_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def seems_whole(path: Path) -> bool:
    """Whether a file ends as a checkpoint does; nothing else of it is read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for somebody to write
            return False
        with open(path, "rb") as file:
            file.seek(-TRAILER, os.SEEK_END)
            return file.read(len(MARK)) == MARK
    except OSError:
        return False


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once all is written and on the disk. Where that fails, `path` is as before.

    The one way in which the loop writes a file whole: under another name, flushed, and renamed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write(state: Mapping[str, Any], path: Path) -> None:
    """Writes `state` to `path`, wholly or, with an OSError, not at all: an older file of that name is then kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as file:
            hashing = _HashingWriter(file)
            torch.save(state, cast(IO[bytes], hashing))
            file.write(MARK + hashing.hash.digest())
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer hides why it could not write
        raise


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU. CorruptCheckpoint if the file is not whole; nothing of it is loaded then."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptCheckpoint("it is not a regular file")
        digest, expected = digests(path)
    except OSError as error:
        raise CorruptCheckpoint(f"it cannot be read: {error.strerror or error}") from error
    if expected is None:
        raise CorruptCheckpoint("it is truncated: its end is missing")
    if digest != expected:
        raise CorruptCheckpoint("its checksum is wrong")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of bytes that torch.save has not written
        raise CorruptCheckpoint(f"it cannot be loaded: {error}") from error
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"it holds a {type(state).__name__}, not a dict")
    return state


def digests(path: Path) -> tuple[bytes, bytes | None]:
    """The SHA-256 of a file without its trailer, and the one in the trailer; None where there is no trailer."""
    sha, left = hashlib.sha256(), path.stat().st_size - TRAILER
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
        trailer = file.read(TRAILER)
    return sha.digest(), trailer[len(MARK) :] if trailer.startswith(MARK) and len(trailer) == TRAILER else None


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` outlast a power failure, where the system knows how."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashingWriter:
    """The part of a file that torch.save needs, which hashes what goes by."""

    def __init__(self, file: Any) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def plain(tree: Any, where: str = "the state") -> Any:
    """A tree of what `torch.load(weights_only=True)` takes: tensors, numbers, strings, None, dicts, lists, tuples.

    NumPy's numbers become Python's, any mapping a dict, a small view of a large tensor a tensor of its own, and a
    DTensor the whole tensor, on the CPU, for which all its processes must be here. TypeError that says where for
    anything else.
    """
    if is_dtensor(tree):
        return whole(tree.detach()).cpu()
    if isinstance(tree, Tensor):
        is_small_view = tree.layout == torch.strided and type(tree) in (Tensor, torch.nn.Parameter)
        is_small_view = is_small_view and tree.untyped_storage().nbytes() > 2 * tree.nbytes
        return tree.detach().clone() if is_small_view else tree.detach()
    if tree is None or isinstance(tree, bool | str | bytes):
        return tree
    if isinstance(tree, Integral):
        return int(tree)
    if isinstance(tree, Real):
        return float(tree)
    if isinstance(tree, Mapping):
        return {plain(key, where): plain(value, f"{where}[{key!r}]") for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(plain(value, f"{where}[{i}]") for i, value in enumerate(tree))
    if isinstance(tree, list):
        return [plain(value, f"{where}[{i}]") for i, value in enumerate(tree)]
    raise TypeError(f"{where} is a {type(tree).__name__}, which a checkpoint cannot hold")
