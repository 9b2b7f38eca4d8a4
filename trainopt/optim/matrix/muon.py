"""Muon."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeGuard

import torch

from trainopt import originals
from trainopt.optim import registry
from trainopt.optim.adamw import AdamW
from trainopt.optim.depth import apply_depth
from trainopt.optim.matrix import update
from trainopt.optim.matrix.loading import Loading
from trainopt.optim.matrix.options import (
    EXTRAS,
    check_adamw,
    check_extras,
    check_group,
    check_params,
    check_present,
    check_values,
    is_muons,
    torchs_defaults,
)
from trainopt.optim.report import NonfiniteReport, Record
from trainopt.optim.states import asks_for_state
from trainopt.stand_in import StandIn


class Muon(originals.Muon, metaclass=StandIn):
    """torch.optim.Muon for hidden matrices, with the fused AdamW for the rest: a whole model in one optimizer.

        optimizer = trainopt.Muon(trainopt.muon_groups(model), lr=0.02, adamw={"lr": 3e-4})

    The arguments of `torch.optim.Muon` have its order, defaults and errors, and its update is this one's, to the
    rounding of the iteration. With gradient g, momentum μ and the state ``momentum_buffer`` b, zeros at first::

        b = μ * b + (1 - μ) * g
        u = μ * b + (1 - μ) * g if nesterov else b
        p = p * (1 - lr * weight_decay) - lr * ratio * orthogonalize(u)

    where the ratio is sqrt(max(1, rows / columns)), or 0.2 * sqrt(max(rows, columns)) as in Moonshot's work, or
    sqrt(rows / columns) as in Bernstein's. Sources:
    Jordan et al., Muon, 2024; Liu et al., Muon is scalable for LLM training, 2025 (arXiv:2502.16982); for NorMuon, Li
    et al. 2025 (arXiv:2510.05491).

    Args:
        params: tensors, which are all matrices, or groups, such as `trainopt.muon_groups` makes. A group with
            ``use_muon=False`` is AdamW's: it takes AdamW's options, trainopt's own among them but those that concern a
            whole step, and none of Muon's. In Muon's groups those below may be keys.
        lr: the learning rate of the matrices (default 1e-3), at least 0.
        weight_decay: of the matrices (default 0.1), at least 0 and decoupled.
        momentum: μ (default 0.95), at least 0.
        nesterov: whether the update looks ahead (default True).
        ns_coefficients: a, b and c of the iteration.
        eps: the least norm that a matrix is divided by before it (default 1e-7).
        ns_steps: of the iteration (default 5), less than 100.
        adjust_lr_fn: how the learning rate follows a matrix's shape: "original" (as with None), "match_rms_adamw", or
            where torch's class knows it (from 2.14 on) "spectral_unclamped".
        flatten: with True (default False), a parameter of more dimensions, such as a convolution's weight, is a matrix
            of its first dimension and all others.
        split: a parameter is several matrices, orthogonalised each by itself: a number of equal blocks, or their sizes
            in a tuple, such as 3 for fused queries, keys and values, or their number of heads.
        split_dim: 0 (default) for blocks of rows, as in a Linear's weight; 1 for blocks of columns.
        normuon_beta2: with a number in [0, 1), such as 0.95, NorMuon: each row of the update is divided by the root of
            a moving average of its mean square (the state ``second_momentum_buffer``) of this decay, and the update is
            then given the norm that it had. None (default): plain Muon.
        ns_dtype: of the iteration, "bfloat16", "float32" or "float64". None (default): float64 for float64 parameters,
            for others bfloat16, as torch has it, but float32 on a CPU without instructions for bfloat16.
        adamw: options of the groups with ``use_muon=False``, where these have none of their own; what is not there
            either has AdamW's defaults, lr 1e-3 and weight_decay 1e-2 among them.

    Raises:
        ValueError: an option is out of its range, unknown, or of the other algorithm; a parameter of Muon's is no
            matrix.
        RuntimeError: in a step, for a complex parameter or a sparse gradient, before anything is changed.
    """

    EXTRAS = EXTRAS
    _inner: AdamW | None = None
    _loading: Loading | None = None
    _opt_called: bool  # read by torch's schedulers

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        flatten: bool = False,
        split: int | Sequence[int] = 1,
        split_dim: int = 0,
        normuon_beta2: float | None = None,
        ns_dtype: str | torch.dtype | None = None,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = torchs_defaults(
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
            }
        )
        given = {
            "flatten": flatten,
            "split": split,
            "split_dim": split_dim,
            "normuon_beta2": normuon_beta2,
            "ns_dtype": ns_dtype,
        }
        check_extras(given)
        defaults |= {name: value for name, value in given.items() if value != EXTRAS[name]}
        check_group({}, defaults)
        if adamw:
            check_adamw(adamw)
            defaults["adamw"] = dict(adamw)
        torch.optim.Optimizer.__init__(self, params, defaults)  # torch's Muon would refuse what is no matrix

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch does."""
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # torch's error
        defaults = self.defaults
        own = {name: value for name, value in defaults.items() if name != "adamw"}
        if is_muons(param_group):
            check_group(param_group, own)
        else:
            own = AdamW([torch.empty(0)], **defaults.get("adamw", {})).defaults
            check_group(param_group, own)
        apply_depth(param_group, own)
        self.defaults = own  # what torch fills the group with
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = defaults
        try:
            check_params(self.param_groups[-1])  # of whatever form they came in, torch has made a list
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    @torch._disable_dynamo
    @torch.optim.Optimizer.profile_hook_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What `closure` returned, else None.
        """
        loss = None
        self._opt_called = True
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_present(group)
        if asks_for_state(self):
            self.init_state()
            return loss
        gathered = update.gather(self.param_groups, self.state)
        if (adamw := self.adamw) is not None:
            adamw._step()  # hooks are this optimizer's
        update.step(gathered, self.state)
        self._record.steps += 1
        return loss

    # torch puts hooks round the step of a class when it makes the first object of it, and `trainopt.fuse` makes none.
    step.hooked = True  # type: ignore[attr-defined]
    # A scheduler of torch's wraps step() to see whether it was called, and `trainopt.fuse` unwraps it: ours tells.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @property
    def adamw(self) -> AdamW | None:
        """The AdamW that steps the groups with ``use_muon=False``, on these very groups and states; None without such.

        For what it can tell, such as ``optimizer.adamw.stats()``, and for `trainopt.convert_state`.
        """
        groups = [group for group in self.param_groups if not is_muons(group)]
        if not groups:
            return None
        if self._inner is None:
            self._inner = AdamW([torch.empty(0)])
        self._inner.param_groups, self._inner.state = groups, self.state
        return self._inner

    # What every optimizer of trainopt's has ---------------------------------------------------------------------------

    @cached_property
    def _record(self) -> Record:
        return Record()

    @property
    def completed_steps(self) -> int:
        """How many steps this object has completed since it was made, but those that only ask for states."""
        return self._record.completed()

    @property
    def last_step_skipped(self) -> bool:
        """False: a step for a gradient that is not finite is left out by GradScaler, which does not call it."""
        return self._record.was_skipped()

    def nonfinite_report(self) -> NonfiniteReport:
        """The parameters with NaN or infinite elements in their gradient, states or value, by name and count.

        Returns a report that prints itself and is empty (false) if all is finite. Reads every tensor once.
        """
        return NonfiniteReport.of(self)

    def init_state(self) -> None:
        """Makes the state of every parameter that requires a gradient and has none yet, as before its first step.

        For tools that need states to load into, such as distributed checkpoints: no step is counted, and the first
        real step is a first step.
        """
        for group in self.param_groups:
            check_present(group)
        matrices = [group for group in self.param_groups if is_muons(group)]
        for group in matrices:
            check_values(group)
            check_params(group)
        if (adamw := self.adamw) is not None:
            adamw.init_state()
        for group in matrices:
            for param in group["params"]:
                if param.requires_grad:
                    update.start(group, param, self.state[param])

    # What torch calls -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of torch's Muon into an optimizer of matrices.

        As torch's, and beyond it: a state whose shape is not its parameter's is a ValueError before anything is
        changed, and options that torch's class does not know keep their present values if the state dict has none.
        """
        loading = Loading(self)
        hook = self.register_load_state_dict_pre_hook(loading.take)  # the last: after those that convert a state dict
        self._loading = loading
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            del self._loading

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict ends here too, before its hooks.
        super().__setstate__(state if self._loading is None else self._loading.put(state))


registry.MATRIX_METHODS[Muon.__name__] = Muon


def is_muon(optimizer: Any) -> TypeGuard[Muon]:
    """Whether an optimizer is trainopt's Muon: isinstance asks for torch's while trainopt stands in its place."""
    return Muon in type(optimizer).__mro__
