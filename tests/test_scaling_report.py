"""Tables and figure of how cost grows: functions of made-up records, and a fit that finds what it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpdlm.report import scaling
from cpdlm.report.tables import write_made
from experiments import bench_overhead

HARDWARE = {"accelerator": "none", "processor": "P", "cores": 2, "threads": 2}
BASE = {"positions": 64, "horizon": 4, "rank": 8, "vocab": 1024, "width": 32}


def cells(fixed: float = 0.5) -> list[dict[str, Any]]:
    sizes = [BASE] + [BASE | {name: BASE[name] // share} for name in BASE for share in (2, 4)]
    found = []
    for size in sizes:
        logits = size["positions"] * size["horizon"] * size["rank"] * size["vocab"]
        seconds = 6 * logits * size["width"] / 1e9 + logits / 1e7 + fixed
        found.append(size | {"seconds": seconds, "peak_bytes": 2**20})
    return found


def records() -> dict[str, dict[str, Any]]:
    side = {"seconds": 1.0, "peak_bytes": 2**30, "errors": {"table": 0.01, "hidden": 0.02}}
    dimensions = BASE | {"dtype": "bfloat16", "chunk_mib": 64}
    recipes = [
        {
            "recipe": recipe,
            "joint_nll": {"mean": 2.0},
            "flops": {"trunk": 1.0, "window": cost},
            "tokens_per_pass": rate,
        }
        for recipe, cost, rate in (
            ("whole", 9.0, 2.0),
            ("1/4", 3.0, 1.97),
            ("tied, 1/16", 1.0, 1.5),
        )
    ]
    timed = [
        {"size": size, "recipe": recipe, "step_ms": ms, "peak_bytes": 2**20, "planned_bytes": 2**20, "overhead": ms / 100 - 1, "bound": 1.0}
        for size in ("tiny", "base")
        for recipe, ms in (("whole", 300.0), ("1/4", 150.0))
    ]  # fmt: skip
    common = {
        "hardware": HARDWARE,
        "dimensions": dimensions,
        "settings": {"rank": 8, "horizon": 4, "vocab": 9, "steps": 5},
    }
    return {
        "joint-loss-large-gpu": common
        | {"sides": {"bounded": side | {"chunks": {"8": side}}, "dense": {"failed": "out of memory"}}, "floor_seconds": 0.6}
        | {"dense_at_few_positions": {"positions": 2} | side},
        "joint-loss-growth-gpu": common | {"cells": cells()},
        "joint-loss-growth-cpu": common | {"cells": cells()},
        "training_overhead": common | {"cells": timed},
        "training_recipes": common | {"cells": recipes} | bench_overhead.choose(recipes),
    }  # fmt: skip


def test_the_fit_finds_what_the_times_were_made_from() -> None:
    found = scaling.fit(cells())
    assert (found.flops, found.logits, found.fixed) == pytest.approx((1e9, 1e7, 0.5))
    assert found.deviation < 1e-6
    without = scaling.fit(cells(fixed=-0.001))
    assert without.fixed == 0 and 0 < without.deviation < 0.1, "no negative time"


def test_the_recipe_of_fewest_flops_that_keeps_the_gain_is_chosen() -> None:
    made = records()["training_recipes"]
    assert made["chosen"] == "1/4", "tied, 1/16 keeps half of it"
    assert [round(cell["kept"], 2) for cell in made["cells"]] == [1.0, 0.97, 0.5]


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
    assert "+200%" in overhead and "97%" in overhead and ": 1/4." in overhead
    drawn, shown = scaling.draw(tmp_path, tmp_path)
    assert shown.picture is not None and {path.suffix for path in drawn} == {".md", ".pdf", ".png"}


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    (tmp_path / "loss_large.md").write_text("old")
    files, notes = write_made(scaling.tables(tmp_path), tmp_path)
    assert not files and len(notes) == len(scaling.TABLES) and not (tmp_path / "loss_large.md").exists()
    assert "python experiments/bench_loss.py --large makes it" in notes[0]
    assert "bench_overhead.py time" in scaling.draw(tmp_path, tmp_path)[1].caption
