"""DTensors: FSDP2, tensor parallelism and tensors distributed by hand take the engine's path on their local tensors.

Two processes run all of `CASES` in one go, against the same steps in one process in float64.
"""

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from helpers import CLASSES, OPTIONS, assert_equal, attempt, each_class
from judge import TABLE, bits
from ranks import mesh_of_one
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import trainopt
from trainopt._extension import _C

OPTIMIZERS = {name: row.ours for name, row in TABLE.items()}
CASES = {}


def skip_unless_shards_are_taken(name):
    if not TABLE[name].takes_shards:
        pytest.skip(f"torch's {name} refuses shards")


def case(*options):
    """Makes a function a case of both processes, or a case for each of these arguments."""

    def register(function):
        for given in options or [()]:
            arguments = given if isinstance(given, tuple) else (given,)
            name = "-".join([function.__name__, *map(str, arguments)])
            CASES[name] = lambda mesh, arguments=arguments: function(mesh, *arguments)
        return function

    return register


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_number(optimizer, key):
    """Whether a state is one number for a parameter, and no DTensor."""
    ours = optimizer if hasattr(optimizer, "_numbers") else CLASSES[type(optimizer).__name__][0]
    return key in ("step", *ours._numbers)


def check_same(ours, alone, **tolerance):
    """Parameters and states of two optimizers, the one of DTensors put together."""
    for i, (p, q) in enumerate(zip(*(o.param_groups[0]["params"] for o in (ours, alone)), strict=True)):
        assert_equal(whole(p.detach()), q, f"parameter {i}", **tolerance)
        assert set(ours.state[p]) == set(alone.state[q])
        for key, value in alone.state[q].items():
            mine = ours.state[p][key]
            assert isinstance(mine, DTensor) == (isinstance(p, DTensor) and not is_number(ours, key)), key
            if isinstance(mine, DTensor):
                assert mine.placements == p.placements and mine.device_mesh == p.device_mesh
            assert_equal(whole(mine), value, f"{key} of parameter {i}", **tolerance)


def paths_of(optimizer):
    return ["fused" if row.path.startswith("fused") else "torch" for row in trainopt.explain(optimizer)]


# Models ---------------------------------------------------------------------------------------------------------------

EXTRAS = {
    "plain": {},
    "noise": {"noise": 0.1, "seed": 5},
    "l1": {"l1": 0.01},
    "maximize": {"maximize": True},
    "proximal": {"l1": 0.1, "l1_proximal": True, "noise": 0.01},
    "tail": {"max_grad_norm": 0.05, "ema_decay": 0.5, "zero_grad": "in_step"},
}


