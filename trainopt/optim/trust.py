"""Sums over whole parameters, for the plain steps of optimizers that scale by them."""

import torch


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """In float64 where the device has it; of a DTensor that of the whole, on every rank."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    kept = tensor.to(dtype, copy=tensor.requires_grad)  # of a differentiable step, which writes to it afterwards
    found = kept.square().sum()  # pairwise, and so closer than torch's norm
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def norms(tensor: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Euclidean norms of both, and whether neither is 0. Where one is, both are given as 1."""
    squares, others = sum_of_squares(tensor), sum_of_squares(other)
    exist = (squares != 0) & (others != 0)
    return torch.where(exist, squares, 1.0).sqrt(), torch.where(exist, others, 1.0).sqrt(), exist
