"""The loss is a part of what is trained: what it owns is saved, restored, averaged, brought back and copied with the
model, whatever the loss looks like."""

import functools

import pytest
import torch
from test_training_loop import Recorder
from torch import nn
from torch.nn import functional as F

import trainopt
from trainopt.training import Silent, checkpoint, fit, lr_find
from trainopt.training.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread")


FEATURES, CLASSES = 6, 5


def data(count=40):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, inputs[:, 0].mul(3).long().clamp(-2, 2) + 2


def body(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, FEATURES), nn.BatchNorm1d(FEATURES), nn.Tanh())


class Head(nn.Module):
    """A loss with a layer and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, output, target):
        loss = F.cross_entropy(self.layer(output), target)
        if self.training:
            self.mean.lerp_(loss.detach(), 0.5)
        return loss


class Caller:
    """A callable object that holds a module."""

    def __init__(self, head):
        self.head = head

    def __call__(self, output, target):
        return self.head(output, target)

    def score(self, output, target):
        return self.head(output, target)


def by_closure(head):
    return lambda output, target: head(output, target)


def by_default(head):
    def loss(output, target, head=head):
        return head(output, target)

    return loss


def by_global(head):
    globals()["HEAD"] = head

    def loss(output, target):
        return HEAD(output, target)  # noqa: F821

    return loss


def by_container(head):
    parts = {"head": [head]}
    return lambda output, target: parts["head"][0](output, target)


def loose(head):
    """The parameters alone, as a person holds them who writes functions."""
    weight, bias = head.layer.weight, head.layer.bias
    return lambda output, target: F.cross_entropy(F.linear(output, weight, bias), target)


FORMS = {
    "module": lambda head: head,
    "forward": lambda head: head.forward,
    "compiled": lambda head: torch.compile(head, backend="eager"),
    "closure": by_closure,
    "closure, compiled": lambda head: torch.compile(by_closure(head), backend="eager"),
    "default": by_default,
    "global": by_global,
    "container": by_container,
    "partial": lambda head: functools.partial(by_default(nn.Identity()), head=head),
    "object": Caller,
    "method": lambda head: Caller(head).score,
    "parameters": loose,
}


def run(directory=None, form="module", seed=0, head=None, report=None, **choices):
    """A run whose loss has parameters; the model, the head and the result."""
    model = body(seed)
    head = head or Head()
    optimizer = trainopt.AdamW([*model.parameters(), *head.parameters()], lr=0.05)
    choices = {"epochs": 4, "batch_size": 8, "seed": 1, "directory": directory, **choices}
    loss = FORMS[form](head)
    result = fit(model, data(), loss, optimizer, validation=data(), report=report or Silent(), **choices)
    return model, head, result


def states(*modules):
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def learned(head, form):
    """What of the head is state: a function that holds its parameters alone knows nothing of its buffer."""
    return [*head.parameters()] if form == "parameters" else [*head.state_dict().values()]


@pytest.mark.parametrize("form", FORMS)
def test_a_finished_run_comes_back_with_its_loss(form, tmp_path):
    model, head, first = run(tmp_path, form)
    again, other, second = run(tmp_path, form, seed=5)
    assert second.step == first.step and second.best == first.best
    assert same(states(model), states(again)) and same(learned(head, form), learned(other, form))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_with_its_loss(form, tmp_path):
    straight = run(form=form)
    run(tmp_path, form, epochs=2)
    longer = run(tmp_path, form, seed=5)
    assert same(states(straight[0]), states(longer[0])) and same(learned(straight[1], form), learned(longer[1], form))


def test_the_best_and_the_average_are_those_of_both(tmp_path):
    seen = []

    class Watching(Recorder):
        def validated(self, event):
            super().validated(event)
            seen.append(event.loss)

    model, head, result = run(tmp_path, average=0.5, early_stopping=2, epochs=30, report=Watching())
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert saved["step"] == result.best_step and saved["loss"] == result.best == min(seen)
    for module, part in ((model, "model"), (head, "criterion")):  # the best average is what the run ends with
        assert same(states(module), list(saved[part].values()))
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        value = head.eval()(model.eval()(data()[0]), data()[1])
    assert value.item() == pytest.approx(result.best, rel=1e-6)


def test_the_average_of_the_loss_is_in_the_result():
    _, head, result = run(average=0.5)
    assert set(result.criterion_average) == {"layer.weight", "layer.bias", "mean"}
    assert torch.equal(result.criterion_average["mean"], head.mean)  # buffers as they are
    assert not torch.equal(result.criterion_average["layer.weight"], head.layer.weight)
    head.load_state_dict(result.criterion_average)
    assert "0.weight" in result.average and not any("criterion" in name for name in result.average)


def test_the_loss_is_evaluated_in_evaluation_mode_and_trained_in_training_mode():
    modes = []

    class Noting(Head):
        def forward(self, output, target):
            modes.append((torch.is_grad_enabled(), self.training))
            return super().forward(output, target)

    head = Noting().eval()
    run(head=head, epochs=1)
    assert set(modes) == {(True, True), (False, False)} and head.training


@pytest.mark.parametrize("form", FORMS)
def test_the_range_test_leaves_the_loss_as_it_was(form):
    model, head = body(), Head()
    optimizer = trainopt.AdamW([*model.parameters(), *head.parameters()], lr=0.05)
    before, fresh = states(model, head), states(model, Head())
    assert len(before) == len(fresh)
    curve = lr_find(model, data(), FORMS[form](head), optimizer, steps=20, batch_size=8)
    assert len(curve.rates) > 2 and same(before, states(model, head))
    assert all(param.grad is None for param in (*model.parameters(), *head.parameters()))


def test_our_own_linear_cross_entropy_comes_back(tmp_path):
    def once(seed):
        model = body(seed)
        loss = trainopt.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True)
        optimizer = trainopt.AdamW([*model.parameters(), *loss.parameters()], lr=0.05)
        choices = {"epochs": 4, "batch_size": 8, "accumulation": 2, "directory": tmp_path, "report": Silent()}
        return model, loss, fit(model, data(), loss, optimizer, validation=data(), **choices)

    model, loss, first = once(0)
    again, other, second = once(3)
    assert second.best == first.best and same(states(model, loss), states(again, other))


# Whose parameters there are -------------------------------------------------------------------------------------------


def test_parameters_of_no_one_are_refused(tmp_path):
    model, head, stray = body(), Head(), nn.Linear(3, 2)
    params = [*model.parameters(), *head.parameters()]
    arguments = {"epochs": 1, "batch_size": 8, "report": Silent(), "directory": tmp_path / "run"}
    text = r"optimizer has 2 of 8 parameters that belong to neither model nor loss, of shapes \(2, 3\), \(2,\)"
    with pytest.raises(ValueError, match=text):
        fit(model, data(), head, trainopt.AdamW([*params, *stray.parameters()]), **arguments)
    with pytest.raises(ValueError, match="belong to neither model nor loss"):
        fit(model, data(), lambda o, t: F.cross_entropy(o, t), trainopt.AdamW(params), **arguments)
    with pytest.raises(ValueError, match="belong to neither"):
        lr_find(model, data(), F.cross_entropy, trainopt.AdamW(params), batch_size=8)
    layers = nn.Sequential(nn.Linear(4, CLASSES))
    optimizer = trainopt.AdamW(layers.parameters())
    layers[0] = nn.Linear(4, CLASSES)
    with pytest.raises(ValueError, match="optimizer has no parameter of model"):
        fit(layers, data(), F.cross_entropy, optimizer, **arguments)
    assert not (tmp_path / "run").exists()


def test_some_parameters_of_the_model_are_enough(tmp_path):
    """Frozen layers, adapters beside them, tied weights: the optimizer has what is trained and no more."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.base = nn.Linear(4, CLASSES).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, CLASSES, bias=False)
            self.tied = self.up

        def forward(self, x):
            return self.base(x) + self.tied(self.down(x))

    model = Adapted()
    frozen = states(model.base)
    optimizer = trainopt.AdamW([model.down.weight, model.up.weight], lr=0.1)
    arguments = {"epochs": 2, "batch_size": 8, "directory": tmp_path, "average": 0.9, "report": Silent()}
    fit(model, data(), nn.CrossEntropyLoss(), optimizer, **arguments)
    assert same(frozen, states(model.base)) and not torch.equal(model.up.weight, Adapted().up.weight)
    again = Adapted()
    with torch.no_grad():
        again.base.weight.zero_()
    optimizer = trainopt.AdamW([again.down.weight, again.up.weight], lr=0.1)
    fit(again, data(), nn.CrossEntropyLoss(), optimizer, **arguments)
    assert same(states(model), states(again))


