"""What heads on a frozen model may be trained for: named objectives, each a pure function, in bounded memory.

The joint likelihood is not what decoding earns. A draft is accepted with probability alpha_k = sum_v min(p_k, q_k): p_k
is the target at x_{t+k}, and q_k the draft's distribution there given the same tokens. The objectives below are sums
over the factors k = 1..N of gamma^(k-1) L_k:

    joint             L_k = -log q(x_k | x_1..x_{k-1})               the chain rule's terms, arXiv 2410.17765
    eq14              L_k = a KL(p_k || q_k) + (1-a) (-log q_k(x_k))     KL + CE (eq. 14), q_k the conditional
    eq14-marginal     the same with q_k the marginal of position k   (which of the two is meant is not known)
    acceptance        L_k = 1 - alpha_k                              the total variation of p_k and q_k
    log-acceptance    L_k = -log alpha_k                             arXiv 2602.23881
    blend             L_k = b KL(p_k || q_k) + (1-b) (1 - alpha_k)   ibid.; b = exp(-3 alpha_k), without gradient

With a draft vocabulary both cover its tokens alone. p_k is not renormalised there, since what lies outside is lost to
the draft; q_k is. A token outside has no draft probability: it drops out of -log q and of the posterior. V may be less
still: `teacher` has the target as a few likely tokens and the rest as one.

Letters: P positions, C positions in a chunk, N factors, R rank, V tokens that drafts cover, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpdlm.model.joint import TINY, Joint
from cpdlm.model.losses.teacher import Seen, TopTeacher, WholeTeacher


@dataclass(frozen=True)
class Windows:
    """What the drafts of a window are held against. N factors, k = 1..N.

    future_PN: tokens, as indices of V, -1 for those that drafts do not cover. counts_PN: bool, which factors count:
    those of tokens that exist and whose target is known. state_PN: which of the teacher's states p_k is read from,
    that of position t+k-1.
    """

    future_PN: Tensor
    counts_PN: Tensor
    state_PN: Tensor
    teacher: WholeTeacher | TopTeacher

    def narrowed(self, table_VD: Tensor, top: int, others: int, chunk_bytes: int) -> Windows:
        """The same with a `TopTeacher`, where `top` is not 0. Windows that share a state have one token behind it."""
        if not top:
            return self
        assert isinstance(self.teacher, WholeTeacher)
        own_U = self.state_PN.new_full((len(self.teacher.states_UD),), -1)
        own_U[self.state_PN[self.counts_PN]] = self.future_PN[self.counts_PN]
        chunk = max(1, chunk_bytes // (4 * len(table_VD)))
        return replace(self, teacher=TopTeacher.of(self.teacher, own_U, table_VD, top, others, chunk))


Formula = Callable[[Joint, Seen, float], Tensor]


def cross_entropy(draft_CNV: Tensor, seen: Seen) -> Tensor:
    """-log q_k(x_k) (C, N); 0 where drafts do not cover x_k."""
    chosen_CN = draft_CNV.take_along_dim(seen.future_CN.clamp(min=0).unsqueeze(-1), dim=-1).squeeze(-1)
    return -chosen_CN.clamp_min(TINY).log() * (seen.future_CN >= 0)


def divergence(draft_CNV: Tensor, seen: Seen) -> Tensor:
    """sum_v p_k (log p_k - log q_k) (C, N), over the tokens that drafts cover."""
    target_CNV = seen.target_CNV
    return (target_CNV * (target_CNV.clamp_min(TINY).log() - draft_CNV.clamp_min(TINY).log())).sum(dim=-1)


def overlap(draft_CNV: Tensor, target_CNV: Tensor) -> Tensor:
    """alpha_k (C, N) = sum_v min(p_k, q_k): the probability that a sampled draft is accepted."""
    return torch.minimum(target_CNV, draft_CNV).sum(dim=-1)


def eq14(draft_CNV: Tensor, seen: Seen, alpha: float) -> Tensor:
    return alpha * divergence(draft_CNV, seen) + (1 - alpha) * cross_entropy(draft_CNV, seen)


def blend(draft_CNV: Tensor, seen: Seen) -> Tensor:
    alpha_CN = overlap(draft_CNV, seen.target_CNV)
    share_CN = torch.exp(-3 * alpha_CN.detach())
    return share_CN * divergence(draft_CNV, seen) + (1 - share_CN) * (1 - alpha_CN)


# What `loss.objective` takes: (joint, seen, alpha) -> L_k (C, N), in nats or shares.
OBJECTIVES: dict[str, Formula] = {
    "joint": lambda joint, seen, alpha: cross_entropy(joint.conditionals(seen.future_CN), seen),
    "eq14": lambda joint, seen, alpha: eq14(joint.conditionals(seen.future_CN), seen, alpha),
    "eq14-marginal": lambda joint, seen, alpha: eq14(joint.marginals(), seen, alpha),
    "acceptance": lambda joint, seen, alpha: 1 - overlap(joint.conditionals(seen.future_CN), seen.target_CNV),
    "log-acceptance": lambda joint, seen, alpha: (
        -overlap(joint.conditionals(seen.future_CN), seen.target_CNV).clamp_min(TINY).log()
    ),
    "blend": lambda joint, seen, alpha: blend(joint.conditionals(seen.future_CN), seen),
}


def chunked_sum(
    loss: Callable[..., Tensor], inputs_P: Sequence[Tensor], parameters: Sequence[Tensor], weight_P: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(sum_p weight_p loss_p, loss_P detached), for a loss of each position by itself, `chunk` positions at a time.

    loss(*inputs_C, *parameters) -> loss_C. As in `joint_nll`, gradients are formed in the forward pass, chunk by chunk,
    and backward scales them; memory is that of one chunk. weight_P has no gradient.
    """
    learns = torch.is_grad_enabled()
    total, loss_P = _ChunkedSum.apply(loss, chunk, learns, len(inputs_P), weight_P, *inputs_P, *parameters)
    return total, loss_P


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Callable[..., Tensor], chunk: int, learns: bool, split: int, weight_P: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs_P, parameters = tensors[:split], tensors[split:]
        needs = [learns and need for need in ctx.needs_input_grad[5:]]
        leaves = [each.detach().requires_grad_(need) for each, need in zip(parameters, needs[split:], strict=True)]
        grads = [torch.zeros_like(each) if need else None for each, need in zip(tensors, needs, strict=True)]
        loss_P = torch.empty(len(weight_P), dtype=torch.float32, device=weight_P.device)
        for start in range(0, len(weight_P), chunk):
            part = slice(start, min(start + chunk, len(weight_P)))
            inputs_C = [each[part].detach() for each in inputs_P]
            for each, need in zip(inputs_C, needs[:split], strict=True):
                each.requires_grad_(need)
            with torch.set_grad_enabled(learns):
                loss_C = loss(*inputs_C, *leaves)
                sum_C = (weight_P[part].to(loss_C.dtype) * loss_C).sum()
            loss_P[part] = loss_C.detach()
            wanted = [each for each, need in zip([*inputs_C, *leaves], needs, strict=True) if need]
            if not wanted:
                continue
            found = iter(torch.autograd.grad(sum_C, wanted))
            for index, grad in enumerate(grads):
                if grad is not None and index < split:
                    grad[part] = next(found)
                elif grad is not None:
                    grad += next(found)
        ctx.grads = grads
        ctx.mark_non_differentiable(loss_P)
        return (weight_P.to(torch.float32) * loss_P).sum(), loss_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the draft loss frees its gradients in backward; run the forward pass again"
        return (None,) * 5 + tuple(grad * grad_sum.to(grad.dtype) if grad is not None else None for grad in grads)


@dataclass(frozen=True)
class Objective:
    """A named objective with its constants.

    name: of `OBJECTIVES`. alpha: eq. 14's a. gamma: the discount of each further token. top: how many tokens of the
    target have a cell of their own (0: all). others: how many of the others the draft's normaliser sums over (0: all).
    """

    name: str
    alpha: float = 0.9
    gamma: float = 1.0
    top: int = 0
    others: int = 0

    def __call__(self, joint: Joint, seen: Seen, counts_CN: Tensor) -> Tensor:
        """sum_k gamma^(k-1) L_k (C,) over the factors that count."""
        each_CN = OBJECTIVES[self.name](joint, seen, self.alpha)
        discount_N = self.gamma ** torch.arange(each_CN.shape[1], device=each_CN.device, dtype=each_CN.dtype)
        return (each_CN.masked_fill(~counts_CN, 0.0) * discount_N).sum(dim=1)
