"""How much of the tokens per forward becomes time: one table of all records of `experiments/bench/speed.py`."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.records import machine_text
from experiments.report import benchmarks
from experiments.report.benchmarks import Benchmark
from experiments.report.table import Column, Columns, Made, Table, tabulated

# column -> (key of a cell, digits)
MEASURED = {
    "tokens per forward": ("tokens_per_pass", 2),
    "t(1) (ms)": ("t1_ms", 2),
    "t(n) (ms)": ("tn_ms", 2),
    "draft (ms)": ("draft_ms", 2),
    "floor (ms)": ("floor_ms", 2),
    "forward with draft (ms)": ("pass_ms", 2),
    "forward / floor": ("pass_over_floor", 3),
    "speed-up": ("speedup", 2),
    "speed-up per token per forward": ("conversion", 3),
    "limit": ("limit", 3),
    "share of limit": ("share_of_limit", 3),
    "ms/token": ("token_ms", 2),
    "tokens/s": ("tokens_per_second", 1),
}


def tables(results: Path) -> list[Made]:
    """The table of all records, whatever their machine."""
    return [
        *benchmarks.of_kind(results, "decode_speed", "speed", speed_table),
        *benchmarks.of_kind(results, "forwards", "forwards", forwards_table),
    ]


def forwards_table(*records: Benchmark) -> Table:
    """What a forward of a pretrained model costs by how its weights are held."""
    sizes = sorted({row["tokens"] for record in records for row in record["rows"]})
    columns: Columns = {
        "machine": lambda row: row["machine"],
        "precision": lambda row: row["dtype"],
        "weights": lambda row: row["weights"],
        **{f"{size} tokens (ms)": _forward(size) for size in sizes},
        "in linear maps": lambda row: f"{row['share']:.0%}",
        "memory's bound (ms)": lambda row: f"{row['read_ms']:.1f}",
        "prompt (ms)": lambda row: f"{row['prompt_ms']:.0f}",
    }
    rows = []
    for record in records:
        for weights, prompt_ms in record["prompt_ms"].items():
            own = [row for row in record["rows"] if row["weights"] == weights]
            share = sum(row["products_ms"] for row in own) / sum(row["ms"] for row in own)
            by_size = {row["tokens"]: row["ms"] for row in own}
            row = {"machine": machine_text(record["hardware"]), "dtype": record["dtype"], "weights": weights}
            rows.append(row | {"ms": by_size, "share": share, "read_ms": own[0]["read_ms"], "prompt_ms": prompt_ms})
    settings = [record["settings"] for record in records]
    prompts = "; ".join(
        f"{each['model']} in {record['dtype']}, behind {each['behind']} tokens, prompt of {each['prompt']}"
        for each, record in zip(settings, records, strict=True)
    )
    caption = (
        "A forward of a pretrained model with its logits, by tokens of the window and by how the weights are held "
        "(docs/speed-up.md). Memory's bound: reading the maps' weights once, at the rate of a copy in the same run. "
        f"Medians over turns. {prompts}."
    )
    return tabulated("forwards", caption, columns, rows)


def _forward(size: int) -> Column:
    return lambda row: f"{row['ms'][size]:.1f}" if size in row["ms"] else "-"


def speed_table(*records: Benchmark) -> Table:
    """Speed-up per token per forward against its limit, forwards against their floor, larger batches."""
    machines, groups = _machines(records), [group for record in records for group in record["groups"]]
    columns: Columns = {
        **({"machine": lambda row: row["machine"]} if len(records) > 1 else {}),
        **({"forwards": _forwards} if any(group["captured"] for group in groups) else {}),
        "dtype": lambda row: row["dtype"],
        "mode": lambda row: row["mode"],
        "batch": lambda row: str(row["batch"]),
        "rank": lambda row: str(row["rank"]),
        "n": lambda row: str(row["horizon"]),
        "draft vocabulary": lambda row: f"{row['shortlist']:,}" if row["shortlist"] else "-",
        **{name: _measured(key, digits) for name, (key, digits) in MEASURED.items()},
    }
    described = [
        (f"{machines[record['name']]}: " if len(records) > 1 else "") + _described(record) for record in records
    ]
    caption = (
        "How much of the tokens per forward becomes time. Weights are random and acceptance is forced: 0, 1, .. n-1 "
        "drafts are accepted in turn, and speed-ups are of this pattern alone; what carries over to trained heads is "
        "the speed-up per token per forward. Its limit: t(1)/t(n), t(k) being the target's time for k tokens behind "
        "a cached text, output layer included; the floor of a forward: t(n) and the draft measured alone. "
        "Autoregressive: decoding without drafts, what the speed-ups of its group are over; generate: Hugging Face's "
        "on the same weights. Draft vocabulary: tokens that drafts are made of (-: all). ms/token: latency of a row; "
        "tokens/s: of all rows of a batch. Medians of the repeats, share of limit with its 95% "
        f"interval over them, as recorded. {' '.join(described)}"
    )
    rows = [
        row | {"machine": machines[record["name"]]}
        for record in records
        for group in record["groups"]
        for row in _group(group)
    ]
    return tabulated("speed", caption, columns, rows)


def _forwards(row: dict[str, Any]) -> str:
    return "captured" if row["captured"] else "launched"


def _group(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Autoregressive decoding and generate, then the cells."""
    shared = {key: group[key] for key in ("captured", "dtype", "mode", "batch")}
    alone = shared | {"horizon": "-", "shortlist": 0}
    yield alone | {"rank": "autoregressive", "speedup": 1.0} | group["plain"]
    if "generate" in group:
        yield alone | {"rank": "generate", "speedup": 1 / _middle(group["plain_over_generate"])} | group["generate"]
    yield from (shared | cell for cell in group["cells"])


