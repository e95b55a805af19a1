"""The benchmark of ways to draft: its baselines' laws, its records from a tiny run in-process, and what is drawn from them."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.baselines.hydra import HydraHeads, HydraModel, Sequential
from cpdlm.config import Config, resolve
from cpdlm.decoding import Sampling, decode, decode_batch
from cpdlm.decoding.drafters import Uniforms
from cpdlm.decoding.lookup import Lookup, decode_with_lookup
from cpdlm.model.language_model import build_language_model
from cpdlm.training import checkpoints
from experiments.bench import decode as bench_decode
from experiments.measure.agreement import agreement
from experiments.report import decoding, render
from tests import oracle
from tests.made_records import ORIGIN
from tests.toy import FILTERS, ToyModel, truth

SAMPLES, LENGTH, PROMPT = 3000, 3, (1, 0)
SETTINGS = ("unfiltered", "all")


# --- prompt lookup -----------------------------------------------------------------------------------------------


def test_lookup_copies_what_followed_the_longest_match_last_seen() -> None:
    lookup = Lookup([5, 1, 2, 7, 9, 2, 8, 1, 2], longest=3)
    assert lookup.draft(3) == [7, 9, 2]  # behind "1 2", not behind the later "2"
    assert Lookup([5, 1, 2, 7, 9, 2, 8, 1, 2], longest=1).draft(2) == [8, 1]
    lookup.extend([8])
    assert lookup.draft(2) == [1, 2]
    assert Lookup([3, 4, 3, 4]).draft(5) == [3, 4, 3, 4, 3]  # goes on with its own copy
    assert Lookup([1, 2, 3]).draft(2) == [3, 3]  # never seen before


def test_lookup_writes_the_greedy_text_in_fewer_forwards() -> None:
    model = ToyModel("common", context=12, vocab_size=2)
    prompt = torch.tensor([0, 1, 0])
    plain = decode(model, prompt, 9, Sampling(0.0), draft="none")
    looked = decode_with_lookup(model, prompt, 9, Sampling(0.0), horizon=4)
    assert looked.tokens == plain.tokens
    assert looked.forwards < plain.forwards


@pytest.mark.parametrize("setting", SETTINGS)
def test_lookup_writes_as_the_target(setting: str) -> None:
    model, sampling = ToyModel("common"), FILTERS[setting]
    generator = torch.Generator().manual_seed(3)
    counts: Counter[oracle.History] = Counter()
    for _ in range(SAMPLES // 3):
        done = decode_with_lookup(model, torch.tensor(PROMPT), LENGTH, sampling, generator, horizon=3)
        counts[tuple(done.tokens)] += 1
    assert oracle.p_value(counts, truth(model, sampling, PROMPT, LENGTH)) > oracle.FALSE_ALARM


# --- sequential heads --------------------------------------------------------------------------------------------


@dataclass
class TableDistribution:
    """Conditionals of a toy: the rows of a table, by the history with pending token and drafts."""

    model: SequentialToy
    code_B: Tensor
    pending_B: Tensor

    def next(self, drafts_BJ: Tensor) -> Tensor:
        code_B = self.model.extend(self.code_B, self.pending_B)
        for draft_B in drafts_BJ.unbind(dim=1):
            code_B = self.model.extend(code_B, draft_B)
        return self.model.table[code_B]


class SequentialToy(ToyModel):
    def __init__(self) -> None:
        super().__init__("common", horizon=3)
        generator = torch.Generator().manual_seed(4)
        scores = torch.randn(self.codes, self.vocab_size, generator=generator, dtype=torch.float64) * 1.5
        self.table = scores.log_softmax(dim=-1)

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Any:
        return TableDistribution(self, hidden_BD[:, 0].long(), pending_B)


@pytest.mark.parametrize("setting", SETTINGS)
def test_sequential_drafts_write_as_the_target(setting: str) -> None:
    model, sampling = SequentialToy(), FILTERS[setting]
    generators = [torch.Generator().manual_seed(row) for row in range(SAMPLES)]
    done = decode_batch(model, [torch.tensor(PROMPT)] * SAMPLES, LENGTH, sampling, generators, draft=Sequential)
    counts = Counter(tuple(each.tokens) for each in done)
    assert oracle.p_value(counts, truth(model, sampling, PROMPT, LENGTH)) > oracle.FALSE_ALARM
    greedy = [decode(model, torch.tensor(PROMPT), 3, Sampling(0.0), draft=each).tokens for each in (Sequential, "none")]
    assert greedy[0] == greedy[1]


def hydra(vocab_size: int = 5) -> HydraModel:
    torch.manual_seed(2)
    base = build_language_model(resolve(settings(horizon=1, rank=1, balance="none")), vocab_size).eval()
    heads = HydraHeads(base.trunk.width, 3, 16)
    for weight in heads.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return HydraModel(base, heads.eval())


@torch.inference_mode()
def test_sequential_heads_draw_from_the_conditionals_that_they_report() -> None:
    model, sampling = hydra(), Sampling(temperature=0.8)
    hidden_D = model.hidden(torch.tensor([[1, 2, 0]]))[0, -1]
    distribution = model.draft_joint(hidden_D.expand(SAMPLES, -1), torch.full((SAMPLES,), 3))
    uniforms = Uniforms([torch.Generator().manual_seed(row) for row in range(SAMPLES)], hidden_D.device)
    proposal = Sequential(sampling, uniforms).draft(distribution, 2)

    def in_vocabulary(*seen: int) -> list[float]:  # by hand: [h, E x, ..] through one head, then the unembedding
        head = len(seen) - 1
        inputs = torch.cat([hidden_D, *(model.base.trunk.embedding[token] for token in seen)])
        inner = model.heads.into[head](inputs)
        moved = model.heads.out[head](inner * torch.sigmoid(inner))
        scores = model.base.unembedding.weight.double() @ (hidden_D + moved).double()
        return oracle.filter_law(scores.softmax(dim=-1).tolist(), 0.8)

    first = in_vocabulary(3)
    windows = {(a, b): first[a] * p for a in range(5) for b, p in enumerate(in_vocabulary(3, a))}
    assert oracle.p_value(Counter(tuple(row) for row in proposal.tokens_BK.tolist()), windows) > oracle.FALSE_ALARM
    for row in range(20):
        a = int(proposal.tokens_BK[row, 0])
        assert proposal.distributions[row].tolist() == [
            pytest.approx(first, abs=1e-5),
            pytest.approx(in_vocabulary(3, a), abs=1e-5),
        ]


@torch.inference_mode()
def test_the_loss_of_sequential_heads_is_their_chain_rule() -> None:
    model = hydra()
    hidden_PD, future_PN = torch.randn(4, model.base.trunk.width), torch.randint(5, (4, 3))
    first = model.log_distribution(hidden_PD, future_PN[:, :1]).gather(1, future_PN[:, 1:2])[:, 0]
    second = model.log_distribution(hidden_PD, future_PN[:, :2]).gather(1, future_PN[:, 2:])[:, 0]
    nll_P = model.nll(hidden_PD, future_PN, torch.tensor([3, 2, 1, 3]))
    expected = -torch.stack([(first + second)[0], first[1], first[1] * 0, (first + second)[3]])
    assert torch.allclose(nll_P, expected, atol=1e-6)


# --- agreement ---------------------------------------------------------------------------------------------------


def test_agreement_of_a_draft_that_is_the_target() -> None:
    """A toy whose draft of x_{t+2} is exact: its argmax is always right, its overlap is 1."""
    model: Any = ToyModel("anchored", rank=1, horizon=2, context=9)
    for code in range(model.codes):
        model.factors[code, 0, 0] = model.own[code]
    written = decode(model, torch.tensor([1]), 7, Sampling(0.0), draft="none").tokens
    shares = agreement(model, torch.tensor([[1, *written]]), 1, 4)
    assert shares["positions"] == 6
    assert shares["chain"]["right"] == shares["window"]["kept"] == shares["told"] == [1.0]
    assert shares["overlap"] == [pytest.approx(1.0)]
    assert shares["changed"] == {"reached": 0, "differs": 0, "now right": 0, "was right": 0}


# --- the benchmark -----------------------------------------------------------------------------------------------

LETTERS = "abcdefgh ().=\n"


def settings(**more: Any) -> dict[str, Any]:
    return {
        "size": "micro",
        "data.context": 48,
        "decode.prompt_tokens": 8,
        "decode.new_tokens": 8,
        "horizon": 3,
        "optim.steps": 2,
        "optim.warmup": 1,
    } | more


def save(folder: Path, config: Config) -> None:
    trunk = checkpoints.load_model(Path(config.model.trunk)) if config.model.trunk else None
    torch.manual_seed(config.rank + 10 * config.seed)
    model = build_language_model(config, 257, trunk)
    checkpoints.open_run(folder, config)
    checkpoints.save_model(folder, model, model.state_dict(), 257)
    (folder / checkpoints.TRAINED).write_text('{"seconds": 2.5}')


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of runs, folder of records) of one tiny benchmark."""
    root = tmp_path_factory.mktemp("bench")
    for index in range(60):
        path = root / "corpus" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(random.Random(index).choices(LETTERS, k=300)))
    # The same files under two names are two corpora.
    (root / "other").symlink_to(root / "corpus")
    runs = ["--runs", str(root / "runs")]
    plain = {"horizon": 1, "rank": 1, "balance": "none"}
    for corpus in ("corpus", "other"):
        common = settings(
            corpus=str(root / corpus), **{"data.cache": str(root / "cache"), "output": str(root / "runs")}
        )
        trunk = root / "runs" / f"trunk-{corpus}"
        save(trunk, resolve(common | plain))
        save(root / f"assistant-{corpus}", resolve(common | plain))
        for rank, anchor, seed in ((1, "none", 0), (1, "none", 1), (2, "none", 0), (2, "none", 1), (2, "token", 0)):
            config = resolve(common | {"rank": rank, "anchor": anchor, "model.trunk": str(trunk), "seed": seed})
            save(root / "runs" / config.run_name, config)
    assert bench_decode.main([*runs, "--train-hydra", str(root / "hydra")]) == 0
    small = (
        "--prompts 3 --timed-prompts 2 --prompt-tokens 8 --new-tokens 6 --nodes 3 --draws 1 --acceptance-draws 2 --baseline-draws 2 "
        "--warmups 0 --lookup-horizons 3"
    )
    assistants = [str(root / f"assistant-{corpus}") for corpus in ("corpus", "other")]
    words = [*runs, *small.split(), "--hydra", str(root / "hydra"), "--assistant", *assistants]
    assert bench_decode.main([*words, "--output", str(root / "results" / "benchmarks")]) == 0
    return root / "runs", root / "results"


