"""C6, rank: on a pretrained, frozen model a rank above 1 is faster than rank 1.

Cells and deciding setting: those of `c6_heads.py`. Until 2026-11-28 this stood beside the other question, which rank 1
alone can satisfy.
"""

from collections.abc import Sequence

from experiments import pretrained
from experiments.claims import c6_heads
from experiments.claims.verdict import Claim, Verdict
from experiments.families import Family
from experiments.stats import over_seeds

CLAIM = Claim(
    id="C6",
    part="rank",
    question="Does a rank above 1 make a pretrained model faster than rank 1 does?",
    expected="rank did not help the speed of many models",
    statistic="speed when sampling, every rank above 1 over rank 1 on the same pretrained model, measured side by side",
    rule="holds: for some rank above 1 the interval (95%, corrected for their number) is above 1; no difference: for "
    "every one it is inside ±2%; contradicted: for every one it is below 1",
    quantity="speedup_over_rank1",
    unit="x",
    target="pretrained",
    figure="pretrained",
    arms=(pretrained.retrofit,),
    margin=0.02,
    digits=2,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting and kind of draft that has a rank above 1."""
    rows = [_row(family, variant) for family, variant in c6_heads.settings(families) if family.ranks(variant)[-1] > 1]
    return CLAIM.complete(rows, "no records of a rank above 1 on a pretrained model")


def _row(family: Family, variant: str) -> Verdict:
    above = {rank: cells for rank, cells in family.by_rank(variant).items() if rank > 1}
    level = 1 - 0.05 / len(above)
    found = {rank: over_seeds(cells, CLAIM.quantity) for rank, cells in above.items()}
    return c6_heads.row(CLAIM, family, variant, c6_heads.some_rank(CLAIM, found, level, "rank 1"))


shown = c6_heads.shown
