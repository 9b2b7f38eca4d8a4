"""A step on the device is compared with the last one, as on the CPU, and overlooks nothing."""

import pytest
import torch
from edits import ANYWHERE
from helpers import CLASSES, Twins, each_class

MANY = 500


class OnDevice(Twins):
    """Both sides on the device."""

    def __init__(self, name, device, **options):
        self.device = device
        if name == "ASGD":  # torch's foreach makes its step size in float32 arithmetic
            options = {"foreach": False, **options}
        super().__init__(name, shapes=((9,), (9,), (4, 4), (2,)), **options)

    def random(self, shape, dtype=torch.float64):
        return super().random(shape, dtype).to(self.device)


@each_class
@pytest.mark.parametrize("edit", ANYWHERE)
def test_nothing_is_overlooked(name, edit, device):
    twins = OnDevice(name, device)
    twins.step(2)
    twins.set_gradients()
    twins.edit(ANYWHERE[edit])
    twins.step_alike()
    twins.step(1)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_learning_rate_on_the_device_may_change(name, device):
    twins = OnDevice(name, device, lr=torch.tensor(0.1, dtype=torch.float64, device=device), capturable=True)
    for lr in (0.1, 0.1, 0.5, 0.5, torch.tensor(0.125, dtype=torch.float64, device=device)):
        if isinstance(lr, torch.Tensor):
            twins.edit(lambda optimizer, _, lr=lr: optimizer.param_groups[0].update(lr=lr))
        else:
            twins.edit(lambda optimizer, _, lr=lr: optimizer.param_groups[0]["lr"].fill_(lr))
        twins.set_gradients()
        twins.edit(lambda optimizer, _: optimizer.step())
        twins.compare(rtol=1e-6, atol=1e-6)  # torch takes the bias corrections in the count's float32


@each_class
def test_gradients_that_come_and_go(name, device):
    twins = OnDevice(name, device)
    for missing in ((), (), (0, 2), (0, 2), (0, 1, 2, 3), ()):
        twins.step(1, missing)


@each_class
def test_version_counters_move_by_one(name, device):
    params = [torch.nn.Parameter(torch.ones(9, device=device)) for _ in range(MANY)]
    optimizer = CLASSES[name][0](params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p._version for p in params]
        optimizer.step()
        assert [p._version for p in params] == [version + 1 for version in before]


def test_a_recalled_step_with_host_counts_is_not_captured(device):
    if device != "simt":
        pytest.skip("captures without a graph")
    from trainopt._extension import _C

    params = [torch.nn.Parameter(torch.ones(9, device=device))]
    optimizer = CLASSES["AdamW"][0](params, lr=0.1)
    params[0].grad = torch.ones_like(params[0])
    for _ in range(3):
        optimizer.step()
    before = params[0].detach().cpu()
    _C.simt.set_capturing(True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    _C.simt.set_capturing(False)
    assert torch.equal(params[0].detach().cpu(), before) and optimizer.state[params[0]]["step"] == 3


def step_both(name, device, gradients_of, steps, **more):
    """The same steps by an optimizer that compares each with the last, and by one that begins anew each time."""
    outcomes = []
    for forgets in (False, True):
        params = [torch.nn.Parameter(torch.arange(n, dtype=torch.float32, device=device)) for n in (9, 9, 2049, 9)]
        optimizer = CLASSES[name][0](params, lr=0.125)
        seen = []
        for step in range(steps):
            gradients_of(params, step)
            for attribute, value in more.items():
                setattr(optimizer, attribute, torch.tensor(value(step), device=device))
            if forgets:
                optimizer._plan = None
            before = [p.grad._version for p in params]
            optimizer.step()
            written = [p.grad._version - version for p, version in zip(params, before, strict=True)]
            seen.append(([t.detach().cpu().clone() for p in params for t in (p, p.grad)], written))
        outcomes.append(seen)
    for (found, found_written), (truth, truth_written) in zip(*outcomes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
        assert found_written == truth_written
    return outcomes[0]


def numbers(like, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(like.shape, generator=generator) * scale).to(like.device)


@each_class
def test_gradients_move_in_memory(name, device):
    def gradients_of(params, step):
        for i, p in enumerate(params):
            value = numbers(p, 10 * step + i)
            if step in (3, 4):  # elsewhere, and no longer aligned
                value = torch.cat((value[:1], value))[1:]
            if step < 2 or step > 2:
                p.grad = value
            else:
                p.grad.copy_(value)

    step_both(name, device, gradients_of, 7)


@each_class
def test_a_scale_that_stays_on_the_device(name, device):
    """Gradients are divided by it and written back: in their old memory, in new, and in one that two share."""

    def gradients_of(params, step):
        for i, p in enumerate(params):
            value = numbers(p, 10 * step + i, 64.0)
            if step in (0, 3):
                p.grad = value
            elif step == 4 and i == 1:
                p.grad = params[0].grad
            elif step == 5:
                p.grad = value
            else:
                p.grad.copy_(value)
                if step == 6:
                    p.grad = p.grad.data  # the same memory, with a version counter of its own

    scales = (64.0, 64.0, 64.0, 128.0, 128.0, 128.0, 128.0)
    seen = step_both(
        name, device, gradients_of, 7, grad_scale=scales.__getitem__, found_inf=lambda step: float(step == 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(seen[1][0][::2], seen[2][0][::2], strict=True))  # left out
