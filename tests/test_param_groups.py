"""param_groups: who gets weight decay, everyone once, by name."""

import math
import warnings

import pytest
import torch
from torch import nn

import trainopt
from trainopt import param_groups


class Net(nn.Module):
    """A module with a parameter of every kind that the rule tells apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.conv = nn.Conv1d(4, 4, 3)
        self.lstm = nn.LSTM(4, 3)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.norms = nn.ModuleList(
            [
                nn.LayerNorm([3, 4]),
                nn.RMSNorm([3, 4]),
                nn.GroupNorm(2, 4),
                nn.BatchNorm2d(4),
                nn.InstanceNorm1d(4, affine=True),
            ]
        )
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.gain = nn.Parameter(torch.ones(4))
        self.position_bias = nn.Parameter(torch.zeros(5, 5))
        self.biased = nn.Parameter(torch.zeros(5, 5))


def split(groups):
    """(names with decay, names without)"""
    names = {True: set(), False: set()}
    for group in groups:
        names[group["weight_decay"] != 0] |= {name for name, _ in group["params"]}
    return names[True], names[False]


def test_who_gets_weight_decay():
    decayed, undecayed = split(param_groups(Net(), 0.1))
    assert decayed == {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "bilinear.weight",
        "biased",
    }
    assert {"attention.bias_k", "position_bias", "norms.0.weight", "norms.1.weight", "scale", "gain"} <= undecayed


def test_every_parameter_is_there_once_in_the_models_order():
    model = Net()
    groups = param_groups(model, 0.1)
    pairs = [pair for group in groups for pair in group["params"]]
    assert {id(p) for _, p in pairs} == {id(p) for p in model.parameters()}
    assert len(pairs) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert all(named[name] is param for name, param in pairs)
    order = list(named)
    for group in groups:
        places = [order.index(name) for name, _ in group["params"]]
        assert places == sorted(places)


def test_a_tied_parameter_is_spared_under_any_of_its_names():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm([3, 3])})
    model["linear"].weight = model["norm"].weight
    assert split(param_groups(model, 0.1)) == (set(), {"linear.weight", "linear.bias", "norm.bias"})
    assert split(param_groups(Net(), 0.1, no_decay=["head.weight"]))[1] >= {"embed.weight"}


def test_a_module_used_twice_is_counted_once():
    shared = nn.Linear(2, 2)
    groups = param_groups(nn.Sequential(shared, nn.ReLU(), shared), 0.1)
    assert [[name for name, _ in group["params"]] for group in groups] == [["0.weight"], ["0.bias"]]


def test_frozen_parameters_are_there_and_unfreezing_needs_no_new_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimizer = trainopt.AdamW(param_groups(model, 0.1), lr=0.1)
    before = model.weight.clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before) and model.weight not in optimizer.state
    model.weight.requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("make", [trainopt.SGD, trainopt.AdamW, torch.optim.AdamW])
def test_optimizers_take_the_groups_and_their_names(make):
    model = Net()
    optimizer = make(param_groups(model, 0.1), lr=1.0)
    first, second = optimizer.param_groups
    assert first["weight_decay"] == 0.1 and second["weight_decay"] == 0.0
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))


def test_the_decay_acts_on_the_first_group_alone():
    model = nn.Linear(3, 2)
    nn.init.ones_(model.bias)
    weight = model.weight.detach().clone()
    optimizer = trainopt.AdamW(param_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * 0.95)
    assert torch.equal(model.bias, torch.ones(2))


def test_a_group_that_would_be_empty_is_left_out():
    [group] = param_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1
    [group] = param_groups(nn.LayerNorm(2), 0.1)
    assert group["weight_decay"] == 0.0
    trainopt.AdamW(param_groups(nn.LayerNorm(2), 0.1))


def test_patterns_spare_more():
    decayed, undecayed = split(param_groups(Net(), 0.1, no_decay=["lstm.*", "conv.weight"]))
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "conv.weight"} <= undecayed
    assert "bilinear.weight" in decayed


# Norms, tokens, magnitudes, and what models say ----------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))


class FilterNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.tau = nn.Parameter(torch.ones(1, 6, 1, 1))


class GlobalResponse(nn.Module):
    """A norm by its parameters' shapes alone."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 1, 1, 6))
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.projection = nn.Parameter(torch.ones(6, 6, 1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("cls_token", "class_token", "reg_token", "register_tokens", "mask_token", "dist_token"):
            self.register_parameter(name, nn.Parameter(torch.ones(1, 4, 6)))
        self.registers = nn.Parameter(torch.ones(4, 6))
        self.pos_embed = nn.Parameter(torch.ones(1, 9, 6))
        self.tokens_mixer = nn.Parameter(torch.ones(9, 9))
        self.cls = nn.Linear(6, 2, bias=False)
        self.token_embedding = nn.Embedding(9, 6)
        self.one_output = nn.Conv2d(6, 1, 1, bias=False)  # a weight of (1, 6, 1, 1)
        self.one_linear = nn.Linear(6, 1, bias=False)


def test_norms_by_type_and_by_shape():
    model = nn.ModuleDict({"rms": LlamaRMSNorm(), "filter": FilterNorm2d(), "response": GlobalResponse()})
    assert split(param_groups(model, 0.1)) == (
        {"response.projection"},
        {"rms.weight", "filter.gamma", "filter.tau", "response.gamma", "response.scale"},
    )


def test_tokens_are_spared_and_weights_of_one_output_are_not():
    decayed, undecayed = split(param_groups(Tokens(), 0.1))
    assert decayed == {
        *("pos_embed", "tokens_mixer", "cls.weight", "token_embedding.weight", "one_output.weight"),
        "one_linear.weight",
    }
    assert undecayed == {
        *("cls_token", "class_token", "reg_token", "register_tokens", "mask_token", "dist_token", "registers"),
    }


def test_the_magnitudes_of_weight_normalisation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(3, 4)),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
            nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=None),
        )
    decayed, undecayed = split(param_groups(model, 0.1))
    assert decayed == {
        *("0.weight_v", "1.parametrizations.weight.original1", "2.weight_hh_l0_v", "2.weight_ih_l0"),
        *("3.parametrizations.weight.original", "4.parametrizations.weight.original1"),
    }
    assert {"0.weight_g", "1.parametrizations.weight.original0", "2.weight_hh_l0_g"} <= undecayed
    assert "4.parametrizations.weight.original0" in undecayed


