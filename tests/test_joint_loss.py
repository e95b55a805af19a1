"""The bounded-memory loss is the dense loss, in value and every gradient, and its memory is bounded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpdlm.model.heads import FactorHeads, HeadsConfig
from tests import joint_oracle as oracle

KINDS = ("full", "low-rank", "mlp", "separate")
LINEAR = ("full", "low-rank", "separate")  # a perceptron's own rounding and saturation are not the loss's
P, N, R, V, D, K = 7, 3, 2, 11, 6, 2
POSITION_BYTES = N * R * V * 8  # of float64 logits


class Case:
    """Heads, inputs and an unembedding, with a fresh copy of every leaf for each side of the comparison."""

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float64,
        rank: int = R,
        factors: int = N,
        positions: int = P,
        hidden_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.kind, self.rank = kind, rank
        self.heads = FactorHeads(
            D,
            V,
            HeadsConfig(
                rank,
                factors,
                False,
                separate=kind == "separate",
                map_rank=K if kind == "low-rank" else 0,
                map_hidden=K if kind == "mlp" else 0,
                noise=0.7,
            ),
        ).to(dtype)
        for parameter in self.heads.maps.parameters():
            parameter.data.mul_(1 + torch.rand_like(parameter))
        self.heads.gate.weight.data.normal_()
        if kind == "separate":
            self.heads.maps["unembeddings"].data.normal_()
        self.hidden = (hidden_scale * torch.randn(positions, D)).to(dtype).requires_grad_()
        self.table = torch.randn(V, D).to(dtype).requires_grad_(kind != "separate")
        self.future = torch.randint(0, V, (positions, factors))
        self.count = torch.arange(positions) % (factors + 1)  # absent factors, down to none at all
        self.weight = torch.randn(positions, dtype=torch.float64)  # negative ones too

    def leaves(self) -> dict[str, Tensor]:
        found = {"hidden": self.hidden, **dict(self.heads.named_parameters())}
        return found | {"table": self.table} if self.kind != "separate" else found

    def present(self) -> Tensor:
        """The tokens, -1 for those that do not exist."""
        return self.future.masked_fill(torch.arange(self.heads.factors) >= self.count[:, None], -1)

    def bounded(self, chunk_bytes: int = 32 * 2**20, factors: int | None = None) -> tuple[Tensor, Tensor]:
        factors = self.heads.factors if factors is None else factors
        found = self.heads.nll(self.hidden, self.present(), self.weight, self.table, factors, chunk_bytes)
        return found[:2]

    def dense(self, factors: int | None = None) -> tuple[Tensor, Tensor]:
        """The oracle, in float64 whatever the case's own type."""
        maps = {name: parameter.double() for name, parameter in self.heads.maps.items()}
        gate = self.hidden.double() @ self.heads.gate.weight.double().T + self.heads.gate.bias.double()
        count = self.count if factors is None else self.count.clamp(max=factors)
        known = gate.log_softmax(-1), self.future, count, self.weight, maps, self.table.double()
        return oracle.loss(self.kind, self.hidden.double(), *known)


