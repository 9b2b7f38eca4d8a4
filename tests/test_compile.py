"""Under torch.compile: the step as an operator in the graph, and uncompiled where that would not be the same step."""

import copy
import warnings

import pytest
import torch
from helpers import CLASSES, OPTIONS, assert_drop_in, each_class, model_and, one, snapshot
from torch._dynamo.testing import CompileCounterWithBackend

import trainopt

optimizer_step_ = torch.ops.trainopt.optimizer_step_

#: Classes with one state and with three, with and without a count of steps, and with numbers of a parameter, which is
#: what the compiler sees of a class. That every class's compiled step is the engine's and torch's, two tests ask.
KINDS = ("SGD", "Adagrad", "Adam", "NAdam")
each_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


# The operator ---------------------------------------------------------------------------------------------------------

RULES = {
    "sgd": {"options": [0.9, 0.1, 1.0], "states": 1, "count": False},
    "sgd without momentum": {"options": [0.0, 0.0, 0.0], "states": 0, "count": False},
    "adam": {"options": [0.9, 0.99, 1e-8, 0.0, 1.0, 1.0], "states": 2, "count": True},
    "adam with amsgrad": {"options": [0.9, 0.99, 1e-8, 1.0, 0.0, 0.0], "states": 3, "count": True},
}
each_rule = pytest.mark.parametrize("case", RULES)


def arguments(case, dtype=torch.float32, shapes=((5,), (3, 7), ())):
    generator = torch.Generator().manual_seed(0)
    rule = RULES[case]

    def tensors():
        return [torch.rand(shape, generator=generator).to(dtype) for shape in shapes]

    states = [state for _ in range(rule["states"]) for state in tensors()]
    steps = [torch.tensor(float(3 * i)) for i in range(len(shapes))] if rule["count"] else []
    lr = torch.tensor(0.01, dtype=torch.float64)
    return case.partition(" ")[0], tensors(), tensors(), states, steps, lr, rule["options"]


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(case, dtype):
    shared = {"weight_decay": 0.1, "maximize": True, "l1": 0.01, "l1_proximal": True}
    torch.library.opcheck(optimizer_step_.default, arguments(case, dtype), shared)
    torch.library.opcheck(optimizer_step_.default, arguments(case, dtype, shapes=()))


@each_rule
def test_the_operator_moves_version_counters(case):
    rule, params, gradients, states, steps, lr, options = arguments(case)
    written, read = [*params, *states, *steps], [*gradients, lr]
    before = [[t._version for t in tensors] for tensors in (written, read)]
    optimizer_step_(rule, params, gradients, states, steps, lr, options)
    assert [t._version for t in written] == [version + 1 for version in before[0]]
    assert [t._version for t in read] == before[1]


@each_rule
def test_the_operator_steps_shared_memory_one_after_the_other(case):
    _, params, gradients, states, steps, lr, options = arguments(case, shapes=((9,), (9,)))
    rule = case.partition(" ")[0]
    tied = [params[0], params[0].view(9)]
    expected = [params[0].clone()] * 2
    apart = [[t.clone() for t in tensors] for tensors in (gradients, states, steps)]
    optimizer_step_(rule, tied, gradients, states, steps, lr, options)
    for i in range(2):
        now = [tensors[i::2] for tensors in apart]
        optimizer_step_(rule, expected[:1], *now, lr, options)
    assert torch.equal(tied[0], expected[0])
    assert all(map(torch.equal, states, apart[1]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: "lbfgs"}, "there is no rule 'lbfgs'"),
        ({1: []}, "gradients: 3 for 0 params"),
        ({2: []}, "gradients: 0 for 3 params"),
        ({3: []}, "states: 0 where these options call for 6"),
        ({4: []}, "steps: 0 for 3 params"),
        ({5: torch.ones(2)}, "lr has 2 elements, not 1"),
        ({6: [0.9]}, "options: adam has 6, not 1"),
        ({2: [torch.ones(6), torch.ones(3, 7), torch.ones(())]}, "the gradient of params[0] has shape [6], not [5]"),
        ({1: [torch.ones(5), torch.ones(3, 7).int(), torch.ones(())]}, "params[1]: not float32"),
    ],
    ids=str,
)
def test_the_operator_refuses_what_it_cannot_take_and_changes_nothing(change, message):
    given = list(arguments("adam"))
    for place, value in change.items():
        given[place] = value
    before = copy.deepcopy(given)
    with pytest.raises(ValueError, match="^" + f"optimizer_step_: {message}".replace("[", r"\[").replace("]", r"\]")):
        optimizer_step_(*given)
    for mine, then in zip(given[1:5], before[1:5], strict=True):
        assert all(map(torch.equal, mine, then))


