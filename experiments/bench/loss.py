"""The bounded joint loss against its rivals: time of a forward and backward pass, and memory beside weights and gradients.

    python experiments/bench/loss.py             # against the dense loss (targets: 1/8 of its memory, 1.1 times its time)
    python experiments/bench/loss.py --large     # V = 128k in bfloat16, against all rivals (target: 2 GiB); for a GPU
    python experiments/bench/loss.py --growth    # the bounded loss alone, one dimension after the other

Rivals: the dense loss is `Joint` as everything else uses it (all logits, `log_prob`, autograd). The fused linear
cross-entropies of others (cut-cross-entropy, Liger) are called once per (component, position), or once for all rows; each
row's loss needs a gradient of its own, its component's posterior, so `reduction="none"`. One record each. A rival that
fails, for want of memory, time or its package, stands in the record with the reason.

Letters: P positions, N horizon, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MEMORY_TARGET, TIME_TARGET = 1 / 8, 1.1
LARGE_TARGET_GIB = 2.0
SIDES = (
    "bounded",
    "bounded, eager",
    "dense",
    "cut-cross-entropy",
    "cut-cross-entropy, filtered",
    "liger",
    "liger, all rows",
)
# What the large comparison and the growth are made at, where the command line says nothing else.
DIMENSIONS = ("positions", "horizon", "rank", "vocab", "width")
SMALL = {"positions": 1024, "horizon": 4, "rank": 8, "vocab": 32768, "width": 512, "dtype": "float32", "chunk_mib": 32}
LARGE = SMALL | {"positions": 4096, "vocab": 128256, "width": 4096, "dtype": "bfloat16", "chunk_mib": 512}
GROWTH_CPU = SMALL | {"positions": 256, "vocab": 131072, "width": 64}
CHUNKS_MIB = (128, 1024)  # measured beside it
ACCURACY = {"positions": 64, "horizon": 3, "rank": 2, "vocab": 4096, "width": 256}  # against float64


class Case:
    """Weights and inputs of one size. The softmax is as peaked as a language model's: logits deviate by 4, not by 0.02.

    (cut-cross-entropy skips what a peaked softmax makes small; on a flat one it would skip all.)
    """

    def __init__(self, dimensions: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        import torch

        from cpdlm.model.heads import FactorHeads, HeadsConfig

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
        import copy

        other = copy.copy(self)
        other.heads = copy.deepcopy(self.heads).double()
        other.table_VD, other.hidden_PD = (
            t.detach().double().requires_grad_() for t in (self.table_VD, self.hidden_PD)
        )
        return other

    def gradient_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves().values())


# --- the sides: mean joint NLL of the first positions of a case -------------------------------------------------------


def bounded(case: Case, positions: int, chunk_mib: int) -> Tensor:
    import torch

    future_PN = case.future_PN[:positions]
    weight_P = torch.full((positions,), 1 / positions, device=future_PN.device)
    return case.heads.nll(
        case.hidden_PD[:positions],
        future_PN,
        weight_P,
        case.table_VD,
        case.horizon,
        chunk_mib * 2**20,
    )[0]


def dense(case: Case, positions: int) -> Tensor:
    return -case.heads.joint(case.hidden_PD[:positions], case.table_VD).log_prob(case.future_PN[:positions]).mean()


def fused(case: Case, positions: int, row_nll: Callable[[Tensor, Tensor, Tensor], Tensor], at_once: bool) -> Tensor:
    """row_nll: (rows (M, D), table (V, D), tokens (M,)) -> nll (M,), once per (component, position) or for all."""
    import torch
    import torch.nn.functional as F

    hidden_PD, width = case.hidden_PD[:positions], case.hidden_PD.shape[-1]
    maps = case.heads.maps["full"].split(width)

    def rows(m: int) -> Tensor:
        return hidden_PD + F.linear(hidden_PD, maps[m])

    tokens = [case.future_PN[:positions, m // case.rank].contiguous() for m in range(len(maps))]
    if at_once:
        nll = row_nll(torch.cat([rows(m) for m in range(len(maps))]), case.table_VD, torch.cat(tokens)).split(positions)
    else:
        nll = tuple(row_nll(rows(m), case.table_VD, tokens[m]) for m in range(len(maps)))
    nll_PR = torch.stack(nll, dim=-1).view(positions, case.horizon, case.rank).sum(dim=1)
    return -(case.heads.log_weights(hidden_PD) - nll_PR).logsumexp(dim=-1).mean()


def make(side: str, chunk_mib: int) -> Callable[[Case, int], Tensor]:
    """The side's loss (case, positions) -> mean NLL; imports what it needs."""
    if side.startswith("bounded"):
        if side.endswith("eager"):
            from cpdlm.model.losses import joint_nll

            joint_nll.can_compile = lambda: False  # type: ignore[assignment]
        return lambda case, positions: bounded(case, positions, chunk_mib)
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

    return lambda case, positions: fused(case, positions, row_nll, way == "all rows")


