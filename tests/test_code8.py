"""States in 8 bits (``state_dtype="8bit"``): the codes, and steps that keep them."""

import copy
import math
from unittest import mock

import pytest
import torch
from judge import TABLE, on_both_paths, outcome, random_problem, run, stored_in

import trainopt
from trainopt import switches
from trainopt.optim import code8
from trainopt.optim.state_dtype import AS_PRECISE

NAMES = [name for name, row in TABLE.items() if row.states]
#: Ragged, whole and many blocks, and nothing at all.
SHAPES = ((), (7,), (0, 3), (33, 20), (256,), (257,), (3, 512))
FLAGS = [False, True]


@pytest.fixture
def any_size(monkeypatch):
    """Small tensors are stored in 8 bits too."""
    monkeypatch.setattr(code8, "LEAST_ELEMENTS", 0)


def book(scale, is_unsigned):
    """Every number that there is in a block of this scale, by code."""
    return code8.decode(torch.arange(256, dtype=torch.uint8), scale.view(1), is_unsigned).double()


def values_for(is_unsigned, seed=0):
    """Blocks of all kinds: even, heavy-tailed, over many decades, with zeros, with a single number, tiny and huge."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(40, 256, generator=generator)
    blocks[8:16] *= torch.exp(8 * torch.randn(8, 256, generator=generator))
    blocks[16:24] *= (torch.rand(8, 256, generator=generator) < 0.1).float()
    blocks[24] = 0.0
    blocks[25] = 0.0
    blocks[25, 17] = -3.0
    blocks[26] *= 1e-30
    blocks[27] *= 1e37
    blocks[28:32] = 1 + 0.2 * blocks[28:32]
    blocks[32:34] = 1 + blocks[32:34].abs() * 1.5
    values = blocks.flatten()
    return values.square().clamp(max=3e38) if is_unsigned else values


@pytest.mark.parametrize("is_unsigned", FLAGS)
def test_a_code_is_the_nearest_there_is(is_unsigned):
    values = values_for(is_unsigned)
    codes, scale = code8.encode(values, is_unsigned)
    for block in range(len(scale)):
        part = slice(256 * block, 256 * block + 256)
        numbers = book(scale[block], is_unsigned)
        assert (numbers.unique().diff() > 0).all() and len(numbers.unique()) >= (1 if scale[block] == 0 else 255)
        candidates = numbers[1:] if is_unsigned else numbers  # a number above 0 is none that is divided by as 0
        exact = values[part].double()
        distance = (exact[:, None] - candidates[None]).abs().amin(1)
        distance = torch.where(exact == 0, 0.0, distance)
        found = numbers[codes[part].long()]
        # A number that lies in the middle, to the last bits of a float32, may go either way.
        assert ((found - exact).abs() <= distance * (1 + 1e-5) + 1e-37).all(), block
        largest = exact.abs().max()
        assert (found.abs().max() - largest).abs() <= 8e-7 * largest
    assert {int(bits) for bits in scale.view(torch.int32) & 3} == ({0, 1, 2, 3} if is_unsigned else {0, 1, 2})


@pytest.mark.parametrize("is_unsigned", FLAGS)
def test_zeros_stay_zeros_and_what_is_divided_by_never_is_one(is_unsigned):
    values = values_for(is_unsigned)
    codes, scale = code8.encode(values, is_unsigned)
    back = code8.decode(codes, scale, is_unsigned)
    assert not back[values == 0].any()
    if is_unsigned:
        assert (back[values.gt(0) & scale.repeat_interleave(256).gt(1e-25)] > 0).all()
        assert (codes[values > 0] > 0).all()
    else:
        assert torch.equal(back.signbit()[back != 0], values.signbit()[back != 0])
    subnormal, scale = code8.encode(torch.full((256,), 1e-40), is_unsigned)
    assert not code8.decode(subnormal, scale, is_unsigned).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("is_unsigned", FLAGS)
def test_what_is_not_finite_is_not_lost(is_unsigned, bad):
    values = torch.rand(512)
    values[300] = bad
    back = code8.decode(*code8.encode(values, is_unsigned), is_unsigned)
    assert back[:256].isfinite().all() and not back[256:].isfinite().any()


@pytest.mark.parametrize("is_unsigned", FLAGS)
def test_encoded_again_it_is_the_same(is_unsigned):
    """Where the block's shift is: that is chosen by the numbers, which encoding has moved."""
    codes, scale = code8.encode(values_for(is_unsigned), is_unsigned)
    again, other = code8.encode(code8.decode(codes, scale, is_unsigned), is_unsigned)
    same = (scale.view(torch.int32) & 3) == (other.view(torch.int32) & 3)
    assert same.float().mean() > 0.8
    assert (codes != again).view(-1, 256)[same].float().mean() < 1e-3  # the scale may move in its last bits


