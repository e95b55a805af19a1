"""Judging one setting over its ranks, which C1 to C4 share; and the trend that C1 and C3 ask for."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from experiments.claims.verdict import (
    CONTRADICTED,
    HOLDS,
    NOT_RUN,
    Claim,
    Finding,
    Number,
    Verdict,
    cited,
    fewest_seeds,
    sign,
    trained,
)
from experiments.families import Cells, Family
from experiments.records import counted
from experiments.stats import difference, over_rank_one, over_seeds, shared_seeds, together

Rule = Callable[[Claim, dict[int, Cells]], Finding]
Rows = Callable[[Family, list[Family]], list[Verdict]]
TARGETS = {"own": "a target of their own", "common": "one frozen target"}


def over_ranks(claim: Claim, families: Sequence[Family], rows: Rows) -> list[Verdict]:
    """The rows of every family with the claim's target and two ranks; where some have rank 1 and the top one, of those.

    That of most seeds of rank 1 and the top one comes first, of those that of code, as the star's base cell, of those
    the longest training.
    """
    ours = trained(families)
    usable = [family for family in ours if family.target == claim.target and len(family.ranks()) > 1]
    whole = [family for family in usable if {1, claim.top} <= set(family.ranks())]
    found = [row for family in sorted(whole or usable, key=partial(_evidence, claim.top)) for row in rows(family, ours)]
    missing = f"no records of two or more ranks with {TARGETS[claim.target]} and link=none"
    return claim.complete(found, missing, [family for family in ours if family.target == claim.target])


def _evidence(top: int, family: Family) -> tuple[int, bool, int]:
    cells = family.by_rank()
    return (
        -len(shared_seeds(cells.get(1, {}), cells.get(top, {}))),
        family.settings["corpus"] != "code",
        -family.settings["optim.steps"],
    )


def judged(claim: Claim, family: Family, rule: Rule) -> Verdict:
    """The rule on the family's cells of the paper's distribution; the means by rank and greedy beside it."""
    cells = family.by_rank()
    missing = [rank for rank in (1, claim.top) if rank not in cells]
    means, greedy = (_means(claim, cells, mode) for mode in ("sampling", "greedy"))
    seeds = 0 if missing else len(shared_seeds(cells[1], cells[claim.top]))
    if missing:
        lacking, there = " and ".join(map(str, missing)), ", ".join(map(str, cells))
        found = Finding(NOT_RUN, f"no cell of rank {lacking} (there is {there})", means)
    else:
        found = rule(claim, cells)
        seeds = fewest_seeds(found.numbers) if found.numbers else seeds
        found = claim.too_few(seeds, [each.interval for each in found.numbers], found.numbers) or found
    beside = means * bool(found.numbers and not missing) + greedy * (claim.target == "common")
    return replace(found, numbers=found.numbers or means).of(
        claim,
        f"{family.label}, {counted(seeds, 'seed')}",
        beside=beside,
        seeds=seeds,
        **cited(family.records("untied")),
    )


def _means(claim: Claim, cells: dict[int, Cells], mode: str) -> list[Number]:
    return [
        claim.number(f"{'greedy, ' * (mode == 'greedy')}rank {rank}:", mean)
        for rank, by_seed in cells.items()
        if (mean := over_seeds(by_seed, claim.quantity, mode)) is not None
    ]


def trend(claim: Claim, cells: dict[int, Cells]) -> Finding:
    """The top rank against rank 1 has the wanted sign, and no step from one rank to the next surely has the other one;
    each at 95%, the seeds' variance pooled."""
    ranks, apart = [rank for rank in sorted(cells) if rank <= claim.top], ""
    total = over_rank_one(cells, claim.quantity).get(claim.top)
    steps = {
        (low, high): difference(cells[high], cells[low], claim.quantity) for low, high in itertools.pairwise(ranks)
    }
    found = together({pair: step for pair, step in steps.items() if step is not None}, one_base=True)
    if total is None:
        return Finding(NOT_RUN, f"the records hold no {claim.quantity}")
    numbers = [claim.number(f"rank {claim.top} - rank 1:", total, sign=True)]
    for low, high in itertools.pairwise(ranks):
        step = found.get((low, high))
        if step is None:
            apart = apart or f"rank {high} shares no seed with rank {low}"
        elif sign(step) == -claim.wanted:
            numbers.append(claim.number(f"rank {high} - rank {low}:", step, sign=True))
            return Finding(CONTRADICTED, f"the step from rank {low} to rank {high} goes the other way", numbers)
    finding = claim.signed(total, numbers)
    return Finding(NOT_RUN, apart, numbers) if apart and finding.word == HOLDS else finding


def at_top_rank(verdict: Verdict) -> tuple[str, str]:
    """The answer and the difference of the top rank to rank 1, in two digits."""
    top = f"rank {verdict.claim.top}"
    number = next((each for each in verdict.numbers if each.name.startswith(f"{top} - rank 1")), None)
    return verdict.plain, replace(number, digits=2).short(f"at {top}") if number else "-"
