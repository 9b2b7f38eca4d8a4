"""What is kept of DTensors beside them, and told of them: states in 8 bits, checkpoints, and stats."""

import shutil
import sys
import tempfile

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
from judge import bits
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import trainopt

CASES = {}
case = registering(CASES)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@case("AdamW", "Adafactor")
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
    optimizer, truth = (OPTIMIZERS[name](m.parameters(), **OPTIONS[name]) for m in (model, alone))
    train(model, optimizer, slice(dist.get_rank(), None, 2))
    train(alone, truth)
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        for key, q in alone.named_parameters():
            for state, value in truth.state[q].items():
                assert_equal(saved["state"][key][state], value)
    optimizer.zero_grad()  # torch makes no states to load into where there are gradients
    resumed = OPTIMIZERS[name](model.parameters(), **OPTIONS[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, resumed, saved, options=options)
    train(model, resumed, slice(dist.get_rank(), None, 2))
    train(alone, truth)
    check_same(resumed, truth)


# States in 8 bits -----------------------------------------------------------------------------------------------------

#: Whose rows are whole blocks of 256 elements, or which are small.
CODED = [(16, 512), (17, 2, 256), (1, 8192), (2, 4096), (9, 3)]


@case(*((name, where) for name in OPTIMIZERS for where in ("rows", "replicated")))
def states_in_8_bits(mesh, name, where):
    """A shard has whole blocks, and the bits that the whole has."""
    options = {"state_dtype": "8bit", "precision": "master24"}
    for optimizers in steps_of_both(mesh, name, PLACEMENTS[where], CODED, torch.bfloat16, **options):
        for p, q in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
            assert torch.equal(bits(whole(p.detach())), bits(q)), tuple(p.shape)
            mine, alone = (optimizer.state[r] for optimizer, r in zip(optimizers, (p, q), strict=True))
            assert set(mine) == set(alone)
            for key, value in alone.items():
                assert torch.equal(bits(whole(mine[key])), bits(value)), (key, tuple(p.shape))
    assert set(paths(optimizers[0])) == {"fused"}


@case("AdamW", "Lion")
def codes_are_spread_anew(mesh, name):
    """What ranks have saved one process goes on with, and the other way round; and they go back to float32."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    def made(is_sharded):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 17), nn.Linear(17, 512, bias=False))
        return fully_shard(model, mesh=mesh) if is_sharded else model

    def step(model, optimizer, seed):
        for p in model.parameters():
            gradient = random(p.shape, seed).float()
            p.grad = spread(mesh, gradient, Shard(0)) if isinstance(p, DTensor) else gradient
        optimizer.step()
        optimizer.zero_grad()

    sides = []
    for is_sharded in (True, False):
        model = made(is_sharded)
        options = {**OPTIONS[name], "state_dtype": "8bit"}
        groups = [
            {"params": [model[0].weight, model[0].bias]},
            {"params": [model[1].weight], "state_dtype": "bfloat16"},
        ]
        sides.append((model, OPTIMIZERS[name](groups, **options)))
        step(*sides[-1], 1)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    saved = [get_optimizer_state_dict(*side, options=StateDictOptions(full_state_dict=True)) for side in sides]
    key = next(key for key in saved[1]["state"]["0.weight"] if key.endswith("_scale"))
    if dist.get_rank() == 0:
        assert torch.equal(*(state["state"]["0.weight"][key] for state in saved))
    set_optimizer_state_dict(*sides[0], saved[1], options=full)
    given = [saved[0]]
    dist.broadcast_object_list(given)
    set_optimizer_state_dict(*sides[1], given[0])
    for side in sides:
        step(*side, 2)
    check = [[whole(p.detach()) for p in model.parameters()] for model, _ in sides]
    for p, q in zip(*check, strict=True):
        assert torch.equal(p, q)
    for _, optimizer in sides:
        trainopt.convert_state(optimizer, state_dtype="float32")
    for p, q in zip(*(model.parameters() for model, _ in sides), strict=True):
        for state, value in sides[1][1].state[q].items():
            assert torch.equal(whole(sides[0][1].state[p][state]), value) and value.dtype == torch.float32


@case("AdamW", "Lion")
def codes_in_distributed_checkpoints(mesh, name):
    """Saved as shards and loaded as replicas, a run goes on with the same bits."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    ended = []
    for placement in (Shard(0), Replicate()):
        model = nn.Linear(512, 17, bias=False)
        model.weight = nn.Parameter(spread(mesh, random((17, 512), 0).bfloat16(), placement))
        optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS[name], state_dtype="8bit", precision="master24")

        def step(seed, model=model, optimizer=optimizer, placement=placement):
            model.weight.grad = spread(mesh, random((17, 512), seed).bfloat16(), placement)
            optimizer.step()
            optimizer.zero_grad()

        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        if placement == Shard(0):
            step(1)
            state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.save(state, checkpoint_id=folder[0])
        else:
            dcp.load(state, checkpoint_id=folder[0])
            model.load_state_dict(state["model"])
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        step(2)
        state = optimizer.state[model.weight]
        assert any(key.endswith("_scale") for key in state)
        ended.append([whole(model.weight.detach()), *(whole(state[key]) for key in sorted(state))])
    assert all(map(torch.equal, *ended))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


