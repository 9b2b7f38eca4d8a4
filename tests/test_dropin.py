"""Drop-in: signatures, names, groups, dtypes, schedulers and averaging are as with torch.optim."""

import inspect
import warnings

import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    Twins,
    assert_equal,
    assert_same_outcome,
    each_class,
    one,
)

# Signature ------------------------------------------------------------------------------------------------------------


def positional(parameters):
    return [k for k, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]


@each_class
def test_the_signature_is_torchs_and_more(name):
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in CLASSES[name])
    assert positional(ours) == positional(theirs)
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default and ours[key].kind == parameter.kind, key
    extras = {k: (p.default, p.kind) for k, p in ours.items() if k not in theirs}
    assert {k: default for k, (default, _) in extras.items()} == {
        **({} if name == "SGD" else {"bias_correction": True}),
        **{"l1": 0.0, "l1_proximal": False, "noise": 0.0, "seed": 0, "skip_nonfinite": False},
    }
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind in extras.values())


@each_class
def test_it_is_an_optimizer_of_torchs_class(name):
    ours, torchs = CLASSES[name]
    optimizer = ours([torch.nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torchs) and isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == torchs.__name__
    text, theirs = repr(optimizer), repr(torchs([torch.nn.Parameter(torch.zeros(2))]))
    assert set(theirs.splitlines()) <= set(text.splitlines()) and "    l1: 0.0" in text
    assert {k: optimizer.defaults[k] for k in torchs([torch.nn.Parameter(torch.zeros(2))]).defaults} == torchs(
        [torch.nn.Parameter(torch.zeros(2))]
    ).defaults


BAD_EXTRAS = [{"l1": -0.1}, {"l1": float("nan")}, {"noise": -1.0}, {"seed": -1}, {"seed": 2**64}, {"seed": 1.5}]


@each_class
@pytest.mark.parametrize("bad", BAD_EXTRAS, ids=str)
def test_senseless_options_are_refused_by_name(name, bad):
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    (key, value), ours = *bad.items(), CLASSES[name][0]
    with pytest.raises(ValueError, match=f"Invalid {key} value: {value}".replace("*", r"\*")):
        ours([p], **bad)
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        ours([{"params": [p], **bad}])
    optimizer = ours([p])
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        optimizer.add_param_group({"params": [q], **bad})
    assert len(optimizer.param_groups) == 1


# Names, groups, dtypes, views -----------------------------------------------------------------------------------------


@each_class
def test_named_parameters(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)).double()
        optimizer = cls(model.named_parameters(), **OPTIONS[name])
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        sides.append((optimizer, list(model.parameters())))
    assert sides[0][0].param_groups[0]["param_names"] == sides[1][0].param_groups[0]["param_names"]
    assert_same_outcome(*sides)


@each_class
def test_parameters_of_several_dtypes_in_one_group(name):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float64, torch.float32]
    options = {} if name == "SGD" else {"eps": 1e-3}
    twins = Twins(name, shapes=((40,),) * 6, **options)
    twins.edit(lambda _, params: [setattr(p, "data", p.data.to(d)) for p, d in zip(params, dtypes, strict=True)])
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda o, _: o.step())
    for p, q, dtype in zip(twins.ours.params, twins.torchs.params, dtypes, strict=True):
        assert p.dtype == dtype
        tolerance = 20 * torch.finfo(dtype).eps
        assert_equal(p, q, rtol=tolerance, atol=tolerance)
        for key, value in twins.torchs.optimizer.state[q].items():
            assert_equal(twins.ours.optimizer.state[p][key], value, key, rtol=tolerance, atol=tolerance)


@each_class
def test_a_view_sees_the_step(name):
    p = torch.nn.Parameter(torch.ones(4, 3))
    view, alias, pointer = p.detach()[1], p.data.numpy(), p.data_ptr()
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    p.grad = torch.ones(4, 3)
    before = view._version
    optimizer.step()
    assert torch.equal(view, p.detach()[1]) and (alias != 1).all() and p.data_ptr() == pointer
    assert view._version > before


@each_class
def test_a_parameter_that_is_a_view_of_a_flat_buffer(name):
    """Neighbours in one buffer are not stepped into."""
    sides = []
    for cls in CLASSES[name]:
        flat = torch.linspace(-1, 1, 100, dtype=torch.float64)
        params = [torch.nn.Parameter(flat[i : i + 7].view(7)) for i in range(1, 90, 10)]
        optimizer = cls(params, **OPTIONS[name])
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        sides.append((optimizer, [*params, torch.nn.Parameter(flat)]))
    assert_same_outcome(*sides)


@each_class
def test_a_hundred_groups(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(17, dtype=torch.float64)) for _ in range(100)]
        optimizer = cls([{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(params)], **OPTIONS[name])
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


# Schedulers, averaging ------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=20),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.5, step_size_up=3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        ],
        milestones=[4],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@each_class
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_schedulers(name, kind, tensor):
    """OneCycleLR and CyclicLR cycle the momentum, or beta1, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins = Twins(name, lr=torch.tensor(0.25, dtype=torch.float64) if tensor else 0.25)
        schedulers = [SCHEDULERS[kind](side.optimizer) for side in twins.sides]
        for epoch in range(8):
            twins.step()
            for scheduler in schedulers:
                scheduler.step(*([1.0 + epoch] if kind == "ReduceLROnPlateau" else []))
            ours, torchs = (side.optimizer.param_groups[0] for side in twins.sides)
            assert float(ours["lr"]) == float(torchs["lr"])
    assert isinstance(ours["lr"], torch.Tensor) == isinstance(torchs["lr"], torch.Tensor) == tensor


@each_class
def test_the_warning_of_a_scheduler_that_goes_first_is_kept(name):
    for cls in CLASSES[name]:
        optimizer, _ = one(cls)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()


@each_class
def test_a_scheduler_made_after_some_steps(name):
    twins = Twins(name)
    twins.step(2)
    schedulers = [torch.optim.lr_scheduler.StepLR(side.optimizer, 1, gamma=0.5) for side in twins.sides]
    for _ in range(3):
        twins.step()
        for scheduler in schedulers:
            scheduler.step()


@each_class
def test_stochastic_weight_averaging(name):
    outcomes = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)).double()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        optimizer = cls(model.parameters(), **OPTIONS[name])
        scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
            scheduler.step()
        outcomes.append(list(averaged.parameters()))
    for p, q in zip(*outcomes, strict=True):
        assert_equal(p, q)
