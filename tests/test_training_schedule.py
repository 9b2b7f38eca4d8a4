"""Schedules that count updates, epochs or validations, and optimizers with modes."""

import pytest
import torch
from test_training_loop import Recorder, network, samples, sgd
from torch import nn
from torch.optim import lr_scheduler
from training_runs import Stopping, assert_same

import trainopt
from trainopt.training import Silent, fit, lr_find

pytestmark = pytest.mark.usefixtures("one_thread")


PER_EPOCH = 4


def trained(schedule_of, epochs=4, directory=None, stop_at=-1, **choices):
    model = network()
    optimizer = sgd(model, lr=1.0)
    schedule = None if schedule_of is None else schedule_of(optimizer)
    choices = {"batch_size": 7, "log_every": 1, "seed": 0, "epochs": epochs, "directory": directory, **choices}
    recorder = choices.setdefault("report", Recorder())
    loss = Stopping(nn.CrossEntropyLoss(), stop_at)
    result = fit(model, samples(), loss, optimizer, schedule=schedule, count=len, **choices)
    rates = [event.lr for event in recorder.named("Progress")]
    return model, schedule, rates, result


def each(rates):
    """Of every update, from one rate an epoch."""
    return [rate for rate in rates for _ in range(PER_EPOCH)]


@pytest.mark.parametrize("unit", ["update", "epoch", "validation", None])
def test_the_unit_of_a_schedule(unit):
    def make(optimizer):
        return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    _, schedule, rates, _ = trained(make, schedule_every=unit, validation=samples(), validate_every=2)
    halvings = {"update": range(16), None: range(16), "epoch": each(range(4))}
    halvings["validation"] = [i // 2 for i in range(16)]
    assert rates == [0.5**k for k in halvings[unit]]
    assert schedule.last_epoch == {"update": 16, None: 16, "epoch": 4, "validation": 8}[unit]


def test_a_cycle_of_epochs_ends_with_the_run():
    def make(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)

    _, _, rates, _ = trained(make, epochs=5, schedule_every="epoch")
    assert len(set(rates)) == 5 and rates[-1] < 1e-4


class Falling:
    """Validation losses as they are told."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, output, target):
        return torch.tensor(self.values.pop(0))


@pytest.mark.parametrize("unit", [None, "validation", "epoch"])
def test_a_plateau_is_given_what_is_monitored(unit):
    given = []

    class Plateau(lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics):
            given.append(metrics)
            super().step(metrics)

    def make(optimizer):
        return Plateau(optimizer, mode="max", factor=0.1, patience=0)

    scores = [0.1, 0.5, 0.4, 0.6]
    metrics = {"accuracy": Falling(*scores)}
    choices = {"validation": [samples()], "metrics": metrics, "monitor": "accuracy"}
    _, _, rates, result = trained(make, schedule_every=unit, **choices)
    assert given == pytest.approx(scores) and rates == pytest.approx(each([1, 1, 1, 0.1]))
    assert result.best == pytest.approx(0.6) and result.best_step == 16


def test_a_plateau_is_given_the_validation_loss():
    given = []

    class Plateau(lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics):
            given.append(metrics)

    report = Recorder()
    trained(Plateau, validation=samples(), report=report)
    assert given == [event.loss for event in report.named("Validated")] and len(given) == 4


@pytest.mark.parametrize(
    ("make", "choices", "text"),
    [
        (lr_scheduler.ReduceLROnPlateau, {}, "ReduceLROnPlateau, which needs the value of a validation, but there is"),
        (
            lr_scheduler.ReduceLROnPlateau,
            {"schedule_every": "update", "validation": samples()},
            "schedule_every is 'update', but schedule is ReduceLROnPlateau",
        ),
        (
            lambda optimizer: lr_scheduler.StepLR(optimizer, 1),
            {"schedule_every": "validation"},
            "schedule_every is 'validation', but there is no validation data",
        ),
        (lambda optimizer: lr_scheduler.StepLR(optimizer, 1), {"schedule_every": "step"}, "schedule_every is 'step'"),
        (None, {"schedule_every": "epoch"}, "schedule_every is 'epoch', but there is no schedule"),
    ],
)
def test_a_unit_that_cannot_be_counted_is_refused(make, choices, text):
    with pytest.raises(ValueError, match=text):
        trained(make, **choices)


def test_a_schedule_that_asks_for_something_else_is_refused():
    class Odd:
        def step(self, temperature):
            pass

        def state_dict(self):
            return {}

        load_state_dict = step

    with pytest.raises(TypeError, match="schedule is a Odd, whose step asks for temperature"):
        trained(lambda optimizer: Odd())


def test_a_schedule_may_ask_for_the_epoch():
    class Counting:
        """As timm's schedulers do."""

        def __init__(self):
            self.epochs = []

        def step(self, epoch, metric=None):
            self.epochs.append(epoch)

        def state_dict(self):
            return {"epochs": self.epochs}

        def load_state_dict(self, state):
            self.epochs = state["epochs"]

    _, schedule, _, _ = trained(lambda optimizer: Counting())
    assert schedule.epochs == [1, 2, 3, 4]


@pytest.mark.parametrize("unit", ["epoch", "validation"])
@pytest.mark.parametrize("stop_at", [1, 4, 5, 9, 13])
def test_a_run_that_was_stopped_goes_on_with_its_schedule(unit, stop_at, tmp_path):
    def make(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.05)

    choices = {"schedule_every": unit, "validation": samples(), "accumulation": 2}
    straight, schedule, _, _ = trained(make, **choices)
    trained(make, directory=tmp_path, stop_at=stop_at, **choices)
    model, again, _, result = trained(make, directory=tmp_path, **choices)
    assert result.reason == "finished" and again.state_dict() == schedule.state_dict()
    assert_same(dict(model.state_dict()), dict(straight.state_dict()))


# Optimizers with modes ------------------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682): the gradient is taken at y, the result is x.

    In training mode the parameters are y = (1 - beta) z + beta x, in evaluation mode x. It refuses what its authors'
    own refuses, and rounds as that does: from y to x and back is not the identity.
    """

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"], group["beta"] = False, beta

    @torch.no_grad()
    def _turn(self, is_training):
        for group in self.param_groups:
            if group["train_mode"] != is_training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"].to(p), 1 - (group["beta"] if is_training else 1 / group["beta"]))
                group["train_mode"] = is_training

    def train(self):
        self._turn(True)

    def eval(self):
        self._turn(False)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"], "not in train mode"
        for group in self.param_groups:
            beta = group["beta"]
            for p in group["params"]:
                state = self.state[p]
                if "z" not in state:
                    state["z"], state["t"] = p.clone(), torch.zeros(())
                state["t"] += 1
                x = (p - (1 - beta) * state["z"]) / beta
                state["z"] -= group["lr"] * p.grad
                x.lerp_(state["z"], 1 / float(state["t"]))
                p.copy_(x).lerp_(state["z"], 1 - beta)


def modal(directory=None, stop_at=-1, optimizer_of=ScheduleFree, epochs=3, **choices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = optimizer_of(model.parameters())
    loss = Stopping(nn.CrossEntropyLoss(), stop_at)
    choices = {"batch_size": 7, "seed": 0, "epochs": epochs, "directory": directory, **choices}
    report = Recorder()
    result = fit(model, samples(), loss, optimizer, validation=samples(), report=report, count=len, **choices)
    return model, optimizer, report, result


def plain_modal(optimizer_of, evaluations):
    """The same in a plain loop: the weights at the end, and those to be used after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = optimizer_of(model.parameters())
    inputs, target = samples()
    optimizer.train()
    used = []
    for _ in range(evaluations):
        for index in range(4):
            part = slice(7 * index, 7 * index + 7)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
        kept = [param.detach().clone() for param in model.parameters()]
        optimizer.eval()
        used.append([param.detach().clone() for param in model.parameters()])
        optimizer.train()
        with torch.no_grad():
            for param, value in zip(model.parameters(), kept, strict=True):
                param.copy_(value)
    return used


def test_validation_checkpoints_and_the_end_have_the_weights_to_be_used(tmp_path):
    seen = []

    class Watching(Silent):
        def validated(self, event):
            saved = torch.load(tmp_path / "best.pt", weights_only=True)["model"] if event.is_best else None
            seen.append((event.loss, saved))

    used = plain_modal(ScheduleFree, 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = ScheduleFree(model.parameters())
    choices = {"batch_size": 7, "shuffle": False, "epochs": 3, "directory": tmp_path, "report": Watching(), "keep": 9}
    fit(model, samples(), nn.CrossEntropyLoss(), optimizer, validation=samples(), **choices)
    names = list(model.state_dict())
    for index, (weights, (loss, best)) in enumerate(zip(used, seen, strict=True), 1):
        state = dict(zip(names, weights, strict=True))
        expected = nn.functional.cross_entropy(model_output(model, state), samples()[1]).item()
        assert loss == pytest.approx(expected, rel=1e-5)
        saved = torch.load(tmp_path / "checkpoints" / f"step-{4 * index:09}.pt", weights_only=True)["model"]
        for name in names:
            torch.testing.assert_close(saved[name], state[name])
            if best is not None:
                torch.testing.assert_close(best[name], state[name])
    for param, value in zip(model.parameters(), used[-1], strict=True):
        torch.testing.assert_close(param.detach(), value)
    assert not optimizer.param_groups[0]["train_mode"]


def model_output(model, state):
    return torch.func.functional_call(model, state, samples()[0])


def test_neither_validating_nor_saving_has_a_part_in_what_is_trained(tmp_path):
    quiet, *_ = modal(validate_every=1000)
    busy, *_ = modal(tmp_path, validate_every=1, average=0.9, checkpoint_every=1)
    assert_same(dict(quiet.state_dict()), dict(busy.state_dict()))


@pytest.mark.parametrize("stop_at", [1, 3, 6, 11])
def test_a_run_with_modes_goes_on_to_the_same_bits(stop_at, tmp_path):
    straight, optimizer, _, expected = modal(tmp_path / "a", accumulation=2, average=0.5)
    modal(tmp_path / "b", stop_at, accumulation=2, average=0.5)
    model, again, _, result = modal(tmp_path / "b", accumulation=2, average=0.5)
    assert_same(dict(model.state_dict()), dict(straight.state_dict()))
    assert_same(again.state_dict()["state"], optimizer.state_dict()["state"])
    assert_same(result.average, expected.average)


def test_the_best_weights_are_brought_back_as_they_are_to_be_used():
    seen = []

    class Watching(Recorder):
        def validated(self, event):
            super().validated(event)
            seen.append(event.loss)

    torch.manual_seed(0)
    model = network()
    optimizer = ScheduleFree(model.parameters(), lr=20.0)
    choices = {"epochs": 9, "batch_size": 7, "early_stopping": 3, "report": Watching(), "seed": 0}
    result = fit(model, samples(), nn.CrossEntropyLoss(), optimizer, validation=samples(), **choices)
    loss = nn.functional.cross_entropy(model(samples()[0]), samples()[1]).item()
    assert loss == pytest.approx(min(seen), rel=1e-5) == pytest.approx(result.best, rel=1e-5)


def test_the_range_test_trains_in_training_mode():
    model = network()
    optimizer = ScheduleFree(model.parameters())
    assert len(lr_find(model, samples(), nn.CrossEntropyLoss(), optimizer, steps=10, batch_size=7).rates) > 2
    assert not optimizer.param_groups[0]["train_mode"] and not optimizer.state


def test_the_authors_own_schedule_free_optimizer(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")

    def make(params):
        return schedulefree.AdamWScheduleFree(params, lr=0.05, warmup_steps=2)

    straight, *_ = modal(optimizer_of=make)
    modal(tmp_path, 5, make)
    model, *_ = modal(tmp_path, -1, make)
    assert_same(dict(model.state_dict()), dict(straight.state_dict()))


@pytest.mark.parametrize("choices", [{}, {"step_in_backward": True}, {"state_dtype": "8bit", "average": 0.9}], ids=str)
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_our_schedule_free_optimizers_train(name, choices, tmp_path):
    """A run that was stopped comes to the bits of one that was not, which neither validated nor saved."""

    def make(params):
        return getattr(trainopt, name)(params, lr=0.05)

    straight, optimizer, *_ = modal(optimizer_of=make, validate_every=1000, **choices)
    modal(tmp_path, 5, make, **choices)
    model, *_ = modal(tmp_path, -1, make, **choices)
    assert_same(dict(model.state_dict()), dict(straight.state_dict()))
    assert not optimizer.param_groups[0]["train_mode"] and optimizer.param_groups[0]["k"] == 12


def test_our_other_optimizers_have_no_modes():
    from trainopt.training.average import Modes

    assert not Modes(trainopt.AdamW(network().parameters())).exist
