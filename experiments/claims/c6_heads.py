"""C6, heads: heads alone make a pretrained, frozen model decode faster.

Cells: heads of ranks 1, 2, 4 and 8 on SmolLM2-135M-Instruct, by kind of draft, text, training and precision. The
README shows the longest training, of which the released heads are. Whether rank adds to it is `c6_rank.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from cpdlm.config import LossConfig
from experiments import pretrained
from experiments.claims.verdict import (
    CONTRADICTED,
    HOLDS,
    NOT_RUN,
    Answer,
    Claim,
    Finding,
    Number,
    Verdict,
    complete,
    headline,
    percent,
    plain_answer,
    underpowered,
)
from experiments.families import Cells, Family
from experiments.records import Record, counted
from experiments.stats import Interval, over_seeds

CLAIM = Claim(
    id="C6",
    part="heads",
    question="Do trained heads make a pretrained model faster than autoregressive decoding?",
    expected="heads alone make a pretrained model decode faster",
    statistic="speed-up when sampling, over autoregressive decoding of the pretrained model, measured side by side",
    rule="holds: for some rank the interval (95%, corrected for the number of ranks) is above 1; contradicted: for "
    "every rank it is below 1",
    quantity="speedup",
    unit="x",
    target="pretrained",
    figure="readme",
    arms=(pretrained.retrofit,),
    digits=2,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting and kind of draft."""
    rows = [_row(family, variant) for family, variant in settings(families)]
    return complete(CLAIM, rows, "no records of heads on a pretrained model", [])


def settings(families: Sequence[Family]) -> list[tuple[Family, str]]:
    """(family, variant) of heads on a pretrained model, the longest trained first. Cells of a short training, by which
    the objective was chosen, do not count."""
    usable = [family for family in families if family.is_pretrained and not _is_screen(family)]
    return [(family, variant) for family in sorted(usable, key=_longest, reverse=True) for variant in family.variants()]


def _is_screen(family: Family) -> bool:
    return all(record["claim"] == "C6-screen" for record in family.records())


def _longest(family: Family) -> int:
    return positions(family.records()[0])


def positions(record: Record) -> int:
    """Positions that trained the window, of all steps."""
    fraction = record.config["loss"].get("joint_fraction", LossConfig.joint_fraction)
    return round(record["training"]["tokens"] * fraction)


def row(claim: Claim, family: Family, variant: str, finding: Finding, beside: list[Number]) -> Verdict:
    cells = {rank: family.cells[variant, rank] for rank in family.ranks(variant)}
    fewest, most = (choose(map(len, cells.values())) for choose in (min, max))
    seeds = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds by rank"
    return Verdict(
        claim,
        f"{family.label}, {variant}, {seeds}",
        finding.word,
        finding.reason,
        beside=beside,
        records=[record.path for record in family.records(variant)],
        seeds=fewest,
    ).found(finding)


def _row(family: Family, variant: str) -> Verdict:
    cells = {rank: family.cells[variant, rank] for rank in family.ranks(variant)}
    found, (why, beside) = _faster(cells), _why(family.horizon, cells)
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


def _faster(cells: dict[int, Cells]) -> Finding:
    """Some rank beats autoregressive decoding; Bonferroni over the ranks."""
    level = 1 - 0.05 / len(cells)
    found = {rank: over_seeds(by_seed, "speedup", level=level) for rank, by_seed in cells.items()}
    over_ar = {rank: interval for rank, interval in found.items() if interval is not None}
    return some_rank(CLAIM, list(cells), over_ar, level, "autoregressive decoding")


def some_rank(claim: Claim, ranks: list[int], ratios: dict[int, Interval], level: float, rival: str) -> Finding:
    """Whether for some rank the ratio is surely above 1. ratios: at `level`, of the ranks that were measured."""
    if not ratios:
        return Finding(NOT_RUN, f"no speed over {rival} was measured")
    faster = {rank: interval for rank, interval in ratios.items() if interval.low > 1}
    best = max(faster or ratios, key=lambda rank: ratios[rank].mean)
    numbers = [Number(f"rank {best} over {rival} {percent(level)}:", ratios[best], claim.digits, claim.unit)]
    if faster:
        return Finding(HOLDS, "", numbers)
    undecided = [interval for interval in ratios.values() if interval.high >= 1]
    if undecided:
        return underpowered(claim, undecided, "for no rank is the interval above 1, and for some not below", numbers)
    if missing := [str(rank) for rank in ranks if rank not in ratios]:
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


def answer(verdicts: Sequence[Verdict]) -> Answer:
    return headline(verdicts, shown)


def shown(verdict: Verdict) -> tuple[str, str]:
    """The number is that of the best rank, which its name begins with."""
    if not verdict.numbers:
        return plain_answer(verdict), "-"
    number = verdict.numbers[0]
    return plain_answer(verdict), number.short(f"at {number.name.partition(' over')[0]}")
