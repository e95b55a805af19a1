"""The figures, as functions of the records. PDF and PNG, the same bytes for the same records and matplotlib.

Drawn for one column (3.4 in) with text of 7 pt or more, in Okabe and Ito's colours, told apart by marker or hatch as
well. A figure whose cells are missing is left out with a line that says so. Each has a caption file beside it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpdlm.files import write_bytes
from cpdlm.report.results import MODES, PARTS, Cells, Family, Record
from cpdlm.report.statistics import Interval, difference, over_seeds
from cpdlm.report.tables import described
from cpdlm.report.verdicts import CLAIMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, ROW = 3.4, 1.75  # inches
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 7, "axes.labelsize": 7, "axes.titlesize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4, "hatch.linewidth": 0.5,
    "legend.frameon": False, "legend.handlelength": 1.8, "pdf.fonttype": 42, "figure.dpi": 100, "savefig.dpi": 300,
    "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "0.88", "axes.grid": True, "axes.grid.axis": "y",
    "axes.ymargin": 0.1, "svg.hashsalt": "cpdlm", "text.usetex": False, "figure.constrained_layout.h_pad": 0.05, "axes.titlelocation": "left",
    "figure.constrained_layout.w_pad": 0.05,
}  # fmt: skip
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
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


@dataclass(frozen=True)
class Drawn:
    """A figure, the caption that goes with it and the records it shows."""

    figure: Figure
    caption: str
    records: list[Record]


def draw_all(families: list[Family], folder: Path) -> tuple[list[Path], list[str]]:
    """Draw every figure into `folder`; returns (files, one line per figure left out)."""
    try:
        import matplotlib
    except ImportError:
        return [], ["figures left out: matplotlib is not installed (pip install matplotlib)"]
    files: list[Path] = []
    skipped: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        for name, draw in FIGURES.items():
            drawn = draw(families)
            if isinstance(drawn, str):
                skipped.append(f"figure {name} left out: {drawn}")
                for suffix in ("pdf", "png", "md"):
                    (folder / f"{name}.{suffix}").unlink(missing_ok=True)
                continue
            files += save(drawn.figure, f"{drawn.caption} {described(drawn.records)}", folder, name)
    return sorted(files), skipped


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


def _grid(
    rows: int, columns: int, *, width: float = COLUMN, height: float = ROW, share_y: bool | str = False,
    ratios: list[float] | None = None,
) -> tuple[Figure, Any]:  # fmt: skip
    """A figure without pyplot's global state, and its axes, always two-dimensional."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y, height_ratios=ratios)  # type: ignore[arg-type]


# --- likelihood ------------------------------------------------------------------------------------------------------


def nll(families: list[Family]) -> Drawn | str:
    """Joint NLL against rank, and each position's change against rank 1."""
    shown = [f for f in families if len(f.ranks()) > 1]
    if not shown:
        return "no records of two or more ranks"
    figure, axes = _grid(len(shown), 2)
    for (left, right), family in zip(axes, shown, strict=True):
        ranks = family.ranks()
        _joint(left, family)
        drawn = range(1, family.horizon + 1)
        base = family.cells["untied", ranks[0]]
        for index, k in enumerate(drawn):
            gaps = [difference(family.cells["untied", rank], base, f"position_nll:{k}") for rank in ranks[1:]]
            zero = Interval(0.0, 0.0, 0.0, 0.95, 1)
            _line(
                right,
                ranks,
                [zero, *gaps],
                SERIES[index % len(SERIES)],
                rf"$x_{{t+{k}}}$",
                shift=(index - len(drawn) / 2 + 0.5) * 0.07,
            )
        right.axhline(0, color="0.5", linewidth=0.6, zorder=0)
        _ranks(right, ranks)
        right.set_ylabel(f"NLL minus rank {ranks[0]}'s (nats)")
        right.set_title("by position")
    _legend_below(figure, axes[0, 1], min(4, max(f.horizon for f in shown)))
    return Drawn(
        figure,
        "Left: held-out joint NLL of n tokens (positions with all n) against the rank; untied heads, target as named. Bars: 95% "
        "interval of the difference to the lowest rank, paired over seeds and test rows. Right: its chain-rule terms, each minus "
        "the lowest rank's.",
        _untied(shown),
    )


