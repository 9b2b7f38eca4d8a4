"""Marks that run a test with every row of the optimizers' table, alone or with sets of its options, in every dtype."""

import pytest
from judge import DTYPES, TABLE

each_row = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
COMBINED = [
    pytest.param(r, o, id=f"{name}-{k}")
    for name, r in TABLE.items()
    for k, o in (("usual", r.usual), ("everything", r.everything))
]
each_combination = pytest.mark.parametrize("row, options", COMBINED)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def states_of(row, optimizer, param):
    return [name for name in row.states if name in optimizer.state[param]]
