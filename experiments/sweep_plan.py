"""What a sweep runs, and what it refuses: cells that would be compared with records of other code or data.

A cell is finished once its record lies among the results, with these settings and timed beside its mates.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cpdlm.config import INCIDENTAL, Config, ConfigError, flat, to_dict
from experiments.provenance import git_state, is_commit, run_git
from experiments.records import Record, RecordError, counted, load
from experiments.scheduler import ROOT
from experiments.suite import Cell, complete, mates

STAGES = ("data", "train", "decode", "report")
AFRESH = "out=OTHER results=OTHER/results"
# What decides the numbers of a record. Commits that differ elsewhere only are the same code.
CODE = (
    "cpdlm/config",
    "cpdlm/data",
    "cpdlm/model",
    "cpdlm/training",
    "cpdlm/decoding",
    "cpdlm/bench",
    "experiments/likelihood.py",
    "experiments/measure",  # where it stood before 2026-12
    "experiments/cell.py",
)


@dataclass(frozen=True)
class Plan:
    """What to run and where.

    title: the claim or the profile. comparisons: sets of cells that are compared with each other. mix: records of other
    code or data may be added to.
    """

    title: str
    cells: list[Cell]
    out: Path
    results: Path
    command: str
    comparisons: list[list[Cell]] = field(default_factory=list)
    experiment: str = "cpdlm"
    stages: tuple[str, ...] = STAGES
    mix: bool = False

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
        """By name: the cells with a record that stands."""
        found = ((cell.name, self._record(cell)) for cell in self.cells)
        return {name: record for name, record in found if record is not None}

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


# --- what may be compared --------------------------------------------------------------------------------------------


def mixed_code(plan: Plan) -> list[str]:
    """A line per set of records, or of trained cells, of other code that pending cells would be compared with."""
    from experiments import cell as one

    trained = {cell.name: one.trained_by(cell.config(str(plan.out))) for cell in plan.pending}
    other = {name: commit for name, commit in trained.items() if commit and not _goes_on(commit)}
    lines = []
    for cells in plan.comparisons or [plan.cells]:
        names = {cell.name for cell in cells}
        if not names & trained.keys():
            continue
        old = [record for name, record in plan.finished.items() if name in names and not _same_code(record)]
        if old:
            commits = sorted({str(record["commit"])[:10] + "-dirty" * bool(record["dirty"]) for record in old})
            lines.append(f"{len(old)} records of other code ({', '.join(commits)}) under {plan.results}: {_some(old)}")
        found = sorted(names & other.keys())
        if found:
            commits = sorted({other[name][:10] for name in found})
            what = f"{counted(len(found), 'cell')} that other code ({', '.join(commits)}) trained"
            lines.append(f"{what} under {plan.out}: {_some(found)}")
    return list(dict.fromkeys(lines))


def refuse_mixed_code(plan: Plan) -> None:
    """Raise ConfigError unless plan.mix."""
    lines = mixed_code(plan)
    if lines and not plan.mix:
        raise ConfigError(
            f"the missing cells would be compared with {'; and with '.join(lines)}. Type mix=yes to add to them (the "
            f"report names the commits), or {AFRESH} to begin afresh"
        )


def refuse_mixed_data(plan: Plan, config: Config, sha256: str) -> None:
    """Raise ConfigError where finished records were made of other text, unless plan.mix."""
    mine = data_settings(config)
    other = [
        record
        for record in plan.finished.values()
        if {"corpus": record.config["corpus"]} | {key: record.config["data"][key] for key in mine if key != "corpus"}
        == mine
        and record["data"]["sha256"] != sha256
    ]
    if other and not plan.mix:
        raise ConfigError(
            f"{len(other)} records under {plan.results} are of other text than corpus={config.corpus} is now (sha256 "
            f"{other[0]['data']['sha256'][:12]} then, {sha256[:12]} now): {_some(other)}. Restore it, type {AFRESH}, "
            "or mix=yes: the report never compares the two"
        )


def data_settings(config: Config) -> dict[str, Any]:
    """What decides the text and its tokens."""
    data = config.data
    return {"corpus": config.corpus} | {key: getattr(data, key) for key in ("tokenizer", "max_bytes", "release")}


def refused_trunk(plan: Plan, trunk: Cell) -> str:
    """Why heads on this trunk would have another target than finished records; "" where they would not.

    With plan.mix that is a warning, and "" is returned.
    """
    from cpdlm.data.target import WEIGHTS, Target

    heads = {cell.name: cell for cell in plan.cells if cell.trunk is not None and cell.trunk.name == trunk.name}
    if not heads or not (plan.out / trunk.name / WEIGHTS).is_file():
        return ""
    mine = Target.of(next(iter(heads.values())).config(str(plan.out))).sha256
    other = [r for name, r in plan.finished.items() if name in heads and r.trunk_sha256 not in ("", mine)]
    if not other:
        return ""
    found = f"{trunk.name} trained to other weights than those under {len(other)} records ({_some(other)})"
    paired = "pairs no cell on one with a cell on the other"
    if plan.mix:
        print(f"warning: {found}: another target, and the report {paired}", file=sys.stderr)
        return ""
    return (
        f"{found}: the heads would not share one target. Type mix=yes to add cells on this one (the report says so and "
        f"{paired}), or {AFRESH}"
    )


@lru_cache(maxsize=64)
def _unchanged_since(commit: str) -> bool:
    here, _ = git_state()
    if not is_commit(here):
        return commit == here
    return run_git(ROOT, "diff", "--quiet", commit, "--", *CODE).returncode == 0


def _same_code(record: Record) -> bool:
    return not record["dirty"] and _unchanged_since(str(record["commit"]))


def _goes_on(commit: str) -> bool:
    """Whether cells that a sweep of that commit left may be continued, also with uncommitted changes."""
    return commit == git_state()[0] or _unchanged_since(commit)


def _some(found: Sequence[Record | str]) -> str:
    names = [each if isinstance(each, str) else str(each["name"]) for each in found]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
