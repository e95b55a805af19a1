"""One interval for everything that is measured: Student's t around a mean over seeds and over units that they share.

Units are prompts, rows or repeats. A statistic is a function of sums over units. Its pseudo-values (the jackknife of
Tukey, 1958) say what each unit contributes, so that a ratio of sums is treated as a mean. Seeds and units are crossed:
the variance of the mean is that of the seeds, that of the units, and their interaction, each once (the two-way layout
of Searle, Variance Components, 1992, section 4.3). Each part enters the squared half-width with the t quantile of
its own degrees of freedom (Graybill and Wang, 1980). Of one unit the interval is infinite; of one seed it covers the
units alone.

Letters: S seeds, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


def pseudo_values(statistic: Callable[..., Array], *parts_SU: Array) -> tuple[Array, Array]:
    """((S,) the statistic of each seed's sums, (S, U) its pseudo-values). One unit has none: they are infinite."""
    units = parts_SU[0].shape[-1]
    sums_S1 = [part_SU.sum(axis=-1, keepdims=True) for part_SU in parts_SU]
    whole_S1 = np.asarray(statistic(*sums_S1))
    if units == 1:
        return whole_S1[:, 0], np.full_like(parts_SU[0], math.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        without_SU = statistic(*(sum_S1 - part_SU for sum_S1, part_SU in zip(sums_S1, parts_SU, strict=True)))
    return whole_S1[:, 0], whole_S1 + (units - 1) * np.where(np.isfinite(without_SU), whole_S1 - without_SU, 0.0)


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and the two parts of its variance. Of one seed nothing is known of `between`.

    spread: standard deviation of the seeds' values. between: its square, less what their own units' noise adds to it;
    it may come out below 0. within: variance of the mean by its units. freedom_within: infinite where a standard error
    was given.
    """

    mean: float
    seeds: int
    spread: float
    between: float
    freedom: float
    within: float
    freedom_within: float

    @classmethod
    def of(cls, point_S: Array, pseudo_SU: Array) -> Effect:
        seeds, units = pseudo_SU.shape
        mean, mixed = float(np.mean(point_S)), 0.0
        spread = float(np.std(point_S, ddof=1)) if seeds > 1 else 0.0
        if units == 1:
            return cls(mean, seeds, spread, 0.0, seeds - 1, math.inf, 1)
        within = float(np.var(pseudo_SU.mean(axis=0), ddof=1)) / units
        if seeds > 1:
            apart_SU = pseudo_SU - pseudo_SU.mean(axis=0) - pseudo_SU.mean(axis=1, keepdims=True) + pseudo_SU.mean()
            mixed = float((apart_SU**2).sum()) / (seeds - 1) / (units - 1) / units
        return cls(mean, seeds, spread, spread**2 - mixed, seeds - 1, within, units - 1)

    def ends(
        self, level: float = 0.95, between: float | None = None, freedom: float | None = None
    ) -> tuple[float, float]:
        """(low, high). between, freedom: of several settings, where it is common to them."""
        seeds = max(0.0, self.between if between is None else between) / self.seeds
        freedom = self.freedom if freedom is None else freedom
        q = (1 + level) / 2
        half = math.sqrt(_share(seeds, freedom, q) + _share(self.within, self.freedom_within, q))
        return self.mean - half, self.mean + half


def _share(variance: float, freedom: float, q: float) -> float:
    """Of the squared half-width: each part of the variance has Student's t of its own degrees of freedom."""
    return variance * float(special.stdtrit(freedom, q)) ** 2 if variance else 0.0


def named(name: str, point: float, effect: Effect, change: Callable[[float], float] = float) -> dict[str, float]:
    """{name, "low", "high"} at 95 %, the point alone where one unit leaves it without an interval.

    A median may lie outside the interval of a mean, which then reaches to it."""
    low, high = (change(end) if math.isfinite(end) else point for end in effect.ends())
    return {name: point, "low": min(point, low), "high": max(point, high)}


def ratio(top: Array, bottom: Array) -> Array:
    return top / bottom


def log_ratio(top: Array, bottom: Array, *base: Array) -> Array:
    """Less that of `base`, where there is one."""
    return np.asarray(np.log(top / bottom)) - (log_ratio(*base) if base else 0.0)


def of_ratio(*parts_U: Sequence[float] | Array) -> dict[str, float]:
    """{"mean", "low", "high"} of sum(top) / sum(bottom) over units (U,), or seeds and units (S, U), of what is above 0.

    parts_U: top and bottom, and those of what the ratio is held against, where it is."""
    parts = [np.atleast_2d(np.asarray(each_U, dtype=np.float64)) for each_U in parts_U]
    effect = Effect.of(*pseudo_values(log_ratio, *parts))
    return named("mean", math.exp(effect.mean), effect, math.exp)


def of_median(values: Sequence[float]) -> dict[str, float]:
    """{"median", "low", "high"} over repeats (K,) of what is above 0; the interval is that of the geometric mean."""
    logs_1K = np.log(np.asarray([values], dtype=np.float64))
    return named("median", float(np.median(values)), Effect.of(logs_1K.mean(axis=1), logs_1K), math.exp)
