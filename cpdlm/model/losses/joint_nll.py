"""Negative log-likelihood of the joint in memory that does not grow with R * N * V times the batch.

The dense way holds a logit for every (position, component, token). Here logits are formed for a few positions at a
time and, since the gradient of the loss with respect to them is known in closed form, turned into gradients at once:

    nll_p           = -logsumexp_a [ log w_pa + sum_s log p_pa^(s)(y_ps) ]
    d nll_p / d z   =  P(a at s | y_p) (softmax(z) - onehot(y_ps))      for the logits z of row (p, s, a)
    d nll_p / d log w_pa = -P(a at 1 | y_p)

that is, ordinary cross-entropy per (component, position) row, weighted by the component's posterior at that position.
For an HMM these are the posteriors of its states; autograd finds them from N x R numbers a position. `backward` only
scales what `forward` accumulated by the incoming gradient. The module that owns the weights calls this inside its own
forward, so that FSDP2 has gathered them and tied weights are in one place.

Three products with the unembedding are the work: logits, gradient of the rows, gradient of the unembedding. What lives
beside weights and gradients is one chunk of logits, in the type of the products, which becomes its own gradient in
place. On a GPU the function that needs float32 inside is compiled, so that no float32 logits exist.

Letters: P positions (a batch of time steps, flattened), C positions in a chunk, N factors, R rank, V vocabulary,
D width, M = C * N * R rows of logits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton

from cpdlm.model.joint import log_likelihood

# inputs_CX, first factor, map parameters -> rows: what the unembedding multiplies. Pure, differentiable by autograd.
Features = Callable[..., Tensor]

# As many partial sums are kept in a parameter's own type (a bfloat16 gradient then errs by half a per cent), no more.
MOST_SUMS = 64


class Gate(NamedTuple):
    """log_weights: (P, R), normalised. log_transitions: (P, N-1, R, R) of an HMM, normalised, or None."""

    log_weights: Tensor
    log_transitions: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [each for each in self if each is not None]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Gate:
        """The reverse of `tensors`."""
        return Gate(*tensors)

    def log_likelihood(self, seen_CNR: Tensor) -> Tensor:
        """(C,) of tokens of which each component has the log-probability seen_CNR."""
        return log_likelihood(self.log_weights, seen_CNR, self.log_transitions)

    def posteriors(self, seen_CNR: Tensor) -> list[Tensor]:
        """Gradients of the log-likelihood by that of each token, by the weights and by the transitions: the posteriors
        of each component at each position, at the first one, and of each pair of components."""
        with torch.enable_grad():
            seen_CNR, *gate = leaves = [each.detach().requires_grad_() for each in (seen_CNR, *self.tensors)]
            return list(torch.autograd.grad(Gate.of(gate).log_likelihood(seen_CNR).sum(), leaves))


def joint_nll(
    hidden_PD: Tensor,
    gate_P: Gate,
    future_PN: Tensor,
    weight_P: Tensor,
    unembedding: Tensor,
    features: Features,
    parameters: tuple[Tensor, ...] = (),
    chunk_bytes: int = 32 * 2**20,
) -> tuple[Tensor, Tensor]:
    """sum_p weight_p nll_p, and nll_P in nats (detached).

    hidden_PD: what the factors see, of any width.  future_PN: token ids, -1 for a token that does not exist, whose
    factors are 1.  weight_P: weight of each position (no gradient).
    unembedding: (V, D) shared by all rows, or (N, R, V, D).  features(hidden_CD, 0, *parameters) -> rows (C*N*R, D) for
    a shared unembedding, or (C, D) for separate ones; given n and the n-th part of each parameter, those of factor n.
    chunk_bytes: bound on the logits alive at once.
    """
    assert not weight_P.requires_grad, "position weights carry no gradient"
    # Inside `forward` gradients are always off and `needs_input_grad` ignores no_grad: ask here.
    learns = torch.is_grad_enabled()
    total, nll_P = _JointNLL.apply(
        features, chunk_bytes, learns, hidden_PD, *gate_P, future_PN, weight_P, unembedding, *parameters
    )
    return total, nll_P


@dataclass(frozen=True)
class _Plan:
    """How a batch is worked through.

    exact: type of sums. fast: type of the products. chunk: positions at a time. groups: into how many parts, one per
    factor, the maps are split.
    """

    exact: torch.dtype
    fast: torch.dtype
    exponentials: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    chunk: int
    groups: int

    @staticmethod
    def of(
        hidden_PD: Tensor, unembedding: Tensor, horizon: int, rank: int, parameters: Sequence[Tensor], chunk_bytes: int
    ) -> _Plan:
        exact, device = torch.promote_types(hidden_PD.dtype, torch.float32), hidden_PD.device.type
        fast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else unembedding.dtype
        compiled = device == "cuda" and can_compile()
        # Outside the compiled function, float32 copies of a chunk exist.
        logit_bytes = torch.finfo(fast if compiled else exact).bits // 8
        chunk = max(1, chunk_bytes // max(1, horizon * rank * unembedding.shape[-2] * logit_bytes))
        chunk -= chunk % 64 if chunk > 64 else 0  # whole tiles
        # The maps of one factor at a time where the gradient of all would take more than a chunk of logits.
        groups = horizon if sum(p.numel() * p.element_size() for p in parameters) > chunk_bytes else 1
        return _Plan(exact, fast, _compiled_exponentials() if compiled else exponentials_, chunk, groups)


class _Gradients:
    """What each chunk adds to, in a parameter's own type or, where there are many chunks, in an exact one."""

    def __init__(
        self,
        plan: _Plan,
        hidden_PD: Tensor,
        gate_P: Sequence[Tensor],
        unembedding: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> None:
        few = len(hidden_PD) <= MOST_SUMS * plan.chunk

        def new_sum(parameter: Tensor) -> Tensor:
            return torch.zeros_like(parameter, dtype=parameter.dtype if few else plan.exact)

        self.groups = plan.groups
        self.hidden_PD = torch.zeros_like(hidden_PD)
        self.gate_P = [torch.zeros_like(each, dtype=plan.exact) for each in gate_P]
        # A frozen trunk's unembedding learns nothing: a third of the work is not done.
        self.unembedding = new_sum(unembedding) if unembedding is not None else None
        self.parameters = [new_sum(parameter) for parameter in parameters]

    def add(
        self,
        part: slice,
        hidden_CD: Tensor,
        leaves: list[list[Tensor]],
        rows: list[Tensor],
        grad_rows: list[Tensor],
    ) -> None:
        """Through the maps: from the rows of each group to the hidden states and the group's parameters."""
        for group, (made, grad) in enumerate(zip(rows, grad_rows, strict=True)):
            wanted = [hidden_CD, *(parts[group] for parts in leaves)]
            grad_hidden_CD, *grads = torch.autograd.grad(made, wanted, grad.to(made.dtype))
            self.hidden_PD[part] += grad_hidden_CD
            for total, each in zip(self.parameters, grads, strict=True):
                total.chunk(self.groups)[group].add_(each)


class _JointNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Features,
        chunk_bytes: int,
        learns: bool,
        hidden_PD: Tensor,
        log_weights_PR: Tensor,
        log_transitions_PNRR: Tensor | None,
        future_PN: Tensor,
        weight_P: Tensor,
        unembedding: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gate_P = Gate(log_weights_PR, log_transitions_PNRR).tensors
        (positions, horizon), rank, (vocab, width) = future_PN.shape, log_weights_PR.shape[-1], unembedding.shape[-2:]
        plan = _Plan.of(hidden_PD, unembedding, horizon, rank, parameters, chunk_bytes)
        learns = learns and any(ctx.needs_input_grad)
        table_VD = unembedding.reshape(-1, width).to(plan.fast)
        scale = _scale_of(weight_P, plan.exact)
        scaled_P = weight_P.to(plan.exact) / scale
        nll_P = torch.empty(positions, dtype=plan.exact, device=hidden_PD.device)
        grads = None
        if learns:
            grads = _Gradients(plan, hidden_PD, gate_P, unembedding if ctx.needs_input_grad[8] else None, parameters)
        leaves = [[part.requires_grad_(learns) for part in p.detach().chunk(plan.groups)] for p in parameters]
        for start in range(0, positions, plan.chunk):
            part = slice(start, min(start + plan.chunk, positions))
            hidden_CD, future_CN = hidden_PD[part].detach().requires_grad_(learns), future_PN[part]
            with torch.set_grad_enabled(learns):
                rows = [features(hidden_CD, group, *(each[group] for each in leaves)) for group in range(plan.groups)]
            rows_MD = _interleaved([each.detach() for each in rows], len(hidden_CD)).to(plan.fast)
            # One buffer holds the logits, then their exponentials, then the gradient of the logits.
            buffer_MV = (rows_MD @ table_VD.T).view(-1, vocab)
            index_M1 = future_CN.clamp(min=0).unsqueeze(-1).expand(-1, -1, rank).reshape(-1, 1)
            log_prob_M1, total_M1 = plan.exponentials(buffer_MV, index_M1)
            here_CN1 = (future_CN >= 0).unsqueeze(-1)
            log_prob_CNR = log_prob_M1.view(-1, horizon, rank).masked_fill(~here_CN1, 0.0)
            gate_C = Gate.of([each[part].to(plan.exact) for each in gate_P])
            nll_P[part] = -gate_C.log_likelihood(log_prob_CNR)
            if grads is None:
                continue
            pull_CNR, *pull_gate_C = gate_C.posteriors(log_prob_CNR)
            for total, pull_C in zip(grads.gate_P, pull_gate_C, strict=True):
                total[part] = -pull_C * scaled_P[part].view(-1, *[1] * (pull_C.dim() - 1))
            pull_M1 = (scaled_P[part, None, None] * pull_CNR * here_CN1).view(-1, 1)
            buffer_MV.mul_(pull_M1 / total_M1)
            buffer_MV.scatter_(-1, index_M1, (pull_M1 * log_prob_M1.expm1()).to(plan.fast))
            grad_logits = buffer_MV.view(len(rows_MD), -1)
            if grads.unembedding is not None:
                _add_product(grads.unembedding.view(-1, width), grad_logits, rows_MD)
            grad_rows = _separated(grad_logits @ table_VD, plan.groups, len(hidden_CD))
            del buffer_MV, grad_logits
            grads.add(part, hidden_CD, leaves, rows, grad_rows)
        if grads is not None:
            gate_grads = (*grads.gate_P, None)[:2]
            ctx.grads = [grads.hidden_PD, *gate_grads, None, None, grads.unembedding, *grads.parameters]
            given = (hidden_PD, log_weights_PR, log_weights_PR, future_PN, weight_P, unembedding, *parameters)
            ctx.scale, ctx.dtypes = scale, [each.dtype for each in given]
        ctx.mark_non_differentiable(nll_P)
        return (weight_P.to(plan.exact) * nll_P).sum(), nll_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the joint loss frees its gradients in backward; run the forward pass again"
        factor = grad_sum * ctx.scale
        scaled = [
            (grad.mul_(factor.to(grad.dtype)).to(dtype) if grad is not None and need else None)
            for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *scaled


def _scale_of(weight_P: Tensor, exact: torch.dtype) -> Tensor:
    """By what weights are divided to lie in [-1, 1], so that half precision does not lose their gradients.

    A power of two, so that scaling back does not round.
    """
    largest = weight_P.abs().max().to(exact) if len(weight_P) else weight_P.new_zeros((), dtype=exact)
    return largest.clamp_min(torch.finfo(exact).tiny).log2().ceil().exp2()


def exponentials_(logits_MV: Tensor, index_M1: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit - largest of its row) in place; returns log-probability of the token and sum of its row, each (M, 1).

    At least float32 inside. Eager, logits of less have a copy in float32 for the time of the call; compiled, none.
    """
    exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    top_M1 = exact_MV.amax(dim=-1, keepdim=True)
    chosen_M1 = exact_MV.gather(-1, index_M1) - top_M1
    total_M1 = exact_MV.sub_(top_M1).exp_().sum(dim=-1, keepdim=True)
    if exact_MV is not logits_MV:
        logits_MV.copy_(exact_MV)
    return chosen_M1 - total_M1.log(), total_M1


@cache
def can_compile() -> bool:
    """Triton, and the C compiler that it calls. (TORCHDYNAMO_DISABLE=1 turns compiling off.)"""
    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@cache
def _compiled_exponentials() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(exponentials_)


def _add_product(total_VD: Tensor, left_MV: Tensor, right_MD: Tensor) -> None:
    """total += left.T @ right, with sums in at least float32 and no second (V, D) where the device can."""
    if total_VD.dtype == left_MV.dtype:
        total_VD.addmm_(left_MV.T, right_MD)
    elif total_VD.dtype == torch.float32 and total_VD.is_cuda:
        torch.addmm(total_VD, left_MV.T, right_MD, out_dtype=torch.float32, out=total_VD)
    else:
        total_VD += left_MV.T @ right_MD


def _interleaved(rows: list[Tensor], positions: int) -> Tensor:
    """Rows of each group, (C*R, D) of one factor or all rows at once -> (M, D) by (position, factor, component)."""
    width = rows[0].shape[-1]
    return torch.cat([each.view(positions, -1, width) for each in rows], dim=1).view(-1, width)


def _separated(rows_MD: Tensor, groups: int, positions: int) -> list[Tensor]:
    """The reverse of `_interleaved`."""
    width = rows_MD.shape[-1]
    parts = rows_MD.view(positions, -1, width).chunk(groups, dim=1)
    return [part.reshape(-1, width) for part in parts]
