"""Whatever is handed to the loss operators and the module's functions, the process lives on. Run under
AddressSanitizer too (`make sanitize`)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_fuzz import EXAMPLES, attempt, calls, loss_operators, run

from trainopt._extension import _C

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", loss_operators())
def test_any_arguments(name):
    @given(data=st.data())
    @settings(max_examples=EXAMPLES, deadline=None)
    def check(data):
        arguments = data.draw(calls(name))
        run(name, arguments, data.draw(st.sampled_from((None, "input", "target", "weight"))))

    check()


@pytest.mark.parametrize("name", loss_operators())
def test_right_arguments_are_taken(name):
    """Else the test above would see nothing but refusals."""
    taken = []

    @given(data=st.data())
    @settings(max_examples=20, deadline=None)
    def check(data):
        from loss_fuzz import OPS, _right

        taken.append(getattr(OPS, name)(*data.draw(_right(name, "cpu")).values()))

    check()
    assert taken


JUNK = (
    *(None, 1, -1.5, "x", [], [1], {}, object(), b"x", (None, None)),
    *(torch.ones(2), torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64)),
    *([None], [torch.ones(2), None], [torch.ones(2, device="meta")]),
)


@pytest.mark.parametrize("name", sorted(name for name in dir(_C) if callable(getattr(_C, name)) and name != "Plan"))
def test_the_modules_functions_take_junk(name):
    function = getattr(_C, name)
    if name in ("set_install_command", "set_variant"):
        pytest.skip("it changes what other tests rely on")
    for count in range(4):
        for arguments in itertools.product(JUNK, repeat=min(count, 2)):
            attempt(lambda arguments=arguments, count=count: function(*arguments, *arguments[:1] * (count - 2)))


RIGHT = {
    "cross_entropy": (
        torch.ones(2, 3),
        torch.zeros(2, dtype=torch.int64),
        None,
        False,
        1,
        -100,
        0.0,
        0.0,
        0.0,
        False,
        1.0,
    ),
    "pointwise_loss": ("mse_loss", torch.ones(2), torch.ones(2), None, None, 1, 0.0),
    "norm_of": ([torch.ones(2)], 2.0, False),
    "clip_gradients": ([torch.ones(2)], 1.0, 2.0),  # without gradients: there is nothing to do
}


@pytest.mark.parametrize("name", RIGHT)
def test_each_argument_is_junk(name):
    function = getattr(_C, name)
    assert function(*RIGHT[name]) is not None
    for place, junk in itertools.product(range(len(RIGHT[name])), JUNK):
        arguments = [*RIGHT[name]]
        arguments[place] = junk
        attempt(lambda arguments=arguments: function(*arguments))


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("name", [*RIGHT, "gaussian_"])
def test_memory_that_is_not_there(name, left):
    """Only where a tensor is due: the words of a refusal show what was given, and torch cannot show such a tensor."""

    def spoilt(value):
        if isinstance(value, list):
            return [spoilt(each) for each in value]
        value, value.grad = value.clone(), value.clone()
        (value.grad if name == "clip_gradients" else value).untyped_storage().resize_(left)
        return value

    for place, value in enumerate(RIGHT.get(name, (torch.ones(4), 1, 2, 3))):
        if isinstance(value, torch.Tensor | list):
            arguments = [*RIGHT.get(name, (torch.ones(4), 1, 2, 3))]
            arguments[place] = spoilt(value)
            with pytest.raises(RuntimeError, match=f"bytes of memory, and its storage has {left}"):
                getattr(_C, name)(*arguments)


@pytest.mark.parametrize("tensor", [None, 1.0, [1.0]], ids=str)
def test_what_is_no_tensor_is_not_taken(tensor):
    for name in ("cross_entropy", "pointwise_loss"):
        for place in (0, 1) if name == "cross_entropy" else (1, 2):
            arguments = [*RIGHT[name]]
            arguments[place] = tensor
            assert getattr(_C, name)(*arguments) is None
