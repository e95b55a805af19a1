"""Filters against the oracle and against `transformers`; draws by their exact boundaries."""

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cpdlm.decoding.filtering import LEAST_TEMPERATURE, Sampling, draw, filtered
from tests import oracle

SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 0, 1.0),
    (1.0, 2, 1.0),
    (1.0, 0, 0.6),
    (0.8, 3, 0.7),
    (1.0, 99, 1.0),
    (1.0, 1, 0.1),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_filtered_is_the_oracles_distribution(setting: tuple[float, int, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = (2 * torch.randn(50, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    distribution = filtered(log_probs, Sampling(*setting))
    expected = [oracle.filter_law(row, *setting) for row in log_probs.exp().tolist()]
    torch.testing.assert_close(distribution, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_filtered_is_what_transformers_does(setting: tuple[float, int, float]) -> None:
    temperature, top_k, top_p = setting
    scores = 3 * torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    expected = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    distribution = filtered(scores.log_softmax(-1), Sampling(*setting))
    assert ((distribution > 0) == (expected > -math.inf)).all()
    torch.testing.assert_close(distribution, expected.softmax(-1))


def test_a_tiny_temperature_is_the_argmax_and_half_precision_is_widened() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.4]]).log()
    assert filtered(log_probs, Sampling(LEAST_TEMPERATURE)).tolist() == [[0.0, 1.0, 0.0]]
    assert filtered(log_probs.bfloat16(), Sampling(0.9)).dtype == torch.float32


def test_draw_has_exact_boundaries_and_never_takes_an_impossible_token() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64) * 3
    below = math.nextafter(0.25, 0)
    uniforms = torch.tensor([0.0, below, 0.25, math.nextafter(0.75, 0), 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs.expand(6, 6), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_reaches_tokens_too_rare_for_a_sum_in_float32() -> None:
    probs = torch.cat([torch.ones(1), torch.full((2**16,), 2.0**-26)])[None]
    assert draw(probs, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2**16


@pytest.mark.parametrize("row", [[math.nan, 1.0, 1.0], [0.0, 0.0, 0.0], [math.nan] * 3, [math.inf, 0.0, 0.0]])
def test_draw_marks_what_is_no_distribution(row: list[float]) -> None:
    assert draw(torch.tensor([row]), torch.tensor([0.5], dtype=torch.float64)).item() == 3


@pytest.mark.parametrize("setting", [Sampling(), Sampling(0.7), Sampling(1.0, 2), Sampling(1.0, 0, 0.5)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_row_stays_broken(setting: Sampling, value: float) -> None:
    distribution = filtered(torch.full((1, 4), value), setting)
    assert draw(distribution, torch.tensor([0.5], dtype=torch.float64)).item() == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1 must be a whole number of at least 0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": math.inf}, "top_k=inf"),
        ({"temperature": "1"}, "temperature='1' must be a finite number"),
        ({"top_p": None}, "top_p=None"),
    ],
)
def test_wrong_settings_say_what_to_type(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]
