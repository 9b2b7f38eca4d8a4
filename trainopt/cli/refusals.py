"""What is said of a word that there is not, or of a bad option: one sentence, and status 2."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

#: What other programs call an option, beside what `trainopt.training.Options` knows.
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "learningrate", "lr_max", "max_lr", "base_lr", "alpha", "eta"), "lr"),
    **dict.fromkeys(("wd", "decay", "l2", "weight_decay_rate"), "weight_decay"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule", "sched"), "schedule"),
    **dict.fromkeys(("warmup_steps", "warmup_updates", "num_warmup_steps", "warm_up"), "warmup"),
    **dict.fromkeys(("min_lr", "lr_min", "min_lr_ratio"), "floor"),
    **dict.fromkeys(("num_threads", "n_threads", "num_workers", "workers", "jobs"), "threads"),
    **dict.fromkeys(("run_name", "experiment_name", "exp_name"), "name"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "log_dir", "run_dir", "directory", "output"), "runs"),
    **dict.fromkeys(("block_size", "seq_len", "sequence_length", "context_length"), "context"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), "width"),
    **dict.fromkeys(("n_layer", "num_layers", "depth"), "layers"),
    **dict.fromkeys(("n_head", "num_heads"), "heads"),
    **dict.fromkeys(("gpu", "accelerator"), "device"),
}
#: Where what has been an option is now.
MOVED = {"--compare": ": the comparison with torch is a benchmark of the source tree, python -m benchmarks.twin"}


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean …?' if there is something that others call so, or something alike."""
    from trainopt.training import options  # not above: the command must start where trainopt cannot be imported

    name = word.lstrip("-")
    dashes = word[: len(word) - len(name)]
    key = name.replace("-", "_")
    other = OTHER_NAMES.get(key, options.OTHER_NAMES.get(key, "")).replace("_", "-")
    if other and dashes + other in known:
        return f"; did you mean {dashes}{other}?"
    alike = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {alike[0]}?" if alike else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a bad option in one sentence, with status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
