"""The losses as operators: opcheck, torch.compile, torch.export, fake tensors, autocast."""

import itertools
from functools import partial

import pytest
import torch
from loss_fuzz import LOSSES, loss_operators
from loss_judge import REDUCTIONS, assert_no_worse, classes, random, run
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

import trainopt
from trainopt import functional

OPS = torch.ops.trainopt
NUMBERS = {"none": 0, "mean": 1, "sum": 2}
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


def logits(*shape):
    return random(*(shape or (6, 9))).float().requires_grad_()


@pytest.mark.parametrize("reduction", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_opcheck_of_cross_entropy(reduction, kind):
    target = classes((6,), 9) if kind == "classes" else random(6, 9, seed=1).softmax(1).float()
    plain = (0.0, 0.0, 0.0, False)
    extra = (0.1, 0.2, 3.0, True, 2.0)
    for options, weight in itertools.product((plain, extra), (None, torch.rand(9))):
        opcheck(OPS.cross_entropy.default, (logits(), target, weight, False, reduction, -100, *options))
    volume = logits(2, 9, 3)
    places = classes((2, 3), 9) if kind == "classes" else random(2, 9, 3, seed=1).softmax(1).float()
    opcheck(OPS.cross_entropy.default, (volume, places, None, False, reduction, -100, *plain))


@pytest.mark.parametrize(  # a reduction is the same to all of them
    ("name", "reduction"), [*((name, "none") for name in LOSSES), ("mse_loss", "mean"), ("kl_div", "sum")]
)
def test_opcheck_of_pointwise_losses(name, reduction):
    x, t = (random(4, 5, seed=seed).sigmoid().float().requires_grad_() for seed in (0, 1))
    weight = torch.rand(5) if name.startswith("binary") else None
    positive = torch.rand(5) if name == "binary_cross_entropy_with_logits" else None
    parameter = 0.5 if name in ("smooth_l1_loss", "huber_loss") else 0.0
    opcheck(OPS.pointwise_loss.default, (name, x, t, weight, positive, NUMBERS[reduction], parameter))
    opcheck(OPS.pointwise_loss.default, (name, x, t.detach()[:, :1], None, None, NUMBERS[reduction], parameter))


@pytest.mark.parametrize("reduction", NUMBERS.values(), ids=NUMBERS)
def test_opcheck_of_linear_cross_entropy(reduction):
    weight, bias, target = logits(11, 9), logits(11), classes((6,), 11)
    for options in ((0.0, 0.0, 0.0, False), (0.1, 0.2, 3.0, True, 2.0)):
        for given in (None, bias):
            opcheck(
                OPS.linear_cross_entropy.default,
                (logits(), weight, target, given, None, 100, reduction, -100, *options),
            )


@pytest.mark.parametrize("reduction", NUMBERS.values(), ids=NUMBERS)
def test_opcheck_of_what_autograd_calls(reduction):
    """The operators that have no derivative themselves."""
    x, weight, bias, target = logits().detach(), logits(11, 9).detach(), logits(11).detach(), classes((6,), 11)
    options = (0.1, 0.2, 3.0, True, 2.0)
    _, _, lse = OPS.cross_entropy(x, TARGET, None, False, reduction, -100, *options)
    upstream = torch.rand(6) if reduction == 0 else torch.rand(())
    opcheck(OPS.cross_entropy_backward.default, (upstream, x, TARGET, torch.rand(9), lse, reduction, -100, *options))
    for wanted in ([False] * 3, [reduction != 0] * 3):
        linear = (x, weight, target, bias, torch.rand(11), 100, wanted, reduction, -100, *options)
        opcheck(OPS.linear_cross_entropy_forward.default, linear)
        lse = OPS.linear_cross_entropy_forward(*linear)[2]
        linear = (upstream, *linear[:5], lse, *linear[5:])
        opcheck(OPS.linear_cross_entropy_backward.default, linear)
    upstream = torch.rand(6, 9) if reduction == 0 else torch.rand(())
    for wanted in ([True, True], [True, False]):
        pair = (upstream, x.sigmoid(), PROBABILITIES, None, None, reduction, 0.5, wanted)
        opcheck(OPS.pointwise_loss_backward.default, ("smooth_l1_loss", *pair))


def test_every_operator_is_checked():
    """A new operator needs a check above."""
    known = {"cross_entropy", "pointwise_loss", "linear_cross_entropy"}
    known |= {"cross_entropy_backward", "pointwise_loss_backward"}
    known |= {"linear_cross_entropy_forward", "linear_cross_entropy_backward"}
    assert set(loss_operators()) == known


# torch.compile --------------------------------------------------------------------------------------------------------

TARGET = classes((6,), 9)
LAYER = random(9, 9, seed=2).float()
PROBABILITIES = random(6, 9, seed=1).softmax(1).float()

COMPILED = {
    "cross_entropy": lambda x, side: side.cross_entropy(x, TARGET),
    "cross_entropy, all": lambda x, side: side.cross_entropy(x, TARGET, torch.ones(9), label_smoothing=0.1),
    "cross_entropy, probabilities": lambda x, side: side.cross_entropy(x, PROBABILITIES, reduction="sum"),
    "mse": lambda x, side: side.mse_loss(x, PROBABILITIES),
    "l1": lambda x, side: side.l1_loss(x, PROBABILITIES),
    "smooth_l1": lambda x, side: side.smooth_l1_loss(x, PROBABILITIES, beta=0.4),
    "huber": lambda x, side: side.huber_loss(x, PROBABILITIES, delta=0.4),
    "bce": lambda x, side: side.binary_cross_entropy(x.sigmoid(), PROBABILITIES),
    "bce with logits": lambda x, side: side.binary_cross_entropy_with_logits(x, PROBABILITIES, torch.ones(9)),
    "kl": lambda x, side: side.kl_div(x.log_softmax(1), PROBABILITIES, reduction="batchmean"),
}


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def gradient(function, x):
    x = x.detach().clone().requires_grad_()
    loss = function(x)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("loss", COMPILED.values(), ids=COMPILED)
def test_compiled_whole(loss):
    """The graph has trainopt's operator, and its results are those without a compiler."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    function = torch.compile(lambda x: 2 * loss(x, functional), fullgraph=True, backend=backend)
    for mine, theirs in zip(
        gradient(function, logits()), gradient(lambda x: 2 * loss(x, functional), logits()), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert any(name.startswith("trainopt.") for name in names), names


def test_compiled_extras():
    def loss(x):
        options = {"z_loss": 0.1, "softcap": 3.0, "empty": "zero", "temperature": 2.0}
        value, z = functional.cross_entropy(x, TARGET, return_z_loss=True, **options)
        return value + 0 * z + functional.linear_cross_entropy(x, LAYER, TARGET, **options)

    for mine, theirs in zip(gradient(compiled(loss), logits()), gradient(loss, logits()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_permission_costs_nothing_where_it_cannot_be_used(backend, reduction):
    def loss(x):
        return functional.cross_entropy(2 * x, TARGET, inplace_backward=True, reduction=reduction).sum()

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True, backend=backend)
    for mine, theirs in zip(gradient(function, logits()), gradient(loss, logits()), strict=True):
        torch.testing.assert_close(mine, theirs)


WARNING = {
    "KLDivLoss": lambda side: side.KLDivLoss(),
    "KLDivLoss of logs": lambda side: side.KLDivLoss(log_target=True),
    "KLDivLoss, size_average": lambda side: side.KLDivLoss(size_average=True),
    "KLDivLoss, reduce": lambda side: side.KLDivLoss(reduce=False),
    "MSELoss": lambda side: side.MSELoss(),
    "L1Loss": lambda side: side.L1Loss(),
    "HuberLoss": lambda side: side.HuberLoss(),
    "SmoothL1Loss": lambda side: side.SmoothL1Loss(),
    "CrossEntropyLoss, size_average": lambda side: side.CrossEntropyLoss(size_average=False),
}
DEPRECATED = ("cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "binary_cross_entropy")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", WARNING.values(), ids=WARNING)
def test_modules_that_warn_compile(make):
    """A warning in Python ends a graph; torch's modules have one and compile whole."""
    for shape in ((6, 9), (6, 1)) if isinstance(make(trainopt), torch.nn.MSELoss | torch.nn.L1Loss) else ((6, 9),):
        target = random(*shape, seed=1).softmax(1).float()
        results = []
        for module in (compiled(make(trainopt)), make(torch.nn)):
            results.append(gradient(lambda x, f=module, t=target: f(x.log_softmax(1), t).sum(), logits()))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}, {"reduction": "elementwise_mean"}])
