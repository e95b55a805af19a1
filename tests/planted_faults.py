"""Wrong decoders, there so that the tests can be tested.

Each variant is a pair with the signatures of `proposals.sampled_chain` and `accept.verify`; what its draft hands to its
verify as `distributions` is its own affair. Batched like the library, so that one call simulates every sample of a
step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpdlm.decoding import accept, proposals
from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.model.joint import Joint


@dataclass(frozen=True)
class Variant:
    draft: Callable[[Joint, int, Sampling, Tensor], tuple[Tensor, Any]]
    verify: Callable[[Tensor, Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def _drawn_component(joint: Joint, count: int, uniforms_BS: Tensor) -> Tensor:
    component_B = draw(joint.log_weights_R.exp(), uniforms_BS[:, 0])
    return joint.log_factors_NRV[:, :count].take_along_dim(component_B[:, None, None, None], dim=2).squeeze(2)


def _conditionals(joint: Joint, tokens_BK: Tensor) -> Tensor:
    distributions = []
    for k in range(tokens_BK.shape[1]):
        distributions.append(joint.first())
        joint = joint.condition(tokens_BK[:, k])
    return torch.stack(distributions, dim=1)


def _accepted(target_BSV: Tensor, draft_probs_BKV: Tensor, tokens_BK: Tensor, uniforms_BS: Tensor) -> Tensor:
    index = tokens_BK.unsqueeze(-1)
    p, q = target_BSV[:, :-1].gather(-1, index).squeeze(-1), draft_probs_BKV.gather(-1, index).squeeze(-1)
    return (uniforms_BS[:, :-1] * q < p).long().cumprod(dim=-1).sum(dim=-1)


def _after(
    target_BSV: Tensor, draft_probs_BKV: Tensor, accepted_B: Tensor, uniforms_BS: Tensor, from_p: Tensor
) -> Tensor:
    """Token after the accepted drafts: from the residual, or from the target itself where from_p (B,) says so."""
    drafts = draft_probs_BKV.shape[1]
    p = target_BSV.take_along_dim(accepted_B[:, None, None], dim=1).squeeze(1)
    q = draft_probs_BKV.take_along_dim(accepted_B.clamp(max=drafts - 1)[:, None, None], dim=1).squeeze(1)
    from_p = from_p | (accepted_B == drafts)
    return draw(torch.where(from_p.unsqueeze(-1), p, accept.residual(p, q)), uniforms_BS[:, -1])


def draft_by_component(joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor) -> tuple[Tensor, Any]:
    """(a): holds the distributions of both the drawn component and the mixture."""
    own_BKV = _drawn_component(joint, count, uniforms_BS).exp()
    tokens_BK = draw(own_BKV, uniforms_BS[:, 1:])
    return tokens_BK, (own_BKV, _conditionals(joint, tokens_BK).exp())


def verify_wrongly(from_p: Callable[[Tensor], Tensor], two: bool = False) -> Callable[..., tuple[Tensor, Tensor]]:
    """Where the token after accepted_B drafts is drawn from p, whatever was rejected, is up to from_p.

    two: drafts come with two distributions, that by which they are accepted and that by which they are corrected.
    """

    def verify(target_BSV: Tensor, distributions: Any, tokens_BK: Tensor, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
        if distributions is None:
            return accept.verify(target_BSV, distributions, tokens_BK, uniforms_BS)
        accepted_by, corrected_by = distributions if two else (distributions, distributions)
        accepted_B = _accepted(target_BSV, accepted_by, tokens_BK, uniforms_BS)
        return accepted_B, _after(target_BSV, corrected_by, accepted_B, uniforms_BS, from_p(accepted_B))

    return verify


def draft_filtered_components(
    joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """(c): drawn from the filtered component, scored by the filtered conditional of the mixture."""
    own_BKV = filtered(_drawn_component(joint, count, uniforms_BS), sampling)
    tokens_BK = draw(own_BKV, uniforms_BS[:, 1:])
    return tokens_BK, filtered(_conditionals(joint, tokens_BK), sampling)


EXACT = Variant(proposals.sampled_chain, accept.verify)
FAULTS = {
    # Accepted by the drawn component's probability, corrected by the mixture's.
    "a": Variant(draft_by_component, verify_wrongly(lambda accepted_B: accepted_B < 0, two=True)),
    # After a partial acceptance the corrected token is dropped and the position starts a fresh window.
    "b": Variant(proposals.sampled_chain, verify_wrongly(lambda accepted_B: accepted_B > 0)),
    "c": Variant(draft_filtered_components, accept.verify),
    # The corrected token is drawn from p.
    "d": Variant(proposals.sampled_chain, verify_wrongly(lambda accepted_B: accepted_B >= 0)),
}
