"""Lists of parameter shapes to step through: synthetic extremes and the shapes of well-known models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A model as its optimizer sees it: the shapes of its parameters and their dtype."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """Parameters in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def outline(self) -> str:
        """What it is, with its numbers of tensors and elements, for the title of a table."""
        return f"{self.title}: {len(self.shapes):,} tensor(s), {self.elements:,} elements"


def mlp(*widths: int) -> tuple[Shape, ...]:
    """Weight and bias of each linear layer between the widths given."""
    return tuple(shape for inputs, outputs in pairwise(widths) for shape in ((outputs, inputs), (outputs,)))


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> tuple[Shape, ...]:
    """GPT-2, by default the small one of 124M; the output layer shares the token embedding."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = norm + attention + norm + feed_forward
    return ((vocabulary, width), (context, width), *(block * layers), *norm)


def resnet50(classes: int = 1000) -> tuple[Shape, ...]:
    """ResNet-50 as torchvision builds it: four stages of bottleneck blocks; the norms' running statistics are no
    parameters."""

    def convolution_and_norm(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = convolution_and_norm(3, 64, 7)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution_and_norm(channels, width, 1)
            shapes += convolution_and_norm(width, width, 3)
            shapes += convolution_and_norm(width, 4 * width, 1)
            if block == 0:  # the shortcut changes the number of channels
                shapes += convolution_and_norm(channels, 4 * width, 1)
            channels = 4 * width
    return (*shapes, (classes, channels), (classes,))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("1000x64", "1,000 tensors of 64", ((64,),) * 1000),
        Workload("300x4096", "300 tensors of 4,096", ((4096,),) * 300),
        Workload("mlp", "MLP 784-128-10", mlp(784, 128, 10)),
        Workload("resnet50", "ResNet-50", resnet50()),
        Workload("gpt2", "GPT-2 124M", gpt2()),
        Workload("64m", "one tensor of 64M", ((2**26,),)),
        Workload("gpt2-bf16", "GPT-2 124M, bfloat16", gpt2(), torch.bfloat16),
    )
}
