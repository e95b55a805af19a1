"""What more processes bring on one machine: bytes tokenised per second, and time of a training step, one record.

    python experiments/bench/processes.py [--quick] [--corpus code --tokenizers bytes bpe:8192 --processes 1 2 --size small ...]

Tokenising: 24 MB of the corpus, in pieces as a corpus is built, the start of the processes included; "threads" is one
process with the tokenizer's own threads. What comes before (comparing documents, which one process does) is timed as well.
Training: the command that a user types, same rows in every step; each process has cores / processes threads. A step's time
is the median of its run. Contenders take turns; medians over the repeats.
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from cpdlm.config import resolve

OUTPUT = ROOT / "results" / "benchmarks" / "processes.json"
QUICK = "--max-bytes 60000 --tokenizers bytes bpe:300 --size micro --steps 12 --context 32 --repeats 1"


def tokenise_once(options: argparse.Namespace, tokenizer_name: str, count: int, folder: Path) -> dict[str, float]:
    """Seconds of one pass over the train split with `count` processes, and its bytes."""
    from tqdm import tqdm

    from cpdlm.data import sources, tokens
    from cpdlm.data.tokenizer import build_tokenizer

    config = resolve({"corpus": options.corpus, "data.cache": options.cache, "data.max_bytes": options.max_bytes})
    texts = sources.locate(config, progress=False).read().texts
    if options.max_bytes:
        size = 0
        texts = [text for text in texts if (size := size + len(text)) <= options.max_bytes]
    tokenizer = build_tokenizer(tokenizer_name, texts, progress=False)
    pieces = tokens.plan(texts, {"train": list(range(len(texts)))}, folder)["train"]
    began = time.perf_counter()
    with tqdm(disable=True) as bar:
        tokens.tokenise(texts, pieces, tokenizer, count, bar)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": sum(piece.size for piece in pieces), "pieces": len(pieces)}


def compare_once(options: argparse.Namespace) -> dict[str, float]:
    """Seconds in which near-duplicates are found, and the bytes compared."""
    from cpdlm.data import sources
    from cpdlm.data.duplicates import clusters

    config = resolve({"corpus": options.corpus, "data.cache": options.cache, "data.max_bytes": options.max_bytes})
    texts = sources.locate(config, progress=False).read().texts
    began = time.perf_counter()
    clusters(texts, progress=False)
    return {"seconds": time.perf_counter() - began, "bytes": sum(map(len, texts))}


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


def in_fresh_process(arguments: list[str], task: list[str], threads: bool = False) -> dict[str, float]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true" if threads else "false"}
    command = [sys.executable, __file__, *arguments, "--task", *task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(task)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def one_task(options: argparse.Namespace) -> dict[str, float]:
    kind, *words = options.task
    if kind == "compare":
        return compare_once(options)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "tokenise":
            return tokenise_once(options, words[0], int(words[1]), Path(folder))
        return train_once(options, words[0], int(words[1]), Path(folder))


def tasks(options: argparse.Namespace) -> dict[str, list[str]]:
    """Label -> what a fresh process is told to do."""
    made = {"compare": ["compare"]}
    for name in options.tokenizers:
        made |= {f"tokenise {name} {count}": ["tokenise", name, str(count)] for count in options.processes}
        if name != "bytes":
            made[f"tokenise {name} threads"] = ["tokenise", name, "1"]
    for parallel in ("ddp", "fsdp"):
        made |= {f"train {parallel} {count}": ["train", parallel, str(count)] for count in options.processes}
    return made


def measure(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """The record."""
    import torch  # noqa: F401 - so that the hardware entry knows of threads and accelerator

    from experiments.provenance import provenance

    every, runs = tasks(options), dict[str, list[dict[str, float]]]()
    for repeat in range(options.repeats):
        for label in list(every) if repeat % 2 == 0 else reversed(every):
            found = in_fresh_process(arguments, every[label], threads=label.endswith("threads"))
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
        if "seconds" in cell:
            cell["bytes_per_second"] = cell["bytes"] / cell["seconds"]
        else:
            cell["tokens_per_second"] = 1000 * cell["tokens_per_step"] / cell["step_ms"]
    settings = {key: value for key, value in vars(options).items() if key not in ("task", "output", "cache", "quick")}
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
    parser.add_argument("--max-bytes", type=int, default=24_000_000, help="text to tokenise (0: all of the corpus)")
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "bpe:8192"])
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
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    if "--quick" in arguments:
        arguments = [*shlex.split(QUICK), *arguments]
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.task:
        print(json.dumps(one_task(options)))
        return 0
    from cpdlm.files import write_json

    record = measure(options, arguments)
    write_json(options.output, record)
    for label, cell in record["cells"].items():
        rate = cell.get("bytes_per_second")
        shown = f"{rate / 1e6:8.2f} MB/s" if rate else f"{cell['step_ms']:8.1f} ms per step"
        print(f"{label:<28} {shown}")
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
