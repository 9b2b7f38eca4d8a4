"""The noise: normal, independent, and a pure function of (seed, step, parameter, element)."""

import copy
import math

import pytest
import torch
from judge import DTYPES, TABLE, random_problem

from trainopt._extension import _C

ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())


def gaussian(size, seed=0, step=1, tensor=0):
    out = torch.empty(size)
    _C.gaussian_(out, seed, step, tensor)
    return out


def correlation(a, b):
    """In units of its standard deviation, were the two independent standard normal samples."""
    return (a.double() * b.double()).mean().item() * math.sqrt(a.numel())


# The distribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345])
def test_moments(seed):
    """Mean 0, variance 1, skewness 0, kurtosis 3, each within five standard deviations of its estimate."""
    n = 1 << 20
    x = gaussian(n, seed=seed).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        error = (x**power).mean().item() - expected
        assert abs(error) < 5 * math.sqrt(variance / n), f"moment {power}: {error + expected}"


def test_against_the_normal_distribution_function():
    """Kolmogorov and Smirnov's test: the largest difference of the distribution functions."""
    n = 1 << 20
    x = gaussian(n, seed=3).double().sort().values
    expected = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    difference = torch.maximum(ranks[1:] - expected, expected - ranks[:-1]).max().item()
    # Probability of more: 2 * exp(-2 * 2**2) < 1e-3 for chance, and the seed is fixed.
    assert difference * math.sqrt(n) < 2


def test_tails():
    n = 1 << 24
    x = gaussian(n, seed=4)
    for limit in (2.0, 3.0, 4.0, 5.0):
        for side in (x > limit, x < -limit):
            expected = n * 0.5 * math.erfc(limit / math.sqrt(2))
            assert abs(int(side.sum()) - expected) < 5 * math.sqrt(expected) + 3, limit
    assert x.isfinite().all() and 5 < x.abs().max() < 6.8


def test_values_are_many():
    """No coarse grid: few values come twice among a million, in the middle as in the tails."""
    x = gaussian(1 << 20, seed=5)
    assert x.unique().numel() > 0.95 * x.numel()
    middle = x[x.abs() < 0.01]
    assert middle.unique().numel() > 0.99 * middle.numel()


@pytest.mark.parametrize("residue", range(4))
def test_every_place_in_a_quad(residue):
    """Four values come of one counter: each of them alone is normal too."""
    x = gaussian(1 << 20, seed=6)[residue::4].double()
    n = x.numel()
    assert abs(x.mean().item()) < 5 / math.sqrt(n)
    assert abs(x.square().mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x > 0).double().mean().item() - 0.5) < 2.5 / math.sqrt(n)


# Independence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 64, 255, 256, 257, 1024, 65_536])
def test_elements_are_independent(lag):
    x = gaussian((1 << 20) + lag, seed=7)
    a, b = x[:-lag], x[lag:]
    assert abs(correlation(a, b)) < 4.5
    # Box and Muller's two values share a radius: their squares must not be correlated.
    assert abs(correlation((a.double() ** 2 - 1) / math.sqrt(2), (b.double() ** 2 - 1) / math.sqrt(2))) < 4.5


COUNTERS = [
    {"step": 2},
    {"step": 3},
    {"step": 1 << 20},
    {"tensor": 1},
    {"tensor": 2},
    {"tensor": 1000},
    {"tensor": 1, "step": 0},
    {"seed": 1},
    {"seed": 1, "step": 0},
    {"seed": 1, "tensor": 1},
    {"seed": 1 << 32},
    {"seed": (1 << 64) - 1},
]


@pytest.mark.parametrize("counter", COUNTERS, ids=str)
def test_tensors_steps_and_seeds_are_independent(counter):
    n = 1 << 18
    base = {"seed": 0, "step": 1, "tensor": 0}
    a, b = gaussian(n, **base), gaussian(n, **{**base, **counter})
    for shift in (0, 1, 2, 4, 256):
        assert abs(correlation(a[shift:], b[: n - shift])) < 4.5
        assert abs(correlation((a[shift:] ** 2 - 1) / math.sqrt(2), (b[: n - shift] ** 2 - 1) / math.sqrt(2))) < 4.5