class Vit(nn.Module):
    """As timm's and Swin's models say it."""

    def __init__(self, depth=3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 6))
        self.pos_embed = nn.Parameter(torch.ones(1, 9, 6))
        self.patch_embed = nn.Conv2d(3, 6, 2)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(depth)))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def no_weight_decay(self):
        return {"pos_embed", "blocks.*.1.weight", "no_such_name"}

    def no_weight_decay_keywords(self):
        return {"patch_embed"}


def test_what_a_model_says_of_weight_decay():
    spared = {"pos_embed", "cls_token", "patch_embed.weight", *(f"blocks.{i}.1.weight" for i in range(3))}
    decayed, undecayed = split(param_groups(Vit(), 0.1))
    assert spared <= undecayed and decayed == {"head.weight"}
    nested = nn.ModuleDict({"encoder": Vit(), "pos_embed": nn.Linear(3, 3)})
    decayed, undecayed = split(param_groups(nested, 0.1))
    assert {f"encoder.{name}" for name in spared} <= undecayed
    assert decayed == {"encoder.head.weight", "pos_embed.weight"}


# Learning rates by depth ----------------------------------------------------------------------------------------------


def scale_of(groups, key="lr_scale"):
    return {name: group[key] for group in groups for name, _ in group["params"]}


def test_layer_decay_is_beits():
    """get_num_layer_for_vit: embeddings 0, block i is i + 1, the last norm and the head at the top."""
    depth = 3

    def layer(name):
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1

    groups = param_groups(Vit(depth), 0.1, layer_decay=0.75)
    scales = scale_of(groups)
    assert scales == {name: 0.75 ** (depth + 1 - layer(name)) for name, _ in Vit(depth).named_parameters()}
    assert [group["layer"] for group in groups] == sorted(group["layer"] for group in groups)
    assert len(groups) == len({(group["layer"], group["weight_decay"]) for group in groups})
    assert split(groups) == split(param_groups(Vit(depth), 0.1))


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
        self.fc = nn.Linear(8, 2)


NESTED = nn.Sequential(nn.Linear(2, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), nn.Linear(4, 1))
MODELS = {
    "stages": (Resnet(), ["conv1", "layer1.0", "layer1.2", "layer2.0", "layer2.1", "fc"]),
    "an MLP": (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), ["0", "2"]),
    "a stack in a stack": (NESTED, ["0", "1.0", "1.1", "1.2", "1.3", "2"]),
    "torch's transformer": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 3, enable_nested_tensor=False),
        ["layers.0", "layers.1", "layers.2"],
    ),
}


