"""One form for every benchmark's record: how it begins and is written, and the options that all benchmarks share.

`experiments.report.benchmarks` reads the records.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cpdlm.files import check_writable, write_json
from experiments.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


def parser(about: str | None) -> argparse.ArgumentParser:
    """With the shared options. about: the benchmark's docstring, of which the first line is shown."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    made.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks", help="folder of the records")
    made.add_argument("--cpu", action="store_true", help="measure on the CPU though there is a GPU")
    made.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: PyTorch's own choice)")
    made.add_argument("--quick", action="store_true", help="a run of seconds that measures nothing, in runs/quick")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str], quick: str) -> argparse.Namespace:
    """The options. quick: the words that --quick stands for; those of the command line are stronger."""
    options = made.parse_args(arguments)
    if options.quick:  # a record that measures nothing takes no real one's place
        output = str(ROOT / "runs" / "quick")
        options = made.parse_args([*quick.split(), "--output", output, *arguments])
    return options


def device(options: argparse.Namespace) -> torch.device:
    """Where to measure; on the CPU --threads is applied."""
    if torch.cuda.is_available() and not options.cpu:
        return torch.device("cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device("cpu")


def settle(options: argparse.Namespace) -> None:
    """--cpu and --threads for what chooses its device by itself, here and in the processes that are started."""
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)


def begin(benchmark: str, script: str, arguments: Sequence[str], settings: dict[str, Any], seed: int = 0) -> Record:
    """What every record begins with: what it measures, the command, commit, machine, versions, seed and settings."""
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", f"experiments/bench/{script}.py", *arguments]),
        **provenance(),
        "seed": seed,
        "settings": settings,
    }


def chosen(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """These options by name, for the settings of a record."""
    return {name: getattr(options, name) for name in names}


def write(options: argparse.Namespace, name: str, record: Record) -> None:
    """The whole file OUTPUT/NAME.json."""
    check_writable(options.output)
    path = options.output / f"{name}.json"
    write_json(path, record)
    say(f"record: {path}")


def run(
    name: str,
    arguments: Sequence[str],
    options: argparse.Namespace,
    names: Iterable[str],
    measure: Callable[[argparse.Namespace], Record],
    script: str = "",
) -> Record:
    """Measures and writes the record NAME, which is returned. names: the options that are its settings.

    script: whose name is another."""
    settle(options)
    settings, seed = chosen(options, names), getattr(options, "seed", 0)
    record = begin(name.replace("_", " "), script or name, arguments, settings, seed) | measure(options)
    write(options, name, record)
    return record


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
