"""Heads and anchor: hidden states to the joint distribution, against the written-out formulas."""

import pytest
import torch
from torch import Tensor

from cpdlm.model.draft_input import Anchor
from cpdlm.model.heads import FactorHeads, HeadsConfig
from tests import joint_oracle as oracle

P, N, R, V, D, K = 4, 3, 2, 7, 6, 2
KINDS = ("full", "low-rank", "mlp", "separate")


def make(kind: str, rank: int = R, bias_buffer: bool = False) -> tuple[FactorHeads, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = FactorHeads(
        D,
        V,
        HeadsConfig(
            rank,
            N,
            False,
            separate=kind == "separate",
            map_rank=K if kind == "low-rank" else 0,
            map_hidden=K if kind == "mlp" else 0,
            bias_buffer=bias_buffer,
        ),
    ).double()
    heads.gate.weight.data.normal_()
    return heads, torch.randn(P, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, R])
def test_joint_is_the_written_out_formula(kind: str, rank: int) -> None:
    heads, hidden_PD, table_VD = make(kind, rank)
    joint = heads.joint(hidden_PD, table_VD)
    gate_PR = (hidden_PD @ heads.gate.weight.T + heads.gate.bias).log_softmax(-1)
    torch.testing.assert_close(joint.log_weights_R, gate_PR)
    for p in range(P):
        for s in range(N):
            for a in range(rank):
                row = oracle.rows(kind, hidden_PD[p], s, a, rank, dict(heads.maps.items()), table_VD)
                torch.testing.assert_close(joint.log_factors_NRV[p, s, a], row.log_softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, R])
def test_given_the_first_token_is_the_joint_conditioned(kind: str, rank: int) -> None:
    heads, hidden_PD, table_VD = make(kind, rank)
    first_P = torch.tensor([0, -1, V - 1, 3])
    given, exact = heads.given_first(hidden_PD, table_VD, first_P), heads.joint(hidden_PD, table_VD).condition(first_P)
    torch.testing.assert_close(given.log_weights_R, exact.log_weights_R)
    torch.testing.assert_close(given.log_factors_NRV, exact.log_factors_NRV)


@pytest.mark.parametrize("kind", KINDS)
def test_components_start_apart(kind: str) -> None:
    """Equal components would stay equal: their gradients would be, too."""
    heads, hidden_PD, table_VD = make(kind)
    factors = heads.joint(hidden_PD, table_VD).log_factors_NRV
    assert (factors[:, :, 0] - factors[:, :, 1]).abs().amax(-1).min() > 1e-3


def test_maps_start_near_the_trunks_own_prediction() -> None:
    torch.manual_seed(0)
    width = 256
    hidden = torch.randn(64, width)
    for map_rank in (0, 16):
        heads = FactorHeads(width, V, HeadsConfig(R, N, False, map_rank=map_rank, noise=0.2))
        rows = heads._features()(hidden, 0, *heads._map_parameters(0, N)).view(64, N * R, width)
        moved = (rows - hidden[:, None]).norm(dim=-1) / hidden.norm(dim=-1)[:, None]
        assert 0.15 < moved.mean() < 0.25


def test_bias_buffer_takes_the_place_of_the_gates_bias() -> None:
    heads, hidden_PD, table_VD = make("full", bias_buffer=True)
    assert heads.gate.bias is None and "balance_bias_R" in heads.state_dict()
    assert not any("bias" in name for name, _ in heads.named_parameters())
    before = heads.joint(hidden_PD, table_VD).log_weights_R
    heads.balance_bias_R += torch.tensor([0.3, -0.2], dtype=torch.float64)
    after = heads.joint(hidden_PD, table_VD).log_weights_R
    expected = (before + torch.tensor([0.3, -0.2], dtype=torch.float64)).log_softmax(-1)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(heads.joint(hidden_PD, table_VD, stop=1).log_weights_R, expected)


def test_the_token_condition_starts_as_the_identity_and_learns_from_the_first_step() -> None:
    anchor = Anchor(D, 4).double()
    hidden_PD, embedded_PD = torch.randn(P, D, dtype=torch.float64), torch.randn(P, D, dtype=torch.float64)
    assert torch.equal(anchor(hidden_PD, embedded_PD), hidden_PD)
    anchor(hidden_PD, embedded_PD).square().sum().backward()
    assert anchor.out.weight.grad is not None and anchor.out.weight.grad.norm() > 0
    assert sum(p.numel() for p in anchor.parameters()) == (2 * D * 4 + 4) + (4 * D + D)