# --- one measurement --------------------------------------------------------------------------------------------------


def measure(loss: Callable[[Case, int], Tensor], case: Case, repeats: int) -> dict[str, Any]:
    """{"seconds", "cpu_seconds", "peak_bytes", "loss", "repeats"}: peak beside weights, inputs and one gradient of each.

    On a GPU after a pass at full size, which compiles; on the CPU, where freed memory stays the process's, after a pass over one
    position, and then the peak is the first pass's.
    """
    device = case.hidden_PD.device

    def one_forward(positions: int) -> float:
        for leaf in case.leaves().values():
            leaf.grad = None
        value = loss(case, positions)
        value.backward()
        if not math.isfinite(value.item()):
            raise RuntimeError(f"the loss is {value.item()}")
        return value.item()

    one_forward(case.positions if device.type == "cuda" else 1)
    runs = []
    for _ in range(repeats):
        for leaf in case.leaves().values():
            leaf.grad = None
        before = _reset_peak(device)
        began, began_cpu = time.perf_counter(), time.process_time()
        value = one_forward(case.positions)
        peak = _peak(device)  # waits for the GPU
        runs.append(
            {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - began_cpu,  # beside the wall clock, to see a busy machine
                "peak_bytes": peak - before - case.gradient_bytes(),
                "loss": value,
            }
        )
    return summary(runs)


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    middle = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
    return middle | {"peak_bytes": max(run["peak_bytes"] for run in runs), "loss": runs[0]["loss"], "repeats": runs}


