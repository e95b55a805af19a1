"""Which records may be compared: families, that differ in rank, variant and seed only."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpdlm.config import INCIDENTAL, flat
from experiments.records import VARIANTS, Record, counted, decoding_hardware, training_hardware

# What comparable records may differ in: settings that change no result, and the dials that a family is laid out along.
_FREE = (
    *INCIDENTAL,
    "loss.chunk_mib",
    "evaluate.batch_rows",
    "train.validation_rows",
    "rank",
    "seed",
    "link",
    "model.tie_first",
    "model.draft_width",
    "model.draft_normed",
    "model.link_width",
    "model.component_rank",
    "joint",
    "model.map_hidden",
    "model.map_rank",
    "model.trunk",
)
# Said only where nothing else differs: what other text or longer training brings with it, and how long decoding was
# measured.
_CONSEQUENCES = (
    *("data.sha256", "data.vocab_size", "trunk", "optim.lr", "optim.warmup", "train.precision"),
    *("decode.prompts", "decode.repeats", "decode.warmups"),
)
Cells = dict[int, Record]  # seed -> record


TARGETS = {"own": "self target", "common": "shared frozen target"}


@dataclass
class Family:
    """Records that differ in rank, seed and variant only: what may be compared. settings: everything they share."""

    settings: dict[str, Any]
    label: str = ""
    cells: dict[tuple[str, int], Cells] = field(default_factory=dict)
    reference: list[Record] = field(
        default_factory=list
    )  # next-token trunks of equal training, or the shared frozen target

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

    def variants(self) -> list[str]:
        """The variants that it has, those of VARIANTS first."""
        found = {variant for variant, _ in self.cells}
        return [distribution for distribution in VARIANTS if distribution in found] + sorted(found - set(VARIANTS))

    def ranks(self, variant: str = "untied") -> list[int]:
        return sorted(rank for kind, rank in self.cells if kind == variant)

    def by_rank(self, variant: str = "untied") -> dict[int, Cells]:
        return {rank: self.cells[variant, rank] for rank in self.ranks(variant)}

    def records(self, variant: str | None = None) -> list[Record]:
        return [
            record
            for (kind, _), cells in sorted(self.cells.items())
            for _, record in sorted(cells.items())
            if variant in (None, kind)
        ]


def families_of(records: Iterable[Record]) -> tuple[list[Family], list[str]]:
    """(families, notes), the largest family first, of two alike the newer.

    Different data or settings are never mixed. The notes say what else differs within a family (commit, hardware,
    uncommitted changes), and which duplicates were left out.
    """
    records = list(records)
    found: dict[str, Family] = {}
    notes: list[str] = []
    for record in records:
        if record.horizon == 1:
            continue
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
    return ordered, notes + _one_trunk(ordered) + _targets(ordered)


def along(families: Iterable[Family], *free: str) -> list[list[Family]]:
    """Groups of at least two families that share all settings but `free`, the largest group first.

    free: prefixes of dotted names.
    """
    groups: dict[str, list[Family]] = {}
    for family in families:
        kept = {key: value for key, value in family.settings.items() if not key.startswith(free)}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(family)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def trained_longer(family: Family, families: Iterable[Family]) -> list[Cells]:
    """Rank-1 cells that differ from the family in having had more steps, by steps."""
    others = [
        other
        for other in families
        if other.settings["optim.steps"] > family.settings["optim.steps"]
        and 1 in other.ranks()
        and along([family, other], "optim.steps", "optim.warmup")
    ]
    return [other.cells["untied", 1] for other in sorted(others, key=lambda other: other.settings["optim.steps"])]


def _settings(record: Record) -> dict[str, Any]:
    settings = {key: value for key, value in flat(record.config).items() if not key.startswith(_FREE)}
    settings["target"] = record.target
    settings["trunk"] = re.sub(r"-s\d+$", "", Path(record.config["model"]["trunk"]).name)
    settings["data.sha256"] = record["data"]["sha256"]
    settings["data.vocab_size"] = record["data"]["vocab_size"]
    return settings


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


def _differing(family: Family, other: Family) -> list[str]:
    return [key for key in sorted(family.settings) if family.settings[key] != other.settings.get(key)]


def _label(ordered: list[Family]) -> None:
    plain: dict[str, list[Family]] = {}
    for family in ordered:
        s = family.settings
        text = f"{s['corpus']}, {family.size}, n={s['horizon']}, {TARGETS[family.target]}"
        plain.setdefault(text, []).append(family)
    for text, members in plain.items():
        # That from which all differ in the fewest settings, of two alike the largest: the others say in what.
        usual = min(members, key=lambda each: sum(len(_differing(other, each)) for other in members))
        for family in members:
            differing = _differing(family, usual)
            # Other text or another tokenizer shows in hashes, too, and those are said only where nothing else is.
            said = [key for key in differing if key not in _CONSEQUENCES] or differing
            family.label = ", ".join([text, *(f"{key}={str(family.settings[key])[:12]}" for key in said)])


def _mixture(family: Family) -> list[str]:
    records = family.records()
    notes = []
    origins = [[record.content, *([record["decoding"]["origin"]] if record["decoding"] else [])] for record in records]
    commits = sorted({origin["commit"][:10] for each in origins for origin in each})
    if len(commits) > 1:
        notes.append(f"{family.label}: records of {len(commits)} commits ({', '.join(commits)}) are compared")
    dirty = sum(any(origin["dirty"] for origin in each) for each in origins)
    if dirty:
        notes.append(f"{family.label}: {dirty} of {len(records)} records come from uncommitted changes")
    for what, machine in (("decoded", decoding_hardware), ("trained", training_hardware)):
        machines = sorted({machine(record) for record in records})
        if len(machines) > 1:
            kinds = f"{len(machines)} kinds of hardware are compared: {'; '.join(machines)}"
            notes.append(f"{family.label}: records {what} on {kinds}")
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
    heads = f"{counted(found, 'comparison')} with several seeds of the heads on one frozen trunk"
    return [f"{heads}: its own variation is not covered"]


def _targets(ordered: list[Family]) -> list[str]:
    """A line per shared trunk (a name, on one text) that has several sets of weights: each is another target."""
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
