"""What training does over its steps and over time (C7), what it costs (C8), and whether the balance loss helps (C5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.families import Cells, Family, along
from experiments.records import Record
from experiments.report.figures.style import (
    BLACK,
    BLUE,
    RED,
    SKY,
    WIDE,
    Drawn,
    arms,
    by_rank,
    grid,
    legend_below,
    lines,
    looks,
    pairs,
    rank_axis,
    retrofits,
    widest,
    wrapped,
)
from experiments.stats import Interval, Sample, contrast, difference, estimate, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]


def decoding_over_training(families: list[Family]) -> Drawn | str:
    """Tokens per pass on validation prompts against the step, by rank; on a pretrained model each law by itself."""
    names = {mode: f"validation/{mode}_tokens_per_pass" for mode in ("greedy", "sampling")}
    ours = _curved([family for family in families if not family.is_pretrained], names["sampling"])
    shown = [(family, "untied", _untied(family)) for family in ours]
    for family, distribution in retrofits(families):
        curved = {
            label: cells for label, cells in lines(family, distribution).items() if _is_curved(cells, names["sampling"])
        }
        shown += [(family, distribution, curved)] if curved else []
    if not shown:
        return "no records with train.decode_prompts above 0 and two validations"
    figure, axes = pairs(len(shown), share_y=True)
    styles = looks(label for _, _, cells in shown for label in cells)
    for row, (family, distribution, cells) in zip(axes, shown, strict=True):
        for axis, (mode, name) in zip(row, names.items(), strict=True):
            _curves(axis, cells, name, _steps, styles=styles)
            axis.set_xlabel("training steps")
            axis.set_title(f"{wrapped(family)}\n{distribution}, {mode}" if mode == "greedy" else mode)
        row[0].set_ylabel("tokens per trunk pass")
    legend_below(figure, 3)
    records = [record for _, _, cells in shown for by_seed in cells.values() for record in by_seed.values()]
    prompts = sorted({record.config["train"].get("decode_prompts", 0) for record in records} - {0})
    return Drawn(
        figure,
        f"Tokens per trunk pass on {' or '.join(map(str, prompts))} validation prompts while training goes on; on a pretrained model, cells "
        "validated at least twice. Band: 95% t interval over seeds, where there are three or more.",
        records,
    )


def equal_time(families: list[Family]) -> Drawn | str:
    """Validation joint NLL at equal steps, and at equal wall-clock."""
    shown = _curved(families, "validation/joint_nll")
    if not shown:
        return "no records of two or more ranks with a validation curve"
    figure, axes = pairs(len(shown), share_y=True, height=1.9)
    guessed, records = False, [record for family in shown for record in family.records("untied")]
    for (left, right), family in zip(axes, shown, strict=True):
        _curves(left, _untied(family), "validation/joint_nll", _steps)
        ends = _curves(right, _untied(family), "validation/joint_nll", _clock)
        longer = [
            f for g in along(families, "optim.steps", "optim.warmup") if family in g for f in g if f.ranks() == [1]
        ]
        for other in longer:
            word = f", {other.settings['optim.steps']:,} steps"
            _curves(right, _untied(other, word), "validation/joint_nll", _clock, SKY)
            records += other.records("untied")
        left.set_xlabel("training steps")
        right.set_xlabel("seconds of training steps")
        left.set_ylabel(f"joint NLL of {family.horizon} tokens (nats)")
        left.set_title(f"{wrapped(family)}\nequal steps")
        right.set_title("equal wall-clock")
        right.axvline(min(ends), color="0.4", linewidth=0.8, linestyle=":")
        guessed |= any("clock" not in record["training"] for record in family.records("untied"))
    every = sorted({record.config["train"]["validate_every"] for record in records})
    legend_below(figure, 4)
    return Drawn(
        figure,
        "Validation joint NLL against steps, and against the time spent in them; untied heads. A point is a validation, one every "
        f"{' or '.join(map(str, every))} steps: a short training has two, the second at its end or before it. Dotted: the cheapest rank's last point; at "
        "equal wall-clock the others are read there (or rank 1 further on, where it was also trained for longer). Band: 95% t interval over seeds, where there are three or more."
        + (" Records without a clock have their steps spread evenly over their time." if guessed else ""),
        records,
    )


def overhead(families: list[Family]) -> Drawn | str:
    """Step time against rank with the bound that FLOPs set, the share of the machine that is reached, and memory."""
    shown = [
        f
        for f in widest(families)
        if 1 in f.ranks() and all(r["training"].get("flops_per_token") for r in f.records("untied"))
    ]
    if not shown:
        return "no records of two or more ranks that counted their FLOPs"
    figure, axes = grid(len(shown), 3, width=WIDE)
    for (left, middle, right), family in zip(axes, shown, strict=True):
        ranks, base = family.ranks(), family.cells["untied", 1]
        cells = [family.cells["untied", rank] for rank in ranks]
        by_rank(left, ranks, [_ratio(c, base, "step_ms_median") for c in cells], (BLUE, "o", "-"), "measured")
        by_rank(left, ranks, [_ratio(c, base, "flops_per_token") for c in cells], (RED, "", "--"), "FLOPs (the bound)")
        left.axhline(1, color="black", linewidth=0.8)
        left.set_ylabel("step time over rank 1 (x)")
        left.set_title(wrapped(family))
        fractions = [over_seeds(c, "training:matmul_fraction") for c in cells]
        by_rank(middle, ranks, [_scaled(value, 100) for value in fractions], (BLUE, "o", "-"), "measured")
        middle.set_ylabel("matmul rate reached (%)")
        middle.set_ylim(bottom=0)
        memory = [over_seeds(c, "training:peak_memory_bytes") for c in cells]
        by_rank(right, ranks, [_scaled(value, 2**-30) for value in memory], (BLUE, "o", "-"), "measured")
        right.set_ylabel("peak memory (GiB)")
        right.set_ylim(bottom=0)
        for axis in (left, middle, right):
            rank_axis(axis, ranks)
    legend_below(figure, 2)
    return Drawn(
        figure,
        "What a rank costs in training, untied heads. Left: median step time over rank 1's of the same seed, and the same ratio of FLOPs, "
        "which it would follow if all time went into matrix products at one rate. Middle: FLOPs done per second, as a share of a large "
        "matrix product's on the same device, threads and precision. Right: peak memory of the process (of the GPU, where there is one). "
        "Bars: 95% t interval over seeds.",
        [record for family in shown for record in family.records("untied")],
    )


def balance(families: list[Family]) -> Drawn | str:
    """Ways to keep the components in use, against none."""
    found = _balanced(families)
    if found is None:
        return "no records with balance=none beside another balance at one rank above 1"
    label, rank, ways = found
    none = ways["none"]
    order = ["none", *sorted(way for way in ways if way != "none")]
    figure, axes = grid(1, 3, width=WIDE, height=0.9 + 0.2 * len(order))
    panels: tuple[tuple[str, Callable[[Cells], Interval | None]], ...] = (
        ("joint NLL minus none's (nats)", lambda cells: difference(cells, none, "joint_nll")),
        (f"effective components of {rank}", lambda cells: over_seeds(cells, "effective")),
        ("tokens per pass, sampling", lambda cells: over_seeds(cells, "tokens_per_pass", "sampling")),
    )
    for axis, (quantity, value) in zip(axes[0], panels, strict=True):
        for index, way in enumerate(order):
            interval = value(ways[way])
            if interval is None:
                continue
            axis.errorbar(
                interval.mean,
                index,
                xerr=arms([interval]),
                color=BLACK if way == "none" else BLUE,
                marker="o",
                elinewidth=0.8,
                capsize=1.5,
                capthick=0.8,
            )
        axis.set_yticks(range(len(order)), order if axis is axes[0, 0] else [""] * len(order))
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.grid(True, axis="x")
        axis.set_xlabel(quantity)
    axes[0, 0].axvline(0, color="0.5", linewidth=0.6, zorder=0)
    axes[0, 0].set_title(f"{label}, rank {rank}")
    axes[0, 1].set_xlim(1, 1.03 * rank)
    records = [record for cells in ways.values() for _, record in sorted(cells.items())]
    return Drawn(
        figure,
        f"The balance loss, rank {rank}, untied: joint NLL on test text against none (paired over seeds and rows; lower is better), "
        "effective number of components (exp of the entropy of the mean weights), and tokens per trunk pass. The number is the weight "
        "of the loss (balance=bias: the step of the bias). Bars: 95% interval over rows or prompts and seeds.",
        records,
    )


# --- parts -----------------------------------------------------------------------------------------------------------


def _curved(families: list[Family], name: str) -> list[Family]:
    """Comparisons of which two ranks at least have a curve of that name."""

    return widest([f for f in families if len([c for c in _untied(f).values() if _is_curved(c, name)]) > 1])


def _is_curved(cells: Cells, name: str) -> bool:
    """Whether some record has two points or more of that name."""
    return any(len(_points(record, name)[0]) > 1 for record in cells.values())


def _untied(family: Family, word: str = "") -> dict[str, Cells]:
    return {f"rank {rank}{word}": family.cells["untied", rank] for rank in family.ranks()}


def _steps(record: Record) -> list[float]:
    return [float(note["step"]) for note in record["training"]["curve"]]


def _points(record: Record, name: str, x: Sequence[float] | None = None) -> tuple[Array, Array]:
    """(x, value) at the entries of the curve that have it."""
    curve = record["training"]["curve"]
    indices = _steps(record) if x is None else x
    kept = [(index, note[name]) for index, note in zip(indices, curve, strict=True) if name in note]
    return np.array([index for index, _ in kept]), np.array([value for _, value in kept], dtype=float)


def _clock(record: Record) -> list[float]:
    """Seconds in training steps at each entry of the curve."""
    training: dict[str, Any] = record["training"]
    if len(training.get("clock", ())) == len(training["curve"]):
        return [float(seconds) for seconds in training["clock"]]
    whole = training.get("seconds", record["seconds"].get("train", 0.0))
    return [whole * note["step"] / training["steps"] for note in training["curve"]]


def _curves(
    axis: Axes,
    shown: dict[str, Cells],
    name: str,
    x: Callable[[Record], list[float]],
    color: str = "",
    styles: dict[str, tuple[str, str, str]] | None = None,
) -> list[float]:
    """A line per label, the mean over seeds, with a band where there are three or more (of two it would hide all else); returns
    where each ends. color: of another training than the others'. styles: of labels, where several panels have them."""
    ends, styles = [], styles or looks(shown)
    for label, cells in shown.items():
        records = [record for _, record in sorted(cells.items()) if len(_points(record, name)[0])]
        if not records:
            continue
        own, marker, style = styles[label]
        shade = color or own
        points = [_points(record, name, x(record)) for record in records]
        length = min(len(values) for _, values in points)
        indices = np.mean([at[:length] for at, _ in points], axis=0)
        values = [estimate([Sample(mean=each[k]) for _, each in points]) for k in range(length)]
        axis.plot(indices, [v.mean for v in values], color=shade, marker=marker, linestyle=style, label=label)
        ends.append(float(indices[-1]))
        if len(points) > 2:
            axis.fill_between(
                indices, [v.low for v in values], [v.high for v in values], color=shade, alpha=0.15, linewidth=0
            )
    return ends


def _ratio(cells: Cells, base: Cells, key: str) -> Interval | None:
    """Geometric mean over seeds of a training quantity over that of `base`, t interval."""
    pairs = [
        (Sample(mean=math.log(cells[seed]["training"][key])), Sample(mean=math.log(base[seed]["training"][key])))
        for seed in sorted(set(cells) & set(base))
    ]
    return contrast(pairs).exp() if pairs else None


def _scaled(value: Interval | None, by: float) -> Interval | None:
    if value is None:
        return None
    return Interval(value.mean * by, value.low * by, value.high * by, value.level, value.seeds, value.spread * by)


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
