"""torch's own step, for the parameters that the engine does not take and for bisecting (TRAINOPT_REFERENCE=1).

The arithmetic is torch's: the body of `step` of the torch class that an optimizer derives from, run over a view of the
optimizer that holds only the parameters in question. For an optimizer that torch does not have it is the plain step
that stands beside its class (`plain_step`). What trainopt adds to torch is done round it, in plain torch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy as shallow_copy
from typing import Any

import torch

from trainopt._extension import _C
from trainopt.optim import average, precision, stats
from trainopt.optim.distributed import is_dtensor, like, reals_of
from trainopt.optim.gradients import GradientScaling, clears, clips
from trainopt.optim.options import DEFAULTS, extra
from trainopt.optim.state_dtype import are_apart, cast_states, dtype_of, has_codes
from trainopt.optim.states import Numbered, States, widen_count
from trainopt.originals import step_of

# A step count at which every bias correction is exactly 1.
_LONG_PAST = 1e18


def step(
    optimizer: States,
    params: Sequence[Numbered],
    indices: Sequence[int] | None,
    scaling: GradientScaling,
    *,
    plain: bool = False,
) -> None:
    """Steps the parameters of these indices (all if None) that have a gradient, by torch's own code.

    Args:
        params: every parameter of the optimizer, in order.
        scaling: what the gradients are divided by first. In place, but for those that are clipped.
        plain: by torch's plain loop on every device. torch's foreach kernels race for memory that parameters share.
    """
    wanted = params if indices is None else [params[i] for i in indices]
    chosen = [(index, group, param) for index, group, param in wanted if param.grad is not None]
    if not chosen:
        return
    for each in chosen:
        _check(optimizer, each)
    if optimizer._factors:
        chosen = _with_elements(optimizer, chosen)
    if optimizer._sums_over_all and "sums" not in chosen[0][1]:
        _step_by_sums(optimizer, chosen, scaling, plain)
        return
    with stats.measured(optimizer, chosen, scaling.scale):
        ways: dict[bool, list[Numbered]] = {True: [], False: []}
        for each in chosen:
            ways[_is_stored_apart(optimizer, *each)].append(each)
        for each in ways[True]:
            _step_in_float32(optimizer, each, scaling, plain)
        # Choosing steps a parameter from 0, which nobody may see who shares its memory: each is stepped alone.
        together = [each for each in ways[False] if not chooses(each[1])]
        for part in ([each] for each in ways[False] if chooses(each[1])):
            _step_in_place(optimizer, part, scaling, plain)
        if together:
            _step_in_place(optimizer, together, scaling, plain)


def _step_by_sums(optimizer: States, chosen: Sequence[Numbered], scaling: GradientScaling, plain: bool) -> None:
    """Steps all parameters of a class whose step depends on sums over them, which copies of them are made to tell."""
    for _, group, param in chosen:
        optimizer._start(param, group)
    terms: list[list[float]] = []
    view = _view(optimizer, [])
    view.state, view._unstarted = defaultdict(dict), set()
    view.plain_step = lambda *operands: terms.append([float(term) for term in optimizer.plain_sums(*operands)])
    inert = {name: DEFAULTS[name] for name in ("cautious", "cautious_weight_decay", "stats", "ema_decay", "zero_grad")}
    for index, group, param in chosen:
        assert param.grad is not None
        copy = torch.nn.Parameter(param.detach().clone())
        copy.grad = param.grad.detach().clone()
        view.state[copy] = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in optimizer.state[param].items()
            if key != average.KEY
        }
        step(view, [(index, {**group, **inert, "params": [copy], "sums": ()}, copy)], None, scaling, plain=plain)
    sums = torch.tensor(terms, dtype=torch.float64).sum(0).tolist()
    groups = {id(group): {**group, "sums": sums} for _, group, _ in chosen}
    step(optimizer, [(index, groups[id(group)], param) for index, group, param in chosen], None, scaling, plain=plain)
    optimizer._take_sums(sums)


def _with_elements(optimizer: States, chosen: Sequence[Numbered]) -> list[Numbered]:
    """Those that have elements, by whose number torch's Adafactor divides. Of the others only steps are counted."""
    for _, group, param in chosen:
        if param.numel() == 0:
            optimizer._start(param, group)
            optimizer.state[param]["step"] += 1
    return [each for each in chosen if each[2].numel() > 0]


