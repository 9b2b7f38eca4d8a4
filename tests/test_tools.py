"""The tools round the optimizers: explain, nonfinite_report, init_state and fuse."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from helpers import (
    CLASSES,
    NAMES,
    OPTIONS,
    TABLE,
    WITH_FUSED,
    Twins,
    assert_same_bits,
    assert_same_outcome,
    each_class,
    model_and,
    skip_where_torchs_differ,
    skip_without_fused,
    skip_without_momentum,
    snapshot,
    train,
)

import trainopt
from trainopt._extension import _C
from trainopt.optim.explain import _reason

# explain --------------------------------------------------------------------------------------------------------------


class Mine(torch.Tensor):
    pass


def exotic():
    memory = torch.zeros(10)
    sparse = torch.nn.Parameter(torch.zeros(4, 5))
    sparse.grad = torch.ones(4, 5).to_sparse()
    strided = torch.nn.Parameter(torch.zeros(4, 10)[:, ::2])
    return {
        "subclass": ([torch.nn.Parameter(torch.zeros(3).as_subclass(Mine))], "subclass"),
        "complex": ([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))], "float32"),
        "meta": ([torch.nn.Parameter(torch.zeros(3, device="meta"))], "a device that there are kernels for"),
        "sparse gradient": ([sparse], "sparse"),
        "strided": ([strided], "memory"),
        "shared": ([torch.nn.Parameter(memory[:7]), torch.nn.Parameter(memory[3:])], "shares"),
    }


@each_class
@pytest.mark.parametrize("kind", exotic())
def test_explain_tells_path_and_reason(name, kind):
    odd, reason = exotic()[kind]
    ordinary = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))]
    optimizer = CLASSES[name][0]([ordinary[0], *odd, ordinary[1]])
    for p in odd[1:] and odd:  # that memory is shared shows where it is written
        p.grad = torch.ones_like(p)
    found = trainopt.explain(optimizer)
    assert [row.path for row in found] == [f"fused (cpu, {_C.cpu_variant()})", *["torch"] * len(odd), found[0].path]
    assert all(reason in row.reason for row in found[1:-1]) and found[0].reason == found[-1].reason == ""
    assert found[-1].parameter == "bfloat16 (2, 2) on cpu"
    assert reason in str(found) and "fused" in str(found)


def test_explain_says_of_cuda_tensors_that_there_are_no_kernels_for_them(monkeypatch):
    monkeypatch.setattr("trainopt._build.CUDA", None)
    monkeypatch.setattr("trainopt._build.CUDA_REASON", "no nvcc was found")
    said = "not a plain dense tensor"
    assert _reason(said, torch.device("cuda")) == "trainopt was built without CUDA kernels: no nvcc was found"
    assert _reason(said, torch.device("meta")) == said and _reason("", torch.device("cuda")) == ""
    monkeypatch.setattr("trainopt._build.CUDA", "13.0")
    assert _reason(said, torch.device("cuda")) == said


@each_class
def test_explain_of_differentiable_and_reference(name, monkeypatch):
    p = torch.nn.Parameter(torch.zeros(3))
    ours = CLASSES[name][0]
    if "differentiable" in TABLE[name].defaults:
        assert "differentiable" in trainopt.explain(ours([p], differentiable=True))[0].reason
    optimizer = ours([p])
    assert trainopt.explain(optimizer)[0].path.startswith("fused")
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    (row,) = trainopt.explain(ours([p]))
    assert row.path == "torch" and "TRAINOPT_REFERENCE" in row.reason
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", False)
    assert trainopt.explain(ours([p]))[0].path.startswith("fused")


@each_class
def test_explain_names_the_parameters(name):
    model = torch.nn.Linear(3, 2)
    named = trainopt.explain(CLASSES[name][0](model.named_parameters()))
    assert [row.name for row in named] == ["'weight'", "'bias'"]
    unnamed = trainopt.explain(CLASSES[name][0]([{"params": [model.weight]}, {"params": [model.bias]}]))
    assert [row.name for row in unnamed] == ["parameter 0 of group 0", "parameter 0 of group 1"]


@each_class
def test_explain_changes_nothing_and_takes_other_optimizers(name):
    twins = Twins(name)
    twins.step(2)
    before = snapshot(twins.ours.optimizer)
    versions = [p._version for p in twins.ours.params]
    trainopt.explain(twins.ours.optimizer)
    assert_same_bits(before, snapshot(twins.ours.optimizer))
    assert [p._version for p in twins.ours.params] == versions
    theirs = trainopt.explain(twins.torchs.optimizer)
    assert len(theirs) == len(twins.torchs.params) and all(row.path == "torch" for row in theirs)
    twins.step(2)
    fresh = Twins(name)
    before = snapshot(fresh.ours.optimizer)
    trainopt.explain(fresh.ours.optimizer)
    assert_same_bits(before, snapshot(fresh.ours.optimizer))
    assert bool(fresh.ours.optimizer.state) == TABLE[name].eager_states


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_explain_says_below_what_a_second_moment_underflows(name, beta2):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = CLASSES[name][0]([p], lr=1e-3, betas=(0.9, beta2), amsgrad=True)
        [row] = trainopt.explain(optimizer)
        assert ("float16" in row.note) == (dtype is torch.float16)
        assert row.note in str(row) and row.note in str(trainopt.explain(optimizer))
    # What it says is what happens: just above, something is left; just below, nothing.
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = CLASSES[name][0]([p], betas=(0.9, beta2))
    least = float(re.search(r"below (\S+) leave nothing", trainopt.explain(optimizer)[0].note)[1])
    p.grad = torch.tensor([0.98 * least, 1.02 * least, -0.98 * least, -1.02 * least], dtype=torch.float16)
    optimizer.step()
    assert (optimizer.state[p]["exp_avg_sq"] != 0).tolist() == [False, True, False, True]


def test_explain_says_it_of_states_too():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = trainopt.AdamW([p])
    p.grad = torch.ones(4)
    optimizer.step()
    assert not trainopt.explain(optimizer)[0].note
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].half()
    assert "float16" in trainopt.explain(optimizer)[0].note
    assert not trainopt.explain(trainopt.SGD([torch.nn.Parameter(torch.ones(4).half())], momentum=0.9))[0].note


# nonfinite_report -----------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("named", [False, True])
def test_nonfinite_report(name, named):
    torch.manual_seed(0)
    params = {"embed": torch.nn.Parameter(torch.randn(4, 5)), "head": torch.nn.Parameter(torch.randn(3))}
    last = torch.nn.Parameter(torch.randn(2))
    group = list(params.items()) if named else list(params.values())
    other = [("last", last)] if named else [last]
    optimizer = CLASSES[name][0]([{"params": group}, {"params": other}], **OPTIONS[name])
    for _ in range(2):
        for p in (*params.values(), last):
            p.grad = torch.randn_like(p)
        optimizer.step()
    report = optimizer.nonfinite_report()
    assert not report and len(report) == 0 and "finite" in str(report)

    nan, inf = float("nan"), float("inf")
    params["embed"].grad[1, 2:] = nan
    params["embed"].grad[0, 0] = -inf
    params["embed"].grad[3, 1] = inf
    key = optimizer._states_needed(optimizer.param_groups[0], params["head"])[0]
    optimizer.state[params["head"]][key][1] = nan
    with torch.no_grad():
        last[0] = inf
    before = snapshot(optimizer)
    report = optimizer.nonfinite_report()
    embed, head, final = ("'embed'", "'head'", "'last'") if named else (
        "parameter 0 of group 0", "parameter 1 of group 0", "parameter 0 of group 1"
    )  # fmt: skip
    found = [(r.parameter, r.group, r.tensor, r.nan, r.inf, r.numel) for r in report]
    assert found == [(embed, 0, "gradient", 3, 2, 20), (head, 0, key, 1, 0, 3), (final, 1, "value", 0, 1, 2)]
    assert {r.step for r in report} == {None if name == "SGD" else 2}
    assert len(str(report).splitlines()) == 3 and "3 NaN and 2 Inf of 20" in str(report)
    assert_same_bits(before, snapshot(optimizer))


@each_class
def test_nonfinite_report_of_a_step_that_brings_them(name):
    twins = Twins(name)
    twins.step()
    twins.set_gradients()
    twins.ours.params[2].grad[3, 4] = float("nan")
    twins.ours.optimizer.step()
    found = {(r.tensor, r.nan) for r in twins.ours.optimizer.nonfinite_report()}
    if TABLE[name].hides_nan:
        assert found == {("gradient", 1), ("prev", 1)}
        return
    if name == "Adafactor":  # the mean of the rows is in every element's step
        assert found == {("gradient", 1), ("row_var", 1), ("col_var", 1), ("value", 33 * 20)}
        return
    assert ("gradient", 1) in found and ("value", 1) in found and len(found) == 2 + len(CLASSES[name][0]._states)


def test_nonfinite_report_of_other_kinds():
    sparse = torch.nn.Parameter(torch.zeros(4, 5))
    sparse.grad = torch.sparse_coo_tensor([[1]], torch.full((1, 5), float("nan")), (4, 5), check_invariants=True)
    compound = torch.nn.Parameter(torch.tensor([1 + 1j, complex(float("nan"), 0), complex(0, float("inf"))]))
    plain = torch.nn.Parameter(torch.ones(3))
    found = trainopt.SGD([sparse, compound, plain]).nonfinite_report()
    assert [(r.tensor, r.nan, r.inf) for r in found] == [("gradient", 5, 0), ("value", 1, 1)]


# init_state -----------------------------------------------------------------------------------------------------------

STARTS = {
    "SGD": [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, {"lr": 0.1}],
    "Adam": [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True}],
}
STARTS = [(name, options) for name in NAMES for options in STARTS.get(name, [OPTIONS[name]])]
EXTRAS = [{}, {"noise": 0.25}]


@pytest.mark.parametrize("name, options", STARTS, ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("saved", [False, True], ids=["", "through a state dict"])
def test_init_state(name, options, extras, saved):
    fresh_model, fresh = model_and(CLASSES[name][0], **options, **extras)
    model, optimizer = model_and(CLASSES[name][0], **options, **extras)
    model[2].bias.requires_grad_(False)
    optimizer.init_state()
    states = [optimizer.state.get(p, {}) for p in model.parameters()]
    model[2].bias.requires_grad_(True)
    assert bool(states[-1]) == TABLE[name].eager_states
    for p, state in zip(list(model.parameters())[:-1], states, strict=False):
        first = optimizer._states_needed(optimizer.param_groups[0], p)[:2]
        always = {"SGD": (), "RMSprop": ("square_avg",)}.get(name, first)
        by_option = {"momentum_buffer": "momentum", "grad_avg": "centered", "max_exp_avg_sq": "amsgrad"}
        needed = {*always, *(key for key, option in by_option.items() if options.get(option))}
        numbers = CLASSES[name][0]._numbers
        assert set(state) - {"step"} == {*needed, *numbers}
        begin = fresh._begin_at(fresh.defaults)
        assert all(
            state[k].shape == optimizer._shape_of(k, p) and (state[k] == begin.get(k, 0.0)).all() for k in needed
        )
        assert all(state[k].shape == () and state[k] == torch.tensor(begin.get(k, 0.0)) for k in numbers)
        assert float(state.get("step", 0)) == 0 and (name == "SGD" or "step" in state)
    optimizer.init_state()
    if saved:
        other_model, other = model_and(CLASSES[name][0], **options, **extras)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        model, optimizer = other_model, other
    train(model, optimizer, 4)
    train(fresh_model, fresh, 4)
    slack = 1e-6 if saved and CLASSES[name][0]._numbers else 0  # of numbers that float64 parameters make float64
    for p, q in zip(model.parameters(), fresh_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=slack, atol=slack)
        for key, value in fresh.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key].to(value.dtype), value, rtol=slack, atol=slack)


@pytest.mark.parametrize("name, options", STARTS, ids=str)
def test_init_state_leaves_a_run_alone(name, options):
    model, optimizer = model_and(CLASSES[name][0], **options)
    train(model, optimizer, 2)
    before = snapshot(optimizer)
    optimizer.init_state()
    after = snapshot(optimizer)
    if name != "SGD" or options.get("momentum"):
        assert_same_bits(before, after)
    straight_model, straight = model_and(CLASSES[name][1], **options)
    train(model, optimizer, 2, start=2)
    train(straight_model, straight, 4)
    for p, q in zip(model.parameters(), straight_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, options", STARTS, ids=str)
def test_a_step_with_lr_0_in_a_run_is_torchs(name, options):
    """In the middle of a run it counts, as with torch: nobody made it to have states."""
    twins = Twins(name, **options)
    twins.step(2)
    twins.edit(lambda o, params: [setattr(p, "grad", torch.zeros_like(p)) for p in params])
    twins.edit(lambda o, _: o.param_groups[0].update(lr=0.0))
    twins.edit(lambda o, _: o.step())
    twins.compare()
    twins.edit(lambda o, _: o.param_groups[0].update(lr=0.1))
    twins.step(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("path", ["engine", "torch"])
def test_rprop_begins_at_the_learning_rate_of_its_first_step(dtype, path, monkeypatch):
    """Whatever it was when the states were made; but steps that somebody has put there count, as in torch."""
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path == "torch")
    ends = []
    for begin in ("late", "early", "given"):
        p = torch.nn.Parameter(torch.zeros(5, dtype=dtype))
        optimizer = trainopt.Rprop([p], lr=0.5)
        if begin != "late":
            optimizer.init_state()
        if begin == "given":
            optimizer.state[p]["step_size"].fill_(0.125)
        optimizer.param_groups[0]["lr"] = 0.25
        p.grad = torch.ones_like(p)
        optimizer.step()
        ends.append((p.real if dtype.is_complex else p).tolist())
    assert ends == [[-0.25] * 5, [-0.25] * 5, [-0.125] * 5]


# fuse -----------------------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("before", [0, 3])
def test_fuse_carries_on(name, flags, before):
    skip_without_fused(name, flags)
    if before:
        skip_where_torchs_differ(name, flags)
    model, optimizer = model_and(CLASSES[name][1], **OPTIONS[name], **flags)
    train(model, optimizer, before)
    fused = trainopt.fuse(optimizer)
    assert type(fused) is CLASSES[name][0]
    assert fused.param_groups is optimizer.param_groups and fused.state is optimizer.state
    train(model, fused, 3, start=before)
    straight_model, straight = model_and(CLASSES[name][1], **OPTIONS[name])
    train(straight_model, straight, before + 3)
    assert_same_outcome((fused, list(model.parameters())), (straight, list(straight_model.parameters())))
    assert all(row.path.startswith("fused") for row in trainopt.explain(fused))
    assert fused.state_dict()["state"].keys() == straight.state_dict()["state"].keys()
    # The same groups: what changes them through the old one arrives.
    optimizer.param_groups[0].update(TABLE[name].still)
    train(model, fused, 1)  # ASGD's step size is that of the step before
    values = [p.detach().clone() for p in model.parameters()]
    train(model, fused, 1)
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    copied = copy.deepcopy(fused)
    assert type(copied) is CLASSES[name][0]
    group = {"params": [torch.nn.Parameter(torch.zeros(3))]}
    fused.add_param_group(group)
    assert "l1: 0.0" in repr(fused) and len(optimizer.param_groups) == 2


def assert_fused_alike(program):
    """A program that makes (optimizer, params) and turns one into trainopt's on the way ends as if it did not."""
    ends = [program(turn) for turn in (trainopt.fuse, lambda optimizer: optimizer)]
    assert_same_outcome(*ends)
    return ends


