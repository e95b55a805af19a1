"""C6, heads: heads alone make a pretrained, frozen model decode faster.

Cells: heads of ranks 1, 2, 4 and 8 on SmolLM2-135M-Instruct, by kind of draft, text, training and precision. The
README shows the longest training. Whether rank adds to it is `c6_rank.py`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from experiments import pretrained
from experiments.claims.verdict import CONTRADICTED, HOLDS, NOT_RUN, Claim, Finding, Number, Verdict, cited, percent
from experiments.families import Cells, Family
from experiments.records import Record, counted
from experiments.stats import Interval, over_seeds, together

CLAIM = Claim(
    id="C6",
    part="heads",
    question="Do trained heads make a pretrained model faster than autoregressive decoding?",
    expected="heads alone make a pretrained model decode faster",
    statistic="speed-up when sampling, over autoregressive decoding of the pretrained model, measured side by side",
    rule="holds: for some rank the interval (95%, corrected for the number of ranks) is above 1; no difference: for "
    "every rank it is inside ±2%; contradicted: for every rank it is below 1",
    quantity="speedup",
    unit="x",
    target="pretrained",
    figure="pretrained",
    arms=(pretrained.retrofit,),
    margin=0.02,
    digits=2,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting and kind of draft."""
    rows = [_row(family, variant) for family, variant in settings(families)]
    return CLAIM.complete(rows, "no records of heads on a pretrained model")


def settings(families: Sequence[Family]) -> list[tuple[Family, str]]:
    """(family, variant) of heads on a pretrained model, the longest trained first. Cells of a short training, by which
    the objective was chosen, do not count, nor do those that were never decoded."""
    usable = [
        family
        for family in families
        if family.is_pretrained
        and any(record["decoding"] and record["claim"] != "C6-screen" for record in family.records())
    ]
    usable.sort(key=lambda family: positions(family.records()[0]), reverse=True)
    return [(family, variant) for family in usable for variant in family.variants()]


def positions(record: Record) -> int:
    """Positions that trained the window, of all steps."""
    return round(record["training"]["tokens"] * record.config["loss"]["joint_fraction"])


def row(claim: Claim, family: Family, variant: str, finding: Finding, beside: Sequence[Number] = ()) -> Verdict:
    seeds = [
        sum(record["decoding"] is not None for record in cells.values()) for cells in family.by_rank(variant).values()
    ]
    fewest, most = min(seeds), max(seeds)
    said = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds by rank"
    return finding.of(
        claim,
        f"{family.label}, {variant}, {said}",
        beside=beside,
        seeds=fewest,
        **cited(family.records(variant)),
    )


def _row(family: Family, variant: str) -> Verdict:
    cells = family.by_rank(variant)
    level = 1 - 0.05 / len(cells)  # Bonferroni over the ranks
    speeds = {rank: over_seeds(by_seed, CLAIM.quantity) for rank, by_seed in cells.items()}
    found = some_rank(CLAIM, speeds, level, "autoregressive decoding")
    why, beside = _why(family.horizon, cells)
    found = replace(found, reason="; ".join(part for part in (found.reason, *why) if part))
    measured = [("tokens_per_pass", "tokens per forward"), ("speedup", "x"), ("speedup_over_rank1", "x rank 1")]
    beside += [
        Number(f"{mode}, rank {rank}:", value, CLAIM.digits, unit)
        for mode in ("sampling", "greedy")
        for rank, by_seed in cells.items()
        for quantity, unit in measured
        if (value := over_seeds(by_seed, quantity, mode)) is not None
    ]
    return row(CLAIM, family, variant, found, beside)


def some_rank(claim: Claim, found: dict[int, Interval | None], level: float, rival: str) -> Finding:
    """Whether for some rank the ratio is surely above 1, judged at `level`. found: None where it was not measured."""
    ratios = together({rank: interval for rank, interval in found.items() if interval is not None}, level)
    if not ratios:
        return Finding(NOT_RUN, f"no speed over {rival} was measured")
    faster = {rank: interval for rank, interval in ratios.items() if interval.low > 1}
    best = max(faster or ratios, key=lambda rank: ratios[rank].mean)
    numbers = [claim.number(f"rank {best} over {rival} {percent(level)}:", ratios[best])]
    if faster and not all(claim.is_nothing(interval) for interval in ratios.values()):
        return Finding(HOLDS, "", numbers)
    if len(ratios) == len(found) and all(claim.is_nothing(interval) for interval in ratios.values()):
        return claim.no_difference(numbers)
    undecided = [interval for interval in ratios.values() if interval.high >= 1]
    if undecided:
        return claim.underpowered(undecided, "for no rank is the interval above 1, and for some not below", numbers)
    if missing := [str(rank) for rank in found if rank not in ratios]:
        why = f"every other rank is slower than {rival}, but rank {', '.join(missing)} was not decoded"
        return Finding(NOT_RUN, why, numbers)
    return Finding(CONTRADICTED, f"every rank is slower than {rival}", numbers)


def _why(horizon: int, cells: dict[int, Cells]) -> tuple[list[str], list[Number]]:
    """What lies behind a speed-up: what a forward over the window costs, drafts accepted by depth, and how many
    components make them; in words, and as numbers."""
    words, numbers = [], []
    timed = [mode for by_seed in cells.values() for record in by_seed.values() if (mode := record.mode("sampling"))]
    if timed:
        cost = statistics.median(1 / mode["conversion_limit"] for mode in timed)
        words.append(f"a target forward over {horizon} tokens takes {cost:.2f} times as long as one over 1")
    for rank, by_seed in cells.items():
        found = {depth: over_seeds(by_seed, f"kept:{depth}") for depth in range(1, horizon + 1)}
        kept = {depth: share for depth, share in found.items() if share is not None}
        numbers += [Number(f"rank {rank}, depth {depth}:", share, 3, "accepted") for depth, share in kept.items()]
        if kept and rank in (min(cells), max(cells)):
            shares = ", ".join(f"{share.mean:.2f}" for share in kept.values())
            words.append(f"of rank {rank}'s drafts {shares} are accepted at depths {', '.join(map(str, kept))}")
        effective = over_seeds(by_seed, "effective")
        if rank > 1 and effective is not None:
            numbers.append(Number(f"rank {rank}:", effective, 2, "effective components"))
            if effective.mean < rank / 2:
                words.append(f"components collapsed ({effective.mean:.1f} of {rank} in use)")
    return words, numbers


def shown(verdict: Verdict) -> tuple[str, str]:
    """The number is that of the best rank, which its name begins with."""
    if not verdict.numbers:
        return verdict.plain, "-"
    number = verdict.numbers[0]
    return verdict.plain, number.short(f"at {number.name.partition(' over')[0]}")
