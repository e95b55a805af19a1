"""Ways to draft, side by side: tables and a figure from the records of `experiments/bench/decode.py`.

Left out with a line that says so where a record is missing. As elsewhere, the same records give the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.records import MODES, machine_text
from experiments.report.figures import Shown, one
from experiments.report.figures.benchmarks import ways_to_draft
from experiments.report.tables import Made, Table, title_of
from experiments.stats import Sample, contrast

Benchmark = dict[str, Any]
RECORDS = {
    "decoding acceptance": "decode_acceptance.json",
    "decoding strategies": "decode_strategies.json",
    "decoding baselines": "decode_baselines.json",
}
CHAIN, RANK1 = "tokens_per_pass_over_chain", "tokens_per_pass_over_rank1"  # keys of differences


def tables(root: Path) -> list[Made]:
    """Every table of the records under root/benchmarks."""
    return [
        Made(name, title_of(make), record if isinstance(record, str) else make(record))
        for name, (benchmark, make) in TABLES.items()
        for record in [_read(root, benchmark)]
    ]


def draw(root: Path, folder: Path) -> tuple[list[Path], Shown]:
    """The figure as PDF and PNG with its caption: (files, the figure as the report shows it)."""
    record = _read(root, "decoding baselines")
    return one(
        "decoding",
        _TITLE,
        record if isinstance(record, str) else (record, f"{_CAPTION} {_described(record)}"),
        ways_to_draft,
        folder,
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def methods_table(record: Benchmark) -> Table:
    """Baselines and our heads: what each costs and what it gains."""
    rows: list[tuple[str, ...]] = []
    for method in record["methods"]:
        modes = [method["modes"][mode] for mode in MODES]
        rows.append(
            (
                method["corpus"],
                method["name"],
                " / ".join(dict.fromkeys(method["strategy"][mode] for mode in MODES)),
                f"{method['parameters_added']:,}",
                f"{method['weights_mib']:.1f}",
                *(_memory(mode) for mode in modes),
                f"{method['training_seconds']:,.0f}",
                *(_interval(mode["tokens_per_pass"]) for mode in modes),
                *(f"{mode['tokens_per_second']:,.0f}" for mode in modes),
                *(_interval(mode["speedup"], 2) for mode in modes),
                *(_interval(mode["speedup_over_generate"], 2) for mode in modes),
                *(_interval(mode["conversion"], 2) for mode in modes),
            )
        )
    header = (
        "corpus",
        "method",
        "drafts, greedy / sampling",
        "added parameters",
        "added weights (MiB)",
        "memory, greedy (KiB)",
        "memory, sampling (KiB)",
        "training (s)",
        "tokens per pass, greedy",
        "tokens per pass, sampling",
        "tokens/s, greedy",
        "tokens/s, sampling",
        "speed-up, greedy",
        "speed-up, sampling",
        "over generate, greedy",
        "over generate, sampling",
        "conversion, greedy",
        "conversion, sampling",
    )
    caption = (
        "Ways to draft for one target per corpus, side by side: the same weights, prompts, number of tokens and machine; all are lossless. "
        "Plain: our loop without drafts; generate and assisted generation: Hugging Face's; rank 1, untied: independent heads, as Medusa's; "
        "sequential heads: as Hydra's. Chosen: the strategy that was fastest on the validation prompts. Tokens per pass of the target, plain "
        "decoding is 1.00. Speed-up: over plain; conversion: passes per second over plain's. Memory: tensors alive at the worst moment of one text, "
        "all weights aside / of what follows the pass over the prompt / between two passes of the target, beyond those alive at the end of the "
        f"one before: verifying and drafting. Training: of what is added to the target, one seed. {_described(record)}"
    )
    return Table("decoding", caption, header, rows)


def strategies_table(record: Benchmark) -> Table:
    """Speed-up of every strategy, the one chosen and what it gains over the chain."""
    names = _in_order({name for cell in record["cells"] for mode in MODES for name in _strategies(cell, mode)})
    rows: list[tuple[str, ...]] = []
    for mode, cell in itertools.product(MODES, record["cells"]):
        found, chosen = _strategies(cell, mode), cell["modes"][mode]["chosen"]
        best = found[chosen]["test"]
        rows.append(
            (
                mode,
                cell["corpus"],
                cell["law"],
                str(cell["rank"]),
                _seeds(cell),
                *(_interval(found[name]["test"]["speedup"], 2) if name in found else "-" for name in names),
                chosen,
                _interval(best["tokens_per_pass_over_chain"], 3, sign=True),
                _interval(best["speed_over_chain"], 2),
                _interval(best["conversion"], 2),
            )
        )
    header = (
        "mode",
        "corpus",
        "law",
        "rank",
        "seeds",
        *(f"speed-up, {name}" for name in names),
        "chosen",
        "tokens per pass over chain",
        "speed over chain",
        "conversion",
    )
    suggested = ", ".join(f"{mode}: {record['suggested'][mode]}" for mode in MODES)
    caption = (
        "Strategies of drafting and verifying, on the test prompts: speed-up over plain decoding; chosen: the fastest on the validation "
        "prompts; the last three columns are its. Window and path of rank 1 are its chain. Suggested default, the fastest on the validation "
        f"prompts over all heads (geometric mean): {suggested}. Differences are paired. {_described(record)}"
    )
    return Table("strategies", caption, header, rows)


def acceptance_table(record: Benchmark) -> Table:
    """Tokens per pass of every strategy, over the chain of the same heads and over rank 1 of the same law."""
    found = {_place(row): row for row in record["strategies"]}
    measured = any(CHAIN in row for row in record["strategies"])

    def over(key: str, row: dict[str, Any], rank: int, *strategies: str) -> str:
        if measured:
            return _interval(row[key], 3, sign=True) if key in row else "-"
        indices = [(*_place(row)[:3], rank, drafter) for drafter in strategies]
        other = next((found[index] for index in indices if index in found), row)
        return "-" if other is row else contrast([(_counts(row), _counts(other))]).text(3, sign=True)

    rows: list[tuple[str, ...]] = [
        (
            row["mode"],
            row["corpus"],
            row["law"],
            str(row["rank"]),
            _seeds(row),
            row["strategy"],
            _interval(row["tokens_per_pass"]),
            over(CHAIN, row, row["rank"], "chain"),
            over(RANK1, row, 1, row["strategy"], "chain"),
        )
        for row in record["strategies"]
    ]
    header = ("mode", "corpus", "law", "rank", "seeds", "strategy", "tokens per pass", "over its chain", "over rank 1")
    paired = "seeds, draws and prompts" if measured else "prompts, each with all its draws and seeds"
    caption = (
        "Tokens per pass of the target under every strategy of drafting and verifying; what it gains over the chain of the same heads, and "
        "over the same strategy of rank 1 of the same law (window and path of rank 1 are its chain). Differences are paired over the same "
        f"{paired}. {_described(record)}"
    )
    return Table("acceptance", caption, header, rows)


def agreement_table(record: Benchmark) -> Table:
    """The joint against the target, position by position."""
    rows: list[tuple[str, ...]] = []
    for mode, cell in itertools.product(MODES, record["agreement"]):
        shares = cell["modes"][mode]
        changed = shares["changed"]
        rows.append(
            (
                mode,
                cell["corpus"],
                cell["law"],
                str(cell["rank"]),
                _shares(shares["chain"]["right"]),
                _shares(shares["told"]),
                _shares(shares["overlap"]),
                *(f"{1 + sum(shares[name]['kept']):.3f}" for name in _SHAPES),
                f"{changed['differs']:,} of {changed['reached']:,}",
                f"{changed['now right']:,}",
                f"{changed['was right']:,}",
            )
        )
    header = (
        "text",
        "corpus",
        "law",
        "rank",
        "argmax right",
        "argmax right, given the true tokens",
        "overlap with the target",
        *(f"tokens per pass, {name}" for name in _SHAPES),
        "argmax changed by conditioning",
        "then right",
        "right before",
    )
    caption = (
        "Drafts against what the target wrote, at every position of its own text (greedy or sampled), by depth 2/3/..; tokens per pass as if a "
        "window began at each. Overlap: mean of sum min(p, q) given the true tokens, what sampling keeps. Marginals: the argmax of each "
        "position alone. Argmax changed: of the positions with right drafts before, where conditioning on those drafts changed the argmax. "
        f"All seeds together. {_described(record)}"
    )
    return Table("agreement", caption, header, rows)


def filters_table(record: Benchmark) -> Table:
    """Tokens per pass under temperatures and top-p."""
    tops = sorted({row["top_p"] for row in record["filters"]})
    found: dict[tuple[str, str, int, str, float], dict[float, str]] = {}
    for row in record["filters"]:
        key = (row["corpus"], row["law"], row["rank"], row["strategy"], row["temperature"])
        found.setdefault(key, {})[row["top_p"]] = _interval(row["tokens_per_pass"])
    rows = [
        (corpus, distribution, str(rank), drafter, f"{temperature:g}", *(by_top.get(top, "-") for top in tops))
        for (corpus, distribution, rank, drafter, temperature), by_top in found.items()
    ]
    header = ("corpus", "law", "rank", "strategy", "temperature", *(f"tokens per pass, top-p {top:g}" for top in tops))
    caption = f"Tokens per pass under filters; temperature 0 is greedy. {_described(record)}"
    return Table("filters", caption, header, rows)


TABLES: dict[str, tuple[str, Callable[[Benchmark], Table]]] = {
    "decoding": ("decoding baselines", methods_table),
    "strategies": ("decoding strategies", strategies_table),
    "acceptance": ("decoding acceptance", acceptance_table),
    "agreement": ("decoding acceptance", agreement_table),
    "filters": ("decoding acceptance", filters_table),
}
_ORDER = ("chain", "block", "tree", "window", "path")
_SHAPES = ("chain", "marginals", "window", "path")


# --- figure ----------------------------------------------------------------------------------------------------------

_TITLE = "Ways to draft, side by side"
_CAPTION = (
    "Tokens per target forward, and speed-up over autoregressive (AR) decoding, of every way to draft: the same target, prompts and "
    "machine. Chosen: the drafter that was fastest on the validation prompts. A logarithmic scale."
)


# --- parts -----------------------------------------------------------------------------------------------------------


def _read(root: Path, benchmark: str) -> Benchmark | str:
    """The record, or why there is none."""
    path = root / "benchmarks" / RECORDS[benchmark]
    if not path.is_file():
        return f"no record benchmarks/{path.name} (experiments/bench/decode.py makes it)"
    try:
        record: Benchmark = json.loads(path.read_bytes())
    except ValueError as error:
        return f"benchmarks/{path.name} is damaged ({error}); make it again with experiments/bench/decode.py"
    if record.get("benchmark") != benchmark:
        return f"benchmarks/{path.name} is not a record of the benchmark {benchmark!r}"
    if "targets" not in record:
        return f"benchmarks/{path.name} is of an earlier version; make it again with experiments/bench/decode.py"
    return record


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("mode", "corpus", "law", "rank", "strategy"))


def _counts(row: dict[str, Any]) -> Sample:
    """Of a record without differences: tokens and passes of each prompt."""
    return Sample.ratio(row["per_prompt"]["tokens"], row["per_prompt"]["passes"])


def _strategies(cell: dict[str, Any], mode: str) -> dict[str, Any]:
    return {name: entry for name, entry in cell["modes"][mode].items() if name != "chosen"}


def _in_order(names: set[str]) -> list[str]:
    return [name for name in _ORDER if name in names]


def _seeds(row: dict[str, Any]) -> str:
    return " ".join(map(str, row["seeds"]))


def _interval(found: dict[str, float], digits: int = 3, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{found['mean']:{plus}.{digits}f} [{found['low']:{plus}.{digits}f}, {found['high']:{plus}.{digits}f}]"


def _memory(mode: dict[str, Any]) -> str:
    """Three numbers; records of old have the first alone."""
    keys = ("working_memory_bytes", "later_memory_bytes", "between_memory_bytes")
    return " / ".join(f"{mode[key] / 2**10:,.0f}" for key in keys if key in mode)


def _shares(shares: Sequence[float]) -> str:
    return " / ".join(f"{share:.3f}" for share in shares)


def _described(record: Benchmark) -> str:
    settings = record["settings"]
    targets = "; ".join(
        f"{target['trunk']} ({target['corpus']}, {target['parameters'] / 1e6:.1f}M parameters, {target['steps']:,} steps, its heads "
        f"{target['head_steps']:,}, n={target['horizon']})"
        for target in record["targets"]
    )
    untimed = record["benchmark"] == "decoding acceptance"
    prompts = f"{settings['prompts'] if untimed else settings['timed_prompts']} prompts per corpus"
    return (
        "95% percentile bootstrap intervals over seeds of the heads, draws and prompts, as recorded: narrow, since there are few of each. "
        f"Targets: {targets}. {prompts}, {settings['new_tokens']} new tokens "
        + ("each." if untimed else f"each, batch 1; {machine_text(record['hardware'])}.")
    )
