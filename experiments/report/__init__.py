"""From records to verdicts, tables and figures: everything printed as a result is a function of `results/` alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.claims import Verdict


@dataclass(frozen=True)
class Report:
    """What `render` made. text: the verdicts for a terminal. notes: what a reader must know, one line each."""

    text: str
    verdicts: list[Verdict]
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def render(results: Path, figures: Path, readme: Path | None = None) -> Report:
    """Redraw tables, figures and page of the records under `results` into `figures`; update `readme` where it is there.

    Tables need no matplotlib; without it the figures are left out with a note. Raises RecordError for a folder that
    is not there or a claims block that is torn, WriteError where `figures` cannot be written.
    """
    from experiments import claims
    from experiments.families import families_of
    from experiments.records import load_all
    from experiments.report import benchmarks, decoding, page, sample, scaling, speed, table, tables, tasks
    from experiments.report import figures as drawing
    from experiments.report import readme as front

    records, damaged = load_all(results)
    families, notes = families_of(records)
    found = claims.judge(families)
    notes = [*damaged, *notes]
    files = table.write_table(tables.claims_table(found), figures / "tables", notes)
    made = tables.of_cells(families)
    if readme is not None and readme.is_file():
        blocks, docs = front.blocks(results, records, families, found), readme.parent / "docs" / "reproducing.md"
        if not front.update(readme, blocks):
            notes.append(f"{readme} has no <!-- claims:begin --> line: its claims were not updated")
        if docs.is_file():
            front.update(docs, blocks)
    drawn, shown = drawing.draw_all(families, figures)
    if (results / "benchmarks").is_dir():  # a sweep has none
        made += benchmarks.tables(results, decoding.TABLES) + tasks.tables(results) + speed.tables(results)
        made += benchmarks.tables(results, scaling.TABLES)
        pictures, beside = drawing.draw_benchmarks(results, figures)
        front_files, front_shown = drawing.draw_front(results, families, figures)
        drawn, shown = [*drawn, *pictures, *front_files, *sample.draw(results, figures)], [*shown, *beside, front_shown]
    written, left_out = table.write_made(made, figures / "tables")
    files, notes = [*files, *written], [*notes, *left_out]
    html = page.write(figures / "report.html", records, found, shown, made, notes)
    notes += [f"figure {each.name} left out: {each.caption}" for each in shown if each.picture is None]
    return Report(tables.claims_text(found), found, [*files, *drawn, html], notes)
