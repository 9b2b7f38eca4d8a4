"""What trainopt.explain says of losses and of clipping; of optimizers, see test_tools."""

import functools
import os
import subprocess
import sys

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
        (trainopt.clip_grad_value_, [("clip_grad_value_", FUSED)]),
        (trainopt.clip_grads_with_norm_, [("clip_grads_with_norm_", FUSED)]),
        (nn.utils.clip_grad_norm_, [("clip_grad_norm_", "torch")]),
        (nn.utils.clip_grad_value_, [("clip_grad_value_", "torch")]),
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


ALL_PATHS = """
import os, torch, trainopt
os.environ["TRAINOPT_REFERENCE"] = "" if os.environ.get("TRAINOPT_REFERENCE") else "1"  # too late to matter
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = trainopt.AdamW([p])
optimizer.step()
loss = trainopt.functional.mse_loss(p, torch.zeros(3))
told = [*trainopt.explain(optimizer), *trainopt.explain(trainopt.MSELoss(), p, torch.zeros(3))]
told += trainopt.explain(trainopt.clip_grad_norm_, [p])
done = [optimizer._plan is None, "trainopt" not in loss.grad_fn.name().lower()]
print({row.path == "torch" for row in told} | set(done))
"""


@pytest.mark.slow
@pytest.mark.parametrize("forced", ["1", "", "0"])
def test_the_reference_is_asked_for_once_and_holds_for_everything(forced):
    environment = {**os.environ, "TRAINOPT_REFERENCE": forced}
    done = subprocess.run([sys.executable, "-c", ALL_PATHS], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ("{True}" if forced == "1" else "{False}"), done.stderr
