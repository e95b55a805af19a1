"""What drafting is worth in time: on a pretrained model (C6), over rank 1 (C4), on trunks of several sizes (C7)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.families import TARGETS, Family, along
from experiments.records import MODES, Record
from experiments.report import tasks
from experiments.report.benchmarks import Benchmark
from experiments.report.figures import style
from experiments.report.figures.style import Drawn
from experiments.report.table import described
from experiments.stats import Interval, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FINE = [0.05 * tick for tick in range(10, 50)]  # ticks of ratios near 1
_METHODS = dict(zip(("lookup", "branched", "lookup+branched"), style.SERIES[4:], strict=True))
_TYPE = 9  # pt, of the README's figure: 12 px at 700 px across
_LINE = 0.135  # inches of a line of the forest plot
_SPAN = (0.78, 1.28)  # of the forest plot; longer intervals run out of it
_SIZES = ("size", "trunk", "optim.")  # what trunks of several sizes differ in


# --- C6 --------------------------------------------------------------------------------------------------------------


def pretrained(families: list[Family]) -> Drawn | str:
    """Speed-up of a pretrained model, and what rank adds to it."""
    found = _settings(families)
    if not found:
        return "no decoding records of two or more ranks on a pretrained model"
    settings, variant, cells = found
    figure, axes = style.grid(1, 2, width=style.WIDE, height=0.75 + 0.68 * len(settings), share_y=True)
    left, right = axes[0]
    speeds = _groups(left, settings, variant, "speedup")
    style.ratio_axis(left, "speed over autoregressive decoding (x)", ticks=_FINE[::2])
    name = style.worded(settings[0][0].size)
    lowest, highest = (f(value.mean for value in speeds) for f in (min, max))
    left.set_title(f"Heads on {name}:\n{lowest:.2f} to {highest:.2f} times as fast as without", weight="bold")
    _gains(right, settings, variant)
    style.legend_below(figure, 4)
    _enlarge(figure)
    return Drawn(
        figure,
        f"Heads on frozen {name} ({style.worded(variant)}), batch 1. Left: speed over autoregressive decoding of the "
        "same model, in the same loop. Right: over rank 1, measured side by side. Lossless: greedy writes the model's "
        "own text, sampling its distribution. Bars: 95% interval over prompts, repeats and seeds (one seed: prompts "
        "and repeats).",
        cells,
    )


def front(families: list[Family], records: Sequence[Benchmark]) -> tuple[Figure, str] | str:
    """The README's figure: what the released heads bring by text, and what rank adds on the same model."""
    found = _settings(families)
    if not found or not records:
        return "no decoding records of two or more ranks on a pretrained model, or none of the released heads"
    settings, variant, cells = found
    texts = [(record, task, mode) for record in records for task, mode in tasks.texts(record)]
    figure, (axes,) = style.grid(1, 2, width=style.WIDE, height=0.75 + 0.4 * max(len(texts), 1.5 * len(settings)))
    left, right = axes
    for place, (record, task, mode) in enumerate(texts):
        entries = tasks.rivals(record, task, mode)
        for shift, (method, look) in zip((-0.25, 0, 0.25), _METHODS.items(), strict=True):
            if speed := entries.get(method, {}).get("speedup"):
                value = Interval(speed["median"], speed["low"], speed["high"], 0.95, 1)
                style.across(left, place + shift, value, look, tasks.RIVALS[method])
    style.rows_axis(left, [f"{task},\n{mode}" for _, task, mode in texts])
    style.ratio_axis(left, "speed over autoregressive decoding (x)", ticks=(1, 1.25, 1.5, 2, 2.5, 3))
    name = style.worded(settings[0][0].size)
    left.set_title(f"Released heads of {name}\n(rank 1): speed by text", weight="bold")
    _gains(right, settings, variant)
    for axis in axes:
        axis.legend(*style.labels(axis), loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, handlelength=1)
    _enlarge(figure)
    return figure, (
        f"Left: the heads that come with the package. {' '.join(map(tasks.described, records))} Right: other heads on "
        f"the same model, trained for less long, ranks above 1 over rank 1, measured side by side "
        f"({style.worded(variant)}). Bars: 95% intervals. " + described(cells, True)
    )


def _settings(families: list[Family]) -> tuple[list[tuple[Family, str]], str, list[Record]] | None:
    """The comparisons of ranks on one pretrained model in each mode, the variant of heads that they are of, and their
    records."""
    shown = _pretrained(families)
    if not shown:
        return None
    variant = next(v for v in ("token-conditioned", "tied", "untied") if len(shown[0].ranks(v)) > 1)
    shown = [family for family in shown if len(family.ranks(variant)) > 1]
    records = [record for family in shown for record in family.records(variant)]
    return [(family, mode) for family in shown for mode in MODES], variant, records


