"""trainopt in torch's place, by `patch` or by hand: what falls back reaches torch, and nothing calls itself."""

import warnings

import pytest
import torch
from patches import LABELS, P, rows
from torch import nn
from torch.nn import functional as F

import trainopt

pytestmark = pytest.mark.usefixtures("torch_restored")


class Subclass(torch.Tensor):
    pass


def per_sample(loss):
    return torch.func.vmap(loss)(rows(), LABELS)


def tangent(loss):
    return torch.func.jvp(loss, (rows(),), (rows() + 1,))


LOSSES = {
    "int32 classes": lambda: F.cross_entropy(rows(), LABELS.int()),
    "classes of one element": lambda: F.cross_entropy(rows()[0], LABELS[:1]),
    "probabilities that want a gradient": lambda: F.cross_entropy(rows(), P.clone().requires_grad_()),
    "class weights that want a gradient": lambda: F.cross_entropy(rows(), LABELS, torch.ones(5, requires_grad=True)),
    "meta": lambda: F.cross_entropy(rows(device="meta"), LABELS.to("meta")),
    "vmap": lambda: per_sample(F.cross_entropy),
    "jvp": lambda: tangent(lambda x: F.cross_entropy(x, LABELS)),
    "grad": lambda: torch.func.grad(lambda x: F.cross_entropy(x, LABELS))(rows()),
    "subclass": lambda: F.cross_entropy(rows().as_subclass(Subclass), LABELS),
    "a list": lambda: F.cross_entropy([1.0], LABELS),
    "complex": lambda: F.l1_loss(rows(dtype=torch.complex64), rows(dtype=torch.complex64) + 1),
    "complex mse": lambda: F.mse_loss(rows(dtype=torch.complex64), rows(dtype=torch.complex64)),
    "float8": lambda: F.mse_loss(rows().to(torch.float8_e4m3fn), rows().to(torch.float8_e4m3fn)),
    "integers": lambda: F.smooth_l1_loss(rows().long(), P.long()),
    "two dtypes": lambda: F.mse_loss(rows(), P.double()),
    "mse with a weight": lambda: F.mse_loss(rows(), P, weight=P),
    "l1 with a weight": lambda: F.l1_loss(rows(), P, weight=P),
    "huber with a weight": lambda: F.huber_loss(rows(), P, weight=P),
    "huber of two dtypes": lambda: F.huber_loss(rows(), P.double()),
    "negative beta": lambda: F.smooth_l1_loss(rows(), P, beta=-1.0),
    "meta smooth l1": lambda: F.smooth_l1_loss(rows(device="meta"), P.to("meta")),
    "bce of another shape": lambda: F.binary_cross_entropy(P, P[:2]),
    "bce, vmap": lambda: torch.func.vmap(F.binary_cross_entropy)(P, P),
    "bce with logits, weights that want a gradient": lambda: F.binary_cross_entropy_with_logits(
        rows(), P, P.clone().requires_grad_(), pos_weight=torch.ones(5, requires_grad=True)
    ),
    "kl, deprecated": lambda: F.kl_div(rows(), P, size_average=False),
    "kl, meta": lambda: F.kl_div(rows(device="meta"), P.to("meta"), reduction="batchmean"),
    "module, meta": lambda: nn.CrossEntropyLoss()(rows(device="meta"), LABELS.to("meta")),
    "module, int32": lambda: nn.CrossEntropyLoss()(rows(), LABELS.int()),
    "module, vmap": lambda: torch.func.vmap(nn.KLDivLoss(reduction="sum"))(rows(), P),
    "module of torch's own": lambda: torch.nn.modules.loss.CrossEntropyLoss()(rows(), LABELS),
    "another loss by cross-entropy": lambda: nn.NLLLoss()(rows().log_softmax(1), LABELS),
}
if hasattr(F, "linear_cross_entropy"):
    W = torch.linspace(-1, 1, 7 * 5).reshape(7, 5)
    LOSSES |= {
        "linear, K-dimensional": lambda: F.linear_cross_entropy(rows(), W.reshape(7, 1, 5), LABELS[:, None]),
        "linear, 3 dimensions": lambda: F.linear_cross_entropy(rows()[None], W, LABELS[None]),
        "linear, meta": lambda: F.linear_cross_entropy(rows(device="meta"), W.to("meta"), LABELS.to("meta")),
        "linear, vmap": lambda: torch.func.vmap(lambda x, y: F.linear_cross_entropy(x, W, y))(rows(), LABELS),
        "linear, subclass": lambda: F.linear_cross_entropy(rows().as_subclass(Subclass), W, LABELS),
        "linear, int32": lambda: F.linear_cross_entropy(rows(), W, LABELS.int()),
        "linear, torch's chunks": lambda: F.linear_cross_entropy(
            rows().bfloat16(),
            W.bfloat16(),
            LABELS,
            options=nn.LinearCrossEntropyOptions(acc_dtype=torch.bfloat16),
        ),
    }


