"""Sequential draft heads, a baseline: each head also sees the tokens drafted before it (Hydra, arXiv 2402.05109).

The distribution of a window is a chain of conditionals, not a mixture: drafts are made one after another, by a head
each, where a mixture has all its factors at once. Trunk and unembedding are a finished model's, frozen.

Letters: B batch, P positions (any batch), J tokens behind the hidden state, S = K+1 positions of a window of K drafts,
N horizon, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpdlm.decoding.drafters import Acceptance, Drafter, Noise, make_drafter
from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.decoding.model import ModelProxy
from cpdlm.decoding.proposals import Proposal
from cpdlm.model.joint import log_normalise
from cpdlm.model.language_model import LanguageModel


class HydraHeads(nn.Module):
    """Head J = 1..N-1 gives x_{t+1+J} from h_t and x_{t+1..t+J}.

    It is the softmax of U (h + out SiLU(into [h, E x_{t+1}, .., E x_{t+J}])), D numbers wide inside.
    """

    def __init__(self, width: int, horizon: int) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear((1 + seen) * width, width) for seen in range(1, horizon))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(1, horizon))
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_PD: Tensor, embedded_PJD: Tensor) -> Tensor:
        """What goes to the unembedding, (P, D), of the head that sees J tokens (1 or more)."""
        head = embedded_PJD.shape[-2] - 1
        seen = torch.cat([hidden_PD, embedded_PJD.flatten(-2)], dim=-1)
        moved_PD: Tensor = self.out[head](F.silu(self.into[head](seen)))
        return hidden_PD + moved_PD


@dataclass(frozen=True)
class SequentialDistribution:
    """The distribution of what follows the pending token, one token at a time."""

    model: HydraModel
    hidden_BD: Tensor
    pending_B: Tensor

    def next(self, drafts_BJ: Tensor) -> Tensor:
        """Log-probabilities (B, V) of the draft behind these; J = 0 for the first."""
        return self.model.log_distribution(self.hidden_BD, torch.cat([self.pending_B[:, None], drafts_BJ], dim=1))


class HydraModel(ModelProxy):
    """A finished model with sequential heads in place of its own, for `decode` with the drafter `Sequential`."""

    base: LanguageModel
    draft_ids = None

    def __init__(self, base: LanguageModel, heads: HydraHeads) -> None:
        super().__init__(base)
        self.heads, self.horizon = heads, len(heads.into) + 1

    @property
    def training(self) -> bool:
        return self.base.training or self.heads.training

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> SequentialDistribution:
        return SequentialDistribution(self, hidden_BD, pending_B)

    def log_distribution(self, hidden_PD: Tensor, tokens_PJ: Tensor) -> Tensor:
        """Log-probabilities (P, V) of the token behind tokens_PJ, the first of which follows the hidden state."""
        return log_normalise(self.base.unembedding(self.heads(hidden_PD, self.base.trunk.embed(tokens_PJ))))

    def nll(self, hidden_PD: Tensor, future_PN: Tensor, count_P: Tensor) -> Tensor:
        """-log q(x_{t+2..t+N} | x_{t+1}) per position (P,), nats; of the N successors count_P exist."""
        total_P = hidden_PD.new_zeros(len(hidden_PD))
        for seen in range(1, self.horizon):
            log_probs_PV = self.log_distribution(hidden_PD, future_PN[:, :seen])
            surprise_P = -log_probs_PV.gather(-1, future_PN[:, seen : seen + 1]).squeeze(-1)
            total_P = total_P + surprise_P.masked_fill(count_P <= seen, 0.0)
        return total_P


class Sequential:
    """The drafter of models that have their conditionals one after another.

    Each draft is drawn from the filtered conditional given those before it (greedy: its argmax), and verified as a
    chain.
    """

    def __init__(self, sampling: Sampling, uniforms: Noise | None) -> None:
        self.sampling, self.uniforms = sampling, uniforms
        self.chain: Drafter = make_drafter("chain", sampling, uniforms)

    def draft(self, joint: SequentialDistribution, depth: int) -> Proposal:
        tokens_BJ = joint.pending_B[:, None][:, :0]
        if self.uniforms is None:
            for _ in range(depth):
                tokens_BJ = torch.cat([tokens_BJ, joint.next(tokens_BJ).argmax(dim=-1, keepdim=True)], dim=1)
            return Proposal(tokens_BJ)
        distributions, uniforms_BK = [], self.uniforms(depth)
        for k in range(depth):
            distributions.append(filtered(joint.next(tokens_BJ), self.sampling))
            # A broken distribution (NaN) drafts the last token, which is then rejected.
            token_B = draw(distributions[-1], uniforms_BK[:, k]).clamp(max=distributions[-1].shape[-1] - 1)
            tokens_BJ = torch.cat([tokens_BJ, token_B[:, None]], dim=1)
        return Proposal(tokens_BJ, torch.stack(distributions, dim=1))

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        return self.chain.verify(target_BSV, proposal)
