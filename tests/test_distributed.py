"""Several processes equal one at the same global batch: DDP and FSDP2, on the CPU with gloo, ragged documents.

Also where one is killed, hangs, has a full disk or a NaN loss; on several machines; on another number of them.
"""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from cpdlm.config import resolve
from cpdlm.training.checkpoints import CHECKPOINT, TRAINED, WEIGHTS, RunError, check_checkpoint, consolidate, open_run
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
    ("fsdp", {"train.recompute": True, "train.accumulate": 2} | FLOAT64, "adamw"),
    ("fsdp", {"train.precision": "bf16-mixed"}, "sgd"),
]
EVERY: list[Case] = [
    (parallel, head | tie | FLOAT64 if optimizer == "adamw" else head | tie, optimizer)
    for parallel in ("ddp", "fsdp")
    for head in ({}, SEPARATE, {"link": "first", "model.map_rank": 4}, {"balance": "kl"}, {"train.accumulate": 2})
    for tie in ({}, UNTIED)
    for optimizer in ("sgd", "adamw")
] + [(parallel, {"model.family": "gpt2"}, "sgd") for parallel in ("ddp", "fsdp")]
# "sharded": FSDP2, and a checkpoint that is a folder.
CROSSINGS = [("auto", "ddp"), ("auto", "fsdp"), ("ddp", "auto"), ("fsdp", "ddp")]
CROSSINGS += [("auto", "sharded"), ("sharded", "auto"), ("sharded", "ddp")]
FROZEN = ["ddp", "fsdp", "sharded"]


def mode(name: str, more: dict[str, Any]) -> Case:
    return ("fsdp", more | {"train.sharded": True}, "adamw") if name == "sharded" else (name, more, "adamw")


