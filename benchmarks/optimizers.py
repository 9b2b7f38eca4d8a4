"""What one optimizer step costs, with trainopt and its peers, on the shapes of real and extreme models.

    python -m benchmarks.optimizers
    python -m benchmarks.optimizers --optimizer adamw --workload mlp gpt2 --markdown
    python -m benchmarks.optimizers --all --workload 64m 1000x64
    python -m benchmarks.optimizers --field --compiled --workload 64m 1000x64

What is timed is the whole step() call of a real optimizer whose parameters have gradients, in trainopt, in torch, and
in the packages of benchmarks/peers.py that are installed. Every contender has its own parameters and states; the
gradients are shared, except with those that write to them. Beside them in the same rounds, a plain pass over memory
shows what the machine can do at best with the bytes that the algorithm must move. Muon has benchmarks/muon.py.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter

import trainopt
from benchmarks.bandwidth import ReadModifyWrite
from benchmarks.peers import PEERS, Compile, by_torch, missing
from benchmarks.tables import duration, markdown_table, percent, spread, text_table
from benchmarks.timing import Spread, interleave, machine, paired_difference, paired_ratio
from benchmarks.workloads import WORKLOADS, Workload
from trainopt._extension import _C

Factory = Callable[[list[Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """An optimizer, its settings, and how many values it reads and writes for an element.

    What the first step is of parameters that are 0 is what it is of others where it does not depend on them; the others
    have a `start`, a standard deviation. Contenders are compared after so many steps.
    """

    name: str
    title: str
    settings: dict[str, Any]
    moved: int
    start: float = 0.0
    steps: int = 1


#: Those of the second half are what the field has beyond torch; what LAMB, LARS, NovoGrad and Prodigy read for their
#: sums comes first. Rates and growth are such that parameters which follow one gradient for thousands of steps stay
#: finite. RAdam's step is adaptive from the sixth on. With LAMB's own eps all elements change alike, and torch's norm
#: of 64M such numbers, which the peers take, is 6 % too small.
RULES = {
    "adamw": Rule("AdamW", "AdamW", {"lr": 1e-3, "weight_decay": 0.01}, 4 + 3),
    "sgd": Rule("SGD", "SGD with momentum 0.9", {"lr": 1e-3, "momentum": 0.9}, 3 + 2),
    "adamax": Rule("Adamax", "Adamax", {"lr": 1e-3}, 4 + 3),
    "radam": Rule("RAdam", "RAdam", {"lr": 1e-3}, 4 + 3, steps=6),
    "nadam": Rule("NAdam", "NAdam", {"lr": 1e-3}, 4 + 3),
    "asgd": Rule("ASGD", "ASGD", {"lr": 1e-3}, 3 + 2),
    "rmsprop": Rule("RMSprop", "RMSprop with momentum 0.9", {"lr": 1e-3, "momentum": 0.9}, 4 + 3),
    "adagrad": Rule("Adagrad", "Adagrad", {"lr": 1e-3}, 3 + 2),
    "adadelta": Rule("Adadelta", "Adadelta", {"lr": 1e-3}, 4 + 3),
    "adafactor": Rule("Adafactor", "Adafactor", {"lr": 1e-3}, 5 + 1),
    "rprop": Rule("Rprop", "Rprop", {"lr": 1e-3}, 4 + 3),
    "lion": Rule("Lion", "Lion", {"lr": 1e-4}, 3 + 2),
    "lamb": Rule(
        "LAMB", "LAMB", {"lr": 1e-3, "eps": 0.01, "weight_decay": 0.01, "bias_correction": False}, 4 + 4 + 3, start=1e-3
    ),
    "lars": Rule("LARS", "LARS", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, 2 + 3 + 2, start=1e-3),
    "novograd": Rule("NovoGrad", "NovoGrad", {"lr": 1e-3}, 1 + 3 + 2),
    "adan": Rule("Adan", "Adan", {"lr": 1e-3}, 6 + 5),
    "ademamix": Rule("AdEMAMix", "AdEMAMix", {"lr": 1e-3, "alpha": 2.0}, 5 + 4),
    "prodigy": Rule("Prodigy", "Prodigy", {"lr": 1.0, "growth_rate": 1.0}, 4 + 5 + 4, start=1e-3),
    "adamwschedulefree": Rule("AdamWScheduleFree", "AdamWScheduleFree", {"lr": 2.5e-3}, 4 + 3),
    "radamschedulefree": Rule("RAdamScheduleFree", "RAdamScheduleFree", {"lr": 2.5e-3}, 4 + 3, steps=6),
    "sgdschedulefree": Rule("SGDScheduleFree", "SGDScheduleFree", {"lr": 1e-3}, 3 + 2),
}
USUAL = ("adamw", "sgd")
FIELD = [name for name, rule in RULES.items() if not hasattr(torch.optim, rule.name)]


@dataclass(frozen=True)
class Contender:
    """What makes an optimizer, and how to treat it."""

    make: Factory
    writes_gradient: bool = False
    differs: str = ""  # why it is not compared with the others
    compile: Compile | None = None


def contenders(rule: Rule, compiled: bool = False) -> dict[str, Contender]:
    """Everything here that can take the step; the first is the judge of the others."""
    ours = getattr(trainopt, rule.name)
    found: dict[str, Contender] = {}
    if stock := getattr(torch.optim, rule.name, None):
        found["torch default"] = Contender(partial(stock, **rule.settings))
        for way in ("foreach", "fused"):
            if way in inspect.signature(stock).parameters:
                found[f"torch {way}"] = Contender(partial(stock, **{way: True}, **rule.settings))
        if compiled:
            found["torch compiled"] = Contender(partial(stock, foreach=True, **rule.settings), compile=by_torch)
    for peer in PEERS.get(rule.name, []):
        if (compiled or not peer.compile) and (theirs := peer.load()):
            make = partial(theirs, **{**rule.settings, **peer.settings})
            found[peer.title] = Contender(make, peer.writes_gradient, peer.differs, peer.compile)
    found["trainopt"] = Contender(partial(ours, **rule.settings))
    return found


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """One workload stepped by one rule: seconds a step of each contender, round by round."""

    rule: Rule
    workload: Workload
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)

    @property
    def traffic(self) -> int:
        """Bytes that the algorithm must read and write in a step."""
        return self.rule.moved * self.workload.elements * self.workload.dtype.itemsize

    @property
    def reference(self) -> str:
        """Whom the ratios are against: the fastest that does the same work, or trainopt where it is alone."""
        peers = [name for name in self.seconds if name != "trainopt" and name not in self.not_compared]
        return min(peers or ["trainopt"], key=lambda name: median(self.seconds[name]))

    def speedup(self, contender: str) -> Spread:
        """How many times as fast as the reference."""
        return paired_ratio(self.seconds[self.reference], self.seconds[contender])

    def over_memory(self, contender: str) -> Spread:
        """How many times as long as the plain pass over memory."""
        return paired_ratio(self.seconds[contender], self.memory)


def measure(workload: Workload, rule: Rule, rounds: int, most_compiled: int = 0) -> Result:
    """Time all contenders that do the work; those that do not are left out, with the reason. Steps over more tensors
    than `most_compiled` are not compiled."""
    result = Result(rule, workload)
    steps, truth = dict[str, Callable[[], object]](), list[Parameter]()
    starts, gradients = (random_tensors(workload, seed) for seed in (1, 0))
    for start in starts:
        start.mul_(rule.start)
    for name, contender in contenders(rule, len(workload.shapes) <= most_compiled).items():
        parameters = [Parameter(start.clone()) for start in starts]
        try:
            optimizer = contender.make(parameters)
            if hasattr(optimizer, "train"):  # of schedule-free ones
                optimizer.train()
            step = contender.compile(optimizer) if contender.compile else optimizer.step
            for _ in range(rule.steps):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone() if contender.writes_gradient else gradient
                step()
        except Exception as error:  # a peer that does not work here, for whatever reason, does not end the benchmark
            if name == "trainopt":
                raise
            result.left_out[name] = f"{type(error).__name__}: {error}"
            continue
        if contender.differs:
            result.not_compared[name] = contender.differs
        else:
            truth = truth or parameters
            wrong = share_unlike(parameters, truth, starts)
            if wrong > 0.001:
                result.left_out[name] = (
                    f"its first step is unlike that of {next(iter(steps))} in {percent(wrong)} of the elements"
                )
                continue
        steps[name] = step
    if "trainopt" in result.left_out:
        raise RuntimeError(f"trainopt, {rule.title}, {workload.title}: {result.left_out['trainopt']}")

    memory = ReadModifyWrite(result.traffic)
    result.seconds = interleave({**steps, memory.label: memory}, rounds)
    result.memory = result.seconds.pop(memory.label)
    return result


def random_tensors(workload: Workload, seed: int) -> list[torch.Tensor]:
    """Standard normal numbers in the workload's shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(workload.dtype) for shape in workload.shapes]


