"""The schema of a record: the type of every field that is read here. Other fields are kept as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

SCHEMA = 1
PARTS = ("prefill", "draft", "trunk", "verify", "other")
NUMBER = (int, float)
_MEAN = {"mean": NUMBER, "sem": NUMBER}
_MEDIAN = {"median": NUMBER, "low": NUMBER, "high": NUMBER}


class RecordError(ValueError):
    """A record that cannot be used: names the file, the field and what is there."""


class Maybe:
    """A field that may be null."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Optional(Maybe):
    """A field that may be null or absent."""


_MODE: dict[str, Any] = {
    "temperature": NUMBER,
    "top_k": int,
    "top_p": NUMBER,
    "prompts": int,
    "new_tokens": int,
    "repeats": int,
    "tokens": int,
    "passes": int,
    "tokens_per_pass": {"mean": NUMBER, "low": NUMBER, "high": NUMBER},
    "emitted_histogram": [int],
    "acceptance_by_depth": [{"depth": int, "reached": int, "accepted": int}],
    "per_prompt": {"tokens": [NUMBER], "passes": [NUMBER]},
    "drafts_per_prompt": {"reached": [[int]], "accepted": [[int]]},
    "tokens_per_second": {"plain": NUMBER, "speculative": NUMBER, "generate": Maybe(NUMBER)},
    "speedup": _MEDIAN,
    "speedup_over_rank1": Maybe(_MEDIAN),
    "speedup_over_trunk": Maybe(_MEDIAN),
    "plain_over_generate": Maybe(_MEDIAN),
    "other_than_generate": Maybe({"prompts": int, "of": int, "first_token": Maybe(int)}),
    "conversion": NUMBER,
    "conversion_limit": NUMBER,
    "t1_ms": NUMBER,
    "tn_ms": NUMBER,
    "seconds_by_part": dict.fromkeys(PARTS, NUMBER),
    "repeat_seconds": {"plain": [NUMBER], "speculative": [NUMBER]},
}

FIELDS: dict[str, Any] = {
    "schema": int,
    "name": str,
    "claim": str,
    "profile": str,
    "command": str,
    "config": {
        "rank": int,
        "horizon": int,
        "size": str,
        "corpus": str,
        "seed": int,
        "anchor": str,
        "model": {"trunk": str, "tie_first": bool},
        "optim": {"steps": int},
        "data": {"tokenizer": str, "context": int},
    },
    "commit": str,
    "dirty": bool,
    "seed": int,
    "started": str,
    "hardware": {
        "machine": str,
        "processor": str,
        "cores": int,
        "threads": Maybe(int),
        "memory_gib": Maybe(NUMBER),
        "accelerator": str,
    },
    "versions": {"python": str},
    "data": {
        "corpus": str,
        "sha256": str,
        "tokenizer": str,
        "vocab_size": int,
        "splits": {},
        "trunk_sha256": Optional(str),
    },
    "seconds": {},
    "parameters": {"trunk": int, "heads": int, "gate": int, "anchor": int, "total": int, "trained": int},
    "training": {
        "steps": int,
        "tokens": int,
        "tokens_per_second": NUMBER,
        "step_ms_median": NUMBER,
        "peak_memory_bytes": int,
        "curve": [{"step": NUMBER}],
        "resumed": int,
        "seconds": NUMBER,
        "clock": [NUMBER],
        "flops_per_token": Maybe(NUMBER),
        "matmul_flops_per_second": Maybe(NUMBER),
        "matmul_fraction": Maybe(NUMBER),
    },
    "likelihood": {
        "split": str,
        "rows": int,
        "positions": int,
        "joint_nll": _MEAN,
        "position_nll": [_MEAN],
        "first_token_nll": _MEAN,
        "bits_per_byte": Maybe(NUMBER),
        "per_source": {},
        "kept_by_depth": Optional([{"depth": int, "mean": NUMBER, "sem": NUMBER}]),
        "per_row": {
            "positions": [NUMBER],
            "joint_nll": [NUMBER],
            "first_token_nll": [NUMBER],
            "position_nll": Optional([[NUMBER]]),
            "target_nll": Optional([NUMBER]),
            "bytes": Optional([NUMBER]),
        },
        "shortlist": Optional({"tokens": int, "windows": NUMBER}),
        "weights": {"entropy_mean": NUMBER, "effective": NUMBER, "dead": int, "mean": [NUMBER]},
        "components": Optional(
            {
                "classes": [str],
                "class_share": [[NUMBER]],
                "certainty": NUMBER,
                "top_tokens": [[{"token": str, "share": NUMBER, "lift": NUMBER}]],
                "examples": [{"source": str, "tokens": [str], "component": [int], "share": [NUMBER]}],
            }
        ),
    },
    "decoding": Maybe(
        {
            "group": [str],
            "rank_one": Maybe(str),
            "origin": {"commit": str, "dirty": bool, "hardware": {}},
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
    _check(content, FIELDS, "", where)
    if field := non_finite(content):
        raise RecordError(f"{where}: {field} is not a finite number")
    horizon, terms = content["config"]["horizon"], content["likelihood"]["position_nll"]
    if len(terms) != horizon:
        raise RecordError(f"{where}: likelihood.position_nll has {len(terms)} entries, config.horizon is {horizon}")
    if content["seed"] != content["config"]["seed"]:
        raise RecordError(f"{where}: seed is {content['seed']}, config.seed is {content['config']['seed']}")
    for mode, measured in (content["decoding"] or {"modes": {}})["modes"].items():
        tokens, forwards = (len(measured["per_prompt"][key]) for key in ("tokens", "passes"))
        if [tokens, forwards] != [measured["prompts"]] * 2:
            raise RecordError(
                f"{where}: decoding.modes.{mode}.per_prompt has {tokens} tokens and {forwards} passes for "
                f"{measured['prompts']} prompts"
            )
    return content


def with_nulls(value: Any, kind: Any = None) -> Any:
    """The value with null for every field that may be absent and is."""
    kind = FIELDS if kind is None else kind
    kind = kind.kind if isinstance(kind, Maybe) else kind
    if isinstance(value, dict) and isinstance(kind, dict):
        absent = {key: None for key, inner in kind.items() if isinstance(inner, Optional) and key not in value}
        return {key: with_nulls(inner, kind.get(key, Any)) for key, inner in value.items()} | absent
    return value


def _check(value: Any, kind: Any, field: str, where: str) -> None:
    if isinstance(kind, Maybe):
        if value is None:
            return
        kind = kind.kind
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise RecordError(f"{where}: {field} must be an object, found {_shown(value)}")
        for key, inner in kind.items():
            name = f"{field}.{key}" if field else key
            if key in value:
                _check(value[key], inner, name, where)
            elif not isinstance(inner, Optional):
                there = f"{field or 'the record'} has {', '.join(sorted(value)) or 'nothing'}"
                raise RecordError(f"{where}: {name} is missing; {there}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise RecordError(f"{where}: {field} must be a list, found {_shown(value)}")
        for index, item in enumerate(value):
            _check(item, kind[0], f"{field}[{index}]", where)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
        raise RecordError(f"{where}: {field} must be {names}, found {_shown(value)}")


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
