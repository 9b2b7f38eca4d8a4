"""The loop: what one update computes, what is counted, shown and stepped, and how bad input is refused."""

import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainopt
from trainopt.training import Options, Silent, fit


class Recorder(Silent):
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def started(self, event):
        self.events.append(event)

    progress = validated = message = finished = started

    def named(self, name):
        return [event for event in self.events if type(event).__name__ == name]


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def samples(count=28, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, dtype=dtype, generator=generator)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def sgd(model, **options):
    return trainopt.SGD(model.parameters(), **{"lr": 0.1, **options})


def fitted(model, data=None, loss=None, optimizer=None, **choices):
    """One epoch of batches of 7 by SGD on cross-entropy, silently, where nothing else is said."""
    usual = {"batch_size": 7, "report": Silent(), **({} if "steps" in choices else {"epochs": 1})}
    data, loss = samples() if data is None else data, loss or nn.CrossEntropyLoss()
    return fit(model, data, loss, optimizer or sgd(model), **{**usual, **choices})


def assert_same_weights(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if tolerance:
            torch.testing.assert_close(p, q, **tolerance)
        else:
            assert torch.equal(p, q), name


# The gradient of an update ------------------------------------------------------------------------------------------


def test_the_loop_is_the_plain_loop_to_the_bit():
    loader = DataLoader(TensorDataset(*samples()), batch_size=8)
    ours, plain = network(), network()
    optimizer = trainopt.AdamW(plain.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        for inputs, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(inputs), target).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
            optimizer.step()
            schedule.step()
    mine = trainopt.AdamW(ours.parameters(), lr=0.01)
    decay = torch.optim.lr_scheduler.ExponentialLR(mine, 0.9)
    result = fit(ours, loader, nn.CrossEntropyLoss(), mine, epochs=3, clip=0.3, schedule=decay, report=Silent())
    assert result.step == 12 and decay.get_last_lr() == schedule.get_last_lr()
    assert_same_weights(ours, plain, rtol=1e-6, atol=1e-7)  # the norm is summed in float64 here


@pytest.mark.parametrize("kind", ["module", "function", "custom"])
def test_accumulated_micro_batches_give_the_gradient_of_the_big_batch(kind):
    """Uneven counts, one micro-batch with nothing in it, seven micro-batches with an accumulation of 4."""
    inputs, target = samples(28, torch.float64)
    target[[0, 5, 6, 13, 20, 21, 22]] = -100
    target[8:12] = -100  # all of the third micro-batch
    ours, plain = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for window in (slice(0, 16), slice(16, 28)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(inputs[window]), target[window]).backward()
        optimizer.step()

    def masked_mean(output, target):
        keep = target != -100
        return (nn.functional.cross_entropy(output, target.clamp(min=0), reduction="none") * keep).sum() / keep.sum()

    loss = {"module": nn.CrossEntropyLoss(), "function": nn.functional.cross_entropy, "custom": masked_mean}[kind]
    count = (lambda target: (target != -100).sum()) if kind == "custom" else None
    recorder = Recorder()
    arguments = {"epochs": 1, "batch_size": 4, "shuffle": False, "accumulation": 4, "report": recorder, "count": count}
    result = fit(ours, (inputs, target), loss, sgd(ours, lr=0.5), **arguments)
    assert result.step == 2
    assert_same_weights(ours, plain, rtol=1e-13, atol=1e-15)
    assert math.isfinite(result.loss)


def test_class_weights_are_counted():
    inputs, target = samples(24, torch.float64)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64), ignore_index=2)
    ours, plain = network(dtype=torch.float64), network(dtype=torch.float64)
    loss(plain(inputs), target).backward()
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    fitted(ours, (inputs, target), loss, sgd(ours, lr=0.5), batch_size=5, accumulation=5)
    assert_same_weights(ours, plain, rtol=1e-13, atol=1e-15)


