"""The paper's claims C1 to C8, a file each: question, cells, statistic, rule, figure, and the code that judges.

results/LOG.md dates each change of a rule, and a verdict says where its rule is younger than its records. A verdict is
a function of the records alone. Its word is *holds*, *contradicted*, *no difference within ±x* (the whole interval is
inside the claim's margin), *underpowered (could have seen y or more)* or *not run*. y is the largest half-width among
the intervals that decide nothing, for ratios as a factor.

Verdicts are about the paper's own distribution (untied, link=none) on trunks of ours; C6 is about heads on a
pretrained model, each kind of draft by itself, and asks two questions.
"""

from collections.abc import Sequence

from experiments.claims import c1_likelihood as c1
from experiments.claims import c2_first_token as c2
from experiments.claims import c3_acceptance as c3
from experiments.claims import c4_speed as c4
from experiments.claims import c5_balance as c5
from experiments.claims import c6_heads, c6_rank
from experiments.claims import c7_scale as c7
from experiments.claims import c8_overhead as c8
from experiments.claims.verdict import Answer, Claim, Verdict, headline
from experiments.families import Family

_PAGES = (c1, c2, c3, c4, c5, c6_heads, c6_rank, c7, c8)
CLAIMS: tuple[Claim, ...] = tuple(page.CLAIM for page in _PAGES)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """Verdicts in the order of CLAIMS, one per setting that can be judged (one saying so where there is none)."""
    return [verdict for page in _PAGES for verdict in page.judge(families)]


def answers(verdicts: Sequence[Verdict]) -> list[Answer]:
    """One row per claim that the verdicts are of, in the order of CLAIMS."""
    by_page = [(page, [verdict for verdict in verdicts if verdict.claim == page.CLAIM]) for page in _PAGES]
    return [headline(found, page.shown) for page, found in by_page if found]
