"""Micro-batches in an order that is a function of (seed, epoch), from any position, each process its shard.

Three kinds of data give them: plain tensors, a DataLoader over a dataset with indices, and any other iterable. Nothing
here draws from the global random generators, so a run that starts in the middle of an epoch leaves them as a run that
came there by training.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from trainopt.training import random_state
from trainopt.training.distributed import Processes
from trainopt.training.random_state import derived


class MicroBatch(NamedTuple):
    """One batch as the data gave it. `counts` is False for one that only keeps a process with an empty share busy."""

    batch: Any
    counts: bool = True


class Source:
    """Data that can be iterated over from any position of any epoch."""

    length: int | None  # micro-batches in an epoch, where that is known

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[MicroBatch]:
        """The micro-batches of an epoch but the first `skip`."""
        raise NotImplementedError

    def state(self) -> list[Tensor]:
        """Beside seed, epoch and position: the state of the generators that the person gave, at the epoch's start."""
        return []

    def load(self, state: list[Tensor]) -> None:
        """Sets what `state` gave, before the epoch begins again."""

    def end_epoch(self) -> None:
        """From now on `state` is that at the next epoch's start."""


def source_of(
    data: Any,
    batch_size: int | str | None,
    shuffle: bool,
    processes: Processes,
    sharded: bool = False,
    name: str = "data",
) -> Source:
    """The source that suits the data; ValueError or TypeError, naming what is wrong, where none does."""
    source: Source
    if is_tensors(data):
        source = TensorSource(data, batch_size, shuffle, Shard() if sharded else Shard.of(processes), name)
    elif batch_size is not None:
        raise ValueError(
            f"batch_size is {batch_size!r}, but {name} is a {type(data).__name__}, which cuts its own batches"
        )
    elif not isinstance(data, Iterable):
        raise TypeError(
            f"{name} is a {type(data).__name__}: give a DataLoader, a tuple of tensors or an iterable of batches"
        )
    elif isinstance(data, Iterator):
        raise TypeError(
            f"{name} is a {type(data).__name__}, which can be gone through only once: give something that makes a new "
            "iterator for each epoch"
        )
    elif isinstance(data, DataLoader) and has_index_batches(data):
        is_own_part = sharded or isinstance(data.sampler, DistributedSampler)
        source = LoaderSource(data, Shard() if is_own_part else Shard.of(processes))
    elif processes.world > 1 and not sharded:
        raise ValueError(
            f"sharded is False, but {name}, a {type(data).__name__}, cannot be divided among {processes.world} "
            "processes: let it give each process its own part and say sharded=True"
        )
    else:
        source = IterableSource(data)
    if source.length == 0:
        hint = ""
        if isinstance(data, DataLoader):
            hint = f" (batch_size={data.batch_size}, drop_last={data.drop_last}, over {len(data.dataset)} samples)"  # type: ignore[arg-type]
        raise ValueError(f"{name} is empty: it gives no batch{hint}")
    return source


def is_tensors(data: Any) -> bool:
    """Whether data are plain tensors, a row a sample."""
    return isinstance(data, tuple | list) and bool(data) and all(isinstance(tensor, Tensor) for tensor in data)


class Shard(NamedTuple):
    """Which part of every micro-batch is this process's: each `world`-th sample from `rank` on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, processes: Processes) -> Shard:
        return cls(processes.rank, processes.world)

    def cut(self, indices: Any) -> tuple[Any, bool]:
        """This process's part of a batch of indices, and whether it counts: where there are too few for all, the first
        sample stands in for none."""
        if self.world == 1:
            return indices, True
        part = indices[self.rank :: self.world]
        return (part, True) if len(part) else (indices[:1], False)


class TensorSource(Source):
    """Tensors of equal length, cut into micro-batches of `batch_size` rows, in a new random order each epoch."""

    def __init__(
        self, tensors: Sequence[Tensor], batch_size: int | str | None, shuffle: bool, shard: Shard, name: str
    ) -> None:
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) > 1:
            raise ValueError(f"{name} has tensors of different lengths: {', '.join(map(str, lengths))}")
        self.samples = lengths[0]
        if self.samples == 0:
            raise ValueError(f"{name} is empty: its tensors have length 0")
        if batch_size is None:
            raise ValueError(f'batch_size is None, but {name} is plain tensors: give a number of samples, or "full"')
        self.size = self.samples if batch_size == "full" else int(batch_size)
        if self.size > self.samples:
            raise ValueError(
                f'batch_size is {self.size}, but {name} has only {self.samples} samples; "full" takes them all at once'
            )
        self.tensors, self.shuffle, self.shard = tuple(tensors), shuffle, shard
        self.device = tensors[0].device  # that the order is on
        self.take_rows = [row_taker(tensor, self.device) for tensor in tensors]
        self.length = -(-self.samples // self.size)

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[MicroBatch]:
        if skip * self.size >= self.samples:
            return
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived(seed, epoch))
            order = torch.randperm(self.samples, generator=generator).to(self.device)
        elif self.shard.world == 1:
            for start in range(skip * self.size, self.samples, self.size):
                yield MicroBatch(tuple(tensor[start : start + self.size] for tensor in self.tensors))
            return
        else:
            order = torch.arange(self.samples, device=self.device)
        for indices in order[skip * self.size :].split(self.size):
            rows, counts = self.shard.cut(indices)
            yield MicroBatch(tuple([take(rows) for take in self.take_rows]), counts)


def row_taker(tensor: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What gives rows of a tensor by their indices on `device`: as fast as they can be copied, where that is known."""
    if tensor.ndim > 1 and tensor.device == device:
        return functools.partial(tensor.index_select, 0)
    return tensor.__getitem__


