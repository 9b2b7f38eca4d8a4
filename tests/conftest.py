"""What the tests share: the devices, the SIMD variants, and settings of the process that every test leaves as it found
them. And what they do without: a file that imports an optional package which is not installed is skipped, and says so.
"""

import functools
import gc
from collections import defaultdict
from zlib import crc32

import patches
import pytest
import torch
from devices import DEVICES, HAS_GPU, IS_EMULATED, VARIANTS
from torch.optim.optimizer import _get_scalar_dtype

import trainopt
from trainopt._extension import _C

#: Packages of the extras in pyproject.toml. Any other module that is missing is an error.
OPTIONAL = {"expecttest", "hypothesis", "matplotlib", "mlxtend", "numpy", "rich", "tensorboard"}
OPTIONAL |= {"accelerate", "ignite", "lightning", "peft", "timm", "transformers", "trl"}
OPTIONAL |= {"lion_pytorch", "prodigyopt", "pytorch_optimizer", "schedulefree"}


def of_elements(loop):
    """torch's Adafactor divides by the number of a parameter's elements, also where there are none. For the tests it
    only counts the steps of those, as trainopt's does."""

    @functools.wraps(loop)
    def with_empty(params, *others, **options):
        *lists, steps = (params, *others[:5])
        kept = [i for i, p in enumerate(params) if p.numel() > 0]
        for i in range(len(params)):
            if i not in kept:
                steps[i] += 1
        return loop(*([of[i] for i in kept] for of in (*lists, steps)), *others[5:], **options)

    return with_empty


for name in ("_single_tensor_adafactor", "_multi_tensor_adafactor"):
    setattr(torch.optim._adafactor, name, of_elements(getattr(torch.optim._adafactor, name)))


#: The tests of devices are not even loaded where none is: each of thousands was a line of its own that says so.
collect_ignore = [] if IS_EMULATED or HAS_GPU else ["cuda"]


def pytest_report_header():
    return "tests/cuda is left out: there is neither a GPU nor `make emulated`" if collect_ignore else None


def pytest_addoption(parser):
    parser.addoption("--emulated", action="store_true", help="fail unless trainopt is the one on the emulated device")
    parser.addoption("--gpu", action="store_true", help="fail unless there is a GPU that trainopt is built for")
    parser.addoption(
        "--architectures",
        type=lambda text: tuple(map(int, text.split(","))),
        default="75,80,86,90,100,120",
        help="those that CUDA's kernels are compiled for, to look at the machine code (%(default)s)",
    )
    parser.addoption("--rows", type=part_of, metavar="N/M", help="of the rows of each test, the N-th part of M")


def part_of(text):
    part, of = map(int, text.split("/"))
    if not 1 <= part <= of:
        raise ValueError(text)
    return part, of


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a real GPU")
    if config.getoption("--emulated", default=False) and not IS_EMULATED:
        raise pytest.UsageError(f"trainopt is built for {_C.device_types()}, not for the emulated device")
    if config.getoption("--gpu", default=False) and not HAS_GPU:
        found = "finds a GPU" if torch.cuda.is_available() else "finds no GPU"
        raise pytest.UsageError(f"trainopt is built for {_C.device_types()}, and torch {found}")


def pytest_collection_modifyitems(config, items):
    """Leaves of each test the part of its rows that --rows names, drawn by their names, and one row at least."""
    if not config.getoption("--rows", default=None):
        return
    part, of = config.getoption("--rows")
    rows = defaultdict(list)
    for item in items:
        rows[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for of_a_test in rows.values():
        drawn = {item: (crc32(item.nodeid.encode()) - part + 1) % of for item in of_a_test}
        kept.update([item for item in of_a_test if drawn[item] == 0] or [min(of_a_test, key=drawn.__getitem__)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish():
    """Leaves what there is by now out of the garbage collector's passes: with 30,000 tests each took seconds."""
    gc.collect()
    gc.freeze()


def mend_torchs_adagrad():
    """In torch 2.11 a parameter that is added after the construction has no state, and its step is a KeyError."""
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))])
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones(1)
    try:
        optimizer.step()
        return
    except KeyError:
        gather = torch.optim.Adagrad._init_group

    def gather_with_states(self, group, *lists):
        value, params = self.defaults["initial_accumulator_value"], list(group["params"])
        for p in params:
            if p.grad is not None and not self.state.get(p):
                filling = complex(value, value) if p.is_complex() else value
                made = torch.full_like(p, filling, memory_format=torch.preserve_format)
                self.state[p] = {"step": torch.tensor(0.0, dtype=_get_scalar_dtype()), "sum": made}
        return gather(self, {**group, "params": params}, *lists)

    torch.optim.Adagrad._init_group = gather_with_states


mend_torchs_adagrad()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Else one such import, direct or by way of torch.testing._internal, would end the run before the first test."""
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed and report.call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = str(collector.path), None, f"Skipped: the package {error.name} is not installed"
    return report


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def own_random_numbers():
    """A test that draws without a generator of its own draws the same whatever ran before it: with those of others one
    in a hundred draws was of a loss that nobody could tell from another."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_faults():
    """Fails a test whose kernels race, read what was never set, or leave the memory that they were given."""
    if not IS_EMULATED:
        yield
        return
    _C.simt.take_faults()
    yield
    _C.simt.forbid_synchronisation(False)
    _C.simt.set_capturing(False)
    _C.simt.set_order(ascending=True)
    _C.simt.set_device(0)
    faults = _C.simt.take_faults()
    _C.simt.set_seed()
    assert not faults, "\n".join(faults)


@pytest.fixture(autouse=True)
def process_settings():
    """Puts back the number of threads and the SIMD variant."""
    threads, variant = torch.get_num_threads(), _C.cpu_variant()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _C.set_cpu_variant(variant)


@pytest.fixture
def one_thread():
    """For what is too small to be divided among several."""
    torch.set_num_threads(1)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Runs the test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_digits(monkeypatch):
    """Sixty random digits in place of the 5,000, so that a run takes no time."""
    from trainopt.experiments import digits, mnist

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(60) % 10
        images = torch.rand(60, 784, generator=generator) * 0.1
        images[torch.arange(60), labels] = 1
        return mnist.Digits(images[20:], labels[20:], images[:20], labels[:20])

    monkeypatch.setattr(digits, "embedded_digits", make)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Each SIMD variant that the processor can run, set for the test."""
    _C.set_cpu_variant(request.param)
    return request.param


@pytest.fixture
def each_variant():
    """Iterates over the SIMD variants that the processor can run, setting each."""

    def iterate():
        for name in VARIANTS:
            _C.set_cpu_variant(name)
            yield name

    return iterate


@pytest.fixture
def torch_restored():
    """Fails a test that leaves anything of trainopt's in torch's place, and takes it away."""
    yield
    assert not patches.take_away()


@pytest.fixture(params=["patch", "by hand"])
def in_place(request, monkeypatch):
    """A call that puts trainopt in torch's place until the test ends."""
    if request.param == "by hand":
        yield lambda: patches.by_hand(monkeypatch)
        monkeypatch.undo()
    else:
        made = []
        yield lambda: made.append(trainopt.patch())
        for patch in made:
            patch.undo()