def errors(loss: Callable[[Case, int], Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of the value and of each gradient, relative to its norm, against the dense loss in float64 on a small case."""
    case = Case(ACCURACY, dtype, device)
    value, exact = loss(case, case.positions), dense(double := case.doubled(), case.positions)
    value.backward()
    exact.backward()
    found = {"value": abs(value.item() - exact.item()) / abs(exact.item())}
    for (name, mine), theirs in zip(case.leaves().items(), double.leaves().values(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        found[name] = float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm())
        if not math.isfinite(found[name]):
            raise RuntimeError(f"the gradient of {name} is not finite")
    return found


def report(options: argparse.Namespace) -> None:
    """What a process measures of its sides: a line of JSON each, so that one that breaks takes no other with it."""
    import torch

    device = torch.device(options.on if options.on == "cpu" else "cuda")
    for side in options.sides:
        found = _or_why_not(side_of, side, options, device, getattr(torch, options.dtype))
        print(json.dumps({"side": side, **found}), flush=True)


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
        found["products"] = _products_rate(device, dtype)
    if options.large:
        del case
        found["errors"] = _or_why_not(errors, loss, dtype, device)
    return found


def _products_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product: what no loss here can exceed."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (left @ right)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def _reset_peak(device: torch.device) -> int:
    """Memory in use now, from which the peak counts (bytes)."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")
        return _status("VmRSS")
    return _peak(device)


def _peak(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


# --- records ----------------------------------------------------------------------------------------------------------


def in_fresh_process(sides: Sequence[str], options: argparse.Namespace, **changes: Any) -> dict[str, dict[str, Any]]:
    """What `report` finds there of each side, or {"failed": why}."""
    settings = {name: getattr(options, name) for name in (*SMALL, "repeats")} | changes
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [f"--{name}" for name in ("cpu", "large") if getattr(options, name)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(
                [sys.executable, __file__, *words, "--sides", *sides], stdout=out, stderr=err, timeout=options.seconds
            ).returncode
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else ""
        except subprocess.TimeoutExpired:
            why = f"not done in {options.seconds} s"
        out.seek(0), err.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines() if line.startswith('{"side"')]
        reached = {line.pop("side"): line for line in lines}
        found = {side: reached.get(side) or {"failed": why or _reason(err.read())} for side in sides}
    for side, each in found.items():
        in_vocabulary = each.get("failed") or (
            f"{each['seconds']:8.3f} s {each['cpu_seconds']:8.2f} s CPU {each['peak_bytes'] / 2**20:9.0f} MiB"
        )
        print(
            f"{side:<28} {' '.join(f'{k}={v}' for k, v in changes.items()):<16} {in_vocabulary}",
            file=sys.stderr,
            flush=True,
        )
    return found


def _reason(text: str) -> str:
    return "out of memory" if "OutOfMemoryError" in text else (text.strip().splitlines() or ["no word"])[-1][:300]


def against_dense(options: argparse.Namespace) -> dict[str, Any]:
    """Repeats in fresh processes, by turns."""
    runs: dict[str, list[dict[str, Any]]] = {"bounded": [], "dense": []}
    for repeat in range(options.repeats):
        for side in ("bounded", "dense") if repeat % 2 == 0 else ("dense", "bounded"):
            found = in_fresh_process([side], options, repeats=1)[side]
            if "failed" in found:
                raise SystemExit(f"the {side} side failed: {found['failed']}")
            runs[side] += found["repeats"]
    sides = {side: summary(measured) for side, measured in runs.items()}
    assert math.isclose(sides["bounded"]["loss"], sides["dense"]["loss"], rel_tol=1e-4)
    ratios = {key: sides["bounded"][key] / sides["dense"][key] for key in ("peak_bytes", "seconds")}
    return {
        "benchmark": "joint loss, head=shared, float32",
        "sides": sides,
        "memory_ratio": _judged(ratios["peak_bytes"], MEMORY_TARGET),
        "time_ratio": _judged(ratios["seconds"], TIME_TARGET),
    }


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Every side once; the dense loss also at the positions that fit. On a GPU, sides of one package share a process."""
    packages: tuple[Sequence[str], ...] = (SIDES[:3], SIDES[3:5], SIDES[5:])
    if options.on == "cpu":
        packages = tuple([side] for side in SIDES)
    sides = {side: found for package in packages for side, found in in_fresh_process(package, options).items()}
    few = max(1, options.positions // 32)
    products = 6 * options.positions * options.horizon * options.rank * options.vocab * options.width
    found = sides["bounded"]
    record: dict[str, Any] = {
        "benchmark": "joint loss, large vocabulary",
        "sides": sides,
        "dense_at_few_positions": {"positions": few} | in_fresh_process(["dense"], options, positions=few)["dense"],
        "products_flops": products,
    }
    if "failed" not in found:
        record["memory_gib"] = _judged(found["peak_bytes"] / 2**30, LARGE_TARGET_GIB)
        record["floor_seconds"] = products / found["products"]
    return record


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """The bounded loss at the base and with one dimension a half and a quarter of it: time and memory."""
    base = dimensions(options)
    cells = [base] + [
        base | {name: base[name] // share} for name in DIMENSIONS for share in (2, 4) if base[name] // share
    ]
    if options.on == "cpu":  # freed memory stays a process's, so each has its own
        return _grown([in_fresh_process(["bounded"], options, **cell)["bounded"] for cell in cells], cells)
    import torch

    dtype = getattr(torch, options.dtype)
    loss = make("bounded", options.chunk_mib)
    return _grown([measure(loss, Case(cell, dtype, torch.device("cuda")), options.repeats) for cell in cells], cells)


def _grown(found: list[dict[str, Any]], cells: list[dict[str, int]]) -> dict[str, Any]:
    return {
        "benchmark": "joint loss, growth",
        "cells": [{**cell, **each} for cell, each in zip(cells, found, strict=True)],
    }


def _judged(measured: float, target: float) -> dict[str, Any]:
    return {"measured": measured, "target": target, "holds": measured <= target}


def dimensions(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in DIMENSIONS}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true", help="V = 128k in bfloat16, against every rival")
    parser.add_argument("--growth", action="store_true", help="the bounded loss alone, one dimension after the other")
    for name in DIMENSIONS:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--chunk-mib", type=int, help="bound on the logits alive at once (loss.chunk_mib)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=600, help="what a process may take before it counts as failed")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU though there is a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks")
    parser.add_argument("--sides", choices=SIDES, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    on_cpu = options.cpu or not _has_gpu()
    defaults = LARGE if options.large else SMALL
    if options.growth:
        defaults = GROWTH_CPU if on_cpu else LARGE
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.on = "cpu" if on_cpu else "gpu"
    return options


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.sides:
        report(options)
        return 0
    from cpdlm.files import write_json
    from experiments.provenance import provenance

    name, compare = ("large", large) if options.large else ("growth", growth) if options.growth else ("", against_dense)
    record = compare(options) | {
        "command": shlex.join(["python", "experiments/bench/loss.py", *arguments]),
        **provenance(),
        "dimensions": {key: getattr(options, key) for key in SMALL},
    }
    path = options.output / f"joint-loss-{'-'.join(filter(None, (name, options.on)))}.json"
    write_json(path, record)
    for key in ("memory_ratio", "time_ratio", "memory_gib"):
        if key in record:
            print(f"{key}: {record[key]['measured']:.3f} (target at most {record[key]['target']})")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
