"""Contenders in fresh processes, by turns: what a process holds or has warmed up reaches no other one."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.bench import record

LIMIT = 3600  # seconds of one process
Contender = TypeVar("Contender")


def by_turns(contenders: Iterable[Contender], repeats: int) -> Iterator[Contender]:
    """All of them `repeats` times, there and back, so that a machine that gets slower treats them alike."""
    order = list(contenders)
    for repeat in range(repeats):
        yield from order if repeat % 2 == 0 else order[::-1]


def run(what: str, words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The output of a Python process. Raises SystemExit, naming `what`, where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, *words],
            env=os.environ | dict(environment or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{what}: not done in {LIMIT} s") from None
    if done.returncode:
        raise SystemExit(f"{what}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return str(done.stdout)


def train(what: str, words: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the command that a user types says of its training."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(record.ROOT / "experiments" / "run.py")
        run(what, [script, *words, "name=run", f"output={folder}", "--stage=train"], environment)
        trained: dict[str, Any] = json.loads((Path(folder) / "run" / "train.json").read_text())
    return trained


def spread(values: Sequence[float], middle: str) -> dict[str, float]:
    """{"median" or "mean", "low", "high"}: middle, least and greatest."""
    return {middle: getattr(statistics, middle)(values), "low": min(values), "high": max(values)}


def medians(runs: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """The median of each key over the runs."""
    return {key: statistics.median(run[key] for run in runs) for key in keys}
