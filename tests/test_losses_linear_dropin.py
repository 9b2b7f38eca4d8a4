"""linear_cross_entropy is torch's: names, shapes, errors, options, dtypes; where torch has none, too."""

import inspect
import warnings

import pytest
import torch
from helpers import attempt
from loss_judge import REDUCTIONS, assert_no_worse, classes, random, run
from ranks import mesh_of_one
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import trainopt
from trainopt import functional
from trainopt.losses import chunks, dispatch, linear, older_torch, reference
from trainopt.losses.options import CrossEntropyOptions

TOKENS, WIDTH, WORDS = 6, 5, 7
X, W, B = random(TOKENS, WIDTH).float(), random(WORDS, WIDTH, seed=1).float(), random(WORDS, seed=2).float()
LABELS, P = classes((TOKENS,), WORDS), random(TOKENS, WORDS, seed=3).softmax(1).float()
CLASS_WEIGHT = random(WORDS, seed=4).abs().float()
DEEP, DEEP_BIAS = random(WORDS, 3, 2, WIDTH).float(), random(WORDS, 3, 2).float()
DEEP_LABELS, DEEP_P = classes((TOKENS, 3, 2), WORDS), random(TOKENS, WORDS, 3, 2).softmax(1).float()
OPTIONS = trainopt.LinearCrossEntropyOptions
EXTRAS = {"z_loss", "return_z_loss", "softcap", "empty", "memory_budget", "out_dtype", "temperature"}

has_torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy")


def plain(input, linear_weight, target, **options):
    """What torch 2.13 computes, or raises, in its own words; also for a torch that is older."""
    bias, weight, dtype = (options.pop(name, None) for name in ("linear_bias", "weight", "out_dtype"))
    options.pop("options", None)
    settings = CrossEntropyOptions(**{"ignore_index": None, **options})
    return reference.linear_cross_entropy(input, linear_weight, target, bias, weight, settings, dtype)


@pytest.fixture(params=[pytest.param("torch's", marks=has_torchs), "older torch"])
def fallback(request, monkeypatch):
    """With torch's function to fall back to, and as where torch has none."""
    if request.param == "older torch":
        monkeypatch.setattr(linear, "_torch_function", None)


# Signatures -----------------------------------------------------------------------------------------------------------


@has_torchs
@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda: functional.linear_cross_entropy, lambda: F.linear_cross_entropy),
        (lambda: trainopt.LinearCrossEntropyLoss, lambda: nn.LinearCrossEntropyLoss),
        (lambda: older_torch.LinearCrossEntropyLoss, lambda: nn.LinearCrossEntropyLoss),
        (lambda: older_torch.LinearCrossEntropyOptions, lambda: nn.LinearCrossEntropyOptions),
    ],
    ids=["function", "module", "older torch's module", "older torch's options"],
)
def test_the_signature_is_torchs(ours, torchs):
    ours, torchs = inspect.signature(ours()).parameters, inspect.signature(torchs()).parameters
    for (name, mine), theirs in zip(ours.items(), torchs.values(), strict=False):
        assert (name, mine.kind, mine.default) == (theirs.name, theirs.kind, theirs.default)
    more = [parameter for name, parameter in ours.items() if name not in torchs]
    assert {parameter.name for parameter in more} <= EXTRAS
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in more)


# Values ---------------------------------------------------------------------------------------------------------------

