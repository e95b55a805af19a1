"""Negative log-likelihood of the joint law in memory that does not grow with R * N * V times the batch.

The plain way holds a logit for every (position, component, token). Here logits are formed for a few positions at a
time and, since the gradient of the loss with respect to them is known in closed form, turned into gradients at once:

    nll_p           = -logsumexp_a [ log w_pa + sum_s log p_pa^(s)(y_ps) ]
    d nll_p / d z   =  P(a | y_p) (softmax(z) - onehot(y_ps))      for the logits z of row (p, s, a)
    d nll_p / d log w_pa = -P(a | y_p)

that is, ordinary cross-entropy per (component, position) row, weighted by the component's posterior. `backward` only
scales what `forward` accumulated by the incoming gradient. The module that owns the weights calls this inside its own
forward, so that FSDP2 has gathered them and tied weights are in one place.

Letters: P positions (a batch of time steps, flattened), C positions in a chunk, N factors, R rank, V vocabulary,
D width, M = C * N * R rows (or C, for separate unembeddings).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# hidden_CD, map parameters -> rows_MD: what the unembedding multiplies. Pure, differentiable by autograd.
Features = Callable[..., Tensor]


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
    shared unembedding, or (C, D) for separate ones.  chunk_bytes: bound on the float32 logits alive at once.
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

        # Gradients are formed for weights scaled into [-1, 1], so that half precision does not lose them.
        scale = weight_P.abs().max().to(exact) if positions else torch.zeros((), dtype=exact, device=hidden_PD.device)
        scaled_P = weight_P.to(exact) / scale.clamp_min(torch.finfo(exact).tiny)

        nll_P = torch.empty(positions, dtype=exact, device=hidden_PD.device)
        grad_hidden_PD = torch.zeros_like(hidden_PD) if learns else None
        grad_log_weights_PR = torch.zeros_like(log_weights_PR, dtype=exact) if learns else None
        # A frozen trunk's unembedding learns nothing: a third of the work is not done.
        table_learns = learns and ctx.needs_input_grad[8]
        grad_table_VD = torch.zeros(table_VD.shape, dtype=exact, device=table_VD.device) if table_learns else None
        leaves = [parameter.detach().requires_grad_(learns) for parameter in parameters]
        grad_parameters = [torch.zeros_like(p, dtype=exact) for p in parameters] if learns else []

        logits_per_position = horizon * rank * vocab
        chunk = max(1, chunk_bytes // max(1, logits_per_position * torch.finfo(exact).bits // 8))
        for start in range(0, positions, chunk):
            part = slice(start, min(start + chunk, positions))
            hidden_CD = hidden_PD[part].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                rows_MD = features(hidden_CD, *leaves)
            rows_fast_MD = rows_MD.detach().to(fast)
            # One buffer holds the logits, then the softmax, then the gradient of the logits.
            buffer_CNRV = (rows_fast_MD @ table_VD.T).to(exact).view(-1, horizon, rank, vocab)
            index_CNR1 = future_PN[part, :, None, None].expand(-1, -1, rank, 1)
            top_CNR1 = buffer_CNRV.amax(dim=-1, keepdim=True)
            chosen_CNR = (buffer_CNRV.gather(-1, index_CNR1) - top_CNR1).squeeze(-1)
            total_CNR1 = buffer_CNRV.sub_(top_CNR1).exp_().sum(dim=-1, keepdim=True)
            log_prob_CNR = chosen_CNR - total_CNR1.squeeze(-1).log()
            here_CN1 = exists_PN[part].unsqueeze(-1)
            each_CR = log_weights_PR[part].to(exact) + log_prob_CNR.masked_fill(~here_CN1, 0.0).sum(dim=1)
            log_joint_C = each_CR.logsumexp(dim=-1)
            nll_P[part] = -log_joint_C
            if not learns:
                continue
            assert grad_hidden_PD is not None and grad_log_weights_PR is not None
            pull_CR = scaled_P[part, None] * (each_CR - log_joint_C.unsqueeze(-1)).exp()
            grad_log_weights_PR[part] = -pull_CR
            pull_CNR1 = (pull_CR.unsqueeze(1) * here_CN1).unsqueeze(-1)
            buffer_CNRV.mul_(pull_CNR1 / total_CNR1)
            buffer_CNRV.scatter_add_(-1, index_CNR1, -pull_CNR1)
            grad_logits_MV = buffer_CNRV.view(rows_fast_MD.shape[0], -1).to(fast)
            if grad_table_VD is not None and fast == exact:
                grad_table_VD.addmm_(grad_logits_MV.T, rows_fast_MD)
            elif grad_table_VD is not None:
                grad_table_VD += grad_logits_MV.T @ rows_fast_MD
            grad_rows_MD = (grad_logits_MV @ table_VD).to(rows_MD.dtype)
            grads = torch.autograd.grad(rows_MD, [hidden_CD, *leaves], grad_rows_MD)
            grad_hidden_PD[part] = grads[0]
            for total, grad in zip(grad_parameters, grads[1:], strict=True):
                total += grad

        if learns:
            ctx.grads = [
                grad_hidden_PD,
                grad_log_weights_PR,
                None,
                None,
                None,
                grad_table_VD.view_as(unembedding) if grad_table_VD is not None else None,
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
