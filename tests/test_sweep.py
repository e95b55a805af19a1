"""The sweep: its words, its scheduler, and cells that fail, are killed, are finished or do not belong together."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_records import made

from cpdlm.config import ConfigError, to_dict
from cpdlm.training import checkpoints
from experiments import cell as one_cell
from experiments import cost, pipeline, scheduler, sweep, sweep_plan
from experiments.claims import CLAIMS
from experiments.profiles import PROFILES, SCALES, study
from experiments.provenance import git_state
from experiments.records import Record, load_all, write
from experiments.scheduler import Job, Local
from experiments.suite import Cell, heads, scratch, trunk
from experiments.sweep_plan import Plan

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
    lines = {each.name: each.log.read_text().split() for each in jobs}
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
        assert seen["timed"][0] >= seen[name][1] or seen["timed"][1] <= seen[name][0], (
            "something ran beside a timed job"
        )
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


def test_a_failing_cell_is_recorded_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells that only note that they ran; one raises until it is mended, and one needs it."""
    bad, good = trunk("code", "smoke,trunk"), scratch("code", 1, "smoke")
    cells = [bad, heads(bad, 1, "smoke"), replace(good, reference=None)]
    work = "import pathlib, sys; here = pathlib.Path(sys.argv[1]); {}; (here / 'done').open('a').write('ran ')"
    fail = (
        f"exec('' if pathlib.Path({str(tmp_path / 'mended')!r}).exists() else 'raise RuntimeError(\"out of ideas\")')"
    )

    def command(cell: Cell, plan: Plan, track: list[str]) -> tuple[str, ...]:
        return "-c", work.format(fail if cell is bad else "0"), str(tmp_path / "out" / cell.name)

    monkeypatch.setattr(pipeline, "train_command", command)
    monkeypatch.setattr(
        "experiments.cell.is_trained", lambda config: (tmp_path / "out" / config.run_name / "done").exists()
    )
    monkeypatch.setattr("experiments.cell.trained_by", lambda config: "")
    monkeypatch.setattr("experiments.cell.sweep", lambda *given: "")
    mine = plan(tmp_path, cells, stages=("train",))
    assert pipeline.run(mine, Local(2)) == 1
    said = capsys.readouterr()
    assert f"failed: {bad.name}: exit 1" in said.err and "out of ideas" in said.err
    assert f"failed: {cells[1].name}: its trunk failed" in said.err
    failure = json.loads((tmp_path / "out" / bad.name / "failed.json").read_text())
    assert failure["exit"] == 1 and failure["name"] == bad.name and failure["command"].startswith("python -c")
    assert failure["traceback"].startswith("Traceback") and failure["traceback"].endswith("RuntimeError: out of ideas")
    assert (tmp_path / "out" / good.name / "done").read_text() == "ran "
    # Mended, the same plan runs what is left alone, and the mark is gone; then nothing is left.
    (tmp_path / "mended").touch()
    assert pipeline.run(mine, Local(2)) == 0
    assert not (tmp_path / "out" / bad.name / "failed.json").exists()
    assert pipeline.run(mine, Local(2)) == 0
    assert [(tmp_path / "out" / cell.name / "done").read_text() for cell in cells] == ["ran ", "ran ", "ran "]
    assert "skipped: all 3 cells are complete" in capsys.readouterr().out


def test_a_job_without_a_traceback_leaves_the_end_of_its_log(tmp_path: Path) -> None:
    failing = job(tmp_path, "a", "import sys; print('step 1', end='\\r'); sys.exit('error: the loss is nan at step 3')")
    codes, _ = ran([failing], Local(1))
    pipeline.note_failure(tmp_path / "failed.json", failing, codes["a"])
    noted = json.loads((tmp_path / "failed.json").read_text())
    assert noted["traceback"].splitlines()[-1].strip() == "error: the loss is nan at step 3"


