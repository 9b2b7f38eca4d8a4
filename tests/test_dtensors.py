"""DTensors: FSDP2, tensor parallelism and tensors distributed by hand take the engine's path on their local tensors.

Two processes run all of `CASES` in one go, against the same steps in one process in float64.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from dtensors import (
    OPTIMIZERS,
    PLACEMENTS,
    SHAPES,
    check_same,
    main,
    network,
    outcomes_of,
    random,
    registering,
    spread,
    steps_of_both,
    train,
    whole,
)
from helpers import OPTIONS, assert_equal, attempt, paths
from judge import TABLE, bits
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import trainopt
from trainopt._extension import _C

CASES = {}
case = registering(CASES)

SUMMING = [name for name, cls in OPTIMIZERS.items() if _C.rules()[cls._rule].sums]

EXTRAS = {
    "plain": {},
    "noise": {"noise": 0.1, "seed": 5},
    "l1": {"l1": 0.01},
    "maximize": {"maximize": True},
    "proximal": {"l1": 0.1, "l1_proximal": True, "noise": 0.01},
    "tail": {"max_grad_norm": 0.05, "ema_decay": 0.5, "zero_grad": "in_step"},
}


# Models ---------------------------------------------------------------------------------------------------------------


@case(*((name, extra) for name in OPTIMIZERS for extra in EXTRAS))
def fsdp(mesh, name, extra):
    from torch.distributed.fsdp import fully_shard

    options = {**OPTIONS[name], **EXTRAS[extra]}
    model, alone = network(), network()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, truth = (OPTIMIZERS[name](m.parameters(), **options) for m in (model, alone))
    train(model, optimizer, slice(dist.get_rank(), None, 2))
    train(alone, truth)
    check_same(optimizer, truth)
    assert paths(optimizer) == ["fused"] * 6


@case({}, {"normuon_beta2": 0.9})
def muon(mesh, options):
    """Matrices that are sharded are orthogonalised as a whole; AdamW's parameters are shards like any other."""
    from torch.distributed.fsdp import fully_shard

    model, alone = network(), network()
    fully_shard(model, mesh=mesh)
    optimizer, truth = (trainopt.Muon(trainopt.muon_groups(m), lr=0.02, **options) for m in (model, alone))
    train(model, optimizer, slice(dist.get_rank(), None, 2))
    train(alone, truth)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_equal(whole(p.detach()), q.detach(), "a parameter", rtol=1e-9, atol=1e-9)
    assert paths(optimizer.adamw) == ["fused"] * 4
    with pytest.raises(ValueError, match="split=7 is for ordinary tensors"):
        trainopt.Muon([{"params": [model[0].weight], "split": 7}])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