def gradients(case: Case, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    for leaf in case.leaves().values():
        leaf.grad = None
    loss().backward()
    return {
        name: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone())
        for name, leaf in case.leaves().items()
    }


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient to `tolerance` of its own norm."""
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        error = (ours[name].double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"the gradient of {name} is off by {error:.1e} of its norm"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions_per_chunk", [0, 1, 2, 3, P, 1000])
def test_equals_the_dense_loss_at_every_chunk_size(kind: str, positions_per_chunk: int) -> None:
    case = Case(kind)
    chunk = max(1, positions_per_chunk * POSITION_BYTES)
    total, nll = case.bounded(chunk)
    exact_total, exact_nll = case.dense()
    torch.testing.assert_close(total, exact_total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, exact_nll, rtol=1e-12, atol=1e-12)
    assert not nll.requires_grad
    exact = gradients(case, lambda: case.dense()[0])
    assert all(gradient.norm() > 0 for gradient in exact.values()), "the comparison would be empty"
    compare(gradients(case, lambda: case.bounded(chunk)[0]), exact, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,factors", [(1, 1), (1, 3), (4, 1), (4, 2)])
def test_equals_the_dense_loss_at_every_shape(kind: str, rank: int, factors: int) -> None:
    case = Case(kind, rank=rank, factors=factors)
    exact = gradients(case, lambda: case.dense()[0])
    compare(gradients(case, lambda: case.bounded(POSITION_BYTES)[0]), exact, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_marginal_over_fewer_factors(kind: str) -> None:
    case = Case(kind)
    torch.testing.assert_close(case.bounded(factors=1)[0], case.dense(factors=1)[0])
    exact = gradients(case, lambda: case.dense(factors=1)[0])
    compare(gradients(case, lambda: case.bounded(POSITION_BYTES, factors=1)[0]), exact, 1e-12)


def test_a_second_backward_says_what_to_do() -> None:
    total, _ = Case("full").bounded()
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="run the forward pass again"):
        total.backward()


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_under_autocast_and_throughout(kind: str, parameters: torch.dtype) -> None:
    """Products in bfloat16 (8 bits of mantissa), sums and softmax in float32; gradients come in the leaf's own type."""
    case = Case(kind, parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        total, nll = case.bounded(POSITION_BYTES // 2)
        mine = gradients(case, lambda: case.bounded(POSITION_BYTES // 2)[0])
    assert total.dtype == nll.dtype == torch.float32
    assert all(gradient.dtype == parameters for gradient in mine.values())
    torch.testing.assert_close(total.double(), case.dense()[0], rtol=0.02, atol=0.1)
    compare(mine, gradients(case, lambda: case.dense()[0]), 0.04)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_ten_thousand_stay_finite_and_right(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype, hidden_scale=1e4)
    case.heads.gate.weight.data.mul_(1e-4)  # the gate is not what is being stretched
    total, nll = case.bounded(POSITION_BYTES)
    mine = gradients(case, lambda: case.bounded(POSITION_BYTES)[0])
    assert nll.max() > 1e4 and torch.isfinite(total) and torch.isfinite(nll).all()
    assert all(torch.isfinite(gradient).all() for gradient in mine.values())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(nll.double(), case.dense()[1], rtol=tolerance, atol=tolerance)
    compare(mine, gradients(case, lambda: case.dense()[0]), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_incoming_gradient_scales_exactly(kind: str) -> None:
    """As a gradient scaler would: 65536 is a power of two, so the scaled gradients differ in the exponent alone."""
    case = Case(kind, torch.float32)
    once = gradients(case, lambda: case.bounded()[0])
    scaled = gradients(case, lambda: case.bounded()[0] * 65536)
    for name, gradient in once.items():
        assert torch.equal(gradient * 65536, scaled[name]), name
    mixed = gradients(case, lambda: 3 * case.bounded()[0] - 0.5 * case.bounded()[0])
    compare(mixed, {name: 2.5 * gradient for name, gradient in once.items()}, 1e-6)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_tiny_and_huge_weights_survive_bfloat16(exponent: int) -> None:
    case = Case("full", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        once = gradients(case, lambda: case.bounded()[0])
        case.weight *= 2.0**exponent
        moved = gradients(case, lambda: case.bounded()[0])
    compare(moved, {name: 2.0**exponent * gradient for name, gradient in once.items()}, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_trunk_gets_no_gradient_and_the_heads_all_of_theirs(kind: str) -> None:
    case = Case(kind)
    exact = gradients(case, lambda: case.dense()[0])
    case.hidden.requires_grad_(False)
    case.table.requires_grad_(False)
    mine = gradients(case, lambda: case.bounded(POSITION_BYTES)[0])
    assert case.hidden.grad is None and case.table.grad is None
    heads = dict(case.heads.named_parameters())
    compare({name: mine[name] for name in heads}, {name: exact[name] for name in heads}, 1e-12)


def test_frozen_heads_pass_the_gradient_on() -> None:
    case = Case("full")
    exact = gradients(case, lambda: case.dense()[0])
    case.heads.requires_grad_(False)
    mine = gradients(case, lambda: case.bounded(POSITION_BYTES)[0])
    assert all(parameter.grad is None for parameter in case.heads.parameters())
    compare({"hidden": mine["hidden"]}, {"hidden": exact["hidden"]}, 1e-12)
    compare({"table": mine["table"]}, {"table": exact["table"]}, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_value_is_the_same(kind: str) -> None:
    case = Case(kind)
    with torch.no_grad():
        total, nll = case.bounded(POSITION_BYTES)
    assert not total.requires_grad
    torch.testing.assert_close(total, case.dense()[0].detach())
    torch.testing.assert_close(nll, case.dense()[1].detach())
    with torch.inference_mode():
        torch.testing.assert_close(case.bounded(POSITION_BYTES)[1].clone(), nll)
    with torch.no_grad(), Watched() as mode:
        case.bounded(1)
    assert not any("backward" in name or "scatter" in name for name in mode.names), "gradients that nobody asked for"


@pytest.mark.parametrize("kind", KINDS)
def test_no_positions_give_zero_and_zero_gradients(kind: str) -> None:
    case = Case(kind, positions=0)
    total, nll = case.bounded()
    assert total.item() == 0 and nll.shape == (0,)
    assert all(gradient.norm() == 0 for gradient in gradients(case, lambda: case.bounded()[0]).values())


class Watched(TorchDispatchMode):
    """What any operation made, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.made = set[str](), list[Tensor]()  # kept, so that no memory is used twice

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        self.names.add(str(function))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.made.append(tensor.detach())
        return result


def largest(kind: str, positions: int, chunk_positions: int) -> int:
    case = Case(kind, torch.float32, positions=positions)
    with Watched() as mode:
        case.bounded(chunk_positions * N * R * V * 4)[0].backward()
    return max(tensor.numel() for tensor in mode.made)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_logits_of_the_batch(kind: str) -> None:
    """No tensor ever holds more logits than a chunk; what does grow is a few numbers per (position, width)."""
    positions, row = 64, N * R * V
    allowed = max(3 * row, positions * D, 2 * N * R * V * D if kind == "separate" else N * R * D * D)
    assert allowed < positions * row / 4
    assert largest(kind, positions, 3) <= allowed, "logits of more than a chunk are alive at once"
    assert largest(kind, positions, positions) >= positions * row, "the meter does not see the logits"


@pytest.mark.parametrize("positions", [8, 400])
def test_bfloat16_gradients_of_many_chunks_do_not_stall(positions: int) -> None:
    """A sum of hundreds of equal parts cannot be kept in 8 bits of mantissa; of few, it can, without more memory.

    Of the sums over chunks. The gate's gradient is prior - posterior, which rounds badly however they are cut.
    """
    case = Case("full", torch.bfloat16, positions=positions)
    case.hidden = case.hidden.detach()[:1].repeat(positions, 1).requires_grad_()
    case.future, case.count = case.future[:1].repeat(positions, 1), torch.full_like(case.count, N)
    case.weight = torch.full_like(case.weight, 1 / positions)
    mine, exact = (gradients(case, loss) for loss in (lambda: case.bounded(1)[0], lambda: case.dense()[0]))
    summed = ("hidden", "table", "maps.full")
    compare({name: mine[name] for name in summed}, {name: exact[name] for name in summed}, 0.02)


def test_the_maps_of_one_factor_at_a_time_where_they_are_larger_than_a_chunk() -> None:
    """Never a second gradient of all maps; nor, in backward, a zero-filled one behind a slice."""
    storages = []
    for chunk_bytes in (N * R * D * D * 4 - 1, 2**20):
        case = Case("full", torch.float32, positions=2)
        maps = case.heads.maps["full"].data_ptr()
        with Watched() as mode:
            case.bounded(chunk_bytes)[0].backward()
        storages.append({tensor.data_ptr() for tensor in mode.made if tensor.numel() == N * R * D * D} - {maps})
    assert len(storages[0]) == 1 and len(storages[1]) > 1, "the sum of the gradients, and nothing else of its size"