def test_in_the_mean_over_steps_a_second_moment_is_rounded_to_itself():
    values = values_for(True)[: 8 * 256]
    mean = torch.zeros(len(values), dtype=torch.float64)
    steps = 500
    for step in range(1, steps + 1):
        codes, scale = code8.encode(values, True, code8.rounding_at(step))
        mean += code8.decode(codes, scale, True).double() / steps
    exact = values.double()
    nearest = code8.decode(*code8.encode(values, True), True).double()
    off = (mean - exact).abs() / exact
    assert off.mean() < 0.1 * ((nearest - exact).abs() / exact).mean()
    assert off.max() < 4e-3  # and the least part that is rounded up is 1/64


# In a step ------------------------------------------------------------------------------------------------------------


def by_torch(reference):
    return mock.patch.object(switches, "REFERENCE_FORCED", reference)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_decodes_computes_in_float32_and_encodes(name, dtype, device):
    """Against the plain path, which decodes and encodes in torch: a code is another only where a last bit decides."""
    row = TABLE[name]
    work = random_problem(SHAPES, dtype, 4)
    (ours, params), (plain, others) = on_both_paths(row, *work, device, **row.usual, state_dtype="8bit")
    assert {row_.path.split(" ")[0] for row_ in trainopt.explain(ours)} == {"fused"}
    for p, q in zip(params, others, strict=True):
        assert ours.state[p].keys() == plain.state[q].keys()
        torch.testing.assert_close(p.cpu(), q, rtol=3 * torch.finfo(dtype).eps, atol=1e-5)
        for key in row.states:
            if ours.state[p].get(key) is None:
                continue
            assert ours.state[p][key].dtype is stored_in(key, "8bit")
            if key in AS_PRECISE:
                torch.testing.assert_close(ours.state[p][key].cpu(), plain.state[q][key], rtol=2e-6, atol=1e-6)
                continue
            scales = [s[key + "_scale"].cpu() for s in (ours.state[p], plain.state[q])]
            torch.testing.assert_close(*scales, rtol=2e-6, atol=0)
            codes = [s[key].cpu().int() for s in (ours.state[p], plain.state[q])]
            assert (codes[0] != codes[1]).float().mean() < 0.01 if codes[0].numel() else True


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("name", NAMES)
def test_converted_from_a_file_of_torchs_and_back(name):
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, torch.float32, 2)
    optimizer, params = run(row.make, start, gradients, **row.usual)
    other = row.make([torch.nn.Parameter(p.detach().clone()) for p in params], **row.usual, state_dtype="8bit")
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        for key in row.coarse_states:
            if (value := optimizer.state[p].get(key)) is None:
                continue
            codes, scale = code8.encode(value, key in row.ours._unsigned)
            assert torch.equal(codes, other.state[q][key])
            assert torch.equal(scale, other.state[q][key + "_scale"])
    trainopt.convert_state(other, None)
    assert "state_dtype" not in other.param_groups[0]
    keys = {key for p in params for key in optimizer.state[p]}
    for q in other.param_groups[0]["params"]:
        assert other.state[q].keys() <= keys
        assert all(value.dtype is torch.float32 for value in other.state[q].values())
    if row.ours._torch_class is not None:
        row.ours._torch_class(other.param_groups[0]["params"]).load_state_dict(other.state_dict())


