"""Against the rank: likelihood of the joint (C1) and the first token (C2), drafts and speed on one target (C3)."""

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
    own, common = ([family for family in families if family.target == target] for target in ("own", "common"))
    shown = [*style.widest(own, least=2), *style.widest(common)][: style.PANELS]
    if not shown:
        return "no records of two or more ranks"
    beside = min(len(shown), 2)  # comparisons to a row, of two panels each
    figure, axes = style.grid(-(-len(shown) // 2), 2 * beside, width=style.WIDE if beside == 2 else style.COLUMN)
    panels = axes.reshape(-1, 2)
    for axis in panels[len(shown) :].flat:
        axis.remove()
    for (left, right), family in zip(panels, shown, strict=False):
        ranks = family.ranks()
        _joint(left, family)
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
    shown = style.widest([f for f in families if f.target == "own" and 1 in f.ranks()], least=2)
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


def gain(families: list[Family]) -> Drawn | str:
    """Likelihood, tokens per forward and speed-up of one target, against the rank."""
    ours = [f for f in families if not f.is_pretrained and any(record.mode("sampling") for record in f.records())]
    several = list({id(f): f for variant in style.VARIANTS for f in style.widest(ours, variant)}.values())
    shown = ([family for family in several if family.target == "common"] or several)[:2]
    if not shown:
        return "no decoding records of two or more ranks"
    figure, axes = style.grid(len(shown), 3, width=style.WIDE, height=1.85)
    for (left, middle, right), family in zip(axes, shown, strict=True):
        for variant in style.VARIANTS:
            if family.ranks(variant):
                _joint(left, family, variant)
        _by_variant(middle, family, "tokens_per_pass")
        middle.set(ylabel="tokens per forward", title="draft length (higher is better)")
        _by_variant(right, family, "speedup")
        right.axhline(1, color="black", linewidth=0.8)
        right.set(ylabel="speed-up over AR (x)", title="speed (line: AR decoding)")
        for axis in (left, middle, right):
            style.rank_axis(axis, sorted({rank for variant in style.VARIANTS for rank in family.ranks(variant)}))
    style.legend_below(figure, 3)
    return Drawn(
        figure,
        "Left: held-out joint NLL of n tokens (bars: 95% interval of the difference to the lowest rank, paired). "
        "Middle and right: tokens per target forward, and speed-up over autoregressive (AR) decoding with the same "
        "weights, when sampling (bars: 95% intervals over prompts, repeats and seeds; prompts are shared, so that "
        "differences between ranks are surer than the bars suggest). Untied: the paper's heads; tied: one next-token "
        "head; token-conditioned: the drafts also see the pending token. Dotted: rank 1 with perceptron maps that "
        "have the parameters of the highest rank.",
        [
            record
            for family in shown
            for variant in style.VARIANTS
            for record in (*family.records(variant), *(_equal_size(family, variant) or {}).values())
        ],
    )


def _joint(axis: Axes, family: Family, variant: str = "untied") -> None:
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


def _by_variant(axis: Axes, family: Family, quantity: str) -> None:
    """When sampling: a line per variant against the rank, and rank 1 of equal size."""
    for index, (variant, look) in enumerate(style.VARIANTS.items()):
        ranks = family.ranks(variant)
        values = [over_seeds(family.cells[variant, rank], quantity) for rank in ranks]
        style.by_rank(axis, ranks, values, look, style.worded(variant), shift=(index - 1) * 0.06)
        control = _equal_size(family, variant)
        value = over_seeds(control, quantity) if control else None
        if value is not None:
            label = f"{style.worded(variant)}, rank 1 of equal size"
            axis.axhline(value.mean, color=look[0], linestyle=":", linewidth=1.0, label=label)


def _equal_size(family: Family, variant: str) -> Cells | None:
    """The rank-1 control with about as many parameters as the highest rank of a variant has."""
    if not family.ranks(variant):
        return None

    def trained(cells: Cells) -> int:
        return int(next(iter(cells.values()))["parameters"]["trained"])

    wanted = trained(family.cells[variant, family.ranks(variant)[-1]])
    wide = [
        cells
        for (kind, rank), cells in sorted(family.cells.items())
        if rank == 1 and kind.startswith(f"{variant}, mlp")
    ]
    near = [cells for cells in wide if abs(trained(cells) / wanted - 1) < 0.05]
    return near[0] if near else None
