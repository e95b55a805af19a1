"""How fast the command that a user types trains, one record each.

    python experiments/bench/training_rate.py processes [--processes 1 2 --size small ...]
    python experiments/bench/training_rate.py heads [--model smollm2 --ranks 1 4 ...]

processes: what more processes bring on one machine, on the same rows in every step. Each has cores / processes threads.
heads: positions a second at which heads on a frozen model train. Kept: the trunk's states come from the disk. Streamed:
the trunk runs in each step. preset=retrofit trains on a share of the positions, against the whole target; preset=many
on all of a row's. On the way from one to the other: `whole` has the whole target, `few` sees it as its likeliest tokens
and the rest as one, and `many` estimates the draft's normaliser as well.

A step's time is the median of its run; contenders take turns; medians over the repeats.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

from cpdlm.bench.hardware import hardware
from cpdlm.config import parse as settings_of
from experiments.bench import fresh, record

TARGETS = {
    "retrofit": ["preset=retrofit"],
    "whole": ["preset=retrofit,many", "loss.target_top=0", "loss.normaliser_tokens=0"],
    "few": ["preset=retrofit,many", "loss.normaliser_tokens=0"],
    "many": ["preset=retrofit,many"],
}
QUICK = "--size micro --ranks 1 --horizon 3 --steps 2 --context 32 --states 640 --repeats 1"
SETTINGS = {
    "processes": ("corpus", "processes", "size", "rows", "context", "steps", "train_bytes", "repeats"),
    "heads": ("model", "corpus", "ranks", "horizon", "context", "steps", "states", "train_bytes", "repeats"),
}
CONTEXT, STEPS = {"processes": 128, "heads": 256}, {"processes": 30, "heads": 12}
CORES: int = hardware()["cores"]
Contender = tuple[list[str], dict[str, str]]  # settings, and what is added to the environment


def processes(options: argparse.Namespace) -> dict[str, Contender]:
    words = [f"data.batch_rows={options.rows}", f"size={options.size}", "evaluate.rows=1"]
    words += [f"train.validation_rows={max(options.processes)}"]
    return {
        f"train {way} {count}": (
            [*words, f"parallel={way}", f"devices={count}"],
            {"OMP_NUM_THREADS": str(max(1, (options.threads or CORES) // count))},
        )
        for way in ("ddp", "fsdp")
        for count in options.processes
    }


def heads(options: argparse.Namespace) -> dict[str, Contender]:
    words = [f"model={options.model}", f"horizon={options.horizon}", "train.validation_rows=1"]
    words += ["train.decode_prompts=0", "decode.prompts=1"]
    return {
        f"{states} {target} rank {rank}": ([*words, f"rank={rank}", *TARGETS[target], f"data.states={kept}"], {})
        for rank in options.ranks
        for states, kept in (("kept", options.states), ("streamed", 0))
        for target in TARGETS
    }


def train_once(label: str, contender: Contender, options: argparse.Namespace) -> dict[str, float]:
    """tokens: that a step trains the window at."""
    own, environment = contender
    words = [
        f"corpus={options.corpus}",
        f"data.cache={options.cache}",
        f"data.max_bytes={options.train_bytes}",
        f"data.context={options.context}",
        f"optim.steps={options.steps}",
        "optim.warmup=1",
        f"train.validate_every={options.steps}",
        "decode.prompt_tokens=8",
        "decode.new_tokens=8",
        "tracking.mlflow=false",
        *own,
    ]
    trained, config = fresh.train(label, words, environment), settings_of(words)
    tokens = config.data.batch_rows * config.data.context * config.loss.joint_fraction
    found = {key: trained[key] for key in ("step_ms_median", "peak_memory_bytes")}
    step_ms = found.pop("step_ms_median")
    found |= {"step_ms": step_ms, "tokens_per_step": tokens, "tokens_per_second": 1000 * tokens / step_ms}
    record.say(f"{label:<28} {step_ms:8.1f} ms per step, {found['tokens_per_second']:8,.0f} tokens/s")
    return found


def measure(options: argparse.Namespace) -> record.Record:
    """cells: label -> what was measured of it; of heads, how many times as fast as preset=retrofit."""
    contenders = (processes if options.what == "processes" else heads)(options)
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in contenders}
    for label in fresh.by_turns(contenders, options.repeats):
        runs[label].append(train_once(label, contenders[label], options))
    cells: dict[str, dict[str, Any]] = {}
    for label, each in runs.items():
        medians = {key: statistics.median(run[key] for run in each) for key in each[0]}
        cells[label] = medians | {"repeats": each}
        if options.what == "heads":
            states, _, *rank = label.split()
            first = runs[" ".join([states, "retrofit", *rank])]
            gains = [
                run["tokens_per_second"] / base["tokens_per_second"] for run, base in zip(each, first, strict=True)
            ]
            cells[label]["over_retrofit"] = fresh.spread(gains, "median")
    return {"cells": cells}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = record.parser(__doc__)
    add = parser.add_argument
    add("what", choices=tuple(SETTINGS), help="the rate by number of processes, or of heads on a pretrained model")
    add("--corpus", default="code", help="that is trained on")
    add("--train-bytes", type=int, default=1_000_000, help="of the corpus")
    add("--repeats", type=int, default=3, help="timed runs of each")
    add("--cache", default=".cache/cpdlm", help="folder of prepared texts")
    add("--context", type=int, help="tokens of a row (default: 128; heads: 256)")
    add("--steps", type=int, help="of a run (default: 30; heads: 12)")
    add("--processes", nargs="+", type=int, default=sorted({1, 2, CORES}), help="numbers of processes")
    add("--size", default="small", help="processes: trunk of the training runs")
    add("--rows", type=int, default=4, help="processes: of a batch")
    add("--model", default="smollm2", help="heads: what they stand on")
    add("--ranks", nargs="+", type=int, default=[1, 4], help="of the heads")
    add("--horizon", type=int, default=4, help="of the heads")
    add("--states", type=int, default=32_768, help="heads: tokens whose states are kept")
    options = record.parse(parser, arguments, QUICK)
    options.context = options.context or CONTEXT[options.what]
    options.steps = options.steps or STEPS[options.what]
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    name = "processes" if options.what == "processes" else "training_rate"
    record.run(name, arguments, options, SETTINGS[options.what], measure, "training_rate")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
