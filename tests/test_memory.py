"""Memory of decoding, against tensors of known size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cpdlm.bench.memory import working_memory

CPU = torch.device("cpu")
MB = 250_000  # float32 numbers


class Target(nn.Module):
    """A forward that takes as many MB as it is told, and leaves one."""

    def forward(self, megabytes: int) -> Tensor:
        torch.zeros(megabytes * MB)
        return torch.zeros(MB)


def test_a_long_prompt_does_not_hide_what_drafting_takes() -> None:
    target, before = Target(), torch.zeros(10 * MB)

    def work() -> None:
        kept = [target(20)]
        for _ in range(3):
            torch.zeros(3 * MB)  # a draft
            kept.append(target(5))
        kept.append(before[:MB] + 1)

    found = working_memory(work, target, CPU)
    assert (found.whole, found.later, found.between) == pytest.approx((20e6, 8e6, 3e6), rel=0.01)
    assert found == working_memory(work, target, CPU), "the same every time"
    assert not target._forward_hooks and not target._forward_pre_hooks


def test_what_lies_behind_the_last_pass_counts() -> None:
    target = Target()
    found = working_memory(lambda: (target(2), torch.zeros(7 * MB)), target, CPU)
    assert (found.whole, found.later, found.between) == pytest.approx((8e6, 8e6, 7e6), rel=0.01)


def test_work_without_a_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no forward of the target"):
        working_memory(lambda: torch.zeros(3), Target(), CPU)
