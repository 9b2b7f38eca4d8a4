"""Hooks, the profiler, closures, GradScaler and threads see a step as they see torch.optim's."""

import contextlib
import inspect
import sys
import threading
import time
import warnings

import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    TABLE,
    WITH_FUSED,
    Twins,
    assert_equal,
    assert_same_bits,
    assert_same_outcome,
    each_class,
    error_of,
    one,
    snapshot,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# Hooks, the profiler, closures ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def global_hooks(before, after):
    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overriding(cls):
    class Mine(cls):
        def step(self, closure=None):
            return super().step(closure)

    return Mine


def inheriting(cls):
    class Mine(cls):
        pass

    return Mine


SUBCLASSES = {"itself": lambda cls: cls, "a subclass": inheriting, "a subclass with its own step": overriding}


@each_class
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_hooks_fire_exactly_once(name, kind):
    optimizer, p = one(SUBCLASSES[kind](CLASSES[name][0]))
    events = []
    removable = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: events.append(("pre", o, p[0].item()))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: events.append(("post", o, p[0].item()))),
    ]
    with global_hooks(
        lambda o, args, kwargs: events.append(("all pre", o, p[0].item())),
        lambda o, args, kwargs: events.append(("all post", o, p[0].item())),
    ):
        optimizer.step()
    assert sorted(e[0] for e in events) == ["all post", "all pre", "post", "pre"]
    assert all(e[1] is optimizer for e in events)
    assert all((value == 1) == what.endswith("pre") for what, _, value in events)
    assert [e[0].endswith("pre") for e in events] == [True, True, False, False]
    for handle in removable:
        handle.remove()
    events.clear()
    optimizer.step()
    assert events == []


@each_class
def test_the_order_of_hooks_is_torchs(name):
    orders = []
    for cls in CLASSES[name]:
        events = []
        optimizer, _ = one(cls)
        for i in range(2):
            optimizer.register_step_pre_hook(lambda o, a, k, i=i, e=events: e.append(f"pre {i}"))
            optimizer.register_step_post_hook(lambda o, a, k, i=i, e=events: e.append(f"post {i}"))
        with global_hooks(
            lambda o, a, k, e=events: e.append("all pre"), lambda o, a, k, e=events: e.append("all post")
        ):
            optimizer.step()
        orders.append(events)
    assert orders[0] == orders[1]


@each_class
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_pre_hook_can_change_the_arguments(name, kind):
    optimizer, _ = one(SUBCLASSES[kind](CLASSES[name][0]))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0
    optimizer, _ = one(SUBCLASSES[kind](CLASSES[name][0]))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
    torchs, _ = one(CLASSES[name][1])
    torchs.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
    assert error_of(optimizer.step)[0] is error_of(torchs.step)[0] is RuntimeError


CALLS = {
    "step()": lambda o, c: o.step(),
    "step(None)": lambda o, c: o.step(None),
    "step(closure=None)": lambda o, c: o.step(closure=None),
    "step(closure)": lambda o, c: o.step(c),
    "step(closure=closure)": lambda o, c: o.step(closure=c),
    "the class's": lambda o, c: type(o).step(o, c),
}


