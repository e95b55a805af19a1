"""The sides that the loss benchmark compares, and what is measured of one: time, memory, errors against float64.

Letters: P positions, N horizon, R rank, M rows (component, position), V vocabulary, D width.
"""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpdlm.model.heads import FactorHeads, HeadsConfig
from cpdlm.model.losses import joint_nll
from experiments.bench.fresh import medians

SIDES = (
    *("bounded", "bounded, eager", "dense"),
    *("cut-cross-entropy", "cut-cross-entropy, filtered"),
    *("liger", "liger, all rows"),
)
DIMENSIONS = ("positions", "horizon", "rank", "vocab", "width")
ACCURACY = {"positions": 64, "horizon": 3, "rank": 2, "vocab": 4096, "width": 256}  # of the errors


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


# --- the sides: mean joint NLL of the first positions of a case --------------------------------------------------


def bounded(case: Case, positions: int, chunk_mib: int) -> Tensor:
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


# --- one measurement ---------------------------------------------------------------------------------------------


def measure(loss: Callable[[Case, int], Tensor], case: Case, repeats: int) -> dict[str, Any]:
    """{"seconds", "cpu_seconds", "peak_bytes", "loss", "repeats"}: peak beside weights, inputs and their gradients.

    On a GPU after a run at full size, which compiles. On the CPU freed memory stays the process's: there after a run
    over one position, and the peak is that of the first run at full size.
    """
    device = case.hidden_PD.device

    def one_run(positions: int) -> float:
        for leaf in case.leaves().values():
            leaf.grad = None
        value = loss(case, positions)
        value.backward()
        if not math.isfinite(value.item()):
            raise RuntimeError(f"the loss is {value.item()}")
        return value.item()

    one_run(case.positions if device.type == "cuda" else 1)
    runs = []
    for _ in range(repeats):
        for leaf in case.leaves().values():
            leaf.grad = None
        before = _reset_peak(device)
        began, began_cpu = time.perf_counter(), time.process_time()
        value = one_run(case.positions)
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
    middle = medians(runs, ("seconds", "cpu_seconds"))
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


def _reset_peak(device: torch.device) -> int:
    """Memory in use now, from which the peak counts (bytes)."""
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
