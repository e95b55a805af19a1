"""Tables and figures from made-up records: complete, the same bytes every time, and whole when cells are missing."""

from __future__ import annotations

import csv
import html
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_records import made, suite, wider

from cpdlm.config import parse
from experiments import claims
from experiments.families import families_of
from experiments.records import Record, RecordError, load_all, write
from experiments.report import Report, figures, render, tables
from experiments.report.__main__ import main
from experiments.report.figures.components import usage
from experiments.report.figures.style import retrofits
from experiments.report.figures.training import decoding_over_training

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for content in [*suite(seeds=2), *wider(seeds=2)]:
        write(content, root / content["claim"])
    return root


@pytest.fixture(scope="module")
def drawn(records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("figures")
    return folder, render(records, folder)


TABLES = ("claims", "cells", "paired", "beyond", "references", "baselines", "cost", "trunks")


def test_every_figure_and_table_is_there(drawn: tuple[Path, Report]) -> None:
    folder, report = drawn
    assert {path.name for path in report.files if path.parent == folder} == {
        f"{name}.{suffix}" for name in figures.FIGURES for suffix in ("pdf", "png", "md")
    } | {"report.html"}
    assert {path.name for path in (folder / "tables").iterdir()} == {
        f"{name}.{suffix}" for name in TABLES for suffix in ("md", "tex", "csv")
    }
    assert all(path.stat().st_size > 200 for path in report.files)


def test_figures_hold_no_date_version_or_path(drawn: tuple[Path, Report]) -> None:
    folder, _ = drawn
    for path in [*folder.glob("*.pdf"), *folder.glob("*.png")]:
        content = path.read_bytes()
        for word in (b"CreationDate", b"Producer", b"Software", b"matplotlib", str(folder).encode()):
            assert word not in content, f"{path.name} holds {word!r}"


def test_figures_fit_a_column_with_readable_text(records: Path) -> None:
    import matplotlib
    from matplotlib.text import Text

    families, _ = families_of(load_all(records)[0])
    with matplotlib.rc_context():
        matplotlib.rcParams.update(figures.STYLE)
        for name, plot in figures.FIGURES.items():
            made_figure = plot.draw(families)
            assert not isinstance(made_figure, str), name
            figure = made_figure.figure
            assert figure.get_figwidth() in (3.4, 7.0)
            figure.canvas.draw()
            edges = figure.bbox
            for text in figure.findobj(Text):
                if text.get_text() and text.get_visible():
                    assert text.get_fontsize() >= 7, (name, text.get_text())
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert edges.x0 <= box.x0 and box.x1 <= edges.x1, f"{name}: the legend is cut off"
            for axis in figure.axes:
                assert axis.get_xlabel() or not axis.axison, f"{name}: an x axis has no label"
                low, high = sorted(axis.get_xlim())
                ticks = [tick for tick in axis.get_xticklabels() if low <= tick.get_position()[0] <= high]
                for text in (axis.title, axis._left_title, axis.yaxis.label, *ticks):  # type: ignore[attr-defined]
                    if text.get_text():
                        box = text.get_window_extent()
                        assert box.x0 >= edges.x0 - 1 and box.x1 <= edges.x1 + 1, (
                            f"{name}: {text.get_text()!r} is cut off"
                        )


def test_a_panel_without_records_says_so_and_keeps_its_axis() -> None:
    untied = [made(rank) for rank in (1, 8)]
    anchored = [made(rank, anchor="token", corpus="text") for rank in (1, 8)]
    made_of = [Record(f"{place}.json", content) for place, content in enumerate([*untied, *anchored])]
    families, _ = families_of(made_of)
    made_figure = figures.FIGURES["acceptance"].draw(families)
    assert isinstance(made_figure, figures.Drawn)
    panels = made_figure.figure.axes
    empty = [panel for panel in panels if not panel.lines]
    assert len(panels) == 8 and len(empty) == 4
    assert all([text.get_text() for text in panel.texts] == ["not measured"] for panel in empty)
    assert {panel.get_xlim() for panel in panels} == {panels[0].get_xlim()}


def test_captions_state_the_conditions(drawn: tuple[Path, Report]) -> None:
    folder, _ = drawn
    for name in figures.FIGURES:
        caption = (folder / f"{name}.md").read_text()
        for word in (
            "trunk parameters)",
            "seed",
            "rows of 256 tokens",
            "Made-up CPU, 2 cores",
            f"{parse([]).optim.steps} steps",
        ):
            assert word in caption, (name, word)


@pytest.mark.parametrize("kept", [0, 1])
def test_missing_cells_leave_notes_not_tracebacks(kept: int, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for content in suite(seeds=1, ranks=(1, 8))[:kept]:
        write(content, tmp_path / "results" / content["claim"])
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
        block = page.partition(f'id="figure-{name}"')[2][:400]
        assert (f"<code>{command}</code>" in block) == bool(said), name


def test_two_records_drawn_by_two_processes_then_one(tmp_path: Path) -> None:
    """The same bytes from another process, hash seed and time zone; a figure that can no longer be drawn is taken away."""
    for rank in (1, 8):
        write(made(rank), tmp_path / "results" / "C1")
    report = render(tmp_path / "results", tmp_path / "one")
    said_of_all(report)
    assert (tmp_path / "one" / "nll.png").exists()
    command = [
        sys.executable,
        "-m",
        "experiments.report",
        "--results",
        str(tmp_path / "results"),
        "--figures",
        str(tmp_path / "two"),
    ]
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "C1" in done.stdout
    for path in report.files:
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path.name
    (tmp_path / "results" / "C1" / "code-tiny-own-r8-n4-none-s0.json").unlink()
    render(tmp_path / "results", tmp_path / "one")
    assert not (tmp_path / "one" / "nll.png").exists()


def test_older_records_are_drawn_without_what_they_lack(tmp_path: Path) -> None:
    for rank, seed in itertools.product((1, 8), (0, 1)):
        content = made(rank, seed)
        content["likelihood"].pop("components", None)
        for mode in content["decoding"]["modes"].values():
            del mode["drafts_per_prompt"]
        for key in ("clock", "seconds", "flops_per_token", "matmul_flops_per_second", "matmul_fraction"):
            del content["training"][key]
        content["training"]["curve"] = [
            {key: value for key, value in note.items() if "weight_" not in key and "_per_pass" not in key}
            for note in content["training"]["curve"]
        ]
        write(content, tmp_path)
    families, _ = families_of(load_all(tmp_path)[0])
    found = {name: plot.draw(families) for name, plot in figures.FIGURES.items()}
    lacking = {name for name, made_figure in found.items() if isinstance(made_figure, str)}
    assert lacking == {
        "heat",
        "by_size",
        "over_training",
        "training_cost",
        "balance",
        "gate",
        "specialities",
        "windows",
    }
    equal_time = found["equal_time"]
    assert isinstance(equal_time, figures.Drawn) and "without a clock" in equal_time.caption
    assert "one every 200 steps" in equal_time.caption
    assert [row[8] for row in tables.cost_table(families).rows] == ["-", "-"]


def test_components_are_shown_at_the_horizon_of_the_base_cell() -> None:
    """The widest comparison has no components; of the others one at horizon 4 comes first, all of it of one family."""
    base = [made(rank, seed) for rank in (1, 2, 4, 8) for seed in (0, 1)]
    for content in base:
        content["likelihood"].pop("components", None)
    short = [made(rank, horizon=2) for rank in (1, 2, 4, 8)]
    brief = [made(rank, optim__steps=100, name=f"brief-r{rank}") for rank in (1, 4)]
    other = [made(8, balance=way, name=f"{way}-r8") for way in ("bias", "none")]
    weighted = [made(8, 1, loss__balance_weight=0.1, name="weighted-r8")]

    def shown(*contents: dict[str, Any]) -> list[str]:
        records = [Record(f"{place}.json", content) for place, content in enumerate(contents)]
        drawn = figures.components.specialities(families_of(records)[0])
        return [record["name"] for record in drawn.records] if isinstance(drawn, figures.Drawn) else []

    assert shown(*base, *short) == [f"code-tiny-own-r{rank}-n2-none-s0" for rank in (4, 8)]
    assert shown(*base, *short, *other) == ["bias-r8"]
    assert shown(*base, *short, *other, *brief) == ["brief-r4"]
    assert shown(*base, *short, *other, *brief, *weighted) == ["weighted-r8"]
    whole = [made(rank, 2) for rank in (2, 8)]
    assert shown(*base, *short, *other, *brief, *weighted, *whole) == [f"code-tiny-own-r{r}-n4-none-s2" for r in (2, 8)]


def test_timing_cells_are_for_the_cost_of_training_alone() -> None:
    made_of = [made(rank) for rank in (1, 8)] + [made(rank, claim="C8", optim__steps=40) for rank in (1, 8)]
    families, _ = families_of([Record(f"{place}.json", content) for place, content in enumerate(made_of)])
    for plot in figures.FIGURES.values():
        steps = {family.settings["optim.steps"] for family in figures.meant_for(plot, families)}
        assert steps == ({40} if plot.claim == "C8" else {parse([]).optim.steps})
    brief = [family for family in families if not family.is_timing]
    assert figures.meant_for(figures.FIGURES["training_cost"], brief) == brief


def test_the_page_is_whole_by_itself(records: Path, drawn: tuple[Path, Report]) -> None:
    page = (drawn[0] / "report.html").read_text()
    assert len(page) < 5_000_000
    assert page.count("data:image/png;base64,") == len(figures.FIGURES)
    outside = re.findall(r"""(?:src|href|url|action|@import)\W{1,3}(?:https?:)?//[^"' )]+""", page)
    assert not outside and "default-src 'none'" in page and not re.search(r"<(link|iframe|script src)", page)
    order = [page.index(f'<section id="{name}">') for name in ("claims", "figures", "tables", "records", "notes")]
    assert order == sorted(order)
    every, _ = load_all(records)
    rows = page[order[3] : order[4]]
    assert rows.count("<tr>") == 1 + len(every)
    for record in every:
        assert f"<td>{record.path.removesuffix('.json')}</td>" in rows and html.escape(record["command"]) in rows
    for verdict in drawn[1].verdicts:
        assert html.escape(verdict.claim.question) in page and html.escape(verdict.reason) in page
        assert all(html.escape(number.text()) in page for number in verdict.numbers)
    for name in figures.FIGURES:  # the caption stands under its picture
        caption = (drawn[0] / f"{name}.md").read_text().strip()
        assert html.escape(caption[-60:]) in page.partition(f'id="figure-{name}"')[2].partition("</figure>")[0]


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


def test_paired_differences_have_interval_and_spread(drawn: tuple[Path, Report]) -> None:
    rows = list(csv.DictReader((drawn[0] / "tables" / "paired.csv").open()))
    assert all(row["rank"] != "1" for row in rows) and {row["law"] for row in rows} >= {"untied", "anchored"}
    row = next(
        row
        for row in rows
        if (row["law"], row["rank"], row["setting"]) == ("untied", "8", "code, tiny, n=4, own target")
    )
    text = row["joint NLL (nats), minus rank 1"]
    mean, low, high, spread = map(float, re.findall(r"[+-]?\d+\.\d+", text))
    assert row["seeds"] == "2" and " +- " in text and low < mean < high < 0 < spread < high - low
    # A wide table is shrunk to the page, a narrow one is not.
    assert r"\resizebox{\linewidth}{!}{" in (drawn[0] / "tables" / "paired.tex").read_text()
    narrow = tables.Table("narrow", "A caption.", ("a", "b"), [("1", "2")])
    assert "resizebox" not in narrow.latex() and narrow.latex().count("{") == narrow.latex().count("}")


def test_beyond_needs_no_untied_cell() -> None:
    contents = [made(rank, 0, claim="beyond", anchor="token") for rank in (1, 8)]
    families, _ = families_of(Record(content["name"], content) for content in contents)
    assert [row[1:3] for row in tables.beyond_table(families).rows] == [("anchored", "1"), ("anchored", "8")]


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
    rows = [row for row in rows if row["setting"] == "code, tiny, n=4, own target"]
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
    families, notes = families_of(load_all(records)[0])
    assert tables.update_readme(readme, families, claims.judge(families), notes)
    text = readme.read_text()
    assert text.startswith(f"# Above\n\n{tables.BEGIN}\n| claim |")
    assert text.endswith(f"{tables.END}\n\nbelow\n")
    assert "stale" not in text
    for word in ("2 seeds (0, 1)", "Made-up CPU", "tiny (0.8M trunk parameters)"):
        assert word in text
    assert tables.update_readme(readme, families, claims.judge(families), notes)
    assert readme.read_text() == text


def test_a_readme_without_markers_is_left_alone_and_a_torn_one_refused(records: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# mine\n")
    families, _ = families_of(load_all(records)[0])
    assert not tables.update_readme(readme, families, claims.judge(families))
    for torn in (f"{tables.BEGIN}\n", f"{tables.END}\n{tables.BEGIN}\n", f"{tables.BEGIN}{tables.BEGIN}{tables.END}"):
        readme.write_text(torn)
        with pytest.raises(RecordError, match="claims block"):
            tables.update_readme(readme, families, claims.judge(families))
        assert readme.read_text() == torn


def test_the_papers_unknown_numbers_are_never_printed(drawn: tuple[Path, Report]) -> None:
    rows = list(csv.DictReader((drawn[0] / "tables" / "claims.csv").open()))
    assert not any(re.search(r"\d", row["expected"].replace("rank 1", "")) for row in rows)


def test_braces() -> None:
    assert tables.braces(["a1-s0", "a8-s0", "a1-s1", "a8-s1"]) == "a{1,8}-s{0,1}"
    assert tables.braces(["a1-s0", "a8-s1"]) == "a1-s0, a8-s1"
    assert tables.braces(["b/a-r1", "b/a-r1-x", "b/c-r1"]) == "b/a-r1-x, b/{a,c}-r1"
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


PRETRAINED = {"model__trunk": "smollm2", "model__family": "pretrained", "data__tokenizer": "model", "claim": "C6"}


def test_the_table_of_retrofits_tells_every_dial_apart(tmp_path: Path) -> None:
    """What a row was trained for, on which text, with which maps: no two cells of the grid share a row or lose one."""
    tied = PRETRAINED | {"model__tie_first": True, "loss__objective": "eq14"}
    cells = [
        tied,
        tied | {"rank": 4},
        PRETRAINED | {"loss__objective": "eq14"},
        tied | {"anchor": "token"},
        tied | {"anchor": "token", "model__anchor_width": 99},
        tied | {"model__map_rank": 64},
        tied | {"model__map_hidden": 32},
        tied | {"loss__objective": "blend"},
        tied | {"loss__alpha": 0.5},
        tied | {"loss__gamma": 0.7},
        tied | {"data__text": "greedy", "data__states": 512},
        tied | {"optim__steps": 9},
    ]
    for number, cell in enumerate(cells):
        write(made(**cell) | {"name": f"cell-{number}"}, tmp_path / "C6")  # type: ignore[arg-type]
    families, notes = families_of(load_all(tmp_path)[0])
    table = tables.retrofit_table(families)
    assert len(table.rows) == len(cells) and not [note for note in notes if "left out" in note]
    assert len({row[:6] for row in table.rows}) == len(cells)
    shown = {(row[1], row[2]) for row in table.rows}
    assert shown >= {
        ("eq14", "untied"),
        ("eq14", "anchored"),
        ("eq14", "anchored, anchor 99"),
        ("eq14", "tied, low 64"),
        ("eq14", "tied, mlp 32"),
        ("blend", "tied"),
        ("eq14, alpha 0.5", "tied"),
        ("eq14, gamma 0.7", "tied"),
        ("eq14, the model's own text (greedy)", "tied"),
    }


def test_a_rank_looks_the_same_in_every_panel() -> None:
    """Also where a panel has other ranks than the next; of pretrained models the longest trained come first."""
    records = []
    for anchor, ranks, steps in (("none", (1, 4), 50), ("token", (1, 2, 4, 8), 90), ("token", (1,), 20)):
        for rank in ranks:
            content = made(rank, **PRETRAINED, model__tie_first=True, anchor=anchor, optim__steps=steps)
            content["training"]["curve"] = [
                {"step": step, "train/effective_components": 1.0}
                | {f"validation/{mode}_tokens_per_pass": 1.5 for mode in ("greedy", "sampling")}
                for step in (1, 2)
            ]
            records.append(Record(f"C6/{anchor}-{rank}-{steps}.json", content))
    families, _ = families_of(records)
    for draw, most in ((usage, 2), (decoding_over_training, 3)):
        drawn = draw(families)
        assert not isinstance(drawn, str)
        looks: dict[str, set[tuple[object, object]]] = {}
        for axis in drawn.figure.axes:
            for line in axis.get_lines():
                if str(line.get_label()).startswith("rank"):
                    looks.setdefault(str(line.get_label()), set()).add((line.get_color(), line.get_linestyle()))
        assert set(looks) >= {"rank 2", "rank 4", "rank 8"} and all(len(each) == 1 for each in looks.values())
        assert len({look for each in looks.values() for look in each}) == len(looks)
        titles = [axis.get_title() for axis in drawn.figure.axes[::2]]
        assert len(titles) == most and "anchored" in titles[0] and "tied" in titles[1]


def test_the_retrofits_of_most_ranks_are_shown_first() -> None:
    """A variant of a rank is no rank more; of as many the longest trained."""
    records = [
        Record(
            f"C6/{steps}-{rank}-{hidden}.json",
            made(
                rank, **PRETRAINED, model__tie_first=True, anchor="token", optim__steps=steps, model__map_hidden=hidden
            ),
        )
        for steps, dials in (
            (30, [(1, 0), (2, 0), (4, 0)]),
            (50, [(1, 0), (2, 0), (4, 0)]),
            (70, [(1, 0), (1, 64), (4, 0)]),
        )
        for rank, hidden in dials
    ]
    shown = retrofits(families_of(records)[0])
    assert [family.settings["optim.steps"] for family, _ in shown] == [50, 30, 70]


def test_the_table_of_retrofits_says_what_became_of_drafts_and_components() -> None:
    content = made(
        8,
        **PRETRAINED,
        model__tie_first=True,
        model__dtype="bfloat16",
        loss__objective="eq14",
        loss__draft_vocabulary=100,
    )
    content["likelihood"]["weights"] |= {"effective": 1.1823, "dead": 7}
    content["training"]["tokens"], content["config"]["loss"]["joint_fraction"] = 8000, 0.125
    content["likelihood"]["kept_by_depth"] = [{"depth": depth, "mean": 0.6 / depth, "sem": 0.01} for depth in (2, 3, 4)]

    def row() -> tuple[dict[str, str], str]:
        table = tables.retrofit_table(families_of([Record("C6/one.json", content)])[0])
        return dict(zip(table.header, table.rows[0], strict=True)), table.caption

    found, caption = row()
    assert found["positions"] == "1,000"
    assert (
        found["components in use"] == "1.18 of 8, 7 dead" and found["kept by depth"] == "2: 0.300, 3: 0.200, 4: 0.150"
    )
    assert found["heads (MiB)"] == f"{2 * content['parameters']['trained'] / 2**20:.1f}"
    depths = content["decoding"]["modes"]["greedy"]["acceptance_by_depth"]
    assert found["accepted by depth, greedy"] == ", ".join(
        f"{each['depth']}: {each['accepted'] / each['reached']:.3f}" for each in depths
    )
    assert "1 record of an older version: kept shares and joint NLL of the law over the whole vocabulary" in caption
    content["likelihood"]["shortlist"] = {"tokens": 100, "windows": 0.981}
    assert "over the windows that the list covers (98.1% of them at least). Means" in row()[1]


def test_curves_and_components_of_a_pretrained_model_are_drawn() -> None:
    """Decoding over training needs two validations; components in use need two components. A line per rank of each law."""
    cells = [
        *(made(rank, **PRETRAINED, anchor="token") for rank in (1, 8)),
        made(1, **PRETRAINED, anchor="token", model__map_hidden=64),
        *(made(rank, **PRETRAINED, model__tie_first=True) for rank in (1, 4)),
    ]

    def drawn(name: str, contents: list[dict[str, Any]]) -> figures.Drawn | str:
        made_of = [Record(f"{place}.json", content) for place, content in enumerate(contents)]
        return figures.FIGURES[name].draw(families_of(made_of)[0])

    curves, usage = drawn("over_training", cells), drawn("usage", cells)
    assert isinstance(curves, figures.Drawn) and isinstance(usage, figures.Drawn)
    labels = [[line.get_label() for line in axis.get_lines()] for axis in curves.figure.axes]
    assert labels == [["rank 1", "rank 4"]] * 2 + [["rank 1", "rank 8", "rank 1, mlp 64"]] * 2
    assert {record.rank for record in usage.records} == {4, 8} and len(usage.figure.axes) == 4
    for content in cells:
        content["training"]["curve"] = content["training"]["curve"][-1:]
    assert drawn("over_training", cells) == "no records with train.decode_prompts above 0 and two validations"
