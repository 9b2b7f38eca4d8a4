"""The operator optimizer_step_, called directly with whatever its schema lets through: right, or refused whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compile import RULES, arguments

optimizer_step_ = torch.ops.trainopt.optimizer_step_

REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
LISTS = {"params": 1, "gradients": 2, "states": 3, "steps": 4}


def lose_memory(tensor):
    tensor.untyped_storage().resize_(max(0, tensor.untyped_storage().nbytes() - 1))
    return tensor


def in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


#: What becomes of one tensor. The first half is another way to hold the same values.
SAME_VALUES = {
    "clone": torch.clone,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(),
    "with an offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "a lazy negation": lambda t: torch._neg_view(-t),
    "lazily cloned": torch._lazy_clone,
    "wider": torch.Tensor.double,
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
}
OTHER_VALUES = {
    "of another size": lambda t: t.new_ones(t.numel() + 1),
    "of another shape": lambda t: t.reshape(1, *t.shape).expand(2, *t.shape).clone(),
    "empty": lambda t: t.new_empty(0),
    "of no dimensions": lambda t: t.new_ones(()),
    "repeated": lambda t: t.new_ones(()).expand(t.shape),
    "of integers": torch.Tensor.long,
    "of truth values": torch.Tensor.bool,
    "complex": lambda t: t.to(torch.complex64),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "of 8 bits": lambda t: t.to(torch.float8_e5m2),
    "sparse": torch.Tensor.to_sparse,
    "on meta": lambda t: t.to("meta"),
    "without memory": lambda t: lose_memory(t.clone()),
    "nested": lambda t: torch.nested.nested_tensor([t.reshape(-1)]),
    "made in inference mode": in_inference_mode,
    "nan": lambda t: torch.full_like(t, float("nan")),
}
CHANGES = SAME_VALUES | OTHER_VALUES
OPTIONS = [float("nan"), float("inf"), -1.0, 0.0, 0.5, 1.0, 1e300]


@st.composite
def calls(draw):
    """Arguments that were right before a few of them were changed."""
    case = draw(st.sampled_from(sorted(RULES)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    given = list(arguments(case, dtype, shapes=((5,), (3, 7), (), (2, 0))[: draw(st.integers(0, 4))]))
    told = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["tensor", "tensor", "tensor", "alias", "drop", "add", "lr", "options", "rule"]))
        place = LISTS[draw(st.sampled_from(sorted(LISTS)))]
        tensors = given[place]
        told.append(kind)
        if kind == "rule":
            given[0] = draw(st.sampled_from(["", "sgd", "adam", "adam\0", "lbfgs", "ö" * 1000]))
        elif kind == "options":
            given[6] = draw(st.lists(st.sampled_from(OPTIONS), max_size=13))
        elif kind == "lr":
            given[5] = CHANGES[draw(st.sampled_from(sorted(set(CHANGES) - {"transposed"})))](torch.tensor(0.25))
        elif kind == "add":
            tensors.append(draw(st.sampled_from([*given[1], torch.ones(2)])))
        elif tensors:
            index = draw(st.integers(0, len(tensors) - 1))
            if kind == "drop":
                del tensors[index]
            elif kind == "alias":
                others = [t for other in LISTS.values() for t in given[other]] + [given[5]]
                tensors[index] = draw(st.sampled_from(others))
            else:
                told[-1] = draw(st.sampled_from(sorted(CHANGES)))
                try:
                    tensors[index] = CHANGES[told[-1]](tensors[index])
                except (RuntimeError, NotImplementedError):  # a second change that torch does not have
                    told.pop()
    return given, told


def bits_of(tensor):
    """What can be seen of a tensor's values; nothing of one that has none."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return None
    if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize:
        return None
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


def everything(given):
    return [bits_of(t) for place in LISTS.values() for t in given[place]]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call_is_right_or_refused_whole(call):
    given, told = call
    before = everything(given)
    contiguous = None
    if set(told) <= set(SAME_VALUES):
        contiguous = list(given)
        for place in LISTS.values():
            contiguous[place] = [t.detach().resolve_neg().clone().contiguous() for t in given[place]]
    try:
        optimizer_step_(*given)
    except REFUSALS:
        assert everything(given) == before
        return
    if contiguous is None:
        return
    optimizer_step_(*contiguous)
    for place in LISTS.values():
        for mine, theirs in zip(given[place], contiguous[place], strict=True):
            torch.testing.assert_close(mine.detach().contiguous(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("where", LISTS)
def test_a_partner_on_meta_is_refused(case, where):
    """The dispatcher then calls the meta kernel, which steps nothing."""
    given = list(arguments(case))
    if not given[LISTS[where]] or where == "steps":
        return
    given[LISTS[where]][1] = given[LISTS[where]][1].to("meta")
    before = everything(given)
    with pytest.raises(ValueError, match="meta"):
        optimizer_step_(*given)
    assert everything(given) == before


@pytest.mark.parametrize("where", ["params", "gradients", "states"])
def test_memory_that_is_gone_is_named(where):
    given = list(arguments("adam"))
    lose_memory(given[LISTS[where]][1])
    with pytest.raises(RuntimeError, match=r"params\[1\].*storage"):
        optimizer_step_(*given)


def test_a_parameter_that_is_its_own_gradient_is_refused():
    """Its elements would be read after they are written; torch's loop is not at hand here."""
    given = list(arguments("adam"))
    given[2][1] = given[1][1]
    before = everything(given)
    with pytest.raises(ValueError, match=r"params\[1\].*memory"):
        optimizer_step_(*given)
    assert everything(given) == before