def record(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "benchmarks" / name).read_text())
    return found


@pytest.mark.parametrize("name", ["decode_acceptance", "decode_baselines", "decode_strategies"])
def test_records_say_where_they_come_from(name: str, measured: tuple[Path, Path]) -> None:
    found = record(measured[1], f"{name}.json")
    assert found["benchmark"] == name.replace("decode_", "decoding ") and "schema" not in found
    assert found["command"].startswith("python experiments/bench/decode.py --runs ")
    assert {"commit", "dirty", "hardware", "versions", "started"} <= set(found)
    assert found["settings"]["prompts"] == 3 and found["settings"]["seeds"] == [0, 1]
    assert [target["trunk"] for target in found["targets"]] == ["trunk-corpus", "trunk-other"]
    assert found["targets"][0]["horizon"] == 3 and found["targets"][0]["steps"] == 2


LAWS = [("untied", 1, [0, 1]), ("untied", 2, [0, 1]), ("anchored", 2, [0])]


def test_every_strategy_is_measured_on_both_splits(measured: tuple[Path, Path]) -> None:
    found = record(measured[1], "decode_strategies.json")
    assert [(cell["law"], cell["rank"], cell["seeds"]) for cell in found["cells"]] == LAWS * 2
    assert len({cell["corpus"] for cell in found["cells"]}) == 2
    for cell in found["cells"]:
        for mode, names in bench_decode.DRAFTERS.items():
            entry = cell["modes"][mode]
            if cell["rank"] == 1:
                names = tuple(name for name in names if name not in ("window", "path"))
            assert set(entry) == {*names, "chosen"} and entry["chosen"] in names
            fastest = max(names, key=lambda name: entry[name]["validation"]["speedup"]["mean"])
            assert entry["chosen"] == fastest
            for name in names:
                for split in ("validation", "test"):
                    one = entry[name][split]
                    assert one["tokens"] == sum(one["per_prompt"]["tokens"]) == 12 * len(cell["seeds"])
                    assert [row["depth"] for row in one["acceptance_by_depth"]] == [2, 3]
                    product = one["conversion"]["mean"] * one["tokens_per_pass"]["mean"]
                    assert product == pytest.approx(one["speedup"]["mean"])
                    assert len(one["by_seed"]) == len(cell["seeds"])
            assert entry["chain"]["test"]["tokens_per_pass_over_chain"] == {"mean": 0, "low": 0, "high": 0}
    assert set(found["suggested"]) == {"greedy", "sampling"}


