"""Laws 1 to 7 of the joint: by enumeration of every window, in float64."""

import dataclasses
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from cpdlm.model.joint import Joint
from tests import joint_oracle as oracle

SHAPES = [(1, 1, 4), (1, 3, 3), (2, 3, 3), (3, 2, 4), (4, 4, 2)]  # rank, horizon, vocabulary


def make(rank: int, horizon: int, vocab: int, batch: tuple[int, ...] = (), seed: int = 0) -> Joint:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(*batch, rank, generator=generator, dtype=torch.float64)
    scores = 2 * torch.randn(*batch, horizon, rank, vocab, generator=generator, dtype=torch.float64)
    return Joint.from_logits(gate, scores)


def plain(joint: Joint) -> tuple[list[float], list[list[list[float]]]]:
    return joint.log_weights_R.exp().tolist(), joint.log_factors_NRV.exp().tolist()


def every_window(vocab: int, length: int) -> Tensor:
    return torch.tensor(oracle.windows(vocab, length)).reshape(-1, length)


def spread(joint: Joint, count: int) -> Joint:
    """The same law at `count` batch positions."""
    return Joint(
        joint.log_weights_R.expand(count, -1), joint.log_factors_NRV.expand(count, *joint.log_factors_NRV.shape)
    )


def close(ours: Tensor, theirs: Tensor | list[float], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=torch.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_the_formula_and_sums_to_one(shape: tuple[int, int, int]) -> None:
    joint = make(*shape)
    tokens = every_window(shape[2], shape[1])
    distribution = spread(joint, len(tokens)).log_prob(tokens).exp()
    close(distribution, [oracle.probability(*plain(joint), window) for window in oracle.windows(shape[2], shape[1])])
    assert math.isclose(distribution.sum().item(), 1, abs_tol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_marginal_is_the_sum_over_later_tokens(shape: tuple[int, int, int]) -> None:
    _, horizon, vocab = shape
    joint = make(*shape)
    for k in range(1, horizon + 1):
        prefixes = oracle.windows(vocab, k)
        summed = [
            sum(oracle.probability(*plain(joint), prefix + rest) for rest in oracle.windows(vocab, horizon - k))
            for prefix in prefixes
        ]
        tokens = torch.tensor(prefixes)
        close(spread(joint.marginal(k), len(tokens)).log_prob(tokens).exp(), summed)
        close(spread(joint, len(tokens)).log_prob(tokens).exp(), summed)
        padded = torch.nn.functional.pad(tokens, (0, horizon - k), value=-1)
        close(spread(joint, len(tokens)).log_prob(padded).exp(), summed)
    assert joint.marginal(0).horizon == 0
    close(joint.marginal(0).log_prob(torch.zeros(0, dtype=torch.long)), torch.zeros(()))
    close(joint.first().exp(), [oracle.probability(*plain(joint), (token,)) for token in range(vocab)])


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_terms_are_the_conditionals(shape: tuple[int, int, int]) -> None:
    _, horizon, vocab = shape
    joint = make(*shape)
    tokens = every_window(vocab, horizon)
    chain = spread(joint, len(tokens)).chain(tokens)
    close(chain.sum(-1), spread(joint, len(tokens)).log_prob(tokens))
    for row, window in enumerate(oracle.windows(vocab, horizon)):
        for k in range(horizon):
            exact = oracle.probability(*plain(joint), window[: k + 1]) / oracle.probability(*plain(joint), window[:k])
            assert math.isclose(chain[row, k].exp().item(), exact, rel_tol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_conditionals_are_the_chain_over_the_vocabulary(shape: tuple[int, int, int]) -> None:
    """And stepwise re-weighting gives the same; a token of -1 tells nothing."""
    rank, horizon, vocab = shape
    joint = make(*shape)
    weights, factors = plain(joint)
    scores = Joint(joint.log_weights_R, joint.log_factors_NRV + 3, normalised=False)
    for window in oracle.windows(vocab, horizon):
        whole, steps = joint.conditionals(torch.tensor(window)), joint.weights_R[None]
        close(scores.conditionals(torch.tensor(window)), whole)
        for k in range(horizon):
            before = oracle.probability(weights, factors, window[:k])
            exact = [oracle.probability(weights, factors, (*window[:k], v)) / before for v in range(vocab)]
            close(whole[k], exact)
            step = joint.step(k, None)
            close(step.mixed(steps)[0] / steps.sum(), exact)
            steps = step.reweighted(steps, torch.tensor([[window[k]]]))[0]
    untold = joint.conditionals(torch.full((horizon,), -1))
    close(untold, joint.marginals())
    for k in range(horizon):
        close(untold[k], [sum(weights[a] * factors[k][a][v] for a in range(rank)) for v in range(vocab)])
    close(joint.posterior(torch.full((horizon,), -1)), joint.log_weights_R)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
def test_conditioning_is_bayes_and_twice_is_once(shape: tuple[int, int, int]) -> None:
    rank, horizon, vocab = shape
    joint = make(*shape)
    weights, factors = plain(joint)
    for token in range(vocab):
        given = joint.condition(torch.tensor(token))
        assert (given.horizon, given.rank, given.vocab_size) == (horizon - 1, rank, vocab)
        close(given.log_weights_R.exp(), oracle.posterior(weights, factors, (token,)))
        total = oracle.probability(weights, factors, (token,))
        for rest in oracle.windows(vocab, horizon - 1):
            exact = oracle.probability(weights, factors, (token, *rest)) / total
            assert math.isclose(given.log_prob(torch.tensor(rest)).exp().item(), exact, rel_tol=1e-10)
        if horizon > 2:
            for second in range(vocab):
                twice = given.condition(torch.tensor(second))
                close(twice.log_weights_R, joint.posterior(torch.tensor([token, second])))
                close(twice.log_factors_NRV, joint.log_factors_NRV[2:])


def test_rank_one_is_independent_heads() -> None:
    joint = make(1, 3, 5)
    tokens = every_window(5, 3)
    alone = sum(joint.log_factors_NRV[s, 0][tokens[:, s]] for s in range(3))
    close(spread(joint, len(tokens)).log_prob(tokens), alone)
    given = joint.condition(torch.tensor(2))
    close(given.first(), joint.log_factors_NRV[1, 0])


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 3, 3)])
def test_samples_follow_log_prob(shape: tuple[int, int, int]) -> None:
    """Chi-square over all windows of 60 000 draws; the seed is fixed, a fresh one would fail with probability 1e-6."""
    joint, draws = make(*shape, seed=1), 60_000
    distribution = [oracle.probability(*plain(joint), window) for window in oracle.windows(shape[2], shape[1])]
    sampled = spread(joint, draws).sample(torch.Generator().manual_seed(3))
    index = torch.tensor([shape[2] ** k for k in reversed(range(shape[1]))])
    observed = torch.bincount((sampled * index).sum(-1), minlength=len(distribution)).tolist()
    assert stats.chisquare(observed, [p * draws for p in distribution]).pvalue > 1e-6
    # The test would see components drawn per token instead of once per window (for rank > 1: independent positions).
    if shape[0] > 1:
        weights, factors = plain(joint)
        first = [
            [sum(weights[a] * factors[s][a][v] for a in range(shape[0])) for v in range(shape[2])]
            for s in range(shape[1])
        ]
        wrong = [math.prod(first[s][token] for s, token in enumerate(w)) for w in oracle.windows(shape[2], shape[1])]
        assert stats.chisquare(observed, [p * draws for p in wrong]).pvalue < 1e-12


