"""Intervals of what records hold: estimates over seeds, and differences paired over seeds and rows or prompts.

`cpdlm.bench.intervals` makes the interval of every table: seeds and rows (or prompts) are crossed, each counts once.
With few seeds their variance is hardly known, so that comparisons of one claim share it: `together`. Where rows are
missing (older likelihoods by position) a recorded standard error counts as one that all seeds share. A recorded ratio
(of speeds) has a standard error over prompts; it is laid on them as the tokens per forward vary, since the time of a
forward hardly does. With one seed the interval covers rows or prompts only, and `seeds` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from scipy import special

from cpdlm.bench.intervals import Array, Effect, pseudo_values, ratio
from experiments.families import Cells
from experiments.records import Record

LEVEL = 0.95
RATIOS = ("speedup", "speedup_over_rank1", "speedup_over_trunk")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """An estimate, its interval at `level`, the spread (standard deviation) over seeds and how many seeds there are.

    effect: what it was made of, in logarithms where `is_ratio`."""

    mean: float
    low: float
    high: float
    level: float
    seeds: int
    spread: float = 0.0
    effect: Effect | None = field(default=None, compare=False, repr=False)
    is_ratio: bool = field(default=False, compare=False, repr=False)

    @classmethod
    def certain(cls, value: float) -> Interval:
        """What others are held against."""
        return cls(value, value, value, LEVEL, 1)

    def of(self, change: Callable[[float], float]) -> Interval:
        """Changed in its mean and ends."""
        return replace(self, mean=change(self.mean), low=change(self.low), high=change(self.high))

    def exp(self) -> Interval:
        """From logarithms to ratios."""
        return replace(self.of(math.exp), spread=self.spread * math.exp(self.mean), is_ratio=True)

    def text(self, digits: int = 3, sign: bool = False) -> str:
        plus = "+" if sign else ""
        return f"{self.mean:{plus}.{digits}f} [{self.low:{plus}.{digits}f}, {self.high:{plus}.{digits}f}]"


@dataclass(frozen=True, eq=False)
class Sample:
    """One cell's measurement. parts_U: pseudo-values of its units (rows, prompts), where they are recorded; else `sem`,
    the standard error, of `units` (0 where they are too many to matter)."""

    point: float
    parts_U: Array | None = None
    sem: float = 0.0
    units: int = 0

    @classmethod
    def ratio(cls, top: Sequence[float] | Array, bottom: Sequence[float] | Array) -> Sample:
        """sum(top) / sum(bottom) over units. Raises ValueError on unequal lengths."""
        top_U, bottom_U = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
        if top_U.shape != bottom_U.shape or not len(top_U) or bottom_U.sum() <= 0:
            raise ValueError(f"a ratio of sums needs equally many units, found {top_U.shape} and {bottom_U.shape}")
        point_1, parts_1U = pseudo_values(ratio, top_U[None], bottom_U[None])
        return cls(float(point_1[0]), parts_1U[0], units=len(top_U))

    @classmethod
    def log_ratio(cls, recorded: dict[str, float], mode: dict[str, Any]) -> Sample:
        """The logarithm of a ratio of a record's mode. Older records have a percentile interval and no "sem"."""
        rate = cls.ratio(mode["per_prompt"]["tokens"], mode["per_prompt"]["passes"])
        units, sem = rate.units, recorded.get("sem")
        if sem is None:
            half = math.log(recorded["high"] / recorded["low"]) / 2
            sem = half / float(special.ndtri(0.975)) * math.sqrt(units / max(units - 1, 1))
        point = math.log(recorded["median"])
        assert rate.parts_U is not None
        own = float(np.std(rate.parts_U, ddof=1)) / math.sqrt(units) if units > 1 else math.inf
        if not own:
            return cls(point, sem=sem, units=units)
        return cls(point, point + (rate.parts_U - rate.parts_U.mean()) * (sem / own) if units > 1 else rate.parts_U)

    def scaled(self, by: float) -> Sample:
        parts_U = None if self.parts_U is None else by * self.parts_U
        return Sample(by * self.point, parts_U, by * self.sem, self.units)

    def minus(self, other: Sample) -> Sample:
        """On the same units."""
        point, units = self.point - other.point, max(self.units, other.units)
        if self.parts_U is not None and other.parts_U is not None:
            return Sample(point, self.parts_U - other.parts_U, units=units)
        return Sample(point, sem=math.hypot(self.sem, other.sem), units=units)


