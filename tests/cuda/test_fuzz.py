"""Whatever is handed to the loss operators on a device, it answers with an error or a result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_fuzz import EXAMPLES, attempt, calls, loss_operators, run

from trainopt import functional

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", loss_operators())
def test_any_arguments(device, name):
    @given(data=st.data())
    @settings(max_examples=EXAMPLES, deadline=None)
    def check(data):
        run(name, data.draw(calls(name, device)), data.draw(st.sampled_from((None, "input", "target", "weight"))))

    check()
    attempt(functional.check_targets)  # what has been found is no concern of other tests


@pytest.mark.parametrize("left", [0, 8])
def test_memory_that_is_not_there(device, left):
    x, target = torch.rand(4, 5, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    x.untyped_storage().resize_(left)
    for loss, other in ((functional.cross_entropy, target), (functional.mse_loss, torch.rand(4, 5, device=device))):
        with pytest.raises(RuntimeError, match=f"input needs 80 bytes of memory, and its storage has {left}"):
            loss(x, other)
