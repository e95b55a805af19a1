"""The training objective: which positions count, with what weight, and what keeps the components in use.

    L = mean_t [ -log p(x_{t+1}) ] + mean_{t in S} [ -log p(x_{t+2..t+n} | x_{t+1}) ] + balance

over positions t with at least one successor; absent successors drop out of the joint's marginal. With S = all
positions the first two terms are the mean joint negative log-likelihood (the paper's loss); with S a random subset they
are an unbiased estimate of it whose next-token part still sees every position.

Letters: B batch, T position, P positions picked, R rank. All counts are sums over every process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


def position_weights(
    successors_BT: Tensor, picked_BT: Tensor, step_counts: Tensor, first_is_tied: bool
) -> tuple[Tensor, Tensor]:
    """(first_BT, rest_BT) as `LanguageModel.forward` takes them: weights with which the sums of nll, averaged over
    processes and summed over micro-batches, are the means of L.

    successors_BT: how many successors exist. picked_BT: which positions are in S. step_counts: (2,) positions that
    exist and those of them in S, over all micro-batches of this process in this optimiser step. first_is_tied: the rest
    term is then conditional on x_{t+1}; otherwise it is the whole joint, which holds -log p(x_{t+1}) too, and the first
    term counts only what the joint does not.
    """
    exists_BT = successors_BT > 0
    chosen_BT = exists_BT & picked_BT
    positions, picked = global_sum(step_counts.to(torch.float64))
    share = torch.tensor(float(world_size()), dtype=torch.float64, device=successors_BT.device)
    every_BT = exists_BT * (share / positions.clamp_min(1))
    rest_BT = chosen_BT * (share / picked.clamp_min(1))
    first_BT = every_BT if first_is_tied else (every_BT - rest_BT)
    return first_BT, rest_BT


@dataclass(frozen=True)
class ComponentUse:
    """How a batch used the components, over every process. mean_R carries this process's gradient."""

    mean_R: Tensor  # P_a: batch mean of the weights
    top_share_R: Tensor  # f_a: share of positions whose largest weight is a
    entropy: Tensor  # batch mean of the entropy of a position's weights, nats
    positions: Tensor  # how many positions the means are over

    @property
    def effective(self) -> Tensor:
        """exp of the entropy of the batch-mean weights: 1 (one component does all) to R (all equally)."""
        mean_R = self.mean_R.detach()
        return torch.exp(-(mean_R * mean_R.clamp_min(1e-12).log()).sum())

    @property
    def dead(self) -> Tensor:
        """How many components carry less than a tenth of an equal share."""
        return (self.mean_R.detach() < 0.1 / len(self.mean_R)).sum()


def component_use(log_weights_PR: Tensor) -> ComponentUse:
    """Batch statistics of the gate. log_weights_PR: normalised, one row per position."""
    weights_PR = log_weights_PR.exp()
    rank = weights_PR.shape[-1]
    local_R = weights_PR.sum(dim=0)
    top_R = torch.nn.functional.one_hot(weights_PR.detach().argmax(dim=-1), rank).sum(dim=0)
    entropy = -(weights_PR * log_weights_PR).sum().detach()
    count = torch.tensor(float(len(weights_PR)), device=weights_PR.device)
    total = global_sum(torch.cat([local_R.detach(), top_R.to(local_R.dtype), entropy[None], count[None]]))
    positions = total[-1].clamp_min(1)
    # The gradient of the global mean with respect to this process's rows; processes are averaged afterwards.
    own_R = (local_R - local_R.detach()) * (world_size() / positions)
    return ComponentUse(
        total[:rank] / positions + own_R, total[rank : 2 * rank] / positions, total[2 * rank] / positions, total[-1]
    )


def switch_balance(use: ComponentUse) -> Tensor:
    """R * sum_a f_a P_a (Switch Transformers, arXiv 2101.03961, eq. 4): 1 when balanced, up to R."""
    return len(use.mean_R) * (use.top_share_R * use.mean_R).sum()


def kl_balance(use: ComponentUse) -> Tensor:
    """KL(uniform || P), nats: 0 when the batch-mean weights are equal."""
    rank = len(use.mean_R)
    return -(use.mean_R.clamp_min(1e-12).log()).mean() - math.log(rank)


def bias_step(uses: Sequence[ComponentUse], rate: float) -> Tensor:
    """rate * sign(1/R - P): what balance=bias adds to the gate's bias after each step; P over its micro-batches."""
    total_R = torch.stack([use.mean_R.detach() * use.positions for use in uses]).sum(dim=0)
    mean_R = total_R / torch.stack([use.positions for use in uses]).sum().clamp_min(1)
    return rate * torch.sign(1 / len(mean_R) - mean_R)


def world_size() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def global_sum(value: Tensor) -> Tensor:
    """Sum over processes; the value itself in a single one. Carries no gradient."""
    if not _distributed():
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
