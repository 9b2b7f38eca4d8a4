"""The optimizers. A new one is imported here; `trainopt` exports what this module does."""

# As they are: they make no single pass over the parameters.
from torch.optim import LBFGS, SparseAdam

from trainopt.optim.adadelta import Adadelta
from trainopt.optim.adafactor import Adafactor
from trainopt.optim.adagrad import Adagrad
from trainopt.optim.adam import Adam
from trainopt.optim.adamax import Adamax
from trainopt.optim.adamw import AdamW
from trainopt.optim.adan import Adan
from trainopt.optim.ademamix import AdEMAMix
from trainopt.optim.asgd import ASGD
from trainopt.optim.convert import convert_state
from trainopt.optim.explain import explain as explain  # `trainopt.explain` takes losses too
from trainopt.optim.fuse import fuse
from trainopt.optim.groups import param_groups
from trainopt.optim.lamb import LAMB
from trainopt.optim.lars import LARS
from trainopt.optim.lion import Lion
from trainopt.optim.matrix.muon import Muon
from trainopt.optim.matrix.split import muon_groups
from trainopt.optim.nadam import NAdam
from trainopt.optim.novograd import NovoGrad
from trainopt.optim.prodigy import Prodigy
from trainopt.optim.radam import RAdam
from trainopt.optim.release import step_in_backward
from trainopt.optim.report import nonfinite_report
from trainopt.optim.rmsprop import RMSprop
from trainopt.optim.rprop import Rprop
from trainopt.optim.schedule import Schedule
from trainopt.optim.schedule_free import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from trainopt.optim.sgd import SGD

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "Adan",
    "Lion",
    "Muon",
    "NAdam",
    "NovoGrad",
    "Prodigy",
    "RAdam",
    "RAdamScheduleFree",
    "RMSprop",
    "Rprop",
    "SGDScheduleFree",
    "Schedule",
    "SparseAdam",
    "convert_state",
    "fuse",
    "muon_groups",
    "nonfinite_report",
    "param_groups",
    "step_in_backward",
]
