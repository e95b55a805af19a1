"""What becomes of the drafts: what a rank gains on one target, and the share accepted by depth (C3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.families import Cells, Family
from experiments.records import MODES
from experiments.report.figures import style
from experiments.report.figures.likelihood import joint
from experiments.report.figures.style import Drawn
from experiments.stats import over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gain(families: list[Family]) -> Drawn | str:
    """Likelihood, tokens per forward and speed-up of one target, against the rank."""
    several = [family for family in style.decoded(families) if not family.is_pretrained]
    shown = ([family for family in several if family.target == "common"] or several)[:2]
    if not shown:
        return "no decoding records of two or more ranks"
    figure, axes = style.grid(len(shown), 3, width=style.WIDE, height=1.85)
    for (left, middle, right), family in zip(axes, shown, strict=True):
        for variant in style.VARIANTS:
            if family.ranks(variant):
                joint(left, family, variant)
        _by_variant(middle, family, "tokens_per_pass")
        middle.set(ylabel="tokens per forward", title="draft length (higher is better)")
        _by_variant(right, family, "speedup")
        right.axhline(1, color="black", linewidth=0.8)
        right.set(ylabel="speed-up over AR (x)", title="speed (line: AR decoding)")
        for axis in (left, middle, right):
            style.rank_axis(axis, sorted({rank for variant in style.VARIANTS for rank in family.ranks(variant)}))
    style.legend_below(figure, 3)
    return Drawn(
        figure,
        "Left: held-out joint NLL of n tokens (bars: 95% interval of the difference to the lowest rank, paired). "
        "Middle and right: tokens per target forward, and speed-up over autoregressive (AR) decoding with the same "
        "weights, when sampling (bars: 95% intervals over prompts, repeats and seeds; prompts are shared, so that "
        "differences between ranks are surer than the bars suggest). Untied: the paper's heads; tied: one next-token "
        "head; token-conditioned: the drafts also see the pending token. Dotted: rank 1 with perceptron maps that "
        "have the parameters of the highest rank.",
        [
            record
            for family in shown
            for variant in style.VARIANTS
            for record in (*family.records(variant), *(_equal_size(family, variant) or {}).values())
        ],
    )


def acceptance(families: list[Family]) -> Drawn | str:
    """Share of drafts accepted at each depth, given that it was reached, by rank."""
    shown = [family for family in style.decoded(families) if family.horizon > 2]
    if not shown:
        return "no decoding records of two or more ranks"
    variants = [
        variant for variant in ("untied", "token-conditioned") if any(family.ranks(variant) for family in shown)
    ]
    figure, axes = style.grid(len(shown), 2 * len(variants), width=style.WIDE, share_y="row")
    # One look per rank in every panel, whichever ranks a panel has.
    ranks = sorted({rank for family in shown for variant in variants for rank in family.ranks(variant)})
    for row, family in zip(axes, shown, strict=True):
        for column, axis in enumerate(row):
            variant, mode = variants[column // 2], MODES[column % 2]
            _by_depth(axis, family, variant, mode, ranks)
            title = f"{style.worded(variant)}, {mode}"
            axis.set_title(title if column else f"{style.wrapped(family)}\n{title}")
        row[0].set_ylabel("accepted, if reached")
    style.legend_below(figure, 4)
    return Drawn(
        figure,
        "Share of drafts accepted at each depth, among those whose depth was reached. Depth 2 is the first draft: "
        "the pending token is not one. Bars: 95% interval over prompts and seeds (independent drafts, where a record "
        "has no counts per prompt). Untied: the paper's heads; token-conditioned: the drafts also see the pending "
        "token.",
        [record for family in shown for variant in variants for record in family.records(variant)],
    )


def _by_depth(axis: Axes, family: Family, variant: str, mode: str, ranks: list[int]) -> None:
    depths = range(2, family.horizon + 1)
    for index, rank in enumerate(ranks):
        cells = family.cells.get((variant, rank), {})
        found = [over_seeds(cells, f"accepted:{depth}", mode) for depth in depths]
        values = [value and value.of(lambda share: min(max(share, 0.0), 1.0)) for value in found]
        shift = (index - len(ranks) / 2 + 0.5) * 0.09
        style.errors(
            axis, [depth + shift for depth in depths], values, style.SERIES[index % len(style.SERIES)], f"rank {rank}"
        )
    axis.set_ylim(0, 1.04)
    axis.set_xticks(depths)
    axis.set(xlim=(1.75, family.horizon + 0.25), xlabel="depth k of the draft $x_{t+k}$")
    if not axis.has_data():
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.4")


def _by_variant(axis: Axes, family: Family, quantity: str) -> None:
    """When sampling: a line per variant against the rank, and rank 1 of equal size."""
    for index, (variant, look) in enumerate(style.VARIANTS.items()):
        ranks = family.ranks(variant)
        values = [over_seeds(family.cells[variant, rank], quantity) for rank in ranks]
        style.by_rank(axis, ranks, values, look, style.worded(variant), shift=(index - 1) * 0.06)
        control = _equal_size(family, variant)
        value = over_seeds(control, quantity) if control else None
        if value is not None:
            label = f"{style.worded(variant)}, rank 1 of equal size"
            axis.axhline(value.mean, color=look[0], linestyle=":", linewidth=1.0, label=label)


def _equal_size(family: Family, variant: str) -> Cells | None:
    """The rank-1 control with about as many parameters as the highest rank of a variant has."""
    if not family.ranks(variant):
        return None

    def trained(cells: Cells) -> int:
        return int(next(iter(cells.values()))["parameters"]["trained"])

    wanted = trained(family.cells[variant, family.ranks(variant)[-1]])
    wide = [
        cells
        for (kind, rank), cells in sorted(family.cells.items())
        if rank == 1 and kind.startswith(f"{variant}, mlp")
    ]
    near = [cells for cells in wide if abs(trained(cells) / wanted - 1) < 0.05]
    return near[0] if near else None
