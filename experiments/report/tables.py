"""Every table of the report. The same records always give the same bytes."""

import shutil
import textwrap

from experiments.claims import Verdict
from experiments.claims.verdict import RULED
from experiments.families import Family
from experiments.report.cells import (
    cells_table,
    cost_table,
    paired_table,
    pretrained_table,
    references_table,
)
from experiments.report.table import Made, Table, braces, title_of

RULED_AFTER = "after its records"
INTERVALS = (
    "Intervals are 95% unless marked, over test rows or prompts and over seeds (one seed: rows or prompts only)."
)
# In the order of the report, after the claims.
TABLES = (
    cells_table,
    paired_table,
    references_table,
    pretrained_table,
    cost_table,
)


def of_cells(families: list[Family]) -> list[Made]:
    """Every table of the cells; one may be without rows."""
    return [Made(table.name, title_of(make), table) for make in TABLES for table in [make(families)]]


def claims_table(verdicts: list[Verdict]) -> Table:
    """Every verdict: what decided, what stands beside it, and the records."""
    rows: list[tuple[str, ...]] = []
    for v in verdicts:
        beside = f". Beside: {'; '.join(number.text() for number in v.beside)}" if v.beside else ""
        rows.append(
            (
                v.claim.name,
                v.setting,
                v.expected or v.claim.expected,
                v.measured() + beside,
                v.verdict,
                v.visible,
                RULED_AFTER if v.is_ruled_after else "before its records" if v.records else "-",
                braces(v.records) or "none",
            )
        )
    caption = (
        f"{INTERVALS} Verdicts are about the paper's distribution (untied, link=none); C6 has a row for each kind "
        "of draft. Visible: the smallest effect that the deciding intervals could have shown (their largest "
        f"half-width, for ratios as a factor). Rule: of {RULED[:10]}, its margins being what matters to a user. "
        f'"{RULED_AFTER}": the row is judged by a rule that is younger than its records. Rules: '
        + " ".join(f"{c.name}: {c.question} {c.statistic}; {c.rule}." for c in dict.fromkeys(v.claim for v in verdicts))
    )
    return Table(
        "claims", caption, ("claim", "setting", "expected", "measured", "verdict", "visible", "rule", "record"), rows
    )


def claims_text(verdicts: list[Verdict]) -> str:
    """For this terminal: of every verdict its claim and setting, what was measured, and the word."""
    width, lines = max(20, min(118, shutil.get_terminal_size((118, 24)).columns)), []
    for v in verdicts:
        lines += textwrap.wrap(f"{v.claim.name}: {v.setting}", width)
        for said in (*(number.text() for number in v.numbers), v.verdict):
            lines += textwrap.wrap(said, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