@each_class
def test_fuse_keeps_hooks(name):
    _, optimizer = model_and(CLASSES[name][1], **OPTIONS[name])
    events = []
    optimizer.register_step_pre_hook(lambda o, a, k: events.append(("pre", type(o))))
    optimizer.register_step_post_hook(lambda o, a, k: events.append(("post", type(o))))
    optimizer.register_state_dict_post_hook(lambda o, d: events.append(("saved", type(o))))
    optimizer.register_load_state_dict_post_hook(lambda o: events.append(("loaded", type(o))))
    fused = trainopt.fuse(optimizer)
    ours = CLASSES[name][0]
    fused.step()
    fused.load_state_dict(fused.state_dict())
    assert events == [("pre", ours), ("post", ours), ("saved", ours), ("loaded", ours)]


@each_class
def test_fuse_keeps_groups_names_and_their_options(name):
    def program(turn):
        p, q = (torch.nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (0.5, -2.0))
        groups = [{"params": [("a", p)], "lr": 0.5}, {"params": [("b", q)], "weight_decay": 0.25, "tag": "mine"}]
        optimizer = turn(CLASSES[name][1](groups, **OPTIONS[name]))
        for i in range(3):
            p.grad, q.grad = torch.full_like(p, i + 1.0), torch.full_like(q, i - 1.0)
            optimizer.step()
        return optimizer, [p, q]

    (fused, _), _ = assert_fused_alike(program)
    assert fused.param_groups[1]["tag"] == "mine" and fused.param_groups[1]["param_names"] == ["b"]


