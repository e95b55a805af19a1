"""The record of a cell: its schema, where it comes from, and how it is stored and read back.

One JSON file per cell, results/FOLDER/NAME.json; results/README.md describes the fields. A record is written whole or
not at all, and one that is damaged is named instead of taking the report down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.config import FAMILIES, SIZES, Config, from_dict, to_dict, upgrade
from cpdlm.files import write_json
from cpdlm.training.flops import Shape, draft_flops
from experiments.provenance import provenance

SCHEMA = 1
MODES = ("greedy", "sampling")
LAWS = ("untied", "tied", "anchored", "blind")
PARTS = ("prefill", "draft", "trunk", "verify", "other")


class RecordError(ValueError):
    """A record that cannot be used: names the file, the field and what is there."""


class NotACell(RecordError):
    """A benchmark's record, which lies beside those of the cells and is no part of the claims."""


@dataclass(frozen=True)
class Record:
    """A validated record and the path it is cited by (relative to the root it was loaded from)."""

    path: str
    content: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.content["config"]
        return config

    @property
    def rank(self) -> int:
        return int(self.config["rank"])

    @property
    def horizon(self) -> int:
        return int(self.config["horizon"])

    @property
    def seed(self) -> int:
        return int(self.content["seed"])

    @property
    def target(self) -> str:
        return "common" if self.config["model"]["trunk"] else "own"

    @property
    def trunk_sha256(self) -> str:
        """Of the weights of the common target; "" for an own target, and where an older record does not say."""
        return str(self.content["data"].get("trunk_sha256", ""))

    @property
    def is_pretrained(self) -> bool:
        """Heads on a model of others."""
        return bool(self.config["model"].get("family", "llama") == "pretrained")

    @property
    def size(self) -> str:
        """The trunk, by its size or its name."""
        return Path(self.config["model"]["trunk"]).name if self.is_pretrained else str(self.config["size"])

    @property
    def variant(self) -> str:
        return variant_of(self.config)

    def draft_flops(self) -> int | None:
        """Floating-point operations of one draft of all tokens: gate, anchor, maps and unembedding, at 2 per multiply-add.

        None for a size that is not one of ours, or without drafts.
        """
        family = self.config["model"].get("family", "llama")
        if self.config["size"] not in SIZES or family not in FAMILIES or self.is_pretrained or self.horizon == 1:
            return None
        parts = self.content["parameters"]
        shape = Shape.of(from_dict(self.config), self.content["data"]["vocab_size"])
        return draft_flops(shape, parts["heads"] + parts["gate"] + parts["anchor"])

    def trained_bytes(self) -> int:
        """Of what was trained, as it is stored: heads on a pretrained model in that model's precision, others in float32."""
        narrow = self.config["model"].get("dtype", "float32") == "bfloat16"
        return int(self.content["parameters"]["trained"]) * (2 if narrow else 4)

    def mode(self, name: str) -> dict[str, Any] | None:
        """The `greedy` or `sampling` part, None where this cell was not decoded so."""
        decoding = self.content["decoding"]
        found: dict[str, Any] | None = decoding["modes"].get(name) if decoding else None
        return found


# --- schema ----------------------------------------------------------------------------------------------------------

NUMBER = (int, float)
_MEAN = {"mean": NUMBER, "sem": NUMBER}
_MEDIAN = {"median": NUMBER, "low": NUMBER, "high": NUMBER}


class Maybe:
    """A field that may be null."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Omissible:
    """A field that may be left out."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


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
    "drafts_per_prompt": Omissible({"reached": [[int]], "accepted": [[int]]}),
    "tokens_per_second": {"plain": NUMBER, "speculative": NUMBER, "generate": Maybe(NUMBER)},
    "speedup": _MEDIAN,
    "speedup_over_rank1": Maybe(_MEDIAN),
    "speedup_over_trunk": Omissible(Maybe(_MEDIAN)),
    "plain_over_generate": Maybe(_MEDIAN),
    "other_than_generate": Omissible(Maybe({"prompts": int, "of": int, "first_token": Maybe(int)})),
    "conversion": NUMBER,
    "conversion_limit": NUMBER,
    "t1_ms": NUMBER,
    "tn_ms": NUMBER,
    "seconds_by_part": dict.fromkeys(PARTS, NUMBER),
    "repeat_seconds": {"plain": [NUMBER], "speculative": [NUMBER]},
}