@case(*OPTIMIZERS)
def tensor_parallel(mesh, name):
    """The gradients of SequenceParallel's norms are sums that are still to be taken: torch takes them in its step."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Block().double())
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(models[0], mesh, plan)
    optimizers = [OPTIMIZERS[name](model.parameters(), **OPTIONS[name]) for model in models]
    for step in range(3):
        x = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer, rows in zip(models, optimizers, (x.chunk(2, 1)[dist.get_rank()], x), strict=True):
            optimizer.zero_grad()
            out = model(rows)
            (out.full_tensor() if isinstance(out, DTensor) else out).square().sum().backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_equal(whole(p.detach()), q)
    others = "fused" if TABLE[name].in_common is None else "torch"  # what has numbers in common goes one way
    assert paths(optimizers[0]) == ["torch", "torch", *[others] * 4]


# By hand --------------------------------------------------------------------------------------------------------------


@case(*((name, where, extra) for name in OPTIMIZERS for where in PLACEMENTS for extra in ("plain", "noise", "tail")))
def distributed_by_hand(mesh, name, where, extra):
    *_, optimizers = steps_of_both(mesh, name, PLACEMENTS[where], **EXTRAS[extra])
    check_same(*optimizers)
    assert set(paths(optimizers[0])) == {"fused"}


@case(*OPTIMIZERS)
def plain_tensors_in_the_same_group(mesh, name):
    whole_and_missing = {"is_whole": lambda i: i % 2 == 0, "is_missing": lambda step, i: step == i}
    *_, optimizers = steps_of_both(mesh, name, Shard(0), [(4, 3)] * 4, **whole_and_missing)
    check_same(*optimizers)
    assert set(paths(optimizers[0])) == {"fused"}


@case(*((name, dim) for name in OPTIMIZERS if TABLE[name].factors for dim in range(-1, 4)))
def stacks_of_matrices(mesh, name, dim):
    """Their last two dimensions are the matrices; -1 stands for replicas."""
    shapes = [(1, 5, 4, 6), (1, 1, 3, 1)]
    if dim != 1:
        shapes += [(3, 1, 4, 6), (2, 3, 130, 5)]
    *_, optimizers = steps_of_both(mesh, name, Replicate() if dim < 0 else Shard(dim), shapes)
    check_same(*optimizers)
    assert set(paths(optimizers[0])) == {"fused"}


@case(*(name for name in OPTIMIZERS if TABLE[name].factors))
def matrices_that_do_not_lie_beside_each_other(mesh, name):
    """Plain torch steps them."""
    for matrices in (4, 1):  # of one, a process has none
        p = nn.Parameter(spread(mesh, random((2, matrices, 3, 3), 1), Shard(1)))
        assert "block of rows and columns" in trainopt.explain(OPTIMIZERS[name]([p]))[0].reason
    *_, optimizers = steps_of_both(mesh, name, Shard(1), [(2, 4, 3, 5), (3, 6, 2, 2)])
    check_same(*optimizers)
    assert set(paths(optimizers[0])) == {"torch"}


@case(*((n, where, dtype) for n in SUMMING for where in PLACEMENTS for dtype in ("float32", "float64", "bfloat16")))
def sums_do_not_depend_on_shards(mesh, name, where, dtype):
    """A step that depends on the whole tensor's norms has the same bits whoever holds which part of it; of sums over
    rows and columns, which are plain doubles, float64 parameters see the last digits."""
    is_close = TABLE[name].factors and dtype == "float64"
    for optimizers in steps_of_both(mesh, name, PLACEMENTS[where], dtype=getattr(torch, dtype)):
        for p, q in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
            if is_close:
                assert_equal(whole(p.detach()), q, str(tuple(p.shape)), rtol=1e-14, atol=1e-14)
            else:
                assert torch.equal(bits(whole(p.detach())), bits(q)), tuple(p.shape)
    assert set(paths(optimizers[0])) == {"fused"}


@case(*PLACEMENTS)
def noise_to_the_bit(mesh, where):
    """An element's noise is that of its place in the whole."""
    for dtype in (torch.float32, torch.float64):
        params = [nn.Parameter(spread(mesh, torch.zeros(shape, dtype=dtype), PLACEMENTS[where])) for shape in SHAPES]
        optimizer = trainopt.SGD(params, lr=0.0, noise=1.0, seed=9)
        for p in params:
            p.grad = torch.ones_like(p)  # zeros would only ask for states
        optimizer.step()
        for i, p in enumerate(params):
            expected = torch.empty(p.shape)
            _C.gaussian_(expected, 9, 1, i)
            assert torch.equal(whole(p.detach()), expected.to(dtype)), SHAPES[i]


def check_alike(name, sides, gradient_of, what, **options):
    """A tensor in parts and the same one whole end alike after three steps with the gradients of (parameter, step)."""
    results = []
    for start in sides:
        p = nn.Parameter(start)
        optimizer = OPTIMIZERS[name]([p], **OPTIONS[name], **options)
        for step in range(3):
            p.grad = gradient_of(p, step)
            optimizer.step()
        results.append(whole(p.detach()))
    assert_equal(*results, what)


on_torchs_path = case(*(name for name in OPTIMIZERS if TABLE[name].takes_shards or TABLE[name].factors))


