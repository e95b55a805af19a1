"""C4: faster than autoregressive decoding and than rank 1.

Cells: those of C3, decoded side by side. The README shows the setting with the most seeds, and answers for each rival.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments import star
from experiments.claims.equal_cost import equal_cost
from experiments.claims.ranks import judged, over_ranks
from experiments.claims.verdict import (
    CONTRADICTED,
    HOLDS,
    NOT_RUN,
    UNDERPOWERED,
    Claim,
    Finding,
    Number,
    Verdict,
    percent,
    sign,
)
from experiments.families import Cells, Family
from experiments.stats import Interval, over_seeds, together

CLAIM = Claim(
    id="C4",
    question="Is decoding faster than autoregressive (AR), than rank 1?",
    expected="faster than autoregressive decoding and than rank 1",
    statistic="speed-up when sampling, over autoregressive decoding and over rank 1, measured side by side on one "
    "frozen target shared by all ranks",
    rule="holds: for some rank above 1 both intervals (95%, corrected for the number of ranks) are above 1; no "
    "difference: for every rank both are inside ±2%; contradicted: for every rank above 1 some interval is below 1. At "
    "equal training time and equal parameters: the 95% interval of rank 8 over rank 1",
    quantity="speedup",
    unit="x",
    target="common",
    figure="over_rank1",
    arms=(star.ranks, star.corpora, star.horizons, star.heads_for_equal_time, star.anchors),
    gpu_arms=(star.gpu_ranks,),
    wanted=1,
    margin=0.02,
    digits=2,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting, and those at equal cost where there are such cells."""
    return over_ranks(CLAIM, families, _rows)


def _rows(family: Family, ours: list[Family]) -> list[Verdict]:
    row, equal = judged(CLAIM, family, _faster), equal_cost(CLAIM, family, ours)
    beside = [*(number for each in equal for number in each.numbers), *row.beside, *_greedy(family.by_rank())]
    return [replace(row, beside=beside), *equal]


def _greedy(cells: dict[int, Cells]) -> list[Number]:
    """Every rank above 1 over rank 1 under greedy, where only the likeliest tokens count."""
    over = {rank: over_seeds(found, "speedup_over_rank1", "greedy") for rank, found in cells.items() if rank > 1}
    return [
        CLAIM.number(f"greedy, rank {rank} over rank 1:", ratio) for rank, ratio in over.items() if ratio is not None
    ]


def _faster(claim: Claim, cells: dict[int, Cells]) -> Finding:
    """Some rank above 1 beats both autoregressive decoding and rank 1; Bonferroni over the ranks."""
    above = [rank for rank in sorted(cells) if rank > 1]
    level = 1 - 0.05 / len(above)
    found = [{rank: over_seeds(cells[rank], name) for rank in above} for name in ("speedup", "speedup_over_rank1")]
    over_ar, over_rank1 = (
        together({rank: ratio for rank, ratio in each.items() if ratio is not None}, level, one_base=True)
        for each in found
    )
    both = {rank: (over_ar[rank], over_rank1[rank]) for rank in above if rank in over_ar and rank in over_rank1}
    if not both:
        return Finding(NOT_RUN, "no rank above 1 was measured side by side with rank 1")
    # Reported: the rank whose weaker interval is best.
    best = max(both, key=lambda rank: min(interval.low for interval in both[rank]))
    numbers = [
        claim.number(f"rank {best} over autoregressive {percent(level)}:", both[best][0]),
        claim.number(f"over rank 1 {percent(level)}:", both[best][1]),
    ]
    if len(both) == len(above) and all(claim.is_nothing(interval) for pair in both.values() for interval in pair):
        return claim.no_difference(numbers)
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
    """Autoregressive decoding, rank 1, and rank 1 at equal cost, in this order; the number is that over rank 1."""
    if len(verdict.numbers) != 2:
        return verdict.plain, "-"
    (over_ar, over_rank1), equal = verdict.numbers, [each for each in verdict.beside if ", equal " in each.name]
    asked = {"AR": over_ar, "rank 1": over_rank1} | {
        "at " + each.name.partition(", ")[2].partition(" (")[0].removesuffix(":"): each for each in equal
    }
    words = [f"{rival}: {_beaten(number.interval)}" for rival, number in asked.items()]
    return "; ".join(words), over_rank1.short("over rank 1")


def _beaten(ratio: Interval) -> str:
    return {1: "yes", -1: "no"}.get(sign(ratio), UNDERPOWERED)
