"""Drafts of a model that has its conditionals one after another: sequential heads, where no joint law exists to condition.

Letters: B batch, J drafts so far, S = K+1 positions of a window, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpdlm.baselines.hydra import SequentialLaw
from cpdlm.decoding.drafters import Ancestral, Greedy, Proposal, Strategy, Uniforms, Verdict
from cpdlm.decoding.filtering import Sampling, draw, filtered


class Sequential:
    """Each draft drawn from (under greedy: the argmax of) the filtered conditional given those before it; verified as a
    chain. `decode(..., draft=Sequential)`."""

    def __init__(self, sampling: Sampling, uniforms: Uniforms | None) -> None:
        self.sampling, self.uniforms = sampling, uniforms
        self.chain: Strategy = Greedy() if uniforms is None else Ancestral(sampling, uniforms)

    def draft(self, joint: SequentialLaw, depth: int) -> Proposal:
        tokens_BJ = joint.fixed_B[:, None][:, :0]
        if self.uniforms is None:
            for _ in range(depth):
                tokens_BJ = torch.cat([tokens_BJ, joint.next(tokens_BJ).argmax(dim=-1, keepdim=True)], dim=1)
            return Proposal(tokens_BJ)
        laws, uniforms_BK = [], self.uniforms(depth)
        for k in range(depth):
            laws.append(filtered(joint.next(tokens_BJ), self.sampling))
            # A broken law (NaN) drafts the last token, which is then rejected.
            token_B = draw(laws[-1], uniforms_BK[:, k]).clamp(max=laws[-1].shape[-1] - 1)
            tokens_BJ = torch.cat([tokens_BJ, token_B[:, None]], dim=1)
        return Proposal(tokens_BJ, torch.stack(laws, dim=1))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Verdict:
        return self.chain.verify(target_BSV, proposal)
