"""What the losses say to input that is wrong: torch's own words, or the argument, its value and where."""

import inspect
import itertools
import warnings
from functools import partial

import pytest
import torch
from loss_judge import classes, random
from torch.nn import functional as F

import trainopt
from trainopt import functional

#: trainopt's cross-entropy and torch's.
LOSSES = (functional.cross_entropy, F.cross_entropy)


def logits(*shape):
    return random(*(shape or (4, 5))).float()


def error_of(action):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except Exception as error:
            return type(error), str(error)
    return None


# A class out of range -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, 1000, -1, -99, 2**62, -(2**62)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_class_out_of_range(value, reduction):
    target = torch.tensor([[0, 1, 2], [3, 4, value]])
    with pytest.raises(IndexError, match=rf"target {value} at position \(1, 2\) is out of range for 5 classes"):
        functional.cross_entropy(logits(2, 5, 3), target, reduction=reduction)
    with pytest.raises(IndexError, match=rf"target {value} at position \(5\) is out of range for 5 classes"):
        functional.linear_cross_entropy(logits(6, 8), logits(5, 8), target.flatten(), reduction=reduction)
    with pytest.raises(IndexError, match=rf"target {value} "):
        functional.cross_entropy(logits(5), torch.tensor(value))


def test_torch_refuses_the_same_classes():
    for value in (5, -1, 255):
        with pytest.raises(IndexError):
            F.cross_entropy(logits(), torch.tensor([0, 1, 2, value]))
    with pytest.raises(IndexError, match="target 255 at position"):
        functional.cross_entropy(logits(), torch.tensor([0, 1, 2, 255], dtype=torch.uint8))


def test_the_default_ignore_index_is_no_error_and_others_are():
    functional.cross_entropy(logits(), torch.tensor([0, 1, 2, -100]))
    functional.cross_entropy(logits(), torch.tensor([0, 1, 2, 77]), ignore_index=77)
    with pytest.raises(IndexError, match=r"target -100 at position \(3\)"):
        functional.cross_entropy(logits(), torch.tensor([0, 1, 2, -100]), ignore_index=77)


def test_no_classes_at_all():
    with pytest.raises(IndexError, match="for 0 classes"):
        functional.cross_entropy(logits(4, 0), torch.zeros(4, dtype=torch.int64))
    for shape, reduction in itertools.product([(4, 0), (0, 5), (0, 0), (2, 0, 3)], ["none", "mean", "sum"]):
        ours, torchs = (f(logits(*shape), torch.zeros(shape), reduction=reduction) for f in LOSSES)
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "target"),
    [
        ((4, 5), (3,)),
        ((4, 5), (5,)),
        ((4, 5), (4, 1)),
        ((2, 5, 3), (2, 4)),
        ((2, 5, 3), (2,)),
        ((4, 5), ()),
        ((4, 5), (4, 5)),
        ((2, 5, 3, 3), (2, 3, 4)),
        ((2, 5, 3, 3), (3, 3, 3)),
    ],
    ids=str,
)
def test_shapes_of_classes_that_do_not_match(input, target):
    ours, torchs = (error_of(lambda f=f: f(logits(*input), torch.zeros(target, dtype=torch.int64))) for f in LOSSES)
    assert ours[0] is torchs[0] and str(list(input)) in ours[1] and str(list(target)) in ours[1]


@pytest.mark.parametrize(
    ("input", "target"),
    [((4, 5), (4, 4)), ((4, 5), (4,)), ((4, 5), (3, 5)), ((2, 5, 3), (2, 5)), ((2, 5, 3), (3, 5, 3)), ((5,), (4,))],
    ids=str,
)
def test_shapes_of_probabilities_that_do_not_match(input, target):
    ours, torchs = (error_of(lambda f=f: f(logits(*input), torch.zeros(target))) for f in LOSSES)
    assert ours[0] is torchs[0] and str(list(input)) in ours[1] and str(list(target)) in ours[1]


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1), (1, 5), ()], ids=str)
def test_a_class_weight_of_another_shape(shape):
    with pytest.raises(RuntimeError, match=r"weight has shape .* 5 classes") as caught:
        functional.cross_entropy(logits(), classes((4,), 5), torch.ones(shape))
    assert str(list(shape)) in str(caught.value)
    assert error_of(lambda: F.cross_entropy(logits(), classes((4,), 5), torch.ones(shape)))[0] is RuntimeError


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("in_autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("binary_cross_entropy_with_logits", "weight"),
        ("binary_cross_entropy_with_logits", "pos_weight"),
        ("cross_entropy", "weight"),
    ],
)
def test_a_weight_of_whole_numbers_goes_through_torch(name, key, in_autocast, dtype):
    weight, target = torch.tensor([1, 0, 3]).to(dtype), torch.tensor([[1.0, 0.0, 1.0]])
    with torch.autocast("cpu", enabled=in_autocast):
        calls = [partial(getattr(of, name), logits(1, 3), target, **{key: weight}) for of in (functional, F)]
        assert error_of(calls[0]) == error_of(calls[1])
        if error_of(calls[1]) is None:
            torch.testing.assert_close(calls[0](), calls[1]())


