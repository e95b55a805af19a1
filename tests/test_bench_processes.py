"""The benchmark of processes: what it times, and that a quick run leaves a whole record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench import processes

ROOT = Path(__file__).parents[1]


def test_every_contender_is_a_task_of_its_own() -> None:
    options = processes.parse(["--tokenizers", "bytes", "bpe:300", "--processes", "1", "4"])
    tasks = processes.tasks(options)
    assert tasks["tokenise bpe:300 4"] == ["tokenise", "bpe:300", "4"] and "tokenise bytes threads" not in tasks
    assert tasks["train fsdp 4"] == ["train", "fsdp", "4"] and len(tasks) == 1 + 5 + 4


def test_tokenising_is_timed_over_all_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n\n" * 2000)
    options = processes.parse(["--corpus", str(tmp_path / "text.txt"), "--cache", str(tmp_path)])
    found = processes.tokenise_once(options, "bpe:300", 1, tmp_path)
    assert (
        found["bytes"] == 30_000 and found["seconds"] > 0 and len(list(tmp_path.glob("train-*.npz"))) == found["pieces"]
    )


@pytest.mark.slow
def test_a_quick_run_leaves_a_whole_record(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(f"{number} and {k * number}\n" for k in range(150)))
    words = [
        "--quick",
        "--corpus",
        str(tmp_path / "texts"),
        "--cache",
        str(tmp_path),
        "--output",
        str(tmp_path / "p.json"),
    ]
    command = [sys.executable, "experiments/bench/processes.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["benchmark"] == "processes" and record["hardware"]["cores"] >= 1 and record["commit"]
    for label, cell in record["cells"].items():
        assert cell["tokens_per_second" if label.startswith("train") else "bytes_per_second"] > 0, label
