"""The optimizers."""

from trainopt.optim.adam import Adam
from trainopt.optim.adamw import AdamW
from trainopt.optim.explain import explain
from trainopt.optim.fuse import fuse
from trainopt.optim.groups import param_groups
from trainopt.optim.nonfinite import nonfinite_report
from trainopt.optim.schedule import Schedule
from trainopt.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Schedule", "explain", "fuse", "nonfinite_report", "param_groups"]
