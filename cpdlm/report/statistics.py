"""Intervals over rows, prompts and seeds.

Rows (or prompts) are resampled, the same draw for everything that is compared, since all cells see the same rows. Seeds
are too few to resample (a bootstrap of three values is far too narrow), so that between-seed variation enters as a
Student t draw with seeds - 1 degrees of freedom times the standard error over seeds. Without row variation the interval
is exactly the t interval over seeds; with one seed it covers rows only, and says so by `seeds`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdlm.report.results import Cells, Record

Array = NDArray[np.float64]
RESAMPLES = 4000
Z95 = 1.959964
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

    def exp(self) -> Interval:
        """From logarithms to ratios."""
        return Interval(
            math.exp(self.mean),
            math.exp(self.low),
            math.exp(self.high),
            self.level,
            self.seeds,
            self.spread * math.exp(self.mean),
        )

    def text(self, digits: int = 3, sign: bool = False) -> str:
        plus = "+" if sign else ""
        return f"{self.mean:{plus}.{digits}f} [{self.low:{plus}.{digits}f}, {self.high:{plus}.{digits}f}]"


@dataclass(frozen=True)
class Sample:
    """One cell's measurement: the ratio of two sums over units (rows, prompts), or a mean with a standard error."""

    top_U: Array | None = None
    bottom_U: Array | None = None
    mean: float = 0.0
    sem: float = 0.0

    @classmethod
    def ratio(cls, top: Sequence[float] | Array, bottom: Sequence[float] | Array) -> Sample:
        """sum(top) / sum(bottom) over units that can be resampled together. Raises ValueError on unequal lengths."""
        top_U, bottom_U = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
        if top_U.shape != bottom_U.shape or not len(top_U) or bottom_U.sum() <= 0:
            raise ValueError(f"a ratio of sums needs equally many units, found {top_U.shape} and {bottom_U.shape}")
        return cls(top_U, bottom_U)

    @classmethod
    def log_ratio(cls, median: float, low: float, high: float) -> Sample:
        """The logarithm of a ratio that was recorded with its 95 % interval."""
        return cls(mean=math.log(median), sem=(math.log(high) - math.log(low)) / (2 * Z95))

    @property
    def point(self) -> float:
        if self.top_U is None or self.bottom_U is None:
            return self.mean
        return float(self.top_U.sum() / self.bottom_U.sum())

    @property
    def units(self) -> int:
        return 0 if self.top_U is None else len(self.top_U)

    def scaled(self, by: float) -> Sample:
        if self.top_U is None:
            return Sample(mean=by * self.mean, sem=by * self.sem)
        return Sample(by * self.top_U, self.bottom_U)

    def draws(self, counts_BU: Array | None, generator: np.random.Generator) -> Array:
        """Resampled values (B,): by the given counts of units, or around the mean."""
        if self.top_U is None or self.bottom_U is None or counts_BU is None:
            return self.point + self.sem * generator.standard_normal(RESAMPLES)
        bottom_B = counts_BU @ self.bottom_U
        return np.where(bottom_B > 0, (counts_BU @ self.top_U) / np.where(bottom_B > 0, bottom_B, 1.0), self.point)


@functools.lru_cache(maxsize=8)
def _counts(units: int) -> Array | None:
    """How often each unit is drawn, (B, U): one draw for everything measured on as many units; None for none."""
    if not units:
        return None
    return np.random.default_rng(units).multinomial(units, np.full(units, 1 / units), RESAMPLES).astype(float)


def estimate(samples: Sequence[Sample], level: float = 0.95) -> Interval:
    """Mean over seeds; samples: one per seed, on the same rows or prompts."""
    return _interval([(sample, None) for sample in samples], level)


def contrast(pairs: Sequence[tuple[Sample, Sample]], level: float = 0.95) -> Interval:
    """Mean over seeds of first minus second; pairs: one per seed."""
    return _interval(list(pairs), level)


def _interval(pairs: Sequence[tuple[Sample, Sample | None]], level: float) -> Interval:
    """Raises ValueError where there is nothing to estimate."""
    if not pairs:
        raise ValueError("no seeds to estimate from")
    generator = np.random.default_rng(0)
    points, draws = [], []
    for first, second in pairs:
        points.append(first.point - (second.point if second is not None else 0.0))
        drawn = first.draws(_counts(first.units), generator)
        draws.append(drawn - second.draws(_counts(second.units), generator) if second is not None else drawn)
    seeds = len(pairs)
    mean, values_B = float(np.mean(points)), np.mean(draws, axis=0)
    spread = float(np.std(points, ddof=1)) if seeds > 1 else 0.0
    if seeds > 1:
        values_B = values_B + generator.standard_t(seeds - 1, RESAMPLES) * spread / math.sqrt(seeds)
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, min(mean, float(low)), max(mean, float(high)), level, seeds, spread)


