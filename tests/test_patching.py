"""trainopt in torch's place, by `patch` or by hand: what is replaced and comes back, classes, files and programs."""

import abc
import copy
import io
import pickle
import runpy
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from patches import BEFORE, LABELS, REPLACED, rows, standing
from torch import nn
from torch.nn import functional as F

import trainopt

pytestmark = pytest.mark.usefixtures("torch_restored")

# What is replaced, and for how long -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "name"), REPLACED, ids=lambda part: part)
def test_every_name_is_ours_and_then_torchs_again(place, name):
    ours = {"_get_total_norm": trainopt.get_total_norm, "get_total_norm": trainopt.get_total_norm}
    ours |= {"clip_grad_norm_": trainopt.clip_grad_norm_, "_clip_grads_with_norm_": trainopt.clip_grads_with_norm_}
    expected = ours.get(name) or getattr(trainopt, name, None) or getattr(trainopt.functional, name)
    with trainopt.patched():
        assert vars(sys.modules[place])[name] is expected
    assert vars(sys.modules[place])[name] is BEFORE[place, name]


def test_everything_that_trainopt_has_of_torchs_is_replaced():
    names = {name for _, name in REPLACED}
    classes = {name for name in trainopt.__all__ if isinstance(getattr(trainopt, name), type)}
    classes -= {"Schedule", "LinearCrossEntropyOptions"}
    classes = {name for name in classes if getattr(trainopt, name) is not getattr(torch.optim, name, None)}
    functions = {name for name in trainopt.functional.__all__ if hasattr(F, name)}
    assert {name for name in classes if hasattr(torch.optim, name) or hasattr(nn, name)} | functions <= names
    assert {"clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"} <= names


def test_trainopt_has_every_optimizer_of_torchs():
    """`import trainopt as optim` is enough."""
    torchs = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer"}
    assert torchs <= set(trainopt.__all__)
    assert all(issubclass(getattr(trainopt, name), getattr(torch.optim, name)) for name in torchs)


def test_a_patch_is_undone_once():
    patch = trainopt.patch()
    assert F.cross_entropy is trainopt.functional.cross_entropy
    patch.undo()
    patch.undo()
    assert standing() == BEFORE
    with trainopt.patch() as patch:
        patch.undo()
        assert standing() == BEFORE
    assert standing() == BEFORE


@pytest.mark.parametrize("first", [0, 1])
def test_patches_overlap(first):
    patches = [trainopt.patch(), trainopt.patch()]
    patches[first].undo()
    assert F.cross_entropy is trainopt.functional.cross_entropy
    patches[1 - first].undo()
    assert standing() == BEFORE
    with trainopt.patched(), trainopt.patched():
        assert torch.optim.AdamW is trainopt.AdamW
    assert standing() == BEFORE


def test_an_exception_puts_torch_back():
    with pytest.raises(ZeroDivisionError), trainopt.patched():
        1 / 0  # noqa: B018
    assert standing() == BEFORE


def test_a_decorator():
    @trainopt.patched()
    def made():
        return type(torch.optim.SGD([torch.zeros(1)]))

    assert made() is made() is trainopt.SGD and standing() == BEFORE


def test_a_block_that_is_not_entered_changes_nothing():
    trainopt.patched()
    assert standing() == BEFORE


def test_what_somebody_else_has_put_there(monkeypatch):
    """Before: it comes back. Meanwhile: it stays."""

    def theirs(*arguments, **options):
        raise AssertionError("not called")

    monkeypatch.setattr(F, "mse_loss", theirs)
    with trainopt.patched():
        assert F.mse_loss is trainopt.functional.mse_loss
    assert F.mse_loss is theirs
    with trainopt.patched():
        F.l1_loss = theirs
    assert F.l1_loss is theirs
    F.l1_loss = BEFORE["torch.nn.functional", "l1_loss"]
    monkeypatch.undo()


def test_threads_share_a_patch():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with trainopt.patched():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with trainopt.patched():
        seen.append(F.cross_entropy)
        leave.set()
        thread.join()
        seen.append(F.cross_entropy)
    assert seen == 2 * [trainopt.functional.cross_entropy] and standing() == BEFORE


def test_many_threads_at_once():
    def often():
        for _ in range(50):
            with trainopt.patched():
                assert torch.optim.Adam is trainopt.Adam

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert standing() == BEFORE


# Imported after somebody else -----------------------------------------------------------------------------------------