CALLS = {
    "classes": ((X, W, LABELS), {}),
    "one row": ((X[0], W, LABELS[0]), {}),
    "no rows": ((X[:0], W, LABELS[:0]), {}),
    "probabilities": ((X, W, P), {}),
    "probabilities of one row": ((X[0], W, P[0]), {}),
    "bias and class weights": ((X, W, LABELS), {"linear_bias": B, "weight": CLASS_WEIGHT}),
    "smoothing": ((X, W, LABELS), {"label_smoothing": 0.1, "weight": CLASS_WEIGHT}),
    "ignored": ((X, W, LABELS), {"ignore_index": int(LABELS[0])}),
    "the default ignores -100": ((X, W, LABELS.clone().index_fill_(0, torch.tensor([1]), -100)), {}),
    "uint8": ((X, W, LABELS.byte()), {}),
    "K-dimensional": ((X, DEEP, DEEP_LABELS), {}),
    "K-dimensional, all": (
        (X, DEEP, DEEP_LABELS),
        {"linear_bias": DEEP_BIAS, "weight": CLASS_WEIGHT, "ignore_index": 2, "label_smoothing": 0.1},
    ),
    "K-dimensional probabilities": ((X, DEEP, DEEP_P), {"linear_bias": DEEP_BIAS, "weight": CLASS_WEIGHT}),
    "no features": ((X[:, :0], W[:, :0], LABELS), {"linear_bias": B}),
    "probabilities of another dtype": ((X, W, P.double()), {}),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operands", "options"), CALLS.values(), ids=CALLS)
def test_values_are_torchs(operands, options, reduction, fallback):
    def of(function, dtype):
        target = operands[2].to(dtype) if operands[2].is_floating_point() and dtype == torch.float64 else operands[2]
        cast = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        return run(
            lambda x, w: function(x, w, target, reduction=reduction, **cast), [x.to(dtype) for x in operands[:2]]
        )

    found, expected = of(functional.linear_cross_entropy, torch.float32), of(plain, torch.float32)
    if hasattr(F, "linear_cross_entropy"):
        torch.testing.assert_close(expected, of(F.linear_cross_entropy, torch.float32), equal_nan=True)
    for mine, theirs, true in zip(found, expected, of(plain, torch.float64), strict=True):
        assert_no_worse(mine, theirs, true, roundings=8)


def test_one_row_may_have_a_target_of_one_element():
    """Of which torch has no gradient."""
    found, expected = (side(X[0], W, LABELS[:1]) for side in (functional.linear_cross_entropy, plain))
    assert torch.equal(found, expected)


def test_extras_of_a_k_dimensional_loss():
    extras = {"z_loss": 0.1, "softcap": 3.0, "empty": "zero", "temperature": 2.0}
    found = functional.linear_cross_entropy(X, DEEP, DEEP_LABELS, linear_bias=DEEP_BIAS, return_z_loss=True, **extras)
    logits = torch.einsum("nf,cabf->ncab", X, DEEP) + DEEP_BIAS
    expected = functional.cross_entropy(logits, DEEP_LABELS, return_z_loss=True, **extras)
    torch.testing.assert_close(found, expected)


def test_without_the_operator(monkeypatch, fallback):
    """Other devices, subclasses, TRAINOPT_REFERENCE."""
    expected = functional.linear_cross_entropy(X, W, LABELS, linear_bias=B)
    monkeypatch.setattr(dispatch, "REFERENCE_FORCED", True)
    torch.testing.assert_close(functional.linear_cross_entropy(X, W, LABELS, linear_bias=B), expected)
    on_meta = functional.linear_cross_entropy(X.to("meta"), W.to("meta"), LABELS.to("meta"))
    assert on_meta.is_meta and on_meta.shape == ()


# Errors ---------------------------------------------------------------------------------------------------------------

REFUSED = {
    "3 dimensions": ((X[None], W, LABELS[None]), {}),
    "0 dimensions": ((X[0, 0], W, LABELS[0]), {}),
    "features": ((X, W[:, :4], LABELS), {}),
    "bias": ((X, W, LABELS), {"linear_bias": B[:6]}),
    "bias of a K-dimensional loss": ((X, DEEP, DEEP_LABELS), {"linear_bias": B}),
    "one row of a K-dimensional loss": ((X[0], DEEP, DEEP_LABELS[0]), {}),
    "probabilities with ignore_index": ((X, W, P), {"ignore_index": -100}),
    "fewer targets": ((X, W, LABELS[:3]), {}),
    "probabilities of another shape": ((X, W, P[:, :5]), {}),
    "class weights": ((X, W, LABELS), {"weight": CLASS_WEIGHT[:6]}),
    "int32 classes": ((X, W, LABELS.int()), {}),
    "dtypes": ((X, W.double(), LABELS), {}),
    "dtype of the bias": ((X, W, LABELS), {"linear_bias": B.double()}),
    "reduction": ((X, W, LABELS), {"reduction": "foo"}),
    "smoothing": ((X, W, LABELS), {"label_smoothing": 1.5}),
}


@pytest.mark.parametrize(("operands", "options"), REFUSED.values(), ids=REFUSED)
def test_refused_in_torchs_words(operands, options, fallback):
    expected = attempt(lambda: plain(*operands, **options))
    assert expected is not None
    if hasattr(F, "linear_cross_entropy"):
        assert attempt(lambda: F.linear_cross_entropy(*operands, **options)) == expected
    assert attempt(lambda: functional.linear_cross_entropy(*operands, **options)) == expected
    assert attempt(lambda: functional.linear_cross_entropy(*operands, softcap=3.0, **options)) == expected


def test_names_and_order_of_before_are_refused():
    for call in (
        lambda: functional.linear_cross_entropy(X, W, LABELS, B),
        lambda: functional.linear_cross_entropy(X, weight=W, target=LABELS),
        lambda: functional.linear_cross_entropy(X, W, LABELS, class_weight=CLASS_WEIGHT),
        lambda: trainopt.LinearCrossEntropyLoss(WIDTH, WORDS, True),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "linear_bias", "weight"])
