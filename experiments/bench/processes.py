"""What more processes bring on one machine: time of a training step, one record.

    python experiments/bench/processes.py [--quick] [--corpus code --processes 1 2 --size small ...]

The command that a user types trains on the same rows in every step. Each process has cores / processes threads. A
step's time is the median of its run. Contenders take turns; medians over the repeats.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

from experiments.bench import fresh, record

QUICK = "--size micro --steps 12 --context 32 --repeats 1"
SETTINGS = ("corpus", "processes", "size", "rows", "context", "steps", "train_bytes", "repeats")


def train_once(options: argparse.Namespace, parallel: str, count: int) -> dict[str, float]:
    """The step times of a run with `count` processes."""
    words = [
        *fresh.brief(options),
        f"data.batch_rows={options.rows}",
        f"size={options.size}",
        f"train.validation_rows={max(options.processes)}",
        "evaluate.rows=1",
        f"parallel={parallel}",
        f"devices={count}",
    ]
    threads = max(1, (options.threads or cores()) // count)
    trained = fresh.train(f"{parallel} with {count} processes", words, {"OMP_NUM_THREADS": str(threads)})
    return {
        "step_ms": trained["step_ms_median"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "tokens_per_step": options.rows * options.context,
        "threads_each": threads,
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(options: argparse.Namespace) -> record.Record:
    """cells: label -> what was measured of so many processes that share the training in this way."""
    tasks = {f"train {way} {count}": (way, count) for way in ("ddp", "fsdp") for count in options.processes}
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in tasks}
    for label in fresh.by_turns(tasks, options.repeats):
        found = train_once(options, *tasks[label])
        runs[label].append(found)
        record.say(f"{label:<28} " + ", ".join(f"{key} {value:,.1f}" for key, value in found.items()))
    cells = {}
    for label, each in runs.items():
        cell = fresh.medians(each, each[0])
        rate = 1000 * cell["tokens_per_step"] / cell["step_ms"]
        cells[label] = cell | {"repeats": each, "tokens_per_second": rate}
    return {"cells": cells}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = fresh.training_parser(__doc__)
    add = parser.add_argument
    add("--processes", nargs="+", type=int, default=sorted({1, 2, cores()}))
    add("--size", default="small", help="trunk of the training runs")
    add("--rows", type=int, default=4)
    add("--context", type=int, default=128)
    add("--steps", type=int, default=30)
    return record.parse(parser, arguments, QUICK)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    found = record.run("processes", arguments, options, SETTINGS, measure)
    for label, cell in found["cells"].items():
        print(f"{label:<28} {cell['step_ms']:8.1f} ms per step")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
