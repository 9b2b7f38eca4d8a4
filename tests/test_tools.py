"""The tools round the optimizers: explain, nonfinite_report and init_state."""

import copy
import re

import pytest
import torch
from helpers import (
    CLASSES,
    NAMES,
    OPTIONS,
    TABLE,
    Twins,
    assert_same_bits,
    each_class,
    model_and,
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
