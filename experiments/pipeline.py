"""The stages of a sweep over any list of cells: data, train, decode, report. `experiments/sweep.py` is its command line.

Every stage skips what is complete, so that the same sweep continues where a killed one was. A cell whose record lies among
the results, with these settings and timed beside its mates, is finished and never runs again; where only its weights are
needed (a trunk) they are made again. A cell that fails leaves OUT/NAME/failed.json, and the others go on.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cpdlm.config import INCIDENTAL, Config, ConfigError, flat, to_dict
from cpdlm.files import check_writable, write_json
from experiments.provenance import git_state
from experiments.records import Record, RecordError, counted, load
from experiments.scheduler import ROOT, Job, Launcher, Slurm, schedule
from experiments.suite import Cell, complete, decode_groups, mates

STAGES = ("data", "train", "decode", "report")
FAILED = "failed.json"
# What decides the numbers of a record: records of commits that differ elsewhere only are records of the same code.
CODE = (
    "cpdlm/config",
    "cpdlm/data",
    "cpdlm/model",
    "cpdlm/training",
    "cpdlm/decoding",
    "cpdlm/bench",
    "experiments/measure",
    "experiments/cell.py",
)


@dataclass(frozen=True)
class Plan:
    """What to run and where. title: the claim or the profile. comparisons: sets of cells that are compared with each other.
    mix: records of other code or data may be added to. shown: the folder whose records the report is drawn from (default:
    results). publish: it takes the place of the committed figures and of README's claims."""

    title: str
    cells: list[Cell]
    out: Path
    results: Path
    command: str
    comparisons: list[list[Cell]] = field(default_factory=list)
    experiment: str = "cpdlm"
    stages: tuple[str, ...] = STAGES
    mix: bool = False
    shown: Path | None = None
    publish: bool = False

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


def run(plan: Plan, launcher: Launcher) -> int:
    """The stages in order; returns the exit code: 1 where a cell or a group failed (the others are run all the same)."""
    failures: list[str] = []
    check_writable(plan.results)
    refuse_mixed_code(plan)
    stages: dict[str, Callable[[], str]] = {
        "data": lambda: _data(plan),
        "train": lambda: _train(plan, launcher, failures),
        "decode": lambda: _decode(plan, launcher, failures),
        "report": lambda: _report(plan),
    }
    try:
        for number, name in enumerate(STAGES, start=2):
            if name in plan.stages:
                print(f"[{number}/5] {name} ...", flush=True)
                began = time.monotonic()
                outcome = stages[name]()
                print(f"[{number}/5] {name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


# --- what may be compared --------------------------------------------------------------------------------------------


def mixed_code(plan: Plan) -> list[str]:
    """One line per set of finished records, and of trained cells without a record yet, of other code than this, that pending
    cells would be compared with."""
    from experiments import cell as one

    trained = {cell.name: one.trained_by(cell.config(str(plan.out))) for cell in plan.pending}
    lines = []
    for cells in plan.comparisons or [plan.cells]:
        names = {cell.name for cell in cells}
        if not names & {cell.name for cell in plan.pending}:
            continue
        old = [record for name, record in plan.finished.items() if name in names and not _same_code(record)]
        if old:
            commits = sorted({str(record["commit"])[:10] + "-dirty" * bool(record["dirty"]) for record in old})
            lines.append(f"{len(old)} records of other code ({', '.join(commits)}) under {plan.results}: {_some(old)}")
        foreign = {
            name: commit for name, commit in trained.items() if name in names and commit and not _goes_on(commit)
        }
        if foreign:
            commits = sorted({commit[:10] for commit in foreign.values()})
            lines.append(
                f"{counted(len(foreign), 'cell')} that other code ({', '.join(commits)}) trained under {plan.out}: {_some(list(foreign))}"
            )
    return list(dict.fromkeys(lines))


def refuse_mixed_code(plan: Plan) -> None:
    """Raise ConfigError unless plan.mix."""
    lines = mixed_code(plan)
    if lines and not plan.mix:
        raise ConfigError(
            f"the missing cells would be compared with {'; and with '.join(lines)}. Type mix=yes to add to them (the report "
            "names the commits), or out=OTHER results=OTHER/results to begin afresh"
        )


def refuse_mixed_data(plan: Plan, config: Config, sha256: str) -> None:
    """Raise ConfigError where finished records were made of other text, unless plan.mix."""
    other = [
        record
        for record in plan.finished.values()
        if all(record.config[key] == value for key, value in _data_settings(config).items() if key == "corpus")
        and all(record.config["data"].get(k) == v for k, v in _data_settings(config).items() if k != "corpus")
        and record["data"]["sha256"] != sha256
    ]
    if other and not plan.mix:
        raise ConfigError(
            f"{len(other)} records under {plan.results} are of other text than corpus={config.corpus} is now (sha256 "
            f"{other[0]['data']['sha256'][:12]} then, {sha256[:12]} now): {_some(other)}. Restore it, type out=OTHER results=OTHER/results, or "
            "mix=yes: the report never compares the two"
        )


def _data_settings(config: Config) -> dict[str, Any]:
    return {"corpus": config.corpus, "tokenizer": config.data.tokenizer, "max_bytes": config.data.max_bytes}


def _other_trunk(plan: Plan, trunk: Cell) -> str:
    """What to say where finished records rest on other weights of this trunk than these; "" where none does. With plan.mix it
    is no more than a warning."""
    from cpdlm.training.checkpoints import WEIGHTS, trunk_hash

    if not (plan.out / trunk.name / WEIGHTS).is_file():
        return ""
    head = next((c for c in plan.cells if c.trunk is not None and c.trunk.name == trunk.name), None)
    mine = trunk_hash(head.config(str(plan.out))) if head is not None else ""
    heads = {cell.name for cell in plan.cells if cell.trunk is not None and cell.trunk.name == trunk.name}
    other = [r for name, r in plan.finished.items() if name in heads and r["data"].get("trunk_sha256", mine) != mine]
    if not other:
        return ""
    found = f"{trunk.name} trained to other weights than those under {len(other)} records ({_some(other)})"
    if plan.mix:
        print(
            f"warning: {found}: another target, and the report pairs no cell on one with a cell on the other",
            file=sys.stderr,
        )
        return ""
    return (
        f"{found}: the target would not be a common one. Type mix=yes to add cells on this one (the report says so and pairs no "
        "cell on one with a cell on the other), or out=OTHER results=OTHER/results"
    )


@lru_cache(maxsize=64)
def _unchanged_since(commit: str) -> bool:
    if commit == git_state()[0] == "unknown":
        return True
    asked = subprocess.run(
        ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *CODE], capture_output=True, check=False
    )
    return asked.returncode == 0 if git_state()[0] != "unknown" else commit == git_state()[0]