def first_token(families: list[Family]) -> Drawn | str:
    """First-token NLL against rank, with the margin of C2 round rank 1."""
    shown = [f for f in families if f.target == "own" and len(f.ranks()) > 1 and 1 in f.ranks()]
    if not shown:
        return "no from-scratch records of two or more ranks"
    margin = next(claim.margin for claim in CLAIMS if claim.id == "C2")
    figure, axes = _grid(len(shown), 1, height=2.0)
    for (axis,), family in zip(axes, shown, strict=True):
        ranks, base = family.ranks(), family.cells["untied", 1]
        start = _mean(over_seeds(base, "first_token_nll"))
        axis.axhspan(
            start - margin, start + margin, color="0.9", linewidth=0, zorder=0, label=rf"margin of $\pm${margin:g} nats"
        )
        gaps = [
            _shifted(difference(family.cells["untied", rank], base, "first_token_nll", level=0.9), start)
            for rank in ranks[1:]
        ]
        _line(axis, ranks, [Interval(start, start, start, 0.9, 1), *gaps], LAWS["untied"][:3], "rank r, eq. 11")
        if family.reference:
            plain = np.mean([r["likelihood"]["first_token_nll"]["mean"] for r in family.reference])
            axis.axhline(plain, color=RED, linestyle=":", linewidth=1.2, label="next-token model")
        axis.set_ylabel("first-token NLL (nats)")
        axis.set_title(family.label)
        axis.margins(y=0.15)
        _ranks(axis, ranks)
    _legend_below(figure, axes[0, 0], 2)
    return Drawn(
        figure,
        "Held-out first-token NLL against the rank, trained from scratch. Bars: 90% interval of the difference to rank 1, paired "
        f"over seeds and test rows; independence of the rank (C2) means that all lie within the grey band of {margin:g} nats. "
        "Dotted: a pure next-token model of as many steps (over positions with one successor).",
        _untied(shown),
    )


def _joint(axis: Axes, family: Family) -> None:
    ranks, base = family.ranks(), family.cells["untied", family.ranks()[0]]
    start = _mean(over_seeds(base, "joint_nll"))
    gaps = [_shifted(difference(family.cells["untied", rank], base, "joint_nll"), start) for rank in ranks[1:]]
    _line(axis, ranks, [Interval(start, start, start, 0.95, 1), *gaps], LAWS["untied"][:3], "untied")
    _ranks(axis, ranks)
    axis.set_ylabel(f"joint NLL of {family.horizon} tokens (nats)")
    axis.set_title(_wrapped(family))


# --- drafts ----------------------------------------------------------------------------------------------------------


def acceptance(families: list[Family]) -> Drawn | str:
    """Share of drafts accepted at each depth, given that it was reached, by rank."""
    shown = [
        (family, law)
        for family in families
        for law in ("untied", "anchored")
        if family.horizon > 2 and len([r for r in family.ranks(law) if _accepted(family.cells[law, r], "sampling")]) > 1
    ]
    if not shown:
        return "no decoding records of two or more ranks"
    figure, axes = _grid(len(shown), 2, share_y="row")
    # One look per rank in every panel, whichever ranks a panel has.
    ranks = sorted({rank for family, law in shown for rank in family.ranks(law)})
    for row, (family, law) in zip(axes, shown, strict=True):
        for axis, mode in zip(row, MODES, strict=True):
            for index, rank in enumerate(ranks):
                points = _accepted(family.cells.get((law, rank), {}), mode)
                if not points:
                    continue
                color, marker, style = SERIES[index % len(SERIES)]
                depths = np.array([depth for depth, _ in points]) + (index - len(ranks) / 2 + 0.5) * 0.08
                axis.plot(
                    depths,
                    [share for _, share in points],
                    color=color,
                    marker=marker,
                    linestyle=style,
                    label=f"rank {rank}",
                )
            axis.set_xticks(range(2, family.horizon + 1))
            axis.set_xlabel("depth k of the draft $x_{t+k}$")
        row[0].set_ylabel("accepted, if reached")
        row[0].set_title(f"{_wrapped(family)}\n{law}, greedy")
        row[1].set_title("sampling")
    _legend_below(figure, axes[0, 0], 4)
    return Drawn(
        figure,
        "Share of drafts accepted at each depth, among those whose depth was reached, pooled over prompts, repeats and seeds. "
        "Depth 2 is the first draft: the fixed token is not one.",
        [record for family, law in shown for record in family.records(law)],
    )


