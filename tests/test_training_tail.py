"""What a run's optimizer does in its step (clipping, leaving out, the average) against the loop's own passes.

A subclass with a `step` of its own is left with the loop's passes, and so is the other side of every comparison.
"""

import functools
import itertools
import math

import pytest
import torch
from test_training_loop import Recorder
from torch import nn

import trainopt
from trainopt.training import Silent, fit, gradients

OPTIMIZERS = {
    "adamw": (trainopt.AdamW, {"lr": 0.01}),
    "fused": (trainopt.Adam, {"lr": 0.01, "fused": True}),
    "amsgrad": (trainopt.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "sgd": (trainopt.SGD, {"lr": 0.05}),
    "momentum": (trainopt.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "noise": (trainopt.SGD, {"lr": 0.05, "noise": 1e-3}),
    "lion": (trainopt.Lion, {"lr": 0.001}),
    "lamb": (trainopt.LAMB, {"lr": 0.01}),
    "lars": (trainopt.LARS, {"lr": 0.1, "momentum": 0.9}),
}
CASES = {
    "both": {"clip": 0.1, "average": 0.9},
    "no warm-up": {"clip": 0.1, "average": 0.9, "average_warmup": False},
    "clip": {"clip": 0.1},
    "average": {"average": 0.9},
    "the last one": {"average": 0.0},
    "unread": {"clip": 0.1, "average": 0.9, "nonfinite": "ignore"},
    "accumulated": {"clip": 0.1, "average": 0.9, "accumulation": 3},
}


class Net(nn.Module):
    """Parameters that every forward pass uses, that some do, that none does, and that are frozen."""

    def __init__(self, is_late=None):
        super().__init__()
        self.first, self.last, self.late = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.is_late = is_late  # in which of four passes `late` is used

    def forward(self, inputs):
        self.calls += self.training
        output = self.frozen(self.last(torch.tanh(self.first(inputs))))
        return self.late(output) if self.calls % 4 == self.is_late else output


class Scaled(nn.Module):
    """A loss with a parameter; at one call it may be infinite, and finite when it is computed again."""

    def __init__(self, infinite_at=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.calls, self.infinite_at = 0, infinite_at

    def forward(self, output, target):
        self.calls += 1
        factor = math.inf if self.calls == self.infinite_at else 1
        return nn.functional.cross_entropy(output * self.scale, target) * factor


@functools.cache
def with_own_step(kind):
    """The class, with a step that may be anything, as far as the loop knows."""
    return type(kind.__name__, (kind,), {"step": lambda self, closure=None: kind.step(self, closure)})


def train(kind, settings, choices, *, is_late=None, bad=None, dtype=torch.float64, hooked=None, loss=None, **more):
    """A run of 24 updates; the result, all weights and the optimizer."""
    torch.manual_seed(0)
    net, loss = Net(is_late).to(dtype), (loss or Scaled()).to(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64).to(dtype)
    if bad is not None:
        inputs[bad] = math.nan
    optimizer = kind([*net.parameters(), *loss.parameters()], **settings)
    if hooked is not None:
        hooked(optimizer)
    choices = {"epochs": 3, "batch_size": 5, "shuffle": False, "seed": 0, "report": Silent(), **choices, **more}
    result = fit(net, (inputs, torch.arange(40) % 3), loss, optimizer, **choices)
    return result, {**net.state_dict(), **loss.state_dict()}, optimizer


def assert_all_close(found, expected, rtol=1e-11):
    """Two dicts of tensors are the same but for rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol / 10)


def assert_close(a, b, rtol=1e-11):
    """Two runs are."""
    assert_all_close(a[1], b[1], rtol)
    for name in ("average", "criterion_average"):
        assert_all_close(getattr(a[0], name) or {}, getattr(b[0], name) or {}, rtol)
    assert a[0].step == b[0].step and a[0].loss == pytest.approx(b[0].loss, rel=rtol)


@pytest.fixture
def passes(monkeypatch):
    """The names of the loop's own passes, as they are made."""
    made = []

    def noting(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (made.append(name), original(*args))[1])

    for name in ("clip", "global_norm"):
        noting(gradients, name)
    noting(torch, "_foreach_lerp_")
    return made


@pytest.mark.parametrize(
    "name, case",
    [
        *((name, "both") for name in OPTIMIZERS),
        *((n, c) for n in ("adamw", "momentum", "lamb") for c in CASES if c != "both"),
    ],
)
def test_the_step_does_what_the_loops_passes_do(name, case, passes):
    kind, settings = OPTIMIZERS[name]
    ours = train(kind, settings, CASES[case], log_every=1000)
    assert "clip" not in passes and "global_norm" not in passes
    passes.clear()
    assert_close(ours, train(with_own_step(kind), settings, CASES[case], log_every=1000))
    assert ("clip" in passes) == ("clip" in CASES[case]) and ("_foreach_lerp_" in passes) == ("average" in CASES[case])


def test_where_nothing_is_clipped_the_weights_are_the_same_to_the_bit():
    kind, settings = OPTIMIZERS["adamw"]
    choices = {"clip": 1e6, "average": 0.9}
    ours, others = (train(each, settings, choices, dtype=torch.float32) for each in (kind, with_own_step(kind)))
    assert all(torch.equal(value, others[1][name]) for name, value in ours[1].items())
    assert_close(ours, others, rtol=1e-6)


def test_parameters_of_the_model_that_the_optimizer_does_not_step_are_averaged_by_the_loop(passes):
    train(*OPTIMIZERS["adamw"], {"average": 0.9})
    assert passes.count("_foreach_lerp_") == 24  # the frozen layer's and the unused one's


@pytest.mark.parametrize("is_late", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "momentum", "noise", "lamb"])
def test_a_parameter_without_a_gradient_now_and_then_has_the_average_of_the_formula(name, is_late):
    """Its own count of steps is not the count of updates: from then on the loop averages."""
    kind, settings = OPTIMIZERS[name]
    ours, others = (train(each, settings, CASES["both"], is_late=is_late) for each in (kind, with_own_step(kind)))
    assert_close(ours, others)
    assert not torch.equal(ours[0].average["late.weight"], ours[1]["late.weight"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_an_update_that_is_not_finite_is_left_out_by_the_step(name, accumulation):
    kind, settings = OPTIMIZERS[name]
    sides = []
    for each in (kind, with_own_step(kind)):
        heard = Recorder()
        choices = {**CASES["both"], "accumulation": accumulation, "report": heard, "log_every": 3}
        result = train(each, settings, choices, bad=13)
        texts = [event.text for event in heard.named("Message")]
        shown = [(event.step, event.loss, event.grad_norm, event.skipped) for event in heard.named("Progress")]
        sides.append((result, texts, shown))
    (ours, said, shown), (others, expected, expected_shown) = sides
    assert_close(ours, others)
    assert ours[0].step == 24 // accumulation - 3 and said == expected and "left out" in said[0]
    for numbers, wanted in zip(shown, expected_shown, strict=True):
        assert numbers == pytest.approx(wanted, rel=1e-10)
    assert ours[0].suspects is not None


@pytest.mark.parametrize("own", [{"zero_grad": "in_step"}, {"max_grad_norm": 0.1, "error_if_nonfinite": True}], ids=str)
def test_it_is_left_out_by_the_loop_where_the_step_would_clear_its_traces_or_raise(own):
    texts = []
    for kind in (trainopt.AdamW, with_own_step(trainopt.AdamW)):
        heard = Recorder()
        result, *_ = train(kind, own, {"clip": 0.1, "report": heard}, loss=Scaled(infinite_at=3))
        texts.append([event.text for event in heard.named("Message")])
        assert result.step == 23
    assert texts[0] == texts[1] and "the gradient of parameter" in texts[0][0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_with_every_precision(precision, dtype):
    kind, settings = OPTIMIZERS["momentum"]
    choices = {**CASES["both"], "precision": precision}
    sides = [train(each, settings, choices, dtype=dtype) for each in (kind, with_own_step(kind))]
    assert_close(*sides, rtol=1e-5 if dtype is torch.float32 else 0.05)


def test_the_optimizer_is_left_as_it_was():
    kind, settings = OPTIMIZERS["adamw"]
    seen = []

    class Looking(Silent):
        def progress(self, event):
            seen.append([{**group, "params": None} for group in optimizers[0].param_groups])

    optimizers = []
    choices = {**CASES["both"], "log_every": 1, "report": Looking()}
    *_, optimizer = train(kind, settings, choices, hooked=optimizers.append)
    given = {**kind([nn.Parameter(torch.zeros(1))], **settings).param_groups[0], "params": None}
    assert len(seen) == 24 and all(groups == [given] for groups in seen)
    assert {**optimizer.param_groups[0], "params": None} == given
    assert all("ema" not in state for state in optimizer.state.values()) and len(optimizer.state) == 5


def test_hooks_see_clipped_gradients_and_what_they_make_of_the_weights_is_averaged():
    kind, settings = OPTIMIZERS["sgd"]
    norms = []

    def hooked(optimizer):
        params = optimizer.param_groups[0]["params"]
        optimizer.register_step_pre_hook(lambda *_: norms.append(float(gradients.global_norm(params))))
        optimizer.register_step_post_hook(lambda *_: [param.data.clamp_(-0.1, 0.1) for param in params])

    result, _, _ = train(kind, settings, {"clip": 0.01, "average": 0.9}, hooked=hooked)
    assert len(norms) == 24 and max(norms) <= 0.01
    assert all(value.abs().max() <= 0.1 for name, value in result.average.items() if name != "calls")


def test_options_that_the_optimizer_has_itself_hold():
    """The same as the run's, they are used; the run's alone or the optimizer's alone, as well."""
    kind, settings = OPTIMIZERS["adamw"]
    own = {"max_grad_norm": 0.1, "ema_decay": 0.9, "ema_warmup": True}
    expected = train(kind, settings, CASES["both"])
    *_, optimizer = ours = train(kind, {**settings, **own}, CASES["both"])
    assert_close(ours, expected)
    assert all(optimizer.param_groups[0][name] == value for name, value in own.items())
    assert torch.equal(optimizer.ema_state_dict()[0], expected[0].average["first.weight"])
    heard = Recorder()
    alone = train(kind, {**settings, **own}, {"report": heard, "log_every": 1})
    assert alone[0].average is None
    assert all(torch.equal(value, expected[1][name]) for name, value in alone[1].items())
    assert all(event.grad_norm > 0 for event in heard.named("Progress"))


@pytest.mark.parametrize(
    ("own", "choices", "words"),
    [
        ({"max_grad_norm": 0.5}, {"clip": 1.0}, r"clip is 1.0, but optimizer has max_grad_norm=0.5: give one of them"),
        (
            {"ema_decay": 0.5},
            {"average": 0.9},
            r"average is 0.9 .* but optimizer has ema_decay=0.5 with ema_warmup=Fal",
        ),
        ({"ema_decay": 0.9}, {"average": 0.9}, "average is 0.9 with average_warmup=True, but optimizer .*=False: give"),
        (
            {"state_dtype": "float16"},
            {"state_dtype": "bfloat16"},
            "'bfloat16', but optimizer has state_dtype='float16'",
        ),
        ({"state_dtype": {"exp_avg": "float16"}}, {"state_dtype": "float16"}, "optimizer has state_dtype={'exp_avg': "),
        ({}, {"state_dtype": "float16"}, "state_dtype='float16' is for parameters of .* and one is torch.float64"),
    ],
)
def test_options_that_contradict_the_optimizers_own_are_refused(own, choices, words, tmp_path):
    dtype = torch.float64 if not own else torch.float32
    with pytest.raises(ValueError, match=words):
        train(trainopt.AdamW, own, choices, dtype=dtype, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_trainopts_optimizers_have_states_of_other_dtypes():
    with pytest.raises(
        ValueError, match=r"state_dtype is 'float16', but optimizer is a torch.optim.adamw.AdamW, which"
    ):
        train(torch.optim.AdamW, {}, {"state_dtype": "float16"})


def test_states_change_their_dtype_in_the_middle_of_a_run(tmp_path):
    for epochs, name in enumerate(["float32", "bfloat16", None, "float16"], 1):
        choices = {"epochs": epochs, "state_dtype": name, "directory": tmp_path, "average": 0.9}
        result, _, optimizer = train(trainopt.AdamW, {"lr": 0.01}, choices, dtype=torch.float32)
        wanted = getattr(torch, name or "bfloat16")
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {wanted}
        assert result.step == 8 * epochs and result.average["first.weight"].dtype == torch.float32


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_late", [None, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_to_the_same_bits(name, is_late, tmp_path):
    kind, settings = OPTIMIZERS[name]
    straight = train(kind, settings, CASES["both"], is_late=is_late)
    for epochs in (1, 2, 3):
        ours = train(kind, settings, CASES["both"], is_late=is_late, directory=tmp_path, epochs=epochs)
    for found, expected in ((ours[1], straight[1]), (ours[0].average, straight[0].average)):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_files_are_those_of_runs_whose_loop_averages_and_go_both_ways(name, first, tmp_path):
    kind, settings = OPTIMIZERS[name]
    kinds = [kind, with_own_step(kind)]
    half = train(kinds[first], settings, CASES["both"], directory=tmp_path, epochs=1)
    saved = torch.load(next((tmp_path / "checkpoints").iterdir()), weights_only=True)
    assert all("ema" not in entries for entries in saved["optimizer"]["state"].values())
    assert set(saved["optimizer"]["param_groups"][0]).isdisjoint(("ema_decay", "max_grad_norm", "skip_nonfinite"))
    assert saved["average"]["count"] == 8
    for key, value in half[0].average.items():
        assert key == "calls" or torch.equal(saved["average"]["weights"][key], value)
    rest = train(kinds[1 - first], settings, CASES["both"], directory=tmp_path)
    straight = train(kinds[0], settings, CASES["both"])
    for found, expected in ((rest[1], straight[1]), (rest[0].average, straight[0].average)):
        assert_all_close(found, expected)


def test_a_limit_of_the_checkpoints_that_contradicts_is_not_overridden(tmp_path):
    train(trainopt.AdamW, {"max_grad_norm": 0.5}, {}, directory=tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"clip is 1.0, but optimizer has max_grad_norm=0.5"):
        train(trainopt.AdamW, {}, {"clip": 1.0}, directory=tmp_path)


# When the optimizer does not average ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "momentum", "noise"])
def test_an_optimizer_that_has_stepped_before_is_averaged_from_the_runs_first_update(name):
    kind, settings = OPTIMIZERS[name]

    def step_before(optimizer):
        for _ in range(5):
            for param in optimizer.param_groups[0]["params"]:
                param.grad = torch.ones_like(param)
            optimizer.step()

    ours, others = (train(each, settings, CASES["both"], hooked=step_before) for each in (kind, with_own_step(kind)))
    assert_close(ours, others)


def test_a_step_that_only_makes_states_counts_for_the_average_as_for_the_run():
    """Rates of 0 and gradients of 0, as at the start of a warm-up: the optimizer does not count that step."""
    sides = []
    for kind in (trainopt.AdamW, with_own_step(trainopt.AdamW)):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        optimizer = kind(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 3) / 3)
        inputs = torch.cat([torch.zeros(4, 3), torch.randn(12, 3)]).double()

        def loss(output, target):
            return (output * target).mean()

        data = (inputs, inputs.abs().sum(1, keepdim=True).sign().expand(16, 2))
        choices = {"epochs": 2, "batch_size": 4, "shuffle": False, "average": 0.9, "report": Silent()}
        sides.append(fit(model, data, loss, optimizer, schedule=schedule, count=len, **choices).average)
    assert_all_close(*sides)


def test_a_group_that_is_added_is_clipped_and_averaged_with_the_others():
    """A layer that is thawed in the middle of a run."""
    sides = []
    for kind in (trainopt.AdamW, with_own_step(trainopt.AdamW)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        optimizer = kind(model[1].parameters(), lr=0.1)

        class Thawing(Silent):
            def progress(self, event, model=model, optimizer=optimizer):
                if event.step == 3:
                    optimizer.add_param_group({"params": model[0].parameters()})

        data = (torch.randn(8, 3).double(), torch.arange(8) % 2)
        choices = {"steps": 8, "batch_size": 4, "clip": 0.01, "average": 0.9, "log_every": 1, "seed": 0}
        result = fit(model, data, nn.CrossEntropyLoss(), optimizer, report=Thawing(), **choices)
        sides.append((result.average, dict(model.state_dict())))
    for found, expected in zip(*sides, strict=True):
        assert_all_close(found, expected)


@pytest.mark.parametrize("stats", [None, False, 0], ids=str)
@pytest.mark.parametrize("choices", [{"nonfinite": "ignore"}, {}, {"clip": 0.1}, {"average": 0.9}], ids=str)
def test_the_step_tells_how_far_it_goes(choices, stats, passes):
    """With plain SGD, the learning rate times the gradient's norm."""
    torch.manual_seed(0)
    net, told = Net(), []

    class Watching(Silent):
        def progress(self, event):
            told.append((event, math.hypot(*(float(p.detach().norm()) for p in trained))))

    trained = [*net.first.parameters(), *net.last.parameters()]  # the others have no gradient
    told.append((None, math.hypot(*(float(p.detach().norm()) for p in trained))))
    optimizer = trainopt.SGD(trained, lr=0.05)
    given = {} if stats is None else {"stats": stats}
    optimizer.param_groups[0].update(given)
    data = torch.randn(40, 6), torch.arange(40) % 3
    fit(net, data, nn.CrossEntropyLoss(), optimizer, epochs=1, batch_size=5, log_every=1, report=Watching(), **choices)
    assert len(told) == 9
    assert [{k: v for k, v in group.items() if k == "stats"} for group in optimizer.param_groups] == [given]
    for (_, before), (event, _) in itertools.pairwise(told):
        length = min(event.grad_norm, choices.get("clip", math.inf))
        assert event.update_ratio == pytest.approx(0.05 * length / before, rel=1e-4)
    assert ("global_norm" in passes) == (choices != {"nonfinite": "ignore"} and "clip" not in choices)


def test_a_foreign_step_tells_nothing_of_it():
    record = Recorder()
    train(with_own_step(trainopt.SGD), {"lr": 0.05}, {}, report=record, log_every=4)
    assert {event.update_ratio for event in record.named("Progress")} == {None}
