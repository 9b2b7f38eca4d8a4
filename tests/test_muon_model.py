"""Muon over whole models: which parameters are matrices, AdamW for the rest, and what surrounds an optimizer."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import assert_same_bits, snapshot
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed

import trainopt
from trainopt.schedules import linear

pytestmark = pytest.mark.usefixtures("one_thread")

LR, ADAMW = 0.02, {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.1}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.proj(self.qkv(self.norm(x)).tanh()[..., : x.shape[-1]])


class Language(nn.Module):
    """A model with all that a split meets: embeddings, positions, blocks, a norm, a head that may be tied."""

    def __init__(self, tied=False, width=8, words=11):
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.pos_embed = nn.Parameter(torch.randn(4, width) / 10)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def made(seed=0, **options):
    torch.manual_seed(seed)
    model = Language()
    return model, trainopt.Muon(trainopt.muon_groups(model, **options), LR, adamw=ADAMW)


def train(model, optimizer, steps=3, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        ids = torch.arange(8).view(2, 4) + step % 3
        trainopt.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def names_of(groups, use_muon=True):
    return {name for group in groups if group.get("use_muon", True) is use_muon for name, _ in group["params"]}


# The split ------------------------------------------------------------------------------------------------------------

HIDDEN = {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("qkv", "proj")}


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(Block(8), Block(8))


class Transformers(nn.Module):
    """A head that is not registered last, and says so itself."""

    def __init__(self):
        super().__init__()
        self.out, self.body = nn.Linear(8, 11), nn.Linear(8, 8)

    def get_output_embeddings(self):
        return self.out


def perceptron():
    return nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


SPLITS = {
    "a language model": (Language, {}, HIDDEN),
    "with a tied head": (lambda: Language(tied=True), {}, HIDDEN),
    "a perceptron": (perceptron, {}, {"0.weight", "2.weight"}),
    "no head": (Headless, {}, HIDDEN),
    "convolutions": (Headless, {"flatten": True}, HIDDEN | {"stem.weight"}),
    "a head that says so": (Transformers, {}, {"body.weight"}),
    "named for AdamW": (Language, {"adamw": ["*.qkv.weight"]}, {n for n in HIDDEN if "qkv" not in n}),
    "named for Muon": (Language, {"muon": ["head.weight", "pos_*"]}, HIDDEN | {"head.weight", "pos_embed"}),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16), {}, None),
}


@pytest.mark.parametrize("name", SPLITS)
def test_hidden_matrices_are_muons(name):
    make, options, want = SPLITS[name]
    if want is None:
        want = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"}
    model = make()
    groups = trainopt.muon_groups(model, **options)
    assert names_of(groups) == want
    params = [param for group in groups for _, param in group["params"]]
    assert sorted(map(id, params)) == sorted(map(id, model.parameters()))
    spared = [group for group in groups if group.get("weight_decay") == 0]
    assert all(not group.get("use_muon", True) for group in spared)
    assert all(param.ndim == 1 or "pos" in name for group in spared for name, param in group["params"])
    trainopt.Muon(groups)


def test_options_for_some_matrices_are_groups_of_their_own():
    model, optimizer = made(options={"*.qkv.weight": {"split": 3, "lr": 0.5}, "*.proj.*": {"normuon_beta2": 0.9}})
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["blocks.0.qkv.weight", "blocks.1.qkv.weight"]
    assert group["split"] == 3 and group["lr"] == 0.5 and "split" not in optimizer.param_groups[1]
    assert all(p.isfinite().all() for p in train(model, optimizer))
    told = {row.name: row for row in trainopt.explain(optimizer)}
    assert "as 3 matrices" in told["'blocks.0.qkv.weight'"].note and told["'blocks.0.qkv.weight'"].path == "muon"
    assert "normuon_beta2" in told["'blocks.1.proj.weight'"].note
    assert told["'tokens.weight'"].path.startswith("fused") and told["'tokens.weight'"].note == "AdamW"
    assert [row.name for row in trainopt.explain(optimizer)] == [
        repr(name) for group in optimizer.param_groups for name in group["param_names"]
    ]


BAD_SPLITS = [
    ({"adamw": ["nothing.*"]}, "'nothing.\\*' matches no parameter"),
    ({"muon": "head.weight"}, "muon must be a list of patterns"),
    ({"muon": ["norm.weight"]}, "'norm.weight' in muon is no matrix"),
    ({"muon": ["head.*"], "adamw": ["head.*"]}, "'head.weight' is in both"),
    ({"options": {"head.*": {"split": 2}}}, "'head.\\*' in options matches no matrix"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SPLITS)
def test_a_split_that_makes_no_sense_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        trainopt.muon_groups(Language(), **options)


# One object -----------------------------------------------------------------------------------------------------------


def test_the_rest_is_stepped_as_by_adamw_alone_and_the_matrices_as_by_muon_alone():
    model, optimizer = made()
    torch.manual_seed(0)
    other = Language()
    groups = trainopt.muon_groups(other)
    alone = [
        trainopt.Muon([g for g in groups if g.get("use_muon", True)], LR),
        trainopt.AdamW([{k: v for k, v in g.items() if k != "use_muon"} for g in groups if "use_muon" in g], **ADAMW),
    ]

    class Both:
        def zero_grad(self):
            other.zero_grad()

        def step(self):
            for each in alone:
                each.step()

    for p, q in zip(train(model, optimizer), train(other, Both()), strict=True):
        assert torch.equal(p, q)


def test_copies_pickles_and_state_dicts_go_on_alike():
    model, optimizer = made()
    train(model, optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    loaded_model, loaded = made(seed=1)
    train(loaded_model, loaded, 1)
    loaded_model.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    want = train(model, optimizer, first=3)
    for other in ((copied_model, copied), (pickled_model, pickled), (loaded_model, loaded)):
        assert all(map(torch.equal, train(*other, first=3), want))
        assert other[1].param_groups[-1]["lr"] == ADAMW["lr"]
    loaded.add_param_group({"params": [("new", nn.Parameter(torch.zeros(3)))], "use_muon": False})
    assert loaded.param_groups[-1]["betas"] == ADAMW["betas"]


def test_states_that_adamw_stores_in_other_dtypes_are_loaded_as_they_were():
    def bfloat16():
        torch.manual_seed(0)
        model = Language().bfloat16()
        adamw = {**ADAMW, "state_dtype": "float32", "precision": "master"}
        return model, trainopt.Muon(trainopt.muon_groups(model), LR, adamw=adamw)

    model, optimizer = bfloat16()
    train(model, optimizer)
    other, loaded = bfloat16()
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, train(model, optimizer, first=3), train(other, loaded, first=3)))
    assert {v.dtype for v in loaded.state[other.norm.weight].values()} == {torch.float32, torch.int16}


BAD_LOADS = {
    "momentum_buffer": ("blocks.0.qkv.weight", "momentum_buffer of 'blocks.0.qkv.weight' has shape"),
    "exp_avg": ("tokens.weight", "exp_avg of .* has shape"),
}


@pytest.mark.parametrize("state", BAD_LOADS)
def test_a_state_dict_that_does_not_fit_changes_nothing(state):
    name, message = BAD_LOADS[state]
    model, optimizer = made()
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    key = next(
        k for g in saved["param_groups"] for k, n in zip(g["params"], g["param_names"], strict=True) if n == name
    )
    saved["state"][key][state] = torch.zeros(2, 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0]["use_muon"] = False
    with pytest.raises(ValueError, match="group 0 is AdamW's, and the optimizer's is Muon's"):
        optimizer.load_state_dict(saved)
    assert_same_bits(before, snapshot(optimizer))
    train(model, optimizer, 1)


def test_a_closure_hooks_and_schedules():
    model, optimizer = made()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = trainopt.Schedule(optimizer, lr=linear(until=4))
    torchs = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(4)[None]).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == ["before", "after"]
    torchs.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.75 * LR, *[0.75 * ADAMW["lr"]] * 2]


def test_a_grad_scaler_unscales_and_skips():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (model, optimizer), (plain, other) = made(), made()
    for scale in (1.0, float("inf")):
        before = snapshot(optimizer)
        optimizer.zero_grad()
        scaler.scale(model(torch.arange(4)[None]).square().mean() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(before, snapshot(optimizer))
    plain(torch.arange(4)[None]).square().mean().backward()
    other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_what_adamw_can_tell():
    torch.manual_seed(0)
    model = Language()
    optimizer = trainopt.Muon(trainopt.muon_groups(model), LR, adamw={"stats": True})
    train(model, optimizer, 1)
    assert optimizer.adamw.stats()["tokens.weight"].update_norm > 0
    assert trainopt.Muon(model.blocks[0].qkv.weight[None].detach().unbind()).adamw is None


def test_it_stands_in_torchs_place_and_takes_torchs_over():
    p = nn.Parameter(torch.eye(3))
    torchs = torch.optim.Muon([p], lr=0.5)
    with trainopt.patched():
        assert torch.optim.Muon is trainopt.Muon and isinstance(torchs, torch.optim.Muon)
        assert not isinstance(torch.optim.Muon([p]).state, list)
    p.grad = torch.ones(3, 3)
    torchs.step()
    assert trainopt.fuse(torchs) is torchs and type(torchs) is trainopt.Muon and trainopt.fuse(torchs) is torchs
    state = torchs.state[p]["momentum_buffer"].clone()
    torchs.step()
    torch.testing.assert_close(torchs.state[p]["momentum_buffer"], state.lerp(p.grad, 0.05))


def test_inside_a_compiled_step():
    model, optimizer = made()
    other, plain = made()
    want = train(other, plain, 2)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    for i in range(2):
        optimizer.zero_grad()
        ids = torch.arange(8).view(2, 4) + i
        trainopt.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        step()
    assert all(map(torch.equal, model.parameters(), want))


# As the others --------------------------------------------------------------------------------------------------------

FUSED_FIRST = """
import torch, trainopt
from trainopt.schedules import linear