# The compiled step ----------------------------------------------------------------------------------------------------


def set_gradients(model, i):
    model.zero_grad()
    model(torch.full((3, 5), 0.1 * (i % 4 + 1), dtype=torch.float64)).square().sum().backward()


def run(name, step_of, steps=8, schedule=True, edit=lambda optimizer, i: None, **options):
    """Steps with the function that `step_of` makes; returns the optimizer."""
    model, optimizer = model_and(CLASSES[name][0], **{**OPTIONS[name], **options})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps) if schedule else None
    step = step_of(optimizer)
    for i in range(steps):
        edit(optimizer, i)
        set_gradients(model, i)
        step()
        if scheduler is not None:
            scheduler.step()
    return optimizer


def skip_where_it_runs_uncompiled(name):
    if CLASSES[name][0]._numbers or CLASSES[name][0]._factors:
        pytest.skip("the operator knows no numbers, and no rows and columns")


def eagerly(optimizer):
    return lambda: optimizer.step()


def recompiles():
    """How often a frame was compiled again."""
    return sum(torch._dynamo.utils.counters["recompiles"].values())


def assert_equal_steps(ours, eager):
    """The same parameters and states, to the bit but for the sign of a zero."""
    mine, theirs = snapshot(ours), snapshot(eager)
    assert all(torch.equal(p, q) for p, q in zip(mine["params"], theirs["params"], strict=True))
    for a, b in zip(mine["states"], theirs["states"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Compiled:
    """Compiles a step with a backend that counts, and keeps, its graphs."""

    def __init__(self, backend="aot_eager", fullgraph=True):
        self.counter = CompileCounterWithBackend(backend)
        self.fullgraph = fullgraph

    def __call__(self, optimizer):
        return torch.compile(lambda: optimizer.step(), backend=self.counter, fullgraph=self.fullgraph)

    def operators(self):
        targets = [node.target for graph in self.counter.graphs for node in graph.graph.nodes]
        return sum(target in (optimizer_step_, optimizer_step_.default) for target in targets)


VARIANTS = {
    "as it is": {},
    "a tensor lr": {"lr": 0.02},
    "l1, maximize": {"l1": 0.01, "maximize": True},
    "l1_proximal": {"l1": 0.01, "l1_proximal": True},
}
#: What the options change is seen with either backend; that the graph is right for autograd, with one.
CASES = [
    *(("eager", variant, name) for variant in ("as it is", "a tensor lr") for name in CLASSES),
    *(("eager", variant, name) for variant in ("l1, maximize", "l1_proximal") for name in KINDS),
    *(("aot_eager", "a tensor lr", name) for name in KINDS),
]


@pytest.mark.parametrize("backend, variant, name", CASES)
def test_compiled_steps_are_one_graph_and_the_eager_ones_to_the_bit(backend, variant, name):
    skip_where_it_runs_uncompiled(name)
    options = dict(VARIANTS[variant])
    made = [{**options, "lr": torch.tensor(options["lr"])} if "lr" in options else options for _ in range(2)]
    compiled = Compiled(backend)
    ours = run(name, compiled, **made[0])
    eager = run(name, eagerly, **copy.deepcopy(made[1]))
    assert compiled.operators() == compiled.counter.frame_count  # one group, one operator
    assert compiled.counter.frame_count <= 2 and recompiles() <= 1  # for the learning rate, which is scheduled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_equal_steps(ours, eager)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_several_groups_and_parameters_without_gradients(name):
    def step_of(whole):
        def make(optimizer):
            frozen = optimizer.param_groups[0]["params"][1]
            frozen.requires_grad_(False)
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))], "lr": 0.5})
            optimizer.param_groups[1]["params"][0].grad = torch.full((3,), 0.5, dtype=torch.float64)
            return whole(optimizer)

        return make

    compiled = Compiled()
    ours, eager = run(name, step_of(compiled), steps=6), run(name, step_of(eagerly), steps=6)
    assert compiled.operators() == 2 * compiled.counter.frame_count
    assert_equal_steps(ours, eager)


