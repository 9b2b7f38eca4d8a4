"""The parts of `make gpu-check`, with stand-ins for a GPU's tools: what they call, and how they read what was said."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builds import needs_source_tree

tools = pytest.importorskip("tools", reason="these tests are not in a source tree")
from tools import gpu_check, gpu_profile, gpu_sanitize, gpu_test, jobs  # noqa: E402

pytestmark = needs_source_tree

MAKEFILE = gpu_test.ROOT / "Makefile"


def script(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / name).chmod(0o755)
    return folder / name


# Jobs -----------------------------------------------------------------------------------------------------------------


def job(folder, name, code, seconds=30.0):
    return jobs.Job(name, [sys.executable, "-c", code], folder / f"{name}.log", seconds, {"ADDED": name})


def test_jobs_end_each_in_its_own_way(tmp_path):
    started = [
        job(tmp_path, "good", "import os; print(os.environ['ADDED'])"),
        job(tmp_path, "bad", "raise SystemExit(3)"),
        job(tmp_path, "killed", "import os; print('before', flush=True); os.kill(os.getpid(), 11)"),
        job(tmp_path, "slow", "import time; print('begun', flush=True); time.sleep(60)", seconds=2.0),
    ]
    ended = {end.job.name: end for end in jobs.run_all(started, at_once=4, minutes=1)}
    assert [ended[name].code for name in ("good", "bad", "killed", "slow")] == [0, 3, -11, None]
    assert [ended[name].fault for name in ended if ended[name].code in (0, 3)] == ["", ""]
    assert ended["killed"].fault == "killed by SIGSEGV" and ended["slow"].fault == "out of time"
    assert ended["good"].text == "good\n" and ended["killed"].text == "before\n"


def test_what_a_job_has_started_ends_with_it_and_the_rest_is_not_begun(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    first, second = jobs.run_all([job(tmp_path, "first", code), job(tmp_path, "second", "")], 1, minutes=1 / 60)
    assert first.fault == "out of time" and second.fault == "not started: out of time"
    assert time.monotonic() - start < 30


def test_tools_are_found_in_the_path_and_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "USUAL_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert jobs.find_tool("ncu") is None
    script(tmp_path / "cuda" / "bin", "ncu", "")
    assert jobs.find_tool("ncu") == str(tmp_path / "cuda" / "bin" / "ncu")
    first = script(tmp_path / "path", "ncu", "")
    monkeypatch.setenv("PATH", str(first.parent))
    assert jobs.find_tool("ncu") == str(first)


# Tests ----------------------------------------------------------------------------------------------------------------


FILES = {
    "test_good.py": """
import pytest
def test_a(): pass
@pytest.mark.skip("no such thing")
def test_b(): pass
@pytest.mark.slow
def test_c(): assert False
""",
    "test_bad.py": """
import pytest
@pytest.mark.parametrize("i", ["one two", "three"])
def test_a(i): assert i == "three"
""",
    "test_broken.py": "import no_such_module",
    "test_crash.py": """
import ctypes
def test_before(): pass
def test_null(): ctypes.string_at(0)
def test_after(): pass
""",
    "test_empty.py": "",
}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A small suite in place of this one."""
    monkeypatch.setattr(gpu_test, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "tests" / "cuda").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / "tests" / name).write_text(text)
    return tmp_path


def test_a_fault_in_a_file_does_not_end_the_others(suite, capsys):
    assert gpu_test.main(["--results", "out", "--jobs", "2"]) == 1
    reports = {Path(report["file"]).stem: report for report in json.loads(Path("out/test.json").read_text())}
    counts = {n: [r[kind] for kind in gpu_test.KINDS] for n, r in reports.items()}
    assert counts == {
        "test_good": [1, 0, 0, 1],
        "test_bad": [1, 1, 0, 0],
        "test_broken": [0, 0, 1, 0],
        "test_crash": [1, 0, 0, 0],
        "test_empty": [0, 0, 0, 0],
    }
    outcomes = {name: report["outcome"] for name, report in reports.items()}
    assert outcomes["test_good"] == outcomes["test_empty"] == "ok"
    assert outcomes["test_bad"] == outcomes["test_broken"] == "FAILED"
    assert outcomes["test_crash"] == "killed by SIGSEGV in tests/test_crash.py::test_null"
    assert reports["test_bad"]["failures"][0].startswith("tests/test_bad.py::test_a[one two] - ")
    output = capsys.readouterr().out
    assert "skipped 1: no such thing" in output and "FAILED tests/test_bad.py::test_a[one two]" in output
    last = output.splitlines()[-1].split()
    assert last[:4] == ["all", "3", "2", "1"] and last[5:] == ["3", "with", "faults"]
    assert "test_null" in Path("out/test/test_crash.log").read_text()


