"""What README.md and docs/reproducing.md say about results: blocks between markers, generated from the records.

`<!-- claims:begin -->` to `<!-- claims:end -->` is a row per claim, `rates` tokens a second of the released heads,
`sceptic` what a sceptical reader asks first, `training` how far C1's models are trained, `reruns` another group's
numbers beside ours, `carried` the cells that answers rest on, `compute` what the records took.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpdlm.bench.tasks import row
from cpdlm.files import write_bytes
from experiments.claims import Verdict, answers
from experiments.families import Cells, Family
from experiments.records import MODES, Record, RecordError, counted
from experiments.report.benchmarks import ODD, Benchmark, read_benchmark
from experiments.report.reproducing import carried_table, compute_table, reruns_table, training_table
from experiments.report.tasks import COUNTED, rates_block

ALL_ROWS = "paper_figures/tables/claims.md"


def blocks(
    results: Path, records: Sequence[Record], families: Sequence[Family], verdicts: Sequence[Verdict]
) -> dict[str, str]:
    """Name -> Markdown of every block that a page may have."""
    return {
        "claims": claims_block(families, verdicts),
        "rates": _unless_odd(rates_block, results),
        "sceptic": sceptic_block(results, families, verdicts),
        "training": _unless_odd(lambda there: training_table(there, families, verdicts), results),
        "reruns": reruns_table(families),
        "carried": carried_table(records, verdicts),
        "compute": compute_table(records, verdicts),
    }


def _unless_odd(make: Callable[[Path], str], results: Path) -> str:
    """What `make` says of records of benchmarks; "" where one of them is not as it expects."""
    try:
        return make(results)
    except ODD:
        return ""


def update(path: Path, made: dict[str, str]) -> list[str]:
    """Fill the blocks of `path`; returns the names of those that it has. RecordError where a marker is torn off."""
    text, found = path.read_text(encoding="utf-8"), []
    for name, block in made.items():
        begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
        if begin not in text and end not in text:
            continue
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        if text.count(begin) != 1 or text.count(end) != 1 or end not in rest:
            raise RecordError(
                f"{path}: the {name} block must be one {begin} line followed by one {end} line; mend it by hand"
            )
        if path.parent.name == "docs":
            block = block.replace("](paper_figures", "](../paper_figures")
        text = f"{before}{begin}\n{block}\n{end}{after}"
        found.append(name)
    if found:
        write_bytes(path, text.encode())
    return found


def claims_block(families: Sequence[Family], verdicts: Sequence[Verdict]) -> str:
    """A row per claim, and a line on what it rests on."""
    rows = [
        f"| {each.claim.id} | {each.claim.question} | {each.answer} | {each.number} |" for each in answers(verdicts)
    ]
    used = {path for verdict in verdicts for path in verdict.records}
    records = [record for family in families for record in family.records() if record.path in used]
    line = (
        f"From {counted(len(records), 'record')} on {_machines(records)}. Brackets: 90 to 99% intervals. "
        f"Every setting, rule and record: [{ALL_ROWS}]({ALL_ROWS})."
    )
    return "\n".join(["| | question | answer | number |", "| --- | --- | --- | --- |", *rows, "", line])


def _machines(records: Sequence[Record]) -> str:
    """How many kinds of machine, and which."""
    every = [record["hardware"] for record in records] + _decoded_on(records)
    kinds = {each["processor"] if each["accelerator"] == "none" else each["accelerator"] for each in every}
    named = "; ".join(sorted(kind.replace("(R)", "") for kind in kinds))
    return f"{counted(len(kinds), 'kind')} of machine ({named})" if kinds else "no machine"


def _decoded_on(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [record["decoding"]["origin"]["hardware"] for record in records if record["decoding"]]


def sceptic_block(results: Path, families: Sequence[Family], verdicts: Sequence[Verdict]) -> str:
    """A bullet per line, each of at most 200 characters; one whose records are missing is left out."""
    lines = [
        _equal_time(verdicts),
        _other_heads(verdicts),
        _unless_odd(_lookup, results),
        _unless_odd(_released, results),
        _near_ties(families),
        _gpu(results, families),
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _equal_time(verdicts: Sequence[Verdict]) -> str:
    """What is left of C1 where rank 1 trains for as long as rank 8."""
    found = [
        each for each in verdicts if each.claim.id == "C1" and each.beside and "equal training time" in each.setting
    ]
    if not found:
        return ""
    (joint, *_), (first, *_) = found[0].numbers, found[0].beside
    return (
        f"C1 at equal training time: {joint.interval.mean:+.2f} nats remain, and rank 8 is {first.interval.mean:.2f} "
        "nats worse on the first token."
    )


def _other_heads(verdicts: Sequence[Verdict]) -> str:
    """C6 with drafts of the paper's kind, and without bf16 instructions."""
    rows = [each for each in verdicts if each.claim.name == "C6 heads" and each.numbers]
    blind = [each.numbers[0].short() for each in rows if "untied" in each.setting]
    slow = [each.numbers[0].interval.mean for each in rows if "C6-float32/" in each.records[0]]
    if not blind or not slow:
        return ""
    return (
        f"C6 with the paper's drafts, which see only h_t, and less training: {blind[0]}. In float32, "
        f"without bf16 instructions, on an older decoder: {min(slow):.2f}x to {max(slow):.2f}x."
    )


