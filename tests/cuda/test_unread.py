"""What lies on the device stays there: a step waits for nothing, skips itself after an overflow, allocates nothing more
and can be captured."""

from contextlib import nullcontext

import judge
import pytest
import torch
from steps import SHAPES, TABLE, UNREAD, assert_near, assert_same_bits, counts_on_device, here, moved

import trainopt

each_row = pytest.mark.parametrize("name", TABLE)
each_unread = pytest.mark.parametrize("name", UNREAD)
each_on_host = pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.needs_host])
each_adam = pytest.mark.parametrize("name", ["Adam", "AdamW"])
PROBLEM = judge.random_problem(SHAPES, torch.float32, 4)


def make(name, device, **options):
    params = [torch.nn.Parameter(t.to(device, copy=True)) for t in PROBLEM[0]]
    return TABLE[name].make(params, **{**TABLE[name].usual, **options}), params


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.to(p.device, p.dtype)


def without_waiting(name, no_synchronisation):
    """But for those whose steps' numbers are the host's."""
    return nullcontext() if TABLE[name].needs_host else no_synchronisation()


def with_device_numbers(name, device):
    """The usual options, with those that may be tensors on the device."""
    usual = dict(TABLE[name].usual)
    numbers = {"lr": torch.tensor(usual["lr"], device=device)}
    if "betas" in usual:
        numbers["betas"] = tuple(torch.tensor(b, dtype=torch.float64, device=device) for b in usual["betas"])
    if "betas" in usual or TABLE[name].ours._counts_steps:
        numbers |= counts_on_device(name)
    return numbers


def kinds_of(name, device):
    return {
        "default": {},
        "fused": {"fused": True},
        "counts on the device": counts_on_device(name),
        "numbers on the device": with_device_numbers(name, device),
        "everything": {k: v for k, v in TABLE[name].everything.items() if k != "lr"},
        "noise": {"noise": 0.1},
        "stats and averages": {"stats": True, "ema_decay": 0.9},
    }


@each_unread
def test_no_step_waits_for_the_device(device, name, no_synchronisation):
    kinds = kinds_of(name, device)
    if TABLE[name].needs_host:
        del kinds["numbers on the device"]
    for kind, options in kinds.items():
        optimizer, params = make(name, device, **options)
        gradients = [moved(now, device) for now in PROBLEM[1]]
        with no_synchronisation():
            for now in gradients:
                set_gradients(params, now)
                optimizer.step()
        assert optimizer.completed_steps == len(gradients), kind


@each_unread
def test_a_learning_rate_on_the_device_is_read_in_each_step(device, name, no_synchronisation):
    rates = (0.05, 0.02, 0.0, 0.1)
    for dtype in (torch.float32, torch.float64):
        there = torch.tensor(0.0, dtype=dtype, device=device)
        optimizer, params = make(name, device, **{**with_device_numbers(name, device), "lr": there})
        truth, peers = make(name, "cpu", lr=torch.tensor(0.0, dtype=dtype))
        for rate, now in zip(rates, PROBLEM[1], strict=True):
            set_gradients(params, now)
            with without_waiting(name, no_synchronisation):
                there.fill_(rate)
                optimizer.step()
            truth.param_groups[0]["lr"].fill_(rate)
            set_gradients(peers, now)
            truth.step()
        assert_near(here(judge.outcome(optimizer, params)), judge.outcome(truth, peers))


@each_row
def test_a_learning_rate_on_the_device_for_a_parameter_on_the_cpu(device, name):
    optimizer, params = make(name, "cpu", lr=torch.tensor(0.03, device=device), **counts_on_device(name))
    truth, peers = make(name, "cpu", lr=torch.tensor(0.03))
    for now in PROBLEM[1]:
        set_gradients(params, now)
        set_gradients(peers, now)
        optimizer.step()
        truth.step()
    assert_same_bits(judge.outcome(optimizer, params), judge.outcome(truth, peers))


@each_row
def test_an_option_on_the_device_is_that_number(device, name):
    """Of each in turn, and of those too that say which states there are, as SGD's momentum does."""
    options = TABLE[name].everything
    truth, peers = make(name, "cpu", **options)
    for now in PROBLEM[1]:
        set_gradients(peers, now)
        truth.step()
    for key in (key for key, value in options.items() if isinstance(value, float)):
        optimizer, params = make(name, device, **options)
        optimizer.param_groups[0][key] = torch.tensor(options[key], dtype=torch.float64, device=device)
        for now in PROBLEM[1]:
            set_gradients(params, now)
            optimizer.step()
        assert_near(here(judge.outcome(optimizer, params)), judge.outcome(truth, peers))


