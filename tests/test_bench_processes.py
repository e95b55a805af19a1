"""The benchmark of processes: a quick run leaves a whole record, whose table can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bench import processes
from experiments.report.scaling import processes_table


@pytest.mark.slow
def test_a_quick_run_leaves_a_whole_record(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(f"{number} and {k * number}\n" for k in range(150)))
    words = ["--quick", "--corpus", str(tmp_path / "texts"), "--cache", str(tmp_path), "--output", str(tmp_path)]
    assert processes.main([*words, "--processes", "1", "2"]) == 0
    record = json.loads((tmp_path / "processes.json").read_text())
    assert record["benchmark"] == "processes" and record["hardware"]["cores"] >= 1 and record["commit"]
    assert list(record["cells"]) == ["train ddp 1", "train ddp 2", "train fsdp 1", "train fsdp 2"]
    assert all(cell["tokens_per_second"] > 0 for cell in record["cells"].values())
    assert len(processes_table("processes", record).rows) == 4