@pytest.mark.parametrize("value", [None, 2.0, [1.0], "a", nn.Linear(WIDTH, WORDS)], ids=repr)
def test_no_tensor(name, value):
    operands = {"input": X, "linear_weight": W, "target": LABELS, "linear_bias": B, "weight": CLASS_WEIGHT}
    if value is None and name in ("linear_bias", "weight"):
        functional.linear_cross_entropy(**{**operands, name: None})
        return
    with pytest.raises(
        TypeError, match=rf"argument '{name}' \(position \d\) must be Tensor, not {type(value).__name__}"
    ):
        functional.linear_cross_entropy(**{**operands, name: value})


def test_a_layer_is_not_its_weight():
    with pytest.raises(TypeError, match=r"not Linear: .* linear_weight=layer\.weight and linear_bias=layer\.bias"):
        functional.linear_cross_entropy(X, nn.Linear(WIDTH, WORDS), LABELS)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.empty(0), r"dimensionality at least 2, got 1 \(shape \(0,\)\)"),
        (torch.rand(WORDS * WIDTH), r"dimensionality at least 2, got 1 \(shape \(35,\)\)"),
        (torch.rand(()), r"dimensionality at least 2, got 0 \(shape \(\)\)"),
        (torch.empty(0, WIDTH), r"linear_weight is empty, it has shape \(0, 5\)"),
        (torch.empty(WORDS, 0), r"linear_weight is empty, it has shape \(7, 0\)"),
        (torch.empty(0, 0), r"linear_weight is empty, it has shape \(0, 0\)"),
        (torch.empty(0, 3, WIDTH), r"linear_weight is empty, it has shape \(0, 3, 5\)"),
    ],
    ids=lambda given: given if isinstance(given, str) else str(tuple(given.shape)),
)
def test_a_weight_that_is_not_gathered(weight, words):
    """torch raises RuntimeError for each (IndexError where it finds no class)."""
    with pytest.raises(RuntimeError, match=rf"{words}.*gather.*full_tensor.*summon_full_params.*GatheredParameters"):
        functional.linear_cross_entropy(X, weight, LABELS)


def test_a_dtensor():
    with mesh_of_one() as mesh:
        shard = distribute_tensor(W, mesh, [Shard(0)])
        with pytest.raises(RuntimeError, match=r"linear_weight is a DTensor.*input is a Tensor.*full_tensor\(\)"):
            functional.linear_cross_entropy(X, shard, LABELS)
        expected = plain(X, W, LABELS)
        torch.testing.assert_close(functional.linear_cross_entropy(X, shard.full_tensor(), LABELS), expected)
        # torch takes operands that are all DTensors, so do we.
        input, target, weight = (distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (X, LABELS, W))
        found = functional.linear_cross_entropy(input, weight, target)
        torch.testing.assert_close(found.full_tensor(), expected)


@pytest.mark.parametrize("value", [0, -5, 1e6, float("nan"), "1 GB"])
def test_no_memory(value):
    for call in (
        lambda: functional.linear_cross_entropy(X, W, LABELS, memory_budget=value),
        lambda: trainopt.LinearCrossEntropyLoss(WIDTH, WORDS, memory_budget=value),
    ):
        with pytest.raises(ValueError, match=rf"memory_budget must be .* greater than 0, not {value!r}"):
            call()


# torch's options ------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """The tokens of a chunk that the operator was given, call by call; None where torch did it."""
    found = []
    operator = torch.ops.trainopt.linear_cross_entropy
    torchs = linear._torch_function

    class Operators:
        def __getattr__(self, name):
            return getattr(torch.ops.trainopt, name)

        def linear_cross_entropy(self, *arguments):
            found.append(arguments[5])
            return operator(*arguments)

    class Torch:
        ops = type("", (), {"trainopt": Operators()})

        def __getattr__(self, name):
            return getattr(torch, name)

    def watched(*arguments, **options):
        found.append(None)
        return torchs(*arguments, **options)

    monkeypatch.setattr(dispatch, "torch", Torch())
    if torchs is not None:
        monkeypatch.setattr(linear, "_torch_function", watched)
    return found


