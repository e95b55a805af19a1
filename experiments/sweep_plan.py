"""What a sweep runs, and what it warns of: records of other text or of another trunk's weights.

A cell is finished once its record lies among the results, with these settings and timed beside its mates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpdlm.config import INCIDENTAL, Config, flat, to_dict
from experiments.records import Record, RecordError, load
from experiments.suite import Cell, complete, mates

STAGES = ("data", "train", "decode", "report")
AFRESH = (
    "stop, and end the command with out=OTHER results=OTHER/results (./reproduce.sh: --out OTHER --results "
    "OTHER/results), to have all cells of one kind"
)


@dataclass(frozen=True)
class Plan:
    """What to run and where.

    title: the claim or the profile.
    """

    title: str
    cells: list[Cell]
    out: Path
    results: Path
    command: str
    experiment: str = "cpdlm"
    stages: tuple[str, ...] = STAGES

    @property
    def shown(self) -> Path:
        """The folder whose records the report is drawn from: those of a GPU join the others."""
        return Path("results") if self.results.parts[:1] == ("results",) else self.results

    @property
    def publish(self) -> bool:
        """Whether the report takes the place of the committed figures and of README's claims."""
        return self.results != self.out / "results"

    @cached_property
    def finished(self) -> dict[str, Record]:
        """By name: the cells with a record that stands, and whose mates have one: what is timed side by side is so anew
        where a part of it is lost."""
        every = {cell.name: self._record(cell) for cell in self.cells}
        lost = {name for name, record in every.items() if record is None}
        whole = [cell.name for cell in self.cells if not mates(cell, self.cells) & lost]
        return {name: record for name in whole if (record := every[name]) is not None}

    @cached_property
    def pending(self) -> list[Cell]:
        """The cells without one."""
        return [cell for cell in self.cells if cell.name not in self.finished]

    @cached_property
    def needed(self) -> list[Cell]:
        """The pending cells, and the trunks and references whose weights they need, those first."""
        return complete(self.pending)

    def _record(self, cell: Cell) -> Record | None:
        path = self.results / cell.folder / f"{cell.name}.json"
        if not path.is_file():
            return None
        try:
            record = load(path, self.results)
        except RecordError:
            return None
        config = cell.config(str(self.out))
        if _comparable(to_dict(config)) != _comparable(to_dict(Config()), record.config):
            return None
        if config.horizon == 1:
            return record
        decoding = record["decoding"] or {"group": []}
        reference = cell.reference is None or (decoding.get("reference") or [""])[0] == cell.reference.name
        beside = mates(cell, self.cells) <= set(decoding["group"])
        return record if record["decoding"] and reference and beside else None


def _comparable(*nested: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide what a cell computes; later ones win. A trunk is its name, wherever it lies."""
    values: dict[str, Any] = {}
    for each in nested:
        values |= flat(each)
    kept = {key: value for key, value in values.items() if not key.startswith(INCIDENTAL)}
    return kept | {"model.trunk": Path(kept["model.trunk"]).name}


# --- what will not be compared ---------------------------------------------------------------------------------------


def other_text(plan: Plan, config: Config, sha256: str) -> str:
    """Which finished records are of other text than the corpus is now; "" where none are."""
    mine = data_settings(config)
    other = [
        record
        for record in plan.finished.values()
        if {"corpus": record.config["corpus"]} | {key: record.config["data"][key] for key in mine if key != "corpus"}
        == mine
        and record["data"]["sha256"] != sha256
    ]
    if not other:
        return ""
    return (
        f"{len(other)} records under {plan.results} are of other text than corpus={config.corpus} is now (sha256 "
        f"{other[0]['data']['sha256'][:12]} then, {sha256[:12]} now): {_some(other)}. The report never compares the "
        f"two: {AFRESH}"
    )


def data_settings(config: Config) -> dict[str, Any]:
    """What decides the text and its tokens."""
    data = config.data
    return {"corpus": config.corpus} | {key: getattr(data, key) for key in ("tokenizer", "max_bytes", "release")}


def other_target(plan: Plan, trunk: Cell) -> str:
    """Which finished records of heads have another target than this trunk; "" where none have."""
    from cpdlm.data.target import WEIGHTS, Target

    heads = {cell.name: cell for cell in plan.cells if cell.trunk is not None and cell.trunk.name == trunk.name}
    if not heads or not (plan.out / trunk.name / WEIGHTS).is_file():
        return ""
    mine = Target.of(next(iter(heads.values())).config(str(plan.out))).sha256
    other = [r for name, r in plan.finished.items() if name in heads and r.trunk_sha256 not in ("", mine)]
    if not other:
        return ""
    return (
        f"{trunk.name} trained to other weights than those under {len(other)} records ({_some(other)}): another "
        f"target, and the report pairs no cell on one with a cell on the other: {AFRESH}"
    )


def _some(found: Sequence[Record]) -> str:
    names = [str(each["name"]) for each in found]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
