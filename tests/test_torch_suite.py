"""torch's own optimizer database, put through trainopt's classes, and the generic checks of torch's optimizer tests."""

import copy
import warnings

import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    TABLE,
    Twins,
    assert_equal,
    assert_same_bits,
    assert_same_outcome,
    error_of,
    skip_without_fused,
    snapshot,
)
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

DB = {info.name: info for info in optim_db if info.optim_cls in {torchs for _, torchs in CLASSES.values()}}
STEPS = 9
# A scalar, one element, less than a vector, vectors with a tail, more than a chunk.
SHAPES = ((), (1,), (2, 3), (5, 7), (300,))


def inputs_of(name):
    """Every input of torch's database for the CPU, those with a flag of theirs, and those it keeps for CUDA.

    Without differentiable=True: leaves that require a gradient cannot be stepped so. test_fallback has other tensors.
    """
    info = DB[name]
    flagged = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info, skip=["differentiable"])
    return [*flagged, *info.optim_inputs_func(device="cuda")]


CASES = [
    pytest.param(name, given.kwargs, id=f"{name}-{i}-{given.desc}")
    for name in CLASSES
    for i, given in enumerate(inputs_of(name))
]


def in_float64(value):
    """A hyper-parameter for the truth; a tensor stays the number that it is."""
    if isinstance(value, tuple):
        return tuple(map(in_float64, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def has_tensors(kwargs):
    values = [v for value in kwargs.values() for v in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(v, torch.Tensor) for v in values)


def on_the_loop(kwargs):
    """The same settings for torch's plain loop, which is the truth."""
    return {k: v for k, v in kwargs.items() if k not in ("foreach", "fused", "capturable", "differentiable")}


def run(cls, kwargs, dtype, start, gradients):
    params = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
    kwargs = copy.deepcopy(kwargs)
    optimizer = cls(params, **kwargs)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(dtype, copy=True)
        optimizer.step()
    return optimizer, params


def results(side):
    """All elements of the parameters, and of each state, end to end."""
    optimizer, params = side
    tensors = {"param": [p.detach() for p in params]}
    for p in params:
        for key, value in optimizer.state[p].items():
            if value is not None:
                tensors.setdefault(key, []).append(value)
    return {key: torch.cat([t.reshape(-1) for t in found]) for key, found in tensors.items()}


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator).double() for shape in SHAPES] for _ in range(STEPS + 1)]


def test_the_database_has_what_is_looked_for():
    assert set(DB) == set(CLASSES) and len(CASES) > 100


@pytest.mark.parametrize("name, kwargs", CASES)
def test_inputs_in_float64(name, kwargs, problem):
    start, *gradients = problem
    ours = run(CLASSES[name][0], kwargs, torch.float64, start, gradients)
    theirs = run(CLASSES[name][1], on_the_loop(kwargs), torch.float64, start, gradients)
    # torch does some of its arithmetic on hyper-parameters in their own dtype, float32 in the database.
    assert_same_outcome(ours, theirs, **({"rtol": 1e-6, "atol": 1e-8} if has_tensors(kwargs) else {}))


@pytest.mark.parametrize("name, kwargs", CASES)
def test_inputs_in_float32(name, kwargs, problem):
    start, *gradients = problem
    exact = {k: in_float64(v) for k, v in on_the_loop(kwargs).items()}
    truth = results(run(CLASSES[name][1], exact, torch.float64, start, gradients))
    theirs = results(run(CLASSES[name][1], on_the_loop(kwargs), torch.float32, start, gradients))
    ours = results(run(CLASSES[name][0], kwargs, torch.float32, start, gradients))
    assert set(ours) == set(theirs) == set(truth)
    for what, exactly in truth.items():
        assert ours[what].dtype == theirs[what].dtype and ours[what].shape == theirs[what].shape, what
        error, peer = ((x[what].double() - exactly).abs().max() for x in (ours, theirs))
        slack = 4 * torch.finfo(torch.float32).eps * exactly.abs().max()
        assert error <= 1.5 * peer + slack, f"{what}: {error} from the truth, torch {peer}"


def error_inputs(name):
    return DB[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)


ERRORS = [
    pytest.param(name, i, id=f"{name}-{given.optimizer_error_input.desc}")
    for name in CLASSES
    for i, given in enumerate(error_inputs(name))
]


