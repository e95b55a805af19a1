"""C2: the first-token loss does not depend on the rank.

Cells: models trained from scratch at ranks 1, 2, 4 and 8 with equal steps. An equivalence test: two one-sided tests at
5% for every rank, which need no correction, since all must hold. The README shows the
setting with the most cells.
"""

from collections.abc import Sequence

from experiments import star
from experiments.claims.ranks import at_top_rank, judged, over_ranks
from experiments.claims.verdict import CONTRADICTED, HOLDS, NOT_RUN, Claim, Finding, Verdict, percent
from experiments.families import Cells, Family
from experiments.stats import over_rank_one

LEVEL = 0.9  # of two one-sided tests at 5%

CLAIM = Claim(
    id="C2",
    question="Is the loss of the first token independent of the rank?",
    expected="the first-token NLL does not depend on the rank",
    statistic="held-out first-token NLL (eq. 11), every rank minus rank 1, from scratch; paired over seeds and test "
    "rows",
    rule="holds: every interval (90%: two one-sided tests at 5%) is inside ±0.02 nats; contradicted: some interval is "
    "wholly outside",
    quantity="first_token_nll",
    unit="nats",
    target="own",
    figure="first_token",
    arms=(star.ranks_from_scratch,),
    gpu_arms=(star.gpu_from_scratch,),
    margin=0.02,
    beyond=0.02,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting."""
    return over_ranks(CLAIM, families, lambda family, _: [judged(CLAIM, family, _equal)])


def _equal(claim: Claim, cells: dict[int, Cells]) -> Finding:
    """Every rank above 1 against rank 1; one that surely differs is enough to contradict."""
    ranks = [rank for rank in sorted(cells) if rank > 1]
    gaps = over_rank_one(cells, claim.quantity, level=LEVEL)
    numbers = [claim.number(f"rank {rank} - rank 1 {percent(LEVEL)}:", gap, sign=True) for rank, gap in gaps.items()]
    outside = [rank for rank, gap in gaps.items() if gap.low > claim.margin or gap.high < -claim.margin]
    alone = [rank for rank in ranks if rank not in gaps]
    if outside:
        which = f"rank {', '.join(map(str, outside))} differs from rank 1"
        return Finding(CONTRADICTED, f"{which} by more than {claim.margin:g} {claim.unit}", numbers)
    if alone:
        return Finding(NOT_RUN, f"rank {', '.join(map(str, alone))} shares no seed with rank 1", numbers)
    crossing = [gap for gap in gaps.values() if not claim.is_nothing(gap)]
    if not crossing:
        return Finding(HOLDS, "", numbers)
    return claim.underpowered(crossing, f"an interval crosses the margin of {claim.margin:g} {claim.unit}", numbers)


shown = at_top_rank
