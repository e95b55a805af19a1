"""The sweep's scheduler, and cells that fail, are killed or are interrupted."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import code_folder

from experiments import pipeline, scheduler
from experiments.records import load_all
from experiments.scheduler import Job, Local
from experiments.suite import Cell, heads, scratch, trunk
from experiments.sweep_plan import Plan
from experiments.tracking import Tracker

ROOT = Path(__file__).resolve().parent.parent


def job(tmp_path: Path, name: str, code: str, *needs: str, alone: bool = False) -> Job:
    return Job(name, ("-c", code), tmp_path / name / "train.log", frozenset(needs), alone)


def ran(jobs: list[Job], launcher: scheduler.Launcher) -> tuple[dict[str, int], list[str]]:
    codes: dict[str, int] = {}

    def ended(job: Job, code: int) -> bool:
        codes[job.name] = code
        return code == 0

    return codes, [each.name for each in scheduler.schedule(jobs, launcher, ended)]


# --- the scheduler, with jobs that only say when they ran -------------------------------------------------------------

STAMP = """
import os, pathlib, sys, time
began, here, others = time.time(), pathlib.Path(sys.argv[1]), sys.argv[2:]
here.with_suffix('.began').touch()
while not all(here.with_name(other).with_suffix('.began').exists() for other in others):
    time.sleep(0.01)  # for good where two that should run at once do not: the test's own limit ends it
print(began, time.time(), len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])
"""


def stamping(tmp_path: Path, name: str, *needs: str, beside: tuple[str, ...] = (), alone: bool = False) -> Job:
    """A job that ends only once those `beside` it have begun, too."""
    argv = ("-c", STAMP, str(tmp_path / name), *beside)
    return Job(name, argv, tmp_path / f"{name}.log", frozenset(needs), alone)


def stamps(jobs: list[Job]) -> dict[str, tuple[float, float, int, int]]:
    lines = {each.name: each.log.read_text().splitlines()[-1].split() for each in jobs}
    return {name: (float(a), float(b), int(c), int(d)) for name, (a, b, c, d) in lines.items()}


@pytest.mark.timeout(120)
def test_jobs_wait_for_their_needs_and_timed_ones_have_the_machine(tmp_path: Path) -> None:
    jobs = [
        stamping(tmp_path, "timed", alone=True),
        stamping(tmp_path, "heads", "trunk"),
        stamping(tmp_path, "trunk", beside=("other",)),
        stamping(tmp_path, "other", beside=("trunk",)),
    ]
    launcher = Local(2)
    codes, skipped = ran(jobs, launcher)
    assert codes == dict.fromkeys(("timed", "heads", "trunk", "other"), 0) and not skipped
    seen = stamps(jobs)
    assert seen["heads"][0] >= seen["trunk"][1]
    for name in ("heads", "trunk", "other"):
        assert seen["timed"][0] >= seen[name][1] or seen["timed"][1] <= seen[name][0], f"{name} ran beside a timed job"
        assert seen[name][2] == seen[name][3] == max(1, len(launcher.cores) // 2), "pinned to its share"
    assert seen["timed"][2] == seen["timed"][3] == len(launcher.cores)


@pytest.mark.timeout(120)
def test_gpus_are_shared_out(tmp_path: Path) -> None:
    show = STAMP + "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(n, ("-c", show, str(tmp_path / n), other), tmp_path / n) for n, other in (("a", "b"), ("b", "a"))]
    ran(jobs, Local(2, ["3", "5"]))
    assert {each.log.read_text().split()[-1] for each in jobs} == {"3", "5"}


def test_a_failure_skips_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "trunk", "raise SystemExit(3)"),
        job(tmp_path, "heads", "", "trunk"),
        job(tmp_path, "other", ""),
        job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
    ]
    codes, skipped = ran(jobs, Local(1))
    assert codes == {"trunk": 3, "other": 0, "killed": -9} and skipped == ["heads"]


# --- failures and kills -----------------------------------------------------------------------------------------------


def plan(folder: Path, cells: list[Cell], **more: Any) -> Plan:
    return Plan("test", cells, folder / "out", folder / "results", "command", **more)


def test_a_failing_cell_is_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells that only note that they ran; one raises until it is mended, and one needs it."""
    bad, good = trunk("code", "smoke,trunk"), scratch(1, "smoke")
    cells = [bad, heads(bad, 1, "smoke"), replace(good, reference=None)]
    work = "import pathlib, sys; here = pathlib.Path(sys.argv[1]); {}; (here / 'done').open('a').write('ran ')"
    mended = f"pathlib.Path({str(tmp_path / 'mended')!r}).exists()"
    fail = f"exec('' if {mended} else 'raise RuntimeError(\"out of ideas\")')"

    def command(cell: Cell, plan: Plan, track: list[str]) -> tuple[str, ...]:
        return "-c", work.format(fail if cell is bad else "0"), str(tmp_path / "out" / cell.name)

    monkeypatch.setattr(pipeline, "train_command", command)
    done = tmp_path / "out"
    monkeypatch.setattr("experiments.cell.is_trained", lambda config: (done / config.run_name / "done").exists())
    monkeypatch.setattr("experiments.tracking.start_sweep", lambda *given, **more: Tracker())
    mine = plan(tmp_path, cells, stages=("train",))
    assert pipeline.run(mine, Local(2)) == 1
    said = capsys.readouterr()
    assert f"failed: {bad.name}: exit 1" in said.err and "out of ideas" in said.err
    assert f"failed: {cells[1].name}: its trunk failed" in said.err
    assert (tmp_path / "out" / good.name / "done").read_text() == "ran "
    # Mended, the same plan runs what is left alone; then nothing is left.
    (tmp_path / "mended").touch()
    assert pipeline.run(mine, Local(2)) == 0
    assert pipeline.run(mine, Local(2)) == 0
    assert [(tmp_path / "out" / cell.name / "done").read_text() for cell in cells] == ["ran ", "ran ", "ran "]
    assert "skipped: all 3 cells are complete" in capsys.readouterr().out


