"""A step on the device has the numbers of the CPU engine: to the bit where the host prepares the scalars, and within
two roundings where the device does; every option, dtype, size, alignment, layout and number of tensors."""

import math

import judge
import pytest
import torch
import torch.distributed as dist
from judge import DTYPES
from ranks import mesh_of_one
from steps import SHAPES, TABLE, assert_near, assert_same_bits, counts_on_device, here, on_device, outcome_on
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

import trainopt
from trainopt._extension import _C
from trainopt.optim import distributed, states

CASES = [
    pytest.param(row, {**options, **extra}, id=f"{name}-{what}")
    for name, row in TABLE.items()
    for what, options, extra in (
        *((what, options, {}) for what, options in row.settings.items() if what not in row.changes_nothing),
        *((f"{what} (extra)", options, {}) for what, options in row.extras.items()),
        ("noise", row.usual, {"noise": 0.1, "seed": 7}),
    )
]
each_row = pytest.mark.parametrize("name", TABLE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def problem(shapes=SHAPES, dtype=torch.float32, steps=3):
    return judge.random_problem(shapes, dtype, steps)


@each_dtype
@pytest.mark.parametrize(("row", "options"), CASES)
def test_every_option_has_the_cpus_bits(device, row, options, dtype):
    work = problem(dtype=dtype)
    assert_same_bits(outcome_on(device, row.make, work, **options), judge.result_of(row.make, *work, **options))


@pytest.mark.parametrize(("row", "options"), CASES)
def test_every_option_where_the_device_knows_alone(device, row, options):
    """Step counts, learning rate and betas on the device."""
    counting = counts_on_device(next(name for name in TABLE if TABLE[name] is row))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        work = problem(dtype=dtype)
        there = outcome_on(device, row.make, work, **{**on_device(options, device), **counting})
        assert_near(there, judge.result_of(row.make, *work, **options))


@each_dtype
@each_row
def test_no_further_from_float64_than_torchs_loop(device, name, dtype):
    row, work = TABLE[name], problem(((300,), (2500,)), dtype, 7)
    truth = judge.result_of(row.make_plain_loop, *work, dtype=torch.float64, **row.usual)
    peer = judge.result_of(row.make_plain_loop, *work, **row.usual)
    for extra in ({}, counts_on_device(name)):
        found = outcome_on(device, row.make, work, **row.usual, **extra)
        judge.assert_no_worse(found, peer, truth, dtype, in_common=row.in_common is not None)


@each_row
def test_gradients_and_states_of_other_dtypes(device, name):
    row = TABLE[name]
    kinds = [(p, g) for p in (torch.float32, torch.bfloat16, torch.float16) for g in (torch.float32, torch.bfloat16)]
    results = []
    for where in ("cpu", device):
        start, gradients = problem(((300,),) * len(kinds), steps=1)
        params = [torch.nn.Parameter(t.to(where, p)) for t, (p, _) in zip(start, kinds, strict=True)]
        optimizer = row.make(params, **row.everything)
        for step in range(2):
            for p, g, (_, dtype) in zip(params, gradients[0], kinds, strict=True):
                p.grad_dtype = None
                p.grad = g.to(where, dtype)
            optimizer.step()
            for p in params if step == 0 else ():  # as a state dict with a dtype of its own leaves them
                for key in row.states:
                    if torch.is_tensor(optimizer.state[p].get(key)):
                        optimizer.state[p][key] = optimizer.state[p][key].to(torch.bfloat16)
        assert all(path.path.startswith("fused") for path in trainopt.explain(optimizer))
        results.append(here(judge.outcome(optimizer, params)))
    assert_same_bits(results[1], results[0])


def place(tensor: torch.Tensor, device: str, offset: int) -> torch.Tensor:
    """The tensor on the device, `offset` elements behind an aligned address."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    return room[offset:].copy_(tensor.reshape(-1)).view(tensor.shape)


@pytest.mark.parametrize("role", ["parameter", "gradient", "state"])
@each_row
def test_an_unaligned_or_empty_tensor_at_every_place_in_the_list(device, name, role):
    row, sizes = TABLE[name], (40, 300, 9, 2100)
    start, gradients = problem([(n,) for n in sizes], steps=2)
    for at in range(len(sizes) + 1):
        for empty in (None, at):
            work_start, work_gradients = list(start), [list(now) for now in gradients]
            if empty is not None:
                for tensors in (work_start, *work_gradients):
                    tensors.insert(at, torch.empty(0))
            offsets = [int(i == at) for i in range(len(work_start))]
            params = [
                torch.nn.Parameter(place(t, device, offset if role == "parameter" else 0))
                for t, offset in zip(work_start, offsets, strict=True)
            ]
            optimizer = row.make(params, **row.everything)
            for now in work_gradients:
                for p, g, offset in zip(params, now, offsets, strict=True):
                    p.grad = place(g, device, offset if role == "gradient" else 0)
                optimizer.step()
                if role == "state" and at < len(params):
                    state = optimizer.state[params[at]]
                    for key in state.keys() & row.states:
                        state[key] = place(state[key], device, 1)
            assert_same_bits(
                here(judge.outcome(optimizer, params)),
                judge.result_of(row.make, work_start, work_gradients, **row.everything),
            )


@each_row
def test_layouts(device, name):
    row = TABLE[name]
    start, gradients = problem(((4, 6, 5, 3), (30, 17), (4, 6, 5, 3)), steps=3)

    def laid_out(where):
        params = [torch.nn.Parameter(t.to(where, copy=True)) for t in start]
        params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        params[1].data = params[1].data.t().contiguous().t()
        optimizer = row.make(params, **row.everything)
        for now in gradients:
            params[0].grad = now[0].to(where)
            params[1].grad = now[1].to(where)
            params[2].grad = now[2].to(where).contiguous(memory_format=torch.channels_last)
            optimizer.step()
        params[0].grad = now[0].to(where)[:, :1].expand(4, 6, 5, 3)
        optimizer.step()
        assert all(path.path.startswith("fused") for path in trainopt.explain(optimizer))
        return here(judge.outcome(optimizer, params))

    assert_same_bits(laid_out(device), laid_out("cpu"))


@each_row
def test_more_tensors_than_fit_in_a_launch(device, name):
    row, work = TABLE[name], problem(((3,), (17,)) * 350, steps=2)
    for extra in ({}, counts_on_device(name)):
        there = outcome_on(device, row.make, work, **row.everything, **extra)
        assert_near(there, judge.result_of(row.make, *work, **row.everything))


@each_row
def test_few_tensors_take_one_launch(device, name):
    if device != "simt":
        pytest.skip("the emulated device counts launches")
    row = TABLE[name]
    start, gradients = problem(((3,), (20000,), (17,)), steps=2)
    params = [torch.nn.Parameter(t.to(device)) for t in start]
    optimizer = row.make(params, **row.everything)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(device)
        _C.simt.take_launches()
        optimizer.step()
        chunks = 4  # of 16,384 elements
        # Before the update: numbers that lie there are moved on; sums of chunks, one block a tensor that combines them,
        # one that adds those up where they are over all, and what follows from them.
        of_all = [1] if row.in_common is not None else []
        before = ([1] if row.ours._beside else []) + ([chunks, 3, *of_all, 1] if row.has_sums else [])
        assert _C.simt.take_launches() == [*before, chunks]


@each_row
def test_the_order_of_threads_does_not_matter(device, name):
    if device != "simt":
        pytest.skip("the emulated device chooses the order")
    row, work = TABLE[name], problem()
    ascending = outcome_on(device, row.make, work, **row.everything)
    _C.simt.set_order(ascending=False)
    assert_same_bits(outcome_on(device, row.make, work, **row.everything), ascending)


@pytest.mark.gpu
@pytest.mark.slow
@each_row
def test_large_tensors(device, name):
    row = TABLE[name]
    for shapes in (((2**24 + 3,), (5000, 3001)), ((1000,),) * 3000):
        work = problem(shapes, steps=2)
        assert_same_bits(
            outcome_on(device, row.make, work, **row.everything), judge.result_of(row.make, *work, **row.everything)
        )


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device):
    size = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 3 * 2 * size:
        pytest.skip("needs 13 GB of free memory on the device")
    param = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=device))
    param.grad = torch.ones_like(param)
    trainopt.SGD([param], lr=0.5).step()
    assert param.detach().eq(0.5).all()


def test_explain_says_so(device):
    params = [torch.nn.Parameter(torch.ones(3, device=where)) for where in (device, "cpu")]
    paths = [row.path for row in trainopt.explain(trainopt.SGD(params))]
    assert paths == [f"fused ({device})", f"fused (cpu, {_C.cpu_variant()})"]


@each_row
def test_noise_goes_on_after_the_largest_count_of_float32(device, name):
    """Wherever the steps are counted."""
    late = 2**24
    for counting in ({}, counts_on_device(name)):
        param = torch.nn.Parameter(torch.zeros(300, device=device))
        optimizer = TABLE[name].make([param], **TABLE[name].still, noise=1.0, seed=5, **counting)
        param.grad = torch.ones(300, device=device)
        optimizer.step()
        optimizer.state[param]["step"].fill_(late)
        for i in (1, 2):
            param.data.zero_()
            optimizer.step()
            expected = torch.empty(300)
            _C.gaussian_(expected, 5, late + i, 0)
            assert torch.equal(param.detach().cpu(), expected)


@pytest.fixture
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.has_sums])
def test_sums_over_shards(device, name, mesh, monkeypatch):
    """As if another process held the other half of each tensor, with the same elements: half a step of the whole."""
    row, called = TABLE[name], []

    class Half:
        """A mesh of two, of which this process is one."""

        def get_coordinate(self):
            return [0]

        def size(self, dim):
            return 2

        def get_group(self, dim):
            return "the group"

    def gather(output, own, group):
        called.append(("gather", group, own.device.type))
        output.copy_(torch.cat((own, own)))

    def reduce(own, op, group):
        called.append(("reduce", group, own.device.type))
        for rows, columns in filter(math.prod, shapes):
            of_rows, of_columns, own = own.split((2 * rows, columns, len(own) - 2 * rows - columns))
            of_rows[rows:] = of_rows[:rows]
            of_columns *= 2

    half = Half()
    monkeypatch.setattr(
        distributed,
        "describe",
        lambda spec: (
            (half, spec.placements),
            False,
            False,
            () if spec.placements == (Replicate(),) else (0,),
            tuple(spec.shape),
            (0,) * len(spec.shape),
        ),
    )
    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    shapes = ((9, 5), (0, 3), (700, 30))
    start, gradients = judge.random_problem(shapes, torch.float32, 3)

    def dtensor(local, rows, placement):
        shape = torch.Size((rows, local.shape[1]))
        meta = TensorMeta(shape, (shape[1], 1), local.dtype)
        return DTensor(local.to(device), DTensorSpec(mesh, (placement,), tensor_meta=meta), requires_grad=False)

    def shard(tensor):
        return dtensor(tensor, 2 * len(tensor), Shard(0))

    def replica(p, sizes):
        """torch would bring it to the mesh, which is the host's."""
        made = torch.empty(sizes, device=device)
        return dtensor(made, sizes[0], Replicate()) if isinstance(p, DTensor) else made

    monkeypatch.setattr(states, "replica", replica)
    params = [torch.nn.Parameter(shard(p)) for p in start]
    alone = [torch.nn.Parameter(torch.cat((p, p)).to(device)) for p in start]
    optimizers = [row.make(given, **row.usual) for given in (params, alone)]
    for now in gradients:
        for p, q, g in zip(params, alone, now, strict=True):
            p.grad, q.grad = shard(g), torch.cat((g, g)).to(device)
        called.clear()
        for optimizer in optimizers:
            optimizer.step()
        collectives = [*["reduce"] * bool(row.factors), "gather"]
        assert called == [(collective, "the group", device) for collective in collectives]
    for p, q in zip(params, alone, strict=True):
        judge.assert_same_bits({"param": [p.detach().to_local().cpu()]}, {"param": [q.detach()[: len(q) // 2].cpu()]})
