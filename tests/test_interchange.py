"""Distributed checkpoints go from torch.optim to trainopt and back: nested, flattened, in files, on two ranks too."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import CLASSES, OPTIONS, TABLE, as_loaded, assert_same_outcome, each_class, model_and, train
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import trainopt

DAMPENED = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
CASES = {**{name: (name, OPTIONS[name]) for name in CLASSES}, "SGD, dampened": ("SGD", DAMPENED), "plain": ("SGD", {})}
each_case = pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)
each_way = pytest.mark.parametrize("way", [(1, 0), (0, 1), (0, 0)], ids=["from torch", "to torch", "our own"])
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
FORMS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "nested, full": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flattened, full": StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def set_state(model, optimizer, saved, form):
    """set_optimizer_state_dict; full and flattened, without any state or with other keys, torch refuses its own."""
    if form.full_state_dict and (
        form.flatten_optimizer_state_dict
        or not optimizer.state
        or saved["param_groups"][0].keys() != optimizer.param_groups[0].keys()
    ):
        form = StateDictOptions(flatten_optimizer_state_dict=form.flatten_optimizer_state_dict)
    set_optimizer_state_dict(model, optimizer, saved, options=form)


def made(cls, options, split=False):
    """A model and its optimizer, of one group or of two."""
    model, optimizer = model_and(cls, **options)
    params = list(model.parameters())
    return model, cls([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], **options) if split else optimizer


def assert_goes_on(first, second, steps=3):
    """The second optimizer's next steps are those of the first."""
    second[0].load_state_dict(first[0].state_dict())
    for model, optimizer in (first[0], as_loaded(first[1])), second:
        train(model, optimizer, steps, start=3)
    assert_same_outcome((second[1], list(second[0].parameters())), (first[1], list(first[0].parameters())))


@each_case
@each_way
@each_form
def test_in_memory(name, options, way, form):
    """Of two groups; of one, in files."""
    source, target = (CLASSES[name][side] for side in way)
    first = made(source, options, split=True)
    train(*first, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(*first, options=form))
    second = made(target, options, split=True)
    set_state(*second, saved, form)
    assert_goes_on(first, second)


@each_case
@each_way
@pytest.mark.parametrize("form", [FORMS["nested"], FORMS["flattened"]], ids=["nested", "flattened"])
def test_in_files(name, options, way, form, tmp_path):
    source, target = (CLASSES[name][side] for side in way)
    first = made(source, options)
    train(*first, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(*first, options=form)}, checkpoint_id=tmp_path, no_dist=True)
    second = made(target, options)
    held = {"optimizer": get_optimizer_state_dict(*second, options=form)}
    dcp.load(held, checkpoint_id=tmp_path, no_dist=True)
    set_state(*second, held["optimizer"], form)
    assert_goes_on(first, second)


@each_class
@each_form
@pytest.mark.parametrize("to_torch", [False, True])
def test_options_of_our_own_go_with_ours_and_do_not_disturb_torch(name, form, to_torch):
    ours = {**OPTIONS[name], "l1": 0.01, "noise": 0.001}
    first = made(CLASSES[name][0], ours)
    train(*first, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(*first, options=form))
    model, second = made(CLASSES[name][to_torch], OPTIONS[name] if to_torch else ours)
    set_state(model, second, saved, form)
    if to_torch:
        train(model, second, 1)
    else:
        assert_goes_on(first, (model, second))


EVERY_OPTION = {"l1": 0.0, "l1_proximal": False, "noise": 0.0, "seed": 0}


@each_class
@each_form
@pytest.mark.parametrize("l1", [0.0, 0.25])
def test_files_of_the_days_when_every_group_had_every_option(name, form, l1):
    first = made(CLASSES[name][0], {**OPTIONS[name], "l1": l1})
    train(*first, 3)
    every = {**EVERY_OPTION, "l1": l1}
    if "bias_correction" in CLASSES[name][0].EXTRAS:
        every["bias_correction"] = True
    for group in first[1].param_groups:
        group.update(every)
    saved = copy.deepcopy(get_optimizer_state_dict(*first, options=form))
    second = made(CLASSES[name][0], {**OPTIONS[name], "l1": l1})
    set_state(*second, saved, form)
    assert second[1].param_groups[0].get("l1", 0.0) == l1
    assert "noise" not in second[1].param_groups[0]
    assert_goes_on(first, second)


@each_class
def test_old_state_dicts_and_pickles(name):
    model, optimizer = made(CLASSES[name][0], OPTIONS[name])
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        group.update(EVERY_OPTION)
    optimizer.defaults.update(EVERY_OPTION)
    again = pickle.loads(pickle.dumps(optimizer))
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    again.step()
    _, other = made(CLASSES[name][0], OPTIONS[name])
    other.load_state_dict(optimizer.state_dict())
    torchs = CLASSES[name][1]([torch.zeros(1)])
    assert set(other.param_groups[0]) == set(torchs.param_groups[0])


@each_class
def test_an_option_that_was_set_is_saved_even_at_its_default(name):
    """Noise that a run has switched off stays off in the run that resumes it, and in the one that resumes that."""
    noisy = {**OPTIONS[name], "noise": 0.1}
    first = made(CLASSES[name][0], noisy)[1]
    first.param_groups[0]["noise"] = 0.0
    for _ in range(2):
        second = made(CLASSES[name][0], noisy)[1]
        second.load_state_dict(first.state_dict())
        assert second.param_groups[0]["noise"] == 0.0
        first = second


# Two processes --------------------------------------------------------------------------------------------------------


def two_ranks(rank, folder):
    """FSDP2 on two ranks: saved by one library, loaded by the other, and the run goes on alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    errors = []
    for case, (name, options) in CASES.items():
        for way in ((1, 0), (0, 1)) if TABLE[name].takes_shards else ((0, 0),):
            for number, (form_name, form) in enumerate(FORMS.items()):
                for files in (False, True):
                    where = f"{case} {way} {form_name} {'files' if files else 'memory'}"
                    path = f"{folder}/{case}-{way[0]}-{number}".replace(" ", "")
                    if form.full_state_dict and (files or form.flatten_optimizer_state_dict or not options):
                        continue  # torch refuses its own
                    try:
                        sharded_run(name, options, way, form, path if files else None, fully_shard, mesh)
                    except Exception as error:
                        errors.append(f"{where}: {type(error).__name__}: {error}")
    assert not errors, "\n".join(errors)


def sharded_run(name, options, way, form, path, fully_shard, mesh):
    sides = []
    for side in way:
        model, _ = made(CLASSES[name][side], options)
        fully_shard(model, mesh=mesh)
        sides.append((model, CLASSES[name][side](model.parameters(), **options)))
    first, second = sides
    train(*first, 3)
    if path is None:
        saved = copy.deepcopy(get_optimizer_state_dict(*first, options=form))
    else:
        dcp.save({"optimizer": get_optimizer_state_dict(*first, options=form)}, checkpoint_id=path)
        saved = {"optimizer": get_optimizer_state_dict(*second, options=form)}
        dcp.load(saved, checkpoint_id=path)
        saved = saved["optimizer"]
    if form.full_state_dict:
        form = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(*second, saved, options=form)
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        q.data.copy_(p.data)
    for model, optimizer in sides:
        train(model, optimizer, 2, start=3)
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.full_tensor())


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_ranks(two_ranks, str(tmp_path))


def test_what_a_group_without_our_options_looks_like():
    group = trainopt.AdamW([torch.zeros(1)], l1=0.5).param_groups[0]
    assert group["l1"] == 0.5 and "noise" not in group
