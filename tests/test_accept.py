"""Accepted drafts and the token after them are distributed as the target, by enumeration and by simulation.

The simulation runs the library's own draft and acceptance code, batched over the samples of one window, completes each
window from the target and compares whole windows with the exact distribution by a chi-square test. A lossless procedure
fails it with probability `oracle.FALSE_ALARM` = 1e-4 per (fixed) seed. Each planted fault is rejected with probability
>= .99: its exact distribution comes from the oracle, its power from the noncentral chi-square, both asserted here.
"""

import math
from collections import Counter, defaultdict
from functools import cache

import pytest
import torch
from torch import Tensor

from cpdlm.decoding.accept import argmaxes, follow, residual, verify
from cpdlm.decoding.filtering import Sampling, draw, filtered
from cpdlm.decoding.proposals import greedy_chain, sampled_chain
from cpdlm.model.joint import Joint
from tests import oracle
from tests.planted_faults import EXACT, FAULTS, Variant
from tests.toy import keep

SAMPLES = 60_000
VOCABULARY, DRAFTS = 4, 2
SETTINGS = {
    "unfiltered": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top-k": Sampling(top_k=2),
    "top-p": Sampling(top_p=0.7),
    "all": Sampling(temperature=1.3, top_k=3, top_p=0.9),
}