def test_what_an_earlier_attempt_said_is_not_filed_under_this_one(tmp_path: Path) -> None:
    raising = "try:\n    raise KeyError('its cause')\nexcept KeyError:\n    raise RuntimeError('of the first attempt')"
    first = job(tmp_path, "a", raising)
    codes, _ = ran([first], Local(1))
    pipeline.note_failure(tmp_path / "first.json", first, codes["a"])
    noted = json.loads((tmp_path / "first.json").read_text())["traceback"]
    assert "its cause" in noted and noted.endswith("RuntimeError: of the first attempt")
    second = replace(job(tmp_path, "a", "import sys; sys.exit('error: no memory')"), logged=first.log.stat().st_size)
    codes, _ = ran([second], Local(1))
    pipeline.note_failure(tmp_path / "second.json", second, codes["a"])
    noted = json.loads((tmp_path / "second.json").read_text())["traceback"]
    assert "first attempt" not in noted and noted == "error: no memory"


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
    for number in range(60):
        body = "\n".join(f"def function_{number}_{line}(x):\n    return x * {line}" for line in range(12))
        (tmp_path / "text" / f"{number}.py").write_text(body)
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


# --- what is finished, and what may be mixed --------------------------------------------------------------------------


def committed(folder: Path, cells: list[Cell], **changes: Any) -> None:
    """Records of these cells, as if they had been run side by side."""
    for cell in cells:
        config = cell.config("runs/old")
        content = made(config.rank, config.seed, claim=cell.folder, horizon=config.horizon)
        content |= {"config": to_dict(config), "name": cell.name} | changes
        if content["decoding"]:
            content["decoding"]["group"] = [each.name for each in cells]
        write(content, folder / cell.folder)


def small(cells: list[Cell], folder: Path) -> Plan:
    return Plan("C3", cells, folder / "out", folder / "results", "command")


def test_a_cell_with_a_record_of_its_settings_is_finished(tmp_path: Path) -> None:
    code = trunk("code", "cpu-trunk,trunk")
    cells = [code, *(heads(code, rank, "cpu-heads") for rank in (1, 8))]
    committed(tmp_path / "results", cells)
    assert not small(cells, tmp_path).pending
    more = [*cells, heads(code, 4, "cpu-heads")]
    # Rank 4 must be timed beside ranks 1 and 8: they are due again, and their trunk is needed for its weights.
    unfinished = small(more, tmp_path)
    assert {cell.name for cell in unfinished.pending} == {cell.name for cell in more[1:]}
    assert unfinished.needed[0].name == code.name and code.name in unfinished.finished
    # Another dial is another comparison: nothing else is due.
    other = [*cells, heads(code, 8, "cpu-heads").varied("kl", {"balance": "kl"})]
    assert [cell.name for cell in small(other, tmp_path).pending] == [other[-1].name]


@pytest.mark.parametrize(
    "change", [{"optim.steps": 7}, {"loss.balance_weight": 0.5}, {"decode.prompts": 3}, {"data.max_bytes": 9999}]
)
def test_a_record_of_other_settings_is_not_taken_for_the_cell(change: dict[str, int], tmp_path: Path) -> None:
    cell = replace(scratch("code", 8), reference=None)
    committed(tmp_path / "results", [replace(cell, overrides=cell.overrides | change)])
    assert small([cell], tmp_path).pending


def test_damaged_or_undecoded_records_are_run_again(tmp_path: Path) -> None:
    cell = replace(scratch("code", 8), reference=None)
    committed(tmp_path / "results", [cell], decoding=None)
    assert small([cell], tmp_path).pending
    (tmp_path / "results" / cell.folder / f"{cell.name}.json").write_text("{")
    assert small([cell], tmp_path).pending


