"""LinearCrossEntropyLoss is torch's module: values, gradients, arguments, copies; where torch has none, too."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_losses_linear_dropin import (
    CLASS_WEIGHT,
    DEEP_LABELS,
    LABELS,
    OPTIONS,
    TOKENS,
    WIDTH,
    WORDS,
    X,
    has_torchs,
)
from torch import nn

import trainopt
from trainopt import functional
from trainopt.losses import linear, older_torch

MODULES = {
    "plain": {},
    "all": {"bias": True, "weight": CLASS_WEIGHT, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "sum"},
    "K-dimensional": {"out_features": (3, 2), "bias": True},
    "options": {"options": OPTIONS(batch_chunk_size=2)},
}
each_module = pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)


def target_of(options):
    return DEEP_LABELS if options.get("out_features") else LABELS


def seeded(make, options):
    torch.manual_seed(0)
    return make(WIDTH, WORDS, **options)


@has_torchs
@each_module
def test_the_module_is_torchs(options):
    ours, torchs = (seeded(make, options) for make in (trainopt.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss))
    assert isinstance(ours, nn.LinearCrossEntropyLoss) and repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    target = target_of(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (ours, torchs):
            module(X, target).backward()
    torch.testing.assert_close(ours(X, target), torchs(X, target))
    for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    torchs.load_state_dict(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())


@each_module
def test_the_module_of_an_older_torch(options, monkeypatch):
    """The one whose base trainopt makes itself."""
    monkeypatch.setattr(linear, "_torch_function", None)
    body = dict(vars(trainopt.LinearCrossEntropyLoss))
    body = {name: body[name] for name in ("forward", *trainopt.LinearCrossEntropyLoss.EXTRAS)}
    older = type("LinearCrossEntropyLoss", (older_torch.LinearCrossEntropyLoss,), body)
    module, same = (seeded(make, options) for make in (older, trainopt.LinearCrossEntropyLoss))
    assert isinstance(module, nn.Module) and repr(module) == repr(same)
    assert module.state_dict().keys() == same.state_dict().keys()
    target = target_of(options)
    torch.testing.assert_close(module(X, target), same(X, target))


def test_arguments_that_the_module_refuses():
    for options, words in (
        ({"weight": torch.ones(6)}, r"expected weight shape to be \(7,\), got \(6,\)"),
        ({"label_smoothing": 1.5}, r"expected label_smoothing to be in range \[0, 1\], got 1.5"),
    ):
        for module in (trainopt.LinearCrossEntropyLoss, older_torch.LinearCrossEntropyLoss):
            with pytest.raises(RuntimeError, match=words):
                module(WIDTH, WORDS, **options)


def test_the_module_is_the_function_with_its_own_layer():
    extras = {"z_loss": 0.1, "softcap": 3.0, "empty": "zero", "memory_budget": 100, "out_dtype": torch.float64}
    extras["temperature"] = 2.0
    module = trainopt.LinearCrossEntropyLoss(WIDTH, WORDS, bias=True, return_z_loss=True, **extras)
    found = module(X, LABELS)
    layer = module.linear
    expected = functional.linear_cross_entropy(
        X, layer.weight, LABELS, linear_bias=layer.bias, return_z_loss=True, **extras
    )
    torch.testing.assert_close(found, expected)


def test_the_modules_weight_can_be_tied_and_its_hooks_fire():
    embedding = nn.Embedding(WORDS, WIDTH)
    module = trainopt.LinearCrossEntropyLoss(WIDTH, WORDS)
    module.linear.weight = embedding.weight
    seen = []
    module.register_forward_pre_hook(lambda module, _: seen.append(module.linear.weight.shape))
    module(embedding(torch.arange(TOKENS)), LABELS).backward()
    assert seen == [(WORDS, WIDTH)] and embedding.weight.grad.abs().sum() > 0


def test_a_weight_that_is_not_gathered():
    for out_features in ((), (3,)):
        module = trainopt.LinearCrossEntropyLoss(WIDTH, WORDS, out_features=out_features)
        module.linear.weight = nn.Parameter(torch.empty(0))
        with pytest.raises(RuntimeError, match="gather the weight first"):
            module(X, LABELS)


@each_module
def test_the_module_can_be_copied_pickled_and_saved(options):
    module = trainopt.LinearCrossEntropyLoss(WIDTH, WORDS, out_dtype=torch.float64, **options)
    target = target_of(options)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert type(other) is type(module) and torch.equal(other(X, target), module(X, target))


@has_torchs
def test_a_pickle_of_torchs_module_becomes_ours():
    """As it does where ours stands in torch's place when it is loaded."""
    torchs = nn.LinearCrossEntropyLoss(WIDTH, WORDS, bias=True)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            is_torchs = name == "LinearCrossEntropyLoss"
            return trainopt.LinearCrossEntropyLoss if is_torchs else super().find_class(module, name)

    ours = Unpickler(io.BytesIO(pickle.dumps(torchs))).load()
    assert type(ours) is trainopt.LinearCrossEntropyLoss
    torch.testing.assert_close(ours(X, LABELS), torchs(X, LABELS))
