"""Tables and figures from made-up records: complete, the same bytes every time, and whole when cells are missing."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_records import made, suite

from cpdlm.config import parse
from cpdlm.report import Report, figures, render, results, tables, verdicts
from cpdlm.report.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for content in suite(seeds=2):
        results.write(content, root / content["claim"])
    return root


@pytest.fixture(scope="module")
def drawn(records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("figures")
    return folder, render(records, folder)


TABLES = ("claims", "cells", "beyond", "references", "baselines", "trunks")


def test_every_figure_and_table_is_there(drawn: tuple[Path, Report]) -> None:
    folder, report = drawn
    assert {path.name for path in report.files if path.parent == folder} == {
        f"{name}.{suffix}" for name in figures.FIGURES for suffix in ("pdf", "png", "md")
    }
    assert {path.name for path in (folder / "tables").iterdir()} == {
        f"{name}.{suffix}" for name in TABLES for suffix in ("md", "tex", "csv")
    }
    assert all(path.stat().st_size > 200 for path in report.files)


def test_a_second_process_draws_the_same_bytes(records: Path, drawn: tuple[Path, Report], tmp_path: Path) -> None:
    """Another process, hash seed and time zone."""
    folder, report = drawn
    command = [sys.executable, "-m", "cpdlm.report", "--results", str(records), "--figures", str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "C1" in done.stdout
    for path in report.files:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_figures_hold_no_date_version_or_path(drawn: tuple[Path, Report]) -> None:
    folder, _ = drawn
    for path in [*folder.glob("*.pdf"), *folder.glob("*.png")]:
        content = path.read_bytes()
        for word in (b"CreationDate", b"Producer", b"Software", b"matplotlib", str(folder).encode()):
            assert word not in content, f"{path.name} holds {word!r}"


def test_figures_fit_a_column_with_readable_text(records: Path) -> None:
    import matplotlib
    from matplotlib.text import Text

    families, _ = results.families(results.load_all(records)[0])
    with matplotlib.rc_context():
        matplotlib.rcParams.update(figures.STYLE)
        for name, draw in figures.FIGURES.items():
            made_figure = draw(families)
            assert not isinstance(made_figure, str), name
            figure = made_figure.figure
            assert figure.get_figwidth() == (7.0 if name == "main" else 3.4)
            figure.canvas.draw()
            edges = figure.bbox
            for text in figure.findobj(Text):
                if text.get_text() and text.get_visible():
                    assert text.get_fontsize() >= 7, (name, text.get_text())
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert edges.x0 <= box.x0 and box.x1 <= edges.x1, f"{name}: the legend is cut off"
            for axis in figure.axes:
                assert axis.get_xlabel(), f"{name}: an x axis has no label"
                for text in (axis.title, axis._left_title, axis.yaxis.label):  # type: ignore[attr-defined]
                    if text.get_text():
                        box = text.get_window_extent()
                        assert box.x0 >= edges.x0 - 1 and box.x1 <= edges.x1 + 1, (
                            f"{name}: {text.get_text()!r} is cut off"
                        )


def test_captions_state_the_conditions(drawn: tuple[Path, Report]) -> None:
    folder, _ = drawn
    for name in figures.FIGURES:
        caption = (folder / f"{name}.md").read_text()
        for word in (
            "small" if name != "first_token" else "tiny",
            "2 seeds (0, 1)",
            "rows of 256 tokens",
            "Made-up CPU, 2 cores",
            f"{parse([]).optim.steps} steps",
        ):
            assert word in caption, (name, word)


@pytest.mark.parametrize("kept", [0, 1, 9])
def test_missing_cells_leave_notes_not_tracebacks(kept: int, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for content in suite(seeds=1, ranks=(1, 8))[:kept]:
        results.write(content, tmp_path / "results" / content["claim"])
    report = render(tmp_path / "results", tmp_path / "figures")
    drawn_names = {path.stem for path in report.files if path.suffix == ".png"}
    for name in figures.FIGURES:
        said = [note for note in report.notes if note.startswith(f"figure {name} left out: no ")]
        assert (name in drawn_names) != bool(said)
    assert len(report.verdicts) >= 4


def test_a_figure_that_can_no_longer_be_drawn_is_taken_away(tmp_path: Path) -> None:
    for rank in (1, 8):
        results.write(made(rank), tmp_path / "results")
    render(tmp_path / "results", tmp_path)
    assert (tmp_path / "nll.png").exists()
    (tmp_path / "results" / "code-tiny-own-r8-n4-none-s0.json").unlink()
    render(tmp_path / "results", tmp_path)
    assert not (tmp_path / "nll.png").exists()


def test_the_claims_table_has_expected_measured_verdict_and_record(drawn: tuple[Path, Report]) -> None:
    folder, report = drawn
    rows = list(csv.DictReader((folder / "tables" / "claims.csv").open()))
    assert list(rows[0]) == ["claim", "setting", "expected", "measured", "verdict", "record"]
    assert [row["claim"] for row in rows] == [verdict.claim.id for verdict in report.verdicts]
    assert rows[0]["record"] == "C1/code-tiny-own-r{1,2,4,8}-n4-none-s{0,1}.json"
    assert all(re.match(r"holds$|fails: |not (measurable|measured) here: ", row["verdict"]) for row in rows)
    assert "its own variation is not covered" in (folder / "tables" / "claims.md").read_text()
    for verdict in report.verdicts:
        assert verdict.setting.split(",")[0] in report.text


def test_beyond_has_controls_and_added_parameters(drawn: tuple[Path, Report]) -> None:
    rows = list(csv.DictReader((drawn[0] / "tables" / "beyond.csv").open()))
    found = {
        (row["law"], row["rank"]): row["added parameters"] for row in rows if row["setting"].startswith("code, small")
    }
    assert found["anchored", "8"] == "+20,000"
    assert found["anchored", "1"] == "+20,000"
    assert found["untied", "1"] == "-"
    cells = (drawn[0] / "tables" / "cells.csv").read_text()
    assert "anchored" not in cells
    assert "tied" in cells


def test_cells_stand_beside_a_next_token_model_of_equal_training(drawn: tuple[Path, Report]) -> None:
    rows = list(csv.DictReader((drawn[0] / "tables" / "references.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "4", "8"] and {row["pairs of seeds"] for row in rows} == {"1"}
    own, over, own_plain = (
        float(rows[3][key].split()[0])
        for key in ("first-token NLL (nats)", "speed-up over it, sampling", "over own plain, sampling")
    )
    assert own > 0 and over == pytest.approx(0.9 * own_plain, rel=0.01)
    strong = list(csv.DictReader((drawn[0] / "tables" / "baselines.csv").open()))
    assert {row["plain / generate, greedy"][:6] for row in strong} == {"1.05 ["}
    assert {row["generate, sampling (tokens/s)"] for row in strong} == {"95"}


def test_markdown_and_latex_are_well_formed(drawn: tuple[Path, Report]) -> None:
    for path in (drawn[0] / "tables").glob("*.md"):
        lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1, path.name
    for path in (drawn[0] / "tables").glob("*.tex"):
        text = path.read_text()
        assert text.count(r"\begin") == text.count(r"\end")
        assert not re.search(r"(?<!\\)[%_#]", text), path.name
        header = re.search(r"\\toprule\n(.*)\\midrule", text, re.S)
        assert header
        assert {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")} == {header[1].count(" & ")}


def test_the_readme_changes_between_its_markers_only(records: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Above\n\n{tables.BEGIN}\nstale\n{tables.END}\n\nbelow\n")
    families, notes = results.families(results.load_all(records)[0])
    assert tables.update_readme(readme, families, verdicts.judge(families), notes)
    text = readme.read_text()
    assert text.startswith(f"# Above\n\n{tables.BEGIN}\n| claim |")
    assert text.endswith(f"{tables.END}\n\nbelow\n")
    assert "stale" not in text
    for word in ("2 seeds (0, 1)", "Made-up CPU", "tiny (0.8M trunk parameters)"):
        assert word in text
    assert tables.update_readme(readme, families, verdicts.judge(families), notes)
    assert readme.read_text() == text


def test_a_readme_without_markers_is_left_alone_and_a_torn_one_refused(records: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# mine\n")
    families, _ = results.families(results.load_all(records)[0])
    assert not tables.update_readme(readme, families, verdicts.judge(families))
    for torn in (f"{tables.BEGIN}\n", f"{tables.END}\n{tables.BEGIN}\n", f"{tables.BEGIN}{tables.BEGIN}{tables.END}"):
        readme.write_text(torn)
        with pytest.raises(results.RecordError, match="claims block"):
            tables.update_readme(readme, families, verdicts.judge(families))
        assert readme.read_text() == torn


def test_the_papers_unknown_numbers_are_never_printed(drawn: tuple[Path, Report]) -> None:
    rows = list(csv.DictReader((drawn[0] / "tables" / "claims.csv").open()))
    assert not any(re.search(r"\d", row["expected"].replace("rank 1", "")) for row in rows)


def test_braces() -> None:
    assert tables.braces(["a1-s0", "a8-s0", "a1-s1", "a8-s1"]) == "a{1,8}-s{0,1}"
    assert tables.braces(["a1-s0", "a8-s1"]) == "a1-s0, a8-s1"
    assert tables.braces(["x"]) == "x"
    assert tables.braces([]) == ""


def test_entry_point_errors_are_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path / "no"), "--figures", str(tmp_path)]) == 2
    assert "is not a folder of records" in capsys.readouterr().err
    (tmp_path / "r").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["--results", str(tmp_path / "r"), "--figures", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_tables_need_no_matplotlib(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = render(records, tmp_path)
    assert any("matplotlib is not installed" in note for note in report.notes)
    assert (tmp_path / "tables" / "claims.md").exists()
