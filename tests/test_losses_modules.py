"""The modules, and what does not go through the operators: subclasses, modes, other devices, TRAINOPT_REFERENCE."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from loss_judge import classes, random
from torch import nn
from torch.nn import functional as F

import trainopt
from trainopt import functional
from trainopt.losses import dispatch
from trainopt.training.criterion.counting import default_count

X, T = random(6, 5).float(), random(6, 5, seed=1).softmax(1).float()
LABELS, WEIGHT = classes((6,), 5), random(5, seed=2).abs().float()
MODULES = {
    "CrossEntropyLoss": ({"weight": WEIGHT, "ignore_index": 2, "label_smoothing": 0.1}, X, LABELS),
    "MSELoss": ({}, X, T),
    "L1Loss": ({}, X, T),
    "SmoothL1Loss": ({"beta": 0.3}, X, T),
    "HuberLoss": ({"delta": 0.3}, X, T),
    "BCELoss": ({"weight": WEIGHT}, X.sigmoid(), T),
    "BCEWithLogitsLoss": ({"weight": WEIGHT, "pos_weight": WEIGHT + 1}, X, T),
    "KLDivLoss": ({"log_target": True}, X.log_softmax(1), T.log()),
}
each_module = pytest.mark.parametrize("name", MODULES)
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


@each_module
def test_a_module_is_torchs(name):
    options, x, t = MODULES[name]
    for reduction in ("none", "mean", "sum"):
        ours, torchs = (getattr(side, name)(reduction=reduction, **options) for side in (trainopt, nn))
        assert isinstance(ours, getattr(nn, name))
        assert repr(ours) == repr(torchs)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        torch.testing.assert_close(ours(x, t), torchs(x, t))
        ours.load_state_dict(torchs.state_dict())
    assert getattr(trainopt, name) in vars(trainopt).values() and name in trainopt.__all__


@each_module
def test_signatures_have_torchs(name):
    ours, torchs = (inspect.signature(getattr(side, name)).parameters for side in (trainopt, nn))
    assert list(ours)[: len(torchs)] == list(torchs)
    for key, parameter in torchs.items():
        assert ours[key].default == parameter.default and ours[key].kind == parameter.kind
    assert all(ours[key].kind is inspect.Parameter.KEYWORD_ONLY for key in list(ours)[len(torchs) :])


@pytest.mark.parametrize("name", sorted({*functional.__all__} - {"linear_cross_entropy", "check_targets"}))
def test_functions_have_torchs_signatures(name):
    ours, torchs = (inspect.signature(getattr(side, name)).parameters for side in (functional, F))
    assert list(ours)[: len(torchs)] == list(torchs)
    assert all(ours[key].default == parameter.default for key, parameter in torchs.items())
    assert all(ours[key].kind is inspect.Parameter.KEYWORD_ONLY for key in list(ours)[len(torchs) :])


@each_module
def test_modules_can_be_copied_pickled_and_saved(name):
    options, x, t = MODULES[name]
    module = getattr(trainopt, name)(**options)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(module) and torch.equal(other(x, t), module(x, t))


def test_the_extras_of_the_module():
    options = {"z_loss": 0.1, "softcap": 3.0, "empty": "zero", "inplace_backward": True, "temperature": 2.0}
    module = pickle.loads(pickle.dumps(trainopt.CrossEntropyLoss(return_z_loss=True, **options)))
    loss, z = module(X, LABELS)
    expected, expected_z = functional.cross_entropy(X, LABELS, return_z_loss=True, **options)
    assert torch.equal(loss, expected) and torch.equal(z, expected_z)


def test_functions_are_found_wherever_one_looks():
    import trainopt.functional as imported
    from trainopt.losses import functional as home

    assert imported is trainopt.functional
    assert all(getattr(imported, name) is getattr(home, name) for name in home.__all__)


def test_training_is_the_same():
    def train(criterion):
        torch.manual_seed(0)
        model = nn.Linear(5, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            criterion(model(X), LABELS).backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(train(trainopt.CrossEntropyLoss()), train(nn.CrossEntropyLoss()))


def test_the_training_loop_counts_by_class_weights_and_not_by_the_layers_weight():
    target, twos = torch.tensor([0, 1, 2, -100]), torch.full((7,), 2.0)
    plain = trainopt.LinearCrossEntropyLoss(5, 7)
    assert default_count(plain)(target) == 3
    assert default_count(trainopt.LinearCrossEntropyLoss(5, 7, weight=twos))(target) == 6
    assert default_count(trainopt.LinearCrossEntropyLoss(5, 7, ignore_index=2))(torch.tensor([0, 1, 2, 3])) == 3
    assert default_count(partial(functional.linear_cross_entropy, linear_weight=torch.ones(7, 5)))(target) == 3
    both = partial(functional.linear_cross_entropy, linear_weight=torch.ones(7, 5), weight=twos)
    assert default_count(both)(target) == 6
    assert default_count(partial(both, ignore_index=None))(target) == 6
    assert default_count(trainopt.CrossEntropyLoss(twos))(target) == 6
    assert default_count(partial(functional.cross_entropy, weight=twos))(target) == 6


# What the operators do not take ---------------------------------------------------------------------------------------


@pytest.fixture
def no_operator(monkeypatch):
    """Fails the test if an operator runs."""

    def refuse(*args):
        raise AssertionError("an operator was called")

    class NoExtension:
        def __getattr__(self, name):
            return refuse if name in ("cross_entropy", "pointwise_loss") else getattr(dispatch_C, name)

    dispatch_C = dispatch._C
    monkeypatch.setattr(dispatch, "_C", NoExtension())


@pytest.fixture
def forced(monkeypatch, no_operator):
    monkeypatch.setattr(dispatch, "REFERENCE_FORCED", True)


@each_module
def test_the_reference_can_be_forced(name, forced):
    options, x, t = MODULES[name]
    ours, torchs = (getattr(side, name)(**options) for side in (trainopt, nn))
    assert torch.equal(ours(x, t), torchs(x, t))


def test_the_reference_can_be_forced_for_linear_cross_entropy(forced):
    weight = random(7, 5, seed=3).float()
    loss = functional.linear_cross_entropy(X, weight, LABELS)
    assert torch.equal(loss, F.cross_entropy(F.linear(X, weight), LABELS))


def test_trainopt_reference_forces_it():
    code = "from trainopt.losses import dispatch; print(dispatch.REFERENCE_FORCED)"
    environment = {**os.environ, "TRAINOPT_REFERENCE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True" and dispatch.REFERENCE_FORCED is False


class Logged(torch.Tensor):
    """A subclass that knows torch's functions by name, and no other."""

    calls: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@each_module