def _same_code(record: Record) -> bool:
    return not record["dirty"] and _unchanged_since(str(record["commit"]))


def _goes_on(commit: str) -> bool:
    """Whether cells that a sweep of that commit left are its own still: with uncommitted changes, too, which their records name."""
    return commit == git_state()[0] or _unchanged_since(commit)


def _some(found: Sequence[Record | str]) -> str:
    names = [each if isinstance(each, str) else str(each["name"]) for each in found]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# --- stages ----------------------------------------------------------------------------------------------------------


def _data(plan: Plan) -> str:
    from cpdlm.data.corpus import load_corpus

    made: dict[str, str] = {}
    for cell in plan.needed:
        config = cell.config(str(plan.out))
        key = f"{_data_settings(config)}/{config.data.context}"
        if key not in made:
            corpus = load_corpus(config)
            refuse_mixed_data(plan, config, str(corpus.describe()["sha256"]))
            made[key] = f"{config.corpus} ({config.data.tokenizer}): {len(corpus.train.tokens):,} training tokens"
    return "; ".join(made.values()) or "skipped: nothing is left to run"


def _train(plan: Plan, launcher: Launcher, failures: list[str]) -> str:
    from cpdlm.training.checkpoints import exclusive
    from experiments import cell as one

    pending = [cell for cell in plan.needed if not one.is_trained(cell.config(str(plan.out)))]
    if not pending:
        return f"skipped: all {len(plan.cells)} cells are complete"
    from tqdm import tqdm

    parent = one.sweep(plan.title, str(plan.out), plan.command, plan.experiment)
    track = [f"tracking.experiment={plan.experiment}", *([f"tracking.parent={parent}"] if parent else [])]
    by_name = {cell.name: cell for cell in pending}
    jobs = []
    for cell in pending:
        folder, needs = plan.out / cell.name, frozenset({cell.trunk.name} if cell.trunk is not None else ())
        # Cells of a killed sweep may still be saving here; on a cluster their jobs are found again.
        if not isinstance(launcher, Slurm):
            with exclusive(folder, patience=60):
                pass
        log = folder / "train.log"
        jobs.append(Job(cell.name, train_command(cell, plan, track), log, needs, cell.alone, logged=_size(log)))
    done = {cell.name for cell in plan.needed} - set(by_name)
    complaints = [line for cell in plan.needed if cell.name in done and (line := _other_trunk(plan, cell))]
    if complaints:
        raise ConfigError("; ".join(complaints))
    print(f"      {len(jobs)} cells; each writes {plan.out}/NAME/train.log", flush=True)
    with tqdm(total=len(jobs), desc="cells", unit="cell") as bar:

        def ended(job: Job, code: int) -> bool:
            bar.update()
            failure = plan.out / job.name / FAILED
            if code == 0:
                failure.unlink(missing_ok=True)
                if complaint := _other_trunk(plan, by_name[job.name]):
                    failures.append(complaint)
                return not complaint
            note_failure(failure, job, code)
            failures.append(f"{job.name}: exit {code}; see {failure}")
            tqdm.write(f"failed: {failures[-1]}{_last_lines(job)}", file=sys.stderr)
            return False

        skipped = schedule(jobs, launcher, ended)
    failures += [f"{job.name}: its trunk failed" for job in skipped]
    return f"{len(pending)} cells run for {len(plan.cells)}, {len(failures)} failed"


