"""The loss benchmark: all sides compute one loss, and a side that cannot run is recorded, not fatal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench import loss, loss_sides

TOY = ["--quick", "--cpu"]


def row_nll(rows_MD: Tensor, table_VD: Tensor, tokens_M: Tensor) -> Tensor:
    """What the packages of others compute."""
    return F.cross_entropy(rows_MD @ table_VD.T, tokens_M, reduction="none")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_fused_cross_entropy_per_row_gives_the_joint_loss(at_once: bool) -> None:
    found = loss_sides.errors(
        lambda case, positions: loss_sides.fused(case, positions, row_nll, at_once), torch.float64, torch.device("cpu")
    )
    assert len(found) == 6 and max(found.values()) < 1e-12, found


@pytest.mark.parametrize("side", ["bounded", "dense"])
def test_our_sides_against_float64(side: str) -> None:
    found = loss_sides.errors(loss_sides.make(side, 1), torch.float32, torch.device("cpu"))
    assert max(found.values()) < 1e-5, found
    found = loss_sides.errors(loss_sides.make(side, 1), torch.bfloat16, torch.device("cpu"))
    assert 1e-5 < max(found.values()) < 0.05, found


def test_a_side_that_fails_is_recorded_beside_those_that_do_not() -> None:
    options = loss.parse([*TOY, "--large"])
    found = loss.in_fresh_process(["bounded", "liger"], options)
    assert set(found["bounded"]) >= {"seconds", "peak_bytes", "loss", "errors", "products"}
    assert found["liger"].keys() == {"failed"} and "liger" in found["liger"]["failed"]
    options.seconds = 0.01
    assert "not done" in loss.in_fresh_process(["dense"], options)["dense"]["failed"]


def test_growth_measures_every_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"seconds": 1.0, "peak_bytes": 1}
    monkeypatch.setattr(loss, "in_fresh_process", lambda sides, options, **changes: {"bounded": cell})
    record = loss.growth(loss.parse([*TOY, "--growth"]))
    for name in loss_sides.DIMENSIONS:
        assert len({found[name] for found in record["cells"]}) >= 2, name
