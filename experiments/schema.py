"""The schema of a record: type and range of every field that is read here. Other fields are kept as they are.

A range says what can be, not what is likely: a number beyond it would stop a table or a figure, or make it absurd.
"""

import datetime
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpdlm.config import CHOICES, flat, leaves, out_of_range

SCHEMA = 1
PARTS = ("prefill", "draft", "trunk", "verify", "other")
NUMBER = (int, float)


@dataclass(frozen=True)
class Within:
    """A number from least to most. kind: int or NUMBER."""

    kind: Any
    least: float
    most: float


@dataclass(frozen=True)
class Each:
    """An object whose every value is of this kind, whatever its key."""

    kind: Any


COUNT, POSITIVE = Within(int, 0, 2**53), Within(int, 1, 2**53)
FEW = Within(int, 1, 10_000)  # ranks, horizons, depths
REAL = Within(NUMBER, -1e6, 1e6)
NATS = Within(NUMBER, -1e9, 1e9)  # sums over a row
AMOUNT = Within(NUMBER, 0, 1e12)
ABOVE = Within(NUMBER, 1e-9, 1e12)  # what is divided by, or whose logarithm is taken
SHARE = Within(NUMBER, 0, 1 + 1e-6)
FLOPS = Within(NUMBER, 1, 1e24)
_MEAN = {"mean": Within(NUMBER, 0, 1e6), "sem": Within(NUMBER, 0, 1e6)}


class RecordError(ValueError):
    """A record that cannot be used: names the file, the field and what is there."""