def test_sampling_is_repeatable_and_batched() -> None:
    joint = make(3, 4, 5, batch=(2, 3))
    one, two = (joint.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert one.shape == (2, 3, 4) and torch.equal(one, two)


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_estimate_against_the_exact_one(shape: tuple[int, int, int]) -> None:
    """Within 5 of its own standard errors (false alarms: 6e-7), and the standard error is not vacuous."""
    joint = make(*shape)
    estimate, error = joint.entropy(2000, torch.Generator().manual_seed(0))
    exact = oracle.entropy(*plain(joint))
    assert abs(estimate.item() - exact) <= 5 * error.item() and error.item() < 0.05


def test_batch_dimensions_are_independent() -> None:
    joint = make(2, 3, 4, batch=(2, 3))
    tokens = torch.randint(0, 4, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    for i in range(2):
        for j in range(3):
            one = Joint(joint.log_weights_R[i, j], joint.log_factors_NRV[i, j])
            close(joint.log_prob(tokens)[i, j], one.log_prob(tokens[i, j]))
            close(joint.chain(tokens)[i, j], one.chain(tokens[i, j]))
            close(joint.first()[i, j], one.first())
            close(joint.posterior(tokens[..., :2])[i, j], one.posterior(tokens[i, j, :2]))
            close(joint.condition(tokens[..., 0]).first()[i, j], one.condition(tokens[i, j, 0]).first())


def test_is_immutable_normalised_and_at_least_float32() -> None:
    joint = Joint.from_logits(torch.randn(2).bfloat16(), torch.randn(3, 2, 4).bfloat16())
    assert joint.log_weights_R.dtype == joint.log_factors_NRV.dtype == torch.float32
    torch.testing.assert_close(joint.log_factors_NRV.exp().sum(-1), torch.ones(3, 2))
    torch.testing.assert_close(joint.log_weights_R.exp().sum(), torch.ones(()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        joint.log_weights_R = torch.zeros(2)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_the_distribution_that_they_normalise_to(dtype: torch.dtype) -> None:
    """Normalised when asked for, in whatever form, is normalised at once."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    scores = (5 * torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)).to(dtype)
    lazy, whole = Joint(weights, scores, normalised=False), Joint.from_logits(weights, scores)
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


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        Joint(torch.zeros(3), torch.zeros(2, 4, 5))


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
