"""Ways to decode a model on prompts that people know: one table of all records of `experiments/bench/tasks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cpdlm.bench.figure import figure_of
from cpdlm.bench.tasks import row
from cpdlm.benchmark import Measured
from experiments.report import benchmarks
from experiments.report.benchmarks import Benchmark
from experiments.report.table import Columns, Made, Table, recorded, tabulated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START = "tasks_"  # of the records' names


def tables(results: Path) -> list[Made]:
    """The table of all records."""
    return benchmarks.of_kind(results, "tasks", "tasks", tasks_table)


def tasks_table(*records: Benchmark) -> Table:
    """Ways to decode, on HumanEval, chats and articles."""
    columns: Columns = {
        "record": lambda entry: entry["record"],
        "task": lambda entry: entry["task"],
        "mode": lambda entry: entry["mode"],
        "method": lambda entry: entry["method"],
        "tokens per forward": recorded("tokens_per_forward", ".2f"),
        "accepted by depth": lambda entry: " / ".join(f"{each:.2f}" for each in row(entry)["accepted_by_depth"]) or "-",
        "speed-up": recorded("speedup", ".2f"),
        "speed-up over generate": recorded("speedup_over_generate", ".2f"),
        "tokens/s": recorded("tokens_per_second", ".1f"),
    }
    caption = (
        "Ways to decode a model: same weights, prompts and machine; a text ends where the model ends it. Accepted by "
        "depth: from the second token on, the share of drafts that are accepted where all before them are. 95% "
        f"intervals over prompts; those of speeds are the record's own. {' '.join(map(described, records))}"
    )
    entries = [entry | {"record": _name(record)} for record in records for entry in record["entries"]]
    return tabulated("tasks", caption, columns, entries)


def figure(record: Benchmark) -> Figure:
    return figure_of(record["entries"])


def described(record: Benchmark) -> str:
    return f"{_name(record)}: {Measured(record['entries'], record).caption}"


def _name(record: Benchmark) -> str:
    return str(record["name"]).removeprefix(START)