def _check(optimizer: States, numbered: Numbered) -> None:
    """RuntimeError for a parameter that cannot be stepped, before one beside it has been."""
    _, group, param = numbered
    assert param.grad is not None
    name = type(optimizer).__name__
    if optimizer._factors and param.is_complex():
        raise RuntimeError(f"{name} does not support complex parameters")
    if optimizer._sums_over_all and param.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} cannot step an inference tensor outside of inference mode: give it a clone of it")
    if param.grad.layout is not torch.strided:
        if optimizer._torch_class is None:
            raise RuntimeError(f"{name} does not support sparse gradients")
        _rehearse(optimizer, numbered)
    if param.is_conj() and (optimizer._torch_class is None or chooses(group) or extra(group, "noise")):
        raise RuntimeError(f"{name} cannot step a conjugated view as pairs of reals: give it param.resolve_conj()")


def _step_in_place(optimizer: States, chosen: Sequence[Numbered], scaling: GradientScaling, plain: bool) -> None:
    started: list[tuple[torch.Tensor, torch.Tensor]] = []  # states of torch's come first
    for _, group, param in chosen:
        if scaling.is_written_back(group):
            assert param.grad is not None
            param.grad.div_(scaling.scale)
    view = _view(optimizer, list(_narrowed(optimizer, chosen, plain)))
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(optimizer.defaults.get("differentiable", False)))
        for _, group, param in chosen:
            if clips(group) and (divisor := scaling.divisor(group)) != 1:
                stack.enter_context(_divided_gradient(param, divisor))
            if extra(group, "l1") and not extra(group, "l1_proximal"):
                stack.enter_context(_l1_in_gradient(param, group))
            if not extra(group, "bias_correction"):
                if not optimizer.state[param]:
                    optimizer._start(param, group)
                stack.enter_context(_steps_long_past(optimizer.state[param]))
            if not optimizer._counts_steps:
                _count_step(optimizer, param, group)
            elif _is_of_no_step(optimizer.state.get(param, {})):
                optimizer._begin_first_step(optimizer.state[param], group)
            if chooses(group):
                stack.enter_context(_chosen_update(optimizer, param, group))
            if average.averages(group) and average.KEY not in optimizer.state.get(param, {}):
                started.append((param, average.new_average(param)))
        _make_step(view)
    for param, begun in started:
        optimizer.state[param][average.KEY] = begun
    with torch.no_grad():
        for index, group, param in chosen:
            if extra(group, "l1") and extra(group, "l1_proximal"):
                _soft_threshold_(param, optimizer._lr_of(group) * float(group["l1"]))
            if extra(group, "noise"):
                _add_noise_(param, optimizer._first_index + index, group, optimizer.state[param])
            if average.averages(group):
                average.update_(param, group, optimizer.state[param])
            if clears(group):
                assert param.grad is not None
                param.grad.zero_()


def _is_stored_apart(optimizer: States, _: int, group: dict[str, Any], param: torch.Tensor) -> bool:
    """Whether a parameter or its states are stored in another way than torch's code takes."""
    if are_apart(group, param):
        return True
    if chooses(group) and param.dtype in (torch.float16, torch.bfloat16):
        return True  # in which small updates leave a parameter as it is, and have no sign
    return has_codes(optimizer.state.get(param, {}), optimizer._states)


