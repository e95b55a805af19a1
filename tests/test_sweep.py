"""The sweep: its words, its scheduler, and what happens when cells fail, are killed, are finished or do not belong together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_records import ORIGIN, made
from test_suite import TINY

from cpdlm.config import ConfigError
from cpdlm.report import results
from cpdlm.training import storage
from experiments import cost, launchers, pipeline, sweep
from experiments.launchers import Job, Local
from experiments.suite import PROFILES, STUDIES, Cell, heads, scratch, study, trunk

ROOT = Path(__file__).resolve().parent.parent


def job(tmp_path: Path, name: str, code: str, *needs: str, alone: bool = False) -> Job:
    return Job(name, ("-c", code), tmp_path / name / "train.log", frozenset(needs), alone)


def ran(jobs: list[Job], launcher: launchers.Launcher) -> tuple[dict[str, int], list[str]]:
    codes: dict[str, int] = {}

    def ended(job: Job, code: int) -> bool:
        codes[job.name] = code
        return code == 0

    return codes, [each.name for each in launchers.schedule(jobs, launcher, ended)]


# --- the scheduler, with jobs that only say when they ran -------------------------------------------------------------

STAMP = "import os, sys, time; a = time.time(); time.sleep({}); print(a, time.time(), len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"  # fmt: skip


def stamps(jobs: list[Job]) -> dict[str, tuple[float, float, int, int]]:
    lines = {each.name: each.log.read_text().split() for each in jobs}
    return {name: (float(a), float(b), int(c), int(d)) for name, (a, b, c, d) in lines.items()}


def test_jobs_wait_for_their_needs_and_timed_ones_have_the_machine(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "timed", STAMP.format(0.1), alone=True),
        job(tmp_path, "heads", STAMP.format(0.1), "trunk"),
        job(tmp_path, "trunk", STAMP.format(0.3)),
        job(tmp_path, "other", STAMP.format(0.3)),
    ]
    launcher = Local(2)
    codes, skipped = ran(jobs, launcher)
    assert codes == dict.fromkeys(("timed", "heads", "trunk", "other"), 0) and not skipped
    seen = stamps(jobs)
    assert seen["heads"][0] >= seen["trunk"][1]
    assert seen["other"][0] < seen["trunk"][1], "two at once"
    for name in ("heads", "trunk", "other"):
        assert seen["timed"][0] >= seen[name][1] or seen["timed"][1] <= seen[name][0], "something ran beside a timed job"
        assert seen[name][2] == seen[name][3] == max(1, len(launcher.cores) // 2), "pinned to its share"
    assert seen["timed"][2] == seen["timed"][3] == len(launcher.cores)


def test_gpus_are_shared_out(tmp_path: Path) -> None:
    show = "import os, time; time.sleep(0.2); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job(tmp_path, name, show) for name in ("a", "b")]
    ran(jobs, Local(2, ["3", "5"]))
    assert {each.log.read_text().strip() for each in jobs} == {"3", "5"}


def test_a_failure_skips_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "trunk", "raise SystemExit(3)"),
        job(tmp_path, "heads", "", "trunk"),
        job(tmp_path, "other", ""),
        job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
    ]
    codes, skipped = ran(jobs, Local(1))
    assert codes == {"trunk": 3, "other": 0, "killed": -9} and skipped == ["heads"]


def test_a_stopped_sweep_tells_its_jobs_once_and_waits(tmp_path: Path) -> None:
    patient = f"""
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(tmp_path / "saved")!r}).open('a').write('saved ')
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(60)
"""

    class Interrupted(Local):
        def wait(self) -> list[tuple[Job, int]]:
            while not (tmp_path / "ready").is_file():
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran([job(tmp_path, "a", patient)], Interrupted(1))
    assert (tmp_path / "saved").read_text() == "saved "


# --- a sweep in a process of its own ----------------------------------------------------------------------------------


def code_cells(folder: Path, *dials: dict[str, object]) -> list[Cell]:
    settings = TINY | {"corpus": str(folder / "text"), "data.cache": str(folder / "cache"), "decode.repeats": 1}
    return [Cell("C1", settings | {"rank": 1} | more) for more in dials]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(60):
        body = "\n".join(f"def function_{number}_{line}(x):\n    return x * {line}" for line in range(12))
        (tmp_path / "text" / f"{number}.py").write_text(body)
    return tmp_path


def plan(folder: Path, cells: list[Cell], **more: object) -> pipeline.Plan:
    return pipeline.Plan("test", cells, folder / "out", folder / "out/results", "command", **more)  # type: ignore[arg-type]


def test_a_failing_cell_is_recorded_and_tried_again(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell whose corpus cannot be read raises inside run.py; the other cell has its record, and the exit code says so."""
    good, bad = code_cells(text, {}, {"rank": 2, "name": "bad"})
    (text / "out" / "bad").mkdir(parents=True)
    (text / "out" / "bad" / "sessions.json").write_text("{")  # a damaged file of an earlier session
    assert pipeline.run(plan(text, [bad, good]), Local(2)) == 1
    said = capsys.readouterr()
    assert "failed: bad: exit 2" in said.err and "is damaged" in said.err
    failure = json.loads((text / "out/bad/failed.json").read_text())
    assert failure["exit"] == 2 and "sessions.json is damaged" in failure["traceback"] and "rank=2" in failure["command"]
    records, _ = results.load_all(text / "out/results")
    assert [record["name"] for record in records] == [good.name]
    # Mended, the same plan runs the failed cell alone, and the mark is gone.
    (text / "out" / "bad" / "sessions.json").unlink()
    stamp = (text / "out" / good.name / "model.safetensors").stat().st_mtime_ns
    assert pipeline.run(plan(text, [bad, good]), Local(2)) == 0
    assert not (text / "out/bad/failed.json").exists()
    assert (text / "out" / good.name / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(results.load_all(text / "out/results")[0]) == 2


def test_the_traceback_of_a_failed_job_is_kept(tmp_path: Path) -> None:
    failing = job(tmp_path, "a", "print('step 1'); raise RuntimeError('out of ideas')")
    codes, _ = ran([failing], Local(1))
    pipeline.note_failure(tmp_path / "failed.json", failing, codes["a"])
    noted = json.loads((tmp_path / "failed.json").read_text())
    assert noted["traceback"].startswith("Traceback") and noted["traceback"].endswith("RuntimeError: out of ideas")
    assert noted["exit"] == 1 and noted["name"] == "a" and noted["log"] == "train.log"


SWEEP = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + '/tests']
from experiments import sweep
from test_sweep import code_cells
sweep.PROFILES['smoke'] = lambda: code_cells(Path({folder!r}), *{dials!r})
sys.exit(sweep.main(['profile=smoke', 'jobs=2', 'out=' + {folder!r} + '/out', 'only=data,train']))
"""


def test_a_sweep_killed_by_kill_9_leaves_no_orphan_and_continues(text: Path) -> None:
    long = {"optim.steps": 3000, "train.checkpoint_every": 20, "train.validate_every": 3000, "name": "long"}
    script = SWEEP.format(root=str(ROOT), folder=str(text), dials=[long])
    first = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = text / "out/long/last.ckpt"
    until = time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    assert checkpoint.is_file(), (text / "out/long/train.log").read_text()
    first.kill()
    first.wait()
    with storage.exclusive(text / "out/long", patience=30):  # the cell saves and goes, too
        pass
    # Shorten what is left by resuming at once near the end: the same settings but for the number of steps are another run.
    second = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = text / "out/long/train.log"
    while "stopped at step" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    stopped = int(log.read_text().split("stopped at step ")[1].split()[0])
    assert stopped >= 20
    while time.monotonic() < until:
        time.sleep(0.2)
        if checkpoint.is_file():
            storage.check_checkpoint(checkpoint)
            break
    time.sleep(8)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 130
    again = [int(part.split()[0]) for part in log.read_text().split("stopped at step ")[1:]]
    assert len(again) == 2 and again[1] > again[0], "the second sweep went on from the checkpoint of the first"


# --- what is finished, and what may be mixed --------------------------------------------------------------------------


def committed(folder: Path, cells: list[Cell], **changes: object) -> None:
    """Records of these cells, as if they had been run."""
    for cell in cells:
        config = cell.config("runs/old")
        settings = {key.replace(".", "__"): value for key, value in cell.settings("runs/old").items() if key != "preset"}
        content = made(claim=cell.folder, **{"rank": config.rank, "seed": config.seed} | settings)
        content |= {"config": results.to_dict(config), "name": cell.name} | changes  # presets are expanded there
        if content["decoding"]:
            content["decoding"]["group"] = [each.name for each in cells]
        results.write(results.validate(content), folder / cell.folder)


def small(cells: list[Cell], folder: Path) -> pipeline.Plan:
    return pipeline.Plan("C3", cells, folder / "out", folder / "results", "command")


def test_a_cell_with_a_record_of_its_settings_is_finished(tmp_path: Path) -> None:
    code = trunk("code", "cpu-trunk,trunk")
    cells = [code, *(heads(code, rank, "cpu-heads") for rank in (1, 8))]
    committed(tmp_path / "results", cells)
    assert not small(cells, tmp_path).pending
    more = [*cells, heads(code, 4, "cpu-heads")]
    # Rank 4 must be timed beside ranks 1 and 8: they are due again, and their trunk is needed for its weights.
    unfinished = small(more, tmp_path)
    assert {cell.name for cell in unfinished.pending} == {cell.name for cell in more[1:]}
    assert [cell.name for cell in unfinished.needed][0] == code.name and code.name in unfinished.finished
    # Another dial is another comparison: nothing else is due.
    other = [*cells, heads(code, 8, "cpu-heads").varied("kl", balance="kl")]
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
        pipeline.refuse_mixed_code(mixed)
    pipeline.refuse_mixed_code(replace(mixed, mix=True))
    # Cells that nothing compares with those records, or no cells at all, mix nothing.
    pipeline.refuse_mixed_code(replace(mixed, comparisons=[[old], [new]]))
    pipeline.refuse_mixed_code(small([old], tmp_path))
    # The same code, or a commit since which nothing that decides numbers has changed.
    commit, _ = results.git_state()
    content["commit"] = commit
    (tmp_path / "results/C1" / f"{old.name}.json").write_text(json.dumps(content))
    same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *pipeline.CODE], cwd=ROOT, check=False).returncode == 0
    assert bool(pipeline.mixed_code(small([old, new], tmp_path))) is not same


def test_records_of_other_text_or_another_trunk_are_named(tmp_path: Path) -> None:
    code = trunk("code", "cpu-trunk,trunk")
    cells = [code, *(heads(code, rank, "cpu-heads") for rank in (1, 8))]
    committed(tmp_path / "results", cells)
    mine = small(cells, tmp_path)
    config = code.config("runs/x")
    pipeline.refuse_mixed_data(mine, config, "ab" * 32)  # what made_records says
    with pytest.raises(ConfigError, match="3 records .* other text than corpus=code is now"):
        pipeline.refuse_mixed_data(mine, config, "cd" * 32)
    pipeline.refuse_mixed_data(replace(mine, mix=True), config, "cd" * 32)
    for cell in cells[1:]:
        path = tmp_path / "results" / cell.folder / f"{cell.name}.json"
        content = json.loads(path.read_text())
        content["data"]["trunk_sha256"] = "12" * 32
        path.write_text(json.dumps(content))
    mine = small(cells, tmp_path)
    (mine.out / code.name).mkdir(parents=True)
    (mine.out / code.name / storage.WEIGHTS).write_bytes(b"other weights")
    assert "other weights than those under 2 records" in pipeline._other_trunk(mine, code)
    assert pipeline._other_trunk(replace(mine, mix=True), code) == ""


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
        (["C3"], "write WORD=VALUE"),
    ],
)
def test_a_mistake_exits_2_with_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(words) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and len(said.splitlines()) == 1


def test_slurm_without_submitit_or_sbatch_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="pip install 'cpdlm\\[slurm\\]'"):
        launchers.Slurm(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", sys)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch"):
        launchers.Slurm(tmp_path)


def test_a_claim_goes_to_the_committed_records_and_a_profile_to_its_own() -> None:
    claim = sweep.plan_of(sweep.parse(["claim=C3"]))
    assert (str(claim.out), str(claim.results), claim.publish, claim.experiment) == ("runs/claims", "results", True, "C3")
    everything = sweep.plan_of(sweep.parse(["claim=all", "profile=gpu", "data=bundle"]))
    assert str(everything.results) == "results/gpu" and len(everything.comparisons) == 5
    assert all(cell.overrides["data.bundle"] == "bundle" for cell in everything.cells)
    profile = sweep.plan_of(sweep.parse(["profile=smoke", f"out={ROOT / 'runs/mine'}"]))
    assert (str(profile.out), str(profile.results), profile.publish) == ("runs/mine", "runs/mine/results", False)
    assert {cell.name for cell in sweep.plan_of(sweep.parse(["profile=cpu-full"])).cells} == {
        cell.name for cell in study("all")
    }


def test_dry_run_prints_cells_states_costs_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_estimates_of_the_committed_records_are_near_what_they_took() -> None:
    records, _ = results.load_all(ROOT / "results")
    model = cost.CostModel.of(records)
    by_name = {cell.name: cell for cell in study("C3") if cell.name.endswith("-s0")}
    assert all(fit.error < 0.25 for fit in model.fits.values())
    for record in records:
        if record["name"] in by_name and record["config"]["optim"]["steps"] == 400:
            config = by_name[record["name"]].config("runs")
            step = model.fits["step"](cost._step(config))
            assert step == pytest.approx(record["training"]["step_ms_median"] / 1000, rel=0.7), record["name"]


def test_costs_follow_the_dials() -> None:
    base = heads(trunk("code", "cpu-trunk,trunk"), 4, "cpu-heads")
    flops = cost.step_flops(base.config("runs"))
    assert cost.step_flops(base.varied("x", rank=8).config("runs"))[1] == pytest.approx(2 * flops[1])
    assert cost.step_flops(scratch("code", 4).varied("x", size="small").config("runs"))[0] == pytest.approx(3 * flops[0])
    separate = base.varied("x", model__head="separate").config("runs")
    assert cost.head_flops(separate) < cost.head_flops(base.config("runs"))
    assert cost.head_weights(separate) == 16 * 256 * 257


def test_without_records_of_a_gpu_the_rates_are_assumed_and_it_says_so() -> None:
    model = cost.CostModel.of([], "gpu")
    assert "no records of a gpu yet; assumed rates" in model.text()
    assert model.estimate(study("C3", "gpu")[0]).train > cost.START_SECONDS


def test_two_workers_halve_the_time_but_not_that_of_a_chain() -> None:
    target = trunk("code", "cpu-trunk,trunk")
    cells = [target, *(heads(target, rank, "cpu-heads") for rank in (1, 2, 4))]
    costs = {cell.name: cost.Estimate(10.0, 1.0, 1.0) for cell in cells}
    assert cost.wall_seconds(cells, costs, 1) == 44
    assert cost.wall_seconds(cells, costs, 2) == 34  # trunk, then two, then one; decoding alone
    alone = [replace(cell, alone=True) for cell in cells]
    assert cost.wall_seconds(alone, costs, 2) == 44


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_suite_says() -> None:
    page = (ROOT / "experiments/README.md").read_text()
    assert sweep.page() in page, "experiments/README.md is not what `python -m experiments.page` writes"
    assert all(f"claim={each.id}" in page for each in STUDIES)
