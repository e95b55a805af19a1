"""The rank-R joint distribution of the next N tokens, as a value.

    p(x_1..x_N) = sum_a w_a prod_s p_a^(s)(x_s)                                     (CP, arXiv 2410.17765)

A canonical polyadic decomposition of an N-way probability tensor, read as a mixture of R experts that each propose a
whole window. Two things may be added, each without the other or with it:

- transitions, T_s(b | a): the component may change between two positions. Components are then the states of a hidden
  Markov model (HMM, arXiv 2511.11346), of which CP is the one with T = identity.
- a link: each factor also sees the token before it, p_a^(s)(x_s | x_{s-1}). Without transitions this is a mixture of R
  Markov chains. What is summed over unseen tokens, `marginals`, then has no closed form.

With f_k(a) = the probability of a prefix x_1..x_k together with component a at position k+1 (forward recursion), and
M_k = sum_a f_k(a), the distribution of the prefix,

    eq. 11             q(x_1) = M_1                              `first`
    posterior          f_k(a) / M_k                              `posterior`, `condition`
    conditionals       q(x_k | x_1..x_{k-1}) = M_k / M_{k-1}     `conditionals`, and `chain` of given tokens

Drafting, verifying, losses, evaluation and the tests use the methods below. Nothing here knows a model.

Factors are normalised when they are first asked for, in the form that is asked for: a greedy draft of rank 1 needs
scores alone, other drafts probabilities, a likelihood the logarithms of a few. N x R x V numbers are then passed over
once, not thrice. A token of -1 is one that the factors do not cover, or that is absent: its factors are 1.

Letters: N horizon, n <= N tokens, R rank, V vocabulary, M prefixes of one window, C tokens behind each; `...` any
batch dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

TINY = 1e-30  # below this a float32 probability is rounding

# (k, before) -> (..., M, V): what the scores of factor k > 0 gain where the token before it is `before` (..., M).
Link = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """Factor k of a joint behind M prefixes, in probabilities: what a draft is made of, one position at a time.

    factors_MRV: (..., M, R, V); M is 1 where the factor is the same behind every prefix. transitions_RR: (..., R, R)
    that lead to the factor behind it, None where components stay.
    """

    factors_MRV: Tensor
    transitions_RR: Tensor | None

    def mixed(self, weights_MR: Tensor) -> Tensor:
        """(..., M, V) sum_a w_a p_a(v), for weights (..., M, R) that need not sum to 1."""
        if self.factors_MRV.shape[-3] == 1:
            return weights_MR @ self.factors_MRV.squeeze(-3)
        return (weights_MR.unsqueeze(-2) @ self.factors_MRV).squeeze(-2)

    def reweighted(self, weights_MR: Tensor, token_MC: Tensor) -> Tensor:
        """(..., M, C, R) weights of the factor behind this one after each of C tokens (..., M, C), not normalised."""
        *batch, prefixes, rank = weights_MR.shape
        factors_MRV = self.factors_MRV.expand(*batch, prefixes, rank, -1)
        index_MRC = token_MC.unsqueeze(-2).expand(*batch, prefixes, rank, -1)
        weights_MCR = (weights_MR.unsqueeze(-1) * factors_MRV.gather(-1, index_MRC)).transpose(-1, -2)
        return weights_MCR if self.transitions_RR is None else weights_MCR @ self.transitions_RR.unsqueeze(-3)


@dataclass(frozen=True, eq=False)
class Joint:
    """Immutable. `exp(log_weights_R)` and each `exp(log_factors_NRV[..., s, a, :])` sum to 1.

    Shapes: log_weights_R (..., R), normalised; scores_NRV (..., N, R, V) with the same leading dimensions, N may be 0.
    normalised: whether the scores are log-probabilities already; else they are so up to a constant per row.
    log_transitions_NRR: (..., N-1, R, R) log T_s(b | a), from component a to b, normalised; None: components stay.
    link: what factors 1..N-1 see of the token before them; None: nothing.
    """

    log_weights_R: Tensor
    scores_NRV: Tensor
    normalised: bool = True
    log_transitions_NRR: Tensor | None = None
    link: Link | None = None

    def __post_init__(self) -> None:
        weights, factors = self.log_weights_R.shape, self.scores_NRV.shape
        assert len(factors) == len(weights) + 2 and factors[:-3] + factors[-2:-1] == weights, (
            f"weights {tuple(weights)} do not fit factors {tuple(factors)}"
        )
        assert self.link is None or not self.normalised, "a link adds to scores that are normalised behind it"

    @cached_property
    def log_factors_NRV(self) -> Tensor:
        """Log-probabilities (..., N, R, V), in at least float32 unless the scores were normalised in less.

        With a link, those of factor 0 alone are what they say; the others are as if no token were before them.
        """
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
        """Probabilities (..., R) of the components of the first factor."""
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

    @property
    def is_independent(self) -> bool:
        """Given its component, each token of a window is independent of the others: plain CP."""
        return self.log_transitions_NRR is None and self.link is None

    def given(self, future_N: Tensor) -> Joint:
        """Each link filled in with the token of future_N (..., n) before it: n factors, no link.

        Its conditionals and likelihood of those very tokens are those of the joint; of other tokens they are not.
        """
        linked = self.marginal(future_N.shape[-1])
        if self.link is None:
            return linked
        scores_NRV = linked.scores_NRV
        gains = [self.link(k, future_N[..., k - 1, None]) for k in range(1, linked.horizon)]
        if gains:
            later_NRV = scores_NRV[..., 1:, :, :] + torch.stack(gains, dim=-3)
            scores_NRV = torch.cat([scores_NRV[..., :1, :, :], later_NRV], dim=-3)
        return replace(linked, scores_NRV=scores_NRV, link=None)

    def log_prob(self, future_N: Tensor) -> Tensor:
        """Log-probability (...) of a window, in nats. future_N: (..., n) ids; n < N gives the marginal of n tokens."""
        return log_likelihood(self.log_weights_R, self._log_likelihood_NR(future_N), self.log_transitions_NRR)

    def chain(self, future_N: Tensor) -> Tensor:
        """Chain-rule terms (..., n): log q(x_k | x_1..x_{k-1}) = log M_k - log M_{k-1}; they sum to `log_prob`."""
        running_NR = self._running(self._log_likelihood_NR(future_N))
        return running_NR.logsumexp(dim=-1).diff(dim=-1)

    def first(self) -> Tensor:
        """Log-probabilities (..., V) of the first token: log sum_a w_a p_a^(1)(v), eq. 11 of the paper."""
        return torch.logsumexp(self.log_weights_R.unsqueeze(-1) + self.log_factors_NRV[..., 0, :, :], dim=-2)

    def posterior(self, prefix_N: Tensor) -> Tensor:
        """Log-posterior (..., R) over the component of the next position after the tokens prefix_N (..., n)."""
        return log_normalise(self._running(self._log_likelihood_NR(prefix_N))[..., -1, :])

    def condition(self, token: Tensor) -> Joint:
        """The joint of the remaining N-1 tokens given the first. token: (...) ids."""
        scores_NRV, link, transitions = self.scores_NRV[..., 1:, :, :], self.link, self.log_transitions_NRR
        if link is not None and self.horizon > 1:
            gain_1V = link(1, token.unsqueeze(-1))
            first_1RV = scores_NRV[..., :1, :, :] + gain_1V.unsqueeze(-3)
            scores_NRV = torch.cat([first_1RV, scores_NRV[..., 1:, :, :]], dim=-3)
            link = partial(_later, link)
        if transitions is not None:
            transitions = transitions[..., 1:, :, :]
        return Joint(self.posterior(token.unsqueeze(-1)), scores_NRV, self.normalised, transitions, link)

    def marginals(self) -> Tensor:
        """(..., N, V): the distribution of each position, whatever the others are. ValueError with a link."""
        if self.link is not None:
            raise ValueError("the marginals of a joint whose factors see the token before them have no closed form")
        nothing_NR = torch.zeros_like(self.scores_NRV[..., 0], dtype=self.log_weights_R.dtype)
        weights_NR = self._running(nothing_NR)[..., :-1, :].exp()
        return (weights_NR.unsqueeze(-2) @ self.factors_NRV).squeeze(-2)

    def conditionals(self, future_N: Tensor) -> Tensor:
        """(..., N, V): the distribution of each position given the tokens before it. future_N: (..., N) ids.

        A mixture of the factors with the posterior of the prefix as its weights. The last token is not read.
        """
        factors_NRV = self.given(future_N).factors_NRV
        seen_NR = factors_NRV.take_along_dim(future_N[..., None, None].clamp(min=0), dim=-1).squeeze(-1)
        seen_NR = seen_NR.clamp_min(TINY).log().masked_fill(future_N[..., None] < 0, 0.0)
        weights_NR = self._running(seen_NR)[..., :-1, :].softmax(dim=-1)
        return (weights_NR.unsqueeze(-2) @ factors_NRV).squeeze(-2)

    def step(self, k: int, before_M: Tensor | None) -> Step:
        """Factor k, from 0, behind M prefixes that end with the tokens before_M (..., M); for k = 0 they are unread."""
        transitions_RR = None
        if self.log_transitions_NRR is not None and k + 1 < self.horizon:
            transitions_RR = self.log_transitions_NRR[..., k, :, :].exp()
        if self.link is None or k == 0:
            return Step(self.factors_NRV[..., k, :, :].unsqueeze(-3), transitions_RR)
        assert before_M is not None, "a linked factor needs the token before it"
        gain_MV = self.link(k, before_M)
        return Step(normalise(self.scores_NRV[..., k, :, :].unsqueeze(-3) + gain_MV.unsqueeze(-2)), transitions_RR)

    def marginal(self, k: int) -> Joint:
        """The joint of the first k tokens, 0 <= k <= N: the absent factors are 1."""
        transitions = self.log_transitions_NRR
        if transitions is not None:
            transitions = transitions[..., : max(k - 1, 0), :, :]
        return replace(self, scores_NRV=self.scores_NRV[..., :k, :, :], log_transitions_NRR=transitions)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A window (..., N): each position's component first, then its token, distributed as the chain is.

        A sampled token's draft probability is the mixture's conditional (`chain`), never the component's own.
        """
        component = _draw(self.log_weights_R, generator)
        tokens: list[Tensor] = []
        for k in range(self.horizon):
            scores_RV = self.scores_NRV[..., k, :, :]
            if self.link is not None and k > 0:
                scores_RV = scores_RV + self.link(k, tokens[-1].unsqueeze(-1))
            chosen_V = scores_RV.take_along_dim(component[..., None, None], dim=-2).squeeze(-2)
            tokens.append(_draw(log_normalise(chosen_V), generator))
            if self.log_transitions_NRR is not None and k + 1 < self.horizon:
                behind_RR = self.log_transitions_NRR[..., k, :, :]
                log_next_R = behind_RR.take_along_dim(component[..., None, None], dim=-2).squeeze(-2)
                component = _draw(log_next_R, generator)
        return torch.stack(tokens, dim=-1)

    def _running(self, seen_NR: Tensor) -> Tensor:
        return running(self.log_weights_R, seen_NR, self.log_transitions_NRR)

    def _log_likelihood_NR(self, future_N: Tensor) -> Tensor:
        """(..., n, R): each component's log-probability of each token, 0 of an absent one."""
        if self.link is not None:
            return self.given(future_N)._log_likelihood_NR(future_N)
        index_NR1 = future_N[..., None, None].clamp(min=0).expand(*future_N.shape, self.rank, 1)
        scores_NRV = self.scores_NRV[..., : future_N.shape[-1], :, :]
        chosen_NR = scores_NRV.gather(-1, index_NR1).squeeze(-1)
        if not self.normalised:
            whole = future_N.shape[-1] == self.horizon
            chosen_NR = chosen_NR - (self._log_sums_NR if whole else _log_sums(scores_NRV))
        return chosen_NR.masked_fill(future_N.unsqueeze(-1) < 0, 0.0)