def test_a_subclass_sees_torchs_function(name):
    options, x, t = MODULES[name]
    torchs = {"CrossEntropyLoss": "cross_entropy", "BCELoss": "binary_cross_entropy", "KLDivLoss": "kl_div"}
    torchs |= {"BCEWithLogitsLoss": "binary_cross_entropy_with_logits", "MSELoss": "mse_loss", "L1Loss": "l1_loss"}
    torchs |= {"SmoothL1Loss": "smooth_l1_loss", "HuberLoss": "huber_loss"}
    Logged.calls = []
    loss = getattr(trainopt, name)(**options)(x.as_subclass(Logged), t)
    assert type(loss) is Logged and getattr(F, torchs[name]) in Logged.calls
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), getattr(nn, name)(**options)(x, t))


def test_a_subclass_has_the_extras():
    x = X.as_subclass(Logged)
    options = {"z_loss": 0.1, "softcap": 3.0, "return_z_loss": True, "empty": "zero", "temperature": 2.0}
    Logged.calls = []
    found = functional.cross_entropy(x, LABELS, **options)
    for mine, theirs in zip(found, functional.cross_entropy(X, LABELS, **options), strict=True):
        torch.testing.assert_close(mine.as_subclass(torch.Tensor), theirs)
    assert F.cross_entropy in Logged.calls
    loss = functional.linear_cross_entropy(x, random(7, 5).float(), LABELS)
    assert type(loss) is Logged


@each_module
def test_a_mode_may_watch(name):
    from torch.overrides import TorchFunctionMode

    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    options, x, t = MODULES[name]
    with Watch():
        loss = getattr(trainopt, name)(**options)(x, t)
    assert any(function in vars(functional).values() for function in seen)
    assert torch.equal(loss, getattr(trainopt, name)(**options)(x, t))


def test_a_default_device_does_not_turn_the_operators_off(monkeypatch):
    called = []
    genuine = dispatch._C.cross_entropy

    class Watched:
        def __getattr__(self, name):
            called.append(name)
            return genuine if name == "cross_entropy" else getattr(dispatch_C, name)

    dispatch_C = dispatch._C
    monkeypatch.setattr(dispatch, "_C", Watched())
    with torch.device("cpu"):
        functional.cross_entropy(X, LABELS)
    assert called == ["cross_entropy"]


def test_lazy_conjugates_and_negations_are_resolved():
    z = torch.view_as_complex(random(6, 5, 2)).conj()
    negative = z.imag  # with the negative bit
    assert negative.is_neg()
    torch.testing.assert_close(functional.mse_loss(negative, negative + 1), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(functional.cross_entropy(negative, LABELS), F.cross_entropy(negative, LABELS))


def test_complex_input_is_torchs():
    z = torch.view_as_complex(random(6, 2))
    torch.testing.assert_close(functional.l1_loss(z, z + 1), F.l1_loss(z, z + 1))


def test_anomaly_mode_and_hooks():
    x = X.clone().requires_grad_()
    seen = []
    x.register_hook(seen.append)
    with torch.autograd.detect_anomaly(check_nan=True):
        functional.cross_entropy(x, LABELS).backward()
    assert torch.equal(seen[0], x.grad)


def test_saved_tensor_hooks():
    x = X.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = functional.cross_entropy(x, LABELS)
    loss.backward()
    expected = X.clone().requires_grad_()
    F.cross_entropy(expected, LABELS).backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = X.clone().requires_grad_()
    checkpoint(lambda x: functional.cross_entropy(x * 2, LABELS), x, use_reentrant=False).backward()
    y = X.clone().requires_grad_()
    functional.cross_entropy(y * 2, LABELS).backward()
    assert torch.equal(x.grad, y.grad)
