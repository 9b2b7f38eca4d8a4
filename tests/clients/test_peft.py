"""PEFT: low-rank adapters are trained, the rest of the model stays as it is."""

import peft
import pytest
import torch
from sides import assert_moved, assert_same, each_optimizer, make
from test_transformers import language_model, loss_of, texts


def adapted():
    model = language_model()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM"))


@each_optimizer
@pytest.mark.parametrize("every", [False, True])
def test_adapters(name, every):
    """`every`: the optimizer holds the frozen parameters too."""

    def run(side):
        model = adapted()
        params = [p for p in model.parameters() if every or p.requires_grad]
        optimizer = make(side, name, params)
        batch = {key: torch.stack([text[key] for text in texts(4)]) for key in ("input_ids", "labels")}
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(side)(model(input_ids=batch["input_ids"]), batch["labels"]).backward()
            side.clip(model.parameters(), 0.5)
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    ours, before = assert_same(run), dict(adapted().named_parameters())
    frozen = {name for name, p in before.items() if not p.requires_grad}
    assert frozen and all(torch.equal(ours[name], before[name]) for name in frozen)
    assert_moved(
        {n: v for n, v in ours.items() if n not in frozen}, {n: p for n, p in before.items() if n not in frozen}
    )
