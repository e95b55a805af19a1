"""Drafters: how drafts are made and which of them are accepted. One small interface, one class per idea, each lossless.

The loop hands a drafter the joint of the tokens behind the pending one, runs the model over what it proposes, and hands
it the target p at every proposed token. What is emitted must be distributed as the target whatever the drafts are;
drafters differ in how many of them survive.

Letters: B batch, K drafts, S = K+1 positions of a window, J longest path through the drafts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cpdlm.config import CHOICES
from cpdlm.decoding.accept import argmaxes, follow, verify, verify_block, walk
from cpdlm.decoding.filtering import Sampling, draw, filtered, is_whole
from cpdlm.decoding.proposals import Proposal, best_window, branched, greedy_chain, grow, sampled_chain
from cpdlm.model.joint import Joint


@dataclass(frozen=True)
class Acceptance:
    """accepted_B: how many drafts are accepted. tokens_BJ: they, in order, and those that were tested behind them; -1
    where there was none. next_B: the token after them; V marks a target that is no distribution. path_BJ: for a tree,
    the window positions of tokens_BJ; None for a chain."""

    accepted_B: Tensor
    tokens_BJ: Tensor
    next_B: Tensor
    path_BJ: Tensor | None = None


class Drafter(Protocol):
    def draft(self, joint: Any, depth: int) -> Proposal:
        """Drafts at most `depth` tokens deep. joint: of what follows the pending token, batch (B,), at least `depth`
        factors."""
        ...

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        """target_BSV: log-probabilities, or scores that rank and normalise alike, behind each token of the window."""
        ...


class Uniforms:
    """(B, count) numbers in [0, 1), float64, each row from its own generator."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self.generators, self.device = list(generators), device

    def __call__(self, count: int) -> Tensor:
        return torch.stack([self._row(count, generator) for generator in self.generators]).to(self.device)

    def _row(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)

    def select(self, rows: Sequence[int]) -> None:
        self.generators = [self.generators[row] for row in rows]


Noise = Callable[[int], Tensor]  # count -> (B, count) numbers in [0, 1), float64, independent of each other
Maker = Callable[[Sampling, Noise | None], Drafter]
Distribution = Callable[[Tensor], Tensor]  # target scores (..., V) -> probabilities


class RejectionSampling:
    """Chain drawn from the filtered conditionals; what is emitted has the filtered target p.

    target_distribution: the sampling's own filter unless the caller has another. block: the chain is accepted as a
    block, not token by token.
    """

    def __init__(
        self,
        sampling: Sampling,
        uniforms: Noise,
        target_distribution: Distribution | None = None,
        block: bool = False,
    ) -> None:
        self.sampling, self.uniforms, self.block = sampling, uniforms, block
        self.target_distribution = target_distribution or (lambda scores: filtered(scores, sampling))

    def draft(self, joint: Joint, depth: int) -> Proposal:
        tokens_BK, probs_BKV = sampled_chain(joint, depth, self.sampling, self.uniforms(depth + 1))
        return Proposal(tokens_BK, probs_BKV, lambda: probs_BKV.amax(dim=-1))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        tokens_BK, probs_BSV = proposal.tokens_BK, self.target_distribution(target_BSV)
        uniforms_BS, test = self.uniforms(target_BSV.shape[1]), verify_block if self.block else verify
        # Where there is no draft (-1), q is NaN, which rejects and leaves p.
        accepted_B, next_B = test(probs_BSV, proposal.distributions, tokens_BK.clamp(min=0), uniforms_BS)
        return Acceptance(accepted_B, tokens_BK, next_B)


class DeterministicDraft:
    """Drafts that are a function of the joint and the text alone: no draft q, no acceptance ratio.

    The target's choice is drawn (or, under greedy, taken) behind every token of the window; drafts are accepted while
    they are what was chosen. shape: "chain", the argmax of each conditional in turn; "tree", the `nodes` likeliest
    prefixes; "window", the likeliest whole window; "path", the window with the largest sum of prefix probabilities,
    that is, the largest expected number of accepted tokens if the joint were the target. The last two search a beam of
    `nodes`.
    """

    def __init__(
        self,
        shape: str,
        sampling: Sampling,
        uniforms: Noise | None,
        nodes: int,
        target_distribution: Distribution | None = None,
    ) -> None:
        self.shape, self.uniforms, self.nodes = shape, uniforms, nodes
        self.target_distribution = target_distribution or (lambda scores: filtered(scores, sampling))

    def draft(self, joint: Joint, depth: int) -> Proposal:
        if self.shape == "tree":
            return grow(joint, depth, self.nodes)
        chain = self.shape == "chain"
        tokens_BK = greedy_chain(joint, depth) if chain else best_window(joint, depth, self.shape, self.nodes)
        return Proposal(tokens_BK, confidence=lambda: joint.marginal(depth).chain(tokens_BK).exp())

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        if proposal.parents_BK is not None and self.uniforms is not None:
            fresh = _fresh(self.target_distribution(target_BSV), self.uniforms(target_BSV.shape[1]))
            return _walked(proposal, proposal.parents_BK, fresh)
        if self.uniforms is None:
            chosen_BS = argmaxes(target_BSV)
        else:
            chosen_BS = draw(self.target_distribution(target_BSV), self.uniforms(target_BSV.shape[1]))
        if proposal.parents_BK is not None:
            return _walked(proposal, proposal.parents_BK, lambda at_B: _at(chosen_BS, at_B))
        accepted_B, next_B = follow(chosen_BS, proposal.tokens_BK)
        return Acceptance(accepted_B, proposal.tokens_BK, next_B)


