"""What trainopt.explain says of losses and of clipping; of optimizers, see test_tools."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trainopt
from trainopt._extension import _C

FUSED = f"fused (cpu, {_C.cpu_variant()})"
LOGITS, CLASSES = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
SOFT = torch.rand(4, 3)


def paths(*subject):
    return [(row.name, row.path) for row in trainopt.explain(*subject)]


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.ours, self.theirs = trainopt.CrossEntropyLoss(), nn.MSELoss()

    def forward(self, output, target):
        return self.ours(output, target) + self.theirs(output, output * 2)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (trainopt.CrossEntropyLoss(), [("CrossEntropyLoss", FUSED)]),
        (trainopt.LinearCrossEntropyLoss(3, 4), [("LinearCrossEntropyLoss", FUSED)]),
        (nn.CrossEntropyLoss(), [("CrossEntropyLoss", "torch")]),
        (trainopt.functional.mse_loss, [("mse_loss", FUSED)]),
        (functools.partial(F.mse_loss, reduction="sum"), [("mse_loss", "torch")]),
        (Holder(), [("ours (CrossEntropyLoss)", FUSED), ("theirs (MSELoss)", "torch")]),
        (torch.compile(trainopt.MSELoss(), backend="eager"), [("MSELoss", FUSED)]),
        (trainopt.clip_grad_norm_, [("clip_grad_norm_", FUSED)]),
        (nn.utils.clip_grad_norm_, [("clip_grad_norm_", "torch")]),
        (trainopt.get_total_norm, [("get_total_norm", FUSED)]),
    ],
)
def test_without_inputs_ordinary_tensors_are_assumed(subject, expected):
    assert paths(subject) == expected
    assert "ordinary tensors" in str(trainopt.explain(subject))


@pytest.mark.parametrize(
    ("loss", "target", "expected"),
    [
        (trainopt.CrossEntropyLoss(), CLASSES, [("cross_entropy", FUSED)]),
        (trainopt.CrossEntropyLoss(inplace_backward=True), CLASSES, [("cross_entropy", FUSED)]),
        (trainopt.CrossEntropyLoss(), SOFT, [("cross_entropy", FUSED)]),
        (trainopt.CrossEntropyLoss(), SOFT.clone().requires_grad_(), [("cross_entropy", "torch")]),
        (lambda o, t: F.cross_entropy(o, t), CLASSES, [("cross_entropy", "torch")]),
        (Holder(), CLASSES, [("cross_entropy", FUSED), ("mse_loss", "torch")]),
        (trainopt.functional.mse_loss, SOFT, [("mse_loss", FUSED)]),
        (lambda o, t: (o - t).square().mean(), SOFT, [("<lambda>", "torch")]),
    ],
)
def test_with_inputs_each_loss_that_is_computed_is_told(loss, target, expected):
    logits, before = LOGITS.clone(), torch.get_rng_state()
    assert paths(loss, logits, target) == expected
    assert torch.equal(logits, LOGITS) and not logits.requires_grad and target.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_clipping_is_told_of_the_tensors_at_hand():
    model, table = nn.Linear(3, 2), nn.Embedding(5, 3, sparse=True)
    model(LOGITS).sum().backward()
    table(torch.tensor([1])).sum().backward()
    assert paths(trainopt.clip_grad_norm_, model.parameters()) == [("clip_grad_norm_", FUSED)]
    (row,) = trainopt.explain(trainopt.clip_grad_norm_, table.parameters())
    assert row.path == "torch" and "sparse" in row.reason


def test_what_cannot_be_told_is_refused():
    with pytest.raises(TypeError, match="not a int"):
        trainopt.explain(3)
    with pytest.raises(TypeError, match="give its inputs too"):
        trainopt.explain(lambda output, target: (output - target).square().mean())