def params(*gradients):
    made = [nn.Parameter(torch.ones_like(gradient.to_dense())) for gradient in gradients]
    for param, gradient in zip(made, gradients, strict=True):
        param.grad = gradient.clone()
    return made


def clipped(*gradients, limit=0.1, **options):
    made = params(*gradients)
    total = torch.nn.utils.clip_grad_norm_(made, limit, **options)
    return total, *(param.grad for param in made)


def shared():
    made = params(torch.ones(4), torch.ones(4))
    made[1].grad = made[0].grad
    return torch.nn.utils.clip_grad_norm_(made, 0.1), made[0].grad


SPARSE = torch.eye(3).to_sparse()
CLIPPING = {
    "order 3": lambda: clipped(rows(), norm_type=3),
    "order 0.5": lambda: clipped(rows(), norm_type=0.5),
    "order 3, foreach": lambda: clipped(rows(), norm_type=3, foreach=True),
    "sparse": lambda: clipped(SPARSE),
    "complex": lambda: clipped(rows(dtype=torch.complex64)),
    "meta": lambda: clipped(rows(device="meta")),
    "subclass": lambda: clipped(rows().as_subclass(Subclass)),
    "not finite": lambda: clipped(rows() * torch.inf, error_if_nonfinite=True),
    "not finite, order 3": lambda: clipped(rows() * torch.inf, norm_type=3, error_if_nonfinite=True),
    "shared": shared,
    "a used generator": lambda: torch.nn.utils.clip_grad_norm_((p for p in ()), 1.0),
    "deprecated name": lambda: torch.nn.utils.clip_grad_norm(params(rows()), 1.0, 3),
    "norm of order 3": lambda: torch.nn.utils.get_total_norm([rows()], 3),
    "norm of a complex tensor": lambda: torch.nn.utils.get_total_norm([rows(dtype=torch.complex64)]),
    "norm of float8": lambda: torch.nn.utils.get_total_norm([rows().to(torch.float8_e4m3fn)]),
    "norm that is not finite": lambda: torch.nn.utils.get_total_norm([rows() * torch.nan], error_if_nonfinite=True),
    "norm under its first name": lambda: torch.nn.utils.clip_grad._get_total_norm([rows()], 3),
    "clipping of values": lambda: torch.nn.utils.clip_grad_value_(params(rows()), 0.1),
}


def stepped(name, gradient, steps=2, dtype=torch.float32, **options):
    param = nn.Parameter(torch.ones(3, 3, dtype=dtype))
    optimizer = getattr(torch.optim, name)([param], lr=0.1, **options)
    for _ in range(steps):
        param.grad = gradient.to(dtype).clone()
        optimizer.step()
    return param.detach(), *(value for value in optimizer.state[param].values() if value is not None)


def differentiated():
    start = torch.ones(3, requires_grad=True)
    param = start * 1
    optimizer = torch.optim.SGD([param], lr=0.1, differentiable=True)
    param.grad = param.detach() * 2
    optimizer.step()
    return param.detach()


STEPS = {
    "SGD, sparse": lambda: stepped("SGD", SPARSE),
    "SGD, sparse, momentum": lambda: stepped("SGD", SPARSE, momentum=0.9),
    "Adam, sparse": lambda: stepped("Adam", SPARSE),
    "AdamW, sparse": lambda: stepped("AdamW", SPARSE),
    "Adam, complex": lambda: stepped("Adam", torch.ones(3, 3), dtype=torch.complex64),
    "AdamW, complex, amsgrad": lambda: stepped("AdamW", torch.ones(3, 3), dtype=torch.complex64, amsgrad=True),
    "SGD, complex": lambda: stepped("SGD", torch.ones(3, 3), dtype=torch.complex64, momentum=0.9, nesterov=True),
    "AdamW, another engine": lambda: stepped("AdamW", torch.ones(3, 3), foreach=True),
    "differentiable": differentiated,
    "refused": lambda: torch.optim.AdamW([torch.zeros(1)], lr=-1.0),
    "no parameters": lambda: torch.optim.SGD([]),
}
FALLBACKS = {**LOSSES, **CLIPPING, **STEPS}


