"""C4: faster than autoregressive decoding and than rank 1."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import star
from experiments.claims.ranks import judged, over_ranks
from experiments.claims.verdict import FAILS, HOLDS, UNMEASURED, Claim, Finding, Number, Verdict
from experiments.families import Cells, Family
from experiments.stats import Interval, over_seeds

CLAIM = Claim(
    id="C4",
    question="Is decoding faster than autoregressive decoding and than rank 1?",
    expected="faster than plain decoding and than rank 1",
    statistic="speed-up when sampling, over plain decoding and over rank 1, measured side by side on one common target",
    rule="holds: for some rank above 1 both intervals above 1 (95%, corrected for the number of ranks); fails: for every "
    "rank above 1 some interval below 1",
    quantity="speedup",
    unit="x",
    target="common",
    figure="over_rank1",
    arms=(star.ranks, star.corpora, star.horizons),
    digits=2,
    gpu_arms=(star.gpu_ranks,),
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting."""
    return over_ranks(CLAIM, families, lambda family, _: [judged(CLAIM, family, _faster)])


def _faster(claim: Claim, cells: dict[int, Cells]) -> Finding:
    """Some rank above 1 beats both autoregressive decoding and rank 1; Bonferroni over the ranks."""
    ranks = [rank for rank in sorted(cells) if rank > 1]
    level = 1 - 0.05 / len(ranks)
    both: dict[int, tuple[Interval, Interval]] = {}
    for rank in ranks:
        over_plain = over_seeds(cells[rank], "speedup", level=level)
        over_rank1 = over_seeds(cells[rank], "speedup_over_rank1", level=level)
        if over_plain is not None and over_rank1 is not None:
            both[rank] = over_plain, over_rank1
    if not both:
        return Finding(UNMEASURED, "no rank above 1 was measured side by side with rank 1")
    # Reported: the rank whose weaker interval is best.
    best = max(both, key=lambda rank: min(interval.low for interval in both[rank]))
    percent = f"({100 * level:.1f}%)"
    numbers = [
        Number(f"rank {best} over plain {percent}:", both[best][0], claim.digits, claim.unit),
        Number(f"over rank 1 {percent}:", both[best][1], claim.digits, claim.unit),
    ]
    if all(interval.low > 1 for interval in both[best]):
        return Finding(HOLDS, "", numbers)
    if len(both) == len(ranks) and all(any(interval.high < 1 for interval in pair) for pair in both.values()):
        slower = [
            "plain decoding" if any(p.high < 1 for p, _ in both.values()) else "",
            "rank 1" if any(r.high < 1 for _, r in both.values()) else "",
        ]
        return Finding(FAILS, f"every rank above 1 is slower than {' or '.join(filter(None, slower))}", numbers)
    why = "undecided: for no rank are both intervals above 1, and for some rank neither is below"
    return Finding(UNMEASURED, why, numbers)
