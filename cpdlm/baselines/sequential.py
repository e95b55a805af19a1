"""Drafts of a model that has its conditionals one after another: sequential heads, where no joint law exists to condition.

Letters: B batch, J drafts so far, S = K+1 positions of a window, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpdlm.baselines.hydra import SequentialDistribution
from cpdlm.decoding.drafters import Acceptance, Drafter, Greedy, Noise, RejectionSampling
from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.decoding.proposals import Proposal


class Sequential:
    """Each draft drawn from (under greedy: the argmax of) the filtered conditional given those before it; verified as a
    chain. `decode(..., draft=Sequential)`."""

    def __init__(self, sampling: Sampling, uniforms: Noise | None) -> None:
        self.sampling, self.uniforms = sampling, uniforms
        self.chain: Drafter = Greedy() if uniforms is None else RejectionSampling(sampling, uniforms)

    def draft(self, joint: SequentialDistribution, depth: int) -> Proposal:
        tokens_BJ = joint.pending_B[:, None][:, :0]
        if self.uniforms is None:
            for _ in range(depth):
                tokens_BJ = torch.cat([tokens_BJ, joint.next(tokens_BJ).argmax(dim=-1, keepdim=True)], dim=1)
            return Proposal(tokens_BJ)
        distributions, uniforms_BK = [], self.uniforms(depth)
        for k in range(depth):
            distributions.append(filtered(joint.next(tokens_BJ), self.sampling))
            # A broken law (NaN) drafts the last token, which is then rejected.
            token_B = draw(distributions[-1], uniforms_BK[:, k]).clamp(max=distributions[-1].shape[-1] - 1)
            tokens_BJ = torch.cat([tokens_BJ, token_B[:, None]], dim=1)
        return Proposal(tokens_BJ, torch.stack(distributions, dim=1))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        return self.chain.verify(target_BSV, proposal)
