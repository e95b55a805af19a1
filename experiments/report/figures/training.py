"""What a rank is worth at equal training time (C1, C3), whether the balance loss helps (C5), what a rank costs (C8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.families import Cells, Family, along, trained_longer
from experiments.report.figures import style
from experiments.report.figures.ranks import over_base
from experiments.report.figures.style import Drawn
from experiments.stats import Interval, Sample, contrast, difference, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def equal_time(families: list[Family]) -> Drawn | str:
    """Held-out joint NLL and tokens per forward against the time spent in training."""
    found = [(family, trained_longer(family, families)) for family in style.widest(families) if 1 in family.ranks()]
    shown = [each for each in found if each[1]][:2] or found[:2]
    if not shown:
        return "no records of rank 1 and a higher one"
    figure, axes = style.grid(2, len(shown), width=style.WIDE if len(shown) > 1 else 3.4, height=1.6)
    panels = (("joint_nll", "joint NLL (nats)"), ("tokens_per_pass", "tokens per forward"))
    for column, (family, longer) in zip(axes.T, shown, strict=True):
        for axis, (quantity, label) in zip(column, panels, strict=True):
            _against_time(axis, family, longer, quantity)
            axis.set(ylabel=label, xlabel="seconds of training steps")
        column[0].set_title(style.wrapped(family))
    style.legend_below(figure, 3)
    return Drawn(
        figure,
        "Held-out joint NLL (top) and tokens per target forward when sampling (bottom) against the time spent in "
        "training steps (median step times their number, mean over seeds); untied heads of equal steps, and rank 1 "
        "trained for longer (open), joined to rank 1 by a dashed line: at equal wall-clock a rank is read against "
        "that line. Bars: 95% interval, of the joint NLL that of the difference to rank 1 of equal steps, paired "
        "over seeds and test rows.",
        [
            record
            for family, longer in shown
            for record in (*family.records("untied"), *(r for cells in longer for r in cells.values()))
        ],
    )


def _against_time(axis: Axes, family: Family, longer: list[Cells], quantity: str) -> None:
    base = family.cells["untied", 1]

    def value(cells: Cells) -> Interval | None:
        paired = over_base(cells, base, quantity) if quantity == "joint_nll" else None
        return paired or over_seeds(cells, quantity)

    styles = style.looks(f"rank {rank}" for rank in family.ranks())
    known = [(_seconds(cells), each.mean) for cells in (base, *longer) if (each := value(cells)) is not None]
    axis.plot(*zip(*known, strict=True), color=style.BLACK, linestyle=(0, (4, 2)), linewidth=0.8, zorder=1)
    marks: list[tuple[Cells, str, dict[str, Any]]] = [(c, f"rank {rank}", {}) for rank, c in family.by_rank().items()]
    open_marker = {"markerfacecolor": "white", "markeredgewidth": 1.0}
    marks += [(cells, "rank 1, trained for longer", open_marker) for cells in longer]
    for cells, label, options in marks:
        color, marker, _ = styles[label.partition(",")[0]]
        style.errors(axis, [_seconds(cells)], [value(cells)], (color, marker, "none"), label, **options)
    axis.set_xlim(left=0)


def _seconds(cells: Cells) -> float:
    """Mean over seeds of the time in training steps, without validation, checkpoints and pauses."""
    return float(np.mean([record.step_seconds for record in cells.values()]))


def balance(families: list[Family]) -> Drawn | str:
    """Ways to keep the components in use, against none."""
    found = _balanced(families)
    if found is None:
        return "no records with balance=none beside another balance at one rank above 1"
    label, rank, ways = found
    none = ways["none"]
    order = ["none", *sorted(way for way in ways if way != "none")]
    figure, axes = style.grid(1, 3, width=style.WIDE, height=0.9 + 0.2 * len(order))
    panels: tuple[tuple[str, Callable[[Cells], Interval | None]], ...] = (
        ("joint NLL minus none's (nats)", lambda cells: difference(cells, none, "joint_nll")),
        (f"effective components of {rank}", lambda cells: over_seeds(cells, "effective")),
        ("tokens per forward, sampling", lambda cells: over_seeds(cells, "tokens_per_pass", "sampling")),
    )
    for axis, (quantity, value) in zip(axes[0], panels, strict=True):
        for index, way in enumerate(order):
            interval = value(ways[way])
            if interval is not None:
                style.across(axis, index, interval, (style.BLACK if way == "none" else style.BLUE, "o", "none"), "_")
        style.rows_axis(axis, order if axis is axes[0, 0] else [""] * len(order))
        axis.grid(True, axis="x")
        axis.set_xlabel(quantity)
    axes[0, 0].axvline(0, color="0.5", linewidth=0.6, zorder=0)
    axes[0, 0].set_title(f"{style.worded(label)}, rank {rank}")
    axes[0, 1].set_xlim(1, 1.03 * rank)
    records = [record for cells in ways.values() for _, record in sorted(cells.items())]
    return Drawn(
        figure,
        f"The balance loss, rank {rank}, untied: joint NLL on test text against none (paired over seeds and rows; "
        "lower is better), effective number of components (exp of the entropy of the mean weights), and tokens per "
        "target forward. The number is the weight of the loss (balance=bias: the step of the bias). Bars: 95% "
        "interval over rows or prompts and seeds.",
        records,
    )


def _balanced(families: list[Family]) -> tuple[str, int, dict[str, Cells]] | None:
    """(label, rank, cells by way): the group and rank above 1 at which most ways stand beside none."""
    best: tuple[str, int, dict[str, Cells]] | None = None
    for group in along(families, "balance", "loss.balance_"):
        for rank in sorted({rank for family in group for rank in family.ranks()} - {1}):
            ways: dict[str, Cells] = {}
            for family in group:
                if ("untied", rank) in family.cells:
                    ways.setdefault(family.balance, family.cells["untied", rank])
            if "none" in ways and len(ways) > 1 and (best is None or len(ways) >= len(best[2])):
                best = group[0].label, rank, ways
    return best


def cost(families: list[Family]) -> Drawn | str:
    """Step time against rank with the bound that FLOPs set, the share of the machine that is reached, and memory."""
    shown = [
        f
        for f in style.widest(families)
        if 1 in f.ranks() and all(r["training"]["flops_per_token"] for r in f.records("untied"))
    ]
    if not shown:
        return "no records of two or more ranks that counted their FLOPs"
    figure, axes = style.grid(len(shown), 3, width=style.WIDE)
    for (left, middle, right), family in zip(axes, shown, strict=True):
        ranks, base = family.ranks(), family.cells["untied", 1]
        cells = [family.cells["untied", rank] for rank in ranks]
        style.by_rank(
            left, ranks, [_ratio(c, base, "step_ms_median") for c in cells], (style.BLUE, "o", "-"), "measured"
        )
        style.by_rank(
            left, ranks, [_ratio(c, base, "flops_per_token") for c in cells], (style.RED, "", "--"), "FLOPs (the bound)"
        )
        left.axhline(1, color="black", linewidth=0.8)
        left.set(ylabel="step time over rank 1 (x)", title=style.wrapped(family))
        for axis, key, scale, label in (
            (middle, "matmul_fraction", 100.0, "matmul rate reached (%)"),
            (right, "peak_memory_bytes", 2**-30, "peak memory (GiB)"),
        ):
            found = [over_seeds(c, f"training:{key}") for c in cells]
            values = [value and value.of(scale.__mul__) for value in found]
            style.by_rank(axis, ranks, values, (style.BLUE, "o", "-"), "measured")
            axis.set(ylabel=label, ylim=(0, None))
        for axis in (left, middle, right):
            style.rank_axis(axis, ranks)
    style.legend_below(figure, 2)
    return Drawn(
        figure,
        "What a rank costs in training, untied heads. Left: median step time over rank 1's of the same seed, and the "
        "same ratio of FLOPs, which it would follow if all time went into matrix products at one rate. Middle: FLOPs "
        "done per second, as a share of a large matrix product's on the same device, threads and precision. Right: "
        "peak memory of the process (of the GPU, where there is one). Bars: 95% t interval over seeds.",
        [record for family in shown for record in family.records("untied")],
    )


def _ratio(cells: Cells, base: Cells, key: str) -> Interval | None:
    """Geometric mean over seeds of a training quantity over that of `base`, t interval."""
    pairs = [
        (Sample(math.log(cells[seed]["training"][key])), Sample(math.log(base[seed]["training"][key])))
        for seed in sorted(set(cells) & set(base))
    ]
    return contrast(pairs).exp() if pairs else None