def test_no_two_streams_share_a_value():
    n = 4096
    streams = [gaussian(n, seed, step, tensor) for seed in (0, 1) for step in (1, 2, 3) for tensor in (0, 1, 2)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert (a == b).sum() <= 2


def test_sums_over_steps_grow_as_of_independent_steps():
    """A random walk: the variance after k steps is k."""
    total = sum(gaussian(1 << 16, seed=8, step=step).double() for step in range(1, 101))
    variance = total.square().mean().item() / 100
    assert abs(variance - 1) < 5 * math.sqrt(2 / (1 << 16))


def philox(seed, counter):
    """Philox-4x32-10 by the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def box_muller(a, b):
    radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
    # 24 bits for the place in the quadrant, from its middle; the top two for the quadrant.
    place = (((b << 2 & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 >> 8) / 2**24
    angle = math.pi / 2 * (place + (b >> 30))
    return radius * math.cos(angle), radius * math.sin(angle)


@pytest.mark.parametrize("seed, step, tensor", [(0, 1, 0), (2**40 + 5, 77, 3), (2**64 - 1, 10**6, 2**20)])
def test_values_are_the_formulas(seed, step, tensor, variant):
    expected = []
    for quad in range(500):
        a, b, c, d = philox(seed, (quad, 0, tensor, step))
        expected += [*box_muller(a, b), *box_muller(c, d)]
    found = gaussian(2000, seed, step, tensor).double()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


def test_philox_is_philox():
    """The known answers of its authors."""
    assert philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    seed = 0xFFFFFFFFFFFFFFFF
    assert philox(seed, (0xFFFFFFFF,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_values_are_for_good():
    """A checkpoint of today goes on with the same noise tomorrow, on any machine: the very bits."""
    first = [1.6511778831481934, 0.8456453680992126, -0.11563605815172195, 0.10209859162569046]
    assert gaussian(4, seed=0, step=1, tensor=0).tolist() == first
    later = [1.4749715328216553, 0.09284273535013199, -0.7536100149154663]
    assert gaussian(259, seed=2**40 + 5, step=77, tensor=3)[256:].tolist() == later


# In the optimizers ----------------------------------------------------------------------------------------------------


def noise_only(row, params, **options):
    """An optimizer whose step does nothing but add noise."""
    optimizer = row.make(params, **{**row.still, "noise": 1.0, **options})
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    return optimizer


def zeros(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@ROWS
def test_step_adds_it(row, variant):
    """p += noise * N(seed, step, index over all groups, element), after everything else."""
    params = zeros(1000, 3, 257)
    optimizer = noise_only(row, [{"params": params[:2]}, {"params": params[2:], "noise": 0.5, "seed": 3}], seed=11)
    optimizer.step()
    first = [p.detach().clone() for p in params]
    optimizer.step()
    for index, p in enumerate(params):
        seed, scale = (3, 0.5) if index == 2 else (11, 1.0)
        one = gaussian(p.shape, seed, 1, index) * scale
        assert torch.equal(first[index], one)
        assert torch.equal(p.detach(), one + gaussian(p.shape, seed, 2, index) * scale)


@ROWS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_the_same_noise(row, dtype):
    (p,) = zeros(5000, dtype=dtype)
    noise_only(row, [p], seed=12).step()
    assert torch.equal(p.detach(), gaussian(5000, 12).to(dtype))


@ROWS
def test_it_comes_after_the_rule_and_the_threshold(row):
    """Soft-thresholding makes zeros; the noise moves them."""
    start, gradients = random_problem((400,), torch.float32, 1, 1)
    results = []
    for noise in (0.0, 0.25):
        p = start[0].clone().requires_grad_()
        p.grad = gradients[0][0]
        row.make([p], lr=0.01, l1=50.0, l1_proximal=True, noise=noise, seed=13).step()
        results.append(p.detach())
    assert (results[0] == 0).any()
    assert torch.equal(results[1], results[0] + gaussian(400, 13) * 0.25)


@ROWS
def test_frozen_and_gradientless_parameters_keep_the_others_noise(row):
    """The index counts all parameters, and the step is the parameter's own."""
    params = zeros(8, 8, 8)
    optimizer = noise_only(row, params, seed=14)
    params[1].grad = None
    optimizer.step()
    optimizer.step()
    params[1].grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(params[1].detach(), gaussian(8, 14, 1, 1))
    expected = sum(gaussian(8, 14, step, 2) for step in (1, 2, 3))
    torch.testing.assert_close(params[2].detach(), expected)


@ROWS
def test_resumed(row):
    start, gradients = random_problem((300, 7), torch.float32, 6, 2)
    options = {**row.everything, "noise": 0.1, "seed": 15}

    def go_on(optimizer, params, part):
        for now in part:
            for p, g in zip(params, now, strict=True):
                p.grad = g
            optimizer.step()

    params = [p.clone().requires_grad_() for p in start]
    optimizer = row.make(params, **options)
    go_on(optimizer, params, gradients[:3])
    saved, at = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    go_on(optimizer, params, gradients[3:])
    again = [p.requires_grad_() for p in at]
    # The options come with the state dict.
    resumed = row.make(again)
    resumed.load_state_dict(saved)
    go_on(resumed, again, gradients[3:])
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)


