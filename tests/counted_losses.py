"""Losses of every form that people write, and the (sum, count) that each of them stands for."""

import functools
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import trainopt

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


def quietly(make):
    """torch's compilers of before warn that they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def scripted(thing):
    return quietly(lambda: torch.jit.script(thing))


def traced(thing, *output):
    example = torch.randn(*output, CLASSES), torch.zeros(*output, dtype=torch.long)
    return quietly(lambda: torch.jit.trace(thing, example))


def typed_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=0)


def of_scripted(function):
    return lambda output, target: function(output * 1.0, target)


def compiled(thing):
    return torch.compile(thing, backend="eager")


def ignoring(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=0)


def each_and_kept(output, target):
    """The loss of each class, and whether it counts."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none"), target.flatten() != 0


def masked(output, target, end=lambda n: n):
    losses, keep = each_and_kept(output, target)
    return (losses * keep).sum() / end(keep.sum())


def indexed(output, target):
    losses, keep = each_and_kept(output, target)
    return losses[keep].mean()


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


def of_samples(output, target):
    """Each sample's own mean."""
    return [F.cross_entropy(o, t, ignore_index=0) for o, t in zip(output, target, strict=True)]


def sampled(output, target):
    return torch.stack(of_samples(output, target)).mean()


def summed(output, target):
    losses = of_samples(output, target)
    return sum(losses) / len(losses)


def counted(output, target):
    """The sum over what is not 0, and how many that is."""
    losses, keep = each_and_kept(output, target)
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
    losses = of_samples(output, target)
    return sum(losses), len(losses)


def scaled(factor, function):
    return lambda *arguments: (factor * function(*arguments)[0], function(*arguments)[1])


def flat_with(output, target, criterion):
    return criterion(output.flatten(0, 1), target.flatten())


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
    "function, traced": (lambda: traced(ignoring, 2, 3), counted),
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

#: What some rows add to each loss without a part in the gradient.
CONSTANTS = {"two terms": 1e-3, "in place": 1 / 3}


# Of two tensors of one shape ------------------------------------------------------------------------------------------


def elements(losses):
    return losses.sum(), losses.numel()


def rows(losses):
    return losses.sum(), len(losses)


def each(function, count=elements, **options):
    return lambda o, t: count(function(o, t, reduction="none", **options))


def squares(o, t):
    return elements((o - t) ** 2)


def squares_by_rows(o, t):
    return rows((o - t) ** 2)


LOG = functools.partial(F.log_softmax, dim=-1)
#: A loss of two tensors of one shape, and its (sum, count).
ELEMENTWISE = {
    "mse": (nn.MSELoss(), squares),
    "mse, ours": (trainopt.MSELoss(), squares),
    "mse, function": (F.mse_loss, squares),
    "mse, by hand": (lambda o, t: (o - t).pow(2).mean(), squares),
    "mse, compiled": (compiled(lambda o, t: (o - t).pow(2).mean()), squares),
    "l1": (nn.L1Loss(), lambda o, t: elements((o - t).abs())),
    "smooth l1": (nn.SmoothL1Loss(), each(F.smooth_l1_loss)),
    "huber": (trainopt.HuberLoss(delta=0.5), each(F.huber_loss, delta=0.5)),
    "bce": (
        lambda o, t: F.binary_cross_entropy(o.sigmoid(), t.sigmoid()),
        lambda o, t: elements(F.binary_cross_entropy(o.sigmoid(), t.sigmoid(), reduction="none")),
    ),
    "bce with logits": (Direct(nn.BCEWithLogitsLoss()), each(F.binary_cross_entropy_with_logits)),
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
        each(F.kl_div, count=rows, log_target=True),
    ),
    "poisson": (nn.PoissonNLLLoss(), each(F.poisson_nll_loss)),
    "gaussian": (
        lambda o, t: F.gaussian_nll_loss(o, t, torch.full_like(o, 0.5)),
        lambda o, t: elements(F.gaussian_nll_loss(o, t, torch.full_like(o, 0.5), reduction="none")),
    ),
    "soft margin": (nn.SoftMarginLoss(), each(F.soft_margin_loss)),
    "multilabel soft margin": (nn.MultiLabelSoftMarginLoss(), each(F.multilabel_soft_margin_loss)),
    "cosine": (
        lambda o, t: F.cosine_embedding_loss(o.flatten(0, -2), t.flatten(0, -2), torch.ones(t[..., 0].numel())),
        lambda o, t: elements(1 - F.cosine_similarity(o.flatten(0, -2), t.flatten(0, -2))),
    ),
    "sum of squares of a row": (lambda o, t: ((o - t) ** 2).flatten(1).sum(1).mean(), squares_by_rows),
    "mean of each row": (
        lambda o, t: ((o - t) ** 2).flatten(1).mean(1).mean(),
        lambda o, t: elements(((o - t) ** 2).flatten(1).mean(1)),
    ),
    "sum over columns of their means": (lambda o, t: ((o - t) ** 2).flatten(1).mean(0).sum(), squares_by_rows),
    "a sum over a number": (lambda o, t: ((o - t) ** 2).sum() / o.shape[0], squares_by_rows),
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
    "a penalty on top": (lambda o, t: F.mse_loss(o, t) + 0.0 * torch.ones(()).exp(), squares),
}
