"""What drafts are held against: the frozen model's distribution of each next token, whole or as a few likely tokens.

The whole one costs a logit of every token of the draft vocabulary for the target and, in the gradient, one for each of
the draft's components. Few of them matter. `TopTeacher` sees the draft vocabulary as K + 1 cells: K tokens, namely the
text's own and the target's likeliest others, and the rest as one. Target p and draft q are summed over the rest alike,
so an objective is that of the two coarser distributions:

    KL      a lower bound of the whole KL (data processing), equal to it at K = V: how q is spread over the rest, which
            has the probability p(rest), is not trained
    alpha   sum min(p, q) over cells is an upper bound of the acceptance
    -log q  of the text's own token, and the posterior behind it, are those of the whole

The draft's normaliser still runs over all V tokens, unless `others` says that it is estimated: the tokens that have a
cell anywhere in the chunk count as they are, and of all others every s-th one, with weight s, from an offset that the
text decides. The normaliser is then right on average, and its logarithm, the loss, a little low.

Letters: P positions, C positions in a chunk, N factors, R rank, V tokens that drafts cover, A of them with a logit,
D width, U states of the frozen model, K tokens with a cell of their own, M = C * N * R rows of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpdlm.model.joint import TINY

# (states, table) -> logits of the tokens of that table, as the frozen model has them.
TargetLogits = Callable[[Tensor, Tensor], Tensor]


class Seen(NamedTuple):
    """One chunk of windows as the objectives see it. V: tokens, or cells.

    future_CN: tokens, -1 for those that drafts do not cover. target_CNV: p_1..p_N, probabilities in float32.
    """

    future_CN: Tensor
    target_CNV: Tensor


@dataclass(frozen=True)
class WholeTeacher:
    """states_UD: of the frozen model. log_normaliser_U: their log sum_v exp(logit) over the whole vocabulary."""

    states_UD: Tensor
    log_normaliser_U: Tensor
    logits: TargetLogits

    def hold(self, rows_MD: Tensor, table_VD: Tensor, future_CN: Tensor, state_CN: Tensor) -> tuple[Tensor, Seen]:
        """(scores (M, V) of the draft's rows, what they are held against), over the same tokens or cells.

        future_CN: tokens, -1 where drafts do not cover them. state_CN: which state each is read from.
        """
        with torch.no_grad():  # windows that overlap share a state
            state_U, which_CN = state_CN.unique(return_inverse=True)
            logits_UV = self.logits(self.states_UD[state_U], table_VD).float()
            target_UV = logits_UV.sub_(self.log_normaliser_U[state_U, None]).exp_()
        return F.linear(rows_MD, table_VD), Seen(future_CN, target_UV[which_CN])


@dataclass(frozen=True)
class TopTeacher:
    """tokens_UK: the tokens with a cell, the text's own first where drafts cover it. target_UK1: p of the K + 1 cells.

    others: how many of the other tokens the draft's normaliser sums over (0: all).
    """

    tokens_UK: Tensor
    target_UK1: Tensor
    others: int = 0

    @staticmethod
    @torch.no_grad()
    def of(whole: WholeTeacher, own_U: Tensor, table_VD: Tensor, top: int, others: int, chunk: int) -> TopTeacher:
        """own_U: the text's token behind each state, -1 where drafts do not cover it. chunk: states at a time."""
        top = min(top, len(table_VD))
        tokens_UK = own_U.new_empty(len(own_U), top)
        target_UK1 = own_U.new_empty(len(own_U), top + 1, dtype=torch.float32)
        for start in range(0, len(own_U), chunk):
            part = slice(start, start + chunk)
            buffer_CV = whole.logits(whole.states_UD[part], table_VD).float()
            index_C1 = own_U[part, None].clamp(min=0)
            kept_C1 = buffer_CV.gather(-1, index_C1)
            first_C1 = torch.where(own_U[part, None] >= 0, math.inf, kept_C1)
            tokens_CK = buffer_CV.scatter_(-1, index_C1, first_C1).topk(top).indices
            buffer_CV.scatter_(-1, index_C1, kept_C1).sub_(whole.log_normaliser_U[part, None]).exp_()
            tokens_UK[part], target_UK1[part, :-1] = tokens_CK, buffer_CV.gather(-1, tokens_CK)
            target_UK1[part, -1] = buffer_CV.scatter_(-1, tokens_CK, 0.0).sum(-1)
        return TopTeacher(tokens_UK, target_UK1, others)

    def hold(self, rows_MD: Tensor, table_VD: Tensor, future_CN: Tensor, state_CN: Tensor) -> tuple[Tensor, Seen]:
        """As of `WholeTeacher`."""
        tokens_CNK = self.tokens_UK[state_CN]
        seen = Seen(torch.where(future_CN >= 0, 0, -1), self.target_UK1[state_CN])
        gain_A = None
        if self.others:
            column_A, gain_A = columns(tokens_CNK, len(table_VD), self.others)
            place_V = torch.empty(len(table_VD), dtype=torch.long, device=table_VD.device)
            place_V[column_A] = torch.arange(len(column_A), device=table_VD.device)
            table_VD, tokens_CNK = table_VD[column_A], place_V[tokens_CNK]
        rank = len(rows_MD) // state_CN.numel()
        tokens_MK = tokens_CNK.unsqueeze(2).expand(-1, -1, rank, -1).reshape(len(rows_MD), -1)
        return cell_log_probs(rows_MD, table_VD, tokens_MK, gain_A), seen


def columns(tokens: Tensor, vocab_size: int, others: int) -> tuple[Tensor, Tensor]:
    """(A tokens that get a logit, log of the weight with which each counts): those named, and about `others` more."""
    named_V = torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device)
    named_V[tokens.flatten()] = True
    named_A, rest_V = named_V.nonzero().squeeze(-1), (~named_V).nonzero().squeeze(-1)
    stride = max(1, len(rest_V) // others)
    drawn_A = rest_V[int(tokens.sum()) % stride :: stride]
    gain_A = torch.zeros(len(named_A) + len(drawn_A), device=tokens.device)
    gain_A[len(named_A) :] = math.log(stride)
    return torch.cat([named_A, drawn_A]), gain_A


def cell_log_probs(rows_MD: Tensor, table_AD: Tensor, tokens_MK: Tensor, gain_A: Tensor | None = None) -> Tensor:
    """log q (M, K + 1) of K distinct tokens of each row and of all others together, for logits rows @ table + gain.

    The gradient with respect to the rows is in closed form: one buffer holds logits, exponentials and their gradient.
    """
    cells_MK1: Tensor = _CellLogProbs.apply(rows_MD, table_AD, tokens_MK, gain_A)
    return cells_MK1


class _CellLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, table_AD: Tensor, tokens_MK: Tensor, gain_A: Tensor | None) -> Tensor:
        logits_MA = F.linear(rows_MD, table_AD)
        exact = torch.promote_types(logits_MA.dtype, torch.float32)
        buffer_MA = logits_MA.to(exact)
        if gain_A is not None:
            buffer_MA += gain_A
        buffer_MA -= buffer_MA.amax(dim=-1, keepdim=True)
        chosen_MK = buffer_MA.gather(-1, tokens_MK)
        rest_M1 = buffer_MA.exp_().scatter_(-1, tokens_MK, 0.0).sum(dim=-1, keepdim=True).clamp_min_(TINY)
        total_M1 = rest_M1 + chosen_MK.exp().sum(dim=-1, keepdim=True)
        cells_MK1 = torch.cat([chosen_MK, rest_M1.log()], dim=-1) - total_M1.log()
        ctx.buffer_MA, ctx.fast = buffer_MA, logits_MA.dtype
        ctx.save_for_backward(table_AD, tokens_MK, rest_M1, total_M1, cells_MK1)
        return cells_MK1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MK1: Tensor) -> Any:
        table_AD, tokens_MK, rest_M1, total_M1, cells_MK1 = ctx.saved_tensors
        grad_MA, ctx.buffer_MA = ctx.buffer_MA, None
        assert grad_MA is not None, "the logits are gone after backward; run the forward pass again"
        sum_M1 = grad_MK1.sum(dim=-1, keepdim=True)
        grad_MA.mul_(grad_MK1[:, -1:] / rest_M1 - sum_M1 / total_M1)
        grad_MA.scatter_(-1, tokens_MK, grad_MK1[:, :-1] - sum_M1 * cells_MK1[:, :-1].exp())
        return (grad_MA.to(ctx.fast) @ table_AD.to(ctx.fast)).to(table_AD.dtype), None, None, None