def network():
    """Sizes that two processes share unevenly, or that leave one without anything."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def inputs(step):
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, rows=slice(None), steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)[rows]).square().mean().backward()
        optimizer.step()


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
    assert paths_of(optimizer) == ["fused"] * 6


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
    assert paths_of(optimizer.adamw) == ["fused"] * 4
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
    assert paths_of(optimizers[0]) == ["torch", "torch", *[others] * 4]


@case("AdamW")
def full_state_dicts(mesh, name):
    """What one process would have saved, and the way back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    model, alone = network(), network()
    fully_shard(model, mesh=mesh)
    optimizer, truth = (trainopt.AdamW(m.parameters(), **OPTIONS[name]) for m in (model, alone))
    train(model, optimizer, slice(dist.get_rank(), None, 2))
    train(alone, truth)
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        for key, q in alone.named_parameters():
            for state, value in truth.state[q].items():
                assert_equal(saved["state"][key][state], value)
    optimizer.zero_grad()  # torch makes no states to load into where there are gradients
    resumed = trainopt.AdamW(model.parameters(), **OPTIONS[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, resumed, saved, options=options)
    train(model, resumed, slice(dist.get_rank(), None, 2))
    train(alone, truth)
    check_same(resumed, truth)


# By hand --------------------------------------------------------------------------------------------------------------

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
SHAPES = [(5, 3), (1, 4), (2, 1), (4, 6), (3, 0), (300, 7), (7, 300)]


def spread(mesh, tensor, placement):
    """A copy of it: without one the local tensor of a replicated DTensor is the tensor itself."""
    return distribute_tensor(tensor.clone(), mesh, [placement], src_data_rank=None)


def random(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps_of_both(mesh, name, placement, options, wrap=None, steps=3):
    """An optimizer of DTensors and one of the same tensors whole."""
    start = [random(shape, i) for i, shape in enumerate(SHAPES)]
    params = [nn.Parameter(spread(mesh, t, placement)) for t in start], [nn.Parameter(t) for t in start]
    optimizers = [OPTIMIZERS[name](given, **options) for given in params]
    for step in range(steps):
        for i, (p, q) in enumerate(zip(*params, strict=True)):
            q.grad = random(SHAPES[i], 100 * step + i)
            p.grad = spread(mesh, q.grad, placement)
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


@case(*((name, where, extra) for name in OPTIMIZERS for where in PLACEMENTS for extra in ("plain", "noise", "tail")))
def distributed_by_hand(mesh, name, where, extra):
    optimizers = steps_of_both(mesh, name, PLACEMENTS[where], {**OPTIONS[name], **EXTRAS[extra]})
    check_same(*optimizers)
    assert set(paths_of(optimizers[0])) == {"fused"}


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


@case(*(name for name in OPTIMIZERS if TABLE[name].takes_shards))  # on torch's path
def two_dimensions_of_processes(mesh, name):
    """A mesh of one row: sharded over its columns, or replicated over them."""
    grid = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Replicate()], [Shard(0), Shard(0)]):
        start, results = random((5, 6), 1), []
        for p in (nn.Parameter(distribute_tensor(start, grid, placements)), nn.Parameter(start.clone())):
            optimizer = OPTIMIZERS[name]([p], **OPTIONS[name], noise=0.1)
            for step in range(3):
                gradient = random((5, 6), step)
                p.grad = distribute_tensor(gradient, grid, placements) if isinstance(p, DTensor) else gradient
                optimizer.step()
            results.append(whole(p.detach()))
        assert_equal(*results, str(placements))


@case(*OPTIMIZERS)
def plain_tensors_in_the_same_group(mesh, name):
    start = [random((4, 3), i) for i in range(4)]
    params = [nn.Parameter(spread(mesh, t, Shard(0)) if i % 2 else t.clone()) for i, t in enumerate(start)]
    alone = [nn.Parameter(t) for t in start]
    optimizers = [OPTIMIZERS[name](given, **OPTIONS[name]) for given in (params, alone)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            q.grad = None if step == i else random((4, 3), 10 * step + i)
            p.grad = q.grad if not isinstance(p, DTensor) or q.grad is None else spread(mesh, q.grad, Shard(0))
        for optimizer in optimizers:
            optimizer.step()
    check_same(*optimizers)
    assert set(paths_of(optimizers[0])) == {"fused"}


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


@case(*(name for name in OPTIMIZERS if TABLE[name].takes_shards))  # on torch's path
def gradients_of_other_placements(mesh, name):
    """torch's own operators bring them together; a sum that is still to be taken is taken."""
    for placement in (Replicate(), Partial()):
        results = []
        for distributed in (True, False):
            start = random((4, 3), 1)
            p = nn.Parameter(spread(mesh, start, Shard(0)) if distributed else start)
            optimizer = OPTIMIZERS[name]([p], **OPTIONS[name])
            for step in range(3):
                p.grad = random((4, 3), step)
                if distributed:
                    share = p.grad if placement == Replicate() else p.grad / 2
                    p.grad = DTensor.from_local(share, mesh, [placement])
                optimizer.step()
            results.append(whole(p.detach()))
        assert_equal(*results, str(placement))


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


SUMMING = [name for name, cls in OPTIMIZERS.items() if _C.rules()[cls._rule].sums]


@case(
    *((name, where, dtype) for name in SUMMING for where in PLACEMENTS for dtype in ("float32", "float64", "bfloat16"))
)
def sums_do_not_depend_on_shards(mesh, name, where, dtype):
    """A step that depends on the whole tensor's norms has the same bits whoever holds which part of it."""
    kind = getattr(torch, dtype)
    start = [random(shape, i).to(kind) for i, shape in enumerate(SHAPES)]
    params = [nn.Parameter(spread(mesh, t, PLACEMENTS[where])) for t in start], [nn.Parameter(t) for t in start]
    optimizers = [OPTIMIZERS[name](given, **OPTIONS[name]) for given in params]
    for step in range(3):
        for i, (p, q) in enumerate(zip(*params, strict=True)):
            q.grad = random(SHAPES[i], 100 * step + i).to(kind)
            p.grad = spread(mesh, q.grad, PLACEMENTS[where])
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(*params, strict=True):
            assert torch.equal(bits(whole(p.detach())), bits(q)), tuple(p.shape)
    assert set(paths_of(optimizers[0])) == {"fused"}


@case(*SUMMING)
def one_collective_for_each_dimension_of_a_mesh(mesh, name):
    """For all tensors together, in a step that looks at everything and in those that repeat it; none for replicas."""
    grid = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    cases = [
        (1, [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Shard(0), Replicate()], [Replicate(), Shard(0)]]),
        (0, [[Replicate(), Replicate()], [Shard(0), Replicate()]]),
    ]
    original, called = dist.all_gather_into_tensor, []

    def count(output, own, group):
        called.append(dist.get_process_group_ranks(group))
        return original(output, own, group)

    dist.all_gather_into_tensor = count
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
                assert called == [[0, 1]] * calls
    finally:
        dist.all_gather_into_tensor = original