def measured(record: Record, quantity: str, mode: str = "sampling") -> Sample | None:
    """A record's sample of `joint_nll`, `first_token_nll`, `position_nll:K` (nats), `bits_per_byte` (of the target law),
    `joint_bits_per_byte` and `bytes_per_pass` (tokens counted as the bytes they have in the test split), `tokens_per_pass`,
    `accepted:DEPTH` (share of the drafts reached), `kept:DEPTH` (sum min(p, q) on test text), `effective` (components),
    `training:KEY`, or of the logarithm of `speedup`, `speedup_over_rank1`, `speedup_over_trunk` or `plain_over_generate`; None
    where the record does not have it."""
    likelihood, decoded = record["likelihood"], record.mode(mode)
    if quantity in ("joint_nll", "first_token_nll"):
        rows = likelihood.get("per_row")
        if rows:
            return Sample.ratio(rows[quantity], rows["positions"])
        return Sample(mean=likelihood[quantity]["mean"], sem=likelihood[quantity]["sem"])
    if quantity.startswith("position_nll:"):
        index, rows = int(quantity.partition(":")[2]) - 1, likelihood.get("per_row", {})
        if index == 0 and rows:
            return Sample.ratio(rows["first_token_nll"], rows["positions"])
        if "position_nll" in rows:
            return Sample.ratio(rows["position_nll"][index], rows["positions"])
        term = likelihood["position_nll"][index]
        return Sample(mean=term["mean"], sem=term["sem"])
    if quantity == "bits_per_byte":
        rows = likelihood.get("per_row", {})
        if sum(rows.get("bytes", ())):
            return Sample.ratio(np.asarray(rows["target_nll"]) / math.log(2), rows["bytes"])
        return None if likelihood[quantity] is None else Sample(mean=likelihood[quantity])
    if quantity == "joint_bits_per_byte":
        size, joint = _bytes_per_token(record), measured(record, "joint_nll")
        return None if size is None or joint is None else joint.scaled(1 / (record.horizon * math.log(2) * size))
    if quantity == "bytes_per_pass":
        size, rate = _bytes_per_token(record), measured(record, "tokens_per_pass", mode)
        return None if size is None or rate is None else rate.scaled(size)
    if quantity.startswith("kept:"):
        depth = int(quantity.partition(":")[2])
        share = next((each for each in likelihood.get("kept_by_depth", ()) if each["depth"] == depth), None)
        return None if share is None else Sample(mean=share["mean"], sem=share["sem"])
    if quantity == "effective":
        return Sample(mean=likelihood["weights"]["effective"])
    if quantity.startswith("training:"):
        value = record["training"].get(quantity.partition(":")[2])
        return None if value is None else Sample(mean=value)
    if decoded is None:
        return None
    if quantity == "tokens_per_pass":
        return Sample.ratio(decoded["per_prompt"]["tokens"], decoded["per_prompt"]["passes"])
    if quantity.startswith("accepted:"):
        return _accepted(decoded, int(quantity.partition(":")[2]))
    if quantity in RATIOS:
        ratio = decoded.get(quantity)
        return None if ratio is None else Sample.log_ratio(ratio["median"], ratio["low"], ratio["high"])
    raise ValueError(f"unknown quantity {quantity!r}")


def _bytes_per_token(record: Record) -> float | None:
    """Over the test split, what separates documents included; None where the record does not count it."""
    test = record["data"]["splits"].get("test")
    return test["bytes"] / test["tokens"] if test else None


def _accepted(decoded: dict[str, Any], depth: int) -> Sample | None:
    """Prompts are resampled; a record without counts per prompt has the error of independent drafts, each repeat of a
    prompt counted as the same text over again (which greedy repeats are)."""
    counts = next((entry for entry in decoded["acceptance_by_depth"] if entry["depth"] == depth), None)
    if counts is None or not counts["reached"]:
        return None
    by_prompt = decoded.get("drafts_per_prompt")
    if by_prompt:
        return Sample.ratio(by_prompt["accepted"][depth - 2], by_prompt["reached"][depth - 2])
    share = counts["accepted"] / counts["reached"]
    return Sample(mean=share, sem=math.sqrt(share * (1 - share) * decoded["repeats"] / counts["reached"]))


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
