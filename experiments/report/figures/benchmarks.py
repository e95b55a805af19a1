"""Figures of the benchmarks' records: ways to draft side by side, and the overhead of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.report.figures import style
from experiments.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Benchmark = dict[str, Any]


def ways_to_draft(record: Benchmark) -> Figure:
    """A row per method: its tokens per target forward and its speed-up over AR decoding, greedy and sampling."""
    corpora = [target["corpus"] for target in record["targets"]]
    methods = [[method for method in record["methods"] if method["corpus"] == corpus] for corpus in corpora]
    lines = max(map(len, methods))
    figure, axes = style.grid(len(corpora), 2, width=style.WIDE, height=0.7 + 0.19 * lines, share_y="row")
    for (left, right), corpus, rows in zip(axes, corpora, methods, strict=True):
        _methods(left, rows, "tokens_per_pass")
        _methods(right, rows, "speedup")
        style.rows_axis(left, [style.worded(method["name"]) for method in rows])
        style.ratio_axis(left, "tokens per forward")
        style.ratio_axis(right, "speed-up over AR (x)")
        left.set_title(f"{corpus}: draft length")
        right.set_title("speed (line: AR decoding)")
    style.legend_below(figure, 2)
    return figure


def _methods(axis: Axes, rows: Sequence[dict[str, Any]], quantity: str) -> None:
    for place, method in enumerate(rows):
        for shift, (mode, look) in zip((-0.15, 0.15), style.BY_MODE.items(), strict=True):
            found = method["modes"][mode][quantity]
            style.across(axis, place + shift, Interval(found["mean"], found["low"], found["high"], 0.95, 1), look, mode)


def training_overhead(record: Benchmark) -> Figure:
    """A row per recipe, a panel per size of the trunk: a step over the next-token model's, and what FLOPs allow."""
    cells = [cell for cell in record["cells"] if cell.get("bound")]
    recipes, sizes = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("recipe", "size"))
    figure, axes = style.grid(1, len(sizes), width=style.WIDE, height=0.7 + 0.17 * len(recipes), share_y=True)
    highest = max(1 + max(cell["bound"], cell["overhead"]["high"]) for cell in cells)
    lowest = min(1, *(1 + min(cell["bound"], cell["overhead"]["low"]) for cell in cells))
    for axis, size in zip(axes[0], sizes, strict=True):
        for cell in (cell for cell in cells if cell["size"] == size):
            place, found = recipes.index(cell["recipe"]), cell["overhead"]
            value = Interval(1 + found["median"], 1 + found["low"], 1 + found["high"], 1.0, 1)
            style.across(axis, place, value, style.BY_MODE["sampling"], "measured")
            axis.plot(
                1 + cell["bound"], place, "|", color=style.RED, markersize=9, markeredgewidth=1.2, label="by FLOPs"
            )
        style.ratio_axis(
            axis, "step / next-token step (x)", lowest / 1.3, highest * 1.3, (0.25, 0.5, 1, 2, 4, 8, 16, 32)
        )
        axis.set_title(f"trunk {size}")
    style.rows_axis(axes[0, 0], [style.worded(recipe) for recipe in recipes])
    style.legend_below(figure, 2)
    return figure