def test_bytes_whose_weights_torch_cannot_gather():
    target, hidden, words = torch.tensor([0, 1], dtype=torch.uint8), logits(2, 3), torch.eye(3)
    options = {"weight": torch.ones(3), "label_smoothing": 0.1}
    for call in (
        lambda: functional.cross_entropy(hidden, target, **options),
        lambda: functional.linear_cross_entropy(hidden, words, target, **options),
    ):
        assert error_of(call)[0] is RuntimeError


def test_an_input_without_a_dimension():
    with pytest.raises((ValueError, RuntimeError)):
        functional.cross_entropy(torch.tensor(1.0), torch.tensor(0))


def test_one_column_against_none():
    """(N, 1) against (N) trains on nonsense: an error for the BCEs, torch's warning for the others."""
    column, row = torch.rand(4, 1), torch.rand(4)
    for name in ("binary_cross_entropy", "binary_cross_entropy_with_logits"):
        ours, torchs = (error_of(lambda s=s: getattr(s, name)(column, row)) for s in (functional, F))  # noqa: B023
        assert ours == torchs and ours[0] is ValueError
        assert "[4]" in ours[1] and "[4, 1]" in ours[1]
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        with pytest.warns(
            UserWarning, match=r"target size \(torch.Size\(\[4\]\)\).*input size \(torch.Size\(\[4, 1\]\)\)"
        ):
            getattr(functional, name)(column, row)


def test_shapes_that_do_not_broadcast():
    a, b = torch.rand(3), torch.rand(4)
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        error = error_of(lambda name=name: getattr(functional, name)(a, b))
        assert error == error_of(lambda name=name: getattr(F, name)(a, b)) and error[0] is RuntimeError


def test_what_torch_lets_pass():
    target = torch.tensor([3])
    for reduction in ("none", "mean"):
        ours, torchs = (side.cross_entropy(logits(5), target, reduction=reduction) for side in (functional, F))
        assert torch.equal(ours, torchs) and ours.shape == torchs.shape
    for smoothing in (-0.5, float("nan")):
        ours, torchs = (side.cross_entropy(logits(), LABELS, label_smoothing=smoothing) for side in (functional, F))
        assert torch.equal(ours, torchs)


# torch's own words ----------------------------------------------------------------------------------------------------

