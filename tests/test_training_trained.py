"""What a batch is for the model and the loss, and the names under which both are saved, whatever stands round them."""

from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from test_training_loop import Recorder, assert_same_weights, network, samples, sgd
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import trainopt
from trainopt.training import Silent, fit
from trainopt.training.data import move, tensors_in

pytestmark = pytest.mark.usefixtures("one_thread")


META = torch.device("meta")


# Batches that are mappings --------------------------------------------------------------------------------------------


class Language(nn.Module):
    """A causal model by Hugging Face's convention: it takes the batch's keys and gives an output with `.loss`."""

    def __init__(self, output=SimpleNamespace, shift=1):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4).double(), nn.Linear(4, 9).double()
        self.made, self.shift = output, shift

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids))
        loss = None
        if labels is not None:
            kept, wanted = logits[:, : logits.size(1) - self.shift], labels[:, self.shift :]
            loss = F.cross_entropy(kept.flatten(0, 1), wanted.flatten())
        return self.made(loss=loss, logits=logits)


def token_batches(kind=dict):
    """Two micro-batches of different sizes, lengths and padding."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for rows, length, padding in ((4, 6, 2), (2, 5, 0), (3, 6, 4)):
        tokens = torch.randint(0, 9, (rows, length), generator=generator)
        labels = tokens.clone()
        labels[: rows // 2, length - padding :] = -100
        batches.append(kind({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}))
    return batches


@pytest.mark.parametrize("shift", [1, 0])
@pytest.mark.parametrize("output", [SimpleNamespace, OrderedDict, dict])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_model_that_computes_its_own_loss_needs_neither_loss_nor_split(output, kind, shift):
    batches = token_batches(kind)
    ours, plain = Language(output, shift), Language(shift=shift)
    total = count = 0
    for batch in batches:
        counted = (batch["labels"][:, shift:] != -100).sum()
        total, count = total + plain(**batch).loss * counted, count + counted
    (total / count).backward()
    recorder = Recorder()
    metrics = {"accuracy": lambda output, labels: torch.ones(())}
    choices = {"epochs": 1, "accumulation": 3, "validation": batches, "metrics": metrics, "report": recorder}
    fit(ours, batches, None, sgd(ours, lr=1.0), **choices)
    for param, start, other in zip(ours.parameters(), Language().parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(start - param, other.grad, rtol=1e-9, atol=1e-12)
    assert not recorder.named("Message")
    loss, _ = (sum(value) for value in zip(*validation_terms(ours, batches, shift), strict=True))
    assert recorder.named("Validated")[-1].loss == pytest.approx(loss, rel=1e-9)


def validation_terms(model, batches, shift):
    counts = [int((batch["labels"][:, shift:] != -100).sum()) for batch in batches]
    model.made = SimpleNamespace
    with torch.no_grad():
        return [(float(model(**b).loss) * c / sum(counts), c) for b, c in zip(batches, counts, strict=True)]


@pytest.mark.parametrize(
    "loss", [lambda output, target: output.loss, lambda output, labels: 2 * output.loss, lambda o, _: o.loss + 0.1]
)
def test_a_loss_may_take_the_models_own(loss):
    batches, expected = token_batches(), Language()
    ours = Language()
    fit(expected, batches, None, sgd(expected, lr=0.5), epochs=1, accumulation=3, report=Silent())
    factor = 2 if loss(SimpleNamespace(loss=1.0), None) == 2 else 1
    recorder = Recorder()
    fit(ours, batches, loss, sgd(ours, lr=0.5 / factor), epochs=1, accumulation=3, report=recorder)
    assert_same_weights(ours, expected, rtol=1e-10, atol=1e-12)
    assert not recorder.named("Message")


def test_a_compiled_model_that_computes_its_own_loss_says_what_is_assumed():
    model = Language(shift=0)
    expected = Language(shift=0)
    fit(expected, token_batches(), None, sgd(expected), epochs=1, accumulation=3, report=Silent())
    recorder = Recorder()
    compiled = torch.compile(model, backend="eager")
    fit(compiled, token_batches(), None, sgd(model), epochs=1, accumulation=3, report=recorder)
    (message,) = recorder.named("Message")
    assert message.topic == "count" and "labels" in message.text
    assert_same_weights(model, expected, rtol=1e-10, atol=1e-12)


def test_a_model_without_a_loss_is_told():
    model = network()
    with pytest.raises(TypeError, match="loss is None, but the model's output, a Tensor, has no loss"):
        fit(model, samples(), None, sgd(model), epochs=1, batch_size=7, report=Silent())
    with pytest.raises(ValueError, match=r"a batch is a UserDict, not \(inputs, target\): give split=, or loss=None"):
        fit(model, token_batches(UserDict), nn.CrossEntropyLoss(), sgd(model), epochs=1, report=Silent())


def test_mappings_of_any_kind_are_moved_and_looked_into():
    class Batch(UserDict):
        @property
        def first(self):
            return self["a"]

    tree = Batch(a=torch.ones(2), b=[torch.ones(1), ("text", 3)])
    moved = move(tree, META)
    assert type(moved) is Batch and moved.first.is_meta and moved["b"][0].is_meta and not tree.first.is_meta
    assert moved["b"][1] == ("text", 3)
    assert type(move(OrderedDict(a=torch.ones(1)), META)) is OrderedDict
    assert len(list(tensors_in({"a": tree, "b": torch.ones(1)}))) == 3
    Pair = namedtuple("Pair", "x y")
    assert move(Pair(torch.ones(1), 2), META).x.is_meta
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert isinstance(move(packed, torch.device("cpu")), PackedSequence)

    class Graph:
        """A batch that knows itself how to be moved."""

        def to(self, device):
            return device

    assert move([Graph()], META) == [META]


# Names ----------------------------------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


def partly(model):
    """One layer of it compiled."""
    model[1] = torch.compile(model[1], backend="eager")
    model[0].compile(backend="eager")
    return model


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def deep(wrap):
    model = Deep()
    if wrap is partly:
        model.body = partly(model.body)
        return model, model
    return wrap(model), model


WRAPPERS = {"plain": lambda model: model, "compiled": compiled, "partly": partly, "parallel": nn.DataParallel}


def run(directory, wrap, **choices):
    called, model = deep(WRAPPERS[wrap])
    optimizer = trainopt.AdamW(model.parameters(), lr=0.02)
    choices = {"batch_size": 7, "average": 0.5, "early_stopping": 50, "seed": 0, **choices}
    choices |= {"directory": directory, "report": Silent(), "validation": samples()}
    return model, fit(called, samples(), nn.CrossEntropyLoss(), optimizer, **choices)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_files_carry_plain_names_and_go_on_under_any_wrapper(wrap, tmp_path):
    names = list(Deep().state_dict())
    straight, _ = run(tmp_path / "straight", "plain", epochs=3)
    _, result = run(tmp_path / "run", wrap, epochs=1)
    saved = torch.load(result.checkpoint, weights_only=True)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert list(saved["model"]) == list(best["model"]) == list(result.average) == names
    assert list(saved["average"]["weights"]) == [name for name, _ in Deep().named_parameters()]
    Deep().load_state_dict(result.average)
    run(tmp_path / "run", "plain" if wrap != "plain" else "compiled", epochs=2)
    model, _ = run(tmp_path / "run", wrap, epochs=3)
    for value, other in zip(model.state_dict().values(), straight.state_dict().values(), strict=True):
        # What is compiled may round otherwise, and DataParallel moves a model to the GPU where there is one.
        relative, absolute = (1e-6, 1e-7) if value.device == other.device else (1e-3, 1e-4)
        torch.testing.assert_close(value.cpu(), other, rtol=relative, atol=absolute)


def test_an_old_file_of_a_compiled_model_goes_on(tmp_path):
    from test_training_criterion import as_format_1

    _, result = run(tmp_path, "plain", epochs=1)
    as_format_1(result.checkpoint)
    state = torch.load(result.checkpoint, weights_only=True)
    for tree in (state, state["average"]):
        key = "model" if tree is state else "weights"
        tree[key] = {f"_orig_mod.{name}": value for name, value in tree[key].items()}
    state["best"]["weights"] = {f"_orig_mod.{name}": value for name, value in state["best"]["weights"].items()}
    from trainopt.training.checkpoint import write

    write(state, result.checkpoint)
    assert run(tmp_path, "compiled", epochs=2)[1].step == 8


# What is refused, and how ---------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone, for wrappers that want one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_static_graph_under_accumulation_is_refused_in_a_sentence(alone):
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
    choices = {"epochs": 1, "batch_size": 7, "report": Silent()}
    with pytest.raises(ValueError, match="accumulation is 2, but model is a DistributedDataParallel with static_graph"):
        fit(wrapped, samples(), nn.CrossEntropyLoss(), sgd(model), accumulation=2, **choices)
    assert fit(wrapped, samples(), nn.CrossEntropyLoss(), sgd(model), **choices).step == 4


class Nothing:
    """An iterable of unknown length that gives nothing."""

    def __iter__(self):
        return iter(())


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("validation", [Nothing(), torch.utils.data.DataLoader(Streamed())])
def test_an_empty_validation_is_refused_before_training(validation):
    model = network()
    metrics = {"accuracy": lambda output, target: (output.argmax(1) == target).double().mean()}
    with pytest.raises(ValueError, match="validation is empty: it gives no batch"):
        choices = {"validation": validation, "metrics": metrics, "report": Silent()}
        fit(model, samples(), nn.CrossEntropyLoss(), sgd(model), epochs=1, batch_size=7, **choices)
    assert_same_weights(model, network())


def test_a_validation_that_becomes_empty_gives_no_number():
    class Once:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([samples()] if self.passes < 2 else [])

    recorder, model = Recorder(), network()
    metrics = {"accuracy": lambda output, target: torch.ones(())}
    choices = {"validation": Once(), "metrics": metrics, "report": recorder}
    fit(model, samples(), nn.CrossEntropyLoss(), sgd(model), epochs=1, batch_size=7, **choices)
    (event,) = recorder.named("Validated")
    assert event.loss != event.loss and event.metrics["accuracy"] != event.metrics["accuracy"]


def test_the_range_test_is_a_function_of_the_package():
    from trainopt.training import lr_find
    from trainopt.training.lr_find import LrCurve

    model = network()
    assert isinstance(lr_find(model, samples(), nn.CrossEntropyLoss(), sgd(model), steps=5, batch_size=7), LrCurve)


class Doubled(nn.Module):
    """Its output's gradient is twice the scale, which float16 holds only where the loss is weighed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)