SCHEDULERS = {
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "Schedule": lambda o: trainopt.Schedule(o, lr=trainopt.schedules.linear(8)),
}


@each_class
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("load", ["never", "new", "old", "twice"])
@pytest.mark.filterwarnings("error")
def test_a_scheduler_moves_what_fuse_made_also_after_loading(name, kind, load):
    if kind == "OneCycleLR":
        skip_without_momentum(name)
    rates = []

    def program(turn):
        model, old = model_and(CLASSES[name][1], **OPTIONS[name])
        scheduler = SCHEDULERS[kind](old)
        optimizer = turn(old)
        held = optimizer.param_groups
        rates.append([])
        for i in range(6):
            if (i == 2 and load != "never") or (i == 3 and load == "twice"):
                loaded = old if load == "old" else optimizer
                loaded.load_state_dict(copy.deepcopy(loaded.state_dict()))
            train(model, optimizer, 1, start=i)
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            rates[-1].append(optimizer.param_groups[0]["lr"])
            assert old.param_groups is optimizer.param_groups and old.state is optimizer.state
            assert optimizer is old or optimizer.param_groups is held
        return optimizer, list(model.parameters())

    assert_fused_alike(program)
    assert rates[0] == rates[1] and len(set(rates[0])) > 2


@each_class
def test_the_old_name_of_what_was_fused_is_the_new_optimizer(name):
    """zero_grad, step, state_dict and groups by either name: there is one optimizer."""

    def program(turn):
        model, old = model_and(CLASSES[name][1], **OPTIONS[name])
        new = turn(old)
        train(model, new, 1)
        train(model, old, 1, start=1)
        old.load_state_dict(new.state_dict())
        new.load_state_dict(old.state_dict())
        extra = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        old.add_param_group({"params": [extra]})
        new.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
        extra.grad = torch.ones_like(extra)
        train(model, old, 1, start=2)
        assert len(old.param_groups) == len(new.param_groups) == 3
        old.zero_grad()
        assert extra.grad is None
        if turn is trainopt.fuse:
            assert type(old) is CLASSES[name][0] and new.completed_steps == 3
            again, other = pickle.loads(pickle.dumps((old, new)))
            assert again is other
        return old, [*model.parameters(), extra]

    assert_fused_alike(program)