class Maybe:
    """A field that may be null."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Optional(Maybe):
    """A field that may be null or absent."""


_MEDIAN = {"median": ABOVE, "low": ABOVE, "high": ABOVE, "sem": Optional(AMOUNT)}
_MODE: dict[str, Any] = {
    "temperature": AMOUNT,
    "top_k": COUNT,
    "top_p": SHARE,
    "prompts": POSITIVE,
    "new_tokens": POSITIVE,
    "repeats": POSITIVE,
    "tokens": POSITIVE,
    "passes": POSITIVE,
    "tokens_per_pass": {"mean": ABOVE, "low": ABOVE, "high": ABOVE},
    "acceptance_by_depth": [{"depth": FEW, "reached": COUNT, "accepted": COUNT}],
    "per_prompt": {"tokens": [ABOVE], "passes": [ABOVE]},
    "drafts_per_prompt": {"reached": [[COUNT]], "accepted": [[COUNT]]},
    "tokens_per_second": {"plain": ABOVE, "speculative": ABOVE, "generate": Maybe(ABOVE)},
    "speedup": _MEDIAN,
    "speedup_over_rank1": Maybe(_MEDIAN),
    "speedup_over_trunk": Maybe(_MEDIAN),
    "plain_over_generate": Maybe(_MEDIAN),
    "other_than_generate": Maybe({"prompts": COUNT, "of": COUNT, "first_token": Maybe(COUNT)}),
    "conversion": ABOVE,
    "conversion_limit": ABOVE,
    "t1_ms": ABOVE,
    "tn_ms": ABOVE,
    "seconds_by_part": dict.fromkeys(PARTS, AMOUNT),
}

HARDWARE = {
    "machine": str,
    "processor": str,
    "cores": POSITIVE,
    "threads": Maybe(COUNT),
    "memory_gib": Maybe(AMOUNT),
    "accelerator": str,
}

FIELDS: dict[str, Any] = {
    "schema": int,
    "name": str,
    "claim": str,
    "profile": str,
    "command": str,
    "config": {
        "rank": FEW,
        "horizon": FEW,
        "size": str,
        "corpus": str,
        "seed": COUNT,
        "model": {"trunk": str, "tie_first": bool},
        "optim": {"steps": POSITIVE},
        "data": {"tokenizer": str, "context": POSITIVE},
    },
    "commit": str,
    "dirty": bool,
    "seed": COUNT,
    "started": str,
    "hardware": HARDWARE,
    "load": Optional(AMOUNT),
    "versions": Each(str),
    "data": {
        "corpus": str,
        "sha256": str,
        "tokenizer": str,
        "vocab_size": Within(int, 2, 2**31),
        "splits": {"test": {"bytes": COUNT, "tokens": POSITIVE}},
        "trunk_sha256": Optional(str),
    },
    "seconds": Each(AMOUNT),
    "parameters": {
        "trunk": POSITIVE,
        "heads": COUNT,
        "gate": COUNT,
        "anchor": COUNT,
        "total": POSITIVE,
        "trained": COUNT,
    },
    "training": {
        "steps": POSITIVE,
        "tokens": POSITIVE,
        "tokens_per_second": ABOVE,
        "step_ms_median": ABOVE,
        "peak_memory_bytes": COUNT,
        "curve": [Each(REAL)],
        "seconds": ABOVE,
        "clock": [AMOUNT],
        "flops_per_token": Maybe(FLOPS),
        "matmul_flops_per_second": Maybe(FLOPS),
        "matmul_fraction": Maybe(ABOVE),
    },
    "likelihood": {
        "split": str,
        "rows": POSITIVE,
        "positions": POSITIVE,
        "joint_nll": _MEAN,
        "position_nll": [_MEAN],
        "first_token_nll": _MEAN,
        "bits_per_byte": Maybe(AMOUNT),
        "kept_by_depth": [{"depth": FEW, "mean": SHARE, "sem": AMOUNT}],
        "per_row": {
            "positions": [POSITIVE],
            "joint_nll": [NATS],
            "first_token_nll": [NATS],
            "position_nll": [[NATS]],
            "target_nll": [NATS],
            "bytes": [AMOUNT],
        },
        "shortlist": Optional({"tokens": COUNT, "windows": SHARE}),
        "weights": {
            "effective": AMOUNT,
            "dead": COUNT,
            "mean": [SHARE],
        },
    },
    "decoding": Maybe(
        {
            "group": [str],
            "rank_one": Maybe(str),
            "origin": {"commit": str, "dirty": bool, "hardware": HARDWARE, "load": Optional(AMOUNT)},
            "modes": {"greedy": _MODE, "sampling": _MODE},
        }
    ),
}


def validate(content: Any, where: str = "record") -> dict[str, Any]:
    """The content itself, once it fits the schema; raises RecordError naming `where`, the field and what is there."""
    if not isinstance(content, dict):
        raise RecordError(f"{where}: expected a JSON object, found {_shown(content)}")
    if content.get("schema") != SCHEMA:
        schema = _shown(content.get("schema"))
        raise RecordError(f"{where}: schema is {schema}, this version reads {SCHEMA}; run the cell again")
    check_kind(content, FIELDS, "", where)
    if field := non_finite(content):
        raise RecordError(f"{where}: {field} is not a finite number")
    check_settings(content["config"], where)
    for said in _disagreements(content):
        raise RecordError(f"{where}: {said}")
    return content


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """RecordError for a setting of a wrong type or beyond its range; names that are no settings are left alone."""
    kinds, known = {"int": int, "float": NUMBER, "str": str, "bool": bool}, leaves()
    for group in {key.partition(".")[0] for key in known if "." in key} & config.keys():
        check_kind(config[group], {}, f"config.{group}", where)
    for key, value in flat(config).items():
        if key in known:
            check_kind(value, kinds[known[key].type], f"config.{key}", where)
            for said in out_of_range(key, value):
                raise RecordError(f"{where}: config.{said}")
        if key in CHOICES and value not in CHOICES[key]:
            raise RecordError(f"{where}: config.{key} is {_shown(value)}, none of {', '.join(CHOICES[key])}")


def _disagreements(content: dict[str, Any]) -> Iterator[str]:
    """Fields that do not fit one another, in words."""
    config, likelihood, training = content["config"], content["likelihood"], content["training"]
    horizon, per_row, steps = config["horizon"], likelihood["per_row"], training["curve"]
    if content["seed"] != config["seed"]:
        yield f"seed is {content['seed']}, config.seed is {config['seed']}"
    try:
        then = datetime.datetime.fromisoformat(content["started"])
    except ValueError:
        then = datetime.datetime.min
    if not 2000 <= then.year < 2200:
        yield f"started is {_shown(content['started'])}, which is no time"
    if any("step" not in entry for entry in steps):
        yield "training.curve has an entry without a step"
    yield from _lengths("likelihood", {"position_nll": likelihood["position_nll"]}, horizon, "config.horizon")
    yield from _lengths("training", {"clock": training["clock"]}, len(steps), "the length of training.curve")
    for key, values in per_row.items():
        by_position = key == "position_nll"
        if by_position:
            yield from _lengths("likelihood.per_row", {key: values}, horizon, "config.horizon")
        for each in values if by_position else [values]:
            yield from _lengths("likelihood.per_row", {key: each}, likelihood["rows"], "likelihood.rows")
    positions = sum(per_row["positions"])
    for key in ("joint_nll", "first_token_nll"):
        yield from _sums(f"likelihood.per_row.{key}", per_row[key], likelihood[key]["mean"] * positions)
    for mode, measured in (content["decoding"] or {"modes": {}})["modes"].items():
        at, drafts = f"decoding.modes.{mode}", measured["drafts_per_prompt"]
        yield from _lengths(f"{at}.per_prompt", measured["per_prompt"], measured["prompts"], "prompts")
        for key in ("tokens", "passes"):
            yield from _sums(f"{at}.per_prompt.{key}", measured["per_prompt"][key], measured[key])
        depths = len(measured["acceptance_by_depth"])
        yield from _lengths(f"{at}.drafts_per_prompt", drafts, depths, "acceptance_by_depth")
        for each in (*drafts["reached"], *drafts["accepted"]):
            yield from _lengths(f"{at}.drafts_per_prompt", {"[]": each}, measured["prompts"], "prompts")


def _sums(field: str, parts: Sequence[float], total: float) -> Iterator[str]:
    """total: what is read in one place, where the parts are read in another."""
    if not math.isclose(sum(parts), total, rel_tol=1e-4, abs_tol=1e-4):
        yield f"{field} sums to {sum(parts):g}, which is not {total:g}"


def _lengths(field: str, lists: Mapping[str, Any], length: int, of: str) -> Iterator[str]:
    for key, values in lists.items():
        if isinstance(values, list) and len(values) != length:
            yield f"{field}.{key} has {len(values)} entries, {of} is {length}"


def with_nulls(value: Any, kind: Any = None) -> Any:
    """The value with null for every field that may be absent and is."""
    kind = FIELDS if kind is None else kind
    kind = kind.kind if isinstance(kind, Maybe) else kind
    if isinstance(value, dict) and isinstance(kind, dict):
        absent = {key: None for key, inner in kind.items() if isinstance(inner, Optional) and key not in value}
        return {key: with_nulls(inner, kind.get(key, Any)) for key, inner in value.items()} | absent
    return value


def check_kind(value: Any, kind: Any, field: str, where: str = "benchmark") -> None:
    """RecordError where a value is not of this kind."""
    if isinstance(kind, Maybe):
        if value is None:
            return
        kind = kind.kind
    if isinstance(kind, Within):
        check_kind(value, kind.kind, field, where)
        if not kind.least <= value <= kind.most:
            raise RecordError(f"{where}: {field} is {_shown(value)}; it lies from {kind.least:g} to {kind.most:g}")
    elif isinstance(kind, Each):
        check_kind(value, {}, field, where)
        for key, item in value.items():
            check_kind(item, kind.kind, f"{field}.{key}", where)
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            raise RecordError(f"{where}: {field} must be an object, found {_shown(value)}")
        for key, inner in kind.items():
            name = f"{field}.{key}" if field else key
            if key in value:
                check_kind(value[key], inner, name, where)
            elif not isinstance(inner, Optional):
                there = f"{field or 'the record'} has {', '.join(sorted(value)) or 'nothing'}"
                raise RecordError(f"{where}: {name} is missing; {there}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise RecordError(f"{where}: {field} must be a list, found {_shown(value)}")
        for index, item in enumerate(value):
            check_kind(item, kind[0], f"{field}[{index}]", where)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
        raise RecordError(f"{where}: {field} must be {names}, found {_shown(value)}")
    elif isinstance(value, str) and "\x00" in value:  # no command, path or store takes it
        raise RecordError(f"{where}: {field} has a zero byte: {_shown(value)}")


def non_finite(value: Any, field: str = "") -> str:
    """The first field, by its dotted name, that holds a NaN or an infinity; "" where there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else field
    inside: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        inside = ((f"{field}.{key}" if field else str(key), inner) for key, inner in value.items())
    elif isinstance(value, list):
        inside = ((f"{field}[{index}]", inner) for index, inner in enumerate(value))
    return next((found for name, inner in inside if (found := non_finite(inner, name))), "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
