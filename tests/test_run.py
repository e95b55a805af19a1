"""One cell from the command line: its record, its errors, its processes, and what it refuses to continue from."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import TINY, code_folder, small_pretrained
from transformers import PreTrainedTokenizerFast

from cpdlm.data.tokenizer import BpeTokenizer
from cpdlm.hf import export
from cpdlm.training import checkpoints
from experiments import run
from experiments.records import load
from experiments.suite import words as typed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return code_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pretrained(tmp_path_factory.mktemp("pretrained"), sorted(corpus.glob("*.py")))


def _run(*words: str, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *words]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, check=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnk=8"], "did you mean rank"),
        (["rank=0"], "rank=0"),
        (["size=smal"], "size=small"),
        (["horizon=500"], "data.context=256"),
        (["corpus=cdoe"], "code"),
        (["--stage=trian"], "train"),
        (["model.trunk=nowhere", "preset=smoke", "corpus=cpdlm", "data.max_bytes=0"], "nowhere"),
    ],
)
def test_a_mistake_exits_2_with_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*words, f"output={tmp_path}/runs", f"data.cache={tmp_path}/cache"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.splitlines()[-1].startswith("error: ")


def test_a_trunk_that_changed_since_is_not_taken_for_the_old_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of heads leaves it out: resuming on another one would go unnoticed."""
    words = typed(TINY)
    words += [f"corpus={corpus}", f"data.cache={tmp_path}/cache", f"output={tmp_path}/runs", "--stage=train"]
    trunk, heads = [*words, "preset=trunk", "name=trunk"], [*words, "name=heads", f"model.trunk={tmp_path}/runs/trunk"]
    assert run.main(trunk) == 0 and run.main(heads) == 0
    shutil.rmtree(tmp_path / "runs" / "trunk")
    assert run.main([*trunk, "seed=1"]) == 0
    (tmp_path / "runs" / "heads" / "train.json").unlink()
    assert run.main(heads) == 2
    assert "trained on other weights: its trunk has changed since" in capsys.readouterr().err


def test_a_corpus_that_changed_since_is_not_taken_for_the_old_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither when a run resumes, nor when a finished one is decoded."""
    mine = tmp_path / "mine"
    shutil.copytree(corpus, mine)
    words = typed(TINY)
    words += [f"corpus={mine}", f"data.cache={tmp_path}/cache", f"output={tmp_path}/runs", "rank=2", "name=one"]
    assert run.main([*words, "--stage=train"]) == 0
    for path in mine.glob("*.py"):
        path.write_text(path.read_text().replace("return", "yield"))
    assert run.main([*words, "--stage=decode"]) == 2
    assert "trained on other text" in capsys.readouterr().err
    (tmp_path / "runs" / "one" / "train.json").unlink()
    assert run.main([*words, "--stage=train"]) == 2
    assert "name=OTHER" in capsys.readouterr().err


def test_drafts_from_a_draft_vocabulary_are_an_option_of_a_cell(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the bytes: lossless (test_drafters), with its coverage in the record; it may change after training."""
    words = typed(TINY)
    words += [f"corpus={corpus}", f"data.cache={tmp_path}/cache", f"output={tmp_path}/runs", "rank=2", "name=one"]
    assert run.main([*words, "decode.draft_vocabulary=20"]) == 0
    record = load(Path(capsys.readouterr().out.split("record: ")[1].strip()))
    assert 0.5 < record["decoding"]["shortlist_coverage"] < 1 and record.config["decode"]["draft_vocabulary"] == 20
    ids = checkpoints.run_draft_vocabulary(tmp_path / "runs" / "one")
    assert ids is not None and len(ids.unique()) == 20
    export.export(tmp_path / "runs" / "one", tmp_path / "mine")
    assert "from the 20 most frequent tokens" in (tmp_path / "mine" / "README.md").read_text()
    # More than there are: all of them. The run's folder, its measurement and what is exported agree.
    assert run.main([*words, "decode.draft_vocabulary=300"]) == 0
    ids = checkpoints.run_draft_vocabulary(tmp_path / "runs" / "one")
    assert ids is not None and len(ids.unique()) == 257
    wrapped = export.export(tmp_path / "runs" / "one", tmp_path / "mine")
    assert wrapped.config.draft_ids == ids.tolist()
    # What is lost comes back with the same command, as the error says.
    (tmp_path / "runs" / "one" / checkpoints.DRAFT_VOCABULARY).unlink()
    with pytest.raises(checkpoints.RunError, match="run its command again"):
        checkpoints.run_draft_vocabulary(tmp_path / "runs" / "one")
    assert run.main([*words, "decode.draft_vocabulary=300"]) == 0
    assert checkpoints.run_draft_vocabulary(tmp_path / "runs" / "one") is not None


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_cell_on_two_processes(parallel: str, corpus: Path, tmp_path: Path) -> None:
    """The launcher starts the command once more; only the first process evaluates, decodes and writes the record."""
    words = _words(corpus, tmp_path)
    done = _run(*words, f"parallel={parallel}", "devices=2")
    assert done.returncode == 0, done.stderr
    both = load(Path(done.stdout.split("record: ")[1].strip()))
    done = _run(*words, "name=alone")
    assert done.returncode == 0, done.stderr
    alone = load(Path(done.stdout.split("record: ")[1].strip()))
    assert both["likelihood"]["joint_nll"]["mean"] == pytest.approx(alone["likelihood"]["joint_nll"]["mean"], abs=1e-3)