X, P = torch.rand(4, 5), torch.rand(4, 5)
LABELS = torch.tensor([0, 1, 2, 3])
TORCHS = {
    "unknown reduction": lambda side: side.cross_entropy(X, LABELS, reduction="foo"),
    "unknown reduction of mse": lambda side: side.mse_loss(X, P, reduction="batchmean"),
    "unknown reduction of l1": lambda side: side.l1_loss(X, P, reduction="foo"),
    "unknown reduction of smooth_l1": lambda side: side.smooth_l1_loss(X, P, reduction="foo"),
    "unknown reduction of huber": lambda side: side.huber_loss(X, P, reduction="foo"),
    "unknown reduction of bce": lambda side: side.binary_cross_entropy(X, P, reduction="foo"),
    "unknown reduction of bce with logits": lambda side: side.binary_cross_entropy_with_logits(X, P, reduction="foo"),
    "unknown reduction of kl": lambda side: side.kl_div(X, P, reduction="foo"),
    "integer logits": lambda side: side.cross_entropy(X.long(), LABELS),
    "integer input of mse": lambda side: side.mse_loss(X.long(), P.long()),
    "integer input of l1": lambda side: side.l1_loss(X.long(), P.long()),
    "integer input of huber": lambda side: side.huber_loss(X.long(), P.long()),
    "integer input of bce": lambda side: side.binary_cross_entropy(X.long(), P),
    "integer input of bce with logits": lambda side: side.binary_cross_entropy_with_logits(X.long(), P.long()),
    "int32 classes": lambda side: side.cross_entropy(X, LABELS.int()),
    "bool classes": lambda side: side.cross_entropy(X, LABELS.bool()),
    "float classes": lambda side: side.binary_cross_entropy(X, P.double()),
    "smoothing above 1": lambda side: side.cross_entropy(X, LABELS, label_smoothing=1.5),
    "ignored probabilities": lambda side: side.cross_entropy(X, P, ignore_index=2),
    "class weight of another type": lambda side: side.cross_entropy(X, LABELS, torch.ones(5).double()),
    "negative beta": lambda side: side.smooth_l1_loss(X, P, beta=-1.0),
    "delta 0": lambda side: side.huber_loss(X, P, delta=0.0),
    "two types in huber": lambda side: side.huber_loss(X.requires_grad_(), P.double()).backward(),
    "no probability": lambda side: side.binary_cross_entropy(X + 1, P),
    "no probability, below": lambda side: side.binary_cross_entropy(X - 1, P),
    "no number": lambda side: side.binary_cross_entropy(X * torch.nan, P),
    "no probability as target": lambda side: side.binary_cross_entropy(X, P + 7),
    "no probability as target, below": lambda side: side.binary_cross_entropy(X, P - 1, reduction="none"),
    "no number as target": lambda side: side.binary_cross_entropy(X, P * torch.nan, reduction="sum"),
    "no probability among targets": lambda side: side.binary_cross_entropy(X, P.index_fill(1, torch.tensor([2]), 1.5)),
    "no probability of either": lambda side: side.binary_cross_entropy(X + 1, P + 7),
    "a weight of 0 on no probability": lambda side: side.binary_cross_entropy(X, P + 7, torch.zeros(5)),
    "weight of a larger shape": lambda side: side.binary_cross_entropy(X, P, torch.ones(3, 4, 5)),
    "weight of a larger shape, logits": lambda side: side.binary_cross_entropy_with_logits(X, P, torch.ones(3, 4, 5)),
    "weight of another shape": lambda side: side.binary_cross_entropy_with_logits(X, P, torch.ones(4)),
    "pos_weight of another shape": lambda side: side.binary_cross_entropy_with_logits(X, P, pos_weight=torch.ones(4)),
    "mse weight of another shape": lambda side: side.mse_loss(X, P, weight=torch.ones(5)),
    "a list": lambda side: side.cross_entropy([1.0], LABELS),
    "a list of classes": lambda side: side.cross_entropy(X, [0, 1, 2, 3]),
    "a list of errors": lambda side: side.mse_loss(X, [1.0]),
    "None": lambda side: side.cross_entropy(X, None),
}


@pytest.mark.parametrize("call", TORCHS.values(), ids=TORCHS)
def test_torchs_own_words(call):
    expected = error_of(lambda: call(F))
    assert expected is not None
    assert error_of(lambda: call(functional)) == expected


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy"])
@pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (None, False), (False, True)])
def test_deprecated_arguments(name, size_average, reduce):
    target = LABELS if name == "cross_entropy" else P
    results = []
    for side in (functional, F):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            results.append(getattr(side, name)(X, target, size_average=size_average, reduce=reduce))
    torch.testing.assert_close(*results)


def test_elementwise_mean_is_deprecated_as_in_torch():
    with pytest.warns(UserWarning, match="elementwise_mean"):
        loss = functional.mse_loss(X, P, reduction="elementwise_mean")
    torch.testing.assert_close(loss, F.mse_loss(X, P))


# What is no tensor, and no number -------------------------------------------------------------------------------------