@pytest.mark.parametrize("model, layers", MODELS.values(), ids=MODELS)
def test_layers_of_other_models(model, layers):
    scales = scale_of(param_groups(model, 0.1, layer_decay=0.5))
    for name, scale in scales.items():
        [layer] = [i for i, prefix in enumerate(layers) if name.startswith(f"{prefix}.")]
        assert scale == 0.5 ** (len(layers) - 1 - layer), name


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"module": m})], ids=["itself", "wrapped"])
@pytest.mark.parametrize("kind", ["dict", "function"])
def test_a_models_group_matcher(wrap, kind):
    class Matched(Vit):
        def group_matcher(self, coarse=False):
            assert not coarse
            if kind == "function":
                return lambda name: 0 if "embed" in name or "cls" in name else 1 if "blocks" in name else (2, 5)
            return {
                "stem": r"^cls_token|pos_embed|patch_embed",
                "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
            }

    scales = scale_of(param_groups(wrap(Matched()), 0.1, layer_decay=0.5))
    scales = {name.removeprefix("module."): scale for name, scale in scales.items()}
    if kind == "function":
        assert (scales["pos_embed"], scales["blocks.2.1.weight"], scales["head.weight"]) == (0.25, 0.5, 1)
    else:
        # The ordinal of the norm says: with the group before, block 2.
        found = [
            scales[name] for name in ("cls_token", "blocks.0.1.weight", "blocks.2.1.weight", "norm.weight", "head.bias")
        ]
        assert found == [0.5**4, 0.5**3, 0.5, 0.5, 1]


@pytest.mark.parametrize("make", [trainopt.SGD, trainopt.AdamW])
@pytest.mark.parametrize("given", [False, True], ids=["of the optimizer", "given"])
def test_optimizers_step_with_the_layers_rates(make, given):
    model = Vit()
    groups = param_groups(model, 0.1, layer_decay=0.75, lr=0.5 if given else None)
    optimizer = make(groups, lr=77.0 if given else 0.5)
    scales = scale_of(param_groups(Vit(), 0.1, layer_decay=0.75))
    for group in optimizer.param_groups:
        assert "lr_scale" not in group
        assert {group["lr"] / 0.5} == {scales[name] for name in group["param_names"]}
    schedule = trainopt.Schedule(optimizer, lr=lambda k: 0.5)
    assert schedule.base_lrs == [group["lr"] * 2 for group in optimizer.param_groups]


def test_torchs_optimizers_with_a_given_rate():
    optimizer = torch.optim.AdamW(param_groups(Vit(), 0.1, layer_decay=0.75, lr=0.5), lr=77.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 * 0.75**k for k in range(5)}


def test_timms_own_groups_are_left_to_timms_schedulers():
    p = nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [p], "lr_scale": 0.5, "weight_decay": 0.0}]
    for make in (trainopt.AdamW, torch.optim.AdamW):
        [group] = make([dict(group) for group in groups], lr=1.0).param_groups
        assert group["lr"] == 1.0 and group["lr_scale"] == 0.5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_as_timm(name):
    try:
        import timm
        from timm.optim import param_groups_layer_decay
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        pytest.skip(f"timm: {error}")
    model = timm.create_model(name, pretrained=False)
    theirs = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)(), layer_decay=0.75
    )
    names = {param: name for name, param in model.named_parameters()}
    expected = {names[param]: group["lr_scale"] for group in theirs for param in group["params"]}
    assert scale_of(param_groups(model, 0.05, layer_decay=0.75)) == pytest.approx(expected)
    spared = {names[param] for group in theirs for param in group["params"] if group["weight_decay"] == 0}
    assert spared <= split(param_groups(model, 0.05))[1]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: param_groups(nn.Linear(2, 2), -0.1), ["weight_decay", "-0.1"]),
        (lambda: param_groups(nn.Linear(2, 2), math.nan), ["weight_decay", "nan"]),
        (lambda: param_groups(nn.Linear(2, 2), "0.1"), ["weight_decay", "'0.1'"]),
        (lambda: param_groups(nn.Linear(2, 2), 0.1, no_decay="bias"), ["no_decay", "'bias'"]),
        (lambda: param_groups(nn.Linear(2, 2), 0.1, no_decay=["bias", "embed*"]), ["no_decay", "'embed*'"]),
        (lambda: param_groups(nn.ReLU(), 0.1), ["ReLU"]),
        (lambda: param_groups(nn.LazyLinear(2), 0.1), ["'weight'"]),
        (lambda: param_groups(Vit(), 0.1, layer_decay=0), ["layer_decay", "0"]),
        (lambda: param_groups(Vit(), 0.1, layer_decay=1.5), ["layer_decay", "1.5"]),
        (lambda: param_groups(Vit(), 0.1, layer_decay="0.75"), ["layer_decay", "'0.75'"]),
        (lambda: param_groups(Vit(), 0.1, layer_decay=0.75, lr=-1.0), ["lr", "-1.0"]),
        (lambda: param_groups(Vit(), 0.1, lr=0.1), ["lr=0.1", "layer_decay"]),
        (lambda: param_groups(nn.Linear(2, 2), 0.1, layer_decay=0.75), ["Linear", "layer"]),
    ],
)
def test_refused_by_name_and_value(make, words):
    with pytest.raises(ValueError) as refusal:
        make()
    assert all(word in str(refusal.value) for word in ["param_groups", *words]), refusal.value
