"""Heads whose joint has transitions, links, offsets, or few active components: losses and drafts against `Joint`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.decoding.accept import verify
from cpdlm.decoding.filtering import Sampling, draw
from cpdlm.decoding.proposals import sampled_chain
from cpdlm.model.heads import Before, FactorHeads, HeadsConfig
from cpdlm.model.joint import Joint
from cpdlm.model.losses.draft import Objective, Windows
from cpdlm.model.losses.teacher import WholeTeacher
from tests import oracle
from tests.planted_faults import EXACT, Variant
from tests.test_accept import DRAFTS, SETTINGS, VOCABULARY, Step, simulate, truth

P, N, R, V, D, K = 5, 3, 4, 7, 6, 3
KINDS: dict[str, dict[str, Any]] = {
    "hmm": {"joint": "hmm"},
    "linked": {"link": "all"},
    "offsets": {"component_rank": 2},
    "all of them": {"joint": "hmm", "link": "all", "component_rank": 2},
    "linked mlp": {"link": "all", "map_hidden": 2},
}


def make(kind: dict[str, Any], rank: int = R) -> tuple[FactorHeads, Tensor, Tensor]:
    """Heads with all of their weights away from where they start, what they see, and a table of unembeddings."""
    torch.manual_seed(0)
    shape = HeadsConfig(rank, N + 1, True, link_width=K, **kind)
    heads = FactorHeads(D, V, shape, logit_scale=0.7).double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return heads, torch.randn(P, D).double().requires_grad_(), torch.randn(V, D).double()


def before(heads: FactorHeads, pending_P: Tensor, table_VD: Tensor) -> Before | None:
    return Before(table_VD[pending_P], lambda tokens: table_VD[tokens]) if heads.link is not None else None


@pytest.mark.parametrize("chunk_bytes", [1, 2**20], ids=["a position and a factor at a time", "at once"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_bounded_loss_is_the_joints_log_prob_with_its_gradients(kind: dict[str, Any], chunk_bytes: int) -> None:
    heads, seen_PD, table_VD = make(kind)
    future_PN, pending_P = torch.randint(0, V, (P, N)), torch.randint(0, V, (P,))
    future_PN[1, 2] = -1
    weight_P = torch.randn(P, dtype=torch.float64)
    before_PND = table_VD[torch.cat([pending_P[:, None], future_PN[:, :-1]], dim=1)]
    total, nll_P, _ = heads.nll(seen_PD, future_PN, weight_P, table_VD, N, chunk_bytes, before_PND)
    dense_P = -heads.joint(seen_PD, table_VD, before(heads, pending_P, table_VD)).log_prob(future_PN)
    torch.testing.assert_close(nll_P, dense_P, rtol=1e-10, atol=1e-10)
    leaves = [seen_PD, *heads.parameters()]
    exact = torch.autograd.grad((weight_P * dense_P).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(total, leaves), exact, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_draft_objective_holds_the_conditionals_against_the_target(kind: dict[str, Any]) -> None:
    heads, seen_PD, table_VD = make(kind)
    future_PN, pending_P = torch.randint(0, V, (P, N)), torch.randint(0, V, (P,))
    states_UD = torch.randn(P * N, D).double()
    logits_UV = states_UD @ table_VD.T
    teacher = WholeTeacher(states_UD, logits_UV.logsumexp(-1).float(), lambda hidden, table: hidden @ table.T)
    windows = Windows(future_PN, torch.ones(P, N).bool(), torch.arange(P * N).view(P, N), teacher)
    objective, logits_PNV = Objective("eq14", 0.7, 0.9), logits_UV.view(P, N, V)
    before_PND = table_VD[torch.cat([pending_P[:, None], future_PN[:, :-1]], dim=1)]
    _, loss_P, _ = heads.draft_loss(seen_PD, windows, torch.ones(P), table_VD, objective, 4 * V, before_PND)
    joint, exact_P = heads.joint(seen_PD, table_VD, before(heads, pending_P, table_VD)), torch.zeros(P).double()
    for k in range(N):
        q_PV = torch.stack(
            [joint.marginal(k + 1).conditionals(_with(future_PN[:, : k + 1], v))[:, k, v] for v in range(V)], -1
        )
        p_PV = logits_PNV[:, k].softmax(-1)
        kl_P = (p_PV * (p_PV.log() - q_PV.log())).sum(-1)
        surprise_P = -q_PV.gather(-1, future_PN[:, k, None])[:, 0].log()
        exact_P = exact_P + 0.9**k * (0.7 * kl_P + 0.3 * surprise_P)
    torch.testing.assert_close(loss_P.double(), exact_P, rtol=1e-5, atol=1e-5)


def _with(prefix_Pn: Tensor, last: int) -> Tensor:
    return torch.cat([prefix_Pn[:, :-1], torch.full_like(prefix_Pn[:, :1], last)], dim=1)


@pytest.mark.parametrize("rows", [1, P])
@pytest.mark.parametrize("kind", [{}, {"map_rank": 2}, {"map_hidden": 2}, KINDS["offsets"], KINDS["linked"]])
def test_active_components_are_the_heaviest_renormalised(kind: dict[str, Any], rows: int) -> None:
    heads, seen_PD, table_VD = make(kind)
    seen_PD, given = seen_PD[:rows], before(heads, torch.arange(rows), table_VD)
    whole, few = heads.joint(seen_PD, table_VD, given), heads.joint(seen_PD, table_VD, given, active=2)
    assert few.rank == 2
    weights, chosen = whole.weights_R.topk(2, dim=-1)
    torch.testing.assert_close(few.weights_R, weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(few.scores_NRV, whole.scores_NRV.take_along_dim(chosen[:, None, :, None], dim=2))
    assert heads.joint(seen_PD, table_VD, given, active=R).rank == R


# --- exactness: what is written has the target's distribution, whatever the joint ------------------------------------


class FamilyStep(Step):
    """A window whose joint is no plain CP."""

    def __init__(self, kind: str) -> None:
        super().__init__(3)
        generator = torch.Generator().manual_seed(1)
        shape = (DRAFTS - 1, 3, 3)
        self.transitions = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
        self.gains = 2 * torch.randn(DRAFTS, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        self.kind = kind

    def batch(self, samples: int) -> Joint:
        plain = super().batch(samples)
        return Joint(
            plain.log_weights_R,
            plain.scores_NRV,
            False,
            self.transitions.expand(samples, -1, -1, -1) if "hmm" in self.kind else None,
            (lambda k, before: self.gains[k][before]) if "chain" in self.kind else None,
        )


@pytest.mark.parametrize("setting", ["unfiltered", "all"])
@pytest.mark.parametrize("kind", ["hmm", "chain", "hmm+chain"])
def test_drafts_of_every_joint_are_accepted_losslessly(kind: str, setting: str) -> None:
    counts, accepted = simulate(EXACT, FamilyStep(kind), SETTINGS[setting])
    assert oracle.p_value(counts, truth(3, setting)) > oracle.FALSE_ALARM
    assert 0.2 < accepted < DRAFTS


def heaviest(joint: Joint) -> Joint:
    """`decode.active=1`."""
    weights, chosen = joint.weights_R.topk(1, dim=-1)
    scores = joint.scores_NRV.take_along_dim(chosen[:, None, :, None], dim=2)
    return Joint((weights / weights.sum(-1, keepdim=True)).log(), scores, joint.normalised)


def draft_few(joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
    return sampled_chain(heaviest(joint), count, sampling, uniforms_BS)


def draft_few_scored_by_all(joint: Joint, count: int, sampling: Sampling, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The fault: drawn from the few active components, accepted by the whole mixture."""
    tokens_BK, _ = draft_few(joint, count, sampling, uniforms_BS)
    return tokens_BK, joint.conditionals(tokens_BK)


def test_drafts_of_few_components_are_lossless_and_scoring_them_by_all_is_not() -> None:
    step, exact = Step(3), truth(3, "unfiltered")
    assert oracle.p_value(simulate(Variant(draft_few, verify), step, Sampling())[0], exact) > oracle.FALSE_ALARM
    faulty = simulate(Variant(draft_few_scored_by_all, verify), step, Sampling())[0]
    assert oracle.p_value(faulty, exact) < 1e-12


def test_a_sampled_chain_is_drawn_from_what_it_says() -> None:
    """q of a drawn draft is its conditional, for an HMM with links: rejection sampling divides by it."""
    step = FamilyStep("hmm+chain")
    joint, uniforms = step.batch(8), torch.rand(8, DRAFTS + 1, dtype=torch.float64)
    tokens_BK, probs_BKV = sampled_chain(joint, DRAFTS, Sampling(), uniforms)
    torch.testing.assert_close(probs_BKV, joint.conditionals(tokens_BK))
    for k in range(DRAFTS):
        assert torch.equal(tokens_BK[:, k], draw(probs_BKV[:, k], uniforms[:, k]))
