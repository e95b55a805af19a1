"""C4: faster than autoregressive decoding and than rank 1.

Cells: those of C3, decoded side by side. The README shows the setting with the most cells, and answers for each rival.
"""

from collections.abc import Sequence

from experiments import star
from experiments.claims.ranks import judged, over_ranks
from experiments.claims.verdict import CONTRADICTED, HOLDS, NOT_RUN, Claim, Finding, Verdict, percent
from experiments.families import Cells, Family
from experiments.stats import Interval, over_seeds

CLAIM = Claim(
    id="C4",
    question="Is decoding faster than autoregressive (AR), and than rank 1?",
    expected="faster than autoregressive decoding and than rank 1",
    statistic="speed-up when sampling, over autoregressive decoding and over rank 1, measured side by side on one "
    "frozen target shared by all ranks",
    rule="holds: for some rank above 1 both intervals (95%, corrected for the number of ranks) are above 1; "
    "contradicted: for every rank above 1 some interval is below 1",
    quantity="speedup",
    unit="x",
    target="common",
    figure="over_rank1",
    arms=(star.ranks, star.corpora, star.horizons),
    gpu_arms=(star.gpu_ranks,),
    digits=2,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting."""
    return over_ranks(CLAIM, families, lambda family, _: [judged(CLAIM, family, _faster)])


def _faster(claim: Claim, cells: dict[int, Cells]) -> Finding:
    """Some rank above 1 beats both autoregressive decoding and rank 1; Bonferroni over the ranks."""
    above = [rank for rank in sorted(cells) if rank > 1]
    level = 1 - 0.05 / len(above)
    both: dict[int, tuple[Interval, Interval]] = {}
    for rank in above:
        over_ar = over_seeds(cells[rank], "speedup", level=level)
        over_rank1 = over_seeds(cells[rank], "speedup_over_rank1", level=level)
        if over_ar is not None and over_rank1 is not None:
            both[rank] = over_ar, over_rank1
    if not both:
        return Finding(NOT_RUN, "no rank above 1 was measured side by side with rank 1")
    # Reported: the rank whose weaker interval is best.
    best = max(both, key=lambda rank: min(interval.low for interval in both[rank]))
    numbers = [
        claim.number(f"rank {best} over autoregressive {percent(level)}:", both[best][0]),
        claim.number(f"over rank 1 {percent(level)}:", both[best][1]),
    ]
    if all(interval.low > 1 for interval in both[best]):
        return Finding(HOLDS, "", numbers)
    if len(both) == len(above) and all(any(interval.high < 1 for interval in pair) for pair in both.values()):
        slower = [
            "autoregressive decoding" if any(p.high < 1 for p, _ in both.values()) else "",
            "rank 1" if any(r.high < 1 for _, r in both.values()) else "",
        ]
        why = f"every rank above 1 is slower than {' or '.join(filter(None, slower))}"
        return Finding(CONTRADICTED, why, numbers)
    open_ = [pair for pair in both.values() if all(interval.high >= 1 for interval in pair)]
    if not open_:
        missing = ", ".join(str(rank) for rank in above if rank not in both)
        return Finding(NOT_RUN, f"rank {missing} was not measured side by side with rank 1", numbers)
    nearest = max(open_, key=lambda pair: min(interval.low for interval in pair))
    why = "for no rank are both intervals above 1, and for some neither is below"
    return claim.underpowered([interval for interval in nearest if interval.low <= 1], why, numbers)


def shown(verdict: Verdict) -> tuple[str, str]:
    if len(verdict.numbers) != 2:
        return verdict.plain, "-"
    words = [
        f"{rival}: {_beaten(number.interval)}"
        for rival, number in zip(("than AR", "than rank 1"), verdict.numbers, strict=True)
    ]
    rank = verdict.numbers[0].name.partition(" over")[0]
    return "; ".join(words), f"{rank}: {'; '.join(number.short() for number in verdict.numbers)}"


def _beaten(ratio: Interval) -> str:
    if ratio.low > 1:
        return "yes"
    return "no" if ratio.high < 1 else CLAIM.underpowered([ratio], "").phrase
