"""The stages of a sweep: data, train, decode, report. `experiments/sweep.py` is its command line.

Every stage skips what is complete, so the same sweep continues where a killed one was. A finished cell never runs
again; where its weights are needed (a trunk) they are made again. Where a cell fails the others go on.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cpdlm.config import Config
from cpdlm.files import check_writable, remove_partial, write_json
from cpdlm.progress import Bar
from experiments import tracking
from experiments.report import render
from experiments.scheduler import Job, Launcher, Slurm, schedule
from experiments.suite import Cell, decode_groups, mates
from experiments.sweep_plan import STAGES, Plan, data_settings, other_target, other_text


def run(plan: Plan, launcher: Launcher) -> int:
    """The stages in order. The exit code is 1 where a cell or a group failed; the others are run all the same."""
    failures: list[str] = []
    check_writable(plan.results)
    for folder in {plan.results, *(plan.results / cell.folder for cell in plan.cells)}:
        remove_partial(folder)  # of killed sweeps; runs do so in their own folders
    stages: dict[str, Callable[[], str]] = {
        "data": lambda: _data(plan),
        "train": lambda: _train(plan, launcher, failures),
        "decode": lambda: _decode(plan, launcher, failures),
        "report": lambda: _report(plan, failures),
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
    if plan.title == "smoke" and plan.stages == STAGES and not failures:
        page = _figures(plan) / "report.html"
        print(f"works; these numbers mean nothing; next: ./reproduce.sh --profile cpu, or open {page}")
    return 1 if failures else 0


def _data(plan: Plan) -> str:
    from cpdlm.data.corpus import load_corpus

    made: dict[str, str] = {}
    for cell in plan.needed:
        config = cell.config(str(plan.out))
        key = f"{data_settings(config)}/{config.data.context}"
        if key not in made:
            corpus = load_corpus(config)
            _warn(other_text(plan, config, str(corpus.describe()["sha256"])))
            made[key] = f"{config.corpus} ({config.data.tokenizer}): {len(corpus.train.tokens):,} training tokens"
    return "; ".join(made.values()) or "skipped: nothing is left to run"


def _train(plan: Plan, launcher: Launcher, failures: list[str]) -> str:
    from experiments import cell as one

    pending = {cell.name: cell for cell in plan.needed if not one.is_trained(cell.config(str(plan.out)))}
    if not pending:
        return f"skipped: all {len(plan.cells)} cells are complete"
    for cell in plan.needed:
        if cell.name not in pending:
            _warn(other_target(plan, cell))
    parent = tracking.start_sweep(plan.title, plan.out, plan.command, experiment=plan.experiment).run_id
    track = [f"tracking.experiment={plan.experiment}", *([f"tracking.parent={parent}"] if parent else [])]
    jobs = [_training_job(cell, plan, launcher, track) for cell in pending.values()]
    print(f"      {len(jobs)} cells; each writes {plan.out}/NAME/train.log", flush=True)
    with Bar(total=len(jobs), desc="cells", unit="cell") as bar:

        def ended(job: Job, code: int) -> bool:
            bar.update()
            if code == 0:
                _warn(other_target(plan, pending[job.name]))
                return True
            failures.append(_failure(job, code))
            Bar.write(f"failed: {failures[-1]}", file=sys.stderr)
            return False

        skipped = schedule(jobs, launcher, ended)
    failures += [f"{job.name}: its trunk failed" for job in skipped]
    return f"{len(pending)} cells run for {len(plan.cells)}, {len(failures)} failed"


def _warn(why: str) -> None:
    if why:
        Bar.write(f"warning: {why}", file=sys.stderr)


def _training_job(cell: Cell, plan: Plan, launcher: Launcher, track: list[str]) -> Job:
    from cpdlm.training.checkpoints import exclusive

    folder = plan.out / cell.name
    # Cells of a killed sweep may still be saving here; on a cluster their jobs are found again.
    if not isinstance(launcher, Slurm):
        with exclusive(folder, patience=60):
            pass
    needs = frozenset({cell.trunk.name} if cell.trunk is not None else ())
    return Job(cell.name, train_command(cell, plan, track), folder / "train.log", needs, cell.alone)


def train_command(cell: Cell, plan: Plan, track: list[str]) -> tuple[str, ...]:
    return ("experiments/run.py", *cell.words(str(plan.out)), "--stage=train", *track)


def _decode(plan: Plan, launcher: Launcher, failures: list[str]) -> str:
    from experiments import cell as one

    out = str(plan.out)
    trained = [cell for cell in plan.needed if one.is_trained(cell.config(out))]
    drafting = [cell for cell in trained if cell.config(out).horizon > 1]
    names = {cell.name for cell in trained}

    def is_measured(cell: Cell) -> bool:
        reference = cell.reference.config(out) if cell.reference is not None and cell.reference.name in names else None
        return one.is_measured(cell.config(out), mates(cell, drafting), reference)

    due = [cell for cell in drafting if not is_measured(cell)]
    if not due:
        return "skipped: nothing is left to time"
    due += [cell for cell in trained if cell.config(out).horizon == 1]  # references
    jobs = []
    for group in decode_groups(due, out):
        path = plan.out / "groups" / f"decoding-{group.cells[0].name}.json"
        reference = group.reference.words(out) if group.reference is not None else None
        write_json(path, {"cells": [cell.words(out) for cell in group.cells], "reference": reference})
        argv = ("-m", "experiments.cell", str(path))
        jobs.append(Job(path.stem, argv, path.with_suffix(".log"), alone=True))

    def ended(job: Job, code: int) -> bool:
        print(f"      {job.name}: {'measured' if code == 0 else f'exit {code}'}", flush=True)
        failures.extend([_failure(job, code)] if code else [])
        return code == 0

    before = len(failures)
    schedule(jobs, launcher, ended)
    return f"{len(jobs)} groups measured, {len(failures) - before} failed"


def _report(plan: Plan, failures: list[str]) -> str:
    from cpdlm.training.checkpoints import RunError
    from experiments import cell as one
    from experiments.records import RecordError

    written: list[tuple[Config, Path]] = []
    there = [(cell.config(str(plan.out)), plan.results / cell.folder / f"{cell.name}.json") for cell in plan.cells]
    ran_here = [(config, path) for config, path in there if config.run_name in plan.finished]
    for cell in plan.pending:
        config = cell.config(str(plan.out))
        command = "python experiments/run.py " + " ".join(cell.words(str(plan.out)))
        folder = plan.results / cell.folder
        try:
            if one.is_trained(config):
                path = one.write_record(config, command, folder, claim=cell.folder, profile=plan.title)
                written.append((config, path))
        except (RecordError, RunError) as error:
            failures.append(f"{cell.name}: its record is not written: {error}")
    figures = _figures(plan)
    drawn = render(plan.shown, figures, Path("README.md") if plan.publish else None)
    notes = "".join(f"note: {line}\n" for line in drawn.notes)
    text = (
        f"\n{drawn.text}\n{notes}\nreport: {figures}/report.html\nrecords: {plan.shown}\n"
        f"dashboard: ./dev ui {plan.out}   (MLflow on http://127.0.0.1:5000)"
    )
    # A sweep that was killed here has written records that MLflow lacks.
    _log(plan, [*written, *ran_here], text, [path for path in drawn.files if path.suffix in (".png", ".html")])
    print(text, flush=True)
    return f"{len(written)} records written, {len(plan.finished)} were there, of {len(plan.cells)} under {plan.results}"


def _figures(plan: Plan) -> Path:
    return Path("paper_figures") if plan.publish else plan.out / "figures"


def _log(plan: Plan, records: list[tuple[Config, Path]], text: str, pictures: list[Path]) -> None:
    """Finished records to their MLflow runs; to the sweep's, what the report says and the pictures."""
    parent = tracking.start_sweep(plan.title, plan.out, plan.command, experiment=plan.experiment)
    for config, path in records:
        shown = replace(config.tracking, experiment=plan.experiment, parent=parent.run_id)
        tracking.log_record(replace(config, tracking=shown), path)
    parent.text(f"{text.strip()}\n", "claims.txt")
    where = "The verdicts are under *Artifacts*, in `claims.txt`; the figures are beside it."
    parent.tags({"mlflow.note.content": f"`{plan.command}`. {where}"})
    for picture in pictures:
        parent.figure(picture)
    parent.end()


def _failure(job: Job, code: int) -> str:
    """What became of a job that failed, where it is told, and the end of that, where its error is."""
    said = job.log.read_text(errors="replace").replace("\r", "\n") if job.log.is_file() else ""
    lines = [line for line in said.splitlines() if line.strip()]
    return f"{job.name}: exit {code}; see {job.log}" + "".join(f"\n    {line}" for line in lines[-5:])
