"""C3: more drafts are accepted as the rank rises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experiments import star
from experiments.claims.equal_time import equal_time
from experiments.claims.ranks import judged, over_ranks, trend
from experiments.claims.verdict import Claim, Number, Verdict
from experiments.families import Family
from experiments.stats import over_seeds

CLAIM = Claim(
    id="C3",
    question="Does draft acceptance rise with the rank?",
    expected="more tokens per trunk pass as the rank rises",
    statistic="tokens per pass when sampling, rank 8 minus rank 1, one common target; paired over seeds and prompts",
    rule="holds: 95% interval above 0, not inside +-0.02, and no step from one rank to the next surely down; fails: 95% interval "
    "below 0 or inside +-0.02, or a step surely down",
    quantity="tokens_per_pass",
    unit="tokens per pass",
    target="common",
    figure="main",
    arms=(star.ranks, star.corpora, star.horizons, star.heads_for_equal_time, star.anchors, star.unembeddings),
    wanted=1,
    margin=0.02,
    gpu_arms=(star.gpu_ranks,),
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting, and one at equal wall-clock where there is one."""
    return over_ranks(CLAIM, families, _rows)


def _rows(family: Family, ours: list[Family]) -> list[Verdict]:
    row = judged(CLAIM, family, trend)
    return [replace(row, beside=row.beside + _own_target(family, ours)), *equal_time(CLAIM, family, ours)]


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
        Number(f"own target ({other.size}), rank {rank}:", mean, CLAIM.digits, CLAIM.unit)
        for other, rank, mean in means
        if mean is not None
    ]
