"""Tables of the cells: every one, every rank against rank 1, beside a next-token model, and the baseline's strength."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from experiments.families import Cells, Family
from experiments.records import MODES, VARIANTS
from experiments.report.table import Table, described, shown, signed, with_spread
from experiments.stats import difference, over_seeds, shared_seeds

NOTES = (
    "Means over seeds with 95% intervals over test rows or prompts and seeds (one seed: rows or prompts only). Joint "
    "NLL: over all n tokens, positions with all n. Tokens per forward: of the target, the prompt's forward counts; "
    "autoregressive decoding has 1.00. Speed-up: over autoregressive decoding with the same weights and loop."
)


def cells_table(families: list[Family]) -> Table:
    """Every cell: likelihood, draft length and speed."""
    rows = [
        _row(family, variant, rank)
        for family in families
        for variant, rank in itertools.product(family.variants(), family.all_ranks())
        if (variant, rank) in family.cells and (not family.is_pretrained or variant == "untied")
    ]
    header = (
        "setting",
        "variant",
        "rank",
        "seeds",
        "trained parameters",
        "parameters over untied",
        "joint NLL (nats)",
        "first-token NLL (nats)",
        "bits per byte",
        *(f"tokens per forward, {mode}" for mode in MODES),
        *(f"speed-up, {mode}" for mode in MODES),
        "speed over rank 1, sampling",
        "speed-up per token per forward",
        "its limit",
        "MFLOPs per draft",
    )
    caption = (
        "Variant: untied is the paper's; tied, the first token is the target's own; anchored, tied and conditioned "
        "on the pending token; blind, that map fed h in place of the token's embedding; mlp, perceptron maps with "
        "the parameters of the highest rank. Other kinds of draft on a pretrained model have a table of their own. "
        "Limit: t(1)/t(n), the target's time for one token over that for n."
    )
    records = [record for family in families for record in family.records()]
    return Table("cells", f"{caption} {NOTES} {described(records)}", header, rows)


def _row(family: Family, variant: str, rank: int) -> tuple[str, ...]:
    cells = family.cells[variant, rank]
    record = next(iter(cells.values()))
    flops = record.draft_flops()
    return (
        family.label,
        variant,
        str(rank),
        str(len(cells)),
        f"{record['parameters']['trained']:,}",
        _added(family, variant, rank),
        shown(over_seeds(cells, "joint_nll")),
        shown(over_seeds(cells, "first_token_nll")),
        shown(over_seeds(cells, "bits_per_byte"), bare=True),
        *(shown(over_seeds(cells, "tokens_per_pass", mode)) for mode in MODES),
        *(shown(over_seeds(cells, "speedup", mode), 2) for mode in MODES),
        shown(over_seeds(cells, "speedup_over_rank1"), 2),
        *(_mean(cells, key) for key in ("conversion", "conversion_limit")),
        "-" if flops is None else f"{flops / 1e6:.2f}",
    )


def _added(family: Family, variant: str, rank: int) -> str:
    untied = family.cells.get(("untied", rank))
    if variant == "untied" or not untied:
        return "-"
    total = next(iter(family.cells[variant, rank].values()))["parameters"]["total"]
    return f"{total - next(iter(untied.values()))['parameters']['total']:+,}"


def _mean(cells: Cells, key: str) -> str:
    modes = [mode for record in cells.values() if (mode := record.mode("sampling"))]
    return f"{sum(mode[key] for mode in modes) / len(modes):.2f}" if modes else "-"


def paired_table(families: list[Family]) -> Table:
    """Every rank against rank 1 of its variant, paired: mean, interval and spread."""
    families = [family for family in families if not family.is_timing]
    places = [
        (family, variant, rank)
        for family in families
        for variant in VARIANTS
        for rank in family.ranks(variant)
        if rank > 1
    ]
    rows = [row for place in places if (row := _paired(*place)) is not None]
    header = (
        "setting",
        "variant",
        "rank",
        "seeds",
        *(f"{name}, minus rank 1" for *_, name in _PAIRED),
        *(f"speed over rank 1, {mode}" for mode in MODES),
    )
    compared = [r for f in families for variant in VARIANTS if (variant, 1) in f.cells for r in f.records(variant)]
    caption = (
        "Every rank against rank 1 of the same variant, target and seed, on the same test rows or prompts: mean over "
        "seeds, 95% interval (bootstrap over rows or prompts, expanded where they are few, and t over seeds), ± "
        "standard deviation over seeds where there are several. Speed: medians of interleaved repeats in one "
        f"process, with their own intervals, over all seeds. {described(compared)}"
    )
    return Table("paired", caption, header, rows)


_PAIRED = (
    ("joint_nll", "sampling", "joint NLL (nats)"),
    ("first_token_nll", "sampling", "first-token NLL (nats)"),
    *(("tokens_per_pass", mode, f"tokens per forward, {mode}") for mode in MODES),
)


def _paired(family: Family, variant: str, rank: int) -> tuple[str, ...] | None:
    cells, one = family.cells[variant, rank], family.cells.get((variant, 1), {})
    gaps = [difference(cells, one, quantity, mode) for quantity, mode, _ in _PAIRED]
    if all(gap is None for gap in gaps):
        return None
    speeds = [over_seeds(cells, "speedup_over_rank1", mode) for mode in MODES]
    values = [*(with_spread(gap, 3, sign=True) for gap in gaps), *(with_spread(speed, 2) for speed in speeds)]
    return family.label, variant, str(rank), str(len(shared_seeds(cells, one))), *values


def references_table(families: list[Family]) -> Table:
    """From-scratch cells beside a next-token model of the same trunk, steps, rows and seed: speed at equal quality."""
    rows: list[tuple[str, ...]] = []
    for family in families:
        if family.target != "own" or not family.reference:
            continue
        alone = {record.seed: record for record in family.reference}
        rows += [
            _beside(family, variant, rank, alone)
            for variant, rank in itertools.product(family.variants(), family.ranks())
            if (variant, rank) in family.cells
        ]
    header = (
        "setting",
        "variant",
        "rank",
        "pairs of seeds",
        "first-token NLL (nats)",
        "next-token model's NLL (nats)",
        "difference",
        "bits per byte",
        "next-token model's bits per byte",
        *(f"speed-up over it, {mode}" for mode in MODES),
        *(f"speed-up, {mode}" for mode in MODES),
    )
    caption = (
        "From-scratch cells beside a next-token model of equal training: the same trunk, steps, rows, data order and "
        "seed. First-token NLL: of the cells over positions with all n successors, of the next-token model over "
        "those with one. Speed-up over it: the cell's speculative decoding over the next-token model's "
        "autoregressive decoding, which has no heads to evaluate, so that quality and speed can be weighed together. "
        "Speed-up: over the cell's own autoregressive decoding. On a frozen target the trunk is the next-token "
        "model: quality is equal by construction."
    )
    return Table("references", caption, header, rows)


def _beside(family: Family, variant: str, rank: int, alone: Cells) -> tuple[str, ...]:
    cells = family.cells[variant, rank]
    return (
        family.label,
        variant,
        str(rank),
        str(len(set(cells) & set(alone))),
        *(shown(over_seeds(each, "first_token_nll")) for each in (cells, alone)),
        signed(difference(cells, alone, "first_token_nll")),
        *(shown(over_seeds(each, "bits_per_byte"), bare=True) for each in (cells, alone)),
        *(shown(over_seeds(cells, "speedup_over_trunk", mode), 2) for mode in MODES),
        *(shown(over_seeds(cells, "speedup", mode), 2) for mode in MODES),
    )


def baselines_table(families: list[Family]) -> Table:
    """How strong the baseline is: autoregressive decoding with our loop against Hugging Face's generate."""
    rows: list[tuple[str, ...]] = []
    for family in families:
        held = [by_seed for _, by_seed in sorted(family.cells.items())]
        held = [by_seed for by_seed in held if over_seeds(by_seed, "plain_over_generate") is not None]
        if held:
            cells = max(held, key=len)
            ratios = [shown(over_seeds(cells, "plain_over_generate", mode), 2) for mode in MODES]
            rows.append((family.label, str(len(cells)), *_rates(cells), *ratios))
    header = (
        "setting",
        "seeds",
        *(f"{what}, {mode} (tokens/s)" for mode in MODES for what in ("autoregressive", "generate")),
        *(f"autoregressive / generate, {mode}" for mode in MODES),
    )
    caption = (
        "Autoregressive decoding with our loop, and Hugging Face generate on the same weights (shared, not copied), "
        "both with a cache, side by side. Targets trained with untied heads (eq. 11) have no counterpart in generate."
    )
    return Table("baselines", caption, header, rows)


def _rates(cells: Cells) -> Sequence[str]:
    return [
        f"{sum(m['tokens_per_second'][key] for m in modes) / len(modes):,.0f}"
        for mode in MODES
        for key in ("plain", "generate")
        if (modes := [m for r in cells.values() if (m := r.mode(mode)) and m["plain_over_generate"]])
    ]