def tokens_per_pass(families: list[Family]) -> Drawn | str:
    """Tokens per trunk pass against rank, greedy and sampling, by law."""
    shown = [
        f
        for f in families
        if any(len(f.ranks(law)) > 1 for law in LAWS) and any(r.mode("sampling") for r in f.records())
    ]
    if not shown:
        return "no decoding records of two or more ranks"
    figure, axes = _grid(len(shown), 2, share_y="row")
    for row, family in zip(axes, shown, strict=True):
        for axis, mode in zip(row, MODES, strict=True):
            _by_law(axis, family, "tokens_per_pass", mode)
            axis.set_title(f"{_wrapped(family)}\ngreedy" if mode == "greedy" else "sampling")
        row[0].set_ylabel("tokens per trunk pass")
    _legend_below(figure, axes[0, 0], 3, axes.ravel())
    return Drawn(
        figure,
        "Tokens per trunk pass against the rank (plain decoding: 1.00). Bars: 95% interval over prompts and seeds; prompts are shared, "
        "so that differences between ranks are surer than the bars suggest. Untied: the paper's law; tied: one next-token head; "
        "anchored: the drafts also see the fixed token. Dotted: rank 1 with perceptron maps that have the parameters of the highest rank.",
        [record for family in shown for record in family.records()],
    )


# --- speed -----------------------------------------------------------------------------------------------------------


def speedup(families: list[Family]) -> Drawn | str:
    """Bars of the speed-up over plain decoding by rank and law; rank 1 marked."""
    shown = [
        f
        for f in families
        if any(len(f.ranks(law)) > 1 for law in LAWS) and any(r.mode("sampling") for r in f.records())
    ]
    if not shown:
        return "no timed records of two or more ranks"
    figure, axes = _grid(len(shown), 2, share_y="row")
    for row, family in zip(axes, shown, strict=True):
        for axis, mode in zip(row, MODES, strict=True):
            _speed_bars(axis, family, mode)
            axis.set_title(f"{_wrapped(family)}\ngreedy" if mode == "greedy" else "sampling")
        row[0].set_ylabel("speed-up over plain (x)")
    _legend_below(figure, axes[0, 0], 3, axes.ravel())
    return Drawn(
        figure,
        "Speed-up over plain decoding with the same weights, loop and prompts (solid line: 1). Dashed line: rank 1, untied. Bars: "
        "95% interval over repeats and seeds.",
        [record for family in shown for record in family.records()],
    )


def time_split(families: list[Family]) -> Drawn | str:
    """Milliseconds per token, by part of the work: plain decoding against each rank."""
    shown = [f for f in families if len([r for r in f.ranks() if _modes(f.cells["untied", r], "sampling")]) > 1]
    if not shown:
        return "no timed records of two or more ranks"
    counts = [1 + len(family.ranks()) + len(family.ranks("anchored")) for family in shown]
    figure, axes = _grid(len(shown), 1, ratios=[0.16 * count + 0.1 for count in counts])
    for (axis,), family in zip(axes, shown, strict=True):
        bars: list[tuple[str, dict[str, float]]] = []
        for law in ("untied", "anchored"):
            for rank in family.ranks(law):
                modes = _modes(family.cells[law, rank], "sampling")
                if modes:
                    bars.append((f"rank {rank}" + (", anchored" if law == "anchored" else ""), _milliseconds(modes)))
        plain = [
            1000 / m["tokens_per_second"]["plain"]
            for rank in family.ranks()
            for m in _modes(family.cells["untied", rank], "sampling")
        ]
        _height(axis, 0, float(np.mean(plain)), "plain", ("0.55", "xxxx"))
        for place, (_, parts) in enumerate(bars, start=1):
            left = 0.0
            for part in PARTS:
                _height(axis, place, parts[part], part, FILLS[part], left)
                left += parts[part]
        axis.set_yticks(range(len(bars) + 1), ["plain", *(name for name, _ in bars)])
        axis.invert_yaxis()
        axis.grid(False)
        axis.grid(True, axis="x")
        axis.set_xlabel("milliseconds per token")
        axis.set_title(family.label)
    figure.set_size_inches(COLUMN, sum(0.16 * count + 0.75 for count in counts) + 0.4)
    _legend_below(figure, axes[0, 0], 3)
    return Drawn(
        figure,
        "Time per token when sampling: plain decoding, and speculative decoding split by timers in a repeat of its own (scaled to the "
        "median untimed rate). trunk: hidden states; verify: the target's law at all n positions and the acceptance test.",
        [record for family in shown for law in ("untied", "anchored") for record in family.records(law)],
    )