PATIENT = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
def stop(*_):
    (here / 'saved').open('a').write('saved ')
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(here / 'ready').touch()
time.sleep(60)
"""


def test_a_stopped_sweep_tells_its_jobs_once_and_waits(tmp_path: Path) -> None:
    class Interrupted(Local):
        def wait(self) -> list[tuple[Job, int]]:
            await_file(tmp_path / "ready")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran([Job("a", ("-c", PATIENT, str(tmp_path)), tmp_path / "log")], Interrupted(1))
    assert (tmp_path / "saved").read_text() == "saved "


def test_a_sweep_killed_by_kill_9_leaves_no_orphan(tmp_path: Path) -> None:
    """Its jobs are told to save and stop."""
    script = f"""
from pathlib import Path
from experiments.scheduler import Job, Local, schedule
here = Path({str(tmp_path)!r})
schedule([Job('a', ('-c', {PATIENT!r}, str(here)), here / 'log')], Local(1), lambda job, code: True)
"""
    sweeping = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    await_file(tmp_path / "ready")
    sweeping.kill()
    sweeping.wait()
    await_file(tmp_path / "saved")


def await_file(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


SWEEP = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + '/tests']
from tiny import TINY
from experiments import sweep
from experiments.suite import Cell
here = Path({folder!r})
settings = TINY | {{"corpus": str(here / "text"), "data.cache": str(here / "cache"), "name": "long", "rank": 2}}
settings |= {{"optim.steps": 600, "train.checkpoint_every": 20, "train.validate_every": 600}}
sweep.PROFILES['smoke'] = lambda: [Cell('C1', settings)]
sys.exit(sweep.main(['profile=smoke', 'out={folder}/out']))
"""


@pytest.mark.slow
def test_a_real_sweep_killed_by_kill_9_continues(tmp_path: Path) -> None:
    """The cell goes on from its checkpoint, is decoded and recorded; then nothing is left to run."""
    (tmp_path / "text").mkdir()
    code_folder(tmp_path / "text")
    command = [sys.executable, "-c", SWEEP.format(root=str(ROOT), folder=str(tmp_path))]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_file(tmp_path / "out/long/last.ckpt", 300)
    first.kill()
    first.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = load_all(tmp_path / "out/results")[0]
    assert record["training"]["resumed"] >= 1 and record["training"]["steps"] == 600 and record["decoding"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "skipped: all 1 cells are complete" in again.stdout
