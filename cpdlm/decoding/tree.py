"""Several drafts at once: the likeliest continuations under the mixture, as a tree that one trunk pass verifies.

A node is a prefix of the window with its probability under the joint, sum_a w_a prod_s p_a^(s)(x_s): each component is a
coherent branch, so that a mixture has more to offer than the product of its marginals. No prefix is likelier than its
own prefixes, hence the M likeliest prefixes of all lengths form a tree, the one that best-first search would grow; and of
each length only the M likeliest can be in it, which is a beam over depths, without a loop over components, vocabulary or
nodes.

Letters: B batch, M nodes, D depths, S = M+1 positions of a window (0: the fixed token), R rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpdlm.model.joint import Joint

# Between equally likely prefixes the shorter one goes first, or a node could be chosen without its parent.
_TIE = 1e-4


@dataclass(frozen=True)
class Beam:
    """The M likeliest prefixes of each length 1..D: tokens_BDM, parents_BDM (index into the level above), log_probs_BDM."""

    tokens_BDM: Tensor
    parents_BDM: Tensor
    log_probs_BDM: Tensor

    def windows(self) -> tuple[Tensor, Tensor]:
        """The M whole windows: tokens_BMD, and the log-probability of each of their prefixes, log_probs_BMD."""
        depths = self.tokens_BDM.shape[1]
        index_BM = torch.arange(self.tokens_BDM.shape[2], device=self.tokens_BDM.device).expand_as(
            self.tokens_BDM[:, 0]
        )
        tokens, log_probs = [], []
        for level in reversed(range(depths)):
            tokens.append(self.tokens_BDM[:, level].gather(1, index_BM))
            log_probs.append(self.log_probs_BDM[:, level].gather(1, index_BM))
            index_BM = self.parents_BDM[:, level].gather(1, index_BM)
        return torch.stack(tokens[::-1], dim=2), torch.stack(log_probs[::-1], dim=2)


def beam(joint: Joint, depth: int, width: int) -> Beam:
    """joint: batch (B,), `depth` factors or more. A level with fewer than `width` prefixes is padded with log-probability
    -inf."""
    offspring = min(width, joint.vocab_size)
    joint = joint.marginal(depth)
    # Unnormalised posterior of each prefix: its sum over components is the prefix's probability.
    weights_BMR = joint.weights_R.unsqueeze(1)
    levels: list[tuple[Tensor, Tensor, Tensor]] = []
    for level in range(depth):
        probs_BMV = joint.mixed(level, weights_BMR)
        # No prefix has more than `width` extensions among the `width` likeliest: first each one's, then all together.
        top_BMC, token_BMC = probs_BMV.topk(offspring, dim=-1)
        flat_BE = top_BMC.flatten(1)
        prob_BM, index_BM = flat_BE.topk(min(width, flat_BE.shape[1]), dim=-1)
        token_BM = token_BMC.flatten(1).gather(1, index_BM)
        parent_BM = index_BM // offspring
        before_BMR = weights_BMR.gather(1, parent_BM.unsqueeze(-1).expand(-1, -1, joint.rank))
        weights_BMR = joint.reweighted(level, before_BMR, token_BM)
        short = width - token_BM.shape[1]
        pad = torch.nn.functional.pad
        levels.append((pad(token_BM, (0, short)), pad(parent_BM, (0, short)), pad(prob_BM, (0, short)).log()))
        weights_BMR = pad(weights_BMR, (0, 0, 0, short))
    tokens, parents, log_probs = (torch.stack(each, dim=1) for each in zip(*levels, strict=True))
    return Beam(tokens, parents, log_probs)


@dataclass(frozen=True)
class Tree:
    """M drafts in window order (0 is the fixed token, i+1 is node i): tokens_BM, parents_BM (window positions, before the
    node), depth_BS and seen_BSS as `strategies.Proposal` has them."""

    tokens_BM: Tensor
    parents_BM: Tensor
    depth_BS: Tensor
    seen_BSS: Tensor


def grow(joint: Joint, depth: int, nodes: int) -> Tree:
    """The `nodes` likeliest prefixes of at most `depth` tokens."""
    found = beam(joint, depth, nodes)
    batch, device = found.tokens_BDM.shape[0], found.tokens_BDM.device
    levels_D = torch.arange(depth, device=device)
    score_BE = (found.log_probs_BDM - _TIE * levels_D[:, None]).flatten(1)
    chosen_BM = score_BE.topk(nodes, dim=-1).indices.sort(dim=-1).values  # level by level: parents first
    level_BM = chosen_BM // nodes
    above_BM = (level_BM - 1) * nodes + found.parents_BDM.flatten(1).gather(1, chosen_BM)
    order_BM = torch.arange(1, nodes + 1, device=device).expand(batch, -1)
    index_BE = torch.zeros(batch, depth * nodes, dtype=torch.long, device=device).scatter(1, chosen_BM, order_BM)
    parents_BM = torch.where(level_BM > 0, index_BE.gather(1, above_BM.clamp(min=0)), 0)
    size = nodes + 1
    up_BSS = torch.zeros(batch, size, size, device=device)
    up_BSS[:, 1:].scatter_(2, parents_BM.unsqueeze(-1), 1.0)
    own_SS = torch.eye(size, device=device)
    seen_BSS = own_SS.expand(batch, -1, -1)
    for _ in range(depth):
        seen_BSS = own_SS + up_BSS @ seen_BSS
    depth_BS = seen_BSS.sum(dim=-1).long() - 1
    return Tree(found.tokens_BDM.flatten(1).gather(1, chosen_BM), parents_BM, depth_BS, seen_BSS > 0)


def walk(tokens_BM: Tensor, parents_BM: Tensor, next_BS: Tensor, deepest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's choices down the tree: (kept_B, path_BJ of window positions, next_B).

    next_BS: the token that the target chose (drew) behind each position of the window. deepest: depth of the tree. A node is entered when its parent's
    choice is its token; the choice of the last node entered is emitted. Exact whatever the tree is: each choice is a
    draw from the target given the tokens before it, and every position is visited at most once.
    """
    batch, nodes = tokens_BM.shape
    at_B = torch.zeros(batch, dtype=torch.long, device=next_BS.device)
    going_B = torch.ones(batch, dtype=torch.bool, device=next_BS.device)
    accepted_B, path = torch.zeros_like(at_B), []
    for _ in range(min(deepest, nodes)):
        wanted_B1 = next_BS.gather(1, at_B.unsqueeze(1))
        match_BM = (parents_BM == at_B.unsqueeze(1)) & (tokens_BM == wanted_B1) & going_B.unsqueeze(1)
        going_B = match_BM.any(dim=1)
        at_B = torch.where(going_B, match_BM.long().argmax(dim=1) + 1, at_B)
        accepted_B = accepted_B + going_B
        path.append(at_B)
    path_BJ = torch.stack(path, dim=1) if path else at_B.new_zeros(batch, 0)
    return accepted_B, path_BJ, next_BS.gather(1, at_B.unsqueeze(1)).squeeze(1)
