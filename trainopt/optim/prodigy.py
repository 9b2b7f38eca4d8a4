"""Prodigy."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions
from trainopt.optim.plain import bias_correction
from trainopt.optim.trust import sum_of_products

#: What there is one of for all groups: what the steps so far have found, and what that is found with.
_FOUND = ("d", "d_max", "d_numerator", "k")
_SHARED = ("betas", "beta3", "d0", "d_coef", "growth_rate", "use_bias_correction")


class Prodigy(Fused, rule="prodigy"):
    """Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101) with a fused step: Adam that finds its learning rate.

    d estimates how far from its start the solution is. With gradient g and the parameter's start p0, sums over the
    elements of all parameters, r = d * lr and beta3 = sqrt(beta2)::

        numerator = beta3 * numerator + (d / d0) * r * sum(g * (p0 - p))
        s = beta3 * s + (d / d0) * r * g
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * (d * g)**2
        new_d = max(d, d_coef * numerator / sum(abs(s)))
        p = p * (1 - r * weight_decay) - r * m / (sqrt(v) + new_d * eps)
        d = new_d

    Names, defaults and states are those of the authors' package, prodigyopt; and so are the numbers in the groups: d,
    d_max, d_numerator, d_denom, d_hat and k, the count of steps, the same in all of them. A state dict of the package
    can be loaded. A group whose lr is 0 rests: it has no part in d, and is not moved. Otherwise groups have one lr, and
    one of each option that d is found with. All parameters of a step go one way: by the engine if it takes each of
    them, on the CPU or on one device. The host reads d's two sums once in a step, so that no CUDA graph can hold one.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: what d is multiplied by, for schedules, a number or a tensor of one element (default 1.0), at least 0.
        betas: of the two moments (default (0.9, 0.999)), each at least 0 and less than 1.
        beta3: of d's averages, at least 0 and less than 1 (default None: the root of the second of betas).
        eps: times d, added to the root of the second moment (default 1e-8), at least 0.
        weight_decay: times d and lr (default 0), at least 0.
        decouple: decays the parameter, as AdamW does; with False the decay is in the gradient (default True).
        use_bias_correction: multiplies lr by Adam's bias corrections, in the count of all steps (default False).
        safeguard_warmup: keeps lr out of s, for schedules that begin with a small one (default False).
        d0: what d begins at (default 1e-6), greater than 0.
        d_coef: what each new estimate is multiplied by (default 1.0), greater than 0.
        growth_rate: the most that d grows by in a step, as a factor (default inf), at least 1.
        fsdp_in_use: only False: the sums over the shards of DTensors are known to be such.
        slice_p: only 1: d is found from every element.
        maximize, foreach, capturable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range, or ``differentiable=True``: d is a number.
        RuntimeError: in `step`, for groups that differ in what there is one of.

    The states m, v, s and p0 (``exp_avg``, unless the first beta is 0, ``exp_avg_sq``, ``s`` and ``p0``) have the
    parameter's dtype; arithmetic is float32, or float64 for float64 parameters, and sums are float64. A `state_dtype`
    of fewer bits than the parameter's is for the moments alone: of p0 - p and of s, whose average is long, rounding
    would leave nothing.
    """

    _begin_as_parameter = ("p0",)
    _may_be_none = frozenset({"beta3"})
    _deciding = ("beta3", "d0", "d_coef", "growth_rate")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1.0,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        **options: Unpack[PlainOptions],
    ) -> None:
        _check_one_way({"fsdp_in_use": fsdp_in_use, "slice_p": slice_p})
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            beta3=beta3,
            eps=eps,
            weight_decay=weight_decay,
            decouple=decouple,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d=d0,
            d0=d0,
            d_max=d0,
            d_numerator=0.0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            k=0,
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch does; from the next step on it has the d of the others."""
        if isinstance(param_group, dict) and "d0" in param_group:
            param_group = {"d": param_group["d0"], "d_max": param_group["d0"], **param_group}
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer of trainopt does; also what the authors' package has saved, with ``slice_p=1``."""
        for group in state_dict["param_groups"]:
            _check_one_way(group)
        params = [param for group in self.param_groups for param in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        state = {**state_dict["state"]}
        for key, param in zip(keys, params, strict=False):
            if isinstance(state.get(key), dict):
                state[key] = dict(_reshaped(state[key], param))
        super().load_state_dict({**state_dict, "state": state})

    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> None:
        super()._check_options(options)
        _check(options)

    # One d for all ----------------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        groups = list(self.param_groups)
        for group in groups:
            _check_one_way(group)
        for group in groups[1:]:
            for name in _SHARED:
                if (value := group[name]) is not (of_first := groups[0][name]) and value != of_first:
                    raise RuntimeError(
                        f"Prodigy has one d for all groups, and {name} is {of_first!r} in one and {value!r} in another"
                    )
        try:
            rates = {float(group["lr"]) for group in groups} - {0.0} if len(groups) > 1 else set()
        except (TypeError, ValueError):
            self._check_groups()
            raise
        if len(rates) > 1:
            raise RuntimeError(f"Prodigy has one lr for all groups that have not 0, and they have {sorted(rates)}")
        for group in groups[1:]:
            for name in _FOUND:
                group[name] = groups[0][name]

    def _take_sums(self, sums: Sequence[float]) -> None:
        if sums[1] == 0:  # no gradient so far
            return
        first, lr = self.param_groups[0], max(float(group["lr"]) for group in self.param_groups)
        found = {**estimate({**first, "lr": lr}, sums), "k": first["k"] + 1}
        for group in self.param_groups:
            group.update(found)

    def _lr_of(self, group: dict[str, Any]) -> float:
        return lr_of(group)

    @staticmethod
    def plain_sums(
        param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """What one parameter adds to the sums over all."""
        if group["lr"] == 0:
            zero = torch.zeros(())
            return zero, zero
        gradient = _decayed(param, gradient, group)
        s = _new_s(gradient, state, group)
        return sum_of_products(gradient, state["p0"] - param), sum_of_products(s, s.sign())

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        if group["lr"] == 0:
            return
        (beta1, beta2), d, lr, sums = map(float, group["betas"]), group["d"], lr_of(group), group["sums"]
        new_d = estimate(group, sums)["d"] if sums[1] != 0 else d
        v = state["exp_avg_sq"]
        gradient = _decayed(param, gradient, group)
        v.copy_(v * beta2 + gradient * (d * d * (1 - beta2)) * gradient)
        state["s"].copy_(_new_s(gradient, state, group))
        if beta1 == 0:
            m = gradient * new_d  # as the authors' code has it
        else:
            m = state["exp_avg"].copy_(state["exp_avg"] * beta1 + gradient * (d * (1 - beta1)))
        if group["decouple"]:
            param.mul_(1 - lr * group["weight_decay"])
        if sums[1] != 0:
            param.sub_(m * lr / (v.sqrt() + new_d * group["eps"]))


def estimate(group: dict[str, Any], sums: Sequence[float]) -> dict[str, float]:
    """The numbers of a group after a step with these sums."""
    d, d_max = group["d"], group["d_max"]
    numerator = _beta3(group) * group["d_numerator"] + d / group["d0"] * lr_of(group) * sums[0]
    d_hat = group["d_coef"] * numerator / sums[1]
    if d == group["d0"]:
        d = max(d, d_hat)
    d_max = max(d_max, d_hat)
    d = min(d_max, d * group["growth_rate"])
    return {"d": d, "d_max": d_max, "d_hat": d_hat, "d_numerator": numerator, "d_denom": sums[1]}


def lr_of(group: dict[str, Any]) -> float:
    """A group's learning rate with d in it, and the bias corrections where they are asked for."""
    rate = group["d"]
    if group["use_bias_correction"]:
        (beta1, beta2), step = map(float, group["betas"]), group["k"] + 1
        rate = rate * math.sqrt(bias_correction(beta2, step)) / bias_correction(beta1, step)
    return float(float(group["lr"]) * rate)


def _beta3(group: dict[str, Any]) -> float:
    return math.sqrt(float(group["betas"][1])) if group["beta3"] is None else float(group["beta3"])


def _new_s(gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
    by_start = group["d"] / group["d0"]
    share = by_start * (group["d"] if group["safeguard_warmup"] else lr_of(group))
    return state["s"] * _beta3(group) + gradient * share


def _decayed(param: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    decays = not group["decouple"] and group["weight_decay"] != 0
    return gradient + param * group["weight_decay"] if decays else gradient


def _check(options: dict[str, Any]) -> None:
    """ValueError for options out of their ranges, those that torch's optimizers have aside."""
    if options["beta3"] is not None and not 0 <= options["beta3"] < 1:
        raise ValueError(f"Invalid beta3 value: {options['beta3']}")
    if not 0 < options["d0"]:
        raise ValueError(f"Invalid d0 value: {options['d0']}")
    if not 0 < options["d_coef"]:
        raise ValueError(f"Invalid d_coef value: {options['d_coef']}")
    if not 1 <= options["growth_rate"]:
        raise ValueError(f"Invalid growth_rate value: {options['growth_rate']}")
    if options.get("differentiable"):
        raise ValueError(
            "differentiable=True: the step depends on d, a number, through which nothing is differentiated"
        )
    _check_one_way(options)


def _check_one_way(options: dict[str, Any]) -> None:
    """ValueError for what the authors' package has another way for."""
    if options.get("slice_p", 1) != 1:
        raise ValueError(f"slice_p={options['slice_p']!r}: Prodigy finds d from every element here (slice_p=1)")
    if options.get("fsdp_in_use", False):
        raise ValueError(
            "fsdp_in_use=True: of DTensors (FSDP2's fully_shard) it is known that they are shards, and flat parameters"
            " of FullyShardedDataParallel cannot be stepped so"
        )


def _reshaped(state: dict[str, Any], param: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """A parameter's state as the authors' package saves it, in the parameter's shape: s and p0 are flat there, the p0
    of a parameter of zeros is one 0, and the count of steps is an int."""
    for name, value in state.items():
        if name == "step" and isinstance(value, int):
            yield name, torch.tensor(float(value))
        elif name == "p0" and isinstance(value, torch.Tensor) and value.ndim == 0 < param.ndim:
            yield name, torch.full_like(param, float(value), dtype=value.dtype, requires_grad=False)
        elif name in ("s", "p0") and isinstance(value, torch.Tensor) and value.shape == (param.numel(),):
            yield name, value.reshape(param.shape)
        else:
            yield name, value