def test_small_tensors_are_stored_in_float32_and_the_rest_in_two_bytes():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (4095, 4096, 1_000_000)]
    optimizer = trainopt.AdamW(params, state_dtype="8bit")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.uint8, torch.uint8]
    held = sum(value.nbytes for key, value in optimizer.state[params[2]].items() if key != "step")
    assert held / 1_000_000 < 2.04
    notes = [row.note for row in trainopt.explain(optimizer)]
    assert "exp_avg in float32" in notes[0] and "exp_avg in 8 bits, exp_avg_sq in 8 bits" in notes[1]
    assert "8 bytes of state" in notes[0] and "2.03 bytes of state" in notes[2]


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("layout", ["channels last", "transposed", "a gradient of another order", "noise"])
def test_blocks_follow_the_memory(layout, device):
    start = torch.randn(8, 6, 5, 7)
    if layout == "channels last":
        start = start.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        start = start.transpose(0, 3)
    results = []
    for reference in (False, True):
        with by_torch(reference):
            p = torch.nn.Parameter(start.clone().to("cpu" if reference else device))
            assert p.stride() == start.stride()
            noise = 0.1 if layout == "noise" else 0.0
            optimizer = trainopt.AdamW([p], state_dtype="8bit", noise=noise)
            for seed in range(3):
                gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.device)
                p.grad = gradient if layout == "a gradient of another order" else torch.empty_like(p).copy_(gradient)
                if layout == "a gradient of another order":
                    p.grad = gradient.contiguous(memory_format=torch.channels_last)
                optimizer.step()
            assert optimizer.state[p]["exp_avg"].stride() == p.stride()
            results.append(outcome(optimizer, [p]))
    for key, tensors in results[0].items():
        for ours, plain in zip(tensors, results[1][key], strict=True):
            close = torch.isclose(ours.cpu().double(), plain.double(), rtol=1e-5, atol=1e-6)
            assert close.float().mean() > 0.99, key


def dynamic_map(signed):
    """The field's 8-bit code (Dettmers 2016, arXiv:1511.04561), by decades that have twice as many numbers each."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        numbers += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float64)


def coded_by(numbers, values, least=None):
    blocks = values.view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)
    middles = (numbers[1:] + numbers[:-1]) / 2
    index = torch.bucketize(blocks / scale.clamp(min=1e-300), middles)
    if least is not None:
        index = torch.where((blocks > 0) & (index < least), least, index)
    return (numbers[index] * scale).flatten()


@pytest.mark.parametrize("kind", ["even", "rows of many scales", "elements of many scales", "heavy tails", "sparse"])
def test_the_update_errs_no_more_than_with_the_dynamic_map(kind):
    """On the same gradients, as the root mean square of the update's difference to float32 states, over 150 steps."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.exp(2 * torch.randn(64, 1, generator=generator) * (kind == "rows of many scales"))
    each = torch.exp(torch.randn(64, 128, generator=generator))

    def gradient():
        g = torch.randn(64, 128, generator=generator) * rows
        if kind == "elements of many scales":
            g = g * each
        if kind == "heavy tails":
            g = g / torch.rand(64, 128, generator=generator).clamp(min=1e-6).sqrt()
        if kind == "sparse":
            g = g * (torch.rand(64, 1, generator=generator) < 0.1)
        return g.flatten()

    beta1, beta2 = 0.9, 0.999
    ways = ("float32", "ours", "dynamic")
    m = {way: torch.zeros(64 * 128, dtype=torch.float64) for way in ways}
    v = {way: torch.zeros(64 * 128, dtype=torch.float64) for way in ways}
    maps = dynamic_map(True), dynamic_map(False)
    total = dict.fromkeys(("ours", "dynamic"), 0.0)
    for step in range(1, 151):
        g = gradient().double()
        update = {}
        for way in ways:
            m[way] = beta1 * m[way] + (1 - beta1) * g
            v[way] = beta2 * v[way] + (1 - beta2) * g * g
            update[way] = (m[way] / (1 - beta1**step)) / ((v[way] / (1 - beta2**step)).sqrt() + 1e-8)
        m["ours"] = code8.decode(*code8.encode(m["ours"].float(), False), False).double()
        v["ours"] = code8.decode(*code8.encode(v["ours"].float(), True, code8.rounding_at(step)), True).double()
        m["dynamic"] = coded_by(maps[0], m["dynamic"])
        v["dynamic"] = coded_by(maps[1], v["dynamic"], least=1)
        for way in total:
            total[way] += float((update[way] - update["float32"]).square().mean())
    assert total["ours"] <= total["dynamic"]


