"""HMM transitions and the link between tokens: every window and every path of components enumerated, in float64."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from cpdlm.decoding.proposals import beam, greedy_chain
from cpdlm.model.joint import Joint, log_likelihood
from tests.joint_oracle import windows

KINDS = ["cp", "hmm", "chain", "hmm+chain"]
RANK, HORIZON, VOCABULARY = 3, 3, 3


def make(kind: str, seed: int = 0) -> tuple[Joint, Tensor]:
    """A joint, and its link's gains as a table (N, V before, V)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    gains_NVV = drawn(HORIZON, VOCABULARY, VOCABULARY)
    joint = Joint(
        drawn(RANK).log_softmax(-1),
        drawn(HORIZON, RANK, VOCABULARY),
        normalised=False,
        log_transitions_NRR=drawn(HORIZON - 1, RANK, RANK).log_softmax(-1) if "hmm" in kind else None,
        link=(lambda k, before: gains_NVV[k][before]) if "chain" in kind else None,
    )
    return joint, gains_NVV if "chain" in kind else torch.zeros_like(gains_NVV)


def exact(joint: Joint, gains_NVV: Tensor, window: tuple[int, ...]) -> float:
    """sum over paths a_1..a_n of w_{a_1} prod_s p_{a_s}(x_s | x_{s-1}) prod_s T_s(a_{s+1} | a_s), in plain numbers."""
    total = 0.0
    for path in itertools.product(range(RANK), repeat=len(window)):
        value = joint.log_weights_R[path[0]].exp().item() if path else 1.0
        for s, token in enumerate(window):
            scores = [joint.scores_NRV[s, path[s], v].item() for v in range(VOCABULARY)]
            if s:
                scores = [score + gains_NVV[s, window[s - 1], v].item() for v, score in enumerate(scores)]
                if joint.log_transitions_NRR is not None:
                    value *= joint.log_transitions_NRR[s - 1, path[s - 1], path[s]].exp().item()
                elif path[s] != path[s - 1]:
                    value = 0.0
            value *= math.exp(scores[token]) / sum(map(math.exp, scores))
        total += value
    return total


def spread(joint: Joint, count: int) -> Joint:
    transitions = joint.log_transitions_NRR
    return Joint(
        joint.log_weights_R.expand(count, -1),
        joint.scores_NRV.expand(count, *joint.scores_NRV.shape),
        False,
        None if transitions is None else transitions.expand(count, *transitions.shape),
        joint.link,
    )


def close(ours: Tensor, theirs: Tensor | list[float]) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_has_the_probability_that_its_paths_sum_to(kind: str) -> None:
    joint, gains = make(kind)
    for n in range(1, HORIZON + 1):
        tokens = torch.tensor(windows(VOCABULARY, n))
        wanted = [exact(joint, gains, window) for window in windows(VOCABULARY, n)]
        assert math.isclose(sum(wanted), 1, abs_tol=1e-12)
        close(spread(joint, len(tokens)).log_prob(tokens).exp(), wanted)
        close(spread(joint.marginal(n), len(tokens)).log_prob(tokens).exp(), wanted)
    close(joint.first().exp(), [exact(joint, gains, (v,)) for v in range(VOCABULARY)])


@pytest.mark.parametrize("kind", KINDS)
def test_conditionals_steps_and_conditioning_are_bayes(kind: str) -> None:
    joint, gains = make(kind)
    for window in windows(VOCABULARY, HORIZON):
        future = torch.tensor(window)
        conditionals, weights, given = joint.conditionals(future), joint.weights_R[None], joint
        close(joint.chain(future).exp(), conditionals.gather(-1, future[:, None])[:, 0])
        for k in range(HORIZON):
            before = exact(joint, gains, window[:k])
            wanted = [exact(joint, gains, (*window[:k], v)) / before for v in range(VOCABULARY)]
            close(conditionals[k], wanted)
            step = joint.step(k, future[k - 1 : k])
            close(step.mixed(weights)[0] / weights.sum(), wanted)
            weights = step.reweighted(weights, future[None, k : k + 1])[0]
            close(given.first().exp(), wanted)
            close(joint.posterior(future[:k]), given.log_weights_R)
            if k + 1 < HORIZON:
                given = given.condition(future[k])


@pytest.mark.parametrize("kind", ["cp", "hmm"])
def test_marginals_sum_over_the_other_positions(kind: str) -> None:
    joint, gains = make(kind)
    wanted = torch.zeros(HORIZON, VOCABULARY, dtype=torch.float64)
    for window in windows(VOCABULARY, HORIZON):
        for k, token in enumerate(window):
            wanted[k, token] += exact(joint, gains, window)
    close(joint.marginals(), wanted)


def test_a_link_has_no_marginals_in_closed_form() -> None:
    with pytest.raises(ValueError, match="no closed form"):
        make("chain")[0].marginals()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_log_prob(kind: str) -> None:
    """Chi-square over all windows of 40 000 draws; a fresh seed would fail with probability 1e-6."""
    joint, gains = make(kind, seed=1)
    sampled = spread(joint, 40_000).sample(torch.Generator().manual_seed(3))
    index = torch.tensor([VOCABULARY**k for k in reversed(range(HORIZON))])
    observed = torch.bincount((sampled * index).sum(-1), minlength=VOCABULARY**HORIZON)
    exact_W = [exact(joint, gains, window) for window in windows(VOCABULARY, HORIZON)]
    expected = 40_000 * torch.tensor(exact_W, dtype=torch.float64)
    common = expected >= 5
    pooled = [[*each[common].tolist(), float(each[~common].sum())] for each in (observed, expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_beam_finds_the_likeliest_prefixes(kind: str) -> None:
    joint, gains = make(kind, seed=2)
    found = beam(spread(joint, 1), HORIZON, VOCABULARY**HORIZON)
    tokens_BMK, log_probs_BMK = found.windows()
    for row in range(tokens_BMK.shape[1]):
        for k in range(HORIZON):
            wanted = exact(joint, gains, tuple(tokens_BMK[0, row, : k + 1].tolist()))
            assert math.isclose(log_probs_BMK[0, row, k].exp().item(), wanted, rel_tol=1e-10)
    assert len({tuple(row) for row in tokens_BMK[0].tolist()}) == VOCABULARY**HORIZON
    chain = greedy_chain(spread(joint, 1), HORIZON)[0].tolist()
    for k in range(HORIZON):
        choices = [exact(joint, gains, (*chain[:k], v)) for v in range(VOCABULARY)]
        assert chain[k] == max(range(VOCABULARY), key=choices.__getitem__)


def test_identity_transitions_are_cp() -> None:
    joint, _ = make("cp")
    identity = torch.eye(RANK, dtype=torch.float64).log().expand(HORIZON - 1, -1, -1)
    seen_NR = torch.randn(HORIZON, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(log_likelihood(joint.log_weights_R, seen_NR, identity), log_likelihood(joint.log_weights_R, seen_NR, None))
