"""Lightning's Trainer and Fabric: clipping, precision, accumulation, schedulers, checkpoints."""

import lightning
import pytest
import torch
from sides import (
    TORCH,
    TRAINOPT,
    assert_moved,
    assert_same,
    classifier,
    compare,
    each_optimizer,
    examples,
    make,
    values,
)

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Module(lightning.LightningModule):
    def __init__(self, side, name):
        super().__init__()
        self.side, self.optimizer_name, self.model = side, name, classifier()

    def training_step(self, batch, _):
        return self.side.losses.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = make(self.side, self.optimizer_name, self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader():
    return torch.utils.data.DataLoader(examples(), batch_size=4)


def fit(side, name, folder, epochs=1, checkpoint=None, **settings):
    module = Module(side, name)
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=str(folder), devices=1, **QUIET, **settings)
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer, module


@each_optimizer
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_trainer(name, precision, tmp_path):
    def run(side):
        settings = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "precision": precision}
        _, module = fit(side, name, tmp_path, enable_checkpointing=False, **settings)
        return values(module.model)

    tolerance = {"rtol": 1e-2, "atol": 1e-3} if precision == "bf16-mixed" else {"rtol": 1e-4, "atol": 1e-6}
    assert_moved({k: v.float() for k, v in assert_same(run, **tolerance).items()}, values(classifier()))


@pytest.mark.parametrize(
    ("first", "second"), [(TRAINOPT, TRAINOPT), (TORCH, TRAINOPT), (TRAINOPT, TORCH)], ids=lambda side: side.name
)
def test_trainer_goes_on_from_a_checkpoint(first, second, tmp_path):
    _, whole = fit(TORCH, "AdamW", tmp_path, epochs=2, enable_checkpointing=False)
    trainer, _ = fit(first, "AdamW", tmp_path, epochs=1, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    _, resumed = fit(second, "AdamW", tmp_path, 2, str(tmp_path / "saved.ckpt"), enable_checkpointing=False)
    compare(values(resumed.model), values(whole.model))


@each_optimizer
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(name, precision):
    def run(side):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = classifier()
        optimizer = make(side, name, model.parameters())
        model, optimizer = fabric.setup(model, optimizer)
        norms = []
        for x, y in fabric.setup_dataloaders(loader()):
            optimizer.zero_grad()
            fabric.backward(side.losses.cross_entropy(model(x), y))
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.5))
            optimizer.step()
        return {**values(model.module), "norms": torch.stack(norms)}

    assert_same(run, **({"rtol": 1e-2, "atol": 1e-3} if precision != "32-true" else {}))


def test_fabric_saves_and_loads(tmp_path):
    def start():
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = classifier()
        return fabric, *fabric.setup(model, make(TRAINOPT, "AdamW", model.parameters()))

    def train(fabric, model, optimizer):
        for x, y in loader():
            optimizer.zero_grad()
            fabric.backward(TRAINOPT.losses.cross_entropy(model(x), y))
            optimizer.step()
        return values(model.module)

    fabric, model, optimizer = start()
    train(fabric, model, optimizer)
    fabric.save(tmp_path / "saved.ckpt", {"model": model, "optimizer": optimizer})
    whole = train(fabric, model, optimizer)
    fabric, model, optimizer = start()
    fabric.load(tmp_path / "saved.ckpt", {"model": model, "optimizer": optimizer})
    compare(train(fabric, model, optimizer), whole, rtol=0, atol=0)
