"""Intervals over seeds, draws and prompts, against spreads known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from cpdlm.bench.intervals import (
    Written,
    by_seed,
    interval,
    more_per_forward,
    speedup,
    speedup_per_token_per_forward,
    tokens_per_forward,
)


def written(rate_HDP: np.ndarray, seconds: float = 1.0) -> Written:
    """100 tokens per text, at these tokens per pass."""
    tokens = np.full(rate_HDP.shape, 100.0)
    return Written.of(tokens, tokens / rate_HDP, np.full(rate_HDP.shape, seconds))


def test_texts_that_are_all_the_same_leave_no_doubt() -> None:
    found = interval(tokens_per_forward, written(np.full((2, 3, 4), 2.0)))
    assert found == {"mean": pytest.approx(2), "low": pytest.approx(2), "high": pytest.approx(2)}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_of_seeds_draws_and_prompts_widens_the_interval(axis: int) -> None:
    spread = np.array([1.8, 1.9, 2.1, 2.2])
    shape = [3, 3, 3]
    shape[axis] = 4
    rate_HDP = np.ones(shape) * spread.reshape([4 if index == axis else 1 for index in range(3)])
    found = interval(tokens_per_forward, written(rate_HDP))
    assert 1.8 < found["low"] < 1.93 < found["mean"] < 2.07 < found["high"] < 2.2
    assert found == interval(tokens_per_forward, written(rate_HDP)), "the same every time"


def test_differences_are_paired() -> None:
    rate_HDP = np.random.default_rng(0).uniform(1, 3, (2, 2, 12))
    one, other = written(rate_HDP * 1.1), written(rate_HDP)
    found = interval(more_per_forward, one, other)
    alone = interval(tokens_per_forward, one)
    assert 0 < found["low"] < found["mean"] < found["high"] < alone["high"] - alone["low"]


def test_autoregressive_decoding_has_no_seeds() -> None:
    one, plain = written(np.full((2, 2, 3), 2.0), seconds=4.0), written(np.ones((1, 2, 3)), seconds=6.0)
    assert interval(speedup, one, plain)["mean"] == pytest.approx(1.5)
    assert interval(speedup_per_token_per_forward, one, plain) == {
        key: pytest.approx(0.75) for key in ("mean", "low", "high")
    }
    assert by_seed(tokens_per_forward, one) == [pytest.approx(2.0)] * 2
