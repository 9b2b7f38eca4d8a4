"""A small language model of characters, trained on the Python standard library's own sources."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from trainopt.experiments import Problem
from trainopt.experiments.sources import VOCABULARY, decode, encode, windows
from trainopt.experiments.transformer import Transformer
from trainopt.functional import linear_cross_entropy
from trainopt.training.fields import option, real, whole

DESCRIPTION = "Train a small GPT-like model to write Python, character by character, on the standard library's sources."
DEFAULTS = {
    "steps": 2000,
    "batch_size": 8,
    "accumulation": 2,
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 100,
    "floor": 0.1,
    "clip": 1.0,
    "average": 0.99,
    "validate_every": 400,
    "log_every": 50,
}
PROMPT = "def "


@dataclass
class Options:
    """The model, and what it writes.

    Args:
        context: characters that the model sees.
        width: features of a character, a multiple of the heads.
        layers: blocks of attention and feed-forward.
        heads: of the attention.
        sample: characters written at the end.
        temperature: of the sample; less is more careful.
    """

    context: int = option(128, whole(8, 4096))
    width: int = option(160, whole(8, 4096))
    layers: int = option(4, whole(1, 64))
    heads: int = option(5, whole(1, 64))
    sample: int = option(500, whole(0, 100_000))
    temperature: float = option(0.9, real(0, above=True))


def check(settings: SimpleNamespace) -> None:
    if settings.width % settings.heads:
        raise ValueError(f"argument --width: {settings.width} is no multiple of --heads {settings.heads}")


def make(settings: SimpleNamespace) -> Problem:
    training, held_out = windows(settings.context, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Transformer(
            len(VOCABULARY), settings.context, width=settings.width, layers=settings.layers, heads=settings.heads
        )
    size = sum(parameter.numel() for parameter in model.parameters())
    return Problem(
        title=f"{settings.layers} layers of width {settings.width}, {size / 1e6:.1f} M parameters, "
        f"{settings.context} characters of context; {training[0].numel():,} characters of Python to train on, "
        f"{held_out[0].numel():,} held out",
        model=model,
        data=training,
        validation=held_out,
        loss=loss,
        count=Tensor.numel,
    )


def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The mean cross-entropy of the next characters, in nats; the logits are never held as a whole."""
    hidden, weight = output
    return linear_cross_entropy(hidden.flatten(0, 1), weight, target.flatten().long())


def finish(problem: Problem, settings: SimpleNamespace) -> None:
    if settings.sample:
        assert isinstance(problem.model, Transformer)
        print(f"\n{sample(problem.model, PROMPT, settings.sample, settings.temperature, settings.seed)}")


@torch.no_grad()
def sample(model: Transformer, prompt: str, length: int, temperature: float, seed: int) -> str:
    """`prompt` and `length` characters that the model, in evaluation mode, writes after it."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    text = encode(prompt).to(device)
    model.eval()
    for _ in range(length):
        hidden, weight = model(text[None, -model.context :])
        logits = hidden[0, -1].float() @ weight.T.float()
        chosen = torch.multinomial(torch.softmax(logits.cpu() / temperature, 0), 1, generator=generator)
        text = torch.cat([text, chosen.to(text)])
    return decode(text)
