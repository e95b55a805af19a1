"""How much of the tokens per forward becomes time: one table of all records of `experiments/bench/speed.py`, whatever
machine.

Left out with a line that says so where there is no record. As elsewhere, the same records give the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.records import machine_text
from experiments.report.benchmarks import Benchmark, made_of, read_benchmark
from experiments.report.table import Made, Table, title_of

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


def tables(root: Path) -> list[Made]:
    """The table of the records under root/benchmarks."""
    names = sorted(path.stem for path in (root / "benchmarks").glob("decode_speed*.json")) or ["decode_speed"]
    records: dict[str, Benchmark] = {}
    left_out: list[str] = []
    for name in names:
        record = read_benchmark(root, name)
        alone = record if isinstance(record, str) else made_of(name, speed_table, {name: record})
        if isinstance(record, str) or isinstance(alone, str):
            left_out.append(str(alone))
        else:
            records[name] = record
    made: Table | str = left_out[0] if not records else made_of("decode_speed*", speed_table, records)
    if isinstance(made, Table) and left_out:
        made = replace(made, caption=f"{made.caption} Left out: {'; '.join(left_out)}.")
    return [Made("speed", title_of(speed_table), made)]


def speed_table(records: dict[str, Benchmark]) -> Table:
    """Speed-up per token per forward against its limit, forwards against their floor, larger batches."""
    machines = _machines(records)
    captures = any(group.get("captured") for record in records.values() for group in record["groups"])
    rows = []
    for name, record in records.items():
        for group in record["groups"]:
            forwards = "captured" if group.get("captured") else "launched"
            start = (
                *([machines[name]] if len(records) > 1 else []),
                *([forwards] if captures else []),
                group["dtype"],
                group["mode"],
                str(group["batch"]),
            )
            rows += [(*start, *row) for row in _group(group)]
    described = [
        (f"{machines[name]}: " if len(records) > 1 else "") + _described(record) for name, record in records.items()
    ]
    header = (
        *(["machine"] if len(records) > 1 else []),
        *(["forwards"] if captures else []),
        "dtype",
        "mode",
        "batch",
        "rank",
        "n",
        "draft vocabulary",
        *MEASURED,
    )
    caption = (
        "How much of the tokens per forward becomes time. Weights are random and acceptance is forced: 0, 1, .. n-1 "
        "drafts are accepted in turn, and speed-ups are of this pattern alone; what carries over to trained heads is "
        "the speed-up per token per forward. Its limit: t(1)/t(n), t(k) being the target's time for k tokens behind "
        "a cached text, output layer included; the floor of a forward: t(n) and the draft measured alone. "
        "Autoregressive: decoding without drafts, what the speed-ups of its group are over; generate: Hugging Face's "
        "on the same weights. Draft vocabulary: tokens that drafts are made of (-: all). ms/token: latency of a row; "
        "tokens/s: of all rows of a batch. Medians of the repeats, share of limit with its 95% percentile bootstrap "
        f"interval over them, as recorded. {' '.join(described)}"
    )
    return Table("speed", caption, header, rows)


def _group(group: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Autoregressive decoding and generate, then the cells."""
    plain = group["plain"] | {"speedup": 1.0}
    yield ("autoregressive", "-", "-", *_values(plain))
    if "generate" in group:
        yield (
            "generate",
            "-",
            "-",
            *_values(group["generate"] | {"speedup": 1 / _middle(group["plain_over_generate"])}),
        )
    for cell in group["cells"]:
        shortlist = f"{cell['shortlist']:,}" if cell["shortlist"] else "-"
        yield (str(cell["rank"]), str(cell["horizon"]), shortlist, *_values(cell))


def _values(cell: dict[str, Any]) -> Iterator[str]:
    for key, digits in MEASURED.values():
        if key not in cell:
            yield "-"
            continue
        text = f"{_middle(cell[key]):,.{digits}f}"
        yield text + (
            f" [{cell[key]['low']:.{digits}f}, {cell[key]['high']:.{digits}f}]" if key == "share_of_limit" else ""
        )


def _middle(value: float | dict[str, float]) -> float:
    return value["median"] if isinstance(value, dict) else value


def _machines(records: dict[str, Benchmark]) -> dict[str, str]:
    """record -> what tells its machine from the others': the accelerator or the processor, and the record's name where
    needed."""
    hardware = {name: record["hardware"] for name, record in records.items()}
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
    for each in record.get("compiled_generate", []):
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
