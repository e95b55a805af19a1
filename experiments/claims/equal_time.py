"""Equal wall-clock: the top rank against rank 1 trained for as long as the top rank took (C1, C3)."""

import statistics
from typing import Any

from experiments.claims.verdict import NOT_RUN, Claim, Finding, Number, Verdict
from experiments.families import Cells, Family, trained_longer
from experiments.records import Record, counted, training_hardware
from experiments.stats import difference, shared_seeds

# Rank 1 trained for longer counts as equal wall-clock where it had the top rank's time, and at most this factor more.
EQUAL_TIME = 1.33


def equal_time(claim: Claim, family: Family, families: list[Family]) -> list[Verdict]:
    """One row where there is a rank-1 cell of more steps, else none."""
    top = family.cells.get(("untied", claim.top), {})
    longer = [cells for cells in trained_longer(family, families) if shared_seeds(top, cells)]
    if not longer:
        return []
    alike = [
        cells for cells in longer if len({training_hardware(r) for r in _shared(cells, top) + _shared(top, cells)}) == 1
    ]
    times = [(_training_seconds(cells, top) / _training_seconds(top, cells), cells) for cells in alike]
    times.sort(key=lambda each: each[0])
    equal = [each for each in times if 1 <= each[0] <= EQUAL_TIME]
    setting = f"{family.label}, equal wall-clock"
    more: dict[str, Any] = {}
    if not alike:
        found = Finding(NOT_RUN, "trained on different kinds of hardware, so that their times cannot be compared")
    elif not equal:
        ratios = ", ".join(f"{ratio:.2f}" for ratio, _ in times)
        reason = f"rank 1 was trained for {ratios} times rank {claim.top}'s time; 1 to {EQUAL_TIME:g} counts as equal"
        found = Finding(NOT_RUN, reason)
    else:
        found, more = _compared(claim, top, *equal[0])
        setting += f", {counted(more['seeds'], 'seed')}"
    expected = claim.expected.replace("at equal steps", "at equal wall-clock")
    return [found.of(claim, setting, expected=expected, **more)]


def _compared(claim: Claim, top: Cells, ratio: float, rank_one: Cells) -> tuple[Finding, dict[str, Any]]:
    """(the finding, what the verdict has beside it)."""
    more: dict[str, Any] = {
        "records": [record.path for record in _shared(rank_one, top) + _shared(top, rank_one)],
        "seeds": len(shared_seeds(top, rank_one)),
    }
    gap = difference(top, rank_one, claim.quantity)
    if gap is None:
        return Finding(NOT_RUN, f"no seed with {claim.quantity} is shared"), more
    # Rank 1 has seen more data by then, which the first token shows.
    more["beside"] = [
        Number(f"{what}:", other, 3, "nats", sign=True)
        for quantity, what in (("joint_nll", "joint"), ("first_token_nll", "first token alone"))
        if quantity != claim.quantity and (other := difference(top, rank_one, quantity)) is not None
    ]
    name = f"rank {claim.top} - rank 1 trained for {ratio:.2f} times its time:"
    return claim.signed(gap, [claim.number(name, gap, sign=True)]), more


def _shared(cells: Cells, other: Cells) -> list[Record]:
    """Its records of the seeds that both have."""
    return [cells[seed] for seed in shared_seeds(cells, other)]


def _training_seconds(cells: Cells, other: Cells) -> float:
    """Mean over the shared seeds."""
    return statistics.mean(record.step_seconds for record in _shared(cells, other))
