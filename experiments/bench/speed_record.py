"""What the speed benchmark records of a group: speed-up, its limit, the floor of a forward, the targets.

The keys are those of the records on disk: a "pass" is a target forward, "plain" autoregressive decoding, "conversion"
the speed-up per token per forward, "shortlist" the draft vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpdlm.bench.intervals import of_median as interval
from experiments.bench.speed_calls import Run

# rank -> least share of the limit, at horizon 4, batch 1, a trunk of 50M parameters or more, greedy and temperature 1
TARGETS = {1: 0.92, 8: 0.80}
LEAST_TRUNK = 50_000_000
GENERATE_TARGET, FLOOR_TARGET = 0.95, 1.05


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
    """Every target: {"what", "cell", "measured", "target", "holds"}; of batches above 1 the floor's."""
    found = []

    def add(what: str, cell: str, value: float, target: float, holds: bool) -> None:
        found.append({"what": what, "cell": cell, "measured": value, "target": target, "holds": holds})

    for group in measured:
        alone = group["batch"] == 1
        where = f"{group['dtype']} {group['mode']}" + ("" if alone else f" batch {group['batch']}")
        if "plain_over_generate" in group:
            ratio = group["plain_over_generate"]["median"]
            add("AR over generate, at least", where, ratio, GENERATE_TARGET, ratio >= GENERATE_TARGET)
        for cell in group["cells"]:
            name = f"{where} r{cell['rank']} n{cell['horizon']} draft vocabulary {cell['shortlist'] or 'none'}"
            least = TARGETS.get(cell["rank"])
            if alone and least is not None and cell["horizon"] == 4 and trunk_parameters >= LEAST_TRUNK:
                share = cell["share_of_limit"]["median"]
                add("speed-up per token per forward over its limit, at least", name, share, least, share >= least)
            over = cell["pass_over_floor"]["median"]
            add("forward over floor, at most", name, over, FLOOR_TARGET, over <= FLOOR_TARGET)
    return found
