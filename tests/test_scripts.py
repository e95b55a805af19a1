"""The doors: reproduce.sh, dev, .ci/run and verify. Nothing is installed or downloaded here: a stand-in Python answers
`-m venv` and `-m pip`, notes what it was asked, and hands everything else to the real one."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from made_records import made
from packaging.requirements import Requirement

from experiments import verify
from experiments.records import Record

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("reproduce.sh", "dev", ".ci/run", "requirements/environment.sh")
LOCKS = ("cpu", "cuda")
CUDA = re.compile(r"^(nvidia|cuda|triton)")

FAKE_PYTHON = """#!/usr/bin/env bash
log=@LOG@
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv" >>"$log" ;;
    "-m pip")
        case $3 in
            list) cat @LOG@.list 2>/dev/null ;;
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

    def installed(self, *names: str) -> None:
        self.log.with_name("log.list").write_text("".join(f"{name}==1.0\n" for name in names))

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
def test_help_needs_no_environment(name: str, machine: Machine) -> None:
    done = machine(name, "--help", cwd=Path("/"))
    assert done.returncode == 0 and done.stdout.startswith(f"usage: ./{name}")
    assert machine.asked() == []


def test_help_names_every_profile() -> None:
    from experiments.profiles import PROFILES

    page = script(ROOT, "reproduce.sh", "--help").stdout
    assert all(re.search(rf"^ .*\b{name} ", page, flags=re.MULTILINE) for name in PROFILES)


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


@pytest.mark.parametrize("profile", ["gpu", "retrofit-gpu", "paper", "retrofit", "cpu"])
def test_a_profile_for_a_gpu_warns_where_there_is_none(profile: str, machine: Machine) -> None:
    said = machine("reproduce.sh", "--only", "set-up", "--profile", profile).stdout
    assert (f"profile {profile} would take days" in said) == (profile in ("gpu", "retrofit-gpu", "paper"))
    assert "sweep" not in said


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


def test_a_changed_lock_is_installed_again(machine: Machine) -> None:
    machine("dev", "setup")
    machine.asked()
    with (machine.tree / "requirements/cpu.txt").open("a") as lock:
        lock.write("another==1.0\n")
    assert machine("dev", "setup").returncode == 0
    assert [line.split()[0] for line in machine.asked()] == ["install"] * 3


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


def test_a_broken_environment_is_made_again(machine: Machine) -> None:
    machine("dev", "setup")
    machine.asked()
    (machine.tree / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    assert machine("dev", "setup").returncode == 0
    assert machine.asked()[0] == "venv"


def test_a_missing_python_is_named(machine: Machine) -> None:
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        machine.program(name, "#!/bin/sh\nexit 1\n")
    assert "apt install python3.11-venv" in machine("dev", "setup").stderr


# --- dev -------------------------------------------------------------------------------------------------------------


def test_dev_test_passes_arguments_on(machine: Machine) -> None:
    (machine.tree / "pytest.py").write_text("import sys\nprint('pytest', *sys.argv[1:])\n")
    assert "loadfile tests/x.py -k a b" in machine("dev", "test", "tests/x.py", "-k", "a b").stdout
    assert "loadfile -m slow -x" in machine("dev", "test", "--slow", "-x").stdout
    done = script(machine.tree, "dev", "test", path=str(machine.bin), CPDLM_JUNIT="report.xml")
    assert "loadfile --junitxml=report.xml" in done.stdout


# --- .ci/run ---------------------------------------------------------------------------------------------------------

FAKE_PYTEST = """
import os, sys
slow = "slow" in sys.argv
for word in sys.argv:
    if word.startswith("--junitxml="):
        skip = "<skipped type='pytest.skip'/>" * (not slow)
        open(word.split("=")[1], "w").write(f"<testsuite><testcase classname='tests.test_a' name='t{slow}'>{skip}</testcase></testsuite>")
print("== 1 passed in 0.1s ==")
sys.exit(int(os.environ.get("FAILS", "0")) if slow else 0)
"""


@pytest.mark.parametrize(
    ("listed", "fails", "last"),
    [
        (
            "tests/test_a.py::tFalse\n",
            "0",
            r"ci: all passed \(set-up \d+ s, tests \d+ s, slow tests \d+ s, smoke \d+ s, skipped tests \d+ s\)",
        ),
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


def pins_of(lock: str) -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / f"requirements/{lock}.txt").read_text().splitlines() if not line.startswith("#")]
    found = []
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][^ ;]*)( ; .+)?", line)
        assert match, f"{lock}.txt: not an exact version: {line}"
        found.append((match[1], match[2]))
    return found


