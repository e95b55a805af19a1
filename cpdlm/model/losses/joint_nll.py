"""Negative log-likelihood of the joint law in memory that does not grow with R * N * V times the batch.

The plain way holds a logit for every (position, component, token). Here logits are formed for a few positions at a
time and, since the gradient of the loss with respect to them is known in closed form, turned into gradients at once:

    nll_p           = -logsumexp_a [ log w_pa + sum_s log p_pa^(s)(y_ps) ]
    d nll_p / d z   =  P(a | y_p) (softmax(z) - onehot(y_ps))      for the logits z of row (p, s, a)
    d nll_p / d log w_pa = -P(a | y_p)

that is, ordinary cross-entropy per (component, position) row, weighted by the component's posterior. `backward` only
scales what `forward` accumulated by the incoming gradient. The module that owns the weights calls this inside its own
forward, so that FSDP2 has gathered them and tied weights are in one place.

Three products with the unembedding are the work: logits, gradient of the rows, gradient of the unembedding. What lives
beside weights and gradients is one chunk of logits, in the type of the products, which becomes its own gradient in
place. On a GPU the pass that needs float32 inside is compiled, so that no float32 logits exist.

Letters: P positions (a batch of time steps, flattened), C positions in a chunk, N factors, R rank, V vocabulary,
D width, M = C * N * R rows of logits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton

# hidden_CD, map parameters -> rows: what the unembedding multiplies. Pure, differentiable by autograd.
Features = Callable[..., Tensor]

# As many partial sums are kept in a parameter's own type (a bfloat16 gradient then errs by half a per cent), no more.
MOST_SUMS = 64


def joint_nll(
    hidden_PD: Tensor,
    log_weights_PR: Tensor,
    future_PN: Tensor,
    exists_PN: Tensor,
    weight_P: Tensor,
    unembedding: Tensor,
    features: Features,
    parameters: tuple[Tensor, ...] = (),
    chunk_bytes: int = 32 * 2**20,
) -> tuple[Tensor, Tensor]:
    """sum_p weight_p nll_p, and nll_P in nats (detached).

    hidden_PD: what the factors see.  log_weights_PR: normalised gate.  future_PN: token ids.
    exists_PN: bool, which of the N tokens exist; absent factors are 1.  weight_P: weight of each position (no gradient).
    unembedding: (V, D) shared by all rows, or (N, R, V, D).  features(hidden_CD, *parameters) -> rows (C*N*R, D) for a
    shared unembedding, or (C, D) for separate ones; given the n-th part of each parameter, the rows of factor n alone.
    chunk_bytes: bound on the logits alive at once.
    """
    assert not weight_P.requires_grad, "position weights carry no gradient"
    # Inside `forward` gradients are always off and `needs_input_grad` ignores no_grad: ask here.
    learns = torch.is_grad_enabled()
    total, nll_P = _JointNLL.apply(
        features,
        chunk_bytes,
        learns,
        hidden_PD,
        log_weights_PR,
        future_PN,
        exists_PN,
        weight_P,
        unembedding,
        *parameters,
    )
    return total, nll_P


class _JointNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Features,
        chunk_bytes: int,
        learns: bool,
        hidden_PD: Tensor,
        log_weights_PR: Tensor,
        future_PN: Tensor,
        exists_PN: Tensor,
        weight_P: Tensor,
        unembedding: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        positions, horizon = future_PN.shape
        rank, vocab, width = log_weights_PR.shape[-1], unembedding.shape[-2], unembedding.shape[-1]
        learns = learns and any(ctx.needs_input_grad)
        exact = torch.promote_types(hidden_PD.dtype, torch.float32)
        device = hidden_PD.device.type
        fast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else unembedding.dtype
        table_VD = unembedding.reshape(-1, width).to(fast)

        exponentials = _compiled_exponentials() if device == "cuda" and can_compile() else exponentials_

        # Gradients are formed for weights scaled into [-1, 1], so that half precision does not lose them; by a power of two,
        # so that scaling back does not round.
        scale = weight_P.abs().max().to(exact) if positions else torch.zeros((), dtype=exact, device=hidden_PD.device)
        scale = scale.clamp_min(torch.finfo(exact).tiny).log2().ceil().exp2()
        scaled_P = weight_P.to(exact) / scale

        # Outside the compiled pass, float32 copies of a chunk exist.
        logit_bytes = torch.finfo(exact if exponentials is exponentials_ else fast).bits // 8
        chunk = max(1, chunk_bytes // max(1, horizon * rank * vocab * logit_bytes))
        chunk -= chunk % 64 if chunk > 64 else 0  # whole tiles
        # The maps of one factor at a time where the gradient of all would take more than a chunk of logits.
        groups = horizon if sum(p.numel() * p.element_size() for p in parameters) > chunk_bytes else 1

        def new_sum(parameter: Tensor) -> Tensor:
            return torch.zeros_like(parameter, dtype=parameter.dtype if positions <= MOST_SUMS * chunk else exact)

        nll_P = torch.empty(positions, dtype=exact, device=hidden_PD.device)
        grad_hidden_PD = torch.zeros_like(hidden_PD) if learns else None
        grad_log_weights_PR = torch.zeros_like(log_weights_PR, dtype=exact) if learns else None
        # A frozen trunk's unembedding learns nothing: a third of the work is not done.
        grad_unembedding = new_sum(unembedding) if learns and ctx.needs_input_grad[8] else None
        grad_parameters = [new_sum(parameter) for parameter in parameters] if learns else []
        leaves = [[part.requires_grad_(learns) for part in p.detach().chunk(groups)] for p in parameters]

        for start in range(0, positions, chunk):
            part = slice(start, min(start + chunk, positions))
            hidden_CD = hidden_PD[part].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                rows = [features(hidden_CD, *(parts[group] for parts in leaves)) for group in range(groups)]
            rows_MD = _interleaved([each.detach() for each in rows], len(hidden_CD)).to(fast)
            # One buffer holds the logits, then their exponentials, then the gradient of the logits.
            buffer_MV = (rows_MD @ table_VD.T).view(-1, vocab)
            index_M1 = future_PN[part, :, None].expand(-1, -1, rank).reshape(-1, 1)
            log_prob_M1, total_M1 = exponentials(buffer_MV, index_M1)
            here_CN1 = exists_PN[part].unsqueeze(-1)
            log_prob_CNR = log_prob_M1.view(-1, horizon, rank).masked_fill(~here_CN1, 0.0)
            each_CR = log_weights_PR[part].to(exact) + log_prob_CNR.sum(dim=1)
            log_joint_C = each_CR.logsumexp(dim=-1)
            nll_P[part] = -log_joint_C
            if not learns:
                continue
            assert grad_hidden_PD is not None and grad_log_weights_PR is not None
            pull_CR = scaled_P[part, None] * (each_CR - log_joint_C.unsqueeze(-1)).exp()
            grad_log_weights_PR[part] = -pull_CR
            pull_M1 = (pull_CR.unsqueeze(1) * here_CN1).view(-1, 1)
            buffer_MV.mul_(pull_M1 / total_M1)
            buffer_MV.scatter_(-1, index_M1, (pull_M1 * log_prob_M1.expm1()).to(fast))
            grad_logits = buffer_MV.view(len(rows_MD), -1)
            if grad_unembedding is not None:
                _add_product(grad_unembedding.view(-1, width), grad_logits, rows_MD)
            grad_rows = _separated(grad_logits @ table_VD, groups, len(hidden_CD))
            del buffer_MV, grad_logits
            for group, (made, grad) in enumerate(zip(rows, grad_rows, strict=True)):
                wanted = [hidden_CD, *(parts[group] for parts in leaves)]
                grad_hidden_CD, *grads = torch.autograd.grad(made, wanted, grad.to(made.dtype))
                grad_hidden_PD[part] += grad_hidden_CD
                for total, each in zip(grad_parameters, grads, strict=True):
                    total.chunk(groups)[group].add_(each)

        if learns:
            ctx.grads = [
                grad_hidden_PD,
                grad_log_weights_PR,
                None,
                None,
                None,
                grad_unembedding,
                *grad_parameters,
            ]
            ctx.scale = scale
            ctx.dtypes = [hidden_PD.dtype, log_weights_PR.dtype, None, None, None, unembedding.dtype] + [
                parameter.dtype for parameter in parameters
            ]
        ctx.mark_non_differentiable(nll_P)
        return (weight_P.to(exact) * nll_P).sum(), nll_P

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