p, calls = torch.nn.Parameter(torch.eye(3)), []
p.grad = torch.ones(3, 3)
optimizer = torch.optim.Muon([p], lr=0.5)
optimizer.register_step_post_hook(lambda *_: calls.append("after"))
schedule = trainopt.Schedule(trainopt.fuse(optimizer), lr=linear(until=4))
optimizer.step()
schedule.step()
print(calls, optimizer.param_groups[0]["lr"])
"""


@pytest.mark.slow
def test_hooks_and_schedules_of_one_that_was_fused_where_none_was_made():
    made = subprocess.run([sys.executable, "-c", FUSED_FIRST], capture_output=True, text=True)
    assert made.stdout.strip() == "['after'] 0.375", made.stderr


def test_a_scheduler_of_torchs_goes_on_with_one_that_is_fused():
    p = nn.Parameter(torch.eye(3))
    optimizer = torch.optim.Muon([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    p.grad = torch.ones(3, 3)
    trainopt.fuse(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25 and optimizer.completed_steps == 1
    unstepped = trainopt.Muon([p], lr=0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        torch.optim.lr_scheduler.StepLR(unstepped, 1, 0.5).step()


def test_states_that_are_made_before_the_first_step():
    """By `init_state`, and by a step that only asks for them: nothing else changes, and nothing is counted."""
    want = train(*made(options={"*.qkv.weight": {"normuon_beta2": 0.9}}))
    for ask in (False, True):
        model, optimizer = made(options={"*.qkv.weight": {"normuon_beta2": 0.9}})
        schedule, before = trainopt.Schedule(optimizer, lr=linear(until=4)), copy.deepcopy(model.state_dict())
        if ask:
            rates = [group["lr"] for group in optimizer.param_groups]
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
        else:
            optimizer.init_state()
        assert optimizer.completed_steps == 0 and not optimizer.last_step_skipped
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        names = [set(optimizer.state[p]) for p in (model.blocks[0].qkv.weight, model.blocks[0].proj.weight)]
        assert names == [{"momentum_buffer", "second_momentum_buffer"}, {"momentum_buffer"}]
        assert set(optimizer.state[model.norm.bias]) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(map(torch.equal, train(model, optimizer), want)) and optimizer.completed_steps == 3
        schedule.step()
        assert schedule.last_epoch == 3


@pytest.mark.parametrize("is_flat", [False, True])
def test_distributed_checkpoints(is_flat):
    choices = distributed.StateDictOptions(flatten_optimizer_state_dict=is_flat)
    model, optimizer = made()
    train(model, optimizer)
    saved = copy.deepcopy(distributed.get_optimizer_state_dict(model, optimizer, options=choices))
    other, loaded = made(seed=1)
    other.load_state_dict(model.state_dict())
    distributed.set_optimizer_state_dict(other, loaded, saved, options=choices)
    assert all(map(torch.equal, train(model, optimizer, first=3), train(other, loaded, first=3)))


def test_what_is_not_finite_is_named():
    model, optimizer = made()
    assert not optimizer.nonfinite_report()
    train(model, optimizer, 1)
    optimizer.state[model.blocks[1].proj.weight]["momentum_buffer"][0, 0] = torch.inf
    [found] = optimizer.nonfinite_report()
    assert (found.parameter, found.tensor, found.inf) == ("'blocks.1.proj.weight'", "momentum_buffer", 1)


def test_the_states_of_the_rest_are_converted_alone():
    model, optimizer = made()
    train(model, optimizer)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"momentum of Muon's matrices.*convert_state\(optimizer.adamw, …\)"):
        trainopt.convert_state(optimizer, "bfloat16")
    assert_same_bits(before, snapshot(optimizer))
    trainopt.convert_state(optimizer.adamw, "bfloat16")
    for p in model.parameters():
        [momentum, *_] = [value for name, value in optimizer.state[p].items() if name != "step"]
        assert momentum.dtype is (torch.float32 if len(optimizer.state[p]) == 1 else torch.bfloat16)
    other, loaded = made(seed=1)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, train(model, optimizer, first=3), train(other, loaded, first=3)))