def test_full_batch_is_gradient_descent():
    inputs, target = samples(20, torch.float64)
    ours, plain = network(dtype=torch.float64), network(dtype=torch.float64)
    for _ in range(3):
        plain.zero_grad()
        nn.functional.cross_entropy(plain(inputs), target).backward()
        with torch.no_grad():
            for param in plain.parameters():
                param -= 0.1 * param.grad
    assert fitted(ours, (inputs, target), epochs=3, batch_size="full").step == 3
    assert_same_weights(ours, plain, rtol=1e-12, atol=1e-14)


def test_the_norm_is_clipped_once_an_update_and_shown_unclipped():
    inputs, target = samples(16, torch.float64)
    ours, plain = network(dtype=torch.float64), network(dtype=torch.float64)
    nn.functional.cross_entropy(plain(inputs), target).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    recorder = Recorder()
    choices = {"batch_size": 4, "accumulation": 4, "clip": 0.05, "report": recorder}
    fitted(ours, (inputs, target), optimizer=sgd(ours, lr=1.0), **choices)
    assert_same_weights(ours, plain, rtol=1e-12, atol=1e-14)
    assert recorder.named("Progress")[-1].grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert float(norm) > 0.05


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_and_scaler_are_those_of_the_plain_loop(precision, fused):
    loader = DataLoader(TensorDataset(*samples()), batch_size=7)
    ours, plain = network(), network()
    optimizer = trainopt.AdamW(plain.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    for _ in range(2):
        for inputs, target in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", getattr(torch, precision)):
                loss = nn.functional.cross_entropy(plain(inputs), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.2)
            scaler.step(optimizer)
            scaler.update()
    mine = trainopt.AdamW(ours.parameters(), lr=0.01, fused=fused)
    fit(ours, loader, nn.CrossEntropyLoss(), mine, epochs=2, clip=0.2, precision=precision, report=Silent())
    assert_same_weights(ours, plain, rtol=1e-5, atol=1e-6)


def test_any_optimizer_of_torch():
    for make in (torch.optim.RMSprop, torch.optim.Adagrad, trainopt.Adam):
        model = network()
        assert fitted(model, optimizer=make(model.parameters())).step == 4 and not torch.equal(
            model[0].weight, network()[0].weight
        )


@pytest.mark.parametrize("choices", [{}, {"clip": 0.1}, {"average": 0.9}], ids=str)
@pytest.mark.parametrize("optimizer", [trainopt.AdamW, torch.optim.AdamW])
def test_complex_parameters_are_trained_and_looked_at(optimizer, choices):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(5, 3, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.weight).abs()

    model, (inputs, classes) = Network(), samples()
    assert fitted(model, (inputs, classes), None, optimizer(model.parameters()), **choices).step == 4
    inputs[3] = math.nan
    before = model.weight.clone()
    result = fitted(model, (inputs, classes), None, optimizer(model.parameters()), batch_size="full", **choices)
    assert result.step == 0 and result.suspects is not None and torch.equal(model.weight, before)


# What is counted, shown and stepped ---------------------------------------------------------------------------------


def test_the_unit_is_one_update():
    model = network()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    recorder = Recorder()
    arguments = {"epochs": 2, "batch_size": 4, "accumulation": 4, "log_every": 1, "schedule": schedule}
    result = fit(model, samples(), nn.CrossEntropyLoss(), optimizer, report=recorder, **arguments)
    assert result.step == schedule.last_epoch == 4 and result.epoch == 2
    assert [event.lr for event in recorder.named("Progress")] == [0.1 / k for k in (1, 2, 3, 4)]
    assert [event.step for event in recorder.named("Progress")] == [1, 2, 3, 4]
    assert recorder.named("Started")[0].total_steps == 4
    assert recorder.named("Finished")[0].samples == 56


def test_validation_is_the_mean_over_all_and_leaves_no_trace():
    inputs, target = samples(27)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # a layer the person froze
    recorder = Recorder()
    accuracy = {"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()}
    still = {"optimizer": sgd(model, lr=0.0), "batch_size": 8, "seed": 0}
    torch.manual_seed(3)
    fitted(model, validation=(inputs, target), report=recorder, metrics=accuracy, **still)
    after = torch.rand(1)
    assert model.training and not model[1].training
    shown = recorder.named("Validated")[-1]
    model.eval()
    assert shown.loss == pytest.approx(nn.functional.cross_entropy(model(inputs), target).item(), rel=1e-5)
    assert shown.metrics["accuracy"] == pytest.approx((model(inputs).argmax(1) == target).float().mean().item())
    model.train()
    model[1].eval()
    torch.manual_seed(3)
    fitted(model, **still)
    assert torch.equal(torch.rand(1), after)


def test_early_stopping_brings_back_the_best_weights():
    model = network()
    inputs, target = samples()
    best = []

    class Watching(Recorder):
        def validated(self, event):
            super().validated(event)
            if event.is_best:
                best[:] = [param.detach().clone() for param in model.parameters()]

    recorder = Watching()
    choices = {
        "epochs": 50,
        "early_stopping": 3,
        "validation": (inputs, (target + 1) % 3),
        "report": recorder,
        "seed": 0,
    }
    result = fitted(model, optimizer=sgd(model, lr=2.0), **choices)
    assert result.reason == "early stopping"
    losses = [event.loss for event in recorder.named("Validated")]
    assert result.best == min(losses) and len(losses) == losses.index(min(losses)) + 1 + 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), best, strict=True))