# GradScaler -----------------------------------------------------------------------------------------------------------


def scaled(scale, gradients, overflow=False):
    gradients = [g * scale for g in gradients]
    if overflow:
        gradients[-1].view(-1)[0] = float("inf")
    return gradients


def copied(optimizer, params):
    return [t.detach().clone() for t in (*params, *(v for p in params for v in optimizer.state[p].values()))]


@each_unread
def test_a_fused_step_unscales_and_counts_without_waiting(device, name, no_synchronisation):
    optimizer, params = make(name, device, fused=True)
    truth, peers = make(name, "cpu")
    optimizer.grad_scale = torch.tensor(64.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    for i, now in enumerate(PROBLEM[1]):
        gradients = moved(scaled(64.0, now), device)
        if i == 0 and name == "SGD":  # whose buffer tells a first step by being absent: whether it is one must be read
            set_gradients(params, gradients)
            optimizer.step()
        else:
            with without_waiting(name, no_synchronisation):
                set_gradients(params, gradients)
                optimizer.step()
        set_gradients(peers, now)
        truth.step()
    assert_near(here(judge.outcome(optimizer, params)), judge.outcome(truth, peers))
    for p, g in zip(params, PROBLEM[1][-1], strict=True):
        assert torch.equal(p.grad.cpu(), g)  # gradients are left unscaled
    assert not optimizer.last_step_skipped and optimizer.completed_steps == len(PROBLEM[1])


@pytest.mark.parametrize("counts", ["host", "device"])
@pytest.mark.parametrize("at", [0, 1, 3])
@each_row
def test_an_overflow_touches_nothing(device, name, at, counts, no_synchronisation):
    optimizer, params = make(name, device, **({"fused": True} if counts == "device" else {}))
    truth, peers = make(name, "cpu")
    for i, now in enumerate(PROBLEM[1]):
        optimizer.grad_scale = torch.tensor(64.0, device=device)
        optimizer.found_inf = torch.tensor(float(i == at), device=device)
        set_gradients(params, scaled(64.0, now, overflow=i == at))
        before = copied(optimizer, params)
        optimizer.step()
        assert optimizer.last_step_skipped is (i == at)
        if i != at:
            set_gradients(peers, now)
            truth.step()
        elif at > 0:
            for was, tensor in zip(before, copied(optimizer, params), strict=True):
                assert torch.equal(was.cpu(), tensor.cpu())
    assert optimizer.completed_steps == len(PROBLEM[1]) - 1
    assert_near(here(judge.outcome(optimizer, params)), judge.outcome(truth, peers))


@pytest.mark.parametrize("fused", [False, True])
@each_row
def test_under_torchs_gradscaler(device, name, fused):
    """As without it, but for the one step that overflows."""
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    optimizer, params = make(name, device, **({"fused": True} if fused else {}))
    truth, peers = make(name, "cpu")
    for i, now in enumerate(PROBLEM[1]):
        loss = sum((p * g.to(device)).sum() for p, g in zip(params, now, strict=True))
        optimizer.zero_grad()
        (scaler.scale(loss) * (float("inf") if i == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if i != 1:
            set_gradients(peers, now)
            truth.step()
    assert_near(here(judge.outcome(optimizer, params)), judge.outcome(truth, peers))
    assert scaler.get_scale() == 128.0


# skip_nonfinite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["default", "fused", "counts on the device", "numbers on the device", "noise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2])
@each_unread
def test_the_device_leaves_out_a_step_that_is_not_finite(device, name, at, value, kind, no_synchronisation):
    options = {**kinds_of(name, device)[kind], "skip_nonfinite": True}
    optimizer, params = make(name, device, **options)
    truth, peers = make(name, "cpu", **{k: v for k, v in kinds_of(name, "cpu")[kind].items() if k != "capturable"})
    for i, now in enumerate(PROBLEM[1]):
        gradients = moved([g.clone() for g in now], device)
        if i == at:
            gradients[-1].view(-1)[3] = value
        before = copied(optimizer, params)
        set_gradients(params, gradients)
        with without_waiting(name, no_synchronisation):
            optimizer.step()
        if i != at:
            set_gradients(peers, now)
            truth.step()
        else:
            assert optimizer.last_step_skipped
            if at > 0:
                for was, tensor in zip(before, copied(optimizer, params), strict=True):
                    assert torch.equal(was.cpu(), tensor.cpu())
    assert not optimizer.last_step_skipped and optimizer.completed_steps == len(PROBLEM[1]) - 1
    assert_near(here(judge.outcome(optimizer, params)), judge.outcome(truth, peers))


@each_adam
def test_counts_that_lie_on_the_host_move_to_the_device_that_decides(device, name, no_synchronisation):
    """As those of a checkpoint of torch's class, that is not capturable."""
    optimizer, params = make(name, device)
    set_gradients(params, moved(PROBLEM[1][0], device))
    optimizer.step()
    assert optimizer.state[params[0]]["step"].is_cpu
    optimizer.param_groups[0]["skip_nonfinite"] = True
    with no_synchronisation():
        optimizer.step()
        params[0].grad.fill_(float("nan"))
        optimizer.step()
    assert all(optimizer.state[p]["step"].device == p.device and optimizer.state[p]["step"] == 2 for p in params)
    assert optimizer.completed_steps == 2 and optimizer.last_step_skipped


@each_row
def test_a_step_that_is_not_finite_on_two_kinds_of_devices(device, name):
    """The host must know then, for the step of its own parameter."""
    here_too = torch.nn.Parameter(torch.ones(3))
    there = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = TABLE[name].make([here_too, there], **TABLE[name].usual, skip_nonfinite=True)
    for bad in (None, here_too, there, None):
        for p in (here_too, there):
            p.grad = torch.ones_like(p)
        if bad is not None:
            bad.grad[1] = float("inf")
        before = [p.detach().cpu().clone() for p in (here_too, there)]
        optimizer.step()
        assert optimizer.last_step_skipped == (bad is not None)
        for was, p in zip(before, (here_too, there), strict=True):
            assert torch.equal(was, p.detach().cpu()) == (bad is not None)
    assert optimizer.completed_steps == 2


# Memory ---------------------------------------------------------------------------------------------------------------


@each_unread
def test_a_step_keeps_no_memory(device, name, allocations, allocated):
    for kind, options in kinds_of(name, device).items():
        optimizer, params = make(name, device, **options)
        set_gradients(params, PROBLEM[1][0])
        optimizer.step()
        optimizer.step()
        before, blocks = allocated(), allocations()
        for _ in range(3):
            optimizer.step()
        assert allocated() == before, kind
        if kind in ("default", "everything", "noise"):
            # A reduce phase has memory for sums, for those of chunks, and for what follows from them, which goes back;
            # and so do rows and columns.
            of_a_step = 3 + bool(TABLE[name].factors) if TABLE[name].has_sums else 0
            assert allocations() - blocks == 3 * of_a_step, kind


# Capture --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(device):
    if device != "simt":
        pytest.skip("the emulated device says that it captures; tests of graphs do capture")
    from trainopt._extension import _C

    _C.simt.set_capturing(True)


@each_adam
def test_a_count_on_the_host_cannot_be_captured(device, name, request):
    optimizer, params = make(name, device)
    set_gradients(params, PROBLEM[1][0])
    optimizer.step()
    request.getfixturevalue("capturing")
    before = optimizer.completed_steps
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert optimizer.completed_steps == before


@each_unread
def test_a_parameter_without_a_gradient_cannot_be_captured(device, name, request):
    optimizer, params = make(name, device, **counts_on_device(name))
    set_gradients(params, PROBLEM[1][0])
    optimizer.step()
    params[2].grad = None
    request.getfixturevalue("capturing")
    with pytest.raises(RuntimeError, match="parameter 2 has no gradient"):
        optimizer.step()
    params[2].requires_grad_(False)
    optimizer.step()


@each_unread
def test_what_counts_on_the_device_can_be_captured(device, name, request):
    optimizer, params = make(name, device, **with_device_numbers(name, device))
    set_gradients(params, PROBLEM[1][0])
    optimizer.step()
    request.getfixturevalue("capturing")
    optimizer.step()
    assert trainopt.explain(optimizer)[0].path == f"fused ({device})"


@each_on_host
def test_numbers_of_the_host_cannot_be_captured(device, name, request):
    optimizer, params = make(name, device, **with_device_numbers(name, device))
    set_gradients(params, PROBLEM[1][0])
    optimizer.step()
    request.getfixturevalue("capturing")
    before = judge.progress_of(optimizer)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        optimizer.step()
    assert judge.progress_of(optimizer) == before
