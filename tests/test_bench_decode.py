"""The decoding benchmark: its records from one tiny run, and what is drawn from them."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cpdlm.config import Config, resolve
from cpdlm.model.build import build_language_model
from cpdlm.training import checkpoints
from experiments.bench import decode as benchmark
from experiments.bench import decode_drafters
from experiments.bench.decode_heads import Heads
from experiments.report import decoding, render
from experiments.report.benchmarks import read_benchmark

HEADS = [("untied", 1, [0, 1]), ("untied", 2, [0, 1]), ("token-conditioned", 2, [0])]  # of the first corpus
ALONE = [("untied", 1, [0])]  # of the second


def save(folder: Path, config: Config) -> None:
    trunk = checkpoints.load_model(Path(config.model.trunk)) if config.model.trunk else None
    torch.manual_seed(config.rank + 10 * config.seed)
    model = build_language_model(config, 257, trunk)
    checkpoints.open_run(folder, config)
    checkpoints.save_model(folder, model, model.state_dict(), 257)
    (folder / checkpoints.TRAINED).write_text('{"seconds": 2.5}')


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of runs, folder of records) of one quick benchmark of two corpora."""
    root = tmp_path_factory.mktemp("bench")
    (root / "corpus").mkdir()
    for index in range(60):
        text = "".join(random.Random(index).choices("abcdefgh ().=\n", k=300))
        (root / "corpus" / f"{index}.txt").write_text(text)
    (root / "other").symlink_to(root / "corpus")  # the same files under two names are two corpora
    alone = {"horizon": 1, "rank": 1, "balance": "none"}
    for corpus, all_heads in (("corpus", HEADS), ("other", ALONE)):
        common = {
            "corpus": str(root / corpus),
            "data.cache": str(root / "cache"),
            "output": str(root / "runs"),
            "size": "micro",
            "data.context": 48,
            "decode.prompt_tokens": 8,
            "decode.new_tokens": 8,
            "horizon": 3,
            "optim.steps": 2,
            "optim.warmup": 1,
        }
        trunk = root / "runs" / f"trunk-{corpus}"
        save(trunk, resolve(common | alone))
        save(root / f"assistant-{corpus}", resolve(common | alone))
        for variant, rank, seeds in all_heads:
            for seed in seeds:
                anchor = "token" if variant == "token-conditioned" else "none"
                more = {"rank": rank, "link": anchor, "model.trunk": str(trunk), "seed": seed}
                config = resolve(common | more)
                save(root / "runs" / config.run_name, config)
    runs = ["--runs", str(root / "runs"), "--cpu"]
    assert benchmark.main([*runs, "--train-hydra", str(root / "hydra")]) == 0
    words = [*runs, "--quick", "--hydra", str(root / "hydra"), "--assistant", str(root / "assistant-corpus")]
    words += ["--active", "1", "2"]
    assert benchmark.main([*words, "--output", str(root / "results" / "benchmarks")]) == 0
    return root / "runs", root / "results"


def read(folder: Path, what: str) -> dict[str, Any]:
    found = read_benchmark(folder, f"decode_{what}")
    assert not isinstance(found, str), found
    assert found["benchmark"] == f"decoding {what}"
    assert found["command"].startswith("python experiments/bench/decode.py --runs ")
    assert {"commit", "dirty", "hardware", "versions", "started", "seed"} <= set(found)
    assert found["settings"]["prompts"] == 3 and found["settings"]["seeds"] == [0, 1]
    assert [target["trunk"] for target in found["targets"]] == ["trunk-corpus", "trunk-other"]
    assert found["targets"][0]["horizon"] == 3 and found["targets"][0]["steps"] == 2
    return found


def test_every_drafter_is_measured_on_both_splits(measured: tuple[Path, Path]) -> None:
    found = read(measured[1], "strategies")
    assert [(cell["law"], cell["rank"], cell["seeds"]) for cell in found["cells"]] == HEADS + ALONE
    for cell in found["cells"]:
        for mode, names in decode_drafters.DRAFTERS.items():
            entry = cell["modes"][mode]
            if cell["rank"] == 1:
                names = tuple(name for name in names if name not in ("window", "path"))
            assert set(entry) == {*names, "chosen"}
            assert entry["chosen"] == max(names, key=lambda name: entry[name]["validation"]["speedup"]["mean"])
            for one in (entry[name][split] for name in names for split in ("validation", "test")):
                assert one["tokens"] == sum(one["per_prompt"]["tokens"]) == 12 * len(cell["seeds"])
                assert [row["depth"] for row in one["acceptance_by_depth"]] == [2, 3]
                product = one["conversion"]["mean"] * one["tokens_per_pass"]["mean"]
                assert product == pytest.approx(one["speedup"]["mean"])
            assert entry["chain"]["test"]["tokens_per_pass_over_chain"] == {"mean": 0, "low": 0, "high": 0}
    assert set(found["suggested"]) == {"greedy", "sampling"}


