"""What a loss counts: accumulated micro-batches of any shape give the gradient of the one big batch, for any loss."""

import functools
import warnings

import pytest
import torch
from test_training_loop import Recorder
from torch import nn
from torch.nn import functional as F

import trainopt
from trainopt.training import Silent, fit

pytestmark = pytest.mark.usefixtures("one_thread")


CE, OURS = nn.CrossEntropyLoss, trainopt.CrossEntropyLoss
CLASSES = 4
WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Linear(5, CLASSES).double()


def flat(function):
    """A loss of (rows, length, classes) and (rows, length) by one of (N, classes) and (N)."""
    return lambda output, target: function(output.flatten(0, 1), target.flatten())


class Holder(nn.Module):
    """A person's own module round a criterion."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, output, target):
        return self.criterion(output.transpose(1, 2), target)


class Direct(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.inner = criterion

    def forward(self, output, target):
        return self.inner(output, target)


class Focal:
    """A callable object that is no module, with a mask of its own."""

    def __call__(self, output, target):
        log_p = F.log_softmax(output, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        losses = -((1 - log_p.exp()) ** 2) * log_p
        keep = target != 0
        return (losses * keep).sum() / keep.sum()


class Opaque(torch.autograd.Function):
    """A mean that no one sees being made."""

    @staticmethod
    def forward(ctx, losses):
        ctx.shape = losses.shape
        return torch.from_numpy(losses.detach().numpy().mean(keepdims=True)).reshape(())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.expand(ctx.shape) / ctx.shape.numel()


def scripted(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(thing)


def typed_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=0)


def traced(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(thing, (torch.randn(2, 3, CLASSES), torch.zeros(2, 3, dtype=torch.long)))


def traced_criterion():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(CE(ignore_index=0), (torch.randn(2, CLASSES), torch.zeros(2, dtype=torch.long)))


def of_scripted(function):
    return lambda output, target: function(output * 1.0, target)


def compiled(thing):
    return torch.compile(thing, backend="eager")


def ignoring(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=0)


def masked(output, target, end=lambda n: n):
    losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    keep = target.flatten() != 0
    return (losses * keep).sum() / end(keep.sum())


def indexed(output, target):
    losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    return losses[target.flatten() != 0].mean()


def guarded(end):
    """A loss that returns something else where there is nothing to be counted."""
    return lambda output, target: ignoring(output, target) if (target != 0).any() else end(output)


def shifted(output, target):
    return F.cross_entropy(output[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)


def sum_and_count(output, target):
    losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=0)
    return losses, (target != 0).sum()


def sum_and_number(output, target):
    total, count = sum_and_count(output, target)
    return total, int(count)


def two_terms(output, target):
    return 0.5 * ignoring(output, target) + 0.1 * masked(output, target) + 1e-3


def in_place(output, target):
    loss = ignoring(output, target)
    loss *= 2
    loss += 1.0
    return loss.to(torch.float64).squeeze() / 3


def sampled(output, target):
    """The mean over samples of each sample's own mean."""
    losses = [F.cross_entropy(o, t, ignore_index=0) for o, t in zip(output, target, strict=True)]
    return torch.stack(losses).mean()


def summed(output, target):
    losses = [F.cross_entropy(o, t, ignore_index=0) for o, t in zip(output, target, strict=True)]
    return sum(losses) / len(losses)


def counted(output, target):
    """The sum over what is not 0, and how many that is."""
    losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    keep = target.flatten() != 0
    return losses[keep].sum(), keep.sum()


def counted_shifted(output, target):
    return counted(output[:, :-1], target[:, 1:])


def counted_weighted(output, target):
    losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), WEIGHT, reduction="none", ignore_index=0)
    weights = torch.where(target != 0, WEIGHT[target], 0.0)
    return losses.sum(), weights.sum()


