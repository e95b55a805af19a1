"""What more processes bring on one machine: time of a training step, one record.

    python experiments/bench/processes.py [--quick] [--corpus code --processes 1 2 --size small ...]

The command that a user types trains on the same rows in every step. Each process has cores / processes threads. A
step's time is the median of its run. Contenders take turns; medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

OUTPUT = ROOT / "results" / "benchmarks" / "processes.json"
QUICK = "--size micro --steps 12 --context 32 --repeats 1"


def train_once(options: argparse.Namespace, parallel: str, count: int, folder: Path) -> dict[str, float]:
    """The step times of a run with `count` processes."""
    words = [
        f"corpus={options.corpus}",
        f"data.cache={options.cache}",
        f"data.max_bytes={options.train_bytes}",
        f"data.context={options.context}",
        f"data.batch_rows={options.rows}",
        f"size={options.size}",
        f"optim.steps={options.steps}",
        "optim.warmup=1",
        f"train.validate_every={options.steps}",
        f"train.validation_rows={max(options.processes)}",
        "evaluate.rows=1",
        "decode.prompt_tokens=8",
        "decode.new_tokens=8",
        "tracking.mlflow=false",
        f"parallel={parallel}",
        f"devices={count}",
        f"output={folder}",
        "name=run",
    ]
    threads = max(1, cores() // count)
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "run.py"), *words, "--stage=train"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{parallel} with {count} processes ended with {done.returncode}\n{done.stderr[-2000:]}")
    trained = json.loads((folder / "run" / "train.json").read_text())
    return {
        "step_ms": trained["step_ms_median"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "tokens_per_step": options.rows * options.context,
        "threads_each": threads,
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tasks(options: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """Label -> how the processes share the training, and how many there are."""
    return {f"train {way} {count}": (way, count) for way in ("ddp", "fsdp") for count in options.processes}


def measure(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """The record."""
    import torch  # noqa: F401 - so that the hardware entry knows of threads and accelerator

    from experiments.provenance import provenance

    every, runs = tasks(options), dict[str, list[dict[str, float]]]()
    for repeat in range(options.repeats):
        for label in list(every) if repeat % 2 == 0 else reversed(every):
            with tempfile.TemporaryDirectory() as folder:
                found = train_once(options, *every[label], Path(folder))
            runs.setdefault(label, []).append(found)
            print(f"{label:<28} " + ", ".join(f"{key} {value:,.1f}" for key, value in found.items()), file=sys.stderr)
    cells: dict[str, dict[str, Any]] = {
        label: {
            **{key: statistics.median(run[key] for run in runs[label]) for key in runs[label][0]},
            "repeats": runs[label],
        }
        for label in every
    }
    for cell in cells.values():
        cell["tokens_per_second"] = 1000 * cell["tokens_per_step"] / cell["step_ms"]
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "cache", "quick")}
    return {
        "benchmark": "processes",
        "command": shlex.join(["python", "experiments/bench/processes.py", *arguments]),
        **provenance(),
        "settings": settings,
        "cells": cells,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", default="code")
    parser.add_argument("--processes", nargs="+", type=int, default=sorted({1, 2, cores()}))
    parser.add_argument("--size", default="small", help="trunk of the training runs")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--train-bytes", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", default=".cache/cpdlm")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quick", action="store_true", help="seconds, measures nothing")
    if "--quick" in arguments:
        arguments = [*shlex.split(QUICK), *arguments]
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from cpdlm.files import write_json

    record = measure(options, arguments)
    write_json(options.output, record)
    for label, cell in record["cells"].items():
        print(f"{label:<28} {cell['step_ms']:8.1f} ms per step")
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