@each_class
@pytest.mark.parametrize("kind", ["itself", "a subclass"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_hooks_get_the_calls_own_arguments(name, kind, call):
    heard = []
    for cls in CLASSES[name]:
        optimizer, _ = one(SUBCLASSES[kind](cls))
        closure = lambda: 1.0  # noqa: E731
        seen = []
        hook = lambda o, args, kwargs, seen=seen, closure=closure: seen.append(  # noqa: E731
            (
                [a if a is None else a is closure or type(a).__mro__[-3].__name__ for a in args],
                {k: v if v is None else v is closure for k, v in kwargs.items()},
            )
        )
        optimizer.register_step_pre_hook(hook)
        optimizer.register_step_post_hook(hook)
        with global_hooks(hook, hook):
            call(optimizer, closure)
        heard.append(seen)
    assert heard[0] == heard[1] and len(heard[0]) == 4


@each_class
def test_arguments_that_step_does_not_take(name):
    for call in (lambda o: o.step(1, 2), lambda o: o.step(loss=3), lambda o: o.step(None, closure=None)):
        errors = [error_of(lambda cls=cls, call=call: call(one(cls)[0])) for cls in CLASSES[name]]
        assert errors[0][0] is errors[1][0] is TypeError
    ours, torchs = (inspect.signature(cls.step) for cls in CLASSES[name])
    assert list(ours.parameters) == list(torchs.parameters)
    assert ours.parameters["closure"].default is None


@each_class
def test_a_pre_hook_that_edits_gradients_is_seen(name):
    twins = Twins(name)
    twins.edit(
        lambda o, _: o.register_step_pre_hook(
            lambda o, args, kwargs: [p.grad.mul_(2) for g in o.param_groups for p in g["params"]] and None
        )
    )
    twins.step(3)


@each_class
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_the_profiler_shows_the_step(name, kind):
    cls = SUBCLASSES[kind](CLASSES[name][0])
    optimizer, _ = one(cls)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{cls.__name__}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{cls.__name__}.zero_grad"] == 1
    assert sum(count for key, count in counts.items() if key.startswith("Optimizer.step#")) == 2


@each_class
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back(name, grad_mode):
    optimizer, p = one(CLASSES[name][0])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * 2).sum()
        if grad_mode is not torch.inference_mode:
            loss.backward()
        else:
            p.grad = torch.full((3,), 2.0)
        return loss

    with grad_mode():
        loss = optimizer.step(closure)
        again = optimizer.step(closure=closure)
        assert optimizer.step() is None
    assert calls == [True, True] and loss.item() == 6.0 and again.item() < 6.0
    assert (p < 1).all()


@each_class
def test_an_error_in_the_closure_leaves_everything(name):
    optimizer, _ = one(CLASSES[name][0])
    optimizer.step()
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError, match="no loss today"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_same_bits(before, snapshot(optimizer))


# Mixed precision ------------------------------------------------------------------------------------------------------

RECIPES = ["plain", "unscale_", "unscale_ and clip", "accumulate"]


def scaled_run(cls, recipe, options, overflow_at=(), steps=5, seen=None):
    """A run under GradScaler on the CPU; returns the optimizer, the parameters and the scaler."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    optimizer = cls(model.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for i in range(steps):
        for _ in range(2 if recipe == "accumulate" else 1):
            loss = model(torch.linspace(-1, 1, 36).view(4, 9) * (i + 1)).square().mean()
            scaler.scale(loss).backward()
        if i in overflow_at:
            model[0].weight.grad[3, 4] = float("inf")
        if "unscale_" in recipe:
            scaler.unscale_(optimizer)
        if "clip" in recipe:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if seen is not None:
            seen(optimizer, i, lambda: scaler.step(optimizer))
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return optimizer, list(model.parameters()), scaler


@each_class
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fused, overflow_at", [(None, ()), (None, (0,)), (None, (2,)), (True, (0, 1, 3))])
def test_gradscaler(name, recipe, fused, overflow_at):
    ours, torchs = CLASSES[name]
    options = {**OPTIONS[name], **({"dampening": 0.25} if name == "SGD" else TABLE[name].kept({"eps": 1e-3}))}
    if name == "RMSprop":  # else its variance is a difference of near numbers, and its momentum of large ones
        options = {**OPTIONS[name], "centered": False}
    mine = scaled_run(ours, recipe, {**options, "fused": fused}, overflow_at)
    theirs = scaled_run(torchs, recipe, options, overflow_at)
    assert mine[2].get_scale() == theirs[2].get_scale()
    assert_same_outcome(mine[:2], theirs[:2], rtol=2e-5, atol=2e-6)


@each_class
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("overflow_at, extras", [(0, {}), (3, {"noise": 0.1, "l1": 0.1})], ids=["", "extras"])
def test_an_overflow_leaves_everything_as_it_was(name, fused, recipe, overflow_at, extras):
    skipped = []

    def seen(optimizer, i, step):
        before, keys = snapshot(optimizer), [list(optimizer.state[p]) for p in optimizer.state]
        version = optimizer.param_groups[0]["params"][0]._version
        step()
        if i == overflow_at:
            assert_same_bits(before, snapshot(optimizer))
            assert [list(optimizer.state[p]) for p in optimizer.state] == keys
            assert optimizer.param_groups[0]["params"][0]._version == version
            assert overflow_at > 0 or TABLE[name].eager_states or len(optimizer.state) == 0
        skipped.append(optimizer.last_step_skipped)

    options = {**OPTIONS[name], "fused": fused, **extras}
    optimizer, _, _ = scaled_run(CLASSES[name][0], recipe, options, (overflow_at,), seen=seen)
    if fused:
        assert skipped == [i == overflow_at for i in range(5)]
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@each_class
def test_the_scaler_keys_on_fused_alone(name):
    p = [torch.nn.Parameter(torch.zeros(2))]
    assert not getattr(CLASSES[name][0](p), "_step_supports_amp_scaling", False)
    assert CLASSES[name][0](p, fused=True)._step_supports_amp_scaling
    assert CLASSES[name][0](p).last_step_skipped is False


@pytest.mark.parametrize("name", WITH_FUSED)
def test_a_gradient_scale_is_divided_out_and_written_back(name):
    """As torch's fused step does; a user's own scale, as for clipping, goes the same way."""
    twins = Twins(name, shapes=((33, 20), (5,)), fused=True)
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda o, params: [p.grad.mul_(8) for p in params])
        for side in twins.sides:
            side.optimizer.grad_scale = torch.tensor(4.0)
            side.optimizer.found_inf = torch.tensor(0.0)
        twins.edit(lambda o, _: o.step())
        twins.compare()
        for p, q in zip(twins.ours.params, twins.torchs.params, strict=True):
            assert_equal(p.grad, q.grad)
    twins.set_gradients()
    before = snapshot(twins.ours.optimizer)
    twins.ours.optimizer.found_inf = torch.tensor(1.0)
    gradients = [p.grad.clone() for p in twins.ours.params]
    twins.ours.optimizer.step()
    assert twins.ours.optimizer.last_step_skipped
    assert_same_bits(before, snapshot(twins.ours.optimizer))
    assert all(torch.equal(p.grad, g) for p, g in zip(twins.ours.params, gradients, strict=True))


# Threads --------------------------------------------------------------------------------------------------------------


@each_class
def test_a_step_in_another_thread(name):
    twins = Twins(name, shapes=((1000, 700), (50,)))
    for _ in range(3):
        twins.set_gradients()
        thread = threading.Thread(target=twins.ours.optimizer.step)
        thread.start()
        busy = [i for _ in range(20) for i in range(1000)]
        twins.torchs.optimizer.step()
        thread.join()
        assert len(busy) == 20_000
        twins.compare()


@each_class
def test_two_optimizers_in_two_threads(name):
    pairs = [Twins(name, shapes=((300, 700), (50,))) for _ in range(2)]
    for twins in pairs:
        twins.set_gradients()
        for _ in range(5):
            twins.torchs.optimizer.step()
    threads = [threading.Thread(target=lambda t=t: [t.ours.optimizer.step() for _ in range(5)]) for t in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for twins in pairs:
        twins.compare()


@each_class
def test_the_interpreter_is_free_during_a_large_step(name):
    """Another Python thread gets on while the engine is at work, and only then: Python itself would not switch."""
    p = torch.nn.Parameter(torch.zeros(3_000_000))
    p.grad = torch.ones_like(p)
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    optimizer.step()
    go, done, ran = threading.Semaphore(0), False, []

    def work():
        while True:
            go.acquire()
            ran.append(True)
            if done:
                return

    interval = sys.getswitchinterval()
    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.05)
    sys.setswitchinterval(1000)
    try:
        for _ in range(30):
            go.release()
            optimizer.step()
            if ran:
                break
        found = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        done = True
        go.release()
        worker.join()
    assert found


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.full((4,), float(i)) @ torch.ones(4, 4)


@each_class
def test_forked_workers_after_a_step_do_not_hang(name):
    model = torch.nn.Linear(4, 100_000)
    optimizer = CLASSES[name][0](model.parameters(), lr=1e-6)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
        for batch in loader:
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
