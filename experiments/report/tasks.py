"""Ways to decode a model on prompts that people know: the records of `experiments/bench/tasks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpdlm.bench.figure import figure_of
from cpdlm.bench.methods import AUTOREGRESSIVE, GENERATE, LLAMA
from cpdlm.bench.tasks import row
from cpdlm.benchmark import Measured
from experiments.records import machine_text
from experiments.report import benchmarks
from experiments.report.benchmarks import Benchmark, read_benchmark
from experiments.report.table import Columns, Made, Table, dash, recorded, tabulated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START = "tasks_"  # of the records' names
HELD = ("tasks_smollm2", "tasks_smollm2_chat", "tasks_smollm2_prose")  # of the released heads, weights as they are
RATED = (*HELD, "tasks_int4")
RIVALS = {
    AUTOREGRESSIVE: "AR",
    "lookup": "prompt lookup",
    "branched": "heads",
    "lookup+branched": "lookup and heads",
    GENERATE: "`generate`",
    LLAMA: "llama.cpp, no drafts",
}


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


def rates_block(results: Path) -> str:
    """Markdown: tokens a second of the released heads and their rivals; the last column has an interval."""
    records = [record for name in RATED if not isinstance(record := read_benchmark(results, name), str)]
    lines = [
        _line("text, mode, weights", *RIVALS.values(), "lookup and heads / AR (x)"),
        "|---|" + "---:|" * (len(RIVALS) + 1),
    ]
    for record in records:
        for task, mode in dict.fromkeys((each["task"], each["mode"]) for each in record["entries"]):
            found = {e["method"]: row(e) for e in record["entries"] if (e["task"], e["mode"]) == (task, mode)}
            for each in ("branched", "lookup+branched"):  # where nothing is sampled, a chain
                others = (found.get(each.replace("branched", kind)) for kind in ("block", "chain"))
                found.setdefault(each, next((other for other in others if other), {}))
            rates = [dash(found.get(each, {}).get("tokens_per_second"), 0) for each in RIVALS]
            gain = recorded("speedup", ".2f")(found["lookup+branched"])
            lines.append(_line(f"{task}, {mode}, {_held(record)}", *rates, gain))
    return "\n".join([*lines, "", _machine(records)]) if records else ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _held(record: Benchmark) -> str:
    return str(record["dtype"] if record["weights"] in ("plain", "packed") else record["weights"])


def _machine(records: Sequence[Benchmark]) -> str:
    prompts = sorted({entry["prompts"] for record in records for entry in record["entries"]})
    return (
        f"Tokens a second, SmolLM2-135M, {' or '.join(map(str, prompts))} prompts a text, at most "
        f"{records[0]['new_tokens']} new tokens; {machine_text(records[0]['hardware'])}.\n"
        "AR is our loop without drafts. `generate` is transformers' loop, on weights as they were loaded.\n"
        "-: not measured. Brackets: 95% over prompts."
    )


def figure(record: Benchmark) -> Figure:
    return figure_of(record["entries"])


def described(record: Benchmark) -> str:
    return f"{_name(record)}: {Measured(record['entries'], record).caption}"


def _name(record: Benchmark) -> str:
    return str(record["name"]).removeprefix(START)