# Type of every field that is read here; other fields are kept as they are.
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
    "data": {"corpus": str, "sha256": str, "tokenizer": str, "vocab_size": int, "splits": {}},
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
        "seconds": Omissible(NUMBER),
        "clock": Omissible([NUMBER]),
        "flops_per_token": Omissible(Maybe(NUMBER)),
        "matmul_flops_per_second": Omissible(Maybe(NUMBER)),
        "matmul_fraction": Omissible(Maybe(NUMBER)),
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
        "kept_by_depth": Omissible([{"depth": int, "mean": NUMBER, "sem": NUMBER}]),
        "per_row": Omissible(
            {
                "positions": [NUMBER],
                "joint_nll": [NUMBER],
                "first_token_nll": [NUMBER],
                "position_nll": Omissible([[NUMBER]]),
                "target_nll": Omissible([NUMBER]),
                "bytes": Omissible([NUMBER]),
            }
        ),
        "shortlist": Omissible({"tokens": int, "windows": NUMBER}),
        "weights": {"entropy_mean": NUMBER, "effective": NUMBER, "dead": int, "mean": [NUMBER]},
        "components": Omissible(
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
            "rank_one": Omissible(Maybe(str)),
            "origin": Omissible({"commit": str, "dirty": bool, "hardware": {}}),
            "modes": {"greedy": Omissible(_MODE), "sampling": Omissible(_MODE)},
        }
    ),
}


def validate(content: Any, where: str = "record") -> dict[str, Any]:
    """The content itself, once it fits the schema; raises RecordError naming `where`, the field and what is there."""
    if not isinstance(content, dict):
        raise RecordError(f"{where}: expected a JSON object, found {_shown(content)}")
    if content.get("schema") != SCHEMA:
        raise RecordError(
            f"{where}: schema is {_shown(content.get('schema'))}, this version reads {SCHEMA}; make it again"
        )
    _check(content, FIELDS, "", where)
    _finite(content, "", where)
    horizon, terms = content["config"]["horizon"], content["likelihood"]["position_nll"]
    if len(terms) != horizon:
        raise RecordError(f"{where}: likelihood.position_nll has {len(terms)} entries, config.horizon is {horizon}")
    if content["seed"] != content["config"]["seed"]:
        raise RecordError(f"{where}: seed is {content['seed']}, config.seed is {content['config']['seed']}")
    for mode, measured in (content["decoding"] or {"modes": {}})["modes"].items():
        lengths = [len(measured["per_prompt"][key]) for key in ("tokens", "passes")]
        if lengths != [measured["prompts"]] * 2:
            raise RecordError(
                f"{where}: decoding.modes.{mode}.per_prompt has {lengths[0]} tokens and {lengths[1]} passes for "
                f"{measured['prompts']} prompts"
            )
    return content


def _check(value: Any, kind: Any, field: str, where: str) -> None:
    if isinstance(kind, Omissible):
        kind = kind.kind
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
            elif not isinstance(inner, Omissible):
                raise RecordError(
                    f"{where}: {name} is missing; {field or 'the record'} has {', '.join(sorted(value)) or 'nothing'}"
                )
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise RecordError(f"{where}: {field} must be a list, found {_shown(value)}")
        for index, item in enumerate(value):
            _check(item, kind[0], f"{field}[{index}]", where)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
        raise RecordError(f"{where}: {field} must be {names}, found {_shown(value)}")