def test_what_is_monitored_can_be_a_metric_that_grows():
    model = network()
    metrics = {"score": lambda output, target: output.mean() * 0 + next(scores)}
    scores = iter([1.0, 3.0, 2.0, 2.5, 0.0])
    choices = {"epochs": 50, "batch_size": "full", "early_stopping": 3, "monitor": "score", "maximize": True}
    result = fitted(model, validation=samples(), metrics=metrics, **choices)
    assert (result.best, result.best_step, result.step) == (3.0, 2, 5)


def test_batches_of_any_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    batches = [{"a": torch.randn(4, 5), "b": torch.randn(4, 5), "label": torch.randint(0, 3, (4,))} for _ in range(3)]
    for split in (
        lambda batch: ({"a": batch["a"], "b": batch["b"]}, batch["label"]),
        lambda batch: ((batch["a"], batch["b"]), batch["label"]),
    ):
        model = Two()
        assert fit(model, batches, nn.CrossEntropyLoss(), sgd(model), epochs=2, split=split, report=Silent()).step == 6
    with pytest.raises(ValueError, match=r"a batch is a dict, not \(inputs, target\): give split="):
        fit(model, batches, nn.CrossEntropyLoss(), sgd(model), epochs=1, report=Silent())


def test_plain_lines(capsys):
    model = network()
    fit(model, samples(), nn.CrossEntropyLoss(), sgd(model), epochs=2, batch_size=7, log_every=4, validation=samples())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training Sequential (66 parameters) with SGD on cpu"
    assert sum("validation loss" in line for line in lines) == 2 and lines[-1].startswith("finished after step 8")
    assert "\x1b" not in "".join(lines)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"accumulation": 0}, "accumulation is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 3}, "epochs is 1, steps is 3"),
        ({"batch_size": 29}, "batch_size is 29, but data has only 28 samples"),
        ({"batch_size": "half"}, "batch_size is 'half'; it must be a whole number of at least 1 or \"full\""),
        ({"batch_size": None}, "batch_size is None"),
        ({"clip": 0.0}, r"clip is 0\.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"average": 1.0}, r"average is 1\.0"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"nonfinite": "hope"}, "nonfinite is 'hope'"),
        ({"keep": True}, "keep is True"),
        ({"seed": -1}, "seed is -1"),
        ({"acumulation": 2}, "no option 'acumulation'; is it 'accumulation'"),
        ({"lr": 1}, "no option 'lr': it is the optimizer's"),
        ({"learning_rate": 1}, ": it is the optimizer's"),
        ({"weight_decay": 1}, ": it is the optimizer's"),
        ({"max_epochs": 1}, r"; is it 'epochs'\?"),
        ({"gradient_accumulation_steps": 1}, r"; is it 'accumulation'\?"),
        ({"max_grad_norm": 1}, r"; is it 'clip'\?"),
        ({"ema": 1}, r"; is it 'average'\?"),
        ({"patience": 1}, r"; is it 'early_stopping'\?"),
        ({"zzz": 1}, "there is no option 'zzz'$"),
        ({"early_stopping": 2}, "early_stopping is 2, but there is no validation"),
        ({"monitor": "f1"}, "monitor is 'f1'"),
        ({"shuffle": 1}, "shuffle is 1"),
        ({"state_dtype": "float64"}, "state_dtype is 'float64'; it must be one of 'float32', 'bfloat16', 'float16'"),
        ({"step_in_backward": True, "clip": 2.0}, "step_in_backward is True, but clip is 2.0: the norm of all"),
        ({"step_in_backward": True, "accumulation": 2}, "step_in_backward is True, but accumulation is 2: the first"),
        ({"step_in_backward": True, "precision": "float16"}, "but precision is 'float16': .* GradScaler's scale"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_written(choice, text, tmp_path):
    model = network()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=text):
        fitted(model, **{"epochs": 1, "directory": tmp_path / "run", **choice})
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("field", dataclasses.fields(Options), ids=lambda field: field.name)
def test_every_option_is_checked_by_its_field(field):
    """Also what no table above thinks of; None only where it is the default."""
    length = {} if field.name in ("epochs", "steps") else {"epochs": 1}
    for value in [object(), math.nan, *([] if field.default is None else [None])]:
        with pytest.raises(ValueError, match=f"^{field.name} is {re.escape(repr(value))}; it must be "):
            Options(**length, **{field.name: value})


def test_objects_that_do_not_go_together_are_refused():
    model, other = network(), network()
    loss = nn.CrossEntropyLoss()
    empty = TensorDataset(*samples())

    def refuses(text, data=empty, loss=loss, optimizer=None, kind=ValueError, **choices):
        with pytest.raises(kind, match=text):
            fit(model, data, loss, optimizer or sgd(model), epochs=1, report=Silent(), **choices)

    refuses("data is empty", DataLoader(TensorDataset(*(tensor[:0] for tensor in samples())), batch_size=4))
    refuses("batch_size=40, drop_last=True, over 28", DataLoader(empty, batch_size=40, drop_last=True))
    refuses("batch_size is 4, but data is a DataLoader", DataLoader(empty), batch_size=4)
    refuses("data is a generator, which can be gone through only once", (x for x in ()), kind=TypeError)
    refuses("data is a int", 3, kind=TypeError)
    refuses("different lengths: 28, 27", (samples()[0], samples()[1][:-1]), batch_size=4)
    refuses("data is empty", [])
    refuses("reduction 'sum'", DataLoader(empty), nn.CrossEntropyLoss(reduction="sum"))
    refuses("optimizer has no parameter of model", DataLoader(empty), optimizer=sgd(other))
    refuses("LBFGS", DataLoader(empty), optimizer=torch.optim.LBFGS(model.parameters()))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd(model))
    refuses("ReduceLROnPlateau", DataLoader(empty), schedule=plateau)
    refuses("schedule is a int", DataLoader(empty), schedule=3, kind=TypeError)
    with pytest.raises(ValueError, match="not both"):
        fit(model, DataLoader(empty), loss, sgd(model), Options(epochs=1), clip=1.0)


def test_every_target_ignored_is_said():
    class Nothing:
        def __iter__(self):
            return iter(())

    model, (inputs, target) = network(), samples()
    for data, choices in ((Nothing(), {"batch_size": None}), ((inputs, target.fill_(-100)), {})):
        with pytest.raises(ValueError, match="nothing that the loss counts"):
            fitted(model, data, steps=3, **choices)