# In this process: a mesh of one ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def replace_local(tensor, local):
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements)


def edit_state(change):
    def edit(optimizer, params):
        state = optimizer.state[params[1]]
        key = next(key for key in state if not is_number(optimizer, key))
        state[key] = change(state[key])

    return edit


def set_slot(tensor, local):
    tensor._local_tensor = local


EDITS = {
    "nothing": lambda optimizer, params: None,
    "a gradient gone": lambda optimizer, params: setattr(params[1], "grad", None),
    "a gradient of other placements": lambda optimizer, params: setattr(
        params[1], "grad", params[1].grad.redistribute(placements=[Replicate()])
    ),
    "a gradient that is no DTensor": lambda optimizer, params: setattr(params[1], "grad", params[1].grad.to_local()),
    "a gradient in other memory": lambda optimizer, params: setattr(params[1], "grad", params[1].grad.clone()),
    "a gradient whose local tensor is another": lambda optimizer, params: set_slot(
        params[1].grad, params[1].grad.to_local() + 1
    ),
    "a transposed local gradient": lambda optimizer, params: set_slot(
        params[1].grad, params[1].grad.to_local().t().contiguous().t()
    ),
    "a local gradient with a lazy negation": lambda optimizer, params: set_slot(
        params[1].grad, torch._neg_view(params[1].grad.to_local())
    ),
    "another parameter's gradient": lambda optimizer, params: setattr(params[1], "grad", params[2].grad),
    "a parameter's local tensor": lambda optimizer, params: set_slot(params[1], params[1].to_local().detach() + 1),
    "a parameter's local memory": lambda optimizer, params: setattr(
        params[1]._local_tensor, "data", params[1]._local_tensor.data + 1
    ),
    "a state replaced by a copy": edit_state(torch.clone),
    "a state replaced by another value": edit_state(lambda m: m + 1),
    "a state that is no DTensor": edit_state(lambda m: m.to_local()),
    "a state of other placements": edit_state(lambda m: m.redistribute(placements=[Replicate()])),
    "a state whose local tensor is another": lambda optimizer, params: [
        set_slot(value, value.to_local() + 1)
        for value in optimizer.state[params[1]].values()
        if isinstance(value, DTensor)
    ],
    "all states gone": lambda optimizer, params: optimizer.state.clear(),
    "a step count replaced": lambda optimizer, params: optimizer.state[params[1]].update(
        {"step": torch.tensor(40.0)} if "step" in optimizer.state[params[1]] else {}
    ),
    "two parameters over one memory": lambda optimizer, params: set_slot(params[1], params[2].to_local().detach()),
    "a gradient in a parameter's memory": lambda optimizer, params: set_slot(
        params[1].grad, params[2].to_local().detach()
    ),
    "a parameter replaced": lambda optimizer, params: optimizer.param_groups[0]["params"].__setitem__(
        1, nn.Parameter(params[1].detach().clone())
    ),
    "no gradient needed any more": lambda optimizer, params: params[1].requires_grad_(False),
    "the order of the parameters": lambda optimizer, params: optimizer.param_groups[0]["params"].reverse(),
}


