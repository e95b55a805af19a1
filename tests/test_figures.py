"""Figures from made-up records: complete, readable, the same bytes every time, and whole when cells are missing."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_records import made, suite

from experiments import records as store
from experiments.report import Report, figures, render

ROOT = Path(__file__).resolve().parent.parent


def test_figures_hold_no_date_version_or_path(drawn: tuple[Path, Report]) -> None:
    folder, _ = drawn
    for path in [*folder.glob("*.pdf"), *folder.glob("*.png")]:
        content = path.read_bytes()
        for word in (b"CreationDate", b"Producer", b"Software", b"matplotlib", str(folder).encode()):
            assert word not in content, f"{path.name} holds {word!r}"


@pytest.mark.parametrize("kept", [0, 1])
def test_missing_cells_leave_notes_not_tracebacks(kept: int, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for content in suite(seeds=1, ranks=(1, 8))[:kept]:
        store.write(content, tmp_path / "results" / content["claim"])
    report = render(tmp_path / "results", tmp_path / "figures")
    said_of_all(report)
    assert not any(path.suffix == ".png" for path in report.files)
    assert len(report.verdicts) >= 4
    assert report.notes[-1] == figures.ADDING and "mix=yes" in figures.ADDING


def said_of_all(report: Report) -> None:
    """Every figure is drawn, or a note and the page say what is missing and which command makes it."""
    page = next(path for path in report.files if path.name == "report.html").read_text()
    for name, plot in figures.FIGURES.items():
        said = [note for note in report.notes if note.startswith(f"figure {name} left out: no ")]
        assert bool(said) != any(path.name == f"{name}.png" for path in report.files), name
        command = f"python experiments/sweep.py claim={plot.claim}"
        assert all(command in note for note in said)
        block = page.partition(f'id="figure-{name}"')[2].partition("</figure>")[0]
        assert (f"<code>{command}</code>" in block) == bool(said), name


def test_two_records_drawn_by_two_processes_then_one(tmp_path: Path) -> None:
    """The same bytes from another process, hash seed and time zone; a figure that can no longer be drawn is removed."""
    for rank in (1, 8):
        store.write(made(rank), tmp_path / "results" / "C1")
    report = render(tmp_path / "results", tmp_path / "one")
    said_of_all(report)
    assert (tmp_path / "one" / "nll.png").exists()
    folders = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "5"}
    command = [sys.executable, "-m", "experiments.report", *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "C1" in done.stdout
    for path in report.files:
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path.name
    (tmp_path / "results" / "C1" / "code-tiny-own-r8-n4-none-s0.json").unlink()
    render(tmp_path / "results", tmp_path / "one")
    assert not (tmp_path / "one" / "nll.png").exists()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_by_itself(made_results: Path, drawn: tuple[Path, Report]) -> None:
    page = (drawn[0] / "report.html").read_text()
    assert len(page) < 2_000_000 and page.count("data:image/png;base64,") == len(figures.FIGURES)
    outside = re.findall(r"""(?:src|href|url|action|@import)\W{1,3}(?:https?:)?//[^"' )]+""", page)
    assert not outside and "default-src 'none'" in page and not re.search(r"<(link|iframe|script src)", page)
    rows = page.partition('id="records">')[2].partition('id="notes">')[0]
    every, _ = store.load_all(made_results)
    assert rows.count("<tr>") == 1 + len(every)
    for record in every:
        assert f"<td>{record.path.removesuffix('.json')}</td>" in rows and html.escape(record["command"]) in rows
    for verdict in drawn[1].verdicts:
        assert html.escape(verdict.claim.question) in page and html.escape(verdict.reason) in page
        assert all(html.escape(number.text()) in page for number in verdict.numbers)
