"""The record of a cell: its schema, where it comes from, and how it is stored and read back.

One JSON file per cell, results/FOLDER/NAME.json; results/README.md describes the fields. A record is written whole or
not at all, and one that is damaged is named instead of taking the report down.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpdlm.config import FAMILIES, INCIDENTAL, SIZES, Config, flat, to_dict
from cpdlm.files import write_json

SCHEMA = 1
MODES = ("greedy", "sampling")
LAWS = ("untied", "tied", "anchored", "blind")
PARTS = ("prefill", "draft", "trunk", "verify", "other")
PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "numpy",
    "omegaconf",
    "datasets",
    "tokenizers",
    "mlflow",
    "matplotlib",
)


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
        size, parts = SIZES.get(self.config["size"]), self.content["parameters"]
        foreign = self.is_pretrained or self.config["model"].get("family", "llama") not in FAMILIES
        if size is None or foreign or self.horizon == 1:
            return None
        rows = (self.horizon - (not self.variant.startswith("untied"))) * self.rank
        shared = self.config["model"].get("head", "shared") == "shared"
        unembedding = rows * self.content["data"]["vocab_size"] * size.width if shared else 0
        return int(2 * (parts["heads"] + parts["gate"] + parts["anchor"] + unembedding))

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


def provenance() -> dict[str, Any]:
    """{"commit", "dirty", "hardware", "versions", "started"}: where and from what this process runs."""
    commit, dirty = git_state()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit, "dirty": dirty, "hardware": hardware(), "versions": versions(), "started": started}


def hardware() -> dict[str, Any]:
    """Kind of machine, never its name. Memory in GiB; threads are torch's, None before torch is loaded."""
    torch = sys.modules.get("torch")
    accelerator = "none"
    if torch is not None and torch.cuda.is_available():
        accelerator = str(torch.cuda.get_device_name(0))
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory_gib": memory,
        "accelerator": accelerator,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Python and every package of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(root: Path | None = None) -> tuple[str, bool]:
    """(commit, dirty) of this code; ("unknown", False) outside git.

    CPDLM_COMMIT stands in where the code was copied without .git ("HASH" or "HASH-dirty"). Generated files (results,
    figures, README) do not make the tree dirty, since a sweep writes them while it runs.
    """
    given = os.environ.get("CPDLM_COMMIT", "")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    root = root or Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != root.resolve():
        return "unknown", False
    generated = [f":(exclude){path}" for path in ("results", "paper_figures", "README.md")]
    return commit, bool(_git(root, "status", "--porcelain", "--", ".", *generated))


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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


# --- comparing -------------------------------------------------------------------------------------------------------

# What two comparable records may differ in: settings that change no result, and the dials that a family is laid out along.
_FREE = (
    *INCIDENTAL,
    "loss.chunk_mib",
    "evaluate.batch_rows",
    "train.validation_rows",
    "rank",
    "seed",
    "anchor",
    "model.tie_first",
    "model.anchor_width",
    "model.map_hidden",
    "model.map_rank",
    "model.adapter_layers",
    "model.trunk",
)
_CONSEQUENCES = ("data.sha256", "data.vocab_size", "trunk")
Cells = dict[int, Record]  # seed -> record


@dataclass
class Family:
    """Records that differ in rank, seed and variant only: what may be compared. settings: everything they share."""

    settings: dict[str, Any]
    label: str = ""
    cells: dict[tuple[str, int], Cells] = field(default_factory=dict)
    reference: list[Record] = field(default_factory=list)  # next-token trunks of equal training, or the common target

    @property
    def target(self) -> str:
        return str(self.settings["target"])

    @property
    def horizon(self) -> int:
        return int(self.settings["horizon"])

    @property
    def is_pretrained(self) -> bool:
        """Heads on a model of others."""
        return bool(self.settings["model.family"] == "pretrained")

    @property
    def size(self) -> str:
        """The trunk, by its size or its name."""
        return str(self.settings["trunk"] if self.is_pretrained else self.settings["size"])

    @property
    def is_timing(self) -> bool:
        """Cells trained alone for a few steps, to be timed (C8): their likelihoods and drafts say nothing."""
        return all(record["claim"] == "C8" for record in self.records())

    @property
    def balance(self) -> str:
        """switch and kl with their strength, bias with its rate, none."""
        name = str(self.settings["balance"])
        key = {"switch": "loss.balance_weight", "kl": "loss.balance_weight", "bias": "loss.balance_rate"}.get(name)
        return f"{name} {self.settings[key]:g}" if key else name

    def all_ranks(self) -> list[int]:
        return sorted({rank for _, rank in self.cells})

    def variants(self) -> list[str]:
        """The variants that it has, those of LAWS first."""
        found = {variant for variant, _ in self.cells}
        return [distribution for distribution in LAWS if distribution in found] + sorted(found - set(LAWS))

    def ranks(self, variant: str = "untied") -> list[int]:
        return sorted(rank for kind, rank in self.cells if kind == variant)

    def records(self, variant: str | None = None) -> list[Record]:
        return [
            record
            for (kind, _), cells in sorted(self.cells.items())
            for _, record in sorted(cells.items())
            if variant in (None, kind)
        ]


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


