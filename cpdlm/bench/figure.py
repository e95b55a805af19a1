"""The figure of a benchmark: tokens per second and speed-up of every method, a row of panels for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = dict[str, Any]
LOOKS = {"greedy": ("#D55E00", "s"), "T=1": ("#0072B2", "o")}  # colour and marker, as in the reports
TIMED = {"tokens_per_second": "tokens/s", "speedup": "speed-up over AR (x)"}
COUNTED = {"tokens_per_forward": "tokens per forward"}


def figure_of(entries: Sequence[Entry]) -> Figure:
    """entries: as `tasks` makes them, timed or counted. No global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    shown = TIMED if all(entry["speedup"] for entry in entries) else COUNTED
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    height = (0.6 + 0.19 * len(methods)) * len(tasks) + 0.3
    figure = Figure(figsize=(7.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), len(shown), squeeze=False, sharey=True, sharex="col")
    for line, task in zip(axes, tasks, strict=True):
        own = [entry for entry in entries if entry["task"] == task]
        for axis, key in zip(line, shown, strict=True):
            _panel(axis, [(methods.index(entry["method"]), entry["mode"], entry[key]) for entry in own if entry[key]])
            axis.set_title(task)
        line[0].set_yticks(range(len(methods)), methods)
    axes[0, 0].set_ylim(len(methods) - 0.4, -0.6)
    for axis, label in zip(axes[-1], shown.values(), strict=True):
        axis.set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=len(found))
    return figure


def _panel(axis: Axes, points: Sequence[tuple[int, str, dict[str, float]]]) -> None:
    """points: the method's place, the mode, and {"median" or "mean", "low", "high"}."""
    for place, mode, value in points:
        colour, marker = LOOKS[mode]
        middle = value["median"] if "median" in value else value["mean"]
        # The median of the repeats may lie outside the interval of the total rates.
        arms = [[max(middle - value["low"], 0.0)], [max(value["high"] - middle, 0.0)]]
        shift = -0.15 if mode == "greedy" else 0.15
        axis.errorbar(
            middle, place + shift, xerr=arms, fmt=marker, color=colour, markersize=4, elinewidth=0.8, label=mode
        )
    axis.grid(True, axis="x", color="0.88", linewidth=0.4)
    axis.grid(False, axis="y")
    axis.set_axisbelow(True)


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write the figure as PNG. ConfigError where matplotlib is not installed."""
    import io

    from cpdlm.config import ConfigError
    from cpdlm.files import write_bytes

    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--output draws a figure, which needs matplotlib; type pip install matplotlib") from error
    memory = io.BytesIO()
    figure_of(entries).savefig(memory, format="png", dpi=200)
    write_bytes(path, memory.getvalue())