def _gains(axis: Axes, settings: Sequence[tuple[Family, str]], variant: str) -> None:
    """The panel of speeds over rank 1."""
    gains = _groups(axis, settings, variant, "speedup_over_rank1")
    style.rows_axis(axis, [f"{family.settings['corpus']},\n{mode}" for family, mode in settings])
    style.ratio_axis(axis, "speed over rank 1 (x)", ticks=_FINE)
    faster, slower = sum(value.low > 1 for value in gains), sum(value.high < 1 for value in gains)
    axis.set_title(
        f"Over rank 1, {len(gains)} cases:\n{faster or 'none'} surely faster, {slower or 'none'} slower",
        weight="bold",
    )


def _enlarge(figure: Figure) -> None:
    for text in figure.findobj(lambda artist: hasattr(artist, "set_fontsize")):
        text.set(fontsize=_TYPE)


def _pretrained(families: list[Family]) -> list[Family]:
    """The widest comparison of each text whose cells were decoded, all of one pretrained model."""
    found: dict[str, Family] = {}
    for family in families:
        several = any(len(family.ranks(variant)) > 1 for variant in style.VARIANTS)
        timed = any(record.mode(mode) for record in family.records() for mode in MODES)
        if family.is_pretrained and several and timed:
            found.setdefault(str(family.settings["corpus"]), family)
    first = next(iter(found.values()), None)
    return [family for family in found.values() if first is not None and family.size == first.size]


def _groups(axis: Axes, settings: Sequence[tuple[Family, str]], variant: str, quantity: str) -> list[Interval]:
    """A group of points per setting, one per rank, from the top down; returns the intervals."""
    ranks = sorted({rank for family, _ in settings for rank in family.ranks(variant)})
    styles, found = style.looks(f"rank {rank}" for rank in ranks), []
    for place, (family, mode) in enumerate(settings):
        for index, rank in enumerate(ranks):
            value = over_seeds(family.cells.get((variant, rank), {}), quantity, mode)
            if value is not None:
                y = place + (index - (len(ranks) - 1) / 2) * 0.8 / len(ranks)
                style.across(axis, y, value, styles[f"rank {rank}"], f"rank {rank}")
                found.append(value)
    return found


# --- C4 --------------------------------------------------------------------------------------------------------------


def over_rank_one(families: list[Family]) -> Drawn | str:
    """Speed over rank 1 in every setting that was decoded, with the smallest effect that it could have shown."""
    rows = [
        (family, variant, rank)
        for family in sorted(families, key=lambda family: not family.is_pretrained)
        for variant in style.VARIANTS
        for rank in family.ranks(variant)
        if any(over_seeds(family.cells[variant, rank], "speedup_over_rank1", mode) for mode in MODES) and rank > 1
    ]
    if not rows:
        return "no records of ranks above 1 timed beside rank 1"
    figure, axes = style.grid(1, 2, width=style.WIDE, height=0.75 + _LINE * len(rows), share_y=True)
    names = [_row_name(rows, index) for index in range(len(rows))]
    for axis, mode in zip(axes[0], MODES, strict=True):
        values = [over_seeds(family.cells[variant, rank], "speedup_over_rank1", mode) for family, variant, rank in rows]
        sure = sum(value.low > 1 for value in values if value is not None)
        slower = sum(value.high < 1 for value in values if value is not None)
        style.rows_axis(axis, names)
        axis.set_title(f"{mode}: of {len(rows)}, surely\nfaster {sure}, slower {slower}")
        axis.text(1.03, 1.0, "visible\nfrom", transform=axis.transAxes, va="bottom", color="0.35")
        _forest(axis, values)
    axes[0, 0].text(-0.03, 1.0, "setting   rank", transform=axes[0, 0].transAxes, ha="right", va="bottom", color="0.35")
    for axis in axes[0]:
        for y in range(1, len(rows)):
            if rows[y][:2] != rows[y - 1][:2]:
                axis.axhline(y - 0.5, color="0.85", linewidth=0.5, zorder=0)
    return Drawn(
        figure,
        "Speed of every rank above 1 over rank 1 of the same heads, measured side by side, in every setting that was "
        "decoded (line: equal). Filled: the interval excludes 1 (by chance one in twenty does). Numbers: half the "
        "width of the interval, the smallest effect that would have been visible. Intervals: 95%, over prompts, "
        "repeats and seeds (one seed: prompts and repeats); an arrow marks one that runs out of the panel.",
        list({record.path: record for f, variant, rank in rows for record in f.cells[variant, rank].values()}.values()),
    )


