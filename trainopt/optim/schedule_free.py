"""Schedule-free AdamW, RAdam and SGD: the average of the iterates stands in for a learning-rate schedule.

The parameters are y in train mode, where gradients are taken, and x in eval mode, the average, which is the result. The
third sequence is the state z, and y = (1 - beta1) * z + beta1 * x. The weights of the average are numbers of the
groups; a step moves them on before the engine reads them, and back if it is not made.
"""

import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainopt import checks
from trainopt.optim import precision
from trainopt.optim.base import Fused
from trainopt.optim.gradients import DEVICE_TYPES
from trainopt.optim.options import ForeachlessOptions
from trainopt.optim.plain import bias_correction
from trainopt.optim.report import Record

#: What a group remembers of its steps, before the first one.
_PROGRESS = {"k": 0, "train_mode": False, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}
#: Of these, what a step moves on.
_MOVED = ("k", "weight_sum", "lr_max", "scheduled_lr")


class ScheduleFree(Fused):
    """What the schedule-free optimizers have in common: the two modes, and the numbers of a step."""

    _needs_host = True
    _host_options = frozenset({*_PROGRESS, "warmup_steps", "r", "weight_lr_power"})
    _begin_as_parameter = ("z",)
    _momentum: ClassVar[str] = "betas"  # the option that says where y lies between z and x

    #: The parameters as they were in train mode, while they are the averages.
    _trained: dict[Tensor, Tensor]

    def __init__(self, params: Any, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        for name in options.keys() - ForeachlessOptions.__annotations__.keys():
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
        self._trained = {}
        super().__init__(params, **own, **_PROGRESS, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch does; it is in the mode that the others are in."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            name, momentum = self._momentum, self._momentum_of(options)
            if not 0 < momentum < 1:  # of y = z there is no way to x
                raise ValueError(f"Invalid {name}: {options[name]} ({momentum} must be between 0 and 1, exclusive)")
            if "warmup_steps" in options:
                checks.stock_option("warmup_steps", options["warmup_steps"])
            if self.param_groups:
                param_group.setdefault("train_mode", self.param_groups[0]["train_mode"])
        super().add_param_group(param_group)

    # Modes ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def eval(self) -> None:
        """Makes the parameters x, the averages that are to be evaluated, saved and used. Does nothing in eval mode."""
        self._check_parameters("eval")
        for group in self.param_groups:
            if group["train_mode"]:
                for param in self._averaged(group):
                    value = self._value(group, param)
                    self._trained[param] = value if precision.has_master(group, param) else param.detach().clone()
                    self._store(group, param, self._average(group, param, value))
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Makes the parameters y, on which `step` works. Does nothing in train mode.

        Elements that nobody has written since `eval` have the bits that they had before it; to that end a copy of the
        parameters is kept in eval mode. Of others, and after a state dict was loaded, y is computed from x and z.
        """
        self._check_parameters("train")
        for group in self.param_groups:
            if not group["train_mode"]:
                for param in self._averaged(group):
                    value, z = self._value(group, param), self._z(param)
                    trained = value + (z - value) * (1 - self._momentum_of(group))
                    if (before := self._trained.get(param)) is not None:
                        before = before.to(value.dtype)
                        average = self._as_stored(group, param, self._average(group, param, before))
                        is_same = (value == average) | (value.isnan() & average.isnan())
                        trained = torch.where(is_same, before, trained)
                    self._store(group, param, trained)
                    self._trained.pop(param, None)
                group["train_mode"] = True

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Warns whenever the model is evaluated in train mode, in which its parameters are y and not the averages.

            optimizer.watch(model)

        An optimizer does not know whose parameters it has; this tells it. Evaluated is a module whose forward is called
        in evaluation mode (``model.eval()``), once the optimizer has made a step. A program that torch.compile has made
        does not warn.

        Returns:
            a handle, whose ``remove()`` ends it. The model does not keep the optimizer alive, and copies of it do not
            warn.

        Raises:
            TypeError: `model` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {model!r}: it must be a torch.nn.Module")
        return model.register_forward_pre_hook(_Watch(self))

    def _check_parameters(self, what: str) -> None:
        if self._record.holds_averages:
            raise RuntimeError(f"{what}: the parameters are their moving averages, inside averaged_parameters()")

    def _averaged(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have made a step; of others x, y and z are the same."""
        return [param for param in group["params"] if self.state.get(param, {}).get("z") is not None]

    def _average(self, group: dict[str, Any], param: Tensor, trained: Tensor) -> Tensor:
        """x, of y and z. Without a fused multiply-add, which torch has for some elements only."""
        return trained + (self._z(param) - trained) * (1 - 1 / self._momentum_of(group))

    def _momentum_of(self, group: Mapping[str, Any]) -> float:
        value = group[self._momentum]
        return float(value[0] if self._momentum == "betas" else value)

    def _value(self, group: dict[str, Any], param: Tensor) -> Tensor:
        """A parameter in the arithmetic's type, with what it lacks of a float32 if that is stored beside it."""
        own = self.state[param] if precision.has_master(group, param) else {}
        return precision.value_of(param, own) if param.dtype.itemsize < 4 else param.detach()

    def _z(self, param: Tensor) -> Tensor:
        z: Tensor = self.state[param]["z"]
        return z.detach().to(param.device, torch.float32 if param.dtype.itemsize < 4 else param.dtype)

    def _store(self, group: dict[str, Any], param: Tensor, value: Tensor) -> None:
        """Rounds to nearest: no random number belongs to a change of modes."""
        if precision.has_master(group, param):
            precision.store_(param, value, group, self.state[param], 0)
        else:
            param.copy_(value)

    def _as_stored(self, group: dict[str, Any], param: Tensor, value: Tensor) -> Tensor:
        """A value as it would be read again."""
        if not precision.has_master(group, param):
            return value.to(param.dtype).to(value.dtype)
        stored, own = torch.empty_like(param), dict[str, Any]()
        precision.store_(stored, value, group, own, 0)
        return precision.value_of(stored, own)

    # The step ---------------------------------------------------------------------------------------------------------

    def _check_can_step(self) -> None:
        super()._check_can_step()
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "step: the optimizer is in eval mode, in which the parameters are the averages: call optimizer.train()"
                " before training, and optimizer.eval() before evaluating and saving"
            )

    def _advanced(self, group: dict[str, Any]) -> dict[str, Any]:
        lr = self._scheduled_lr(group)
        lr_max = max(lr, group["lr_max"])
        weight = _weight({**group, "lr_max": lr_max})
        return {"scheduled_lr": lr, "lr_max": lr_max, "weight_sum": group["weight_sum"] + weight}

    def _scheduled_lr(self, group: dict[str, Any]) -> float:
        """A group's learning rate in its next step, with the warm-up in it. Waits for a device where the rate is."""
        k, warmup = group["k"], group["warmup_steps"]
        return float(group["lr"]) * ((k + 1) / warmup if k < warmup else 1.0)

    def _make_step(self, record: Record) -> None:
        modules = map(torch.get_device_module, DEVICE_TYPES)
        if any(module.is_available() and module.is_current_stream_capturing() for module in modules):
            raise RuntimeError(
                f"{type(self).__name__} cannot be captured: the numbers of its steps are the host's, and a graph would"
                " repeat those of one step"
            )
        groups, steps = self.param_groups, record.steps
        before = [{name: group[name] for name in _MOVED} for group in groups]
        try:
            advanced = [self._advanced(group) for group in groups]
        except (TypeError, ValueError):
            self._check_groups()
            raise
        for group, values in zip(groups, advanced, strict=True):
            group.update(values)
        try:
            super()._make_step(record)
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update({"k": old["k"] + 1} if record.steps > steps else old)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._trained = {}
        super().__setstate__(state)


class _Watch:
    """A module's hook that knows an optimizer; a copy of it knows none."""

    def __init__(self, optimizer: ScheduleFree | None = None) -> None:
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type["_Watch"], tuple[()]]:
        return _Watch, ()

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if module.training or self.optimizer is None or torch.compiler.is_compiling():
            return
        optimizer = self.optimizer()
        if optimizer is not None and any(group["train_mode"] and group["k"] > 0 for group in optimizer.param_groups):
            warnings.warn(
                f"the model is evaluated while {type(optimizer).__name__} is in train mode: its parameters are not the"
                " averages that training is to result in. Call optimizer.eval() before, and optimizer.train() after it",
                stacklevel=3,
            )