def test_arguments_for_pytest_stand_behind_two_dashes(suite):
    wanted = ["tests/test_good.py", "--results", "out", "--", "-m", ""]
    assert gpu_test.main(wanted) == 1
    assert json.loads(Path("out/test.json").read_text())[0]["failed"] == 1  # the slow one


def test_the_gpus_files_come_first_and_must_find_one():
    files = gpu_test.test_files([])
    ours = [file for file in files if gpu_test.CUDA_TESTS in file.parents]
    assert files[: len(ours)] == ours and len(ours) > 5 and len(files) == len(set(files)) > 40
    assert [file.name for file in ours[:2]] == ["test_steps.py", "test_recalled_steps.py"]
    for file, option in ((ours[0], "--gpu"), (files[-1], None)):
        command = gpu_test.job_of(file, "cuda", Path("out"), 60, 2, []).command
        assert (option is None and "--gpu" not in command) or option in command
    assert "--emulated" in gpu_test.job_of(ours[0], "simt", Path("out"), 60, 2, []).command


# The sanitizer --------------------------------------------------------------------------------------------------------

SANITIZER = """
import os, sys
words = sys.argv[1:]
tool = words[words.index("--tool") + 1]
test = next(word for word in words if "test_" in word)
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= COMPUTE-SANITIZER")
print(words)
errors = int(tool == "racecheck" and "steps" in test)
if "pointwise_losses" in test:
    raise SystemExit(255)
print("F" if "clipping" in test else ".")
print("1 failed, 3 passed, 9 deselected in 1.00s" if "clipping" in test else "12 passed, 30 deselected in 2.00s")
if tool == "racecheck":
    print(f"========= RACECHECK SUMMARY: {errors} hazards displayed ({errors} errors, 0 warnings)")
else:
    print("========= ERROR SUMMARY: 0 errors")
raise SystemExit(86 if errors else 1 if "clipping" in test else 0)
"""


