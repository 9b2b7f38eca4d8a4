"""Installing, loading and reporting: what happens on machines that are not like the developer's."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from builds import (
    ROOT,
    add_compiler,
    add_metadata_of_torch,
    bare_packages,
    copy_of_sources,
    last_line,
    needs_source_tree,
    python,
)

import trainopt
from trainopt import _build

pytestmark = pytest.mark.slow

PACKAGE = Path(trainopt.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
RELEASE = ".".join(torch.__version__.split(".")[:2])
INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps"

# Building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def source_tree(tmp_path):
    return copy_of_sources(tmp_path / "source")


@pytest.fixture
def built_tree(source_tree):
    """The same after a build; what ROOT/build has is not compiled again. torch without CUDA: no nvcc is called."""
    for objects in [*map(ROOT.joinpath, ("build/kernels", "build/units")), *ROOT.glob("build/torch-*")]:
        shutil.copytree(objects, source_tree / "build" / objects.name)
    path, log = os.environ["PATH"], source_tree.parent / "log"
    if torch.version.cuda is None:
        path = f"{add_compiler(source_tree.parent, 'nvcc', log).parent}{os.pathsep}{path}"
    built = python("setup.py", "-q", "bdist_wheel", cwd=source_tree, PATH=path)
    assert built.returncode == 0, built.stdout + built.stderr
    assert ("CUDA kernels: not built" in built.stdout) == (not _build.CUDA)
    assert not log.exists()
    return source_tree


@pytest.fixture
def without_torch(tmp_path):
    """Runs a Python that has setuptools and nothing else, or a torch of which there is only the metadata."""
    packages = bare_packages(tmp_path / "packages")

    def run(*arguments, cwd, torch_version=None):
        if torch_version:
            add_metadata_of_torch(packages, torch_version)
        return python("-S", *arguments, cwd=cwd, PYTHONPATH=str(packages))

    return run


@needs_source_tree
@pytest.mark.parametrize(
    ("torch_version", "requirement"),
    [(None, "torch>=2.11"), ("2.10.0", "torch>=2.11"), ("2.13.0+cpu", "torch==2.13.*"), ("3.0.1", "torch==3.0.*")],
)
def test_metadata_needs_no_torch_to_import(source_tree, without_torch, torch_version, requirement):
    result = without_torch("setup.py", "egg_info", cwd=source_tree, torch_version=torch_version)
    assert result.returncode == 0, result.stderr
    assert (source_tree / "trainopt.egg-info/requires.txt").read_text().splitlines()[0] == requirement


@needs_source_tree
@pytest.mark.parametrize(("torch_version", "told"), [(None, "--no-build-isolation"), ("2.10.0", "2.11 or newer")])
def test_build_without_a_fitting_torch_is_told_in_one_line(source_tree, without_torch, torch_version, told):
    result = without_torch("setup.py", "-q", "build_ext", cwd=source_tree, torch_version=torch_version)
    assert result.returncode != 0
    assert last_line(result.stderr).startswith("error: ") and told in last_line(result.stderr)
    assert "Traceback" not in result.stderr


@needs_source_tree
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"TRAINOPT_CUDA": "yes"}, "use 0 or 1"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (looked for no-such-compiler)"),
    ],
)
def test_a_build_that_cannot_be_is_told_in_one_line(source_tree, environment, told):
    result = python("setup.py", "-q", "build_ext", cwd=source_tree, **environment)
    assert result.returncode != 0
    assert last_line(result.stderr).startswith("error: ") and told in last_line(result.stderr)
    assert "Traceback" not in result.stderr


@needs_source_tree
def test_wheel(built_tree, tmp_path):
    [wheel] = built_tree.glob("dist/*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    python_files = {str(path.relative_to(built_tree)) for path in built_tree.glob("trainopt/**/*.py")}
    assert names == python_files | {"trainopt/_build.py", f"trainopt/_C{SUFFIX}", "trainopt/py.typed"}

    [metadata] = installed.glob("*.dist-info/METADATA")
    assert {f"Version: {trainopt.__version__}", f"Requires-Dist: torch=={RELEASE}.*"} <= set(
        metadata.read_text().splitlines()
    )

    [scripts] = installed.glob("*.dist-info/entry_points.txt")
    assert "trainopt = trainopt.cli:main" in scripts.read_text()

    report = python("-m", "trainopt", cwd=installed)
    assert report.returncode == 0, report.stdout + report.stderr
    assert str(installed) in report.stdout
    bench = python("-m", "trainopt", "bench", cwd=installed)
    assert bench.returncode == 2 and "source tree" in bench.stderr
    step = (
        "import torch, trainopt; p = torch.ones(1000, requires_grad=True); o = trainopt.AdamW([p], lr=0.5);"
        "p.sum().backward(); o.step(); print(trainopt.__file__, p.max().item())"
    )
    result = python("-c", step, cwd=installed)
    assert result.returncode == 0, result.stderr
    file, value = result.stdout.split()
    assert Path(file).is_relative_to(installed) and float(value) < 0.6


@needs_source_tree
def test_second_build_compiles_nothing(built_tree):
    result = python("setup.py", "-q", "build_ext", "--inplace", cwd=built_tree)
    assert result.returncode == 0, result.stderr
    assert "compiled" not in result.stdout and "linked" not in result.stdout
    assert (built_tree / f"trainopt/_C{SUFFIX}").exists() and (built_tree / "trainopt/_build.py").exists()


@needs_source_tree
def test_simd_objects_share_no_code(built_tree):
    """A weak symbol is one copy for the whole binary: compiled for AVX-512, it would crash every older processor."""
    if sys.platform != "linux" or not shutil.which("nm"):
        pytest.skip("reads ELF objects with nm")
    objects = list(built_tree.glob("build/kernels/csrc-cpu-kernels_*.o"))
    assert objects
    for built in objects:
        symbols = subprocess.run(["nm", "-C", built], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^\w+ [WVu] .*", symbols, re.MULTILINE), built.name


@needs_source_tree
def test_nothing_is_compiled_for_the_machine_that_builds(built_tree):
    commands = [path.read_text() for path in built_tree.glob("build/*/*.command")]
    assert commands
    assert not [command for command in commands if re.search(r"-march=|-mtune=|-ffast-math|-Ofast", command)]


@needs_source_tree
def test_sdist_has_what_a_build_needs(source_tree):
    (source_tree / "trainopt/_build.py").write_text("TORCH = 'of this machine'\n")
    wanted = [path for folder in ("csrc", "trainopt", "tests", "tools") for path in (source_tree / folder).rglob("*.*")]
    wanted += [source_tree / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md")]
    result = python("setup.py", "-q", "sdist", cwd=source_tree)
    assert result.returncode == 0, result.stderr
    [archive] = source_tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {str(path.relative_to(source_tree)) for path in wanted} - names == {"trainopt/_build.py"}


@needs_source_tree
@pytest.mark.parametrize("folder", ["core", "rules", "cpu"])
def test_kernels_know_neither_torch_nor_python(folder):
    files = list((ROOT / "csrc" / folder).iterdir())
    assert files
    for file in files:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)", file.read_text()), file


# Loading and reporting --------------------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(tmp_path):
    """A folder with the package and no compiled module."""
    shutil.copytree(PACKAGE, tmp_path / "trainopt", ignore=shutil.ignore_patterns("*.so", "_build.py", "__pycache__"))
    return tmp_path


def python_in(folder, *arguments):
    """Without `site`, and so without an editable install of trainopt that would fill in what the folder lacks."""
    return python("-S", *arguments, cwd=folder, PYTHONPATH=str(Path(torch.__file__).parents[1]))


def test_another_torch_is_told_in_one_line(tmp_path):
    built_for = "import sys, types; sys.modules['trainopt._build'] = types.SimpleNamespace(TORCH='2.5.1+cu118')"
    result = python("-c", f"{built_for}\nimport trainopt", cwd=PACKAGE.parent)
    assert result.returncode != 0
    line = last_line(result.stderr)
    assert line.startswith("ImportError: trainopt was built for torch 2.5.1+cu118")
    assert torch.__version__ in line and INSTALL in line


def installed(folder, origin):
    """A folder as pip leaves it: the package, built for another torch, with the record of what it came from."""
    shutil.copytree(PACKAGE, folder / "trainopt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = folder / "trainopt/_build.py"
    build.write_text(re.sub("TORCH = .*", "TORCH = '2.5.1+cu118'", (PACKAGE / "_build.py").read_text()))
    metadata = folder / "trainopt-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: trainopt\nVersion: 0.1.0\n")
    if origin is not None:
        (metadata / "direct_url.json").write_text(origin if isinstance(origin, str) else json.dumps(origin))


TORCH_AS_BUILT = "run `pip install torch==2.5.1`, or build trainopt for this torch: "


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (lambda home: {"url": f"file://{home}/my%20sources", "dir_info": {}}, f"run `{INSTALL} '{{home}}/my sources'`"),
        (lambda home: {"url": f"file://{home}/gone", "dir_info": {}}, TORCH_AS_BUILT),
        (lambda home: {"url": f"file://{home}/a.tar.gz", "archive_info": {}}, f"run `{INSTALL} {{home}}/a.tar.gz`"),
        (lambda home: {"url": f"file://{home}/a.whl", "archive_info": {}}, TORCH_AS_BUILT),
        (
            lambda home: {"url": "https://somewhere.org/t.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            f"run `{INSTALL} git+https://somewhere.org/t.git`",
        ),
        (lambda home: None, TORCH_AS_BUILT),
        (lambda home: "no json", TORCH_AS_BUILT),
        (lambda home: "[]", TORCH_AS_BUILT),
    ],
    ids=["folder", "a folder that is gone", "archive", "wheel", "git", "index", "no json", "list"],
)
def test_what_mends_another_torch_can_be_run(origin, command, tmp_path):
    """There is no trainopt in any index: it is built from where it came from, or torch is put back."""
    home = tmp_path / "home"
    (home / "my sources").mkdir(parents=True)
    for file in ("my sources/setup.py", "a.tar.gz", "a.whl"):
        (home / file).touch()
    installed(tmp_path / "site", origin(home))
    line = last_line(python_in(tmp_path / "site", "-c", "import trainopt").stderr)
    assert line.startswith("ImportError: trainopt was built for torch 2.5.1+cu118")
    assert command.replace("{home}", str(home)) in line and " trainopt`" not in line


def test_a_later_patch_release_of_torch_is_accepted():
    built_for = f"import sys, types; sys.modules['trainopt._build'] = types.SimpleNamespace(TORCH='{RELEASE}.99')"
    result = python("-c", f"{built_for}\nimport trainopt", cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr


def test_a_tree_that_was_never_built_says_what_to_run(unbuilt):
    result = python_in(unbuilt, "-c", "import trainopt")
    assert result.returncode != 0
    assert last_line(result.stderr).startswith("ImportError: trainopt's compiled module has not been built: run `")
    assert INSTALL in last_line(result.stderr)

    report = python_in(unbuilt, "-m", "trainopt")
    assert report.returncode == 1
    assert "has not been built" in report.stdout and torch.__version__ in report.stdout


def test_a_module_that_does_not_load_says_what_to_run_and_why(unbuilt):
    shutil.copy(PACKAGE / "_build.py", unbuilt / "trainopt")
    module = unbuilt / f"trainopt/_C{SUFFIX}"
    module.write_text("not a library")
    result = python_in(unbuilt, "-c", "import trainopt")
    assert result.returncode != 0
    assert "does not load here" in last_line(result.stderr) and INSTALL in last_line(result.stderr)

    report = python_in(unbuilt, "-m", "trainopt")
    assert report.returncode == 1
    assert "does not load here" in report.stdout
    assert str(module) in last_line(report.stdout)  # the loader's own words
    assert "Traceback" not in report.stdout + report.stderr


@pytest.mark.parametrize("arguments", [[], ["info"], ["train", "digits"], ["lr-find", "digits"], ["bench"]])
@pytest.mark.parametrize("as_script", [False, True])
def test_the_command_says_what_to_run_in_a_tree_that_was_never_built(unbuilt, arguments, as_script):
    if as_script:
        script = unbuilt / "bin/trainopt"
        script.parent.mkdir()
        entry = "from trainopt.cli import main; sys.exit(main())"
        script.write_text(f"import sys; sys.path.insert(0, {str(unbuilt)!r}); {entry}")
        result = python_in(unbuilt, str(script), *arguments)
    else:
        result = python_in(unbuilt, "-m", "trainopt", *arguments)
    assert result.returncode == 1
    assert INSTALL in last_line(result.stdout + result.stderr) or "has not been built" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_report():
    report = python("-m", "trainopt", cwd=PACKAGE.parent)
    assert report.returncode == 0, report.stderr
    for fact in (
        trainopt.__version__,
        str(PACKAGE),
        torch.__version__,
        f"trainopt was built for {torch.__version__}",
        "compilers",
        "SIMD",
        "baseline",
        "this processor runs it",
        f"threads             {torch.get_num_threads()}",
        f"CUDA kernels        {'built' if _build.CUDA else f'not built ({_build.CUDA_REASON})'}",
        "TRAINOPT_REFERENCE  not set",
    ):
        assert fact in report.stdout
    for optimizer in ("SGD", "Adam", "AdamW"):
        assert re.search(rf"^{optimizer} .*CPU: \w+ kernel", report.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("environment", "facts"),
    [
        ({"TRAINOPT_CPU": "baseline"}, ["baseline (TRAINOPT_CPU=baseline)", "CPU: baseline kernel"]),
        ({"TRAINOPT_CPU": "scalar"}, ["baseline (TRAINOPT_CPU=scalar)"]),
        ({"ATEN_CPU_CAPABILITY": "default"}, ["baseline (ATEN_CPU_CAPABILITY=default)"]),
        ({"TRAINOPT_REFERENCE": "1"}, ["TRAINOPT_REFERENCE  1", "CPU: torch's own path"]),
    ],
)
def test_report_follows_the_environment(environment, facts):
    report = python("-m", "trainopt", cwd=PACKAGE.parent, **environment)
    assert report.returncode == 0, report.stderr
    for fact in facts:
        assert fact in report.stdout


def test_an_unknown_simd_name_is_answered_with_the_valid_ones():
    result = python("-c", "import trainopt", cwd=PACKAGE.parent, TRAINOPT_CPU="sse9")
    assert result.returncode != 0
    line = last_line(result.stderr)
    assert line.startswith("ImportError: TRAINOPT_CPU") and "sse9" in line and "baseline" in line
    assert "pip install" not in line

    report = python("-m", "trainopt", cwd=PACKAGE.parent, TRAINOPT_CPU="sse9")
    assert report.returncode == 1
    assert "sse9" in last_line(report.stdout)


def test_nothing_is_compiled_at_run_time():
    """Importing trainopt and stepping start no process that stock torch does not start."""
    script = """
import sys, torch

def step(optimizers):
    p = torch.ones(9, requires_grad=True)
    p.sum().backward()
    optimizers.SGD([p], lr=0.5).step()

step(torch.optim)
sys.addaudithook(lambda event, _: event == "subprocess.Popen" and sys.exit("started a process"))
import trainopt
step(trainopt)
"""
    result = python("-c", script, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