def train_command(cell: Cell, plan: Plan, track: list[str]) -> tuple[str, ...]:
    return ("experiments/run.py", *cell.words(str(plan.out)), "--stage=train", *track)


def note_failure(path: Path, job: Job, code: int) -> None:
    """What a failed job leaves: its command, exit code and the traceback (else the last lines) of this attempt's log."""
    _, found, trace = _said(job).partition("Traceback (most recent call last):")
    write_json(
        path,
        {
            "name": job.name,
            "command": " ".join(["python", *job.argv]),
            "exit": code,
            "traceback": (found + trace).strip() if found else _last_lines(job, 20).strip(),
            "log": job.log.name,
            "commit": git_state()[0],
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )


def _size(log: Path) -> int:
    return log.stat().st_size if log.is_file() else 0


def _said(job: Job) -> str:
    """What this attempt added to the job's log."""
    added = job.log.read_bytes()[job.logged :] if job.log.is_file() else b""
    return added.decode(errors="replace").replace("\r", "\n")


def _last_lines(job: Job, count: int = 5) -> str:
    """The end of what a failed job said, where its error is."""
    lines = [line for line in _said(job).splitlines() if line.strip()]
    return "".join(f"\n    {line}" for line in lines[-count:])


def _decode(plan: Plan, launcher: Launcher, failures: list[str]) -> str:
    from experiments import cell as one

    out = str(plan.out)
    trained = [cell for cell in plan.needed if one.is_trained(cell.config(out))]
    drafting = [cell for cell in trained if cell.config(out).horizon > 1]
    names = {cell.name for cell in trained}

    def is_measured(cell: Cell) -> bool:
        beside = mates(cell, drafting)
        reference = cell.reference.config(out) if cell.reference is not None and cell.reference.name in names else None
        return one.is_measured([cell.config(out)], reference) and beside <= set(
            json.loads((plan.out / cell.name / one.MEASURED).read_bytes())["group"]
        )

    due = [cell for cell in drafting if not is_measured(cell)]
    if not due:
        return "skipped: nothing is left to time"
    due += [cell for cell in trained if cell.config(out).horizon == 1]  # references
    jobs = []
    for group in decode_groups(due, out):
        name = f"decoding-{group.cells[0].name}"
        reference = group.reference.words(out) if group.reference is not None else None
        path = plan.out / "groups" / f"{name}.json"
        write_json(path, {"cells": [cell.words(out) for cell in group.cells], "reference": reference})
        log = path.with_suffix(".log")
        jobs.append(Job(name, ("-m", "experiments.decode_group", str(path)), log, alone=True, logged=_size(log)))

    def ended(job: Job, code: int) -> bool:
        print(f"      {job.name}: {'measured' if code == 0 else f'exit {code}'}", flush=True)
        failure = job.log.with_suffix(f".{FAILED}")
        failure.unlink(missing_ok=True)
        if code:
            note_failure(failure, job, code)
            failures.append(f"{job.name}: exit {code}; see {failure}{_last_lines(job)}")
        return code == 0

    before = len(failures)
    schedule(jobs, launcher, ended)
    return f"{len(jobs)} groups measured, {len(failures) - before} failed"


def _report(plan: Plan) -> str:
    from experiments import cell as one

    written: list[tuple[Config, Path]] = []
    for cell in plan.pending:
        config = cell.config(str(plan.out))
        if one.is_trained(config):
            command = "python experiments/run.py " + " ".join(cell.words(str(plan.out)))
            folder = plan.results / cell.folder
            path = one.write_record(config, command, folder, claim=cell.folder, profile=plan.title)
            written.append((config, path))
    text, figures = one.report(plan.shown or plan.results, plan.out, publish=plan.publish)
    one.log(written, plan.title, plan.out, plan.command, plan.experiment, text, figures)
    print(text, flush=True)
    return f"{len(written)} records written, {len(plan.finished)} were there, of {len(plan.cells)} under {plan.results}"
