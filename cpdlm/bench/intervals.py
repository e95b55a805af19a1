"""One bootstrap for everything that is measured: units are drawn with replacement, and percentiles are taken.

Axes that are crossed (seeds of the heads, draws, repeats, prompts) are each resampled by themselves. Whatever is
compared gets the same draws, so that what it shares cancels. Few units on an axis say little about its spread: with two
the interval is too narrow on that side.

Letters: H seeds of the heads, D draws, K repeats, P prompts, U units, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Array = NDArray[np.float64]


def drawn(units: int, random: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """(S, U) how often each unit is in each resample."""
    return random.multinomial(units, np.full(units, 1 / units), resamples).astype(np.float64)


def summed(values: Array, times: Sequence[Array]) -> Array:
    """(S,) the sum of each resample. values: one axis per entry of `times`, (S, U) each."""
    axes = "abc"[: values.ndim]
    parts = ",".join([*(f"s{axis}" for axis in axes), axes])
    return np.asarray(np.einsum(f"{parts}->s", *times, values, optimize=True))


def bounds(values_S: Array) -> dict[str, float]:
    """{"low", "high"}: the 95 % percentile interval."""
    low, high = np.percentile(values_S, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def of_ratio(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> dict[str, float]:
    """{"mean", "low", "high"} of sum(top) / sum(bottom) over units (U,) that are resampled together."""
    top_U, bottom_U = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    times = [drawn(len(top_U), np.random.default_rng(seed))]
    return {"mean": float(top_U.sum() / bottom_U.sum())} | bounds(summed(top_U, times) / summed(bottom_U, times))


def of_median(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """{"median", "low", "high"} of the median over repeats (K,)."""
    values_K = np.asarray(values, dtype=np.float64)
    times_SK = drawn(len(values_K), np.random.default_rng(seed))
    return {"median": float(np.median(values_K))} | bounds(medians(values_K, times_SK))


def medians(values_K: Array, times_SK: Array) -> Array:
    """(S,) the median of each resample."""
    order, half = values_K.argsort(), len(values_K) / 2
    reached_SK = times_SK[:, order].cumsum(axis=1)
    # The two middle values of each resample; of an odd number they are one.
    middle = [values_K[order][(reached_SK >= rank).argmax(axis=1)] for rank in (np.ceil(half), np.floor(half) + 1)]
    return np.asarray((middle[0] + middle[1]) / 2)


@dataclass(frozen=True)
class Written:
    """What was counted per text. H is 1 for a method without heads, which is the same for all seeds."""

    tokens_HDP: Array
    forwards_HDP: Array
    seconds_HDP: Array

    @classmethod
    def of(cls, tokens: Sequence[Any], forwards: Sequence[Any], seconds: Sequence[Any]) -> Written:
        """From nested lists [seed][draw][prompt]. Raises ValueError where their shapes differ."""
        arrays = [np.asarray(each, dtype=np.float64) for each in (tokens, forwards, seconds)]
        if len({each.shape for each in arrays}) != 1 or arrays[0].ndim != 3:
            shapes = [each.shape for each in arrays]
            raise ValueError(f"tokens, forwards and seconds have the shapes {shapes}, not one (H, D, P)")
        return cls(*arrays)

    def totals(self, add: Callable[[Array], Array]) -> Totals:
        return Totals(add(self.tokens_HDP), add(self.forwards_HDP), add(self.seconds_HDP))


@dataclass(frozen=True)
class Totals:
    """Sums over the texts of each resample, or over all texts."""

    tokens: Array
    forwards: Array
    seconds: Array


def tokens_per_forward(one: Totals) -> Array:
    return one.tokens / one.forwards


def tokens_per_second(one: Totals) -> Array:
    return one.tokens / one.seconds


def speedup(one: Totals, other: Totals) -> Array:
    return tokens_per_second(one) / tokens_per_second(other)


def speedup_per_token_per_forward(one: Totals, autoregressive: Totals) -> Array:
    """Share of the tokens per forward that became speed: forwards per second over those of autoregressive decoding."""
    return (one.forwards / one.seconds) / tokens_per_second(autoregressive)


def more_per_forward(one: Totals, other: Totals) -> Array:
    return tokens_per_forward(one) - tokens_per_forward(other)


def interval(statistic: Callable[..., Array], *written: Written, seed: int = 0) -> dict[str, float]:
    """{"mean", "low", "high"}: of all texts, and the 95 % interval over seeds, draws and prompts.

    statistic takes one `Totals` per Written. Raises ValueError where their draws and prompts differ, or where there is
    more than one number of seeds above 1.
    """
    shapes = {each.tokens_HDP.shape[1:] for each in written}
    seeds = {each.tokens_HDP.shape[0] for each in written} - {1}
    if len(shapes) != 1 or len(seeds) > 1:
        raise ValueError(f"not the same texts: {[each.tokens_HDP.shape for each in written]} (seeds, draws, prompts)")
    ((draws, prompts),) = shapes
    random = np.random.default_rng(seed)
    times_SH, *others = (drawn(size, random) for size in (max(seeds, default=1), draws, prompts))

    def resampled(counts_HDP: Array) -> Array:
        own_SH = times_SH if counts_HDP.shape[0] == times_SH.shape[1] else np.ones((RESAMPLES, 1))
        return summed(counts_HDP, [own_SH, *others])

    mean = statistic(*(each.totals(lambda counts_HDP: np.asarray(counts_HDP.sum())) for each in written))
    return {"mean": float(mean)} | bounds(statistic(*(each.totals(resampled) for each in written)))


def by_seed(statistic: Callable[[Totals], Array], written: Written) -> list[float]:
    """The statistic of each seed's heads."""
    return [float(each) for each in statistic(written.totals(lambda counts_HDP: counts_HDP.sum(axis=(1, 2))))]