def main(families: list[Family]) -> Drawn | str:
    """The README's figure: likelihood, tokens per pass and speed-up of the largest comparison."""
    decoded = [f for f in families if len(f.ranks()) > 1 and any(r.mode("sampling") for r in f.records("untied"))]
    common = [f for f in decoded if f.target == "common"] or decoded
    if not common:
        return "no decoding records of two or more ranks"
    fast = common[0]
    own = [
        f
        for f in families
        if f.target == "own" and len(f.ranks()) > 1 and f.settings["corpus"] == fast.settings["corpus"]
    ]
    likely = (own or [fast])[0]
    figure, axes = _grid(1, 3, width=7.0, height=2.0)
    left, middle, right = axes[0]
    _joint(left, likely)
    left.set_title(f"Joint loss: lower is better\n{likely.label}")
    _by_law(middle, fast, "tokens_per_pass", "sampling")
    middle.set_ylabel("tokens per trunk pass")
    middle.set_title(f"Draft length: higher is better\n{fast.label}")
    _speed_bars(right, fast, "sampling")
    right.set_ylabel("speed-up over plain (x)")
    right.set_title("Lossless speed-up, sampling\n(dashed: rank 1)")
    _legend_below(figure, middle, 3)
    return Drawn(
        figure,
        "Left: held-out joint NLL against the rank (bars: 95% interval of the paired difference to the lowest rank). Middle: tokens per "
        "trunk pass when sampling; plain decoding is 1. Right: speed-up over plain decoding with the same weights. Bars: 95% intervals "
        "over prompts or repeats and seeds. Untied: the paper's law; tied and anchored: ours. Dotted: rank 1 with perceptron maps that "
        "have the parameters of the highest rank.",
        [*likely.records("untied"), *(r for r in fast.records() if likely is not fast or r.variant != "untied")],
    )


FIGURES: dict[str, Callable[[list[Family]], Drawn | str]] = {
    "main": main, "nll": nll, "first_token": first_token, "acceptance": acceptance, "tokens_per_pass": tokens_per_pass,
    "speedup": speedup, "time_split": time_split,
}  # fmt: skip


# --- parts -----------------------------------------------------------------------------------------------------------


def _by_law(axis: Axes, family: Family, quantity: str, mode: str) -> None:
    for index, (law, (color, marker, style, _)) in enumerate(LAWS.items()):
        ranks = family.ranks(law)
        values = [over_seeds(family.cells[law, rank], quantity, mode) for rank in ranks]
        _line(axis, ranks, values, (color, marker, style), law, shift=(index - 1) * 0.06)
        control = _equal_size(family, law)
        value = over_seeds(control, quantity, mode) if control else None
        if value is not None:
            axis.axhline(value.mean, color=color, linestyle=":", linewidth=1.0, label=f"{law}, rank 1 of equal size")
    _ranks(axis, sorted({rank for law in LAWS for rank in family.ranks(law)}))


def _equal_size(family: Family, law: str) -> Cells | None:
    """The rank-1 control with about as many parameters as the highest rank of a law has."""
    if not family.ranks(law):
        return None

    def trained(cells: Cells) -> int:
        return int(next(iter(cells.values()))["parameters"]["trained"])

    wanted = trained(family.cells[law, family.ranks(law)[-1]])
    wide = [
        cells for (kind, rank), cells in sorted(family.cells.items()) if rank == 1 and kind.startswith(f"{law}, mlp")
    ]
    near = [cells for cells in wide if abs(trained(cells) / wanted - 1) < 0.05]
    return near[0] if near else None