def _measured(key: str, digits: int) -> Column:
    def cell(row: dict[str, Any]) -> str:
        if key not in row:
            return "-"
        text = f"{_middle(row[key]):,.{digits}f}"
        ends = f" [{row[key]['low']:.{digits}f}, {row[key]['high']:.{digits}f}]" if key == "share_of_limit" else ""
        return text + ends

    return cell


def _middle(value: float | dict[str, float]) -> float:
    return value["median"] if isinstance(value, dict) else value


def _machines(records: Sequence[Benchmark]) -> dict[str, str]:
    """record -> what tells its machine from the others': the accelerator or the processor, and the record's name where
    needed."""
    hardware = {record["name"]: record["hardware"] for record in records}
    short = {
        name: str(each["processor"] if each["accelerator"] == "none" else each["accelerator"])
        for name, each in hardware.items()
    }
    alike = {label for label in short.values() if list(short.values()).count(label) > 1}
    return {name: f"{label} ({name})" if label in alike else label for name, label in short.items()}


def _described(record: Benchmark) -> str:
    settings = record["settings"]
    changes = " + changes" if record["dirty"] else ""
    maps = f"maps of rank {settings['map_rank']}" if settings["map_rank"] else "full maps"
    text = (
        f"{machine_text(record['hardware'])}; commit {record['commit'][:10]}{changes}; trunk {settings['size']} "
        f"({settings['trunk_parameters'] / 1e6:.1f}M parameters), V={settings['vocab']:,}, {maps}, prompts of "
        f"{settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones ({settings['batch_tokens']} in "
        f"batches), {settings['repeats']} repeats; {_held(record['targets'])}"
    )
    for each in record["compiled_generate"]:
        against = (
            f"is {_middle(each['plain_over_generate']):.2f} times as fast as"
            if "failure" not in each
            else f"could not be held against ({each['failure']})"
        )
        text += f"; captured autoregressive decoding in {each['dtype']} {against} generate compiled with a static cache"
    return f"{text}."


def _held(targets: Sequence[dict[str, Any]]) -> str:
    """How many targets hold, of all and of each kind."""
    kinds = sorted(targets, key=lambda target: (target["what"], target["target"]))
    parts = []
    for (what, target), group in itertools.groupby(kinds, key=lambda target: (target["what"], target["target"])):
        held = [each["holds"] for each in group]
        parts.append(f"{what} {target:g}: {sum(held)} of {len(held)}")
    return f"{sum(each['holds'] for each in targets)} of {len(targets)} targets hold ({'; '.join(parts)})"