@ROWS
def test_replicas_agree(row):
    """Two replicas that see the same gradients stay the same, whatever else their processes do with random numbers."""
    results = []
    for replica in range(2):
        torch.manual_seed(replica)
        params = zeros(1000)
        optimizer = noise_only(row, params, seed=16)
        for _ in range(3):
            torch.rand(7 + replica)
            optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(*results)
    state = torch.get_rng_state()
    noise_only(row, zeros(1000)).step()
    assert torch.equal(state, torch.get_rng_state())


@ROWS
def test_deepcopy_agrees(row):
    params = zeros(100)
    optimizer = noise_only(row, params, seed=17)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    q.grad = torch.ones(100)
    optimizer.step()
    twin.step()
    assert torch.equal(params[0], q)


@ROWS
def test_memory_format_does_not_matter(row):
    """The noise of an element is that of its place in the tensor as one writes it down."""
    plain = zeros((4, 5, 6, 7))
    noise_only(row, plain, seed=18).step()
    for other in (
        torch.zeros(4, 5, 6, 7).to(memory_format=torch.channels_last),
        torch.zeros(7, 5, 6, 4).transpose(0, 3),
        torch.zeros(4, 5, 6, 14)[..., ::2],
    ):
        p = other.detach().requires_grad_()
        noise_only(row, [p], seed=18).step()
        assert torch.equal(p.detach(), plain[0].detach()), other.stride()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_seeds(seed):
    params = zeros(64)
    noise_only(TABLE["SGD"], params, seed=seed).step()
    assert torch.equal(params[0].detach(), gaussian(64, seed))


@ROWS
def test_switched_on_and_off(row):
    """Noise is a group's option like any other: a schedule may set it; 0 adds nothing."""
    params = zeros(64)
    optimizer = noise_only(row, params, seed=20, noise=0.0)
    optimizer.step()
    assert (params[0] == 0).all()
    optimizer.param_groups[0]["noise"] = 2.0
    optimizer.step()
    step = int(optimizer.state[params[0]]["step"])
    before = params[0].detach().clone()
    assert torch.equal(before, gaussian(64, 20, step) * 2)
    optimizer.param_groups[0]["noise"] = 0.0
    optimizer.step()
    assert torch.equal(params[0].detach(), before)


