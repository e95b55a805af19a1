"""What the report draws of the decoding benchmark's records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.report import decoding, render
from tests.made_records import ORIGIN


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