def estimate(samples: Sequence[Sample]) -> Interval:
    """Mean over seeds; samples: one per seed, on the same rows or prompts. Raises ValueError where there are none."""
    if not samples:
        raise ValueError("no seeds to estimate from")
    point_S = np.asarray([sample.point for sample in samples])
    parts = [sample.parts_U for sample in samples if sample.parts_U is not None]
    if len(parts) == len(samples):
        effect = Effect.of(point_S, np.stack(parts))
    else:
        spread = float(np.std(point_S, ddof=1)) if len(point_S) > 1 else 0.0
        units = min((sample.units for sample in samples if sample.units), default=0)
        within = math.inf if units == 1 else float(np.mean([sample.sem**2 for sample in samples]))
        freedom = units - 1 if units else math.inf
        effect = Effect(float(point_S.mean()), len(point_S), spread, spread**2, len(point_S) - 1, within, freedom)
    return _made(effect, LEVEL)


def contrast(pairs: Sequence[tuple[Sample, Sample]]) -> Interval:
    """Mean over seeds of first minus second; pairs: one per seed."""
    return estimate([first.minus(second) for first, second in pairs])


def _made(effect: Effect, level: float, *common: float) -> Interval:
    return Interval(effect.mean, *effect.ends(level, *common), level, effect.seeds, effect.spread, effect)


def together(found: Mapping[Key, Interval], level: float = LEVEL, one_base: bool = False) -> dict[Key, Interval]:
    """The same estimates at `level`, their seeds' variance pooled where it is common.

    One whose variance is too large for that (Cochran's C test at 5%) keeps its own, and so do those of one seed.
    one_base: all are held against the same cells, and so vary together (correlation 1/2): fewer degrees of freedom.
    """
    effects = {key: each.effect for key, each in found.items() if each.effect is not None}
    pool = [effect for effect in effects.values() if effect.seeds > 1]
    while _has_outlier(pool):
        pool.remove(max(pool, key=lambda effect: effect.spread))
    freedom = sum(effect.freedom for effect in pool)
    between = sum(effect.between * effect.freedom for effect in pool) / max(freedom, 1)
    if one_base:
        freedom /= 1 + (len(pool) - 1) / 4
    pooled = {}
    for key, effect in effects.items():
        made = _made(effect, level, *((between, freedom) if effect in pool else ()))
        pooled[key] = made.exp() if found[key].is_ratio else made
    return pooled


def _has_outlier(pool: Sequence[Effect]) -> bool:
    """W. G. Cochran, 1941: whether the largest of several variances is too large a share of their sum."""
    total = sum(effect.spread**2 for effect in pool)
    if len(pool) < 2 or not total:
        return False
    others, freedom = len(pool) - 1, min(effect.freedom for effect in pool)
    limit = 1 / (1 + others / float(special.fdtri(freedom, others * freedom, 1 - 0.05 / len(pool))))
    return max(effect.spread for effect in pool) ** 2 / total > limit