BAD = {
    "complex": (torch.ones(3, dtype=torch.complex64), "one is torch.complex64"),
    "float64": (torch.ones(3, dtype=torch.float64), "one is torch.float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    value, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        trainopt.AdamW([torch.nn.Parameter(value)], state_dtype="8bit")


def test_a_file_with_codes_but_without_their_scales_is_refused_before_anything_changes():
    p = torch.nn.Parameter(torch.zeros(5000))
    optimizer = trainopt.AdamW([p], state_dtype="8bit")
    p.grad = torch.ones_like(p)
    optimizer.step()
    for broken in ("missing", "short", "of another dtype"):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        state = saved["state"][0]
        if broken == "missing":
            del state["exp_avg_scale"]
        elif broken == "short":
            state["exp_avg_scale"] = state["exp_avg_scale"][:-1]
        else:
            state["exp_avg"] = state["exp_avg"].float()
        with pytest.raises(ValueError, match="exp_avg_scale"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] != 0.5
        assert optimizer.state[p]["exp_avg"].dtype is torch.uint8


BAD_GROUPS = {
    "complex": (torch.ones(5000, dtype=torch.complex64), {}, "one is torch.complex64"),
    "float64": (torch.ones(5000, dtype=torch.float64), {}, "one is torch.float64"),
    "unknown": (torch.ones(5000), {"state_dtype": "4bit"}, "Invalid state_dtype value: '4bit'"),
    "unknown precision": (torch.ones(5000), {"precision": "double"}, "Invalid precision value: 'double'"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_file_whose_options_do_not_fit_is_refused_before_anything_changes(case):
    value, options, message = BAD_GROUPS[case]
    p = torch.nn.Parameter(torch.zeros(5000))
    optimizer = trainopt.AdamW([p], state_dtype="8bit", lr=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(options)
    other = trainopt.AdamW([torch.nn.Parameter(value)], lr=0.25)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.25 and not other.state


def test_a_hook_after_loading_sees_all_states():
    p = torch.nn.Parameter(torch.zeros(5000))
    optimizer = trainopt.AdamW([p], state_dtype="8bit", ema_decay=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    other = trainopt.AdamW([torch.nn.Parameter(p.detach().clone())])
    seen = []
    other.register_load_state_dict_post_hook(lambda loaded: seen.extend(next(iter(loaded.state.values()))))
    other.load_state_dict(optimizer.state_dict())
    assert {*seen} == {*optimizer.state[p]}


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("reference", [False, True])
def test_states_stay_as_they_are_stored_whatever_the_group_says_later(reference):
    p = torch.nn.Parameter(torch.ones(700))
    optimizer = trainopt.AdamW([p], state_dtype="8bit")
    with by_torch(reference):
        for chosen in ("8bit", None, "bfloat16"):
            optimizer.param_groups[0]["state_dtype"] = chosen
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert optimizer.state[p]["exp_avg"].dtype is torch.uint8


@pytest.mark.usefixtures("any_size")
def test_a_sparse_momentum_stays_sparse():
    p = torch.nn.Parameter(torch.ones(500, 2))
    optimizer = trainopt.SGD([p], lr=0.1, momentum=0.9, state_dtype="8bit")
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 2]]), torch.ones(2, 2), (500, 2))
    optimizer.step()
    trainopt.convert_state(optimizer, "8bit")
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].is_sparse and (p[1] < 1).all() and (p[0] == 1).all()


def test_codes_beside_a_float64_parameter_are_decoded():
    """Nobody makes such, but somebody may put them there: float64 arithmetic in the engine has no codes."""
    p, q = (torch.nn.Parameter(torch.ones(5000, dtype=torch.float64)) for _ in range(2))
    coded, plain = trainopt.AdamW([p], lr=0.1), trainopt.AdamW([q], lr=0.1)
    for step in range(2):
        for param in (p, q):
            param.grad = torch.linspace(-1, 1, 5000).double()
        if step == 1:
            state, other = coded.state[p], plain.state[q]
            state["exp_avg"], state["exp_avg_scale"] = code8.encode(state["exp_avg"].float(), False)
            other["exp_avg"] = code8.decode(state["exp_avg"], state["exp_avg_scale"], False).double()
        coded.step()
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