DEFAULT = chunks.MEMORY_BUDGET // (4 * WORDS)


@pytest.mark.parametrize(
    ("options", "chunk"),
    [
        ({}, DEFAULT),
        ({"allow_retain_graph": True}, DEFAULT),
        ({"acc_dtype": torch.float32}, DEFAULT),
        ({"acc_policy": "accurate"}, DEFAULT),
        ({"acc_policy": "compact"}, DEFAULT),
        ({"batch_chunk_size": 4}, 4),
        ({"batch_chunk_size": 400}, 400),
        ({"chunking_method": None}, TOKENS),
        ({"chunking_method": None, "batch_chunk_size": 1}, 1),
        ({"chunking_method": "aspect_ratio"}, 4),  # 6 tokens in ceil(7 / 5) parts, up to a power of two
        ({"chunking_method": "aspect_ratio:2"}, 2),
        ({"chunking_method": "aspect_ratio:4"}, 1),
        ({"chunking_method": "aspect_ratio:64"}, 1),
        ({"chunking_method": "aspect_ratio:2", "batch_chunk_size": 2}, 2),
    ],
    ids=str,
)
def test_options_say_how_large_a_chunk_is(options, chunk, seen):
    expected, options = plain(X, W, LABELS), OPTIONS(**options)
    torch.testing.assert_close(functional.linear_cross_entropy(X, W, LABELS, options=options), expected)
    assert trainopt.LinearCrossEntropyLoss(WIDTH, WORDS, options=options)(X, LABELS).shape == expected.shape
    assert seen == [chunk, chunk]


@has_torchs
@pytest.mark.parametrize("method", ["aspect_ratio", "aspect_ratio:2", "aspect_ratio:3", "aspect_ratio:100"])
def test_the_aspect_ratio_is_torchs(method):
    for tokens in (0, 1, 2, 5, 64, 1000, 1025):
        for words, width in ((7, 5), (50257, 768), (3, 1000), (1000, 1)):
            options = OPTIONS(chunking_method=method)
            theirs = options._adjust(tokens, width, words, torch.float32).batch_chunk_size
            ours = chunks.tokens_in_chunk(torch.empty(tokens, width), torch.empty(words, width), options, None)
            assert ours == theirs


