"""Chain drafts: one token after another from the mixture's conditionals, with the law each was drawn from.

The conditional of draft k is the mixture with posterior weights, q_k = sum_a w_a(d_1..d_{k-1}) p_a^(k). It is what the
acceptance test must use, whatever way the tokens were drawn. Filters act on these conditionals: filtering the
components would be another joint. The loop runs over the K depths at most, never over components or vocabulary, and in
probabilities rather than logs: the factors are normalised once, and a depth is one matrix product instead of a log-sum-exp.

Letters: B batch, K drafts, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.model.joint import Joint


def greedy_chain(joint: Joint, count: int) -> Tensor:
    """Drafts (B, K): the argmax of each conditional in turn. joint: batch (B,), at least `count` factors."""
    if joint.rank == 1:
        return joint.scores_NRV[:, :count, 0].argmax(dim=-1)
    joint = joint.marginal(count)
    weights_B1R, tokens = joint.weights_R.unsqueeze(1), list[Tensor]()
    for k in range(count):
        tokens.append(joint.mixed(k, weights_B1R).argmax(dim=-1))
        if k + 1 < count:
            weights_B1R = _posterior(joint, k, weights_B1R, tokens[-1])
    return torch.cat(tokens, dim=1)


def sampled_chain(joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
    """-> (tokens_BK, laws_BKV): drafts, and the law from which each was drawn given those before it.

    uniforms_BS: (B, K+1) float64 in [0, 1). Where nothing is filtered the component is drawn first and then all tokens
    at once, which is equal in law to the chain; the laws returned are the mixture's conditionals all the same.
    """
    joint = joint.marginal(count)
    if joint.rank == 1:
        draft_probs_BKV = (
            joint.factors_NRV[:, :, 0] if sampling.plain else filtered(joint.scores_NRV[:, :, 0], sampling)
        )
        return _draw_draft(draft_probs_BKV, uniforms_BS[:, :count]), draft_probs_BKV
    if sampling.plain:
        return _component_first(joint, count, uniforms_BS)
    weights_B1R = joint.weights_R.unsqueeze(1)
    tokens: list[Tensor] = []
    distributions: list[Tensor] = []
    for k in range(count):
        probs_B1V = filtered(joint.mixed(k, weights_B1R).log(), sampling)
        token_B1 = _draw_draft(probs_B1V, uniforms_BS[:, k : k + 1])
        tokens.append(token_B1)
        distributions.append(probs_B1V)
        if k + 1 < count:
            weights_B1R = _posterior(joint, k, weights_B1R, token_B1)
    return torch.cat(tokens, dim=1), torch.cat(distributions, dim=1)


def _component_first(joint: Joint, count: int, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
    component_B = _draw_draft(joint.weights_R, uniforms_BS[:, 0])
    drawn_BKV = joint.factors_NRV.take_along_dim(component_B[:, None, None, None], dim=2).squeeze(2)
    tokens_BK = _draw_draft(drawn_BKV, uniforms_BS[:, 1 : count + 1])
    return tokens_BK, joint.conditionals(tokens_BK)


def _posterior(joint: Joint, k: int, weights_B1R: Tensor, token_B1: Tensor) -> Tensor:
    weights_B1R = joint.reweighted(k, weights_B1R, token_B1)
    return weights_B1R / weights_B1R.sum(dim=-1, keepdim=True)


def _draw_draft(probs: Tensor, uniforms: Tensor) -> Tensor:
    """A draw that stays in the vocabulary where the draft law is broken (NaN): such a draft is always rejected."""
    return draw(probs, uniforms).clamp(max=probs.shape[-1] - 1)
