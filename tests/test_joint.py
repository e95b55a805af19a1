"""Laws of the joint, also with HMM transitions and a link: every window and path of components enumerated, float64."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from cpdlm.decoding.proposals import beam, greedy_chain
from cpdlm.model.joint import Joint, log_likelihood, log_normalise

RANK, HORIZON, VOCABULARY = USUAL = (3, 3, 3)
Shape = tuple[int, int, int]
KINDS = ["cp", "hmm", "chain", "hmm+chain"]
CASES = [("cp", shape) for shape in ((1, 1, 4), (1, 3, 3), (2, 3, 3), (3, 2, 4), (4, 4, 2))]
CASES += [(kind, USUAL) for kind in KINDS]


def windows(vocab: int, length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(vocab), repeat=length))


def make(kind: str = "cp", shape: Shape = USUAL, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Joint, Tensor]:
    """A joint, and its link's gains as a table (N, V before, V)."""
    generator, (rank, horizon, vocab) = torch.Generator().manual_seed(seed), shape

    def drawn(*size: int) -> Tensor:
        return 2 * torch.randn(*batch, *size, generator=generator, dtype=torch.float64)

    gains_NVV = drawn(horizon, vocab, vocab)
    joint = Joint(
        drawn(rank).log_softmax(-1),
        drawn(horizon, rank, vocab),
        normalised=False,
        log_transitions_NRR=drawn(horizon - 1, rank, rank).log_softmax(-1) if "hmm" in kind else None,
        link=(lambda k, before: gains_NVV[k][before]) if "chain" in kind else None,
    )
    return joint, gains_NVV if "chain" in kind else torch.zeros_like(gains_NVV)


def exact(joint: Joint, gains_NVV: Tensor, window: tuple[int, ...]) -> float:
    """sum over paths a_1..a_n of w_{a_1} prod_s p_{a_s}(x_s | x_{s-1}) prod_s T_s(a_{s+1} | a_s), in plain numbers."""
    weights, scores, gains = (each.tolist() for each in (joint.log_weights_R.exp(), joint.scores_NRV, gains_NVV))
    transitions = None if joint.log_transitions_NRR is None else joint.log_transitions_NRR.exp().tolist()
    stays = [(a,) * len(window) for a in range(joint.rank)]
    total = 0.0
    for path in stays if transitions is None else itertools.product(range(joint.rank), repeat=len(window)):
        value = weights[path[0]] if path else 1 / joint.rank
        for s, token in enumerate(window):
            gain = gains[s][window[s - 1]] if s else [0.0] * joint.vocab_size
            odds = [math.exp(score + more) for score, more in zip(scores[s][path[s]], gain, strict=True)]
            value *= odds[token] / sum(odds)
            if s and transitions is not None:
                value *= transitions[s - 1][path[s - 1]][path[s]]
        total += value
    return total if window else 1.0


def spread(joint: Joint, count: int) -> Joint:
    """The same law at `count` batch positions."""
    transitions = joint.log_transitions_NRR
    return Joint(
        joint.log_weights_R.expand(count, -1),
        joint.scores_NRV.expand(count, *joint.scores_NRV.shape),
        joint.normalised,
        None if transitions is None else transitions.expand(count, *transitions.shape),
        joint.link,
    )


def close(ours: Tensor, theirs: Tensor | list[float]) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_every_prefix_has_the_probability_that_its_paths_sum_to(kind: str, shape: Shape) -> None:
    (joint, gains), (_, horizon, vocab) = make(kind, shape), shape
    for n in range(1, horizon + 1):
        tokens = torch.tensor(windows(vocab, n))
        wanted = [exact(joint, gains, window) for window in windows(vocab, n)]
        assert math.isclose(sum(wanted), 1, abs_tol=1e-12)
        close(spread(joint, len(tokens)).log_prob(tokens).exp(), wanted)
        close(spread(joint.marginal(n), len(tokens)).log_prob(tokens).exp(), wanted)
        if kind == "cp":
            padded = torch.nn.functional.pad(tokens, (0, horizon - n), value=-1)
            close(spread(joint, len(tokens)).log_prob(padded).exp(), wanted)
    close(joint.first().exp(), [exact(joint, gains, (v,)) for v in range(vocab)])
    assert joint.marginal(0).horizon == 0
    close(joint.marginal(0).log_prob(torch.zeros(0, dtype=torch.long)), torch.zeros(()))


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_conditionals_steps_and_conditioning_are_bayes(kind: str, shape: Shape) -> None:
    (joint, gains), (_, horizon, vocab) = make(kind, shape), shape
    for window in windows(vocab, horizon):
        future = torch.tensor(window)
        conditionals, weights, given = joint.conditionals(future), joint.weights_R[None], joint
        close(joint.chain(future).exp(), conditionals.gather(-1, future[:, None])[:, 0])
        for k in range(horizon):
            before = exact(joint, gains, window[:k])
            wanted = [exact(joint, gains, (*window[:k], v)) / before for v in range(vocab)]
            close(conditionals[k], wanted)
            step = joint.step(k, future[k - 1 : k])
            close(step.mixed(weights)[0] / weights.sum(), wanted)
            weights = step.reweighted(weights, future[None, k : k + 1])[0]
            close(given.first().exp(), wanted)
            close(joint.posterior(future[:k]), given.log_weights_R)
            if k + 1 < horizon:
                given = given.condition(future[k])