@pytest.mark.parametrize("budget", [1, 4 * WORDS * 3, 10**6])
def test_the_budget_says_how_large_a_chunk_is(budget, seen):
    for dtype, bytes_of_logit in ((torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 4)):
        functional.linear_cross_entropy(X.to(dtype), W.to(dtype), LABELS, memory_budget=budget)
        assert seen.pop() == max(budget // (bytes_of_logit * WORDS), 1)


def test_a_gpu_chooses_its_chunks_unless_it_is_told():
    input, weight = torch.empty(TOKENS, WIDTH, device="meta"), torch.empty(WORDS, WIDTH, device="meta")
    assert chunks.tokens_in_chunk(input, weight, None, None) == 0
    assert chunks.tokens_in_chunk(input, weight, OPTIONS(), None) == 0
    assert chunks.tokens_in_chunk(input, weight, OPTIONS(batch_chunk_size=2), None) == 2


def test_options_that_contradict_each_other():
    options = OPTIONS(batch_chunk_size=3, chunking_method="aspect_ratio")
    with pytest.raises(ValueError, match=r"batch_chunk_size \(=3\).*give different chunk sizes \(3 vs 4\)") as caught:
        functional.linear_cross_entropy(X, W, LABELS, options=options)
    if hasattr(F, "linear_cross_entropy"):
        refused = attempt(lambda: F.linear_cross_entropy(X, W, LABELS, options=options))
        assert refused == (ValueError, str(caught.value))
    with pytest.raises(ValueError, match=r"memory_budget \(=100\) and options \(batch_chunk_size=3.*pass only one"):
        functional.linear_cross_entropy(X, W, LABELS, options=OPTIONS(batch_chunk_size=3), memory_budget=100)
    functional.linear_cross_entropy(X, W, LABELS, options=OPTIONS(), memory_budget=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accumulation_in_16_bits_is_torchs(dtype, seen):
    """Ours is float32, so whoever asks for another gets torch's, or an error; never what was not asked for."""
    operands, options = (X.to(dtype), W.to(dtype), LABELS), OPTIONS(acc_dtype=dtype)
    if linear._torch_function is not None:
        found = functional.linear_cross_entropy(*operands, options=options)
        assert torch.equal(found, F.linear_cross_entropy(*operands, options=options)) and seen == [None]
    with pytest.raises(ValueError, match=rf"options with acc_dtype={dtype} need torch's own chunks"):
        functional.linear_cross_entropy(*operands, options=options, z_loss=0.1)


def test_accumulation_in_16_bits_on_an_older_torch(monkeypatch):
    monkeypatch.setattr(linear, "_torch_function", None)
    with pytest.raises(ValueError, match=r"acc_dtype=torch.bfloat16 need torch's own chunks, of torch 2\.13"):
        functional.linear_cross_entropy(X.bfloat16(), W.bfloat16(), LABELS, options=OPTIONS(acc_dtype=torch.bfloat16))


@has_torchs
def test_an_accumulation_that_torch_refuses():
    options = OPTIONS(acc_dtype=torch.float64)
    ours, torchs = (
        attempt(lambda side=side: side.linear_cross_entropy(X, W, LABELS, options=options)) for side in (functional, F)
    )
    assert ours == torchs is not None


def test_options_that_are_ignored_with_a_warning(fallback):
    """Where the logits are stored in spite of them, as in torch; where they are not, there is nothing to say."""
    for extras in ({}, {"z_loss": 0.1}):
        with pytest.warns(UserWarning, match="``options`` ignored"):
            functional.linear_cross_entropy(X, DEEP, DEEP_LABELS, options=OPTIONS(), **extras)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.linear_cross_entropy(X, W, LABELS, label_smoothing=0.1, options=OPTIONS())
        functional.linear_cross_entropy(X, W, P, options=OPTIONS())


@pytest.mark.parametrize("make", [OPTIONS, older_torch.LinearCrossEntropyOptions], ids=["torch's", "older torch's"])
@pytest.mark.parametrize(
    "options",
    [
        {"acc_policy": "fast"},
        {"chunking_method": "aspect_ratio:0"},
        {"chunking_method": "aspect_ratio:x"},
        {"chunking_method": "rows"},
        {"batch_chunk_size": 0},
        {"batch_chunk_size": 2.0},
        {"acc_dtype": torch.int32},
    ],
    ids=str,
)
def test_options_are_checked(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(allow, reduction):
    x = X.clone().requires_grad_()
    options = OPTIONS(allow_retain_graph=allow)
    loss = functional.linear_cross_entropy(x, W, LABELS, reduction=reduction, options=options).sum()
    once = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, x), once)


# The dtype of the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_has_torchs_dtype_or_the_one_asked_for(dtype, reduction, fallback):
    x, w = X.to(dtype), W.to(dtype)
    truth = plain(x.double(), w.double(), LABELS, reduction=reduction)
    found = functional.linear_cross_entropy(x, w, LABELS, reduction=reduction)
    assert found.dtype == plain(x, w, LABELS, reduction=reduction).dtype == dtype
    for out_dtype in (torch.float32, torch.float64):
        for operands in ((x, w), (x.to("meta"), w.to("meta"))):
            asked, z = functional.linear_cross_entropy(
                *operands,
                LABELS.to(operands[0].device),
                reduction=reduction,
                out_dtype=out_dtype,
                z_loss=0.1,
                return_z_loss=True,
            )
            assert asked.dtype == z.dtype == out_dtype and asked.shape == z.shape == truth.shape
        asked = functional.linear_cross_entropy(x, w, LABELS, reduction=reduction, out_dtype=out_dtype)
        torch.testing.assert_close(asked.double(), truth, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear_cross_entropy(x, w, LABELS).dtype == plain(x, w, LABELS).dtype


def test_a_float32_loss_of_float16_survives_the_scale_of_gradscaler():
    x, w = X.half().requires_grad_(), W.half().requires_grad_()
    assert (functional.linear_cross_entropy(x, w, LABELS) * 65536).isinf()
    loss = functional.linear_cross_entropy(x, w, LABELS, out_dtype=torch.float32)
    found = torch.autograd.grad(loss * 65536, (x, w))
    exact = torch.autograd.grad(plain(x.double(), w.double(), LABELS) * 65536, (x, w))
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == torch.float16 and mine.isfinite().all()
        torch.testing.assert_close(mine.double(), true.double(), rtol=2e-3, atol=20)


@pytest.mark.parametrize("value", [torch.int32, torch.bool, torch.complex64, "float32"], ids=str)
def test_no_floating_dtype(value):
    with pytest.raises(ValueError, match="out_dtype must be a floating dtype"):
        functional.linear_cross_entropy(X, W, LABELS, out_dtype=value)
