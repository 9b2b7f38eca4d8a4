"""Seeds faults into the arithmetic of the optimizers' rules, and counts those that the tests' formulas catch.

    python -m tools.rule_faults               every rule of csrc/rules
    python -m tools.rule_faults adam lion

A fault is one small change of a header: a swapped beta, epsilon inside the root, a step counted too late, an operator
for another. The changed header is compiled without an engine and makes some steps in float64, with the options of its
rows in tests/optimizer_table.py. The fault is caught if a parameter or a state is not the formula's: which is what
tests/test_rules.py finds out through the engines. Prints the faults that survive, and the score of each rule. Fails if
one survives that EQUIVALENT does not account for.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import text_table
from csrc.compiler import Compiler, jobs_at_once
from trainopt._extension import _C
from trainopt.optim.options import option_at, places_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from formulas import formula_step, numbers_after  # noqa: E402
from optimizer_table import TABLE  # noqa: E402

#: What a fault is called, what it changes, and into what.
CHANGES = (
    ("minus for plus", r" \+ ", " - "),
    ("plus for minus", r" - ", " + "),
    ("over for times", r" \* ", " / "),
    ("times for over", r" / ", " * "),
    ("a comparison", r" <= ", " > "),
    ("a comparison", r" < ", " >= "),
    ("a comparison", r" > ", " <= "),
    ("equal for unequal", r" != ", " == "),
    ("unequal for equal", r" == ", " != "),
    ("or for and", r" && ", " || "),
    ("and for or", r" \|\| ", " && "),
    ("the branches", r"\? ([^?:]+) : ([^;?:,]+)([;,])", r"? \2 : \1\3"),
    ("beta2 for beta1", r"\bkBeta1\b", "kBeta2"),
    ("beta1 for beta2", r"\bkBeta2\b", "kBeta1"),
    ("beta1 for beta3", r"\bkBeta3\b", "kBeta1"),
    ("a step too late", r"\binfo\.step\b", "(info.step + 1)"),
    ("another learning rate", r"\binfo\.lr\b", "(info.lr * 1.5)"),
    ("first for later", r"\binfo\.first\b", "!info.first"),
    ("another epsilon", r"\boptions\[kEps\]", "(options[kEps] * 1.5)"),
    ("epsilon inside the root", r"\bsquare_root\((\w+)\)", r"square_root(\1 + T(S(1e-4)))"),
    ("no root", r"\bsquare_root\(", "("),
    ("no sign", r"\bsign_or_nan\(", "("),
    ("another state", r"\bstate\[0\]", "state[1]"),
    ("another state", r"\bstate\[1\]", "state[0]"),
    ("another state", r"\bstate\[2\]", "state[0]"),
    ("another constant", r"\b0\.5\b", "0.6"),
    ("another decay", r"Decay::kGradient", "Decay::kParameter"),
    ("another decay", r"Decay::kParameter", "Decay::kGradient"),
)

#: What stands in changed lines whose change is none beyond rounding, and why.
EQUIVALENT = {
    "_is_small": "an average is the same from either end",
    "static_cast<S>(one_minus_beta), beta": "an average is the same from either end",
    "weights_of<S>(1 + k.weight": "an average is the same from either end",
    "weights_of<S>(beta, 1 + beta)": "of two functions of this name, the rule calls the other",
    "k.rounds = ": "of a learning rate that is a float32 tensor, which tests/test_rules.py has",
    "k.most = ": "of matrices, which tests/test_rules.py and tests/test_adafactor.py have",
    "k.is_factored) return g": "likewise",
    "sign_of(size) * sign_of(size)": "sizes are 0 in the first step, unless somebody puts others there (test_tools.py)",
    "static_cast<float>(": "of a learning rate that is a float32 tensor, which tests/test_rules.py has",
    "k.step_size = static_cast<S>((info.lr * 1.5));": "`finish` writes it before it is read",
    "k.rests = (info.lr * 1.5) == 0;": "0 times anything is 0",
}

SOURCE = """
#include "core/math.h"
#include "rules/rule.h"
#include "rules/stages.h"
{header}
using namespace trainopt;

