"""Muon: its update judged by float64 singular values and torch.optim.Muon, its options, and AdamW for the rest."""

import copy
import inspect

import pytest
import torch
from helpers import assert_same_bits, assert_same_outcome, error_of, snapshot
from torch import nn

import trainopt
from trainopt.optim.matrix.newton_schulz import orthogonalize, runs, takes_gram_form
from trainopt.optim.matrix.update import normalize_rows

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((12, 12), (9, 30), (30, 9), (9, 30), (1, 7), (7, 1), (5, 6))
pytestmark = pytest.mark.usefixtures("one_thread")

#: Of an element of an update, next to torch's, which is orthogonalised in bfloat16.
BFLOAT16 = {"rtol": 0, "atol": 0.05}


def matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def judged(g, steps=5, coefficients=COEFFICIENTS, eps=1e-7):
    """The iteration in float64, by singular values: the polynomial of each, on the singular vectors that it has."""
    a, b, c = coefficients
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / max(float(torch.linalg.vector_norm(s)), eps)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def bound(steps=5):
    """The largest that a singular value between 0 and 1 becomes."""
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for _ in range(steps):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    return float(s.max())


def with_spectrum(values, columns):
    """A matrix of these singular values."""
    rows = len(values)
    u, v = (torch.linalg.qr(matrix(n, rows, seed=n))[0] for n in (rows, columns + 1))
    return u * torch.as_tensor(values, dtype=torch.float64) @ v.mT


SPECTRA = {
    "noise": matrix(48, 200),
    "one large": with_spectrum([1.0] + [0.01] * 47, 200),
    "a power": with_spectrum([1 / (i + 1) for i in range(48)], 200),
    "decaying": with_spectrum([10 ** (-i / 8) for i in range(48)], 200),
    "rank 3": matrix(48, 3) @ matrix(3, 200, seed=1),
    "all alike": with_spectrum([1.0] * 48, 200),
    "square": matrix(48, 48),
    "zeros": torch.zeros(48, 200, dtype=torch.float64),
}


# The iteration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 7])
@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_are_those_of_the_iteration(name, is_tall, steps):
    g = SPECTRA[name].mT if is_tall else SPECTRA[name]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-3), (torch.bfloat16, None)):
        made = orthogonalize(torch.stack([g.to(dtype), 3 * g.to(dtype)]), COEFFICIENTS, steps, 1e-7)
        assert made.dtype is dtype and made.shape == (2, *g.shape) and made.isfinite().all()
        want = judged(g, steps)
        if tolerance is not None:
            assert (made.double() - want).abs().max() <= tolerance, dtype
        else:  # which cannot tell the smallest singular values from rounding, but must not blow them up
            assert torch.linalg.svdvals(made.double()).max() <= max(1, bound(steps)) * 1.05


@pytest.mark.parametrize("name", SPECTRA)
def test_in_bfloat16_it_is_as_near_to_the_judge_as_torchs_or_near_enough(name):
    """The Gram form rounds the squares of singular values: where some are far larger than others, that is more."""
    g = SPECTRA[name].float()
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    torch.optim.Muon([p], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    made = orthogonalize(g.bfloat16()[None].clone(), COEFFICIENTS, 5, 1e-7)[0]
    ours, theirs = (float((x.double() - judged(g)).norm()) for x in (made, -p.detach()))
    assert ours <= max(1.3 * theirs, 0.07 * float(judged(g).norm()))


@pytest.mark.parametrize("shape", [(20, 20), (20, 25), (20, 90)])
def test_the_transpose_of_the_problem_gives_the_transpose_of_the_update(shape):
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        g = matrix(*shape, dtype=dtype)
        made, turned = (orthogonalize(x[None].clone(), COEFFICIENTS, 5, 1e-7)[0] for x in (g, g.mT))
        torch.testing.assert_close(turned.mT, made, rtol=0, atol=atol)


def test_the_gram_form_is_taken_where_it_has_fewer_multiplications():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert all(takes_gram_form(*sides, 5, dtype) for sides in ((768, 3072), (3072, 768), (768, 2304)))
        assert not any(takes_gram_form(*sides, 5, dtype) for sides in ((768, 768), (700, 768), (0, 5), (5, 0)))
    assert not takes_gram_form(768, 3072, 0, torch.float32)
    assert runs(5, torch.bfloat16) == [3, 2] and runs(5, torch.float32) == [5] and sum(runs(23, torch.bfloat16)) == 23


# As torch.optim.Muon --------------------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": {},
    "no nesterov": {"nesterov": False, "lr": 0.1},
    "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.5},
    "original": {"adjust_lr_fn": "original", "momentum": 0.5, "lr": 0.05},
    "a tensor": {"lr": torch.tensor(0.02)},
    "another iteration": {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 9, "eps": 1e-3},
}
if "spectral_unclamped" in inspect.getsource(torch.optim.Muon.__init__):  # torch 2.14
    OPTIONS["spectral_unclamped"] = {"adjust_lr_fn": "spectral_unclamped", "lr": 0.05}


