"""How the components of the mixture are used: how many, how much each, and for what (C5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.families import Cells, Family
from experiments.records import Record
from experiments.report.figures import style
from experiments.report.figures.style import Drawn, Look
from experiments.stats import Interval, Sample, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HORIZON = 4  # of the base cell
_COMPARED = 2  # comparisons on trunks of ours, and on pretrained models
_EXAMPLES = 3  # stretches of text that are shown
_LINE, _LINES = 112, 4  # characters of a line, lines of a stretch


def usage(families: list[Family]) -> Drawn | str:
    """Effective number of components over training, and the mean weight of each on test text."""
    name = "train/effective_components"
    asked = [(family, "untied") for family in style.widest([family for family in families if not family.is_pretrained])]
    shown = []
    for family, variant in [*asked[:_COMPARED], *style.on_pretrained(families)[:_COMPARED]]:
        every = style.lines(family, variant).items()
        mixtures = {label: cells for label, cells in every if next(iter(cells.values())).rank > 1}
        if any(name in note for cells in mixtures.values() for r in cells.values() for note in r["training"]["curve"]):
            shown.append((family, variant, mixtures))
    if not shown:
        return "no records of two or more components"
    from matplotlib.ticker import MultipleLocator

    figure, axes = style.pairs(len(shown))
    styles = style.looks(label for _, _, mixtures in shown for label in mixtures)
    for (left, right), (family, variant, mixtures) in zip(axes, shown, strict=True):
        for index, (label, cells) in enumerate(mixtures.items(), start=1):
            rank, look = next(iter(cells.values())).rank, styles[label]
            _over_steps(left, cells, name, look, label)
            left.axhline(rank, color=look[0], linewidth=0.6, linestyle=":")
            weights = [sorted(record["likelihood"]["weights"]["mean"], reverse=True) for record in cells.values()]
            values = [estimate([Sample(seed[a] * rank) for seed in weights]) for a in range(rank)]
            style.errors(right, list(np.arange(1, rank + 1) + 0.08 * (index - 2)), values, look, "_")
        left.set_ylim(bottom=1)
        left.yaxis.set_major_locator(MultipleLocator(2))
        left.set(
            xlabel="training steps",
            ylabel="effective components",
            title=f"{style.wrapped(family)}\n{style.worded(variant)}",
        )
        right.axhline(1, color="0.5", linewidth=0.6, zorder=0)
        right.set(
            ylim=(0, None), xlabel="component, by weight", ylabel="weight over an equal share", title="on test text"
        )
    style.legend_below(figure, 4)
    return Drawn(
        figure,
        "Left: effective number of components (exp of the entropy of the batch-mean weights) over training; dotted: "
        "all equally used. Right: mean weight of each component on test text, the largest first, over 1 / rank. Mean "
        "and 95% t interval over seeds (left: where there are three or more).",
        [record for _, _, mixtures in shown for cells in mixtures.values() for record in cells.values()],
    )


def specialities(families: list[Family]) -> Drawn | str:
    """How much more often a component explains windows that begin with a kind of character."""
    records = _one_per_rank(families, lambda record: bool(record["likelihood"]["components"]))[-2:]
    if not records:
        return "no records of two or more components that say what each explains"
    figure, axes = style.grid(
        len(records), 1, width=style.WIDE, height=2.3, ratios=[1 + 0.25 * r.rank for r in records]
    )
    figure.set_size_inches(style.WIDE, sum(1.1 + 0.2 * record.rank for record in records))
    for (axis,), record in zip(axes, records, strict=True):
        _lifts(axis, record)
    return Drawn(
        figure,
        "What each component is responsible for: how much more often than on average the windows that it explains "
        "begin with a character of that kind (1: as often as all), by posterior weight over test windows; and the "
        "first tokens that tell it apart most. One run per rank (the lowest seed), the highest ranks; components are "
        "numbered as in the other figures.",
        records,
    )


def _lifts(axis: Axes, record: Record) -> None:
    """A coloured table: components down, kinds of characters across, and each component's tokens beside it."""
    entry: dict[str, Any] = record["likelihood"]["components"]
    joint_RC = np.array(entry["class_share"])
    seen_C = joint_RC.sum(axis=0) > 1e-3
    classes = [name for name, seen in zip(entry["classes"], seen_C, strict=True) if seen]
    joint_RC = joint_RC[:, seen_C]
    share_R = joint_RC.sum(axis=1)
    lift_RC = joint_RC / np.outer(share_R, joint_RC.sum(axis=0) / joint_RC.sum()).clip(1e-9)
    axis.imshow(np.log2(lift_RC.clip(1 / 4, 4)), cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto")
    for a in range(record.rank):
        for c in range(len(classes)):
            dark = abs(np.log2(lift_RC[a, c].clip(1 / 4, 4))) > 1.1
            axis.text(c, a, f"{lift_RC[a, c]:.2f}", ha="center", va="center", color="white" if dark else "black")
        tops = "  ".join(_visible(top["token"]) for top in entry["top_tokens"][a])
        axis.text(len(classes) - 0.4, a, tops, va="center", family="DejaVu Sans Mono")
    axis.text(len(classes) - 0.4, -0.75, "begin with, most of all")
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(record.rank), [f"{a + 1} ({share_R[a]:.0%})" for a in range(record.rank)])
    axis.set(xlim=(-0.5, len(classes) + 1.3), ylabel="component (share)", xlabel="first character of the window")
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    sure = f"the likeliest component has {entry['certainty']:.0%} on average"
    axis.set_title(f"rank {record.rank}: {record['name']}; {sure}")