def test_a_loss_that_shares_the_models_weight_trains_it_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(9, FEATURES)

        def forward(self, tokens):
            return self.embedding(tokens)

    def once():
        model, loss = Tied(), trainopt.LinearCrossEntropyLoss(FEATURES, 9)
        loss.linear.weight = model.embedding.weight
        tokens = torch.arange(36).remainder(9)
        choices = {"epochs": 2, "batch_size": 3, "average": 0.5, "directory": tmp_path, "report": Silent()}
        optimizer = trainopt.AdamW(model.parameters(), lr=0.1)
        return model, fit(model, (tokens, tokens.roll(1)), loss, optimizer, **choices)

    model, first = once()
    again, second = once()
    assert torch.equal(model.embedding.weight, again.embedding.weight)
    assert same(list(first.average.values()), list(second.average.values()))


def test_a_teacher_that_the_loss_reaches_is_neither_saved_nor_copied(tmp_path):
    model, teacher = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES).requires_grad_(False)
    inputs = data()[0]

    def loss(output, target):
        return F.mse_loss(output, teacher(target))

    optimizer = trainopt.SGD(model.parameters(), lr=0.1)
    result = fit(model, (inputs, inputs), loss, optimizer, epochs=1, batch_size=8, directory=tmp_path, report=Silent())
    assert torch.load(result.checkpoint, weights_only=True)["criterion"] == {}
    assert Trained(model, loss, optimizer).criterion.owned.state_dict() == {}