def _forest(axis: Axes, values: Sequence[Interval | None]) -> None:
    low, high = _SPAN
    for y, value in enumerate(values):
        if value is None:
            continue
        sure = value.low > 1 or value.high < 1
        color = style.BY_MODE["greedy"][0] if sure and value.mean < 1 else style.BY_MODE["sampling"][0]
        axis.plot([max(value.low, low), min(value.high, high)], [y, y], color=color, linewidth=0.9)
        if low < value.mean < high:
            axis.plot(value.mean, y, "o", color=color, markerfacecolor=color if sure else "white", markersize=3.5)
        for edge, out, marker in ((low, value.low < low, "<"), (high, value.high > high, ">")):
            if out:
                axis.plot(edge, y, marker, color=color, markersize=3, clip_on=False)
        half = 50 * (value.high - value.low)
        axis.text(1.03, y, rf"$\pm${half:.0f}%", transform=axis.get_yaxis_transform(), va="center", color="0.35")
    style.ratio_axis(axis, "speed over rank 1 (x)", low, high, (0.8, 0.9, 1, 1.1, 1.2))


def _row_name(rows: Sequence[tuple[Family, str, int]], index: int) -> str:
    """The setting on the first of its lines, the rank on each."""
    family, variant, rank = rows[index]
    if index and rows[index - 1][:2] == (family, variant):
        return str(rank)
    return f"{_brief(family)}, {style.worded(variant)}   {rank}"


def _brief(family: Family) -> str:
    """A label of one line: what it shares with most others is left out."""
    said = {
        TARGETS["common"]: "",
        "n=4": "",
        "data.states=100000": "",
        "decode.prompts=12": "",
        "model.dtype=float32": "float32",
    }
    parts = [said.get(part, part) for part in family.label.split(", ")]
    parts = [re.sub(r"^[a-z]+\.([a-z_]+)=", r"\1 ", part).replace("_", " ") for part in parts]
    return style.worded(", ".join(part for part in parts if part))


# --- C7 --------------------------------------------------------------------------------------------------------------


def by_size(families: list[Family]) -> Drawn | str:
    """Speed-up and tokens per forward against the trunk's parameters, a line per rank."""
    timed = [f for f in families if any(record.mode("sampling") for record in f.records("untied"))]
    ours = [family for family in timed if not family.is_pretrained]
    groups = [group for group in along(ours, *_SIZES) if len({f.size for f in group}) > 1]
    if not groups:
        return "no timed records of two or more trunk sizes"
    group = groups[0]
    sizes = {family.size: family for family in reversed(group)}  # of two alike, the larger comparison
    trunks = {size: next(iter(family.records("untied")))["parameters"]["trunk"] for size, family in sizes.items()}
    ordered = sorted(sizes, key=trunks.__getitem__)
    ranks = sorted({rank for family in sizes.values() for rank in family.ranks()})
    ranks = [rank for rank in ranks if sum(rank in sizes[size].ranks() for size in ordered) > 1]
    figure, axes = style.grid(2, 2, height=1.7)
    panels = (("tokens_per_pass", "tokens per forward"), ("speedup", "speed-up over AR (x)"))
    for row, (quantity, label) in zip(axes, panels, strict=True):
        for axis, mode in zip(row, MODES, strict=True):
            for index, rank in enumerate(ranks):
                values = [over_seeds(sizes[size].cells.get(("untied", rank), {}), quantity, mode) for size in ordered]
                x = [trunks[size] / 1e6 * 1.1 ** (index - (len(ranks) - 1) / 2) for size in ordered]
                style.errors(axis, x, values, style.SERIES[index % len(style.SERIES)], f"rank {rank}")
            size_axis(axis, [trunks[size] for size in ordered])
            axis.set_title(mode)
        row[0].set_ylabel(label)
    for axis in axes[1]:
        axis.axhline(1, color="black", linewidth=0.8)
    style.legend_below(figure, 4)
    return Drawn(
        figure,
        "Tokens per target forward, and speed-up over AR decoding, against the size of the trunk "
        f"({', '.join(ordered)}); untied heads, n={group[0].horizon}, {group[0].settings['corpus']}. Bars: 95% "
        "interval over prompts or repeats and seeds. Black line: AR decoding.",
        [record for size in ordered for record in sizes[size].records("untied") if record.rank in ranks],
    )


def size_axis(axis: Axes, trunks: Sequence[int], decades: bool = False) -> None:
    """Parameters of the trunk on a logarithmic x axis; decades: marked at powers of ten, not at the trunks."""
    ticks = [0.1, 1, 10, 100, 1000, 10_000] if decades else [trunk / 1e6 for trunk in trunks]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.2g}" if tick < 100 else f"{tick:,.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlim=(min(trunks) / 1.6e6, max(trunks) * 1.6 / 1e6), xlabel="trunk parameters (millions)")
