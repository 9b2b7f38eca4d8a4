"""The engine: the same bits wherever an element lies and whoever computes it, and nothing else is written."""

import copy
import gc

import pytest
import torch
from judge import TABLE, WIDTHS, assert_same_bits, bits, random_problem, result_of, run
from rows import each_combination, each_dtype, each_row, states_of

from trainopt._extension import _C

# Blocks of 256 that are too few to be given to another thread: see kGrainBlocks in csrc/python/plan.cpp.
SPLIT_SIZE = 48 * 256


# The same bits --------------------------------------------------------------------------------------------------------


@each_dtype
@each_combination
def test_any_cut_of_a_tensor(row, options, dtype):
    """A tensor in one piece, and cut anywhere: vector body, tail and place in a chunk make no difference."""
    if row.has_sums:
        pytest.skip("a step that depends on the whole tensor: tests/test_reduce_phase.py")
    size = 3000
    start, gradients = random_problem((size,), dtype, 3, 1)
    whole = result_of(row.make, start, gradients, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        count = 1 + int(torch.randint(0, 200, (), generator=generator))
        cuts = sorted((torch.randperm(size - 1, generator=generator)[:count] + 1).tolist())
        lengths = [end - begin for begin, end in zip([0, *cuts], [*cuts, size], strict=True)]
        now = [list(g.split(lengths)) for (g,) in gradients]
        pieces = result_of(row.make, list(start[0].split(lengths)), now, **options)
        assert all(n == whole[name][0] for name in row.numbers for n in pieces[name])
        joined = {name: [torch.cat(tensors)] for name, tensors in pieces.items() if name not in row.numbers}
        assert_same_bits({name: whole[name] for name in joined}, joined)


@each_dtype
@each_combination
def test_any_number_of_threads(row, options, dtype):
    # Split inside the big tensor, between tensors, and at ends that are no multiples of a chunk.
    sizes = (SPLIT_SIZE * 3 + 77, 5, 255, *([300] * 50), SPLIT_SIZE + 1)
    start, gradients = random_problem(sizes, dtype, 2, 2)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(result_of(row.make, start, gradients, **options, noise=0.1, seed=3))
    assert_same_bits(*results)


@each_dtype
@each_row
@pytest.mark.parametrize("options", ["usual", "everything", "noise"])
def test_every_simd_variant(row, dtype, options, each_variant):
    chosen = {
        "usual": row.usual,
        "everything": row.everything,
        "noise": {**row.settings["all"], "noise": 0.3, "seed": 9},
    }[options]
    # Whatever is left of a vector of 16, 8 or 4.
    sizes = (*range(1, 19), 31, 33, 63, 65, 255, 257, 12_345)
    start, gradients = random_problem(sizes, dtype, 3, 3)
    results = [result_of(row.make, start, gradients, **chosen) for _ in each_variant()]
    for other in results[1:]:
        assert_same_bits(results[0], other)


@each_dtype
@each_row
def test_special_values_in_every_simd_variant(row, dtype, each_variant):
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 6e-8, 65504.0, 3.3e38, 1e-39, inf, -inf, nan]
    start = [torch.tensor(values).to(dtype).repeat_interleave(len(values))]
    gradients = [[torch.tensor(values).to(dtype).repeat(len(values))]] * 2
    results = [result_of(row.make, start, gradients, **row.everything) for _ in each_variant()]
    for other in results[1:]:
        for name, tensors in results[0].items():
            a, b = tensors[0], other[name][0]
            # Which NaN it is the processor's instructions do not agree on.
            assert torch.equal(a.isnan(), b.isnan()), name
            assert torch.equal(bits(a)[~a.isnan()], bits(b)[~b.isnan()]), name


# Every element --------------------------------------------------------------------------------------------------------


@each_dtype
@each_row
def test_every_element_is_stored(row, dtype, variant):
    """After steps on gradients of 1 and 2 each element of the parameter and of each state has changed, and no other."""
    options = {"momentum": 0.9, "amsgrad": True, "centered": True, "weight_decay": 0.0, "eps": 0.1, "d0": 1.0}
    options = row.kept({**options, "silent_sgd_phase": False})
    sizes = sorted({1, 257, 65_537, *(n for w in WIDTHS for n in (w - 1, w, w + 1, 2 * w + 3))})
    # Each parameter between guards in one piece of memory.
    storages = [torch.full((size + 32,), 2.0, dtype=dtype) for size in sizes]
    params = [s[16 : 16 + n].requires_grad_() for s, n in zip(storages, sizes, strict=True)]
    lr = 100.0 if row.numbers and row.has_sums else 0.1  # an element's share in the norm of many is small
    optimizer = row.make(params, lr=lr, **options)
    for size in (1, 2):
        for p in params:
            p.grad = torch.full_like(p, size)
        optimizer.step()
    for p, storage in zip(params, storages, strict=True):
        n = p.numel()
        assert (p != 2).all(), f"{n} elements: not all of param changed"
        assert (storage[:16] == 2).all() and (storage[16 + n :] == 2).all(), f"{n} elements: written beyond the ends"
        for name in states_of(row, optimizer, p):
            assert (optimizer.state[p][name] != 0).all(), f"{n} elements: not all of {name} changed"