def _speed_bars(axis: Axes, family: Family, mode: str) -> None:
    laws = [law for law in LAWS if family.ranks(law)]
    ranks = sorted({rank for law in laws for rank in family.ranks(law)})
    width = 0.8 / len(laws)
    for index, law in enumerate(laws):
        color, _, _, hatch = LAWS[law]
        for place, rank in enumerate(ranks):
            value = over_seeds(family.cells[law, rank], "speedup", mode) if (law, rank) in family.cells else None
            if value is None:
                continue
            x = place + (index - (len(laws) - 1) / 2) * width
            axis.bar(x, value.mean, width * 0.92, color=color, hatch=hatch, edgecolor="white", linewidth=0.4, label=law)
            axis.errorbar(x, value.mean, _arms([value]), color="black", elinewidth=0.8, capsize=1.5, capthick=0.8)
    axis.axhline(1, color="black", linewidth=0.8)
    first = over_seeds(family.cells["untied", 1], "speedup", mode) if ("untied", 1) in family.cells else None
    if first is not None:
        axis.axhline(first.mean, color="black", linewidth=0.8, linestyle=(0, (4, 2)))
    axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axis.set_xlabel("rank r")


def _line(
    axis: Axes, ranks: Sequence[int], values: Sequence[Interval | None], look: tuple[str, str, str], label: str, shift: float = 0.0
) -> None:  # fmt: skip
    """Points with interval bars against the rank on a log axis; `shift`, in doublings, keeps bars apart."""
    kept = [(rank, value) for rank, value in zip(ranks, values, strict=True) if value is not None]
    if not kept:
        return
    color, marker, style = look
    x = [rank * 2**shift for rank, _ in kept]
    axis.errorbar(
        x, [v.mean for _, v in kept], _arms([v for _, v in kept]), color=color, marker=marker, linestyle=style, label=label,
        elinewidth=0.8, capsize=1.5, capthick=0.8, markeredgewidth=0,
    )  # fmt: skip


def _arms(values: Sequence[Interval]) -> Any:
    return np.array([[v.mean - v.low for v in values], [v.high - v.mean for v in values]])


def _ranks(axis: Axes, ranks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ranks), [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.set_xlim(min(ranks) * 2**-0.3, max(ranks) * 2**0.3)
    axis.set_xlabel("rank r")


def _height(axis: Axes, place: int, width: float, label: str, fill: tuple[str, str], left: float = 0.0) -> None:
    axis.barh(place, width, 0.72, left, color=fill[0], hatch=fill[1], edgecolor="white", linewidth=0.3, label=label)


def _legend_below(figure: Figure, axis: Axes, columns: int, others: Sequence[Axes] = ()) -> None:
    """One legend under the whole figure; entries of the same name once."""
    found: dict[str, Any] = {}
    for one in [axis, *others, *figure.axes]:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if (
        len(found) > 1
        and "untied" in found
        and axis is not figure.axes[0]
        and any(label.startswith("$x_") for label in found)
    ):
        del found["untied"]
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, columnspacing=1.2)


def _accepted(cells: Cells, mode: str) -> list[tuple[int, float]]:
    """(depth, share accepted of those reached), pooled over seeds."""
    counts: dict[int, list[int]] = {}
    for measured in _modes(cells, mode):
        for entry in measured["acceptance_by_depth"]:
            total = counts.setdefault(entry["depth"], [0, 0])
            total[0] += entry["accepted"]
            total[1] += entry["reached"]
    return [(depth, accepted / reached) for depth, (accepted, reached) in sorted(counts.items()) if reached]


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


def _modes(cells: Cells, mode: str) -> list[dict[str, Any]]:
    return [measured for _, record in sorted(cells.items()) if (measured := record.mode(mode))]


def _untied(families: list[Family]) -> list[Record]:
    return [record for family in families for record in family.records("untied")]


def _shifted(interval: Interval | None, by: float) -> Interval | None:
    if interval is None:
        return None
    return Interval(
        interval.mean + by, interval.low + by, interval.high + by, interval.level, interval.seeds, interval.spread
    )


def _mean(interval: Interval | None) -> float:
    assert interval is not None, "every record has its likelihoods"
    return interval.mean


def _wrapped(family: Family) -> str:
    """The label on lines that fit half a column."""
    parts = family.label.split(", ")
    lines = [", ".join(parts[:3]), ", ".join(parts[3:])]
    return "\n".join(line for line in lines if line)
