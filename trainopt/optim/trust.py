"""Sums over whole parameters, for the plain steps of optimizers that go by them."""

import torch

from trainopt.optim.stats import whole


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """In float64 where the device has it; of a DTensor that of the whole, on every rank."""
    kept = _wide(tensor)
    if kept is tensor and tensor.requires_grad:  # of a differentiable step, which writes to it afterwards
        kept = tensor.clone()
    return whole(kept.square().sum())  # pairwise, and so closer than torch's norm


def sum_of_products(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Likewise, of the elements of both."""
    return whole((_wide(tensor) * _wide(other)).sum())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def norms(tensor: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Euclidean norms of both, and whether neither is 0. Where one is, both are given as 1."""
    squares, others = sum_of_squares(tensor), sum_of_squares(other)
    exist = (squares != 0) & (others != 0)
    return torch.where(exist, squares, 1.0).sqrt(), torch.where(exist, others, 1.0).sqrt(), exist
