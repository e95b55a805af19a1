"""C8: low overhead in training and in sampling.

Cells: trained for a few steps with nothing else on the machine, and decoded, beside a next-token model. What rank adds
is held against rank 1: verifying four tokens alone takes 1.2 times as long as one, whatever the rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from experiments import star
from experiments.claims.verdict import CONTRADICTED, HOLDS, NOT_RUN, Claim, Finding, Verdict, cited, on_gpu
from experiments.families import Cells, Family
from experiments.records import Record, counted
from experiments.stats import Interval, Sample, contrast, estimate, together

CLAIM = Claim(
    id="C8",
    question="Is the overhead of the rank low, in training and in sampling?",
    expected="little more time per training step and per target forward",
    statistic="rank 8 over rank 1 of the same seed: time of a training step, each alone on the machine; time of a "
    "forward with its draft when sampling, both measured beside the same next-token model",
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
Cost = Callable[[Record], float | None]


def _step(record: Record) -> float | None:
    return float(record["training"]["step_ms_median"])


def _forward(speedup: str) -> Cost:
    """Time of a forward with its draft over that of the rival's token: tokens per forward over the speed-up."""

    def cost(record: Record) -> float | None:
        mode = record.mode("sampling")
        return mode["tokens_per_pass"]["mean"] / mode[speedup]["median"] if mode and mode[speedup] else None

    return cost


_OVER_NEXT, _OVER_OWN = _forward("speedup_over_trunk"), _forward("speedup")


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting of the timing cells, which were trained for a few steps with nothing beside them."""
    timed = [family for family in families if family.is_timing and not family.is_pretrained]
    return CLAIM.complete([_row(family) for family in timed], "no timing cells", timed)


def _row(family: Family) -> Verdict:
    """What decides is the top rank over rank 1; beside it the other ranks, and each over the next-token model."""
    plain = {record.seed: record for record in family.reference}
    cells = family.by_rank()
    step, forward = (_over_rank_one(cells, cost) for cost in (_step, _OVER_NEXT))
    named: list[tuple[str, Mapping[int, Interval | None]]] = [
        ("training step over rank 1", step),
        ("forward with draft over rank 1", forward),
        ("forward with draft over rank 1, each over its own autoregressive decoding", _over_rank_one(cells, _OVER_OWN)),
        ("training step over next-token", {rank: _ratio(by_seed, plain, _step) for rank, by_seed in cells.items()}),
        *(
            (f"forward with draft over {rival}", {rank: _mean(by_seed, cost) for rank, by_seed in cells.items()})
            for rival, cost in (("a next-token model's", _OVER_NEXT), ("its own autoregressive", _OVER_OWN))
        ),
    ]
    numbers = {
        (rank, what): CLAIM.number(f"rank {rank}, {what}:", ratio)
        for what, by_rank in named
        for rank, ratio in by_rank.items()
        if ratio is not None
    }
    deciding = [numbers.pop((CLAIM.top, what)) for what, _ in named[:2] if (CLAIM.top, what) in numbers]
    seeds = len(set(cells.get(CLAIM.top, {})) & set(cells.get(1, {})))
    found = _is_low(step.get(CLAIM.top), forward.get(CLAIM.top), seeds)
    hardware = "one GPU" if on_gpu(family) else f"{family.records()[0]['hardware']['cores']} cores"
    return replace(found, numbers=deciding).of(
        CLAIM,
        f"{family.label}, {hardware}, {counted(seeds, 'seed')}",
        beside=list(numbers.values()),
        seeds=seeds,
        **cited(family.records("untied")),
    )


def _is_low(step: Interval | None, drafting: Interval | None, seeds: int) -> Finding:
    limit = 1 + CLAIM.margin
    if step is None or drafting is None:
        return Finding(NOT_RUN, f"no cell of rank {CLAIM.top} beside rank 1 and a next-token model, timed and decoded")
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
    """The numbers are those of training and of sampling."""
    step, forward = verdict.numbers
    said = f"{step.short('per training step')}, {forward.short('per sampled forward')}; limit {1 + CLAIM.margin:g}x"
    return verdict.plain, said


def _over_rank_one(cells: dict[int, Cells], cost: Cost) -> dict[int, Interval]:
    """Every rank above 1, the seeds' variance pooled."""
    found = {rank: _ratio(by_seed, cells.get(1, {}), cost) for rank, by_seed in cells.items() if rank > 1}
    return together({rank: ratio for rank, ratio in found.items() if ratio is not None}, one_base=True)


def _ratio(cells: Cells, other: Cells, cost: Cost) -> Interval | None:
    """Of the same seeds; the interval is over them."""
    costs = [(cost(cells[seed]), cost(other[seed])) for seed in sorted(set(cells) & set(other))]
    pairs = [(Sample(math.log(one)), Sample(math.log(two))) for one, two in costs if one and two]
    return contrast(pairs).exp() if pairs else None


def _mean(cells: Cells, cost: Cost) -> Interval | None:
    samples = [Sample(math.log(value)) for record in cells.values() if (value := cost(record))]
    return estimate(samples).exp() if samples else None
