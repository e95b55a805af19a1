"""The top rank against rank 1 at equal cost: trained for as long, or with as many parameters (C1, C3, C4)."""

import statistics
from dataclasses import replace

from experiments.claims.verdict import NOT_RUN, Claim, Finding, Number, Verdict, cited
from experiments.families import Cells, Family, trained_longer
from experiments.records import Record, counted, training_hardware
from experiments.stats import difference, shared_seeds

# Rank 1 trained for longer counts as equal training time where it had the top rank's, and at most this factor more.
EQUAL_TIME = 1.33
EQUAL_PARAMETERS = 0.02  # how far the totals may be apart, as a share


def equal_cost(claim: Claim, family: Family, families: list[Family]) -> list[Verdict]:
    """A row at equal training time and one at equal parameters, where there are such rank-1 cells."""
    return [*equal_time(claim, family, families), *_equal_parameters(claim, family)]


def equal_time(claim: Claim, family: Family, families: list[Family]) -> list[Verdict]:
    """One row where there is a rank-1 cell of more steps, else none."""
    top, setting = _top(claim, family), f"{family.label}, equal training time"
    longer = [cells for cells in trained_longer(family, families) if shared_seeds(top, cells)]
    if not longer:
        return []
    alike = [
        cells for cells in longer if len({training_hardware(r) for r in _shared(cells, top) + _shared(top, cells)}) == 1
    ]
    times = [(_training_seconds(cells, top) / _training_seconds(top, cells), cells) for cells in alike]
    times.sort(key=lambda each: each[0])
    equal = [each for each in times if 1 <= each[0] <= EQUAL_TIME]
    expected = claim.expected.replace("at equal steps", "at equal training time")
    if equal:
        ratio, rank_one = equal[0]
        row = _row(claim, setting, f"equal training time ({ratio:.2f} of it)", top, rank_one)
        return [replace(row, expected=expected)]
    reason = "trained on different kinds of hardware, so that their times cannot be compared"
    if alike:
        ratios = ", ".join(f"{ratio:.2f}" for ratio, _ in times)
        reason = f"rank 1 was trained for {ratios} times rank {claim.top}'s time; 1 to {EQUAL_TIME:g} counts as equal"
    return [Finding(NOT_RUN, reason).of(claim, setting, expected=expected)]


def _equal_parameters(claim: Claim, family: Family) -> list[Verdict]:
    """Rank 1 with perceptron maps that have the top rank's parameters."""
    top = _top(claim, family)
    found = [
        cells
        for (variant, rank), cells in family.cells.items()
        if rank == 1 and variant.startswith("untied, mlp") and shared_seeds(top, cells) and _as_large(cells, top)
    ]
    setting = f"{family.label}, equal parameters"
    return [_row(claim, setting, "equal parameters", top, cells) for cells in found[:1]]


def _row(claim: Claim, setting: str, what: str, top: Cells, rank_one: Cells) -> Verdict:
    gap = difference(top, rank_one, claim.quantity)
    those = _shared(rank_one, top) + _shared(top, rank_one)
    if gap is None:
        found = Finding(NOT_RUN, f"no seed with {claim.quantity} is shared")
    elif gap.is_ratio and not all(map(_timed_together, _shared(top, rank_one), _shared(rank_one, top))):
        found = Finding(NOT_RUN, "the two were not timed side by side")
    else:
        name = f"rank {claim.top} {'over' if gap.is_ratio else '-'} rank 1, {what}:"
        numbers = [claim.number(name, gap, sign=not gap.is_ratio)]
        found = claim.too_few(gap.seeds, [gap], numbers) or claim.signed(gap, numbers)
    # Rank 1 has seen more data by then, which the first token shows.
    beside = [
        Number(f"{name}:", other, 3, "nats", sign=True)
        for quantity, name in (("joint_nll", "joint"), ("first_token_nll", "first token alone"))
        if quantity != claim.quantity and (other := difference(top, rank_one, quantity)) is not None
    ]
    seeds = gap.seeds if gap is not None else 0
    where = f"{setting}, {counted(seeds, 'seed')}"
    return found.of(claim, where, beside=beside if found.numbers else [], seeds=seeds, **cited(those))


def _timed_together(one: Record, other: Record) -> bool:
    return bool(one["decoding"] and other["decoding"] and one["decoding"]["group"] == other["decoding"]["group"])


def _top(claim: Claim, family: Family) -> Cells:
    return family.cells.get(("untied", claim.top), {})


def _as_large(cells: Cells, top: Cells) -> bool:
    one, other = (next(iter(each.values()))["parameters"]["total"] for each in (cells, top))
    return abs(one / other - 1) <= EQUAL_PARAMETERS


def _shared(cells: Cells, other: Cells) -> list[Record]:
    """Its records of the seeds that both have."""
    return [cells[seed] for seed in shared_seeds(cells, other)]


def _training_seconds(cells: Cells, other: Cells) -> float:
    """Mean over the shared seeds."""
    return statistics.mean(record.step_seconds for record in _shared(cells, other))
