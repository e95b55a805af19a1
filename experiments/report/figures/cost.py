"""What a rank costs: in time per token, in a target forward by the size of the trunk, and in training (C4, C8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.families import Cells, Family
from experiments.report.figures import style
from experiments.report.figures.speed import size_axis
from experiments.report.figures.style import Drawn, Look
from experiments.schema import PARTS
from experiments.stats import Interval, Sample, contrast, estimate, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HORIZON = 4  # tokens of the forwards that are compared across trunks
_MODE = "sampling"


def time_split(families: list[Family]) -> Drawn | str:
    """Milliseconds per token, by part of the work: AR decoding against each rank."""
    shown = [
        f
        for f in style.widest(families)
        if len([r for r in f.ranks() if style.modes_of(f.cells["untied", r], _MODE)]) > 1
    ]
    if not shown:
        return "no timed records of two or more ranks"
    from matplotlib.ticker import MaxNLocator

    counts = [1 + len(family.ranks()) + len(family.ranks("token-conditioned")) for family in shown]
    figure, axes = style.grid(len(shown), 1, ratios=[0.16 * count + 0.1 for count in counts])
    for (axis,), family in zip(axes, shown, strict=True):
        style.rows_axis(axis, _bars(axis, family))
        axis.grid(True, axis="x")
        axis.set_xlabel("milliseconds per token")
        axis.xaxis.set_major_locator(MaxNLocator(6, prune="upper"))  # a label at the edge would be cut off
        axis.set_title(style.wrapped(family))
    figure.set_size_inches(style.COLUMN, sum(0.16 * count + 0.85 for count in counts) + 0.4)
    style.legend_below(figure, 3)
    return Drawn(
        figure,
        "Time per token when sampling: AR decoding, and speculative decoding split by timers in a repeat of its own "
        "(scaled to the median untimed rate). trunk: hidden states; verify: the target's distribution at all n "
        "positions and the acceptance test.",
        [record for f in shown for variant in ("untied", "token-conditioned") for record in f.records(variant)],
    )


def _bars(axis: Axes, family: Family) -> list[str]:
    """A bar for AR decoding and one per rank and variant; returns their names, from the top down."""
    alone = [
        1000 / mode["tokens_per_second"]["plain"]
        for rank in family.ranks()
        for mode in style.modes_of(family.cells["untied", rank], _MODE)
    ]
    names = ["AR"]
    _part(axis, 0, float(np.mean(alone)), "AR", ("0.55", "xxxx"))
    for variant, word in (("untied", ""), ("token-conditioned", ", token-conditioned")):
        for rank in family.ranks(variant):
            modes = style.modes_of(family.cells[variant, rank], _MODE)
            left = 0.0
            for part, width in _milliseconds(modes).items() if modes else ():
                _part(axis, len(names), width, part, style.FILLS[part], left)
                left += width
            names += [f"rank {rank}{word}"] if modes else []
    return names


def _part(axis: Axes, place: int, width: float, label: str, fill: tuple[str, str], left: float = 0.0) -> None:
    axis.barh(place, width, 0.72, left, color=fill[0], hatch=fill[1], edgecolor="white", linewidth=0.3, label=label)


def _milliseconds(modes: list[dict[str, Any]]) -> dict[str, float]:
    """Per part; the parts sum to the mean over seeds of the time per token."""
    sums = dict.fromkeys(PARTS, 0.0)
    for mode in modes:
        whole, rate = (
            sum(mode["seconds_by_part"][part] for part in PARTS) or 1.0,
            mode["tokens_per_second"]["speculative"],
        )
        for part in PARTS:
            sums[part] += 1000 / rate * mode["seconds_by_part"][part] / whole / len(modes)
    return sums


# --- a forward, by the size of the trunk -----------------------------------------------------------------------------


def forward(families: list[Family]) -> Drawn | str:
    """What a target forward over n tokens and its draft cost, against the size of the trunk."""
    trunks = _by_trunk(families)
    if len(trunks) < 2:
        return "no timed records of two or more trunks"
    figure, axes = style.grid(1, 2, height=2.1)
    left, right = axes[0]
    ranks: dict[int, Look] = {1: (style.BLACK, "o", "-"), 4: (style.ORANGE, "s", "--"), 8: (style.PURPLE, "D", ":")}
    _by_kind(left, trunks, 0, _forward_ratio, (style.BLUE, "o", "-"), f"forward over {_HORIZON} tokens")
    for rank, look in ranks.items():
        _by_kind(right, trunks, rank, _draft_ratio, look, f"draft, rank {rank}")
    for axis, title in ((left, f"target forward\nover {_HORIZON} tokens"), (right, "draft")):
        size_axis(axis, [size for size, _, _ in trunks], decades=True)
        axis.set_title(title)
    left.axhline(1, color="black", linewidth=0.8)
    left.set_ylabel("time over a one-token forward (x)")
    right.set_ylim(bottom=0)
    style.legend_below(figure, 2)
    return Drawn(
        figure,
        "What speculation adds to a step, in forwards of the target over one token, when sampling. Left: a forward "
        f"over {_HORIZON} tokens. Right: drafting them, from the share of the timers. Lines: untied heads on trunks "
        "of ours, float32. Points: token-conditioned heads on pretrained models, filled in float32, open in "
        "bfloat16. Bars: 95% t interval over seeds, where there are several. "
        + "; ".join(f"{size / 1e6:.3g}M: {style.worded(family.size)}" for size, family, _ in trunks)
        + ".",
        [record for _, f, variant in trunks for rank in f.ranks(variant) for record in f.cells[variant, rank].values()],
    )


def _by_trunk(families: list[Family]) -> list[tuple[int, Family, str]]:
    """(parameters, family, variant) of the largest comparison on each trunk in each precision, by size."""
    found: dict[tuple[str, str], tuple[int, Family, str]] = {}
    for family in families:
        variant = "token-conditioned" if family.is_pretrained else "untied"
        timed = any(style.modes_of(family.cells[variant, rank], _MODE) for rank in family.ranks(variant))
        if timed and family.horizon == _HORIZON and family.target == "common":
            size = int(family.records(variant)[0]["parameters"]["trunk"])
            found.setdefault((family.size, str(family.settings["model.dtype"])), (size, family, variant))
    return sorted(found.values(), key=lambda each: each[0])


def _by_kind(
    axis: Axes,
    trunks: list[tuple[int, Family, str]],
    rank: int,
    ratio: Callable[[dict[str, Any]], float],
    look: Look,
    label: str,
) -> None:
    """A line through the trunks of ours, a point for each pretrained model. rank: 0 for the lowest."""
    ours: list[tuple[float, Interval | None]] = []
    for size, family, variant in trunks:
        value = _over(family.cells.get((variant, rank or min(family.ranks(variant))), {}), ratio)
        if not family.is_pretrained:
            ours.append((size / 1e6, value))
        else:
            narrow = family.settings["model.dtype"] == "bfloat16"
            shift = 1.4 ** {1: -1, 8: 1}.get(rank, 0)  # markers of several ranks on one trunk stay apart
            face = {"markerfacecolor": "white", "markeredgewidth": 1.0} if narrow else {}
            style.errors(axis, [size / 1e6 * shift], [value], (look[0], look[1], "none"), "_", **face)
    style.errors(axis, [x for x, _ in ours], [value for _, value in ours], look, label)


def _forward_ratio(mode: dict[str, Any]) -> float:
    return float(mode["tn_ms"] / mode["t1_ms"])


def _draft_ratio(mode: dict[str, Any]) -> float:
    parts = mode["seconds_by_part"]
    return float(parts["draft"] / parts["trunk"] * mode["tn_ms"] / mode["t1_ms"])


def _over(cells: Cells, ratio: Callable[[dict[str, Any]], float]) -> Interval | None:
    """Geometric mean over seeds."""
    samples = [Sample(math.log(ratio(mode))) for mode in style.modes_of(cells, _MODE)]
    return estimate(samples).exp() if samples else None


# --- training --------------------------------------------------------------------------------------------------------


def training(families: list[Family]) -> Drawn | str:
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
