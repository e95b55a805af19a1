"""Every profile and claim is well formed, and every kind of cell builds, trains, decodes and writes a valid record."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, TINY_RETROFIT, code_folder, small_pretrained

from cpdlm.config import DecodeConfig, flatten, to_dict
from cpdlm.data.corpus import write_bundle
from cpdlm.data.draft_vocabulary import frequent_tokens
from cpdlm.model.build import parameter_counts
from cpdlm.model.heads import HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import Trunk, build_body
from experiments import cell as one_cell
from experiments import pipeline, run, scheduler, sweep
from experiments.claims import CLAIMS, judge
from experiments.families import families_of
from experiments.profiles import PROFILES, study
from experiments.records import Record, load_all
from experiments.report import Report
from experiments.suite import NARROW, Cell, complete, controls, decode_groups, heads, mates, trunk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return code_folder(tmp_path_factory.mktemp("corpus"))


def shrunk(cell: Cell, corpus: Path, cache: Path) -> Cell:
    trunk, reference = (
        shrunk(other, corpus, cache) if other is not None else None for other in (cell.trunk, cell.reference)
    )
    bpe = cell.overrides.get("data.tokenizer", "bytes") != "bytes"
    here = {"corpus": str(corpus), "data.cache": str(cache), "data.tokenizer": "bpe:300" if bpe else "bytes"}
    # Cells of another size or training length would be each other's equals: their names tell them apart.
    return replace(cell, overrides={"name": cell.name} | cell.overrides | TINY | here, trunk=trunk, reference=reference)


@pytest.mark.parametrize("profile", PROFILES)
def test_cells_resolve_and_have_names_of_their_own(profile: str) -> None:
    cells = PROFILES[profile]()
    names = [cell.config("runs").run_name for cell in cells]
    assert len(set(names)) == len(names)
    for cell in cells:
        assert cell.trunk is None or cell.trunk in cells[: cells.index(cell)], "a trunk is listed before its heads"
    for group in decode_groups(cells, "runs"):
        configs = [cell.config("runs") for cell in group.cells]
        ours = [{k: v for k, v in flatten(c).items() if k.startswith(("decode.", "data."))} for c in configs]
        assert all(settings == ours[0] for settings in ours), "a group is timed on the same prompts"
        assert len({config.seed for config in configs}) == 1
        untied = [c for c in configs if not c.first_is_tied]
        assert not untied or configs[0] == untied[0], "the rank-1 reference is the paper's rank 1"
        if group.reference is not None:  # the next-token model of equal training
            free = ("rank", "link", "name", "model.tie_first", "horizon", "balance", "preset", "loss.joint_fraction")
            plain = {k: v for k, v in flatten(group.reference.config("runs")).items() if k not in free}
            for cell in group.cells:
                mine = {k: v for k, v in flatten(cell.config("runs")).items() if k not in free}
                assert cell.reference is None or mine == plain
        else:
            assert all(cell.trunk or cell.config("").is_pretrained or "time8" in cell.name for cell in group.cells)


# The dials that an arm of the star may move, from heads of rank 4, horizon 4, on one frozen code trunk.
ARMS: dict[str, set[str]] = {
    "ranks": {"rank"},
    "corpora": {"rank", "corpus"},
    "horizons": {"rank", "horizon"},
    "anchors": {"rank", "link", "model.map_hidden", *NARROW},
    "heads_for_equal_time": {"rank", "optim.steps"},
    "unembeddings": {"model.head"},
    "balances": {"rank", "balance", "loss.balance_weight"},
    "sizes": {"rank", "size"},
    "lengths": {"rank", "optim.steps", "train.decode_prompts"},
    "vocabularies": {"rank", "data.tokenizer"},
}


def test_the_claims_are_a_star_around_one_cell() -> None:
    """Heads differ from the base cell in the dials of their arm, and its cells have three seeds."""
    base = flatten(heads(trunk("code", "cpu-trunk,trunk"), 4, "cpu-heads").config("runs"))
    arms = {arm.__name__: arm for each in CLAIMS for arm in each.arms}
    assert set(arms) - set(ARMS) == {"ranks_from_scratch", "scratch_for_equal_time", "timings", "retrofit"}
    for name, dials in ARMS.items():
        seeds: dict[str, set[int]] = {}
        for cell in arms[name]():
            mine = flatten(cell.config("runs"))
            moved = {key for key in mine if mine[key] != base[key]} - {"seed", "name", "model.trunk"}
            assert moved <= dials, f"{name}: {cell.name}"
            seeds.setdefault(cell.setting, set()).add(mine["seed"])
        assert all(found == {0, 1, 2} for found in seeds.values()), name


def test_mates_differ_in_rank_only_and_needs_come_first() -> None:
    cells = study("C3")
    cell = next(c for c in cells if c.name == "code-small-common-r4-n8-none-s1")
    assert mates(cell, cells) == {f"code-small-common-r{rank}-n8-none-s1" for rank in (1, 2, 4, 8)}
    names = [c.name for c in cells]
    assert len(set(names)) == len(names) and complete(cells[-2:])[0] == cells[-1].trunk
    for c in cells:
        assert c.trunk is None or names.index(c.trunk.name) < names.index(c.name)


def test_speed_over_rank_1_is_of_cells_that_differ_in_rank_only() -> None:
    code = trunk("code", "cpu-trunk,trunk")
    cells = [heads(code, r, "cpu-heads", link=link) for link in ("none", "first") for r in (1, 4)]
    cells += [heads(code, 4, "cpu-heads", hidden=288), heads(code, 1, "cpu-heads", hidden=1152)]
    (group,) = decode_groups(cells, "runs")
    assert one_cell._rank_one([cell.config("runs") for cell in group.cells]) == {
        cells[1].name: cells[0].name,
        cells[3].name: cells[2].name,
    }


def test_controls_have_the_parameters_of_what_they_are_held_against() -> None:
    """Rank 1 against anchored rank 1 (exactly), rank 8 and anchored rank 8 (within 1 %: the gates differ)."""

    def sizes(cell: Cell) -> tuple[int, int]:
        config = cell.config("runs")
        with torch.device("meta"):
            trunk, shape = Trunk(build_body(config, 257)), HeadsConfig.of(config)
            made = LanguageModel(trunk, 257, shape, frozen_target=True, context=config.data.context)
            counts = parameter_counts(made)
        content = {"config": to_dict(config), "parameters": counts, "data": {"vocab_size": 257}}
        flops = Record("x", content).draft_flops()
        assert flops is not None
        return counts["trained"], flops

    code = trunk("code", "cpu-trunk,trunk")
    blind, equal_size, anchored = map(sizes, controls(code))
    assert blind == sizes(heads(code, 1, "cpu-heads", link="first"))
    assert equal_size[0] == pytest.approx(sizes(heads(code, 8, "cpu-heads"))[0], rel=0.01)
    assert anchored[0] == pytest.approx(sizes(heads(code, 8, "cpu-heads", link="first"))[0], rel=0.01)


def test_every_kind_of_cell_runs_to_a_valid_record(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the claims, shrunk, through the real pipeline; then again, when nothing is left to do."""
    kinds: dict[tuple[object, ...], Cell] = {}
    for cell in PROFILES["cpu-full"]():
        config = cell.config("runs")
        if config.seed == 0 and (config.rank, config.horizon) in ((1, 1), (1, 4), (4, 4)):
            kind = (config.target, config.link, config.horizon > 1, config.model.map_hidden > 0, config.model.head)
            kinds.setdefault((*kind, config.data.tokenizer), cell)
    cells = [shrunk(cell, corpus, tmp_path / "cache") for cell in complete(kinds.values())]
    monkeypatch.setitem(sweep.PROFILES, "smoke", lambda: cells)
    monkeypatch.setattr(sweep, "Local", lambda slots, devices: InProcess())
    monkeypatch.setattr(pipeline, "render", lambda *given: Report("", [], []))  # slow, and test_report.py's
    arguments = ["profile=smoke", f"out={tmp_path / 'out'}"]
    assert sweep.main(arguments) == 0
    records, damaged = load_all(tmp_path / "out" / "results")
    assert not damaged and len(records) == len(cells)
    assert judge(families_of(records)[0])
    for record in records:
        assert record["training"]["steps"] == 2
        for mode in (record["decoding"] or {"modes": {}})["modes"].values():
            assert mode["tokens"] == sum(mode["per_prompt"]["tokens"]) == 2 * 2 * 8
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json") if ".sweep" not in str(path)}
    assert stamps and sweep.main(arguments) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "a finished cell was run or written again"


