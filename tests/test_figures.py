"""Figures from made-up records: complete, readable, the same bytes every time, and whole when cells are missing."""

from __future__ import annotations

import html
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_records import made, suite

from cpdlm.config import parse
from experiments import records as store
from experiments.families import Family, families_of
from experiments.report import Report, figures, render
from experiments.report.figures.style import on_pretrained

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = {"model__trunk": "smollm2", "model__family": "pretrained", "data__tokenizer": "model", "claim": "C6"}


def families(*contents: dict[str, Any]) -> list[Family]:
    return families_of([store.Record(f"{place}.json", content) for place, content in enumerate(contents)])[0]


def drawing(name: str, *contents: dict[str, Any]) -> figures.Drawn:
    made_figure = figures.FIGURES[name].draw(families(*contents))
    assert isinstance(made_figure, figures.Drawn), made_figure
    return made_figure


def test_figures_hold_no_date_version_or_path(drawn: tuple[Path, Report]) -> None:
    folder, _ = drawn
    for path in [*folder.glob("*.pdf"), *folder.glob("*.png")]:
        content = path.read_bytes()
        for word in (b"CreationDate", b"Producer", b"Software", b"matplotlib", str(folder).encode()):
            assert word not in content, f"{path.name} holds {word!r}"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_fits_a_column_with_readable_labelled_text(name: str, made_results: Path) -> None:
    import matplotlib
    from matplotlib.text import Text

    found, _ = families_of(store.load_all(made_results)[0])
    with matplotlib.rc_context():
        matplotlib.rcParams.update(figures.STYLE)
        drawn = figures.FIGURES[name].draw(found)
        assert not isinstance(drawn, str), name
        figure = drawn.figure
        assert figure.get_figwidth() in (3.4, 7.0)
        figure.canvas.draw()
        edges = figure.bbox
        shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert all(text.get_fontsize() >= 7 for text in shown)
        for axis in figure.axes:
            assert axis.get_xlabel() or not axis.axison, "an x axis has no label"
            low, high = sorted(axis.get_xlim())
            ticks = [tick for tick in axis.get_xticklabels() if low <= tick.get_position()[0] <= high]
            left = [axis.title, axis._left_title, axis.yaxis.label]  # type: ignore[attr-defined]
            for text in (*left, *ticks, *(axis.get_yticklabels() if axis.axison else ())):
                box = text.get_window_extent()
                inside = edges.x0 - 1 <= box.x0 and box.x1 <= edges.x1 + 1
                assert inside or not text.get_text() or not text.get_visible(), f"{text.get_text()!r} is cut off"
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert edges.x0 <= box.x0 and box.x1 <= edges.x1, "the legend is cut off"


def test_a_panel_without_records_says_so_and_keeps_its_axis() -> None:
    untied = [made(rank) for rank in (1, 8)]
    panels = drawing("acceptance", *untied, *(made(rank, anchor="token", corpus="text") for rank in (1, 8))).figure.axes
    empty = [panel for panel in panels if not panel.lines]
    assert len(panels) == 8 and len(empty) == 4
    assert all([text.get_text() for text in panel.texts] == ["not measured"] for panel in empty)
    assert {panel.get_xlim() for panel in panels} == {panels[0].get_xlim()}


def test_captions_state_the_conditions(drawn: tuple[Path, Report]) -> None:
    steps = f"{parse([]).optim.steps} steps"
    for name in figures.FIGURES:
        caption = (drawn[0] / f"{name}.md").read_text()
        for word in ("trunk parameters)", "seed", "rows of 256 tokens", "Made-up CPU, 2 cores", steps):
            assert word in caption, (name, word)


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


def test_components_are_shown_at_the_horizon_of_the_base_cell() -> None:
    """The widest comparison has no components; of the others one at horizon 4 comes first, all of it of one family."""
    base = [made(rank, seed) for rank in (1, 2, 4, 8) for seed in (0, 1)]
    for content in base:
        content["likelihood"]["components"] = None
    more = [
        [made(rank, horizon=2) for rank in (1, 2, 4, 8)],
        [made(8, balance=way, name=f"{way}-r8") for way in ("bias", "none")],
        [made(rank, optim__steps=100, name=f"brief-r{rank}") for rank in (1, 4)],
        [made(8, 1, loss__balance_weight=0.1, name="weighted-r8")],
        [made(rank, 2) for rank in (2, 8)],
    ]
    expected = [
        [f"code-tiny-own-r{rank}-n2-none-s0" for rank in (4, 8)],
        ["bias-r8"],
        ["brief-r4"],
        ["weighted-r8"],
        [f"code-tiny-own-r{rank}-n4-none-s2" for rank in (2, 8)],
    ]
    for count, names in enumerate(expected, start=1):
        contents = [*base, *itertools.chain(*more[:count])]
        assert [record["name"] for record in drawing("specialities", *contents).records] == names


def test_timing_cells_are_for_the_cost_of_training_alone() -> None:
    found = families(*(made(rank) for rank in (1, 8)), *(made(r, claim="C8", optim__steps=40) for r in (1, 8)))
    for plot in figures.FIGURES.values():
        steps = {family.settings["optim.steps"] for family in figures.meant_for(plot, found)}
        assert steps == ({40} if plot.claim == "C8" else {parse([]).optim.steps})
    brief = [family for family in found if not family.is_timing]
    assert figures.meant_for(figures.FIGURES["training_cost"], brief) == brief


