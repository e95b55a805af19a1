"""How cost grows: tables from the records of `bench/{loss,overhead,training_rate}.py`."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import cost
from experiments.records import machine_text
from experiments.report.benchmarks import Benchmark
from experiments.report.table import Columns, Table, ranged, recorded, tabulated

DIMENSIONS = ("positions", "horizon", "rank", "vocab", "width")
FIGURE = (
    "A training step over the next-token model's on the same trunk, by recipe and size of the trunk: measured (bars: "
    "the range over fresh processes), and what the FLOPs would allow. Whole: untied heads trained at every position; "
    "1/4, 1/16: at that share of them; low rank: maps of rank 16; frozen: the trunk is; draft vocabulary: a quarter "
    "of the tokens."
)


# --- the joint loss --------------------------------------------------------------------------------------------------


def large_table(record: Benchmark) -> Table:
    """Each way to compute the joint loss at a large vocabulary: time, memory, error."""
    few, size = record["dense_at_few_positions"], record["dimensions"]
    sides = record["sides"] | {f"dense, {few['positions']} positions": few}
    chunks = record["sides"]["bounded"].get("chunks", {})
    sides |= {f"bounded, chunks of {mib} MiB": chunks[mib] for mib in sorted(chunks, key=int)}
    columns: Columns = {
        "loss": lambda side: side[0],
        "seconds": lambda side: f"{side[1]['seconds']:.3f}" if "seconds" in side[1] else "-",
        "memory (GiB)": lambda side: f"{side[1]['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in side[1] else "-",
        "largest gradient error": lambda side: _worst(side[1].get("errors", {})),
        "failed": lambda side: side[1].get("failed", "-"),
    }
    floor = ""
    if "floor_seconds" in record:
        floor = f" The products alone take {record['floor_seconds']:.3f} s at the rate of one large product."
    caption = (
        f"The joint loss forward and backward, {_sizes(size)}. "
        f"Memory: beside weights, inputs and one gradient of each (target for ours: "
        f"{record.get('memory_gib', {}).get('target', 2.0):g} GiB). Error: the "
        f"largest of a gradient against float64, relative to its norm, on a small case.{floor} {described(record)}"
    )
    return tabulated("loss_large", caption, columns, sides.items())


def _worst(errors: dict[str, Any]) -> str:
    return "-" if not errors or "failed" in errors else f"{max(errors.values()):.4f}"


def _sizes(size: dict[str, Any]) -> str:
    return (
        f"V={size['vocab']:,}, R={size['rank']}, N={size['horizon']}, D={size['width']:,}, {size['positions']:,} "
        f"positions, {size['dtype']}, chunks of {size['chunk_mib']} MiB"
    )


def dense_table(record: Benchmark) -> Table:
    """The bounded joint loss against the dense one: time and memory."""
    columns: Columns = {
        "loss": lambda side: side[0],
        "seconds": lambda side: _over([run["seconds"] for run in side[1]["repeats"]], ".2f"),
        "memory (MiB)": lambda side: f"{side[1]['peak_bytes'] / 2**20:,.0f}",
    }
    memory, seconds = record["memory_ratio"], record["time_ratio"]
    caption = (
        f"The joint loss forward and backward, {_sizes(record['dimensions'])}; dense: all logits at once, by autograd. "
        "Median and range over the repeats. Bounded "
        f"over dense: {memory['measured']:.3f} of the memory (target: at most {memory['target']:g}), "
        f"{seconds['measured']:.2f} of the time (at most {seconds['target']:g}). {described(record)}"
    )
    return tabulated("loss_dense", caption, columns, record["sides"].items())


def growth_table(record: Benchmark) -> Table:
    """Time and memory against each dimension, their exponents, and the fitted model's deviation."""
    cells = [cell for cell in record["cells"] if "failed" not in cell]
    fitted, base = fit(cells), record["cells"][0]
    columns: Columns = {
        "dimension": lambda line: line[0],
        "size": lambda line: " / ".join(f"{cell[line[0]]:,}" for cell in line[1]),
        "seconds": lambda line: " / ".join(f"{cell['seconds']:.3f}" for cell in line[1]),
        "fitted": lambda line: " / ".join(f"{fitted(_terms(cell)):.3f}" for cell in line[1]),
        "exponent": lambda line: f"{_exponent(*line):.2f}",
        "memory (MiB)": lambda line: " / ".join(f"{cell['peak_bytes'] / 2**20:,.0f}" for cell in line[1]),
    }
    products, logits, fixed = fitted.coefficients
    deviation = max(abs(fitted(_terms(cell)) / cell["seconds"] - 1) for cell in cells)
    caption = (
        "The bounded loss with one dimension at a time a quarter, a half and the whole of the base ("
        + ", ".join(f"{key} {base[key]:,}" for key in DIMENSIONS)
        + f"; {record['dimensions']['dtype']}). Exponent: slope of log seconds against log size. "
        f"Fitted to all cells: seconds = products / {_inverse(products):.3g} FLOP/s + logits / "
        f"{_inverse(logits):.3g} per s + {fixed:.3g} s, off by at most "
        f"{deviation:.0%}. Memory: beside weights, inputs and one gradient of each. {described(record)}"
    )
    lines = [(dimension, _along(cells, dimension)) for dimension in DIMENSIONS]
    return tabulated("loss_growth", caption, columns, [line for line in lines if len(line[1]) > 1])