def outcome(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except RecursionError:
            raise
        except Exception as error:
            return type(error), str(error)


@pytest.mark.parametrize("call", FALLBACKS.values(), ids=FALLBACKS)
def test_a_fallback_reaches_torch(call, in_place):
    expected = outcome(call)
    in_place()
    found = outcome(call)
    if isinstance(expected, tuple) and isinstance(expected[0], type):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_torchs_path_for_all(name, in_place, monkeypatch):
    expected = stepped(name, torch.ones(3, 3))
    in_place()
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    torch.testing.assert_close(stepped(name, torch.ones(3, 3)), expected)


def test_losses_by_torchs_path_for_all(in_place, monkeypatch):
    from trainopt.losses import dispatch

    expected = F.cross_entropy(rows(), LABELS), F.mse_loss(rows(), P), nn.BCELoss()(P, P)
    in_place()
    monkeypatch.setattr(dispatch, "REFERENCE_FORCED", True)
    torch.testing.assert_close((F.cross_entropy(rows(), LABELS), F.mse_loss(rows(), P), nn.BCELoss()(P, P)), expected)


def test_a_step_that_somebody_has_put_in_torchs_class(monkeypatch):
    """torch's path of an optimizer is torch's body of `step`, whatever stands there now."""
    expected = stepped("Adam", torch.ones(3, 3), dtype=torch.complex64)
    monkeypatch.setattr(torch.optim.Adam, "step", trainopt.Adam.step)
    monkeypatch.setattr(torch.optim, "Adam", trainopt.Adam)
    torch.testing.assert_close(stepped("Adam", torch.ones(3, 3), dtype=torch.complex64), expected)
    monkeypatch.undo()


KNOWN = [F.cross_entropy, F.mse_loss, F.kl_div]


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss", "kl_div"])
def test_a_subclass_that_knows_torchs_functions(name, in_place):
    """One that looks torch's function up in a table of its own, which it made before."""
    handled = {function: function.__name__ for function in KNOWN}

    class Tabled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in handled:
                return handled[function]
            return super().__torch_function__(function, types, args, kwargs or {})

    in_place()
    target = LABELS if name == "cross_entropy" else P
    assert getattr(F, name)(rows().as_subclass(Tabled), target) == name


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_knows_torchs_losses_again():
    """It lists torch's functions by name, anew after init_process_group, and found trainopt's under those names."""
    torch._dynamo.trace_rules.clear_lru_cache()  # as init_process_group does
    with trainopt.patched():
        torch.compile(F.mse_loss, backend="eager")(torch.ones(3), torch.zeros(3))
    torch._dynamo.reset()
    loss = torch.compile(lambda x, t: F.mse_loss(x, t, size_average=False), backend="eager", fullgraph=True)
    assert loss(torch.ones(3), torch.zeros(3)) == 3


def test_traced_exported_and_compiled():
    """The tools that look into functions, and find ours."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x, target):
            return F.cross_entropy(self.layer(x), target) + F.mse_loss(self.layer(x), x)

    model = Model()
    expected = model(rows(), LABELS)
    with trainopt.patched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programs = {
            "script": torch.jit.script(model),
            "trace": torch.jit.trace(model, (rows(), LABELS)),
            "fx": torch.fx.symbolic_trace(model),
            "compile": torch.compile(model, backend="aot_eager", fullgraph=True),
            "export": torch.export.export(model, (rows(), LABELS)).module(),
            "script a module": torch.jit.script(nn.CrossEntropyLoss()),
        }
        whole = programs.pop("script a module")
        for name, program in programs.items():
            torch.testing.assert_close(program(rows(), LABELS), expected, msg=name)
        torch.testing.assert_close(whole(rows(), LABELS), nn.CrossEntropyLoss()(rows(), LABELS))
    torch._dynamo.reset()


def test_an_option_of_ours_cannot_be_scripted():
    module = trainopt.CrossEntropyLoss(softcap=3.0)
    assert module.__prepare_scriptable__() is module
