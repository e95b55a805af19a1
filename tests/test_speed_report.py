"""The table of speeds from made-up records: of one machine or several, of today's shape or without what came later."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.report import render, speed
from experiments.report.table import write_made
from tests.made_records import ORIGIN


def near(value: float) -> dict[str, float]:
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


def cell(rank: int, shortlist: int) -> dict[str, Any]:
    values = {
        "t1_ms": 10.0,
        "tn_ms": 14.0,
        "draft_ms": 1.5,
        "floor_ms": 15.5,
        "pass_ms": 15.0 + rank,
        "pass_over_floor": 1.03,
        "speedup": 1.5,
        "conversion": 0.625,
        "limit": 0.714,
        "share_of_limit": 0.875,
        "token_ms": 6.25,
        "tokens_per_second": 1160.0,
    }
    shape = {"rank": rank, "horizon": 4, "shortlist": shortlist, "tokens_per_pass": 2.4, "ms_by_part": None}
    return shape | {key: near(value) for key, value in values.items()}


def group(batch: int, **more: Any) -> dict[str, Any]:
    rate = {"token_ms": near(10.0), "tokens_per_second": near(100.0 * batch)}
    found = {
        "dtype": "float32",
        "mode": "greedy",
        "batch": batch,
        "new_tokens": 64,
        "plain": rate | {"ms_by_part": None},
        "cells": [cell(1, 0), cell(8, 2048)],
    }
    if batch == 1:
        found |= {"generate": rate, "plain_over_generate": near(1.25)}
    return found | more


def record(groups: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    targets = [
        {"what": what, "cell": "c", "measured": 1.0, "target": target, "holds": holds}
        for what, target, holds in (
            ("pass over floor, at most", 1.05, True),
            ("pass over floor, at most", 1.05, False),
            ("plain over generate, at least", 0.95, True),
        )
    ]
    settings = {
        "size": "56m",
        "vocab": 8192,
        "map_rank": 64,
        "prompt_tokens": 8,
        "new_tokens": 64,
        "batch_tokens": 32,
        "repeats": 5,
        "trunk_parameters": 56_324_160,
    }
    shape = {
        "benchmark": "decoding speed, forced acceptance",
        "settings": settings,
        "groups": groups,
        "targets": targets,
    }
    return ORIGIN | shape | more


def save(root: Path, **records: Any) -> None:
    (root / "benchmarks").mkdir()
    for name, content in records.items():
        (root / "benchmarks" / f"{name}.json").write_text(json.dumps(content))


def drawn(root: Path) -> list[dict[str, str]]:
    write_made(speed.tables(root), root / "tables")
    return list(csv.DictReader((root / "tables" / "speed.csv").open()))


def test_a_record_of_old_without_captured_forwards(tmp_path: Path) -> None:
    save(tmp_path, decode_speed=record([group(1), group(16)]))
    rows = drawn(tmp_path)
    assert list(rows[0])[:6] == ["dtype", "mode", "batch", "rank", "n", "draft vocabulary"], (
        "no column that says nothing"
    )
    assert [(row["batch"], row["rank"]) for row in rows] == [
        ("1", "autoregressive"),
        ("1", "generate"),
        ("1", "1"),
        ("1", "8"),
        ("16", "autoregressive"),
        ("16", "1"),
        ("16", "8"),
    ]
    assert rows[1]["speed-up"] == "0.80" and rows[1]["limit"] == "-", "AR is 1.25 times as fast as generate"
    heads = rows[3]
    assert (heads["n"], heads["draft vocabulary"], rows[2]["draft vocabulary"]) == ("4", "2,048", "-")
    assert (heads["tokens per forward"], heads["floor (ms)"], heads["forward with draft (ms)"]) == (
        "2.40",
        "15.50",
        "23.00",
    )
    assert (heads["speed-up per token per forward"], heads["limit"], heads["forward / floor"]) == (
        "0.625",
        "0.714",
        "1.030",
    )
    assert heads["share of limit"] == "0.875 [0.787, 0.963]" and heads["tokens/s"] == "1,160.0"
    assert rows[4]["tokens/s"] == "1,600.0", "throughput of all rows"
    caption = (tmp_path / "tables" / "speed.md").read_text()
    for word in (
        "Made-up CPU, 2 cores, 2 threads; commit 0123456789; trunk 56m (56.3M parameters), V=8,192, maps of rank 64",
        "2 of 3 targets hold (pass over floor, at most 1.05: 1 of 2; plain over generate, at least 0.95: 1 of 1)",
    ):
        assert word in caption


def test_records_of_several_machines_stand_in_one_table(tmp_path: Path) -> None:
    gpu = {"hardware": ORIGIN["hardware"] | {"accelerator": "Made-up GPU"}}
    compiled = {"dtype": "bfloat16", "failure": "RuntimeError: no compiler"}
    groups = [group(1, captured=False), group(1, captured=True)]
    save(
        tmp_path,
        decode_speed=record([group(1)]),
        decode_speed_gpu=record(groups, compiled_generate=[compiled], **gpu),
        decode_speed_later=record([group(1)]),
        other={"benchmark": "decoding speed"},
    )
    rows = drawn(tmp_path)
    assert list(rows[0])[:2] == ["machine", "forwards"]
    found = dict.fromkeys((row["machine"], row["forwards"]) for row in rows)
    assert list(found) == [
        ("Made-up CPU (decode_speed)", "launched"),
        ("Made-up GPU", "launched"),
        ("Made-up GPU", "captured"),
        ("Made-up CPU (decode_speed_later)", "launched"),
    ]
    caption = (tmp_path / "tables" / "speed.md").read_text()
    assert "Made-up GPU: Made-up GPU, Made-up CPU, 2 cores" in caption and "no compiler" in caption
    assert caption.count("targets hold") == 3


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "bench/speed.py makes it"),
        ("{", "is damaged"),
        ('{"benchmark": "another"}', "is not a record of 'decoding speed'"),
    ],
)
def test_without_a_record_the_table_is_left_out_with_a_note(content: str | None, why: str, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    if content is not None:
        (tmp_path / "benchmarks" / "decode_speed.json").write_text(content)
    (tmp_path / "speed.md").write_text("stale")
    files, (note,) = write_made(speed.tables(tmp_path), tmp_path)
    assert not files and note.startswith("table speed left out: ") and why in note
    assert not (tmp_path / "speed.md").exists()


def test_the_page_has_the_tables_of_benchmarks(tmp_path: Path) -> None:
    save(tmp_path, decode_speed=record([group(1)]))
    report = render(tmp_path, tmp_path / "figures")
    assert {"speed.md", "speed.tex", "speed.csv"} <= {path.name for path in report.files}
    page = (tmp_path / "figures" / "report.html").read_text()
    table = page.partition('id="table-speed"')[2].partition("</details>")[0]
    assert "against its limit" in table and "0.875 [0.787, 0.963]" in table and "targets hold" in table
    assert 'id="table-strategies"' not in page, "there is no record of it"
