"""The acceptance test: which drafts are accepted, and which token follows them. It sees probabilities, never models.

Rejection sampling of one token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): draft d ~ q, accept
it with probability min(1, p(d)/q(d)), otherwise emit a draw of norm(max(0, p - q)). The emitted token has distribution
p, provided that q is the distribution from which d was drawn, given the drafts before it.

Letters: B batch, K drafts in the window (horizon - 1 or fewer, may be 0), S = K+1 positions of it (0: the pending
token), M nodes of a tree, J longest path through it, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cpdlm.decoding.filtering import draw


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """Unnormalised norm(max(0, p - q)) (..., V); p itself where the difference is nothing but rounding.

    A draft q of NaN gives p: its token was never accepted, so that p is right.
    """
    excess = (target - draft).clamp(min=0)
    return torch.where(excess.sum(dim=-1, keepdim=True) > 0, excess, target)


def verify(target_BSV: Tensor, draft_BKV: Tensor, tokens_BK: Tensor, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
    """-> (accepted_B, next_B): how many drafts are accepted, and the token after them (V: p is no distribution there).

    target_BSV: the filtered target p at the S positions: row k is for draft k, the last row for the token after them
    all. draft_BKV: the q from which each draft was drawn, given those before it. uniforms_BS: float64 in [0, 1): K
    tests and one draw. With K = 0 this is a draw from p.
    """
    drafts = tokens_BK.shape[1]
    if drafts == 0:
        return torch.zeros_like(uniforms_BS[:, 0], dtype=torch.long), draw(target_BSV[:, 0], uniforms_BS[:, 0])
    index_BK1 = tokens_BK.unsqueeze(-1)
    p_BK = target_BSV[:, :drafts].gather(-1, index_BK1).squeeze(-1)
    q_BK = draft_BKV.gather(-1, index_BK1).squeeze(-1)
    # U < p/q without the division; NaN on either side compares false, that is, rejects.
    accepted_B = (uniforms_BS[:, :drafts] * q_BK < p_BK).long().cumprod(dim=-1).sum(dim=-1)
    return accepted_B, _drawn_after(accepted_B, target_BSV, draft_BKV, uniforms_BS[:, drafts])


def _drawn_after(
    accepted_B: Tensor, target_BSV: Tensor, draft_BKV: Tensor, uniforms_B: Tensor, share_B1: Tensor | None = None
) -> Tensor:
    """(B,) the token after the accepted drafts: from norm(max(0, share p - q)), or from p behind them all."""
    drafts = draft_BKV.shape[1]
    stop_B11 = accepted_B[:, None, None]
    target_BV = target_BSV.take_along_dim(stop_B11, dim=1).squeeze(1)
    draft_BV = draft_BKV.take_along_dim(stop_B11.clamp(max=drafts - 1), dim=1).squeeze(1)
    taken_BV = target_BV if share_B1 is None else share_B1 * target_BV
    rejected_B1 = (accepted_B < drafts).unsqueeze(-1)
    return draw(torch.where(rejected_B1, residual(taken_BV, draft_BV), target_BV), uniforms_B)


def argmaxes(target_BSV: Tensor) -> Tensor:
    """(B, S) the target's choices at temperature 0; V where it is NaN or -inf alone.

    target_BSV: log-probabilities or any scores that rank alike.
    """
    best_BS = target_BSV.argmax(dim=-1)  # of ties the one that everybody's argmax takes
    value_BS = target_BSV.gather(-1, best_BS.unsqueeze(-1)).squeeze(-1)
    return best_BS.masked_fill(~(value_BS > -math.inf), target_BSV.shape[-1])


def follow(chosen_BS: Tensor, tokens_BK: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` of drafts that are not drawn: they are accepted while each is what the target chose in its place.

    chosen_BS: ids, behind the pending token and each draft; V, which no draft equals, where p is no distribution.
    """
    if tokens_BK.shape[1] == 0:
        return torch.zeros_like(chosen_BS[:, 0]), chosen_BS[:, 0]
    accepted_B = (chosen_BS[:, :-1] == tokens_BK).long().cumprod(dim=-1).sum(dim=-1)
    return accepted_B, chosen_BS.gather(1, accepted_B.unsqueeze(-1)).squeeze(-1)