def share_unlike(parameters: list[Parameter], truth: list[Parameter], starts: list[torch.Tensor]) -> float:
    """The share of elements whose change is off by more than 2 %, which no rounding explains: work not done, or other
    work. Next to nothing may be off by a hundredth of what its tensor's elements change by, and what is stored by its
    last bit."""
    unlike = elements = 0
    with torch.no_grad():
        for parameter, expected, start in zip(parameters, truth, starts, strict=True):
            change = (expected - start).float()
            allowed = change.abs() * 0.02 + change.square().mean().sqrt() * 0.01
            allowed += expected.abs() * torch.finfo(expected.dtype).eps
            alike = (parameter.float() - expected.float()).abs() <= allowed  # a NaN is not
            unlike += parameter.numel() - int(alike.sum())
            elements += parameter.numel()
    return unlike / elements


# --------------------------------------------------------------------------------------------------------- reporting


def details(result: Result) -> str:
    """A table with a row a contender."""
    workload, reference = result.workload, result.reference
    head = ["contender", "a step", f"times as fast as {reference}", "GB/s", "of memory speed", "above memory"]
    rows = []
    for name, seconds in result.seconds.items():
        above = paired_difference(seconds, result.memory).median
        share = 1 / result.over_memory(name).median
        speed = f"{result.traffic / median(seconds) / 1e9:.1f}"
        rows.append(
            [name, duration(median(seconds)), spread(result.speedup(name)), speed, percent(share), duration(above)]
        )
    memory = median(result.memory)
    rows.append([ReadModifyWrite.label, duration(memory), "", f"{result.traffic / memory / 1e9:.1f}", "100 %", ""])
    dtype = str(workload.dtype).removeprefix("torch.")
    lines = [
        f"{result.rule.title}, {workload.outline} in {dtype}, {result.traffic / 1e6:,.1f} MB a step",
        text_table(head, rows),
        *notes(result),
    ]
    return "\n".join(lines) + "\n"


