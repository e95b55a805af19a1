"""The record of a cell: how it is built, stored and read.

One JSON file per cell, results/FOLDER/NAME.json; results/README.md describes the fields, `schema.py` checks them. A
record is written whole or not at all. One that is damaged is named, and the report goes on without it.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm import config as configuration
from cpdlm.config import FAMILIES, SIZES, Config, ConfigError, from_dict, to_dict
from cpdlm.files import write_json
from cpdlm.training.flops import Shape, draft_flops
from experiments.provenance import provenance
from experiments.schema import SCHEMA, RecordError, check_settings, validate, with_nulls

MODES = ("greedy", "sampling")
SPARE_LOAD = 0.5  # of a load average beyond the cores: the decoding itself keeps all of them busy
VARIANTS = ("untied", "tied", "token-conditioned", "blind")


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
        """own: a self target. common: a frozen target that is shared."""
        return "common" if self.config["model"]["trunk"] else "own"

    @property
    def trunk_sha256(self) -> str:
        """Of the weights of a shared frozen target; "" for a self target."""
        return str(self.content["data"]["trunk_sha256"] or "")

    @property
    def is_pretrained(self) -> bool:
        """Heads on a pretrained model."""
        return bool(self.config["model"]["family"] == "pretrained")

    @property
    def size(self) -> str:
        """The trunk, by its size or its name."""
        return Path(self.config["model"]["trunk"]).name if self.is_pretrained else str(self.config["size"])

    @property
    def variant(self) -> str:
        return variant_of(self.config)

    def draft_flops(self) -> int | None:
        """Floating-point operations of one draft: gate, token embedding, maps and unembedding, 2 per multiply-add.

        None for a size that is not one of ours, or without drafts.
        """
        family = self.config["model"]["family"]
        if self.config["size"] not in SIZES or family not in FAMILIES or self.is_pretrained or self.horizon == 1:
            return None
        parts = self.content["parameters"]
        try:
            config = from_dict(self.config)
        except ConfigError:  # settings that no run of this version has
            return None
        shape = Shape.of(config, self.content["data"]["vocab_size"])
        return draft_flops(shape, parts["heads"] + parts["gate"] + parts["anchor"])

    def trained_bytes(self) -> int:
        """Of what was trained: heads on a pretrained model in that model's precision, others in float32."""
        narrow = self.config["model"]["dtype"] == "bfloat16"
        return int(self.content["parameters"]["trained"]) * (2 if narrow else 4)

    @property
    def step_seconds(self) -> float:
        """In training steps: without validation, checkpoints and pauses."""
        training = self.content["training"]
        return float(training["steps"] * training["step_ms_median"] / 1000)

    def mode(self, name: str) -> dict[str, Any] | None:
        """The `greedy` or `sampling` part, None where this cell was not decoded so."""
        decoding = self.content["decoding"]
        found: dict[str, Any] | None = decoding["modes"].get(name) if decoding else None
        return found


def build(config: Config, origin: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """A validated record.

    parts: claim, profile, command, data, seconds, parameters, training, likelihood, decoding, as the schema has them.
    origin: what `provenance` returned when the cell ran (default: taken now).
    """
    mine = {"schema": SCHEMA, "name": config.run_name, "config": to_dict(config), "seed": config.seed}
    return validate(with_nulls(mine | (origin or provenance()) | parts), f"record of {config.run_name}")


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write folder/NAME.json whole; what is there stays until then. Raises WriteError."""
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
    content = upgrade(validate(content, str(path)))
    check_settings(content["config"], str(path))  # by their present names
    return Record(path.relative_to(root).as_posix() if root else path.as_posix(), content)


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """A record of any version as this one writes it.

    Settings get their present names; one that is younger than the record had its default then. What may be absent is
    null.
    """
    config = configuration.upgrade(content["config"])
    whole = {
        key: value | config.get(key, {}) if isinstance(value, dict) else config.get(key, value)
        for key, value in _defaults().items()
    }
    return {**with_nulls(content), "config": config | whole}


@functools.cache
def _defaults() -> dict[str, Any]:
    return to_dict(Config())


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
    """One of VARIANTS, and the sizes that a cell has of its own, such as "untied, mlp 1024". config: nested settings.

    untied: the paper's distribution. tied: one next-token head. token-conditioned: tied, and the rest also sees
    x_{t+1}. blind: its control, which sees h_t in place of x_{t+1}. Sizes: hidden units of perceptron maps (mlp), rank
    of low-rank maps (low) or of offsets, multiples of the trunk's width (draft; 0.5 is not said).
    linked: each factor also sees the token before it.
    """
    model, link = config["model"], config["link"]
    distribution = {"first": "token-conditioned", "all": "linked", "blind": "blind"}.get(
        link, "tied" if model["tie_first"] else "untied"
    )
    sizes = {"mlp": "map_hidden", "low": "map_rank", "offsets": "component_rank"}
    wide = [f"draft {model['draft_width']:g}"] if link != "none" and model["draft_width"] != 0.5 else []
    hmm = ["hmm"] if config["joint"] == "hmm" else []
    return ", ".join(
        [distribution, *hmm, *wide, *(f"{name} {model[key]}" for name, key in sizes.items() if model[key])]
    )


# --- a record in words -----------------------------------------------------------------------------------------------


def training_hardware(record: Record) -> str:
    """One line naming what a record was trained and evaluated on."""
    return machine_text(record["hardware"])


def decoding_hardware(record: Record) -> str:
    """One line naming what a record was decoded on, alone: often with more threads than it was trained with."""
    return machine_text((record["decoding"]["origin"] if record["decoding"] else record.content)["hardware"])


def machine_text(hardware: dict[str, Any]) -> str:
    """One line on `hardware` of a record."""
    gpu = "" if hardware["accelerator"] == "none" else f"{hardware['accelerator']}, "
    threads = f", {counted(hardware['threads'], 'thread')}" if hardware["threads"] else ""
    return f"{gpu}{hardware['processor']}, {counted(hardware['cores'], 'core')}{threads}"


def is_busy(record: Record) -> str:
    """What to say beside its timings where other work kept the machine busy; "" where it did not, or is not known."""
    origin = record["decoding"]["origin"] if record["decoding"] else record.content
    load, cores = origin["load"], origin["hardware"]["cores"]
    if load is None or load <= cores + SPARE_LOAD:
        return ""
    return f"the machine was busy (load average {load:.1f} on {counted(cores, 'core')}); do not trust its timings"


def counted(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}{'s' * (count != 1)}"