def fit(cells: Sequence[dict[str, Any]]) -> cost.Fit:
    """Seconds of the bounded loss = products, logits and 1 times its coefficients. cells: dimensions and `seconds`."""
    return cost.fit([_terms(cell) for cell in cells], [cell["seconds"] for cell in cells])


def _terms(cell: dict[str, Any]) -> tuple[float, float, float]:
    logits = math.prod(cell[name] for name in ("positions", "horizon", "rank", "vocab"))
    return 6.0 * logits * cell["width"], float(logits), 1.0


def _inverse(weight: float) -> float:
    return 1 / weight if weight else math.inf


def _along(cells: Sequence[dict[str, Any]], dimension: str) -> list[dict[str, Any]]:
    """The cells that differ from the first in this dimension alone, by size."""
    rest = [name for name in DIMENSIONS if name != dimension]
    found = [cell for cell in cells if all(cell[name] == cells[0][name] for name in rest)]
    return sorted(found, key=lambda cell: int(cell[dimension]))


def _exponent(dimension: str, line: Sequence[dict[str, Any]]) -> float:
    x, y = (np.log([float(cell[key]) for cell in line]) for key in (dimension, "seconds"))
    return float(np.polyfit(x, y, 1)[0])


# --- training --------------------------------------------------------------------------------------------------------


def overhead_table(record: Benchmark, recipes: Benchmark) -> Table:
    """What each recipe costs at each size, measured and by its FLOPs, and what it keeps of the gain."""
    kept = {cell["recipe"]: cell for cell in recipes["cells"]}
    columns: Columns = {
        "trunk": lambda cell: cell["size"],
        "recipe": lambda cell: cell["recipe"],
        "step (ms)": recorded("step_ms", ",.0f"),
        "overhead": recorded("overhead", "+.0%"),
        "bound": lambda cell: f"{cell['bound']:+.0%}" if "bound" in cell else "-",
        "peak (MiB)": lambda cell: f"{cell['peak_bytes'] / 2**20:,.0f}",
        "planned (MiB)": lambda cell: f"{cell['planned_bytes'] / 2**20:,.0f}",
        "tokens per forward": recorded("tokens_per_pass", ".2f"),
        "gain kept": recorded("kept", ".0%"),
        "joint NLL": recorded("joint_nll", ".2f"),
    }
    settings, other = record["settings"], recipes["settings"]
    decided = "by every seed" if recipes["decided"] else "not by every seed, or with one alone"
    caption = (
        f"Training with rank {settings['rank']} and horizon {settings['horizon']} against next-token training of the "
        f"same trunk, V={settings['vocab']:,}: median step and its range over {settings['repeats']} fresh processes, "
        "and what it exceeds the next-token step of the same turn by, measured and by FLOPs (bound); peak memory, "
        f"and as planned. Beside them, of heads trained by the recipe for {other['steps']} steps on one frozen trunk "
        f"(bytes), mean and range over {other['seeds']} seeds: tokens per forward expected from the test positions, "
        "the share of the whole loss's gain that is kept, joint NLL (nats). Chosen, the fewest FLOPs that keep "
        f"{recipes['kept_target']:.0%} on average: {recipes['chosen']} ({decided}). {described(record)}"
    )
    return tabulated("overhead", caption, columns, (kept.get(cell["recipe"], {}) | cell for cell in record["cells"]))


