"""The rank-R joint law of the next N tokens, as a value.

    p(x_1..x_N) = sum_a w_a prod_s p_a^(s)(x_s)                                     (arXiv 2410.17765)

A canonical polyadic decomposition of an N-way probability tensor, read as a mixture of R experts that each propose a
whole window. Drafting, verifying, evaluation and the tests all use the methods below; nothing here knows a model.

Factors are normalised when they are first asked for, in the form that is asked for: a greedy draft of rank 1 needs scores
alone, other drafts probabilities, a likelihood their logarithms. N x R x V numbers are then passed over once, not thrice.

Letters: N horizon, R rank, V vocabulary; `...` any batch dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Joint:
    """Immutable. `exp(log_weights_R)` and each `exp(log_factors_NRV[..., s, a, :])` sum to 1.

    Shapes: log_weights_R (..., R), normalised; scores_NRV (..., N, R, V) with the same leading dimensions, N may be 0.
    normalised: whether the scores are log-probabilities already; else they are so up to a constant per row.
    """

    log_weights_R: Tensor
    scores_NRV: Tensor
    normalised: bool = True

    def __post_init__(self) -> None:
        weights, factors = self.log_weights_R.shape, self.scores_NRV.shape
        assert len(factors) == len(weights) + 2 and factors[:-3] + factors[-2:-1] == weights, (
            f"weights {tuple(weights)} do not fit factors {tuple(factors)}"
        )

    @staticmethod
    def from_logits(gate_logits_R: Tensor, factor_logits_NRV: Tensor) -> Joint:
        """Normalise unnormalised scores, in at least float32. Shapes as the fields."""
        return Joint(log_normalise(gate_logits_R), log_normalise(factor_logits_NRV))

    @cached_property
    def log_factors_NRV(self) -> Tensor:
        """Log-probabilities (..., N, R, V), in at least float32 unless the scores were normalised in less."""
        return self.scores_NRV if self.normalised else log_normalise(self.scores_NRV)

    @cached_property
    def factors_NRV(self) -> Tensor:
        """Probabilities (..., N, R, V), as `log_factors_NRV`."""
        return self.scores_NRV.exp() if self.normalised else normalise(self.scores_NRV)

    @property
    def weights_R(self) -> Tensor:
        """Probabilities (..., R) of the components."""
        return self.log_weights_R.exp()

    @property
    def horizon(self) -> int:
        return self.scores_NRV.shape[-3]

    @property
    def rank(self) -> int:
        return self.scores_NRV.shape[-2]

    @property
    def vocab_size(self) -> int:
        return self.scores_NRV.shape[-1]

    def log_prob(self, future_N: Tensor, count: Tensor | None = None) -> Tensor:
        """Log-probability (...) of a window, in nats.

        future_N: (..., n) token ids with n <= N; factors beyond n are 1, so n < N gives the marginal of the first n.
        count: (...) how many of the n tokens exist; the rest count as absent (their factors are 1). Default: all.
        """
        return torch.logsumexp(self.log_weights_R + self._log_likelihood_R(future_N, count), dim=-1)

    def chain(self, future_N: Tensor) -> Tensor:
        """Chain-rule terms (..., N): log q(x_k | x_1..x_{k-1}) = log M_k - log M_{k-1}; they sum to `log_prob`."""
        each_NR = _gather(self.log_factors_NRV, future_N)
        running_NR = self.log_weights_R.unsqueeze(-2) + each_NR.cumsum(dim=-2)
        prefix_N = torch.logsumexp(running_NR, dim=-1)
        return prefix_N.diff(dim=-1, prepend=torch.zeros_like(prefix_N[..., :1]))

    def first(self) -> Tensor:
        """Log law (..., V) of the first factor: log sum_a w_a p_a^(1)(v), eq. 11 of the paper."""
        return torch.logsumexp(self.log_weights_R.unsqueeze(-1) + self.log_factors_NRV[..., 0, :, :], dim=-2)

    def posterior(self, prefix_K: Tensor) -> Tensor:
        """Log-posterior (..., R) over components after the tokens prefix_K (..., k), k <= N."""
        return log_normalise(self.log_weights_R + self._log_likelihood_R(prefix_K, None))

    def condition(self, token: Tensor) -> Joint:
        """The law of the remaining N-1 tokens given the first. token: (...) ids."""
        return Joint(self.posterior(token.unsqueeze(-1)), self.scores_NRV[..., 1:, :, :], self.normalised)

    def marginal(self, k: int) -> Joint:
        """The law of the first k tokens, 0 <= k <= N: the absent factors are 1."""
        return Joint(self.log_weights_R, self.scores_NRV[..., :k, :, :], self.normalised)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A window (..., N): the component first, then all its tokens at once, which is equal in law to the chain.

        A sampled token's draft probability is the mixture's conditional (`chain`), never the component's own.
        """
        batch = self.log_weights_R.shape[:-1]
        component = _draw(self.log_weights_R, generator)
        index = component[..., None, None, None].expand(*batch, self.horizon, 1, self.vocab_size)
        return _draw(self.log_factors_NRV.gather(-2, index).squeeze(-2), generator)

    def entropy(self, samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Monte Carlo estimate (...) of the entropy in nats, and its standard error. No closed form for R > 1."""
        surprise_S = torch.stack([-self.log_prob(self.sample(generator)) for _ in range(samples)], dim=-1)
        return surprise_S.mean(dim=-1), surprise_S.std(dim=-1) / samples**0.5

    def _log_likelihood_R(self, future_N: Tensor, count: Tensor | None) -> Tensor:
        each_NR = _gather(self.log_factors_NRV, future_N)
        if count is not None:
            absent_N = torch.arange(future_N.shape[-1], device=future_N.device) >= count.unsqueeze(-1)
            each_NR = each_NR.masked_fill(absent_N.unsqueeze(-1), 0.0)
        return each_NR.sum(dim=-2)


def log_normalise(scores: Tensor) -> Tensor:
    """log_softmax over the last dimension, in float32 or wider."""
    return scores.log_softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def normalise(scores: Tensor) -> Tensor:
    """softmax over the last dimension, in float32 or wider."""
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _gather(log_factors_NRV: Tensor, future_N: Tensor) -> Tensor:
    """(..., n, R): each component's log-probability of each of the n tokens."""
    n, rank = future_N.shape[-1], log_factors_NRV.shape[-2]
    index = future_N[..., None, None].expand(*future_N.shape, rank, 1)
    return log_factors_NRV[..., :n, :, :].gather(-1, index).squeeze(-1)


def _draw(log_probs: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = log_probs.exp().reshape(-1, log_probs.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).reshape(log_probs.shape[:-1])
