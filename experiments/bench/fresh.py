"""Contenders in fresh processes, by turns: what a process holds or has warmed up reaches no other one."""

import json
import os
import signal
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


class Failed(SystemExit):
    """A process that failed, and why, in a line."""

    def __init__(self, what: str, why: str, said: str = "") -> None:
        super().__init__(f"{what}: {why}\n{said[-2000:]}".strip())
        self.why = why


def run(what: str, words: Sequence[str], environment: Mapping[str, str] | None = None, limit: float = LIMIT) -> str:
    """The last line that a Python process writes. Raises Failed, naming `what`, also after `limit` seconds."""
    try:
        done = subprocess.run(
            [sys.executable, *words],
            env=os.environ | dict(environment or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise Failed(what, f"not done in {limit} s") from None
    if done.returncode < 0:
        raise Failed(what, f"killed by {signal.Signals(-done.returncode).name}", done.stderr)
    if done.returncode:
        raise Failed(what, (done.stderr.strip().splitlines() or ["no word"])[-1], done.stderr)
    return (done.stdout.splitlines() or [""])[-1]


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
