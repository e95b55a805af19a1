"""What a cell will cost before it runs: seconds and memory, from a model fitted to the records so far.

    step = a + b F_trunk + c F_heads             seconds of one optimiser step; F in FLOPs, at 2 per multiply-add
    train = k steps step                         k: wall-clock over time in steps (validation, checkpoints)
    evaluate = a + b rows F_row
    decode = units (a + b F_forward + c F_draft + d / cells of the group)
    units: tokens written, over modes and repeats
    memory = a + b weights

Least squares of relative errors, no coefficient below zero; `CostModel.text` shows each fit's error. FLOPs are those of
`cpdlm.training.flops`. Records of a GPU are fitted apart; until there are some, the rates of `ASSUMED` stand in, and
the text says so. Heads on a pretrained model cost what the nearest records on that model took; without one there is no
number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize

from cpdlm.config import Config, from_dict
from cpdlm.training.flops import Shape, draft_flops, loss_flops, trunk_flops, trunk_forwards, trunk_matrices
from experiments.records import Record
from experiments.suite import Cell, decode_groups

# Seconds that a process takes before its first step: imports, tokens, model, evaluation's start.
START_SECONDS = 12.0
# A GPU of the H100 class on models this small, in cautious round numbers, and a slow core, until records replace them.
ASSUMED = {
    "gpu": {
        "step": (0.01, 1 / 165e12, 1 / 100e12),  # attention counts all pairs, of which a causal kernel computes half
        "evaluate": (2.0, 1 / 50e12),
        "decode": (0.006, 1e-14, 1e-14, 0.012),
        "memory": (4e9, 20.0),
    },
    "cpu": {
        "step": (0.05, 1 / 50e9, 1 / 50e9),
        "evaluate": (1.0, 1 / 50e9),
        "decode": (2e-3, 1 / 5e9, 1 / 5e9, 4e-3),
        "memory": (7e8, 16.0),
    },
}


# --- what a config computes ------------------------------------------------------------------------------------------


def _shape(config: Config) -> Shape:
    kind, _, size = config.data.tokenizer.partition(":")
    return Shape.of(config, int(size) if kind == "bpe" else 257 if kind == "bytes" else 50_000)


def written_tokens(config: Config) -> int:
    """Tokens that one contender of a decoding group writes, over both modes and all repeats."""
    decode = config.decode
    return 2 * (decode.repeats + decode.warmups) * decode.prompts * decode.new_tokens


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """observed = coefficients . features. error: median relative error of the records it was fitted to; nan: none."""

    coefficients: tuple[float, ...]
    error: float = float("nan")
    records: int = 0

    def __call__(self, features: Sequence[float]) -> float:
        return float(np.dot(self.coefficients, features))


def fit(features: Sequence[Sequence[float]], observed: Sequence[float]) -> Fit:
    """Least squares of relative errors, no coefficient below zero."""
    seen = np.asarray(observed, dtype=float)
    scaled = np.asarray(features, dtype=float) / seen[:, None]
    size = np.linalg.norm(scaled, axis=0)  # FLOPs beside seconds: columns of one length
    coefficients = optimize.nnls(scaled / size, np.ones(len(seen)))[0] / size
    return Fit(tuple(coefficients), float(np.median(np.abs(scaled @ coefficients - 1))), len(seen))


@dataclass(frozen=True)
class Estimate:
    """Of one cell: seconds per stage, on as many threads as the records had; bytes while it trains. nan: not known."""

    train: float
    decode: float
    memory: float


@dataclass(frozen=True)
class CostModel:
    """fits: of step, evaluate, decode and memory. overhead: k above. device: what the records ran on.

    pretrained: the records on pretrained models.
    """

    fits: dict[str, Fit]
    overhead: float
    device: str
    pretrained: tuple[tuple[Record, Config], ...] = ()

    @classmethod
    def of(cls, records: Iterable[Record], scale: str = "cpu") -> CostModel:
        """From the records of that kind of device; those on pretrained models have other shapes and are not fitted."""
        every = [
            (record, from_dict(record.config))
            for record in records
            if (record["hardware"]["accelerator"] != "none") == (scale == "gpu")
        ]
        pretrained = tuple((record, config) for record, config in every if config.is_pretrained)
        usable = [(record, config) for record, config in every if config.model.family in ("llama", "gpt2")]
        if len(usable) < 8:
            return cls({name: Fit(values) for name, values in ASSUMED[scale].items()}, 1.2, scale, pretrained)
        decoded = [(record, config) for record, config in usable if record["decoding"] is not None]
        seen = {
            "step": ([_step(c) for _, c in usable], [r["training"]["step_ms_median"] / 1000 for r, _ in usable]),
            "evaluate": ([_evaluate(c) for _, c in usable], [max(0.1, r["seconds"]["evaluate"]) for r, _ in usable]),
            "decode": (
                [_decode(c, len(r["decoding"]["group"])) for r, c in decoded],
                [r["seconds"]["decode"] / written_tokens(c) for r, c in decoded],
            ),
            "memory": ([_memory(c) for _, c in usable], [r["training"]["peak_memory_bytes"] for r, _ in usable]),
        }
        spent = [record["seconds"]["train"] / record.step_seconds for record, _ in usable]
        names = {r["hardware"]["processor"] for r, _ in usable}
        fits = {name: fit(*values) for name, values in seen.items() if values[1]}
        return cls(fits, statistics.median(spent), ", ".join(sorted(names)), pretrained)

    def estimate(self, config: Config, group: int = 1) -> Estimate:
        """group: how many cells are decoded beside it, itself among them."""
        if config.is_pretrained:
            return self._as_the_nearest(config)
        train = self.overhead * config.optim.steps * self.fits["step"](_step(config))
        decode = written_tokens(config) * self.fits["decode"](_decode(config, group)) if config.horizon > 1 else 0.0
        total = START_SECONDS + train + self.fits["evaluate"](_evaluate(config))
        return Estimate(total, decode, self.fits["memory"](_memory(config)))

    def _as_the_nearest(self, config: Config) -> Estimate:
        """Medians over the nearest records on the same model; nan without one."""

        def distance(other: Config) -> tuple[bool, bool, float]:
            return (
                other.model.dtype != config.model.dtype,
                other.loss.joint_fraction != config.loss.joint_fraction,
                abs(math.log2(other.rank / config.rank)),
            )

        name = Path(config.model.trunk).name
        alike = [(record, other) for record, other in self.pretrained if record.size == name]
        nearest = min((distance(other) for _, other in alike), default=None)
        alike = [(record, other) for record, other in alike if distance(other) == nearest]
        decoded = [(record, other) for record, other in alike if record["decoding"] is not None]
        if not decoded:
            return Estimate(math.nan, math.nan, math.nan)
        steps = [record["seconds"]["train"] / record["training"]["steps"] for record, _ in alike]
        tokens = [record["seconds"]["decode"] / written_tokens(other) for record, other in decoded]
        evaluated = [record["seconds"]["evaluate"] for record, _ in alike]
        train = START_SECONDS + config.optim.steps * statistics.median(steps) + statistics.median(evaluated)
        memory = statistics.median(record["training"]["peak_memory_bytes"] for record, _ in alike)
        return Estimate(train, written_tokens(config) * statistics.median(tokens), memory)

    def text(self) -> str:
        """One line: what it rests on and how far off it is."""
        if not next(iter(self.fits.values())).records:
            text = f"cost model: no records of a {self.device} yet; assumed rates"
            return f"as the nearest of {len(self.pretrained)} records took" if self.pretrained else text
        errors = ", ".join(f"{name} {100 * each.error:.0f}%" for name, each in self.fits.items())
        count = self.fits["step"].records
        text = f"cost model: {count} records ({self.device}); median error of the fit: {errors}"
        if self.pretrained:
            text += f". Heads on a pretrained model: what the nearest of {len(self.pretrained)} records took"
        return text


def _step(config: Config) -> tuple[float, ...]:
    tokens = config.data.context * config.data.batch_rows
    trunk = trunk_forwards(config) * trunk_flops(config)
    return 1.0, tokens * trunk, tokens * sum(loss_flops(_shape(config), config).values())


def _evaluate(config: Config) -> tuple[float, ...]:
    return 1.0, config.evaluate.rows * config.data.context * (trunk_flops(config) + _head_flops(config))


def _decode(config: Config, group: int) -> tuple[float, ...]:
    # Cells with targets of their own are compared with autoregressive decoding of their own.
    shared = group if config.target == "common" else 1
    return 1.0, trunk_flops(config), _head_flops(config), 1 / shared


def _memory(config: Config) -> tuple[float, ...]:
    shape = _shape(config)
    return 1.0, trunk_matrices(config) + shape.vocab * shape.width + shape.head_weights


def _head_flops(config: Config) -> float:
    """FLOPs of one position's draft distribution, or of its next token where there are no heads."""
    shape = _shape(config)
    return draft_flops(shape) if shape.factors else 2.0 * shape.width * shape.vocab