def _weight(group: Mapping[str, Any]) -> float:
    """What z counts in the average in a group's next step."""
    return math.pow(group["k"] + 1, group["r"]) * math.pow(group["lr_max"], group["weight_lr_power"])


def _move(param: Tensor, update: Tensor, state: dict[str, Any], group: dict[str, Any], momentum: float) -> None:
    """Moves y and z by an update, in place, and y on to the average."""
    z, lr, weight_sum = state["z"], group["scheduled_lr"], group["weight_sum"]
    share = _weight(group) / weight_sum if weight_sum != 0 else 0.0
    if group["weight_decay"] != 0:
        update = update + param * group["weight_decay"]
    change = (param - z) * share + update * (lr * (1 - momentum * (1 - share)))
    z.sub_(update * lr)
    param.sub_(change)


def _averaged_length(beta2: float, step: int) -> float:
    """Of a simple average with as much in it as the second moment has (RAdam)."""
    rest = beta2**step
    return 2 / (1 - beta2) - 1 - 2 * step * rest / (1 - rest)


class AdamScheduleFree(ScheduleFree):
    """What AdamW and RAdam have in common."""

    @staticmethod
    def plain_step(param: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        (beta1, beta2), step, v = map(float, group["betas"]), group["k"] + 1, state["exp_avg_sq"]
        v.copy_(v * beta2 + gradient * (1 - beta2) * gradient)
        factor, eps = 1 / bias_correction(beta2, step) ** 0.5, group["eps"]
        if not group.get("silent_sgd_phase", True) and _averaged_length(beta2, step) <= 4:
            factor, eps = 0.0, 1.0
        _move(param, gradient / (v.sqrt() * factor + eps), state, group, beta1)


class AdamWScheduleFree(AdamScheduleFree, rule="adam_schedule_free"):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682) with a fused step.

        optimizer.train()   # before training
        optimizer.eval()    # before evaluating or saving; the parameters are the averages then

    In train mode the parameter is y, at which the gradient g is taken. With z, v and the average x, which is not
    stored, in a group's step k = 0, 1, …::

        lr_k = lr * min(1, (k + 1) / warmup_steps)
        w = (k + 1)**r * max(lr_0, …, lr_k)**weight_lr_power;  c = w / (the sum of all w so far)
        v = beta2 * v + (1 - beta2) * g**2
        u = g / (sqrt(v / (1 - beta2**(k + 1))) + eps) + weight_decay * y
        z = z - lr_k * u
        x = (1 - c) * x + c * z
        y = (1 - beta1) * z + beta1 * x

    Names, defaults, states and the keys of groups are those of the authors' package; state dicts go both ways. k and
    the sums are the group's: a parameter whose first gradient comes late finds them where they are.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 0.0025), at least 0. A scheduler may change
            it; there is no need of one.
        betas: where y lies between z and x, and of the squares' average (default (0.9, 0.999)): the first greater than
            0 and less than 1, the second at least 0 and less than 1.
        eps: added to the root of the second moment (default 1e-8), at least 0.
        weight_decay: of y, in the update (default 0), at least 0.
        warmup_steps: in which the learning rate rises evenly (default 0).
        r: power of the step's number in the weights of the average (default 0).
        weight_lr_power: power of the learning rate in these weights (default 2).
        foreach: takes no effect: the step is fused (default True, as the authors').
        maximize, capturable, differentiable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`. What acts
            on parameters acts on y.

    Raises:
        ValueError: an option is out of its range.
        RuntimeError: for `step` in eval mode, in which the optimizer is at first; or in a CUDA graph's capture.

    The states z and v (``z``, ``exp_avg_sq``) have the parameter's dtype; arithmetic is float32, or float64 for float64
    parameters. z is a weight, in which small steps must not be lost: where ``state_dtype`` or ``precision`` are given,
    it is float32. The numbers of a step are the host's: it waits to know whether a step is left out
    (``skip_nonfinite``, GradScaler with ``fused=True``), and under torch.compile the step runs uncompiled.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        **options: Unpack[ForeachlessOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "foreach": foreach,
            },
            options,
        )


class RAdamScheduleFree(AdamScheduleFree, rule="adam_schedule_free"):
    """Schedule-free RAdam (Defazio et al. 2024, arXiv:2405.15682; Liu et al. 2020, arXiv:1908.03265), fused.

    As `trainopt.AdamWScheduleFree`, `train()` and `eval()` included, with RAdam's rectification in place of a warm-up.
    With l = 2 / (1 - beta2) - 1 and n = l - 2 * (k + 1) * beta2**(k + 1) / (1 - beta2**(k + 1))::

        lr_k = lr * sqrt((n - 4) * (n - 2) * l / ((l - 4) * (l - 2) * n))    where n > 4

    Before that, in the first few steps, lr_k is 0 and only v moves; with ``silent_sgd_phase=False`` lr_k is lr and u is
    g + weight_decay * y.

    Args:
        params, lr, betas, eps, weight_decay, r, weight_lr_power, foreach: as in `trainopt.AdamWScheduleFree`.
        silent_sgd_phase: the first steps move no parameter (default True).
        maximize, capturable, differentiable, fused, l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm,
            error_if_nonfinite, zero_grad, ema_decay, ema_warmup, state_dtype, precision, cautious,
            cautious_weight_decay, stats: as there.

    Raises:
        ValueError, RuntimeError: as there.
    """

    _host_options = ScheduleFree._host_options - {"warmup_steps"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        silent_sgd_phase: bool = True,
        **options: Unpack[ForeachlessOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "foreach": foreach,
                "silent_sgd_phase": silent_sgd_phase,
            },
            options,
        )

    def _scheduled_lr(self, group: dict[str, Any]) -> float:
        beta2 = float(group["betas"][1])
        longest, now = 2 / (1 - beta2) - 1, _averaged_length(beta2, group["k"] + 1)
        share = float(not group["silent_sgd_phase"])
        if now > 4:
            share = ((now - 4) * (now - 2) * longest / ((longest - 4) * (longest - 2) * now)) ** 0.5
        return float(group["lr"]) * share


class SGDScheduleFree(ScheduleFree, rule="sgd_schedule_free"):
    """Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682) with a fused step.

    As `trainopt.AdamWScheduleFree`, `train()` and `eval()` included, with u = g + weight_decay * y and ``momentum`` for
    beta1. Learning rates are larger than SGD's, by 1 / (1 - momentum) or more.

    Args:
        params, weight_decay, warmup_steps, r, weight_lr_power, foreach: as in `trainopt.AdamWScheduleFree`.
        lr: the learning rate, a number or a tensor of one element (default 1.0), at least 0.
        momentum: where y lies between z and x (default 0.9), greater than 0 and less than 1.
        maximize, capturable, differentiable, fused, l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm,
            error_if_nonfinite, zero_grad, ema_decay, ema_warmup, state_dtype, precision, cautious,
            cautious_weight_decay, stats: as there.

    Raises:
        ValueError, RuntimeError: as there.

    The one state is z.
    """

    _momentum = "momentum"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        **options: Unpack[ForeachlessOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "foreach": foreach,
            },
            options,
        )

    @staticmethod
    def plain_step(param: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        _move(param, gradient, state, group, float(group["momentum"]))