def test_acceptance_is_over_seeds_draws_and_prompts(measured: tuple[Path, Path]) -> None:
    found = record(measured[1], "decode_acceptance.json")
    for row in found["strategies"]:
        draws = 1 if row["mode"] == "greedy" else 2
        assert row["tokens"] == 3 * 6 * draws * len(row["seeds"])
        rate = row["tokens_per_pass"]
        assert rate["mean"] == pytest.approx(row["tokens"] / row["passes"])
        assert rate["low"] <= rate["mean"] <= rate["high"] and len(row["by_seed"]) == len(row["seeds"])
        others = {
            "tokens_per_pass_over_chain": (row["rank"], ("chain",)),
            "tokens_per_pass_over_rank1": (1, (row["strategy"], "chain")),
        }
        for key, (rank, strategies) in others.items():
            kin = {
                each["strategy"]: each
                for each in found["strategies"]
                if each["rank"] == rank and all(each[name] == row[name] for name in ("corpus", "mode", "law", "seeds"))
            }
            other = next((kin[name] for name in strategies if name in kin), row)
            assert (key in row) == (other is not row), "nothing is held against itself, nor against what is not there"
            if key in row:
                assert row[key]["mean"] == pytest.approx(rate["mean"] - other["tokens_per_pass"]["mean"])
                assert row[key]["low"] <= row[key]["mean"] <= row[key]["high"]
    per_corpus = sum(2 if rank == 1 else 4 for _, rank, _ in LAWS) + sum(3 if rank == 1 else 5 for _, rank, _ in LAWS)
    assert len(found["strategies"]) == 2 * per_corpus
    settings_seen = {(row["temperature"], row["top_p"]) for row in found["filters"]}
    assert settings_seen == {(0.0, 1.0)} | {(t, p) for t in (0.5, 0.8, 1.0, 1.2) for p in (0.8, 0.95, 1.0)}
    for cell in found["agreement"]:
        shares = cell["modes"]["greedy"]
        assert shares["positions"] == 3 * (6 - 2) * len(cell["seeds"])
        assert shares["changed"]["differs"] <= shares["changed"]["reached"]
        assert 0 <= shares["overlap"][0] <= 1
        if cell["rank"] == 1:  # nothing to condition on
            assert shares["chain"] == shares["marginals"] and shares["changed"]["differs"] == 0


