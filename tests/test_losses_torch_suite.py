"""torch's own operator database, put through trainopt's losses: every sample input, every error input."""

import warnings

import pytest
import torch
from loss_judge import as_dtype, assert_no_worse
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

from trainopt import functional

NAMES = ("cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div")
NAMES += ("binary_cross_entropy", "binary_cross_entropy_with_logits")
NAMES += ("linear_cross_entropy",) if hasattr(F, "linear_cross_entropy") else ()
DB = {
    info.name.rpartition(".")[2]: info
    for info in op_db
    if info.name.startswith("nn.functional.") and not info.variant_test_name
}
DB = {name: DB[name] for name in NAMES}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_loss = pytest.mark.parametrize("name", NAMES)


def outcome(function, sample, dtype=None):
    """Loss and gradients of everything floating in a sample, or the error."""

    def prepare(value):
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.detach().clone() if dtype is None else as_dtype(value, dtype)
        return copy.requires_grad_(value.requires_grad)

    args = [prepare(value) for value in (sample.input, *sample.args)]
    options = {key: prepare(value) for key, value in sample.kwargs.items()}
    leaves = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor) and value.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = function(*args, **options)
            gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True) if leaves else ()
        except Exception as error:
            return error
    return [loss.detach(), *gradients]


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(name, dtype):
    samples = list(DB[name].sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        found, expected = (outcome(getattr(side, name), sample) for side in (functional, F))
        if isinstance(expected, Exception):
            assert type(found) is type(expected) and str(found) == str(expected)
            continue
        assert not isinstance(found, Exception), found
        truth = outcome(getattr(F, name), sample, torch.float64)
        for mine, theirs, true in zip(found, expected, truth, strict=True):
            if theirs is None:
                assert mine is None
            else:
                assert_no_worse(mine, theirs, true, str(sample), roundings=4)


@each_loss
def test_samples_that_torch_reads_from_its_reference(name):
    samples = list(DB[name].reference_inputs("cpu", torch.float32, requires_grad=True))
    for sample in samples:
        found, expected = (outcome(getattr(side, name), sample) for side in (functional, F))
        if isinstance(expected, Exception):
            assert type(found) is type(expected)
            continue
        truth = outcome(getattr(F, name), sample, torch.float64)
        for mine, theirs, true in zip(found, expected, truth, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert_no_worse(mine, theirs, true, str(sample), roundings=4)


@pytest.mark.parametrize("name", [name for name in NAMES if DB[name].error_inputs_func is not None])
def test_errors(name):
    for error in DB[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)


@each_loss
def test_complex_and_other_types_are_torchs(name):
    """Whatever else torch's database says that it takes."""
    for dtype in DB[name].supported_dtypes("cpu") - set(DTYPES):
        for sample in DB[name].sample_inputs("cpu", dtype, requires_grad=False):
            found, expected = (outcome(getattr(side, name), sample) for side in (functional, F))
            if isinstance(expected, Exception):
                assert type(found) is type(expected)
            else:
                torch.testing.assert_close(found, expected, equal_nan=True)
