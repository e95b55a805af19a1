"""The doors: reproduce.sh, dev, .ci/run and verify. Nothing is installed or downloaded here: a stand-in Python answers
`-m venv` and `-m pip`, notes what it was asked, and hands everything else to the real one."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from experiments.profiles import PROFILES

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("reproduce.sh", "dev", ".ci/run", "requirements/environment.sh")
LOCKS = ("cpu", "cuda")

FAKE_PYTHON = """#!/usr/bin/env bash
log=@LOG@
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv" >>"$log" ;;
    "-m pip")
        case $3 in
            install)
                echo "install ${*:4}" >>"$log"
                left=$(cat @LOG@.failures 2>/dev/null || echo 0)
                if [ "$left" -gt 0 ]; then echo $((left - 1)) >@LOG@.failures; echo "no route to host"; exit 1; fi ;;
        esac ;;
    *) exec @REAL@ "$@" ;;
esac
"""


def script(
    tree: Path, *words: str, path: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CPDLM_")}
    kept |= {"PATH": f"{path}:/usr/bin:/bin" if path else kept["PATH"]} | environment
    command = ["bash", str(tree / words[0]), *words[1:]]
    return subprocess.run(command, cwd=cwd or tree, env=kept, capture_output=True, text=True, check=False, timeout=60)


class Machine:
    """A copy of the scripts on a machine whose only Python is the stand-in, with a sweep that shows its arguments."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.bin, self.log = folder / "a copy", folder / "bin", folder / "log"
        for name in (*SCRIPTS, "requirements/cpu.txt", "requirements/cuda.txt"):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        (self.tree / "experiments").mkdir()
        (self.tree / "experiments/sweep.py").write_text("import sys\nprint('sweep', *sys.argv[1:])\n")
        self.program("python3.11", FAKE_PYTHON.replace("@LOG@", str(self.log)).replace("@REAL@", sys.executable))
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> None:
        self.bin.mkdir(exist_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def fail_installs(self, count: int) -> None:
        self.log.with_name("log.failures").write_text(str(count))

    def asked(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        self.log.unlink(missing_ok=True)
        return lines

    def __call__(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return script(self.tree, *words, path=str(self.bin), cwd=cwd)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- the scripts themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_and_name_no_machine(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / name)], check=False).returncode == 0
    assert not re.search(r"/(work|root|home|opt)/", (ROOT / name).read_text())
    assert name.startswith("requirements/") or os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize("name", ["reproduce.sh", "dev"])
def test_help_needs_no_environment_and_names_every_profile(name: str, machine: Machine) -> None:
    done = machine(name, "--help", cwd=Path("/"))
    assert done.returncode == 0 and done.stdout.startswith(f"usage: ./{name}")
    assert machine.asked() == []
    for profile in PROFILES if name == "reproduce.sh" else ():
        assert re.search(rf"^ +(--profile NAME +)?{profile} ", done.stdout, flags=re.MULTILINE), profile


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("reproduce.sh", "--profile"), "--profile needs a value"),
        (("reproduce.sh", "smoke"), "write --profile smoke"),
        (("dev",), "usage: ./dev"),
        (("dev", "tset"), "'./dev tset' is not a command"),
    ],
)
def test_mistakes_exit_2_before_any_work(words: tuple[str, ...], said: str, machine: Machine) -> None:
    done = machine(*words)
    assert done.returncode == 2 and said in done.stderr and machine.asked() == []


def test_what_the_sweep_knows_is_handed_to_it(machine: Machine, tmp_path: Path) -> None:
    """A folder outside the repository stays where the user meant it; inside, it is named relative to the repository."""
    done = machine("reproduce.sh", "--out", "mine", "--jobs=2", "--porfile", "x", cwd=tmp_path)
    assert f"sweep profile=cpu out={tmp_path}/mine jobs=2 porfile=x" in done.stdout, done.stderr
    done = machine("reproduce.sh", "--profile=smoke", f"--out={machine.tree}/runs/x", "--only", "data,train")
    assert "sweep profile=smoke out=runs/x only=data,train" in done.stdout


def test_a_profile_for_a_gpu_warns_where_there_is_none(machine: Machine) -> None:
    for profile, warns in (("retrofit-gpu", True), ("paper", True), ("cpu", False)):
        said = machine("reproduce.sh", "--only", "set-up", "--profile", profile).stdout
        assert (f"profile {profile} would take days" in said) == warns and "sweep" not in said


# --- a given interpreter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "said"),
    [("torch>=2.11", ""), ("torch>=99", "torch is "), ("omegaconf>=2.3", ""), ("nothing>=1", "")],
)
def test_a_given_python_is_checked_and_nothing_is_installed(needed: str, said: str, machine: Machine) -> None:
    shutil.copy(ROOT / "requirements/check.py", machine.tree / "requirements/check.py")
    (machine.tree / "pyproject.toml").write_text(f"[project]\ndependencies = ['{needed}']\n")
    done = machine("reproduce.sh", "--python", sys.executable, "--only", "train", "--profile", "smoke")
    assert machine.asked() == [] and not (machine.tree / ".venv").exists()
    assert done.returncode == (2 if said else 0) and said in done.stderr
    assert ("sweep profile=smoke only=train" in done.stdout) == (not said)


# --- the set-up ------------------------------------------------------------------------------------------------------


