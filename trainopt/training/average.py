"""The weights that are to be used, where others are trained: a moving average, or a schedule-free optimizer's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.optim import precision
from trainopt.optim.average import KEY, averages, dtype_of, kept, new_average
from trainopt.optim.states import States, numbered
from trainopt.training.distributed import is_dtensor, like, whole
from trainopt.training.gradients import parameters
from trainopt.training.trained import Trained, plain_state


class WeightAverage:
    """The moving average of a module's parameters; its buffers are copied as they are, integers too.

    At its t-th update (t = 1, 2, …), with the weights w just stepped to:

        d_t = decay, or with warm-up min(decay, t / (9 + t))
        D_t = d_1 · d_2 · … · d_t                      (D_0 = 1)
        a_t = a_{t-1} + (1 - d_t) / (1 - D_t) · (w - a_{t-1})

    The divisor 1 - D_t takes the bias out, as in Adam (Kingma & Ba 2015, section 3): a_t is a weighted mean of w_1
    … w_t alone, whose weights are those of the plain recursion divided by their sum, so that a_1 = w_1, and without
    warm-up a_t is near the plain mean while t is small against 1 / (1 - decay). The warm-up, which is that of
    TensorFlow's ExponentialMovingAverage with `num_updates`, forgets the first weights of a run faster still.

    16-bit parameters have their average in float32, where its small steps are not lost.

    An optimizer of trainopt's can move the averages of what it steps in the same pass (`keep_in`): they are its states
    then. Its t is each parameter's own count of steps; `trainopt.training.tail` sees to it that this is t here.

    Args:
        model: the module: a model, or all that is trained.
        decay: in [0, 1).
        warmup: whether the decay starts small.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        self.model, self.decay, self.warmup = model, decay, warmup
        self.count = 0  # t
        self.log_bias = 0.0  # log D_t: D_t itself is 0 at once where the decay is, and 1 - D_t is exact from it
        with torch.no_grad():
            names = model.names() if isinstance(model, Trained) else [name for name, _ in model.named_parameters()]
            params = zip(names, model.parameters(), strict=True)
            self.weights = {name: new_average(param) for name, param in params}
        self.keeper: States | None = None  # the optimizer that moves some of them
        self.in_step: dict[str, Tensor] = {}  # the parameters of these, by name

    def decay_at(self, t: int) -> float:
        """d_t."""
        return min(self.decay, t / (9 + t)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now: after an update that was made, never after a skipped one."""
        self.count += 1
        decay = self.decay_at(self.count)
        self.log_bias += math.log(decay) if decay > 0 else -math.inf
        step = (1 - decay) / -math.expm1(self.log_bias)
        if len(self.in_step) == len(self.weights):
            return
        named = zip(self.weights.items(), self.model.parameters(), strict=True)
        rest = [(average, param) for (name, average), param in named if name not in self.in_step]
        averages = [average for average, _ in rest]
        current = [param.detach().to(dtype_of(param)) for _, param in rest]
        if not any(map(is_dtensor, averages)):
            torch._foreach_lerp_(averages, current, step)
            return
        for average, value in zip(averages, current, strict=True):  # a list must not hold tensors of both kinds
            average.lerp_(value, step)

    def keep_in(self, optimizer: States, params: Iterable[Tensor]) -> None:
        """From now on the optimizer's steps move the averages of these parameters, and `update` the others."""
        chosen = {id(param): param for param in params}
        own = zip(self.weights, self.model.parameters(), strict=True)
        self.keeper, self.in_step = optimizer, {name: param for name, param in own if id(param) in chosen}
        for name, param in self.in_step.items():
            if self.count:
                optimizer.state[param][KEY] = self.weights[name]
            else:  # its first step makes the state; until then the average is the parameter
                self.weights[name] = param.detach()

    def take_back(self) -> None:
        """From now on `update` moves all averages; the optimizer has those left that its groups ask for themselves."""
        self._find()
        groups = [] if self.keeper is None else self.keeper.param_groups
        stays = {id(param) for group in groups if averages(group) for param in group["params"]}
        for name, param in self.in_step.items():
            assert self.keeper is not None
            found = None if id(param) in stays else self.keeper.state.get(param, {}).pop(KEY, None)
            self.weights[name] = new_average(self.weights[name]) if found is None else found
        self.keeper, self.in_step = None, {}

    def _find(self) -> None:
        """Looks up the averages that the optimizer keeps: its first step has made them, or a person replaced them."""
        for name, param in self.in_step.items():
            assert self.keeper is not None
            self.weights[name] = self.keeper.state.get(param, {}).get(KEY, self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        """The counter, the bias and the averages, by parameter name."""
        self._find()
        return {"count": self.count, "log_bias": self.log_bias, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, as copies."""
        self.count, self.log_bias = state["count"], state["log_bias"]
        with torch.no_grad():
            for name, average in self.weights.items():
                average.copy_(like(state["weights"][name], average))

    def model_state(self, part: nn.Module | None = None) -> dict[str, Tensor]:
        """A state dict for the module, or a part of it: the averages in its parameters' dtypes, and its buffers as they
        are; copies."""
        with self.applied():
            state = plain_state(self.model if part is None else part)
            return {name: whole(tensor.detach()).clone() for name, tensor in state.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model's parameters are the averages inside, and afterwards the same bits as before."""
        if not self.count:
            yield
            return
        self._find()
        params = list(self.model.parameters())
        with kept(params):
            with torch.no_grad():
                for param, average in zip(params, self.weights.values(), strict=True):
                    param.copy_(average)
            yield


class Modes:
    """`optimizer.train()` and `optimizer.eval()`, where there are such methods; else nothing.

    A schedule-free optimizer's gradient is taken at one point and its result is another; the two methods move the
    parameters from one to the other, and back but for a rounding. So that no validation and no checkpoint has a part in
    what is trained, the parameters are put back to the bit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.exist = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
        self.weights: list[Tensor] | None = None  # those trained on, while the model holds those to be used

    def train(self, weights: list[Tensor] | None = None) -> None:
        """Training mode; `weights`, if they are given, are those that a checkpoint has kept."""
        if not self.exist:
            return
        self.optimizer.train()  # type: ignore[attr-defined]
        if weights is not None:
            with torch.no_grad():
                for (_, group, param), value in zip(numbered(self.optimizer.param_groups), weights, strict=True):
                    state = self.optimizer.state.get(param)
                    if state and precision.has_master(group, param) and value.dtype is torch.float32:
                        precision.store_(param, value.to(param.device), group, state, 0)
                    else:
                        param.copy_(value)

    def eval(self) -> None:
        """Evaluation mode: the model holds the weights to be used."""
        if self.exist:
            self.optimizer.eval()  # type: ignore[attr-defined]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode inside; afterwards the parameters have the bits that they had."""
        if not self.exist or self.weights is not None:
            yield
            return
        params = parameters(self.optimizer)
        with kept(params):
            self.weights = [
                precision.value_of(param, self.optimizer.state.get(param, {}))
                if precision.has_master(group, param)
                else param.detach().clone()
                for _, group, param in numbered(self.optimizer.param_groups)
            ]
            self.optimizer.eval()  # type: ignore[attr-defined]
            try:
                yield
            finally:
                self.optimizer.train()  # type: ignore[attr-defined]
                self.weights = None
