"""C6: heads alone make a pretrained, frozen model decode faster."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments import pretrained
from experiments.claims.verdict import FAILS, HOLDS, UNMEASURED, Claim, Finding, Number, Verdict, complete
from experiments.families import Cells, Family
from experiments.records import counted
from experiments.stats import over_seeds

CLAIM = Claim(
    id="C6",
    question="Does it work when only heads on a frozen, pretrained model are trained?",
    expected="heads alone make a pretrained model decode faster",
    statistic="speed-up when sampling, over plain decoding of the pretrained model, measured side by side; over rank 1 beside it",
    rule="holds: for some rank the interval over plain decoding is above 1 (95%, corrected for the number of ranks); fails: for "
    "every rank it is below 1",
    quantity="speedup",
    unit="x",
    target="pretrained",
    figure="readme",
    arms=(pretrained.retrofit,),
    digits=2,
)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting and kind of draft. Cells of a short training, by which the objective was chosen, do not count."""
    usable = [family for family in families if family.is_pretrained and not _is_screen(family)]
    rows = [_row(family, variant) for family in usable for variant in family.variants()]
    return complete(CLAIM, rows, "no records of heads on a pretrained model", usable)


def _is_screen(family: Family) -> bool:
    return all(record["claim"] == "C6-screen" for record in family.records())


def _row(family: Family, variant: str) -> Verdict:
    cells = {rank: family.cells[variant, rank] for rank in family.ranks(variant)}
    found = _works(cells)
    why, beside = _why(family.horizon, cells)
    for mode in ("sampling", "greedy"):
        for rank, by_seed in cells.items():
            for quantity, unit in (
                ("tokens_per_pass", "tokens per pass"),
                ("speedup", "x"),
                ("speedup_over_rank1", "x rank 1"),
            ):
                value = over_seeds(by_seed, quantity, mode)
                if value is not None:
                    beside.append(Number(f"{mode}, rank {rank}:", value, CLAIM.digits, unit))
    counts = [len(by_seed) for by_seed in cells.values()]
    fewest, most = min(counts), max(counts)
    seeds = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds by rank"
    return Verdict(
        CLAIM,
        f"{family.label}, {variant}, {seeds}",
        found.word,
        "; ".join(part for part in (found.reason, *why) if part),
        found.numbers,
        beside,
        [record.path for record in family.records(variant)],
        fewest,
    )


def _works(cells: dict[int, Cells]) -> Finding:
    """Some rank beats autoregressive decoding; Bonferroni over the ranks. The best rank above 1 stands beside rank 1."""
    level = 1 - 0.05 / len(cells)
    over_plain = {rank: over_seeds(by_seed, "speedup", level=level) for rank, by_seed in cells.items()}
    measured = {rank: interval for rank, interval in over_plain.items() if interval is not None}
    if not measured:
        return Finding(UNMEASURED, "no cell was decoded")
    faster = {rank: interval for rank, interval in measured.items() if interval.low > 1}
    best = max(faster or measured, key=lambda rank: measured[rank].mean)
    percent = f"({100 * level:.1f}%)"
    numbers = [Number(f"rank {best} over plain {percent}:", measured[best], CLAIM.digits, CLAIM.unit)]
    beaten = {rank: over_seeds(cells[rank], "speedup_over_rank1", level=level) for rank in cells if rank > 1}
    known = {rank: interval for rank, interval in beaten.items() if interval is not None}
    if known:
        rival = max(known, key=lambda rank: known[rank].mean)
        numbers.append(Number(f"rank {rival} over rank 1 {percent}:", known[rival], CLAIM.digits, CLAIM.unit))
    if faster:
        return Finding(HOLDS, "", numbers)
    slower = all(interval.high < 1 for interval in measured.values())
    if slower and len(measured) < len(cells):
        missing = ", ".join(str(rank) for rank in cells if rank not in measured)
        why = f"every other rank is slower than plain decoding, but rank {missing} was not decoded"
        return Finding(UNMEASURED, why, numbers)
    if slower:
        return Finding(FAILS, "every rank is slower than plain decoding", numbers)
    why = "undecided: for no rank is the interval above 1, and for some it is not below"
    return Finding(UNMEASURED, why, numbers)


def _why(horizon: int, cells: dict[int, Cells]) -> tuple[list[str], list[Number]]:
    """What lies behind a speed-up: what a forward over the window costs, drafts accepted by depth, and how many components
    make them; in words, and as numbers."""
    words, numbers = [], []
    timed = [mode for by_seed in cells.values() for record in by_seed.values() if (mode := record.mode("sampling"))]
    if timed:
        cost = statistics.median(1 / mode["conversion_limit"] for mode in timed)
        words.append(f"a pass over {horizon} tokens takes {cost:.2f} times as long as one over 1")
    for rank, by_seed in cells.items():
        found = {depth: over_seeds(by_seed, f"kept:{depth}") for depth in range(1, horizon + 1)}
        kept = {depth: share for depth, share in found.items() if share is not None}
        numbers += [Number(f"rank {rank}, depth {depth}:", share, 3, "kept") for depth, share in kept.items()]
        if kept and rank in (min(cells), max(cells)):
            shares = ", ".join(f"{share.mean:.2f}" for share in kept.values())
            words.append(f"rank {rank} keeps {shares} of its drafts at depths {', '.join(map(str, kept))}")
        effective = over_seeds(by_seed, "effective")
        if rank > 1 and effective is not None:
            numbers.append(Number(f"rank {rank}:", effective, 2, "effective components"))
            if effective.mean < rank / 2:
                words.append(f"components collapsed ({effective.mean:.1f} of {rank} in use)")
    return words, numbers
