"""What is at the ends on a device: vocabularies of 128k classes and more, over 2^31 logits, and NaN and infinities.

They must stand where torch has them in float64, or where the CPU's engine has them, which is held against torch
elsewhere.
"""

import contextlib
import itertools

import judge
import pytest
import torch
from devices import IS_EMULATED
from loss_judge import DTYPES, REDUCTIONS, as_dtype, assert_no_worse, classes, on, random, run
from steps import TABLE, assert_same_bits, counts_on_device, outcome_on
from test_losses_cross_entropy import compare, problem
from test_losses_linear import by_logits
from test_losses_linear import problem as linear_problem
from test_losses_pointwise import LOSSES
from torch.nn import functional as F

import trainopt
from trainopt import functional
from trainopt._extension import _C

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])

# Many classes ---------------------------------------------------------------------------------------------------------

#: 128k, Qwen's, and one that no row after the first begins at a multiple of 16 bytes with.
each_vocabulary = pytest.mark.parametrize("count", [2**17, 151_936, 131_071])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_vocabulary
def test_rows_of_many_classes(device, count, dtype):
    logits, target = problem((2,), count=count)
    target[1] = count - 1
    compare(device, logits, target, dtype)
    compare(device, logits, target, dtype, reduction="none", label_smoothing=0.1)


