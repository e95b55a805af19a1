"""How drafts are made and which of them are kept: one small interface, one implementation per idea, each lossless.

The loop (`speculative.decode_batch`) hands a strategy the joint law of the tokens behind the fixed one, runs the trunk over what
it proposes, and hands it the target at every proposed token. What is emitted must have the target's law whatever the
drafts are; strategies differ in how many of them survive.

Letters: B batch, K drafts of a pass, S = K+1 positions of a window, J longest path through the drafts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cpdlm.decoding import chain, tree
from cpdlm.decoding.accept import verify, verify_block, verify_greedy
from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.model.joint import Joint


@dataclass(frozen=True)
class Proposal:
    """Drafts behind the fixed token, as many for every row.

    tokens_BK: ids. laws: what the strategy's own `verify` needs: (B, K, V) probabilities of drawn drafts, a tree's depth. For a tree, over
    window positions (0 is the fixed token, k+1 is draft k): parents_BK, the position before each draft; depth_BS, how far
    behind the fixed token each position is; seen_BSS, whether s (row) sees j (column): its ancestors and itself. None for
    a chain.
    """

    tokens_BK: Tensor
    distributions: Any = None
    parents_BK: Tensor | None = None
    depth_BS: Tensor | None = None
    seen_BSS: Tensor | None = None

    def on_vocabulary(self, draft_ids: Tensor, vocab_size: int) -> Proposal:
        """The same drafts, made on a shortlist of the vocabulary, by their ids in the whole: draft_ids (V',)."""
        distributions = self.distributions
        if isinstance(distributions, Tensor):
            distributions = distributions.new_zeros(*distributions.shape[:-1], vocab_size).index_copy(
                -1, draft_ids, distributions
            )
        return replace(self, tokens_BK=draft_ids[self.tokens_BK], distributions=distributions)


@dataclass(frozen=True)
class Acceptance:
    """kept_B: how many drafts are kept. tokens_BJ: they, in order (what lies behind kept_B is not read). next_B: the token
    after them; V marks a target that is no law. path_BJ: for a tree, the window positions of tokens_BJ; None for a chain."""

    accepted_B: Tensor
    tokens_BJ: Tensor
    next_B: Tensor
    path_BJ: Tensor | None = None


class Drafter(Protocol):
    def draft(self, joint: Any, depth: int) -> Proposal:
        """Drafts at most `depth` tokens deep. joint: the law of what follows the fixed token, batch (B,), `depth` factors or
        more."""
        ...

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        """target_BSV: log-probabilities (or scores that rank and normalise alike) behind each token of the window."""
        ...


class Uniforms:
    """(B, count) numbers in [0, 1), float64, each row from its own generator."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self.generators, self.device = list(generators), device

    def __call__(self, count: int) -> Tensor:
        rows = [
            torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
            for generator in self.generators
        ]
        return torch.stack(rows).to(self.device)

    def select(self, rows: Sequence[int]) -> None:
        self.generators = [self.generators[row] for row in rows]


Noise = Callable[[int], Tensor]  # count -> (B, count) numbers in [0, 1), float64, independent of each other
Maker = Callable[[Sampling, Noise | None], Drafter]


def nothing(like: Tensor) -> Proposal:
    """No drafts, for rows like these: (B, ...) ids."""
    return Proposal(like.new_zeros(len(like), 0))


class Greedy:
    """Chain at temperature 0: drafts and target by argmax."""

    def draft(self, joint: Joint, depth: int) -> Proposal:
        return Proposal(chain.greedy_chain(joint, depth))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        accepted_B, next_B = verify_greedy(target_BSV, proposal.tokens_BK)
        return Acceptance(accepted_B, proposal.tokens_BK, next_B)


class RejectionSampling:
    """Chain drawn from the filtered conditionals, kept token by token so that the filtered target's law is unchanged.

    target_law: target scores -> probabilities; the sampling's own filter unless the caller has another.
    """

    def __init__(
        self, sampling: Sampling, uniforms: Noise, target_distribution: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.sampling, self.uniforms = sampling, uniforms
        self.target_distribution = target_distribution or (lambda scores: filtered(scores, sampling))

    def draft(self, joint: Joint, depth: int) -> Proposal:
        return Proposal(*chain.sampled_chain(joint, depth, self.sampling, self.uniforms(depth + 1)))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        accepted_B, next_B = verify(
            self.target_distribution(target_BSV),
            proposal.distributions,
            proposal.tokens_BK,
            self.uniforms(target_BSV.shape[1]),
        )
        return Acceptance(accepted_B, proposal.tokens_BK, next_B)


class BlockVerification:
    """Drafts as `Ancestral`'s, verified as a block (Sun et al., arXiv 2403.10444, algorithm 2): never fewer are kept.

    Ancestral keeps a prefix only if each of its tokens passes by itself; here a prefix is kept if it passes as a whole, so
    that a token which the target likes more than the draft does makes up for one before it.
    """

    def __init__(
        self, sampling: Sampling, uniforms: Noise, target_distribution: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.chain = RejectionSampling(sampling, uniforms, target_distribution)

    def draft(self, joint: Joint, depth: int) -> Proposal:
        return self.chain.draft(joint, depth)

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        if proposal.tokens_BK.shape[1] == 0:
            return self.chain.verify(target_BSV, proposal)
        accepted_B, next_B = verify_block(
            self.chain.target_distribution(target_BSV),
            proposal.distributions,
            proposal.tokens_BK,
            self.chain.uniforms(target_BSV.shape[1]),
        )
        return Acceptance(accepted_B, proposal.tokens_BK, next_B)


class DeterministicDraft:
    """Drafts that are a function of the joint alone: no draft law, no acceptance ratio.

    The target's choice is drawn (or, under greedy, taken) behind every token of the window; drafts are kept while they are
    what was chosen. shape: "tree", the `nodes` likeliest prefixes; "window", the likeliest whole window; "path", the window
    with the largest sum of prefix probabilities, that is, the largest expected number of tokens kept if the joint were the
    target. The last two search a beam of `nodes`.
    """

    def __init__(
        self,
        shape: str,
        sampling: Sampling,
        uniforms: Noise | None,
        nodes: int,
        target_distribution: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.shape, self.sampling, self.uniforms, self.nodes = shape, sampling, uniforms, nodes
        self.target_distribution = target_distribution or (lambda scores: filtered(scores, sampling))

    def draft(self, joint: Joint, depth: int) -> Proposal:
        if self.shape == "tree":
            grown = tree.grow(joint, depth, min(self.nodes, _most(joint.vocab_size, depth)))
            return Proposal(grown.tokens_BM, depth, grown.parents_BM, grown.depth_BS, grown.seen_BSS)
        tokens_BMD, log_probs_BMD = tree.beam(joint, depth, self.nodes).windows()
        score_BM = log_probs_BMD[..., -1] if self.shape == "window" else log_probs_BMD.exp().sum(dim=-1)
        best_B11 = score_BM.argmax(dim=-1)[:, None, None]
        return Proposal(tokens_BMD.take_along_dim(best_B11, dim=1).squeeze(1))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        next_BS = self._choices(target_BSV)
        if proposal.parents_BK is not None:
            accepted_B, path_BJ, next_B = tree.walk(
                proposal.tokens_BK, proposal.parents_BK, next_BS, proposal.distributions
            )
            tokens_BJ = proposal.tokens_BK.gather(1, (path_BJ - 1).clamp(min=0))
            return Acceptance(accepted_B, tokens_BJ, next_B, path_BJ)
        right_BK = next_BS[:, :-1] == proposal.tokens_BK
        accepted_B = right_BK.long().cumprod(dim=1).sum(dim=1)
        return Acceptance(accepted_B, proposal.tokens_BK, next_BS.gather(1, accepted_B.unsqueeze(1)).squeeze(1))

    def _choices(self, target_BSV: Tensor) -> Tensor:
        """(B, S) the target's choice behind each token; V where it is no law."""
        if self.uniforms is None:
            value_BS, best_BS = target_BSV.max(dim=-1)
            return best_BS.masked_fill(~(value_BS > -math.inf), target_BSV.shape[-1])
        return draw(self.target_distribution(target_BSV), self.uniforms(target_BSV.shape[1]))


def _most(vocab_size: int, depth: int) -> int:
    """How many prefixes there are."""
    return sum(vocab_size**k for k in range(1, depth + 1)) if vocab_size < 64 else 10**9


# What `draft=` takes, and what it does under greedy and under sampling.
DRAFTERS = {
    "none": "plain decoding",
    "chain": "argmaxes of the conditionals; sampled from the conditionals, kept token by token",
    "block": "the chain, kept as a block (the same as chain under greedy)",
    "tree": "the likeliest prefixes as a tree",
    "window": "the likeliest window",
    "path": "the window with the largest expected number of tokens kept",
}


def make_drafter(
    name: str | Maker, sampling: Sampling, uniforms: Noise | None, nodes: int = 8, processed: bool = False
) -> Drafter:
    """The strategy of that name for this sampling; raises ValueError on an unknown one.

    name: or what makes a strategy that is none of these, for a model whose draft law is no `Joint`. uniforms: None under
    greedy. nodes: drafts of a tree, or width of the beam. processed: the target's scores are the
    caller's, filtered already.
    """
    if callable(name):
        return name(sampling, uniforms)
    if name not in DRAFTERS:
        raise ValueError(f"draft={name!r} is not one of {', '.join(DRAFTERS)}")
    if nodes < 1:
        raise ValueError(f"nodes={nodes} drafts nothing; pass at least 1")
    target_distribution = _normalised if processed else None
    if name in ("tree", "window", "path"):
        return DeterministicDraft(name, sampling, uniforms, nodes, target_distribution)
    if uniforms is None:
        return Greedy()
    return (BlockVerification if name == "block" else RejectionSampling)(sampling, uniforms, target_distribution)


def _normalised(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