def test_records_of_other_code_are_not_added_to_without_a_word(tmp_path: Path) -> None:
    old, new = (replace(scratch("code", rank), reference=None) for rank in (1, 8))
    committed(tmp_path / "results", [old], commit="0" * 40)
    content = json.loads((tmp_path / "results/C1" / f"{old.name}.json").read_text())
    content["decoding"]["group"].append(new.name)
    (tmp_path / "results/C1" / f"{old.name}.json").write_text(json.dumps(content))
    mixed = small([old, new], tmp_path)
    assert [cell.name for cell in mixed.pending] == [new.name]
    with pytest.raises(ConfigError, match=r"1 records of other code \(0000000000\).*Type mix=yes"):
        sweep_plan.refuse_mixed_code(mixed)
    sweep_plan.refuse_mixed_code(replace(mixed, mix=True))
    # Cells that nothing compares with those records, or no cells at all, mix nothing.
    sweep_plan.refuse_mixed_code(replace(mixed, comparisons=[[old], [new]]))
    sweep_plan.refuse_mixed_code(small([old], tmp_path))
    # The same code, or a commit since which nothing that decides numbers has changed.
    commit, _ = git_state()
    content["commit"] = commit
    (tmp_path / "results/C1" / f"{old.name}.json").write_text(json.dumps(content))
    same = (
        subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *sweep_plan.CODE], cwd=ROOT, check=False).returncode
        == 0
    )
    assert bool(sweep_plan.mixed_code(small([old, new], tmp_path))) is not same


@pytest.mark.parametrize("name", ["evaluate.json", "decode.json", "train.json"])
def test_an_odd_file_of_a_stage_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    for content in (b"[]", b"{}", b'{"likelihood": 3, "seconds": "x"}', b'"\xff"', b"{", b"[" * 100_000):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(checkpoints.RunError, match=f"{name} is damaged .*delete it, and the same command makes it"):
            one_cell._read(tmp_path / name)


def test_records_that_a_killed_report_left_are_logged_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = replace(scratch("code", 1), reference=None)
    committed(tmp_path / "results", [cell])
    logged: list[Path] = []
    monkeypatch.setattr("experiments.cell.report", lambda *arguments, **named: ("", []))
    monkeypatch.setattr("experiments.cell.log", lambda pairs, *rest: logged.extend(path for _, path in pairs))
    assert "0 records written, 1 were there" in pipeline._report(small([cell], tmp_path), [])
    assert logged == [tmp_path / "results" / cell.folder / f"{cell.name}.json"] and logged[0].is_file()