def measured(record: Record, quantity: str, mode: str = "sampling") -> Sample | None:
    """A record's sample of a quantity; None where the record does not have it.

    In nats: `joint_nll`, `first_token_nll`, `position_nll:K`. `bits_per_byte` is the target's. `joint_bits_per_byte`
    and `bytes_per_pass` count a token as the bytes it has in the test split. `tokens_per_pass`: tokens per forward.
    `kept:DEPTH`: sum min(p, q) on test text. `effective`: components.
    `training:KEY`. The `RATIOS` are logarithms.
    """
    likelihood, decoded = record["likelihood"], record.mode(mode)
    rows, (name, _, which) = likelihood["per_row"], quantity.partition(":")
    if quantity == "position_nll:1":
        name = "first_token_nll"
    if name in ("joint_nll", "first_token_nll"):
        return Sample.ratio(rows[name], rows["positions"])
    if name == "position_nll":
        return Sample.ratio(rows[name][int(which) - 1], rows["positions"])
    if name == "bits_per_byte":
        if not sum(rows["bytes"]):
            return None
        return Sample.ratio(np.asarray(rows["target_nll"]) / math.log(2), rows["bytes"])
    if name == "joint_bits_per_byte":
        joint, scale = measured(record, "joint_nll"), record.horizon * math.log(2) * _bytes_per_token(record)
        return joint and joint.scaled(1 / scale)
    if name == "bytes_per_pass":
        rate = measured(record, "tokens_per_pass", mode)
        return rate and rate.scaled(_bytes_per_token(record))
    if name == "kept":
        share = next((each for each in likelihood["kept_by_depth"] if each["depth"] == int(which)), None)
        return None if share is None else Sample(share["mean"], sem=share["sem"])
    if name == "effective":
        return Sample(likelihood["weights"]["effective"])
    if name == "training":
        value = record["training"].get(which)
        return None if value is None else Sample(value)
    if decoded is None:
        return None
    if name == "tokens_per_pass":
        return Sample.ratio(decoded["per_prompt"]["tokens"], decoded["per_prompt"]["passes"])
    assert name in RATIOS, f"unknown quantity {quantity!r}"
    return None if decoded[name] is None else Sample.log_ratio(decoded[name], decoded)


def _bytes_per_token(record: Record) -> float:
    """Over the test split, what separates documents included."""
    test = record["data"]["splits"]["test"]
    return float(test["bytes"] / test["tokens"])


def over_seeds(cells: Cells, quantity: str, mode: str = "sampling") -> Interval | None:
    """The estimate of one cell over its seeds (ratios for speed-ups); None where no record has it."""
    samples = [
        sample for _, record in sorted(cells.items()) if (sample := measured(record, quantity, mode)) is not None
    ]
    if not samples:
        return None
    found = estimate(samples)
    return found.exp() if quantity in RATIOS else found


def shared_seeds(cells: Cells, other: Cells) -> list[int]:
    """The seeds at which two cells may be paired: both have them, and not on two sets of weights of a common trunk."""
    return [
        seed
        for seed in sorted(set(cells) & set(other))
        if len({record.trunk_sha256 for record in (cells[seed], other[seed])} - {""}) < 2
    ]


def difference(cells: Cells, other: Cells, quantity: str, mode: str = "sampling") -> Interval | None:
    """First minus second, of RATIOS first over second, paired over `shared_seeds` and over rows or prompts; None where
    no seed has both."""
    pairs = []
    for seed in shared_seeds(cells, other):
        first, second = measured(cells[seed], quantity, mode), measured(other[seed], quantity, mode)
        if first is not None and second is not None:
            pairs.append((first, second))
    if not pairs:
        return None
    found = contrast(pairs)
    return found.exp() if quantity in RATIOS else found


def over_rank_one(
    cells: Mapping[int, Cells], quantity: str, mode: str = "sampling", level: float = LEVEL
) -> dict[int, Interval]:
    """The difference of every rank above 1 that shares a seed with rank 1, `together`. cells: by rank."""
    found = {rank: difference(by_seed, cells.get(1, {}), quantity, mode) for rank, by_seed in cells.items() if rank > 1}
    return together({rank: gap for rank, gap in found.items() if gap is not None}, level, one_base=True)
