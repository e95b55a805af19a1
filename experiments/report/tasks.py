"""Ways to decode a model on prompts that people know: the records of `experiments/bench/tasks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpdlm.bench.figure import figure_of
from cpdlm.bench.methods import AUTOREGRESSIVE, GENERATE, LLAMA
from cpdlm.bench.tasks import Entry, row
from cpdlm.benchmark import Measured
from experiments.records import counted, machine_text
from experiments.report import benchmarks
from experiments.report.benchmarks import Benchmark, read_benchmark
from experiments.report.table import Columns, Made, Table, dash, recorded, tabulated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START = "tasks_"  # of the records' names
HELD = ("tasks_smollm2", "tasks_smollm2_chat", "tasks_smollm2_prose")  # of the released heads, weights as they are
RATED = (*HELD, "tasks_int4")
COUNTED = ("tasks_counted", "tasks_counted_chat", "tasks_counted_prose")  # the same heads, counted alone
RIVALS = {
    GENERATE: "transformers",
    AUTOREGRESSIVE: "AR",
    "lookup": "prompt lookup",
    "branched": "heads",
    "lookup+branched": "lookup and heads",
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
        "depth: from the second token on, the share of drafts that are accepted where all before them are. For trees "
        "and branches it is too low: until 30 November 2026 places behind their leaves were counted as drafts. 95% "
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
        for task, mode in texts(record):
            entries = rivals(record, task, mode)
            rates = [row(entries[each])["tokens_per_second"] if each in entries else None for each in RIVALS]
            best = max(filter(None, rates), default=0)
            shown = [f"**{dash(rate, 0)}**" if rate == best else dash(rate, 0) for rate in rates]
            gain = recorded("speedup", ".2f")(entries.get("lookup+branched", {"speedup": None}))
            star = "" if _machine(record) == _machine(records[0]) else " *"
            lines.append(_line(f"{task}, {mode}, {_held(record)}{star}", *shown, gain))
    return "\n".join([*lines, "", _notes(records), *_elsewhere(results, records)]) if records else ""


def texts(record: Benchmark) -> list[tuple[str, str]]:
    """(task, mode) of a record, in its order."""
    return list(dict.fromkeys((entry["task"], entry["mode"]) for entry in record["entries"]))


def rivals(record: Benchmark, task: str, mode: str) -> dict[str, Entry]:
    """The entries by method; what was not run of the names with branches is the chain (or block) that they are of."""
    found = {each["method"]: each for each in record["entries"] if (each["task"], each["mode"]) == (task, mode)}
    for name in ("branched", "lookup+branched"):
        others = (found.get(name.replace("branched", kind)) for kind in ("block", "chain"))
        if other := next(filter(None, others), None):
            found.setdefault(name, other)
    return found


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _held(record: Benchmark) -> str:
    return str(record["dtype"] if record["weights"] in ("plain", "packed") else record["weights"])


def _notes(records: Sequence[Benchmark]) -> str:
    prompts = sorted({entry["prompts"] for record in records for entry in record["entries"]})
    longest = sorted({record["new_tokens"] for record in records})
    first, *others = dict.fromkeys(map(_machine, records))
    lines = [
        f"Tokens a second, SmolLM2-135M, {' or '.join(map(str, prompts))} prompts a text, at most "
        f"{' or '.join(map(str, longest))} new tokens; {first}{'; *: ' * bool(others)}{', '.join(others)}.",
        "transformers: its own `generate` without drafts. AR: our loop without drafts. Prompt lookup copies what "
        "followed the same tokens before.",
        "Bold: highest median. Brackets: 95% over prompts. int4: weights rounded, so another target.",
    ]
    return "\n".join([*lines, *filter(None, map(_llama, records))])


def _elsewhere(results: Path, records: Sequence[Benchmark]) -> list[str]:
    """What the first text's other records say: on other machines, with earlier heads or drafts."""
    task, found = records[0]["entries"][0]["task"], dict[str, list[float]]()
    for path in sorted((results / "benchmarks").glob(f"{HELD[0]}_*.json")):
        record = read_benchmark(results, path.stem)
        if isinstance(record, str) or record.get("batch") != 1 or record["dtype"] != records[0]["dtype"]:
            continue
        for each, mode in texts(record):
            entry = rivals(record, task, mode).get("lookup+branched")
            if each == task and entry and entry.get("speedup"):
                found.setdefault(mode, []).append(entry["speedup"]["median"])
    if not found:
        return []
    ranges = [f"{min(each):.2f}x to {max(each):.2f}x ({mode})" for mode, each in found.items()]
    count = max(map(len, found.values()))
    others = f"Other runs, machines and heads ({counted(count, 'record')})"
    return ["", f"{others}, over AR: {task} {', '.join(ranges)}."]


def _machine(record: Benchmark) -> str:
    return machine_text(record["hardware"])


def _llama(record: Benchmark) -> str:
    """What llama.cpp writes of the same file."""
    rates = [
        f"{row(entry)['tokens_per_second']:.0f} ({entry['mode']})"
        for entry in record["entries"]
        if entry["method"] == LLAMA
    ]
    return f"llama.cpp, same file and prompts as {record['weights']}, no drafts: {', '.join(rates)}." if rates else ""


def figure(record: Benchmark) -> Figure:
    return figure_of(record["entries"])


def described(record: Benchmark) -> str:
    return f"{_name(record)}: {Measured(record['entries'], record).caption}"


def _name(record: Benchmark) -> str:
    return str(record["name"]).removeprefix(START)
