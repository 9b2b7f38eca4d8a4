"""timm: its factory makes our optimizers by a name that is registered, with its groups; and its scaler clips."""

import pytest
import timm
import torch
from sides import TORCH, TRAINOPT, assert_moved, assert_same, each_optimizer, values
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler

for side in (TORCH, TRAINOPT):
    for name in ("SGD", "Adam", "AdamW"):
        info = OptimInfo(
            name=f"{side.name}{name.lower()}",
            opt_class=getattr(side.optim, name),
            has_betas=name != "SGD",
            has_momentum=name == "SGD",
        )
        default_registry.register(info)


def images_model():
    """Without a bias of keys, in float64: its gradient is 0 but for roundings, of which Adam makes whole steps."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, qkv_bias=False, **sizes).double()


def train(side, name, model, steps=4, **options):
    optimizer = create_optimizer_v2(
        model, opt=f"{side.name}{name.lower()}", lr=0.01, weight_decay=0.1, momentum=0.9, **options
    )
    assert type(optimizer) is getattr(side.optim, name)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False)
    scaler = NativeScaler(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(4, 3, 32, 32, generator=generator).double()
        y = torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        loss = side.losses.cross_entropy(model(x), y, label_smoothing=0.1)
        scaler(loss, optimizer, clip_grad=0.5, clip_mode="norm", parameters=model.parameters())
        scheduler.step_update(step + 1)
    rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return {**values(model), "rates": rates}


@each_optimizer
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.75}, {"filter_bias_and_bn": False}], ids=str)
def test_the_factory_makes_it_by_name(name, options):
    ours = assert_same(lambda side: train(side, name, images_model(), **options))
    ours.pop("rates")
    assert_moved(ours, values(images_model()))