def test_empty_tensors_at_every_place():
    row = TABLE["AdamW"]
    start, gradients = random_problem((3, 300, 7), torch.float32, 3, 5)
    alone = result_of(row.make, start, gradients, **row.everything)
    for place in range(4):
        one_more, *now = [[*t[:place], torch.empty(0, 4), *t[place:]] for t in (start, *gradients)]
        with_empty = result_of(row.make, one_more, now, **row.everything)
        assert_same_bits(alone, {name: [t for t in ts if t.numel()] for name, ts in with_empty.items()})


@each_dtype
@each_combination
def test_unaligned_memory(row, options, dtype, variant):
    """Parameters, gradients and states that start anywhere in memory."""
    start, gradients = random_problem((300, 33), dtype, 3, 6)
    plain = result_of(row.make, start, gradients, **options)
    for shift in (1, 3):

        def shifted(tensor, shift=shift):
            memory = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
            place = memory[shift : shift + tensor.numel()]
            return place.copy_(tensor)

        params = [shifted(p).requires_grad_() for p in start]
        optimizer = row.make(params, **options)
        for now in gradients:
            for p, g in zip(params, now, strict=True):
                p.grad = shifted(g)
            optimizer.step()
            for state in optimizer.state.values():
                for name in state.keys() & row.states:
                    state[name] = shifted(state[name])
        for name, tensors in plain.items():
            for i, tensor in enumerate(tensors):
                found = params[i].detach() if name == "param" else optimizer.state[params[i]][name]
                assert torch.equal(bits(tensor), bits(found)), (name, i, shift)


# Memory ---------------------------------------------------------------------------------------------------------------


def allocations_in(action):
    """Sizes of what torch's CPU allocator gives out while `action` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_row
def test_no_allocation_from_the_second_step_on(row, dtype):
    start, gradients = random_problem([64] * 100, dtype, 1, 18)
    optimizer, params = run(row.make, start, gradients, **row.everything, noise=0.1)
    for p in params[::2]:  # and strided work
        p.grad = p.grad[0].expand_as(p)
    assert allocations_in(lambda: torch.empty(1000, dtype=torch.uint8)) == [1000]  # the probe works
    gc.collect()
    assert allocations_in(optimizer.step) == []
    assert allocations_in(optimizer.step) == []


@each_combination
def test_gradients_are_not_written(row, options):
    start, gradients = random_problem((70, 300), torch.float32, 3, 19)
    kept = copy.deepcopy(gradients)
    result_of(row.make, start, gradients, **options, noise=0.1)
    for now, before in zip(gradients, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def available_memory():
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 16 * 2**30, reason="needs 16 GiB of free memory")
@pytest.mark.parametrize("gradient", ["expanded", "real"])
def test_more_elements_than_an_int_counts(gradient):
    size = 2**31 + 8
    p = torch.ones(size, dtype=torch.bfloat16).requires_grad_()
    one = torch.ones(1, dtype=torch.bfloat16)
    p.grad = one.expand(size) if gradient == "expanded" else torch.ones(size, dtype=torch.bfloat16)
    TABLE["SGD"].make([p], lr=0.5).step()
    for places in (slice(0, 1000), slice(2**30 - 500, 2**30 + 500), slice(2**31 - 600, None)):
        assert (p.detach()[places] == 0.5).all(), places
    # Every one of them: no chunk was left out.
    assert all((piece == 0.5).all() for piece in p.detach().split(2**26))


# The choice of variant ------------------------------------------------------------------------------------------------


def test_variants_by_name():
    for name in (name for name, usable in _C.cpu_variants().items() if usable):
        _C.set_cpu_variant(name)
        assert _C.cpu_variant() == name
    _C.set_cpu_variant("scalar")
    assert _C.cpu_variant() == "baseline"
    with pytest.raises(ValueError, match="baseline"):
        _C.set_cpu_variant("avx1024")