# --- a whole sweep ---------------------------------------------------------------------------------------------------


def estimates(model: CostModel, cells: list[Cell]) -> dict[str, Estimate]:
    """By name of the cell, decoded in the groups that these cells make."""
    sizes = {cell.name: len(group.cells) for group in decode_groups(cells, "runs") for cell in group.cells}
    return {cell.name: model.estimate(cell.config("runs"), sizes.get(cell.name, 1)) for cell in cells}


def wall_seconds(cells: list[Cell], costs: dict[str, Estimate], jobs: int, decoded: list[Cell] | None = None) -> float:
    """Wall-clock of training `cells`, `jobs` at once as the scheduler orders them, then of what runs alone.

    Alone run the timed cells and all decoding, that of `decoded` (default: the same cells). Unknown costs count as 0.
    """
    train = {name: float(np.nan_to_num(each.train)) for name, each in costs.items()}
    alone = sum(train[cell.name] for cell in cells if cell.alone)
    alone += sum(float(np.nan_to_num(costs[cell.name].decode)) for cell in (cells if decoded is None else decoded))
    free, waiting, ends = [0.0] * jobs, [cell for cell in cells if not cell.alone], dict[str, float]()
    names = {cell.name for cell in waiting}
    while waiting:
        slot = int(np.argmin(free))
        needs = [each.trunk.name if each.trunk is not None and each.trunk.name in names else "" for each in waiting]
        began = [max(free[slot], ends.get(name, math.inf) if name else 0.0) for name in needs]
        first = int(np.argmin(began))
        cell = waiting.pop(first)
        ends[cell.name] = free[slot] = began[first] + train[cell.name]
    return max(free) + alone