def _step_in_float32(optimizer: States, numbered: Numbered, scaling: GradientScaling, plain: bool) -> None:
    """Steps a parameter that is stored apart, or whose states are: in a float32 copy of it."""
    index, group, param = numbered
    assert param.grad is not None
    own: dict[str, Any] = dict(optimizer.state.get(param, {}))
    copy = torch.nn.Parameter(precision.value_of(param, own if precision.of(group, param) != "native" else {}))
    copy.grad = param.grad.detach().float()
    wide = {**group, "state_dtype": None, "precision": "native", "stats": False, "params": [copy]}
    wide |= optimizer._options_for(group, param)
    view = _view(optimizer, [wide])
    view.state = defaultdict(dict)
    view._unstarted = {copy} if param in optimizer._unstarted else set()
    if own or param in optimizer.state:
        view.state[copy] = {key: value for key, value in own.items() if key != precision.KEY}
        cast_states(optimizer, view.state[copy], wide, copy)
    begun = view.state[copy].pop(average.KEY, None)
    if begun is None and average.averages(group):
        begun = average.new_average(param)
    is_random = precision.is_random(group, param)
    if is_random and not optimizer._counts_steps:
        view._start_count(copy, wide)
    step(view, [(index, wide, copy)], None, scaling, plain=plain)
    made = view.state[copy]
    step_made = int(made["step"]) if "step" in made else 0
    cast_states(optimizer, made, _as_stored(optimizer, own, group, param), param, step_made)
    widen_count(made, group, param)
    precision.store_(param, copy.detach(), group, made, optimizer._first_index + index, step_made)
    if scaling.is_written_back(group) or clears(group):
        with torch.no_grad():
            param.grad.copy_(copy.grad)
    if begun is not None:  # of the parameter as it is stored, not of the copy
        average.update_(precision.value_of(param, made), group, made | {average.KEY: begun})
        made[average.KEY] = begun
    if made or own:
        for key in own.keys() - made.keys():
            del optimizer.state[param][key]
        optimizer.state[param].update(made)