@case("AdamW")
def codes_of_shards_without_whole_blocks_are_refused(mesh, name):
    for shape, placement in (((64, 100), Shard(0)), ((64, 512), Shard(1)), ((5000,), Shard(0))):
        p = nn.Parameter(spread(mesh, torch.ones(shape), placement))
        error = attempt(lambda p=p: OPTIMIZERS[name]([p], state_dtype="8bit"))
        assert error[0] is ValueError and "whole blocks" in error[1] and str(shape) in error[1]
        OPTIMIZERS[name]([{"params": [p], "state_dtype": "bfloat16"}], state_dtype="8bit")
    p = nn.Parameter(DTensor.from_local(torch.ones(64, 256), mesh, [Partial()]))
    optimizer = OPTIMIZERS[name]([p], state_dtype="8bit")  # as with other dtypes, the step refuses it
    p.grad = torch.ones_like(p)
    assert "redistribute" in attempt(optimizer.step)[1]


# Stats ----------------------------------------------------------------------------------------------------------------


@case(*((name, where) for name in OPTIMIZERS for where in PLACEMENTS))
def stats_are_of_the_whole(mesh, name, where):
    for optimizers in steps_of_both(mesh, name, PLACEMENTS[where], stats=True):
        found, truth = (optimizer.stats() for optimizer in optimizers)
        assert list(found) == list(truth) == list(range(len(SHAPES)))
        for i, numbers in truth.items():
            assert found[i] == pytest.approx(numbers, rel=1e-12), SHAPES[i]
    assert set(paths(optimizers[0])) == {"fused"}


@case("SGD", "Adafactor")
def what_is_not_finite_on_any_rank_is_told(mesh, name):
    for rows in (5, 1):  # of one row, a process has none
        p = nn.Parameter(spread(mesh, random((rows, 3), 1), Shard(0)))
        optimizer = OPTIMIZERS[name]([p], **OPTIONS[name], stats=True, skip_nonfinite=True)
        gradient = random((rows, 3), 2)
        gradient[-1, 0], gradient[0, 1], gradient[-1, 2] = torch.inf, -torch.inf, 1e3
        p.grad = spread(mesh, gradient, Shard(0))
        optimizer.step()
        assert optimizer.stats()[0].nonfinite == 2 and optimizer.stats()[0].largest_gradient == torch.inf
        assert optimizer.stats()[0].update_norm == 0 and optimizer.last_step_skipped
        mine = p.grad.to_local()
        found = [each for each in optimizer.nonfinite_report() if each.tensor == "gradient"]
        assert sum(each.inf for each in found) == mine.isinf().sum() and all(e.numel == mine.numel() for e in found)


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
