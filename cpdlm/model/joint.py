"""The rank-R joint distribution of the next N tokens, as a value.

    p(x_1..x_N) = sum_a w_a prod_s p_a^(s)(x_s)                                     (arXiv 2410.17765)

A canonical polyadic decomposition of an N-way probability tensor, read as a mixture of R experts that each propose a
whole window. With M_k = sum_a w_a prod_{s<=k} p_a^(s)(x_s), the distribution of a prefix,

    eq. 11             q(x_1) = M_1                          `first`
    posterior          w_a prod_{s<=k} p_a^(s)(x_s) / M_k    `posterior`, `condition`
    conditionals       q(x_k | x_1..x_{k-1}) = M_k / M_{k-1}     `conditionals`, and `chain` of given tokens

Drafting, verifying, losses, evaluation and the tests use the methods below. Nothing here knows a model.

Factors are normalised when they are first asked for, in the form that is asked for: a greedy draft of rank 1 needs
scores alone, other drafts probabilities, a likelihood the logarithms of a few. N x R x V numbers are then passed over
once, not thrice. A token of -1 is one that the factors do not cover, or that is absent: its factors are 1.

Letters: N horizon, n <= N tokens, R rank, V vocabulary, M mixtures of the same factors; `...` any batch dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TINY = 1e-30  # below this a float32 probability is rounding


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

    @cached_property
    def _log_sums_NR(self) -> Tensor:
        return _log_sums(self.scores_NRV)

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

    def log_prob(self, future_N: Tensor) -> Tensor:
        """Log-probability (...) of a window, in nats. future_N: (..., n) ids; n < N gives the marginal of n tokens."""
        return torch.logsumexp(self.log_weights_R + self._log_likelihood_NR(future_N).sum(dim=-2), dim=-1)

    def chain(self, future_N: Tensor) -> Tensor:
        """Chain-rule terms (..., n): log q(x_k | x_1..x_{k-1}) = log M_k - log M_{k-1}; they sum to `log_prob`."""
        running_NR = self.log_weights_R.unsqueeze(-2) + self._log_likelihood_NR(future_N).cumsum(dim=-2)
        prefix_N = torch.logsumexp(running_NR, dim=-1)
        return prefix_N.diff(dim=-1, prepend=torch.zeros_like(prefix_N[..., :1]))

    def first(self) -> Tensor:
        """Log-probabilities (..., V) of the first token: log sum_a w_a p_a^(1)(v), eq. 11 of the paper."""
        return torch.logsumexp(self.log_weights_R.unsqueeze(-1) + self.log_factors_NRV[..., 0, :, :], dim=-2)

    def posterior(self, prefix_N: Tensor) -> Tensor:
        """Log-posterior (..., R) over components after the tokens prefix_N (..., n)."""
        return log_normalise(self.log_weights_R + self._log_likelihood_NR(prefix_N).sum(dim=-2))

    def condition(self, token: Tensor) -> Joint:
        """The joint of the remaining N-1 tokens given the first. token: (...) ids."""
        return Joint(self.posterior(token.unsqueeze(-1)), self.scores_NRV[..., 1:, :, :], self.normalised)

    def marginals(self) -> Tensor:
        """(..., N, V): the distribution of each position, whatever the others are."""
        return (self.weights_R[..., None, None, :] @ self.factors_NRV).squeeze(-2)

    def conditionals(self, future_N: Tensor) -> Tensor:
        """(..., N, V): the distribution of each position given the tokens before it. future_N: (..., N) ids.

        A mixture of the factors with the posterior of the prefix as its weights. The last token is not read.
        """
        token_N11 = future_N[..., :-1, None, None].clamp(min=0)
        seen_NR = self.factors_NRV[..., :-1, :, :].take_along_dim(token_N11, dim=-1).squeeze(-1).clamp_min(TINY).log()
        seen_NR = seen_NR.masked_fill(future_N[..., :-1, None] < 0, 0.0)
        before_NR = torch.nn.functional.pad(seen_NR.cumsum(dim=-2), (0, 0, 1, 0))
        weights_NR = (self.log_weights_R.unsqueeze(-2) + before_NR).softmax(dim=-1)
        return (weights_NR.unsqueeze(-2) @ self.factors_NRV).squeeze(-2)

    def mixed(self, k: int, weights_MR: Tensor) -> Tensor:
        """(..., M, V) sum_a w_a p_a^(k)(v), k from 0, for M sets of weights (..., M, R), which need not sum to 1."""
        return weights_MR @ self.factors_NRV[..., k, :, :]

    def reweighted(self, k: int, weights_MR: Tensor, token_M: Tensor) -> Tensor:
        """(..., M, R) w_a p_a^(k)(x): the posterior of each set of weights after a token (..., M), not normalised."""
        factor_RV = self.factors_NRV[..., k, :, :]
        index_RM = token_M.unsqueeze(-2).expand(*token_M.shape[:-1], self.rank, token_M.shape[-1])
        return weights_MR * factor_RV.gather(-1, index_RM).transpose(-1, -2)

    def marginal(self, k: int) -> Joint:
        """The joint of the first k tokens, 0 <= k <= N: the absent factors are 1."""
        return Joint(self.log_weights_R, self.scores_NRV[..., :k, :, :], self.normalised)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A window (..., N): the component first, then all its tokens at once, distributed as the chain is.

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

    def _log_likelihood_NR(self, future_N: Tensor) -> Tensor:
        """(..., n, R): each component's log-probability of each token, 0 of an absent one."""
        index_NR1 = future_N[..., None, None].clamp(min=0).expand(*future_N.shape, self.rank, 1)
        scores_NRV = self.scores_NRV[..., : future_N.shape[-1], :, :]
        chosen_NR = scores_NRV.gather(-1, index_NR1).squeeze(-1)
        if not self.normalised:
            whole = future_N.shape[-1] == self.horizon
            chosen_NR = chosen_NR - (self._log_sums_NR if whole else _log_sums(scores_NRV))
        return chosen_NR.masked_fill(future_N.unsqueeze(-1) < 0, 0.0)


def log_normalise(scores: Tensor) -> Tensor:
    """log_softmax over the last dimension, in float32 or wider."""
    return scores.log_softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def normalise(scores: Tensor) -> Tensor:
    """softmax over the last dimension, in float32 or wider."""
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _log_sums(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(dim=-1)


def _draw(log_probs: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = log_probs.exp().reshape(-1, log_probs.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).reshape(log_probs.shape[:-1])
