"""The objective: which positions count, unbiased subsets, and the balance terms against loops."""

import math

import pytest
import torch
from torch import Tensor

from cpdlm.training import objective
from tests import joint_oracle as oracle

B, T, N = 2, 32, 3


def ragged() -> Tensor:
    return torch.randint(0, N + 1, (B, T), generator=torch.Generator().manual_seed(0))


def losses() -> tuple[Tensor, Tensor]:
    """nll of x_{t+1}, and of the later tokens given it, at each position."""
    generator = torch.Generator().manual_seed(1)
    first, later = (torch.rand(B, T, generator=generator, dtype=torch.float64) for _ in range(2))
    return 2 * first, 5 * later


def weigh(
    successors_BT: Tensor, fraction: float, first_is_tied: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Weights of a step of one micro-batch."""
    picked_BT = torch.rand(successors_BT.shape, generator=generator) < fraction
    exists_BT = successors_BT > 0
    counts = torch.stack([exists_BT.sum(), (exists_BT & picked_BT).sum()])
    return objective.position_weights(successors_BT, picked_BT, counts, first_is_tied)


def value(weights: tuple[Tensor, Tensor], first_is_tied: bool) -> float:
    first, later = losses()
    rest = later if first_is_tied else first + later
    return (weights[0] * first + weights[1] * rest).sum().item()


def mean_joint_nll() -> float:
    exists = ragged() > 0
    first, later = losses()
    return (first + later)[exists].mean().item()


def test_all_positions_untied_is_exactly_the_mean_joint_nll() -> None:
    first_BT, rest_BT = weigh(ragged(), 1.0, first_is_tied=False)
    exists = ragged() > 0
    assert torch.equal(first_BT, torch.zeros(B, T, dtype=torch.float64))
    torch.testing.assert_close(rest_BT, exists / exists.sum().double())
    assert math.isclose(value((first_BT, rest_BT), False), mean_joint_nll(), rel_tol=1e-12)


def test_all_positions_tied_is_the_same_mean() -> None:
    first_BT, rest_BT = weigh(ragged(), 1.0, first_is_tied=True)
    assert torch.equal(first_BT, rest_BT)
    assert math.isclose(value((first_BT, rest_BT), True), mean_joint_nll(), rel_tol=1e-12)


@pytest.mark.parametrize("first_is_tied", [False, True])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_random_subset_is_an_unbiased_estimate(first_is_tied: bool, fraction: float) -> None:
    """Mean of 4000 subsets within 5 standard errors (false alarms: 6e-7), and the standard error is small."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [value(weigh(ragged(), fraction, first_is_tied, generator), first_is_tied) for _ in range(4000)]
    )
    error = values.std().item() / len(values) ** 0.5
    assert 0 < error < 0.02
    assert abs(values.mean().item() - mean_joint_nll()) < 5 * error


@pytest.mark.parametrize("first_is_tied", [False, True])
def test_the_next_token_is_trained_at_every_position_of_a_subset(first_is_tied: bool) -> None:
    """Weight of -log p(x_{t+1}), over both terms: the same everywhere. That of later tokens: on the subset."""
    first_BT, rest_BT = weigh(ragged(), 0.3, first_is_tied, torch.Generator().manual_seed(0))
    exists = ragged() > 0
    of_first = first_BT if first_is_tied else first_BT + rest_BT
    torch.testing.assert_close(of_first, exists / exists.sum().double())
    assert 0 < (rest_BT > 0).sum() < exists.sum()
    assert not (rest_BT > 0)[~exists].any()
    torch.testing.assert_close(rest_BT.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("fraction", [1.0, 0.01])
def test_no_position_at_all_is_no_weight_and_no_nan(fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first_BT, rest_BT = weigh(torch.zeros(1, 4, dtype=torch.long), fraction, False, generator)
    assert not first_BT.any() and not rest_BT.any()


# --- balance ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Tensor:
    return (2 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).log_softmax(-1)


def test_component_use_against_loops(gate: Tensor) -> None:
    use = objective.component_use(gate)
    mean, firsts, entropy = oracle.use(gate.exp().tolist())
    torch.testing.assert_close(use.mean_R.tolist(), mean)
    torch.testing.assert_close(use.top_share_R.tolist(), firsts)
    assert math.isclose(use.entropy.item(), entropy, rel_tol=1e-9)
    assert math.isclose(use.effective.item(), math.exp(-sum(p * math.log(p) for p in mean)), rel_tol=1e-9)
    assert use.dead.item() == sum(p < 0.1 / 4 for p in mean)


def test_balance_terms_against_loops(gate: Tensor) -> None:
    mean, firsts, _ = oracle.use(gate.exp().tolist())
    use = objective.component_use(gate)
    assert math.isclose(objective.switch_balance(use).item(), 4 * sum(f * p for f, p in zip(firsts, mean, strict=True)))
    kl = sum(0.25 * math.log(0.25 / p) for p in mean)
    assert math.isclose(objective.kl_balance(use).item(), kl, rel_tol=1e-9)


@pytest.mark.parametrize("name", ["switch", "kl"])
def test_gradients_of_the_balance_terms(gate: Tensor, name: str) -> None:
    """f counts as a constant; the gradient goes through P alone."""
    leaf = gate.clone().requires_grad_()
    use = objective.component_use(leaf)
    (objective.switch_balance(use) if name == "switch" else objective.kl_balance(use)).backward()
    mean, firsts, _ = oracle.use(gate.exp().tolist())
    by_mean = [4 * f for f in firsts] if name == "switch" else [-0.25 / p for p in mean]
    expected = gate.exp() * torch.tensor(by_mean, dtype=torch.float64) / len(gate)
    torch.testing.assert_close(leaf.grad, expected)


def test_bias_step_lifts_the_unused_and_lowers_the_overused() -> None:
    gate = torch.tensor([[0.7, 0.25, 0.05, 0.0]], dtype=torch.float64).clamp_min(1e-30).log()
    step = objective.bias_step([objective.component_use(gate)], 0.01)
    torch.testing.assert_close(step.tolist(), [-0.01, 0.0, 0.01, 0.01])


def test_bias_step_weighs_micro_batches_by_their_positions(gate: Tensor) -> None:
    """Halves of unequal length move the bias as the whole does; the last half alone would not."""
    whole, *parts = (objective.component_use(part) for part in (gate, gate[:5], gate[5:]))
    assert torch.equal(objective.bias_step(parts, 0.01), objective.bias_step([whole], 0.01))
    assert torch.equal(torch.stack([p.positions for p in parts]), torch.tensor([5.0, 35.0], dtype=torch.float64))
    assert not torch.equal(objective.bias_step(parts[:1], 0.01), objective.bias_step([whole], 0.01))


def test_no_position_leaves_the_balance_finite() -> None:
    use = objective.component_use(torch.zeros(0, 4))
    assert torch.isfinite(objective.switch_balance(use)) and torch.isfinite(objective.kl_balance(use))