def running(log_weights_R: Tensor, seen_NR: Tensor, log_transitions_NRR: Tensor | None) -> Tensor:
    """(..., n+1, R) log f_0..f_n, the forward recursion: f_k(a) is the probability of the first k tokens together with
    component a at position k+1 (behind the last position: at that position).

    seen_NR: (..., n, R) each component's log-probability of each token.
    """
    found = [log_weights_R.to(torch.promote_types(log_weights_R.dtype, seen_NR.dtype))]
    for k in range(seen_NR.shape[-2]):
        after_R = found[-1] + seen_NR[..., k, :]
        if log_transitions_NRR is not None and k < log_transitions_NRR.shape[-3]:
            after_R = torch.logsumexp(after_R.unsqueeze(-1) + log_transitions_NRR[..., k, :, :], dim=-2)
        found.append(after_R)
    return torch.stack(found, dim=-2)


def log_likelihood(log_weights_R: Tensor, seen_NR: Tensor, log_transitions_NRR: Tensor | None) -> Tensor:
    """log M_n (...), the log-probability of n tokens; arguments as `running` has them."""
    if log_transitions_NRR is None:
        return torch.logsumexp(log_weights_R + seen_NR.sum(dim=-2), dim=-1)
    return torch.logsumexp(running(log_weights_R, seen_NR, log_transitions_NRR)[..., -1, :], dim=-1)


def _later(link: Link, k: int, before_M: Tensor) -> Tensor:
    """The link of a joint whose first token is given."""
    return link(k + 1, before_M)


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
