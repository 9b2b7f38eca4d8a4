"""PyTorch-Ignite: a supervised trainer, a parameter scheduler, accumulation, checkpoints."""

import pytest
import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, CosineAnnealingScheduler, DiskSaver
from sides import TRAINOPT, assert_moved, assert_same, classifier, compare, each_optimizer, examples, make, values


def trainer_of(side, name, **settings):
    model = classifier()
    optimizer = make(side, name, model.parameters())
    trainer = create_supervised_trainer(model, optimizer, side.losses.cross_entropy, **settings)
    schedule = CosineAnnealingScheduler(optimizer, "lr", 0.02, 0.001, cycle_size=12)
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    return trainer, model, optimizer, schedule


def loader():
    return torch.utils.data.DataLoader(examples(), batch_size=4)


@each_optimizer
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_supervised_trainer(name, accumulation):
    def run(side):
        trainer, model, *_ = trainer_of(side, name, gradient_accumulation_steps=accumulation)
        trainer.run(loader(), max_epochs=2)
        return values(model)

    assert_moved(assert_same(run), values(classifier()))


def test_a_checkpoint_goes_on(tmp_path):
    trainer, model, optimizer, schedule = trainer_of(TRAINOPT, "AdamW")
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "schedule": schedule}
    saver = Checkpoint(parts, DiskSaver(str(tmp_path), create_dir=True), n_saved=1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), saver)
    trainer.run(loader(), max_epochs=2)
    whole = values(model)

    trainer, model, optimizer, schedule = trainer_of(TRAINOPT, "AdamW")
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "schedule": schedule}
    (file,) = tmp_path.iterdir()
    Checkpoint.load_objects(parts, torch.load(file))
    trainer.run(loader(), max_epochs=2)
    compare(values(model), whole, rtol=0, atol=0)
