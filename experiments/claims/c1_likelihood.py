"""C1: the joint loss falls as the rank rises."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import star
from experiments.claims.equal_time import equal_time
from experiments.claims.ranks import judged, over_ranks, trend
from experiments.claims.verdict import Claim, Verdict
from experiments.families import Family

CLAIM = Claim(
    id="C1",
    question="Does the joint negative log-likelihood fall as the rank rises?",
    expected="joint NLL falls as the rank rises, at equal steps",
    statistic="held-out joint NLL, rank 8 minus rank 1, from scratch; paired over seeds and test rows",
    rule="holds: 95% interval below 0, not inside +-0.01 nats, and no step from one rank to the next surely up; fails: 95% "
    "interval above 0 or inside +-0.01 nats, or a step surely up",
    quantity="joint_nll",
    unit="nats",
    target="own",
    figure="nll",
    arms=(star.ranks_from_scratch, star.scratch_for_equal_time),
    wanted=-1,
    margin=0.01,
    gpu_arms=(star.gpu_from_scratch,),
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting, and one at equal wall-clock where there is one."""
    return over_ranks(
        CLAIM, families, lambda family, ours: [judged(CLAIM, family, trend), *equal_time(CLAIM, family, ours)]
    )
