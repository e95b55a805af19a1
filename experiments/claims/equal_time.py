"""Equal wall-clock: the top rank against rank 1 trained for as long as the top rank took (C1, C3)."""

from __future__ import annotations

import statistics
from dataclasses import replace

from experiments.claims.verdict import NOT_RUN, Claim, Number, Verdict, signed
from experiments.families import Cells, Family, along
from experiments.records import Record, counted, training_hardware
from experiments.stats import difference, shared_seeds

# Rank 1 trained for longer counts as equal wall-clock where it had the top rank's time, and at most this factor more.
EQUAL_TIME = 1.33


def equal_time(claim: Claim, family: Family, families: list[Family]) -> list[Verdict]:
    """One row where there is a rank-1 cell of more steps, else none."""
    top = family.cells.get(("untied", claim.top), {})
    longer = _longer(family, families, top)
    if not longer:
        return []
    row = Verdict(
        claim,
        f"{family.label}, equal wall-clock",
        NOT_RUN,
        "",
        expected=claim.expected.replace("at equal steps", "at equal wall-clock"),
    )
    longer = [
        cells for cells in longer if len({training_hardware(r) for r in _shared(cells, top) + _shared(top, cells)}) == 1
    ]
    if not longer:
        return [replace(row, reason="trained on different kinds of hardware, so that their times cannot be compared")]
    times = [(_training_seconds(cells, top) / _training_seconds(top, cells), cells) for cells in longer]
    times.sort(key=lambda each: each[0])
    equal = [each for each in times if 1 <= each[0] <= EQUAL_TIME]
    if not equal:
        found = ", ".join(f"{ratio:.2f}" for ratio, _ in times)
        reason = f"rank 1 was trained for {found} times rank {claim.top}'s time; 1 to {EQUAL_TIME:g} counts as equal"
        return [replace(row, reason=reason)]
    return [_compared(row, top, *equal[0])]


def _longer(family: Family, families: list[Family], top: Cells) -> list[Cells]:
    """Rank-1 cells that differ from the family in having had more steps."""
    return [
        cells
        for other in families
        if other.settings["optim.steps"] > family.settings["optim.steps"]
        and along([family, other], "optim.steps", "optim.warmup")
        and shared_seeds(top, cells := other.cells.get(("untied", 1), {}))
    ]


def _compared(row: Verdict, top: Cells, ratio: float, rank_one: Cells) -> Verdict:
    claim, seeds = row.claim, len(shared_seeds(top, rank_one))
    paths = [record.path for record in _shared(rank_one, top) + _shared(top, rank_one)]
    row = replace(row, setting=f"{row.setting}, {counted(seeds, 'seed')}", records=paths, seeds=seeds)
    gap = difference(top, rank_one, claim.quantity)
    if gap is None:
        return replace(row, reason=f"no seed with {claim.quantity} is shared")
    # Rank 1 has seen more data by then, which the first token shows.
    beside = [
        Number(f"{what}:", other, 3, "nats", sign=True)
        for quantity, what in (("joint_nll", "joint"), ("first_token_nll", "first token alone"))
        if quantity != claim.quantity and (other := difference(top, rank_one, quantity)) is not None
    ]
    name = f"rank {claim.top} - rank 1 trained for {ratio:.2f} times its time:"
    numbers = [Number(name, gap, claim.digits, claim.unit, sign=True)]
    return replace(row, beside=beside).found(signed(claim, gap, numbers))


def _shared(cells: Cells, other: Cells) -> list[Record]:
    """Its records of the seeds that both have."""
    return [cells[seed] for seed in shared_seeds(cells, other)]


def _training_seconds(cells: Cells, other: Cells) -> float:
    """Mean over the shared seeds of steps times the median step: without validation, checkpoints and pauses."""
    training = [record["training"] for record in _shared(cells, other)]
    return statistics.mean(each["steps"] * each["step_ms_median"] / 1000 for each in training)
