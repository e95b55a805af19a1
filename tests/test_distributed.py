"""Two processes equal one at the same global batch: DDP and FSDP2, on the CPU with gloo, ragged documents."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cpdlm.training.storage import CHECKPOINT, TRAINED, WEIGHTS, check_checkpoint
from tests import two_processes

SEPARATE = {"model.head": "separate"}
UNTIED = {"model.tie_embeddings": False}
FLOAT64 = {"train.precision": "64-true"}
Case = tuple[str, dict[str, Any], str]  # parallel, overrides, optimiser


def _name(case: Case) -> str:
    parallel, overrides, optimizer = case
    return "-".join([parallel, optimizer, *(str(v).lower() for v in overrides.values())])


DEFAULT: list[Case] = [
    ("ddp", {}, "sgd"),
    ("ddp", SEPARATE | UNTIED | FLOAT64, "adamw"),
    ("fsdp", {}, "sgd"),
    ("fsdp", SEPARATE | FLOAT64, "adamw"),
    ("fsdp", UNTIED | {"optim.clip": 0.0}, "sgd"),
    ("ddp", {"balance": "bias"} | FLOAT64, "adamw"),
    ("fsdp", {"balance": "bias"} | FLOAT64, "adamw"),
]
EVERY: list[Case] = [
    (parallel, head | tie | FLOAT64 if optimizer == "adamw" else head | tie, optimizer)
    for parallel in ("ddp", "fsdp")
    for head in ({}, SEPARATE, {"anchor": "token", "model.map_rank": 4}, {"balance": "kl"}, {"train.accumulate": 2})
    for tie in ({}, UNTIED)
    for optimizer in ("sgd", "adamw")
] + [(parallel, {"model.family": "gpt2"}, "sgd") for parallel in ("ddp", "fsdp")]
MODES = ("auto", "ddp", "fsdp")
CROSSINGS = [(one, other) for one in MODES for other in MODES if one != other]


def launch(cases: list[dict[str, Any]], folder: Path) -> None:
    """Run the cases in two processes; a hang ends with their output."""
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", str(folder / "cases.json")],
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, "\n".join(
            line for line in output.splitlines() if "Error" in line or "site-packages" not in line
        )[-1500:]


def entry(folder: Path, case: Case, die_at: int = -1, devices: int = 2) -> dict[str, Any]:
    parallel, overrides, optimizer = case
    overrides = overrides | {"parallel": parallel, "devices": devices}
    return {"folder": str(folder), "overrides": overrides, "optimizer": optimizer, "die_at": die_at}


def single(case: Case, folder: Path) -> Path:
    """The same run in one process."""
    place = folder / f"single-{_name(case)}"
    two_processes.train(place, case[1], case[2])
    return place


CROSSED = FLOAT64 | {"optim.steps": 5, "train.checkpoint_every": 1, "train.validate_every": 1000}


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs two processes, in one launch: a folder per case, and a folder per crossing of modes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("default")
    work = [entry(folder / _name(case), case) for case in DEFAULT]
    for one, other in CROSSINGS:  # killed before step 4 of 5 in one mode, finished in the other
        place = folder / f"{one} to {other}"
        if one == "auto":
            two_processes.train(place, CROSSED, die_at=3)
        else:
            work.append(entry(place, (one, CROSSED, "adamw"), die_at=3))
        if other != "auto":
            work.append(entry(place, (other, CROSSED, "adamw")))
    launch(work, folder)
    two_processes.train(folder / "whole", CROSSED)
    return folder


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("every")
    launch([entry(folder / _name(case), case) for case in EVERY], folder)
    return folder


def compare(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        worst = (value.double() - other[name].double()).abs().max().item()
        assert worst <= tolerance, f"{name} differs by {worst:.1e}"


def check_equal(case: Case, two: Path, one: Path) -> None:
    parallel, _, optimizer = case
    tolerance = 1e-8 if optimizer == "adamw" else 1e-5
    facts = [json.loads((two / f"facts_{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads((one / "facts_0.json").read_text())
    assert [fact["world"] for fact in facts] == [2, 2] and [fact["rank"] for fact in facts] == [0, 1]
    # Shards hold half of the elements each, under FSDP2; under DDP everything is everywhere.
    for fact in facts:
        assert fact["sharded"] == (parallel == "fsdp") and fact["whole"] == alone["whole"]
        assert fact["own"] == fact["whole"] // (2 if parallel == "fsdp" else 1)
    # The processes see disjoint rows which together are the rows that one process sees.
    rows = [{json.dumps(row) for batch in fact["seen"] for row in batch} for fact in facts]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == {json.dumps(row) for batch in alone["seen"] for row in batch}
    compare(load_file(two / WEIGHTS), load_file(one / WEIGHTS), tolerance)
    curves = [json.loads((folder / TRAINED).read_text())["curve"] for folder in (two, one)]
    assert len(curves[0]) == len(curves[1])
    for mine, theirs in zip(*curves, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5), "logged metrics are those of one process only"
    assert curves[0][1]["validation/joint_nll"] > 0


@pytest.mark.parametrize("case", DEFAULT, ids=_name)
def test_two_processes_equal_one(case: Case, default: Path) -> None:
    check_equal(case, default / _name(case), single(case, default))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=_name)
def test_two_processes_equal_one_everywhere(case: Case, every: Path) -> None:
    check_equal(case, every / _name(case), single(case, every))


def test_the_comparison_would_see_a_wrong_normalisation(tmp_path: Path) -> None:
    """Means of per-process means (what plain data parallelism computes on ragged rows) are far outside the tolerance."""
    two_processes.train(tmp_path / "mean of means", {"train.accumulate": 2}, "sgd")
    two_processes.train(tmp_path / "one", {}, "sgd")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("mean of means", "one"))
    assert max((one[name] - other[name]).abs().max().item() for name in one) > 1e-4


@pytest.mark.parametrize("pair", CROSSINGS, ids=lambda pair: f"{pair[0]} to {pair[1]}")
def test_checkpoints_of_one_mode_load_in_the_other(pair: tuple[str, str], default: Path) -> None:
    place = default / f"{pair[0]} to {pair[1]}"
    if pair[1] == "auto":
        check_checkpoint(place / CHECKPOINT)
        two_processes.train(place, CROSSED)
    summary = json.loads((place / TRAINED).read_text())
    assert summary["resumed"] == 1 and summary["steps"] == 5
    compare(load_file(place / WEIGHTS), load_file(default / "whole" / WEIGHTS), 1e-8)
