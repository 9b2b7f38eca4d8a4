"""The engine: the same bits wherever an element lies and whoever computes it, any layout, any place in memory."""

import copy
import gc

import pytest
import torch
from formulas import formula_step, options_now, take_undecided
from judge import (
    DTYPES,
    TABLE,
    WIDTHS,
    assert_no_worse,
    assert_same_bits,
    bits,
    outcome,
    random_problem,
    result_of,
    run,
    spacing,
)

import trainopt
from trainopt._extension import _C

ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
COMBINED = [
    pytest.param(r, o, id=f"{name}-{k}")
    for name, r in TABLE.items()
    for k, o in (("usual", r.usual), ("everything", r.everything))
]
each_combination = pytest.mark.parametrize("row, options", COMBINED)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Blocks of 256 that are too few to be given to another thread: see kGrainBlocks in csrc/python/plan.cpp.
SPLIT_SIZE = 48 * 256


def path_of(optimizer):
    return [row.path for row in trainopt.explain(optimizer)]


def states_of(row, optimizer, param):
    return [name for name in row.states if name in optimizer.state[param]]


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
    for _ in range(6):
        count = 1 + int(torch.randint(0, 200, (), generator=generator))
        cuts = sorted((torch.randperm(size - 1, generator=generator)[:count] + 1).tolist())
        lengths = [end - begin for begin, end in zip([0, *cuts], [*cuts, size], strict=True)]
        pieces = result_of(
            row.make,
            list(start[0].split(lengths)),
            [list(g.split(lengths)) for (g,) in gradients],
            **options,
        )
        assert all(n == whole[name][0] for name in row.numbers for n in pieces[name])
        joined = {name: [torch.cat(tensors)] for name, tensors in pieces.items() if name not in row.numbers}
        assert_same_bits({name: whole[name] for name in joined}, joined)


