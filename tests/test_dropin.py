"""Drop-in: signatures, names, groups, dtypes, schedulers and averaging are as with torch.optim."""

import inspect
import warnings

import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    TABLE,
    WITH_FUSED,
    Twins,
    assert_drop_in,
    each_class,
    model_and,
    one,
    skip_without_momentum,
    step_randomly,
    train,
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
        **({"bias_correction": True} if "bias_correction" in CLASSES[name][0].EXTRAS else {}),
        **({} if name in WITH_FUSED else {"fused": None}),
        **{"l1": 0.0, "l1_proximal": False, "noise": 0.0, "seed": 0, "skip_nonfinite": False},
        **{
            "max_grad_norm": None,
            "error_if_nonfinite": False,
            "zero_grad": None,
            "ema_decay": None,
            "ema_warmup": False,
            "state_dtype": None,
            "precision": "native",
            "cautious": False,
            "cautious_weight_decay": False,
            "stats": False,
        },
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


# Programs that people write -------------------------------------------------------------------------------------------


def named_parameters(cls, options):
    model, _ = model_and(cls)
    return train(model, cls(model.named_parameters(), **options), 3)


def groups(cls, options):
    params = [torch.nn.Parameter(torch.randn(17, dtype=torch.float64)) for _ in range(100)]
    return step_randomly(cls([{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(params)], **options), params)


def views_of_a_flat_buffer(cls, options):
    """Neighbours in one buffer are not stepped into."""
    flat = torch.linspace(-1, 1, 100, dtype=torch.float64)
    params = [torch.nn.Parameter(flat[i : i + 7].view(7)) for i in range(1, 90, 10)]
    optimizer, params = step_randomly(cls(params, **options), params)
    return optimizer, [*params, torch.nn.Parameter(flat)]


def parameters_over_the_same_memory(cls, options):
    """Tied by hand: torch steps one after the other."""
    memory = torch.randn(40, dtype=torch.float64)
    params = [torch.nn.Parameter(memory[:30]), torch.nn.Parameter(memory[10:]), torch.nn.Parameter(memory.clone())]
    return step_randomly(cls(params, **options), params, 4)


def dampened_over_the_same_memory(cls, options):
    return parameters_over_the_same_memory(cls, {**options, **({"dampening": 0.25} if "dampening" in options else {})})


def the_same_parameter_twice(cls, options):
    p, q = (torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cls([p, q, p], **options)
    return step_randomly(optimizer, [p, q])


def tied_parameters(cls, options):
    embed, head = torch.nn.Embedding(11, 6).double(), torch.nn.Linear(6, 11, bias=False).double()
    head.weight = embed.weight
    params = list(torch.nn.ModuleList([embed, head]).parameters())
    optimizer = cls(params, **options)
    for i in range(4):
        optimizer.zero_grad()
        head(embed(torch.tensor([i, 3, 5]))).exp().sum().backward()
        optimizer.step()
    return optimizer, params


def gradient_accumulation(cls, options, set_to_none=True):
    model, optimizer = model_and(cls, **options)
    for i in range(9):
        (model(torch.full((4, 5), 0.1 * i, dtype=torch.float64)).square().sum() / 3).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == set_to_none for p in model.parameters())
    return optimizer, list(model.parameters())


def gradient_accumulation_into_zeros(cls, options):
    return gradient_accumulation(cls, options, set_to_none=False)


def model_to_float32_before_the_first_step(cls, options):
    model, optimizer = model_and(cls, **options)
    train(model.to(torch.float32), optimizer, 3)
    (state, *_) = optimizer.state.values()
    made_before = TABLE[cls.__name__].eager_states
    assert made_before or all(value.dtype == torch.float32 for value in state.values())
    return optimizer, list(model.parameters())


def model_to_float64_before_the_first_step(cls, options):
    model, optimizer = model_and(cls, torch.float32, **options)
    return train(model.to(torch.float64), optimizer, 3)


def stochastic_weight_averaging(cls, options):
    model, optimizer = model_and(cls, **options)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for i in range(5):
        train(model, optimizer, 1, start=i)
        averaged.update_parameters(model)
        scheduler.step()
    return optimizer, list(averaged.parameters())


def functional_call_and_func_grad(cls, options):
    model, optimizer = model_and(cls, **options)
    params = dict(model.named_parameters())

    def loss_of(params, x):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    for i in range(4):
        x = torch.full((3, 5), 0.3 * (i + 1), dtype=torch.float64)
        if i % 2:
            optimizer.zero_grad()
            loss_of(params, x).backward()
        else:
            for key, gradient in torch.func.grad(loss_of)({k: p.detach() for k, p in params.items()}, x).items():
                params[key].grad = gradient
        optimizer.step()
    return optimizer, list(params.values())


def a_scheduler_made_after_some_steps(cls, options):
    model, optimizer = model_and(cls, **options)
    train(model, optimizer, 2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for i in range(2, 5):
        train(model, optimizer, 1, start=i)
        scheduler.step()
    return optimizer, list(model.parameters())


PROGRAMS = [
    named_parameters,
    groups,
    views_of_a_flat_buffer,
    parameters_over_the_same_memory,
    dampened_over_the_same_memory,
    the_same_parameter_twice,
    tied_parameters,
    gradient_accumulation,
    gradient_accumulation_into_zeros,
    model_to_float32_before_the_first_step,
    model_to_float64_before_the_first_step,
    stochastic_weight_averaging,
    functional_call_and_func_grad,
    a_scheduler_made_after_some_steps,
]


@each_class
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_ends_as_with_torchs_class(name, program):
    tolerance = {}
    if program.__name__.startswith("model_to_") and TABLE[name].eager_states:
        tolerance = {"rtol": 1e-6, "atol": 1e-6}  # states have the old dtype, in which torch computes what they hold
    ours, torchs = assert_drop_in(name, lambda cls: program(cls, OPTIONS[name]), **tolerance)
    names = [[group.get("param_names") for group in optimizer.param_groups] for optimizer, _ in (ours, torchs)]
    assert names[0] == names[1]


# Views ---------------------------------------------------------------------------------------------------------------


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


# Schedulers -----------------------------------------------------------------------------------------------------------

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
        if kind in ("OneCycleLR", "CyclicLR"):
            skip_without_momentum(name)
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
