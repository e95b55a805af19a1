"""What all figures share: one palette, one set of type sizes, one grid, one way to save.

Drawn for one column (3.4 in) or two (7 in) with text of 7 pt or more, in Okabe and Ito's colours, told apart by
marker as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpdlm.files import write_bytes
from experiments.families import Family, along
from experiments.records import Record
from experiments.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, WIDE, ROW = 3.4, 7.0, 1.75  # inches
DPI = 200  # of a PNG
PANELS = 4  # comparisons that one figure shows; further ones are in the tables
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "pdf.fonttype": 42,
    "savefig.dpi": DPI,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.color": "0.88",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.ymargin": 0.1,
    "figure.constrained_layout.h_pad": 0.05,
    "axes.titlelocation": "left",
    "figure.constrained_layout.w_pad": 0.05,
}
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
Look = tuple[str, str, str]  # colour, marker, dashes
# Of ranks, positions and the like, in their order.
SERIES: tuple[Look, ...] = (
    (BLACK, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (BLUE, "D", "-"),
    (RED, "v", "--"),
    (PURPLE, "P", ":"),
    (SKY, "X", "-."),
)
# The same of a variant of the heads, as records name it.
VARIANTS = {"untied": (BLUE, "o", "-"), "tied": (ORANGE, "s", "--"), "token-conditioned": (GREEN, "^", "-.")}
BY_MODE = {"greedy": (RED, "s", "none"), "sampling": (BLUE, "o", "none")}
ARMS: dict[str, Any] = {"elinewidth": 0.8, "markeredgewidth": 0}
TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 16)  # of ratios


@dataclass(frozen=True)
class Drawn:
    """A figure, the caption that goes with it and the records it shows."""

    figure: Figure
    caption: str
    records: list[Record]


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    draw: from families to a Drawn, or to the reason why there is none ("no ..."). claim: whose cells it needs.
    of_time: it is about training time, so that it is drawn from the timing cells, and it alone. decoded: it shows
    what was measured in decoding, so that its caption states the prompts.
    """

    title: str
    claim: str
    draw: Callable[[list[Family]], Drawn | str]
    of_time: bool = False
    decoded: bool = False


def save(figure: Figure, caption: str, folder: Path, name: str) -> list[Path]:
    """Write caption, PDF and PNG; the same figure gives the same bytes."""
    files = [folder / f"{name}.{suffix}" for suffix in ("md", "pdf", "png")]
    write_bytes(files[0], f"{caption}\n".encode())
    for path, metadata in (
        (files[1], {"Creator": None, "Producer": None, "CreationDate": None}),
        (files[2], {"Software": None}),
    ):
        memory = io.BytesIO()
        figure.savefig(memory, format=path.suffix[1:], metadata=metadata)
        write_bytes(path, memory.getvalue())
    return files


# --- axes ------------------------------------------------------------------------------------------------------------


def grid(
    rows: int,
    columns: int,
    *,
    width: float = COLUMN,
    height: float = ROW,
    share_y: bool | str = False,
) -> tuple[Figure, Any]:
    """A figure without pyplot's global state, and its axes, always two-dimensional. height: of a row, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    shared: Any = share_y
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=shared)


def rank_axis(axis: Axes, ranks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ranks), [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.set(xlim=(min(ranks) * 2**-0.3, max(ranks) * 2**0.3), xlabel="rank r")


def ratio_axis(
    axis: Axes, label: str, low: float | None = None, high: float | None = None, ticks: Sequence[float] = TICKS
) -> None:
    """A logarithmic x axis of ratios, with a line at 1; without ends as far as what is drawn reaches."""
    axis.set_xscale("log")
    ends = axis.dataLim.intervalx
    low, high = low or min(ends[0], 1) / 1.03, high or max(ends[1], 1) * 1.03
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=0.8, zorder=1)
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x")
    axis.grid(False, axis="y")
    axis.set_xlabel(label)


def rows_axis(axis: Axes, names: Sequence[str]) -> None:
    """Names down the y axis, the first on top."""
    axis.set_yticks(range(len(names)), list(names))
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")


def labels(*axes: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels for a legend, each label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def legend_below(figure: Figure, columns: int) -> None:
    """One legend under the whole figure."""
    figure.legend(*labels(*figure.axes), loc="outside lower center", ncols=columns, columnspacing=1.2)


# --- marks -----------------------------------------------------------------------------------------------------------


def errors(
    axis: Axes, x: Sequence[float], values: Sequence[Interval | None], look: Look, label: str, **options: Any
) -> None:
    """A line through points with interval arms; a missing value is left out. options: of the markers."""
    kept = [(place, value) for place, value in zip(x, values, strict=True) if value is not None]
    if kept:
        color, marker, style = look
        axis.errorbar(
            [place for place, _ in kept],
            [v.mean for _, v in kept],
            arms([v for _, v in kept]),
            **ARMS | {"color": color, "marker": marker, "linestyle": style, "label": label} | options,
        )


def across(axis: Axes, y: float, value: Interval, look: Look, label: str) -> None:
    """A point with its interval on a line of a table."""
    color, marker, _ = look
    axis.errorbar(
        value.mean,
        y,
        xerr=arms([value]),
        **ARMS | {"color": color, "marker": marker, "linestyle": "none", "label": label},
    )


def by_rank(
    axis: Axes, ranks: Sequence[int], values: Sequence[Interval | None], look: Look, label: str, shift: float = 0.0
) -> None:
    """`errors` against the rank on a log axis; `shift`, in doublings, keeps arms apart."""
    errors(axis, [rank * 2**shift for rank in ranks], values, look, label)


def arms(values: Sequence[Interval]) -> Any:
    return np.array([[v.mean - v.low for v in values], [v.high - v.mean for v in values]])


# --- what is shown ---------------------------------------------------------------------------------------------------


def widest(families: Sequence[Family], variant: str = "untied", least: int = 3) -> list[Family]:
    """The comparisons worth a panel: of `least` ranks or more (two, where none has more), PANELS at most.

    Of those that differ in the horizon alone it is the largest.
    """
    several = [family for family in families if len(family.ranks(variant)) > 1]
    found: list[Family] = []
    for family in [family for family in several if len(family.ranks(variant)) >= least] or several:
        if not any(along([family, other], "horizon") for other in found):
            found.append(family)
    return found[:PANELS]


def looks(shown: Iterable[str]) -> dict[str, Look]:
    """A look by label: the same in every panel and figure for the ranks 1, 2, 4, 8; the others follow."""
    labels = dict.fromkeys([*(f"rank {rank}" for rank in (1, 2, 4, 8)), *shown])
    return {label: SERIES[index % len(SERIES)] for index, label in enumerate(labels)}


def worded(text: str) -> str:
    """With the name that the world knows a model by."""
    return text.replace("smollm2", "SmolLM2-135M")


def wrapped(family: Family) -> str:
    """The label on lines that fit half a column."""
    parts = worded(family.label).split(", ")
    shown = [", ".join(parts[:3]), ", ".join(parts[3:4]), *parts[4:]]
    return "\n".join(line for line in shown if line)