def test_the_search_of_float16_weighs_the_loss_as_the_update_did():
    torch.manual_seed(0)
    inputs = torch.rand(4, 2)
    inputs[3, 1] = float("nan")
    recorder, model = Recorder(), Doubled()
    choices = {"precision": "float16", "accumulation": 4, "batch_size": 1, "shuffle": False, "report": recorder}
    fit(model, (inputs, inputs), lambda output, target: 2 * output.float().mean(), sgd(model), epochs=1, **choices)
    (message,) = [event for event in recorder.named("Message") if event.topic == "nonfinite"]
    assert "the batch's inputs" in message.text


# What is monitored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grows"),
    [
        *(("accuracy", True), ("acc", True), ("val_acc", True), ("top5_acc", True), ("acc@1", True), ("Top1", True)),
        *(("f1", True), ("F1Score", True), ("macro-f1", True), ("macroF1", True), ("auc", True), ("roc_auc", True)),
        *(("AUROC", True), ("mAP", True), ("map50", True), ("mIoU", True), ("mean_iou", True), ("dice", True)),
        *(("bleu", True), ("rouge1", True), ("r2", True), ("PSNR", True), ("ndcg@10", True)),
        *(("balancedAccuracy", True), ("rmse", False), ("mse", False), ("val_mae", False), ("error", False)),
        *(("topErr", False), ("perplexity", False)),
        *(("WER", False), ("cer", False), ("nll", False), ("fid", False), ("brier_score", False), ("loss", False)),
        *(("score", None), ("quality", None), ("accuracy_error", None), ("f1_loss", None), ("", None)),
    ],
)
def test_whether_more_is_better_is_read_from_the_name(name, grows):
    from trainopt.training import Options

    if grows is None:
        with pytest.raises(ValueError, match=r"does not say whether more of it is better: give maximize=True or False"):
            Options(epochs=1, monitor=name).is_larger_better  # noqa: B018
    else:
        assert Options(epochs=1, monitor=name).is_larger_better is grows
    for chosen in (True, False):
        assert Options(epochs=1, monitor=name, maximize=chosen).is_larger_better is chosen


def test_accuracy_is_maximized():
    scores = iter([0.1, 0.9, 0.3])
    model = network()
    metrics = {"accuracy": lambda output, target: next(scores), "odd": lambda output, target: 0.0}
    choices = {"batch_size": "full", "validation": samples(), "metrics": metrics, "report": Silent()}
    result = fit(model, samples(), nn.CrossEntropyLoss(), sgd(model), epochs=3, monitor="accuracy", **choices)
    assert (result.best, result.best_step) == (0.9, 2)
    with pytest.raises(ValueError, match="monitor is 'odd', which does not say"):
        fit(model, samples(), nn.CrossEntropyLoss(), sgd(model), epochs=3, monitor="odd", **choices)
