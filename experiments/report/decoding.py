"""Ways to draft, side by side: tables from the records of `experiments/bench/decode.py`."""

from collections.abc import Callable, Iterator
from typing import Any

from experiments.records import MODES, machine_text
from experiments.report.benchmarks import Benchmark
from experiments.report.table import Column, Columns, Table, recorded, tabulated

Row = dict[str, Any]
CHOSEN = "Chosen: the drafter and verifier that were fastest on the validation prompts."
FIGURE = (
    "Tokens per target forward, and speed-up over autoregressive (AR) decoding, of every way to draft: the same "
    f"target, prompts and machine. {CHOSEN} A logarithmic scale."
)
_HEADS: Columns = {
    "corpus": lambda row: row["corpus"],
    "variant": lambda row: row["law"],
    "rank": lambda row: str(row["rank"]),
}
_SEEDS: Columns = _HEADS | {"seeds": lambda row: " ".join(map(str, row["seeds"]))}
_DRAFTERS = ("chain", "block", "tree", "window", "path")


def methods_table(record: Benchmark) -> Table:
    """Baselines and our heads: what each gains."""
    columns: Columns = {
        "corpus": lambda row: row["corpus"],
        "mode": lambda row: row["mode"],
        "method": lambda row: row["name"],
        "drafter": lambda row: row["strategy"][row["mode"]],
        "tokens per forward": recorded("tokens_per_pass", ".3f"),
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "speed-up": recorded("speedup", ".2f"),
        "speed-up over generate": recorded("speedup_over_generate", ".2f"),
        "speed-up per token per forward": recorded("conversion", ".2f"),
    }
    caption = (
        "Ways to draft for one target per corpus, side by side: the same weights, prompts, number of tokens and "
        "machine; all are lossless. AR: our loop without drafts; generate and assisted generation: Hugging "
        f"Face's; rank 1, untied: independent heads, as Medusa's; sequential heads: as Hydra's. {CHOSEN} Tokens per "
        "target forward: autoregressive decoding has 1.00. Speed-up: over autoregressive decoding with our loop. "
        f"{described(record)}"
    )
    return tabulated("decoding", caption, columns, _by_mode(record["methods"]))


def methods_cost_table(record: Benchmark) -> Table:
    """Baselines and our heads: what each costs."""
    columns: Columns = {
        "corpus": lambda row: row["corpus"],
        "method": lambda row: row["name"],
        "mode": lambda row: row["mode"],
        "added parameters": lambda row: f"{row['parameters_added']:,}",
        "added weights (MiB)": lambda row: f"{row['weights_mib']:.1f}",
        "training (s)": lambda row: f"{row['training_seconds']:,.0f}",
        "memory (KiB)": _kib("working_memory_bytes"),
        "after the prompt (KiB)": _kib("later_memory_bytes"),
        "between forwards (KiB)": _kib("between_memory_bytes"),
    }
    caption = (
        "What each way to draft adds to the target. Memory: tensors alive at the worst moment of one text, all "
        "weights aside; after the prompt: of what follows the forward over the prompt; between forwards: between two "
        "forwards of the target, beyond those alive at the end of the one before, that is, verifying and drafting. "
        f"Training: of what is added, one seed. {described(record)}"
    )
    rows = [row for method in record["methods"] for row in _by_mode([method])]
    return tabulated("decoding_cost", caption, columns, rows)


def strategies_table(record: Benchmark) -> Table:
    """Speed-up of every drafter and verifier, the one chosen and what it gains over the chain."""
    cells = list(_by_mode(record["cells"]))
    columns: Columns = {
        "mode": lambda row: row["mode"],
        **_SEEDS,
        **{f"speed-up, {name}": _of(name, "speedup", ".2f") for name in _DRAFTERS if any(name in row for row in cells)},
        "chosen": lambda row: row["chosen"],
        "tokens per forward over chain": _of("chosen", "tokens_per_pass_over_chain", "+.3f"),
        "speed over chain": _of("chosen", "speed_over_chain", ".2f"),
        "speed-up per token per forward": _of("chosen", "conversion", ".2f"),
    }
    suggested = ", ".join(f"{mode}: {record['suggested'][mode]}" for mode in MODES)
    caption = (
        f"Drafters and verifiers, on the test prompts: speed-up over autoregressive decoding. {CHOSEN} The last three "
        "columns are its. Window and path of rank 1 are its chain. Suggested default, the fastest on the validation "
        f"prompts over all heads (geometric mean): {suggested}. Differences are paired. {described(record)}"
    )
    return tabulated("strategies", caption, columns, cells)


