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
