"""The paper's claims C1 to C8, a file each: question, cells, statistic, rule, figure, and the code that judges.

Rules were fixed before the runs; results/LOG.md dates each change. A verdict is a function of the records alone. Verdicts are
about the paper's own distribution (untied, anchor=none) on trunks of ours; C6 is about heads on a pretrained model.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.claims import (
    c1_likelihood,
    c2_first_token,
    c3_acceptance,
    c4_speed,
    c5_balance,
    c6_pretrained,
    c7_scale,
    c8_overhead,
)
from experiments.claims.c2_first_token import equal_level
from experiments.claims.verdict import FAILS, HOLDS, NOT_MEASURED, UNMEASURED, Claim, Number, Verdict, seeds_text
from experiments.families import Family

__all__ = [
    "CLAIMS",
    "FAILS",
    "HOLDS",
    "NOT_MEASURED",
    "UNMEASURED",
    "Claim",
    "Number",
    "Verdict",
    "equal_level",
    "judge",
    "seeds_text",
]

_PAGES = (
    c1_likelihood,
    c2_first_token,
    c3_acceptance,
    c4_speed,
    c5_balance,
    c6_pretrained,
    c7_scale,
    c8_overhead,
)
CLAIMS: tuple[Claim, ...] = tuple(page.CLAIM for page in _PAGES)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """Verdicts in the order of CLAIMS, one per setting that can be judged (one saying so where there is none)."""
    return [verdict for page in _PAGES for verdict in page.judge(families)]