def counted_all(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum"), target.numel()


def counted_focal(output, target):
    keep = target != 0
    return Focal()(output, target) * keep.sum() if keep.any() else output.sum() * 0, keep.sum()


def counted_sampled(output, target):
    losses = [F.cross_entropy(o, t, ignore_index=0) for o, t in zip(output, target, strict=True)]
    return sum(losses), len(losses)


def scaled(factor, function):
    return lambda *arguments: (factor * function(*arguments)[0], function(*arguments)[1])


#: A loss of (rows, length, classes) and classes of which 0 is padding, and the (sum, count) that it stands for.
LABELLED = {
    "lambda": (lambda: ignoring, counted),
    "closure": (lambda: flat(CE(ignore_index=0)), counted),
    "closure, ours": (lambda: flat(OURS(ignore_index=0)), counted),
    "partial of ours": (lambda: functools.partial(flat_with, criterion=OURS(ignore_index=0)), counted),
    "holder": (lambda: Holder(CE(ignore_index=0)), counted),
    "holder, ours": (lambda: Holder(OURS(ignore_index=0)), counted),
    "holder's forward": (lambda: Holder(CE(ignore_index=0)).forward, counted),
    "holder, compiled": (lambda: compiled(Holder(CE(ignore_index=0))), counted),
    "holder of a compiled one": (lambda: Holder(compiled(CE(ignore_index=0))), counted),
    "holder, scripted": (lambda: scripted(Holder(CE(ignore_index=0))), counted),
    "function, compiled": (lambda: compiled(ignoring), counted),
    "function, scripted": (lambda: scripted(typed_loss), counted),
    "function, traced": (lambda: traced(ignoring), counted),
    "shifted": (lambda: shifted, counted_shifted),
    "shifted, compiled": (lambda: compiled(shifted), counted_shifted),
    "weights": (lambda: flat(CE(WEIGHT, ignore_index=0)), counted_weighted),
    "weights, ours": (lambda: Holder(OURS(WEIGHT, ignore_index=0)), counted_weighted),
    "nll": (lambda: lambda o, t: F.nll_loss(F.log_softmax(o, -1).flatten(0, 1), t.flatten()), counted_all),
    "masked": (lambda: masked, counted),
    "masked, at least 1": (lambda: functools.partial(masked, end=lambda n: n.clamp(min=1)), counted),
    "masked, maximum": (lambda: functools.partial(masked, end=lambda n: torch.maximum(n, torch.tensor(1))), counted),
    "masked, and a little": (lambda: functools.partial(masked, end=lambda n: n + 1e-12), counted),
    "masked, a number": (lambda: functools.partial(masked, end=lambda n: max(n.item(), 1)), counted),
    "masked, a number that may be 0": (lambda: functools.partial(masked, end=int), counted),
    "guarded, a sum by 0": (lambda: guarded(lambda output: output.sum() * 0), counted),
    "guarded, a mean by 0.0": (lambda: guarded(lambda output: 0.0 * output.mean()), counted),
    "guarded, a leaf": (lambda: guarded(lambda output: torch.zeros((), requires_grad=True)), counted),
    "guarded, a leaf alike": (lambda: guarded(lambda output: output.new_zeros(()).requires_grad_()), counted),
    "indexed": (lambda: indexed, counted),
    "an object": (lambda: Focal(), counted_focal),
    "sum and count": (lambda: sum_and_count, counted),
    "sum and number": (lambda: sum_and_number, counted),
    "two terms": (lambda: two_terms, scaled(0.6, counted)),
    "in place": (lambda: in_place, scaled(2 / 3, counted)),
    "stack of samples": (lambda: sampled, counted_sampled),
    "sum of samples": (lambda: summed, counted_sampled),
}


def flat_with(output, target, criterion):
    return criterion(output.flatten(0, 1), target.flatten())


def labelled_batches(empty=True):
    """Micro-batches of different sizes and lengths, of which 0 is padding; in one, 4 rows hold 3 + 1 + 0 + 0 tokens."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows, length in ((4, 5), (3, 6), (2, 5), (5, 3)):
        inputs = torch.randn(rows, length, 5, dtype=torch.float64, generator=generator)
        target = torch.randint(1, CLASSES, (rows, length), generator=generator)
        target[:, -1] = 0
        batches.append((inputs, target))
    few = batches[0][1]
    few.zero_()
    few[0, :3], few[1, 1] = 2, 3
    if empty:
        batches.insert(1, (batches[0][0] + 1, torch.zeros_like(few)))
    return batches


def batches_for(name):
    """For a row of LABELLED; a sample without any token has no mean of its own."""
    batches = labelled_batches(empty="samples" not in name)
    if "samples" in name:
        for _, target in batches:
            target[:, 0] = 1
    return batches


#: What some rows add to each loss without a part in the gradient.
CONSTANTS = {"two terms": 1e-3, "in place": 1 / 3}


def assert_gradient_of_the_big_batch(batches, loss, reference, owned=(), **choices):
    """One update of SGD over all micro-batches is that of sum / count over all of them."""
    ours, plain = network(), network()
    totals = [reference(plain(inputs), target) for inputs, target in batches]
    count = sum(count for _, count in totals)
    expected = sum(total for total, _ in totals) / count
    expected.backward()
    optimizer = torch.optim.SGD([*ours.parameters(), *owned], lr=1.0)
    recorder = Recorder()
    choices = {"validation": batches, "report": recorder, **choices}
    result = fit(ours, batches, loss, optimizer, epochs=1, accumulation=len(batches), **choices)
    assert result.step == 1
    for param, other, start in zip(ours.parameters(), plain.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(start - param, other.grad, rtol=1e-9, atol=1e-12)
    return result, recorder, expected


@pytest.mark.parametrize("name", LABELLED)
def test_the_gradient_is_that_of_the_big_batch(name):
    make, reference = LABELLED[name]
    _, recorder, expected = assert_gradient_of_the_big_batch(batches_for(name), make(), reference)
    assert not [event for event in recorder.named("Message") if event.topic == "count"]
    shown = recorder.named("Progress")[-1].loss
    assert shown == pytest.approx(expected.item() + CONSTANTS.get(name, 0.0), rel=1e-6)


@pytest.mark.parametrize("name", LABELLED)
def test_the_validation_loss_is_the_mean_over_all_that_is_counted(name):
    make, reference = LABELLED[name]
    batches, model = batches_for(name), network()
    with torch.no_grad():
        totals = [reference(model(inputs), target) for inputs, target in batches]
    expected = float(sum(float(total) for total, _ in totals) / sum(count for _, count in totals))
    recorder, optimizer = Recorder(), torch.optim.SGD(model.parameters(), lr=0.0)
    fit(model, batches[-1:], make(), optimizer, epochs=1, validation=batches, report=recorder)
    assert recorder.named("Validated")[-1].loss == pytest.approx(expected + CONSTANTS.get(name, 0.0), rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        CE(ignore_index=0),
        OURS(ignore_index=0),
        CE(ignore_index=0).forward,
        functools.partial(F.cross_entropy, ignore_index=0),
        functools.partial(functools.partial(trainopt.functional.cross_entropy, ignore_index=0), label_smoothing=0.0),
        compiled(CE(ignore_index=0)),
        compiled(functools.partial(F.cross_entropy, ignore_index=0)),
        scripted(CE(ignore_index=0)),
        traced_criterion(),
        Direct(CE(ignore_index=0)),
        compiled(Direct(OURS(ignore_index=0))),
        lambda output, target: CE(ignore_index=0)(output, target),
        nn.Sequential(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_ignore_index_is_seen_through_whatever_stands_round_the_loss(loss):
    if isinstance(loss, nn.Sequential):  # compiled in place
        loss = CE(ignore_index=0)
        loss.compile(backend="eager")
    batches = [(inputs.flatten(0, 1), target.flatten()) for inputs, target in labelled_batches()]

    def reference(output, target):
        return F.cross_entropy(output, target, reduction="sum", ignore_index=0), (target != 0).sum()

    _, recorder, _ = assert_gradient_of_the_big_batch(batches, loss, reference)
    assert not [event for event in recorder.named("Message") if event.topic == "count"]
    assert recorder.named("Validated")[-1].loss == recorder.named("Validated")[-1].loss  # it is no NaN


def test_tokens_that_happen_to_be_as_many_as_rows_are_not_taken_for_rows():
    """Four rows hold 3 + 1 + 0 + 0 tokens: with plain tensors the count was once taken from the shape."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 5, CLASSES, 3, dtype=torch.float64, generator=generator)
    target = torch.full((4, 3), -100)
    target[0], target[1, 1] = 2, 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 1).double()

        def forward(self, inputs):
            return self.linear(inputs.transpose(1, 3)).squeeze(-1).transpose(1, 2)

    ours, plain = Model(), Model()
    F.cross_entropy(plain(inputs), target).backward()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    choices = {"epochs": 1, "batch_size": 1, "accumulation": 4, "shuffle": False, "report": Silent()}
    fit(ours, (inputs, target), CE(), optimizer, **choices)
    torch.testing.assert_close(Model().linear.weight - ours.linear.weight, plain.linear.weight.grad)


