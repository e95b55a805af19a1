"""Intervals of records and of benchmarks, against spreads known beforehand: what is resampled, and what is paired."""

import math
from typing import Any

import numpy as np
import pytest
from made_records import made
from scipy import stats

from experiments.records import Record
from experiments.stats import Interval, Sample, difference, estimate, measured, over_seeds, together


def record(content: dict[str, Any]) -> Record:
    return Record("x.json", content)


def test_bits_per_byte_has_an_interval_over_rows() -> None:
    content = made(1)
    generator = np.random.default_rng(0)
    bytes_U, bits_U = generator.integers(200, 300, 60), generator.normal(2.0, 0.2, 60)
    content["likelihood"]["per_row"] |= {
        "bytes": bytes_U.tolist(),
        "target_nll": (bits_U * bytes_U * math.log(2)).tolist(),
    }
    sample = measured(record(content), "bits_per_byte")
    assert sample is not None and sample.units == 60
    assert sample.point == pytest.approx(float((bits_U * bytes_U).sum() / bytes_U.sum()))
    interval = estimate([sample])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(60), rel=0.3)


@pytest.mark.parametrize("settings", [1, 4])
@pytest.mark.parametrize("seeds", [0.0, 1.0, 3.0])
def test_three_seeds_and_sixteen_prompts_cover_the_truth_as_often_as_they_say(seeds: float, settings: int) -> None:
    """Nominal 95%: 93 to 97% of 1,500 experiments, alone and with the seeds' variance pooled over settings.

    seeds: standard deviation between seeds, in that between prompts, which is also that of a prompt from seed to seed.
    """
    generator, inside = np.random.default_rng(0), 0
    for _ in range(1500):
        found = {}
        for setting in range(settings):
            own_S1, prompts_P = generator.normal(0, seeds, (3, 1)), generator.normal(0, 1, 16)
            rows_SP = own_S1 + prompts_P + generator.normal(0, 1, (3, 16))
            found[setting] = estimate([Sample(float(row_P.mean()), row_P, units=16) for row_P in rows_SP])
        first = together(found)[0]
        inside += first.low < 0 < first.high
    assert 0.93 <= inside / 1500 <= 0.97, inside


def test_a_setting_whose_seeds_spread_more_keeps_its_own_variance() -> None:
    calm = {name: estimate([Sample(value) for value in (0.0, 0.1, 0.2)]) for name in "abc"}
    wild = estimate([Sample(value) for value in (0.0, 10.0, 20.0)])
    found = together(calm | {"wild": wild})
    assert found["wild"] == wild
    assert found["a"] == together(calm)["a"] and found["a"].high < calm["a"].high
    assert together(calm, one_base=True)["a"].high > found["a"].high, "fewer degrees of freedom"


def speed_over(ratio: dict[str, float], prompts: int) -> Sample:
    """Of a record of as many prompts, of which every second needs fewer forwards."""
    passes = [10.0 + index % 2 for index in range(prompts)]
    return Sample.log_ratio(ratio, {"per_prompt": {"tokens": [20.0] * prompts, "passes": passes}})


def test_prompts_that_all_seeds_share_do_not_average_out() -> None:
    one = speed_over({"median": 1.2, "low": 1.1, "high": 1.3}, prompts=1000)
    alone, three = estimate([one]), estimate([one, one, one])
    assert (three.low, three.high) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize("prompts", [4, 8])
def test_an_interval_over_few_prompts_covers_the_truth_as_often_as_it_says(prompts: int) -> None:
    """Of 1,000 experiments each, within three standard errors; unexpanded, 89% at 8 prompts and 80% at 4."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        found = estimate([Sample.ratio(1 + 0.1 * generator.standard_normal(prompts), np.ones(prompts))])
        covered += found.low <= 1 <= found.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_one_prompt_says_nothing_about_others() -> None:
    for sample in (Sample.ratio([3.0], [2.0]), speed_over({"median": 1.5, "low": 1.4, "high": 1.6}, prompts=1)):
        found = estimate([sample])
        assert (found.low, found.high) == (-math.inf, math.inf) and found.exp().low == 0.0
    assert Interval(1.5, -math.inf, math.inf, 0.95, 1).text() == "1.500 [-inf, inf]"


def test_the_interval_of_a_recorded_ratio_is_expanded_as_well() -> None:
    ratio = {"median": 1.2, "low": 1.1, "high": 1.2**2 / 1.1}
    wide, narrow = (estimate([speed_over(ratio, prompts)]) for prompts in (4, 100_000))
    assert narrow.exp().low == pytest.approx(1.1, rel=0.01)
    factor = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert factor == pytest.approx(stats.t.ppf(0.975, 3) / 1.96 * math.sqrt(4 / 3), rel=1e-3)


def test_seeds_alone_give_the_t_interval() -> None:
    """Four exact values 1..4: mean 2.5, standard error 0.6455, t(3) = 3.182."""
    found = estimate([Sample(value) for value in (1.0, 2.0, 3.0, 4.0)])
    assert (found.mean, found.seeds) == (2.5, 4)
    assert (found.high - 2.5, 2.5 - found.low) == pytest.approx((3.182 * 0.6455,) * 2, rel=1e-3)


def test_pairing_removes_what_all_cells_share() -> None:
    """Rows differ by 0.15 nats, the cells by 0.05 on every row: the paired interval is far narrower."""
    one, two = ({0: record(made(rank, 0, noise=0.0))} for rank in (1, 2))
    paired = difference(two, one, "joint_nll")
    alone = over_seeds(one, "joint_nll")
    assert paired is not None and alone is not None
    assert paired.high - paired.low < 0.02 * (alone.high - alone.low)


def test_the_joint_and_the_drafts_can_be_counted_in_bytes() -> None:
    """A vocabulary whose tokens have 3 bytes: the same nats per token are a third of the bits per byte."""
    bytewise, pairs = made(4), made(4)
    pairs["data"]["splits"]["test"] = {"documents": 5, "bytes": 1500, "tokens": 500}
    bits, few = (measured(record(content), "joint_bits_per_byte") for content in (bytewise, pairs))
    joint = measured(record(bytewise), "joint_nll")
    assert bits is not None and few is not None and joint is not None and bits.units == 60
    assert bits.point == pytest.approx(joint.point / (4 * math.log(2)) * 505 / 500)
    assert few.point == pytest.approx(bits.point * 500 / 505 / 3)
    rate, span = (measured(record(pairs), name, "greedy") for name in ("tokens_per_pass", "bytes_per_pass"))
    assert rate is not None and span is not None and span.point == pytest.approx(3 * rate.point)