def _lookup(results: Path) -> str:
    """What prompt lookup and heads gain on the model that all drafters were measured on."""
    record = read_benchmark(results, "decode_baselines")
    if isinstance(record, str):
        return ""
    parts = []
    for mode in MODES:
        best = [_best(record, kind, mode) for kind in ("lookup", "heads")]
        if None in best:
            return ""
        parts.append(f"{mode} {best[0]:.2f}x and {best[1]:.2f}x")
    target = record["targets"][0]
    size = f"{target['parameters'] / 1e6:.1f}M {target['corpus']} model"
    return f"On the {size} over AR, prompt lookup and heads (not C4's): {'; '.join(parts)}."


def _best(record: Benchmark, kind: str, mode: str) -> float | None:
    speeds = [each["modes"][mode]["speedup"]["mean"] for each in record["methods"] if each["kind"] == kind]
    return max(speeds, default=None)


def _pretrained(families: Sequence[Family], folder: str, rank: int, variant: str) -> Cells:
    for family in families:
        cells = family.cells.get((variant, rank), {})
        if family.is_pretrained and cells and all(Path(r.path).parent.name == folder for r in cells.values()):
            return cells
    return {}


def _released(results: Path) -> str:
    """What the heads that `cpdlm/released/` holds draft, from the records of `experiments/bench/tasks.py`."""
    found: dict[str, dict[str, str]] = {}
    for name in COUNTED:
        record = read_benchmark(results, name)
        for entry in [] if isinstance(record, str) else record["entries"]:
            if entry["method"] == "chain":
                found.setdefault(entry["task"], {})[entry["mode"]] = f"{row(entry)['tokens_per_forward']:.2f}"
    if not found:
        return ""
    counts = "; ".join(f"{task} {each.get('greedy', '-')} / {each.get('T=1', '-')}" for task, each in found.items())
    return f"Tokens per forward of the released heads alone (chain), greedy / T = 1: {counts}."


def _near_ties(families: Sequence[Family]) -> str:
    """Greedy texts that differ from those of `generate`, rank 1 on SmolLM2, by precision."""
    shown = []
    for folder in ("C6", "C6-float32"):
        cells = _pretrained(families, folder, 1, "token-conditioned")
        found = [mode["other_than_generate"] for each in cells.values() if (mode := each.mode("greedy"))]
        if not found or None in found:
            return ""
        differing, of = (sum(one[key] for one in found) for key in ("prompts", "of"))
        shown.append(f"{differing} of {of} in {next(iter(cells.values())).config['model']['dtype']}")
    return (
        f"Greedy texts that differ from transformers' at near-ties (rounding, see below), SmolLM2: {', '.join(shown)}."
    )


def _gpu(results: Path, families: Sequence[Family]) -> str:
    """Whether any decoding was timed on a GPU, by a cell or by a benchmark."""
    machines = _decoded_on([record for family in families for record in family.records()])
    for path in sorted((results / "benchmarks").glob("[dt]*.json")):  # decode_, tasks_
        record = read_benchmark(results, path.stem)
        machines += [] if isinstance(record, str) or "hardware" not in record else [record["hardware"]]
    return "" if any(each["accelerator"] != "none" for each in machines) else "No decoding was timed on a GPU."