def verify_block(
    target_BSV: Tensor, draft_BKV: Tensor, tokens_BK: Tensor, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """`verify`, for the drafts as a block (Sun et al., arXiv 2403.10444, algorithm 2): never fewer are accepted.

    share_k = min(1, share_{k-1} p(d_k)/q(d_k)) is how much of the prefix's draft mass the target can take. Prefix k < K
    is accepted with probability h_k = s_k / (s_k + 1 - share_k), s_k = sum max(0, share_k p - q) of the p and q behind
    it, the whole block with probability share_K. The longest accepted prefix counts, and the token after it is drawn
    from norm(max(0, share_k p - q)), or from p behind the whole block. Where q behind a prefix is NaN, the block ends
    there.
    """
    drafts = tokens_BK.shape[1]
    if drafts == 0:
        return verify(target_BSV, draft_BKV, tokens_BK, uniforms_BS)
    index_BK1 = tokens_BK.unsqueeze(-1)
    p_BK = target_BSV[:, :drafts].gather(-1, index_BK1).squeeze(-1)
    q_BK = draft_BKV.gather(-1, index_BK1).squeeze(-1)
    ratio_BK = torch.where(q_BK > 0, p_BK / q_BK, 0.0)  # NaN and an impossible draft: the target takes nothing
    share_B, shares = torch.ones_like(p_BK[:, 0]), []
    for k in range(drafts):
        share_B = (share_B * ratio_BK[:, k]).clamp(max=1).nan_to_num(nan=0.0)
        shares.append(share_B)
    share_BK = torch.stack(shares, dim=1)
    # What is left behind prefixes 1..K-1; behind the empty one share is 1, behind the whole block there is no draft.
    left_BK = (share_BK[:, :-1, None] * target_BSV[:, 1:drafts] - draft_BKV[:, 1:]).clamp(min=0).sum(dim=-1)
    loss_BK = 1 - share_BK[:, :-1]
    keep_BK = torch.where(left_BK + loss_BK > 0, left_BK / (left_BK + loss_BK), 1.0)
    keep_BK = torch.where(left_BK.isnan(), share_BK[:, :-1], keep_BK)
    keep_BK = torch.cat([keep_BK, share_BK[:, -1:]], dim=1)
    accepted_BK = uniforms_BS[:, :drafts] < keep_BK
    order_K = torch.arange(1, drafts + 1, device=tokens_BK.device)
    accepted_B = (accepted_BK * order_K).amax(dim=1)
    share_BS = torch.nn.functional.pad(share_BK, (1, 0), value=1.0)
    share_B1 = share_BS.gather(1, accepted_B.unsqueeze(1))
    return accepted_B, _drawn_after(accepted_B, target_BSV, draft_BKV, uniforms_BS[:, drafts], share_B1)


def walk(
    tokens_BM: Tensor, parents_BM: Tensor, choose: Callable[[Tensor], Tensor], deepest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's choices down a tree: (accepted_B, path_BJ of window positions, next_B).

    parents_BM: window position before each node. choose(at_B): the token that the target chose (drew) behind these
    positions of the window. deepest: depth of the tree. A node is entered when its parent's choice is its token; the
    choice behind the last node entered is emitted. Exact whatever the tree is: each choice is a draw from the target
    given the tokens before it, and every position is visited at most once.
    """
    batch, nodes = tokens_BM.shape
    at_B = torch.zeros(batch, dtype=torch.long, device=tokens_BM.device)
    going_B = torch.ones(batch, dtype=torch.bool, device=tokens_BM.device)
    accepted_B, path, levels, next_B = torch.zeros_like(at_B), [], min(deepest, nodes), choose(at_B)
    for _ in range(levels):
        match_BM = (parents_BM == at_B[:, None]) & (tokens_BM == next_B[:, None]) & going_B[:, None]
        going_B = match_BM.any(dim=1)
        if at_B.device.type == "cpu" and not going_B.any():  # elsewhere to look costs more than to choose
            break
        at_B = torch.where(going_B, match_BM.long().argmax(dim=1) + 1, at_B)
        accepted_B = accepted_B + going_B
        path.append(at_B)
        next_B = torch.where(going_B, choose(at_B), next_B)
    path += [at_B] * (levels - len(path))
    path_BJ = torch.stack(path, dim=1) if path else at_B.new_zeros(batch, 0)
    return accepted_B, path_BJ, next_B