def notes(result: Result) -> list[str]:
    """What there is to say of contenders beside their figures."""
    return [
        *(f"{name} is left out: {reason}" for name, reason in result.left_out.items()),
        *(f"{name} is not compared with the others: {reason}" for name, reason in result.not_compared.items()),
    ]


def summary(results: Sequence[Result]) -> str:
    """A Markdown table for each rule, with a row a workload."""
    tables = []
    for rule in RULES.values():
        chosen = [result for result in results if result.rule is rule]
        if not chosen:
            continue
        names = list(dict.fromkeys(name for result in chosen for name in (*result.seconds, *result.left_out)))
        rows = []
        for result in chosen:
            steps = [duration(median(result.seconds[name])) if name in result.seconds else "no peer" for name in names]
            speedup = f"{spread(result.speedup('trainopt'))}, {result.reference}"
            rows.append([result.workload.title, *steps, speedup, percent(1 / result.over_memory("trainopt").median)])
        head = [rule.title, *names, "trainopt, times as fast as the fastest peer", "trainopt, of memory speed"]
        said = [f"{result.workload.title}: {note}." for result in chosen for note in notes(result)]
        tables.append("\n\n".join([markdown_table(head, rows), *said]))
    return "\n\n".join(tables)


def as_json(results: Sequence[Result], heading: str) -> dict[str, Any]:
    """Everything measured, in seconds, round by round."""
    return {
        "machine": heading,
        "results": [
            {
                "optimizer": result.rule.title,
                "workload": result.workload.name,
                "tensors": len(result.workload.shapes),
                "elements": result.workload.elements,
                "dtype": str(result.workload.dtype),
                "bytes": result.traffic,
                "seconds": result.seconds,
                ReadModifyWrite.label: result.memory,
                "left_out": result.left_out,
                "not_compared": result.not_compared,
            }
            for result in results
        ],
    }


# ------------------------------------------------------------------------------------------------------ command line


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser_of(module: str, doc: str | None, workloads: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark over workloads, of these defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").split("\n")[0])
    add, shown = parser.add_argument, "all" if len(workloads) == len(WORKLOADS) else " ".join(workloads)
    add("--workload", nargs="+", choices=WORKLOADS, default=list(workloads), help=f"workloads (default: {shown})")
    add("--rounds", type=positive, default=rounds, help="rounds; each times every contender (default: %(default)s)")
    add("--threads", type=positive, help="threads torch may use (default: torch's own choice)")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that are given; torch has as many threads as they say from now on."""
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def new_file(text: str) -> Path:
    """A path whose folder exists, for argparse."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    return Path(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options choose and print it."""
    parser = parser_of("benchmarks.optimizers", __doc__, list(WORKLOADS), rounds=15)
    add = parser.add_argument
    add("--optimizer", nargs="+", choices=RULES, default=USUAL, help=f"optimizers (default: {' '.join(USUAL)})")
    add("--all", dest="optimizer", action="store_const", const=list(RULES), help="all of them")
    add("--field", dest="optimizer", action="store_const", const=FIELD, help="all that torch does not have")
    add(
        "--compiled",
        nargs="?",
        type=positive,
        const=200,
        default=0,
        metavar="TENSORS",
        help="compiled steps too, of at most so many tensors (%(const)s), which take half a second each to compile",
    )
    add("--json", type=new_file, metavar="FILE", help="write every measurement to this file, in seconds")
    add(
        "--markdown",
        action="store_true",
        help="print Markdown tables with a row a workload (default: a row a contender)",
    )
    options = parsed(parser, arguments)

    heading = f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})"
    print(f"{heading}\nMedians of {options.rounds} interleaved rounds; in brackets the quartiles", flush=True)
    for package, reason in missing(RULES[name].name for name in options.optimizer).items():
        print(f"No peers from {package}, which cannot be imported ({reason})", flush=True)
    print(flush=True)
    results = []
    for rule in (RULES[name] for name in options.optimizer):
        for workload in (WORKLOADS[name] for name in options.workload):
            results.append(measure(workload, rule, options.rounds, options.compiled))
            if options.compiled:
                torch.compiler.reset()  # it holds optimizers, and compiles a step only so many times
            gc.collect()  # an optimizer refers to itself: free its states before the next workload
            print(details(results[-1]), file=sys.stderr if options.markdown else sys.stdout, flush=True)
    if options.markdown:
        print(summary(results))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(results, heading), indent=1) + os.linesep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
