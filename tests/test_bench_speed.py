"""The speed benchmark: forced acceptance forces nothing but the count, a quick run leaves a whole record."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cpdlm.decoding import Decoded, Sampling, drafters
from cpdlm.model.language_model import LanguageModel
from experiments.bench import speed
from experiments.bench.speed import LEAST_TRUNK, targets
from experiments.bench.speed_calls import Subject

ROOT = Path(__file__).parents[1]


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(each) for each in value.values())
    if isinstance(value, list):
        return all(finite(each) for each in value)
    return math.isfinite(value) if isinstance(value, float) else True


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    _, cells = speed.models(speed.parse(["--quick"]), torch.device("cpu"), "float32")
    return cells[speed.Cell(rank=2, horizon=3, shortlist=0)]


def write(model: LanguageModel, sampling: Sampling, rows: int = 1) -> list[Decoded]:
    prompts_BT = torch.stack([torch.tensor([1, row]) for row in range(rows)])
    return Subject(model, prompts_BT, sampling, drafts=True).decode(12, lambda part: None)


@pytest.mark.parametrize("sampling", speed.MODES.values(), ids=speed.MODES)
def test_forced_acceptance_follows_the_pattern(model: LanguageModel, sampling: Sampling) -> None:
    one, two = write(model, sampling, rows=2)
    assert one.emitted == [1, 1, 2, 3, 1, 2, 2] and two.emitted[:6] == [1, 2, 3, 1, 2, 3]
    assert len(one.tokens) == len(two.tokens) == 12


def test_forcing_leaves_out_no_work(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft, a forward of the trunk and an acceptance test for every target forward but the prompt's."""
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("draft_joint", "hidden", "target_log_probs"):
        counted(model, name)
    counted(drafters, "sampled_chain")
    counted(drafters, "verify")
    forwards = write(model, Sampling())[0].forwards
    assert calls["hidden"] == calls["target_log_probs"] == calls["verify"] == forwards == 7
    assert calls["draft_joint"] == calls["sampled_chain"] == forwards - 1


def test_targets() -> None:
    def cell(rank: int, horizon: int, share: float) -> dict[str, Any]:
        middle = {"share_of_limit": {"median": share}, "pass_over_floor": {"median": 1.01}}
        return {"rank": rank, "horizon": horizon, "shortlist": 0} | middle

    cells = [cell(1, 4, 0.93), cell(8, 4, 0.7), cell(8, 8, 0.7), cell(4, 4, 0.7)]
    group = {"dtype": "float32", "mode": "greedy", "batch": 1, "cells": cells}
    slow = cell(8, 4, 0.7) | {"pass_over_floor": {"median": 1.2}}
    found = targets([group, group | {"batch": 4, "cells": [cells[0], slow]}], LEAST_TRUNK)
    shares = [each for each in found if each["what"].startswith("speed-up per token")]
    assert [(each["target"], each["holds"]) for each in shares] == [(0.92, True), (0.80, False)]
    floors = [each for each in found if each["what"].startswith("forward over floor")]
    assert [each["holds"] for each in floors] == [True] * 5 + [False], "batches above 1 have a floor, too"
    small = targets([group], LEAST_TRUNK - 1)
    assert not any(each["what"].startswith("speed-up per token") for each in small), (
        "the target names a trunk of 50M or more"
    )


def test_a_quick_run_writes_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "experiments/bench/speed.py", "--quick", "--cpu", "--threads", "1"]
    done = subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "decode_speed.json").read_text())
    assert {"benchmark", "command", "commit", "dirty", "hardware", "versions", "started", "seed", "settings"} <= set(
        record
    )
    assert finite(record)
    groups = {(group["dtype"], group["mode"], group["batch"]): group for group in record["groups"]}
    assert len(groups) == len(record["groups"]) == 2 * 2 + 2
    for (_, _, batch), group in groups.items():
        assert ("generate" in group) == (batch == 1)
        cells = [(cell["rank"], cell["horizon"], cell["shortlist"]) for cell in group["cells"]]
        assert cells == ([(1, 3, 0), (1, 3, 16), (2, 3, 0), (2, 3, 16)] if batch == 1 else [(2, 3, 16)])
        for cell in group["cells"]:
            # Batch 1: 12 tokens are 1 of the prompt, then 1, 2, 3, 1, 2, 3 less the last one's overshoot.
            assert batch > 1 or cell["tokens_per_pass"] == 12 / 7
            assert cell["conversion"]["median"] > 0 and cell["floor_ms"]["median"] > cell["tn_ms"]["median"]
            assert cell["draft_ms"]["median"] > 0
    assert "speed-up" in done.stdout and "generate" in done.stdout


@pytest.mark.parametrize("mode", speed.MODES)
def test_captured_forwards_are_measured_alike(mode: str) -> None:
    """On the CPU the step is not a graph, the measuring is the same."""
    options = speed.parse(["--quick"])
    trunk, cells = speed.models(options, torch.device("cpu"), "float32")
    for group in (group for group in speed.groups(options) if group.mode == mode):
        measured = speed.measure(group, trunk, {cell: cells[cell] for cell in group.cells}, options, captures=True)
        assert finite(measured) and measured["captured"]
        assert ("generate" in measured) == (group.batch == 1)
        for cell in measured["cells"]:
            assert cell["draft_ms"]["median"] > 0
            assert 1 < cell["tokens_per_pass"] <= (1 + cell["horizon"]) / 2