def _as_stored(optimizer: States, own: dict[str, Any], group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """A group that has states stored as those are that are there, and new ones as the group says."""
    dtypes = {
        name: own[name].dtype if isinstance(own.get(name), torch.Tensor) else dtype_of(group, name, param)
        for name in optimizer._states
    }
    return {**group, "state_dtype": dtypes}


def rehearse(optimizer: States, params: Sequence[Numbered], indices: Sequence[int]) -> None:
    """Lets torch refuse options and states of these parameters before anything is changed.

    torch finds out in the middle of its arithmetic, when it has counted the step or changed a state. So it steps a
    parameter of one element first, with the options of the one in question and states like its own.
    """
    for index in indices:
        _rehearse(optimizer, params[index])


def _rehearse(optimizer: States, numbered: Numbered) -> None:
    index, group, param = numbered
    shape = [1] * param.dim() if optimizer._factors and param.dim() > 1 else [1]
    stand_in = torch.zeros(shape, dtype=param.dtype, device=param.device, requires_grad=True)
    stand_in.grad = torch.ones_like(stand_in)
    if param.grad is not None and param.grad.is_sparse:
        stand_in.grad = stand_in.grad.to_sparse()
    state = dict(optimizer.state.get(param) or {})  # as it is now: another thread may be making it
    plain = {**group, "cautious": False, "cautious_weight_decay": False}  # with the weight decay in torch's hands
    if optimizer._sums_over_all:
        plain["sums"] = [0.0] * len(_C.rules()[optimizer._rule].sums)
    view = _view(optimizer, list(_narrowed(optimizer, [(index, plain, stand_in)], True)))
    if _is_stored_apart(optimizer, index, group, param):
        cast_states(optimizer, state, {"state_dtype": None}, param)
    whole = ("step", *optimizer._numbers)
    shapes = {key: None if key in whole else optimizer._shape_of(key, param) for key in state}
    view.state = {stand_in: {key: _first_element(value, shapes[key], shape) for key, value in state.items()}}
    with torch.no_grad():
        _make_step(view)


def _first_element(value: Any, shape: torch.Size | None, of_one: list[int]) -> Any:
    """A copy of a state for a parameter of one element; `shape` is None for a number, which stays whole."""
    if not isinstance(value, torch.Tensor):
        return shallow_copy(value)  # a count in an array of NumPy's is counted in place
    if value.shape == shape:  # a count has the shape of a parameter of no dimensions, too
        return torch.zeros(of_one, dtype=value.dtype, device=value.device)
    return value.clone()


def _view(optimizer: States, groups: list[dict[str, Any]]) -> Any:
    """The optimizer with other groups. Gradients are unscaled already, and no step that must be skipped comes here."""
    view = object.__new__(type(optimizer))
    view.__dict__.update(optimizer.__dict__)
    view.__dict__.update(grad_scale=None, found_inf=None, param_groups=groups)
    return view


def _make_step(view: Any) -> None:
    chosen = hasattr(view, "plain_step") and any(map(chooses, view.param_groups))
    params = [param for group in view.param_groups for param in group["params"]]
    is_refused = not view._torch_takes_shards and any(map(is_dtensor, params))
    if view._torch_class is None or chosen or is_refused:
        _make_plain_step(view)
    else:
        step_of(type(view))(view)


def _make_plain_step(optimizer: Any) -> None:
    """The step of an optimizer that torch does not have, or does not leave the update of, one parameter after another.

    As in the engine, arithmetic is float32 (float64 for float64 parameters), and complex numbers are pairs of reals. In
    a first step without states of its own, ``state["first_step"]`` is true.
    """
    for _, group, param in optimizer._enumerate():
        is_first = optimizer._start(param, group)
        state = optimizer.state.get(param, {})
        if optimizer._counts_steps:
            state["step"] += 1
        names = optimizer._states_needed(group, param)
        stored = [reals_of(tensor) for tensor in (param, *(state[name] for name in names))]
        dtype = torch.float64 if stored[0].dtype is torch.float64 else torch.float32
        gradient = reals_of(param.grad).to(dtype)
        values, *states = results = [tensor.to(dtype) for tensor in stored]  # themselves where they have this dtype
        if leaves_update := chooses(group) and needs_parameter(optimizer, group):
            values = stored[0].to(torch.float64, copy=True)  # in which an update keeps its digits beside a parameter
        named = {**state, **dict(zip(names, states, strict=True)), "first_step": is_first}
        optimizer.plain_step(values, -gradient if group["maximize"] else gradient, named, group)
        for tensor, result in zip(stored, results, strict=True):
            if result.dtype is not tensor.dtype:
                tensor.copy_(result)
        if leaves_update:
            stored[0].copy_(values - stored[0])


def _narrowed(optimizer: States, chosen: Sequence[Numbered], plain: bool) -> Iterator[dict[str, Any]]:
    """The groups with only these parameters. On the CPU torch's plain loop is the truth: its fused step is not."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _, group, param in chosen:
        on_cpu = param.device.type == "cpu"
        flags: dict[str, Any] = {"foreach": False, "fused": False} if plain or on_cpu else {}
        if chooses(group) and optimizer._decay_of(group) not in ("update", "none"):
            flags["weight_decay"] = 0.0  # it is done round the step
        if on_cpu and "capturable" in group:
            flags["capturable"] = False
        flags |= (own := optimizer._options_for(group, param))
        key = (id(group), on_cpu, *own.values())
        groups.setdefault(key, {**group, **flags, "params": []})["params"].append(param)
    return iter(groups.values())


@contextmanager
def _divided_gradient(param: torch.Tensor, divisor: float) -> Iterator[None]:
    gradient = param.grad
    assert gradient is not None
    param.grad = gradient / divisor
    try:
        yield
    finally:
        param.grad = gradient


@contextmanager
def _l1_in_gradient(param: torch.Tensor, group: dict[str, Any]) -> Iterator[None]:
    gradient = param.grad
    assert gradient is not None
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    # torch negates the gradient if it maximizes; the penalty pulls towards 0 all the same.
    param.grad = dense + param.detach().sgn() * (-group["l1"] if group["maximize"] else group["l1"])
    try:
        yield
    finally:
        param.grad = gradient


def needs_parameter(optimizer: States, group: dict[str, Any]) -> bool:
    """Whether an update can only be made from the parameter as it is."""
    return optimizer._reads_parameter or optimizer._decay_of(group) == "update"


def chooses(group: dict[str, Any]) -> bool:
    """Whether the signs of gradient, update and parameter say what is done."""
    return bool(extra(group, "cautious") or extra(group, "cautious_weight_decay"))


@contextmanager
def _chosen_update(optimizer: States, param: torch.Tensor, group: dict[str, Any]) -> Iterator[None]:
    """What the step inside makes of a parameter is done as far as the group's cautious options let it.

    The step leaves the update alone in the parameter: it is made from 0, and without weight decay, which goes into the
    gradient or follows here; but from the parameter where the update has the decay in it (`_make_plain_step`).
    """
    kind, weight_decay = optimizer._decay_of(group), group.get("weight_decay", 0)
    gradient = param.grad
    assert gradient is not None
    direction = gradient.to_dense() if gradient.is_sparse else gradient.clone()  # it may be the parameter's memory
    if not gradient.is_sparse:
        param.grad = direction
    if kind == "gradient" and weight_decay:
        direction = direction.add(param.detach(), alpha=-weight_decay if group["maximize"] else weight_decay)
        param.grad = direction
    direction = reals_of(-direction if group["maximize"] else direction)
    own = reals_of(param.detach())
    before = own.clone()
    if not needs_parameter(optimizer, group):
        own.zero_()
    try:
        yield
    except BaseException:
        own.copy_(before)
        raise
    finally:
        param.grad = gradient
    change = -own
    if extra(group, "cautious"):
        agrees = (change.sign() * direction.sign() > 0).to(change.dtype)
        part = stats.whole(agrees.mean(dtype=torch.float64)) if agrees.numel() else 1.0
        change = change * (agrees / max(float(part), 1e-3))
    share = optimizer._decay_share(optimizer.state[param], group)
    own.copy_(before)
    if share and extra(group, "cautious_weight_decay"):
        own.sub_(torch.where(change.sign() * before.sign() >= 0, before * share, 0.0))
    else:
        own.mul_(1 - share)
    own.sub_(change)
    optimizer._settle(own, optimizer.state[param], group)


@contextmanager
def _steps_long_past(state: dict[str, Any]) -> Iterator[None]:
    steps = state["step"]
    state["step"] = torch.full_like(steps, _LONG_PAST)
    try:
        yield
        steps += 1
    finally:
        state["step"] = steps


def _soft_threshold_(param: torch.Tensor, threshold: float) -> None:
    size = param.abs()
    param.copy_(torch.where(size <= threshold, torch.zeros_like(param), param - param.sgn() * threshold))


def _count_step(optimizer: States, param: torch.Tensor, group: dict[str, Any]) -> None:
    """For a class that counts no steps: counts where trainopt does."""
    if precision.is_random(group, param) or average.averages(group):
        optimizer._start_count(param, group)
    state = optimizer.state.get(param, {})
    if param in optimizer._unstarted or state.get("step") == 0:
        for name in optimizer._states:
            state.pop(name, None)  # a placeholder: the first step makes it
    if "step" in state:
        state["step"] += 1


def _is_of_no_step(state: dict[str, Any]) -> bool:
    """Whether a state's count is known to be 0, without waiting for a device."""
    count = state.get("step")
    if type(count) is torch.Tensor:
        return count.device.type == "cpu" and count.numel() == 1 and float(count) == 0
    return isinstance(count, (int, float)) and count == 0


def _add_noise_(param: torch.Tensor, index: int, group: dict[str, Any], state: dict[str, Any]) -> None:
    widen_count(state, group, param)
    target = reals_of(param)
    noise = torch.empty(target.shape, dtype=torch.float32)
    _C.gaussian_(noise, extra(group, "seed"), int(state["step"]), index)
    noise = like(noise.to(target.device, target.dtype), target)  # a rank makes all the noise and keeps its shard
    target.add_(noise, alpha=float(group["noise"]))
