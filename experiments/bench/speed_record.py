"""What the speed benchmark records of a group: speed-up, its limit, the floor of a forward, the targets; and its print.

The keys are those of the records on disk: a "pass" is a target forward, "plain" autoregressive decoding, "conversion"
the speed-up per token per forward, "shortlist" the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpdlm.bench.intervals import of_median as interval
from experiments.bench.speed_calls import Run

# rank -> least share of the limit, at horizon 4, batch 1, a trunk of 50M parameters or more, greedy and temperature 1
TARGETS = {1: 0.92, 8: 0.80}
LEAST_TRUNK = 50_000_000
GENERATE_TARGET, FLOOR_TARGET = 0.95, 1.05
COLUMNS = {
    "tok/forward": ("tokens_per_pass", 2),
    "t(1) ms": ("t1_ms", 2),
    "t(n) ms": ("tn_ms", 2),
    "draft ms": ("draft_ms", 2),
    "floor ms": ("floor_ms", 2),
    "forward ms": ("pass_ms", 2),
    "over floor": ("pass_over_floor", 3),
    "speed-up": ("speedup", 2),
    "per token": ("conversion", 3),
    "limit": ("limit", 3),
    "of limit": ("share_of_limit", 3),
    "ms/token": ("token_ms", 2),
    "tokens/s": ("tokens_per_second", 1),
}


def rate_entry(runs: Sequence[Run], batch: int) -> dict[str, Any]:
    """Latency per token of a row, throughput over all rows."""
    return {
        "token_ms": interval([run.token_seconds * 1e3 for run in runs]),
        "tokens_per_second": interval([batch / run.token_seconds for run in runs]),
    }


def speed_ratio(ours: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """Of each repeat: how many times as fast ours is."""
    return [other.token_seconds / our.token_seconds for our, other in zip(ours, others, strict=True)]


def cell_entry(
    autoregressive: Sequence[Run],
    ours: Sequence[Run],
    ones: Sequence[float],
    windows: Sequence[tuple[float, float]],
    batch: int,
) -> dict[str, Any]:
    """Of each repeat: both runs, t(1) in seconds, and (t(N), draft)."""
    speedups = speed_ratio(ours, autoregressive)
    per_forward = [run.tokens / run.forwards for run in ours]
    shares = [speedup / each for speedup, each in zip(speedups, per_forward, strict=True)]
    limits = [one / window for one, (window, _) in zip(ones, windows, strict=True)]
    floors = [window + draft for window, draft in windows]
    return {
        "tokens_per_pass": float(np.mean(per_forward)),
        "speedup": interval(speedups),
        "conversion": interval(shares),
        "limit": interval(limits),
        "share_of_limit": interval([share / limit for share, limit in zip(shares, limits, strict=True)]),
        "t1_ms": interval([one * 1e3 for one in ones]),
        "tn_ms": interval([window * 1e3 for window, _ in windows]),
        "draft_ms": interval([draft * 1e3 for _, draft in windows]),
        "floor_ms": interval([floor * 1e3 for floor in floors]),
        "pass_ms": interval([run.forward_seconds * 1e3 for run in ours]),
        "pass_over_floor": interval([run.forward_seconds / floor for run, floor in zip(ours, floors, strict=True)]),
        **rate_entry(ours, batch),
    }


def targets(measured: list[dict[str, Any]], trunk_parameters: int) -> list[dict[str, Any]]:
    """Every target: {"what", "cell", "measured", "target", "holds"}; of batches above 1 the floor's.

    Launched kernels on a GPU have none.
    """
    found = []

    def add(what: str, cell: str, value: float, target: float, holds: bool) -> None:
        found.append({"what": what, "cell": cell, "measured": value, "target": target, "holds": holds})

    captured = any(group.get("captured") for group in measured)
    for group in (group for group in measured if group.get("captured", False) == captured):
        alone = group["batch"] == 1
        where = f"{group['dtype']} {group['mode']}" + ("" if alone else f" batch {group['batch']}")
        if "plain_over_generate" in group:
            ratio = group["plain_over_generate"]["median"]
            add("plain over generate, at least", where, ratio, GENERATE_TARGET, ratio >= GENERATE_TARGET)
        for cell in group["cells"]:
            name = f"{where} r{cell['rank']} n{cell['horizon']} shortlist {cell['shortlist'] or 'none'}"
            least = TARGETS.get(cell["rank"])
            if alone and least is not None and cell["horizon"] == 4 and trunk_parameters >= LEAST_TRUNK:
                share = cell["share_of_limit"]["median"]
                add("conversion over its limit, at least", name, share, least, share >= least)
            over = cell["pass_over_floor"]["median"]
            add("pass over floor, at most", name, over, FLOOR_TARGET, over <= FLOOR_TARGET)
    return found


def table(record: dict[str, Any]) -> str:
    """The record for a terminal: medians."""
    lines = []
    for group in record["groups"]:
        rate, how = group["plain"], ", captured" if group["captured"] else ""
        text = (
            f"{group['dtype']}, {group['mode']}, batch {group['batch']}{how}: autoregressive "
            f"{rate['token_ms']['median']:.2f} ms/token, {rate['tokens_per_second']['median']:.1f} tokens/s"
        )
        if "generate" in group:
            text += f"; {group['plain_over_generate']['median']:.3f} times the speed of generate"
        lines += ["", text, " ".join(f"{title:>11}" for title in ("rank", "n", "draft vocab", *COLUMNS))]
        for cell in group["cells"]:
            values = [str(cell["rank"]), str(cell["horizon"]), str(cell["shortlist"] or "all")]
            for key, digits in COLUMNS.values():
                value = cell[key]["median"] if isinstance(cell[key], dict) else cell[key]
                values.append(f"{value:.{digits}f}")
            lines.append(" ".join(f"{value:>11}" for value in values))
    for each in record.get("compiled_generate", []):
        found = each.get("failure") or f"{each['plain_over_generate']['median']:.3f} times its speed"
        lines.append(f"{each['dtype']}: captured autoregressive decoding against compiled generate: {found}")
    missed = [target for target in record["targets"] if not target["holds"]]
    lines += ["", f"{len(record['targets']) - len(missed)} of {len(record['targets'])} targets hold"]
    lines += [f"missed: {m['what']} {m['target']}: {m['measured']:.3f} ({m['cell']})" for m in missed]
    return "\n".join(lines)
