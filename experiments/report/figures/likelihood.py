"""How likely the held-out text is under the joint and its terms, against the rank (C1, C2)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from experiments.claims import c2_first_token
from experiments.families import Family
from experiments.report.figures.style import (
    COLUMN,
    RED,
    SERIES,
    VARIANTS,
    WIDE,
    Drawn,
    by_rank,
    grid,
    legend_below,
    pairs,
    rank_axis,
    widest,
    wrapped,
)
from experiments.stats import Interval, difference, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def nll(families: list[Family]) -> Drawn | str:
    """Joint NLL against rank, and each position's change against rank 1."""
    shown = widest(families)
    if not shown:
        return "no records of two or more ranks"
    figure, axes = pairs(len(shown))
    for (left, right), family in zip(axes, shown, strict=True):
        ranks = family.ranks()
        joint(left, family)
        positions = range(1, family.horizon + 1)
        base = family.cells["untied", ranks[0]]
        for index, k in enumerate(positions):
            gaps = [difference(family.cells["untied", rank], base, f"position_nll:{k}") for rank in ranks[1:]]
            shift = (index - len(positions) / 2 + 0.5) * 0.07
            by_rank(right, ranks, [_certain(0.0), *gaps], SERIES[index % len(SERIES)], rf"$x_{{t+{k}}}$", shift)
        right.axhline(0, color="0.5", linewidth=0.6, zorder=0)
        rank_axis(right, ranks)
        right.set_ylabel(f"NLL minus rank {ranks[0]}'s (nats)")
        right.set_title("by position")
    legend_below(figure, 4)
    return Drawn(
        figure,
        "Left: held-out joint NLL of n tokens (positions with all n) against the rank; untied heads, target as "
        "named. Bars: 95% interval of the difference to the lowest rank, paired over seeds and test rows. Right: its "
        "chain-rule terms, each minus the lowest rank's.",
        [record for family in shown for record in family.records("untied")],
    )


def first_token(families: list[Family]) -> Drawn | str:
    """First-token NLL against rank, with the margin of C2 round rank 1."""
    shown = widest([f for f in families if f.target == "own" and 1 in f.ranks()])
    if not shown:
        return "no from-scratch records of two or more ranks"
    margin = c2_first_token.CLAIM.margin
    figure, axes = grid(1, len(shown), width=COLUMN if len(shown) == 1 else WIDE, height=2.0)
    for axis, family in zip(axes[0], shown, strict=True):
        ranks, base = family.ranks(), family.cells["untied", 1]
        start, level = _mean(over_seeds(base, "first_token_nll")), c2_first_token.equal_level(len(ranks) - 1)
        axis.axhspan(
            start - margin, start + margin, color="0.9", linewidth=0, zorder=0, label=rf"margin of $\pm${margin:g} nats"
        )
        gaps = [
            _shifted(difference(family.cells["untied", rank], base, "first_token_nll", level=level), start)
            for rank in ranks[1:]
        ]
        by_rank(axis, ranks, [_certain(start, level), *gaps], VARIANTS["untied"], "rank r, eq. 11")
        if family.reference:
            alone = np.mean([r["likelihood"]["first_token_nll"]["mean"] for r in family.reference])
            axis.axhline(alone, color=RED, linestyle=":", linewidth=1.2, label="next-token model")
        axis.set_ylabel("first-token NLL (nats)")
        axis.set_title(wrapped(family))
        axis.margins(y=0.15)
        rank_axis(axis, ranks)
    legend_below(figure, 2)
    return Drawn(
        figure,
        "Held-out first-token NLL against the rank, trained from scratch. Bars: interval of the difference to rank 1 "
        "(90%, corrected for the number of ranks), paired over seeds and test rows; independence of the rank (C2) "
        f"means that all lie within the grey band of {margin:g} nats. Dotted: a pure next-token model of as many "
        "steps (over positions with one successor).",
        [record for family in shown for record in family.records("untied")],
    )


def joint(axis: Axes, family: Family, variant: str = "untied") -> None:
    """Joint NLL against the rank, with the interval of its difference to the lowest."""
    ranks, base = family.ranks(variant), family.cells[variant, family.ranks(variant)[0]]
    start = _mean(over_seeds(base, "joint_nll"))
    gaps = [_shifted(difference(family.cells[variant, rank], base, "joint_nll"), start) for rank in ranks[1:]]
    by_rank(axis, ranks, [_certain(start), *gaps], VARIANTS[variant], "_")
    rank_axis(axis, ranks)
    axis.set_ylabel(f"joint NLL of {family.horizon} tokens (nats)")
    axis.set_title(wrapped(family))


def _certain(value: float, level: float = 0.95) -> Interval:
    """What the others are held against."""
    return Interval(value, value, value, level, 1)


def _shifted(interval: Interval | None, by: float) -> Interval | None:
    if interval is None:
        return None
    return replace(interval, mean=interval.mean + by, low=interval.low + by, high=interval.high + by)


def _mean(interval: Interval | None) -> float:
    assert interval is not None, "every record has its likelihoods"
    return interval.mean
