"""The rooms of the house and the arrows between them: nothing reaches upward, and there is no circle.

docs/design.md says what each room is for.
"""

import ast
import os
import re
import shlex
import subprocess
import sysconfig
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "trainopt"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

#: The rooms of csrc, from the ground up. A file may include those of its own room and of the floors below.
FLOORS = (("core",), ("rules", "losses"), ("cpu", "cuda"), ("torch",), ("python",))
#: What a floor's engine may take from the one beside it: the scalars that the host prepares are the same for both.
NEIGHBOURS = {("cuda", "cpu")}
#: Headers of others, by the lowest floor that may include them.
FOREIGN = {
    r"(torch|ATen|c10|caffe2)/(?!csrc/autograd/python|.*pybind)": "torch",
    r"pybind11/|Python\.h|torch/extension\.h|torch/csrc/.*(python|pybind)": "python",
}

#: The rooms of the package, from the ground up: modules, or folders.
STORIES = (
    ("_build", "_version", "_extension", "switches", "checks", "originals", "stand_in", "schedules"),
    ("clip", "adaptive_clip"),
    ("losses", "optim"),
    ("functional",),
    ("patching", "training"),
    ("paths",),
    ("__init__",),
    ("info", "experiments"),
    ("cli",),
    ("__main__",),
)

needs_source_tree = pytest.mark.skipif(not CSRC.is_dir(), reason="there is no source tree beside the tests")


def sources() -> list[Path]:
    return [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp", ".cu")]


def includes(source: Path) -> list[tuple[str, bool]]:
    """(header, whether it is one of ours) for all that a file includes."""
    found = re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', source.read_text(), re.MULTILINE)
    return [(header, mark == '"') for mark, header in found]


def floor_of(room: str) -> int:
    [floor] = [floor for floor, rooms in enumerate(FLOORS) if room in rooms]
    return floor


@needs_source_tree
def test_every_folder_of_csrc_is_a_room():
    assert {path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        room for rooms in FLOORS for room in rooms
    }


@needs_source_tree
@pytest.mark.parametrize("source", sources() if CSRC.is_dir() else [], ids=lambda path: str(path.relative_to(CSRC)))
def test_a_file_includes_nothing_of_a_room_above_its_own(source):
    room = source.relative_to(CSRC).parts[0]
    for header, is_ours in includes(source):
        if is_ours and (CSRC / header).exists():
            other = header.split("/")[0]
            allowed = other == room or floor_of(other) < floor_of(room) or (room, other) in NEIGHBOURS
            assert allowed, f"{source} includes {header}"
        for pattern, lowest in FOREIGN.items():
            if not is_ours and re.match(pattern, header):
                assert floor_of(room) >= floor_of(lowest), f"{source} includes <{header}>"


@needs_source_tree
def test_csrc_torch_names_nothing_of_python():
    for source in (CSRC / "torch").rglob("*"):
        if source.is_file():
            assert not re.search(r"\bPyObject\b|\bpybind11\b|\bTHP\w+", source.read_text()), source


@needs_source_tree
def test_no_header_hides_one_of_torch():
    """csrc comes before torch's folder in the search for <torch/...>."""
    theirs = Path(torch.__path__[0], "include")
    for source in (CSRC / "torch").rglob("*.h"):
        name = source.relative_to(CSRC)
        assert not (theirs / name).exists() and not (theirs / "torch/csrc/api/include" / name).exists(), name


@needs_source_tree
@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ("csrc/torch/optim/batch.cpp", "csrc/torch/optim/step_memory.cpp", "csrc/python/snapshot.cpp")
)
def test_torch_is_inspected_in_its_public_words_too(source):
    """The slow twins compile; and csrc/torch does without Python's headers."""
    theirs = Path(torch.__path__[0], "include")
    folders = [theirs, theirs / "torch/csrc/api/include"]
    if source.startswith("csrc/python"):
        folders.append(Path(sysconfig.get_paths()["include"]))
    command = [*COMPILER, "-fsyntax-only", "-w", "-DTRAINOPT_SLOW_INSPECT", f"-I{CSRC}"]
    standard = f"-std=c++{20 if version('torch') >= '2.14' else 17}"
    command += [standard, *(word for folder in folders for word in ("-isystem", str(folder))), str(ROOT / source)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@needs_source_tree
def test_headers_include_each_other_in_no_circle():
    graph = {
        str(source.relative_to(CSRC)): {header for header, is_ours in includes(source) if (CSRC / header).exists()}
        for source in sources()
    }
    TopologicalSorter(graph).prepare()


# The package ----------------------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_build.py"}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports: anywhere in it, in functions and for type checkers too."""
    modules, found = files(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name in modules:
                found.add(name)
            elif name.rpartition(".")[0] in modules:
                found.add(name.rpartition(".")[0])
    return found - {module_of(path)}


def story_of(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    [story] = [story for story, rooms in enumerate(STORIES) if room in rooms] or [None]
    assert story is not None, f"{module} is in no room: say in STORIES and in docs/design.md where it belongs"
    return story


@pytest.mark.parametrize("module", files())
def test_a_module_imports_nothing_of_a_room_above_its_own(module):
    for other in imports(files()[module]):
        same = other.split(".")[1:2] == module.split(".")[1:2]
        assert same or story_of(other) < story_of(module) or story_of(other) == story_of(module) != 1, (
            f"{module} imports {other}"
        )


def test_modules_import_each_other_in_no_circle():
    graph = {module: imports(path) for module, path in files().items()}
    TopologicalSorter(graph).prepare()
