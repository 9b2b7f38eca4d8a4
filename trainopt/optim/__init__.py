"""The optimizers. A new one is imported here; `trainopt` exports what this module does."""

from torch.optim import LBFGS, SparseAdam  # as they are: their steps are no single pass over the parameters

from trainopt.optim.adadelta import Adadelta
from trainopt.optim.adagrad import Adagrad
from trainopt.optim.adam import Adam
from trainopt.optim.adamax import Adamax
from trainopt.optim.adamw import AdamW
from trainopt.optim.convert import convert_state
from trainopt.optim.explain import explain as explain  # `trainopt.explain` takes losses too
from trainopt.optim.fuse import fuse
from trainopt.optim.groups import param_groups
from trainopt.optim.lamb import LAMB
from trainopt.optim.lars import LARS
from trainopt.optim.lion import Lion
from trainopt.optim.radam import RAdam
from trainopt.optim.release import step_in_backward
from trainopt.optim.report import nonfinite_report
from trainopt.optim.rmsprop import RMSprop
from trainopt.optim.rprop import Rprop
from trainopt.optim.schedule import Schedule
from trainopt.optim.sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Schedule",
    "SparseAdam",
    "convert_state",
    "fuse",
    "nonfinite_report",
    "param_groups",
    "step_in_backward",
]