@each_class
@pytest.mark.parametrize("warm", [1, 3])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_takes_effect_at_the_next_step(name, edit, warm, mesh):
    skip_unless_shards_are_taken(name)
    sides = []
    for cls, flags in zip(CLASSES[name], ({}, {"foreach": False}), strict=True):
        params = [nn.Parameter(spread(mesh, random((4, 4), i), Shard(0))) for i in range(3)]
        params.append(nn.Parameter(random((3,), 3)))
        optimizer = cls(params, **OPTIONS[name], **flags)
        outcomes = []
        for step in range(warm + 2):
            for i, p in enumerate(params):
                if p.requires_grad:
                    p.grad = random(p.shape, 10 * step + i)
                    p.grad = spread(mesh, p.grad, Shard(0)) if isinstance(p, DTensor) else p.grad
            if step == warm:
                EDITS[edit](optimizer, params)
            outcomes.append(attempt(optimizer.step))
            if outcomes[-1] is not None:
                break
        sides.append((outcomes, params, optimizer))
    (mine, params, ours), (theirs, torchs, other) = sides
    assert mine == theirs
    if mine[-1] is not None:
        return
    for p, q in zip(params, torchs, strict=True):
        assert_equal(whole(p.detach()), whole(q.detach()))
        for key, value in other.state[q].items():
            assert_equal(whole(ours.state[p][key]), whole(value))


@each_class
def test_the_engine_steps_them_from_the_second_step_on_without_asking_again(name, mesh, monkeypatch):
    """What is known of a mesh and its placements is kept for as long as the tensors are there."""
    skip_unless_shards_are_taken(name)
    from trainopt.optim import distributed

    params = [nn.Parameter(spread(mesh, random((4, 4), i), Shard(0))) for i in range(3)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    asked = []
    describe = distributed.describe
    monkeypatch.setattr(distributed, "describe", lambda spec: asked.append(spec) or describe(spec))
    for step in range(4):
        for p in params:
            p.grad = (
                p.detach().clone()
                if step == 0
                else DTensor(torch.ones_like(p.to_local()), p.grad._spec, requires_grad=False)
            )
        before = len(asked)
        optimizer.step()
        assert (len(asked) > before) == (step == 0)


@each_class
def test_version_counters_of_both_move(name, mesh):
    skip_unless_shards_are_taken(name)
    params = [nn.Parameter(spread(mesh, random((4, 4), i), Shard(0))) for i in range(3)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        loss = sum((p * p).sum() for p in params)
        before = [(p._version, p._local_tensor._version) for p in params]
        optimizer.step()
        assert [(p._version, p._local_tensor._version) for p in params] == [(a + 1, b + 1) for a, b in before]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_class
def test_a_dtensor_made_in_inference_mode_is_written_to_only_there(name, mesh):
    skip_unless_shards_are_taken(name)
    with torch.inference_mode():
        p = spread(mesh, random((4, 4), 0), Shard(0))
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    with torch.inference_mode():
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
    assert "inference" in attempt(optimizer.step)[1]


def test_a_local_tensor_whose_memory_is_gone_is_named(mesh):
    params = [nn.Parameter(spread(mesh, random((4, 4), i), Shard(0))) for i in range(2)]
    optimizer = trainopt.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[1].to_local().untyped_storage().resize_(0)
    error = attempt(optimizer.step)
    assert error[0] is RuntimeError and "parameter 1" in error[1] and "storage" in error[1]


def test_a_compiled_step_of_dtensors_runs_uncompiled(mesh):
    results = []
    for compiled in (True, False):
        params = [nn.Parameter(spread(mesh, random((4, 4), i), Shard(0))) for i in range(2)]
        optimizer = trainopt.AdamW(params, lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(3):
            for p in params:
                p.grad = spread(mesh, random((4, 4), i), Shard(0))
            step()
        results.append([whole(p.detach()) for p in params])
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


# In two processes -----------------------------------------------------------------------------------------------------


def main(folder):
    """What each process of torchrun runs: all cases, the errors of which it writes down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    outcomes = {}
    for name, run in CASES.items():
        try:
            run(mesh)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    with open(os.path.join(folder, f"{dist.get_rank()}.json"), "w") as file:
        json.dump(outcomes, file)
    dist.destroy_process_group()
    os._exit(0)  # as in ranks.py


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each case said, by process."""
    folder = tmp_path_factory.mktemp("dtensors")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(folder)], env=environment, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, outcomes):
    assert [found[name] for found in outcomes] == [None, None]


if __name__ == "__main__":
    main(*sys.argv[1:])
