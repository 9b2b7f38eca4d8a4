"""Hugging Face's Accelerate: prepare, accumulate, clip, a scheduler, mixed precision, save_state and load_state."""

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from sides import TRAINOPT, assert_moved, assert_same, classifier, compare, each_optimizer, examples, make, values


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(side, name, folder, precision="no"):
    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2, project_dir=str(folder)
    )
    model = classifier()
    optimizer = make(side, name, model.parameters())
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train(side, accelerator, model, optimizer, loader, scheduler):
    norms = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = side.losses.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    lr = torch.tensor(optimizer.param_groups[0]["lr"])
    return {**values(accelerator.unwrap_model(model)), "norms": torch.stack(norms), "lr": lr}


@each_optimizer
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_run(name, precision, tmp_path):
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if precision == "no" else {"rtol": 1e-2, "atol": 1e-3}
    ours = assert_same(lambda side: train(side, *prepared(side, name, tmp_path, precision)), **tolerance)
    ours.pop("norms"), ours.pop("lr")
    assert_moved(ours, values(classifier()))


@each_optimizer
def test_a_saved_state_goes_on(name, tmp_path):
    first = prepared(TRAINOPT, name, tmp_path)
    train(TRAINOPT, *first)
    first[0].save_state(str(tmp_path / "saved"))
    whole = train(TRAINOPT, *first)
    second = prepared(TRAINOPT, name, tmp_path)
    second[0].load_state(str(tmp_path / "saved"))
    compare(train(TRAINOPT, *second), whole, rtol=0, atol=0)
