"""Tables and figure of how cost grows: functions of made-up records, and a fit that finds what it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.bench import fresh, overhead
from experiments.report import scaling
from experiments.report.table import write_made

HARDWARE = {"accelerator": "none", "processor": "P", "cores": 2, "threads": 2}
BASE = {"positions": 64, "horizon": 4, "rank": 8, "vocab": 1024, "width": 32}


def cells(pending: float = 0.5) -> list[dict[str, Any]]:
    sizes = [BASE] + [BASE | {name: BASE[name] // share} for name in BASE for share in (2, 4)]
    found = []
    for size in sizes:
        logits = size["positions"] * size["horizon"] * size["rank"] * size["vocab"]
        seconds = 6 * logits * size["width"] / 1e9 + logits / 1e7 + pending
        found.append(size | {"seconds": seconds, "peak_bytes": 2**20})
    return found


def records() -> dict[str, dict[str, Any]]:
    side = {"seconds": 1.0, "peak_bytes": 2**30, "errors": {"table": 0.01, "hidden": 0.02}}
    dimensions = BASE | {"dtype": "bfloat16", "chunk_mib": 64}
    recipes = [
        {
            "recipe": recipe,
            "flops": {"trunk": 1.0, "window": cost},
            "by_seed": (by_seed := [{"tokens_per_pass": rate, "joint_nll": 2.0} for rate in rates]),
        }
        | {key: fresh.spread([one[key] for one in by_seed], "mean") for key in by_seed[0]}
        for recipe, cost, rates in (
            ("whole", 9.0, (2.0, 2.0)),
            ("1/4", 3.0, (1.96, 1.98)),
            ("tied, 1/16", 1.0, (1.4, 1.6)),
        )
    ]
    timed = [
        {
            "size": size,
            "recipe": recipe,
            "peak_bytes": 2**20,
            "planned_bytes": 2**20,
            "bound": 1.0,
            "step_ms": {"median": ms, "low": ms - 10, "high": ms + 10},
            "overhead": {"median": ms / 100 - 1, "low": ms / 100 - 1.1, "high": ms / 100 - 0.9},
        }
        for size in ("tiny", "base")
        for recipe, ms in (("whole", 300.0), ("1/4", 150.0))
    ]
    common = {
        "hardware": HARDWARE,
        "dimensions": dimensions,
        "settings": {"rank": 8, "horizon": 4, "vocab": 9, "steps": 5, "repeats": 3, "seeds": 2}
        | {"size": "small", "rows": 4, "context": 128},
    }
    repeats = [{"seconds": seconds, "step_ms": 1000 * seconds} for seconds in (1.0, 2.0, 3.0)]
    halved = [{key: value / 2 for key, value in run.items()} for run in repeats]
    tokenised = {"seconds": 2.0, "bytes": 24e6, "bytes_per_second": 12e6}
    stepped = {"step_ms": 2000.0, "tokens_per_second": 256.0, "peak_memory_bytes": 2**30}
    return {
        "joint-loss-cpu": common
        | {"sides": {"bounded": side | {"repeats": repeats}, "dense": side | {"repeats": repeats}}}
        | {f"{what}_ratio": {"measured": 0.1, "target": 1.1, "holds": True} for what in ("memory", "time")},
        "processes": common
        | {
            "cells": {
                "compare": tokenised | {"repeats": repeats},
                "tokenise bpe:300 1": tokenised | {"repeats": repeats},
                "tokenise bpe:300 threads": tokenised | {"repeats": halved},
                "train ddp 1": stepped | {"repeats": repeats},
                "train ddp 2": stepped | {"repeats": halved},
                "train fsdp 2": stepped | {"repeats": repeats},
            }
        },
        "joint-loss-large-gpu": common
        | {
            "sides": {"bounded": side | {"chunks": {"8": side}}, "dense": {"failed": "out of memory"}},
            "floor_seconds": 0.6,
        }
        | {"dense_at_few_positions": {"positions": 2} | side},
        "joint-loss-growth-gpu": common | {"cells": cells()},
        "joint-loss-growth-cpu": common | {"cells": cells()},
        "training_overhead": common | {"cells": timed},
        "training_recipes": common | {"cells": recipes} | overhead.choose(recipes),
    }


def test_the_fit_finds_what_the_times_were_made_from() -> None:
    found = scaling.fit(cells())
    assert (found.flops, found.logits, found.pending) == pytest.approx((1e9, 1e7, 0.5))
    assert found.deviation < 1e-6
    without = scaling.fit(cells(pending=-0.001))
    assert without.pending == 0 and 0 < without.deviation < 0.1, "no negative time"


def test_the_recipe_of_fewest_flops_that_keeps_the_gain_is_chosen() -> None:
    made = records()["training_recipes"]
    assert made["chosen"] == "1/4", "tied, 1/16 keeps half of it"
    assert [round(cell["kept"]["mean"], 2) for cell in made["cells"]] == [1.0, 0.97, 0.5]
    assert (made["cells"][1]["kept"]["low"], made["cells"][1]["kept"]["high"]) == pytest.approx((0.96, 0.98))


@pytest.mark.parametrize(
    ("rates", "cheap", "chosen", "decided"),
    [
        ([1.96, 1.98], [1.4, 1.6], "1/4", True),
        ([1.94, 1.98], [1.4, 1.6], "1/4", False),  # a seed keeps less
        ([1.96, 1.98], [1.4, 1.96], "1/4", False),  # a seed of a cheaper one keeps enough
        ([1.97], [1.5], "1/4", False),  # one seed says nothing of others
    ],
)
def test_a_choice_says_whether_every_seed_makes_it(
    rates: list[float], cheap: list[float], chosen: str, decided: bool
) -> None:
    cells = [
        {"recipe": recipe, "flops": {"trunk": cost}, "by_seed": [{"tokens_per_pass": rate} for rate in given]}
        for recipe, cost, given in (("whole", 9.0, [2.0] * len(rates)), ("1/4", 3.0, rates), ("tied", 1.0, cheap))
    ]
    found = overhead.choose(cells)
    assert (found["chosen"], found["decided"]) == (chosen, decided)


def test_tables_and_figure(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, record in records().items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    files, notes = write_made(scaling.tables(tmp_path), tmp_path / "tables")
    assert not notes and len(files) == 3 * len(scaling.TABLES)
    large = (tmp_path / "tables/loss_large.md").read_text()
    assert "out of memory" in large and "0.0200" in large and "dense, 2 positions" in large
    growth = (tmp_path / "tables/loss_growth_cpu.md").read_text()
    assert "16 / 32 / 64" in growth and "1e+09 FLOP/s" in growth
    overhead = (tmp_path / "tables/overhead.md").read_text()
    assert "+200% [+190%, +210%]" in overhead and "97% [96%, 98%]" in overhead and "300 [290, 310]" in overhead
    assert ": 1/4 (by every seed)." in overhead and "1.97 [1.96, 1.98]" in overhead
    dense = (tmp_path / "tables/loss_dense.md").read_text()
    assert "| bounded | 2.00 [1.00, 3.00] | 1,024 |" in dense and "0.100 of the memory (target: at most 1.1)" in dense
    processes = (tmp_path / "tables/processes.md").read_text()
    assert "| tokenise bpe:300 | threads | 1.0 [0.5, 1.5] s | 12.00 MB/s | 2.00 [2.00, 2.00] | - |" in processes
    assert "| train ddp | 2 | 1,000.0 [500.0, 1,500.0] ms | 256 tokens/s | 2.00 [2.00, 2.00] | 1,024 |" in processes
    assert "| train fsdp | 2 | 2,000.0 [1,000.0, 3,000.0] ms | 256 tokens/s | - | 1,024 |" in processes
    assert "| compare | 1 |" in processes and "tokenise 24.0 MB" in processes
    drawn, shown = scaling.draw(tmp_path, tmp_path)
    assert shown.picture is not None and {path.suffix for path in drawn} == {".md", ".pdf", ".png"}


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    (tmp_path / "loss_large.md").write_text("old")
    files, notes = write_made(scaling.tables(tmp_path), tmp_path)
    assert not files and len(notes) == len(scaling.TABLES) and not (tmp_path / "loss_large.md").exists()
    assert "python experiments/bench/loss.py --large makes it" in notes[0]
    assert "bench/overhead.py time" in scaling.draw(tmp_path, tmp_path)[1].caption