@pytest.mark.parametrize("name", DEPRECATED)
def test_deprecated_arguments_compile(name, options):
    ours, torchs = (partial(getattr(side, name), target=PROBABILITIES, **options) for side in (functional, F))
    found = gradient(compiled(lambda x: ours(x.sigmoid()).sum()), logits())
    for mine, theirs in zip(found, gradient(lambda x: torchs(x.sigmoid()).sum(), logits()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_broadcasting_compiles_and_warns(name):
    def loss(x):
        return getattr(functional, name)(x, PROBABILITIES[:, :1])

    function = compiled(loss)
    with pytest.warns(UserWarning, match="Using a target size"):
        mine = gradient(function, logits())
    with pytest.warns(UserWarning, match="Using a target size"):
        theirs = gradient(loss, logits())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_linear_cross_entropy(reduction):
    weight, target = logits(11, 9), classes((6,), 11)

    def loss(x):
        return functional.linear_cross_entropy(x, weight, target, reduction=reduction).sum()

    for mine, theirs in zip(gradient(compiled(loss), logits()), gradient(loss, logits()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
def test_compiled_by_the_default_backend():
    def loss(x, t):
        return functional.cross_entropy(x * 2, t) + functional.mse_loss(x, PROBABILITIES)

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True)
    mine = gradient(lambda x: function(x, TARGET), logits())
    torch.testing.assert_close(mine, gradient(lambda x: loss(x, TARGET), logits()))


def test_compiled_modules_and_training_step():
    torch.manual_seed(0)
    layer = trainopt.LinearCrossEntropyLoss(9, 11, bias=True)
    criterion = trainopt.CrossEntropyLoss(label_smoothing=0.1)
    target = classes((6,), 11)

    def step(x):
        return layer(x, target) + criterion(x, TARGET)

    for mine, theirs in zip(gradient(compiled(step), logits()), gradient(step, logits()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_other_sizes_do_not_compile_again_and_again():
    function = compiled(lambda x, t: functional.cross_entropy(x, t))
    counter = torch._dynamo.utils.counters
    counter.clear()
    for rows in (4, 5, 6, 7, 8):
        x = random(rows, 9).float()
        torch.testing.assert_close(function(x, classes((rows,), 9)), F.cross_entropy(x, classes((rows,), 9)))
    assert counter["stats"]["unique_graphs"] <= 2


def test_compiled_function_transforms():
    def rows(x):
        return torch.func.vmap(functional.cross_entropy)(x, TARGET)

    torch.testing.assert_close(compiled(rows)(logits()), F.cross_entropy(logits(), TARGET, reduction="none"))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(5, 9)
            self.loss = trainopt.CrossEntropyLoss(label_smoothing=0.1)
            self.head = trainopt.LinearCrossEntropyLoss(5, 9)

        def forward(self, x, target):
            mse = functional.mse_loss(self.layer(x), self.layer(x) + 1)
            return self.loss(self.layer(x), target) + self.head(x, target) + mse

    model, x = Model(), random(6, 5).float()
    program = torch.export.export(model, (x, TARGET), strict=strict)
    torch.testing.assert_close(program.module()(x, TARGET), model(x, TARGET))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"trainopt.cross_entropy.default", "trainopt.linear_cross_entropy.default"} <= operators


def test_fake_and_meta_tensors_have_the_right_shape():
    with FakeTensorMode():
        x = torch.empty(6, 9, requires_grad=True)
        for reduction in REDUCTIONS:
            loss = functional.cross_entropy(x, torch.zeros(6, dtype=torch.int64), reduction=reduction)
            assert loss.shape == ((6,) if reduction == "none" else ())
    x, target = torch.empty(6, 9, device="meta"), torch.empty(6, device="meta", dtype=torch.int64)
    assert functional.cross_entropy(x, target).device.type == "meta"
    assert functional.mse_loss(x, x, reduction="none").shape == (6, 9)


# Autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", COMPILED.values(), ids=COMPILED)
def test_autocast(loss, dtype):
    def under_autocast(side):
        def of(x):
            with torch.autocast("cpu", dtype=dtype):
                return loss(x.to(dtype) if given is dtype else x, side)

        return of

    for given in (torch.float32, dtype):
        x = random(6, 9).float()
        mine, theirs = run(under_autocast(functional), [x]), run(under_autocast(F), [x])
        wide = x.to(given).double()
        truth = run(lambda x: loss(x, Double()), [wide])
        for ours, torchs, true in zip(mine, theirs, truth, strict=True):
            assert_no_worse(ours, torchs, true, roundings=4)


class Double:
    """torch's functions, with every constant in float64."""

    def __getattr__(self, name):
        def call(*args, **options):
            def widen(value):
                floating = isinstance(value, torch.Tensor) and value.is_floating_point()
                return value.double() if floating else value

            return getattr(F, name)(*map(widen, args), **{key: widen(value) for key, value in options.items()})

        return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_linear_cross_entropy(dtype):
    hidden, weight, target = random(6, 5).float(), random(9, 5, seed=1).float(), TARGET

    def ours(h, w):
        with torch.autocast("cpu", dtype=dtype):
            return functional.linear_cross_entropy(h, w, target)

    def torchs(h, w):
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(F.linear(h, w), target)

    mine, theirs = run(ours, [hidden, weight]), run(torchs, [hidden, weight])
    truth = run(lambda h, w: F.cross_entropy(F.linear(h, w), target), [hidden.double(), weight.double()])
    for a, b, true in zip(mine, theirs, truth, strict=True):
        assert_no_worse(a, b, true)