def test_set_up_installs_torch_first_and_only_once(machine: Machine) -> None:
    done = machine("dev", "setup")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = machine.asked()
    assert asked[0] == "venv" and len(asked) == 4 and all("--no-deps" in line for line in asked[1:])
    assert "torch.txt" in asked[1] and "requirements/cpu.txt" in asked[2]
    assert all(line.startswith("torch==") for line in (machine.tree / ".venv/torch.txt").read_text().splitlines())
    assert "skipped: .venv is complete (cpu)" in machine("dev", "setup").stdout and machine.asked() == []
    # A changed lock is installed again; an environment that does not run is made again.
    with (machine.tree / "requirements/cpu.txt").open("a") as lock:
        lock.write("another==1.0\n")
    assert machine("dev", "setup").returncode == 0
    assert [line.split()[0] for line in machine.asked()] == ["install"] * 3
    (machine.tree / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    assert machine("dev", "setup").returncode == 0 and machine.asked()[0] == "venv"


def test_a_failed_set_up_says_so_and_continues(machine: Machine) -> None:
    machine.fail_installs(2)  # pip's own index, then the one of the CPU builds
    done = machine("dev", "setup")
    assert done.returncode == 1
    assert "torch, from its own index could not be installed" in done.stderr and "no route to host" in done.stderr
    assert not (machine.tree / ".venv/.complete").exists()
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in machine.asked()[-1]
    assert machine("dev", "setup").returncode == 0 and (machine.tree / ".venv/.complete").exists()
    assert "venv" not in machine.asked()  # what was there is used


def test_a_gpu_changes_variant_and_profile(machine: Machine) -> None:
    machine("dev", "setup")
    machine.asked()
    machine.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: Made up'\n")
    done = machine("reproduce.sh")
    asked = machine.asked()
    assert asked[0] == "venv" and "requirements/cuda.txt" in asked[-2] and "extra-index-url" not in "".join(asked)
    assert "sweep profile=gpu" in done.stdout


# --- dev -------------------------------------------------------------------------------------------------------------


def test_dev_test_passes_arguments_on(machine: Machine) -> None:
    (machine.tree / "pytest.py").write_text("import sys\nprint('pytest', *sys.argv[1:])\n")
    assert "loadfile tests/x.py -k a b" in machine("dev", "test", "tests/x.py", "-k", "a b").stdout
    assert "loadfile -m slow -x" in machine("dev", "test", "--slow", "-x").stdout


# --- .ci/run ---------------------------------------------------------------------------------------------------------

FAKE_PYTEST = """
import os, sys
slow = "slow" in sys.argv
for word in sys.argv:
    if word.startswith("--junitxml="):
        skip = "<skipped type='pytest.skip'/>" * (not slow)
        case = f"<testcase classname='tests.test_a' name='t{slow}'>{skip}</testcase>"
        open(word.split("=")[1], "w").write(f"<testsuite>{case}</testsuite>")
print("== 1 passed in 0.1s ==")
sys.exit(int(os.environ.get("FAILS", "0")) if slow else 0)
"""


SECONDS = r"set-up \d+ s, tests \d+ s, slow tests \d+ s, smoke \d+ s, skipped tests \d+ s"


@pytest.mark.parametrize(
    ("listed", "fails", "last"),
    [
        ("# why\ntests/test_a.py::tFalse # no GPU\n? tests/test_b.py\n", "0", rf"ci: all passed \({SECONDS}\)"),
        ("", "0", r"ci: failed: skipped tests \(exit 1\) .*"),
        ("tests/test_a.py::tFalse\n", "1", r"ci: failed: slow tests \(exit 1\) .*"),
    ],
)
def test_ci_runs_everything_and_says_what_failed(listed: str, fails: str, last: str, machine: Machine) -> None:
    shutil.copy(ROOT / ".ci/skips.py", machine.tree / ".ci/skips.py")
    (machine.tree / "tests").mkdir()
    (machine.tree / "tests/skips.txt").write_text(listed)
    (machine.tree / "pytest.py").write_text(FAKE_PYTEST)
    done = script(machine.tree, ".ci/run", path=str(machine.bin), cwd=Path("/"), FAILS=fails)
    assert re.fullmatch(last, done.stdout.splitlines()[-1]), done.stdout + done.stderr
    assert done.returncode == ("all passed" not in last)
    assert done.stdout.count("1 passed") == 2 and "sweep profile=smoke" in done.stdout


# --- locks -----------------------------------------------------------------------------------------------------------


def required() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [*project["dependencies"], *extras["dev"]]
    for extra in [name for name in extras if f"cpdlm[{name}]" in names]:  # the tests need its packages, too
        names.remove(f"cpdlm[{extra}]")
        names += extras[extra]
    return [Requirement(name) for name in names]


def pinned(lock: str) -> dict[str, str]:
    lines = [line for line in (ROOT / f"requirements/{lock}.txt").read_text().splitlines() if not line.startswith("#")]
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][^ ;]*)( ; .+)?", line)
        assert match, f"{lock}.txt: not an exact version: {line}"
        found.setdefault(match[1], match[2])  # of two lines for torch, the first
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_every_dependency_at_or_above_its_bound(lock: str) -> None:
    pins = pinned(lock)
    for needed in required():
        assert pins[needed.name].split("+")[0] in needed.specifier, f"{needed} but {pins[needed.name]}"
