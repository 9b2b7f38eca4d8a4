"""A whole training step captured in a CUDA graph: replayed with other inputs, targets and learning rates, it has the
bits of the same steps without a graph. What it finds wrong with a target is told as ever."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from devices import IS_EMULATED
from torch import Tensor, nn

import trainopt
from trainopt import functional

STEPS, BATCH, WIDTH, CLASSES = 4, 6, 5, 7


def labels(generator):
    return torch.randint(CLASSES, (BATCH,), generator=generator)


def some_ignored(generator):
    return labels(generator).masked_fill(
        torch.arange(BATCH) == int(torch.randint(BATCH, (), generator=generator)), -100
    )


def probabilities(generator):
    return torch.rand(BATCH, CLASSES, generator=generator)


def distributions(generator):
    return torch.softmax(torch.randn(BATCH, CLASSES, generator=generator), -1)


def numbers(generator):
    return torch.randn(BATCH, CLASSES, generator=generator)


def images(generator):
    return torch.randint(CLASSES, (2, BATCH // 2), generator=generator)


class Task(NamedTuple):
    """A loss of the model's outputs, and the targets that it takes."""

    loss: Callable[..., Tensor]
    target: Callable[[torch.Generator], Tensor]
    of_hidden: bool = False  # takes the hidden states and the last layer's weight


def weights_like(target):
    """Class weights, or weights of elements: no two the same."""
    return torch.linspace(0.5, 1.5, CLASSES, device=target.device)


