"""The paper's claims C1 to C8, a file each: question, cells, statistic, rule, figure, and the code that judges.

Rules were fixed before the runs; results/LOG.md dates each change. A verdict is a function of the records alone. Its
word is *holds*, *contradicted*, *no difference within ±x* (the whole interval is inside the claim's margin),
*underpowered (could have seen y or more)* or *not run*. y is the largest half-width among the intervals that decide
nothing, for ratios as a factor.

Verdicts are about the paper's own distribution (untied, anchor=none) on trunks of ours; C6 is about heads on a
pretrained model, each kind of draft by itself, and asks two questions.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.claims import (
    c1_likelihood,
    c2_first_token,
    c3_acceptance,
    c4_speed,
    c5_balance,
    c6_heads,
    c6_rank,
    c7_scale,
    c8_overhead,
)
from experiments.claims.c2_first_token import equal_level
from experiments.claims.verdict import (
    CONTRADICTED,
    HOLDS,
    NO_DIFFERENCE,
    NOT_RUN,
    UNDERPOWERED,
    Answer,
    Claim,
    Number,
    Verdict,
    seeds_text,
)
from experiments.families import Family

__all__ = [
    "CLAIMS",
    "CONTRADICTED",
    "HOLDS",
    "NOT_RUN",
    "NO_DIFFERENCE",
    "UNDERPOWERED",
    "Answer",
    "Claim",
    "Number",
    "Verdict",
    "answers",
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
    c6_heads,
    c6_rank,
    c7_scale,
    c8_overhead,
)
CLAIMS: tuple[Claim, ...] = tuple(page.CLAIM for page in _PAGES)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """Verdicts in the order of CLAIMS, one per setting that can be judged (one saying so where there is none)."""
    return [verdict for page in _PAGES for verdict in page.judge(families)]


def answers(verdicts: Sequence[Verdict]) -> list[Answer]:
    """One row per claim that the verdicts are of, in the order of CLAIMS."""
    by_claim = [(page, [verdict for verdict in verdicts if verdict.claim == page.CLAIM]) for page in _PAGES]
    return [page.answer(found) for page, found in by_claim if found]
