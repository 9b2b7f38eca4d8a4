"""A parameter is stepped where it lies, on that device's current stream; what the engine does not take, torch does."""

import judge
import pytest
import torch
from steps import TABLE, UNREAD, assert_same_bits, counts_on_device, here

import trainopt

each_row = pytest.mark.parametrize("name", TABLE)
each_unread = pytest.mark.parametrize("name", UNREAD)
SHAPES = ((5,), (300,), (33, 20), (2, 3), (700,), (9,))
PROBLEM = judge.random_problem(SHAPES, torch.float32, 3)


def run_on(name, places, **options):
    """Steps parameters that lie on these devices, in one optimizer and one group."""
    params = [torch.nn.Parameter(t.to(place, copy=True)) for t, place in zip(PROBLEM[0], places, strict=True)]
    optimizer = TABLE[name].make(params, **{**TABLE[name].everything, **options})
    for now in PROBLEM[1]:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.device)
        optimizer.step()
    return optimizer, params


@pytest.fixture
def on_cpu():
    return lambda name: judge.outcome(*run_on(name, ["cpu"] * len(SHAPES)))


@each_unread
def test_parameters_on_the_cpu_and_on_the_device_in_one_group(device, name, on_cpu):
    optimizer, params = run_on(name, ["cpu", device, device, "cpu", device, "cpu"])
    assert_same_bits(here(judge.outcome(optimizer, params)), on_cpu(name))
    paths = [row.path for row in trainopt.explain(optimizer)]
    assert [path.startswith(f"fused ({p.device.type}") for path, p in zip(paths, params, strict=True)] == [True] * 6


@each_unread
def test_two_devices_in_one_group(device, other_device, name, on_cpu):
    places = [device, other_device, "cpu", other_device, device, other_device]
    assert_same_bits(here(judge.outcome(*run_on(name, places))), on_cpu(name))
    optimizer, params = run_on(name, places, **counts_on_device(name))
    for where, tensors in here(judge.outcome(optimizer, params)).items():
        for found, truth in zip(tensors, on_cpu(name)[where], strict=True):
            torch.testing.assert_close(found, truth)


@each_row
def test_a_device_that_is_not_the_current_one(device, other_device, name, on_cpu):
    module = torch.get_device_module(device)
    before = module.current_device()
    assert_same_bits(here(judge.outcome(*run_on(name, [other_device] * len(SHAPES)))), on_cpu(name))
    assert module.current_device() == before
    with module.device(other_device):
        assert_same_bits(here(judge.outcome(*run_on(name, [f"{device}:0"] * len(SHAPES)))), on_cpu(name))
        assert module.current_device() == 1


@each_row
def test_a_learning_rate_on_another_device_than_the_parameter(device, other_device, name):
    lr = TABLE[name].everything["lr"]
    outcomes = [
        here(judge.outcome(*run_on(name, [device] * len(SHAPES), lr=torch.tensor(lr, device=place))))
        for place in (device, other_device)
    ]
    assert_same_bits(*outcomes)


@each_row
def test_a_side_stream(device, name, on_cpu):
    stream = torch.Stream(device)
    with stream:
        optimizer, params = run_on(name, [device] * len(SHAPES))
    stream.synchronize()
    assert_same_bits(here(judge.outcome(optimizer, params)), on_cpu(name))


@each_row
def test_a_step_on_a_side_stream_is_ordered_with_what_is_there(device, name):
    row, module = TABLE[name], torch.get_device_module(device)
    param = torch.nn.Parameter(torch.zeros(2**20 if device == "cuda" else 300, device=device))
    param.grad = torch.zeros_like(param)
    optimizer = row.make([param], lr=1.0, **row.kept({"silent_sgd_phase": False}))
    optimizer.step()
    module.synchronize()
    stream = module.Stream()
    with module.stream(stream):
        if device == "cuda":  # the emulated device does all as late as it may
            torch.cuda._sleep(100_000_000)
        param.grad.fill_(1.0)
        optimizer.step()
        result = param.detach().clone()
    stream.synchronize()
    assert (result != 0).all()


# What torch does ------------------------------------------------------------------------------------------------------


def assert_torch_takes_it(make_params, set_gradients, device, refused_by=()):
    """With torch's results, and the other parameter's step fused, unless parameters have something in common."""
    for name, row in TABLE.items():
        if name in refused_by:
            continue
        outcomes = []
        for cls in (row.ours, row.peer):
            params = [*make_params(), torch.nn.Parameter(torch.ones(5, device=device))]
            optimizer = cls(params, lr=0.1)
            for _ in range(2):
                set_gradients(params[0])
                params[1].grad = torch.ones(5, device=device)
                optimizer.step()
            outcomes.append(params)
            if cls is row.ours:
                other = f"fused ({device})" if row.in_common is None else "torch"  # all go one way
                assert [path.path for path in trainopt.explain(optimizer)] == ["torch", other], name
        for ours, torchs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours.detach().cpu(), torchs.detach().cpu())


def test_a_complex_parameter(device):
    def set_gradient(p):
        p.grad = torch.full((4,), 1 + 2j, dtype=torch.complex64, device=device)

    def make():
        return [torch.nn.Parameter(torch.ones(4, dtype=torch.complex64, device=device))]

    assert_torch_takes_it(make, set_gradient, device, refused_by=("Adafactor",))  # as torch's class does


def test_a_subclass(device):
    class Mine(torch.nn.Parameter):
        pass

    def set_gradient(p):
        p.grad = torch.ones(4, device=device)

    assert_torch_takes_it(lambda: [Mine(torch.ones(4, device=device))], set_gradient, device)


@pytest.mark.gpu
def test_a_sparse_gradient(device):
    for cls in (trainopt.SGD, torch.optim.SGD):
        table = torch.nn.Embedding(10, 3, sparse=True, device=device)
        torch.nn.init.ones_(table.weight)
        table(torch.tensor([1, 2], device=device)).sum().backward()
        cls(table.parameters(), lr=0.5).step()
        assert table.weight.detach().cpu()[:4].sum(1).tolist() == [3.0, 1.5, 1.5, 3.0]


def overlapping(params, whole):
    for p in params:
        p.grad = torch.arange(6.0, device=p.device)


def gradient_of_the_others_memory(params, whole):
    params[0].grad, params[1].grad = params[1].detach(), torch.arange(6.0, device=whole.device)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("share", [overlapping, gradient_of_the_others_memory], ids=lambda share: share.__name__)
def test_memory_that_two_parameters_share(device, flags, share):
    """By torch's plain loop, whatever is asked for: its foreach kernels race for such memory."""
    for name, row in TABLE.items():
        results = []
        for make, chosen in ((row.ours, flags), (row.make_plain_loop, {})):
            whole = torch.linspace(-1, 1, 20, device=device)
            parts = [whole[:6], whole[4:10]] if share is overlapping else [whole[:6], whole[10:16]]
            params = [torch.nn.Parameter(part) for part in parts]
            optimizer = make(params, lr=0.1, **chosen)
            for _ in range(2):
                share(params, whole)
                optimizer.step()
            results.append(whole.cpu())
        torch.testing.assert_close(*results, msg=name)


def test_a_step_moves_version_counters(device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (param * param).sum()
    param.grad = torch.ones(3, device=device)
    trainopt.SGD([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