cross_entropy = functional.cross_entropy
TASKS = {
    "cross_entropy": Task(cross_entropy, labels),
    "cross_entropy, ignored": Task(cross_entropy, some_ignored),
    "cross_entropy, sum": Task(lambda x, t: cross_entropy(x, t, reduction="sum"), labels),
    "cross_entropy, none": Task(lambda x, t: (cross_entropy(x, t, reduction="none") * t).mean(), labels),
    "cross_entropy, every option": Task(
        lambda x, t: cross_entropy(x, t, weights_like(x), label_smoothing=0.1, z_loss=0.1), some_ignored
    ),
    "cross_entropy, in place": Task(lambda x, t: cross_entropy(x * 2, t, inplace_backward=True), labels),
    "cross_entropy, probabilities": Task(cross_entropy, distributions),
    "cross_entropy, images": Task(lambda x, t: cross_entropy(x.view(2, BATCH // 2, CLASSES).movedim(-1, 1), t), images),
    "linear_cross_entropy": Task(functional.linear_cross_entropy, labels, of_hidden=True),
    "linear_cross_entropy, chunks": Task(
        lambda h, w, t: functional.linear_cross_entropy(h, w, t, memory_budget=3 * CLASSES * 4), some_ignored, True
    ),
    "linear_cross_entropy, bfloat16": Task(
        lambda h, w, t: functional.linear_cross_entropy(h.bfloat16(), w.bfloat16(), t, label_smoothing=0.1).float(),
        labels,
        True,
    ),
    "mse_loss": Task(functional.mse_loss, numbers),
    "l1_loss": Task(functional.l1_loss, numbers),
    "smooth_l1_loss": Task(functional.smooth_l1_loss, numbers),
    "huber_loss": Task(lambda x, t: functional.huber_loss(x, t, reduction="sum", delta=0.5), numbers),
    "kl_div": Task(lambda x, t: functional.kl_div(x.log_softmax(-1), t, reduction="batchmean"), distributions),
    "binary_cross_entropy": Task(lambda x, t: functional.binary_cross_entropy(x.sigmoid(), t), probabilities),
    "binary_cross_entropy, weights": Task(
        lambda x, t: functional.binary_cross_entropy(x.sigmoid(), t, weights_like(x)), probabilities
    ),
    "binary_cross_entropy_with_logits": Task(
        lambda x, t: functional.binary_cross_entropy_with_logits(x, t, pos_weight=weights_like(x)), probabilities
    ),
}
each_task = pytest.mark.parametrize("task", TASKS)


def by_norm(params):
    return trainopt.clip_grad_norm_(params, 0.5)


def by_value(params):
    trainopt.clip_grad_value_(params, 0.01)
    return torch.zeros((), device=params[0].device)


def by_a_norm_that_is_known(params):
    norm = trainopt.get_total_norm([p.grad for p in params], float("inf"))
    trainopt.clip_grads_with_norm_(params, 0.01, norm)
    return norm


CLIPS = {None: "as they are", by_norm: "by norm", by_value: "by value", by_a_norm_that_is_known: "by a norm known"}


class Training:
    """A model, what it is trained with, and memory for a batch and a learning rate that a graph may read again."""

    def __init__(self, device: str, task: Task, make: Callable, clip: Callable | None, scale: float | None) -> None:
        torch.manual_seed(3)
        self.device, self.task, self.clip = device, task, clip
        self.body = nn.Linear(WIDTH, WIDTH).to(device)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False).to(device)
        self.params = [*self.body.parameters(), *self.head.parameters()]
        self.lr = torch.tensor(0.1, device=device)
        self.optimizer = make(self.params, self.lr)
        self.scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
        self.draw = torch.Generator().manual_seed(5)
        self.input = torch.randn(BATCH, WIDTH, generator=self.draw).to(device)
        self.target = task.target(self.draw).to(device)
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.module = torch.get_device_module(device)
        self.side = self.module.Stream()

    def forward(self) -> Tensor:
        hidden = self.body(self.input).tanh()
        operands = (hidden, self.head.weight) if self.task.of_hidden else (self.head(hidden),)
        return self.task.loss(*operands, self.target)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.forward()
        self.scaler.scale(loss).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.norm.copy_(self.clip(self.params))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss.copy_(loss.detach())

    def on_the_side(self, work: Callable[[], None]) -> None:
        """Where a graph is captured, the steps before it must be done too."""
        self.side.wait_stream(self.module.current_stream())
        with self.module.stream(self.side):
            work()
        self.module.current_stream().wait_stream(self.side)

    def captured(self) -> Any:
        graph = self.module.CUDAGraph()
        with self.module.graph(graph, stream=self.side):
            self.step()
        return graph

    def run(self, step: Callable[[], None], poisoned: int = -1) -> list[Tensor]:
        """All that these steps leave."""
        seen = []
        for i in range(STEPS):
            self.input.copy_(torch.randn(BATCH, WIDTH, generator=self.draw))
            self.target.copy_(self.task.target(self.draw))
            self.lr.fill_(0.1 / (i + 1))
            if i == poisoned:
                self.input[1, 2] = float("inf")
            step()
            seen += [self.loss.clone(), self.norm.clone(), *(p.detach().clone() for p in self.params)]
            seen += [p.grad.clone() for p in self.params]
        for p in self.params:
            seen += [value.clone() for value in self.optimizer.state[p].values() if isinstance(value, Tensor)]
        if self.scaler.is_enabled():
            seen.append(torch.tensor(self.scaler.get_scale()))
        return [tensor.cpu() for tensor in seen]


def adamw(params, lr):
    return trainopt.AdamW(params, lr=lr, capturable=True, fused=True)


def sgd(params, lr):
    return trainopt.SGD(params, lr=lr, momentum=0.9, fused=True)


def with_a_tail(params, lr):
    tail = {"max_grad_norm": 0.5, "ema_decay": 0.9, "ema_warmup": True, "zero_grad": "in_step"}
    return trainopt.AdamW(params, lr=lr, capturable=True, **tail)


def lamb(params, lr):
    return trainopt.LAMB(params, lr=lr, capturable=True)


def assert_replays_are_steps(
    device: str,
    name: str,
    make: Callable = adamw,
    clip: Callable | None = by_norm,
    scale: float | None = None,
    poisoned: int = -1,
) -> None:
    found = []
    for replays in (False, True):
        training = Training(device, TASKS[name], make, clip, scale)
        training.on_the_side(training.step)
        training.on_the_side(training.step)
        graph = training.captured() if replays else None
        found.append(training.run(graph.replay if replays else training.step, poisoned))
    assert len(found[0]) == len(found[1])
    for there, here in zip(*found, strict=True):
        same = there == here if torch.cuda.is_available() else torch.eq(there, here)
        assert (same | (there.isnan() & here.isnan())).all(), (there, here)
    assert not torch.equal(found[0][2], found[0][2 + len(found[0]) // STEPS]), "nothing was trained"


@each_task
def test_replays_are_steps(device, task):
    assert_replays_are_steps(device, task)


@pytest.mark.parametrize("make", [adamw, sgd], ids=lambda make: make.__name__)
@pytest.mark.parametrize("clip", CLIPS, ids=CLIPS.values())
@pytest.mark.parametrize("task", ["cross_entropy", "linear_cross_entropy", "mse_loss"])
def test_replays_are_steps_under_a_scaler(device, task, clip, make):
    """One of which overflows."""
    assert_replays_are_steps(device, task, make, clip, scale=256.0, poisoned=2)


@pytest.mark.parametrize("task", ["cross_entropy", "binary_cross_entropy"])
def test_replays_are_steps_with_a_reduce_phase(device, task):
    assert_replays_are_steps(device, task, lamb)


@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("task", ["cross_entropy", "linear_cross_entropy", "mse_loss"])
def test_replays_are_steps_that_clip_average_and_clear(device, task, scale):
    assert_replays_are_steps(device, task, with_a_tail, None, scale, poisoned=2 if scale else -1)


# What is found --------------------------------------------------------------------------------------------------------

FINDINGS = {
    "cross_entropy": (lambda t: t[2].fill_(CLASSES + 4), IndexError, r"target 11 at position \(2\)"),
    "cross_entropy, every option": (lambda t: t[2].fill_(-3), IndexError, r"target -3 at position \(2\)"),
    "cross_entropy, images": (lambda t: t[1, 2].fill_(9), IndexError, r"target 9 at position \(1, 2\)"),
    "linear_cross_entropy": (lambda t: t[5].fill_(CLASSES), IndexError, r"target 7 at position \(5\)"),
    "linear_cross_entropy, chunks": (lambda t: t[5].fill_(CLASSES), IndexError, r"target 7 at position \(5\)"),
    "binary_cross_entropy": (lambda t: t[1, 2].fill_(1.5), RuntimeError, "all elements of target should be between"),
}
each_finding = pytest.mark.parametrize("task", FINDINGS)


@each_finding
def test_what_a_replay_finds_is_told_once(device, task):
    spoil, error, message = FINDINGS[task]
    training = Training(device, TASKS[task], adamw, by_norm, None)
    training.on_the_side(training.step)
    graph = training.captured()
    for told_by in (functional.check_targets, training.forward):
        good = training.target.clone()
        graph.replay()
        training.module.synchronize()
        functional.check_targets()
        spoil(training.target)
        graph.replay()
        training.module.synchronize()
        with pytest.raises(error, match=message):
            told_by()
        training.target.copy_(good)
        functional.check_targets()
        training.run(graph.replay)
    training.module.synchronize()
    functional.check_targets()


@each_finding
def test_what_was_found_before_a_capture_is_told_in_it(device, task):
    spoil, error, message = FINDINGS[task]
    training = Training(device, TASKS[task], adamw, by_norm, None)
    training.on_the_side(training.step)
    good = training.target.clone()
    spoil(training.target)
    training.on_the_side(training.step)
    training.target.copy_(good)
    with pytest.raises(error, match=message):
        training.captured()
    training.on_the_side(training.step)
    graph = training.captured()
    graph.replay()
    training.module.synchronize()
    functional.check_targets()


# How memory is had ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("allocator", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_with_another_allocator(allocator):
    """torch reads it once, when the process first asks for memory."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not allocator"]
    settings = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), allocator)
    result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.skipif(not IS_EMULATED, reason="of the emulated device")
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("task", ["cross_entropy", "linear_cross_entropy, chunks", "binary_cross_entropy, weights"])
def test_replays_are_steps_in_any_order(device, task, seed):
    trainopt._extension._C.simt.set_seed(seed)
    assert_replays_are_steps(device, task, scale=128.0, poisoned=1)
