"""The loss of the joint and the balance terms by loops: slow, obvious, sharing no code with cpdlm.

The loss takes torch tensors, a scalar at a time, so that autograd differentiates what is written here and nothing else.
"""

import math

import torch
from torch import Tensor

# --- the dense loss, one row at a time ------------------------------------------------------------------------


def rows(
    kind: str, hidden_D: Tensor, s: int, a: int, rank: int, maps: dict[str, Tensor], unembedding_VD: Tensor
) -> Tensor:
    """Logits (V,) of component a at position s."""
    width = len(hidden_D)
    m = s * rank + a
    if kind == "separate":
        vocab_size = len(unembedding_VD)
        return maps["unembeddings"][m * vocab_size : (m + 1) * vocab_size] @ hidden_D
    if kind == "full":
        return unembedding_VD @ (hidden_D + maps["full"][m * width : (m + 1) * width] @ hidden_D)
    narrow = maps["up"].shape[1]
    inner_K = maps["down"][m * narrow : (m + 1) * narrow] @ hidden_D
    if kind == "mlp":
        inner_K = inner_K / (1 + torch.exp(-inner_K))
    return unembedding_VD @ (hidden_D + inner_K @ maps["up"][m])


def loss(
    kind: str,
    hidden_PD: Tensor,
    log_weights_PR: Tensor,
    future_PN: Tensor,
    count_P: Tensor,
    weight_P: Tensor,
    maps: dict[str, Tensor],
    unembedding_VD: Tensor,
) -> tuple[Tensor, Tensor]:
    """sum_p weight_p nll_p and each nll_p."""
    positions, rank = log_weights_PR.shape
    each = []
    for p in range(positions):
        terms = []
        for a in range(rank):
            term = log_weights_PR[p, a]
            for s in range(int(count_P[p])):
                logits = rows(kind, hidden_PD[p], s, a, rank, maps, unembedding_VD)
                term = term + logits[future_PN[p, s]] - torch.logsumexp(logits, 0)
            terms.append(term)
        each.append(-torch.logsumexp(torch.stack(terms), 0))
    if not each:
        return hidden_PD.sum() * 0, hidden_PD.new_zeros(0)
    total = sum((weight_P[p] * value for p, value in enumerate(each)), start=each[0] * 0)
    return total, torch.stack(each)


# --- balance --------------------------------------------------------------------------------------------------


def use(weights: list[list[float]]) -> tuple[list[float], list[float], float]:
    """Mean weight and share of firsts of each component, and mean entropy, of a batch of gates."""
    rank, positions = len(weights[0]), len(weights)
    mean = [sum(row[a] for row in weights) / positions for a in range(rank)]
    firsts = [sum(1 for row in weights if max(row) == row[a]) / positions for a in range(rank)]
    return mean, firsts, sum(-sum(w * math.log(w) for w in row) for row in weights) / positions
