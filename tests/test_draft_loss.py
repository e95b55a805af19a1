"""The objectives of heads on a frozen model: each is its equation, at every chunk size, in value and gradient."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.config import CHOICES, ConfigError
from cpdlm.model.heads import FactorHeads, HeadsConfig
from cpdlm.model.joint import Joint
from cpdlm.model.language_model import LanguageModel, States
from cpdlm.model.losses.draft import OBJECTIVES, Objective, Windows
from cpdlm.model.losses.teacher import WholeTeacher, cell_log_probs, columns
from cpdlm.training import states
from cpdlm.training.states import kept_states
from tests.test_language_model import T, make, rows

P, N, R, V, D = 6, 3, 2, 7, 4
KINDS = {"full": {}, "low-rank": {"map_rank": 2}, "mlp": {"map_hidden": 3}}


def case(kind: str = "full", seed: int = 0) -> tuple[FactorHeads, Tensor, Tensor, Windows]:
    torch.manual_seed(seed)
    heads = FactorHeads(D, V, HeadsConfig(R, N, False, noise=0.7, **KINDS[kind])).double()
    heads.gate.weight.data.normal_()
    table_VD = torch.randn(V, D, dtype=torch.float64)
    in_vocabulary_PN = torch.rand(P, N) < 0.8
    counts_PN = torch.arange(N) < (torch.arange(P) % (N + 1)).unsqueeze(-1)
    states_UD = torch.randn(P * N, D, dtype=torch.float64)
    normaliser_U = (states_UD @ table_VD.T).logsumexp(-1) + 0.3  # a part of the mass is outside the draft vocabulary
    return (
        heads,
        table_VD,
        torch.randn(P, D, dtype=torch.float64).requires_grad_(),
        Windows(
            torch.randint(0, V, (P, N)).masked_fill(~in_vocabulary_PN, -1),
            counts_PN,
            torch.randperm(P * N).view(P, N),
            WholeTeacher(states_UD, normaliser_U.float(), lambda hidden, table: hidden @ table.T),
        ),
    )


def by_hand(name: str, heads: FactorHeads, hidden_PD: Tensor, table_VD: Tensor, windows: Windows) -> Tensor:
    """The equations of the module's docstring, one token and one component at a time."""
    joint = heads.joint(hidden_PD, table_VD)
    losses = []
    for p in range(P):
        prior = posterior = joint.log_weights_R[p].exp()
        total = torch.zeros((), dtype=torch.float64)
        for k in range(N):
            factors_RV = joint.log_factors_NRV[p, k].exp()
            draft_V = (prior if name == "eq14-marginal" else posterior) @ factors_RV
            state, whole = windows.state_PN[p, k], windows.teacher
            target_V = torch.exp(table_VD @ whole.states_UD[state] - whole.log_normaliser_U[state].double())
            token = int(windows.future_PN[p, k])
            surprise = -draft_V[token].log() if token >= 0 else torch.zeros(())
            kl = sum(target_V[v] * (target_V[v].log() - draft_V[v].log()) for v in range(V))
            kept = torch.stack([torch.minimum(target_V[v], draft_V[v]) for v in range(V)]).sum()
            share = math.exp(-3 * float(kept.detach()))
            each = {
                "joint": surprise,
                "eq14": 0.7 * kl + 0.3 * surprise,
                "eq14-marginal": 0.7 * kl + 0.3 * surprise,
                "acceptance": 1 - kept,
                "log-acceptance": -torch.log(kept),
                "blend": share * kl + (1 - share) * (1 - kept),
            }[name]
            if windows.counts_PN[p, k]:
                total = total + 0.9**k * each
            if token >= 0:
                posterior = posterior * factors_RV[:, token]
                posterior = posterior / posterior.sum()
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_is_its_equation_with_its_gradient(name: str, kind: str) -> None:
    heads, table_VD, hidden_PD, windows = case(kind)
    weight_P = torch.randn(P, dtype=torch.float64)
    expected_P = by_hand(name, heads, hidden_PD, table_VD, windows)
    leaves = [hidden_PD, *heads.parameters()]
    expected = torch.autograd.grad((weight_P * expected_P).sum(), leaves, allow_unused=True, materialize_grads=True)
    for positions_per_chunk in (1, 4, P):
        chunk_bytes = 4 * N * R * V * positions_per_chunk
        total, loss_P, _ = heads.draft_loss(
            hidden_PD, windows, weight_P, table_VD, Objective(name, 0.7, 0.9), chunk_bytes
        )
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(loss_P.double(), expected_P, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_with_a_cell_for_each_token_the_loss_is_the_whole_one(name: str) -> None:
    heads, table_VD, hidden_PD, windows = case()
    leaves, weight_P, found = [hidden_PD, *heads.parameters()], torch.randn(P, dtype=torch.float64), []
    for held in (windows, windows.narrowed(table_VD, V, others=0, chunk_bytes=100)):
        total, loss_P, _ = heads.draft_loss(hidden_PD, held, weight_P, table_VD, Objective(name, 0.7, 0.9), 400)
        found.append([loss_P, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


def test_fewer_cells_bound_the_divergence_from_below_and_the_overlap_from_above() -> None:
    heads, table_VD, hidden_PD, windows = case()
    held = [windows.narrowed(table_VD, top, others=0, chunk_bytes=100) for top in (1, 3, 5, V)]
    for name, alpha in (("eq14", 1.0), ("acceptance", 1.0)):
        each = [
            heads.draft_loss(hidden_PD, one, torch.ones(P), table_VD, Objective(name, alpha), 400)[1] for one in held
        ]
        for fewer, more in pairwise(each):
            assert (fewer <= more + 1e-6).all() and fewer.sum() < more.sum()


def test_the_texts_own_token_has_a_cell_however_unlikely() -> None:
    heads, table_VD, hidden_PD, windows = case()
    found = [
        heads.draft_loss(hidden_PD, held, torch.ones(P), table_VD, Objective("eq14", alpha=0.0), 400)[1]
        for held in (windows, windows.narrowed(table_VD, 1, others=0, chunk_bytes=100))
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_cells_have_the_gradient_of_their_equation() -> None:
    torch.manual_seed(0)
    rows_MD, table_VD = torch.randn(5, D, dtype=torch.float64).requires_grad_(), torch.randn(V, D, dtype=torch.float64)
    tokens_MK = torch.stack([torch.randperm(V)[:3] for _ in range(5)])
    gain_V, pull_MK1 = torch.rand(V, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    probs_MV = (rows_MD @ table_VD.T + gain_V).softmax(-1)
    chosen_MK = probs_MV.gather(-1, tokens_MK)
    expected_MK1 = torch.cat([chosen_MK, 1 - chosen_MK.sum(-1, keepdim=True)], dim=-1).log()
    found_MK1 = cell_log_probs(rows_MD, table_VD, tokens_MK, gain_V)
    torch.testing.assert_close(found_MK1, expected_MK1)
    torch.testing.assert_close(
        *(torch.autograd.grad((pull_MK1 * each).sum(), rows_MD)[0] for each in (found_MK1, expected_MK1))
    )


def test_an_estimated_normaliser_is_right_on_average() -> None:
    """The sum of the tokens decides the offset; over the three of a stride of three, all count alike."""
    counted_V = torch.zeros(20)
    for tokens in ([1, 1, 1, 2], [1, 1, 2, 2], [1, 2, 2, 2]):
        column_A, gain_A = columns(torch.tensor(tokens), 20, others=6)
        assert len(column_A.unique()) == len(column_A) == 8
        counted_V[column_A] += gain_A.exp() / 3
    torch.testing.assert_close(counted_V, torch.ones(20))


def test_every_objective_has_a_name_that_the_config_knows() -> None:
    assert tuple(OBJECTIVES) == CHOICES["loss.objective"]


# --- in the model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def acceptance_by_hand(model: LanguageModel, batch: dict[str, Tensor]) -> list[float]:
    """1 - sum min(p, q) over the depths whose target lies in the row, from the model's public laws."""
    hidden_BTD = model.hidden(batch["tokens_BT"], batch["position_ids_BT"])
    first = 1 if model.first_is_tied else 0
    losses = []
    for b in range(len(hidden_BTD)):
        for t in range(T):
            future_N = batch["future_BTN"][b, t]
            joint = model.joint(hidden_BTD[b, t], future_N[0])
            total = 0.0
            for k in range(joint.horizon):
                probs_V = Joint(
                    joint.posterior(future_N[first : first + k]), joint.scores_NRV[k:], joint.normalised
                ).first()
                if t + first + k < T:
                    target_V = model.target_log_probs(hidden_BTD[b, t + first + k])
                    total += 1 - float(torch.minimum(probs_V.exp(), target_V.exp()).sum())
            losses.append(total)
    return losses


@pytest.mark.parametrize("layout", ["common", "common anchored"])
def test_the_target_of_each_draft_is_read_one_position_before_it(layout: str) -> None:
    model, batch = make(layout), rows()
    none_BT, all_BT = torch.zeros(2, T), torch.ones(2, T)
    terms = model(**batch, first_weight_BT=none_BT, rest_weight_BT=all_BT, objective=Objective("acceptance"))
    torch.testing.assert_close(
        terms.rest_nll_P.double(),
        torch.tensor(acceptance_by_hand(model, batch), dtype=torch.float64),
        rtol=1e-5,
        atol=1e-6,
    )


def test_known_states_change_nothing() -> None:
    model, batch = make("common anchored"), rows()
    with torch.no_grad():
        hidden_BTD = model.hidden(batch["tokens_BT"], batch["position_ids_BT"])
    known = States(hidden_BTD, model.log_normaliser(hidden_BTD))
    weights = {"first_weight_BT": torch.zeros(2, T), "rest_weight_BT": torch.rand(2, T)}
    for objective in (None, Objective("blend", gamma=0.8)):
        with_trunk = model(**batch, **weights, objective=objective)
        blank = batch | {"tokens_BT": torch.zeros_like(batch["tokens_BT"])}  # the trunk is not asked
        from_states = model(**blank, **weights, objective=objective, states=known)
        assert torch.equal(with_trunk.rest_nll_P, from_states.rest_nll_P)


def test_on_a_draft_vocabulary_the_loss_is_that_of_its_tokens() -> None:
    model, batch = make("common", **{"model.tie_first": True}), rows()
    listed = torch.tensor([0, 2, 3, 5, 7, 10])
    model.use_draft_vocabulary(listed)
    weights = {"first_weight_BT": torch.zeros(2, T), "rest_weight_BT": torch.ones(2, T)}
    found = model(**batch, **weights).rest_nll_P
    hidden_BTD = model.hidden(batch["tokens_BT"], batch["position_ids_BT"])
    place = {int(token): index for index, token in enumerate(listed)}
    expected = []
    for b in range(2):
        for t in range(T):
            joint = model.draft_joint(hidden_BTD[b, t][None], batch["future_BTN"][b, t, :1])
            each_R = joint.log_weights_R[0]
            for k, token in enumerate(batch["future_BTN"][b, t, 1:].tolist()):
                if token in place:
                    each_R = each_R + joint.log_factors_NRV[0, k, :, place[token]]
            expected.append(-each_R.logsumexp(-1))
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-6, atol=1e-8)


# --- states on the disk ---------------------------------------------------------------------------------------------


class FewRows:
    """As much of `Rows` as the cache needs."""

    count, context = 21, T

    def __getitem__(self, some: list[int]) -> dict[str, Tensor]:
        batches = [rows(1, seed) for seed in some]
        return {name: torch.cat([batch[name] for batch in batches]) for name in ("tokens_BT", "position_ids_BT")}


def stored(model: LanguageModel, cache: Path, limit_gib: float = 1.0) -> states.StoredStates:
    of: Any = FewRows()
    return kept_states(model, of, cache, {"text": "t", "trunk": "w"}, limit_gib, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kept_states_are_the_trunks_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make("common").to(dtype)
    kept = stored(model, tmp_path)[[20, 3]]
    some = FewRows()[list(range(16, 21))], FewRows()[list(range(8))]  # batches as they were computed
    for row, place, batch in ((0, 4, some[0]), (1, 3, some[1])):
        with torch.no_grad():
            hidden_BTD = model.hidden(batch["tokens_BT"], batch["position_ids_BT"])
        assert torch.equal(kept["hidden_BTD"][row], hidden_BTD[place])
        torch.testing.assert_close(
            kept["log_normaliser_BT"][row], model.log_normaliser(hidden_BTD)[place], rtol=1e-6, atol=1e-6
        )


def test_a_killed_run_goes_on_behind_its_last_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwards = make("common"), []
    counted = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *given: (forwards.append(1), counted(*given))[1])
    whole = stored(model, tmp_path / "whole")[list(range(21))]
    write = states.write_tensors

    def killed(path: Path, *given: Any) -> None:
        if path.stem == "00001":
            raise KeyboardInterrupt
        write(path, *given)

    monkeypatch.setattr(states, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        stored(model, tmp_path / "cut")
    monkeypatch.setattr(states, "write_tensors", write)
    forwards.clear()
    again = stored(model, tmp_path / "cut")[list(range(21))]
    assert len(forwards) == 2, "the first batch of three was done"
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    forwards.clear()
    stored(model, tmp_path / "cut")
    assert not forwards


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: bytes(len(content)), None])
def test_damaged_states_are_computed_again(
    damage: Callable[[bytes], bytes] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forwards = make("common"), []
    counted = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *given: (forwards.append(1), counted(*given))[1])
    whole = stored(model, tmp_path)[list(range(21))]
    (path,) = tmp_path.rglob("00002.safetensors")
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    forwards.clear()
    again = stored(model, tmp_path)[list(range(21))]
    assert len(forwards) == 1
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_more_states_than_the_limit_are_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"168 tokens \(0.00 GiB\) are more than data.states_gib=1e-06; keep fewer"):
        stored(make("common"), tmp_path, limit_gib=1e-6)