def _finite(value: Any, field: str, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: {field} is {value}, which is not a finite number")
    if isinstance(value, dict):
        for key, inner in value.items():
            _finite(inner, f"{field}.{key}" if field else str(key), where)
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _finite(inner, f"{field}[{index}]", where)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- building --------------------------------------------------------------------------------------------------------


def build(
    config: Config,
    *,
    claim: str,
    profile: str,
    command: str,
    data: dict[str, Any],
    seconds: dict[str, float],
    parameters: dict[str, int],
    training: dict[str, Any],
    likelihood: dict[str, Any],
    decoding: dict[str, Any] | None,
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A validated record. origin: what `provenance` returned when the cell ran (default: taken now)."""
    origin = origin or provenance()
    content = {
        "schema": SCHEMA,
        "name": config.run_name,
        "claim": claim,
        "profile": profile,
        "command": command,
        "config": to_dict(config),
        "commit": origin["commit"],
        "dirty": origin["dirty"],
        "seed": config.seed,
        "started": origin["started"],
        "hardware": origin["hardware"],
        "versions": origin["versions"],
        "data": data,
        "seconds": seconds,
        "parameters": parameters,
        "training": training,
        "likelihood": likelihood,
        "decoding": decoding,
    }
    return validate(content, f"record of {config.run_name}")


# --- storing ---------------------------------------------------------------------------------------------------------


def write(content: dict[str, Any], folder: Path) -> Path:
    """Validate and write folder/NAME.json whole; an older record of that name stays until then. Raises WriteError."""
    validate(content, f"record {content.get('name', '')}")
    path = folder / f"{content['name']}.json"
    write_json(path, content)
    return path


def load(path: Path, root: Path | None = None) -> Record:
    """One validated record; raises RecordError naming the file."""
    try:
        content = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"{path} is damaged ({error}); run the cell again, or restore the file") from error
    if isinstance(content, dict) and "benchmark" in content and "schema" not in content:
        raise NotACell(f"{path} is a benchmark's record, not a cell's")
    validate(content, str(path))
    content["config"] = upgrade(content["config"])
    return Record(path.relative_to(root).as_posix() if root else path.as_posix(), content)


def load_all(root: Path) -> tuple[list[Record], list[str]]:
    """(records sorted by path, one line per damaged file). Raises RecordError where `root` is not a folder."""
    if not root.is_dir():
        raise RecordError(f"{root} is not a folder of records; run ./reproduce.sh, or give another one with --results")
    records, damaged = [], []
    for path in sorted(root.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        try:
            records.append(load(path, root))
        except NotACell:
            continue
        except RecordError as error:
            damaged.append(f"left out: {error}")
    return records, damaged


def variant_of(config: Mapping[str, Any]) -> str:
    """One of LAWS, and the sizes that a cell has of its own ("untied, mlp 1024"): hidden units of perceptron maps, rank of
    low-rank ones (low), hidden units of the anchor, layers with adapters. config: settings as nested dicts.

    untied: the paper's law; tied: one next-token head; anchored: tied, and the rest also sees x_{t+1}; blind: the
    anchor's control, which sees h_t in its place.
    """
    model, anchor = config["model"], config["anchor"]
    distribution = {"token": "anchored", "blind": "blind"}.get(anchor, "tied" if model["tie_first"] else "untied")
    sizes = {"mlp": "map_hidden", "low": "map_rank", "anchor": "anchor_width", "adapters": "adapter_layers"}
    return ", ".join([distribution, *(f"{name} {model[key]}" for name, key in sizes.items() if model.get(key, 0))])


def training_hardware(record: Record) -> str:
    """One line naming what a record was trained and evaluated on."""
    return machine_text(record["hardware"])


def decoding_hardware(record: Record) -> str:
    """One line naming what a record was decoded on, alone: often with more threads than it was trained with."""
    return machine_text((record["decoding"] or {}).get("origin", record.content)["hardware"])


def machine_text(hardware: dict[str, Any]) -> str:
    """One line on `hardware` of a record."""
    gpu = "" if hardware["accelerator"] == "none" else f"{hardware['accelerator']}, "
    threads = f", {counted(hardware['threads'], 'thread')}" if hardware["threads"] else ""
    return f"{gpu}{hardware['processor']}, {counted(hardware['cores'], 'core')}{threads}"


def counted(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def summary_table(record: Record) -> str:
    """A few lines on one cell, for a terminal."""
    likelihood, training = record["likelihood"], record["training"]
    lines = [
        f"{record['name']}",
        f"  parameters        {record['parameters']['total']:,} ({record['parameters']['trained']:,} trained)",
        f"  training          {training['steps']} steps, {training['tokens_per_second']:,.0f} tokens/s",
        f"  joint NLL         {likelihood['joint_nll']['mean']:.4f} nats over {record.horizon} tokens, {likelihood['positions']:,} positions",
        f"  first-token NLL   {likelihood['first_token_nll']['mean']:.4f} nats",
    ]
    if likelihood["bits_per_byte"] is not None:
        lines.append(f"  bits per byte     {likelihood['bits_per_byte']:.4f}")
    for name in MODES:
        mode = record.mode(name)
        if mode:
            rate, speedup = mode["tokens_per_pass"], mode["speedup"]
            lines.append(
                f"  {name:<17} {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] tokens per pass, "
                f"{speedup['median']:.2f}x [{speedup['low']:.2f}, {speedup['high']:.2f}] over plain decoding"
            )
    return "\n".join(lines)
