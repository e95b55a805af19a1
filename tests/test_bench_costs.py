"""The benchmarks of loss, overhead and memory: all sides compute one thing, and what is measured is what was meant."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpdlm.bench.memory import working_memory
from experiments.bench import fresh, loss, overhead, training_rate
from experiments.bench.overhead import NEXT_TOKEN, WHOLE
from experiments.report import scaling
from tests.tiny import code_folder, small_pretrained

VOCAB = 64


@pytest.mark.parametrize("recipe", ["tied, 1/16", "frozen, 1/4, draft vocabulary"])
def test_a_timed_cell(recipe: str) -> None:
    found = overhead.time_one("micro", recipe, VOCAB * 8, 2)
    assert found["step_ms"] > 0 and found["tokens"] == 512
    assert found["planned_bytes"] == sum(found["planned"].values()) > 0
    assert set(found["flops"]) == {"trunk", "next token", "window"}


def test_the_gain_is_taken_over_seeds_of_the_heads_on_one_trunk(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text("".join(f"{number} and {k * number}\n" for k in range(60)))
    indices = {"--corpus": "text", "--runs": "runs", "--cache": "cache"}
    words = [word for option, index in indices.items() for word in (option, str(tmp_path / index))]
    words += ["--sizes", "micro", "--recipes", WHOLE, "tied, 1/16", "--steps", "2"]
    record = overhead.gained(overhead.parse(["gain", *words]))
    assert {folder.name for folder in (tmp_path / "runs").iterdir() if (folder / "evaluate.json").is_file()} == {
        "next-token",
        "whole-s0",
        "whole-s1",
        "tied-1of16-s0",
        "tied-1of16-s1",
    }
    for cell in record["cells"]:
        rate, (first, second) = cell["tokens_per_pass"], (found["tokens_per_pass"] for found in cell["by_seed"])
        assert first != second and rate["mean"] == pytest.approx((first + second) / 2)
        assert (rate["low"], rate["high"]) == (min(first, second), max(first, second))
    assert record["chosen"] in (WHOLE, "tied, 1/16") and isinstance(record["decided"], bool)


TOY = ["--quick", "--cpu"]


def row_nll(rows_MD: Tensor, table_VD: Tensor, tokens_M: Tensor) -> Tensor:
    """What the packages of others compute."""
    return F.cross_entropy(rows_MD @ table_VD.T, tokens_M, reduction="none")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_fused_cross_entropy_per_row_gives_the_joint_loss(at_once: bool) -> None:
    side = partial(loss.fused, row_nll=row_nll, at_once=at_once)
    found = loss.errors(side, torch.float64, torch.device("cpu"))
    assert len(found) == 6 and max(found.values()) < 1e-12, found


@pytest.mark.parametrize("side", ["bounded", "dense"])
def test_our_sides_against_float64(side: str) -> None:
    found = loss.errors(loss.make(side, 1), torch.float32, torch.device("cpu"))
    assert max(found.values()) < 1e-5, found
    found = loss.errors(loss.make(side, 1), torch.bfloat16, torch.device("cpu"))
    assert 1e-5 < max(found.values()) < 0.05, found


def test_a_side_that_fails_is_recorded_beside_those_that_do_not() -> None:
    options = loss.parse([*TOY, "--large"])
    found = {side: loss.in_fresh_process(side, options) for side in ("bounded", "liger")}
    assert set(found["bounded"]) >= {"seconds", "peak_bytes", "loss", "errors", "products"}
    assert found["liger"].keys() == {"failed"} and "liger" in found["liger"]["failed"]
    options.seconds = 0.01
    assert "not done" in loss.in_fresh_process("dense", options)["failed"]


CPU = torch.device("cpu")
MB = 250_000  # float32 numbers


class Target(nn.Module):
    """A forward that takes as many MB as it is told, and leaves one."""

    def forward(self, megabytes: int) -> Tensor:
        torch.zeros(megabytes * MB)
        return torch.zeros(MB)


def test_a_long_prompt_does_not_hide_what_drafting_takes() -> None:
    target, before = Target(), torch.zeros(10 * MB)

    def work() -> None:
        kept = [target(20)]
        for _ in range(3):
            torch.zeros(3 * MB)  # a draft
            kept.append(target(5))
        kept.append(before[:MB] + 1)

    found = working_memory(work, target, CPU)
    assert (found.whole, found.later, found.between) == pytest.approx((20e6, 8e6, 3e6), rel=0.01)
    assert found == working_memory(work, target, CPU), "the same every time"
    assert not target._forward_hooks and not target._forward_pre_hooks


def test_what_lies_behind_the_last_pass_counts() -> None:
    target = Target()
    found = working_memory(lambda: (target(2), torch.zeros(7 * MB)), target, CPU)
    assert (found.whole, found.later, found.between) == pytest.approx((8e6, 8e6, 7e6), rel=0.01)


def test_work_without_a_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no forward of the target"):
        working_memory(lambda: torch.zeros(3), Target(), CPU)


def test_timed_cells_are_set_against_the_next_token_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, each against the one of its own turn: the machine is slower every time."""
    answer = '{"step_ms": %d, "peak_bytes": %d, "planned_bytes": 1, "flops": {"trunk": %d}}'
    order: list[str] = []

    def run(what: str, words: list[str]) -> str:
        order.append(WHOLE if WHOLE in words else NEXT_TOKEN)
        turn = (len(order) + 1) // 2
        return answer % ((300 * turn + 10, turn, 4) if WHOLE in words else (100 * turn, 1, 1))

    monkeypatch.setattr(fresh, "run", run)
    cells = overhead.timed(overhead.parse(["time", "--sizes", "micro", "--recipes", NEXT_TOKEN, WHOLE]))
    assert order == [NEXT_TOKEN, WHOLE, WHOLE, NEXT_TOKEN, NEXT_TOKEN, WHOLE]
    base, whole = cells
    assert base["overhead"] == {"median": 0, "low": 0, "high": 0} and (base["bound"], whole["bound"]) == (0, 3)
    assert whole["step_ms"] == {"median": 610, "low": 310, "high": 910} and whole["repeats"] == [310, 610, 910]
    assert whole["overhead"] == pytest.approx({"median": 2.05, "low": 2 + 0.1 / 3, "high": 2.1})
    assert whole["peak_bytes"] == 3


@pytest.mark.slow
def test_a_quick_run_measures_each_way_to_train_heads(tmp_path: Path) -> None:
    for name in ("texts", "model"):
        (tmp_path / name).mkdir()
    texts = code_folder(tmp_path / "texts")
    small_pretrained(tmp_path / "model", sorted(texts.iterdir()))
    folders = ["--model", str(tmp_path / "model"), "--corpus", str(texts), "--cache", str(tmp_path / "cache")]
    assert training_rate.main(["heads", "--quick", *folders, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "training_rate.json").read_text())
    cells = record["cells"]
    assert len(scaling.rates_table(record).rows) == len(cells)
    assert len(cells) == 2 * len(training_rate.TARGETS)
    assert all(cell["tokens_per_second"] > 0 and cell["over_retrofit"] for cell in cells.values())