@each_dtype
@each_combination
def test_any_number_of_threads(row, options, dtype):
    # Split inside the big tensor, between tensors, and at ends that are no multiples of a chunk.
    sizes = (SPLIT_SIZE * 3 + 77, 5, SPLIT_SIZE, 255, *([300] * 100), SPLIT_SIZE + 1)
    start, gradients = random_problem(sizes, dtype, 2, 2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(result_of(row.make, start, gradients, **options, noise=0.1, seed=3))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@each_dtype
@ROWS
@pytest.mark.parametrize("options", ["usual", "everything", "all", "noise"])
def test_every_simd_variant(row, dtype, options, each_variant):
    chosen = {
        "usual": row.usual,
        "everything": row.everything,
        "all": row.settings["all"],
        "noise": {**row.settings["all"], "noise": 0.3, "seed": 9},
    }[options]
    sizes = (*range(1, 71), 255, 256, 257, 1000, 12_345)
    start, gradients = random_problem(sizes, dtype, 3, 3)
    results = [result_of(row.make, start, gradients, **chosen) for _ in each_variant()]
    for other in results[1:]:
        assert_same_bits(results[0], other)


@each_dtype
@ROWS
def test_special_values_in_every_simd_variant(row, dtype, each_variant):
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1e-7,
        -1e-7,
        6e-8,
        65504.0,
        3.3e38,
        1e-39,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    start = [torch.tensor(values).to(dtype).repeat_interleave(len(values))]
    gradients = [[torch.tensor(values).to(dtype).repeat(len(values))]] * 2
    results = [result_of(row.make, start, gradients, **row.everything) for _ in each_variant()]
    for other in results[1:]:
        for name, tensors in results[0].items():
            a, b = tensors[0], other[name][0]
            # Which NaN it is the processor's instructions do not agree on.
            assert torch.equal(a.isnan(), b.isnan()), name
            assert torch.equal(bits(a)[~a.isnan()], bits(b)[~b.isnan()]), name


@each_combination
def test_two_runs(row, options):
    start, gradients = random_problem((5000, 17), torch.float32, 5, 4)
    one = result_of(row.make, start, gradients, **options, noise=0.1)
    assert_same_bits(one, result_of(row.make, start, gradients, **options, noise=0.1))


# Every element --------------------------------------------------------------------------------------------------------


@each_dtype
@ROWS
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
    empty = torch.empty(0, 4)
    for place in range(4):
        with_empty = result_of(
            row.make,
            [*start[:place], empty, *start[place:]],
            [[*now[:place], empty, *now[place:]] for now in gradients],
            **row.everything,
        )
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


# Layouts --------------------------------------------------------------------------------------------------------------


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def sliced(x):
    """Every second column of something wider."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0, dtype=x.dtype)
    return wide[..., 1::2].copy_(x)


def permuted(x):
    """An order of dimensions that no memory format has a name for."""
    order = [2, 0, 3, 1]
    back = [order.index(d) for d in range(4)]
    return x.permute(order).contiguous().permute(back)


def contiguous(x):
    return x.contiguous()


DENSE = {f.__name__: f for f in (contiguous, transposed, channels_last, permuted)}
LAYOUTS = {**DENSE, "sliced": sliced}
SHAPE = (6, 5, 7, 3)


def logical(result):
    return {name: [t.contiguous() for t in tensors] for name, tensors in result.items()}


def run_in_layouts(row, start, gradients, param_layout, grad_layout, state_layout=None, **options):
    params = [param_layout(p.clone()).requires_grad_() for p in start]
    optimizer = row.make(params, **options)
    for i, now in enumerate(gradients):
        for p, g in zip(params, now, strict=True):
            p.grad = grad_layout(g)
        if i and state_layout is not None:
            for p in params:
                for name in states_of(row, optimizer, p):
                    optimizer.state[p][name] = state_layout(optimizer.state[p][name])
        optimizer.step()
    return optimizer, outcome(optimizer, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("param", DENSE.values(), ids=DENSE.keys())
@ROWS
def test_layouts(row, param, grad, dtype):
    """The result belongs to the logical element, whatever the strides of parameter and gradient; noise too."""
    options = {**row.everything, "noise": 0.2, "seed": 5}
    start, gradients = random_problem((SHAPE, SHAPE[::-1]), dtype, 3, 7)
    plain = run_in_layouts(row, start, gradients, contiguous, contiguous, **options)[1]
    optimizer, found = run_in_layouts(row, start, gradients, param, grad, **options)
    assert_same_bits(logical(plain), logical(found))
    assert all(path.startswith("fused") for path in path_of(optimizer))
    for p in optimizer.param_groups[0]["params"]:
        for name in states_of(row, optimizer, p):
            held = optimizer.state[p][name]
            assert held.is_contiguous() if name in row.factors else held.stride() == p.stride()


@pytest.mark.parametrize("state", DENSE.values(), ids=DENSE.keys())
@pytest.mark.parametrize("param", DENSE.values(), ids=DENSE.keys())
@each_combination
def test_states_with_strides_of_their_own(row, options, param, state):
    """As after loading a contiguous checkpoint into a channels_last model."""
    if row.factors:
        pytest.skip("averages over rows and columns in another order are torch's")
    start, gradients = random_problem((SHAPE,), torch.float32, 3, 8)
    plain = run_in_layouts(row, start, gradients, contiguous, contiguous, **options)[1]
    optimizer, found = run_in_layouts(row, start, gradients, param, channels_last, state, **options)
    assert_same_bits(logical(plain), logical(found))
    assert path_of(optimizer)[0].startswith("fused")


@each_combination
def test_contiguous_checkpoint_in_a_channels_last_model(row, options):
    start, gradients = random_problem((SHAPE,), torch.float32, 6, 8)
    straight = result_of(row.make, start, gradients, **options)
    first, params = run(row.make, start, gradients[:3], **options)
    p = channels_last(params[0].detach().clone()).requires_grad_()
    resumed = row.make([p], **options)
    resumed.load_state_dict(first.state_dict())
    for (g,) in gradients[3:]:
        p.grad = channels_last(g)
        resumed.step()
    assert torch.equal(p, straight["param"][0])
    for name in states_of(row, resumed, p):
        assert torch.equal(resumed.state[p][name], straight[name][0]), name


@each_combination
@pytest.mark.parametrize(
    "shape, source", [((40, 30), (1, 30)), ((40, 30), (40, 1)), ((40, 30), ()), ((2, 300), (300,))]
)
def test_expanded_gradients(row, options, shape, source):
    """Gradients of stride 0, which autograd makes for sum() and the like; they are read, never written."""
    start, _ = random_problem((shape,), torch.float32, 1, 9)
    small, _ = random_problem([source] * 3, torch.float32, 1, 10)
    plain = result_of(row.make, start, [[g.expand(shape).contiguous()] for g in small], **options)
    kept = [g.clone() for g in small]
    _, found = run_in_layouts(row, start, [[g.expand(shape)] for g in small], contiguous, lambda g: g, **options)
    assert_same_bits(plain, {name: found[name] for name in plain})
    assert all(torch.equal(a, b) for a, b in zip(small, kept, strict=True))


@each_combination
@pytest.mark.parametrize("dims", [8, 9, 10])
def test_many_dimensions(row, options, dims):
    """More dimensions than the engine has room for, in an order in which none can be joined."""
    shape = [2, 3] * (dims // 2) + [2] * (dims % 2)
    order = list(range(0, dims, 2)) + list(range(1, dims, 2))
    order = order[::-1]
    start, gradients = random_problem((shape,), torch.float32, 2, 11)

    def shuffled(x):
        return x.permute(order).contiguous().permute([order.index(d) for d in range(dims)])

    plain = run_in_layouts(row, start, gradients, contiguous, contiguous, **options)[1]
    found = run_in_layouts(row, start, gradients, contiguous, shuffled, **options)[1]
    if dims <= 8:
        assert_same_bits(plain, found)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)
    options = {**options, "noise": 0.1}
    plain = run_in_layouts(row, start, gradients, contiguous, contiguous, **options)[1]
    found = run_in_layouts(row, start, gradients, shuffled, contiguous, **options)[1]
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)


@ROWS
def test_parameters_that_are_not_dense(row):
    """A leaf that is a slice of something else: only its own elements change, as torch's loop changes them."""
    start, gradients = random_problem(((20, 30),), torch.float32, 4, 12)
    options = row.settings["all"]
    torchs = result_of(row.make_plain_loop, start, gradients, **options)
    wide = torch.full((20, 61), 7.0)
    p = wide[:, 1::2].copy_(start[0]).detach().requires_grad_()
    optimizer = row.make([p], **options)
    for (g,) in gradients:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), torchs["param"][0], rtol=1e-5, atol=1e-6)
    assert (wide[:, ::2] == 7).all()