def windows(families: list[Family]) -> Drawn | str:
    """Stretches of test text, each token in the colour of the component that explains the window that begins there."""
    found = _one_per_rank(
        families,
        lambda record: bool(record["likelihood"]["components"] and record["likelihood"]["components"]["examples"]),
    )
    if not found:
        return "no records of two or more components with example windows"
    record = found[-1]
    examples = record["likelihood"]["components"]["examples"][:_EXAMPLES]
    laid = [_lay_out(example) for example in examples]
    counts = [1 + max(line for line, *_ in cells) for cells in laid]
    figure, axes = style.grid(len(examples), 1, width=style.WIDE, ratios=[count + 0.6 for count in counts])
    figure.set_size_inches(style.WIDE, sum(0.16 * count + 0.45 for count in counts) + 0.5)
    for (axis,), example, cells, count in zip(axes, examples, laid, counts, strict=True):
        for line, start, text, component, share in cells:
            axis.add_patch(
                _box(start, line, len(text), style.COMPONENTS[component % len(style.COMPONENTS)], 0.08 + 0.55 * share)
            )
            axis.text(start + len(text) / 2, line + 0.5, text, ha="center", va="center", family="DejaVu Sans Mono")
        axis.set(xlim=(0, _LINE), ylim=(count, 0))
        axis.axis("off")
        axis.set_title(example["source"])
    used = sorted({component for cells in laid for *_, component, _ in cells})
    handles = [_box(0, 0, 1, style.COMPONENTS[a % len(style.COMPONENTS)], 0.6) for a in used]
    figure.legend(handles, [f"{a + 1}" for a in used], title="component", loc="outside lower center", ncols=8)
    return Drawn(
        figure,
        f"Test text under {record['name']}: each token in the colour of the component with the largest posterior "
        f"weight for the window of {record.horizon} tokens that begins there; the fuller the colour, the surer. The "
        "text is that of the sources named, under their licences.",
        [record],
    )


# --- parts -----------------------------------------------------------------------------------------------------------


def _one_per_rank(families: list[Family], has: Callable[[Record], bool]) -> list[Record]:
    """Mixtures that differ in their rank alone, the lowest seed of each of the four highest ranks, by rank.

    Of the first comparison in which a record `has` what is shown: first those at the horizon of the base cell, on
    trunks of ours, with its way of balancing; of these the widest, then the one of the highest rank.
    """
    first = style.widest(families)
    usual = first[0].settings["balance"] if first else None

    def preference(family: Family) -> tuple[bool, bool, bool, int]:
        other = family.horizon != HORIZON, family.is_pretrained, family.settings["balance"] != usual
        return *other, -max(family.ranks(), default=1)

    rest = [family for family in families if not any(family is other for other in first)]
    for family in sorted([*first, *rest], key=preference):
        found: dict[int, Record] = {}
        for record in family.records("untied"):  # by rank, then seed
            if record.rank > 1 and record["training"]["curve"] and has(record):
                found.setdefault(record.rank, record)
        if found:
            return list(found.values())[-4:]
    return []


def _over_steps(axis: Axes, cells: Cells, name: str, look: Look, label: str) -> None:
    curves = [
        [(note["step"], note[name]) for note in record["training"]["curve"] if name in note]
        for record in cells.values()
    ]
    length = min(len(curve) for curve in curves)
    if not length:
        return
    steps = [step for step, _ in curves[0][:length]]
    values: list[Interval] = [estimate([Sample(curve[k][1]) for curve in curves]) for k in range(length)]
    axis.plot(steps, [v.mean for v in values], color=look[0], linestyle=look[2], label=label)
    if len(curves) > 2:
        axis.fill_between(
            steps, [v.low for v in values], [v.high for v in values], color=look[0], alpha=0.15, linewidth=0
        )


def _visible(token: str) -> str:
    """A token as it can be printed: signs for white space, and a box for what is no character."""
    return token.replace("\n", "⏎").replace("\t", "→").replace(" ", "␣").replace("\r", "⏎") or "∅"


def _lay_out(example: dict[str, Any]) -> list[tuple[int, int, str, int, float]]:
    """(line, column, text, component, share) of each token that fits; line breaks are signs."""
    cells: list[tuple[int, int, str, int, float]] = []
    line = column = 0
    for token, component, share in zip(example["tokens"], example["component"], example["share"], strict=True):
        text = token.replace("\t", "→").replace("\r", "").replace("\n", "⏎") or "∅"
        if column + len(text) > _LINE:
            line, column = line + 1, 0
        if line >= _LINES:
            break
        cells.append((line, column, text[:_LINE], component, share))
        column += len(text)
    return cells


def _box(x: float, y: float, width: float, color: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y + 0.05), width, 0.9, facecolor=color, alpha=alpha, linewidth=0)