def test_a_pretrained_model_has_its_speed_over_one_and_over_rank_one() -> None:
    """A point per rank and setting, where each was measured; the title counts the ranks that are surely faster."""
    cells = [
        made(rank, **PRETRAINED, anchor="token", corpus=corpus, speed=0.5)
        for rank, corpus in itertools.product((1, 2, 8), ("code", "text"))
    ]
    for content in cells:
        if content["config"]["rank"] == 1:
            for mode in content["decoding"]["modes"].values():
                mode["speedup_over_rank1"] = None
    left, right = drawing("readme", *cells).figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        f"{corpus},\n{mode}" for corpus in ("code", "text") for mode in ("greedy", "sampling")
    ]
    assert (len(left.containers), len(right.containers)) == (4 * 3, 4 * 2)
    assert "none is surely faster" in right.get_title()
    drawn = drawing("over_rank1", *cells)
    assert len(drawn.figure.axes[0].get_yticklabels()) == 2 * 2
    numbers = [text.get_text() for text in drawn.figure.axes[0].texts]
    assert sum(number.startswith(r"$\pm$") for number in numbers) == 2 * 2


def test_a_rank_looks_the_same_in_every_panel() -> None:
    """Also where a panel has other ranks than the next; of pretrained models the longest trained come first."""
    contents = [
        made(rank, **PRETRAINED, model__tie_first=True, anchor=anchor, optim__steps=steps)
        for anchor, ranks, steps in (("none", (1, 4), 50), ("token", (1, 2, 4, 8), 90), ("token", (1,), 20))
        for rank in ranks
    ]
    axes = drawing("usage", *contents).figure.axes
    looks: dict[str, set[tuple[object, object]]] = {}
    for line in itertools.chain.from_iterable(axis.get_lines() for axis in axes):
        if str(line.get_label()).startswith("rank"):
            looks.setdefault(str(line.get_label()), set()).add((line.get_color(), line.get_linestyle()))
    assert set(looks) == {"rank 2", "rank 4", "rank 8"} and all(len(each) == 1 for each in looks.values())
    assert len({look for each in looks.values() for look in each}) == len(looks)
    titles = [axis.get_title() for axis in axes[::2]]
    assert len(titles) == 2 and "token-conditioned" in titles[0] and "tied" in titles[1]


def test_the_pretrained_models_of_most_ranks_are_shown_first() -> None:
    """A variant of a rank is no rank more; of as many the longest trained."""
    contents = [
        made(rank, **PRETRAINED, model__tie_first=True, anchor="token", optim__steps=steps, model__map_hidden=hidden)
        for steps, dials in (
            (30, [(1, 0), (2, 0), (4, 0)]),
            (50, [(1, 0), (2, 0), (4, 0)]),
            (70, [(1, 0), (1, 64), (4, 0)]),
        )
        for rank, hidden in dials
    ]
    shown = on_pretrained(families(*contents))
    assert [family.settings["optim.steps"] for family, _ in shown] == [50, 30, 70]


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


def test_the_answers_come_first_and_each_claim_has_its_figure_beside_it(drawn: tuple[Path, Report]) -> None:
    page = (drawn[0] / "report.html").read_text()
    named = list(dict.fromkeys(verdict.claim.figure for verdict in drawn[1].verdicts))
    places = [page.index(text) for text in ('id="answers"', *(f'id="figure-{name}"' for name in named), 'id="figures"')]
    assert places == sorted(places) and set(named) <= set(figures.FIGURES)
    before = page[: page.index('<details class="section"')]
    assert before.count("<figure") == before.count('<article class="claim"') - drawn_twice(drawn[1])
    for name in figures.FIGURES:  # the caption stands under its picture
        caption = (drawn[0] / f"{name}.md").read_text().strip()
        assert html.escape(caption[-60:]) in page.partition(f'id="figure-{name}"')[2].partition("</figure>")[0]


def drawn_twice(report: Report) -> int:
    """Claims whose figure stands at a claim before."""
    claims = list(dict.fromkeys((verdict.claim.question, verdict.claim.figure) for verdict in report.verdicts))
    return len(claims) - len({figure for _, figure in claims})


def test_a_wide_table_shows_what_tells_its_rows_apart_and_folds_the_rest(drawn: tuple[Path, Report]) -> None:
    page = (drawn[0] / "report.html").read_text()
    for table in re.findall(r'<div class="table">.*?</table>', page, re.S):
        head, body = table.split("<tbody>")
        hidden = ["more" in cell for cell in re.findall(r"<th ([^>]*)>", head)]
        rows = [re.findall(r"<td([^>]*)>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
        assert all(["more" in kind for kind, _ in row] == hidden for row in rows)
        assert (hidden.count(False) <= 11 and f"show {sum(hidden)} more" in table) or not any(hidden)
        shown = [tuple(text for kind, text in row if "more" not in kind) for row in rows]
        assert len(set(shown)) == len(shown)