def test_the_first_dampened_step_takes_the_gradient_whole():
    compiled, eager = run("SGD", Compiled(), dampening=0.5), run("SGD", eagerly, dampening=0.5)
    for p, q in zip(compiled.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


AOT = [("SGD", "aot_eager"), ("Adam", "aot_eager")]


@pytest.mark.parametrize("name, backend", [*((name, "eager") for name in CLASSES), *AOT])
def test_a_compiled_training_step_equals_torchs_eager_one(name, backend):
    def program(cls):
        is_ours = cls is CLASSES[name][0]
        model, optimizer = model_and(cls, **OPTIONS[name])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)

        def step(x):
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(step, backend=backend) if is_ours else step
        for i in range(8):
            optimizer.zero_grad()
            step(torch.full((3, 5), 0.1 * (i % 4 + 1), dtype=torch.float64))
            scheduler.step()
        if is_ours:
            assert recompiles() <= 1
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
        return optimizer, list(model.parameters())

    assert_drop_in(name, program)


@pytest.mark.slow
def test_inductor_compiles_the_step():
    compiled, eager = run("AdamW", Compiled("inductor"), steps=4), run("AdamW", eagerly, steps=4)
    assert_equal_steps(compiled, eager)


# Where the step runs uncompiled ---------------------------------------------------------------------------------------


def listen(optimizer, i):
    if i == 0:
        optimizer.heard = []
        optimizer.register_step_post_hook(lambda o, args, kwargs: o.heard.append(True))


FALLBACKS = {
    "noise": ({"noise": 0.1, "seed": 3}, lambda optimizer, i: None),
    "a hook": ({}, listen),
    "a learning rate of 0 at first": ({}, lambda o, i: o.param_groups[0].update(lr=0.0 if i == 0 else 0.1)),
}


@each_kind
@pytest.mark.parametrize("case", FALLBACKS)
def test_what_the_operator_does_not_do_runs_uncompiled(name, case):
    options, edit = FALLBACKS[case]
    made = {"steps": 6, "schedule": False, "edit": edit, **options}
    compiled = Compiled(fullgraph=False)
    ours, eager = run(name, compiled, **made), run(name, eagerly, **made)
    if case != "a learning rate of 0 at first":
        assert compiled.operators() == 0
    assert getattr(ours, "heard", None) == getattr(eager, "heard", None)
    assert_equal_steps(ours, eager)


@each_class
def test_a_sparse_gradient_and_a_closure_run_uncompiled(name):
    for cls in CLASSES[name] if name == "SGD" else CLASSES[name][:1]:
        p = torch.nn.Parameter(torch.ones(4, 2))
        optimizer = cls([p], **OPTIONS[name])

        def closure(p=p):
            p.grad = torch.ones(4, 2)
            return p.sum()

        loss = torch.compile(lambda o=optimizer, c=closure: o.step(c), backend="eager")()
        assert loss == 8 and not torch.equal(p, torch.ones(4, 2))
    if name == "SGD":
        optimizer = trainopt.SGD([p], lr=0.5)
        p.grad = torch.ones(4, 2).to_sparse()
        before = p.detach().clone()
        torch.compile(lambda: optimizer.step(), backend="eager")()
        assert torch.equal(p, before - 0.5)


@each_kind
def test_options_that_change_between_compiled_steps(name):
    changes = [{}, {"weight_decay": 0.5}, {"noise": 0.1}, {"noise": 0.0}, {"noise": 0.1}, {"noise": 0.0, "l1": 0.1}, {}]

    def edit(optimizer, i):
        optimizer.param_groups[0].update(changes[i])

    made = {"steps": len(changes), "schedule": False, "edit": edit}
    ours, eager = run(name, Compiled(fullgraph=False), **made), run(name, eagerly, **made)
    assert_equal_steps(ours, eager)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tensor_betas_run_uncompiled(name):
    made = [{"betas": (torch.tensor(0.7), torch.tensor(0.9)), "foreach": False, "steps": 4} for _ in range(2)]
    compiled = Compiled(fullgraph=False)
    assert_equal_steps(run(name, compiled, **made[0]), run(name, eagerly, **made[1]))
    assert compiled.operators() == 0


def test_the_reference_path_runs_uncompiled(monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    compiled = Compiled(fullgraph=False)
    ours, eager = run("AdamW", compiled, steps=3), run("AdamW", eagerly, steps=3)
    assert compiled.operators() == 0
    assert_equal_steps(ours, eager)


# Schedulers -----------------------------------------------------------------------------------------------------------


@each_class
def test_a_scheduler_knows_that_a_compiled_step_was_made_and_wraps_nothing(name):
    optimizer, _ = one(CLASSES[name][0])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" not in vars(optimizer)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
