"""Ways to draft, side by side: tables and a figure from the records of `experiments/bench/decode.py`.

Left out with a line that says so where a record is missing. As elsewhere, the same records give the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.records import MODES, machine_text
from experiments.report.benchmarks import Benchmark, made_of, read_benchmark
from experiments.report.figures import Shown, one
from experiments.report.figures.benchmarks import ways_to_draft
from experiments.report.table import Made, Table, title_of
from experiments.stats import Sample, contrast

CHAIN, RANK1 = "tokens_per_pass_over_chain", "tokens_per_pass_over_rank1"  # keys of differences
MEMORY = ("working_memory_bytes", "later_memory_bytes", "between_memory_bytes")
CHOSEN = "Chosen: the drafter and verifier that were fastest on the validation prompts."


def tables(root: Path) -> list[Made]:
    """Every table of the records under root/benchmarks."""
    return [
        Made(name, title_of(make), record if isinstance(record, str) else made_of(benchmark, make, record))
        for name, (benchmark, make) in TABLES.items()
        for record in [read_benchmark(root, benchmark)]
    ]


def draw(root: Path, folder: Path) -> tuple[list[Path], Shown]:
    """The figure as PDF and PNG with its caption: (files, the figure as the report shows it)."""
    record = read_benchmark(root, "decode_baselines")
    return one(
        "decoding",
        _TITLE,
        record
        if isinstance(record, str)
        else made_of("decode_baselines", lambda: (record, f"{_CAPTION} {_described(record)}")),
        ways_to_draft,
        folder,
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def methods_table(record: Benchmark) -> Table:
    """Baselines and our heads: what each gains."""
    rows = [
        (
            method["corpus"],
            mode,
            method["name"],
            method["strategy"][mode],
            _interval(found["tokens_per_pass"]),
            f"{found['tokens_per_second']:,.0f}",
            *(_interval(found[key], 2) for key in ("speedup", "speedup_over_generate", "conversion")),
        )
        for mode in MODES
        for method in record["methods"]
        for found in [method["modes"][mode]]
    ]
    header = (
        "corpus",
        "mode",
        "method",
        "drafter",
        "tokens per forward",
        "tokens/s",
        "speed-up",
        "speed-up over generate",
        "speed-up per token per forward",
    )
    caption = (
        "Ways to draft for one target per corpus, side by side: the same weights, prompts, number of tokens and "
        "machine; all are lossless. Plain: our loop without drafts; generate and assisted generation: Hugging "
        f"Face's; rank 1, untied: independent heads, as Medusa's; sequential heads: as Hydra's. {CHOSEN} Tokens per "
        "target forward: autoregressive decoding has 1.00. Speed-up: over autoregressive decoding with our loop. "
        f"{_described(record)}"
    )
    return Table("decoding", caption, header, rows)


def methods_cost_table(record: Benchmark) -> Table:
    """Baselines and our heads: what each costs."""
    rows = [
        (
            method["corpus"],
            method["name"],
            mode,
            f"{method['parameters_added']:,}",
            f"{method['weights_mib']:.1f}",
            f"{method['training_seconds']:,.0f}",
            *(_kib(method["modes"][mode], key) for key in MEMORY),
        )
        for method in record["methods"]
        for mode in MODES
    ]
    header = (
        "corpus",
        "method",
        "mode",
        "added parameters",
        "added weights (MiB)",
        "training (s)",
        "memory (KiB)",
        "after the prompt (KiB)",
        "between forwards (KiB)",
    )
    caption = (
        "What each way to draft adds to the target. Memory: tensors alive at the worst moment of one text, all "
        "weights aside; after the prompt: of what follows the forward over the prompt; between forwards: between two "
        "forwards of the target, beyond those alive at the end of the one before, that is, verifying and drafting. "
        f"Training: of what is added, one seed. {_described(record)}"
    )
    return Table("decoding_cost", caption, header, rows)


def strategies_table(record: Benchmark) -> Table:
    """Speed-up of every drafter and verifier, the one chosen and what it gains over the chain."""
    names = [name for name in _ORDER if any(name in cell["modes"][mode] for cell in record["cells"] for mode in MODES)]
    rows = [
        (
            mode,
            *_place(cell),
            *(_interval(found[name]["test"]["speedup"], 2) if name in found else "-" for name in names),
            found["chosen"],
            _interval(best["tokens_per_pass_over_chain"], 3, sign=True),
            _interval(best["speed_over_chain"], 2),
            _interval(best["conversion"], 2),
        )
        for mode, cell in itertools.product(MODES, record["cells"])
        for found in [cell["modes"][mode]]
        for best in [found[found["chosen"]]["test"]]
    ]
    header = (
        "mode",
        *_PLACE,
        *(f"speed-up, {name}" for name in names),
        "chosen",
        "tokens per forward over chain",
        "speed over chain",
        "speed-up per token per forward",
    )
    suggested = ", ".join(f"{mode}: {record['suggested'][mode]}" for mode in MODES)
    caption = (
        f"Drafters and verifiers, on the test prompts: speed-up over autoregressive decoding. {CHOSEN} The last three "
        "columns are its. Window and path of rank 1 are its chain. Suggested default, the fastest on the validation "
        f"prompts over all heads (geometric mean): {suggested}. Differences are paired. {_described(record)}"
    )
    return Table("strategies", caption, header, rows)


def acceptance_table(record: Benchmark) -> Table:
    """Tokens per forward of every drafter and verifier, over the chain of the same heads and over rank 1."""
    found = {_index(row): row for row in record["strategies"]}
    measured = any(CHAIN in row for row in record["strategies"])

    def over(key: str, row: dict[str, Any], rank: int, *drafters: str) -> str:
        if measured:
            return _interval(row[key], 3, sign=True) if key in row else "-"
        indices = [(*_index(row)[:3], rank, drafter) for drafter in drafters]
        other = next((found[index] for index in indices if index in found), row)
        return "-" if other is row else contrast([(_counts(row), _counts(other))]).text(3, sign=True)

    rows = [
        (
            row["mode"],
            *_place(row),
            row["strategy"],
            _interval(row["tokens_per_pass"]),
            over(CHAIN, row, row["rank"], "chain"),
            over(RANK1, row, 1, row["strategy"], "chain"),
        )
        for row in record["strategies"]
    ]
    header = ("mode", *_PLACE, "drafter", "tokens per forward", "over its chain", "over rank 1")
    paired = "seeds, draws and prompts" if measured else "prompts, each with all its draws and seeds"
    caption = (
        "Tokens per target forward under every drafter and verifier; what it gains over the chain of the same heads, "
        "and over the same drafter of rank 1 of the same variant (window and path of rank 1 are its chain). "
        f"Differences are paired over the same {paired}. {_described(record)}"
    )
    return Table("acceptance", caption, header, rows)


def agreement_table(record: Benchmark) -> Table:
    """The joint against the target, position by position."""
    rows = [row for mode, cell in itertools.product(MODES, record["agreement"]) for row in _agreement(mode, cell)]
    header = ("text", "corpus", "variant", "rank", "depth", "argmax right", "given the true tokens", "overlap")
    caption = (
        "Drafts against what the target wrote, at every position of its own text (greedy or sampled). Argmax right: "
        "behind drafts that are the joint's own, and given the true tokens before it. Overlap: mean of sum min(p, q) "
        f"given the true tokens, what sampling accepts. All seeds together. {_described(record)}"
    )
    return Table("agreement", caption, header, rows)


def _agreement(mode: str, cell: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    shares = cell["modes"][mode]
    by_depth = zip(shares["chain"]["right"], shares["told"], shares["overlap"], strict=True)
    for depth, found in enumerate(by_depth, start=2):
        place = (mode, cell["corpus"], cell["law"], str(cell["rank"]), str(depth))
        yield (*place, *(f"{share:.3f}" for share in found))


def conditioning_table(record: Benchmark) -> Table:
    """What conditioning on the drafts before changes, and tokens per forward of each kind of window."""
    rows = [
        (
            mode,
            cell["corpus"],
            cell["law"],
            str(cell["rank"]),
            *(f"{1 + sum(shares[name]['kept']):.3f}" for name in _SHAPES),
            *(f"{shares['changed'][key]:,}" for key in ("reached", "differs", "now right", "was right")),
        )
        for mode, cell in itertools.product(MODES, record["agreement"])
        for shares in [cell["modes"][mode]]
    ]
    header = (
        "text",
        "corpus",
        "variant",
        "rank",
        *(f"tokens per forward, {name}" for name in _SHAPES),
        "positions behind right drafts",
        "argmax changed",
        "then right",
        "right before",
    )
    caption = (
        "Tokens per forward as if a window began at every position of the target's own text. Marginals: the argmax "
        "of each position alone. Argmax changed: of the positions with right drafts before, where conditioning on "
        f"those drafts changed it. All seeds together. {_described(record)}"
    )
    return Table("conditioning", caption, header, rows)


def filters_table(record: Benchmark) -> Table:
    """Tokens per forward under temperatures and top-p."""
    tops = sorted({row["top_p"] for row in record["filters"]})
    found: dict[tuple[str, str, int, str, float], dict[float, str]] = {}
    for row in record["filters"]:
        key = (row["corpus"], row["law"], row["rank"], row["strategy"], row["temperature"])
        found.setdefault(key, {})[row["top_p"]] = _interval(row["tokens_per_pass"])
    rows = [
        (corpus, variant, str(rank), drafter, f"{temperature:g}", *(by_top.get(top, "-") for top in tops))
        for (corpus, variant, rank, drafter, temperature), by_top in found.items()
    ]
    columns = (f"tokens per forward, top-p {top:g}" for top in tops)
    header = ("corpus", "variant", "rank", "drafter", "temperature", *columns)
    caption = f"Tokens per target forward under filters; temperature 0 is greedy. {_described(record)}"
    return Table("filters", caption, header, rows)


# name of the table -> (its record, what makes it)
TABLES: dict[str, tuple[str, Callable[[Benchmark], Table]]] = {
    "decoding": ("decode_baselines", methods_table),
    "decoding_cost": ("decode_baselines", methods_cost_table),
    "strategies": ("decode_strategies", strategies_table),
    "acceptance": ("decode_acceptance", acceptance_table),
    "agreement": ("decode_acceptance", agreement_table),
    "conditioning": ("decode_acceptance", conditioning_table),
    "filters": ("decode_acceptance", filters_table),
}
_ORDER = ("chain", "block", "tree", "window", "path")
_SHAPES = ("chain", "marginals", "window", "path")
_PLACE = ("corpus", "variant", "rank", "seeds")


# --- figure ----------------------------------------------------------------------------------------------------------

_TITLE = "Ways to draft, side by side"
_CAPTION = (
    "Tokens per target forward, and speed-up over autoregressive (AR) decoding, of every way to draft: the same "
    f"target, prompts and machine. {CHOSEN} A logarithmic scale."
)


# --- parts -----------------------------------------------------------------------------------------------------------


def _place(row: dict[str, Any]) -> tuple[str, ...]:
    return row["corpus"], row["law"], str(row["rank"]), " ".join(map(str, row["seeds"]))


def _index(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("mode", "corpus", "law", "rank", "strategy"))


def _counts(row: dict[str, Any]) -> Sample:
    """Of a record without differences: tokens and forwards of each prompt."""
    return Sample.ratio(row["per_prompt"]["tokens"], row["per_prompt"]["passes"])


def _interval(found: dict[str, float], digits: int = 3, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{found['mean']:{plus}.{digits}f} [{found['low']:{plus}.{digits}f}, {found['high']:{plus}.{digits}f}]"


def _kib(mode: dict[str, Any], key: str) -> str:
    return f"{mode[key] / 2**10:,.0f}" if key in mode else "-"


def _described(record: Benchmark) -> str:
    settings = record["settings"]
    targets = "; ".join(
        f"{target['trunk']} ({target['corpus']}, {target['parameters'] / 1e6:.1f}M parameters, {target['steps']:,} "
        f"steps, its heads {target['head_steps']:,}, n={target['horizon']})"
        for target in record["targets"]
    )
    untimed = record["benchmark"] == "decoding acceptance"
    prompts = f"{settings['prompts'] if untimed else settings['timed_prompts']} prompts per corpus"
    return (
        "95% percentile bootstrap intervals over seeds of the heads, draws and prompts, as recorded: narrow, since "
        f"there are few of each. Targets: {targets}. {prompts}, {settings['new_tokens']} new tokens "
        + ("each." if untimed else f"each, batch 1; {machine_text(record['hardware'])}.")
    )