def test_every_baseline_is_measured(measured: tuple[Path, Path]) -> None:
    entries = record(measured[1], "decode_baselines.json")["methods"]
    corpus = entries[0]["corpus"]
    methods = {entry["name"]: entry for entry in entries if entry["corpus"] == corpus}
    assert [entry["name"] for entry in entries if entry["corpus"] != corpus].count("plain") == 1
    assert {entry["kind"] for entry in methods.values()} == {
        "plain",
        "generate",
        "lookup",
        "assistant",
        "hydra",
        "heads",
    }
    assert {"rank 1, untied", "rank 2, untied", "rank 2, anchored"} <= set(methods)
    for entry in methods.values():
        seeds = 2 if entry["kind"] == "hydra" else len(entry.get("seeds", [0]))
        for mode in ("greedy", "sampling"):
            one = entry["modes"][mode]
            assert one["tokens"] == 24 * seeds and one["passes"] <= 24 * seeds
            assert one["tokens_per_pass"]["mean"] == pytest.approx(24 * seeds / one["passes"])
            assert one["working_memory_bytes"] >= one["later_memory_bytes"] > one["between_memory_bytes"] > 0
    assert methods["plain"]["modes"]["greedy"]["passes"] == methods["generate"]["modes"]["greedy"]["passes"] == 24
    # An assistant that is the target's equal is always right under greedy.
    assistant = next(entry for entry in methods.values() if entry["kind"] == "assistant")
    assert assistant["modes"]["greedy"]["passes"] < 24 and assistant["parameters_added"] > 0
    heads = next(entry for entry in methods.values() if entry["kind"] == "hydra")
    assert heads["training_seconds"] > 0 and heads["parameters_added"] > 0