def elements(losses):
    return losses.sum(), losses.numel()


def rows(losses):
    return losses.sum(), len(losses)


LOG = functools.partial(F.log_softmax, dim=-1)
#: A loss of two tensors of one shape, and its (sum, count).
ELEMENTWISE = {
    "mse": (nn.MSELoss(), lambda o, t: elements((o - t) ** 2)),
    "mse, ours": (trainopt.MSELoss(), lambda o, t: elements((o - t) ** 2)),
    "mse, function": (F.mse_loss, lambda o, t: elements((o - t) ** 2)),
    "mse, by hand": (lambda o, t: (o - t).pow(2).mean(), lambda o, t: elements((o - t) ** 2)),
    "mse, compiled": (compiled(lambda o, t: (o - t).pow(2).mean()), lambda o, t: elements((o - t) ** 2)),
    "l1": (nn.L1Loss(), lambda o, t: elements((o - t).abs())),
    "smooth l1": (nn.SmoothL1Loss(), lambda o, t: elements(F.smooth_l1_loss(o, t, reduction="none"))),
    "huber": (trainopt.HuberLoss(delta=0.5), lambda o, t: elements(F.huber_loss(o, t, reduction="none", delta=0.5))),
    "bce": (
        lambda o, t: F.binary_cross_entropy(o.sigmoid(), t.sigmoid()),
        lambda o, t: elements(F.binary_cross_entropy(o.sigmoid(), t.sigmoid(), reduction="none")),
    ),
    "bce with logits": (
        Direct(nn.BCEWithLogitsLoss()),
        lambda o, t: elements(F.binary_cross_entropy_with_logits(o, t, reduction="none")),
    ),
    "kl": (
        lambda o, t: F.kl_div(LOG(o), LOG(t), log_target=True, reduction="mean"),
        lambda o, t: elements(F.kl_div(LOG(o), LOG(t), log_target=True, reduction="none")),
    ),
    "kl batchmean": (
        lambda o, t: F.kl_div(LOG(o), LOG(t), log_target=True, reduction="batchmean"),
        lambda o, t: rows(F.kl_div(LOG(o), LOG(t), log_target=True, reduction="none")),
    ),
    "kl batchmean, module": (
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        lambda o, t: rows(F.kl_div(o, t, log_target=True, reduction="none")),
    ),
    "poisson": (nn.PoissonNLLLoss(), lambda o, t: elements(F.poisson_nll_loss(o, t, reduction="none"))),
    "gaussian": (
        lambda o, t: F.gaussian_nll_loss(o, t, torch.full_like(o, 0.5)),
        lambda o, t: elements(F.gaussian_nll_loss(o, t, torch.full_like(o, 0.5), reduction="none")),
    ),
    "soft margin": (nn.SoftMarginLoss(), lambda o, t: elements(F.soft_margin_loss(o, t, reduction="none"))),
    "multilabel soft margin": (
        nn.MultiLabelSoftMarginLoss(),
        lambda o, t: elements(F.multilabel_soft_margin_loss(o, t, reduction="none")),
    ),
    "cosine": (
        lambda o, t: F.cosine_embedding_loss(o.flatten(0, -2), t.flatten(0, -2), torch.ones(t[..., 0].numel())),
        lambda o, t: elements(1 - F.cosine_similarity(o.flatten(0, -2), t.flatten(0, -2))),
    ),
    "sum of squares of a row": (
        lambda o, t: ((o - t) ** 2).flatten(1).sum(1).mean(),
        lambda o, t: rows((o - t) ** 2),
    ),
    "mean of each row": (
        lambda o, t: ((o - t) ** 2).flatten(1).mean(1).mean(),
        lambda o, t: elements(((o - t) ** 2).flatten(1).mean(1)),
    ),
    "sum over columns of their means": (
        lambda o, t: ((o - t) ** 2).flatten(1).mean(0).sum(),
        lambda o, t: rows((o - t) ** 2),
    ),
    "a sum over a number": (lambda o, t: ((o - t) ** 2).sum() / o.shape[0], lambda o, t: rows((o - t) ** 2)),
    "torch.mean of an axis": (
        lambda o, t: torch.mean(torch.norm(o - t, dim=-1)),
        lambda o, t: elements(torch.norm(o - t, dim=-1)),
    ),
    "probabilities": (
        lambda o, t: F.cross_entropy(o.flatten(0, -2), t.softmax(-1).flatten(0, -2)),
        lambda o, t: elements(F.cross_entropy(o.flatten(0, -2), t.softmax(-1).flatten(0, -2), reduction="none")),
    ),
    "weighted elements": (
        lambda o, t: ((o - t) ** 2 * t.abs()).sum() / t.abs().sum(),
        lambda o, t: (((o - t) ** 2 * t.abs()).sum(), t.abs().sum()),
    ),
    "a penalty on top": (
        lambda o, t: F.mse_loss(o, t) + 0.0 * torch.ones(()).exp(),
        lambda o, t: elements((o - t) ** 2),
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_means_over_elements_are_weighed_by_elements(name):
    loss, reference = ELEMENTWISE[name]
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4, 5), (2, 7, 5), (4, 1, 5), (1, 2, 5)]
    batches = [
        (
            torch.randn(shape, dtype=torch.float64, generator=generator),
            torch.randn(*shape[:-1], CLASSES, dtype=torch.float64, generator=generator),
        )
        for shape in shapes
    ]
    _, recorder, expected = assert_gradient_of_the_big_batch(batches, loss, reference)
    assert not [event for event in recorder.named("Message") if event.topic == "count"]
    assert recorder.named("Progress")[-1].loss == pytest.approx(expected.item(), rel=1e-6)