@each_vocabulary
def test_rows_of_many_classes_by_the_general_loop(device, count):
    logits, target = problem((2,), "probabilities", count=count)
    compare(device, logits, target, torch.bfloat16)
    logits, target = problem((2,), count=count)
    compare(device, logits, target, torch.float32, True, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_vocabulary
def test_a_linear_layer_of_many_classes(device, count, dtype):
    hidden, weight, _, target = linear_problem((4,), count, 4)
    operands = [hidden.to(dtype), weight.to(dtype)]
    for budget in (None, count * 8):
        ours = on(device, lambda h, w, t, b=budget: functional.linear_cross_entropy(h, w, t, memory_budget=b))
        found = run(lambda h, w, f=ours: f(h, w, target), operands)
        torchs = run(lambda h, w: by_logits(h, w, target), operands)
        truth = run(lambda h, w: by_logits(h, w, target), [operand.double() for operand in operands])
        for mine, theirs, true in zip(found, torchs, truth, strict=True):
            assert_no_worse(mine, theirs, true, roundings=8)


@contextlib.contextmanager
def only_blocks(*places):
    """What the emulated device does of a grid that would take it too long; a GPU does it all."""
    if IS_EMULATED:
        _C.simt.set_blocks(places)
    try:
        yield
    finally:
        if IS_EMULATED:
            _C.simt.set_blocks(())
            with contextlib.suppress(IndexError):  # of blocks that have left no sums
                functional.check_targets()


def grid_of(work):
    """The blocks of its first launch, of which the emulated device runs one."""
    if not IS_EMULATED:
        return 2
    with only_blocks(0):
        _C.simt.take_launches()
        work()
        return _C.simt.take_launches()[0]


def needs_memory(device, gigabytes):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free memory on the device")


@pytest.mark.slow
def test_more_than_two_to_the_31_logits(device):
    """Rows at either end, whose offsets differ by more than an int holds."""
    needs_memory(device, 10)
    rows, count = 2**14 + 1, 2**17
    logits = torch.empty(rows, count, dtype=torch.bfloat16, device=device)
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    seen = (0, rows - 1)
    for row in seen:
        logits[row] = 3 * random(count, seed=row).to(device, torch.bfloat16)
        target[row] = count - 1 - row
    grid = grid_of(lambda: functional.cross_entropy(logits, target, reduction="none"))
    logits.requires_grad_()
    with only_blocks(0, (rows - 1) % grid):  # which take every so many rows
        loss = functional.cross_entropy(logits, target, reduction="none")
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        for row in seen:
            here = logits[row].detach().cpu()
            label = torch.tensor(count - 1 - row)
            found = [loss[row].cpu(), gradient[row].cpu()]
            torchs, truth = (
                run(lambda x, t=label: F.cross_entropy(x, t), [here.to(dtype)]) for dtype in (here.dtype, torch.float64)
            )
            for mine, theirs, true in zip(found, torchs, truth, strict=True):
                assert_no_worse(mine, theirs, true)


@pytest.mark.slow
def test_more_than_two_to_the_31_errors(device):
    needs_memory(device, 18)
    count = 2**31 + 8
    input, target = (torch.empty(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    seen = (slice(0, 9), slice(count - 9, count))
    for part in seen:
        input[part], target[part] = 3.0, 1.0
    input.requires_grad_()
    last = grid_of(lambda: functional.mse_loss(input, target, reduction="none")) - 1
    with only_blocks(0, last - 1, last):
        values = functional.mse_loss(input, target, reduction="none")
        (gradient,) = torch.autograd.grad(values, input, torch.ones_like(values))
        for part in seen:
            assert values[part].cpu().eq(4).all() and gradient[part].cpu().eq(4).all()


# NaN and infinities ---------------------------------------------------------------------------------------------------


def assert_stands_where_the_cpu_has_it(device, loss, operands, dtype, upstream=None):
    """The operands are rounded first; those that are not floating stay as they are."""
    rounded = [as_dtype(operand, dtype) for operand in operands]
    up = None if upstream is None else as_dtype(upstream, dtype)
    found, expected = run(on(device, loss), rounded, up), run(loss, rounded, up)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def spoilt(tensor, value, place):
    tensor = tensor.clone()
    tensor.view(-1)[place] = value
    return tensor


@each_value
@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("count", [7, 40, 1500])
@pytest.mark.parametrize("operand", ["logits", "probabilities", "weight", "upstream"])
def test_cross_entropy(device, operand, count, reduction, dtype, value):
    """In a row, of a class that rows have and that none has, in one element's upstream gradient."""
    for kind, smoothing in itertools.product(("classes", "probabilities"), (0.0, 0.1)):
        if operand == "probabilities" and kind == "classes":
            continue
        logits, target = problem((4,), kind, count=count)
        logits[:, 3] -= 9  # nobody's largest: there an infinite mass has a loss of infinity - infinity
        weight, upstream = random(count, seed=5).abs() + 0.1, torch.ones(4 if reduction == "none" else ())
        if operand == "logits":
            logits = spoilt(logits, value, count + 3)
        elif operand == "probabilities":
            target = spoilt(target, value, count + 3)
        elif operand == "weight":
            weight = spoilt(weight, value, 3)
        else:
            upstream = spoilt(upstream, value, -1)
        options = {"reduction": reduction, "label_smoothing": smoothing}

        results = []
        for function, up in ((on(device, functional.cross_entropy), dtype), (F.cross_entropy, torch.float64)):
            others = [as_dtype(as_dtype(operand, dtype), up) for operand in (target, weight)]
            leaf = as_dtype(as_dtype(logits, dtype), up)
            results.append(run(lambda x, f=function, g=others, o=options: f(x, *g, **o), [leaf], upstream.to(up)))
        for mine, true in zip(*results, strict=True):
            assert_no_worse(mine, true.to(dtype), true, roundings=8)


@each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operand", ["hidden", "weight", "bias", "upstream"])
def test_linear_cross_entropy(device, operand, reduction, dtype, value):
    hidden, weight, bias, target = linear_problem((4,))
    upstream = torch.ones(4 if reduction == "none" else ())
    if operand == "upstream":
        upstream = spoilt(upstream, value, -1)
    operands = {"hidden": hidden, "weight": weight, "bias": bias}
    if operand in operands:
        operands[operand] = spoilt(operands[operand], value, 2)

    def loss(h, w, b):
        return functional.linear_cross_entropy(h, w, target.to(h.device), linear_bias=b, reduction=reduction)

    assert_stands_where_the_cpu_has_it(device, loss, list(operands.values()), dtype, upstream)


@each_value
@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_pointwise_losses(device, loss, reduction, dtype, value):
    function, make, options = LOSSES[loss]
    names = ["input", "target", "upstream"]
    names += {"bce": ["weight"], "bce with logits": ["weight", "pos_weight"]}.get(loss, [])
    for name in names:
        input, target = make((3, 5))
        factors = {factor: random(5, seed=4).abs() + 0.1 for factor in names[3:]}
        upstream = torch.ones((3, 5) if reduction == "none" else ())
        if name == "input":
            input = spoilt(input, value, 7)
        elif name == "target":
            target = spoilt(target, value, 7)
        elif name == "upstream":
            upstream = spoilt(upstream, value, -1)
        else:
            factors[name] = spoilt(factors[name], value, 2)
        factors = {factor: as_dtype(tensor, dtype) for factor, tensor in factors.items()}
        given = {"reduction": reduction, **options}

        def loss_of(x, t, given=given, factors=factors):
            there = {factor: tensor.to(x.device) for factor, tensor in factors.items()}
            return getattr(functional, function)(x, t, **there, **given)

        if loss == "bce" and name in ("input", "target"):  # which torch refuses, and the CPU
            found = run(on(device, loss_of), [as_dtype(operand, dtype) for operand in (input, target)])
            assert found[0].view(-1)[min(7, found[0].numel() - 1)].isnan()
            with pytest.raises(RuntimeError, match=f"all elements of {name} should be between 0 and 1"):
                functional.check_targets()
            continue
        assert_stands_where_the_cpu_has_it(device, loss_of, [input, target], dtype, upstream)


@each_value
@pytest.mark.parametrize("operand", ["param", "gradient", "state", "lr"])
@pytest.mark.parametrize("name", TABLE)
def test_steps(device, name, operand, value):
    """As the CPU's, bit for bit."""
    row = TABLE[name]
    start, gradients = judge.random_problem(((300,), (5,)), torch.float32, 3)
    options = {key: v for key, v in row.everything.items() if key != "noise"}
    if operand == "param":
        start = [spoilt(start[0], value, 257), *start[1:]]
    elif operand == "lr":
        options["lr"] = value
    else:
        # A state takes it from the gradient before.
        gradients[operand == "gradient"][0] = spoilt(gradients[0][0], value, 257)
    if operand == "lr" and value != torch.inf:
        return  # which a constructor refuses
    try:
        expected = judge.result_of(row.make, start, gradients, **options)
    except ValueError:
        return
    assert_same_bits(outcome_on(device, row.make, (start, gradients), **options), expected)


@each_value
@pytest.mark.parametrize("operand", ["lr", "grad_scale", "found_inf"])
@pytest.mark.parametrize("name", TABLE)
def test_what_lies_on_the_device(device, name, operand, value):
    """A learning rate, GradScaler's scale and its verdict: any that is not 0 leaves the step out."""
    row = TABLE[name]
    start, (gradient,) = judge.random_problem(((300,),), torch.float32, 1)
    found = []
    for place in ("cpu", device):
        param = torch.nn.Parameter(start[0].to(place, copy=True))
        lr = torch.tensor(0.1, device=place)
        fused = {"fused": True} if operand != "lr" or place != "cpu" else {}
        counts = counts_on_device(name) if place != "cpu" else {}
        optimizer = row.make([param], **{**row.usual, **counts, **fused, "lr": lr})
        if operand == "lr":
            lr.fill_(value)  # a constructor refuses it
        else:
            optimizer.grad_scale = torch.tensor(value if operand == "grad_scale" else 4.0, device=place)
            optimizer.found_inf = torch.tensor(value if operand == "found_inf" else 0.0, device=place)
        param.grad = gradient[0].to(place, copy=True)
        optimizer.step()
        found.append(param.detach().cpu())
    torch.testing.assert_close(*found, equal_nan=True)


@each_value
@pytest.mark.parametrize("max_norm", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping(device, name, dtype, max_norm, value):
    found = []
    for clip, place in ((getattr(torch.nn.utils, name), "cpu"), (getattr(trainopt, name), device)):
        params = [torch.nn.Parameter(torch.zeros(size, device=place, dtype=dtype)) for size in (300, 7)]
        for p in params:
            p.grad = spoilt(random(p.numel()), value, 3).to(p.device, dtype)
        norm = clip(params, max_norm)
        found.append([torch.tensor(0.0 if norm is None else norm.item()), *(p.grad.cpu() for p in params)])
    for torchs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_classes_at_the_ends_of_rows(device):
    """The first and the last of a vocabulary, in each kind of kernel."""
    for count in (32, 33, 1024, 1025, 50_257):
        logits = random(2, count)
        compare(device, logits, torch.tensor([0, count - 1]), torch.bfloat16, reduction="none")
        compare(device, logits, classes((2,), count), torch.bfloat16, ignore_index=count - 1)
