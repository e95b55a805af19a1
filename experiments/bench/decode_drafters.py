"""Drafters side by side: their speed, and what is accepted of them.

A drafter is chosen on prompts of the validation split and reported on those of the test split. What each gains over the
chain, and over rank 1, is for the report, which makes it of the counts by prompt.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.intervals import of_ratio
from cpdlm.decoding import Sampling
from experiments.bench.decode_heads import SAMPLINGS, Bench, Heads, speed_entry, speed_ratio, sums
from experiments.bench.record import say

DRAFTERS = {"greedy": ("chain", "tree", "window", "path"), "sampling": ("chain", "block", "tree", "window", "path")}


def speeds(bench: Bench) -> list[dict[str, Any]]:
    """Per heads and mode: each drafter on both splits, and the one chosen."""
    rows: list[dict[str, Any]] = [heads.label | {"modes": {mode: {} for mode in DRAFTERS}} for heads in bench.heads]
    for mode, names in DRAFTERS.items():
        wanted = [(index, drafter) for index, heads in enumerate(bench.heads) for drafter in distinct(names, heads)]
        for split, draws in (("validation", 1), ("test", bench.options.draws)):
            say(f"drafters, {bench.config.corpus}, {mode}, {split}")
            racers = {"AR": bench.autoregressive(SAMPLINGS[mode])} | {
                f"{index} {drafter}": bench.speculative(bench.heads[index], SAMPLINGS[mode], drafter)
                for index, drafter in wanted
            }
            raced = bench.race(racers, split, draws)
            for index, drafter in wanted:
                mine, chain = raced[f"{index} {drafter}"], raced[f"{index} chain"]
                entry = acceptance(mine.decoded, bench.config.horizon) | speed_entry(mine, raced["AR"])
                entry["speed_over_chain"] = speed_ratio(mine, chain)
                rows[index]["modes"][mode].setdefault(drafter, {})[split] = entry
        for row in rows:
            rates = _validation_speeds(row, mode)
            row["modes"][mode]["chosen"] = max(rates, key=lambda drafter: rates[drafter])
    return rows


def sparse(bench: Bench) -> list[dict[str, Any]]:
    """Per mode, heads and number of components that their draft evaluates: speed over AR and over rank 1's chain.

    Intervals are over prompts and seeds."""
    contenders = [
        (heads, active)
        for heads in bench.heads
        for active in (heads.rank, *(k for k in bench.options.active if k < heads.rank))
    ]
    rows = []
    for mode, sampling in SAMPLINGS.items():
        say(f"components, {bench.config.corpus}, {mode}")
        racers = {
            f"{heads.variant} {heads.rank} {active}": bench.speculative(with_active(heads, active), sampling, "chain")
            for heads, active in contenders
        }
        raced = bench.race({"AR": bench.autoregressive(sampling)} | racers, "test", bench.options.draws)
        for heads, active in contenders:
            seeds, mine = len(heads.seeds), raced[f"{heads.variant} {heads.rank} {active}"]
            one = raced.get(f"{heads.variant} 1 1") if heads.rank > 1 else None
            tokens_SP, forwards_SP, _ = sums(mine, seeds)
            rows.append(
                heads.label
                | {"mode": mode, "active": active, "tokens_per_forward": of_ratio(tokens_SP, forwards_SP)}
                | {"speedup": speed_ratio(mine, raced["AR"], seeds)}
                | {"speed_over_rank1": one and speed_ratio(mine, one, seeds, seeds)}
            )
    return rows


def with_active(heads: Heads, active: int) -> Heads:
    """The same weights, of which a draft evaluates so many components."""
    models = [copy(model) for model in heads.models]
    for model in models:
        model.active = active
    return replace(heads, models=models)


def suggested(cells: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Per mode: the fastest drafter on the validation prompts, by the geometric mean of all heads over the chain."""
    best = {}
    for mode in DRAFTERS:
        gains: dict[str, float] = {}
        for entry in cells:
            rates = _validation_speeds(entry, mode)
            for drafter, rate in rates.items():
                gains[drafter] = gains.get(drafter, 0.0) + math.log(rate / rates["chain"])
        best[mode] = max(gains, key=lambda drafter: gains[drafter])
    return best


def _validation_speeds(entry: dict[str, Any], mode: str) -> dict[str, float]:
    found = entry["modes"][mode]
    return {name: each["validation"]["speedup"]["mean"] for name, each in found.items() if name != "chosen"}


def distinct(names: Sequence[str], heads: Heads) -> list[str]:
    """Without those that draft what the chain drafts: of independent positions the likeliest window is the argmaxes."""
    return [name for name in names if heads.rank > 1 or name not in ("window", "path")]


def accepted(bench: Bench) -> list[dict[str, Any]]:
    """Tokens per forward of every drafter on the test prompts, decoded in batches."""
    rows = []
    for mode, names in DRAFTERS.items():
        for heads in bench.heads:
            say(f"acceptance, {bench.config.corpus}, {mode}, {heads.variant}, rank {heads.rank}")
            for drafter in distinct(names, heads):
                what = {"mode": mode, "strategy": drafter}
                rows.append(heads.label | what | _accepted(heads, SAMPLINGS[mode], drafter, bench))
    return rows


def _accepted(heads: Heads, sampling: Sampling, drafter: str, bench: Bench) -> dict[str, Any]:
    draws = 1 if sampling.greedy else bench.options.acceptance_draws  # another greedy draw is the same text
    return acceptance(bench.batch(heads.models, sampling, drafter, draws), heads.config.horizon)


def ends(heads: Sequence[Heads]) -> list[Heads]:
    """Untied and token-conditioned, as far as there are any: the lowest and the highest rank."""
    found: list[Heads] = []
    for variant in ("untied", "token-conditioned"):
        ranked = sorted((each for each in heads if each.variant == variant), key=lambda each: each.rank)
        found += ranked[:1] + ranked[1:][-1:]
    return found
