"""Settings and extras that several rows of the optimizers' table share.

Where an optimizer needs another value to show the option, its row says so.
"""

import torch


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


LR32, LR64 = torch.tensor(0.03), float64(0.03)

PLAIN = {
    "default": {},
    "lr": {"lr": 0.05},
    "lr float32 tensor": {"lr": LR32},
    "lr float64 tensor": {"lr": LR64},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
DECAY = {
    "weight_decay": {"lr": 0.02, "weight_decay": 0.4},
    "maximize, weight_decay": {"lr": 0.02, "maximize": True, "weight_decay": 0.4},
}
BETAS = {
    "beta1 0": {"lr": 0.02, "betas": (0.0, 0.95)},
    "beta1 0.3": {"lr": 0.02, "betas": (0.3, 0.95)},
    "beta2 0": {"lr": 0.02, "betas": (0.9, 0.0), "eps": 0.1},
}
MOMENTS = {
    **BETAS,
    "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.8), float64(0.9))},
    "eps": {"lr": 0.02, "eps": 0.3},
}
# torch computes the bias correction of a float32 beta in float32: the formula is the better truth.
FLOAT32_BETAS = {"betas float32 tensors": {"lr": 0.02, "betas": (torch.tensor(0.8), torch.tensor(0.9))}}
L1 = {
    "l1": {"lr": 0.02, "l1": 0.7},
    "l1, maximize": {"lr": 0.02, "l1": 0.7, "maximize": True},
    "l1_proximal": {"lr": 0.02, "l1": 2.0, "l1_proximal": True},
}

CAUTIOUS = {
    "cautious": {"lr": 0.02, "cautious": True},
    "cautious, weight_decay, l1": {"lr": 0.02, "cautious": True, "weight_decay": 0.4, "l1": 0.2, "maximize": True},
}
CAUTIOUS_DECAY = {
    "cautious_weight_decay": {"lr": 0.02, "cautious_weight_decay": True, "weight_decay": 0.4},
    "both cautious": {"lr": 0.02, "cautious_weight_decay": True, "cautious": True, "weight_decay": 0.4},
}

BETAS_AND_DECAY = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3}
DECAY_AND_L1 = {"lr": 0.02, "weight_decay": 0.3, "l1": 0.5, "l1_proximal": True}
NESTEROV_AND_L1 = {**DECAY_AND_L1, "momentum": 0.9, "nesterov": True, "maximize": True}

AVERAGED = {
    "warmup_steps": {"lr": 0.02, "warmup_steps": 4},
    "r": {"lr": 0.02, "r": 2.0},
    "weight_lr_power": {"lr": 0.02, "warmup_steps": 4, "weight_lr_power": 0.5},
}
ADAM_SCHEDULE_FREE = {
    "beta1 0.3": {"lr": 0.02, "betas": (0.3, 0.95)},
    "beta2 0": {"lr": 0.02, "betas": (0.9, 0.0), "eps": 0.1},
    "betas float64 tensors": {"lr": 0.02, "betas": (float64(0.8), float64(0.9))},
    "eps": {"lr": 0.02, "betas": (0.9, 0.9), "eps": 0.3},
    **DECAY,
    "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
    "maximize": {"lr": 0.02, "maximize": True},
}

ADAM_SETTINGS = {
    **PLAIN,
    **MOMENTS,
    "beta1 0.5": {"lr": 0.02, "betas": (0.5, 0.95)},
    "beta1 0.7": {"lr": 0.02, "betas": (0.7, 0.95)},
    "beta2 0.2": {"lr": 0.02, "betas": (0.9, 0.2)},
    **DECAY,
    "weight_decay, lr float32 tensor": {"lr": LR32, "weight_decay": 0.4},
    "weight_decay, lr float64 tensor": {"lr": LR64, "weight_decay": 0.3},
    "amsgrad": {"lr": 0.02, "betas": (0.9, 0.5), "amsgrad": True},
    "maximize": {"lr": 0.02, "maximize": True},
    "all": {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-2, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
}
ADAM_EXTRAS = {
    **FLOAT32_BETAS,
    "bias_correction": {"lr": 0.02, "bias_correction": False},
    "bias_correction, beta1 0": {"lr": 0.02, "betas": (0.0, 0.9), "bias_correction": False},
    "bias_correction, amsgrad": {"lr": 0.02, "betas": (0.7, 0.5), "bias_correction": False, "amsgrad": True},
    **L1,
    **CAUTIOUS,
    "l1, weight_decay": {"lr": 0.02, "l1": 0.7, "weight_decay": 0.5},
    "l1_proximal, maximize": {"lr": 0.02, "l1": 2.0, "l1_proximal": True, "maximize": True},
    "all": {**ADAM_SETTINGS["all"], "bias_correction": False, "l1": 1.5, "l1_proximal": True},
}
ADAM_EVERYTHING = {**DECAY_AND_L1, "amsgrad": True}
