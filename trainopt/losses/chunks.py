"""How many tokens of linear_cross_entropy have logits at a time: by a budget of bytes, or by torch's options."""

from typing import Any

import torch
from torch import Tensor

#: Bytes of logits that are held at a time where nothing else is asked for.
MEMORY_BUDGET = 32 * 2**20

_HALVES = (torch.bfloat16, torch.float16)


def tokens_in_chunk(input: Tensor, linear_weight: Tensor, options: Any, memory_budget: int | None) -> int:
    """For an input (N, features) or (features), and linear_weight (classes, features).

    torch's options decide where they name a size; "auto" leaves it to the budget.
    """
    method, size = ("auto", None) if options is None else (options.chunking_method, options.batch_chunk_size)
    if method == "auto" and size is None:
        budget = MEMORY_BUDGET if memory_budget is None else memory_budget
        return max(budget // (linear_weight.shape[0] * _bytes_of_logit(input, linear_weight)), 1)
    if memory_budget is not None:
        raise ValueError(
            f"memory_budget (={memory_budget!r}) and options (batch_chunk_size={size!r}, chunking_method={method!r})"
            " both say how large a chunk is: pass only one"
        )
    tokens = input.shape[0] if input.dim() == 2 else 1
    if method in (None, "auto"):
        return max(tokens if size is None else size, 1)
    found = _by_aspect_ratio(method, int(tokens), *linear_weight.shape)
    if size is not None and size != found:
        raise ValueError(
            f"batch_chunk_size (={size}) and chunking_method ('{method}') give different chunk sizes"
            f" ({size} vs {found}); pass only one."
        )
    return max(found, 1)


def _by_aspect_ratio(method: str, tokens: int, classes: int, features: int) -> int:
    """torch's "aspect_ratio:N": as many tokens as make the logits take an N-th of the input's memory."""
    factor = int(method.partition(":")[2] or 1)
    share = -(-tokens // max(-(-classes // max(features, 1)), 1))
    power_of_two = 1 << (share - 1).bit_length()
    return min(power_of_two // factor, tokens)


def _bytes_of_logit(input: Tensor, linear_weight: Tensor) -> int:
    """Logits are float32, or float64. On a GPU their gradient is also held in the type of a 16-bit product."""
    if linear_weight.dtype is torch.float64:
        return 8
    if input.is_cpu:
        return 4
    return 6 if linear_weight.dtype in _HALVES or torch.is_autocast_enabled(input.device.type) else 4


def only_torch_honours(options: Any, input: Tensor) -> str:
    """Of torch's options the one that trainopt's operator does not honour for this input; empty if it does all.

    It accumulates in float32 (float64 for float64), as accurately as "accurate" on the CPU. On a GPU it is neither
    that accurate for 16-bit operands, whose products are the tensor cores', nor as sparing as "compact": the weight's
    gradient is summed in float32. Backward may be run again whether `allow_retain_graph` says so or not.
    """
    if options is None:
        return ""
    accumulates = torch.float64 if input.dtype == torch.float64 else torch.float32
    if options.acc_dtype not in (None, accumulates):
        return f"acc_dtype={options.acc_dtype}"
    if input.device.type != "cpu" and input.dtype in _HALVES and options.acc_policy in ("accurate", "compact"):
        return f"acc_policy={options.acc_policy!r}"
    return ""
