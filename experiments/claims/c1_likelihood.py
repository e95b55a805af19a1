"""C1: the joint loss falls as the rank rises.

Cells: models trained from scratch at ranks 1, 2, 4 and 8 with equal steps, and rank 1 trained for rank 8's time. The
README shows the setting with the most cells at equal steps.
"""

from collections.abc import Sequence

from experiments import star
from experiments.claims.equal_cost import equal_time
from experiments.claims.ranks import at_top_rank, judged, over_ranks, trend
from experiments.claims.verdict import Claim, Verdict
from experiments.families import Family

CLAIM = Claim(
    id="C1",
    question="Does the joint loss of the next tokens fall as the rank rises?",
    expected="the joint NLL falls as the rank rises, at equal steps",
    statistic="held-out joint NLL, rank 8 minus rank 1, from scratch; paired over seeds and test rows",
    rule="holds: the 95% interval is below 0, not inside ±0.02 nats, and no step from one rank to the next is surely "
    "up; contradicted: the interval is above 0, or a step is surely up; no difference: the interval is inside ±0.02 "
    "nats",
    quantity="joint_nll",
    unit="nats",
    target="own",
    figure="nll",
    arms=(star.ranks_from_scratch, star.scratch_for_equal_time),
    gpu_arms=(star.gpu_from_scratch,),
    wanted=-1,
    margin=0.02,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting, and one at equal training time where there is one."""
    return over_ranks(
        CLAIM, families, lambda family, ours: [judged(CLAIM, family, trend), *equal_time(CLAIM, family, ours)]
    )


shown = at_top_rank
