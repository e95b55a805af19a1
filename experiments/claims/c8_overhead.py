"""C8: low overhead in training and in sampling.

Cells: trained for a few steps with nothing else on the machine, and decoded, beside a next-token model.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from experiments import star
from experiments.claims.verdict import CONTRADICTED, HOLDS, NOT_RUN, Claim, Finding, Verdict, on_gpu
from experiments.families import Cells, Family
from experiments.records import Record, counted
from experiments.stats import Interval, Sample, contrast, estimate

CLAIM = Claim(
    id="C8",
    question="Is the overhead low, in training and in sampling?",
    expected="little more time per training step and per target forward",
    statistic="rank 8, when sampling: time of a training step over that of the next-token model, each alone on the "
    "machine; time of a forward with its draft over that of autoregressive decoding, side by side",
    rule="holds: both 95% intervals are below 1.25; contradicted: one of them is above 1.25",
    quantity="overhead",
    unit="x",
    target="timing",
    figure="training_cost",
    arms=(star.timings,),
    gpu_arms=(star.gpu_timings,),
    margin=0.25,
    digits=2,
    seeds=3,
)
_STEP, _FORWARD = "training step over next-token", "forward with draft over autoregressive"
_OVER_NEXT = "forward with draft over a next-token model's"


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting of the timing cells, which were trained for a few steps with nothing beside them."""
    timed = [family for family in families if family.is_timing and not family.is_pretrained]
    return CLAIM.complete([_row(family) for family in timed], "no timing cells", timed)


def _row(family: Family) -> Verdict:
    """Training step of the top rank over that of a next-token model, and its forward over an autoregressive one: of
    the same weights, whose first token a model of rank r mixes from r distributions; beside it, over a next-token
    model's forward."""
    plain = {record.seed: record for record in family.reference}
    cells = family.by_rank()
    ratios = {
        _STEP: {rank: _step_ratio(by_seed, plain) for rank, by_seed in cells.items()},
        _FORWARD: {rank: _forward_ratio(by_seed, "speedup") for rank, by_seed in cells.items()},
        _OVER_NEXT: {rank: _forward_ratio(by_seed, "speedup_over_trunk") for rank, by_seed in cells.items()},
    }
    numbers = {
        (rank, what): CLAIM.number(f"rank {rank}, {what}:", ratio)
        for what, by_rank in ratios.items()
        for rank, ratio in by_rank.items()
        if ratio is not None
    }
    deciding = [numbers.pop((CLAIM.top, what)) for what in (_STEP, _FORWARD) if (CLAIM.top, what) in numbers]
    seeds = len(set(cells.get(CLAIM.top, {})) & set(plain))
    found = _is_low(ratios[_STEP].get(CLAIM.top), ratios[_FORWARD].get(CLAIM.top), seeds)
    hardware = "one GPU" if on_gpu(family) else f"{family.records()[0]['hardware']['cores']} cores"
    return replace(found, numbers=deciding).of(
        CLAIM,
        f"{family.label}, {hardware}, {counted(seeds, 'seed')}",
        beside=list(numbers.values()),
        records=[record.path for record in family.records("untied")],
        seeds=seeds,
    )


def _is_low(step: Interval | None, drafting: Interval | None, seeds: int) -> Finding:
    limit = 1 + CLAIM.margin
    if step is None or drafting is None:
        return Finding(NOT_RUN, f"no cell of rank {CLAIM.top} beside a next-token model, timed alone and decoded")
    if few := CLAIM.too_few(seeds, (step, drafting)):
        return few
    if step.high < limit and drafting.high < limit:
        return Finding(HOLDS)
    slow = [what for what, ratio in (("training", step), ("sampling", drafting)) if ratio.low > limit]
    if slow:
        take = f"{' and '.join(slow)} take{'s' * (len(slow) == 1)}"
        return Finding(CONTRADICTED, f"{take} more than {limit:g} times as long")
    crossing = [ratio for ratio in (step, drafting) if ratio.high >= limit]
    return CLAIM.underpowered(crossing, f"an interval crosses {limit:g}")


def shown(verdict: Verdict) -> tuple[str, str]:
    places = zip(("per training step", "per forward with draft"), verdict.numbers, strict=False)
    return verdict.plain, "; ".join(number.short(place) for place, number in places) or "-"


def _step_ratio(cells: Cells, plain: Cells) -> Interval | None:
    """Time of a training step over that of the next-token model of the same seed."""

    def step(record: Record) -> Sample:
        return Sample(mean=math.log(record["training"]["step_ms_median"]))

    pairs = [(step(cells[seed]), step(plain[seed])) for seed in sorted(set(cells) & set(plain))]
    return contrast(pairs).exp() if pairs else None


def _forward_ratio(cells: Cells, speedup: str) -> Interval | None:
    """Time of a speculative forward with its draft over that of an autoregressive one: tokens per forward over
    `speedup`, with the speed-up's interval."""
    samples = []
    for _, record in sorted(cells.items()):
        mode = record.mode("sampling")
        if mode is not None and mode[speedup]:
            speed = Sample.log_ratio(mode[speedup], mode["prompts"])
            samples.append(replace(speed, mean=math.log(mode["tokens_per_pass"]["mean"]) - speed.mean))
    return estimate(samples).exp() if samples else None