LATE = """
    import functools
    import sys
    import torch
    from torch import nn
    F = torch.nn.functional

    def calls_trainopt(find, original=None):
        def theirs(*arguments, **options):
            return find()(*arguments, **options)
        return theirs if original is None else functools.wraps(original)(theirs)

    def later(name):
        def find():
            import trainopt
            return getattr(trainopt.functional, name, None) or getattr(trainopt, name)
        return find

    expected = F.mse_loss(torch.ones(3, dtype=torch.float64), torch.zeros(3)), torch.optim.AdamW
    for name in ("cross_entropy", "mse_loss", "l1_loss", "kl_div", "huber_loss"):
        setattr(F, name, calls_trainopt(later(name), getattr(F, name) if name.startswith("m") else None))
    for place in (torch.nn.utils, torch.nn.utils.clip_grad):
        place.clip_grad_norm_ = calls_trainopt(later("clip_grad_norm_"), place.clip_grad_norm_)
    torch.nn.utils.get_total_norm = torch.nn.utils.clip_grad._get_total_norm = calls_trainopt(later("get_total_norm"))

    class Theirs(torch.optim.AdamW):
        def step(self, closure=None):
            raise AssertionError("not torch's step")

    class TheirLoss(nn.CrossEntropyLoss):
        def forward(self, input, target):
            raise AssertionError("not torch's forward")

    torch.optim.AdamW = sys.modules["torch.optim.adamw"].AdamW = Theirs
    torch.optim.SGD = sys.modules["torch.optim.sgd"].SGD = functools.partial(torch.optim.SGD, momentum=0.9)
    torch.optim.Adam.step = lambda self, closure=None: 1 / 0
    nn.CrossEntropyLoss = torch.nn.modules.loss.CrossEntropyLoss = TheirLoss

    import trainopt

    torchs = {cls.__module__ + "." + cls.__name__ for cls in trainopt.AdamW.__mro__}
    assert Theirs not in trainopt.AdamW.__mro__ and "torch.optim.adamw.AdamW" in torchs
    assert TheirLoss not in trainopt.CrossEntropyLoss.__mro__

    def refused(error, call):
        try:
            call()
        except error as caught:
            return str(caught)
        raise AssertionError("not refused")

    labels = torch.tensor([0, 1])
    refused(RuntimeError, lambda: F.cross_entropy(torch.ones(2, 3), labels.int()))
    assert F.cross_entropy(torch.ones(2, 3, device="meta"), labels.to("meta")).is_meta
    assert torch.equal(F.mse_loss(torch.ones(3, dtype=torch.float64), torch.zeros(3)), expected[0])
    assert F.l1_loss(torch.ones(3, dtype=torch.complex64), torch.zeros(3)) == 1
    assert F.kl_div(torch.zeros(2, device="meta"), torch.zeros(2, device="meta"), reduction="sum").is_meta
    assert torch.func.vmap(F.huber_loss)(torch.ones(2), torch.zeros(2)).tolist() == [0.5, 0.5]
    for order in (3, 2):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        assert abs(torch.nn.utils.clip_grad_norm_([p], 0.1, order).item() - 3 ** (1 / order)) < 1e-6
        assert p.grad.norm(order) < 0.11
    refused(RuntimeError, lambda: torch.nn.utils.get_total_norm([torch.tensor([torch.inf])], 2.0, True))
    for cls in (trainopt.AdamW, trainopt.Adam, trainopt.SGD):
        p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        p.grad = torch.ones(2, dtype=torch.complex64)
        cls([p], lr=0.1).step()
        assert p.real.max() < 1
    loss = trainopt.CrossEntropyLoss()(torch.ones(2, 3, device="meta"), labels.to("meta"))
    assert loss.is_meta
    print("done")
"""


