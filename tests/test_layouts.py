"""Tensors as they come: any strides, memory that several share, and gradients and states of other dtypes."""

import pytest
import torch
from formulas import formula_step, options_now, take_undecided
from judge import DTYPES, assert_same_bits, outcome, random_problem, result_of, run, spacing
from rows import each_combination, each_row, states_of

import trainopt


def path_of(optimizer):
    return [row.path for row in trainopt.explain(optimizer)]


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


def step_through(optimizer, params, gradients):
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g
        optimizer.step()


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
@pytest.mark.parametrize("param", DENSE.values(), ids=DENSE.keys())
@each_row
def test_layouts(row, param, dtype):
    """The result belongs to the logical element, whatever the strides of parameter and gradient; noise too."""
    options = {**row.everything, "noise": 0.2, "seed": 5}
    start, gradients = random_problem((SHAPE, SHAPE[::-1]), dtype, 3, 7)
    plain = run_in_layouts(row, start, gradients, contiguous, contiguous, **options)[1]
    for grad in LAYOUTS.values():
        optimizer, found = run_in_layouts(row, start, gradients, param, grad, **options)
        assert_same_bits(logical(plain), logical(found))
        assert all(path.startswith("fused") for path in path_of(optimizer))
        for p in optimizer.param_groups[0]["params"]:
            for name in states_of(row, optimizer, p):
                held = optimizer.state[p][name]
                assert held.is_contiguous() if name in row.factors else held.stride() == p.stride()


@pytest.mark.parametrize("param", DENSE.values(), ids=DENSE.keys())
@each_combination
def test_states_with_strides_of_their_own(row, options, param):
    """As after loading a contiguous checkpoint into a channels_last model."""
    if row.factors:
        pytest.skip("averages over rows and columns in another order are torch's")
    start, gradients = random_problem((SHAPE,), torch.float32, 3, 8)
    plain = run_in_layouts(row, start, gradients, contiguous, contiguous, **options)[1]
    for state in DENSE.values():
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
    step_through(resumed, [p], [[channels_last(g)] for (g,) in gradients[3:]])
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
    order = [*range(0, dims, 2), *range(1, dims, 2)][::-1]
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


@each_row
def test_parameters_that_are_not_dense(row):
    """A leaf that is a slice of something else: only its own elements change, as torch's loop changes them."""
    start, gradients = random_problem(((20, 30),), torch.float32, 4, 12)
    options = row.settings["all"]
    torchs = result_of(row.make_plain_loop, start, gradients, **options)
    wide = torch.full((20, 61), 7.0)
    p = wide[:, 1::2].copy_(start[0]).detach().requires_grad_()
    optimizer = row.make([p], **options)
    step_through(optimizer, [p], gradients)
    torch.testing.assert_close(p.detach(), torchs["param"][0], rtol=1e-5, atol=1e-6)
    assert (wide[:, ::2] == 7).all()


@pytest.mark.parametrize("cut", [slice(0, 100), slice(50, 150), slice(99, 199), slice(10, 20)])
@each_row
def test_overlapping_parameters(row, cut):
    """Parameters that share memory are stepped one after the other, as torch does."""
    start, gradients = random_problem((200, 100, cut.stop - cut.start, 40), torch.float32, 4, 13)
    results = []
    for make in (row.make, row.make_plain_loop):
        memory = start[0].clone()
        params = [memory[:100].detach(), memory[cut].detach(), start[3].clone()]
        optimizer = make([p.requires_grad_() for p in params], **row.settings["all"])
        step_through(optimizer, params, [now[1:] for now in gradients])
        results.append((memory, params[2].detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@each_row
def test_memory_shared_only_from_a_later_step_on(row):
    """`p.data = q.data` between two steps."""
    start, gradients = random_problem((64, 64), torch.float32, 4, 14)
    results = []
    for make in (row.make, row.make_plain_loop):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(params, **row.settings["all"])
        step_through(optimizer, params, gradients[:2])
        params[1].data = params[0].data
        step_through(optimizer, params, gradients[2:])
        results.append([p.detach() for p in params])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# Gradients of another dtype -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@each_row
def test_gradient_of_another_dtype(row, param_dtype, grad_dtype):
    """A gradient counts as it is, brought to the arithmetic's type; it is not rounded to the parameter's. Its order in
    memory is the parameter's in every other step."""
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
        p.grad = g if step % 2 else transposed(g)
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
@each_row
def test_states_of_another_dtype(row, param_dtype, state_dtype):
    """A user may put states of another floating dtype in place: they are kept in it."""
    start, gradients = random_problem((500,), param_dtype, 4, 17)
    finer = torch.float64 if param_dtype == torch.float64 else torch.float32
    plain = result_of(row.make, [start[0].to(finer)], [[g.to(finer)] for (g,) in gradients], **row.settings["all"])
    optimizer, params = run(row.make, start, gradients[:1], **row.settings["all"])
    state = optimizer.state[params[0]]
    held = [name for name in row.states if name in state]
    for name in held:
        state[name] = state[name].to(state_dtype)
    step_through(optimizer, params, gradients[1:])
    coarse = max(torch.finfo(param_dtype).eps, torch.finfo(state_dtype).eps)
    assert params[0].dtype == param_dtype and all(state[name].dtype == state_dtype for name in held)
    for name, found in {"param": params[0].detach(), **{name: state[name] for name in held}}.items():
        torch.testing.assert_close(found.to(finer), plain[name][0], rtol=16 * coarse, atol=16 * coarse)