def start(cases: list[dict[str, Any]], folder: Path, environments: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """One process per environment, which all go through the cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.two_processes", str(folder / "cases.json")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    root = Path(__file__).parents[1]
    return [subprocess.Popen(words, cwd=root, env=os.environ | common | each, **pipes) for each in environments]


def ranks(count: int) -> list[dict[str, str]]:
    return [{"LOCAL_RANK": str(rank), "NODE_RANK": "0"} for rank in range(count)]


def ended(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """Their outputs; a hang ends here."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def launch(cases: list[dict[str, Any]], folder: Path, environments: list[dict[str, str]] | None = None) -> None:
    """Run the cases in two processes (or as the environments say); a failure shows their output."""
    processes = start(cases, folder, environments or ranks(2))
    for process, output in zip(processes, ended(processes), strict=True):
        assert process.returncode == 0, output[-3000:]


def entry(folder: Path, case: Case, fault: dict[str, Any] | None = None, devices: int = 2) -> dict[str, Any]:
    parallel, overrides, optimizer = case
    overrides = {"parallel": parallel, "devices": devices} | overrides
    return {"folder": str(folder), "overrides": overrides, "optimizer": optimizer, "fault": fault}


def single(case: Case, folder: Path) -> Path:
    """The same run in one process, which keeps its activations."""
    index = folder / f"single-{_name(case)}"
    two_processes.train(index, case[1] | {"train.recompute": False}, case[2])
    return index


DIE = {"kind": "die", "step": 3}
CROSSED = FLOAT64 | {"optim.steps": 5, "train.checkpoint_every": 1, "train.validate_every": 1000}


def frozen(folder: Path) -> dict[str, Any]:
    return {"model.trunk": str(folder / "trunk")}


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs two processes, in one launch: a folder per case, and a folder per crossing of modes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("default")
    work = [entry(folder / _name(case), case) for case in DEFAULT]
    for one, other in CROSSINGS:  # killed before step 4 of 5 in one mode, finished in the other
        index = folder / f"{one} to {other}"
        if one == "auto":
            two_processes.train(index, CROSSED, fault=DIE)
        else:
            work.append(entry(index, mode(one, CROSSED), DIE))
        if other != "auto":
            work.append(entry(index, mode(other, CROSSED)))
    # Heads on a frozen trunk: the optimiser has some of the parameters only.
    plain = CROSSED | {"horizon": 1, "rank": 1, "balance": "none", "optim.steps": 1}
    open_run(folder / "trunk", resolve(two_processes.BASE | plain))
    two_processes.train(folder / "trunk", plain)
    heads = CROSSED | frozen(folder)
    work += [entry(folder / f"frozen, {name}", mode(name, heads), fault) for name in FROZEN for fault in (DIE, None)]
    work.append(entry(folder / "frozen, left", mode("sharded", heads), DIE))
    # Faults that every process notices, so that the next case can follow.
    work.append(entry(folder / "nan", ("ddp", CROSSED, "adamw"), {"kind": "nan", "step": 3, "rank": 1}))
    work.append(entry(folder / "disk", mode("sharded", CROSSED), {"kind": "full disk", "step": 3, "rank": 1}))
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


def noted(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each process has written down."""
    facts = [json.loads((folder / f"facts_{rank}.json").read_text()) for rank in range(count)]
    assert [(fact["rank"], fact["world"]) for fact in facts] == [(rank, count) for rank in range(count)]
    return facts


def check_equal(case: Case, two: Path, one: Path) -> None:
    parallel, overrides, optimizer = case
    tolerance = 1e-8 if optimizer == "adamw" else 1e-5
    if overrides.get("train.precision") == "bf16-mixed":  # another split of the rows rounds otherwise
        tolerance = 2e-3
    facts, (alone,) = noted(two, 2), noted(one, 1)
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
        assert mine == pytest.approx(theirs, abs=max(2e-5, 10 * tolerance)), "metrics are those of one process only"
    assert curves[0][1]["validation/joint_nll"] > 0


@pytest.mark.parametrize("case", DEFAULT, ids=_name)
def test_two_processes_equal_one(case: Case, default: Path) -> None:
    check_equal(case, default / _name(case), single(case, default))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=_name)
def test_two_processes_equal_one_everywhere(case: Case, every: Path) -> None:
    check_equal(case, every / _name(case), single(case, every))


def test_the_comparison_would_see_a_wrong_normalisation(tmp_path: Path) -> None:
    """Means of per-process means (data parallelism without weights, on ragged rows) are far outside the tolerance."""
    two_processes.train(tmp_path / "mean of means", {"train.accumulate": 2}, "sgd")
    two_processes.train(tmp_path / "one", {}, "sgd")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("mean of means", "one"))
    assert max((one[name] - other[name]).abs().max().item() for name in one) > 1e-4


@pytest.mark.parametrize("pair", CROSSINGS, ids=lambda pair: f"{pair[0]} to {pair[1]}")
def test_checkpoints_of_one_mode_load_in_the_other(pair: tuple[str, str], default: Path) -> None:
    index = default / f"{pair[0]} to {pair[1]}"
    if pair[1] == "auto":
        check_checkpoint(index / CHECKPOINT)
        two_processes.train(index, CROSSED)
    summary = json.loads((index / TRAINED).read_text())
    assert summary["resumed"] == 1 and summary["steps"] == 5
    compare(load_file(index / WEIGHTS), load_file(default / "whole" / WEIGHTS), 1e-8)


@pytest.fixture(scope="module")
def frozen_whole(default: Path) -> dict[str, Tensor]:
    two_processes.train(default / "frozen, whole", CROSSED | frozen(default))
    return load_file(default / "frozen, whole" / WEIGHTS)


@pytest.mark.parametrize("name", FROZEN)
def test_heads_on_a_frozen_trunk_resume_from_checkpoints_without_it(
    name: str, default: Path, frozen_whole: dict[str, Tensor]
) -> None:
    assert json.loads((default / f"frozen, {name}" / TRAINED).read_text())["resumed"] == 1
    compare(load_file(default / f"frozen, {name}" / WEIGHTS), frozen_whole, 1e-8)


def test_one_process_takes_over_heads_from_two(default: Path, frozen_whole: dict[str, Tensor]) -> None:
    left = default / "frozen, left"
    consolidate(left)
    held = torch.load(left / CHECKPOINT, weights_only=True)["state_dict"]
    assert {key.removeprefix("model.") for key in held} == frozen_whole.keys()
    two_processes.train(left, CROSSED | frozen(default))
    compare(load_file(left / WEIGHTS), frozen_whole, 1e-8)


def test_a_loss_that_is_nan_in_one_process_stops_all_with_the_same_words(default: Path) -> None:
    for rank in range(2):
        assert told(default / "nan", rank)["error"] == "NonFiniteLoss"
        assert "the loss is nan at step 3" in told(default / "nan", rank)["message"]
    assert torch.load(default / "nan" / CHECKPOINT, weights_only=True)["global_step"] == 3


def test_a_full_disk_of_one_process_keeps_the_last_sharded_checkpoint(default: Path) -> None:
    index = default / "disk"
    for rank in range(2):
        assert told(index, rank)["error"] == "WriteError"
        assert "cannot write" in told(index, rank)["message"] and "process 1: " in told(index, rank)["message"]
    assert [path.name for path in index.glob(".last.ckpt*")] == [os.readlink(index / CHECKPOINT)], "a torn one is left"
    check_checkpoint(index / CHECKPOINT)
    two_processes.train(index, CROSSED)  # one process takes over from two
    compare(load_file(index / WEIGHTS), load_file(default / "whole" / WEIGHTS), 1e-8)
    assert not list(index.glob("*last.ckpt*"))


def told(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"fault_{rank}.json").read_text())


class Hostile:
    """What a pickle can hold: a call that is made when it is read."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


@pytest.mark.parametrize("where", ["index", "entry", "elsewhere"])
def test_a_received_checkpoint_executes_nothing(where: str, tmp_path: Path) -> None:
    folder, touched = tmp_path / "a", tmp_path / "touched"
    dcp.save({"state_dict": {"x": torch.zeros(3)}, "lr": 0.1}, checkpoint_id=folder, no_dist=True)
    torch.save({"callbacks": {"Journal": {}}}, folder / "meta.pt")
    (tmp_path / CHECKPOINT).symlink_to("a")
    check_checkpoint(tmp_path / CHECKPOINT)
    index = pickle.loads((folder / ".metadata").read_bytes())
    if where == "index":
        index.planner_data = Hostile(touched)
    else:
        part = next(part for key, part in index.storage_data.items() if key.fqn == "lr")
        torch.save(Hostile(touched), tmp_path / "entry")
        part.offset, part.length = 0, (tmp_path / "entry").stat().st_size
        part.relative_path = "entry" if where == "entry" else "../entry"
        shutil.copy(tmp_path / "entry", folder / "entry")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(RunError, match=r"is not a checkpoint of this program: its? .*(executed|beside it)"):
        check_checkpoint(tmp_path / CHECKPOINT)
    with pytest.raises(RunError, match="is not a checkpoint of this program"):
        consolidate(tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_damaged_sharded_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    shard = {"x": torch.zeros(1000)}
    dcp.save(shard, checkpoint_id=tmp_path / "a", no_dist=True)
    torch.save({"callbacks": {} if damage == "foreign" else {"Journal": {}}}, tmp_path / "a" / "meta.pt")
    (tmp_path / CHECKPOINT).symlink_to("a")
    if damage != "foreign":
        check_checkpoint(tmp_path / CHECKPOINT)
        (part,) = (tmp_path / "a").glob("*.distcp")
        part.write_bytes(part.read_bytes()[:-100]) if damage == "cut" else part.unlink()
    said = "is not a checkpoint of this" if damage == "foreign" else "is truncated or not a"
    with pytest.raises(RunError, match=said):
        check_checkpoint(tmp_path / CHECKPOINT)


# Seconds from the fault until the last of the other processes has stopped with an error. For a process that hangs they
# come on top of train.timeout.
PATIENCE = 30.0
LOST: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp, second killed": ("ddp", {}, {"kind": "kill", "rank": 1}),
    "sharded, first killed": ("fsdp", {"train.sharded": True}, {"kind": "kill", "rank": 0}),
    "ddp, second hangs": ("ddp", {"train.timeout": 15}, {"kind": "hang", "rank": 1}),
    "ddp, disk of the first is full": ("ddp", {}, {"kind": "full disk", "rank": 0, "alone": True}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(LOST)]
)
def test_a_lost_process_stops_the_others_and_the_run_resumes(name: str, default: Path, tmp_path: Path) -> None:
    parallel, overrides, fault = LOST[name]
    index = tmp_path / "run"
    processes = start([entry(index, (parallel, CROSSED | overrides, "adamw"), fault | {"step": 3})], tmp_path, ranks(2))
    other = processes[1 - fault["rank"]]
    try:
        output = other.communicate(timeout=240)[0]
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
    assert other.returncode == 1, output[-1500:]
    report = told(index, 1 - fault["rank"])
    assert report["error"] == "ProcessLost"
    assert f"process {1 - fault['rank']} of 2: another one stopped" in report["message"]
    assert f"the same command continues from {index / CHECKPOINT}" in report["message"]
    waited = report["time"] - (index / "struck").stat().st_mtime
    assert waited < PATIENCE + overrides.get("train.timeout", 0), f"{waited:.1f} s"
    if fault["kind"] == "full disk":
        assert told(index, 0)["error"] == "WriteError" and "free some space" in told(index, 0)["message"]
    check_checkpoint(index / CHECKPOINT)
    two_processes.train(index, CROSSED)
    summary = json.loads((index / TRAINED).read_text())
    assert (summary["resumed"], summary["steps"]) == (1, 5)
    compare(load_file(index / WEIGHTS), load_file(default / "whole" / WEIGHTS), 1e-8)


SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "cpdlm"}
SLURM |= {"SLURM_JOB_ID": "1", "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# Two machines of one process each, as the launchers describe them.
BY_SLURM = [SLURM | {"SLURM_PROCID": rank, "SLURM_NODEID": rank} for rank in "01"]
BY_TORCHRUN = [each | TORCHRUN | {"RANK": rank, "GROUP_RANK": rank} for rank, each in zip("01", BY_SLURM, strict=True)]
MACHINES = {"SLURM": BY_SLURM, "torchrun in SLURM": BY_TORCHRUN}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", MACHINES)
def test_two_machines_equal_one(launcher: str, default: Path, tmp_path: Path) -> None:
    two = CROSSED | {"nodes": 2}
    work = [entry(tmp_path / "ddp", ("ddp", two, "adamw"), devices=1)]
    work += [entry(tmp_path / "sharded", mode("sharded", two), fault, devices=1) for fault in (DIE, None)]
    launch(work, tmp_path, MACHINES[launcher])
    for name in ("ddp", "sharded"):
        noted(tmp_path / name, 2)
        compare(load_file(tmp_path / name / WEIGHTS), load_file(default / "whole" / WEIGHTS), 1e-8)


@pytest.mark.slow
def test_four_processes_equal_one_and_take_over_from_two(default: Path, tmp_path: Path) -> None:
    """Two processes, then four, then two, then one, of which each but the last is killed."""
    later = [{"kind": "die", "step": step} for step in (1, 2, 3)]
    modes = {name: tmp_path / name for name in ("ddp", "fsdp", "sharded")}
    for fault, devices in zip(later, (2, 4, 2), strict=True):
        work = [entry(index, mode(name, CROSSED), fault, devices) for name, index in modes.items()]
        if devices == 4:
            work += [entry(tmp_path / f"{name} at once", mode(name, CROSSED), None, 4) for name in modes]
        launch(work, tmp_path, ranks(devices))
    whole = load_file(default / "whole" / WEIGHTS)
    curve = json.loads((default / "whole" / TRAINED).read_text())["curve"]
    for name, index in modes.items():
        two_processes.train(index, CROSSED)
        summary = json.loads((index / TRAINED).read_text())
        assert summary["resumed"] == 3
        for mine, theirs in zip(summary["curve"], curve, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-8), "a sample was lost or repeated"
        compare(load_file(index / WEIGHTS), whole, 1e-8)
        compare(load_file(tmp_path / f"{name} at once" / WEIGHTS), whole, 1e-8)
