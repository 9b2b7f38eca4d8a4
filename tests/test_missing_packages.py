"""Where an optional package is not installed, the tests that need it are skipped by its name, and the others run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent

#: Runs pytest with modules that cannot be found, as where they are not installed.
WITHOUT = """
import builtins, sys

find = builtins.__import__

def without(name, *rest, **more):
    if name.partition(".")[0] == missing:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return find(name, *rest, **more)

missing = sys.argv.pop(1)
builtins.__import__ = without
import pytest
sys.exit(pytest.main(["-p", "no:hypothesispytest", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("missing", "skipped"),
    [
        ("expecttest", ["test_torch_suite.py", "test_losses_torch_suite.py"]),
        ("hypothesis", ["test_edits.py", "test_losses_pointwise.py"]),
    ],
)
def test_a_file_that_needs_it_is_skipped(missing, skipped):
    files = [HERE / name for name in (*skipped, "test_recall.py")]
    command = [sys.executable, "-c", WITHOUT, missing, "--collect-only", "-q", "-rs", *map(str, files)]
    said = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True).stdout
    for name in skipped:
        assert f"tests/{name}: the package {missing} is not installed" in said
        assert f"tests/{name}::" not in said
    assert "tests/test_recall.py::" in said and "ERROR" not in said


def test_any_other_module_that_is_missing_is_an_error(tmp_path):
    """As one of this suite's own, or of trainopt."""
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import no_such_module\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])  # of what conftest.py imports
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "No module named 'no_such_module'" in run.stdout
