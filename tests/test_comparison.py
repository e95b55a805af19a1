"""Records side by side."""

from pathlib import Path

import pytest
from made_records import made

from experiments import compare
from experiments.records import Record, write


def test_what_differs_stands_in_a_column_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write(made(rank), tmp_path)) for rank in (1, 4)]
    assert compare.main(paths) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["rank", "1", "4"] for line in lines) and not any("corpus" in line for line in lines)
    assert sum("tokens per forward" in line for line in lines) == 2
    assert any("not comparable across cells" in line for line in lines)
    (tmp_path / "torn.json").write_text("{")
    assert compare.main([paths[0], str(tmp_path / "torn.json")]) == 2
    assert "torn.json is damaged" in capsys.readouterr().err


def test_what_stands_against_speeds_is_said() -> None:
    busy = made(2)
    assert not any(word in compare.table([Record("x", busy)]) for word in ("busy", "mean nothing"))
    busy["decoding"]["origin"]["load"], busy["training"]["steps"] = 7.25, 3
    said = compare.table([Record("x", busy)])
    assert "3 steps of training, so its speeds mean nothing" in said
    assert "the machine was busy (load average 7.2 on 2 cores)" in said
