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
from experiments.families import Family
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
    """Which kinds of machine. Older records do not say which instructions they have."""
    every = [record["hardware"] for record in records] + _decoded_on(records)
    kinds = {each["processor"] if each["accelerator"] == "none" else each["accelerator"] for each in every}
    return " and ".join(sorted(kind.replace("(R)", "") for kind in kinds)) or "no machine"


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
    """What the best of each kind of drafter gains on the model that all of them were measured on."""
    record = read_benchmark(results, "decode_baselines")
    if isinstance(record, str):
        return ""
    kinds = {"lookup": "prompt lookup", "hydra": "sequential heads (as Hydra's)", "heads": "ours"}
    best = {name: [_best(record, kind, mode) for mode in MODES] for kind, name in kinds.items()}
    parts = [f"{name} {greedy:.2f}x / {sampling:.2f}x" for name, (greedy, sampling) in best.items()]
    target, prompts = record["targets"][0], record["settings"]["timed_prompts"]
    size = f"{target['parameters'] / 1e6:.1f}M {target['corpus']} model"
    return f"{size} over AR, greedy / sampling, best of each on {prompts} prompts: {', '.join(parts)}. EAGLE: not done."


def _best(record: Benchmark, kind: str, mode: str) -> float:
    return max(each["modes"][mode]["speedup"]["mean"] for each in record["methods"] if each["kind"] == kind)


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
    """Greedy texts that differ from those of `generate`, rank 1 on pretrained models, by precision."""
    counts: dict[str, tuple[int, int]] = {}
    for record in (each for family in families if family.is_pretrained for each in family.records()):
        found = (record.mode("greedy") or {}).get("other_than_generate")
        if record.rank == 1 and found:
            differing, of = counts.get(dtype := record.config["model"]["dtype"], (0, 0))
            counts[dtype] = differing + found["prompts"], of + found["of"]
    shown = [f"{differing} of {of} in {dtype}" for dtype, (differing, of) in sorted(counts.items())]
    return f"Greedy texts that differ from transformers' at near-ties (rounding), C6: {', '.join(shown)}." * bool(shown)


def _gpu(results: Path, families: Sequence[Family]) -> str:
    """Whether any decoding was timed on a GPU, by a cell or by a benchmark."""
    machines = _decoded_on([record for family in families for record in family.records()])
    for path in sorted((results / "benchmarks").glob("[dt]*.json")):  # decode_, tasks_
        record = read_benchmark(results, path.stem)
        machines += [] if isinstance(record, str) or "hardware" not in record else [record["hardware"]]
    return "" if any(each["accelerator"] != "none" for each in machines) else "No decoding was timed on a GPU."
