"""How likely the held-out text is under the joint and its terms, against the rank (C1, C2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments.claims import c2_first_token
from experiments.families import Cells, Family
from experiments.report.figures import style
from experiments.report.figures.style import Drawn
from experiments.stats import Interval, difference, over_rank_one, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def nll(families: list[Family]) -> Drawn | str:
    """Joint NLL against rank, and each position's change against rank 1."""
    shown = style.widest(families)
    if not shown:
        return "no records of two or more ranks"
    figure, axes = style.pairs(len(shown))
    for (left, right), family in zip(axes, shown, strict=True):
        ranks = family.ranks()
        joint(left, family)
        positions = range(1, family.horizon + 1)
        base = family.cells["untied", ranks[0]]
        for index, k in enumerate(positions):
            gaps = [difference(family.cells["untied", rank], base, f"position_nll:{k}") for rank in ranks[1:]]
            shift = (index - len(positions) / 2 + 0.5) * 0.07
            style.by_rank(
                right,
                ranks,
                [Interval.certain(0.0), *gaps],
                style.SERIES[index % len(style.SERIES)],
                rf"$x_{{t+{k}}}$",
                shift,
            )
        right.axhline(0, color="0.5", linewidth=0.6, zorder=0)
        style.rank_axis(right, ranks)
        right.set(ylabel=f"NLL minus rank {ranks[0]}'s (nats)", title="by position")
    style.legend_below(figure, 4)
    return Drawn(
        figure,
        "Left: held-out joint NLL of n tokens (positions with all n) against the rank; untied heads, target as "
        "named. Bars: 95% interval of the difference to the lowest rank, paired over seeds and test rows. Right: its "
        "chain-rule terms, each minus the lowest rank's.",
        [record for family in shown for record in family.records("untied")],
    )


def first_token(families: list[Family]) -> Drawn | str:
    """First-token NLL against rank, with the margin of C2 round rank 1."""
    shown = style.widest([f for f in families if f.target == "own" and 1 in f.ranks()])
    if not shown:
        return "no from-scratch records of two or more ranks"
    margin = c2_first_token.CLAIM.margin
    figure, axes = style.grid(1, len(shown), width=style.COLUMN if len(shown) == 1 else style.WIDE, height=2.0)
    for axis, family in zip(axes[0], shown, strict=True):
        ranks, base = family.ranks(), family.cells["untied", 1]
        gaps = over_rank_one(family.by_rank(), "first_token_nll", level=c2_first_token.LEVEL)
        start = np.mean([r["likelihood"]["first_token_nll"]["mean"] for r in base.values()])
        values = [gaps.get(rank, Interval.certain(0.0)).of(start.__add__) for rank in ranks]
        low, high = start - margin, start + margin
        axis.axhspan(low, high, color="0.9", linewidth=0, zorder=0, label=rf"margin of $\pm${margin:g} nats")
        style.by_rank(axis, ranks, values, style.VARIANTS["untied"], "rank r, eq. 11")
        if family.reference:
            alone = np.mean([r["likelihood"]["first_token_nll"]["mean"] for r in family.reference])
            axis.axhline(alone, color=style.RED, linestyle=":", linewidth=1.2, label="next-token model")
        axis.set(ylabel="first-token NLL (nats)", title=style.wrapped(family))
        axis.margins(y=0.15)
        style.rank_axis(axis, ranks)
    style.legend_below(figure, 2)
    return Drawn(
        figure,
        "Held-out first-token NLL against the rank, trained from scratch. Bars: interval of the difference to rank 1 "
        "(90%), paired over seeds and test rows; independence of the rank (C2) "
        f"means that all lie within the grey band of {margin:g} nats. Dotted: a pure next-token model of as many "
        "steps (over positions with one successor).",
        [record for family in shown for record in family.records("untied")],
    )


def joint(axis: Axes, family: Family, variant: str = "untied") -> None:
    """Joint NLL against the rank, with the interval of its difference to the lowest."""
    cells = family.by_rank(variant)
    values = [over_base(each, cells[min(cells)], "joint_nll") for each in cells.values()]
    style.by_rank(axis, list(cells), values, style.VARIANTS[variant], "_")
    style.rank_axis(axis, list(cells))
    axis.set(ylabel=f"joint NLL of {family.horizon} tokens (nats)", title=style.wrapped(family))


def over_base(cells: Cells, base: Cells, quantity: str) -> Interval | None:
    """The level of `base`, with the interval of the paired difference to it."""
    start = over_seeds(base, quantity)
    assert start is not None, "every record has its likelihoods"
    if cells is base:
        return Interval.certain(start.mean)
    gap = difference(cells, base, quantity)
    return gap and gap.of(lambda end: start.mean + end)