def test_sanitizer(tmp_path, monkeypatch, capsys):
    script(tmp_path / "bin", "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert gpu_sanitize.main(["--results", str(tmp_path)]) == 1
    reports = json.loads((tmp_path / "sanitize.json").read_text())
    found = {(r["tool"], Path(r["file"]).stem.removeprefix("test_")): r for r in reports}
    assert len(found) == len(gpu_sanitize.TOOLS) * len(gpu_sanitize.FILES)
    for (tool, name), report in found.items():
        log = tmp_path / "sanitize" / f"{tool}-{name}.log"
        if name == "pointwise_losses":
            assert report["outcome"] == f"{tool} has come to no result: see {log}"
        elif name == "clipping":
            assert report["outcome"] == f"FAILED: see {log}" and (report["passed"], report["failed"]) == (3, 1)
        elif (tool, name) == ("racecheck", "steps"):
            assert report["outcome"] == f"ERRORS: see {log}" and report["errors"] == 1
        else:
            assert report["outcome"] == "ok" and report["passed"] == 12
    ports = {(tmp_path / "sanitize" / f"{t}-{n}.log").read_text().partition("'--port', '")[2][:5] for t, n in found}
    assert len(ports) == len(found)
    last = capsys.readouterr().out.splitlines()[-len(found) :]
    assert all(line.split()[0] in gpu_sanitize.TOOLS for line in last)


@pytest.mark.parametrize("part", [gpu_sanitize, gpu_profile])
def test_without_its_tool_a_part_says_so(part, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jobs, "USUAL_PLACES", ())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert part.main(["--results", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("nothing is ") and "there is no " in output.err


# The profile ----------------------------------------------------------------------------------------------------------

HEAD = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size"]
HEAD += [*gpu_profile.METRICS, "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"]
HEAD += ["smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"]
HEAD += ["smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"]
HEAD += ["smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"]
UNITS = [""] * 9 + ["ns", "%", "byte/second", "register/thread", "%", "inst", "inst", "inst", "inst"]
ROW = ["0", "77", "python3", "127.0.0.1", "update_kernel", "1", "7", "(256, 1, 1)", "(8, 1, 1)"]
ROW += ["1,234,500.5", "91.5", "2,950,000,000,000", "116", "24.75", "1.25", "3.5", "3.25", "1.0"]
CSV = "\n".join(
    ["==PROF== Connected to process 77", "==WARNING== a word"]
    + [",".join(f'"{cell}"' for cell in line) for line in (HEAD, UNITS, ROW)]
)


def test_profile(tmp_path, monkeypatch, capsys):
    ncu = f"""
import sys
words = sys.argv[1:]
assert words[words.index("--clock-control") + 1] == "none" and "--csv" in words
task = words[words.index("--run") + 1]
if "SGD" in task:
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access the counters")
    raise SystemExit(1)
if "mse" in task:
    raise SystemExit(0)
open(words[words.index("--log-file") + 1], "w").write({CSV!r})
"""
    script(tmp_path / "bin", "ncu", ncu)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert gpu_profile.main(["--quick", "--results", str(tmp_path)]) == 1
    kernels = json.loads((tmp_path / "profile.json").read_text())
    titles = [task.title for task in gpu_profile.chosen([], quick=True)]
    assert [kernel["task"] for kernel in kernels] == [t for t in titles if "SGD" not in t and "mse" not in t]
    assert kernels[0] == {
        "task": titles[0],
        "kernel": "update_kernel",
        "grid": "(8, 1, 1)",
        "microseconds": 1234.5005,
        "dram_share": 91.5,
        "dram_speed": 2950.0,
        "registers": 116,
        "occupancy": 24.75,
        "stalls": {"wait": 3.5, "long_scoreboard": 1.25},
    }
    output = capsys.readouterr().out
    assert "ERR_NVGPUCTRPERM" in output and "mse_loss, 100: no kernel was profiled: see" in output
    row = next(line for line in output.splitlines() if line.startswith(titles[0]) and "update_kernel" in line)
    assert row.endswith("wait 3.50, long_scoreboard 1.25")
    assert row.partition("update_kernel")[2].split()[:5] == ["1234.5", "91.5", "2950", "116", "25"]


def test_the_tasks_that_are_profiled_are_the_benchmarks():
    assert [task.title for task in gpu_profile.chosen([], quick=False)] != []
    assert {task.title for task in gpu_profile.chosen([], quick=False)} == set(gpu_profile.TASKS)
    assert all("bfloat16" in task.title for task in gpu_profile.chosen(["× 128,256"], quick=False))


def test_what_is_profiled_is_a_call_of_the_contender():
    called = []

    class Ready:
        def __init__(self, device):
            self.device = device

        def call(self):
            called.append(self.device)

    task = gpu_profile.Task("clip", "a title", 0, "torch", {"mine": Ready})
    gpu_profile.run_profiled(task, "mine", gpu_profile.torch.device("cpu"))
    assert len(called) == 2


# All parts, and make --------------------------------------------------------------------------------------------------


def test_all_parts_are_run_and_summed_up(tmp_path, monkeypatch, capsys):
    code = "import sys; print('said by', sys.argv[1:]); raise SystemExit({})"
    for part, ends in (("test", 1), ("slow", 0), ("bench", 0), ("sanitize", 2), ("profile", -9)):
        (tmp_path / f"{part}_part.py").write_text(code.format(ends if ends >= 0 else "__import__('os').abort()"))
        monkeypatch.setitem(gpu_check.PARTS, part, [f"{part}_part", *gpu_check.PARTS[part][1:]])
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main(["--results", "out"]) == 1
    output = capsys.readouterr().out
    table = [line.split() for line in output.splitlines()[-5:]]
    assert [(row[0], " ".join(row[2:])) for row in table] == [
        ("test", "FAILED"),
        ("slow", "ok"),
        ("bench", "ok"),
        ("sanitize", "left out"),
        ("profile", "FAILED"),
    ]
    assert "said by ['--device', 'cuda', '--results', 'out']" in Path("out/test.txt").read_text()
    handed_on = "'--name', 'slow', 'tests/cuda', '--', '-m', 'slow'"
    assert f"said by ['--device', 'cuda', '--results', 'out', {handed_on}]" in Path("out/slow.txt").read_text()
    assert gpu_check.main(["--results", "out", "--parts", "bench", "sanitize"]) == 0


def make(*arguments):
    command = ["make", "-n", "-f", str(MAKEFILE), *arguments]
    return subprocess.run(command, cwd=gpu_test.ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["build", "test", "emulated", "bench", "gpu-check", "gpu-test", "gpu-bench"])
def test_system_installs_nothing_and_makes_no_environment(target):
    said = make("SYSTEM=1", "PYTHON=some-python", target)
    assert "some-python setup.py" in said and "pip" not in said and ".venv" not in said


def test_variables_reach_the_parts():
    said = make("SYSTEM=1", "RESULTS=/out", "MINUTES=5", "JOBS=3", "TESTS=tests/cuda", "ARGS=-x", "gpu-test")
    assert "-m tools.gpu_test --results '/out' --minutes 5 --jobs 3 tests/cuda -- -x" in said
    assert "--parts bench profile" in make("SYSTEM=1", "PARTS=bench profile", "gpu-check")