# What cannot be known -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: Opaque.apply(F.mse_loss(output, target, reduction="none")),
        lambda output, target: F.mse_loss(output, target).sqrt(),
        lambda output, target: F.mse_loss(output, target, reduction="sum"),
        lambda output, target: 1 - (output * target).sum() / (output.square().sum() + target.square().sum()),
    ],
    ids=["opaque", "root", "sum", "dice"],
)
def test_what_cannot_be_known_is_said_once(loss):
    batches = [(torch.randn(rows, 5).double(), torch.randn(rows, CLASSES).double()) for rows in (3, 2, 4)]
    recorder = Recorder()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fit(model, batches, loss, optimizer, epochs=3, accumulation=2, validation=batches, report=recorder)
    (message,) = [event for event in recorder.named("Message") if event.topic == "count"]
    assert "weighed by the samples" in message.text and "(sum, count)" in message.text
    alone = Recorder()
    fit(model, batches, loss, optimizer, epochs=1, report=alone)  # nothing depends on it
    assert not [event for event in alone.named("Message") if event.topic == "count"]


class Duck(nn.Module):
    """A loss of some other library, with the arguments that everybody has, computed where no one looks."""

    def __init__(self, ignore_index):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, "mean"

    def forward(self, output, target):
        losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
        return Opaque.apply(losses[target.flatten() != self.ignore_index])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (of_scripted(scripted(typed_loss)), "what the loss in its graph counts"),
        (of_scripted(scripted(CE(ignore_index=0))), "what the cross_entropy in it counts"),
        (of_scripted(scripted(Direct(CE(ignore_index=0)))), "what the cross_entropy in it counts"),
        (Duck(0), "not its ignore_index, 0"),
    ],
    ids=["closure of a function", "closure of a module", "closure of a holder", "module"],
)
def test_what_is_guessed_well_is_right_and_said(loss, words):
    batches = labelled_batches(empty=False)
    if "cross_entropy" in words:
        batches = [(inputs.flatten(0, 1), target.flatten()) for inputs, target in batches]
        _, recorder, _ = assert_gradient_of_the_big_batch(batches, loss, lambda o, t: counted(o[None], t[None]))
    else:
        _, recorder, _ = assert_gradient_of_the_big_batch(batches, loss, counted)
    (message,) = [event for event in recorder.named("Message") if event.topic == "count"]
    assert words in message.text


