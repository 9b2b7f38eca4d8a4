"""The judge of the optimizers' numbers.

The truth is the computation in float64: by torch's plain loop (foreach=False, fused=False), never by torch's fused
step, which is wrong on the CPU in known cases; for an optimizer that torch does not have, by the plain step beside its
class; and for what trainopt adds to torch, by the formula (formulas.py). A result is right when its distance to the
truth is no larger than that of the same plain computation in the same dtype: torch's own error, or the formula's.

What it judges is in tests/optimizer_table.py.
"""

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from devices import VARIANTS
from optimizer_row import Row
from optimizer_table import TABLE as TABLE

from trainopt import switches
from trainopt._extension import _C
from trainopt.optim.state_dtype import AS_PRECISE
from trainopt.optim.state_dtype import DTYPES as DTYPES_OF_STATES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Lanes of a vector: 2, 4 and 8 of float64, 4, 8 and 16 of float32. Sizes at and around each, and around a chunk of 256.
WIDTHS = (2, 4, 8, 16)
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 511)
LARGE_SIZES = (65_535, 65_536, 65_537)

Tensors = list[torch.Tensor]


# Runs -----------------------------------------------------------------------------------------------------------------


def random_values(shape, dtype, generator):
    """Values in [0.1, 4) of either sign, one in eleven a zero: float16 can hold their squares."""
    size = torch.empty(shape, dtype=torch.float64).exponential_(2.0, generator=generator).clamp(max=3.9) + 0.1
    sign = torch.randint(-5, 6, size.shape, generator=generator).sign()
    return (size * sign).to(dtype)


def random_problem(shapes, dtype, steps, seed=0, device="cpu"):
    """Starting values, and gradients for each step."""
    generator = torch.Generator().manual_seed(seed)
    start, *gradients = (
        [random_values(shape, dtype, generator).to(device) for shape in shapes] for _ in range(1 + steps)
    )
    return start, gradients


def run(make: Callable[..., Any], start: Tensors, gradients: Sequence[Tensors], dtype=None, **options):
    """Steps fresh parameters through these gradients; returns the optimizer and the parameters."""
    params = [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in start]
    optimizer = make(params, **options)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer, params


def on_both_paths(row: Row, start: Tensors, gradients: Sequence[Tensors], device: str = "cpu", **options):
    """The optimizer and the parameters of `run` by the engine on a device, and by torch's path on the CPU.

    Gradients stay as they are.
    """
    results = []
    for reference, place in ((False, device), (True, "cpu")):
        with mock.patch.object(switches, "REFERENCE_FORCED", reference):
            now = [[g.to(place, copy=True) for g in of_step] for of_step in gradients]
            results.append(run(row.make, [p.to(place) for p in start], now, **options))
    return results


def outcome(optimizer, params) -> dict[str, Tensors]:
    """The parameters and each of their states but the step count, by name."""
    names = dict.fromkeys(name for p in params for name in optimizer.state.get(p, {}) if name != "step")
    held = {name: [s[name] for p in params if name in (s := optimizer.state.get(p, {}))] for name in names}
    return {"param": [p.detach() for p in params], **{n: v for n, v in held.items() if v[0] is not None}}


def progress_of(optimizer) -> dict[str, Any]:
    """What a group remembers of its steps beside its parameters' states."""
    group = optimizer.param_groups[0]
    return {key: group[key] for key in ("k", "weight_sum", "lr_max") if key in group}


def stored_in(name: str, stored: str) -> torch.dtype:
    """What a state is stored in where one dtype is given for all."""
    return torch.float32 if name in AS_PRECISE else DTYPES_OF_STATES[stored]


def result_of(make, start, gradients, dtype=None, **options) -> dict[str, Tensors]:
    return outcome(*run(make, start, gradients, dtype, **options))