def families(records: Iterable[Record]) -> tuple[list[Family], list[str]]:
    """(families, notes), the largest family first, of two alike the newer. Different data or settings are never mixed; the notes say what else
    differs within a family (commit, hardware, uncommitted changes), and which duplicates were left out."""
    records = list(records)
    found: dict[str, Family] = {}
    notes: list[str] = []
    by_name, unlike = {str(record["name"]): record for record in records}, 0
    for record in records:
        if record.horizon == 1:
            continue
        if not _is_like_for_like(record, by_name):
            record, unlike = _without_rank_one(record), unlike + 1
        settings = _settings(record)
        family = found.setdefault(json.dumps(settings, sort_keys=True), Family(settings))
        cells = family.cells.setdefault((record.variant, record.rank), {})
        other = cells.get(record.seed)
        if other is not None:
            old, new = sorted((other, record), key=lambda r: (r["started"], r.path))
            notes.append(f"{old.path} left out: {new.path} is the same cell and newer")
            record = new
        cells[record.seed] = record
    trunks = [record for record in records if record.horizon == 1]
    for family in found.values():
        family.reference = _references(family, trunks)
    ordered = sorted(found.values(), key=lambda f: json.dumps(f.settings, sort_keys=True))
    ordered.sort(key=lambda f: max(str(record["started"]) for record in f.records()), reverse=True)
    ordered.sort(key=lambda f: -len(f.records()))
    _label(ordered)
    for family in ordered:
        notes += _mixture(family)
    if unlike:
        notes.append(
            f"speed over rank 1 is not shown where it was taken over a rank-1 cell of another law or training (records: {unlike})"
        )
    return ordered, notes + _one_trunk(ordered) + _targets(ordered)


def _is_like_for_like(record: Record, by_name: dict[str, Record]) -> bool:
    """Whether its speed over rank 1 was taken over a cell that differs from it in rank only.

    Records say which (`decoding.rank_one`). Those made before they did had the first rank-1 cell of their group, whatever
    its law and training were; where that cell's record is not here, it is not known.
    """
    decoding = record["decoding"] or {}
    if "rank_one" in decoding or "group" not in decoding:
        return True
    for name in decoding["group"]:
        other = by_name.get(name)
        if other is None:
            return False
        if other.rank == 1 and other.horizon == record.horizon:
            same = other.variant == record.variant and other.seed == record.seed
            return same and _settings(other) == _settings(record)
    return True


def _without_rank_one(record: Record) -> Record:
    modes = {name: mode | {"speedup_over_rank1": None} for name, mode in record["decoding"]["modes"].items()}
    return Record(record.path, record.content | {"decoding": record["decoding"] | {"modes": modes}})


def along(families: Iterable[Family], *free: str) -> list[list[Family]]:
    """Groups of families that share all settings but `free` (prefixes of dotted names), the largest group first; a group has two
    families at least."""
    groups: dict[str, list[Family]] = {}
    for family in families:
        kept = {key: value for key, value in family.settings.items() if not key.startswith(free)}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(family)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def trunk_records(records: Iterable[Family]) -> list[Record]:
    """Every reference trunk once, by path."""
    return sorted({r.path: r for family in records for r in family.reference}.values(), key=lambda r: r.path)