# The count that it is keyed by ----------------------------------------------------------------------------------------

LATE = 2**24


def run_late(row, steps, count=LATE, **options):
    """An optimizer whose count says that so many steps are done, and what each of its next steps added."""
    params = zeros(64)
    optimizer = noise_only(row, params, seed=21, **options)
    optimizer.step()
    optimizer.state[params[0]]["step"].fill_(count)
    added = []
    for _ in range(steps):
        params[0].data.zero_()
        optimizer.step()
        added.append(params[0].detach().clone())
    return optimizer, added


@ROWS
@pytest.mark.parametrize("path", ["engine", "torch"])
def test_it_goes_on_after_the_largest_count_of_float32(row, path, monkeypatch):
    """2**24 + 1 is no float32: the count stopped there, and the noise was the same vector in every step."""
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path == "torch")
    optimizer, added = run_late(row, 4)
    for i, noise in enumerate(added):
        assert torch.equal(noise, gaussian(64, 21, LATE + 1 + i))
    (state,) = optimizer.state.values()
    assert state["step"] == LATE + 4


@ROWS
def test_a_float32_count_is_widened_when_it_is_met(row):
    """From torch's state dict, or from a run before noise was switched on."""
    (p,) = zeros(64)
    optimizer = noise_only(row, [p], seed=21, noise=0.0)
    optimizer.step()
    if "step" in optimizer.state[p]:
        assert optimizer.state[p]["step"].dtype == torch.float32
    optimizer.state[p]["step"] = torch.tensor(float(LATE))
    optimizer.param_groups[0]["noise"] = 1.0
    for i in range(3):
        p.data.zero_()
        optimizer.step()
        assert torch.equal(p.detach(), gaussian(64, 21, LATE + 1 + i))


@ROWS
def test_without_noise_nothing_is_kept_that_torch_does_not_keep(row):
    states = []
    for make in (row.make, row.make_plain_loop):
        (p,) = zeros(8)
        p.grad = torch.ones(8)
        optimizer = make([p], **row.settings["all"])
        optimizer.step()
        states.append({key: value.dtype for key, value in optimizer.state[p].items()})
    assert states[0] == states[1]


@ROWS
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("copied", ["state dict", "deepcopy"])
def test_a_late_count_survives_a_resume(row, fused, copied):
    """torch rounds the counts of fused optimizers to float32 when it loads them."""
    optimizer, _ = run_late(row, 3, fused=fused)
    (p,) = zeros(64)
    if copied == "deepcopy":
        resumed = copy.deepcopy(optimizer)
        (p,) = resumed.param_groups[0]["params"]
        p.data.zero_()
    else:
        resumed = noise_only(row, [p], seed=21, fused=fused)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.step()
    assert torch.equal(p.detach(), gaussian(64, 21, LATE + 4))


def test_counts_beyond_32_bits_have_noise_of_their_own():
    seen = [gaussian(64, 5, step) for step in (3, 2**32 + 3, 2**33 + 3, 2**52 + 3)]
    for i, noise in enumerate(seen):
        assert not any(torch.equal(noise, other) for other in seen[:i])
    _, (noise,) = run_late(TABLE["SGD"], 1, count=2**33 + 2)
    assert torch.equal(noise, gaussian(64, 21, 2**33 + 3))


def test_noise_that_is_switched_on_late_leaves_the_momentum():
    """Making a count is no first step: the buffer was replaced by the gradient."""
    found = []
    for late in (True, False):
        (p,) = zeros(8)
        optimizer = noise_only(TABLE["SGD"], [p], momentum=0.5, noise=0.0 if late else 1e-30)
        for i in range(4):
            if i == 2:
                optimizer.param_groups[0]["noise"] = 1e-30
            p.grad = torch.full((8,), float(i + 1))
            optimizer.step()
        found.append(optimizer.state[p]["momentum_buffer"])
    assert torch.equal(*found)
