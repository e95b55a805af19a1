"""C3: more drafts are accepted as the rank rises.

Cells: heads of ranks 1, 2, 4 and 8 on one frozen trunk, on code and text, at horizons 2, 4 and 8; rank 1 trained for
rank 8's time. Beside the star: eight seeds of ranks 1 and 8 (profile=seeds). The README shows the setting with the most
seeds at equal steps.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments import star
from experiments.claims.equal_cost import equal_cost
from experiments.claims.ranks import at_top_rank, judged, over_ranks, trend
from experiments.claims.verdict import Claim, Number, Verdict
from experiments.families import Family
from experiments.stats import over_seeds

CLAIM = Claim(
    id="C3",
    question="Does a higher rank draft more accepted tokens?",
    expected="more tokens per target forward as the rank rises",
    statistic="tokens per target forward when sampling, rank 8 minus rank 1, one frozen target shared by all ranks; "
    "paired over seeds and prompts",
    rule="holds: the 95% interval is above 0, not inside ±0.02, and no step from one rank to the next is surely "
    "down; contradicted: the interval is below 0, or a step is surely down; no difference: the interval is inside "
    "±0.02",
    quantity="tokens_per_pass",
    unit="tokens per forward",
    target="common",
    figure="main",
    arms=(star.ranks, star.corpora, star.horizons, star.heads_for_equal_time, star.anchors, star.unembeddings),
    gpu_arms=(star.gpu_ranks,),
    wanted=1,
    margin=0.02,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting, and those at equal cost where there are such cells."""
    return over_ranks(CLAIM, families, _rows)


def _rows(family: Family, ours: list[Family]) -> list[Verdict]:
    row = judged(CLAIM, family, trend)
    return [replace(row, beside=[*row.beside, *_own_target(family, ours)]), *equal_cost(CLAIM, family, ours)]


def _own_target(family: Family, ours: list[Family]) -> list[Number]:
    """Of cells whose target was trained with the heads, which is another one for every rank."""
    means = [
        (other, rank, over_seeds(other.cells["untied", rank], CLAIM.quantity))
        for other in ours
        if other.target == "own"
        and other.horizon == family.horizon
        and other.settings["corpus"] == family.settings["corpus"]
        for rank in other.ranks()
    ]
    return [
        CLAIM.number(f"target trained with the heads ({other.size}), rank {rank}:", mean)
        for other, rank, mean in means
        if mean is not None
    ]


shown = at_top_rank