# Old files, and other losses ------------------------------------------------------------------------------------------


def as_format_1(path):
    """A checkpoint as version 0.1.0 wrote it."""
    state = torch.load(path, weights_only=True)
    for name in ("criterion", "training_weights", "given"):
        del state[name]
    del state["counters"]["monitored"]
    if (best := state["best"]["weights"]) is not None:
        state["best"]["weights"] = best["model"]
    if (window := state["window"]) is not None:
        window["counts"], window["asked_to_stop"] = window.pop("planned"), False
        del window["asked"], window["is_alone"]
    del state["interval"]["history"]
    lowest = {"lowest": 0.5, "lowest_step": 3, "best_validation": 0.5, "best_step": 3, "train_at_best": 0.5}
    state["watch"] = {"first": None, "recent": [0.5], "intervals": 1, "cause": None, "told": [], "apart": 0, **lowest}
    state["format"] = 1
    checkpoint.write(state, path)


def plain_run(directory, **choices):
    model = body()
    model.append(nn.Linear(FEATURES, CLASSES))
    optimizer = trainopt.AdamW(model.parameters(), lr=0.05)
    choices = {"batch_size": 8, "seed": 1, "average": 0.9, "early_stopping": 100, "checkpoint_every": 3, **choices}
    choices |= {"directory": directory, "report": Silent()}
    return model, fit(model, data(), nn.CrossEntropyLoss(), optimizer, validation=data(), **choices)


def test_a_checkpoint_of_the_format_before_is_read(tmp_path):
    straight, _ = plain_run(tmp_path / "straight", steps=9)
    _, half = plain_run(tmp_path / "half", steps=6)
    as_format_1(half.checkpoint)
    model, result = plain_run(tmp_path / "half", steps=9)
    assert result.step == 9 and same(states(straight), states(model))


def test_a_checkpoint_without_the_losss_parameters_is_refused(tmp_path):
    _, _, result = run(tmp_path)
    as_format_1(result.checkpoint)
    with pytest.raises(ValueError, match="older version, which did not save the parameters of the loss"):
        run(tmp_path)


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    run(tmp_path)
    wider = Head()
    wider.layer = nn.Linear(FEATURES, CLASSES + 1)
    with pytest.raises(ValueError, match=r"another loss: layer.weight is float32 \(5, 6\) there and .* \(6, 6\) here"):
        run(tmp_path, head=wider)


def test_the_weights_of_the_classes_are_an_argument_and_no_state(tmp_path):
    def once(weight, **choices):
        model = nn.Linear(4, CLASSES)
        optimizer = trainopt.SGD(model.parameters(), lr=0.1)
        loss = nn.CrossEntropyLoss(weight)
        fit(model, data(), loss, optimizer, batch_size=8, directory=tmp_path, report=Silent(), **choices)
        return loss

    once(torch.ones(CLASSES), epochs=1)
    assert torch.equal(once(torch.full((CLASSES,), 2.0), epochs=2).weight, torch.full((CLASSES,), 2.0))
    once(None, epochs=3)