@pytest.mark.parametrize("name, index", ERRORS)
def test_error_inputs(name, index):
    given = error_inputs(name)[index]
    params = given.optimizer_error_input.params
    if params is None:
        params = [torch.nn.Parameter(torch.randn(2, 3))]
    kwargs = given.optimizer_error_input.kwargs

    def make(cls):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            groups = [dict(p) if isinstance(p, dict) else p for p in params] if isinstance(params, list) else params
            optimizer = cls(groups, **kwargs)
            if given.error_on == OptimizerErrorEnum.STEP_ERROR:
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()

    ours, theirs = (error_of(lambda cls=cls: make(cls)) for cls in CLASSES[name])
    assert ours == theirs
    with pytest.raises(given.error_type, match=given.error_regex):
        make(CLASSES[name][0])


MORE_ERRORS = {
    "lr": {"lr": -1.0},
    "eps": {"eps": -1.0},
    "beta2": {"betas": (0.9, 1.0)},
    "weight_decay": {"weight_decay": -0.5},
    "momentum": {"momentum": -1.0},
    "nesterov without momentum": {"nesterov": True},
    "nesterov with dampening": {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    "fused and foreach": {"fused": True, "foreach": True},
    "fused and differentiable": {"fused": True, "differentiable": True},
    "lr of two elements": {"lr": torch.tensor([0.1, 0.2])},
    "an option of nobody": {"gamma": 0.9},
    "lr of no number": {"lr": "fast"},
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kwargs", MORE_ERRORS.values(), ids=MORE_ERRORS)
def test_errors_of_the_constructor_are_torchs(name, kwargs):
    skip_without_fused(name, kwargs)
    params = [torch.nn.Parameter(torch.randn(2, 3))]
    ours, theirs = (error_of(lambda cls=cls: cls(params, **kwargs)) for cls in CLASSES[name])
    assert ours == theirs


BAD_PARAMS = {
    "nothing": lambda p: [],
    "a set": lambda p: {p},
    "a set in a group": lambda p: [{"params": {p}}],
    "a number": lambda p: [p, 3],
    "no leaf": lambda p: [p * 2],
    "no params": lambda p: [{"lr": 0.1}],
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("params", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_errors_of_the_parameters_are_torchs(name, params):
    p = torch.nn.Parameter(torch.randn(2, 3))
    if params is BAD_PARAMS["a set"]:  # torch takes it, as any iterable
        assert len(CLASSES[name][0](params(p)).param_groups[0]["params"]) == 1
        return
    ours, theirs = (error_of(lambda cls=cls: cls(params(p))) for cls in CLASSES[name])
    assert ours == theirs


# The generic checks ---------------------------------------------------------------------------------------------------


def plain(name):
    """One input a class and setting that can train, without the flags that the step ignores."""
    return [k for k in (given.kwargs for given in DB[name].optim_inputs_func(device="cpu")) if not k.get("maximize")]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_training_goes_the_right_way(name, contiguous):
    for kwargs in plain(name):
        torch.manual_seed(0)
        if contiguous:
            weight, bias = torch.nn.Parameter(torch.randn(10, 5)), torch.nn.Parameter(torch.randn(10))
        else:
            weight = torch.nn.Parameter(torch.randn(10, 5, 2)[..., 0])
            bias = torch.nn.Parameter(torch.randn(10, 2)[..., 0])
        optimizer = CLASSES[name][0]([weight, bias], **copy.deepcopy(kwargs))
        x = torch.randn(5)

        def closure(weight=weight, bias=bias, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).square().sum()
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(20):
            optimizer.step(closure)
        assert closure().item() < first


@pytest.mark.parametrize("name, index", [(name, i) for name in CLASSES for i in range(len(DB[name].scheduler_inputs))])
def test_schedulers_of_the_database(name, index):
    twins = Twins(name)
    schedulers = [[make(side.optimizer) for make in DB[name].scheduler_inputs[index]] for side in twins.sides]
    for epoch in range(15):
        twins.step()
        for made in schedulers:
            for scheduler in made:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(0.1 * epoch)
                else:
                    scheduler.step()
        assert twins.ours.optimizer.param_groups[0]["lr"] == twins.torchs.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", CLASSES)
def test_options_of_a_group_override_the_defaults(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(20, 7, dtype=torch.float64)) for _ in range(3)]
        groups = [
            {"params": params[:1]},
            {"params": params[1:2], "lr": 0.4, "weight_decay": 0.5},
            {"params": params[2], "lr": 0.0},
        ]
        sides.append((cls(groups, **OPTIONS[name]), params))
        for _ in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            sides[-1][0].step()
    assert_same_outcome(*sides)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_as_learning_rate_is_read_and_left_as_it_is(name, shape, dtype):
    lr = torch.full(shape, 0.0625, dtype=dtype)
    tensors, numbers = Twins(name, lr=lr), Twins(name, lr=0.0625)
    tensors.step(3)
    numbers.step(3)
    for p, q in zip(tensors.ours.params, numbers.ours.params, strict=True):
        assert_equal(p, q, rtol=1e-6, atol=1e-8)  # torch rounds some terms to the tensor's dtype
    tensors.edit(lambda optimizer, _: optimizer.param_groups[0]["lr"].fill_(0.5))
    tensors.step(2)
    assert tensors.ours.optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("name", CLASSES)
def test_no_gradients_no_step(name):
    twins = Twins(name)
    twins.step(2)
    before = snapshot(twins.ours.optimizer)
    twins.edit(lambda optimizer, _: optimizer.zero_grad())
    twins.edit(lambda optimizer, _: optimizer.step())
    assert_same_bits(before, snapshot(twins.ours.optimizer))
    fresh = Twins(name)
    before = snapshot(fresh.ours.optimizer)
    fresh.ours.optimizer.step()
    assert_same_bits(before, snapshot(fresh.ours.optimizer))
    assert bool(fresh.ours.optimizer.state) == TABLE[name].eager_states


@pytest.mark.parametrize("name, kind", [*((name, "dense") for name in CLASSES), ("SGD", "sparse")])
def test_zero_gradients_without_decay_leave_the_values(name, kind):
    p = torch.nn.Parameter(torch.randn(5, 7))
    optimizer = CLASSES[name][0]([p], **TABLE[name].kept({"lr": 0.5, "weight_decay": 0.0, "lambd": 0.0}))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p) if kind == "dense" else torch.zeros(5, 7).to_sparse()
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_are_deterministic(name):
    def trained():
        twins = Twins(name)
        twins.step(3, missing={1})
        return twins.ours.optimizer.state_dict()

    one, other = trained(), trained()
    assert list(one["state"]) == list(other["state"]) and one["param_groups"] == other["param_groups"]
    assert set(one["state"]) == {0, 2, 3, 4, 5} | ({1} if TABLE[name].eager_states else set())
    for index, state in one["state"].items():
        assert list(state) == list(other["state"][index])
        assert all(torch.equal(v, other["state"][index][k]) for k, v in state.items())


@pytest.mark.parametrize("name", CLASSES)
def test_deepcopy_keeps_the_public_attributes(name):
    optimizer = Twins(name).ours.optimizer
    optimizer.zero_grad()
    copied = copy.deepcopy(optimizer)

    def public(thing):
        return {k for k in thing.__dict__ if not k.startswith("_")}

    assert public(copied) == public(optimizer)
    copied.step()


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_hooks(name):
    optimizer = Twins(name).ours.optimizer
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "more": seen.append("after saving")})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after loading"))
    saved = optimizer.state_dict()
    assert "more" in saved
    optimizer.load_state_dict(saved)
    assert seen == ["before saving", "after saving", "before loading", "after loading"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_pre_hook_can_replace_the_state_dict(name):
    source, target = Twins(name), Twins(name)
    source.step(2)
    saved = source.torchs.optimizer.state_dict()
    wrapped = {"optimizer": saved}
    target.edit(lambda o, _: o.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"]))
    target.torchs.optimizer.load_state_dict(wrapped)
    target.ours.optimizer.load_state_dict(wrapped)
    target.step(2)


@pytest.mark.parametrize("name", CLASSES)
def test_step_runs_the_same_whatever_the_grad_mode(name):
    twins = Twins(name)
    for mode in (torch.no_grad, torch.enable_grad):
        twins.set_gradients()
        with mode():
            before = torch.is_grad_enabled()
            twins.edit(lambda optimizer, _: optimizer.step())
            assert torch.is_grad_enabled() == before
        twins.compare()
    assert all(p.is_leaf and p.requires_grad for p in twins.ours.params)
    assert not any(v.requires_grad for s in twins.ours.optimizer.state.values() for v in s.values())
