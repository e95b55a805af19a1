"""What a target forward and its draft cost, against the size of the trunk (C4, C7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from experiments.families import Cells, Family
from experiments.report.figures import style
from experiments.report.figures.speed import size_axis
from experiments.report.figures.style import Drawn, Look
from experiments.stats import Interval, Sample, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HORIZON = 4  # tokens of the forwards that are compared across trunks
_MODE = "sampling"


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
        timed = any(_modes(family.cells[variant, rank]) for rank in family.ranks(variant))
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


def _modes(cells: Cells) -> list[dict[str, Any]]:
    return [measured for _, record in sorted(cells.items()) if (measured := record.mode(_MODE))]


def _forward_ratio(mode: dict[str, Any]) -> float:
    return float(mode["tn_ms"] / mode["t1_ms"])


def _draft_ratio(mode: dict[str, Any]) -> float:
    parts = mode["seconds_by_part"]
    return float(parts["draft"] / parts["trunk"] * mode["tn_ms"] / mode["t1_ms"])


def _over(cells: Cells, ratio: Callable[[dict[str, Any]], float]) -> Interval | None:
    """Geometric mean over seeds."""
    samples = [Sample(math.log(ratio(mode))) for mode in _modes(cells)]
    return estimate(samples).exp() if samples else None