def _settings(record: Record) -> dict[str, Any]:
    # A setting that is younger than the record had its default then.
    every = _defaults() | flat(record.config)
    settings = {key: value for key, value in every.items() if not key.startswith(_FREE)}
    settings["target"] = record.target
    settings["trunk"] = re.sub(r"-s\d+$", "", Path(record.config["model"]["trunk"]).name)
    settings["data.sha256"] = record["data"]["sha256"]
    settings["data.vocab_size"] = record["data"]["vocab_size"]
    return settings


@functools.cache
def _defaults() -> dict[str, Any]:
    return flat(to_dict(Config()))


def _references(family: Family, trunks: list[Record]) -> list[Record]:
    if family.target == "common":
        names = {Path(record.config["model"]["trunk"]).name for record in family.records()}
        same = [r for r in trunks if r["name"] in names]
    else:
        free = (
            "horizon",
            "balance",
            "target",
            "trunk",
            "decode.",
            "loss.",
            "model.head",
            "model.map_rank",
            "model.noise",
        )
        mine = {key: value for key, value in family.settings.items() if not key.startswith(free)}
        same = [r for r in trunks if {k: v for k, v in _settings(r).items() if not k.startswith(free)} == mine]
    return [r for r in same if r["data"]["sha256"] == family.settings["data.sha256"]]


def _label(ordered: list[Family]) -> None:
    plain: dict[str, list[Family]] = {}
    for family in ordered:
        s = family.settings
        text = f"{s['corpus']}, {family.size}, n={s['horizon']}, {s['target']} target"
        plain.setdefault(text, []).append(family)
    for text, members in plain.items():
        usual = members[0].settings  # of the largest: the others say in what they differ from it
        for family in members:
            differing = [key for key in sorted(family.settings) if family.settings[key] != usual.get(key)]
            # Other text or another tokenizer shows in hashes, too, and those are said only where nothing else is.
            said = [key for key in differing if key not in _CONSEQUENCES] or differing
            family.label = ", ".join([text, *(f"{key}={str(family.settings[key])[:12]}" for key in said)])


def _mixture(family: Family) -> list[str]:
    records = family.records()
    notes = []
    origins = [
        origin for record in records for origin in (record.content, (record["decoding"] or {}).get("origin")) if origin
    ]
    commits = sorted({origin["commit"][:10] for origin in origins})
    if len(commits) > 1:
        notes.append(f"{family.label}: records of {len(commits)} commits ({', '.join(commits)}) are compared")
    dirty = [
        record["name"]
        for record in records
        if record["dirty"] or (record["decoding"] or {}).get("origin", {}).get("dirty")
    ]
    if dirty:
        notes.append(f"{family.label}: {len(dirty)} of {len(records)} records come from uncommitted changes")
    for what, machine in (("decoded", decoding_hardware), ("trained", training_hardware)):
        machines = sorted({machine(record) for record in records})
        if len(machines) > 1:
            notes.append(
                f"{family.label}: records {what} on {len(machines)} kinds of hardware are compared: {'; '.join(machines)}"
            )
    return notes


def _one_trunk(ordered: list[Family]) -> list[str]:
    """A line on the comparisons whose seeds are of the heads alone."""
    found = 0
    for family in ordered:
        trunks = {record.config["model"]["trunk"] for record in family.records()}
        seeds = {record.seed for record in family.records()}
        found += family.target == "common" and len(seeds) > len(trunks)
    if not found:
        return []
    return [
        f"{counted(found, 'comparison')} with several seeds of the heads on one frozen trunk: its own variation is not covered"
    ]


def _targets(ordered: list[Family]) -> list[str]:
    """A line per common trunk (a name, on one text) of which there are several sets of weights: each is another target."""
    found: dict[tuple[str, str], list[str]] = {}
    for family in ordered:
        for record in family.records():
            if record.trunk_sha256:
                trunk = Path(record.config["model"]["trunk"]).name, record["data"]["sha256"]
                found.setdefault(trunk, []).append(record.trunk_sha256)
    return [
        f"{name} has {len(set(hashes))} sets of weights ("
        + ", ".join(f"sha256 {each[:10]} under {hashes.count(each)} records" for each in sorted(set(hashes)))
        + "): they are different targets, and cells on one are not paired with cells on another"
        for (name, _), hashes in found.items()
        if len(set(hashes)) > 1
    ]


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
