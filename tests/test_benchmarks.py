"""The benchmarks' shape lists, pairing and tables. No time is asserted: only that everything asked for is measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import in_backward, loss_cases, losses, memory, muon, optimizers, peers, tables, tail, timing, training
from benchmarks.bandwidth import ReadModifyWrite
from benchmarks.workloads import WORKLOADS, Workload

SMALL = Workload("small", "three small tensors", ((5,), (3, 4), ()))


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("1000x64", 1000, 64_000),
        ("300x4096", 300, 1_228_800),
        ("mlp", 4, 101_770),
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("64m", 1, 67_108_864),
        ("gpt2-bf16", 148, 124_439_808),
    ],
)
def test_workloads_have_the_sizes_of_their_models(name, tensors, elements):
    workload = WORKLOADS[name]
    assert (len(workload.shapes), workload.elements) == (tensors, elements)
    assert workload.dtype == (torch.bfloat16 if name.endswith("bf16") else torch.float32)


def test_the_mlp_is_torchs_own():
    model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    assert WORKLOADS["mlp"].shapes == tuple(tuple(parameter.shape) for parameter in model.parameters())


def test_every_round_times_every_contender():
    counts = {"a": 0, "b": 0}

    def count(name):
        counts[name] += 1

    seconds = timing.interleave({name: lambda name=name: count(name) for name in counts}, rounds=3, block_seconds=1e-4)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in seconds.values() for value in values)
    assert all(value >= 3 for value in counts.values())


def test_ratios_are_taken_within_a_round():
    spread = timing.paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 2.0, 2.0)
    assert timing.paired_difference([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]).median == 1.0
    assert timing.Spread.of([5.0]) == timing.Spread(5.0, 5.0, 5.0)


@pytest.mark.parametrize("traffic", [8, 2_849_560])
def test_memory_pass_reads_and_writes_the_traffic(traffic):
    memory = ReadModifyWrite(traffic)
    memory()
    assert memory.tensor[-1] == 2
    assert 2 * memory.tensor.nbytes == traffic


@pytest.mark.parametrize(
    ("rule", "bytes_an_element"),
    [
        ("adamw", 28),
        ("sgd", 20),
        ("adagrad", 20),
        ("rprop", 28),
        ("lion", 20),
        ("lamb", 44),
        ("lars", 28),
        ("novograd", 24),
        ("adan", 44),
        ("ademamix", 36),
        ("prodigy", 52),
        ("adamwschedulefree", 28),
        ("radamschedulefree", 28),
        ("sgdschedulefree", 20),
    ],
)
def test_a_measurement_has_all_contenders(rule, bytes_an_element):
    result = optimizers.measure(SMALL, optimizers.RULES[rule], rounds=2)
    of_torch = set() if rule in optimizers.FIELD else {"torch default", "torch foreach"}
    if of_torch and rule != "rprop":
        of_torch.add("torch fused")
    assert {"trainopt"} | of_torch <= result.seconds.keys()
    installed = {peer.title for peer in peers.PEERS.get(optimizers.RULES[rule].name, []) if peer.load()}
    assert {title for title in installed if "compiled" not in title} <= result.seconds.keys() | {"DeepSpeedCPUAdam"}
    assert result.left_out.keys() <= {"DeepSpeedCPUAdam"}  # which compiles, where it can
    assert all(len(values) == 2 for values in (*result.seconds.values(), result.memory))
    assert result.traffic == bytes_an_element * 18
    assert (result.reference == "trainopt") == (result.seconds.keys() - result.not_compared.keys() == {"trainopt"})
    assert result.speedup(result.reference).median == 1.0
    assert optimizers.details(result).count("\n") >= 3 + len(result.seconds)


def test_packages_that_are_missing_are_named_and_those_that_differ_are_marked(monkeypatch):
    rows = [peers.Peer("gone", "no_such.optim.Lion"), peers.Peer("other", "torch.optim.AdamW", differs="of AdamW")]
    monkeypatch.setitem(peers.PEERS, "Lion", rows)
    assert peers.missing(["Lion", "Adagrad"]) == {"no_such": "ModuleNotFoundError: No module named 'no_such'"}
    result = optimizers.measure(SMALL, optimizers.RULES["lion"], rounds=1)
    assert result.seconds.keys() == {"other", "trainopt"} and result.not_compared == {"other": "of AdamW"}
    assert result.reference == "trainopt"  # it is compared with nobody
    assert "other is not compared with the others: of AdamW" in optimizers.details(result)
    assert "other is not compared with the others: of AdamW." in optimizers.summary([result])


@pytest.mark.parametrize("differs", [{}, {"rho": 0.5}])
def test_peers_are_compared_by_what_they_change(monkeypatch, differs):
    """From parameters that are much larger than their change, and by one that clears its gradients."""

    class Peer(torch.optim.Adadelta):
        def step(self):
            super().step()
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad.zero_()

    monkeypatch.setattr(peers, "imported", lambda module: SimpleNamespace(Peer=Peer))
    monkeypatch.setitem(peers.PEERS, "Adadelta", [peers.Peer("peer", "its.Peer", differs, writes_gradient=True)])
    rule = replace(optimizers.RULES["adadelta"], start=1.0, steps=2)
    result = optimizers.measure(SMALL, rule, rounds=1)
    assert ("peer" in result.left_out) == bool(differs)
    assert result.left_out.keys() <= {"peer"}


@pytest.mark.slow
def test_compiled_steps_are_contenders_where_they_are_asked_for():
    steps = [
        optimizers.measure(SMALL, optimizers.RULES["sgd"], rounds=1, most_compiled=most).seconds for most in (2, 3)
    ]
    assert ["torch compiled" in seconds for seconds in steps] == [False, True]


def test_a_contender_that_does_not_do_the_work_is_no_peer(monkeypatch):
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no compiler")

    stock = optimizers.contenders
    extra = {"torch fused": optimizers.Contender(Idle), "broken": optimizers.Contender(Broken)}
    monkeypatch.setattr(optimizers, "contenders", lambda *options: stock(*options) | extra)
    result = optimizers.measure(SMALL, optimizers.RULES["sgd"], rounds=1)
    assert "100 %" in result.left_out["torch fused"]
    assert result.left_out["broken"] == "RuntimeError: no compiler"
    assert result.reference not in extra
    assert "torch fused is left out" in optimizers.details(result)
    assert "no peer" in optimizers.summary([result])


@pytest.mark.slow
def test_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(optimizers, "WORKLOADS", {"small": SMALL})
    file = tmp_path / "figures.json"
    assert optimizers.main(["--rounds", "1", "--markdown", "--json", str(file)]) == 0
    output = capsys.readouterr()
    assert output.out.count("| three small tensors |") == 2
    assert "x.add_(1)" in output.err
    results = json.loads(file.read_text())["results"]
    assert [result["optimizer"] for result in results] == ["AdamW", "SGD with momentum 0.9"]
    assert all(len(result["seconds"]["trainopt"]) == 1 for result in results)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--workload", "lenet"),
        ("--optimizer", "lbfgs"),
        ("--rounds", "0"),
        ("--threads", "two"),
        ("--compiled", "0"),
        ("--json", "/no/such/f"),
    ],
)
def test_bad_options_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        optimizers.main([option, value])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert option in message and value in message


def test_tables():
    assert tables.text_table(["a", "b"], [["long", "1"], ["x", "22"]]) == "a      b\nlong   1\nx     22"
    assert tables.markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert [tables.duration(value) for value in (1.5e-6, 0.00099, 0.0125, 0.25)] == [
        "1.50 µs",
        "990 µs",
        "12.5 ms",
        "250 ms",
    ]


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_losses(monkeypatch):
    """The cases of the losses at a size at which they cost nothing."""
    cases = (
        loss_cases._cross_entropy(7, 5, torch.float32),
        loss_cases._cross_entropy(7, 5, torch.float32, "in place"),
        loss_cases._pointwise("kl_div", torch.nn.functional.logsigmoid, size=100, reduction="sum"),
        loss_cases._linear(torch.float32, tokens=6, width=3, words=5),
        loss_cases._linear(torch.bfloat16, tokens=6, width=3, words=5),
    )
    monkeypatch.setattr(losses, "CASES", cases)
    return cases


def test_losses_have_the_sizes_that_the_tables_name():
    titles = [case.title for case in loss_cases.CASES]
    assert len(titles) == len(set(titles)) == 18
    moved = {case.title: case.moved for case in loss_cases.CASES}
    assert moved["cross_entropy, 1,024 × 50,257, bfloat16"] == 3 * 1024 * 50257 * 2
    assert moved["mse_loss, 16,777,216"] == 5 * 4 * 2**24


def test_all_contenders_for_a_loss_do_the_same_work(small_losses):
    for index, case in enumerate(small_losses):
        result = losses.measure(index, 1, "default allocator", with_compile=False, with_peaks=False)
        assert not result.left_out
        assert set(result.seconds) == {*case.losses, *case.others}
        assert bool(result.memory_pass) == bool(case.moved)
        assert result.speedup(case.reference).median == 1.0
        assert losses.details(result).startswith(case.title)


def test_a_loss_that_is_another_is_no_peer(small_losses, monkeypatch):
    case = small_losses[0]
    monkeypatch.setitem(case.losses, "torch eager", lambda x, t: 2 * torch.nn.functional.cross_entropy(x, t))
    with pytest.raises(RuntimeError, match="unlike that of torch eager"):
        losses.measure(0, 1, "default allocator", with_compile=False, with_peaks=False)


@pytest.mark.slow
@pytest.mark.skipif(not memory.can_measure(), reason="the system does not tell")
def test_peak_memory_counts_what_is_held_and_given_back():
    def call():
        return torch.ones(2**24).sum()

    # glibc keeps freed memory that lies below memory in use, and a call that is given it adds no page of its own.
    torch.empty(2**22)  # once freed, it raises the size from which glibc asks the system for each tensor alone
    kept = [torch.ones(2**20) for _ in range(65)]
    del kept[:64]
    assert 60e6 < memory.peak_of(call) < 100e6
    assert memory.peak_of(lambda: None) < 5e6


class Ones:
    """Makes a call that holds 64 MB."""

    def __call__(self):
        return torch.ones(2**24).sum


@pytest.mark.skipif(not memory.can_measure(), reason="the system does not tell")
@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own():
    assert memory.peak_in_new_process(Ones()) < 5e6  # what was made before the call is not counted


@pytest.mark.slow
def test_the_losses_table(small_losses, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(losses, "measure_in_new_process", in_this_process)
    monkeypatch.setattr(losses, "peak_in_new_process", lambda prepare: memory.peak_of(prepare()))
    file = tmp_path / "figures.json"
    assert losses.main(["--rounds", "1", "--markdown", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    for allocator in losses.ALLOCATORS:
        assert f"| {allocator} |" in output
    assert output.count("| linear_cross_entropy, 6 × 3 × 5, float32 |") == 2
    assert len(json.loads(file.read_text())["results"]) == 2 * len(small_losses)


def in_this_process(allocator, options, file):
    arguments = ["--allocator", allocator, "--rounds", str(options.rounds), "--json", str(file)]
    assert losses.main(arguments) == 0
    return [losses.Result(**result) for result in json.loads(file.read_text())["results"]]


def test_the_training_benchmark_times_every_loop_against_ten_lines(monkeypatch, capsys):
    monkeypatch.setattr(training, "SAMPLES", 130)
    monkeypatch.setattr(training, "EPOCHS", 1)
    assert training.main(["--rounds", "2", "--markdown"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(training.contenders())


def test_the_tail_is_the_same_work_for_all_and_has_a_row_for_each(monkeypatch, capsys):
    monkeypatch.setitem(tail.WORKLOADS, "mlp", SMALL)
    assert tail.main(["--rounds", "1", "--workload", "mlp"]) == 0
    said = capsys.readouterr().out
    assert "44 bytes an element" in said and all(
        f"\n{name}" in said for name in ("torch, zero_grad", "trainopt", "x.add_")
    )
    one, other = [torch.nn.Parameter(torch.zeros(3))], [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(AssertionError):
        tail.check(one, other)


@pytest.mark.slow
def test_steps_in_backward_are_timed_against_steps_after_it(monkeypatch, capsys):
    for name, value in {"VOCABULARY": 50, "CONTEXT": 8, "WIDTH": 8, "LAYERS": 2, "HEADS": 2}.items():
        monkeypatch.setattr(in_backward, name, value)
    monkeypatch.setattr(in_backward, "peak_in_new_process", lambda prepare: memory.peak_of(prepare()))
    assert in_backward.main(["--rounds", "1", "--tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "\napart" in said and "\nin backward" in said and " MB" in said


def test_muon_is_timed_with_and_without_adamw(capsys):
    assert muon.main(["--rounds", "1", "--layers", "1", "--width", "16", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-2:]] == ["matrices", "all parameters"]
    hidden, rest = muon.parameters(2, 16)
    assert len(hidden) == 8 and len(hidden) + len(rest) == 28
