"""The sweep: what is finished, what does not belong together, its words, and what it says that cells will cost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_records import made, suite

from cpdlm.config import to_dict
from cpdlm.training import checkpoints
from experiments import cell as one_cell
from experiments import cost, sweep, sweep_plan
from experiments.profiles import PROFILES, study
from experiments.records import Record, write
from experiments.suite import Cell, heads, scratch, trunk
from experiments.sweep_plan import Plan

ROOT = Path(__file__).resolve().parent.parent


# --- what is finished, and what may be mixed --------------------------------------------------------------------------


def recorded(folder: Path, cells: list[Cell], **changes: Any) -> None:
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
    recorded(tmp_path / "results", cells)
    assert not small(cells, tmp_path).pending
    more = [*cells, heads(code, 4, "cpu-heads")]
    # Rank 4 must be timed beside ranks 1 and 8: they are due again, and their trunk is needed for its weights.
    unfinished = small(more, tmp_path)
    assert {cell.name for cell in unfinished.pending} == {cell.name for cell in more[1:]}
    assert unfinished.needed[0].name == code.name and code.name in unfinished.finished
    # A lost record is made again beside what it is timed with.
    (tmp_path / "results" / cells[2].folder / f"{cells[2].name}.json").unlink()
    assert {cell.name for cell in small(cells, tmp_path).pending} == {cell.name for cell in cells[1:]}
    recorded(tmp_path / "results", cells)
    # Another dial is another comparison: nothing else is due.
    other = [*cells, heads(code, 8, "cpu-heads").varied("kl", {"balance": "kl"})]
    assert [cell.name for cell in small(other, tmp_path).pending] == [other[-1].name]


@pytest.mark.parametrize(
    "change", [{"optim.steps": 7}, {"loss.balance_weight": 0.5}, {"decode.prompts": 3}, {"data.max_bytes": 9999}]
)
def test_a_record_of_other_settings_is_not_taken_for_the_cell(change: dict[str, int], tmp_path: Path) -> None:
    """Nor is a damaged one, or one that was not decoded."""
    cell = replace(scratch(8), reference=None)
    recorded(tmp_path / "results", [replace(cell, overrides=cell.overrides | change)])
    assert small([cell], tmp_path).pending
    recorded(tmp_path / "results", [cell], decoding=None)
    assert small([cell], tmp_path).pending
    (tmp_path / "results" / cell.folder / f"{cell.name}.json").write_text("{")
    assert small([cell], tmp_path).pending


@pytest.mark.parametrize("name", ["evaluate.json", "decode.json", "train.json"])
def test_an_odd_file_of_a_stage_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    for content in (b"[]", b"{}", b'{"likelihood": 3, "seconds": "x"}', b'"\xff"', b"{", b"[" * 100_000):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(checkpoints.RunError, match=f"{name} is damaged .*delete it, and the same command makes it"):
            one_cell._read(tmp_path / name)


def test_records_of_other_text_or_another_trunk_are_named(tmp_path: Path) -> None:
    code = trunk("code", "cpu-trunk,trunk")
    cells = [code, *(heads(code, rank, "cpu-heads") for rank in (1, 8))]
    recorded(tmp_path / "results", cells)
    mine = small(cells, tmp_path)
    config = code.config("runs/x")
    assert not sweep_plan.other_text(mine, config, "ab" * 32)  # what made_records says
    said = sweep_plan.other_text(mine, config, "cd" * 32)
    assert said.startswith("3 records ") and "other text than corpus=code is now" in said
    for cell in cells[1:]:
        path = tmp_path / "results" / cell.folder / f"{cell.name}.json"
        content = json.loads(path.read_text())
        content["data"]["trunk_sha256"] = "12" * 32
        path.write_text(json.dumps(content))
    mine = small(cells, tmp_path)
    (mine.out / code.name).mkdir(parents=True)
    (mine.out / code.name / checkpoints.WEIGHTS).write_bytes(b"other weights")
    said = sweep_plan.other_target(mine, code)
    assert said.startswith(f"{code.name} trained to other weights than those under 2 records")
    assert "out=OTHER results=OTHER/results" in said


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
        (["claim=C3", "jobs=²"], "jobs=²: write a number from 1 to 1024"),
        (["claim=C3", f"jobs={10**22}"], "write a number from 1 to 1024"),
        (["claim=C3", "only=data,trian"], "did you mean train?"),
        (["claim=C3", "launcher=slrum"], "did you mean slurm?"),
        (["claim=C3", "slurm.partition=x"], "needs launcher=slurm"),
        (["C3"], "write KEY=VALUE"),
        (["--dryrun"], "did you mean --dry-run?"),
    ],
)
def test_a_mistake_exits_2_with_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(words) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and len(said.splitlines()) == 1


def test_a_claim_goes_to_the_committed_records_and_a_profile_to_its_own() -> None:
    claim = sweep.plan_of(sweep.parse(["claim=C3"]))
    assert (str(claim.out), str(claim.results), claim.publish) == ("runs/claims", "results", True)
    everything = sweep.plan_of(sweep.parse(["claim=all", "profile=gpu", "data=bundle"]))
    assert str(everything.results) == "results/gpu" and len({cell.folder for cell in everything.cells}) > 3
    assert str(everything.shown) == "results", "records of a GPU join the others in the report"
    assert all(cell.overrides["data.bundle"] == "bundle" for cell in everything.cells)
    profile = sweep.plan_of(sweep.parse(["profile=smoke", f"out={ROOT / 'runs/mine'}"]))
    assert (str(profile.out), str(profile.results), profile.publish) == ("runs/mine", "runs/mine/results", False)


def test_dry_run_prints_cells_states_costs_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [Record("made.json", content) for content in suite(seeds=1)]
    monkeypatch.setattr("experiments.forecast.load_all", lambda root: (records, []))
    assert sweep.main(["profile=smoke", f"out={tmp_path}/out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for cell in PROFILES["smoke"]():
        assert cell.name in said
    assert "6 cells, 6 without counting seeds: 0 finished, 6 to finish, 6 to train" in said
    assert "median error of the fit: step" in said and "MiB" in said
    assert not list(tmp_path.rglob("*.json"))


# --- the cost model --------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_coefficients_of_exact_data() -> None:
    features = [(1.0, x, y) for x in (1.0, 2.0, 5.0) for y in (1.0, 3.0)]
    found = cost.fit(features, [2 + 0.5 * x + 3 * y for _, x, y in features])
    assert found.coefficients == pytest.approx((2, 0.5, 3)) and found.error < 1e-9 and found.records == 6
    # What would need a negative coefficient is left out.
    found = cost.fit(features, [2 + 0.5 * x - 0.01 * y for _, x, y in features])
    assert found.coefficients[2] == 0 and 0 < found.error < 0.05


@pytest.mark.parametrize(("scale", "jobs", "hours"), [("cpu", 2, 6.0), ("gpu", 1, 25 / 60)])
def test_the_star_fits_its_budget(scale: str, jobs: int, hours: float, cost_model: cost.CostModel) -> None:
    cells = study("all", scale)
    assert len({cell.setting for cell in cells}) <= 60
    model = cost_model if scale == "cpu" else cost.CostModel.of([], scale)
    assert cost.wall_seconds(cells, cost.estimates(model, cells), jobs) / 3600 <= hours


def test_two_workers_halve_the_time_but_not_that_of_a_chain() -> None:
    target = trunk("code", "cpu-trunk,trunk")
    cells = [target, *(heads(target, rank, "cpu-heads") for rank in (1, 2, 4))]
    costs = {cell.name: cost.Estimate(10.0, 1.0, 1.0) for cell in cells}
    assert cost.wall_seconds(cells, costs, 1) == 44
    assert cost.wall_seconds(cells, costs, 2) == 34  # trunk, then two, then one; decoding alone
    alone = [replace(cell, alone=True) for cell in cells]
    assert cost.wall_seconds(alone, costs, 2) == 44
