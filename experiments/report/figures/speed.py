"""What drafting is worth in time (C4), on trunks of several sizes (C7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.families import Family, along
from experiments.records import MODES, PARTS
from experiments.report.figures.drafts import by_law, decoded
from experiments.report.figures.likelihood import joint
from experiments.report.figures.style import (
    COLUMN,
    FILLS,
    LAWS,
    SERIES,
    WIDE,
    Drawn,
    arms,
    errors,
    grid,
    legend_below,
    modes_of,
    pairs,
    widest,
    wrapped,
)
from experiments.stats import over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def speedup(families: list[Family]) -> Drawn | str:
    """Bars of the speed-up over plain decoding by rank and law; rank 1 marked."""
    shown = decoded(families)
    if not shown:
        return "no timed records of two or more ranks"
    figure, axes = pairs(len(shown), share_y=True)
    for row, family in zip(axes, shown, strict=True):
        for axis, mode in zip(row, MODES, strict=True):
            _bars(axis, family, mode)
            axis.set_title(f"{wrapped(family)}\ngreedy" if mode == "greedy" else "sampling")
        row[0].set_ylabel("speed-up over plain (x)")
    legend_below(figure, 3)
    return Drawn(
        figure,
        "Speed-up over plain decoding with the same weights, loop and prompts (solid line: 1). Dashed line: rank 1, untied. Bars: "
        "95% interval over prompts, repeats and seeds (one seed: prompts and repeats only).",
        [record for family in shown for distribution in LAWS for record in family.records(distribution)],
    )


def time_split(families: list[Family]) -> Drawn | str:
    """Milliseconds per token, by part of the work: plain decoding against each rank."""
    shown = [
        f for f in widest(families) if len([r for r in f.ranks() if modes_of(f.cells["untied", r], "sampling")]) > 1
    ]
    if not shown:
        return "no timed records of two or more ranks"
    from matplotlib.ticker import MaxNLocator

    counts = [1 + len(family.ranks()) + len(family.ranks("anchored")) for family in shown]
    figure, axes = grid(len(shown), 1, ratios=[0.16 * count + 0.1 for count in counts])
    for (axis,), family in zip(axes, shown, strict=True):
        bars: list[tuple[str, dict[str, float]]] = []
        for distribution in ("untied", "anchored"):
            for rank in family.ranks(distribution):
                modes = modes_of(family.cells[distribution, rank], "sampling")
                if modes:
                    bars.append(
                        (f"rank {rank}" + (", anchored" if distribution == "anchored" else ""), _milliseconds(modes))
                    )
        plain = [
            1000 / m["tokens_per_second"]["plain"]
            for rank in family.ranks()
            for m in modes_of(family.cells["untied", rank], "sampling")
        ]
        _part(axis, 0, float(np.mean(plain)), "plain", ("0.55", "xxxx"))
        for place, (_, parts) in enumerate(bars, start=1):
            left = 0.0
            for part in PARTS:
                _part(axis, place, parts[part], part, FILLS[part], left)
                left += parts[part]
        axis.set_yticks(range(len(bars) + 1), ["plain", *(name for name, _ in bars)])
        axis.invert_yaxis()
        axis.grid(False)
        axis.grid(True, axis="x")
        axis.set_xlabel("milliseconds per token")
        axis.xaxis.set_major_locator(MaxNLocator(6, prune="upper"))  # a label at the edge would be cut off
        axis.set_title(wrapped(family))
    figure.set_size_inches(COLUMN, sum(0.16 * count + 0.85 for count in counts) + 0.4)
    legend_below(figure, 3)
    return Drawn(
        figure,
        "Time per token when sampling: plain decoding, and speculative decoding split by timers in a repeat of its own (scaled to the "
        "median untimed rate). trunk: hidden states; verify: the target's law at all n positions and the acceptance test.",
        [
            record
            for family in shown
            for distribution in ("untied", "anchored")
            for record in family.records(distribution)
        ],
    )


def by_size(families: list[Family]) -> Drawn | str:
    """Speed-up and tokens per pass against the trunk's parameters, a line per rank."""
    timed = [f for f in families if any(modes_of(f.cells["untied", rank], "sampling") for rank in f.ranks())]
    groups = [
        group
        for group in along([f for f in timed if not f.is_pretrained], "size", "trunk", "optim.")
        if len({f.size for f in group}) > 1
    ]
    if not groups:
        return "no timed records of two or more trunk sizes"
    group = groups[0]
    sizes = {family.size: family for family in reversed(group)}  # of two alike, the larger comparison
    trunks = {size: next(iter(family.records("untied")))["parameters"]["trunk"] for size, family in sizes.items()}
    ordered = sorted(sizes, key=trunks.__getitem__)
    ranks = sorted({rank for family in sizes.values() for rank in family.ranks()})
    ranks = [rank for rank in ranks if sum(rank in sizes[size].ranks() for size in ordered) > 1]
    figure, axes = grid(2, 2, share_y="row", height=1.9)
    for row, (quantity, label) in zip(
        axes, (("speedup", "speed-up over plain (x)"), ("tokens_per_pass", "tokens per trunk pass")), strict=True
    ):
        for axis, mode in zip(row, MODES, strict=True):
            for index, rank in enumerate(ranks):
                values = [over_seeds(sizes[size].cells.get(("untied", rank), {}), quantity, mode) for size in ordered]
                x = [trunks[size] / 1e6 * 1.04 ** (index - (len(ranks) - 1) / 2) for size in ordered]
                errors(axis, x, values, SERIES[index % len(SERIES)], f"rank {rank}")
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log")
            axis.set_xticks([trunks[size] / 1e6 for size in ordered], [f"{trunks[s] / 1e6:.2g}" for s in ordered])
            axis.minorticks_off()
            axis.set_xlabel("trunk parameters (millions)")
            axis.set_title(mode)
        row[0].set_ylabel(label)
    legend_below(figure, 4)
    return Drawn(
        figure,
        f"Speed-up over plain decoding, and tokens per trunk pass, against the size of the trunk ({', '.join(ordered)}); untied heads, "
        f"n={group[0].horizon}, {group[0].settings['corpus']}, {group[0].target} target. Bars: 95% interval over prompts or repeats and "
        "seeds. Solid line: plain decoding.",
        [record for size in ordered for record in sizes[size].records("untied") if record.rank in ranks],
    )


