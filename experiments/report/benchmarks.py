"""Records of `experiments/bench/`, read in one place: what each is of, what makes it, its tables and its figure."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cpdlm.bench.intervals import of_ratio
from experiments.report.table import Made, Table, title_of
from experiments.schema import check_kind
from experiments.stats import Sample, contrast

Benchmark = dict[str, Any]
Result = TypeVar("Result")
# What code raises on content that is not as it expects.
ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_WORDS = {  # of older records
    "anchored": "token-conditioned",
    "shortlist": "draft vocabulary",
    "plain over generate": "AR over generate",
    "conversion over its limit": "speed-up per token per forward over its limit",
    "pass over floor": "forward over floor",
}
# name of the record -> (what its `benchmark` begins with, what makes it)
KINDS = {
    "decode_acceptance": ("decoding acceptance", "experiments/bench/decode.py"),
    "decode_strategies": ("decoding strategies", "experiments/bench/decode.py"),
    "decode_sparse": ("decoding sparse", "experiments/bench/decode.py --active 1 2 4 --only sparse"),
    "decode_baselines": ("decoding baselines", "experiments/bench/decode.py"),
    "decode_speed": ("decoding speed", "experiments/bench/speed.py"),
    "joint-loss-cpu": ("", "experiments/bench/loss.py --cpu"),
    "joint-loss-large-gpu": ("", "experiments/bench/loss.py --large"),
    "joint-loss-growth-gpu": ("", "experiments/bench/loss.py --growth"),
    "joint-loss-growth-cpu": ("", "experiments/bench/loss.py --growth --cpu"),
    "training_overhead": ("", "experiments/bench/overhead.py time"),
    "training_recipes": ("", "experiments/bench/overhead.py gain"),
    "near_ties": ("near ties", "experiments/bench/near_ties.py smollm2"),
    "byte_counts": ("byte counts", "experiments/bench/byte_counts.py corpus=code data.release=2"),
    "processes": ("", "experiments/bench/training_rate.py processes"),
    "training_rate": ("", "experiments/bench/training_rate.py heads"),
    "forwards": ("forwards", "experiments/bench/forwards.py"),
    "sample": ("sample", "experiments/bench/sample.py"),
    "tasks": ("tasks", "experiments/bench/tasks.py smollm2 --name smollm2"),
}


def read_benchmark(results: Path, name: str) -> Benchmark | str:
    """The record results/benchmarks/NAME.json, or why there is none and what makes it."""
    return read_file(results / "benchmarks" / f"{name}.json")


def read_file(path: Path) -> Benchmark | str:
    """The record at `path`, or why there is none and what makes it.

    Its name may be longer than that of its kind: decode_speed_avx2 is of decode_speed.
    """
    name = path.stem
    kind, maker = next(found for start, found in sorted(KINDS.items(), reverse=True) if name.startswith(start))
    if not path.is_file():
        return f"no record benchmarks/{path.name} (python {maker} makes it)"
    try:
        record: Benchmark = json.loads(path.read_bytes())
        check_kind(record, {}, "the record")
    except (OSError, RecursionError, ValueError) as error:  # RecordError is a ValueError
        return f"benchmarks/{path.name} is damaged ({error}); make it again with {maker}"
    if kind and not str(record.get("benchmark")).startswith(kind):
        return f"benchmarks/{path.name} is not a record of {kind!r}; {maker} makes one"
    found = made_of(name, upgrade, record)
    return found if isinstance(found, str) else {"name": name} | found


def upgrade(record: Benchmark) -> Benchmark:
    """A record of any version as `experiments/bench/` writes it now; intervals of counts are made anew over prompts."""
    for part in _parts(record):
        part.update({key: _in_words(value) for key, value in part.items() if isinstance(value, str)})
    for method in record["methods"] if record.get("benchmark") == "decoding baselines" else ():
        method["name"] = "AR" if method["name"] == "plain" else method["name"]
    record.get("dimensions", {}).setdefault("dtype", "float32")
    record.setdefault("compiled_generate", [])
    record.setdefault("batch", 1)
    for part in _parts(record):
        if "per_prompt" in part:
            part["tokens_per_pass"] = of_ratio(*_counts(part))
        elif part.get("forwards") and "tokens_per_forward" in part:
            part["tokens_per_forward"] = of_ratio(part["tokens"], part["forwards"]) if record["batch"] == 1 else None
    cells = record["cells"] if record.get("benchmark") == "decoding strategies" else []
    for modes in (mode for cell in cells for mode in cell["modes"].values()):
        for splits in (each for each in modes.values() if isinstance(each, dict)):
            for split, row in splits.items():
                row["tokens_per_pass_over_chain"] = _gain(row, modes["chain"][split])
    found = {(_heads(row), row["rank"], row["strategy"]): row for row in record.get("strategies", [])}
    for (heads, rank, drafter), row in found.items():
        chain, one = found.get((heads, rank, "chain")), found.get((heads, 1, drafter)) or found.get((heads, 1, "chain"))
        for name, other in (("chain", chain), ("rank1", one)):
            if other is not None and other is not row:
                row[f"tokens_per_pass_over_{name}"] = _gain(row, other)
    return record


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary in it."""
    if isinstance(content, dict):
        yield content
    for each in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _parts(each)


def _in_words(text: str) -> str:
    """Variants, recipes and targets by their present names."""
    return ", ".join(_WORDS.get(part, part) for part in text.split(", "))


def _heads(row: dict[str, Any]) -> tuple[str, ...]:
    return row["mode"], row["corpus"], row["law"]


def _counts(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    return row["per_prompt"]["tokens"], row["per_prompt"]["passes"]


def _gain(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    gain = contrast([(Sample.ratio(*_counts(row)), Sample.ratio(*_counts(other)))])
    return {key: getattr(gain, key) for key in ("mean", "low", "high")}


def made_of(name: str, make: Callable[..., Result], *given: Any) -> Result | str:
    """What `make` makes of records of benchmarks or, where their content is not as it expects, why there is nothing.

    name: of the record or records, for the reason. One odd record takes its own table or figure out, not the report.
    """
    try:
        return make(*given)
    except ODD as error:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        return f"benchmarks/{name}.json has content that cannot be shown ({said}); make it again"


def tables(results: Path, wanted: Mapping[str, tuple[Callable[..., Table], tuple[str, ...]]]) -> list[Made]:
    """wanted: name of a table -> (what makes it, the records that it is made of)."""
    made = []
    for name, (make, names) in wanted.items():
        records = [read_benchmark(results, each) for each in names]
        missing = [record for record in records if isinstance(record, str)]
        table = missing[0] if missing else made_of(" or ".join(names), make, *records)
        made.append(Made(name, title_of(make), table if isinstance(table, str) else replace(table, name=name)))
    return made


def of_kind(results: Path, kind: str, title: str, make: Callable[..., Table]) -> list[Made]:
    """One table of all records whose name begins with that of their kind. An odd one is named in the caption."""
    names = sorted(path.stem for path in (results / "benchmarks").glob(f"{kind}*.json")) or [kind]
    each = {name: tables(results, {title: (make, (name,))})[0].table for name in names}
    whole = tuple(name for name, table in each.items() if isinstance(table, Table))
    odd = [table for table in each.values() if isinstance(table, str)]
    made = tables(results, {title: (make, whole or (names[0],))})
    if isinstance(table := made[0].table, Table) and odd:
        made = [replace(made[0], table=replace(table, caption=f"{table.caption} Left out: {'; '.join(odd)}."))]
    return made
