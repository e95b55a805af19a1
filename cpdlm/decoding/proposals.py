"""Drafts made from a joint: a chain of argmaxes, a sampled chain, the likeliest window, or a tree.

The conditional of draft k is the mixture with posterior weights, q_k = sum_a w_a(d_1..d_{k-1}) p_a^(k). It is what the
acceptance test must use, whatever way the tokens were drawn. Filters act on these conditionals: filtering the
components would be another joint.

A node of a tree is a prefix of the window with its probability under the joint, sum_a w_a prod_s p_a^(s)(x_s). No
prefix is likelier than its own prefixes, hence the M likeliest prefixes of all lengths form a tree, the one that
best-first search would grow. Of each length only the M likeliest can be in it, which is a beam over depths.

Loops run over the depths alone, never over components, vocabulary or nodes, and in probabilities rather than
logarithms: the factors are normalised once, and a depth is one matrix product.

Letters: B batch, K drafts, M nodes of a tree or width of a beam, S = K+1 positions of a window (0: the pending token),
R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.model.joint import Joint, Step

# Between equally likely prefixes the shorter one goes first, or a node could be chosen without its parent.
_TIE = 1e-4


@dataclass(frozen=True)
class Proposal:
    """Drafts behind the pending token.

    tokens_BK: ids; -1 where a row has fewer drafts than others. distributions: what the drafter's own `verify` needs,
    (B, K, V) probabilities for sampled drafts, NaN where there is none. confidence: makes (B, K), how sure the joint is
    of each draft, given those before it; for a drawn draft it knows nothing of the draw. The rest is of a tree, None
    for a chain, over window positions (0 is the pending token, k+1 is draft k). parents_BK: the position before each
    draft. depth_BS: how far behind the pending token each position is, `deepest` at most. seen_BSS: whether s (row)
    sees j (column), its ancestors and itself.
    """

    tokens_BK: Tensor
    distributions: Any = None
    confidence: Callable[[], Tensor] | None = None
    parents_BK: Tensor | None = None
    depth_BS: Tensor | None = None
    seen_BSS: Tensor | None = None
    deepest: int = 0

    def on_vocabulary(self, draft_ids: Tensor, vocab_size: int) -> Proposal:
        """The same drafts, made on a draft vocabulary, by their ids in the whole vocabulary: draft_ids (V',)."""
        probs = self.distributions
        if isinstance(probs, Tensor):
            probs = probs.new_zeros(*probs.shape[:-1], vocab_size).index_copy(-1, draft_ids, probs)
        return replace(self, tokens_BK=draft_ids[self.tokens_BK], distributions=probs)


def nothing(like: Tensor) -> Proposal:
    """No drafts, for rows like these: (B, ...) ids."""
    return Proposal(like.new_zeros(len(like), 0))


# --- chains -----------------------------------------------------------------------------------------------------------


def greedy_chain(joint: Joint, count: int) -> Tensor:
    """Drafts (B, K): the argmax of each conditional in turn. joint: batch (B,), at least `count` factors."""
    if joint.rank == 1 and joint.is_independent:
        return joint.scores_NRV[:, :count, 0].argmax(dim=-1)
    joint = joint.marginal(count)
    weights_B1R = joint.weights_R.unsqueeze(1)
    tokens: list[Tensor] = []
    for k in range(count):
        step = joint.step(k, tokens[-1] if tokens else None)
        tokens.append(step.mixed(weights_B1R).argmax(dim=-1))
        weights_B1R = _posterior(step, weights_B1R, tokens[-1])
    return torch.cat(tokens, dim=1)


def sampled_chain(joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
    """-> (tokens_BK, probs_BKV): drafts, and the distribution q from which each was drawn given those before it.

    uniforms_BS: (B, K+1) float64 in [0, 1). Where nothing is filtered and tokens depend on their component alone, that
    is drawn first and then all tokens at once, which has the same distribution as the chain; q is the mixture's
    conditional all the same.
    """
    joint = joint.marginal(count)
    if joint.rank == 1 and joint.is_independent:
        scores_BKV = joint.scores_NRV[:, :, 0]
        probs_BKV = joint.factors_NRV[:, :, 0] if sampling.unfiltered else filtered(scores_BKV, sampling)
        return _draw_draft(probs_BKV, uniforms_BS[:, :count]), probs_BKV
    if sampling.unfiltered and joint.is_independent:
        component_B = _draw_draft(joint.weights_R, uniforms_BS[:, 0])
        drawn_BKV = joint.factors_NRV.take_along_dim(component_B[:, None, None, None], dim=2).squeeze(2)
        tokens_BK = _draw_draft(drawn_BKV, uniforms_BS[:, 1 : count + 1])
        return tokens_BK, joint.conditionals(tokens_BK)
    weights_B1R = joint.weights_R.unsqueeze(1)
    tokens: list[Tensor] = []
    probs: list[Tensor] = []
    for k in range(count):
        step = joint.step(k, tokens[-1] if tokens else None)
        probs.append(filtered(step.mixed(weights_B1R).log(), sampling))
        tokens.append(_draw_draft(probs[-1], uniforms_BS[:, k : k + 1]))
        weights_B1R = _posterior(step, weights_B1R, tokens[-1])
    return torch.cat(tokens, dim=1), torch.cat(probs, dim=1)


def _posterior(step: Step, weights_B1R: Tensor, token_B1: Tensor) -> Tensor:
    weights_B1R = step.reweighted(weights_B1R, token_B1.unsqueeze(-1)).squeeze(2)
    return weights_B1R / weights_B1R.sum(dim=-1, keepdim=True)


def _draw_draft(probs: Tensor, uniforms: Tensor) -> Tensor:
    """A draw that stays in the vocabulary where q is broken (NaN): such a draft is always rejected."""
    return draw(probs, uniforms).clamp(max=probs.shape[-1] - 1)


# --- windows and trees ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beam:
    """The M likeliest prefixes of each length 1..K: tokens_BKM, parents_BKM (index into the level above),
    log_probs_BKM."""

    tokens_BKM: Tensor
    parents_BKM: Tensor
    log_probs_BKM: Tensor

    def windows(self) -> tuple[Tensor, Tensor]:
        """The M whole windows: tokens_BMK, and the log-probability of each of their prefixes, log_probs_BMK."""
        batch, depths, width = self.tokens_BKM.shape
        index_BM = torch.arange(width, device=self.tokens_BKM.device).expand(batch, -1)
        tokens, log_probs = [], []
        for level in reversed(range(depths)):
            tokens.append(self.tokens_BKM[:, level].gather(1, index_BM))
            log_probs.append(self.log_probs_BKM[:, level].gather(1, index_BM))
            index_BM = self.parents_BKM[:, level].gather(1, index_BM)
        return torch.stack(tokens[::-1], dim=2), torch.stack(log_probs[::-1], dim=2)


def beam(joint: Joint, depth: int, width: int) -> Beam:
    """joint: batch (B,), at least `depth` factors. A level of fewer than `width` prefixes is padded with
    log-probability -inf."""
    joint, offspring = joint.marginal(depth), min(width, joint.vocab_size)
    # Unnormalised posterior of each prefix: its sum over components is the prefix's probability.
    weights_BMR = joint.weights_R.unsqueeze(1)
    levels: list[tuple[Tensor, Tensor, Tensor]] = []
    before_BM: Tensor | None = None
    for level in range(depth):
        step = joint.step(level, before_BM)
        # No prefix has more than `width` extensions among the `width` likeliest: first each one's, then all together.
        top_BMC, token_BMC = step.mixed(weights_BMR).topk(offspring, dim=-1)
        prob_BM, index_BM = top_BMC.flatten(1).topk(min(width, top_BMC[0].numel()), dim=-1)
        children_BER = step.reweighted(weights_BMR, token_BMC).flatten(1, 2)
        weights_BMR = children_BER.gather(1, index_BM.unsqueeze(-1).expand(-1, -1, joint.rank))
        token_BM, short, pad = token_BMC.flatten(1).gather(1, index_BM), width - index_BM.shape[1], functional.pad
        before_BM = pad(token_BM, (0, short))
        levels.append((before_BM, pad(index_BM // offspring, (0, short)), pad(prob_BM, (0, short)).log()))
        weights_BMR = pad(weights_BMR, (0, 0, 0, short))
    tokens, parents, log_probs = (torch.stack(each, dim=1) for each in zip(*levels, strict=True))
    return Beam(tokens, parents, log_probs)


def best_window(joint: Joint, depth: int, shape: str, width: int) -> Tensor:
    """(B, K), of a beam: "window", the likeliest; "path", that with the largest sum of prefix probabilities."""
    tokens_BMK, log_probs_BMK = beam(joint, depth, width).windows()
    score_BM = log_probs_BMK[..., -1] if shape == "window" else log_probs_BMK.exp().sum(dim=-1)
    return tokens_BMK.take_along_dim(score_BM.argmax(dim=-1)[:, None, None], dim=1).squeeze(1)


def grow(joint: Joint, depth: int, nodes: int) -> Proposal:
    """A tree: the `nodes` likeliest prefixes of at most `depth` tokens, or all where there are fewer; parents come
    first."""
    if joint.vocab_size < 64:
        nodes = min(nodes, sum(joint.vocab_size**k for k in range(1, depth + 1)))
    found = beam(joint, depth, nodes)
    batch, device = found.tokens_BKM.shape[0], found.tokens_BKM.device
    levels_K = torch.arange(depth, device=device)
    score_BE = (found.log_probs_BKM - _TIE * levels_K[:, None]).flatten(1)
    chosen_BM = score_BE.topk(nodes, dim=-1).indices.sort(dim=-1).values  # level by level
    level_BM = chosen_BM // nodes
    above_BM = (level_BM - 1) * nodes + found.parents_BKM.flatten(1).gather(1, chosen_BM)
    order_BM = torch.arange(1, nodes + 1, device=device).expand(batch, -1)
    index_BE = torch.zeros(batch, depth * nodes, dtype=torch.long, device=device).scatter(1, chosen_BM, order_BM)
    parents_BM = torch.where(level_BM > 0, index_BE.gather(1, above_BM.clamp(min=0)), 0)
    tokens_BM = found.tokens_BKM.flatten(1).gather(1, chosen_BM)

    def confidence() -> Tensor:
        log_probs_BM = found.log_probs_BKM.flatten(1).gather(1, chosen_BM)
        return (log_probs_BM - torch.nn.functional.pad(log_probs_BM, (1, 0)).gather(1, parents_BM)).exp()

    return tree(tokens_BM, parents_BM, depth, confidence)


def branched(tokens_BK: Tensor, probs_BKV: Tensor, nodes: int) -> Proposal:
    """A drawn chain, the first K nodes, with branches of one token: what q likes best beside the token that was drawn.

    A draft is taken to be reached half as often as the one before it.
    """
    batch, drafts = tokens_BK.shape
    others_BKV = probs_BKV.scatter(-1, tokens_BK.unsqueeze(-1), -1.0)
    each = min(nodes, probs_BKV.shape[-1] - 1)
    score_BKC, branch_BKC = others_BKV.topk(each, dim=-1)
    reached_K1 = 0.5 ** torch.arange(drafts, device=tokens_BK.device).unsqueeze(-1)
    best_BE = (score_BKC * reached_K1).flatten(1).topk(max(0, min(nodes - drafts, drafts * each)), dim=-1).indices
    parents_BM = torch.cat([torch.arange(drafts, device=tokens_BK.device).expand(batch, -1), best_BE // each], dim=1)
    found = tree(torch.cat([tokens_BK, branch_BKC.flatten(1).gather(1, best_BE)], dim=1), parents_BM, drafts)
    return replace(found, distributions=probs_BKV)


def tree(
    tokens_BM: Tensor, parents_BM: Tensor, deepest: int, confidence: Callable[[], Tensor] | None = None
) -> Proposal:
    """The proposal of a tree of at most `deepest` levels. parents_BM: window position before each node, which comes
    first."""
    batch, nodes = tokens_BM.shape
    up_BSS = torch.zeros(batch, nodes + 1, nodes + 1, device=tokens_BM.device)
    up_BSS[:, 1:].scatter_(2, parents_BM.unsqueeze(-1), 1.0)
    own_SS = torch.eye(nodes + 1, device=tokens_BM.device)
    seen_BSS = own_SS.expand(batch, -1, -1)
    for _ in range(deepest):
        seen_BSS = own_SS + up_BSS @ seen_BSS
    depth_BS = seen_BSS.sum(dim=-1).long() - 1
    return Proposal(tokens_BM, None, confidence, parents_BM, depth_BS, seen_BSS > 0, deepest)
