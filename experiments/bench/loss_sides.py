"""The sides that the loss benchmark compares, and what is measured of one: time, memory, errors against float64.

Letters: P positions, N horizon, R rank, M rows (component, position), V vocabulary, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpdlm.bench.memory import most_alive
from cpdlm.bench.timers import Timer
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
    peak = max(run["peak_bytes"] for run in runs)
    return medians(runs, ("seconds",)) | {"peak_bytes": peak, "loss": runs[0]["loss"], "repeats": runs}


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
