"""What the tests of clipping share: parameters with gradients of every size, and what is right of them."""

import math

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = (1.0, 2.0, math.inf)
#: Nothing, a scalar, less than the lanes of a sum, a block of 256 and round it, a chunk of 16,384 and round it.
SHAPES = ((), (0,), (1,), (31,), (33,), (255,), (256,), (257,), (128, 128), (16383,), (16385,), (3, 5, 7, 401))


def make_parameters(shapes=SHAPES, dtype=torch.float32, seed=0, scale=1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)
        params.append(param)
    return params


def copy_of(params):
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for copy, param in zip(copies, params, strict=True):
        copy.grad = None if param.grad is None else param.grad.clone()
    return copies


def gradients(params):
    return [p.grad for p in params if p.grad is not None]


def exact_norm(tensors, order: float) -> float:
    """Of the exact sum, rounded once; the squares of any numbers are held, since the largest is made 1."""
    values = torch.cat([t.detach().double().flatten() for t in tensors]).abs()
    largest = float(values.max())
    if order == math.inf or largest == 0:
        return largest
    if order == 1:
        return math.fsum(values.tolist())
    return math.sqrt(math.fsum(((values / largest) ** 2).tolist())) * largest


def returned(dtype):
    """The dtype of the norm of gradients of this one."""
    return torch.promote_types(dtype, torch.float32)


#: Gradients at the ends of their dtypes, and what they are clipped to: sums or squares that the dtype or float64 cannot
#: hold, subnormal numbers, and coefficients that float32 or float64 would hold with few digits.
EXTREMES = {
    "float32, 1e25": (torch.float32, (1e25,), 1.0),
    "float32, 1e-25": (torch.float32, (1e-25,), 1e-30),
    "float32, 1e38": (torch.float32, (1e38,), 1.0),
    "float32, 1e38 and 1e-38": (torch.float32, (1e38, 1e-38), 1e-3),
    "float32, subnormal": (torch.float32, (1e-40,), 1e-30),
    "float64, 1e200": (torch.float64, (1e200,), 1.0),
    "float64, 1e-200": (torch.float64, (1e-200,), 1.0),
    "float64, 1e160 and 1": (torch.float64, (1e160, 1.0), 1e150),
    "float64, 1 and 1e-160": (torch.float64, (1.0, 1e-160), 1e-3),
    "float64, 1e-120, 1e-135, 1e-140 and 1e-165": (torch.float64, (1e-120, 1e-135, 1e-140, 1e-165), 1.0),
    "float64, 1e-135 alone": (torch.float64, (1e-135,), 1e-140),
    "float64, 1e150": (torch.float64, (1e150,), 1.0),
    "float64, 1e303": (torch.float64, (1e303,), 1e-8),
    "float64, subnormal": (torch.float64, (1e-315,), 1.0),
    "float16, 1,000": (torch.float16, (1000.0,), 1.0),
    "float16, 60,000": (torch.float16, (20000.0,), 100.0),
    "float16, subnormal": (torch.float16, (1e-6,), 1e-7),
    "bfloat16, 1e38": (torch.bfloat16, (1e38,), 1.0),
    "bfloat16, 1e-38": (torch.bfloat16, (1e-38,), 1.0),
}


def make_extreme(dtype, scales):
    """A scalar, nothing, less than a block and more than a chunk, for each scale; the first one with zeros in it."""
    params = [p for i, s in enumerate(scales) for p in make_parameters(((300,), (0,), (), (16_500,)), dtype, i, s)]
    for p in params:
        p.grad.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    params[0].grad[::3] = 0
    return params


def assert_clipped(before, after, exact, limit):
    """After clipping, gradients are those before times min(1, limit / (norm + 1e-6)), in float64."""
    info = torch.finfo(after.dtype)
    whole, small = limit / (exact + 1e-6), 1.0
    if abs(whole) < 1e-200:  # itself subnormal: in two steps
        small, whole = 1e-200, limit / ((exact + 1e-6) * 1e-200)
    wanted = before.double() * small * min(whole, 1.0)
    bound = 4 * info.eps * wanted.abs() + 2 * info.smallest_normal * info.eps
    assert bool(((after.double() - wanted).abs() <= bound).all())