def test_several_machines_need_a_launcher_and_its_number_of_processes() -> None:
    done = _run("nodes=2", "devices=4", "data.batch_rows=8")
    assert done.returncode == 2 and "torchrun --nnodes=2 --nproc-per-node=4" in done.stderr
    assert "srun python experiments/run.py nodes=2 devices=4" in done.stderr and "Traceback" not in done.stderr
    for launcher in (
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "8"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"},
    ):
        done = _run("devices=2", environment=launcher)
        assert done.returncode == 2
        assert "the launcher made 8 processes, nodes=1 x devices=2 are 2; write nodes=MACHINES" in done.stderr


def test_more_devices_than_there_are_processors_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run.main(["devices=4", "data.batch_rows=8"]) == 2
    assert "devices=4: this machine has 3 processors; lower devices" in capsys.readouterr().err


def test_what_was_killed_is_named_though_another_process_noticed_and_ended_first() -> None:
    lost, killed, told = (SimpleNamespace(exitcode=code, timestamp=7) for code in (1, -signal.SIGKILL, -signal.SIGTERM))
    assert run._cause({0: lost, 1: killed, 2: told}) == (1, killed)
    assert run._cause({0: lost, 2: told}) == (0, lost)


@pytest.mark.slow
def test_a_killed_process_stops_the_command_which_then_goes_on_with_another_number(
    corpus: Path, tmp_path: Path
) -> None:
    """Two processes, of which one is killed; then one on each of two machines, stopped by SIGTERM; then one."""
    words = [*_words(corpus, tmp_path), "optim.steps=150", "train.checkpoint_every=1", "train.validate_every=50"]
    pipes: dict[str, Any] = {"cwd": ROOT, "stderr": PIPE, "stdout": PIPE, "text": True}
    run = Popen([sys.executable, "experiments/run.py", *words, "devices=2"], **pipes)
    checkpoint = tmp_path / "runs" / "cell" / "last.ckpt"
    _until(checkpoint.exists, run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    (second,) = (pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    began = time.monotonic()
    os.kill(int(second), signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert time.monotonic() - began < 60 and run.returncode == 1 and "Traceback" not in err
    assert "process 0 of 2: another one stopped" in err and "process 1 of 2 was killed (SIGKILL)" in err

    port = _free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=7", "experiments/run.py", *words, "nodes=2"]
    written = checkpoint.stat().st_mtime
    machines = [Popen(torchrun, **pipes) for _ in range(2)]
    _until(lambda: checkpoint.stat().st_mtime > written, machines[0])
    for machine in machines:  # the first one stops both: the second is told when it is saving, or has stopped
        machine.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    for machine in machines:
        _out, err = machine.communicate(timeout=120)
        assert machine.returncode and "The same command continues from it" in err, err[-2000:]

    done = _run(*words)
    assert done.returncode == 0, done.stderr
    resumed = load(Path(done.stdout.split("record: ")[1].strip()))
    done = _run(*words, "name=alone")
    alone = load(Path(done.stdout.split("record: ")[1].strip()))
    assert resumed["training"]["resumed"] == 2 and resumed["training"]["steps"] == 150
    for mine, theirs in zip(resumed["training"]["curve"], alone["training"]["curve"], strict=True):
        assert mine == pytest.approx(theirs, abs=2e-3), "a sample was lost or repeated"


def _words(corpus: Path, place: Path) -> list[str]:
    words = typed(TINY)
    return [*words, f"corpus={corpus}", f"data.cache={place}/cache", f"output={place}/runs", "rank=2", "name=cell"]


def _free_port() -> int:
    """One that the system gives to nobody who asks for any: it is still free when it is used."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def _until(condition: Callable[[], bool], process: Popen[str], timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_tokenizer_of_another_model_is_refused(
    corpus: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bpe = BpeTokenizer.train("bpe:400", [path.read_bytes() for path in corpus.glob("*.py")])
    other = PreTrainedTokenizerFast(tokenizer_object=bpe._model, eos_token="<|endoftext|>")
    other.save_pretrained(tmp_path / "other")
    words = typed(TINY | {"data.tokenizer": f"hf:{tmp_path}/other", "rank": 2})
    words += [f"data.cache={tmp_path}/cache", f"output={tmp_path}/runs", f"corpus={corpus}", f"model={pretrained}"]
    assert run.main([*words, "--stage=train"]) == 2
    said = capsys.readouterr().err
    assert f"has {len(other)} tokens, model={pretrained} embeds {len(other) - 100}: the tokenizer is another" in said
    # In the model's own folder it is known before the text is read.
    shutil.copytree(pretrained, tmp_path / "mixed")
    other.save_pretrained(tmp_path / "mixed")
    words[-2:] = ["corpus=/nowhere", f"model={tmp_path}/mixed", "data.tokenizer=model"]
    assert run.main([*words, "--stage=train"]) == 2
    said = capsys.readouterr().err
    assert "is another model's; put its own into its folder, or name it: data.tokenizer=hf:NAME" in said


def test_a_finished_cell_says_so_and_its_estimate_comes_first(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(corpus, tmp_path)
    assert run.main(words) == 0
    first = capsys.readouterr().out
    path = Path(first.split("record: ")[1].split()[0])
    record = load(path)
    assert record["command"].startswith("python experiments/run.py ") and record["config"]["rank"] == 2
    assert "tokens per forward, sampling" in first
    assert f"{json.loads(path.read_text())['likelihood']['joint_nll']['mean']:.4f}" in first
    assert first.startswith("estimate: ") and "to train" in first and "already complete" not in first
    assert "2 steps of training, so its speeds mean nothing" in first
    assert run.main(words) == 0
    again = capsys.readouterr().out
    assert again.startswith("already complete: ") and "estimate" not in again


def test_a_cell_that_exceeds_the_memory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["size=1b", "data.batch_rows=1048576", f"output={tmp_path}", "corpus=/nowhere", "tracking.mlflow=false"]
    assert run.main(words) == 2
    assert "lower data.batch_rows=1048576" in capsys.readouterr().err


def test_a_number_may_have_several_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.several(["preset=smoke,trunk", "rank=1,4", "optim.lr=1e-3,2e-3"]) == [
        ["preset=smoke,trunk", f"rank={rank}", f"optim.lr={rate}"] for rank in (1, 4) for rate in ("1e-3", "2e-3")
    ]
    assert run.main(["rank=1,2", "name=one"]) == 2
    assert "these cells have one name" in capsys.readouterr().err


@pytest.mark.slow  # two processes
def test_cells_run_one_after_another_and_are_compared(corpus: Path, tmp_path: Path) -> None:
    words = [word for word in _words(corpus, tmp_path) if not word.startswith(("rank=", "name="))]
    done = _run(*words, "rank=1,2")
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("[2/2]")[1].splitlines()
    assert any(line.split() == ["rank", "1", "2"] for line in table)
    assert any("not comparable across cells" in line for line in table)
    assert any("timed one after another" in line for line in table)
    assert "\r" not in done.stderr, "no bars in a log"


def test_presets_are_listed_with_what_they_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run.main(["--list-presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("trunk") + 1] == "  horizon=1 rank=1 balance=none"
    assert all(len(line) <= 40 or len(line.split()) == 1 for line in lines)


def test_a_python_without_the_packages_is_told_of_the_one_that_has_them() -> None:
    code = "import sys, runpy; sys.argv = ['run.py']; sys.path.insert(0, 'experiments')"
    find = "import importlib.util as u; find = u.find_spec"
    hide = "u.find_spec = lambda name, *rest: None if name == 'omegaconf' else find(name, *rest)"
    done = subprocess.run(
        [sys.executable, "-c", f"{find}; {hide}; {code}; runpy.run_path('experiments/run.py', run_name='__main__')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has no omegaconf; the suite runs with .venv/bin/python" in done.stderr
