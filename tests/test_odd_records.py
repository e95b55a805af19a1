"""One odd record is named and left out, whatever is odd about it; the rest is drawn."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.records import load, load_all
from experiments.report import decoding, scaling, speed
from experiments.report.benchmarks import made_of, read_benchmark
from experiments.schema import RecordError, validate
from experiments.stats import measured
from experiments.verify import VerifyError, _words
from tests.made_records import made

ODD: list[tuple[str, Any]] = [
    ("config.rank", 0),
    ("config.rank", 10**30),
    ("config.optim", []),
    ("config.optim.lr", "fast"),
    ("config.loss", 5),
    ("config.model.dtype", "float7"),
    ("config.decode.top_p", 1.5),
    ("started", "yesterday"),
    ("started", "0001-01-01"),
    ("command", "python\x00"),
    ("seconds.train", -1.0),
    ("versions.torch", 2),
    ("data.vocab_size", -257),
    ("parameters.trunk", 0),
    ("training.tokens_per_second", 0),
    ("training.step_ms_median", -5.0),
    ("training.clock", []),
    ("training.curve", [{"step": 1, "train/nll": None}]),
    ("likelihood.weights.mean", [2.0]),
    ("likelihood.per_row.positions", []),
    ("likelihood.per_row.joint_nll", [1.0]),
    ("likelihood.per_row.first_token_nll", [math.nan] * 60),
    ("decoding.modes.greedy.passes", -3),
    ("decoding.modes.greedy.speedup.median", 0.0),
    ("decoding.modes.greedy.per_prompt.tokens", [1e300] * 16),
    ("decoding.modes.greedy.emitted_histogram", []),
    ("decoding.modes.greedy.drafts_per_prompt.reached", [[]]),
    ("decoding.modes.sampling.repeat_seconds.plain", []),
    ("decoding.origin.hardware", {}),
]


@pytest.mark.parametrize("field, value", ODD)
def test_a_value_that_cannot_be_is_named(field: str, value: Any) -> None:
    content: Any = copy.deepcopy(made(2))
    *parents, last = field.split(".")
    inside = content
    for part in parents:
        inside = inside[part]
    inside[last] = value
    with pytest.raises(RecordError, match=field.replace(".", r"\.")):
        validate(content)


def test_target_likelihoods_may_be_absent(tmp_path: Path) -> None:
    content = made(2)
    content["likelihood"]["per_row"] |= {"bytes": [100.0] * content["likelihood"]["rows"], "target_nll": None}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert measured(load(tmp_path / "a.json"), "bits_per_byte") is not None


def test_a_command_that_cannot_be_read_is_not_run_again(tmp_path: Path) -> None:
    content = made(2) | {"command": "python experiments/run.py 'rank=2"}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(VerifyError, match="its command is"):
        _words(load(tmp_path / "a.json"))


def test_a_bad_record_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    for rank in (1, 2):
        content = made(rank)
        if rank == 2:
            content["training"]["tokens"] = -1
        (tmp_path / f"{rank}.json").write_text(json.dumps(content))
    records, damaged = load_all(tmp_path)
    assert [record.rank for record in records] == [1]
    assert len(damaged) == 1 and "training.tokens is -1; it lies from 1 to" in damaged[0]


def test_settings_that_no_run_has_leave_a_record_readable(tmp_path: Path) -> None:
    content = made(2)
    content["config"]["data"]["context"] = 2  # less than the horizon
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load(tmp_path / "a.json").draft_flops() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: [],
        lambda record: record | {"hardware": "a laptop"},
        lambda record: record | {"settings": math.nan},
        lambda record: {key: [] if isinstance(value, (dict, list)) else value for key, value in record.items()},
        lambda record: {key: [{}] if isinstance(value, list) else value for key, value in record.items()},
        lambda record: {key: {"a": -1} if isinstance(value, dict) else value for key, value in record.items()},
        lambda record: {"benchmark": record["benchmark"]},
    ],
)
def test_an_odd_benchmark_takes_its_own_table_out(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for path in sorted(Path("results/benchmarks").glob("*.json")):
        damaged = damage(json.loads(path.read_text()))
        (tmp_path / "benchmarks" / path.name).write_text(json.dumps(damaged))
    tables = [*decoding.tables(tmp_path), *speed.tables(tmp_path), *scaling.tables(tmp_path)]
    reasons = [each.table for each in tables if isinstance(each.table, str)]
    assert reasons and all("benchmarks/" in reason for reason in reasons)
    for draw in (decoding.draw, scaling.draw):
        files, shown = draw(tmp_path, tmp_path)
        assert shown.picture is None or files


def test_committed_benchmarks_are_read_whole() -> None:
    for path in Path("results/benchmarks").glob("*.json"):
        assert isinstance(read_benchmark(Path("results"), path.stem), dict), path
    assert made_of("x", lambda: {}["groups"]) == (
        "benchmarks/x.json has content that cannot be shown (KeyError: 'groups'); make it again"
    )
