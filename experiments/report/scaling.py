"""How cost grows: tables and a figure from the records of `experiments/bench/loss.py`, `bench/overhead.py` and
`bench/processes.py`.

Left out with a line that says so where a record is missing. As elsewhere, the same records give the same bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records import machine_text
from experiments.report.benchmarks import Benchmark, made_of, read_benchmark
from experiments.report.figures import Shown, one
from experiments.report.figures.benchmarks import training_overhead
from experiments.report.table import Made, Table, title_of

GIB = 2**30
DIMENSIONS = ("positions", "horizon", "rank", "vocab", "width")


def tables(root: Path) -> list[Made]:
    """Every table of the records under root/benchmarks."""
    made = []
    for name, (wanted, make) in TABLES.items():
        records = [read_benchmark(root, each) for each in wanted]
        missing = [record for record in records if isinstance(record, str)]
        made.append(
            Made(name, title_of(make), missing[0] if missing else made_of(" or ".join(wanted), make, name, *records))
        )
    return made


def draw(root: Path, folder: Path) -> tuple[list[Path], Shown]:
    """The figure of training overhead as PDF and PNG with its caption: (files, the figure as the report shows it)."""
    record = read_benchmark(root, "training_overhead")
    return one(
        "overhead_sizes",
        _TITLE,
        record
        if isinstance(record, str)
        else made_of("training_overhead", lambda: (record, f"{_CAPTION} {_conditions(record)} {_described(record)}")),
        training_overhead,
        folder,
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def large_table(name: str, record: Benchmark) -> Table:
    """Each way to compute the joint loss at a large vocabulary: time, memory, error."""
    few = record["dense_at_few_positions"]
    entries = [*record["sides"].items(), (f"dense, {few['positions']} positions", few)]
    entries += [
        (f"bounded, chunks of {mib} MiB", found)
        for mib, found in sorted(record["sides"]["bounded"].get("chunks", {}).items(), key=lambda entry: int(entry[0]))
    ]
    rows: list[tuple[str, ...]] = []
    for side, found in entries:
        if "failed" in found:
            rows.append((side, "-", "-", "-", found["failed"]))
            continue
        errors = found.get("errors", {})
        worst = "-" if not errors or "failed" in errors else f"{max(errors.values()):.4f}"
        rows.append((side, f"{found['seconds']:.3f}", f"{found['peak_bytes'] / GIB:.2f}", worst, "-"))
    size, target = record["dimensions"], record.get("memory_gib", {}).get("target", 2.0)
    floor = (
        f" The products alone take {record['floor_seconds']:.3f} s at the rate of one large product."
        if "floor_seconds" in record
        else ""
    )
    caption = (
        f"The joint loss forward and backward, V={size['vocab']:,}, R={size['rank']}, N={size['horizon']}, "
        f"D={size['width']:,}, {size['positions']:,} positions, {size['dtype']}, chunks of {size['chunk_mib']} MiB. "
        f"Memory: beside weights, inputs and one gradient of each (target for ours: {target:g} GiB). Error: the "
        f"largest of a gradient against float64, relative to its norm, on a small case.{floor} {_described(record)}"
    )
    return Table(name, caption, ("loss", "seconds", "memory (GiB)", "largest gradient error", "failed"), rows)


def dense_table(name: str, record: Benchmark) -> Table:
    """The bounded joint loss against the dense one: time and memory."""
    rows: list[tuple[str, ...]] = [
        (side, _over([run["seconds"] for run in found["repeats"]], ".2f"), f"{found['peak_bytes'] / 2**20:,.0f}")
        for side, found in record["sides"].items()
    ]
    size, memory, seconds = record["dimensions"], record["memory_ratio"], record["time_ratio"]
    caption = (
        f"The joint loss forward and backward, V={size['vocab']:,}, R={size['rank']}, N={size['horizon']}, "
        f"D={size['width']:,}, {size['positions']:,} positions, {size.get('dtype', 'float32')}, chunks of "
        f"{size['chunk_mib']} MiB; dense: all logits at once, by autograd. Median and range over the repeats. Bounded "
        f"over dense: {memory['measured']:.3f} of the memory (target: at most {memory['target']:g}), "
        f"{seconds['measured']:.2f} of the time (at most {seconds['target']:g}). {_described(record)}"
    )
    return Table(name, caption, ("loss", "seconds", "memory (MiB)"), rows)


def growth_table(name: str, record: Benchmark) -> Table:
    """Time and memory against each dimension, their exponents, and the fitted model's deviation."""
    cells = [cell for cell in record["cells"] if "failed" not in cell]
    fitted = fit(cells)
    rows: list[tuple[str, ...]] = []
    for dimension in DIMENSIONS:
        line = sorted(_along(cells, dimension), key=lambda cell: int(cell[dimension]))
        if len(line) < 2:
            continue
        rows.append(
            (
                dimension,
                " / ".join(f"{cell[dimension]:,}" for cell in line),
                " / ".join(f"{cell['seconds']:.3f}" for cell in line),
                " / ".join(f"{fitted.seconds(cell):.3f}" for cell in line),
                f"{_exponent(line, dimension, 'seconds'):.2f}",
                " / ".join(f"{cell['peak_bytes'] / 2**20:,.0f}" for cell in line),
            )
        )
    base = record["cells"][0]
    caption = (
        "The bounded loss with one dimension at a time a quarter, a half and the whole of the base ("
        + ", ".join(f"{key} {base[key]:,}" for key in DIMENSIONS)
        + f"; {record['dimensions']['dtype']}). Exponent: slope of log seconds against log size. "
        "Fitted to all cells: seconds = products / "
        f"{fitted.flops:.3g} FLOP/s + logits / {fitted.logits:.3g} per s + {fitted.pending:.3g} s, off by at most "
        f"{fitted.deviation:.0%}. Memory: beside weights, inputs and one gradient of each. {_described(record)}"
    )
    header = ("dimension", "size", "seconds", "fitted", "exponent", "memory (MiB)")
    return Table(name, caption, header, rows)