@each_class
def test_copies_of_a_fused_optimizer_and_its_scheduler_belong_together(name):
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        _, old = model_and(CLASSES[name][1], **OPTIONS[name])
        scheduler = torch.optim.lr_scheduler.LinearLR(old, 0.1, total_iters=5)
        optimizer = trainopt.fuse(old)
        optimizer, scheduler = duplicate((optimizer, scheduler))
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        before = optimizer.param_groups[0]["lr"]
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] > before and type(optimizer) is CLASSES[name][0]


@each_class
def test_fuse_leaves_a_step_that_somebody_else_replaced(name):
    _, optimizer = model_and(CLASSES[name][1], **OPTIONS[name])
    torchs, calls = optimizer.step, []
    optimizer.step = lambda *a, **k: (calls.append(1), torchs(*a, **k))[1]
    with pytest.warns(UserWarning, match="step was replaced"):
        trainopt.fuse(optimizer)
    optimizer.step()
    assert calls == [1]


@each_class
def test_fuse_of_an_optimizer_whose_own_step_was_kept_by_somebody(name):
    """Accelerate puts the bound method back after a step under its scaler."""
    _, optimizer = model_and(CLASSES[name][1], **OPTIONS[name])
    optimizer.step = optimizer.step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainopt.fuse(optimizer)
    optimizer.step()
    assert optimizer.completed_steps == 1