@pytest.mark.parametrize("cut", [slice(0, 100), slice(50, 150), slice(99, 199), slice(10, 20)])
@ROWS
def test_overlapping_parameters(row, cut):
    """Parameters that share memory are stepped one after the other, as torch does."""
    start, gradients = random_problem((200, 100, cut.stop - cut.start, 40), torch.float32, 4, 13)
    results = []
    for make in (row.make, row.make_plain_loop):
        memory = start[0].clone()
        params = [memory[:100].detach(), memory[cut].detach(), start[3].clone()]
        optimizer = make([p.requires_grad_() for p in params], **row.settings["all"])
        for now in gradients:
            for p, g in zip(params, now[1:], strict=True):
                p.grad = g
            optimizer.step()
        results.append((memory, params[2].detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@ROWS
def test_memory_shared_only_from_a_later_step_on(row):
    """`p.data = q.data` between two steps."""
    start, gradients = random_problem((64, 64), torch.float32, 4, 14)
    results = []
    for make in (row.make, row.make_plain_loop):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(params, **row.settings["all"])
        for i, now in enumerate(gradients):
            if i == 2:
                params[1].data = params[0].data
            for p, g in zip(params, now, strict=True):
                p.grad = g
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# Gradients of another dtype -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, transposed])
@ROWS
def test_gradient_of_another_dtype(row, param_dtype, grad_dtype, layout):
    """A gradient counts as it is, brought to the arithmetic's type; it is not rounded to the parameter's."""
    start, _ = random_problem(((30, 41),), param_dtype, 1, 15)
    _, gradients = random_problem(((30, 41),), grad_dtype, 4, 16)
    wide = torch.float64 if param_dtype == torch.float64 else torch.float32
    options = row.settings["all"]
    p = start[0].clone().requires_grad_()
    p.grad_dtype = None  # any
    optimizer = row.make([p], **options)
    for step, (g,) in enumerate(gradients, start=1):
        old = p.detach().double().clone()
        state = row.held(optimizer.state.get(p, {}))
        p.grad = layout(g)
        assert p.grad.dtype == grad_dtype
        now = options_now(row, [(old, g.to(wide).double(), state)], options, optimizer)
        optimizer.step()
        new = formula_step(row, old, g.to(wide).double(), state, now, step)
        for name, exact in {"param": new, **state}.items():
            found = p.detach() if name == "param" else optimizer.state[p][name]
            assert found.dtype == param_dtype or name in row.numbers
            scale = torch.finfo(wide).eps * 16 * (1 + exact.abs() + old.abs() + g.double().abs().square())
            if name == "param" and (undecided := take_undecided(torch.finfo(wide).eps, g)) is not None:
                scale[undecided] = float("inf")
            allowed = spacing(exact, found.dtype) / 2 + scale
            assert ((found.double() - exact).abs() <= allowed).all(), (name, step)
    assert path_of(optimizer)[0].startswith("fused")


@each_combination
def test_parameters_of_all_dtypes_in_one_optimizer(row, options):
    if row.in_common is not None:
        pytest.skip("alone, a parameter has other numbers: test_prodigy.py")
    start, gradients = [], [[], [], []]
    for seed, dtype in enumerate([*DTYPES, *DTYPES[::-1]]):
        s, g = random_problem((257, 9), dtype, 3, seed)
        start += s
        for now, more in zip(gradients, g, strict=True):
            now += more
    together = result_of(row.make, start, gradients, **options)
    for i in range(len(start)):
        alone = result_of(row.make, [start[i]], [[now[i]] for now in gradients], **options)
        assert_same_bits(alone, {name: [ts[i]] for name, ts in together.items()})


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES[:3], ids=str)
@ROWS
def test_states_of_another_dtype(row, param_dtype, state_dtype):
    """A user may put states of another floating dtype in place: they are kept in it."""
    start, gradients = random_problem((500,), param_dtype, 4, 17)
    finer = torch.float64 if param_dtype == torch.float64 else torch.float32
    plain = result_of(row.make, [start[0].to(finer)], [[g.to(finer)] for (g,) in gradients], **row.settings["all"])
    optimizer, params = run(row.make, start, gradients[:1], **row.settings["all"])
    state = optimizer.state[params[0]]
    for name in row.states:
        if name in state:
            state[name] = state[name].to(state_dtype)
    for (g,) in gradients[1:]:
        params[0].grad = g
        optimizer.step()
    coarse = max(torch.finfo(param_dtype).eps, torch.finfo(state_dtype).eps)
    for name in row.states:
        if name in state:
            assert state[name].dtype == state_dtype
            torch.testing.assert_close(state[name].to(finer), plain[name][0], rtol=16 * coarse, atol=16 * coarse)
    assert params[0].dtype == param_dtype
    torch.testing.assert_close(params[0].detach().to(finer), plain["param"][0], rtol=16 * coarse, atol=16 * coarse)


# Memory ---------------------------------------------------------------------------------------------------------------


def allocations_in(action):
    """Sizes of what torch's CPU allocator gives out while `action` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ROWS
def test_no_allocation_from_the_second_step_on(row, dtype):
    start, gradients = random_problem([64] * 1000, dtype, 1, 18)
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


@ROWS
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_variant_is_right(row, dtype, variant):
    start, gradients = random_problem((1000, 7), dtype, 8, 20)
    options = row.settings["all"]
    assert_no_worse(
        result_of(row.make, start, gradients, **options),
        result_of(row.make_plain_loop, start, gradients, **options),
        result_of(row.make_plain_loop, start, gradients, torch.float64, **options),
        dtype,
        in_common=row.in_common is not None,
    )