TENSORS = {
    "cross_entropy": {"input": X, "target": LABELS, "weight": torch.ones(5)},
    "mse_loss": {"input": X, "target": P, "weight": torch.ones(4, 5)},
    "l1_loss": {"input": X, "target": P, "weight": torch.ones(4, 5)},
    "smooth_l1_loss": {"input": X, "target": P},
    "huber_loss": {"input": X, "target": P, "weight": torch.ones(4, 5)},
    "binary_cross_entropy": {"input": X, "target": P, "weight": torch.ones(5)},
    "binary_cross_entropy_with_logits": {
        "input": X,
        "target": P,
        "weight": torch.ones(5),
        "pos_weight": torch.ones(5),
    },
    "kl_div": {"input": X.log(), "target": P},
}
OPTIONS = {
    "reduction": ("mean", None, 1, ["mean"], "x"),
    "ignore_index": (-100, None, 1.5, "x", [1], True),
    "label_smoothing": (0.1, None, "x", [0.1], torch.tensor(0.1), 1),
    "beta": (0.5, None, "x", [0.1], torch.tensor(0.5), 1, True, float("nan")),
    "delta": (0.5, None, "x", [0.1], torch.tensor(0.5), 1, True, float("nan")),
    "log_target": (True, None, "x", 1),
    "size_average": (True, "x", 0, []),
    "reduce": (True, "x", 0, []),
}
NO_TENSORS = (None, 1.0, 2, [0.5], (0.5,), "x", {}, object())


def outcome(side, name, arguments):
    """What a loss says, or gives, forward and back."""

    def call():
        leaves = {key: value.clone().requires_grad_() if value is X else value for key, value in arguments.items()}
        loss = getattr(side, name)(**leaves)
        loss.sum().backward()
        return loss.detach()

    error = error_of(call)
    return error if error is not None else call()


def assert_same_outcome(name, arguments):
    ours, torchs = (outcome(side, name, arguments) for side in (functional, F))
    if isinstance(ours, torch.Tensor) and isinstance(torchs, torch.Tensor):
        torch.testing.assert_close(ours, torchs, equal_nan=True)
    else:
        assert ours == torchs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor(name):
    tensors = TENSORS[name]
    for keys in ([key] for key in tensors):
        for value in NO_TENSORS:
            assert_same_outcome(name, {**tensors, **dict.fromkeys(keys, value)})
    for value in NO_TENSORS:
        assert_same_outcome(name, {**tensors, "input": value, "target": value})
        assert_same_outcome(name, {**tensors, "input": value, "target": [1]})
    assert_same_outcome(name, tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_option(name):
    accepted = inspect.signature(getattr(F, name)).parameters
    for key, values in OPTIONS.items():
        if key in accepted:
            for value in values:
                assert_same_outcome(name, {**TENSORS[name], key: value})


def test_uint8_classes_where_torch_takes_them():
    for shape, target in (((4, 5), (4,)), ((5,), ()), ((2, 5, 3), (2, 3)), ((2, 5, 3, 2), (2, 3, 2))):
        for weight, smoothing in itertools.product((None, torch.ones(5)), (0.0, 0.1)):
            arguments = {"input": logits(*shape), "target": torch.ones(target, dtype=torch.uint8)}
            arguments |= {"weight": weight, "label_smoothing": smoothing}
            assert_same_outcome("cross_entropy", arguments)


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", TENSORS)
def test_memory_that_is_not_there(name, left):
    """torch's own losses end the process, or read what is not theirs."""
    for key in TENSORS[name]:
        if key == "weight" and name in ("mse_loss", "l1_loss", "huber_loss"):
            continue  # torch's own code
        tensors = {name: tensor.clone() for name, tensor in TENSORS[name].items() if name == key or name != "weight"}
        if name not in ("cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits"):
            tensors.pop("weight", None)
        tensors[key].untyped_storage().resize_(left)
        with pytest.raises(RuntimeError, match=f"{key} needs .* bytes of memory, and its storage has {left}"):
            getattr(functional, name)(**tensors)


# trainopt's own options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("z_loss", -0.1),
        ("z_loss", float("nan")),
        ("z_loss", float("inf")),
        ("softcap", 0.0),
        ("softcap", -1.0),
        ("softcap", float("nan")),
        ("softcap", float("inf")),
        ("temperature", 0.0),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("empty", "none"),
        ("empty", None),
    ],
)
def test_options_out_of_range(option, value):
    calls = (
        lambda: functional.cross_entropy(X, LABELS, **{option: value}),
        lambda: functional.linear_cross_entropy(X, logits(7, 5), LABELS, **{option: value}),
        lambda: trainopt.CrossEntropyLoss(**{option: value}),
        lambda: trainopt.LinearCrossEntropyLoss(5, 7, **{option: value}),
    )
    for call in calls:
        with pytest.raises(ValueError, match=option) as caught:
            call()
        assert repr(value) in str(caught.value)


def test_the_extras_are_keywords():
    with pytest.raises(TypeError):
        functional.cross_entropy(X, LABELS, None, None, -100, None, "mean", 0.0, 0.1)