class Branched(RejectionSampling):
    """A drawn chain with branches beside it. The chain is accepted as a block; the token drawn after what was accepted,
    where it is a branch, leads on to the target's choice behind that branch.

    That token has the law that the acceptance test gives it, each later one is a fresh draw from the target given the
    tokens before it: which branches there are does not matter.
    """

    def __init__(
        self, sampling: Sampling, uniforms: Noise, nodes: int, target_distribution: Distribution | None = None
    ) -> None:
        super().__init__(sampling, uniforms, target_distribution)
        self.nodes = nodes

    def draft(self, joint: Joint, depth: int) -> Proposal:
        tokens_BK, probs_BKV = sampled_chain(joint, depth, self.sampling, self.uniforms(depth + 1))
        return branched(tokens_BK, probs_BKV, self.nodes)

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        tokens_BM, probs_BSV = proposal.tokens_BK, self.target_distribution(target_BSV)
        drafts = 0 if proposal.distributions is None else min(proposal.distributions.shape[1], tokens_BM.shape[1])
        test_BS, fresh = self.uniforms(drafts + 1), _fresh(probs_BSV, self.uniforms(target_BSV.shape[1]))
        q_BKV = probs_BSV[:, :0] if proposal.distributions is None else proposal.distributions[:, :drafts]
        kept_B, next_B = verify_block(probs_BSV[:, : drafts + 1], q_BKV, tokens_BM[:, :drafts], test_BS)
        if proposal.parents_BK is None:
            return Acceptance(kept_B, tokens_BM, next_B)

        def choose(at_B: Tensor) -> Tensor:
            chosen_B = torch.where(at_B < kept_B, _at(tokens_BM, at_B.clamp(max=tokens_BM.shape[1] - 1)), next_B)
            if at_B.device.type == "cpu" and not (at_B > kept_B).any():
                return chosen_B
            return torch.where(at_B > kept_B, fresh(at_B), chosen_B)

        return _walked(proposal, proposal.parents_BK, choose)


def _at(values_BS: Tensor, at_B: Tensor) -> Tensor:
    return values_BS.gather(1, at_B.unsqueeze(1)).squeeze(1)


def _fresh(probs_BSV: Tensor, uniforms_BS: Tensor) -> Callable[[Tensor], Tensor]:
    """Draws from the target behind positions of the window."""
    return lambda at_B: draw(probs_BSV.take_along_dim(at_B[:, None, None], dim=1).squeeze(1), _at(uniforms_BS, at_B))


def _walked(proposal: Proposal, parents_BM: Tensor, choose: Callable[[Tensor], Tensor]) -> Acceptance:
    """Behind a leaf no draft was tested: the path has no token there."""
    tokens_BM = proposal.tokens_BK
    accepted_B, path_BJ, next_B = walk(tokens_BM, parents_BM, choose, proposal.deepest)
    last_B1 = torch.nn.functional.pad(path_BJ, (1, 0)).gather(1, accepted_B.unsqueeze(1))
    is_leaf_B1 = ~((parents_BM == last_B1) & (tokens_BM >= 0)).any(dim=1, keepdim=True)
    behind_BJ = torch.arange(path_BJ.shape[1], device=path_BJ.device) >= accepted_B.unsqueeze(1)
    tokens_BJ = tokens_BM.gather(1, (path_BJ - 1).clamp(min=0)).masked_fill(is_leaf_B1 & behind_BJ, -1)
    return Acceptance(accepted_B, tokens_BJ, next_B, path_BJ)


DRAFTERS = ("none", *CHOICES["decode.draft"])  # what `draft=` takes
LOOKUP = "lookup"
BRANCHES = ("tree", "branched")  # ends of the names whose drafts are a tree
MOST_NODES = 4096  # what they see of each other grows with the square


def make_drafter(
    name: str | Maker, sampling: Sampling, uniforms: Noise | None, nodes: int = 8, processed: bool = False
) -> Drafter:
    """The drafter of that name for this sampling; raises ValueError on an unknown one.

    name: or what makes a drafter that is none of these, for a model whose draft distribution is no `Joint`. uniforms:
    None under greedy. nodes: drafts of a tree, or width of the beam. processed: the target's scores are filtered
    already.
    """
    if callable(name):
        return name(sampling, uniforms)
    if name not in DRAFTERS:
        raise ValueError(f"draft={name!r} is not one of {', '.join(DRAFTERS)}")
    if not is_whole(nodes) or nodes > MOST_NODES:
        raise ValueError(f"nodes={nodes!r} is no number of drafts; pass a whole number, 1 to {MOST_NODES}")
    target_distribution = _normalised if processed else None
    name = name.removeprefix(f"{LOOKUP}+")
    if name in ("tree", "window", "path", LOOKUP):
        return DeterministicDraft(name, sampling, uniforms, nodes, target_distribution)
    if uniforms is None:
        return DeterministicDraft("chain", sampling, uniforms, nodes, target_distribution)
    if name == "branched":
        return Branched(sampling, uniforms, nodes, target_distribution)
    return RejectionSampling(sampling, uniforms, target_distribution, block=name == "block")


def _normalised(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
