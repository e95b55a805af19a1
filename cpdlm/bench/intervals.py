"""One bootstrap for what is measured on heads of several seeds, in several draws, on several prompts.

The three are crossed: every seed's heads write every draw of every prompt. A resample takes seeds, draws and prompts with
replacement, each by itself, and the same ones for everything that is compared, so that what methods share cancels. Few seeds say
little about their spread: with two the interval is too narrow on that side, so show what each seed gave beside it.

Letters: H seeds of the heads, D draws, P prompts, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdlm.bench.acceptance import RESAMPLES

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Written:
    """What was counted per text. H is 1 for a method that has no heads: it is the same for all of them."""

    tokens_HDP: Array
    forwards_HDP: Array
    seconds_HDP: Array

    @classmethod
    def of(cls, tokens: Sequence[Any], forwards: Sequence[Any], seconds: Sequence[Any]) -> Written:
        """From nested lists [seed][draw][prompt]. Raises ValueError where their shapes differ."""
        arrays = [np.asarray(each, dtype=np.float64) for each in (tokens, forwards, seconds)]
        if len({each.shape for each in arrays}) != 1 or arrays[0].ndim != 3:
            raise ValueError(
                f"tokens, passes and seconds have the shapes {[each.shape for each in arrays]}, not one (H, D, P)"
            )
        return cls(*arrays)


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


def conversion(one: Totals, plain: Totals) -> Array:
    """Share of the tokens per pass that became speed: passes per second over plain decoding's."""
    return (one.forwards / one.seconds) / tokens_per_second(plain)


def more_per_forward(one: Totals, other: Totals) -> Array:
    return tokens_per_forward(one) - tokens_per_forward(other)


def interval(statistic: Callable[..., Array], *written: Written, seed: int = 0) -> dict[str, float]:
    """{"mean", "low", "high"}: of all texts, and the 95 % percentile interval.

    statistic takes one `Totals` per Written. Raises ValueError where they have not the same draws and prompts, or more than
    one number of seeds above 1.
    """
    shapes = {each.tokens_HDP.shape[1:] for each in written}
    seeds = {each.tokens_HDP.shape[0] for each in written} - {1}
    if len(shapes) != 1 or len(seeds) > 1:
        raise ValueError(f"not the same texts: {[each.tokens_HDP.shape for each in written]} (seeds, draws, prompts)")
    ((draws, prompts),) = shapes
    random = np.random.default_rng(seed)
    sizes = (max(seeds, default=1), draws, prompts)
    times_SH, times_SD, times_SP = (random.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in sizes)

    def resampled(counts_HDP: Array) -> Array:
        own_SH = times_SH if counts_HDP.shape[0] == times_SH.shape[1] else np.ones((RESAMPLES, 1))
        return np.asarray(np.einsum("sh,sd,sp,hdp->s", own_SH, times_SD, times_SP, counts_HDP, optimize=True))

    def totals(add: Callable[[Array], Array]) -> list[Totals]:
        return [Totals(add(each.tokens_HDP), add(each.forwards_HDP), add(each.seconds_HDP)) for each in written]

    low, high = np.percentile(statistic(*totals(resampled)), [2.5, 97.5])
    mean = statistic(*totals(lambda counts_HDP: np.asarray(counts_HDP.sum())))
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def by_seed(statistic: Callable[[Totals], Array], written: Written) -> list[float]:
    """The statistic of each seed's heads."""
    counts = (each.sum(axis=(1, 2)) for each in (written.tokens_HDP, written.forwards_HDP, written.seconds_HDP))
    return [float(each) for each in statistic(Totals(*counts))]