def pinned(lock: str) -> dict[str, str]:
    return dict(reversed(pins_of(lock)))  # of two lines for torch, the first


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_every_dependency_at_or_above_its_bound(lock: str) -> None:
    pins = pinned(lock)
    for needed in required():
        assert pins[needed.name].split("+")[0] in needed.specifier, f"{needed} but {pins[needed.name]}"


def test_the_cpu_lock_is_the_cuda_lock_without_cuda() -> None:
    cpu, cuda = pinned("cpu"), pinned("cuda")
    assert cpu["torch"] == cuda["torch"] + "+cpu"
    assert {name: version for name, version in cuda.items() if not CUDA.match(name) and name != "torch"} == {
        name: version for name, version in cpu.items() if name != "torch"
    }
    assert sum(bool(CUDA.match(name)) for name in cuda) > 10
    assert not any(CUDA.match(name) for name, _ in pins_of("cpu"))


# --- skipped tests ---------------------------------------------------------------------------------------------------

REPORT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_ran" file="tests/test_a.py" line="1" time="0.1" />
<testcase classname="tests.test_a" name="test_one[x-1]" file="tests/test_a.py"><skipped type="pytest.skip" message="no GPU" /></testcase>
<testcase classname="tests.test_a.TestIt" name="test_two" file="tests/test_a.py"><skipped type="pytest.skip" /></testcase>
<testcase classname="tests.test_a" name="test_known" file="tests/test_a.py"><skipped type="pytest.xfail" /></testcase>
<testcase classname="" name="tests.test_b"><skipped type="pytest.skip" /></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("listed", "code", "said"),
    [
        (
            "# why\ntests/test_a.py::test_one[x-1] # no GPU\ntests/test_a.py::TestIt::test_two\n? tests/test_b.py\n? tests/test_c.py\n",
            0,
            "skipped tests: 3",
        ),
        ("tests/test_a.py::test_one[x-1]\ntests/test_b.py\n", 1, "not in LIST: tests/test_a.py::TestIt::test_two"),
        (
            "tests/test_a.py::test_one[x-1]\ntests/test_a.py::TestIt::test_two\ntests/test_b.py\ntests/test_a.py::test_ran\n",
            1,
            "not skipped: tests/test_a.py::test_ran",
        ),
    ],
)
def test_skips_are_compared(
    listed: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    (tmp_path / "list").write_text(listed)
    main = runpy.run_path(str(ROOT / ".ci/skips.py"))["main"]
    assert main([str(tmp_path / "list"), str(tmp_path / "report.xml")]) == code
    assert said.replace("LIST", str(tmp_path / "list")) in capsys.readouterr().out


def test_the_committed_list_of_skips_names_real_files() -> None:
    for names in runpy.run_path(str(ROOT / ".ci/skips.py"))["listed"]((ROOT / "tests/skips.txt").read_text()):
        assert all((ROOT / name.split("::")[0]).is_file() for name in names)


# --- verify ----------------------------------------------------------------------------------------------------------


def record(content: dict[str, Any]) -> Record:
    return Record("made.json", content)


def differing(change: Any) -> list[str]:
    content = made(4)
    change(content)
    return [line.what for line in verify.compare(record(made(4)), record(content)) if line.agrees is False]


def test_verify_judges_results_and_only_shows_speeds() -> None:
    assert differing(lambda r: None) == []
    assert (
        differing(lambda r: r["likelihood"]["joint_nll"].update(mean=r["likelihood"]["joint_nll"]["mean"] + 9e-4)) == []
    )
    assert differing(
        lambda r: r["likelihood"]["joint_nll"].update(mean=r["likelihood"]["joint_nll"]["mean"] + 2e-3)
    ) == ["joint NLL (nats)"]
    assert differing(lambda r: r["data"].update(sha256="cd" * 32)) == ["data sha256"]
    assert differing(lambda r: r["config"]["optim"].update(lr=1.0)) == ["optim.lr"]
    assert differing(lambda r: r["config"].update(output="elsewhere")) == []
    assert differing(lambda r: r["config"]["data"].update(cache="elsewhere")) == []
    assert differing(lambda r: r["config"]["model"].update(trunk="runs/other")) == ["model.trunk"]
    greedy = made(4)["decoding"]["modes"]["greedy"]["tokens_per_pass"]
    pace = {"mean": greedy["high"] + 0.01}
    assert differing(lambda r: r["decoding"]["modes"]["greedy"]["tokens_per_pass"].update(pace)) == [
        "greedy: tokens per target forward"
    ]
    assert differing(lambda r: r["decoding"]["modes"]["greedy"]["speedup"].update(median=0.1)) == []
    assert differing(lambda r: r["hardware"].update(processor="Another")) == []


STUB = """
import json, pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[1:])
record = json.loads(pathlib.Path("template.json").read_text())
folder = pathlib.Path(given["output"]) / record["name"]
folder.mkdir(parents=True)
(folder / (record["name"] + ".json")).write_text(json.dumps(record))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose run.py writes the record it was committed with."""
    root = tmp_path / "repository"
    (root / "experiments").mkdir(parents=True)
    (root / "results/C1").mkdir(parents=True)
    (root / "experiments/run.py").write_text(STUB)
    (root / "template.json").write_text(json.dumps(made(4)))
    commit(root)
    return root


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(root), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(root: Path) -> None:
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")


def save(root: Path, **changes: Any) -> Path:
    content = made(4) | {"commit": git(root, "rev-parse", "HEAD")} | changes
    path = root / "results/C1" / f"{content['name']}.json"
    path.write_text(json.dumps(content))
    return path


def test_verify_runs_a_record_again_at_its_commit(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(repository)
    (repository / "experiments/run.py").write_text("raise SystemExit(7)")  # the code of today must not matter
    assert verify.main([str(path)], repository) == 0
    assert "judged quantities agree" in capfd.readouterr().out
    likelihood = made(4)["likelihood"]
    likelihood["first_token_nll"]["mean"] += 0.5
    assert verify.main([str(save(repository, likelihood=likelihood))], repository) == 1
    out = capfd.readouterr().out
    assert re.search(r"first-token NLL \(nats\) .* DIFFERS", out) and "1 of" in out
    assert git(repository, "worktree", "list").count("\n") == 0  # nothing stays behind


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"dirty": True}, 2, "uncommitted changes"),
        ({"commit": "0" * 40}, 2, "is not in this clone"),
        ({"command": "rm everything"}, 2, "not `python experiments/run.py"),
        ({"command": "python experiments/run.py nonsense"}, 1, "exit code 1"),
        ({"schema": 99}, 2, "schema is 99"),
        # What would be written outside the temporary folder, or is no setting.
        ({"command": "python experiments/run.py name=../../out"}, 2, "'../../out' is not the name of a run"),
        ({"command": "python experiments/run.py rank=2 --print-config"}, 2, "'--print-config', which is not a setting"),
    ],
)
def test_verify_says_what_cannot_be_repeated(
    changes: dict[str, Any], code: int, said: str, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(save(repository, **changes))], repository) == code
    assert said in capfd.readouterr().err


def test_verify_names_the_nearest_record(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(repository)
    assert verify.main([str(Path("results/C1") / path.name.replace("r4", "r5"))], repository) == 2
    assert f"did you mean results/C1/{path.name}" in capfd.readouterr().err