@on_torchs_path
def two_dimensions_of_processes(mesh, name):
    """A mesh of one row: sharded over its columns, or replicated over them."""
    grid = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Replicate()], [Shard(0), Shard(0)]):

        def gradient_of(p, step, placements=placements):
            gradient = random((5, 6), step)
            return distribute_tensor(gradient, grid, placements) if isinstance(p, DTensor) else gradient

        start = random((5, 6), 1)
        sides = distribute_tensor(start, grid, placements), start.clone()
        check_alike(name, sides, gradient_of, str(placements), noise=0.1)


@on_torchs_path
def gradients_of_other_placements(mesh, name):
    """torch's own operators bring them together; a sum that is still to be taken is taken."""
    for placement, processes in ((Replicate(), 1), (Partial(), 2)):

        def gradient_of(p, step, placement=placement, processes=processes):
            gradient = random((4, 3), step)
            return DTensor.from_local(gradient / processes, mesh, [placement]) if isinstance(p, DTensor) else gradient

        start = random((4, 3), 1)
        check_alike(name, (spread(mesh, start, Shard(0)), start), gradient_of, str(placement))


def given(mesh, gradient, placement):
    """A gradient that the processes hold in this way: of a sum, the first a third and the second the rest."""
    if not isinstance(placement, Partial):
        return spread(mesh, gradient, placement)
    share = (dist.get_rank() + 1) / 3
    return DTensor.from_local((gradient * share).to(gradient.dtype), mesh, [placement], run_check=False)


SPREAD_OTHERWISE = ((Replicate(), Shard(0)), (Replicate(), Partial()), (Shard(0), Shard(1)), (Shard(0), Partial()))


@case(*((name, precision) for name in ("SGD", "AdamW", "LAMB") for precision in ("master", "master24", "stochastic")))
def gradients_of_other_placements_in_two_parts(mesh, name, precision):
    """DTensor's own operators on bits made 1e34 of the parameters."""
    for placement, of_gradient in SPREAD_OTHERWISE:
        start = random((4, 6), 1).bfloat16()
        sides = [nn.Parameter(spread(mesh, start, placement)), nn.Parameter(start)]
        optimizers = [OPTIMIZERS[name]([p], **OPTIONS[name], precision=precision) for p in sides]
        for step in range(3):
            gradient = 3 * (random((4, 6), step) * 4).round().bfloat16()  # a sum of thirds is exact
            sides[0].grad, sides[1].grad = given(mesh, gradient, of_gradient), gradient
            for optimizer in optimizers:
                optimizer.step()
        assert_equal(whole(sides[0].detach()), sides[1].detach(), f"{placement}, {of_gradient}", rtol=0.01, atol=0.01)
        values = [trainopt.optim.precision.value_of(p, o.state[p]) for p, o in zip(sides, optimizers, strict=True)]
        if precision != "stochastic":
            assert_equal(whole(values[0]), values[1], f"{placement}, {of_gradient}", rtol=1e-4, atol=1e-4)


@case("AdamW", "SGD", "Adafactor")
def gradients_of_other_placements_that_are_not_finite(mesh, name):
    """All processes leave the step out, also where one alone has the infinity, or none has and the sum is infinite."""
    for placement, of_gradient in SPREAD_OTHERWISE:
        for value in (float("inf"), *[3e38] * isinstance(of_gradient, Partial)):
            p = nn.Parameter(spread(mesh, torch.ones(4, 6), placement))
            optimizer = OPTIMIZERS[name]([p], **OPTIONS[name], skip_nonfinite=True)
            p.grad = given(mesh, torch.ones(4, 6), of_gradient)
            optimizer.step()
            assert not optimizer.last_step_skipped
            before = whole(p.detach()).clone()
            if value < float("inf") or dist.get_rank() == 1:
                p.grad.to_local()[-1, -1] = value
            optimizer.step()
            assert optimizer.last_step_skipped and torch.equal(whole(p.detach()), before), (placement, of_gradient)


