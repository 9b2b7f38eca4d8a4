"""skip_nonfinite=True: a step whose gradients are not all finite is left out, bit for bit."""

import pickle

import pytest
import torch
from helpers import CLASSES, OPTIONS, SHAPES, TABLE, assert_same_bits, each_class, skip_unless_taken, snapshot
from ranks import run_ranks

import trainopt
from trainopt.optim.report import Record
from trainopt.schedules import linear

NAN, INF = float("nan"), float("inf")
VALUES = [NAN, INF, -INF]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["engine", "torch's path"])
def path(request, monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", request.param != "engine")


def optimizer_of(name, dtype=torch.float32, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = CLASSES[name][0](params, **{**OPTIONS[name], "skip_nonfinite": True, **options})
    return optimizer, params


def set_gradients(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def assert_skipped(optimizer, params):
    before, keys = snapshot(optimizer), [list(state) for state in optimizer.state.values()]
    versions, gradients = [p._version for p in params], [p.grad for p in params]
    completed = optimizer.completed_steps
    optimizer.step()
    assert optimizer.last_step_skipped and optimizer.completed_steps == completed
    assert_same_bits(before, snapshot(optimizer))
    assert [list(state) for state in optimizer.state.values()] == keys and [p._version for p in params] == versions
    assert all(p.grad is g for p, g in zip(params, gradients, strict=True))


@each_class
@pytest.mark.parametrize("value, before", list(zip(VALUES, (0, 2, 2), strict=True)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_out_bit_for_bit(name, value, dtype, before, path):
    optimizer, params = optimizer_of(name, dtype, noise=0.1)
    plain, others = optimizer_of(name, dtype, noise=0.1, skip_nonfinite=False)
    for i in range(before + 2):
        for o, ps in ((optimizer, params), (plain, others)):
            set_gradients(ps, i)
            if i == before and o is optimizer:
                ps[-1].grad[256] = value
                assert_skipped(o, ps)
                set_gradients(ps, i)
            o.step()
        assert not optimizer.last_step_skipped and optimizer.completed_steps == i + 1
    assert_same_bits(
        {**snapshot(optimizer), "groups": [], "members": []}, {**snapshot(plain), "groups": [], "members": []}
    )


@each_class
@pytest.mark.parametrize("where", range(6))
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_wherever_it_is(name, where, layout):
    optimizer, params = optimizer_of(name, shapes=[(6, 4)] * 6)
    set_gradients(params)
    gradient = params[where].grad
    if layout == "transposed":
        gradient = gradient.t().contiguous().t()
    elif layout == "strided":
        gradient = torch.stack([gradient] * 2, -1)[..., 1]
    elif layout == "expanded":
        gradient = gradient[:, :1].expand(6, 4)
    gradient[(where, 0) if layout == "expanded" else (where, where % 4)] = INF
    params[where].grad = gradient
    assert_skipped(optimizer, params)


@each_class
@pytest.mark.parametrize("kind", ["sparse", "complex", "subclass", "differentiable"])
def test_what_torchs_path_takes(name, kind, path):
    skip_unless_taken(name, kind)
    if kind == "sparse" and name != "SGD":
        return
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    if kind == "subclass":
        p = torch.nn.Parameter(p.detach().as_subclass(type("Mine", (torch.Tensor,), {})))
    q = torch.nn.Parameter(torch.ones(3))
    options = {"lr": 0.1} if kind == "sparse" else OPTIONS[name]
    optimizer = CLASSES[name][0]([p, q], **options, skip_nonfinite=True)
    for bad in (False, True, False):
        p.grad, q.grad = torch.ones_like(p), torch.ones(3)
        if bad:
            p.grad[2, 1] = NAN
        if kind == "sparse":
            p.grad = p.grad.to_sparse()
        values = p.detach().clone(), q.detach().clone()
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(values, (p, q), strict=True)]
        assert same == [bad, bad] and optimizer.last_step_skipped == bad


@each_class
def test_gradients_that_overflow_only_when_squared_or_added_are_finite(name):
    optimizer, (p,) = optimizer_of(name, shapes=[(64,)])
    p.grad = torch.full((64,), 3e38)
    optimizer.step()
    assert not optimizer.last_step_skipped


@each_class
def test_missing_and_empty_gradients(name):
    optimizer, params = optimizer_of(name)
    assert not params[4].numel()
    optimizer.step()
    assert not optimizer.last_step_skipped
    set_gradients(params)
    params[0].grad = None
    optimizer.step()
    assert not optimizer.last_step_skipped
    params[1].grad[0] = NAN
    assert_skipped(optimizer, params)


@each_class
def test_a_closure_is_called_and_its_loss_comes_back(name):
    optimizer, (p,) = optimizer_of(name, shapes=[(3,)])

    def closure():
        optimizer.zero_grad()
        loss = (p * scale).sum()
        loss.backward()
        return loss

    for scale in (1.0, NAN, 2.0):
        before = p.detach().clone()
        loss = optimizer.step(closure)
        assert torch.isnan(loss) == (scale != scale) == optimizer.last_step_skipped == torch.equal(p, before)


@each_class
def test_hooks_hear_of_a_step_that_is_left_out(name):
    optimizer, params = optimizer_of(name)
    events = []
    optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
    optimizer.register_step_post_hook(lambda o, *_: events.append(o.last_step_skipped))
    set_gradients(params)
    params[0].grad.fill_(INF)
    optimizer.step()
    assert events == ["pre", True]


@each_class
def test_schedules_do_not_count_it(name):
    optimizer, params = optimizer_of(name, lr=0.1)
    schedule = trainopt.Schedule(optimizer, lr=linear(10))
    for bad in (True, False, True, False, False):
        set_gradients(params)
        if bad:
            params[1].grad[0] = NAN
        optimizer.step()
        schedule.step()
    assert schedule.last_epoch == 3 and optimizer.param_groups[0]["lr"] == pytest.approx(0.07)


@each_class
def test_a_group_may_say_it_for_itself_and_the_whole_step_is_left_out(name):
    optimizer, params = optimizer_of(name, shapes=[(3,)], skip_nonfinite=False)
    other = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [other], "skip_nonfinite": True})
    set_gradients([*params, other])
    other.grad[0] = NAN
    assert_skipped(optimizer, [*params, other])
    set_gradients([*params, other])
    params[0].grad[0] = NAN  # in a group that does not say it
    optimizer.step()
    assert not optimizer.last_step_skipped and params[0].isnan().any() != TABLE[name].hides_nan
    optimizer.param_groups[0]["skip_nonfinite"] = True
    assert_skipped(optimizer, [*params, other])


@each_class
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_under_gradscaler(name, fused, unscale):
    """GradScaler's own skipping stays, and what makes a gradient infinite after it looked is skipped too."""
    optimizer, (p,) = optimizer_of(name, shapes=[(5,)], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = []
    for bad in (None, "before", None, "after", None):
        p.grad = scaler.scale(torch.ones(5))
        if bad == "before":
            p.grad[1] = INF
        if unscale:
            scaler.unscale_(optimizer)
        if bad == "after":
            p.grad[1] = INF
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(p, before))
    assert skipped == [False, True, False, True, False] and optimizer.completed_steps == 3


@each_class
def test_compiled(name):
    torch._dynamo.reset()
    optimizer, params = optimizer_of(name)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for bad in (False, True, False):
        set_gradients(params)
        if bad:
            params[0].grad.fill_(NAN)
        before = snapshot(optimizer)
        step()
        assert optimizer.last_step_skipped == bad
        if bad:
            assert_same_bits(before, snapshot(optimizer))
    assert optimizer.completed_steps == 2


@each_class
def test_the_option_is_seen_and_saved(name):
    optimizer, params = optimizer_of(name)
    assert "skip_nonfinite: True" in repr(optimizer)
    assert all("skip_nonfinite" in row.note for row in trainopt.explain(optimizer))
    assert "skip_nonfinite" in str(trainopt.explain(optimizer))
    other, _ = optimizer_of(name, skip_nonfinite=False)
    assert "skip_nonfinite" not in other.param_groups[0] and "skip_nonfinite: False" in repr(other)
    assert not any(row.note for row in trainopt.explain(other))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["skip_nonfinite"] is True
    torchs = CLASSES[name][1](params, **OPTIONS[name])
    torchs.load_state_dict(optimizer.state_dict())
    set_gradients(params)
    torchs.step()
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.param_groups[0]["params"][0].grad = torch.full((), NAN)
    copied.step()
    assert copied.last_step_skipped


# Two processes --------------------------------------------------------------------------------------------------------


def decide_alike(rank, name):
    """What one rank finds in its shard of a DTensor, all know: with each its own decision they would part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = CLASSES[name][0](model.parameters(), **OPTIONS[name], skip_nonfinite=True)
    for bad in (None, 0, 1, None):
        model(torch.ones(4, 5)).square().sum().backward()
        if bad == rank:
            model[0].weight.grad.to_local()[0, 0] = NAN
        before = [p.full_tensor() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        after = [p.full_tensor() for p in model.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == (bad is not None) == optimizer.last_step_skipped, (rank, bad, same)
    assert optimizer.completed_steps == 2
    rates = [group["lr"] for group in optimizer.param_groups]
    # Nor may the ranks part over whether a step only asks for states: one shard's gradient is zero, one's is not.
    fresh = CLASSES[name][0](model.parameters(), **{**OPTIONS[name], "lr": 0.0})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if rank == 1:
        model[0].weight.grad.to_local()[0, 0] = 1.0
    fresh.step()
    assert fresh.completed_steps == 1 and rates


@each_class
@pytest.mark.slow
def test_ranks_that_share_dtensors_decide_alike(name):
    run_ranks(decide_alike, name)


def test_steps_left_to_a_device_are_counted_whoever_found_what_is_not_finite():
    """GradScaler's number has a dimension and the optimizer's own has none: a run may begin with either."""
    for shapes in [(), (1,)], [(1,), ()]:
        record = Record()
        for shape in shapes:
            record.count_unread(torch.zeros(shape))
            record.count_unread(torch.ones(shape))
        assert record.completed() == 2 and record.was_skipped()