@pytest.mark.parametrize("kind", ["cp", "hmm"])
def test_marginals_sum_over_the_other_positions(kind: str) -> None:
    """They are what conditionals are where nothing is told of the tokens before."""
    joint, gains = make(kind)
    wanted = torch.zeros(HORIZON, VOCABULARY, dtype=torch.float64)
    for window in windows(VOCABULARY, HORIZON):
        for k, token in enumerate(window):
            wanted[k, token] += exact(joint, gains, window)
    close(joint.marginals(), wanted)
    close(joint.conditionals(torch.full((HORIZON,), -1)), wanted)


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
    exact_W = torch.tensor([exact(joint, gains, window) for window in windows(VOCABULARY, HORIZON)])

    def p_value(distribution_W: Tensor) -> float:
        expected = 40_000 * distribution_W.double()
        common = expected >= 5
        pooled = [[*each[common].tolist(), float(each[~common].sum())] for each in (observed, expected)]
        return float(stats.chisquare(*pooled, sum_check=False).pvalue)

    assert p_value(exact_W) > 1e-6
    if kind == "cp":  # the test would see components drawn per token instead of once per window
        apart = joint.marginals()
        wrong = [math.prod(float(apart[k, v]) for k, v in enumerate(w)) for w in windows(VOCABULARY, HORIZON)]
        assert p_value(torch.tensor(wrong)) < 1e-12


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


def test_batch_dimensions_are_independent() -> None:
    joint, _ = make(batch=(2, 3))
    tokens = torch.randint(0, 3, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    for i, j in itertools.product(range(2), range(3)):
        alone = Joint(joint.log_weights_R[i, j], joint.scores_NRV[i, j], normalised=False)
        close(joint.log_prob(tokens)[i, j], alone.log_prob(tokens[i, j]))
        close(joint.chain(tokens)[i, j], alone.chain(tokens[i, j]))
        close(joint.first()[i, j], alone.first())
        close(joint.posterior(tokens[..., :2])[i, j], alone.posterior(tokens[i, j, :2]))
        close(joint.condition(tokens[..., 0]).first()[i, j], alone.condition(tokens[i, j, 0]).first())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_the_distribution_that_they_normalise_to(dtype: torch.dtype) -> None:
    """Normalised when asked for, in whatever form and in float32 at least, is normalised at once."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    scores = (5 * torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)).to(dtype)
    lazy, whole = Joint(weights, scores, normalised=False), Joint(weights, log_normalise(scores))
    tokens = torch.randint(0, 5, (2, 4), generator=generator)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for mine, theirs in (
        (lazy, whole),
        (lazy.marginal(2), whole.marginal(2)),
        (lazy.condition(tokens[:, 0]), whole.condition(tokens[:, 0])),
    ):
        assert mine.factors_NRV.dtype == mine.log_factors_NRV.dtype == torch.promote_types(dtype, torch.float32)
        assert (mine.horizon, mine.rank, mine.vocab_size) == (theirs.horizon, theirs.rank, theirs.vocab_size)
        for of in ("log_weights_R", "weights_R", "log_factors_NRV", "factors_NRV"):
            torch.testing.assert_close(getattr(mine, of), getattr(theirs, of), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mine.factors_NRV, mine.log_factors_NRV.exp())
        assert torch.equal(mine.scores_NRV.argmax(-1), theirs.log_factors_NRV.argmax(-1))
    torch.testing.assert_close(lazy.log_prob(tokens), whole.log_prob(tokens), rtol=tolerance, atol=tolerance)


def test_certain_tokens_stay_finite_in_the_chain() -> None:
    """A component that rules a token out (probability 0) takes no part in the posterior."""
    joint = Joint(
        torch.tensor([0.5, 0.5], dtype=torch.float64).log(),
        torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64).log(),
    )
    given = joint.condition(torch.tensor(0))
    close(given.log_weights_R.exp(), [1.0, 0.0])
    close(given.first().exp(), [0.25, 0.75])
    close(joint.chain(torch.tensor([0, 1])).exp(), [0.5, 0.75])