def overview(families: list[Family]) -> Drawn | str:
    """The README's figure: likelihood, tokens per pass and speed-up of the largest comparison."""
    several = [f for f in families if len(f.ranks()) > 1 and any(r.mode("sampling") for r in f.records("untied"))]
    common = [f for f in several if f.target == "common"] or several
    if not common:
        return "no decoding records of two or more ranks"
    fast = common[0]
    own = [
        f
        for f in families
        if f.target == "own" and len(f.ranks()) > 1 and f.settings["corpus"] == fast.settings["corpus"]
    ]
    likely = (own or [fast])[0]
    figure, axes = grid(1, 3, width=WIDE, height=2.0)
    left, middle, right = axes[0]
    joint(left, likely)
    left.set_title(f"Joint loss: lower is better\n{likely.label}")
    by_law(middle, fast, "tokens_per_pass", "sampling")
    middle.set_ylabel("tokens per trunk pass")
    middle.set_title(f"Draft length: higher is better\n{fast.label}")
    _bars(right, fast, "sampling")
    right.set_ylabel("speed-up over plain (x)")
    right.set_title("Lossless speed-up, sampling\n(dashed: rank 1)")
    legend_below(figure, 3)
    return Drawn(
        figure,
        "Left: held-out joint NLL against the rank (bars: 95% interval of the paired difference to the lowest rank). Middle: tokens per "
        "trunk pass when sampling; plain decoding is 1. Right: speed-up over plain decoding with the same weights. Bars: 95% intervals "
        "over prompts, repeats and seeds. Untied: the paper's law; tied and anchored: ours. Dotted: rank 1 with perceptron maps that "
        "have the parameters of the highest rank.",
        [*likely.records("untied"), *(r for r in fast.records() if likely is not fast or r.variant != "untied")],
    )


def _bars(axis: Axes, family: Family, mode: str) -> None:
    distributions = [distribution for distribution in LAWS if family.ranks(distribution)]
    ranks = sorted({rank for distribution in distributions for rank in family.ranks(distribution)})
    width = 0.8 / len(distributions)
    for index, distribution in enumerate(distributions):
        color, _, _, hatch = LAWS[distribution]
        for place, rank in enumerate(ranks):
            value = (
                over_seeds(family.cells[distribution, rank], "speedup", mode)
                if (distribution, rank) in family.cells
                else None
            )
            if value is None:
                continue
            x = place + (index - (len(distributions) - 1) / 2) * width
            axis.bar(
                x,
                value.mean,
                width * 0.92,
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.4,
                label=distribution,
            )
            axis.errorbar(x, value.mean, arms([value]), color="black", elinewidth=0.8, capsize=1.5, capthick=0.8)
    axis.axhline(1, color="black", linewidth=0.8)
    first = over_seeds(family.cells["untied", 1], "speedup", mode) if ("untied", 1) in family.cells else None
    if first is not None:
        axis.axhline(first.mean, color="black", linewidth=0.8, linestyle=(0, (4, 2)))
    axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axis.set_xlabel("rank r")


def _part(axis: Axes, place: int, width: float, label: str, fill: tuple[str, str], left: float = 0.0) -> None:
    axis.barh(place, width, 0.72, left, color=fill[0], hatch=fill[1], edgecolor="white", linewidth=0.3, label=label)


def _milliseconds(modes: list[dict[str, Any]]) -> dict[str, float]:
    """Per part; the parts sum to the mean over seeds of the time per token."""
    sums = dict.fromkeys(PARTS, 0.0)
    for mode in modes:
        whole = sum(mode["seconds_by_part"][part] for part in PARTS) or 1.0
        for part in PARTS:
            sums[part] += (
                1000 / mode["tokens_per_second"]["speculative"] * mode["seconds_by_part"][part] / whole / len(modes)
            )
    return sums