def test_cells_that_do_not_go_together_are_refused(measured: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no heads of seed 7"):
        bench_decode.load_heads(measured[0], [], [7], [])
    with pytest.raises(SystemExit, match="on a frozen trunk for corpus=poems; train some"):
        bench_decode.load_heads(measured[0], [], [0], ["poems"])
    with pytest.raises(SystemExit, match="not heads of one horizon"):
        bench_decode.load_heads(measured[0], ["trunk-corpus"], [0], [])
    with pytest.raises(checkpoints.RunError, match="make them with --train-hydra"):
        trunk = checkpoints.load_model(measured[0] / "trunk-corpus")
        bench_decode.load_hydra(tmp_path, trunk)


# --- the report --------------------------------------------------------------------------------------------------


def made_baselines() -> dict[str, Any]:
    def mode(rate: float, speed: float) -> dict[str, Any]:
        return {
            "tokens_per_pass": {"mean": rate, "low": rate - 0.1, "high": rate + 0.1},
            "tokens_per_second": 500 * speed,
            "speedup": {"mean": speed, "low": speed * 0.95, "high": speed * 1.05},
            "conversion": {"mean": speed / rate, "low": 0.9 * speed / rate, "high": 1.05 * speed / rate},
            "speedup_over_generate": {"mean": speed * 1.1, "low": speed, "high": speed * 1.2},
            "working_memory_bytes": 2_000_000,
        }

    shapes = [
        ("plain", "plain", None, 1.0, 1.0),
        ("generate", "generate", None, 1.0, 0.9),
        ("prompt lookup, n=4", "lookup", None, 1.4, 1.2),
        ("assisted, micro draft model", "assistant", None, 2.5, 0.8),
        ("sequential heads, n=4", "hydra", None, 2.2, 1.4),
        ("rank 1, untied", "heads", "untied", 1.7, 1.2),
        ("rank 8, untied", "heads", "untied", 2.0, 1.2),
        ("rank 8, untied, chosen", "heads", "untied", 2.4, 1.3),
        ("rank 8, anchored", "heads", "anchored", 2.1, 1.3),
    ]
    return ORIGIN | {
        "benchmark": "decoding baselines",
        "command": "python experiments/bench/decode.py",
        "settings": {"timed_prompts": 16, "new_tokens": 64},
        "targets": [
            {
                "trunk": f"{corpus}-small",
                "corpus": corpus,
                "size": "small",
                "horizon": 4,
                "parameters": 3_200_000,
                "steps": 600,
                "head_steps": 200,
            }
            for corpus in ("code", "text")
        ],
        "methods": [
            {
                "corpus": corpus,
                "name": name,
                "kind": kind,
                "law": distribution,
                "horizon": 4,
                "strategy": {"greedy": "chain", "sampling": "block"},
                "parameters_added": 100_000,
                "weights_mib": 0.4,
                "training_seconds": 30.0,
                "modes": {"greedy": mode(rate, speed), "sampling": mode(rate - 0.02, speed)},
            }
            for corpus in ("code", "text")
            for name, kind, distribution, rate, speed in shapes
        ],
    }


def made_acceptance() -> dict[str, Any]:
    """As recorded before differences were: rank 8 gains a tenth on every prompt, its tree a tenth more."""
    forwards = [40, 50, 60, 80, 90]
    rates = {(1, "chain"): 1.0, (1, "tree"): 1.05, (8, "chain"): 1.1, (8, "tree"): 1.21, (8, "window"): 0.9}
    rows = [
        {
            "mode": "greedy",
            "corpus": "code",
            "law": "untied",
            "rank": rank,
            "seeds": [0, 1],
            "strategy": drafter,
            "tokens_per_pass": {"mean": 2.0 * rate, "low": 1.0, "high": 4.0},
            "per_prompt": {"tokens": [128] * 5, "passes": [each / rate for each in forwards]},
        }
        for (rank, drafter), rate in rates.items()
    ]
    return made_baselines() | {
        "benchmark": "decoding acceptance",
        "strategies": rows,
        "settings": {"prompts": 5, "new_tokens": 64},
    }


def test_differences_of_acceptance_are_paired_over_prompts() -> None:
    table = decoding.acceptance_table(made_acceptance())
    shown = {(row[3], row[5]): row[6:] for row in table.rows}
    assert shown["1", "chain"] == ("2.000 [1.000, 4.000]", "-", "-")
    assert shown["8", "tree"][1].startswith("+0.220 [")
    assert shown["8", "tree"][2].startswith("+0.320 ["), "against the tree of rank 1"
    assert shown["8", "window"][2].startswith("-0.200 ["), "against the chain of rank 1, which is its window"
    mean, low, high = (float(word.strip("[],")) for word in shown["8", "chain"][2].split())
    assert 0 < low < mean < high < 0.36, "the prompts' own spread, 1.4 to 3.2 tokens per pass, cancels"
    assert "paired over the same prompts, each with all its draws and seeds" in table.caption


def test_differences_of_acceptance_come_from_the_record_where_it_has_them() -> None:
    record = made_acceptance()
    record["strategies"][3]["tokens_per_pass_over_chain"] = {"mean": 0.22, "low": -0.01, "high": 0.5}
    table = decoding.acceptance_table(record)
    assert [row[7] for row in table.rows] == ["-", "-", "-", "+0.220 [-0.010, +0.500]", "-"]
    assert "paired over the same seeds, draws and prompts" in table.caption


def test_memory_is_whole_later_and_between_where_the_record_has_them() -> None:
    record = made_baselines()
    record["methods"][0]["modes"]["greedy"] |= {"later_memory_bytes": 512_000, "between_memory_bytes": 2048}
    table = decoding.methods_cost_table(record)
    assert [row[-3:] for row in table.rows[:2]] == [("1,953", "500", "2"), ("1,953", "-", "-")]


def test_tables_and_figure_of_a_measured_benchmark(measured: tuple[Path, Path], tmp_path: Path) -> None:
    report = render(measured[1], tmp_path)
    mine = ("figure decoding", *(f"table {name} left out" for name in decoding.TABLES))
    assert not [note for note in report.notes if note.startswith(mine)]
    names = {path.name for path in report.files}
    assert {"decoding.pdf", "decoding.png"} <= names
    for name in decoding.TABLES:
        assert {f"{name}.{suffix}" for suffix in ("md", "tex", "csv")} <= names
        lines = [line for line in (tmp_path / "tables" / f"{name}.md").read_text().splitlines() if line.startswith("|")]
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1


def test_the_figure_is_the_same_every_time_and_names_the_machine(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "decode_baselines.json").write_text(json.dumps(made_baselines()))
    drawn = [decoding.draw(tmp_path, tmp_path / place)[0] for place in ("one", "two")]
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert b"CreationDate" not in one.read_bytes() and str(tmp_path).encode() not in one.read_bytes()
    assert "Made-up CPU, 2 cores" in (tmp_path / "one" / "decoding.md").read_text()


@pytest.mark.parametrize(
    "content", [None, "{", '{"benchmark": "something else"}', '{"benchmark": "decoding baselines"}']
)
def test_without_a_record_table_and_figure_are_left_out_with_a_note(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "benchmarks"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "decode_baselines.json").write_text(content)
    (tmp_path / "decoding.png").write_bytes(b"stale")
    report = render(tmp_path / "results", tmp_path)
    assert not (tmp_path / "decoding.png").exists()
    for what in ("table decoding", "figure decoding"):
        assert any(note.startswith(f"{what} left out: ") for note in report.notes)
