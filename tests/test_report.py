"""The report from made-up records: complete, the same bytes every time, and whole when cells are missing."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from made_records import made, suite
from matplotlib.text import Text

from experiments import claims
from experiments import records as store
from experiments.families import families_of
from experiments.records import Record, RecordError, load_all, write
from experiments.report import Report, benchmarks, figures, readme, render, tables, tasks
from experiments.report.__main__ import main
from experiments.report.cells import pretrained_table
from experiments.report.figures import speed

ROOT = Path(__file__).resolve().parent.parent


WORDS = r"(holds|contradicted|no difference within ±.*|underpowered \(could have seen .* or more\)|not run)(: |$)"
TABLES = ("claims", "cells", "paired", "references", "pretrained", "cost")


def test_every_figure_and_table_is_there(drawn: tuple[Path, Report]) -> None:
    folder, report = drawn
    assert {path.name for path in report.files if path.parent == folder} == {
        f"{name}.{suffix}" for name in figures.FIGURES for suffix in ("pdf", "png", "md")
    } | {"report.html"}
    assert {path.name for path in (folder / "tables").iterdir()} == {
        f"{name}.{suffix}" for name in TABLES for suffix in ("md", "tex", "csv")
    }
    assert all(path.stat().st_size > 200 for path in report.files)


def test_the_claims_table_has_expected_measured_verdict_and_record(drawn: tuple[Path, Report]) -> None:
    folder, report = drawn
    rows = list(csv.DictReader((folder / "tables" / "claims.csv").open()))
    assert list(rows[0]) == ["claim", "setting", "expected", "measured", "verdict", "visible", "rule", "record"]
    assert [row["claim"] for row in rows] == [verdict.claim.name for verdict in report.verdicts]
    assert rows[0]["record"] == "C1/code-tiny-own-r{1,2,4,8}-n4-none-s{0,1}.json"
    assert all(re.match(WORDS, row["verdict"]) for row in rows)
    assert "its own variation is not covered" in (folder / "tables" / "claims.md").read_text()
    for verdict in report.verdicts:
        assert verdict.setting.split(",")[0] in report.text


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


CLAIMS_BLOCK = ("<!-- claims:begin -->", "<!-- claims:end -->")
SCEPTIC_BLOCK = ("<!-- sceptic:begin -->", "<!-- sceptic:end -->")


def test_the_readme_changes_between_its_markers_only(made_results: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(
        "# Above\n\n{}\nstale\n{}\n\nbetween\n{}\nstale\n{}\n\nbelow\n".format(*CLAIMS_BLOCK, *SCEPTIC_BLOCK)
    )
    found, _ = load_all(made_results)
    families, _ = families_of(found)
    verdicts = claims.judge(families)
    assert readme.update(path, readme.blocks(made_results, found, families, verdicts)) == ["claims", "sceptic"]
    text = path.read_text()
    assert text.startswith("# Above\n") and text.endswith(f"{SCEPTIC_BLOCK[1]}\n\nbelow\n") and "between" in text
    assert "stale" not in text and "Made-up CPU" in text
    assert readme.update(path, readme.blocks(made_results, found, families, verdicts)) and path.read_text() == text


def test_a_readme_without_markers_is_left_alone_and_a_torn_one_refused(tmp_path: Path) -> None:
    path, (begin, end) = tmp_path / "README.md", CLAIMS_BLOCK
    path.write_text("# mine\n")
    assert not readme.update(path, readme.blocks(tmp_path, [], [], []))
    for torn in (f"{begin}\n", f"{end}\n{begin}\n", f"{begin}{begin}{end}"):
        path.write_text(torn)
        with pytest.raises(RecordError, match="claims block"):
            readme.update(path, readme.blocks(tmp_path, [], [], claims.judge([])))
        assert path.read_text() == torn


def test_what_the_readme_says_is_what_the_records_say(committed: list[Record]) -> None:
    """Of the committed records: a row per claim, no line over 200 characters, every number found in a record."""
    results = ROOT / "results"
    families, _ = families_of(committed)
    verdicts = claims.judge(families)
    rows = [line for line in readme.claims_block(families, verdicts).splitlines() if line.startswith("| C")]
    lines = readme.sceptic_block(results, families, verdicts).splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {claim.id}" for claim in claims.CLAIMS]
    assert 3 <= len(lines) <= 6 and max(map(len, [*rows, *lines])) <= 200
    deciding = next(verdict for verdict in verdicts if verdict.claim.id == "C3").numbers[0].interval
    assert (
        f"| yes | {deciding.mean:+.2f} tokens per forward at rank 8 [{deciding.low:.2f}, {deciding.high:.2f}] |"
        in rows[2]
    )
    baselines = json.loads((results / "benchmarks/decode_baselines.json").read_text())
    greedy = max(m["modes"]["greedy"]["speedup"]["mean"] for m in baselines["methods"] if m["kind"] == "lookup")
    assert any(f"prompt lookup {greedy:.2f}x / " in line for line in lines)
    assert not any(
        word in line for line in [*rows, *lines] for word in ("anchor", "tied", "common", "retrofit", "pass")
    )
    text = (ROOT / "README.md").read_text()
    assert all(row in text for row in rows), "./dev report updates the README"
    rates = tasks.rates_block(results)
    assert rates in text and max(map(len, rates.splitlines())) <= 200
    timed = json.loads((results / "benchmarks/tasks_int4.json").read_text())
    [llama] = [e for e in timed["entries"] if e["method"] == "llama.cpp" and e["mode"] == "greedy"]
    assert f" {llama['tokens_per_second']['median']:.0f} (greedy)" in rates


@pytest.mark.parametrize("name", ["tasks_smollm2", "tasks_counted", "decode_baselines"])
def test_an_odd_benchmark_leaves_the_readme_its_other_lines(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / "benchmarks", tmp_path / "benchmarks")
    path = tmp_path / "benchmarks" / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "entries": [3], "methods": [3], "targets": 3}))
    made = readme.blocks(tmp_path, [], [], [])
    assert ("humaneval, greedy" in made["rates"]) == (name != "tasks_smollm2")
    assert ("humaneval 1." in made["sceptic"]) == (name != "tasks_counted")
    assert ("prompt lookup 2." in made["sceptic"]) == (name != "decode_baselines")


def test_the_papers_unknown_numbers_are_never_printed(drawn: tuple[Path, Report]) -> None:
    rows = list(csv.DictReader((drawn[0] / "tables" / "claims.csv").open()))
    assert not any(re.search(r"\d", row["expected"].replace("rank 1", "")) for row in rows)


def test_entry_point_errors_are_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path / "no"), "--figures", str(tmp_path)]) == 2
    assert "is not a folder of records" in capsys.readouterr().err
    (tmp_path / "r").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["--results", str(tmp_path / "r"), "--figures", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_tables_need_no_matplotlib(made_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = render(made_results, tmp_path)
    assert any("matplotlib is not installed" in note for note in report.notes)
    assert (tmp_path / "tables" / "claims.md").exists()


PRETRAINED = {"model__trunk": "smollm2", "model__family": "pretrained", "data__tokenizer": "model", "claim": "C6"}


def test_the_table_of_pretrained_models_tells_every_dial_apart(tmp_path: Path) -> None:
    """What a row was trained for, on which text, with which maps: no two cells of the grid share a row or lose one."""
    tied = PRETRAINED | {"model__tie_first": True, "loss__objective": "eq14"}
    more: list[dict[str, Any]] = [{}, {"rank": 4}, {"model__tie_first": False}, {"link": "first"}]
    more += [{"link": "first", "model__draft_width": 3.0}, {"model__map_rank": 64}, {"model__map_hidden": 32}]
    more += [{"loss__objective": "blend"}, {"loss__alpha": 0.5}, {"loss__gamma": 0.7}, {"optim__steps": 9}]
    more += [{"data__text": "greedy", "data__states": 512}]
    cells = [tied | each for each in more]
    for number, cell in enumerate(cells):
        write(made(**cell) | {"name": f"cell-{number}"}, tmp_path / "C6")
    families, notes = families_of(load_all(tmp_path)[0])
    table = pretrained_table(families)
    assert len(table.rows) == len(cells) and not [note for note in notes if "left out" in note]
    assert len({row[:7] for row in table.rows}) == len(cells)
    shown = {(row[1], row[2]) for row in table.rows}
    assert shown >= {("eq14", "untied"), ("eq14", "token-conditioned, draft 3"), ("eq14", "tied, low 64")}
    assert shown >= {("blend", "tied"), ("eq14, alpha 0.5", "tied"), ("eq14, the model's own text (greedy)", "tied")}


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


def test_the_readmes_figure_cuts_no_text_off(committed: list[Record]) -> None:
    families, _ = families_of(committed)
    held = [benchmarks.read_benchmark(ROOT / "results", name) for name in tasks.HELD]
    with matplotlib.rc_context(figures.STYLE):
        figure, _ = speed.front(families, held)
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        boxes = [text.get_window_extent() for text in texts]
    assert len(texts) > 30
    for text, box in zip(texts, boxes, strict=True):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, text.get_text()


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


def test_the_claims_fit_a_terminal_of_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = claims.judge(families_of([store.Record(f"C1/{n}", each) for n, each in enumerate(suite())])[0])
    monkeypatch.setenv("COLUMNS", "40")
    narrow = tables.claims_text(found)
    assert all(len(line) <= 40 for line in narrow.splitlines())
    assert all(verdict.verdict.split()[0] in narrow for verdict in found)