def processes_table(record: Benchmark) -> Table:
    """What more processes bring on one machine: tokenising and training."""
    cells, settings = record["cells"], record["settings"]
    columns: Columns = {
        "task": lambda row: row["task"],
        "processes": lambda row: row["count"],
        "time": lambda row: f"{_over(row['times'], ',.1f')} {row['unit']}",
        "rate": lambda row: (
            f"{row['bytes_per_second'] / 1e6:,.2f} MB/s"
            if "bytes_per_second" in row
            else f"{row['tokens_per_second']:,.0f} tokens/s"
        ),
        "times as fast as one process": lambda row: _over(row["gains"], ".2f") if row["gains"] else "-",
        "peak memory (MiB)": lambda row: (
            f"{row['peak_memory_bytes'] / 2**20:,.0f}" if "peak_memory_bytes" in row else "-"
        ),
    }
    rows = []
    for label, cell in cells.items():
        task, _, count = label.rpartition(" ") if " " in label else (label, "", "1")
        alone, (key, unit) = cells.get(f"{task} 1"), ("step_ms", "ms") if "step_ms" in cell else ("seconds", "s")
        times = [run[key] for run in cell["repeats"]]
        gains = [one[key] / each for one, each in zip(alone["repeats"], times, strict=True)] if alone else []
        rows.append(cell | {"task": task, "count": count, "times": times, "unit": unit, "gains": gains})
    size = max((cell["bytes"] for label, cell in cells.items() if label.startswith("tokenise")), default=0)
    tokenised = (
        f"seconds to compare documents and to tokenise {size / 1e6:,.1f} MB (threads: one process with the tokenizer's "
        "own), and "
    )
    caption = (
        f"More processes on one machine: {tokenised if size else ''}the median training step of a trunk of size "
        f"{settings['size']} on {settings['rows']} rows of {settings['context']} tokens, each process with its share "
        f"of the cores. Contenders take turns; median and range over {settings['repeats']} repeats; the gain is over "
        f"one process in the same turn. {described(record)}"
    )
    return tabulated("processes", caption, columns, rows)


def rates_table(record: Benchmark) -> Table:
    """Positions a second at which heads on a frozen model train, by recipe."""
    settings = record["settings"]
    columns: Columns = {
        "states": lambda row: row["label"].split()[0],
        "recipe": lambda row: row["label"].split()[1],
        "rank": lambda row: row["label"].split()[-1],
        "positions/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "times retrofit's": lambda row: ranged(row["over_retrofit"], ".1f"),
    }
    caption = (
        f"Heads on {settings['model']}, n={settings['horizon']}: positions trained a second. The trunk's states are "
        "kept on disk, or it runs in every step (streamed). retrofit and many: the presets; whole: every position of a "
        "row against the whole target; few: against its likeliest tokens; many also estimates the draft's normaliser. "
        f"Median and range over {settings['repeats']} repeats by turns. {described(record)}"
    )
    return tabulated("rates", caption, columns, [cell | {"label": label} for label, cell in record["cells"].items()])


TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "loss_large": (large_table, ("joint-loss-large-gpu",)),
    "loss_growth_gpu": (growth_table, ("joint-loss-growth-gpu",)),
    "loss_growth_cpu": (growth_table, ("joint-loss-growth-cpu",)),
    "loss_dense": (dense_table, ("joint-loss-cpu",)),
    "overhead": (overhead_table, ("training_overhead", "training_recipes")),
    "processes": (processes_table, ("processes",)),
    "rates": (rates_table, ("training_rate",)),
}


# --- parts -----------------------------------------------------------------------------------------------------------


def _over(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return ranged({"median": statistics.median(values), "low": min(values), "high": max(values)}, form)


def conditions(record: Benchmark) -> str:
    made = record["settings"]
    sizes = f"Rank {made['rank']}, n={made['horizon']}, V={made['vocab']:,}"
    return f"{sizes}, {made['steps']} steps in each of {made['repeats']} processes. {described(record)}"


def described(record: Benchmark) -> str:
    return f"{machine_text(record['hardware'])}."
