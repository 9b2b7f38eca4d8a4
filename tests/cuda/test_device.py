"""The emulated device is an honest one: what a GPU would not let pass, it does not."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import trainopt
from trainopt._extension import _C

pytestmark = pytest.mark.skipif("simt" not in _C.device_types(), reason="of the emulated device itself")


def test_what_is_copied_there_comes_back(device):
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        value = torch.arange(24).reshape(2, 3, 4).to(dtype)
        for there in (value.to(device), value.mT.to(device).mT, value.to(f"{device}:1").to(device)):
            assert there.device == torch.device(device, 0) and torch.equal(there.cpu(), value)
    assert torch.equal(value.to(device).conj().cpu(), value.conj())
    assert torch.empty(0, 3, device=device).cpu().shape == (0, 3)


def test_it_computes_what_the_cpu_does(device):
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    there = torch.relu(a.to(device) @ b.to(device)).sum(0).mul_(2).to(device)
    assert torch.equal(there.cpu(), torch.relu(a @ b).sum(0).mul_(2))
    half = a.to(device, torch.bfloat16)
    product = torch.ops.aten.mm.dtype(half, half.t(), torch.float32)
    assert product.dtype == torch.float32 and torch.equal(product.cpu(), half.cpu().float() @ half.cpu().float().t())


def test_memory_is_aligned_and_poisoned(device):
    for size in (1, 511, 513):
        block = torch.empty(size, dtype=torch.uint8, device=device)
        assert block.data_ptr() % 512 == 0 and block.cpu().eq(0xFF).all()
    address = torch.ones(100, device=device).data_ptr()
    assert torch.empty(100, device=device).data_ptr() != address  # kept back
    assert torch.empty(100, device=device).isnan().all()


def test_memory_is_counted(device, allocations, allocated):
    count, before = allocations(), allocated()
    block = torch.empty(1000, device=device)
    assert allocations() == count + 1 and allocated() == before + 4000
    del block
    assert allocated() == before
    assert torch.simt.max_memory_allocated() >= before + 4000
    torch.simt.reset_peak_memory_stats()
    assert torch.simt.max_memory_allocated() == before


TOUCH = """
import ctypes, torch
from trainopt._extension import _C
tensor = torch.ones(4, device="simt")
assert tensor.sum().item() == 4
"""


def run_touching(touch):
    return subprocess.run([sys.executable, "-P", "-c", TOUCH + touch], capture_output=True, text=True)


@pytest.mark.parametrize(
    "touch",
    ["print(ctypes.c_float.from_address(tensor.data_ptr()).value)", "ctypes.memset(tensor.data_ptr(), 0, 4)"],
    ids=["reads", "writes"],
)
def test_the_host_is_caught_that_touches_it(touch):
    result = run_touching(touch)
    assert result.returncode < 0 and "touched memory of emulated device 0" in result.stderr, result.stderr


def test_a_kernel_may_write_on_its_device(device):
    tensor = torch.zeros(4, device=device)
    _C.simt.write_by_kernel(tensor.data_ptr() + 4, 2.0)
    assert tensor.tolist() == [0, 2, 0, 0]


def test_a_kernel_is_caught_that_writes_behind_a_tensor(device):
    tensor = torch.zeros(4, device=device)
    _C.simt.write_by_kernel(tensor.data_ptr() + 16, 2.0)
    (fault,) = _C.simt.take_faults()
    assert fault == "device 0: byte 16 was written to, of an allocation of 16 bytes"


def test_a_kernel_is_caught_that_writes_to_what_was_given_back(device):
    address = torch.zeros(4, device=device).data_ptr()
    _C.simt.write_by_kernel(address, 2.0)
    (fault,) = _C.simt.take_faults()
    assert "given back" in fault


def test_a_launch_on_cudas_default_stream_is_caught(device):
    tensor = torch.zeros(4, device=device)
    _C.simt.write_by_kernel(tensor.data_ptr(), 2.0, on_current_stream=False)
    (fault,) = _C.simt.take_faults()
    assert "not on the current stream" in fault


def test_a_kernel_is_caught_that_reaches_for_another_device():
    touch = "_C.simt.write_by_kernel(torch.ones(4, device='simt:1').data_ptr(), 2.0)"
    result = run_touching(touch)
    assert result.returncode < 0 and "touched memory of emulated device 1" in result.stderr, result.stderr


def test_waiting_is_counted_and_can_be_forbidden(device, no_synchronisation):
    tensor = torch.ones(4, device=device)
    before = _C.simt.synchronisations()
    _ = tensor * 2 + torch.zeros(4, device=device)
    tensor.copy_(torch.zeros(4, device=device))
    tensor.fill_(3.0)
    assert _C.simt.synchronisations() == before
    waits = [
        lambda: tensor[0].item(),
        lambda: bool(tensor[0] > 0),
        tensor.cpu,
        lambda: torch.ones(4).to(device),
        lambda: torch.tensor(1.0, device=device),
        tensor.nonzero,
        lambda: torch.equal(tensor, tensor),
    ]
    for wait in waits:
        before = _C.simt.synchronisations()
        wait()
        assert _C.simt.synchronisations() > before
        with no_synchronisation(), pytest.raises(RuntimeError, match="waits for the device"):
            wait()


CANNOT_HOLD = (
    *((torch.int64, 1e300), (torch.int64, math.inf), (torch.uint8, 300)),
    *((torch.float16, 1e5), (torch.bfloat16, 1e39), (torch.float32, 1e300)),
)


@pytest.mark.parametrize(("dtype", "value"), CANNOT_HOLD)
def test_a_number_that_the_dtype_cannot_hold_is_refused_at_the_call(device, dtype, value):
    tensor = torch.ones(3, dtype=dtype, device=device)
    with pytest.raises(RuntimeError, match="without overflow"):
        tensor.fill_(value)
    assert tensor.tolist() == [1, 1, 1]


def test_waiting_is_an_error_in_a_capture(device):
    tensor = torch.ones(4, device=device)
    _C.simt.set_capturing(True)
    with pytest.raises(RuntimeError, match="while a graph is captured"):
        tensor.cpu()


# Streams --------------------------------------------------------------------------------------------------------------

each_seed = pytest.mark.parametrize("seed", range(4))


@pytest.fixture
def streams(device):
    return torch.Stream(device), torch.Stream(device)


def handed_over(streams, write, read, waits, synchronises=True):
    """A number that one stream writes and the other reads, and the host."""
    source, target = torch.zeros(1, device="simt"), torch.zeros(1, device="simt")
    seen = torch.zeros(1).pin_memory()
    torch.simt.synchronize()
    with streams[0]:
        write(source)
    if waits:
        streams[1].wait_stream(streams[0])
    with streams[1]:
        read(source, target)
        seen.copy_(target, non_blocking=True)
    if synchronises:
        streams[1].synchronize()
    found = seen.item()
    torch.simt.synchronize()
    return found


WRITES = [lambda source: source.fill_(1), lambda source: _C.simt.write_by_kernel(source.data_ptr(), 1.0)]
READS = [
    lambda source, target: target.copy_(source),
    lambda source, target: torch.add(source, 0, out=target),
    lambda source, target: _C.simt.copy_by_kernel(source.data_ptr(), target.data_ptr()),
]


@pytest.mark.parametrize("read", READS, ids=["copy", "operator", "kernel"])
@pytest.mark.parametrize("write", WRITES, ids=["operator", "kernel"])
def test_streams_are_ordered_by_events_alone(device, streams, write, read):
    for seed in range(4):
        _C.simt.set_seed(seed)
        assert handed_over(streams, write, read, waits=True) == 1
    _C.simt.set_seed(0)
    assert handed_over(streams, write, read, waits=False) == 0
    assert handed_over(streams, write, read, waits=True, synchronises=False) == 0


@each_seed
def test_memory_that_another_stream_uses_is_kept_if_that_is_said(device, streams, seed):
    _C.simt.set_seed(seed)
    for is_said in (True, False):
        with streams[0]:
            source = torch.ones(100, device=device)
        streams[1].wait_stream(streams[0])
        with streams[1]:
            if is_said:
                source.record_stream(streams[1])
            taken = source * 1
            del source
            seen = taken.cpu()
        assert seen.eq(1).all() if is_said else seed != 0 or seen.isnan().all()


def test_a_step_that_does_not_wait_for_its_gradient_is_caught(device, streams):
    for waits in (True, False):
        param = torch.nn.Parameter(torch.zeros(4, device=device))
        param.grad = torch.zeros(4, device=device)
        torch.simt.synchronize()
        with streams[0]:
            param.grad.fill_(1)
        if waits:
            streams[1].wait_stream(streams[0])
        with streams[1]:
            trainopt.SGD([param], lr=1.0).step()
            assert param.detach().cpu().eq(-1).all() == waits
        torch.simt.synchronize()


# Graphs ---------------------------------------------------------------------------------------------------------------


def captured(streams, work):
    graph = torch.simt.CUDAGraph()
    with torch.simt.graph(graph, stream=streams[0]):
        work()
    return graph


def test_a_graph_does_its_work_when_it_is_replayed(device, streams):
    number, double = torch.ones(3, device=device), torch.zeros(3, device=device)
    graph = captured(streams, lambda: double.copy_(number * 2))
    assert double.tolist() == [0, 0, 0]
    for value in (1.0, 5.0):
        number.fill_(value)
        graph.replay()
        assert double.tolist() == [2 * value] * 3


def test_a_value_of_the_hosts_is_kept_by_a_graph(device, streams):
    """And so is a learning rate that is no tensor on the device, as on CUDA."""
    param = torch.nn.Parameter(torch.zeros(3, device=device))
    param.grad = torch.ones(3, device=device)
    optimizer = trainopt.SGD([param], lr=1.0)
    optimizer.step()
    graph = captured(streams, optimizer.step)
    optimizer.param_groups[0]["lr"] = 5.0
    graph.replay()
    assert param.tolist() == [-2, -2, -2]


def test_a_graphs_memory_is_its_own_and_fresh_in_each_replay(device, streams):
    kept = []
    source, once = torch.ones(100, device=device), torch.ones((), device=device)

    def work():
        kept.append(source * 2)
        passing = torch.empty(100, device=device)
        passing.mul_(once)  # reads what was never set
        kept.append(passing * 1)

    graph = captured(streams, work)
    for _ in range(2):
        graph.replay()
        assert torch.empty(100, device=device).isnan().all()
        assert kept[0].eq(2).all() and kept[1].isnan().all()


REFUSED = {
    "a copy to the host": (lambda t, _: t.cpu(), "not permitted"),
    "a copy from the host": (lambda t, _: t.copy_(torch.ones(4)), "not permitted"),
    "memory that is not pinned": (lambda t, _: t.copy_(torch.ones(4), non_blocking=True), "unless the CPU tensor is"),
    "a number of the device's": (lambda t, _: t[0].item(), "not permitted"),
    "a size of the device's": (lambda t, _: t.nonzero(), "not permitted"),
    "a device": (lambda t, _: torch.simt.synchronize(), "not permitted"),
    "a stream": (lambda t, streams: streams[0].synchronize(), "not permitted"),
    "an event": (lambda t, streams: streams[0].record_event().query(), "not permitted"),
    "cudaMalloc": (lambda t, _: _C.simt.malloc(100), "not permitted"),
    "pinned memory": (lambda t, _: torch.ones(4).pin_memory(), "not permitted"),
    "another stream's past": (lambda t, streams: streams[0].wait_event(t.event), "uncaptured work"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_captured(device, streams, kind):
    work, message = REFUSED[kind]
    tensor = torch.ones(4, device=device)
    tensor.event = streams[1].record_event()
    graph = torch.simt.CUDAGraph()
    with pytest.raises(RuntimeError, match="previous error"), torch.simt.graph(graph, stream=streams[0]):
        with pytest.raises(RuntimeError, match=message):
            work(tensor, streams)
        with pytest.raises(RuntimeError, match="previous error"):
            tensor.fill_(2)
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    assert tensor.sum() == 4


def test_the_legacy_stream_cannot_work_during_a_capture(device, streams):
    tensor = torch.ones(4, device=device)
    legacy = torch.simt.current_stream()
    graph = torch.simt.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="previous error"),
        torch.simt.graph(graph, stream=streams[0]),
        legacy,
        pytest.raises(RuntimeError, match="legacy stream"),
    ):
        tensor.fill_(2)


def test_a_stream_that_joins_a_capture_has_to_come_back(device, streams):
    tensor, other = torch.ones(4, device=device), torch.zeros(4, device=device)

    def work(comes_back):
        streams[1].wait_stream(streams[0])
        with streams[1]:
            other.copy_(tensor)
        if comes_back:
            streams[0].wait_stream(streams[1])
        tensor.add_(other)

    graph = captured(streams, lambda: work(True))
    graph.replay()
    assert tensor.tolist() == [2] * 4
    with pytest.raises(RuntimeError, match="unjoined work"):
        captured(streams, lambda: work(False))


# torch ----------------------------------------------------------------------------------------------------------------


def test_there_are_two_devices(device):
    assert torch.get_device_module(device).device_count() == 2
    tensor = torch.ones(4, device=f"{device}:1")
    assert tensor.device.index == 1 and (tensor * 2).device.index == 1
    with pytest.raises(RuntimeError, match="no device simt:2"):
        torch.ones(4, device=f"{device}:2")


def train(device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, targets = torch.randn(32, 8).to(device), torch.randint(4, (32,)).to(device)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def test_torch_trains_on_it(device):
    for here, there in zip(train("cpu"), train(device), strict=True):
        torch.testing.assert_close(there, here)


def test_autocast_is_cudas(device):
    a = torch.randn(4, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        product = a @ a
        assert product.dtype == torch.bfloat16
        assert torch.nn.functional.softmax(product, -1).dtype == torch.float32


def test_a_tensor_there_can_be_saved_and_copied(device, tmp_path):
    tensor = torch.arange(6.0, device=device)[1:]
    torch.save(tensor, tmp_path / "tensor")
    for again in (copy.deepcopy(tensor), torch.load(tmp_path / "tensor"), tensor.clone()):
        assert again.device.type == device and torch.equal(again.cpu(), tensor.cpu())
    assert torch.load(tmp_path / "tensor", map_location="cpu").device.type == "cpu"
