"""Counted FLOPs against hand counts, and a rate that a matrix product really reaches."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpdlm.training.flop_count import FlopCount, matmul_rate


def test_forward_and_backward_are_counted() -> None:
    left, right = torch.rand(5, 7, requires_grad=True), torch.rand(7, 3, requires_grad=True)
    with FlopCount() as count:
        (left @ right).sum().backward()
    assert count.total == 3 * 2 * 5 * 7 * 3  # the product, and one for each operand's gradient


def test_attention_is_counted_on_the_cpu() -> None:
    query, key, value = (torch.rand(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    products = 2 * 2 * 4 * 16 * 16 * 8  # one of them
    with FlopCount() as count:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert count.total >= 6 * products


def test_a_product_summed_in_another_type_is_counted() -> None:
    """As the joint loss does on a GPU; shapes alone suffice."""
    left, right = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((5, 7), (7, 3)))
    total = torch.empty(5, 3, device="meta")
    with FlopCount() as count:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    assert count.total == 2 * 5 * 7 * 3


def test_the_rate_is_that_of_a_matrix_product_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rate = matmul_rate(torch.device("cpu"), "32-true", seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < rate < 1e15
