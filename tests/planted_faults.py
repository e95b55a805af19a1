"""Wrong decoders, there so that the tests can be tested, and two right but wasteful ones that must pass them.

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


def verify_by_component(
    target_BSV: Tensor, distributions: Any, tokens_BK: Tensor, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """(a): accepted by the drawn component's probability, corrected by the mixture's."""
    if distributions is None:
        return accept.verify(target_BSV, distributions, tokens_BK, uniforms_BS)
    accepted_B = _accepted(target_BSV, distributions[0], tokens_BK, uniforms_BS)
    return accepted_B, _after(
        target_BSV, distributions[1], accepted_B, uniforms_BS, torch.zeros_like(accepted_B, dtype=torch.bool)
    )


def verify_without_residual(
    target_BSV: Tensor, distributions: Any, tokens_BK: Tensor, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """(b): after a partial acceptance the corrected token is dropped and the position starts a fresh window."""
    if distributions is None:
        return accept.verify(target_BSV, distributions, tokens_BK, uniforms_BS)
    accepted_B = _accepted(target_BSV, distributions, tokens_BK, uniforms_BS)
    return accepted_B, _after(target_BSV, distributions, accepted_B, uniforms_BS, accepted_B > 0)


def draft_filtered_components(
    joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """(c): drawn from the filtered component, scored by the filtered conditional of the mixture."""
    own_BKV = filtered(_drawn_component(joint, count, uniforms_BS), sampling)
    tokens_BK = draw(own_BKV, uniforms_BS[:, 1:])
    return tokens_BK, filtered(_conditionals(joint, tokens_BK), sampling)


def verify_from_target(
    target_BSV: Tensor, distributions: Any, tokens_BK: Tensor, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """(d): the corrected token is drawn from p."""
    if distributions is None:
        return accept.verify(target_BSV, distributions, tokens_BK, uniforms_BS)
    accepted_B = _accepted(target_BSV, distributions, tokens_BK, uniforms_BS)
    return accepted_B, _after(
        target_BSV, distributions, accepted_B, uniforms_BS, torch.ones_like(accepted_B, dtype=torch.bool)
    )


def draft_component_throughout(
    joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Lossless, wasteful: the drawn component is the draft q everywhere (no filters)."""
    own_BKV = _drawn_component(joint, count, uniforms_BS).exp()
    return draw(own_BKV, uniforms_BS[:, 1:]), own_BKV


def draft_filtered_throughout(
    joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Lossless, another joint: the mixture of the filtered components, drawn from and scored by."""
    other = Joint(joint.log_weights_R, filtered(joint.log_factors_NRV, sampling).log())
    tokens_BK = draw(_drawn_component(other, count, uniforms_BS).exp(), uniforms_BS[:, 1:])
    return tokens_BK, _conditionals(other, tokens_BK).exp()


EXACT = Variant(proposals.sampled_chain, accept.verify)
FAULTS = {
    "a": Variant(draft_by_component, verify_by_component),
    "b": Variant(proposals.sampled_chain, verify_without_residual),
    "c": Variant(draft_filtered_components, accept.verify),
    "d": Variant(proposals.sampled_chain, verify_from_target),
}
WASTEFUL = {
    "component throughout": Variant(draft_component_throughout, accept.verify),
    "filtered components throughout": Variant(draft_filtered_throughout, accept.verify),
}