class Step:
    """One window: a random joint of the drafts and a random target after each prefix of drafts. Float64."""

    def __init__(self, rank: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def table(*shape: int) -> Tensor:
            return (1.2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)

        self.joint = Joint(table(1, rank), table(1, DRAFTS, rank, VOCABULARY))
        self.target = [table(VOCABULARY**k, VOCABULARY) for k in range(DRAFTS + 1)]

    def batch(self, samples: int) -> Joint:
        weights, factors = self.joint.log_weights_R, self.joint.log_factors_NRV
        return Joint(weights.expand(samples, -1), factors.expand(samples, -1, -1, -1))

    def rows(self, tokens_BK: Tensor, sampling: Sampling) -> Tensor:
        """The filtered target after each prefix of the drafts: (B, K+1, V)."""
        code, distributions = torch.zeros(len(tokens_BK), dtype=torch.long), []
        for k in range(DRAFTS + 1):
            distributions.append(filtered(self.target[k], sampling)[code])
            if k < DRAFTS:
                code = code * VOCABULARY + tokens_BK[:, k]
        return torch.stack(distributions, dim=1)

    def oracle_target(self, sampling: Sampling) -> oracle.Target:
        def distribution(prefix: oracle.History) -> oracle.Law:
            code = 0
            for token in prefix:
                code = code * VOCABULARY + token
            return keep(sampling)(self.target[len(prefix)][code].exp().tolist())

        return distribution

    def oracle_joint(self) -> tuple[oracle.Law, list[list[oracle.Law]]]:
        return self.joint.log_weights_R[0].exp().tolist(), self.joint.log_factors_NRV[0].exp().tolist()


def exact_law(procedure: str, step: Step, sampling: Sampling) -> dict[oracle.History, float]:
    """The oracle's distribution of a window of K+1 tokens: what the procedure emits, completed from the target."""
    target = step.oracle_target(sampling)
    distribution: dict[oracle.History, float] = defaultdict(float)
    for emitted, p in oracle.window_law(procedure, target, (), *step.oracle_joint(), DRAFTS, keep(sampling)).items():
        for tail, q in oracle.autoregressive_law(target, emitted, DRAFTS + 1 - len(emitted)).items():
            distribution[emitted + tail] += p * q
    return distribution


def simulate(variant: Variant, step: Step, sampling: Sampling, seed: int = 0) -> tuple[Counter[oracle.History], float]:
    """-> (counts of completed windows, mean number of accepted drafts)."""
    generator = torch.Generator().manual_seed(seed)

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    tokens_BK, distributions = variant.draft(step.batch(SAMPLES), DRAFTS, sampling, uniforms(SAMPLES, DRAFTS + 1))
    rows = step.rows(tokens_BK, sampling)
    accepted_B, next_B = variant.verify(rows, distributions, tokens_BK, uniforms(SAMPLES, DRAFTS + 1))
    written = torch.empty(SAMPLES, 0, dtype=torch.long)
    code = torch.zeros(SAMPLES, dtype=torch.long)
    for k in range(DRAFTS + 1):
        token = draw(filtered(step.target[k], sampling)[code], uniforms(SAMPLES))
        token = torch.where(accepted_B == k, next_B, token)
        if k < DRAFTS:
            token = torch.where(accepted_B > k, tokens_BK[:, k], token)
        written, code = torch.cat([written, token[:, None]], 1), code * VOCABULARY + token
    return Counter(map(tuple, written.tolist())), accepted_B.double().mean().item()


@cache
def truth(rank: int, setting: str, seed: int = 0) -> dict[oracle.History, float]:
    step, sampling = Step(rank, seed), SETTINGS[setting]
    return oracle.autoregressive_law(step.oracle_target(sampling), (), DRAFTS + 1)


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_emitted_is_the_target_by_enumeration(rank: int, setting: str) -> None:
    """Every window of drafts, with the library's q and residual, summed: equal to the target to 1e-12."""
    step, sampling = Step(rank), SETTINGS[setting]
    uniforms = torch.rand(20_000, DRAFTS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens_BK, draft_probs_BKV = sampled_chain(step.batch(20_000), DRAFTS, sampling, uniforms)
    distributions = {
        tuple(window): distribution for window, distribution in zip(tokens_BK.tolist(), draft_probs_BKV, strict=True)
    }
    weights, factors = step.oracle_joint()
    target = step.oracle_target(sampling)
    emitted: dict[oracle.History, float] = defaultdict(float)
    covered = 0.0
    for window, probs_KV in distributions.items():
        expected = [keep(sampling)(oracle.conditional(weights, factors, window[:k])) for k in range(DRAFTS)]
        torch.testing.assert_close(probs_KV, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
        mass = math.prod(probs_KV[k, token].item() for k, token in enumerate(window))
        covered += mass
        for k, token in enumerate(window):
            p = torch.tensor(target(window[:k]), dtype=torch.float64)
            accept = min(1.0, (p[token] / probs_KV[k, token]).item())
            corrected = residual(p, probs_KV[k])
            for other in range(VOCABULARY):
                emitted[(*window[:k], other)] += mass * (1 - accept) * (corrected[other] / corrected.sum()).item()
            mass *= accept
        for other, p in enumerate(target(window)):
            emitted[(*window, other)] += mass * p
    assert covered == pytest.approx(1, abs=1e-12), "some window of drafts was never drawn"
    completed: dict[oracle.History, float] = defaultdict(float)
    for head, p in emitted.items():
        for tail, q in oracle.autoregressive_law(target, head, DRAFTS + 1 - len(head)).items():
            completed[head + tail] += p * q
    assert oracle.distance(completed, truth(rank, setting)) < 1e-12


@pytest.mark.parametrize("rank", [1, 3])
def test_verify_accepts_exactly_below_the_ratio(rank: int) -> None:
    step, sampling = Step(rank), Sampling()
    uniforms = torch.rand(64, DRAFTS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens_BK, draft_probs_BKV = sampled_chain(step.batch(64), DRAFTS, sampling, uniforms)
    rows = step.rows(tokens_BK, sampling)
    for k in range(DRAFTS):
        index = tokens_BK[:, k : k + 1]
        ratio = (rows[:, k].gather(1, index) / draft_probs_BKV[:, k].gather(1, index))[:, 0]
        for factor, kept in ((1 - 1e-9, True), (1 + 1e-9, False)):
            tests = torch.zeros(64, DRAFTS + 1, dtype=torch.float64)
            tests[:, k] = ratio * factor
            accepted_B, _ = verify(rows, draft_probs_BKV, tokens_BK, tests)
            assert ((accepted_B > k) == kept).all()


def test_the_corrected_token_is_drawn_from_the_excess() -> None:
    p, q = torch.tensor([[[0.5, 0.5], [0.3, 0.7]]]), torch.tensor([[[0.9, 0.1]]])
    drafts = torch.tensor([[0]])
    for u in (0.0, 0.5, 0.999):  # rejected at 5/9: the excess is all on token 1
        assert [int(x) for x in verify(p, q, drafts, torch.tensor([[0.6, u]], dtype=torch.float64))] == [0, 1]
    assert [int(x) for x in verify(p, q, drafts, torch.tensor([[0.5, 0.2]], dtype=torch.float64))] == [1, 0]
    assert [int(x) for x in verify(p, q, drafts, torch.tensor([[0.5, 0.4]], dtype=torch.float64))] == [1, 1]


def test_equal_distributions_leave_no_residual_but_rounding() -> None:
    p = torch.tensor([0.2, 0.8])
    assert residual(p, p).equal(p)
    assert residual(p, torch.full((2,), math.nan)).equal(p)


def test_broken_distributions() -> None:
    """A broken target is marked by V where it would be emitted; a broken draft is rejected, and nothing is lost."""
    half = torch.tensor([[0.5, 0.5]])
    broken = torch.full((1, 2), math.nan)
    uniforms, drafts = torch.tensor([[0.9, 0.3]], dtype=torch.float64), torch.tensor([[1]])
    target = torch.stack([half, half], 1)
    assert [int(x) for x in verify(target, broken[:, None], drafts, uniforms)] == [0, 0]
    assert [int(x) for x in verify(torch.stack([broken, half], 1), half[:, None], drafts, uniforms)] == [0, 2]
    assert [int(x) for x in verify(torch.stack([half, broken], 1), half[:, None], drafts, uniforms)] == [1, 2]
    assert [int(x) for x in verify(broken[:, None], half[:, :0, None], drafts[:, :0], uniforms[:, :1])] == [0, 2]


@pytest.mark.parametrize("rank", [1, 3])
def test_greedy_follows_the_argmax(rank: int) -> None:
    for seed in range(20):
        step = Step(rank, seed)
        drafts = tuple(greedy_chain(step.joint, DRAFTS)[0].tolist())
        weights, factors = step.oracle_joint()
        for k, token in enumerate(drafts):
            distribution = oracle.conditional(weights, factors, drafts[:k])
            assert token == max(range(VOCABULARY), key=distribution.__getitem__)
        target, written = step.oracle_target(Sampling()), ()
        while len(written) <= DRAFTS:
            best = max(range(VOCABULARY), key=target(written).__getitem__)
            written = (*written, best)
            if len(written) > DRAFTS or best != drafts[len(written) - 1]:
                break
        accepted_B, next_B = follow(argmaxes(step.rows(torch.tensor([drafts]), Sampling())), torch.tensor([drafts]))
        assert (*drafts[: int(accepted_B)], int(next_B)) == written


def test_greedy_marks_a_target_of_nan_or_minus_infinity() -> None:
    good, nan, low = torch.tensor([[0.1, 0.9]]).log(), torch.full((1, 2), math.nan), torch.full((1, 2), -math.inf)
    for bad in (nan, low):
        for token in (0, 1):
            accepted_B, next_B = follow(argmaxes(torch.stack([bad, good], 1)), torch.tensor([[token]]))
            assert (int(accepted_B), int(next_B)) == (0, 2)
        assert int(follow(argmaxes(torch.stack([good, bad], 1)), torch.tensor([[1]]))[1]) == 2
        assert int(follow(argmaxes(torch.stack([good, bad], 1)), torch.tensor([[0]]))[1]) == 1


# --- simulated, with power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_library_is_accepted(rank: int, setting: str) -> None:
    counts, _ = simulate(EXACT, Step(rank), SETTINGS[setting])
    assert oracle.p_value(counts, truth(rank, setting)) > oracle.FALSE_ALARM


# (a) has no filter, (c) is a fault of filters only: without filters its two ways to draw are the same.
PLANTED = [("a", "unfiltered"), ("b", "unfiltered"), ("b", "all"), ("d", "unfiltered"), ("d", "top-p"), ("d", "all")]
PLANTED += [("c", setting) for setting in ("temperature", "top-k", "top-p", "all")]


@pytest.mark.parametrize(("fault", "setting"), PLANTED)
def test_every_planted_fault_is_rejected(fault: str, setting: str) -> None:
    step, sampling = Step(3), SETTINGS[setting]
    faulty, right = exact_law(fault, step, sampling), truth(3, setting)
    assert oracle.power(faulty, right, SAMPLES) >= 0.99
    counts, _ = simulate(FAULTS[fault], step, sampling)
    assert oracle.p_value(counts, right) < oracle.FALSE_ALARM
    assert oracle.p_value(counts, faulty) > oracle.FALSE_ALARM, "the planted fault is not the one whose power is stated"
