"""A run that diverges leaves the last good checkpoint and no model; a run that was stopped leaves no wrong speed."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpdlm.config import Config
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import CHECKPOINT, TRAINED, WEIGHTS
from cpdlm.training.module import MultiTokenModule, NonFiniteLoss
from experiments import pipeline
from experiments.records import RecordError
from experiments.report import Report
from experiments.scheduler import Local
from experiments.suite import scratch, trunk
from experiments.sweep_plan import Plan
from tests.test_training import settings, train


def poison_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The optimiser's step number `step` leaves a NaN, as an overflow does."""
    original = MultiTokenModule.optimizer_step

    def poisoned(self: MultiTokenModule, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if self.global_step == step - 1:
            self.model.unembedding.weight.data[0, 0] = math.nan

    monkeypatch.setattr(MultiTokenModule, "optimizer_step", poisoned)


def test_no_checkpoint_of_a_diverged_run_replaces_the_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**{"train.checkpoint_every": 1})
    poison_after(monkeypatch, 4)
    with pytest.raises(NonFiniteLoss, match=r"weight is not finite after step 4.*lower optim\.lr"):
        train(config, tmp_path)
    held = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert held["global_step"] == 3
    assert all(tensor.isfinite().all() for tensor in held["state_dict"].values())
    monkeypatch.undo()
    train(config, tmp_path)  # goes on from it
    assert checkpoints.is_finished(tmp_path)


def test_a_run_that_diverges_in_its_last_step_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_after(monkeypatch, 6)
    with pytest.raises(NonFiniteLoss, match="after step 6"):
        train(settings(**{"train.validate_every": 10}), tmp_path)
    assert not (tmp_path / WEIGHTS).exists() and not (tmp_path / TRAINED).exists()


WATCHED = """
import sys, time
from cpdlm import processes
processes.BEAT_SECONDS, processes.PAUSE_SECONDS = 0.02, 0.3
watch = processes.PauseWatch()
until = time.monotonic() + 0.1
while time.monotonic() < until:
    pass
assert watch.total() == 0
print("ready", flush=True)
sys.stdin.readline()
print(watch.total())
"""


def test_a_stopped_process_notices_for_how_long() -> None:
    child = subprocess.Popen([sys.executable, "-c", WATCHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.6)
    child.send_signal(signal.SIGCONT)
    said, _ = child.communicate("\n", timeout=30)
    assert 0.5 < float(said) < 5


def test_a_step_in_which_the_run_stood_still_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = MultiTokenModule.training_step
    pauses = [0.0]

    def stopped(self: MultiTokenModule, batch: Any, batch_index: int) -> Any:
        if self.global_step == 3:
            pauses[0] = 0.5
            time.sleep(0.5)
        return original(self, batch, batch_index)

    monkeypatch.setattr(MultiTokenModule, "training_step", stopped)
    monkeypatch.setattr("cpdlm.processes.PauseWatch.total", lambda self: pauses[0])
    summary, _ = train(settings(**{"optim.steps": 4, "data.batch_rows": 1}), tmp_path)
    assert "step 4 is not timed: the run stood still for 0.5 s" in capsys.readouterr().err
    assert summary.paused == 0.5 and summary.tokens == 4 * 16
    assert summary.seconds == pytest.approx(summary.clock[2] + 0.001 * summary.step_ms_median, abs=0.002)
    assert summary.tokens_per_second == pytest.approx(summary.tokens / summary.seconds)


def test_a_cell_without_a_record_stops_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [trunk("code", "smoke,trunk"), replace(scratch(1, "smoke"), reference=None)]

    def write(config: Config, command: str, folder: Path, **more: str) -> Path:
        if config.run_name == cells[0].name:
            raise RecordError("likelihood.joint_nll.mean is not a finite number")
        return folder / config.run_name

    told: list[Any] = []
    monkeypatch.setattr("experiments.cell.is_trained", lambda config: True)
    monkeypatch.setattr("experiments.cell.write_record", write)
    monkeypatch.setattr(pipeline, "render", lambda *given: Report("the tables", [], []))
    monkeypatch.setattr(pipeline, "_log", lambda plan, records, *given: told.extend(records))
    plan = Plan("test", cells, tmp_path / "out", tmp_path / "results", "command", stages=("report",))
    assert pipeline.run(plan, Local(1)) == 1
    said = capsys.readouterr()
    assert f"failed: {cells[0].name}: its record is not written: likelihood.joint_nll" in said.err
    assert "the tables" in said.out and [config.run_name for config, _ in told] == [cells[1].name]