@pytest.mark.parametrize(
    ("loss", "kind", "text"),
    [
        (lambda o, t: 0.5, TypeError, "returned a float; .* a plain number has no gradient"),
        (lambda o, t: F.mse_loss(o, t).item(), TypeError, "returned a float"),
        (lambda o, t: None, TypeError, "returned a NoneType"),
        (lambda o, t: (F.mse_loss(o, t), o), TypeError, r"returned \(.* with a gradient\); .*\(sum, count\)"),
        (lambda o, t: (F.mse_loss(o, t), {"parts": 1}), TypeError, "a dict"),
        (lambda o, t: (F.mse_loss(o, t), F.mse_loss(o, t)), TypeError, "with a gradient"),
        (lambda o, t: (F.mse_loss(o, t), 1, 2), TypeError, "an? int"),
        (lambda o, t: (F.mse_loss(o, t), True), TypeError, "a bool"),
        (lambda o, t: (F.mse_loss(o, t), -1), ValueError, "a count of -1"),
        (lambda o, t: {"loss": F.mse_loss(o, t)}, TypeError, "returned a dict"),
        (lambda o, t: F.mse_loss(o, t, reduction="none"), ValueError, r"shape \(3, 4\); it must return one number"),
        (lambda o, t: F.mse_loss(o.detach(), t), ValueError, "does not depend on any parameter"),
        (nn.KLDivLoss(reduction="sum"), ValueError, "reduction 'sum'"),
        (functools.partial(F.mse_loss, reduction="none"), ValueError, "reduction 'none'"),
        (nn.CrossEntropyLoss(reduction="sum").forward, ValueError, "reduction 'sum'"),
        (trainopt.CrossEntropyLoss(z_loss=0.1, return_z_loss=True), ValueError, "return_z_loss"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused_in_a_sentence(loss, kind, text):
    batches = [(torch.randn(3, 5).double(), torch.randn(3, CLASSES).double())] * 2
    model = network()
    with pytest.raises(kind, match=text):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, batches, loss, optimizer, epochs=1, accumulation=2, report=Silent())
    for param, start in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(param, start)
