"""trainopt's operators on CUDA tensors, as far as a machine without a GPU knows them: kernels, and fake results."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from trainopt import _build, functional

OPS = torch.ops.trainopt

pytestmark = pytest.mark.skipif(not _build.CUDA, reason=f"not built with CUDA: {_build.CUDA_REASON}")


def has_kernel(operator, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def test_every_operator_of_the_cpu_has_a_cuda_kernel():
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("trainopt::")]
    with_kernels = [name for name in operators if has_kernel(name, "CPU")]
    assert {"trainopt::optimizer_step_", "trainopt::cross_entropy", "trainopt::pointwise_loss"} <= set(with_kernels)
    assert [name for name in with_kernels if not has_kernel(name, "CUDA")] == []
    assert [name for name in operators if has_kernel(name, "AutocastCPU") != has_kernel(name, "AutocastCUDA")] == []


X, W, LABELS, UPSTREAM = (4, 5), (7, 5), torch.int64, ()
OPTIONS, NO_OPTIONS = (1, -100, 0.1, 0.5, 3.0, True, 2.0), (0, -100, 0.0, 0.0, 0.0, False)
CALLS = {
    "cross_entropy": (X, LABELS, None, False, *OPTIONS),
    "cross_entropy, none": (X, LABELS, (5,), False, *NO_OPTIONS),
    "cross_entropy_backward": (UPSTREAM, X, LABELS, None, (2, 4), *OPTIONS),
    "linear_cross_entropy": (X, W, LABELS, None, None, 1 << 20, *OPTIONS),
    "linear_cross_entropy_forward": (X, W, LABELS, (7,), None, 1 << 20, [True, True, True], *OPTIONS),
    "linear_cross_entropy_backward": (
        UPSTREAM,
        X,
        W,
        LABELS,
        None,
        None,
        (2, 4),
        1 << 20,
        [True, False, False],
        *OPTIONS,
    ),
    "pointwise_loss": ("mse_loss", X, X, None, None, 1, 0.0),
    "pointwise_loss, none": ("huber_loss", X, (4, 1), None, None, 0, 0.5),
    "pointwise_loss_backward": ("mse_loss", UPSTREAM, X, X, None, None, 1, 0.0, [True, True]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_are_those_of_the_cpu_on_the_device(call, dtype):
    def results(device):
        arguments = [
            torch.empty(argument, dtype=dtype, device=device)
            if isinstance(argument, tuple)
            else torch.ones(4, dtype=LABELS, device=device)
            if argument is LABELS
            else argument
            for argument in CALLS[call]
        ]
        found = getattr(OPS, call.partition(",")[0])(*arguments)
        return found if isinstance(found, tuple | list) else [found]

    with FakeTensorMode():
        on_cuda, on_cpu = results("cuda"), results("cpu")
        assert {result.device.type for result in on_cuda} == {"cuda"}
        for ours, theirs in zip(on_cuda, on_cpu, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_fake_optimizer_steps():
    with FakeTensorMode():
        p, g, m = (torch.empty(3, device="cuda") for _ in range(3))
        lr = torch.tensor(0.1)
        assert OPS.optimizer_step_("sgd", [p], [g], [m], [], lr, [0.9, 0.0, 0.0]) is None
        with pytest.raises(ValueError, match="there is no rule 'lbfgs'"):
            OPS.optimizer_step_("lbfgs", [p], [g], [m], [], lr, [0.9, 0.0, 0.0])
        with pytest.raises(ValueError, match="nadam has states that are numbers"):
            OPS.optimizer_step_("nadam", [p], [g], [m], [], lr, [0.9, 0.0, 0.0])
        with pytest.raises(ValueError, match="gradients: 0 for 1 params"):
            OPS.optimizer_step_("sgd", [p], [], [m], [], lr, [0.9, 0.0, 0.0])


class Losses(torch.nn.Module):
    def forward(self, x, labels, weight):
        return (
            functional.cross_entropy(x, labels)
            + functional.mse_loss(x, torch.zeros_like(x))
            + functional.linear_cross_entropy(x, weight, labels)
        )


def test_an_exported_program_on_cuda_calls_the_operators():
    with FakeTensorMode():
        labels = torch.ones(4, dtype=torch.int64, device="cuda")
        arguments = (torch.empty(4, 5, device="cuda"), labels, torch.empty(7, 5, device="cuda"))
        program = torch.export.export(Losses(), arguments)
    called = {str(node.target) for node in program.graph.nodes if "trainopt" in str(node.target)}
    assert called == {
        f"trainopt.{name}.default" for name in ("cross_entropy", "pointwise_loss", "linear_cross_entropy")
    }