def test_the_signature_is_torchs_and_more():
    ours, theirs = (inspect.signature(cls).parameters for cls in (trainopt.Muon, torch.optim.Muon))
    assert list(ours)[: len(theirs)] == list(theirs) and issubclass(trainopt.Muon, torch.optim.Muon)
    assert all(ours[k].default == p.default and ours[k].kind == p.kind for k, p in theirs.items())
    assert all(ours[k].kind is inspect.Parameter.KEYWORD_ONLY for k in list(ours)[len(theirs) :])


def twins(dtype=torch.float32, shapes=SHAPES, extras=None, **options):
    start = [matrix(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    mine, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    return (trainopt.Muon(mine, **options, **(extras or {})), mine), (torch.optim.Muon(theirs, **options), theirs)


def step_alike(*sides, steps=3, first_seed=100):
    for step in range(steps):
        for optimizer, params in sides:
            for i, p in enumerate(params):
                p.grad = matrix(*p.shape, seed=first_seed + 10 * step + i, dtype=p.dtype)
            optimizer.step()


#: But where torch's normalises its momentum in place: see `test_momentum_is_not_normalised_in_place`.
ALIKE = [
    (name, dtype)
    for name in OPTIONS
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if (name, dtype) != ("no nesterov", torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), ALIKE)
def test_a_plain_list_is_stepped_as_by_torch(name, dtype):
    ours, torchs = twins(dtype, **OPTIONS[name])
    step_alike(ours, torchs)
    for p, q in zip(ours[1], torchs[1], strict=True):
        torch.testing.assert_close(p, q, **BFLOAT16)
        assert torch.equal(ours[0].state[p]["momentum_buffer"], torchs[0].state[q]["momentum_buffer"])
        assert ours[0].state[p].keys() == torchs[0].state[q].keys()


def test_the_formula_in_float64():
    """Against SVDs, for two steps, with every shape's own ratio."""
    lr, decay, momentum = 0.1, 0.2, 0.9
    params = [nn.Parameter(matrix(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    want, buffers = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    optimizer = trainopt.Muon(params, lr, decay, momentum)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = matrix(*p.shape, seed=50 + 10 * step + i)
            buffers[i] = momentum * buffers[i] + (1 - momentum) * p.grad
            update = judged(momentum * buffers[i] + (1 - momentum) * p.grad)
            ratio = max(1, p.shape[0] / p.shape[1]) ** 0.5
            want[i] = want[i] * (1 - lr * decay) - lr * ratio * update
        optimizer.step()
    for p, q in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_not_normalised_in_place(nesterov):
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    p.grad = torch.full((4, 4), 2.0, dtype=torch.bfloat16)
    optimizer = trainopt.Muon([p], momentum=0.5, nesterov=nesterov)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(4, 4, dtype=torch.bfloat16))


def test_state_dicts_go_both_ways():
    ours, torchs = twins(lr=0.05, nesterov=False)
    step_alike(ours, torchs)
    assert ours[0].state_dict().keys() == torchs[0].state_dict().keys()
    assert ours[0].state_dict()["param_groups"] == torchs[0].state_dict()["param_groups"]
    group = ours[0].param_groups[0]
    torchs[0].load_state_dict(copy.deepcopy(ours[0].state_dict()))
    ours[0].load_state_dict(torchs[0].state_dict())
    assert ours[0].param_groups[0] is group  # for whoever holds it
    first = ours[1][0], torchs[1][0]
    assert ours[0].state[first[0]]["momentum_buffer"] is not torchs[0].state[first[1]]["momentum_buffer"]
    step_alike(ours, torchs)
    assert_same_outcome(ours, torchs, **BFLOAT16)


WRONG = [
    {"lr": -1.0},
    {"lr": torch.ones(2)},
    {"momentum": -0.1},
    {"weight_decay": -0.1},
    {"adjust_lr_fn": "adamw"},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_errors_are_torchs(options):
    p = nn.Parameter(torch.zeros(2, 2))
    theirs = error_of(lambda: torch.optim.Muon([p], **options))
    assert error_of(lambda: trainopt.Muon([p], **options)) == theirs
    assert error_of(lambda: trainopt.Muon([{"params": [p], **options}])) == theirs


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_what_is_no_matrix_is_refused_in_torchs_words(shape):
    p, q = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(2, 2))
    assert error_of(lambda: trainopt.Muon([p])) == error_of(lambda: torch.optim.Muon([p]))
    optimizer = trainopt.Muon([q])
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        optimizer.add_param_group({"params": iter([p])})
    assert len(optimizer.param_groups) == 1


def test_errors_of_a_step_come_before_anything_changes():
    def change(side, what):
        optimizer, params = side
        params[1].grad = None
        if what == "sparse":
            params[1].grad = torch.eye(9, 30).to_sparse()
        elif what == "complex":
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]})
            optimizer.param_groups[-1]["params"][0].grad = torch.zeros(2, 2, dtype=torch.complex64)
        else:
            params[1].grad = torch.ones(9, 30)
            optimizer.param_groups[0].update({"ns_steps": 100} if what == "steps" else {"ns_coefficients": (1, 2)})

    for what in ("sparse", "complex", "steps", "coefficients"):
        sides = twins()
        step_alike(*sides, steps=1)
        for side in sides:
            change(side, what)
        before = snapshot(sides[0][0])
        assert error_of(sides[0][0].step) == error_of(sides[1][0].step)
        assert_same_bits(before, snapshot(sides[0][0]))


# Beyond torch ---------------------------------------------------------------------------------------------------------


def one_step(p, g, **options):
    """What one step without momentum and decay adds to a parameter of zeros, over the learning rate."""
    p = nn.Parameter(torch.zeros_like(g)) if p is None else p
    p.grad = g.clone()
    start = p.detach().clone()
    defaults = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    trainopt.Muon([p], **{**defaults, **options}).step()
    return (start - p.detach()) / 0.5


def scaled(g):
    return judged(g) * max(1, g.shape[0] / g.shape[1]) ** 0.5


CASES = {
    "flatten": ((6, 4, 3, 2), {"flatten": True}, lambda g: scaled(g.flatten(1)).view(g.shape)),
    "split": ((12, 5), {"split": 3}, lambda g: torch.cat([scaled(x) for x in g.chunk(3)])),
    "sizes": ((12, 5), {"split": (8, 2, 2)}, lambda g: torch.cat([scaled(x) for x in g.split([8, 2, 2])])),
    "columns": ((5, 12), {"split": 4, "split_dim": 1}, lambda g: torch.cat([scaled(x) for x in g.chunk(4, 1)], 1)),
    "groups of a convolution": (
        (6, 4, 3),
        {"flatten": True, "split": 2},
        lambda g: torch.cat([scaled(x.flatten(1)).view(x.shape) for x in g.chunk(2)]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_several_matrices_or_a_tensor(case):
    shape, options, want = CASES[case]
    g = matrix(*shape)
    torch.testing.assert_close(one_step(None, g, **options), want(g), rtol=1e-9, atol=1e-9)
    normed = one_step(None, g, **options, normuon_beta2=0.0)
    assert normed.isfinite().all() and not torch.allclose(normed, want(g), atol=1e-3)


def test_parameters_and_gradients_of_any_strides():
    g = matrix(6, 4, 3, 2)
    p = nn.Parameter(torch.zeros_like(g).to(memory_format=torch.channels_last))
    assert p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
    torch.testing.assert_close(one_step(p, g, flatten=True), one_step(None, g, flatten=True), rtol=1e-9, atol=1e-9)
    g = matrix(9, 30)
    turned = nn.Parameter(torch.zeros(30, 9, dtype=torch.float64).mT)
    torch.testing.assert_close(one_step(turned, g.mT.clone().mT), one_step(None, g), rtol=1e-9, atol=1e-9)


def test_normuon_is_its_formula():
    beta2 = 0.9
    p = nn.Parameter(torch.zeros(10, 24, dtype=torch.float64))
    optimizer = trainopt.Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, normuon_beta2=beta2)
    second, want = torch.zeros(10, 1, dtype=torch.float64), torch.zeros(10, 24, dtype=torch.float64)
    for step in range(3):
        p.grad = matrix(10, 24, seed=step) * torch.linspace(0.1, 5, 10)[:, None]
        o = judged(p.grad)
        second = beta2 * second + (1 - beta2) * o.square().mean(1, keepdim=True)
        update = o / second.sqrt()
        want -= update * o.norm() / update.norm()
        optimizer.step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-8, atol=1e-8)
    assert set(optimizer.state[p]) == {"momentum_buffer", "second_momentum_buffer"}
    torch.testing.assert_close(optimizer.state[p]["second_momentum_buffer"], second, rtol=1e-8, atol=1e-8)
    optimizer.param_groups[0].update(split=2, split_dim=1)
    with pytest.raises(ValueError, match="is not of the present split=2"):
        optimizer.step()
    assert normalize_rows(torch.zeros(3, 4), torch.zeros(3, 1), 0.9).eq(0).all()


def test_normuons_state_stays_float32_beside_bfloat16_parameters():
    ours, _ = twins(torch.bfloat16, extras={"normuon_beta2": 0.9})
    step_alike(ours)
    other, _ = twins(torch.bfloat16, extras={"normuon_beta2": 0.9})
    other[0].load_state_dict(ours[0].state_dict())
    for p, q in zip(ours[1], other[1], strict=True):
        q.data.copy_(p.data)
        moments = (side[0].state[x]["second_momentum_buffer"] for side, x in ((ours, p), (other, q)))
        assert torch.equal(*moments) and other[0].state[q]["second_momentum_buffer"].dtype is torch.float32
    step_alike(ours, other)
    assert_same_bits(snapshot(ours[0]), snapshot(other[0]) | {"members": snapshot(ours[0])["members"]})


def test_the_iterations_dtype():
    g = matrix(20, 60)
    far = {name: float((one_step(None, g, ns_dtype=name) - judged(g)).norm()) for name in ("bfloat16", "float32")}
    assert (
        1e-3 < far["bfloat16"] < 0.5
        and far["float32"] < 1e-4
        and torch.equal(one_step(None, g, ns_dtype="float64"), one_step(None, g))
    )
    with pytest.raises(ValueError, match="Invalid ns_dtype value: 'float16'"):
        trainopt.Muon([nn.Parameter(g)], ns_dtype="float16")


@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.95}])
def test_gradients_of_zeros_and_of_no_elements(options):
    params = [nn.Parameter(matrix(*shape, dtype=torch.float32)) for shape in ((5, 20), (0, 4), (4, 0), (3, 3))]
    optimizer = trainopt.Muon(params, lr=0.5, weight_decay=0.5, **options)
    for p in params[:3]:
        p.grad = torch.zeros_like(p)
    start = [p.detach().clone() for p in params]
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), start[0] * 0.75)
    assert torch.equal(params[3], start[3]) and params[3] not in optimizer.state
