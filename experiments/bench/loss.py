"""The bounded joint loss against its rivals: time of a forward and backward, memory beside weights and gradients.

    python experiments/bench/loss.py            # against the dense loss (targets: 1/8 of its memory, 1.1 of its time)
    python experiments/bench/loss.py --large    # V = 128k in bfloat16, against all rivals (target: 2 GiB); for a GPU
    python experiments/bench/loss.py --growth   # the bounded loss alone, one dimension after the other

Rivals: the dense loss is `Joint` as everything else uses it (all logits, `log_prob`, autograd). The fused linear
cross-entropies of others (cut-cross-entropy, Liger) are called once per (component, position), or once for all rows.
Each row's loss needs a gradient of its own, its component's posterior, so `reduction="none"`. One record each. A rival
that fails, for want of memory, time or its package, stands in the record with the reason.

Letters: P positions, N horizon, R rank, M rows (component, position), V vocabulary, D width.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

import torch
import torch.nn.functional as F
from torch import Tensor

from cpdlm.bench.memory import most_alive
from cpdlm.bench.timers import Timer
from cpdlm.model.heads import FactorHeads, HeadsConfig
from cpdlm.model.losses import joint_nll
from cpdlm.training.flop_count import matmul_rate
from experiments.bench import fresh, record

SIDES = (
    *("bounded", "bounded, eager", "dense"),
    *("cut-cross-entropy", "cut-cross-entropy, filtered"),
    *("liger", "liger, all rows"),
)
DIMENSIONS = ("positions", "horizon", "rank", "vocab", "width")
ACCURACY = {"positions": 64, "horizon": 3, "rank": 2, "vocab": 4096, "width": 256}  # of the errors
MEMORY_TARGET, TIME_TARGET = 1 / 8, 1.1
LARGE_TARGET_GIB = 2.0
# What each comparison is made at, where the command line says nothing else.
SMALL = {"positions": 1024, "horizon": 4, "rank": 8, "vocab": 32768, "width": 512, "dtype": "float32", "chunk_mib": 32}
LARGE = SMALL | {"positions": 4096, "vocab": 128256, "width": 4096, "dtype": "bfloat16", "chunk_mib": 512}
GROWTH_CPU = SMALL | {"positions": 256, "vocab": 131072, "width": 64}
CHUNKS_MIB = (128, 1024)  # measured beside it
QUICK = "--positions 6 --vocab 40 --width 8 --rank 2 --horizon 3 --repeats 1"


# --- what is compared --------------------------------------------------------------------------------------------


class Case:
    """Weights and inputs of one size. The softmax is as peaked as a language model's: logits deviate by 4, not by 0.02.

    (cut-cross-entropy skips what a peaked softmax makes small; on a flat one it would skip all.)
    """

    def __init__(self, dimensions: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.positions, self.horizon, self.rank, vocab, width = (dimensions[name] for name in DIMENSIONS)
        with torch.device(device):
            self.heads = FactorHeads(width, vocab, HeadsConfig(self.rank, self.horizon, False)).to(dtype)
            self.table_VD = (torch.randn(vocab, width, dtype=dtype) * (4 / math.sqrt(width))).requires_grad_()
            self.hidden_PD = torch.randn(self.positions, width, dtype=dtype).requires_grad_()
            self.future_PN = torch.randint(vocab, (self.positions, self.horizon))

    def leaves(self) -> dict[str, Tensor]:
        return {"table": self.table_VD, "hidden": self.hidden_PD, **dict(self.heads.named_parameters())}

    def doubled(self) -> Case:
        """The same numbers in float64."""
        other = copy.copy(self)
        other.heads = copy.deepcopy(self.heads).double()
        other.table_VD, other.hidden_PD = (
            t.detach().double().requires_grad_() for t in (self.table_VD, self.hidden_PD)
        )
        return other

    def gradient_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves().values())


# --- the sides: mean joint NLL of a case -------------------------------------------------------------------------


Loss = Callable[[Case], Tensor]


def bounded(case: Case, chunk_mib: int) -> Tensor:
    weight_P = torch.full((case.positions,), 1 / case.positions, device=case.future_PN.device)
    return case.heads.nll(
        case.hidden_PD, case.future_PN, weight_P, case.table_VD, case.horizon, chunk_bytes=chunk_mib * 2**20
    )[0]


def dense(case: Case) -> Tensor:
    return -case.heads.joint(case.hidden_PD, case.table_VD).log_prob(case.future_PN).mean()


def fused(case: Case, row_nll: Callable[[Tensor, Tensor, Tensor], Tensor], at_once: bool) -> Tensor:
    """row_nll: (rows (M, D), table (V, D), tokens (M,)) -> nll (M,), once per (component, position) or for all."""
    maps = case.heads.maps["full"].split(case.hidden_PD.shape[-1])

    def rows(m: int) -> Tensor:
        return case.hidden_PD + F.linear(case.hidden_PD, maps[m])

    tokens = [case.future_PN[:, m // case.rank].contiguous() for m in range(len(maps))]
    if at_once:
        every = torch.cat([rows(m) for m in range(len(maps))])
        nll = row_nll(every, case.table_VD, torch.cat(tokens)).split(case.positions)
    else:
        nll = tuple(row_nll(rows(m), case.table_VD, tokens[m]) for m in range(len(maps)))
    nll_PR = torch.stack(nll, dim=-1).view(case.positions, case.horizon, case.rank).sum(dim=1)
    return -(case.heads.log_weights(case.hidden_PD) - nll_PR).logsumexp(dim=-1).mean()


def make(side: str, chunk_mib: int) -> Loss:
    """The side's loss; imports what it needs."""
    if side.startswith("bounded"):
        if side.endswith("eager"):
            joint_nll.can_compile = lambda: False  # type: ignore[assignment]
        return partial(bounded, chunk_mib=chunk_mib)
    if side == "dense":
        return dense
    name, _, way = side.partition(", ")
    if name == "liger":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        def row_nll(rows_MD: Tensor, table_VD: Tensor, tokens_M: Tensor) -> Tensor:
            return Liger.apply(rows_MD, table_VD, tokens_M, None, None, -100, 0.0, 0.0, "none")[0]
    else:
        from cut_cross_entropy import linear_cross_entropy

        def row_nll(rows_MD: Tensor, table_VD: Tensor, tokens_M: Tensor) -> Tensor:
            eps = "auto" if way == "filtered" else None
            return linear_cross_entropy(rows_MD, table_VD, tokens_M, reduction="none", filter_eps=eps)

    return partial(fused, row_nll=row_nll, at_once=way == "all rows")


