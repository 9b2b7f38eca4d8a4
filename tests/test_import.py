"""What is computed at import does not depend on where trainopt is imported: each in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SETTINGS = {
    "inference mode": "torch.inference_mode()",
    "no gradients": "torch.no_grad()",
    "a default device": "torch.device('meta')",
    "a default dtype": "DefaultDtype()",
    "a torch function mode": "Forbidding()",
    "a dispatch mode": "ForbiddingBelow()",
    "deterministic algorithms": "Deterministic()",
}

PROGRAM = """
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

class Forbidding(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"called at import: {{function}}")

class ForbiddingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"called at import: {{function}}")

class Setting:
    def __enter__(self): self.set(True)
    def __exit__(self, *_): self.set(False)

class DefaultDtype(Setting):
    def set(self, on): torch.set_default_dtype(torch.float64 if on else torch.float32)

class Deterministic(Setting):
    def set(self, on): torch.use_deterministic_algorithms(on)

with {setting}:
    import trainopt
    import trainopt.training
    import trainopt.experiments.sources

for make in (trainopt.SGD, trainopt.AdamW):
    p = torch.nn.Parameter(torch.ones(300))
    p.grad = torch.ones(300)
    optimizer = make([p], lr=0.5)
    assert [row.path.partition(" ")[0] for row in trainopt.explain(optimizer)] == ["fused"], trainopt.explain(optimizer)
    optimizer.step()
    assert optimizer._plan is not None and p.dtype is torch.float32
logits = torch.randn(7, 5, requires_grad=True)
target = torch.arange(7) % 5
loss = trainopt.functional.cross_entropy(logits, target)
assert type(loss.grad_fn).__name__.startswith("{function}"), loss.grad_fn
loss.backward()
assert logits.grad is not None and trainopt.clip_grad_norm_([logits], 1.0) > 0
assert trainopt.experiments.sources.encode("ab").device.type == "cpu"
"""


def grad_fn_elsewhere():
    import torch

    import trainopt

    loss = trainopt.functional.cross_entropy(torch.randn(7, 5, requires_grad=True), torch.arange(7) % 5)
    return type(loss.grad_fn).__name__


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_imported_under(setting):
    done = run(PROGRAM.format(setting=setting, function=grad_fn_elsewhere()))
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_imported():
    """Nothing beside what torch imports itself: torch's compiler alone takes as long as torch."""
    done = run("import sys, torch; before = {*sys.modules}; import trainopt; print(*{*sys.modules} - before)")
    assert done.returncode == 0, done.stderr[-2000:]
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert packages - sys.stdlib_module_names == {"trainopt"}