template <class Rule>
void step_of(const double* options, const double* info, long count, double* p, const double* kept, const double* g,
             double* states, double* held) {{
  const int needed = numbers_needed_by<Rule>(options);
  Numbers numbers{{{{held[0], held[needed == 1 ? 0 : 1]}}, info[4] != 0}};  // the first in place of one not needed
  const StepInfo step_info{{info[0] * rate_of<Rule>(options), false, info[1], info[2], info[3] != 0}};
  auto k = prepared_by<Rule, double>(options, step_info, numbers);
  const StateSet set = states_of_one(Rule::states_needed(options), kFactorStates<Rule>, 1);  // of a vector
  complete_for_tensor<Rule>(k, set, DType::kFloat64, count);
  double own[kMaxStates];
  const auto read = [&](long i) {{
    for (int s = 0; s < kStateCount<Rule>; ++s) own[s] = contains(set, s) ? states[s * count + i] : 0;
  }};
  if constexpr (kSumCount<Rule> > 0) {{
    double sums[kMaxSums] = {{}};
    for (long i = 0; i < count; ++i) {{
      Term<double> terms[kMaxSums];
      read(i);
      Rule::gather(k, kSumsAreBeforeDecay<Rule> ? p[i] : kept[i], g[i], own, terms);
      for (int s = 0; s < kSumCount<Rule>; ++s) sums[s] += terms[s].a * terms[s].b;
    }}
    finish_by<Rule>(k, sums, numbers);
  }}
  for (int n = 0; n < needed; ++n) held[n] = numbers.at[n];
  for (long i = 0; i < count; ++i) {{
    read(i);
    double moved = kept[i];
    if constexpr (kHasDecayFactor<Rule, double>) moved *= Rule::decay_factor(k);
    moved = moved - Rule::update(k, moved, g[i], own);
    if constexpr (kSettles<Rule, double, double>) Rule::settle(k, moved, own);
    p[i] = moved;
    for (int s = 0; s < kStateCount<Rule>; ++s)
      if (contains(set, s)) states[s * count + i] = own[s];
  }}
}}

extern "C" int decay_of(const double* options) {{ return static_cast<int>({name}::decay(options)); }}

extern "C" double rate(const double* options) {{ return rate_of<{name}>(options); }}

extern "C" void step(const double* options, const double* info, long count, double* p, const double* kept,
                     const double* g, double* states, double* held) {{
  step_of<{name}>(options, info, count, p, kept, g, states, held);
}}
"""

STEPS, ELEMENTS = 6, 40
#: Options that are the engine's, or that choose among ways to the same result.
NOT_THE_RULES = {"l1", "l1_proximal", "noise", "seed", "cautious", "cautious_weight_decay", "foreach", "fused"}


@dataclass(frozen=True)
class Fault:
    """A rule's header with one change."""

    name: str
    line: str  # as it has become
    header: str


#: What rules share, and what faults are seeded into beside their own arithmetic.
SHARED = '#include "rules/moments.h"'


def header_of(rule: str) -> str:
    """The rule's header, with what it shares with others in its place."""
    folder = ROOT / "csrc" / "rules"
    (found,) = [path for path in folder.glob("*.h") if f'kName = "{rule}"' in path.read_text()]
    return found.read_text().replace(SHARED, (folder / "moments.h").read_text()).replace("#pragma once", "")


def lines_of_arithmetic(lines: Sequence[str]) -> Iterator[int]:
    """The rule's own, from its facts on, and those of the shared functions that it calls."""
    facts = next(i for i, line in enumerate(lines) if "kCountsSteps" in line)
    own = "\n".join(lines[facts:])
    refusing = called = False
    for i, line in enumerate(lines):
        if i < facts:
            if function := re.match(r"TRAINOPT_FUNCTION .*?(\w+)\(", line):
                called = function[1] != "are_betas" and re.search(rf"\b{function[1]}[(<]", own) is not None
            if called:
                yield i
            called = called and line != "}"
            continue
        is_takes = "bool takes(" in line
        refusing = (is_takes and not line.endswith("}")) or (refusing and line != "  }")
        if not (is_takes or refusing):
            yield i


def faults_of(rule: str) -> Iterator[Fault]:
    """Every change of every line that has a rule's arithmetic in it."""
    lines = header_of(rule).split("\n")
    for i in lines_of_arithmetic(lines):
        code, slashes, comment = lines[i].partition("  //")
        if code.strip().startswith(("//", "template", "#")):
            continue
        for name, right, wrong in CHANGES:
            for found in re.finditer(right, code):
                line = code[: found.start()] + found.expand(wrong) + code[found.end() :]
                changed = [*lines[:i], line + slashes + comment, *lines[i + 1 :]]
                yield Fault(name, line.strip(), "\n".join(changed))