def assert_same_bits(one: dict[str, Tensors], other: dict[str, Tensors], any_nan: bool = False) -> None:
    """Equal to the bit; with `any_nan` every NaN equals every other: a GPU's arithmetic makes only one of them."""
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        for i, (a, b) in enumerate(zip(tensors, other[name], strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, (name, i)
            bad = bits(a) != bits(b)
            if any_nan:
                bad &= ~(a.isnan() & b.isnan())
            bad = bad.nonzero()
            assert len(bad) == 0, f"{name}[{i}] of {a.numel()}: {len(bad)} elements differ, first at {bad[0].tolist()}"


def everywhere() -> Iterator[None]:
    """Sets each SIMD variant, and for all but the first three threads, which cut every tensor where one does not."""
    for variant, threads in ((VARIANTS[0], 1), *((name, 3) for name in VARIANTS[1:] or VARIANTS)):
        _C.set_cpu_variant(variant)
        torch.set_num_threads(threads)
        yield


def assert_same_bits_everywhere(row: Row, start: Tensors, gradients: Sequence[Tensors], **options) -> None:
    """The outcome has the same bits for any number of threads and every SIMD variant. Gradients stay as they are."""
    first, *others = (
        outcome(*run(row.make, start, [[g.clone() for g in now] for now in gradients], **options)) for _ in everywhere()
    )
    for other in others:
        assert_same_bits(first, other)


def assert_resumes(row: Row, start: Tensors, gradients: Sequence[Tensors], options: dict[str, Any]) -> Any:
    """A run that is saved after two steps, loaded as weights alone and resumed has the bits of one that went on.

    So has one resumed by an optimizer without the options: the file's own count, as any group's do. Returns the file's
    contents.
    """
    straight = outcome(*run(row.make, start, gradients, **options))
    optimizer, params = run(row.make, start, gradients[:2], **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for given in (options, row.usual):
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = row.make(again, **given)
        resumed.load_state_dict(copy.deepcopy(saved))
        for now in gradients[2:]:
            for p, g in zip(again, now, strict=True):
                p.grad = g.clone()
            resumed.step()
        assert_same_bits(straight, outcome(resumed, again))
    return saved


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers)


# The judgement --------------------------------------------------------------------------------------------------------


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def distances(found: dict[str, Tensors], truth: dict[str, Tensors]) -> Iterator[tuple[str, torch.Tensor, float]]:
    """For each result its elements' distances to the truth, and the truth's root mean square."""
    for name, tensors in truth.items():
        exact = flat(tensors)
        yield name, (flat(found[name]) - exact).abs(), exact.square().mean().sqrt().item()


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def undecided_elements(row, start, gradients, dtype, options) -> torch.Tensor:
    """Elements, of all parameters one after the other, for which a rounding to this dtype may decide a sign."""
    optimizer = row.make_formula([torch.nn.Parameter(p.detach().double().clone()) for p in start], **options)
    optimizer.eps = torch.finfo(dtype).eps
    for now in gradients:
        for p, g in zip(optimizer.params, now, strict=True):
            p.grad = g.double()
        optimizer.step()
    return flat(list(optimizer.undecided.values())) != 0


def assert_no_worse(ours, peers, truth, dtype, undecided=None, roundings=1, in_common=False) -> None:
    """Our distance to the truth is no larger than the peer's, in the mean and at the worst element.

    The slack is for the order of roundings: the engine uses no fused multiply-add, torch does here and there. In units
    of the arithmetic's rounding error it is an eighth in the mean over all elements (more over a few), and two at the
    single worst one (with storage in 16 bits chance adds a factor there); in float64, where torch's loop is the truth
    itself, a few. torch's loop rounds the parameter `roundings` times in a step, and the engine once. Elements that the
    peer loses altogether (torch's Adam in float16 turns a gradient of 0 into NaN) need only be finite, as those need
    which are `undecided`, and then numbers, which follow from them all. Where
    elements have a number `in_common`, as Prodigy's d, its error is that of all of them: chance is not averaged over
    them, and the error grows with d.
    """
    assert undecided is None or undecided.double().mean() < 0.5, "too much is undecided"
    assert ours.keys() == truth.keys() == peers.keys()
    exact_peer = dtype == torch.float64
    mean_luck, slack = (8, 64) if in_common else (1.1, 1)
    luck = 8 if in_common else 3 if torch.finfo(dtype).bits == 16 else 1.5
    unit = torch.finfo(torch.float64 if exact_peer else torch.float32).eps
    for (name, our, scale), (_, peer, _) in zip(distances(ours, truth), distances(peers, truth), strict=True):
        assert our.isfinite().all(), name
        if undecided is not None and undecided.any() and len(undecided) != len(our):
            continue
        undecided_here = undecided if undecided is not None and len(undecided) == len(our) else None
        judged = peer.isfinite() if undecided_here is None else peer.isfinite() & ~undecided_here
        our, peer = our[judged], peer[judged]
        few = max(1 / 8, 3 / len(our) ** 0.5) if len(our) else 0.0
        mean, peer_mean, worst, peer_worst = root_mean_square(our), root_mean_square(peer), our.max(), peer.max()
        allowed = slack * (4 * roundings if exact_peer else few) * unit * scale
        assert mean <= mean_luck * peer_mean + allowed, f"{name}: mean {mean}, {peer_mean}"
        allowed = slack * (16 * roundings if exact_peer else 2) * unit * scale
        assert worst <= luck * peer_worst + allowed, f"{name}: {worst}, {peer_worst}"


def assert_one_rounding(found: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor, what: str) -> None:
    """`found` is the float64 tensor `exact` rounded once to found's dtype, but for `slack` before the rounding."""
    limit = torch.finfo(found.dtype).max
    exact = exact.double()
    inside = exact.abs() < limit
    error = (found.double() - exact).abs()[inside]
    allowed = (spacing(exact, found.dtype) / 2 + slack)[inside]
    assert (error <= allowed).all(), f"{what}: {(error / allowed).max()} times the error of one rounding"


def spacing(x: torch.Tensor, dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a dtype round x."""
    info = torch.finfo(dtype)
    smallest = torch.frexp(torch.tensor(info.tiny, dtype=torch.float64)).exponent
    exponent = torch.frexp(x.double().abs()).exponent.clamp(min=smallest.item())
    return torch.exp2((exponent - 1).double()) * info.eps
