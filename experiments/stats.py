"""Intervals over rows, prompts and seeds.

Rows (or prompts) are resampled by `cpdlm.bench.intervals`, with one draw for all cells and seeds, since all see the
same rows. A percentile interval over few prompts is too narrow. It is expanded by sqrt(n / (n - 1)) and by the t
quantile over the normal one (T. Hesterberg, What Teachers Should Know about the Bootstrap, 2015, section 5.3).

Seeds are too few to resample. Their variation enters as Student's t with seeds - 1 degrees of freedom, times the
standard error over seeds, added exactly to what the resamples say. A recorded interval (of speed-ups: over prompts and
repeats) counts as an error that all seeds share; for the repeats that is on the wide side. Without row variation the
interval is the t interval over seeds. With one seed it covers rows only, and `seeds` says so. Of one row or prompt it
is infinite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from cpdlm.bench.intervals import drawn
from experiments.families import Cells
from experiments.records import Record

Array = NDArray[np.float64]
RESAMPLES = 20_000
RATIOS = ("speedup", "speedup_over_rank1", "speedup_over_trunk", "plain_over_generate")


@dataclass(frozen=True)
class Interval:
    """An estimate, its interval at `level`, the spread (standard deviation) over seeds and how many seeds there are."""

    mean: float
    low: float
    high: float
    level: float
    seeds: int
    spread: float = 0.0

    @classmethod
    def certain(cls, value: float, level: float = 0.95) -> Interval:
        """What others are held against."""
        return cls(value, value, value, level, 1)

    def of(self, change: Callable[[float], float]) -> Interval:
        """Changed in its mean and ends."""
        return replace(self, mean=change(self.mean), low=change(self.low), high=change(self.high))

    def exp(self) -> Interval:
        """From logarithms to ratios."""
        return replace(self.of(math.exp), spread=self.spread * math.exp(self.mean))

    def text(self, digits: int = 3, sign: bool = False) -> str:
        plus = "+" if sign else ""
        return f"{self.mean:{plus}.{digits}f} [{self.low:{plus}.{digits}f}, {self.high:{plus}.{digits}f}]"


@dataclass(frozen=True, eq=False)
class Sample:
    """One cell's measurement: the ratio of two sums over units (rows, prompts), or a mean with a standard error.

    of: how many units a bootstrapped standard error came from; 0 where they are too many to matter. Samples are equal
    where all their numbers are: tables and figures ask for the same intervals, which are computed once."""

    top_U: Array | None = None
    bottom_U: Array | None = None
    mean: float = 0.0
    sem: float = 0.0
    of: int = 0

    @functools.cached_property
    def key(self) -> tuple[bytes, ...]:
        numbers = np.asarray([self.mean, self.sem, self.of])
        return tuple(b"" if each is None else each.tobytes() for each in (self.top_U, self.bottom_U, numbers))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self.key == other.key

    @classmethod
    def ratio(cls, top: Sequence[float] | Array, bottom: Sequence[float] | Array) -> Sample:
        """sum(top) / sum(bottom) over units that can be resampled together. Raises ValueError on unequal lengths."""
        top_U, bottom_U = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
        if top_U.shape != bottom_U.shape or not len(top_U) or bottom_U.sum() <= 0:
            raise ValueError(f"a ratio of sums needs equally many units, found {top_U.shape} and {bottom_U.shape}")
        return cls(top_U, bottom_U, of=len(top_U))

    @classmethod
    def log_ratio(cls, ratio: dict[str, float], prompts: int) -> Sample:
        """The logarithm of a ratio that was recorded with its 95 % bootstrap interval over so many prompts."""
        spread = math.log(ratio["high"] / ratio["low"])
        return cls(mean=math.log(ratio["median"]), sem=spread / (2 * _normal(0.95)), of=prompts)

    @property
    def point(self) -> float:
        if self.top_U is None or self.bottom_U is None:
            return self.mean
        return float(self.top_U.sum() / self.bottom_U.sum())

    @property
    def units(self) -> int:
        return 0 if self.top_U is None else len(self.top_U)

    def scaled(self, by: float) -> Sample:
        top_U = None if self.top_U is None else by * self.top_U
        return Sample(top_U, self.bottom_U, by * self.mean, by * self.sem, self.of)

    def errors(self, side: int) -> Array:
        """(S,) resampled values less `point`: by counts of units, or normal. side: 0 or 1, of two that are compared."""
        return self.sem * _normals(side) if self.top_U is None else _resampled(self)


@functools.lru_cache(maxsize=128)
def _resampled(sample: Sample) -> Array:
    """(S,) a ratio of sums, drawn by counts of units, less `point`."""
    assert sample.top_U is not None and sample.bottom_U is not None
    counts_SU = _counts(sample.units)
    bottom_S = counts_SU @ sample.bottom_U
    drawn_S = (counts_SU @ sample.top_U) / np.where(bottom_S > 0, bottom_S, 1.0)
    return np.where(bottom_S > 0, drawn_S, sample.point) - sample.point


@functools.lru_cache(maxsize=8)
def _counts(units: int) -> Array:
    """How often each unit is drawn, (S, U): one draw for everything measured on as many units."""
    return drawn(units, np.random.default_rng(units), RESAMPLES)


@functools.lru_cache(maxsize=2)
def _normals(side: int) -> Array:
    return np.random.default_rng(side).standard_normal(RESAMPLES)


def _normal(level: float) -> float:
    """The normal quantile of a two-sided interval."""
    return float(special.ndtri((1 + level) / 2))


def _expansion(units: int, level: float) -> float:
    """By how much a percentile interval over so many units is too narrow."""
    if not units:
        return 1.0
    return float(special.stdtrit(units - 1, (1 + level) / 2)) / _normal(level) * math.sqrt(units / (units - 1))


def estimate(samples: Sequence[Sample], level: float = 0.95) -> Interval:
    """Mean over seeds; samples: one per seed, on the same rows or prompts."""
    return _interval(tuple((sample, None) for sample in samples), level)


def contrast(pairs: Sequence[tuple[Sample, Sample]], level: float = 0.95) -> Interval:
    """Mean over seeds of first minus second; pairs: one per seed."""
    return _interval(tuple(pairs), level)


@functools.lru_cache(maxsize=8192)
def _interval(pairs: tuple[tuple[Sample, Sample | None], ...], level: float) -> Interval:
    """Raises ValueError where there is nothing to estimate."""
    if not pairs:
        raise ValueError("no seeds to estimate from")
    points, errors = [], []
    for first, second in pairs:
        points.append(first.point - (second.point if second is not None else 0.0))
        errors.append(first.errors(0) - second.errors(1) if second is not None else first.errors(0))
    seeds = len(pairs)
    units = min((sample.of for pair in pairs for sample in pair if sample is not None and sample.of), default=0)
    mean = float(np.mean(points))
    spread = float(np.std(points, ddof=1)) if seeds > 1 else 0.0
    if units == 1:
        return Interval(mean, -math.inf, math.inf, level, seeds, spread)
    values_S = mean + _expansion(units, level) * np.mean(errors, axis=0)
    low, high = (
        _quantile(values_S, spread / math.sqrt(seeds), seeds - 1, q) for q in ((1 - level) / 2, (1 + level) / 2)
    )
    return Interval(mean, min(mean, low), max(mean, high), level, seeds, spread)


def _quantile(values_S: Array, scale: float, freedom: int, q: float) -> float:
    """Of one of the values, each as likely, plus `scale` times Student's t with `freedom` degrees of freedom."""
    if not scale:
        return float(np.quantile(values_S, q))
    tail = scale * float(special.stdtrit(freedom, q))
    low, high = float(values_S.min()) + tail, float(values_S.max()) + tail
    if high - low < 1e-12 * max(abs(low), abs(high), scale):
        return low
    return float(
        optimize.brentq(lambda x: np.mean(_student(freedom, (x - values_S) / scale)) - q, low, high, xtol=1e-6 * scale)
    )


