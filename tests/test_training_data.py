"""The order of the data: a function of seed and epoch, from any position, and divided among processes."""

import itertools

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from trainopt.training.data import source_of
from trainopt.training.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
ROWS = torch.arange(23)


def loader(**options):
    return DataLoader(TensorDataset(ROWS), **{"batch_size": 4, "shuffle": True, **options})


class Drawing:
    """Batches that draw from the global generator, without a length."""

    def __iter__(self):
        for _ in range(5):
            yield torch.rand(3)


MAKERS = {
    "tensors": lambda: source_of((ROWS,), 4, True, ALONE),
    "in order": lambda: source_of((ROWS,), 4, False, ALONE),
    "loader": lambda: source_of(loader(), None, True, ALONE),
    "generator": lambda: source_of(loader(generator=torch.Generator().manual_seed(5)), None, True, ALONE),
    "workers": lambda: source_of(loader(num_workers=2), None, True, ALONE),
    "single samples": lambda: source_of(loader(batch_size=None, shuffle=False), None, True, ALONE),
    "iterable": lambda: source_of(Drawing(), None, True, ALONE),
}


def gone_through(source, epoch=0, skip=0, seed=7):
    return [batch if isinstance(batch, torch.Tensor) else batch[0] for batch, _ in source.epoch(seed, epoch, skip)]


@pytest.mark.parametrize("kind", MAKERS)
def test_an_epoch_is_the_same_from_any_position_and_leaves_the_generators_alone(kind):
    source = MAKERS[kind]()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    start = [state.clone() for state in source.state()]
    whole = gone_through(source)
    assert torch.equal(torch.get_rng_state(), before)
    assert source.length in (None, len(whole))
    torch.manual_seed(99)
    for skip in (0, 1, len(whole) - 1, len(whole)):
        source.load(start)
        rest = gone_through(source, skip=skip)
        assert len(rest) == len(whole) - skip
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[skip:], strict=True))
    if kind not in ("iterable", "single samples"):
        assert sorted(torch.cat(whole).tolist()) == ROWS.tolist()
    if kind in ("tensors", "loader", "iterable", "workers"):
        assert not torch.equal(torch.cat(gone_through(source, epoch=1)), torch.cat(whole))
        assert not torch.equal(torch.cat(gone_through(source, seed=8)), torch.cat(whole))


def test_a_generator_of_the_person_decides_the_order_as_it_did():
    first = source_of(loader(generator=torch.Generator().manual_seed(5)), None, True, ALONE)
    second = source_of(loader(generator=torch.Generator().manual_seed(6)), None, True, ALONE)
    assert not torch.equal(torch.cat(gone_through(first)), torch.cat(gone_through(second)))


@pytest.mark.parametrize("kind", ["tensors", "in order", "loader"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_every_batch_and_leave_nothing_out(kind, world):
    def make(rank):
        processes = Processes(rank, world, torch.device("cpu"))
        return source_of(
            loader() if kind == "loader" else (ROWS,), None if kind == "loader" else 4, kind != "in order", processes
        )

    whole = gone_through(MAKERS[kind]())
    parts = [list(make(rank).epoch(7, 0, 0)) for rank in range(world)]
    for batch, *shares in zip(whole, *parts, strict=True):
        rows = itertools.chain(*(share.batch[0].tolist() for share in shares if share.counts))
        assert sorted(rows) == sorted(batch.tolist())
        assert all(len(share.batch[0]) >= 1 for share in shares)


def test_skipped_batches_are_not_loaded():
    loaded = []

    class Noting(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            loaded.append(index)
            return torch.tensor(index)

    source = source_of(DataLoader(Noting(), batch_size=3), None, True, ALONE)
    assert len(list(source.epoch(0, 0, 3))) == 1 and loaded == [9, 10, 11]


def test_endless_batch_samplers_are_iterated_lazily():
    class Endless(BatchSampler):
        def __iter__(self):
            while True:
                yield torch.randint(23, (4,)).tolist()

        def __len__(self):
            raise TypeError

    data = DataLoader(TensorDataset(ROWS), batch_sampler=Endless(RandomSampler(ROWS), 4, False))
    source = source_of(data, None, True, ALONE)
    assert source.length is None
    first = [batch[0] for batch, _ in itertools.islice(source.epoch(1, 0, 0), 6)]
    again = [batch[0] for batch, _ in itertools.islice(source.epoch(1, 0, 4), 2)]
    assert all(torch.equal(a, b) for a, b in zip(first[4:], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.uint16, torch.uint64])
def test_plain_tensors_of_any_type_and_layout_give_their_rows(dtype):
    numbers = torch.arange(23 * 4).reshape(23, 4)
    table, other = numbers.to(dtype), numbers.t().contiguous().t().to(dtype)
    tensors = (table, other, table[:, 1], table[:, ::2], torch.arange(23))
    for batch, _ in source_of(tensors, 5, True, ALONE).epoch(1, 0, 1):
        for part, tensor in zip(batch, tensors, strict=True):
            assert part.dtype == tensor.dtype and torch.equal(part, tensor[batch[-1]])


def test_plain_tensors_may_lie_on_different_devices():
    source = source_of((ROWS, torch.empty(23, 2, device="meta")), 4, True, ALONE)
    (rows, elsewhere), _ = next(source.epoch(0, 0, 0))
    assert len(rows) == 4 and elsewhere.is_meta and elsewhere.shape == (4, 2)