@case(())
def a_first_step_of_rate_0_whose_gradient_is_0_on_one_process(mesh):
    """It is no step that only asks for states, on any of them."""
    for placement, of_gradient in ((Replicate(), Partial()), (Replicate(), Shard(0)), (Shard(0), Partial())):
        p = nn.Parameter(spread(mesh, torch.ones(4, 6), placement))
        optimizer = trainopt.AdamW([p], lr=0.0)
        p.grad = given(mesh, torch.ones(4, 6), of_gradient)
        p.grad.to_local().mul_(dist.get_rank())
        optimizer.step()
        assert optimizer.completed_steps == 1 and optimizer.state[p]["step"] == 1


@case({}, {"flatten": True}, {"normuon_beta2": 0.9})
def matrices_of_muons_of_other_kinds(mesh, options):
    """Ordinary tensors and DTensors in one group; a cut dimension of one; gradients that are spread otherwise."""
    shapes = [(6, 4), (6, 4), (1, 4), (4, 1), (7, 5)] + [(5, 3, 3, 3), (4, 2, 3)] * ("flatten" in options)
    for placement, of_gradient in ((Shard(0), Shard(0)), (Shard(1), Shard(1)), *SPREAD_OTHERWISE):
        start = [random(shape, i) for i, shape in enumerate(shapes)]
        params = [nn.Parameter(p.clone() if i == 1 else spread(mesh, p, placement)) for i, p in enumerate(start)]
        others = list(map(nn.Parameter, start))
        optimizers = [trainopt.Muon(side, lr=0.02, **options) for side in (params, others)]
        for step in range(2):
            for i, (p, q) in enumerate(zip(params, others, strict=True)):
                q.grad = random(shapes[i], 10 * step + i)
                p.grad = q.grad.clone() if i == 1 else given(mesh, q.grad, of_gradient)
            for optimizer in optimizers:
                optimizer.step()
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert_equal(whole(p.detach()), q.detach(), f"{i}: {placement}, {of_gradient}", rtol=1e-9, atol=1e-9)


@case(*OPTIMIZERS)
def a_partial_parameter_is_refused_by_all(mesh, name):
    params = [nn.Parameter(spread(mesh, torch.ones(4, 3), Shard(0)))]
    params.append(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]).detach().requires_grad_())
    optimizer = OPTIMIZERS[name](params, **OPTIONS[name])
    for p in params:
        p.grad = torch.ones_like(p)
    error = attempt(optimizer.step)
    assert error[0] is RuntimeError and "parameter 1" in error[1] and "redistribute" in error[1]
    assert all((p.to_local() == 1).all() for p in params)
    assert any(optimizer.state.values()) == TABLE[name].eager_states
    assert "partial" in trainopt.explain(optimizer)[1].reason


@case(*OPTIMIZERS)
def a_gradient_scale(mesh, name):
    results = []
    for distributed in (True, False):
        start = random((5, 3), 1)
        p = nn.Parameter(spread(mesh, start, Shard(0)) if distributed else start)
        optimizer = OPTIMIZERS[name]([p], **OPTIONS[name])
        optimizer.grad_scale = torch.tensor(8.0)
        for step in range(3):
            gradient = random((5, 3), step) * 8
            p.grad = spread(mesh, gradient, Shard(0)) if distributed else gradient
            version = p.grad._version
            optimizer.step()
            assert p.grad._version == version + 1
            assert_equal(whole(p.grad), random((5, 3), step))
        results.append(whole(p.detach()))
    assert_equal(*results)


@case(*SUMMING)
def one_collective_for_each_dimension_of_a_mesh(mesh, name):
    """For all tensors together, in a step that looks at everything and in those that repeat it; none for replicas. One
    more for the sums over rows and columns."""
    grid = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    cases = [
        (1, [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Shard(0), Replicate()], [Replicate(), Shard(0)]]),
        (0, [[Replicate(), Replicate()], [Shard(0), Replicate()]]),
    ]
    originals, called = (dist.all_reduce, dist.all_gather_into_tensor), []

    def counted(original):
        def call(*args):
            called.append((original.__name__, dist.get_process_group_ranks(args[2])))
            return original(*args)

        return call

    of_step = [*["all_reduce"] * bool(TABLE[name].factors), "all_gather_into_tensor"]
    dist.all_reduce, dist.all_gather_into_tensor = map(counted, originals)
    try:
        for calls, placements in cases:
            spread_out = [distribute_tensor(random((4, 6), i), grid, placements[i % len(placements)]) for i in range(9)]
            params = [nn.Parameter(p) for p in (*spread_out, random((3,), 9))]
            optimizer = OPTIMIZERS[name](params, **OPTIONS[name])
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                called.clear()
                optimizer.step()
                assert called == [(collective, [0, 1]) for collective in of_step] * calls
    finally:
        dist.all_reduce, dist.all_gather_into_tensor = originals