def compiled(header: str, compiler: Compiler) -> ctypes.CDLL | None:
    """The rule alone; None if it does not compile."""
    name = re.search(r"^struct (\w+) {\n.* kName =", header, re.MULTILINE)
    assert name is not None
    with tempfile.NamedTemporaryFile(suffix=".so", dir=compiler.folder, delete=False) as made:
        command = [*compiler.command, "-std=c++17", "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
        command += [f"-I{ROOT / 'csrc'}", "-x", "c++", "-", "-o", made.name]
    source = SOURCE.format(header=header, name=name[1])
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    if done.returncode != 0:
        return None
    library = ctypes.CDLL(made.name)
    library.rate.restype = ctypes.c_double
    return library


def as_number(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) else value


def choices(rule: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each row of the rule with each of its sets of options."""
    for row in TABLE.values():
        if row.ours._rule != rule:
            continue
        for options in (*row.settings.values(), *row.extras.values(), row.usual, row.everything):
            own = {name: value for name, value in options.items() if name not in NOT_THE_RULES}
            yield row, {n: tuple(map(as_number, v)) if isinstance(v, tuple) else as_number(v) for n, v in own.items()}


def numbers(values: Sequence[float]) -> Any:
    return (ctypes.c_double * len(values))(*values)


def given_in(group: dict[str, Any], rule: str) -> Any:
    """A rule's options as the engine has them: None as NaN."""
    values = [option_at(group, place) for place in places_of(rule)]
    return numbers([math.nan if value is None else float(value) for value in values])


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def is_right(library: ctypes.CDLL, rule: str, row: Any, options: dict[str, Any], from_zero: bool) -> bool:
    """Whether steps with these options, of a parameter that may be 0, come to the formula's parameters and states."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(ELEMENTS, dtype=torch.float64, generator=generator)
    p[: ELEMENTS if from_zero else 3] = 0
    param = torch.nn.Parameter(p.clone())
    optimizer = row.make([param], **options)
    optimizer.init_state()
    group = {"silent_sgd_phase": True, **row.defaults, **options, **optimizer.param_groups[0]}
    decay, lr, sign = float(group.get("weight_decay", 0)), float(group["lr"]), -1 if group["maximize"] else 1
    decay_is = library.decay_of(given_in(group, rule))  # in the gradient, on the parameter, in the update
    names, own = _C.rules()[rule].states, _C.rules()[rule].numbers
    states, held = torch.zeros(len(names), ELEMENTS, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    places = {**dict(zip(names, states, strict=True)), **dict(zip(own, held, strict=False))}
    as_torchs = row.ours._torch_class is not None  # whose numbers are float32
    for name, value in optimizer.state[param].items():
        if name in places:
            places[name].copy_(value)
    truth, state, found = p.clone(), {}, {}
    for step in range(1, STEPS + 1):
        g = torch.randn(ELEMENTS, dtype=torch.float64, generator=generator)
        g *= 10 ** (2 * torch.rand(ELEMENTS, dtype=torch.float64, generator=generator) - 1)
        g[2:8], g[8:12] = 0, g[8:12] if step > 3 else 0
        group |= {"k": step - 1, **found}
        group |= optimizer._advanced(group)
        given = given_in(group, rule)
        found = numbers_after(row, [(truth, g, state)], options, found)
        truth = formula_step(row, truth, g, state, {**options, **found}, step)
        felt = sign * g + (decay * p if decay_is == 0 else 0)
        kept = p * (1 - lr * library.rate(given) * decay) if decay_is == 1 else p.clone()
        info = numbers([lr, decay, step, step == 1, as_torchs])
        library.step(given, info, ELEMENTS, *map(pointer, (p, kept, felt, states, held)))
    pairs = [(p, truth), *((places[name], value.double()) for name, value in state.items())]
    return all(torch.allclose(found, value, rtol=1e-8, atol=1e-10, equal_nan=True) for found, value in pairs)


def is_caught(library: ctypes.CDLL, rule: str) -> bool:
    from_zero = (False, True) if _C.rules()[rule].sums else (False,)
    return not all(is_right(library, rule, *choice, zero) for choice in choices(rule) for zero in from_zero)


def score(rule: str, folder: Path) -> tuple[int, int, list[Fault]]:
    """How many faults there are, how many are caught, and the rest. RuntimeError if the rule itself is not right."""
    compiler = Compiler(folder)
    whole = compiled(header_of(rule), compiler)
    if whole is None or is_caught(whole, rule):
        raise RuntimeError(f"{rule}: the header as it is does not do what the formula says")
    faults = list(faults_of(rule))
    with ThreadPoolExecutor(jobs_at_once()) as pool:
        made = list(pool.map(lambda fault: compiled(fault.header, compiler), faults))
    judged = [(fault, library) for fault, library in zip(faults, made, strict=True) if library is not None]
    survivors = [fault for fault, library in judged if not is_caught(library, rule)]
    return len(judged), len(judged) - len(survivors), survivors


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the score; 1 if a fault survives that is not accounted for."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.rule_faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rules", nargs="*", metavar="RULE", help="default: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, unexplained = [], 0
    for rule in options.rules or _C.rules():
        with tempfile.TemporaryDirectory() as folder:
            count, caught, survivors = score(rule, Path(folder))
        explained = [next((EQUIVALENT[part] for part in EQUIVALENT if part in f.line), None) for f in survivors]
        for fault, reason in zip(survivors, explained, strict=True):
            print(f"{rule}: {fault.name}: {fault.line}\n    {reason or 'SURVIVES'}", flush=True)
        equivalent = sum(reason is not None for reason in explained)
        unexplained += len(survivors) - equivalent
        rows.append([rule, str(count), str(caught), str(equivalent), f"{caught / (count - equivalent):.1%}"])
    print(text_table(["rule", "faults", "caught", "change nothing", "score"], rows))
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
