"""What becomes of the drafts: accepted by depth, tokens per pass, and both over rank x horizon (C3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from experiments.families import Cells, Family, along
from experiments.records import MODES
from experiments.report.figures.style import (
    LAWS,
    PANELS,
    SERIES,
    WIDE,
    Drawn,
    by_rank,
    errors,
    grid,
    legend_below,
    modes_of,
    pairs,
    rank_axis,
    widest,
    wrapped,
)
from experiments.stats import Interval, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def decoded(families: list[Family]) -> list[Family]:
    """Those worth a panel whose cells were decoded: of any law, with two ranks at least."""
    found = list({id(family): family for distribution in LAWS for family in widest(families, distribution)}.values())
    return [family for family in found if any(record.mode("sampling") for record in family.records())][:PANELS]


def acceptance(families: list[Family]) -> Drawn | str:
    """Share of drafts accepted at each depth, given that it was reached, by rank."""
    shown = [family for family in decoded(families) if family.horizon > 2]
    if not shown:
        return "no decoding records of two or more ranks"
    distributions = [
        distribution for distribution in ("untied", "anchored") if any(family.ranks(distribution) for family in shown)
    ]  # one pair of columns each
    figure, axes = grid(len(shown), 2 * len(distributions), width=WIDE, share_y="row")
    # One look per rank in every panel, whichever ranks a panel has.
    ranks = sorted({rank for family in shown for distribution in distributions for rank in family.ranks(distribution)})
    for row, family in zip(axes, shown, strict=True):
        for column, axis in enumerate(row):
            distribution, mode = distributions[column // 2], MODES[column % 2]
            for index, rank in enumerate(ranks):
                depths = range(2, family.horizon + 1)
                cells = family.cells.get((distribution, rank), {})
                values = [_as_share(over_seeds(cells, f"accepted:{depth}", mode)) for depth in depths]
                shift = (index - len(ranks) / 2 + 0.5) * 0.09
                errors(axis, [depth + shift for depth in depths], values, SERIES[index % len(SERIES)], f"rank {rank}")
            axis.set_ylim(0, 1.04)
            axis.set_xticks(range(2, family.horizon + 1))
            axis.set_xlim(1.75, family.horizon + 0.25)
            axis.set_xlabel("depth k of the draft $x_{t+k}$")
            axis.set_title(f"{wrapped(family)}\n{distribution}, {mode}" if not column else f"{distribution}, {mode}")
            if not axis.has_data():
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.4")
        row[0].set_ylabel("accepted, if reached")
    legend_below(figure, 4)
    return Drawn(
        figure,
        "Share of drafts accepted at each depth, among those whose depth was reached. Depth 2 is the first draft: the fixed token is "
        "not one. Bars: 95% interval over prompts and seeds (independent drafts, where a record has no counts per prompt). Untied: the "
        "paper's law; anchored: the drafts also see the fixed token.",
        [record for family in shown for distribution in distributions for record in family.records(distribution)],
    )


def _as_share(value: Interval | None) -> Interval | None:
    """Its interval cut to what a share can be."""
    return None if value is None else replace(value, low=max(value.low, 0.0), high=min(value.high, 1.0))


def tokens_per_forward(families: list[Family]) -> Drawn | str:
    """Tokens per trunk pass against rank, greedy and sampling, by law."""
    shown = decoded(families)
    if not shown:
        return "no decoding records of two or more ranks"
    figure, axes = pairs(len(shown), share_y=True)
    for row, family in zip(axes, shown, strict=True):
        for axis, mode in zip(row, MODES, strict=True):
            by_law(axis, family, "tokens_per_pass", mode)
            axis.set_title(f"{wrapped(family)}\ngreedy" if mode == "greedy" else "sampling")
        row[0].set_ylabel("tokens per trunk pass")
    legend_below(figure, 2)
    return Drawn(
        figure,
        "Tokens per trunk pass against the rank (plain decoding: 1.00). Bars: 95% interval over prompts and seeds; prompts are shared, "
        "so that differences between ranks are surer than the bars suggest. Untied: the paper's law; tied: one next-token head; "
        "anchored: the drafts also see the fixed token. Dotted: rank 1 with perceptron maps that have the parameters of the highest rank.",
        [
            record
            for family in shown
            for distribution in LAWS
            for record in (*family.records(distribution), *(_equal_size(family, distribution) or {}).values())
        ],
    )


def heat(families: list[Family]) -> Drawn | str:
    """Tokens per pass and speed-up over rank x horizon, untied."""
    groups = [
        group
        for group in along([f for f in families if any(modes_of(c, "sampling") for c in f.cells.values())], "horizon")
        if len({family.horizon for family in group if family.ranks()}) > 1
    ][:2]
    if not groups:
        return "no decoding records of two or more horizons"
    rows = [(group, mode) for group in groups for mode in MODES]
    figure, axes = grid(len(rows), 2, width=WIDE, height=1.9)
    for (left, right), (group, mode) in zip(axes, rows, strict=True):
        label = ", ".join(part for part in group[0].label.split(", ") if not part.startswith("n="))
        _cells(left, group, "tokens_per_pass", mode)
        _cells(right, group, "speedup", mode)
        left.set_title(f"{label}, {mode}: tokens per trunk pass")
        right.set_title("speed-up over plain decoding")
    return Drawn(
        figure,
        "Rank against horizon, untied heads: tokens per trunk pass (plain decoding: 1.00) and wall-clock speed-up over plain decoding with "
        "the same weights. Under each mean its 95% interval over prompts, repeats and seeds (one seed: not over seeds). Hatched: no record.",
        [record for group in groups for family in group for record in family.records("untied")],
    )


def _cells(axis: Axes, group: list[Family], quantity: str, mode: str) -> None:
    """A table of coloured cells: horizons across, ranks down."""
    by_horizon = {family.horizon: family for family in reversed(group)}  # of two alike, the larger
    horizons = sorted(horizon for horizon, family in by_horizon.items() if family.ranks())
    ranks = sorted({rank for horizon in horizons for rank in by_horizon[horizon].ranks()})
    values: dict[tuple[int, int], Interval] = {}
    for y, rank in enumerate(ranks):
        for x, horizon in enumerate(horizons):
            found = over_seeds(by_horizon[horizon].cells.get(("untied", rank), {}), quantity, mode)
            if found is not None:
                values[y, x] = found
    means = np.full((len(ranks), len(horizons)), np.nan)
    for place, value in values.items():
        means[place] = value.mean
    axis.set_facecolor("white")
    axis.patch.set_hatch("////")
    axis.patch.set_edgecolor("0.85")
    axis.imshow(means, aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (y, x), value in values.items():
        axis.text(
            x,
            y,
            f"{value.mean:.2f}\n[{value.low:.2f}, {value.high:.2f}]",
            ha="center",
            va="center",
            linespacing=1.1,
            color="white" if value.mean <= middle else "black",
        )
    axis.set_xticks(range(len(horizons)), [str(horizon) for horizon in horizons])
    axis.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axis.set_xlabel("horizon n")
    axis.set_ylabel("rank r")
    axis.grid(False)
    axis.tick_params(length=0)


def by_law(axis: Axes, family: Family, quantity: str, mode: str) -> None:
    """A line per law against the rank, and rank 1 of equal size."""
    for index, (distribution, (color, marker, style, _)) in enumerate(LAWS.items()):
        ranks = family.ranks(distribution)
        values = [over_seeds(family.cells[distribution, rank], quantity, mode) for rank in ranks]
        by_rank(axis, ranks, values, (color, marker, style), distribution, shift=(index - 1) * 0.06)
        control = _equal_size(family, distribution)
        value = over_seeds(control, quantity, mode) if control else None
        if value is not None:
            axis.axhline(
                value.mean, color=color, linestyle=":", linewidth=1.0, label=f"{distribution}, rank 1 of equal size"
            )
    rank_axis(axis, sorted({rank for distribution in LAWS for rank in family.ranks(distribution)}))


def _equal_size(family: Family, distribution: str) -> Cells | None:
    """The rank-1 control with about as many parameters as the highest rank of a law has."""
    if not family.ranks(distribution):
        return None

    def trained(cells: Cells) -> int:
        return int(next(iter(cells.values()))["parameters"]["trained"])

    wanted = trained(family.cells[distribution, family.ranks(distribution)[-1]])
    wide = [
        cells
        for (kind, rank), cells in sorted(family.cells.items())
        if rank == 1 and kind.startswith(f"{distribution}, mlp")
    ]
    near = [cells for cells in wide if abs(trained(cells) / wanted - 1) < 0.05]
    return near[0] if near else None