@case(*((name, key) for name in ("SGD", *SUMMING) for key in ("cautious", "stats")))
def fsdp_of_tensor_parallelism(mesh, name, key):
    """torch's placement for what both cut is no Shard."""
    from torch.distributed.tensor.placement_types import _StridedShard

    grid = dist.device_mesh.init_device_mesh("cpu", (2, 1))

    def shard_of(tensor):
        own = tensor.chunk(2)[dist.get_rank()].clone()
        placements = [_StridedShard(0, split_factor=1), Shard(0)]
        return DTensor.from_local(own, grid, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())

    start = random((16, 8), 0)
    params = [nn.Parameter(shard_of(start)), nn.Parameter(start)]
    optimizers = [OPTIMIZERS[name]([p], **OPTIONS[name], **{key: True}) for p in params]
    for step in range(3):
        gradient = random((16, 8), 1 + step)
        params[0].grad, params[1].grad = shard_of(gradient), gradient
        for optimizer in optimizers:
            optimizer.step()
        if key == "stats":
            found, truth = (optimizer.stats()[0] for optimizer in optimizers)
            assert found == pytest.approx(truth, rel=1e-12)
    assert_equal(whole(params[0].detach()), params[1].detach(), rtol=1e-12, atol=1e-12)


@case(*(name for name, cls in OPTIMIZERS.items() if not cls._sums_over_all))  # of which each process would have its own
def a_mesh_without_this_process(mesh, name):
    meshes = [dist.device_mesh.DeviceMesh("cpu", ranks) for ranks in ([0], [1], [0, 1])]
    options = {**OPTIONS[name], "noise": 0.1, "stats": True}
    params = [nn.Parameter(spread(where, random((5, 3), i), Shard(0))) for i, where in enumerate(meshes)]
    alone = [nn.Parameter(random((5, 3), i)) for i in range(len(meshes))]
    optimizers = [OPTIMIZERS[name](given, **options) for given in (params, alone)]
    for step in range(3):
        for i, (p, q, where) in enumerate(zip(params, alone, meshes, strict=True)):
            p.grad, q.grad = spread(where, random((5, 3), 10 * step + i), Shard(0)), random((5, 3), 10 * step + i)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        if p.device_mesh.get_coordinate() is not None:
            assert_equal(whole(p.detach()), q.detach())
    assert set(paths(optimizers[0])) == {"fused"}


@case("float16", "bfloat16", "float64", "complex64")
def the_norm_that_clips(mesh, dtype):
    """In more than 16 bits, and over meshes of several kinds."""
    grid = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    gradient = (2000 * torch.ones(4096)).to(getattr(torch, dtype))
    for where in ((mesh,), (mesh, grid)):
        given = [gradient.clone() for _ in where]
        placements = [[Shard(0)] if each is mesh else [Replicate(), Shard(0)] for each in where]
        sides = []
        for tensors in (given, list(map(distribute_tensor, given, where, placements))):
            params = [nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors]
            for p, g in zip(params, tensors, strict=True):
                p.grad = g.clone()
            optimizer = trainopt.SGD(params, lr=1.0, max_grad_norm=6.4, skip_nonfinite=True)
            optimizer.step()
            sides.append((optimizer.grad_norm, *(whole(p.detach()) for p in params)))
            assert not optimizer.last_step_skipped
        assert all(map(torch.equal, *sides)), sides


# In two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(__file__, tmp_path_factory.mktemp("dtensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, outcomes):
    assert [found[name] for found in outcomes] == [None, None]


if __name__ == "__main__":
    main(CASES, *sys.argv[1:])
