"""What one optimizer step costs, with trainopt and its peers, on the shapes of real and extreme models.

    python -m benchmarks.optimizers
    python -m benchmarks.optimizers --optimizer adamw --workload mlp gpt2 --markdown
    python -m benchmarks.optimizers --all --workload 64m 1000x64

What is timed is the whole step() call of a real optimizer whose parameters have gradients. Every contender has its own
parameters and states; the gradients are shared. Beside them in the same rounds, a plain pass over memory shows what the
machine can do at best with the bytes that the algorithm must move.
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
from benchmarks.tables import duration, markdown_table, percent, spread, text_table
from benchmarks.timing import Spread, interleave, machine, paired_difference, paired_ratio
from benchmarks.workloads import WORKLOADS, Workload
from trainopt._extension import _C

Factory = Callable[[list[Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """An optimizer, its settings, and how many values it reads and writes for an element."""

    name: str
    title: str
    settings: dict[str, Any]
    moved: int


RULES = {
    "adamw": Rule("AdamW", "AdamW", {"lr": 1e-3, "weight_decay": 0.01}, 4 + 3),
    "sgd": Rule("SGD", "SGD with momentum 0.9", {"lr": 1e-3, "momentum": 0.9}, 3 + 2),
    "adamax": Rule("Adamax", "Adamax", {"lr": 1e-3}, 4 + 3),
    "radam": Rule("RAdam", "RAdam", {"lr": 1e-3}, 4 + 3),
    "nadam": Rule("NAdam", "NAdam", {"lr": 1e-3}, 4 + 3),
    "asgd": Rule("ASGD", "ASGD", {"lr": 1e-3}, 3 + 2),
    "rmsprop": Rule("RMSprop", "RMSprop with momentum 0.9", {"lr": 1e-3, "momentum": 0.9}, 4 + 3),
    "adagrad": Rule("Adagrad", "Adagrad", {"lr": 1e-3}, 3 + 2),
    "adadelta": Rule("Adadelta", "Adadelta", {"lr": 1e-3}, 4 + 3),
    "adafactor": Rule("Adafactor", "Adafactor", {"lr": 1e-3}, 5 + 1),
    "rprop": Rule("Rprop", "Rprop", {"lr": 1e-3}, 4 + 3),
}
USUAL = ("adamw", "sgd")


def contenders(rule: Rule) -> dict[str, Factory]:
    """Everything that can take the step; torch's for-loop first, for it is the judge of the others' first step."""
    stock, ours = getattr(torch.optim, rule.name), getattr(trainopt, rule.name)
    found: dict[str, Factory] = {
        "torch default": partial(stock, **rule.settings),
        "torch foreach": partial(stock, foreach=True, **rule.settings),
    }
    if "fused" in inspect.signature(stock).parameters:
        found["torch fused"] = partial(stock, fused=True, **rule.settings)
    found["trainopt"] = partial(ours, **rule.settings)
    if rule.name == "AdamW":
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError:
            return found
        found["DeepSpeedCPUAdam"] = partial(DeepSpeedCPUAdam, adamw_mode=True, **rule.settings)
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

    @property
    def traffic(self) -> int:
        """Bytes that the algorithm must read and write in a step."""
        return self.rule.moved * self.workload.elements * self.workload.dtype.itemsize

    @property
    def reference(self) -> str:
        """Whom the ratios are against: torch's fused step, or the fastest of torch's where that is no peer."""
        torchs = [name for name in self.seconds if name.startswith("torch")]
        return "torch fused" if "torch fused" in torchs else min(torchs, key=lambda name: median(self.seconds[name]))

    def speedup(self, contender: str) -> Spread:
        """How many times as fast as the reference."""
        return paired_ratio(self.seconds[self.reference], self.seconds[contender])

    def over_memory(self, contender: str) -> Spread:
        """How many times as long as the plain pass over memory."""
        return paired_ratio(self.seconds[contender], self.memory)


def measure(workload: Workload, rule: Rule, rounds: int) -> Result:
    """Time all contenders that do the work; those that do not are left out, with the reason."""
    result = Result(rule, workload)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(workload.dtype) for shape in workload.shapes]
    truth: list[Parameter] = []
    steps: dict[str, Callable[[], object]] = {}
    for name, factory in contenders(rule).items():
        parameters = [Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        try:
            optimizer = factory(parameters)
            optimizer.step()
        except Exception as error:  # a peer that does not work here, for whatever reason, does not end the benchmark
            if name == "trainopt":
                raise
            result.left_out[name] = f"{type(error).__name__}: {error}"
            continue
        truth = truth or parameters
        wrong = share_unlike(parameters, truth)
        if wrong > 0.001:
            result.left_out[name] = (
                f"its first step is unlike that of torch's for-loop in {percent(wrong)} of the elements"
            )
        else:
            steps[name] = optimizer.step
    if "trainopt" in result.left_out:
        raise RuntimeError(f"trainopt, {rule.title}, {workload.title}: {result.left_out['trainopt']}")

    memory = ReadModifyWrite(result.traffic)
    result.seconds = interleave({**steps, memory.label: memory}, rounds)
    result.memory = result.seconds.pop(memory.label)
    return result


def share_unlike(parameters: list[Parameter], truth: list[Parameter]) -> float:
    """The share of elements off by more than 2 %, which no rounding explains: work not done, or other work."""
    unlike = elements = 0
    with torch.no_grad():
        for parameter, expected in zip(parameters, truth, strict=True):
            unlike += parameter.numel() - int(torch.isclose(parameter, expected, rtol=0.02, atol=1e-5).sum())
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
        *(f"{name} is left out: {reason}" for name, reason in result.left_out.items()),
    ]
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> str:
    """A Markdown table for each rule, with a row a workload."""
    tables = []
    for rule in RULES.values():
        chosen = [result for result in results if result.rule is rule]
        if not chosen:
            continue
        names = list(contenders(rule))
        rows = []
        for result in chosen:
            steps = [duration(median(result.seconds[name])) if name in result.seconds else "no peer" for name in names]
            memory_speed = 1 / result.over_memory("trainopt").median
            against = "" if result.reference == "torch fused" else f", against {result.reference}"
            rows.append(
                [result.workload.title, *steps, spread(result.speedup("trainopt")) + against, percent(memory_speed)]
            )
        peer = "torch fused" if "torch fused" in names else "the faster"
        head = [rule.title, *names, f"trainopt, times as fast as {peer}", "trainopt, of memory speed"]
        notes = [
            f"{result.workload.title}: {name} is left out: {reason}."
            for result in chosen
            for name, reason in result.left_out.items()
        ]
        tables.append("\n\n".join([markdown_table(head, rows), *notes]))
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
    add("--all", dest="optimizer", action="store_const", const=list(RULES), help="all that torch has too")
    add("--json", type=new_file, metavar="FILE", help="write every measurement to this file, in seconds")
    add(
        "--markdown",
        action="store_true",
        help="print Markdown tables with a row a workload (default: a row a contender)",
    )
    options = parsed(parser, arguments)

    heading = f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})"
    print(f"{heading}\nMedians of {options.rounds} interleaved rounds; in brackets the quartiles\n", flush=True)
    results = []
    for rule in (RULES[name] for name in options.optimizer):
        for workload in (WORKLOADS[name] for name in options.workload):
            results.append(measure(workload, rule, options.rounds))
            gc.collect()  # an optimizer refers to itself: free its states before the next workload
            print(details(results[-1]), file=sys.stderr if options.markdown else sys.stdout, flush=True)
    if options.markdown:
        print(summary(results))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(results, heading), indent=1) + os.linesep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