def test_cells_that_other_code_trained_are_not_added_to_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no record yet: a sweep that was killed between training and report, and the code changed since."""
    cells = [replace(scratch("code", rank), reference=None) for rank in (1, 8)]
    commit, _ = git_state()
    commits = {cells[0].name: "0" * 40}
    monkeypatch.setattr("experiments.cell.trained_by", lambda config: commits.get(config.run_name, ""))
    mixed = small(cells, tmp_path)
    with pytest.raises(
        ConfigError, match=rf"1 cell that other code \(0000000000\) trained under .*{cells[0].name}.*mix=yes"
    ):
        sweep_plan.refuse_mixed_code(mixed)
    sweep_plan.refuse_mixed_code(replace(mixed, mix=True))
    sweep_plan.refuse_mixed_code(replace(mixed, comparisons=[[cells[1]]]))
    commits[cells[0].name] = commit  # the same command goes on, with uncommitted changes, too
    assert not sweep_plan.mixed_code(mixed)


def test_records_of_other_text_or_another_trunk_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = trunk("code", "cpu-trunk,trunk")
    cells = [code, *(heads(code, rank, "cpu-heads") for rank in (1, 8))]
    committed(tmp_path / "results", cells)
    mine = small(cells, tmp_path)
    config = code.config("runs/x")
    sweep_plan.refuse_mixed_data(mine, config, "ab" * 32)  # what made_records says
    with pytest.raises(ConfigError, match="3 records .* other text than corpus=code is now"):
        sweep_plan.refuse_mixed_data(mine, config, "cd" * 32)
    sweep_plan.refuse_mixed_data(replace(mine, mix=True), config, "cd" * 32)
    for cell in cells[1:]:
        path = tmp_path / "results" / cell.folder / f"{cell.name}.json"
        content = json.loads(path.read_text())
        content["data"]["trunk_sha256"] = "12" * 32
        path.write_text(json.dumps(content))
    mine = small(cells, tmp_path)
    (mine.out / code.name).mkdir(parents=True)
    (mine.out / code.name / checkpoints.WEIGHTS).write_bytes(b"other weights")
    assert "other weights than those under 2 records" in sweep_plan.refused_trunk(mine, code)
    assert not capsys.readouterr().err
    assert sweep_plan.refused_trunk(replace(mine, mix=True), code) == ""
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {code.name} trained to other weights than those under 2 records")


# --- the words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["claim=C33"], "did you mean C3?"),
        (["clam=C3"], "did you mean claim=?"),
        (["claim=C3", "profile=cpu-full"], "not one of cpu, gpu"),
        (["claim=C5", "profile=gpu"], "has no cells for profile=gpu"),
        (["profile=smok"], "did you mean smoke?"),
        (["claim=C3", "jobs=none"], "jobs=none"),
        (["claim=C3", "only=data,trian"], "did you mean train?"),
        (["claim=C3", "launcher=slrum"], "did you mean slurm?"),
        (["claim=C3", "slurm.partition=x"], "needs launcher=slurm"),
        (["claim=C3", "mix=maybe"], "not one of yes, no"),
        (["C3"], "write KEY=VALUE"),
        (["--dryrun"], "did you mean --dry-run?"),
    ],
)
def test_a_mistake_exits_2_with_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(words) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and len(said.splitlines()) == 1


def test_slurm_without_submitit_or_sbatch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="pip install 'cpdlm\\[slurm\\]'"):
        scheduler.Slurm(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", sys)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch"):
        scheduler.Slurm(tmp_path)


def test_a_claim_goes_to_the_committed_records_and_a_profile_to_its_own() -> None:
    claim = sweep.plan_of(sweep.parse(["claim=C3"]))
    assert (str(claim.out), str(claim.results), claim.publish, claim.experiment) == (
        "runs/claims",
        "results",
        True,
        "cpdlm C3",
    )
    everything = sweep.plan_of(sweep.parse(["claim=all", "profile=gpu", "data=bundle"]))
    assert str(everything.results) == "results/gpu" and len(everything.comparisons) == 5
    assert str(everything.shown) == "results", "records of a GPU join the others in the report"
    assert all(cell.overrides["data.bundle"] == "bundle" for cell in everything.cells)
    profile = sweep.plan_of(sweep.parse(["profile=smoke", f"out={ROOT / 'runs/mine'}"]))
    assert (str(profile.out), str(profile.results), profile.publish) == ("runs/mine", "runs/mine/results", False)
    assert {cell.name for cell in sweep.plan_of(sweep.parse(["profile=cpu-full"])).cells} == {
        cell.name for cell in study("all")
    }


def test_dry_run_prints_cells_states_costs_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out/code-micro-own-r1-n4-none-s0").mkdir(parents=True)
    (tmp_path / "out/code-micro-own-r1-n4-none-s0/failed.json").write_text("{}")
    assert sweep.main(["profile=smoke", f"out={tmp_path}/out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for cell in PROFILES["smoke"]():
        assert cell.name in said
    assert "failed before" in said and "6 cells, 6 without counting seeds: 0 finished, 6 to finish, 6 to train" in said
    assert "median error of the fit: step" in said and "MiB" in said
    assert list(tmp_path.rglob("*.json")) == [tmp_path / "out/code-micro-own-r1-n4-none-s0/failed.json"]


# --- the cost model --------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_coefficients_of_exact_data() -> None:
    features = [(1.0, x, y) for x in (1.0, 2.0, 5.0) for y in (1.0, 3.0)]
    found = cost.fit(features, [2 + 0.5 * x + 3 * y for _, x, y in features])
    assert found.coefficients == pytest.approx((2, 0.5, 3)) and found.error < 1e-9 and found.records == 6
    # What would need a negative coefficient is left out.
    found = cost.fit(features, [2 + 0.5 * x - 0.01 * y for _, x, y in features])
    assert found.coefficients[2] == 0 and 0 < found.error < 0.05


def test_estimates_of_the_committed_records_are_near_what_they_took(
    committed: list[Record], cost_model: cost.CostModel
) -> None:
    by_name = {cell.name: cell for cell in study("C3") if cell.name.endswith("-s0")}
    assert all(fit.error < 0.25 for fit in cost_model.fits.values())
    for record in committed:
        if record["name"] in by_name and record["config"]["optim"]["steps"] == 400:
            step = cost_model.fits["step"](cost._step(by_name[record["name"]].config("runs")))
            assert step == pytest.approx(record["training"]["step_ms_median"] / 1000, rel=0.7), record["name"]


def test_without_records_of_a_gpu_the_rates_are_assumed_and_it_says_so() -> None:
    model = cost.CostModel.of([], "gpu")
    assert "no records of a gpu yet; assumed rates" in model.text()
    assert model.estimate(study("C3", "gpu")[0]).train > cost.START_SECONDS


def test_heads_on_a_pretrained_model_cost_what_the_nearest_records_took(
    committed: list[Record], cost_model: cost.CostModel
) -> None:
    cells = {cell.name: cell for cell in study("C6")}
    for name in ("code-smollm2-common-r8-n4-token-eq14-s0", "code-smollm2-common-r1-n4-none-tied-eq14-s0"):
        (record,) = [each for each in committed if each.path == f"C6/{name}.json"]
        found = cost_model.estimate(cells[name])
        assert found.train == pytest.approx(record["seconds"]["train"] + cost.START_SECONDS, rel=0.3)
        assert found.decode == pytest.approx(record["seconds"]["decode"], rel=0.5)
    unknown = cost.CostModel.of([]).estimate(cells[name])
    assert math.isnan(unknown.train) and math.isnan(unknown.decode) and math.isnan(unknown.memory)
    assert cost.wall_seconds([cells[name]], {name: unknown}, 2) == 0


def test_two_workers_halve_the_time_but_not_that_of_a_chain() -> None:
    target = trunk("code", "cpu-trunk,trunk")
    cells = [target, *(heads(target, rank, "cpu-heads") for rank in (1, 2, 4))]
    costs = {cell.name: cost.Estimate(10.0, 1.0, 1.0) for cell in cells}
    assert cost.wall_seconds(cells, costs, 1) == 44
    assert cost.wall_seconds(cells, costs, 2) == 34  # trunk, then two, then one; decoding alone
    alone = [replace(cell, alone=True) for cell in cells]
    assert cost.wall_seconds(alone, costs, 2) == 44


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "experiments/README.md").read_text()


def test_the_page_names_every_claim_with_its_command_and_folders() -> None:
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| C"]
    claims = list({each.id: each for each in reversed(CLAIMS)}.values())[::-1]  # the questions of C6 share their cells
    expected = [(each, scale) for each in claims for scale in SCALES if scale == "cpu" or each.gpu_arms]
    for (each, scale), (claim, question, command, _, folders) in zip(expected, rows, strict=True):
        assert (claim, question) == (each.id, each.question)
        assert command == f"`python experiments/sweep.py claim={each.id}{' profile=gpu' * (scale == 'gpu')}`"
        root = "results/gpu" if scale == "gpu" else "results"
        names = sorted({cell.folder for cell in study(each.id, scale)})
        assert folders == ", ".join(f"`{root}/{name}`" for name in names)


def test_the_commands_of_the_page_are_understood() -> None:
    block = PAGE.split("```bash\n")
    lines = [line.split("#")[0].split() for part in block[1:] for line in part.split("```")[0].splitlines()]
    for _, script, *words in lines:
        if script == "experiments/sweep.py" and "--help" not in words:
            sweep.plan_of(sweep.parse(words))