# --- one measurement ---------------------------------------------------------------------------------------------


def measure(loss: Loss, case: Case, repeats: int) -> dict[str, Any]:
    """{"seconds", "peak_bytes", "loss", "repeats"}: peak beside weights, inputs and their gradients, of a run that is
    not timed, the first at full size, which compiles."""
    timer = Timer(case.hidden_PD.device)
    values: list[float] = []

    def run() -> None:
        for leaf in case.leaves().values():
            leaf.grad = None
        value = loss(case)
        value.backward()
        values.append(value.item())
        if not math.isfinite(values[-1]):
            raise RuntimeError(f"the loss is {values[-1]}")

    run()
    for leaf in case.leaves().values():
        leaf.grad = None
    peak = most_alive(run, timer.device) - case.gradient_bytes()
    runs = []
    for _ in range(repeats):
        began = timer.now()
        run()
        runs.append({"seconds": timer.now() - began, "peak_bytes": peak, "loss": values[-1]})
    return summary(runs)


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "loss": runs[0]["loss"],
        "repeats": runs,
    }


def errors(loss: Loss, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of the value and of each gradient, relative to its norm, against the dense loss in float64 on a small case."""
    case = Case(ACCURACY, dtype, device)
    value, exact = loss(case), dense(double := case.doubled())
    value.backward()
    exact.backward()
    found = {"value": abs(value.item() - exact.item()) / abs(exact.item())}
    for (name, mine), theirs in zip(case.leaves().items(), double.leaves().values(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        found[name] = float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm())
        if not math.isfinite(found[name]):
            raise RuntimeError(f"the gradient of {name} is not finite")
    return found


# --- the comparisons ---------------------------------------------------------------------------------------------


def _or_why_not(measurement: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Packages of others fail in ways of their own; whatever it is, the record says so."""
    try:
        return measurement(*arguments)
    except Exception as error:
        return {"failed": _reason(f"{type(error).__name__}: {error}")}


def side_of(side: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    loss = make(side, options.chunk_mib)
    case = Case(dimensions(options), dtype, device)
    found = measure(loss, case, options.repeats)
    if options.large and side == "bounded":
        others = [mib for mib in CHUNKS_MIB if mib != options.chunk_mib]
        found["chunks"] = {mib: _or_why_not(measure, make(side, mib), case, 1) for mib in others}
        found["products"] = matmul_rate(device, {"bfloat16": "bf16"}.get(options.dtype, "32"))
    if options.large:
        del case
        found["errors"] = _or_why_not(errors, loss, dtype, device)
    return found


def in_fresh_process(side: str, options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """What `side_of` finds there, or {"failed": why}: one that breaks takes no other with it."""
    settings = record.chosen(options, (*SMALL, "repeats", *(["threads"] if options.threads else []))) | changes
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [f"--{name}" for name in ("cpu", "large") if getattr(options, name)]
    try:
        line = fresh.run(side, [__file__, *words, "--side", side], limit=options.seconds)
        found: dict[str, Any] = json.loads(line)
    except fresh.Failed as error:
        found = {"failed": _reason(error.why)}
    at = " ".join(f"{name}={value}" for name, value in changes.items())
    record.say(f"{side:<28} {at:<16} {found.get('failed') or _measured(found)}")
    return found


def _measured(found: dict[str, Any]) -> str:
    mib = found["peak_bytes"] / 2**20
    return f"{found['seconds']:8.3f} s {mib:9.0f} MiB"


def _reason(text: str) -> str:
    return "out of memory" if "OutOfMemoryError" in text else text.strip()[:300]


def against_dense(options: argparse.Namespace) -> dict[str, Any]:
    """Repeats in fresh processes, by turns."""
    runs: dict[str, list[dict[str, Any]]] = {"bounded": [], "dense": []}
    for side in fresh.by_turns(runs, options.repeats):
        found = in_fresh_process(side, options, repeats=1)
        if "failed" in found:
            raise SystemExit(f"the {side} side failed: {found['failed']}")
        runs[side] += found["repeats"]
    sides = {side: summary(measured) for side, measured in runs.items()}
    assert math.isclose(sides["bounded"]["loss"], sides["dense"]["loss"], rel_tol=1e-4)
    ratios = {key: sides["bounded"][key] / sides["dense"][key] for key in ("peak_bytes", "seconds")}
    return {
        "sides": sides,
        "memory_ratio": _judged(ratios["peak_bytes"], MEMORY_TARGET),
        "time_ratio": _judged(ratios["seconds"], TIME_TARGET),
    }


def against_rivals(options: argparse.Namespace) -> dict[str, Any]:
    """Every side once; the dense loss also at the positions that fit."""
    sides = {side: in_fresh_process(side, options) for side in SIDES}
    few = max(1, options.positions // 32)
    products = 6 * options.positions * options.horizon * options.rank * options.vocab * options.width
    found = sides["bounded"]
    large: dict[str, Any] = {
        "sides": sides,
        "dense_at_few_positions": {"positions": few} | in_fresh_process("dense", options, positions=few),
        "products_flops": products,
    }
    if "failed" not in found:
        large["memory_gib"] = _judged(found["peak_bytes"] / 2**30, LARGE_TARGET_GIB)
        large["floor_seconds"] = products / found["products"]
    return large


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """The bounded loss at the base and with one dimension a half and a quarter of it: time and memory."""
    base = dimensions(options)
    cells = [base] + [
        base | {name: base[name] // share} for name in DIMENSIONS for share in (2, 4) if base[name] // share
    ]
    return {"cells": [cell | in_fresh_process("bounded", options, **cell) for cell in cells]}


def _judged(measured: float, target: float) -> dict[str, Any]:
    return {"measured": measured, "target": target, "holds": measured <= target}


def dimensions(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in DIMENSIONS}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = record.parser(__doc__)
    add = parser.add_argument
    add("--large", action="store_true", help="V = 128k in bfloat16, against every rival")
    add("--growth", action="store_true", help="the bounded loss alone, one dimension after the other")
    for name in DIMENSIONS:
        add(f"--{name}", type=int)
    add("--dtype", choices=("float32", "bfloat16"), help="of the states and the weights")
    add("--chunk-mib", type=int, help="bound on the logits alive at once (loss.chunk_mib)")
    add("--repeats", type=int, default=3, help="timed losses of each side")
    add("--seconds", type=int, default=600, help="what a process may take before it counts as failed")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = record.parse(parser, arguments, QUICK)
    options.on = "cpu" if record.device(options).type == "cpu" else "gpu"
    defaults = LARGE if options.large else SMALL
    if options.growth:
        defaults = GROWTH_CPU if options.on == "cpu" else LARGE
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.side:
        device, dtype = record.device(options), getattr(torch, options.dtype)
        print(json.dumps(_or_why_not(side_of, options.side, options, device, dtype)))
        return 0
    name, what, compare = ("", "head=shared, float32", against_dense)
    if options.large:
        name, what, compare = ("large", "large vocabulary", against_rivals)
    elif options.growth:
        name, what, compare = ("growth", "growth", growth)
    settings = record.chosen(options, ("repeats", "seconds"))
    found = record.begin(f"joint loss, {what}", "loss", arguments, settings)
    found |= compare(options) | {"dimensions": record.chosen(options, SMALL)}
    record.write(options, f"joint-loss-{'-'.join(filter(None, (name, options.on)))}", found)
    for key in ("memory_ratio", "time_ratio", "memory_gib"):
        if key in found:
            print(f"{key}: {found[key]['measured']:.3f} (target at most {found[key]['target']})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