def test_a_jobs_result_is_read_and_its_error_goes_to_its_log(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed (pip install cpdlm[slurm])")
    job, handle = scheduler.Job("a", (), tmp_path / "log"), submitit.SlurmJob(tmp_path, "7")
    assert scheduler._result(job, handle) is None
    for result, code in ((("success", 3), 3), (("error", "Traceback"), 1)):
        handle.paths.result_pickle.write_bytes(pickle.dumps(result))
        assert scheduler._result(job, handle) == code
    assert "Traceback" in job.log.read_text()


class InProcess:
    """Runs jobs one after the other, in this process."""

    def __init__(self) -> None:
        self.ended: list[tuple[scheduler.Job, int]] = []

    def start(self, ready: list[scheduler.Job]) -> list[scheduler.Job]:
        job = ready[0]
        script, *words = job.argv
        code = run.main(words) if script == "experiments/run.py" else one_cell.main(words[1])
        self.ended.append((job, code))
        return [job]

    def wait(self) -> list[tuple[scheduler.Job, int]]:
        ended, self.ended = self.ended, []
        return ended

    def stop(self) -> None:
        pass


# What else is under study on a pretrained model: the objective with its constants, and the kinds of maps and anchors.
MORE_DIALS = {"loss.objective", "loss.alpha", "loss.gamma", "model.map_rank", "model.draft_width"}
MORE_DIALS |= {"model.tie_first", "model.map_hidden"}


@pytest.mark.parametrize("profile", [name for name in PROFILES if name.startswith("retrofit")])
def test_cells_on_a_pretrained_model_that_are_compared_differ_in_the_dials_only(profile: str) -> None:
    free = {"rank", "link", "name"} | MORE_DIALS
    for group in decode_groups(PROFILES[profile](), "runs"):
        configs = [cell.config("runs") for cell in group.cells]
        settings = [{k: v for k, v in flatten(config).items() if k not in free} for config in configs]
        assert all(one == settings[0] for one in settings) and configs[0].target == "common"
        for config in configs:  # decoding while training is a curve
            assert config.train.decode_prompts or profile == "retrofit-own"
            assert config.optim.steps // config.train.validate_every >= 3


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer of its own, as a hub folder has them."""
    return small_pretrained(tmp_path_factory.mktemp("pretrained"), sorted(corpus.glob("*.py")))


def test_every_kind_of_cell_on_a_pretrained_model_runs_to_a_valid_record(
    corpus: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grid on a pretrained model, shrunk, from a bundle: objectives, anchors, ties, maps, and its own text."""
    small = TINY | TINY_RETROFIT
    small |= {"model.trunk": str(pretrained), "data.cache": str(tmp_path / "cache"), "corpus": str(corpus)}
    kinds: dict[tuple[object, ...], Cell] = {}
    for cell in PROFILES["retrofit-gpu"]():
        config, screen = cell.config("runs"), cell.folder == "C6-screen"
        objective, maps = config.loss.objective, (config.model.map_hidden > 0, config.model.map_rank)
        wanted = not screen or (config.link == "first" and objective in ("joint", "blend"))
        if wanted and cell.folder != "C6-long" and config.corpus == "code" and config.seed == 0:
            kinds.setdefault((cell.folder, objective, config.link, *maps), cell)
    cells = [Cell(cell.folder, cell.overrides | small) for cell in kinds.values()]
    assert len(cells) == 9 and {cell.config("x").data.text for cell in cells} == {"corpus", "greedy", "sampled"}
    write_bundle([cells[0].config("x")], tmp_path / "bundle")
    monkeypatch.setitem(sweep.PROFILES, "smoke", lambda: cells)
    monkeypatch.setattr(sweep, "Local", lambda slots, devices: InProcess())
    monkeypatch.setattr(pipeline, "render", lambda *given: Report("", [], []))  # the test above draws one
    assert sweep.main(["profile=smoke", f"out={tmp_path / 'out'}", f"data={tmp_path / 'bundle'}"]) == 0
    said = capsys.readouterr().out
    records, damaged = load_all(tmp_path / "out" / "results")
    assert not damaged and len(records) == len(cells)
    # What a list covers is said of the text that is trained on.
    covered = {
        json.loads((folder / "origin.json").read_bytes())["text"]: frequent_tokens(
            np.concatenate([np.load(path)["tokens"] for path in sorted(folder.glob("*.npz"))]), 300, 100
        ).coverage
        for folder in (tmp_path / "cache" / "written").iterdir()
    }
    for text, coverage in covered.items():
        mine = [record for record in records if record.config["data"]["text"] == text]
        assert mine and all(record["decoding"]["shortlist_coverage"] == pytest.approx(coverage) for record in mine)
        assert f"loss.draft_vocabulary=100 tokens cover {coverage:.2%} of the training text" in said
    for record in records:
        listed = record["likelihood"]["shortlist"]
        assert listed["tokens"] == 100 and 0 < listed["windows"] <= 1
        assert record["decoding"]["rank_one"] is None
        assert record["decoding"]["modes"]["sampling"]["tokens"] == 2 * 8
        assert record["training"]["curve"][-1]["validation/sampling_tokens_per_pass"] >= 1
        assert len(record["likelihood"]["kept_by_depth"]) == (3 if record.config["model"]["tie_first"] else 4)
        assert ("written" in record["data"]) == (record.config["data"]["text"] != "corpus")
        weights = load_file(tmp_path / "out" / record["name"] / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert all(name.startswith(("heads.", "anchor.")) for name in weights), "the trunk is not stored with its heads"
    assert len(list((tmp_path / "cache" / "written").iterdir())) == 2
    assert len(list((tmp_path / "cache" / "states").iterdir())) == 3, "cells on the same text share its states"


def test_a_setting_younger_than_an_output_had_its_default() -> None:
    younger = ("draft", "nodes", "draft_vocabulary")
    old = {key: value for key, value in asdict(DecodeConfig()).items() if key not in younger}
    assert one_cell._same(old, DecodeConfig()) and one_cell._same(old | {"draft": "chain"}, DecodeConfig())
    assert not one_cell._same(old, DecodeConfig(draft="tree")) and not one_cell._same(old, DecodeConfig(repeats=9))
    assert not one_cell._same(None, DecodeConfig())
    assert one_cell._same(old | {"shortlist": 5}, DecodeConfig(draft_vocabulary=5)), "by its earlier name"