def test_a_draft_of_few_components_is_measured_beside_all(measured: tuple[Path, Path]) -> None:
    rows = [row for row in read(measured[1], "sparse")["rows"] if row["mode"] == "sampling"]
    found = [(row["law"], row["rank"], row["active"], row["speed_over_rank1"] is None) for row in rows]
    untied = [("untied", 1, 1, True), ("untied", 2, 2, False), ("untied", 2, 1, False)]
    linked = [("token-conditioned", 2, active, True) for active in (2, 1)]  # no rank 1 to hold them against
    assert found == [*untied, *linked, ("untied", 1, 1, True)]
    one, both = rows[:2]
    assert both["speed_over_rank1"]["mean"] == pytest.approx(both["speedup"]["mean"] / one["speedup"]["mean"])


def test_fewer_components_are_the_same_weights_in_another_model() -> None:
    config = resolve({"size": "micro", "rank": 2, "horizon": 3})
    model = build_language_model(config, 257, None)
    (few,) = decode_drafters.with_active(Heads(config, ["heads"], [0], [model], [1.0]), 1).models
    assert (model.active, few.active) == (0, 1)
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), few.parameters(), strict=True))


def test_acceptance_is_over_seeds_draws_and_prompts(measured: tuple[Path, Path]) -> None:
    found = read(measured[1], "acceptance")
    for row in found["strategies"]:
        draws = 1 if row["mode"] == "greedy" else 2
        assert row["tokens"] == 3 * 6 * draws * len(row["seeds"])
        rate = row["tokens_per_pass"]
        assert rate["mean"] == pytest.approx(row["tokens"] / row["passes"])
        assert rate["low"] <= rate["mean"] <= rate["high"]
        others = {
            "tokens_per_pass_over_chain": (row["rank"], ("chain",)),
            "tokens_per_pass_over_rank1": (1, (row["strategy"], "chain")),
        }
        for key, (rank, drafters) in others.items():
            kin = {
                each["strategy"]: each
                for each in found["strategies"]
                if each["rank"] == rank and all(each[name] == row[name] for name in ("corpus", "mode", "law", "seeds"))
            }
            other = next((kin[name] for name in drafters if name in kin), row)
            assert (key in row) == (other is not row), "nothing is held against itself, nor against what is not there"
            if key in row:
                assert row[key]["mean"] == pytest.approx(rate["mean"] - other["tokens_per_pass"]["mean"])
                assert row[key]["low"] <= row[key]["mean"] <= row[key]["high"]
    assert len(found["strategies"]) == sum(2 + 3 if rank == 1 else 4 + 5 for _, rank, _ in HEADS + ALONE)


def test_every_baseline_is_measured(measured: tuple[Path, Path]) -> None:
    entries = read(measured[1], "baselines")["methods"]
    corpus = entries[0]["corpus"]
    methods = {entry["name"]: entry for entry in entries if entry["corpus"] == corpus}
    assert [entry["name"] for entry in entries if entry["corpus"] != corpus].count("AR") == 1
    of_kind = {entry["kind"]: entry for entry in methods.values()}
    assert set(of_kind) == {"AR", "generate", "lookup", "assistant", "hydra", "heads"}
    assert {"rank 1, untied", "rank 2, untied", "rank 2, token-conditioned"} <= set(methods)
    for entry in methods.values():
        tokens = 24 * (2 if entry["kind"] == "hydra" else len(entry.get("seeds", [0])))
        for mode in ("greedy", "sampling"):
            one = entry["modes"][mode]
            assert one["tokens"] == tokens and one["passes"] <= tokens
            assert one["tokens_per_pass"]["mean"] == pytest.approx(tokens / one["passes"])
            assert ("acceptance_by_depth" in one) == (entry["kind"] not in ("generate", "assistant"))
            assert one["working_memory_bytes"] >= one["later_memory_bytes"] > one["between_memory_bytes"] > 0
    assert methods["AR"]["modes"]["greedy"]["passes"] == methods["generate"]["modes"]["greedy"]["passes"] == 24
    # An assistant that is the target's equal is always right under greedy.
    assert of_kind["assistant"]["modes"]["greedy"]["passes"] < 24 and of_kind["assistant"]["parameters_added"] > 0
    assert of_kind["hydra"]["training_seconds"] > 0 and of_kind["hydra"]["parameters_added"] > 0


def test_tables_of_a_measured_benchmark(measured: tuple[Path, Path], tmp_path: Path) -> None:
    report = render(measured[1], tmp_path)
    tables = [name for name, (_, records) in decoding.TABLES.items() if records != ("near_ties",)]  # not measured here
    assert not [note for note in report.notes if note.startswith(tuple(f"table {name} left out" for name in tables))]
    names = {path.name for path in report.files}
    for name in tables:
        assert {f"{name}.{suffix}" for suffix in ("md", "tex", "csv")} <= names
        lines = [line for line in (tmp_path / "tables" / f"{name}.md").read_text().splitlines() if line.startswith("|")]
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
