"""Positions a second at which heads on a frozen model train, one record.

    python experiments/bench/training_rate.py [--quick] [--model smollm2 --corpus code --ranks 1 4 ...]

The command that a user types. Kept: the trunk's states come from the disk. Streamed: the trunk runs in each step.
preset=retrofit trains on a share of the positions, against the whole target; preset=many on all of a row's. On the way
from one to the other: `whole` has the whole target, `few` sees it as its likeliest tokens and the rest as one, and
`many` estimates the draft's normaliser as well. A step's time is the median of its run; contenders take turns; medians
over the repeats.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

from cpdlm.config import parse as settings_of
from experiments.bench import fresh, record

TARGETS = {
    "retrofit": ["preset=retrofit"],
    "whole": ["preset=retrofit,many", "loss.target_top=0", "loss.normaliser_tokens=0"],
    "few": ["preset=retrofit,many", "loss.normaliser_tokens=0"],
    "many": ["preset=retrofit,many"],
}
QUICK = "--ranks 1 --horizon 3 --steps 2 --context 32 --states 640 --repeats 1"
SETTINGS = ("model", "corpus", "ranks", "horizon", "context", "steps", "states", "train_bytes", "repeats")


def train_once(options: argparse.Namespace, states: str, target: str, rank: int) -> dict[str, float]:
    words = [
        *fresh.brief(options),
        f"model={options.model}",
        f"rank={rank}",
        f"horizon={options.horizon}",
        "train.validation_rows=1",
        "train.decode_prompts=0",
        "decode.prompts=1",
        *TARGETS[target],
        f"data.states={options.states if states == 'kept' else 0}",
    ]
    trained = fresh.train(f"{states}, {target}, rank {rank}", words)
    config = settings_of(words)
    positions = config.data.batch_rows * config.data.context * config.loss.joint_fraction
    return {
        "step_ms": trained["step_ms_median"],
        "positions_per_step": positions,
        "positions_per_second": 1000 * positions / trained["step_ms_median"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
    }


def measure(options: argparse.Namespace) -> record.Record:
    """cells: label -> what was measured of it."""
    tasks = {
        f"{states} {target} rank {rank}": (states, target, rank)
        for rank in options.ranks
        for states in ("kept", "streamed")
        for target in TARGETS
    }
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in tasks}
    for label in fresh.by_turns(tasks, options.repeats):
        runs[label].append(train_once(options, *tasks[label]))
        record.say(f"{label:<28} {runs[label][-1]['positions_per_second']:8,.0f} positions/s")
    cells = {}
    for label, each in runs.items():
        first = label.replace(tasks[label][1], "retrofit")
        gains = [
            run["positions_per_second"] / base["positions_per_second"]
            for run, base in zip(each, runs[first], strict=True)
        ]
        cells[label] = fresh.medians(each, each[0]) | {"repeats": each, "over_retrofit": fresh.spread(gains, "median")}
    return {"cells": cells}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = fresh.training_parser(__doc__)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--ranks", nargs="+", type=int, default=[1, 4])
    add("--horizon", type=int, default=4)
    add("--context", type=int, default=256)
    add("--steps", type=int, default=12)
    add("--states", type=int, default=32_768, help="tokens whose states are kept")
    return record.parse(parser, arguments, QUICK)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    found = record.run("training_rate", arguments, options, SETTINGS, measure)
    for label, cell in found["cells"].items():
        gain = cell["over_retrofit"]["median"]
        print(f"{label:<28} {cell['positions_per_second']:8,.0f} positions/s {gain:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
