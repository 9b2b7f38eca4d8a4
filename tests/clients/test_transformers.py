"""Hugging Face's Trainer: both ways to give it an optimizer, accumulation, clipping, bfloat16, checkpoints."""

import pytest
import torch
import transformers
from sides import TORCH, TRAINOPT, assert_moved, assert_same, compare, each_optimizer, make, values
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

WORDS = 37


def language_model(kind="gpt2", dtype=torch.float64):
    """In float64: the gradient of a key's bias is 0 but for roundings, of which Adam makes whole steps in float32."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).to(dtype)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes)).to(dtype)


def texts(count=40):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(WORDS, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**given, **changes})


def loss_of(side):
    """The model's own loss with a side's cross-entropy, as Trainer's compute_loss_func."""

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        reduction = "mean" if num_items_in_batch is None else "sum"
        found = side.losses.cross_entropy(logits, targets, reduction=reduction)
        return found if num_items_in_batch is None else found / num_items_in_batch

    return loss


def result_of(trainer, model):
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**values(model), "losses": torch.tensor(logged), "steps": torch.tensor(trainer.state.global_step)}


@each_optimizer
def test_an_optimizer_and_a_scheduler_are_handed_over(name, tmp_path):
    def run(side):
        model = language_model()
        optimizer = make(side, name, model.parameters())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4)
        settings = arguments(tmp_path / side.name)
        trainer = Trainer(
            model,
            settings,
            train_dataset=texts(),
            optimizers=(optimizer, scheduler),
            compute_loss_func=loss_of(side),
        )
        trainer.train()
        return {**result_of(trainer, model), "lr": torch.tensor(optimizer.param_groups[0]["lr"])}

    assert_moved(assert_same(run), values(language_model()))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_class_and_its_options_are_handed_over(kind, bf16, tmp_path):
    """Trainer makes the optimizer, with groups of its own for what is not decayed."""

    def run(side):
        model = language_model(kind, torch.float32 if bf16 else torch.float64)
        settings = arguments(tmp_path / side.name, bf16=bf16, weight_decay=0.1)
        given = (side.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.9)})
        trainer = Trainer(model, settings, train_dataset=texts(), optimizer_cls_and_kwargs=given)
        trainer.train()
        return result_of(trainer, model)

    assert_same(run, rtol=1e-3 if bf16 else 1e-4, atol=1e-4 if bf16 else 1e-6)


@pytest.mark.parametrize(
    ("first", "second"), [(TRAINOPT, TRAINOPT), (TORCH, TRAINOPT), (TRAINOPT, TORCH)], ids=lambda side: side.name
)
def test_a_run_goes_on_from_a_checkpoint(first, second, tmp_path):
    """Of either library."""

    def train(side, folder, steps, resume=None):
        model = language_model()
        settings = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
        given = (side.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1})
        trainer = Trainer(model, settings, train_dataset=texts(), optimizer_cls_and_kwargs=given)
        if steps < 6:

            class Stop(transformers.TrainerCallback):
                def on_step_end(self, args, state, control, **_):
                    control.should_training_stop = state.global_step >= steps

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return values(model)

    whole = train(TORCH, tmp_path / "whole", 6)
    train(first, tmp_path / "parts", 3)
    compare(train(second, tmp_path / "parts", 6, str(tmp_path / "parts" / "checkpoint-3")), whole)