def _student(freedom: int, t_S: Array) -> Array:
    """Student's distribution function, by its closed forms (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine_S = 1 / (1 + t_S * t_S / freedom)  # of the angle atan(t / sqrt(freedom)), squared
    odd = freedom % 2
    term_S = t_S / math.sqrt(freedom) * (cosine_S if odd else np.sqrt(cosine_S))
    sum_S = np.zeros_like(t_S) if freedom == 1 else term_S.copy()
    for power in range(2 + odd, freedom - 1, 2):
        term_S = term_S * cosine_S * ((power - 1) / power)
        sum_S += term_S
    if odd:
        sum_S = (np.arctan(t_S / math.sqrt(freedom)) + sum_S) * (2 / math.pi)
    return (1 + sum_S) / 2


def measured(record: Record, quantity: str, mode: str = "sampling") -> Sample | None:
    """A record's sample of a quantity; None where the record does not have it.

    In nats: `joint_nll`, `first_token_nll`, `position_nll:K`. `bits_per_byte` is the target's. `joint_bits_per_byte`
    and `bytes_per_pass` count a token as the bytes it has in the test split. `tokens_per_pass`: tokens per forward.
    `accepted:DEPTH`: share of the drafts reached. `kept:DEPTH`: sum min(p, q) on test text. `effective`: components.
    `training:KEY`. The `RATIOS` are logarithms.
    """
    likelihood, decoded = record["likelihood"], record.mode(mode)
    rows, (name, _, which) = likelihood["per_row"], quantity.partition(":")
    if quantity == "position_nll:1":
        name = "first_token_nll"
    if name in ("joint_nll", "first_token_nll"):
        return Sample.ratio(rows[name], rows["positions"])
    if name == "position_nll":
        if rows[name]:
            return Sample.ratio(rows[name][int(which) - 1], rows["positions"])
        term = likelihood[name][int(which) - 1]
        return Sample(mean=term["mean"], sem=term["sem"])
    if name == "bits_per_byte":
        if rows["target_nll"] and sum(rows["bytes"] or ()):
            return Sample.ratio(np.asarray(rows["target_nll"]) / math.log(2), rows["bytes"])
        return None if likelihood[name] is None else Sample(mean=likelihood[name])
    if name == "joint_bits_per_byte":
        size, joint = _bytes_per_token(record), measured(record, "joint_nll")
        return None if size is None or joint is None else joint.scaled(1 / (record.horizon * math.log(2) * size))
    if name == "bytes_per_pass":
        size, rate = _bytes_per_token(record), measured(record, "tokens_per_pass", mode)
        return None if size is None or rate is None else rate.scaled(size)
    if name == "kept":
        share = next((each for each in likelihood["kept_by_depth"] or () if each["depth"] == int(which)), None)
        return None if share is None else Sample(mean=share["mean"], sem=share["sem"])
    if name == "effective":
        return Sample(mean=likelihood["weights"]["effective"])
    if name == "training":
        value = record["training"].get(which)
        return None if value is None else Sample(mean=value)
    if decoded is None:
        return None
    if name == "tokens_per_pass":
        return Sample.ratio(decoded["per_prompt"]["tokens"], decoded["per_prompt"]["passes"])
    if name == "accepted":
        return _accepted(decoded, int(which))
    assert name in RATIOS, f"unknown quantity {quantity!r}"
    return None if decoded[name] is None else Sample.log_ratio(decoded[name], decoded["prompts"])


def _bytes_per_token(record: Record) -> float | None:
    """Over the test split, what separates documents included; None where the record does not count it."""
    test = record["data"]["splits"].get("test")
    return test["bytes"] / test["tokens"] if test else None


def _accepted(decoded: dict[str, Any], depth: int) -> Sample | None:
    """Share of the drafts reached at a depth that were accepted; prompts are resampled."""
    counts = next((entry for entry in decoded["acceptance_by_depth"] if entry["depth"] == depth), None)
    if counts is None or not counts["reached"]:
        return None
    by_prompt = decoded["drafts_per_prompt"]
    return Sample.ratio(by_prompt["accepted"][depth - 2], by_prompt["reached"][depth - 2])


def over_seeds(cells: Cells, quantity: str, mode: str = "sampling", level: float = 0.95) -> Interval | None:
    """The estimate of one cell over its seeds (ratios for speed-ups); None where no record has it."""
    samples = [
        sample for _, record in sorted(cells.items()) if (sample := measured(record, quantity, mode)) is not None
    ]
    if not samples:
        return None
    found = estimate(samples, level)
    return found.exp() if quantity in RATIOS else found


def shared_seeds(cells: Cells, other: Cells) -> list[int]:
    """The seeds at which two cells may be paired: both have them, and not on two sets of weights of a common trunk."""
    return [
        seed
        for seed in sorted(set(cells) & set(other))
        if len({record.trunk_sha256 for record in (cells[seed], other[seed])} - {""}) < 2
    ]


def difference(
    cells: Cells, other: Cells, quantity: str, mode: str = "sampling", level: float = 0.95
) -> Interval | None:
    """First minus second, paired over `shared_seeds` and over rows or prompts; None where no seed has both."""
    pairs = []
    for seed in shared_seeds(cells, other):
        first, second = measured(cells[seed], quantity, mode), measured(other[seed], quantity, mode)
        if first is not None and second is not None:
            pairs.append((first, second))
    return contrast(pairs, level) if pairs else None