class _IndexBatches:
    """The batch sampler of a DataLoader whose batches are decided anew before each epoch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def has_index_batches(loader: DataLoader[Any]) -> bool:
    """Whether a loader's batches are lists of indices, finitely many, so that they can be divided and left out."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return False
    try:
        len(loader)
    except TypeError:
        return False
    return True


class LoaderSource(Source):
    """A person's DataLoader: its dataset, sampler and collation; each batch of indices is divided among the processes.

    Its batch is the batch of all processes together. Without workers, batches before the position are not loaded;
    workers load them again, so that what the dataset draws in them goes on as it was.
    """

    def __init__(self, loader: DataLoader[Any], shard: Shard) -> None:
        self.shard, self.given = shard, loader
        self.length = len(loader)
        self.indices = _IndexBatches()
        self.loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=self.indices,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            in_order=loader.in_order,
        )
        owners = (loader, loader.sampler, loader.batch_sampler)
        generators = [getattr(owner, "generator", None) for owner in owners]
        self.generators = list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())
        self.at_start = self.state_now()

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[MicroBatch]:
        self.at_start = self.state_now()
        for sampler in (self.given.sampler, self.given.batch_sampler):
            if (set_epoch := getattr(sampler, "set_epoch", None)) is not None:
                set_epoch(epoch)
        with random_state.preserved(derived(seed, epoch)):
            cuts = [self.shard.cut(batch) for batch in self.given.batch_sampler or ()]
            if self.loader.num_workers == 0:
                cuts, skip = cuts[skip:], 0
            self.indices.batches = [indices for indices, _ in cuts]
            batches = iter(self.loader)
        for batch, (_, counts) in itertools.islice(zip(batches, cuts, strict=True), skip, None):
            yield MicroBatch(batch, counts)

    def state_now(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def state(self) -> list[Tensor]:
        return self.at_start

    def load(self, state: list[Tensor]) -> None:
        for generator, saved in zip(self.generators, state, strict=True):
            generator.set_state(saved)
        self.at_start = self.state_now()  # also where a checkpoint is written before the epoch begins again

    def end_epoch(self) -> None:
        self.at_start = self.state_now()


class IterableSource(Source):
    """Any iterable of batches. Those before the position are drawn and dropped.

    Whatever it draws from the global generators comes from a stream of its own, seeded anew each epoch.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable
        try:
            self.length = len(iterable)  # type: ignore[arg-type]
        except TypeError:
            self.length = None

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[MicroBatch]:
        with random_state.preserved(derived(seed, epoch)):
            batches = iter(self.iterable)
            stream = random_state.capture()
        for index in itertools.count():
            with random_state.preserved():
                random_state.restore(stream)
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                stream = random_state.capture()
            if index >= skip:
                yield MicroBatch(batch)


def move(tree: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`.

    What knows itself how to be moved (Hugging Face's BatchEncoding, a PackedSequence) does it; mappings, lists and
    tuples are moved element by element and keep their types; everything else is left.
    """
    if isinstance(tree, Tensor):
        return tree.to(device, non_blocking=True)
    if not isinstance(tree, type) and callable(getattr(tree, "to", None)):
        return tree.to(device)
    if isinstance(tree, Mapping):
        moved = {key: move(value, device) for key, value in tree.items()}
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return moved
        same = copy.copy(tree)
        for key, value in moved.items():
            same[key] = value
        return same
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(move(value, device) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(move(value, device) for value in tree)
    return tree


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples, of dataclasses, and of objects with a `.loss`, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)
    elif is_dataclass(tree) or isinstance(getattr(tree, "loss", None), Tensor):
        for value in vars(tree).values() if hasattr(tree, "__dict__") else ():
            yield from tensors_in(value)