@each_class
def test_who_holds_the_groups_holds_them_after_loading(name):
    model, optimizer = model_and(CLASSES[name][0], **OPTIONS[name])
    groups, group, params = optimizer.param_groups, optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    _, other = model_and(CLASSES[name][1], **{**OPTIONS[name], "lr": 0.25})
    other.param_groups[0]["tag"] = "mine"
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups is groups and groups[0] is group and group["params"] is params
    assert group["lr"] == 0.25 and group["tag"] == "mine" and list(group) == list(other.state_dict()["param_groups"][0])
    group.update(TABLE[name].still)
    values = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))


def test_fuse_takes_the_classes_that_there_are_and_its_own():
    p = [torch.nn.Parameter(torch.zeros(2))]

    class Other(torch.optim.AdamW):
        pass

    for optimizer in (torch.optim.LBFGS(p), Other(p), torch.optim.SparseAdam(p)):
        with pytest.raises(TypeError, match=type(optimizer).__qualname__):
            trainopt.fuse(optimizer)
    with pytest.raises(TypeError, match="Linear"):
        trainopt.fuse(torch.nn.Linear(1, 1))
    mine = trainopt.AdamW(p)
    assert trainopt.fuse(mine) is mine


@pytest.mark.parametrize("name", WITH_FUSED)
def test_fuse_with_gradscaler(name):
    def program(turn):
        model, optimizer = model_and(CLASSES[name][1], **OPTIONS[name], fused=True if turn is trainopt.fuse else None)
        optimizer = turn(optimizer)
        assert turn is not trainopt.fuse or optimizer._step_supports_amp_scaling
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((3, 5), 0.3 * (i + 1), dtype=torch.float64)).square().sum()).backward()
            if i == 1:
                model[0].bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return optimizer, list(model.parameters())

    assert_fused_alike(program)
