"""What all figures share: one palette, one set of type sizes, one grid, one way to save.

Drawn for one column (3.4 in) or two (7 in) with text of 7 pt or more, in Okabe and Ito's colours, told apart by marker or
hatch as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpdlm.files import write_bytes
from experiments.families import Cells, Family, along
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
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "pdf.fonttype": 42,
    "figure.dpi": 100,
    "savefig.dpi": DPI,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.color": "0.88",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.ymargin": 0.1,
    "svg.hashsalt": "cpdlm",
    "text.usetex": False,
    "figure.constrained_layout.h_pad": 0.05,
    "axes.titlelocation": "left",
    "figure.constrained_layout.w_pad": 0.05,
    "image.cmap": "cividis",
}
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, YELLOW = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
)
# Colour, marker and dashes of ranks, positions and the like, in their order.
SERIES = (
    (BLACK, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (BLUE, "D", "-"),
    (RED, "v", "--"),
    (PURPLE, "P", ":"),
    (SKY, "X", "-."),
)
LAWS = {"untied": (BLUE, "o", "-", ""), "tied": (ORANGE, "s", "--", "////"), "anchored": (GREEN, "^", "-.", "....")}
FILLS = {
    "prefill": (BLACK, ""),
    "draft": (ORANGE, "////"),
    "trunk": (BLUE, ""),
    "verify": (GREEN, "...."),
    "other": ("0.8", ""),
}
COMPONENTS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, YELLOW, "0.55")  # component a of a mixture


@dataclass(frozen=True)
class Drawn:
    """A figure, the caption that goes with it and the records it shows."""

    figure: Figure
    caption: str
    records: list[Record]


@dataclass(frozen=True)
class Plot:
    """One figure of the report. draw: from families to a Drawn, or to the reason why there is none ("no ..."). claim: whose
    cells it needs. of_time: it is about training time, so that the timing cells are for it, and for it alone. decoded: it shows
    what was measured in decoding, so that its caption states the prompts."""

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


def grid(
    rows: int,
    columns: int,
    *,
    width: float = COLUMN,
    height: float = ROW,
    share_y: bool | str = False,
    ratios: list[float] | None = None,
) -> tuple[Figure, Any]:
    """A figure without pyplot's global state, and its axes, always two-dimensional."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y, height_ratios=ratios)  # type: ignore[arg-type]


def pairs(count: int, *, height: float = ROW, share_y: bool = False) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Two panels for each of `count` comparisons, two comparisons to a row. share_y: within a pair."""
    beside = min(count, 2)
    figure, axes = grid(-(-count // 2), 2 * beside, width=WIDE if beside == 2 else COLUMN, height=height)
    flat = list(axes.flat)
    for axis in flat[2 * count :]:
        axis.remove()
    found = [(flat[place], flat[place + 1]) for place in range(0, 2 * count, 2)]
    for left, right in found if share_y else ():
        right.sharey(left)
        right.tick_params(labelleft=False)
    return figure, found


def widest(families: Sequence[Family], distribution: str = "untied") -> list[Family]:
    """The comparisons of a law worth a panel: those of three ranks or more (two, where none has more), PANELS at most. Of
    those that differ in the horizon alone, the largest: the others are in the heat maps."""
    several = [family for family in families if len(family.ranks(distribution)) > 1]
    found: list[Family] = []
    for family in [family for family in several if len(family.ranks(distribution)) > 2] or several:
        if not any(along([family, other], "horizon") for other in found):
            found.append(family)
    return found[:PANELS]


def retrofits(families: Sequence[Family]) -> list[tuple[Family, str]]:
    """(family, law) of the cells on pretrained models, those of most ranks first, of these the longest trained, PANELS at most."""
    theirs = sorted((f for f in families if f.is_pretrained), key=lambda family: -family.settings["optim.steps"])
    found = [(family, distribution) for family in theirs for distribution in LAWS if lines(family, distribution)]
    return sorted(found, key=lambda each: -len({label.split(",")[0] for label in lines(*each)}))[:PANELS]


def lines(family: Family, distribution: str) -> dict[str, Cells]:
    """A line per rank of a law and of its variants: "rank 4", and "rank 1, mlp 1152"."""
    return {
        ", ".join([f"rank {rank}", *variant.split(", ")[1:]]): family.cells[variant, rank]
        for variant in family.variants()
        if variant.split(", ")[0] == distribution
        for rank in family.ranks(variant)
    }


def looks(shown: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dashes by label, the same in every panel and figure for the ranks 1, 2, 4, 8; the others follow."""
    labels = dict.fromkeys([*(f"rank {rank}" for rank in (1, 2, 4, 8)), *shown])
    return {label: SERIES[index % len(SERIES)] for index, label in enumerate(labels)}


def errors(
    axis: Axes, x: Sequence[float], values: Sequence[Interval | None], look: tuple[str, str, str], label: str
) -> None:
    """A line through points with interval arms; a missing value is left out."""
    kept = [(place, value) for place, value in zip(x, values, strict=True) if value is not None]
    if not kept:
        return
    color, marker, style = look
    axis.errorbar(
        [place for place, _ in kept],
        [v.mean for _, v in kept],
        arms([v for _, v in kept]),
        color=color,
        marker=marker,
        linestyle=style,
        label=label,
        elinewidth=0.8,
        capsize=1.5,
        capthick=0.8,
        markeredgewidth=0,
    )


def by_rank(
    axis: Axes,
    ranks: Sequence[int],
    values: Sequence[Interval | None],
    look: tuple[str, str, str],
    label: str,
    shift: float = 0.0,
) -> None:
    """`errors` against the rank on a log axis; `shift`, in doublings, keeps arms apart."""
    errors(axis, [rank * 2**shift for rank in ranks], values, look, label)


def arms(values: Sequence[Interval]) -> Any:
    return np.array([[v.mean - v.low for v in values], [v.high - v.mean for v in values]])


def rank_axis(axis: Axes, ranks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ranks), [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.set_xlim(min(ranks) * 2**-0.3, max(ranks) * 2**0.3)
    axis.set_xlabel("rank r")


def legend_below(figure: Figure, columns: int, first: Axes | None = None) -> None:
    """One legend under the whole figure; entries of the same name once, those of `first` before the others."""
    found: dict[str, Any] = {}
    for axis in [*([first] if first is not None else []), *figure.axes]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, columnspacing=1.2)


def modes_of(cells: Cells, mode: str) -> list[dict[str, Any]]:
    return [measured for _, record in sorted(cells.items()) if (measured := record.mode(mode))]


def wrapped(family: Family) -> str:
    """The label on lines that fit half a column."""
    parts = family.label.split(", ")
    lines = [", ".join(parts[:3]), ", ".join(parts[3:4]), *parts[4:]]
    return "\n".join(line for line in lines if line)