def overhead_table(name: str, record: Benchmark, recipes: Benchmark) -> Table:
    """What each recipe costs at each size, measured and by its FLOPs, and what it keeps of the gain."""
    kept = {cell["recipe"]: cell for cell in recipes["cells"]}
    rows: list[tuple[str, ...]] = []
    for cell in record["cells"]:
        found = kept.get(cell["recipe"], {})
        rows.append(
            (
                cell["size"],
                cell["recipe"],
                _ranged(cell["step_ms"], ",.0f"),
                _ranged(cell.get("overhead"), "+.0%"),
                _percent(cell.get("bound")),
                f"{cell['peak_bytes'] / 2**20:,.0f}",
                f"{cell['planned_bytes'] / 2**20:,.0f}",
                *(
                    _ranged(found.get(key), form)
                    for key, form in (("tokens_per_pass", ".2f"), ("kept", ".0%"), ("joint_nll", ".2f"))
                ),
            )
        )
    settings, other = record["settings"], recipes["settings"]
    caption = (
        f"Training with rank {settings['rank']} and horizon {settings['horizon']} against next-token training of the "
        f"same trunk, V={settings['vocab']:,}: median step and its range over {settings['repeats']} fresh processes, "
        "and what it exceeds the next-token step of the same turn by, measured and by FLOPs (bound); peak memory, "
        f"and as planned. Beside them, of heads trained by the recipe for {other['steps']} steps on one frozen trunk "
        f"(bytes), mean and range over {other['seeds']} seeds: tokens per forward expected from the test positions, "
        "the share of the whole loss's gain that is kept, joint NLL (nats). Chosen, the fewest FLOPs that keep "
        f"{recipes['kept_target']:.0%} on average: {recipes['chosen']} ({_DECIDED[recipes['decided']]}). "
        f"{_described(record)}"
    )
    header = (
        "trunk",
        "recipe",
        "step (ms)",
        "overhead",
        "bound",
        "peak (MiB)",
        "planned (MiB)",
        "tokens per forward",
        "gain kept",
        "joint NLL",
    )
    return Table(name, caption, header, rows)


_DECIDED = {True: "by every seed", False: "not by every seed, or with one alone"}


def processes_table(name: str, record: Benchmark) -> Table:
    """What more processes bring on one machine: tokenising and training."""
    cells = record["cells"]
    rows: list[tuple[str, ...]] = []
    for label, cell in cells.items():
        task, _, count = label.rpartition(" ") if " " in label else (label, "", "1")
        alone, key = cells.get(f"{task} 1"), "step_ms" if "step_ms" in cell else "seconds"
        times = [run[key] for run in cell["repeats"]]
        gains = [one[key] / each for one, each in zip(alone["repeats"], times, strict=True)] if alone else []
        rate = (
            f"{cell['bytes_per_second'] / 1e6:,.2f} MB/s"
            if "bytes_per_second" in cell
            else f"{cell['tokens_per_second']:,.0f} tokens/s"
        )
        memory = f"{cell['peak_memory_bytes'] / 2**20:,.0f}" if "peak_memory_bytes" in cell else "-"
        unit = "ms" if key == "step_ms" else "s"
        rows.append(
            (task, count, f"{_over(times, ',.1f')} {unit}", rate, _over(gains, ".2f") if gains else "-", memory)
        )
    settings = record["settings"]
    size = max((cell["bytes"] for label, cell in cells.items() if label.startswith("tokenise")), default=0)
    tokenised = (
        f"seconds to compare documents and to tokenise {size / 1e6:,.1f} MB (threads: one process with the tokenizer's "
        "own), and "
    )
    caption = (
        f"More processes on one machine: {tokenised if size else ''}the median training step of a trunk of size "
        f"{settings['size']} on {settings['rows']} rows of {settings['context']} tokens, each process with its share "
        f"of the cores. Contenders take turns; median and range over {settings['repeats']} repeats; the gain is over "
        f"one process in the same turn. {_described(record)}"
    )
    header = ("task", "processes", "time", "rate", "times as fast as one process", "peak memory (MiB)")
    return Table(name, caption, header, rows)


TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Table]]] = {
    "loss_large": (("joint-loss-large-gpu",), large_table),
    "loss_growth_gpu": (("joint-loss-growth-gpu",), growth_table),
    "loss_growth_cpu": (("joint-loss-growth-cpu",), growth_table),
    "loss_dense": (("joint-loss-cpu",), dense_table),
    "overhead": (("training_overhead", "training_recipes"), overhead_table),
    "processes": (("processes",), processes_table),
}


# --- the model of the loss's time -------------------------------------------------------------------------------------


class Fitted:
    """seconds = products / flops + logits / logits_rate + fixed, by least squares of relative errors, none negative."""

    def __init__(self, cells: Sequence[dict[str, Any]]) -> None:
        design = np.array([self._terms(cell) for cell in cells])
        measured = np.array([cell["seconds"] for cell in cells])
        used = [0, 1, 2]
        while True:  # a term that comes out negative explains nothing: without it
            found = np.linalg.lstsq(design[:, used] / measured[:, None], np.ones(len(cells)), rcond=None)[0]
            if (found >= 0).all():
                break
            used.remove(used[int(found.argmin())])
        self.weights = np.zeros(3)
        self.weights[used] = found
        self.deviation = float(np.abs(design @ self.weights / measured - 1).max())

    @staticmethod
    def _terms(cell: dict[str, Any]) -> tuple[float, float, float]:
        logits = math.prod(cell[name] for name in ("positions", "horizon", "rank", "vocab"))
        return 6.0 * logits * cell["width"], float(logits), 1.0

    def seconds(self, cell: dict[str, Any]) -> float:
        return float(np.dot(self._terms(cell), self.weights))

    @property
    def flops(self) -> float:
        return _inverse(self.weights[0])

    @property
    def logits(self) -> float:
        return _inverse(self.weights[1])

    @property
    def pending(self) -> float:
        return float(self.weights[2])


def fit(cells: Sequence[dict[str, Any]]) -> Fitted:
    """cells: {"positions", "horizon", "rank", "vocab", "width", "seconds"} of the bounded loss."""
    return Fitted(cells)


def _inverse(weight: float) -> float:
    return 1 / weight if weight else math.inf


def _along(cells: Sequence[dict[str, Any]], dimension: str) -> list[dict[str, Any]]:
    """The cells that differ from the first in this dimension alone."""
    rest = [name for name in DIMENSIONS if name != dimension]
    return [cell for cell in cells if all(cell[name] == cells[0][name] for name in rest)]


def _exponent(line: Sequence[dict[str, Any]], dimension: str, what: str) -> float:
    x, y = (np.log([float(cell[key]) for cell in line]) for key in (dimension, what))
    return float(np.polyfit(x, y, 1)[0])


# --- figure ----------------------------------------------------------------------------------------------------------

_TITLE = "Training overhead"
_CAPTION = (
    "A training step over the next-token model's on the same trunk, by recipe and size of the trunk: measured (bars: "
    "the range over fresh processes), and what the FLOPs would allow. Whole: untied heads trained at every position; "
    "1/4, 1/16: at that share of them; low rank: maps of rank 16; frozen: the trunk is; draft vocabulary: a quarter "
    "of the tokens."
)


# --- parts -----------------------------------------------------------------------------------------------------------


def _ranged(found: dict[str, float] | None, form: str) -> str:
    """A median or mean with its range."""
    if found is None:
        return "-"
    middle = found["median"] if "median" in found else found["mean"]
    return f"{middle:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def _over(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return _ranged({"median": statistics.median(values), "low": min(values), "high": max(values)}, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0%}"


def _conditions(record: Benchmark) -> str:
    made = record["settings"]
    sizes = f"Rank {made['rank']}, n={made['horizon']}, V={made['vocab']:,}"
    return f"{sizes}, {made['steps']} steps in each of {made['repeats']} processes."


def _described(record: Benchmark) -> str:
    return f"{machine_text(record['hardware'])}."