def test_imported_when_others_stand_in_torchs_place():
    """With functions that say what they wrap, and with such as do not; with classes, and with what is none."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LATE)], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


# Classes --------------------------------------------------------------------------------------------------------------


class Before(torch.optim.Adam):
    """Somebody's class, made while torch's stood there."""

    def step(self, closure=None):
        return super().step(closure)


class LossBefore(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


def test_isinstance_and_issubclass_answer_for_torchs_class(in_place):
    p = [nn.Parameter(torch.ones(2))]
    made = {"AdamW": torch.optim.AdamW(p), "Adam": torch.optim.Adam(p), "SGD": torch.optim.SGD(p), "Before": Before(p)}
    losses = {"CrossEntropyLoss": nn.CrossEntropyLoss(), "LossBefore": LossBefore(), "MSELoss": nn.MSELoss()}
    asked = [(made, torch.optim, name) for name in ("AdamW", "Adam", "SGD", "Optimizer")]
    asked += [(losses, nn, name) for name in ("CrossEntropyLoss", "MSELoss", "Module")]

    def answers():
        return [
            (key, name, isinstance(thing, getattr(place, name)), issubclass(type(thing), getattr(place, name)))
            for things, place, name in asked
            for key, thing in things.items()
        ]

    expected = answers()
    assert not isinstance(made["AdamW"], trainopt.AdamW) and not isinstance(losses["MSELoss"], trainopt.MSELoss)
    in_place()
    assert answers() == expected
    # What is made now is what it would have been.
    made.update(AdamW=torch.optim.AdamW(p), Adam=torch.optim.Adam(p), SGD=torch.optim.SGD(p))
    losses.update(CrossEntropyLoss=nn.CrossEntropyLoss(), MSELoss=nn.MSELoss())
    assert type(made["AdamW"]) is trainopt.AdamW and type(losses["MSELoss"]) is trainopt.MSELoss
    assert answers() == expected


def test_classes_that_derive_from_what_stands_there(in_place):
    in_place()

    class Mine(torch.optim.AdamW):
        def __init__(self, params, lr):
            super().__init__(params, lr, (0.9, 0.99))

        def step(self, closure=None):
            return super().step(closure)

    class Abstract(nn.CrossEntropyLoss, abc.ABC):
        @abc.abstractmethod
        def name(self): ...

    class Concrete(Abstract):
        def name(self):
            return "concrete"

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Mine([param], 0.1)
    optimizer.step()
    assert isinstance(optimizer, trainopt.AdamW) and isinstance(optimizer, torch.optim.Adam) and param.max() < 1
    before = Before([param], lr=0.1)
    before.step()
    assert trainopt.explain(optimizer) and type(before).__mro__[1] is trainopt.originals.Adam
    with pytest.raises(TypeError, match="abstract"):
        Abstract()
    assert Concrete()(rows(), LABELS) == trainopt.functional.cross_entropy(rows(), LABELS)
    assert LossBefore()(rows(), LABELS) == 2 * trainopt.functional.cross_entropy(rows(), LABELS)


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def an_optimizer(name="AdamW"):
    param = nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, name)([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def test_files_of_before(in_place):
    """Pickles and state dicts that torch's classes made."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.CrossEntropyLoss(torch.ones(5))])
    optimizers = [an_optimizer(name) for name in ("SGD", "Adam", "AdamW")]
    files, states = [saved(optimizer) for optimizer in optimizers], [saved(o.state_dict()) for o in optimizers]
    file = saved(model)
    in_place()
    torch.testing.assert_close(loaded(file)[1](rows(), LABELS), model[1](rows(), LABELS))
    for old, data, state in zip(optimizers, files, states, strict=True):
        again = loaded(data)
        fresh = type(again)([nn.Parameter(torch.ones(3))], lr=0.1)
        fresh.load_state_dict(torch.load(io.BytesIO(state)))
        fresh.param_groups[0]["params"][0].data.copy_(old.param_groups[0]["params"][0].data)
        for optimizer in (old, again, fresh):
            param = optimizer.param_groups[0]["params"][0]
            param.grad = torch.ones(3)
            optimizer.step()
            torch.testing.assert_close(param, old.param_groups[0]["params"][0])


def test_files_of_now(in_place):
    """Of what is made in torch's place: state dicts name nothing of trainopt, and whole objects come back."""
    loss = nn.CrossEntropyLoss(torch.ones(5))
    expected = loss(rows(), LABELS)
    in_place()
    optimizer, criterion = an_optimizer(), nn.CrossEntropyLoss(torch.ones(5))
    assert b"trainopt" not in saved(optimizer.state_dict()) + saved(criterion.state_dict())
    for again in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer), loaded(saved(optimizer))):
        assert type(again) is trainopt.AdamW
    torch.testing.assert_close(loaded(saved(criterion))(rows(), LABELS), expected)
    # Objects of torch's own classes, made before.
    assert type(loaded(saved(loss))) is type(copy.deepcopy(loss)) is trainopt.originals.CrossEntropyLoss


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("copied", [lambda o: loaded(saved(o)), copy.deepcopy, copy.copy], ids=["file", "deep", "copy"])
def test_an_optimizer_of_torchs_that_is_copied(name, copied, in_place):
    """Its class can be found under its name no more, where ours stands: the copy is of what is found there."""
    old = an_optimizer(name)
    in_place()
    new = copied(old)
    assert isinstance(new, getattr(torch.optim, name))
    for optimizer in (old, new):
        if copied is not copy.copy or optimizer is old:
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
    torch.testing.assert_close(new.param_groups[0]["params"], old.param_groups[0]["params"])


# A program that knows nothing of trainopt -----------------------------------------------------------------------------

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

torch.manual_seed(0)
data, labels = torch.randn(256, 10), torch.randint(4, (256,))
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = AdamW(model.parameters(), lr=1e-2)
schedule = CosineAnnealingLR(optimizer, 40)
losses = []
for step in range(40):
    rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
    optimizer.zero_grad()
    output = model(data[rows])
    loss = criterion(output, labels[rows]) + 0.1 * F.mse_loss(output, torch.zeros_like(output))
    loss.backward()
    clip_grad_norm_(model.parameters(), 0.5 if step % 2 else 0.4, norm_type=3.0 if step % 5 == 0 else 2.0)
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
state = optimizer.state_dict()
"""


def test_a_program_that_knows_nothing_of_trainopt(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    plain = runpy.run_path(str(script))
    with trainopt.patched():
        found = runpy.run_path(str(script))
    assert type(plain["optimizer"]) is torch.optim.AdamW and type(found["optimizer"]) is trainopt.AdamW
    assert type(found["criterion"]) is trainopt.CrossEntropyLoss
    assert found["losses"][-1] < found["losses"][0]
    torch.testing.assert_close(found["losses"], plain["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["model"].state_dict(), plain["model"].state_dict(), rtol=1e-4, atol=1e-5)
    theirs = torch.optim.AdamW(plain["model"].parameters())
    theirs.load_state_dict(found["state"])
    assert set(plain["state"]["state"][0]) == set(found["state"]["state"][0])