def sparse_table(record: Benchmark) -> Table:
    """What a draft loses and gains when it evaluates only some of its components."""
    columns: Columns = {
        "mode": lambda row: row["mode"],
        **_HEADS,
        "seeds": lambda row: str(len(row["seeds"])),
        "components evaluated": lambda row: str(row["active"]),
        "tokens per forward": recorded("tokens_per_forward", ".3f"),
        "speed-up": recorded("speedup", ".3f"),
        "speed over rank 1": recorded("speed_over_rank1", ".3f"),
    }
    caption = (
        "Chains drafted from the heaviest components of the gate alone (`decode.active`), beside rank 1 and AR, in one "
        "run: the drafts' distribution changes, that of the text does not. Speed-up: over autoregressive decoding. "
        f"{described(record)}"
    )
    return tabulated("sparse", caption, columns, record["rows"])


def acceptance_table(record: Benchmark) -> Table:
    """Tokens per forward of every drafter and verifier, over the chain of the same heads and over rank 1."""
    columns: Columns = {
        "mode": lambda row: row["mode"],
        **_SEEDS,
        "drafter": lambda row: row["strategy"],
        "tokens per forward": recorded("tokens_per_pass", ".3f"),
        "over its chain": recorded("tokens_per_pass_over_chain", "+.3f"),
        "over rank 1": recorded("tokens_per_pass_over_rank1", "+.3f"),
    }
    caption = (
        "Tokens per target forward under every drafter and verifier; what it gains over the chain of the same heads, "
        "and over the same drafter of rank 1 of the same variant (window and path of rank 1 are its chain). "
        f"Differences are paired over the same prompts. {described(record)}"
    )
    return tabulated("acceptance", caption, columns, record["strategies"])


def near_ties_table(record: Benchmark) -> Table:
    """Where greedy texts part from those of generate."""
    columns: Columns = {
        "precision": lambda row: row["dtype"],
        "method": lambda row: row["method"],
        "prompts": lambda row: str(row["prompts"]),
        "tokens": lambda row: str(row["tokens"]),
        "differing tokens": lambda row: f"{row['differing_tokens'] / row['tokens']:.1%}",
        "gap at each first difference (nats, float64)": lambda row: (
            ", ".join("-" if each["gap"] is None else f"{each['gap']:.4f}" for each in row["first_differences"]) or "-"
        ),
    }
    caption = (
        f"Greedy texts against those of Hugging Face's generate, {record['settings']['model']}, at most "
        f"{record['settings']['new_tokens']} tokens. In exact arithmetic they are the same; a forward over several "
        "tokens rounds otherwise than one over a single token. Gap: between the log probabilities, in float64, of the "
        "two tokens at which a text first differs; all tokens behind it differ as a rule. "
        f"{machine_text(record['hardware'])}."
    )
    return tabulated("near_ties", caption, columns, record["entries"])


TABLES: dict[str, tuple[Callable[[Benchmark], Table], tuple[str, ...]]] = {
    "decoding": (methods_table, ("decode_baselines",)),
    "decoding_cost": (methods_cost_table, ("decode_baselines",)),
    "strategies": (strategies_table, ("decode_strategies",)),
    "sparse": (sparse_table, ("decode_sparse",)),
    "acceptance": (acceptance_table, ("decode_acceptance",)),
    "near_ties": (near_ties_table, ("near_ties",)),
}


# --- parts -----------------------------------------------------------------------------------------------------------


def _by_mode(cells: list[Row]) -> Iterator[Row]:
    """A row per mode, in which a cell's part of that mode is its own."""
    return (cell | cell["modes"][mode] | {"mode": mode} for mode in MODES for cell in cells)


def _of(drafter: str, key: str, form: str) -> Column:
    """Of a drafter, or of the one chosen, on the test prompts."""
    shown = recorded(key, form)

    def cell(row: Row) -> str:
        name = row["chosen"] if drafter == "chosen" else drafter
        return shown(row[name]["test"]) if name in row else "-"

    return cell


def _kib(key: str) -> Column:
    return lambda row: f"{row[key] / 2**10:,.0f}" if key in row else "-"


def described(record: Benchmark) -> str:
    settings = record["settings"]
    targets = "; ".join(
        f"{target['trunk']} ({target['corpus']}, {target['parameters'] / 1e6:.1f}M parameters, {target['steps']:,} "
        f"steps, its heads {target['head_steps']:,}, n={target['horizon']})"
        for target in record["targets"]
    )
    untimed = record["benchmark"] == "decoding acceptance"
    prompts = f"{settings['prompts'] if untimed else settings['timed_prompts']} prompts per corpus"
    return (
        "95% intervals over prompts, each with all its draws and seeds of the heads; those of speeds are the record's "
        f"own. Targets: {targets}. {prompts}, {settings['new_tokens']} new tokens "
        + ("each." if untimed else f"each, batch 1; {machine_text(record['hardware'])}.")
    )
